"""Images whose labels look wrong, by the predictions of networks that did not train on these
images.

Those are the test split, and what the calibration has: a validation split, a part held out, or what
the twin has not seen. An image is suspected if another class is as probable as it is for images of
that class on average (the thresholds of confident learning, Northcutt et al. 2021) and its label is
improbable; the first have the least probable label. Nothing is changed or deleted.
"""

from dataclasses import dataclass

import numpy as np

from data import Dataset
from data.notes import note
from training import runs
from training.calibration import Calibration

SUSPECTS = "suspects.csv"
DOUBTFUL = 0.05  # the probability below which a label is
SHOWN = 25  # images in the report
GOOD_JUDGE = 0.8  # accuracy; a network below finds more mistakes of its own than of the labels
COLUMNS = ("image", "label", "suggested", "probability_of_label", "probability_of_suggested")


@dataclass(frozen=True)
class Judged:
    """Images and what a network that did not train on them says.

    places: the split of each and its row there; labels: whole numbers [n]; probabilities: [n,
    classes].
    """

    places: list[tuple[str, int]]
    labels: np.ndarray
    probabilities: np.ndarray


def find_suspects(
    run_dir: str, dataset: Dataset, probabilities: np.ndarray, calibration: Calibration | None
) -> dict | None:
    """Write suspects.csv if there are any: their images, labels [n] and probabilities [n, classes].

    probabilities: of the test split, [N, classes]. Raises CannotWrite.
    """
    judged = judged_images(dataset, probabilities, calibration)
    rows = doubtful_rows(judged.labels, judged.probabilities)
    if not len(rows):
        return None

    table = [COLUMNS]
    table += [describe(dataset, judged, row) for row in rows]
    runs.write_table(run_dir, SUSPECTS, table, end="\r\n")
    found = f"images whose labels look wrong: {len(rows):,}, listed in {run_dir}/{SUSPECTS}"
    right = (judged.probabilities.argmax(1) == judged.labels).mean()
    if right < GOOD_JUDGE:
        found += f"; the network is right about only {right:.0%}, so many may be its own mistakes"
    note(found)

    images = []
    for row in rows[:SHOWN]:
        split, index = judged.places[row]
        images.append(dataset.images_of(split)[index])
    return {
        "images": images,
        "labels": judged.labels[rows],
        "probabilities": judged.probabilities[rows],
    }


def judged_images(
    dataset: Dataset, probabilities: np.ndarray, calibration: Calibration | None
) -> Judged:
    """The test split, with its probabilities, and the images of the calibration."""
    places = [("test", row) for row in range(len(probabilities))]
    labels = dataset.test_labels
    if calibration:
        split = "train" if dataset.val_images is None else "val"
        rows = calibration.judged.tolist()
        places += [(split, row) for row in rows]
        labels = np.concatenate([labels, dataset.labels_of(split)[rows]])
        probabilities = np.concatenate([probabilities, calibration.probabilities])
    return Judged(places=places, labels=labels, probabilities=probabilities)


def doubtful_rows(labels: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """The rows of labels [n] and probabilities [n, classes] that are suspected, the worst first."""
    classes = probabilities.shape[1]
    given = probabilities[np.arange(len(labels)), labels]  # [n], of the label

    # What is usual for a class: the mean probability of the images that are labelled so.
    counts = np.maximum(np.bincount(labels, minlength=classes), 1)
    usual = np.bincount(labels, given, classes) / counts  # [classes]

    guesses = probabilities.argmax(1)
    most = probabilities.max(1)
    is_doubtful = (guesses != labels) & (most >= usual[guesses]) & (given < DOUBTFUL)
    rows = np.flatnonzero(is_doubtful)
    return rows[np.argsort(given[rows], kind="stable")]


def describe(dataset: Dataset, judged: Judged, row: int) -> list[str]:
    """The line of suspects.csv for an image."""
    split, index = judged.places[row]
    label = judged.labels[row]
    probabilities = judged.probabilities[row]  # [classes]
    guess = probabilities.argmax()
    return [
        dataset.name_of(split, index),
        dataset.classes[label],
        dataset.classes[guess],
        f"{probabilities[label]:.6f}",
        f"{probabilities[guess]:.6f}",
    ]
