"""How good answers are: accuracy, figures of each class, calibration error, coverage.

numpy only: what training reports is computed by the code that evaluates on the device.
"""

import math
from collections.abc import Sequence

import numpy as np

from inference.spec import DECIMALS

BINS = 15  # of the reliability diagram
DRAWS = 100  # of whether answers are right, for the noise floor
COVERAGES = (0.95, 0.9, 0.8)
KEPT = (0.99, 0.95)  # the shares that --reject is tried with; reports show the first
NORMAL_95 = 1.959964  # deviations around a normal mean that hold 95 %
SMALLEST = 1e-38  # above 0 in float32, so that a logarithm exists


# ------------------------------------------------------------------------------------------ classes
def confusion_matrix(labels: Sequence[int], predicted: Sequence[int], classes: int) -> np.ndarray:
    """Counts, int64 [true class, predicted class], of whole numbers [n] and [n] below `classes`."""
    pairs = np.asarray(labels, np.int64) * classes + np.asarray(predicted, np.int64)
    return np.bincount(pairs, minlength=classes * classes).reshape(classes, classes)


def per_class(
    labels: Sequence[int], predicted: Sequence[int], classes: Sequence[str]
) -> dict[str, dict]:
    """{class: {"precision", "recall", "f1", "support"}} of whole numbers [n] and [n].

    support: the number of images of the class. A figure that is not defined is 0.
    """
    counts = confusion_matrix(labels, predicted, len(classes))
    hits = counts.diagonal()  # [classes], as the next two
    truths = counts.sum(1)
    guesses = counts.sum(0)

    precision = hits / np.maximum(guesses, 1)
    recall = hits / np.maximum(truths, 1)
    f1 = 2 * hits / np.maximum(guesses + truths, 1)

    figures = {}
    for number, name in enumerate(classes):
        figures[name] = {
            "precision": precision[number].item(),
            "recall": recall[number].item(),
            "f1": f1[number].item(),
            "support": truths[number].item(),
        }
    return figures


def balanced_accuracy(labels: np.ndarray, predicted: np.ndarray) -> float:
    """The mean recall of the classes that occur; labels and predicted: whole numbers [n]."""
    counts = np.bincount(labels)
    hits = np.bincount(labels, labels == predicted, len(counts))
    occurs = counts > 0
    return float((hits[occurs] / counts[occurs]).mean())


def wilson_interval(hits: int, count: int) -> tuple[float, float]:
    """The 95 % interval of a share, of which `hits` of `count` were counted (Wilson 1927)."""
    share = hits / count
    spread = NORMAL_95**2 / count
    centre = (share + spread / 2) / (1 + spread)
    half = math.sqrt(share * (1 - share) * spread + spread**2 / 4) / (1 + spread)
    return max(centre - half, 0.0), min(centre + half, 1.0)


# ------------------------------------------------------------------------------------ probabilities
def first_answers(probabilities: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The confidence of each first answer, float64 [n], and whether it is right, bool [n].

    probabilities: [n, classes]; labels: [n].
    """
    confidence = probabilities.max(1).astype(np.float64)
    return confidence, probabilities.argmax(1) == labels


def reliability_bins(confidence: np.ndarray, right: np.ndarray, bins: int = BINS) -> np.ndarray:
    """The reliability diagram: mean confidence, accuracy and number of answers, [3, bins].

    confidence [n]: the probability of each first answer; right [n]: whether it is. Bins hold
    equally many answers, sorted by confidence (Nixon et al. 2019); there are fewer than `bins` if n
    is smaller. Confidence is rounded as predictions are, and answers of one confidence share their
    accuracy: so the answers of a device, in any order, give the same figures.
    """
    confidence = np.round(confidence, DECIMALS)
    _, group, sizes = np.unique(confidence, return_inverse=True, return_counts=True)
    right = (np.bincount(group, right) / sizes)[group]

    order = np.argsort(confidence, kind="stable")
    columns = []
    for part in np.array_split(order, bins):
        if len(part):
            columns.append((confidence[part].mean(), right[part].mean(), len(part)))
    return np.array(columns, np.float64).reshape(-1, 3).T


def binned_error(confidence: np.ndarray, right: np.ndarray, bins: int = BINS) -> float:
    """The mean distance between confidence and accuracy over reliability_bins()."""
    mean, accuracy, count = reliability_bins(confidence, right, bins)
    return float((np.abs(accuracy - mean) * count).sum() / len(confidence))


def calibration_error(probabilities: np.ndarray, labels: np.ndarray, bins: int = BINS) -> float:
    """The expected calibration error of probabilities [n, classes] for labels [n].

    The mean distance between how often the first answer is right and the probability it is given
    (Naeini et al. 2015), in bins of equal size (Nixon et al. 2019).
    """
    confidence, right = first_answers(probabilities, labels)
    return binned_error(confidence, right, bins)


def calibration_error_floor(probabilities: np.ndarray) -> float:
    """The calibration error that perfect probabilities [n, classes] would show.

    It is above 0 because n is finite: the mean over random draws of whether the first answer is
    right.
    """
    return binned_error_floor(probabilities.max(1).astype(np.float64))


def binned_error_floor(confidence: np.ndarray) -> float:
    """calibration_error_floor() by the confidences [n] alone, in any order."""
    confidence = np.sort(np.round(confidence, DECIMALS))
    rng = np.random.default_rng(0)
    errors = []
    for _ in range(DRAWS):
        right = rng.random(len(confidence)) < confidence
        errors.append(binned_error(confidence, right))
    return float(np.mean(errors))


def coverage_curve(probabilities: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Accuracy [n] of the k most probable answers, for k from 1 to n, and the k-th probability."""
    confidence, right = first_answers(probabilities, labels)
    order = np.argsort(-confidence, kind="stable")
    accuracy = right[order].cumsum() / np.arange(1, len(order) + 1)
    return accuracy, confidence[order]


def accuracy_at_coverage(probabilities: np.ndarray, labels: np.ndarray) -> dict[str, dict]:
    """{share: {"accuracy", "probability"}} of the most probable answers, for each of COVERAGES.

    probability: the lowest among them.
    """
    accuracy, lowest = coverage_curve(probabilities, labels)
    figures = {}
    for share in COVERAGES:
        last = max(round(share * len(labels)), 1) - 1
        figures[f"{share:g}"] = {
            "accuracy": accuracy[last].item(),
            "probability": lowest[last].item(),
        }
    return figures


def with_temperature(probabilities: np.ndarray, temperature: float) -> np.ndarray:
    """Probabilities [n, classes], as if their logits were divided by `temperature` once more.

    The inverse of a temperature undoes it, but for probabilities that float32 rounds to 0.
    """
    logits = np.log(np.maximum(probabilities.astype(np.float64), SMALLEST)) / temperature
    powers = np.exp(logits - logits.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)
