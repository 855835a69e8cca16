"""A model in words and figures: MODEL_CARD.md, precision and recall of each class, the confusion matrix."""

import math
import re
import string
from pathlib import Path

import numpy as np

from inference.command_line import printable
from inference.engines import MODEL_NAMES
from inference.metrics import BINS

FITS = {
    "stretch": "without keeping the aspect ratio",
    "crop": "keeping the shape and the middle of the image",
    "letterbox": "keeping the shape, between black bars",
}
CLASSES_LISTED = 100  # by name; a card names no more


def formatted(value: object, style: str, unit: str = "") -> str:
    """A number in this format, with its unit; a dash for anything that is not a number."""
    try:
        return format(value, style) + unit
    except (TypeError, ValueError, OverflowError):
        return "-"


def cells(figures: dict, **styles: str) -> list[str]:
    """The figures of these names, each `formatted` in its style."""
    return [formatted(figures.get(name), style) for name, style in styles.items()]


def counted(number: int, noun: str) -> str:
    """A number with its noun in the singular or plural: 1 epoch, 1,000 epochs."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def threshold(probability: float) -> str:
    """A probability, rounded down, so that a threshold of it still lets through what has it."""
    return f"{math.floor(1e4 * probability) / 1e4:g}"


def needs(device: dict[str, int]) -> str:
    """In words what one image needs in float32, see deploy/device.py."""
    weights, activations = (f"{4e-6 * device[name]:,.2f} MB of {name}" for name in ("weights", "activations"))
    return f"{weights}, {activations}, {1e-6 * device['multiply_adds']:,.1f} M multiply-adds"


def busy(figures: dict) -> str | None:
    """In words: other work slowed the latency down. None if the 90th percentile is within twice the 10th."""
    try:
        low, high = map(float, figures.get("latency_spread"))
    except (TypeError, ValueError):
        return None
    return f"busy machine: {high / low:.3g}x spread of the latency" if 0 < 2 * low < high else None


# ------------------------------------------------------------------------------------------------- model card
def model_card(spec: dict, parity: dict[str, dict]) -> str:
    """MODEL_CARD.md of an export.

    spec: what the files contain, with `per_class` if the figures of each class are known. parity: the
    contents of parity.json, figures by format. A line whose figure is missing is left out.
    """
    passed = {figures.get("file", name): figures for name, figures in parity.items() if figures.get("passed")}
    sections = [f"# Model card: {markdown(spec['model'])}, trained on {markdown(spec['dataset'])}"]
    if spec["task"] == "regression":
        features, target = counted(spec["channels"], "feature"), markdown(spec["classes"][0])
        about = {"features": features, "target": target, "channels": spec["channels"]}
        sections.append(filled("card.regression.md.template", **about).rstrip())
    else:
        sections += [*describe_classes(spec), describe_images(spec), *describe_trust(spec, passed)]
    return "\n\n".join([*sections, provenance_section(spec), parity_section(passed)])


def filled(template: str, **values: object) -> str:
    """The text of a template in this directory."""
    return string.Template(Path(__file__).with_name(template).read_text(encoding="utf-8")).substitute(values)


def markdown(text: object) -> str:
    """Untrusted text with the characters escaped that mean something to Markdown."""
    return re.sub(r"([\\`*_{}\[\]<>()#|~!&$])", r"\\\1", printable(str(text)))


def without_empty_columns(head: list[str], rows: list[list[str]]) -> tuple[list, list]:
    """The head and rows of a table without the columns that contain only dashes."""
    keep = [k for k in range(len(head)) if any(row[k] != "-" for row in rows)]
    return [head[k] for k in keep], [[row[k] for k in keep] for row in rows]


def markdown_table(head, rows):
    """A Markdown table; the columns after the first are aligned to the right."""
    head, rows = without_empty_columns(head, rows)
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def describe_classes(spec):
    classes, accuracy = spec["classes"], spec.get("test_accuracy")
    names, more = ", ".join(map(markdown, classes[:CLASSES_LISTED])), len(classes) - CLASSES_LISTED
    names += f", and {more:,} more, which the model file lists" if more > 0 else ""
    yield f"An image classifier with {len(classes):,} classes: {names}"
    if accuracy is not None:
        dataset = markdown(spec["dataset"])
        yield f"## Accuracy\n\nThe top-1 accuracy on the test split of {dataset} is {accuracy:.2%}."
    per_class = spec.get("per_class", {})
    seen = [figures for figures in per_class.values() if figures["support"]]
    if seen:
        recall, f1 = (np.mean([figures[key] for figures in seen]) for key in ("recall", "f1"))
        yield f"Averaged over the classes, the recall (balanced accuracy) is {recall:.2%}, the F1 {f1:.2%}."
    styles = {"precision": ".1%", "recall": ".1%", "f1": ".1%", "support": ","}
    if per_class:
        rows = [[markdown(name), *cells(figures, **styles)] for name, figures in per_class.items()]
        yield markdown_table(["class", "precision", "recall", "F1", "test images"], rows[:CLASSES_LISTED])


def describe_images(spec):
    known = "- Output `known`: float32 `[batch]`, how familiar the image looks, 0 to 1.\n"
    return filled(
        "card.md.template",
        size="x".join(map(str, spec["image_size"])),
        channels="3 channels (red, green, blue)" if spec["channels"] == 3 else "1 channel (grey)",
        classes=len(spec["classes"]),
        known=known if spec.get("known") else "",
        fit=FITS[spec.get("fit") or "stretch"],
        device=needs(spec["device"]),
    ).rstrip()


def describe_trust(spec, passed):
    made, temperature = spec.get("calibration"), spec.get("temperature")
    yield "## How far to trust the probabilities"
    if temperature and made:
        images, source = counted(made["images"], "image"), markdown(made["source"])
        yield (
            f"The probabilities are calibrated by a temperature of {temperature:.3g}, which was fitted on\n"
            f"{images} outside the test split (source: {source})."
        )
    else:
        yield "The probabilities are softmax outputs, not calibrated: 0.9 does not mean that 90% are right."
    measured = {file: figures for file, figures in passed.items() if figures.get("coverage")}
    if measured:
        yield describe_calibration(measured)
    if spec.get("known"):
        yield describe_known(measured)
    if any(figures.get("camera") for figures in measured.values()):
        yield "Test images, changed as cameras change them, were classified as follows."
        rows = camera_rows([figures["camera"] for figures in measured.values()], accuracy=".1%")
        yield markdown_table(["change", *measured], rows)
    options = {"--reject": spec.get("reject"), "--min-probability": spec.get("min_probability")}
    thresholds = [f"`{option} {value:g}`" for option, value in options.items() if value is not None]
    if thresholds:
        yield f"Unless they are told otherwise, the programs use {' and '.join(thresholds)}."
    else:
        yield "Unless they are given a threshold, the programs name a class for every image."


def describe_calibration(measured):
    styles = {"calibration_error": ".2%", "calibration_error_floor": ".2%", "nll": ".4f"}
    file, first = next(iter(measured.items()))
    if "calibration_error_uncalibrated" in first:
        before = {key: first.get(f"{key}_uncalibrated") for key in styles}
        measured = {"before calibration": before, **measured}
    rows = [[name, *cells(figures, **styles)] for name, figures in measured.items()]
    head = ["on the test split", "calibration error", "noise floor", "cross entropy"]
    texts = {"errors": markdown_table(head, rows), "bins": BINS, "file": file}
    rows = [["100%", *cells(first, accuracy=".2%"), "-"]]
    for share, found in first["coverage"].items():
        rows.append([f"{float(share):.0%}", f"{found['accuracy']:.2%}", threshold(found["probability"])])
    coverage = markdown_table(["answered", "right", "lowest probability"], rows)
    return filled("card.calibration.md.template", **texts, coverage=coverage).rstrip()


def describe_known(measured):
    kept, kinds = ([figures[key] for figures in measured.values()] for key in ("kept", "familiar"))
    rows = [[f"by `--reject {x}`", *(f"{share[x]:.1%}" for share in kept)] for x in ("0.99", "0.95")]
    kept = markdown_table(["kept of the test split", *measured], rows)
    unknown = {name: [f"{kind[name]['unknown']:.0%}" for kind in kinds] for name in kinds[0]}
    del unknown["test split"]
    rows = [[name, f"{kinds[0][name]['images']:,}", *shares] for name, shares in unknown.items()]
    unknown = markdown_table(["called unknown by `--reject 0.99`", "images", *measured], rows)
    return filled("card.known.md.template", kept=kept, unknown=unknown).rstrip()


def camera_rows(measured: list[list[dict]], **styles: str) -> list[list[str]]:
    """The rows of a table of everyday changes: the figures of each file, in these styles, by change."""
    rows = []
    for changes in zip(*measured, strict=True):
        figures = [cell for change in changes for cell in cells(change, **styles)]
        rows.append([f"{changes[0]['change']} {changes[0]['strength']}", *figures])
    return rows


def provenance_section(spec):
    pretrained, checkpoint = spec.get("arguments", {}).get("pretrained"), spec.get("checkpoint_sha256")
    versions = [f"{markdown(name)} {markdown(value)}" for name, value in spec["versions"].items()]
    facts = {
        "Network": f"{markdown(spec['model'])}, {counted(spec['parameters'], 'parameter')}",
        "Dataset": markdown(spec["dataset"]),
        "Initial weights": markdown(f"pretrained ({pretrained})") if pretrained else None,
        "Trained": spec.get("created"),
        "Versions": ", ".join(versions),
        "Checkpoint": f"SHA-256 `{checkpoint}`" if checkpoint else None,
    }
    lines = [f"- {name}: {fact}" for name, fact in facts.items() if fact]
    lines.append("- The licences of the dataset and of pretrained weights are not recorded here.")
    return "## Provenance\n\n" + "\n".join(lines)


def parity_section(passed):
    styles = {"samples": ",", "max_abs_diff": ".1e", "top1_agreement": ".2%", "accuracy": ".2%"}
    styles["mean_squared_error"] = ".3g"
    rows = [[file, *cells(figures, **styles)] for file, figures in passed.items()]
    head = "file,test samples,largest difference,top-1 agreement,accuracy,mean squared error".split(",")
    notes = "".join(int8_note(figures) for figures in passed.values() if figures.get("quantization"))
    file = next((name for name in MODEL_NAMES if name in passed), "model.onnx")
    return filled("card.parity.md.template", table=markdown_table(head, rows), notes=notes, file=file)


def int8_note(figures):
    speed = "not faster" if "warning" in figures else "faster"  # figures would make bundles of one run differ
    how, drop = markdown(figures["quantization"]), formatted(figures.get("drop"), ".2f")
    return filled("card.int8.md.template", how=how, drop=drop, speed=speed)
