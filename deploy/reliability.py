"""How far probabilities can be trusted: calibration error, and accuracy against coverage."""

import numpy as np

BINS = 15


def calibration_error(probabilities: np.ndarray, labels: np.ndarray, bins: int = BINS) -> float:
    """The expected calibration error of probabilities [n, classes] for labels [n], in bins of equal size.

    The mean distance between how often the first answer is right and the probability it is given (Naeini et
    al. 2015; bins of equal size after Nixon et al. 2019).
    """
    confidence, right = probabilities.max(1), probabilities.argmax(1) == labels
    order = np.argsort(confidence, kind="stable")
    parts = [part for part in np.array_split(order, bins) if len(part)]
    return float(
        sum(abs(right[part].mean() - confidence[part].mean()) * len(part) for part in parts) / len(labels)
    )
