"""What a finished run has reached: the figures of summary.json."""

import argparse
import math
import statistics
from dataclasses import dataclass
from datetime import datetime, timezone

import numpy as np
import torch
import torch.nn.functional as F

import model
from data import Dataset
from inference import metrics
from training.calibration import Calibration
from training.progress import Evaluation, Progress, is_average

LEARNED = 0.5  # of what the accuracy in training can be above chance, if it has learned much
ONE_OF_TWENTY = 1.645  # deviations that a normal number exceeds one time in twenty


@dataclass(frozen=True)
class Outcome:
    """What a run ends with: its network, and how that does on the test split.

    calibration: None if the run is not calibrated. seconds: spent on training, that of other
    networks for the calibration included.
    """

    deployable: model.Deployable
    evaluated: Evaluation
    calibration: Calibration | None
    seconds: float

    @property
    def outputs(self) -> np.ndarray:
        """Of the test split: calibrated probabilities [n, classes], or predictions [n, 1]."""
        if self.evaluated.accuracy is None:
            return self.evaluated.outputs
        temperature = 1.0
        if self.calibration:
            temperature = self.calibration.temperature
        return probabilities_of(self.evaluated.outputs, temperature)


def probabilities_of(logits: np.ndarray, temperature: float) -> np.ndarray:
    """Probabilities [n, classes] of logits [n, classes]."""
    return (torch.from_numpy(logits) / temperature).softmax(1).numpy()


def summarise(settings: argparse.Namespace, progress: Progress, outcome: Outcome) -> dict:
    """The figures that every run has."""
    parameters = outcome.deployable.network.parameters()
    epoch_kept = settings.epochs
    if progress.best:
        epoch_kept = progress.best["epoch"]
    return {
        "dataset": settings.dataset,
        "model": settings.model,
        "epochs": settings.epochs,
        "test_accuracy": outcome.evaluated.accuracy,
        "test_loss": outcome.evaluated.loss,
        "train_seconds": round(outcome.seconds, 3),
        "parameters": sum(parameter.numel() for parameter in parameters),
        "seed": settings.seed,
        "epoch_kept": epoch_kept,
        "averaged_with_twin": is_average(progress),
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def summarise_classes(dataset: Dataset, outcome: Outcome) -> dict:
    """The figures that a run on classes has besides: of calibration, leaks, and each class."""
    labels = dataset.test_labels
    logits = outcome.evaluated.outputs  # [n, classes]
    figures = {}
    if outcome.calibration:
        figures |= figures_of_calibration(logits, labels, outcome)
    figures["unseen"] = dataset.unseen
    figures["calibration_error"] = metrics.calibration_error(outcome.outputs, labels)
    figures["calibration_error_floor"] = metrics.calibration_error_floor(outcome.outputs)

    predicted = logits.argmax(1)
    leaked = dataset.findings.leaked  # bool [n]: test images that are also in the training split
    if leaked.any():
        right = predicted == labels
        figures["test_images_in_train"] = int(leaked.sum())
        figures["test_accuracy_without_them"] = None
        if not leaked.all():
            figures["test_accuracy_without_them"] = float(right[~leaked].mean())

    rows = metrics.per_class(labels, predicted, dataset.classes)
    seen = [row for row in rows.values() if row["support"]]
    figures["balanced_accuracy"] = statistics.fmean(row["recall"] for row in seen)
    figures["macro_f1"] = statistics.fmean(row["f1"] for row in seen)
    figures["per_class"] = rows
    return figures


def find_warnings(dataset: Dataset, outcome: Outcome, train_accuracy: float) -> list[str]:
    """What makes the result worthless, in words: empty for almost all runs.

    train_accuracy: from 0 to 1, in the epoch that is kept.
    """
    labels = dataset.test_labels
    predicted = outcome.evaluated.outputs.argmax(1)
    counts = np.bincount(labels, minlength=len(dataset.classes))
    frequent = dataset.classes[counts.argmax()]
    chance = counts.max() / len(labels)  # the accuracy of always answering the most frequent class

    warnings = []
    has_learned = chance < 1 and train_accuracy - chance >= LEARNED * (1 - chance)
    accuracy = float((predicted == labels).mean())
    if has_learned and accuracy < train_accuracy and is_chance(labels, predicted, counts):
        warnings.append(
            f"{train_accuracy:.1%} of the training images are answered right, but only "
            f"{accuracy:.1%} of the {len(labels):,} test images, which may be chance (always "
            f"answering {frequent!r} gets {chance:.1%}): what was learned does not hold for new "
            "images; check that both splits are labelled alike, and train on more images"
        )

    answers = np.unique(predicted)
    if len(answers) == 1 and np.count_nonzero(counts) > 1:
        answer = dataset.classes[answers[0]]
        same = f"all {len(labels):,} test images are answered {answer!r}"
        warnings.append(f"{same}: the network does not tell the classes apart")
    return warnings


def is_chance(labels: np.ndarray, predicted: np.ndarray, counts: np.ndarray) -> bool:
    """Are answers [n] no better than those of who does not look at the images?

    labels: [n]; counts: of them, [classes]. Such answers have the accuracy of the most frequent
    class at most, and a balanced accuracy of one class among all. Both are exceeded by chance one
    time in twenty, by the normal approximation of the binomial distribution.
    """
    count = len(labels)
    most = counts.max() / count
    limit = most + ONE_OF_TWENTY * math.sqrt(most * (1 - most) / count) + 0.5 / count
    if (predicted == labels).mean() > limit:
        return False

    # Classes that were not tested are left out. The recall of a class is then the share of answers
    # that name it.
    seen = counts > 0
    shares = np.bincount(predicted, minlength=len(counts))[seen] / count
    variances = shares * (1 - shares) / counts[seen]
    limit = shares.mean() + ONE_OF_TWENTY * math.sqrt(variances.sum()) / seen.sum()
    return metrics.balanced_accuracy(labels, predicted) <= limit + 1e-9


def figures_of_calibration(logits: np.ndarray, labels: np.ndarray, outcome: Outcome) -> dict:
    """What calibrating has changed, for logits [n, classes] and labels [n]."""
    temperature = outcome.calibration.temperature
    calibrated = torch.from_numpy(logits) / temperature
    loss = F.cross_entropy(calibrated, torch.from_numpy(labels).long()).item()
    uncalibrated = probabilities_of(logits, temperature=1.0)
    return {
        "temperature": temperature,
        "test_loss_uncalibrated": outcome.evaluated.loss,
        "test_loss": loss,
        "calibration_error_uncalibrated": metrics.calibration_error(uncalibrated, labels),
    }
