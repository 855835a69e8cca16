"""What a person reads of a run: the report, the model card, the figures of each class.

`draw_run` and `write_report` are called by step1 after training, `write_report` once more by step2 after an export:
it reads all it shows back from the files of the run. Everything here is handed plain values and paths.
"""

import os
import re

import numpy as np

MOST_CLASSES = 100  # that the model card lists by name


def per_class(labels, predicted, classes):
    """Precision, recall, F1 and support of each class, from whole numbers [N] and [N] (0 where undefined)."""
    n = len(classes)
    pairs = np.asarray(labels, np.int64) * n + np.asarray(predicted, np.int64)
    counts = np.bincount(pairs, minlength=n * n).reshape(n, n)  # [true, predicted]
    hits, truths, guesses = counts.diagonal(), counts.sum(1), counts.sum(0)
    columns = {
        "precision": hits / np.maximum(guesses, 1),
        "recall": hits / np.maximum(truths, 1),
        "f1": 2 * hits / np.maximum(guesses + truths, 1),
        "support": truths,
    }
    return {name: {key: column[i].item() for key, column in columns.items()} for i, name in enumerate(classes)}


def printable(text):
    """Text from strangers with its control characters and line breaks made visible."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in str(text))


# ------------------------------------------------------------------------------------------------------- pictures


def draw_run(run_dir, spec, rows, labels, outputs, images=None, augmented=None, augmented_labels=None):
    """Draw the pictures of a finished run into its directory. -> their paths.

    spec: the run's; rows: those of metrics.csv, as dicts. Of the test split: labels, whole numbers [N]; outputs, the
    probabilities [N, classes]; images, uint8 by index, of which only the wrongly answered are read. augmented: uint8
    [n, H, W, C] of the training split with their labels [n]. For a regression: labels and outputs are [N, 1], and there
    are no images. Raises ImportError without matplotlib, OSError where a file cannot be written.
    """
    from deploy import pictures  # importing matplotlib takes a second, and it may be missing

    labels, outputs = np.asarray(labels), np.asarray(outputs)
    run = printable(os.path.basename(os.path.normpath(run_dir)))
    drawn = {}
    if spec["task"] == "regression":
        about = f"{run} · test loss {((labels - outputs) ** 2).mean():.4g} · {spec['created'][:10]}"
        drawn["predicted.png"] = pictures.predicted(about, labels[:, 0], outputs[:, 0])
    else:
        about, names = f"{run} · test accuracy {spec['test_accuracy']:.2%} · {spec['created'][:10]}", spec["classes"]
        names = [printable(name) for name in names]
        pairs = labels * len(names) + outputs.argmax(1)
        counts = np.bincount(pairs, minlength=len(names) ** 2).reshape(len(names), -1)
        drawn["confusion.png"] = pictures.confusion(about, counts, names)
        drawn["mistakes.png"] = pictures.mistakes(about, images, labels, outputs, names)
        if augmented is not None and len(augmented):
            drawn["samples.png"] = pictures.samples(about, augmented, np.asarray(augmented_labels), names)
    drawn["curves.png"] = pictures.curves(about, rows)
    for name, content in drawn.items():
        write_whole(os.path.join(run_dir, name), content)
    return [os.path.join(run_dir, name) for name in drawn]


def write_whole(path, content):
    """Write bytes beside `path`, then swap them in."""
    with open(path + ".tmp", "wb") as file:
        file.write(content)
    os.replace(path + ".tmp", path)


# ------------------------------------------------------------------------------------------------------ model card


def model_card(spec, parity):
    """MODEL_CARD.md of an export, as text.

    spec: what the files carry, and with it `per_class` where the figures of each class are known. parity: the contents
    of parity.json, figures by format. Keys that are missing leave their line out.
    """
    regression = spec["task"] == "regression"
    parts = [
        f"# Model card: {markdown(spec['model'])}, trained on {markdown(spec['dataset'])}",
        *(card_regression(spec) if regression else card_classification(spec)),
        card_training(spec),
        card_parity(parity, regression),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def markdown(text):
    """Text from strangers that Markdown takes as it stands."""
    return re.sub(r"([\\`*_{}\[\]<>()#|~!&$])", r"\\\1", printable(text))


def table(head, rows):
    """A Markdown table; the columns after the first are aligned to the right."""
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def card_classification(spec):
    classes, size = spec["classes"], "x".join(map(str, spec["image_size"]))
    names = ", ".join(map(markdown, classes[:MOST_CLASSES]))
    names += f" and {len(classes) - MOST_CLASSES} more (all are in the file)" if len(classes) > MOST_CLASSES else ""
    kind = "RGB" if spec["channels"] == 3 else "grey"
    channels = "3 (red, green, blue)" if spec["channels"] == 3 else "1 (grey)"
    accuracy = spec["test_accuracy"]
    yield f"It tells which of {len(classes)} classes an image shows:\n\n> {names}"
    if accuracy is not None:
        yield (
            f"## How good it is\n\nIt answers {accuracy:.2%} of the test split of `{markdown(spec['dataset'])}` rightly. "
            f"Expect as much only on images of the same origin and kind."
        )
    if spec.get("per_class"):
        rows = [
            [markdown(name), *(f"{row[key]:.1%}" for key in ("precision", "recall", "f1")), f"{row['support']:,}"]
            for name, row in list(spec["per_class"].items())[:MOST_CLASSES]
        ]
        yield table(["class", "precision", "recall", "F1", "test images"], rows)
    yield (
        f"## Input and output\n\n"
        f"- Input `image`: uint8 `[batch, height, width, channels]`, channels = {channels}, values 0 to 255. Any height and "
        f"width: the graph itself resizes to {size} (bilinear, antialiased, the shape squashed) and normalises.\n"
        f"- Output `probabilities`: float32 `[batch, {len(classes)}]`, in the order of the classes.\n"
        f"- Any other program has to decode a file to {kind} as `step3_infer.py` does: EXIF orientation applied, 16 bits "
        f"scaled to 8."
    )
    yield (
        "## Limits\n\n"
        "- It knows these classes only and always answers with one of them, whatever the image shows.\n"
        "- Probabilities are the network's softmax, not calibrated: 0.9 does not mean nine times in ten.\n"
        "- The accuracy holds for data like the test split. Other cameras, light, crops or backgrounds were not measured, "
        "nor was fairness towards groups of people, nor robustness against images made to deceive it.\n"
        "- An image is squashed to the network's size: what is small in a large picture gets lost."
    )


def card_regression(spec):
    yield f"It predicts one number, {markdown(spec['classes'][0])}, from {spec['channels']} features."
    yield (
        f"## Input and output\n\n- Input `features`: float32 `[batch, {spec['channels']}]`.\n"
        f"- Output `prediction`: float32 `[batch, 1]`."
    )
    yield "## Limits\n\n- It was measured on features like those of its test split only; it does not say how sure it is."


def card_training(spec):
    versions = ", ".join(f"{markdown(k)} {markdown(v)}" for k, v in spec["versions"].items())
    rows = [
        ("Network", f"{markdown(spec['model'])}, {spec['parameters']:,} parameters"),
        ("Data", markdown(spec["dataset"])),
        ("Trained", markdown(spec.get("created", ""))),
        ("Exported", markdown(spec.get("exported", ""))),
        ("Versions", versions),
        ("Checkpoint, SHA-256", f"`{spec['checkpoint_sha256']}`" if spec.get("checkpoint_sha256") else ""),
    ]
    return "## Where it comes from\n\n" + table(["", ""], [row for row in rows if row[1]])


def card_parity(parity, regression):
    """The proof's figures for each format that passed, and how to repeat it."""
    rows = []
    for form, figures in parity.items():
        if not figures.get("passed"):
            continue
        accuracy = figures.get("mean_squared_error" if regression else "accuracy")
        agreement = figures.get("top1_agreement")
        rows.append(
            [
                markdown(form),
                f"{figures['samples']:,}",
                f"{figures['max_abs_diff']:.1e}",
                "-" if agreement is None else f"{agreement:.2%}",
                "-" if accuracy is None else f"{accuracy:.3g}" if regression else f"{accuracy:.2%}",
            ]
        )
    head = ["format", "test samples", "largest difference", "same answer", "squared error" if regression else "accuracy"]
    return (
        "## Proof\n\nBefore a file was written, it was run against the trained network over the whole test split, and on "
        "random, black and white inputs:\n\n" + table(head, rows) + "\n\n"
        "The file carries a few samples with the answers expected. Whether another machine computes what the training "
        "machine did, it tells by itself:\n\n    python step3_infer.py --model model.onnx --self-test"
    )
