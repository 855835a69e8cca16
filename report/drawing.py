"""Which pictures a run has: they are drawn into its directory, and shown in its report.

A new picture is an entry of PICTURES, a function of pictures.py or trust_pictures.py that draws it,
and its call in `draw_classifier` or `draw_regression`.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from inference.command_line import printable
from inference.files import replacing
from inference.metrics import KEPT, confusion_matrix

# Only functions import pictures.py: matplotlib, which that needs, takes a second or may be missing.


@dataclass(frozen=True)
class Picture:
    """A picture that a run may have."""

    file: str  # in the run's directory
    caption: str  # plain text, shown below it in report.html and read aloud in its place


# In the order in which report.html shows them.
PICTURES = (
    Picture(
        "curves.png",
        "Training metrics are averages over an epoch, with augmentation and label smoothing where "
        "used; losses are those before calibration.",
    ),
    Picture(
        "predicted.png",
        "Predictions on the test split against the true values; points on the line are exact.",
    ),
    Picture(
        "confusion.png",
        "Confusion matrix of the test split, coloured by the share of the true class (row).",
    ),
    Picture(
        "reliability.png",
        "How often answers on the test split are right, by the probability they are given. On the "
        "line, probabilities mean what they say; below, how many images get which probability.",
    ),
    Picture(
        "coverage.png",
        "Accuracy on the test split if only the most probable answers are given; "
        "--min-probability of step 3 calls the others unsure.",
    ),
    Picture(
        "familiar.png",
        f"The output known for the test split and for other kinds of images; --reject {KEPT[0]:g} "
        "of step 3 calls the orange part unknown. Unfamiliar objects that are photographed like "
        "the training images usually look familiar.",
    ),
    Picture(
        "mistakes.png",
        "Wrong predictions on the test split: predicted class, its probability, and true class.",
    ),
    Picture(
        "looked.png",
        "Test images, up to six with right answers and then up to six with wrong ones; orange "
        "marks what counted for the answer. This is a hint at what the network looks at, not a "
        "proof.",
    ),
    Picture(
        "suspects.png",
        "Images whose labels look wrong to networks that were not trained on them, the least "
        "probable labels first; suspects.csv lists all of them.",
    ),
    Picture(
        "duplicates.png",
        "Images that are in the data twice, identical or nearly so: first copies with conflicting "
        "labels, then copies in both the training and the test split.",
    ),
    Picture(
        "samples.png",
        "Training images with their labels, after augmentation, as the network receives them; "
        "cutmix, where it is used, comes after that.",
    ),
)
DUPLICATES = "Images that are in the data twice"
NEAR_DUPLICATES = "Near-copies: images that are in the data nearly twice"
MIXED_DUPLICATES = "Images that are in the data twice, and near-copies"
LOOKED = "Where the network looked: a hint, not a proof"


@dataclass
class Result:
    """What the pictures of a finished run show. Images are uint8."""

    spec: dict
    rows: list[dict]  # of metrics.csv, by column

    # Of the test split: labels [N] and probabilities [N, classes]; for a regression both [N, 1].
    labels: np.ndarray
    outputs: np.ndarray
    images: Sequence | None = None  # [H, W, C] by index, read only if they are drawn

    augmented: tuple[np.ndarray, np.ndarray] | None = None  # images [n, H, W, C] and labels [n]
    duplicates: Sequence[tuple] = ()  # pairs: (image, image, text, text)
    looked: Sequence[tuple] = ()  # pairs: (image, image with what counted in colour, text, text)
    suspects: dict | None = None  # as training/suspects.py finds them


def draw_run(run_dir: str, result: Result) -> list[str]:
    """Draw the pictures of a finished run into its directory and return their paths.

    Raises ImportError without matplotlib, or OSError.
    """
    from report import pictures

    name = run_name(run_dir)
    if result.spec["task"] == "regression":
        subtitle = f"{name} · test loss {mean_squared_error(result):.4g} · {date(result)}"
        drawn = draw_regression(result, subtitle)
    else:
        accuracy = result.spec["test_accuracy"]
        subtitle = f"{name} · test accuracy {accuracy:.2%} · {date(result)}"
        drawn = draw_classifier(result, subtitle)
    drawn["curves.png"] = pictures.curves(subtitle, result.rows)

    # All are drawn before the first is written: without matplotlib, the directory stays as it is.
    paths = []
    for file_name, content in drawn.items():
        path = os.path.join(run_dir, file_name)
        with replacing(path) as file:
            file.write(content)
        paths.append(path)
    return paths


def run_name(run_dir):
    return printable(os.path.basename(os.path.normpath(run_dir)))


def date(result):
    return result.spec["created"][: len("2026-01-02")]


def mean_squared_error(result):
    return ((result.labels - result.outputs) ** 2).mean()


def draw_regression(result: Result, subtitle: str) -> dict[str, bytes]:
    """The pictures, PNG by file name, that only a regression has."""
    from report import pictures

    truths = result.labels[:, 0]
    predictions = result.outputs[:, 0]
    return {"predicted.png": pictures.predicted(subtitle, truths, predictions)}


def draw_classifier(result: Result, subtitle: str) -> dict[str, bytes]:
    """The pictures, PNG by file name, that only a classifier of images has."""
    from report import pictures, trust_pictures

    labels = result.labels
    probabilities = result.outputs
    names = [printable(name) for name in result.spec["classes"]]
    temperature = result.spec.get("temperature")
    counts = confusion_matrix(labels, probabilities.argmax(1), len(names))

    drawn = {
        "confusion.png": pictures.confusion(subtitle, counts, names),
        "mistakes.png": pictures.mistakes(subtitle, result.images, labels, probabilities, names),
        "reliability.png": trust_pictures.reliability(subtitle, labels, probabilities, temperature),
        "coverage.png": trust_pictures.coverage(subtitle, labels, probabilities),
    }
    if result.augmented is not None and len(result.augmented[0]):
        images, image_labels = result.augmented
        drawn["samples.png"] = pictures.samples(subtitle, images, image_labels, names)
    if result.suspects:
        drawn["suspects.png"] = pictures.suspects(subtitle, names=names, **result.suspects)
    if result.duplicates:
        duplicates = with_printable_text(result.duplicates)
        title = title_of_duplicates(duplicates)
        drawn["duplicates.png"] = pictures.pairs(title, subtitle, duplicates)
    if result.looked:
        looked = with_printable_text(result.looked)
        drawn["looked.png"] = pictures.pairs(LOOKED, subtitle, looked)
    return drawn


def title_of_duplicates(pairs):
    """Whether pairs of images are copies or near-copies, which may differ to the eye."""
    are_equal = [np.array_equal(one, other) for one, other, *_ in pairs]
    if all(are_equal):
        return DUPLICATES
    return MIXED_DUPLICATES if any(are_equal) else NEAR_DUPLICATES


def with_printable_text(pairs):
    """Pairs of images whose texts, such as file names, cannot hold control characters."""
    return [
        (one, other, printable(first), printable(second)) for one, other, first, second in pairs
    ]


def draw_familiar(run_dir: str, export: dict[str, dict]) -> None:
    """Draw familiar.png of the first exported file that has the figures, or else remove it.

    export: figures of parity.json by format. Raises OSError.
    """
    path = os.path.join(run_dir, "familiar.png")
    try:
        figures = first_with_familiar(export)
        subtitle = f"{run_name(run_dir)} · {printable(figures.get('file', ''))}"

        # Only now: a report without this picture need not wait for matplotlib.
        from report import trust_pictures

        content = trust_pictures.familiar(subtitle, figures["familiar"])
    except (ImportError, AttributeError, LookupError, TypeError, ValueError):
        # Nothing to draw, no matplotlib, or other figures than the gate's.
        Path(path).unlink(missing_ok=True)
        return

    with replacing(path) as file:
        file.write(content)


def first_with_familiar(export):
    """The figures of the first file that passed and has `familiar`. Raises LookupError."""
    for figures in export.values():
        if figures.get("passed") and figures.get("familiar"):
            return figures
    raise LookupError("no exported file has figures of what looks familiar")
