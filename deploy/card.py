"""What is said of a model in words and figures: MODEL_CARD.md, and precision and recall of each class."""

import re

import numpy as np

FILES = {"onnx": "model.onnx", "torchscript": "model.pt", "onnx-int8": "model.int8.onnx", "pt2": "model.pt2"}
MOST_CLASSES = 100  # that are listed by name


def printable(text):
    """Text from strangers with its control characters and line breaks made visible."""
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in str(text)
    )


def shown(value, form, unit=""):
    """A number in this format; a dash for what is none."""
    try:
        return format(value, form) + unit
    except (TypeError, ValueError, OverflowError):
        return "-"


def count_pairs(labels, predicted, n):
    """How often each of n classes was taken for which, [true, predicted], from whole numbers [N] and [N]."""
    pairs = np.asarray(labels, np.int64) * n + np.asarray(predicted, np.int64)
    return np.bincount(pairs, minlength=n * n).reshape(n, n)


def per_class(labels, predicted, classes):
    """Precision, recall, F1 and support of each class, from whole numbers [N] and [N] (0 where undefined)."""
    counts = count_pairs(labels, predicted, len(classes))
    hits, truths, guesses = counts.diagonal(), counts.sum(1), counts.sum(0)
    columns = {
        "precision": hits / np.maximum(guesses, 1),
        "recall": hits / np.maximum(truths, 1),
        "f1": 2 * hits / np.maximum(guesses + truths, 1),
        "support": truths,
    }
    return {
        name: {key: column[i].item() for key, column in columns.items()} for i, name in enumerate(classes)
    }


def model_card(spec, parity):
    """MODEL_CARD.md of an export, as text.

    spec: what the files carry, and with it `per_class` where the figures of each class are known. parity: the contents
    of parity.json, figures by format. What is missing leaves its line out.
    """
    kind = card_regression if spec["task"] == "regression" else card_classification
    title = f"# Model card: {markdown(spec['model'])}, trained on {markdown(spec['dataset'])}"
    return "\n\n".join([title, *kind(spec), card_origin(spec), card_proof(parity)]) + "\n"


def markdown(text):
    """Text from strangers that Markdown takes as it stands."""
    return re.sub(r"([\\`*_{}\[\]<>()#|~!&$])", r"\\\1", printable(text))


def without_empty(head, rows):
    """The head and rows of a table without the columns that hold nothing but dashes."""
    keep = [k for k in range(len(head)) if any(row[k] != "-" for row in rows)]
    return [head[k] for k in keep], [[row[k] for k in keep] for row in rows]


def table(head, rows):
    """A Markdown table; the columns after the first are aligned to the right."""
    head, rows = without_empty(head, rows)
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def card_classification(spec):
    classes, accuracy = spec["classes"], spec.get("test_accuracy")
    names, more = ", ".join(map(markdown, classes[:MOST_CLASSES])), len(classes) - MOST_CLASSES
    names += f", and {more:,} more, which the file names" if more > 0 else ""
    yield f"It tells which of {len(classes):,} classes an image shows: {names}"
    if accuracy is not None:
        data = markdown(spec["dataset"])
        yield f"## How good it is\n\nIt answers {accuracy:.2%} of the test split of {data} rightly."
    if figures := spec.get("per_class"):
        rows = [
            [
                markdown(name),
                *(shown(row[key], ".1%") for key in ("precision", "recall", "f1")),
                f"{row['support']:,}",
            ]
            for name, row in list(figures.items())[:MOST_CLASSES]
        ]
        yield table(["class", "precision", "recall", "F1", "test images"], rows)
    size = "x".join(map(str, spec["image_size"]))
    channels = "3 (red, green, blue)" if spec["channels"] == 3 else "1 (grey)"
    yield (
        "## Input and output\n\n"
        f"- Input `image`: uint8 `[batch, height, width, channels]`, channels {channels}, values 0 to 255, any height\n"
        f"  and width. The graph resizes to {size} (bilinear, antialiased, without keeping the shape) and normalises.\n"
        f"- Output `probabilities`: float32 `[batch, {len(classes)}]`, in the order of the classes.\n"
        "- Files are decoded before: EXIF orientation applied, 16 bits scaled to 8, as `step3_infer.py` does it."
    )
    yield (
        "## Limits\n\n"
        "- It knows these classes only and always answers with one of them, whatever the image shows.\n"
        "- Probabilities are the network's softmax and not calibrated: 0.9 does not mean right nine times in ten.\n"
        "- The accuracy was measured on images like those it learned from. Other cameras, light and surroundings,\n"
        "  fairness towards groups of people, and images made to deceive were not measured.\n"
        f"- What is too small to be seen at {size} is not seen."
    )


def card_regression(spec):
    yield f"It predicts one number, {markdown(spec['classes'][0])}, from {spec['channels']} features."
    yield (
        f"## Input and output\n\n- Input `features`: float32 `[batch, {spec['channels']}]`.\n"
        "- Output `prediction`: float32 `[batch, 1]`."
    )
    yield "## Limits\n\n- It was measured on features like those of its test split only, and never says how sure it is."


def card_origin(spec):
    started, checkpoint = spec.get("arguments", {}).get("pretrained"), spec.get("checkpoint_sha256")
    lines = {
        "Network": f"{markdown(spec['model'])}, {spec['parameters']:,} parameters",
        "Data": markdown(spec["dataset"]),
        "Started from": markdown(f"pretrained weights ({started})") if started else None,
        "Trained": spec.get("created"),
        "Exported": spec.get("exported"),
        "Versions": ", ".join(
            f"{markdown(name)} {markdown(value)}" for name, value in spec["versions"].items()
        ),
        "Checkpoint": f"SHA-256 `{checkpoint}`" if checkpoint else None,
    }
    lines = [f"- {name}: {value}" for name, value in lines.items() if value]
    lines.append("- Licences of the data and of weights started from are not recorded here.")
    return "## Where it comes from\n\n" + "\n".join(lines)


def card_proof(parity):
    """The proof's figures for each format that passed, and how to repeat it."""
    passed = {form: figures for form, figures in parity.items() if figures.get("passed")}
    rows = []
    for form, figures in passed.items():
        row = [
            FILES.get(form, form),
            shown(figures.get("samples"), ","),
            shown(figures.get("max_abs_diff"), ".1e"),
        ]
        row += [shown(figures.get(key), ".2%") for key in ("top1_agreement", "accuracy")]
        rows.append([*row, shown(figures.get("mean_squared_error"), ".3g")])
    head = ["file", "test samples", "largest difference", "same answer", "accuracy", "squared error"]
    notes = ""
    if int8 := passed.get("onnx-int8"):
        method, drop = markdown(int8.get("quantization")), shown(int8.get("drop"), ".2f")
        notes = f"{FILES['onnx-int8']} is quantized ({method}): as good, not equal; it loses {drop} points of accuracy.\n\n"
    name = next((name for form, name in FILES.items() if form in passed), "model.onnx")
    return (
        "## Proof\n\nBefore it was let out, each file was run against the trained network over all test samples:\n\n"
        f"{table(head, rows)}\n\n{notes}A few samples with the answers expected are in the file. To see whether a\n"
        f"machine computes what the training machine did:\n\n    python step3_infer.py --model {name} --self-test"
    )
