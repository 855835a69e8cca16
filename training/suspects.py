"""Images whose labels look wrong, by the predictions of networks that did not train on these images.

Those are the test split, and what the calibration has: a validation split, a part held out, or what the twin
has not seen. An image is suspected if another class is as probable as it is for images of that class on
average (the thresholds of confident learning, Northcutt et al. 2021) and its label is improbable; the first
have the least probable label. Nothing is changed or deleted.
"""

import numpy as np

from data.notes import note
from training import runs

SUSPECTS = "suspects.csv"
DOUBTFUL = 0.05  # the probability below which a label is
COLUMNS = ("image", "label", "suggested", "probability_of_label", "probability_of_suggested")


def find_suspects(trainer, probabilities: np.ndarray) -> dict | None:
    """Write suspects.csv if there are any: their images, labels [n] and probabilities [n, classes].

    probabilities: of the test split, [N, classes]. Raises CannotWrite.
    """
    dataset, calibration = trainer.dataset, trainer.calibration
    images, labels = [("test", row) for row in range(len(probabilities))], dataset.test_labels
    if calibration:
        split = "train" if dataset.val_images is None else "val"
        rows = calibration.judged.tolist()
        images += [(split, row) for row in rows]
        labels = np.concatenate([labels, getattr(dataset, f"{split}_labels")[rows]])
        probabilities = np.concatenate([probabilities, calibration.probabilities])
    given = probabilities[np.arange(len(labels)), labels]
    counts = np.maximum(np.bincount(labels, minlength=probabilities.shape[1]), 1)
    usual = np.bincount(labels, given, probabilities.shape[1]) / counts
    guesses, most = probabilities.argmax(1), probabilities.max(1)
    found = np.flatnonzero((guesses != labels) & (most >= usual[guesses]) & (given < DOUBTFUL))
    found = found[np.argsort(given[found], kind="stable")]
    if not len(found):
        return None
    table, names = [COLUMNS], dataset.classes
    for k in found:
        split, row = images[k]
        path = dataset.paths[split][row] if dataset.paths else f"{split} image {row}"
        table.append([path, names[labels[k]], names[guesses[k]], f"{given[k]:.6f}", f"{most[k]:.6f}"])
    runs.write_table(trainer.run, SUSPECTS, table, end="\r\n")
    note(f"images whose labels look wrong: {len(found):,}, listed in {trainer.run}/{SUSPECTS}")
    shown = [getattr(dataset, f"{split}_images")[row] for split, row in (images[k] for k in found[:25])]
    return {"images": shown, "labels": labels[found], "probabilities": probabilities[found]}
