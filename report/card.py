"""MODEL_CARD.md: a model in words and figures, for people who decide where it may be used."""

from collections.abc import Iterator

import numpy as np

from inference.engines import MODEL_NAMES
from inference.metrics import BINS, KEPT
from inference.spec import data_name
from report.promises import HEAD, promise_cells
from report.text import (
    MISSING,
    camera_table,
    cells,
    counted,
    device_needs,
    filled,
    formatted,
    markdown,
    markdown_table,
    merged_if_equal,
    rounded_down,
)

FITS = {
    "stretch": "without keeping the aspect ratio",
    "crop": "keeping the aspect ratio and the middle of the image",
    "letterbox": "keeping the aspect ratio, between black bars",
}
CLASSES_LISTED = 100  # by name; a card names no more


def model_card(spec: dict, parity: dict[str, dict]) -> str:
    """The text of MODEL_CARD.md of an export.

    spec: what the files contain, with `per_class` if the figures of each class are known.
    parity: the contents of parity.json, figures by format. A line whose figure is missing is left
    out.
    """
    passed = {}
    for name, figures in parity.items():
        if figures.get("passed"):
            file = figures.get("file", name)
            passed[file] = figures

    sections = [f"# Model card: {markdown(spec['model'])}, trained on {markdown(data_name(spec))}"]
    if spec["task"] == "regression":
        sections.append(describe_regression(spec))
    else:
        sections += describe_classes(spec)
        sections.append(describe_images(spec))
        sections += describe_trust(spec, passed)
    sections.append(provenance_section(spec))
    sections.append(parity_section(passed))
    return "\n\n".join(sections)


def describe_regression(spec: dict) -> str:
    return filled(
        "card.regression.md.template",
        features=counted(spec["channels"], "feature"),
        target=markdown(spec["classes"][0]),
        channels=spec["channels"],
    ).rstrip()


# ----------------------------------------------------------------------------- classes and accuracy
def describe_classes(spec: dict) -> Iterator[str]:
    """The paragraphs that say what the classes are, and how accurate the network is on each."""
    classes = spec["classes"]
    names = ", ".join(markdown(name) for name in classes[:CLASSES_LISTED])
    if len(classes) > CLASSES_LISTED:
        names += f", and {len(classes) - CLASSES_LISTED:,} more, which the model file lists"
    yield f"An image classifier with {len(classes):,} classes: {names}"

    accuracy = spec.get("test_accuracy")
    if accuracy is not None:
        dataset = markdown(data_name(spec))
        yield f"## Accuracy\n\nThe top-1 accuracy on the test split of {dataset} is {accuracy:.2%}."

    per_class = spec.get("per_class")
    if per_class:
        yield from describe_each_class(per_class)


def describe_each_class(per_class: dict[str, dict]) -> Iterator[str]:
    # A class without test images has no recall that could count in the average.
    seen = [figures for figures in per_class.values() if figures["support"]]
    if seen:
        recall = np.mean([figures["recall"] for figures in seen])
        f1 = np.mean([figures["f1"] for figures in seen])
        averages = f"recall (balanced accuracy) is {recall:.2%} and F1 is {f1:.2%}"
        yield f"Averaged over the classes, {averages}."

    styles = {"precision": ".1%", "recall": ".1%", "f1": ".1%", "support": ","}
    rows = []
    for name, figures in list(per_class.items())[:CLASSES_LISTED]:
        rows.append([markdown(name), *cells(figures, styles)])
    yield markdown_table(["class", "precision", "recall", "F1", "test images"], rows)


def describe_images(spec: dict) -> str:
    channels = "1 channel (grey)"
    if spec["channels"] == 3:  # what decoding makes of any file; the spec allows 1 or 3
        channels = "3 channels (red, green, blue)"

    known = ""
    if spec.get("known"):
        known = "- Output `known`: float32 `[batch]`, how familiar the image looks, 0 to 1.\n"

    unseen = ""
    if spec.get("unseen"):
        part = f"{spec['unseen']:.1%} of the average image of the dataset"
        unseen = f"- Cropping cuts away {part}, which the network does not see.\n"

    height, width = spec["image_size"]
    return filled(
        "card.md.template",
        size=f"{height}x{width}",
        channels=channels,
        classes=len(spec["classes"]),
        known=known,
        unseen=unseen,
        fit=FITS[spec.get("fit") or "stretch"],
        device=device_needs(spec["device"]),
    ).rstrip()


# ------------------------------------------------------------------------- how far to trust outputs
def describe_trust(spec: dict, passed: dict[str, dict]) -> Iterator[str]:
    """The paragraphs that say how far to trust the outputs.

    passed: figures of parity.json by file.
    """
    yield "## How far to trust the probabilities"
    yield describe_temperature(spec)

    measured = {file: figures for file, figures in passed.items() if figures.get("coverage")}
    if measured:
        yield describe_calibration(measured)
    # A file for microcontrollers has no output `known`.
    with_known = {file: figures for file, figures in measured.items() if "kept" in figures}
    if spec.get("known") and with_known:
        yield describe_known(with_known)

    on_camera = {}
    for file, figures in measured.items():
        if figures.get("camera"):
            on_camera[file] = figures["camera"]
    if on_camera:
        yield "Accuracy on some test images after changes that cameras make:"
        files, rows = camera_table(on_camera, {"accuracy": ".1%"})
        yield markdown_table(["change", *(file or "accuracy" for file in files)], rows)

    yield describe_thresholds(spec)
    promised = {file: figures for file, figures in passed.items() if figures.get("promises")}
    if promised:
        yield describe_promises(promised)


def describe_temperature(spec: dict) -> str:
    """Whether the probabilities are calibrated, and on what."""
    temperature = spec.get("temperature")
    calibration = spec.get("calibration")
    if not (temperature and calibration):
        return (
            "The probabilities are softmax outputs, not calibrated: "
            "0.9 does not mean that 90% are right."
        )

    images = counted(calibration["images"], "image")
    source = markdown(calibration["source"])
    made = f"with a temperature of {temperature:.3g}, which was fitted on"
    on = f"{images} outside the test split (source: {source})"
    return f"The probabilities are calibrated {made}\n{on}."


def describe_thresholds(spec: dict) -> str:
    """The thresholds that are built into the files, which the command line can override."""
    thresholds = []
    if spec.get("reject") is not None:
        thresholds.append(f"`--reject {spec['reject']:g}`")
    if spec.get("min_probability") is not None:
        thresholds.append(f"`--min-probability {spec['min_probability']:g}`")

    if not thresholds:
        return "Without a threshold, the programs name a class for every image."
    return f"By default, the programs use {' and '.join(thresholds)}."


def describe_promises(promised: dict[str, dict]) -> str:
    """What each file promises, and how that held on the test split."""
    rows = []
    for file, figures in promised.items():
        for promise in figures["promises"]:
            rows.append([file, *map(markdown, promise_cells(promise))])
    first = next(iter(promised.values()))["promises"][0]
    return filled(
        "card.promises.md.template",
        confidence=f"{first['confidence']:.0%}",
        images=counted(first["images"], "image"),
        source=markdown(first["source"]),
        table=markdown_table(["file", *HEAD], rows),
    ).rstrip()


def describe_calibration(measured: dict[str, dict]) -> str:
    """The calibration error of each file, and the accuracy of the first at several coverages."""
    first_file, first = next(iter(measured.items()))
    return filled(
        "card.calibration.md.template",
        errors=calibration_table(measured),
        bins=BINS,
        file=first_file,
        coverage=coverage_table(first),
    ).rstrip()


def calibration_table(measured):
    styles = {"calibration_error": ".2%", "calibration_error_floor": ".2%", "nll": ".4f"}
    rows = []

    # Before calibration all files are alike: the figures of the first stand for them.
    first = next(iter(measured.values()))
    if "calibration_error_uncalibrated" in first:
        before = {name: first.get(f"{name}_uncalibrated") for name in styles}
        rows.append(["before calibration", *cells(before, styles)])

    for file, figures in measured.items():
        rows.append([file, *cells(figures, styles)])
    head = ["on the test split", "calibration error", "noise floor", "cross entropy"]
    return markdown_table(head, rows)


def coverage_table(figures):
    # All answers have no lowest probability: nothing is left out.
    rows = [["100%", formatted(figures.get("accuracy"), ".2%"), MISSING]]
    for share, found in figures["coverage"].items():
        accuracy = f"{found['accuracy']:.2%}"
        rows.append([f"{float(share):.0%}", accuracy, rounded_down(found["probability"])])
    return markdown_table(["answered", "right", "lowest probability"], rows)


def describe_known(measured: dict[str, dict]) -> str:
    """How much `known` keeps of the test split, and how much of other kinds it calls unknown."""
    return filled(
        "card.known.md.template",
        reject=f"{KEPT[0]:g}",
        share=f"{KEPT[0]:.0%}",
        kept=kept_table(measured),
        unknown=unknown_table(measured),
    ).rstrip()


def kept_table(measured):
    rows = []
    for keep in KEPT:
        shares = [f"{figures['kept'][f'{keep:g}']:.1%}" for figures in measured.values()]
        rows.append([f"by `--reject {keep:g}`", *shares])
    return markdown_table(["share of the test split kept", *measured], rows)


def unknown_table(measured):
    first = next(iter(measured.values()))
    kinds = [kind for kind in first["familiar"] if kind != "test split"]  # that is in kept_table

    columns = {}
    for file, figures in measured.items():
        columns[file] = [f"{figures['familiar'][kind]['unknown']:.0%}" for kind in kinds]
    columns = merged_if_equal(columns)

    rows = []
    for number, kind in enumerate(kinds):
        images = f"{first['familiar'][kind]['images']:,}"
        rows.append([kind, images, *(column[number] for column in columns.values())])
    called_unknown = f"called unknown by `--reject {KEPT[0]:g}`"
    head = [called_unknown, "images", *(file or "share" for file in columns)]
    return markdown_table(head, rows)


# ------------------------------------------------------------------------------ where it comes from
def provenance_section(spec: dict) -> str:
    network = f"{markdown(spec['model'])}, {counted(spec['parameters'], 'parameter')}"
    versions = []
    for name, version in spec["versions"].items():
        versions.append(f"{markdown(name)} {markdown(version)}")

    dataset = data_name(spec)
    if dataset != spec["dataset"]:
        dataset = f"{dataset}, read as {spec['dataset']}"

    lines = [
        "## Provenance",
        "",
        f"- Network: {network}",
        f"- Dataset: {markdown(dataset)}",
    ]
    pretrained = spec.get("arguments", {}).get("pretrained")
    if pretrained:
        lines.append(f"- Initial weights: {markdown(f'pretrained ({pretrained})')}")
    if spec.get("created"):
        lines.append(f"- Trained: {markdown(spec['created'])}")
    if versions:
        lines.append(f"- Versions: {', '.join(versions)}")
    if spec.get("checkpoint_sha256"):
        lines.append(f"- Checkpoint: SHA-256 `{spec['checkpoint_sha256']}`")
    lines.append("- The licences of the dataset and of pretrained weights are not recorded here.")
    return "\n".join(lines)


def parity_section(passed: dict[str, dict]) -> str:
    """How far the outputs of each file are from the network's, and how to test another machine."""
    columns = {  # key of parity.json: (title, style)
        "samples": ("test samples", ","),
        "max_abs_diff": ("largest difference", ".1e"),
        "top1_agreement": ("top-1 agreement", ".2%"),
        "accuracy": ("accuracy", ".2%"),
        "mean_squared_error": ("mean squared error", ".3g"),
    }
    head = ["file", *(title for title, _ in columns.values())]
    styles = {key: style for key, (_, style) in columns.items()}
    rows = [[file, *cells(figures, styles)] for file, figures in passed.items()]

    notes = ""
    for file, figures in passed.items():
        # Facts about the data: they stop no export, and whoever uses the file should know them.
        for warning in figures.get("warnings", ()):
            notes += f"- Warning, {file}: {markdown(warning)}\n"
    if notes:
        notes += "\n"
    for figures in passed.values():
        if figures.get("model_bytes"):
            notes += micro_note(figures)
        elif figures.get("quantization"):
            notes += quantization_note(figures)

    # MODEL_NAMES lists the file first that step3 prefers. Old figures name formats, not files.
    files = [name for name in passed if name.startswith("model.")]
    to_test = next((name for name in (*MODEL_NAMES, *files) if name in passed), "model.onnx")
    return filled(
        "card.parity.md.template",
        table=markdown_table(head, rows),
        notes=notes,
        file=to_test,
    )


def micro_note(figures):
    """What a microcontroller needs for its file. The arena is None where it was not measured."""
    arena = "an arena of unknown size"
    if figures["arena"] is not None:
        arena = f"an arena of {figures['arena']:,} bytes"
    return filled(
        "card.micro.md.template",
        how=markdown(figures["quantization"]),
        flash=f"{figures['model_bytes']:,}",
        arena=arena,
        runtime=markdown(figures["runtime"]),
        images=counted(figures["samples"], "test image"),
        drop=formatted(figures.get("drop"), ".2f"),
        operators=", ".join(figures["operators"]),
    )


def quantization_note(figures):
    # In words: bundles of one run are equal to the byte, and a measured speed never repeats.
    speed = "faster"
    if "warning" in figures:
        speed = "not faster"
    return filled(
        "card.int8.md.template",
        how=markdown(figures["quantization"]),
        drop=formatted(figures.get("drop"), ".2f"),
        speed=speed,
    )
