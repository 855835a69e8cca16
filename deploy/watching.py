"""What an exported file says for --monitor: how it answers images that it was not trained on."""

import numpy as np

from deploy.comparing import Outputs
from inference.drift import LEVELS
from inference.predict import DECIMALS


def monitor_reference(outputs: Outputs, labels: np.ndarray, source: str) -> dict | None:
    """`monitor` of a spec, from the outputs of its file for images and their labels [n].

    source: where the images came from, in words. None if the outputs are not finite.
    """
    probabilities = outputs.main.astype(np.float64)
    if not len(labels) or not np.isfinite(probabilities).all():
        return None
    # Rounded and clipped, as the answers are that they are compared with.
    largest = probabilities.max(1).round(DECIMALS).clip(0, 1)  # [n]
    answers = probabilities.argmax(1)
    known = np.zeros(len(labels))
    known_edges = np.array([])
    if outputs.known is not None:
        known = outputs.known.astype(np.float64).round(DECIMALS).clip(0, 1)
        known_edges = edges(known)
    probability_edges = edges(largest)

    rows = np.searchsorted(known_edges, known, side="right")
    columns = np.searchsorted(probability_edges, largest, side="right")
    counts = np.zeros((len(known_edges) + 1, len(probability_edges) + 1), np.int64)
    np.add.at(counts, (rows, columns), 1)

    right = int((answers == labels).sum())
    return {
        "source": source,
        "images": len(labels),
        "accuracy": right / len(labels),
        "threshold": threshold_of_estimate(largest, right),
        "known": known_edges.tolist(),
        "probability": probability_edges.tolist(),
        "counts": counts.tolist(),
        "answers": np.bincount(answers, minlength=probabilities.shape[1]).tolist(),
    }


def edges(values: np.ndarray) -> np.ndarray:
    """The edges of bins that the values [n] fall into in the shares of LEVELS."""
    return np.unique(np.quantile(values, LEVELS).round(DECIMALS))


def threshold_of_estimate(largest: np.ndarray, right: int) -> float:
    """The threshold that the `right` largest probabilities [n] exceed, as nearly as ties allow.

    The share of answers above it estimates the accuracy where there are no labels (Garg et al.
    2022, average thresholded confidence).
    """
    # A threshold is one of the values, or 0, which all exceed.
    candidates = np.append(0.0, np.unique(largest))
    above = len(largest) - np.searchsorted(np.sort(largest), candidates, side="right")
    return float(candidates[np.abs(above - right).argmin()])
