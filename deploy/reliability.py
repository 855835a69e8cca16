"""How far probabilities can be trusted: calibration error, accuracy against coverage, and unknown images."""

from collections.abc import Iterator

import numpy as np

BINS = 15
DRAWS = 20  # of whether answers are right, for the noise floor
COVERAGES = (0.95, 0.9, 0.8)


def reliability_bins(confidence: np.ndarray, right: np.ndarray, bins: int = BINS) -> np.ndarray:
    """The reliability diagram: mean confidence, accuracy and number of the answers in each bin, [3, bins].

    confidence [n]: the probability of each first answer; right [n]: whether it is. Bins hold equally many
    answers, sorted by confidence (Nixon et al. 2019); there are fewer than `bins` if n is smaller.
    """
    order = np.argsort(confidence, kind="stable")
    parts = [part for part in np.array_split(order, bins) if len(part)]
    columns = [(confidence[part].mean(), right[part].mean(), len(part)) for part in parts]
    return np.array(columns, np.float64).reshape(-1, 3).T


def calibration_error(probabilities: np.ndarray, labels: np.ndarray, bins: int = BINS) -> float:
    """The expected calibration error of probabilities [n, classes] for labels [n], in bins of equal size.

    The mean distance between how often the first answer is right and the probability it is given (Naeini et
    al. 2015; bins of equal size after Nixon et al. 2019).
    """
    return binned_error(*first_answers(probabilities, labels), bins)


def calibration_error_floor(probabilities: np.ndarray) -> float:
    """The calibration error that these probabilities [n, classes] would show if they were perfect.

    It is above 0 because n is finite: the mean over random draws of whether the first answer is right.
    """
    confidence = probabilities.max(1)
    drawn = np.random.default_rng(0).random((DRAWS, len(confidence))) < confidence
    return float(np.mean([binned_error(confidence, right, BINS) for right in drawn]))


def first_answers(probabilities, labels):
    """The probability [n] of each first answer, in float64, and whether it is right [n]."""
    return probabilities.max(1).astype(np.float64), probabilities.argmax(1) == labels


def binned_error(confidence, right, bins):
    mean, accuracy, count = reliability_bins(confidence, right, bins)
    return float((np.abs(accuracy - mean) * count).sum() / len(confidence))


def coverage_curve(probabilities: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Accuracy [n] of the k most probable answers, for k from 1 to n, and the probability [n] of the k-th."""
    confidence, right = first_answers(probabilities, labels)
    order = np.argsort(-confidence, kind="stable")
    return right[order].cumsum() / np.arange(1, len(order) + 1), confidence[order]


def accuracy_at_coverage(probabilities: np.ndarray, labels: np.ndarray) -> dict[str, dict]:
    """For each share of answers, those with the highest probabilities: their accuracy and the lowest one."""
    accuracy, lowest = (curve.tolist() for curve in coverage_curve(probabilities, labels))
    last = {f"{share:g}": max(round(share * len(labels)), 1) - 1 for share in COVERAGES}
    return {share: {"accuracy": accuracy[k], "probability": lowest[k]} for share, k in last.items()}


def with_temperature(probabilities: np.ndarray, temperature: float) -> np.ndarray:
    """Probabilities [n, classes], as they would be if their logits were divided by `temperature` once more.

    The inverse of a temperature undoes it, but for probabilities that float32 rounds to 0.
    """
    logits = np.log(np.maximum(probabilities.astype(np.float64), 1e-38)) / temperature
    powers = np.exp(logits - logits.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


def unknown_kinds(height: int, width: int, channels: int, count: int = 100) -> Iterator[tuple]:
    """Images that no dataset is about, by kind: uint8 [count, height, width, channels]; of plain ones one."""
    rng, shape = np.random.default_rng(0), (count, height, width, channels)
    yield "uniform noise", rng.integers(0, 256, shape, dtype=np.uint8)
    yield "Gaussian noise", np.clip(rng.normal(128, 64, shape), 0, 255).astype(np.uint8)
    yield "smooth blobs", smooth_blobs(rng, shape)
    colours = rng.integers(0, 256, (count, 1, 1, channels), dtype=np.uint8)
    yield "solid colours", np.repeat(np.repeat(colours, height, 1), width, 2)
    yield "black", np.zeros((1, *shape[1:]), np.uint8)
    yield "white", np.full((1, *shape[1:]), 255, np.uint8)


def smooth_blobs(rng, shape):
    """4x4 random levels, enlarged by cosines to [count, height, width, channels], 0 to 255 in each image."""
    count, height, width, channels = shape
    levels, places = rng.random((count, 4, 4, channels)), [np.arange(n)[:, None] for n in (height, width)]
    down, across = (np.cos(np.pi * (place + 0.5) * np.arange(4) / len(place)) for place in places)
    waves = np.einsum("hi,nijc,wj->nhwc", down, 2 * levels - 1, across)
    low, high = waves.min((1, 2, 3), keepdims=True), waves.max((1, 2, 3), keepdims=True)
    return (255 * (waves - low) / np.maximum(high - low, 1e-9)).astype(np.uint8)
