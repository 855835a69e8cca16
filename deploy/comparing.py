"""How outputs are compared: a file's with the trained network's, and both with what was promised of them."""

import itertools
import math
import timeit
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from deploy import camera, unknown
from inference import metrics
from inference.predict import Model

BATCHES = (1, 7, 64)
CAMERA_IMAGES = 500  # at most
KEPT = (0.99, 0.95)  # the shares that thresholds of `known` are tried for
KNOWN_BINS = 20  # of histograms of `known`: a threshold that keeps 95 % cuts off the first one


class Outputs(NamedTuple):
    """Probabilities [N, classes], or predictions [N, 1]; and `known` [N], None if there is none."""

    main: np.ndarray
    known: np.ndarray | None


def some(outputs: Outputs, indices) -> Outputs:
    """The outputs of some of the inputs."""
    return Outputs(*(part if part is None else part[indices] for part in outputs))


def predictions(exported: Model, inputs: np.ndarray) -> Outputs:
    """Outputs of a loaded file for inputs [N, ...], in batches of 1, 7, 64, 1, ..., or its only size."""
    parts, sizes = [], itertools.cycle([exported.batch] if exported.batch else BATCHES)
    while len(inputs):
        part, inputs = np.split(inputs, [next(sizes)])
        parts.append(exported.run(part))
    main, known = zip(*parts, strict=True)
    return Outputs(np.concatenate(main), None if known[0] is None else np.concatenate(known))


def compare(expected: Outputs, got: Outputs, tolerance: float, known_tolerance: float | None = None):
    """Figures of one comparison, and the failures among them in words; of `known` only with a tolerance."""
    main = expected.main
    difference = (np.abs(main.astype(np.float64) - got.main) / np.maximum(1, np.abs(main))).max(axis=1)
    finite = np.isfinite(difference)
    difference[~finite] = np.inf  # NaN agrees with nothing
    top, got_top, rows = main.argmax(1), got.main.argmax(1), np.arange(len(main))
    changed = (top != got_top) & (main[rows, top] - main[rows, got_top] > tolerance / 5)
    quantiles = (0.5, 0.9, 0.99) if finite.any() else ()
    figures = {
        "max_abs_diff": float(difference.max()) if finite.all() else None,
        "quantiles": {f"{q:g}": float(np.quantile(difference[finite], q)) for q in quantiles},
        "top1_agreement": float((top == got_top).mean()),
        "samples": len(main),
        "tolerance": tolerance,
    }
    failures = []
    if not difference.max() <= tolerance:
        failures.append(f"outputs differ by up to {difference.max():.1e} (limit {tolerance:.0e})")
    if changed.any():
        failures.append(f"{changed.sum()} of {len(main)} answers changed")
    if known_tolerance and (expected.known is None) != (got.known is None):
        failures.append(f"the file has {'no' if got.known is None else 'an unexpected'} output 'known'")
    elif known_tolerance and got.known is not None:
        moved = float(np.abs(expected.known.astype(np.float64) - got.known).max())  # NaN stays NaN
        figures["known_max_diff"] = moved if math.isfinite(moved) else None
        if not moved <= known_tolerance:
            failures.append(f"known differs by up to {moved:.1e} (limit {known_tolerance:.0e})")
    return figures, failures


def test_figures(spec: dict, exported: Model, got: Outputs, expected: Outputs, dataset):
    """What the test split and unknown images say of a classifier's file: figures, and failures in words.

    spec: the network's; got: the file's outputs on the test split; expected: the network's.
    """
    labels, names = dataset.test_labels, np.array(exported.spec["classes"])
    # By name, as a user reads the answers: a wrong order of the class names costs accuracy here.
    right = names[got.main.argmax(1)] == np.array(dataset.classes)[labels]
    trained = float((expected.main.argmax(1) == labels).mean())
    figures = {"accuracy": float(right.mean()), "accuracy_trained": trained}
    if not np.isfinite(got.main).all():  # a failure of `compare`
        return figures, []
    promised, failures = promises(spec, got, labels)
    figures |= promised | trust(spec, exported, got, labels)
    spread = slice(None, None, -(-len(labels) // CAMERA_IMAGES))  # over the whole split
    changes = camera.survey(exported, dataset.test_images[spread], labels[spread])
    return figures | {"camera": list(changes)}, failures


def promises(spec: dict, got: Outputs, labels: np.ndarray) -> tuple[dict, list[str]]:
    """Does the test split bear out what calibrated outputs promise? Figures, and failures in words.

    A threshold of `known` keeps its share, within three deviations of the two samples it depends on and half
    a point. The temperature makes the cross entropy no worse, within three standard errors.
    """
    figures, failures, n = {}, [], len(labels)
    if got.known is not None and spec.get("known"):
        figures["kept"] = {f"{keep:g}": float((got.known >= threshold(keep)).mean()) for keep in KEPT}
        for keep, kept in zip(KEPT, figures["kept"].values(), strict=True):
            deviation = math.sqrt(keep * (1 - keep) * (1 / n + 1 / spec["known"]["images"]))
            if not abs(kept - keep) <= 3 * deviation + 0.005:
                failures.append(f"a threshold that should keep {keep:.0%} of the test split keeps {kept:.1%}")
    if spec.get("temperature"):
        logits = torch.from_numpy(got.main).double().clamp(min=1e-38).log()
        versions, labels = (logits * spec["temperature"], logits), torch.from_numpy(labels).long()
        before, after = (F.cross_entropy(version, labels, reduction="none").numpy() for version in versions)
        worse = after - before
        if np.isfinite(worse).all():
            figures |= {"nll": float(after.mean()), "nll_uncalibrated": float(before.mean())}
        if not worse.mean() <= 3 * worse.std() / math.sqrt(n):
            means = f"from {before.mean():.4f} to {after.mean():.4f}"
            failures.append(f"the temperature worsens the cross entropy of the test split, {means}")
    hint = "is the test split another kind of images? --uncalibrated exports without both outputs"
    return figures, [*failures, hint] if failures else []


def trust(spec: dict, exported: Model, got: Outputs, labels: np.ndarray) -> dict:
    """How far to trust a file's outputs, on the test split and on unknown images; this decides nothing.

    "familiar" says for each kind of image: how many there were, which share of them a threshold that keeps
    99 % calls unknown, and how many fell into each bin of `known`.
    """
    figures, versions = {"coverage": metrics.accuracy_at_coverage(got.main, labels)}, {"": got.main}
    if spec.get("temperature"):
        versions["_uncalibrated"] = metrics.with_temperature(got.main, 1 / spec["temperature"])
    for suffix, probabilities in versions.items():
        figures[f"calibration_error{suffix}"] = metrics.calibration_error(probabilities, labels)
        figures[f"calibration_error_floor{suffix}"] = metrics.calibration_error_floor(probabilities)
    if got.known is not None:
        kinds = unknown.unknown_kinds(*spec["image_size"], spec["channels"])
        known = {name: predictions(exported, images).known for name, images in kinds}
        figures["familiar"] = {}
        for name, values in {"test split": got.known, **known}.items():
            histogram = np.histogram(values, KNOWN_BINS, (0, 1))[0].tolist()
            kind = {"images": len(values), "unknown": float((values < threshold(KEPT[0])).mean())}
            figures["familiar"][name] = {**kind, "histogram": histogram}
    return figures


def threshold(keep: float) -> np.float32:
    """The least `known` that is kept, as step3 compares: 1 - 0.99 is a little more than 0.01."""
    return np.float32(round(1 - keep, 6))


def latency(exported: Model, image: np.ndarray, repeats: int = 30) -> dict:
    """Milliseconds for one decoded image, on all threads: the median, and the 10th and 90th percentile."""
    times = timeit.repeat(lambda: exported.predict(image), number=1, repeat=repeats)
    low, median, high = (round(1000 * float(value), 4) for value in np.percentile(times, (10, 50, 90)))
    return {"latency_ms": median, "latency_spread": [low, high]}
