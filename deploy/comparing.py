"""How the outputs of two engines are compared, and how an exported file is run for that."""

import itertools
import math
from typing import NamedTuple

import numpy as np

from inference.predict import Model

BATCH_SIZES = (1, 7, 64)  # taken in turn
QUANTILES = (0.5, 0.9, 0.99)
TIE = 0.2  # of the tolerance: answers whose probabilities differ by less may swap


class Outputs(NamedTuple):
    """Probabilities [N, classes], or predictions [N, 1]; and `known` [N], None if there is none."""

    main: np.ndarray
    known: np.ndarray | None


def take(outputs: Outputs, indices) -> Outputs:
    """The outputs of the inputs at these indices, or in this slice."""
    known = None if outputs.known is None else outputs.known[indices]
    return Outputs(outputs.main[indices], known)


def join(parts: list[Outputs]) -> Outputs:
    """The outputs of batches that follow one another."""
    main = np.concatenate([part.main for part in parts])
    if parts[0].known is None:
        return Outputs(main, None)
    return Outputs(main, np.concatenate([part.known for part in parts]))


def predictions(exported: Model, inputs: np.ndarray) -> Outputs:
    """Outputs of a loaded file for inputs [N, ...]. Raises Problem.

    They run in batches of 1, 7, 64, 1, ..., or in the only batch size that the file takes.
    """
    # Single images and small batches take other paths through an engine than large ones.
    sizes = itertools.cycle([exported.batch] if exported.batch else BATCH_SIZES)
    parts = []
    start = 0
    while start < len(inputs):
        size = next(sizes)
        parts.append(Outputs(*exported.run(inputs[start : start + size])))
        start += size
    return join(parts)


def compare_outputs(
    expected: Outputs, got: Outputs, tolerance: float, known_tolerance: float | None = None
) -> tuple[dict, list[str]]:
    """Figures of one comparison for parity.json, and the failures among them in words.

    `known` is compared only if there is a tolerance for it.
    """
    differences = relative_differences(expected.main, got.main)
    changed = changed_answers(expected.main, got.main, TIE * tolerance)
    figures = difference_figures(differences) | {
        "top1_agreement": float((expected.main.argmax(1) == got.main.argmax(1)).mean()),
        "samples": len(differences),
        "tolerance": tolerance,
    }

    failures = []
    # `not <=` rather than `>`, so that NaN is a failure.
    if not differences.max() <= tolerance:
        failures.append(f"outputs differ by up to {differences.max():.1e} (limit {tolerance:.0e})")
    if changed:
        failures.append(f"{changed} of {len(differences)} answers changed")

    # Of int8 files `known` is not compared: they have a table of their own.
    if known_tolerance is not None:
        known_figures, known_failures = compare_known(expected.known, got.known, known_tolerance)
        figures |= known_figures
        failures += known_failures
    return figures, failures


def relative_differences(expected: np.ndarray, got: np.ndarray) -> np.ndarray:
    """The largest difference [N] of each input's outputs [N, n], relative to outputs above 1.

    NaN and infinity agree with nothing: their difference is infinite.
    """
    scale = np.maximum(1, np.abs(expected))  # [N, n]
    differences = (np.abs(expected.astype(np.float64) - got) / scale).max(axis=1)
    differences[~np.isfinite(differences)] = np.inf
    return differences


def difference_figures(differences: np.ndarray) -> dict:
    """The largest difference, None if it is infinite, and quantiles of those that are finite."""
    finite = differences[np.isfinite(differences)]
    quantiles = {}
    if len(finite):
        quantiles = {f"{q:g}": float(np.quantile(finite, q)) for q in QUANTILES}
    is_finite = len(finite) == len(differences)
    return {
        "max_abs_diff": float(differences.max()) if is_finite else None,
        "quantiles": quantiles,
    }


def changed_answers(expected: np.ndarray, got: np.ndarray, tie: float) -> int:
    """How many first answers changed that were not within `tie` of each other."""
    rows = np.arange(len(expected))
    top = expected.argmax(1)  # [N]
    got_top = got.argmax(1)
    # By how much the network prefers its own answer over that of the file, [N].
    lead = expected[rows, top] - expected[rows, got_top]
    return int(((top != got_top) & (lead > tie)).sum())


def compare_known(
    expected: np.ndarray | None, got: np.ndarray | None, tolerance: float
) -> tuple[dict, list[str]]:
    """Figures and failures of `known` [N]."""
    if expected is None and got is None:
        return {}, []
    if got is None:
        return {}, ["the file has no output 'known'"]
    if expected is None:
        return {}, ["the file has an unexpected output 'known'"]

    largest = float(np.abs(expected.astype(np.float64) - got).max())
    figures = {"known_max_diff": largest if math.isfinite(largest) else None}
    if largest <= tolerance:
        return figures, []
    return figures, [f"known differs by up to {largest:.1e} (limit {tolerance:.0e})"]
