"""How far a file's answers can be trusted, by the test split: accuracy, calibration, thresholds.

What the test split says of them is a fact about the data: a warning with its figure, and no fault
of the file. Real training and test sets differ.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F

from deploy.comparing import Outputs
from deploy.formats import MAX_DROP
from inference import metrics
from inference.metrics import KEPT

KNOWN_BINS = 20  # of histograms of `known`
DEVIATIONS = 3  # a figure of a sample may be off by so many standard deviations
MARGIN = 0.005  # and a share by this much more
LOSS_DEVIATIONS = 2  # of the accuracy that int8 loses: here a loss is looked for
MUCH_UNSEEN = 0.1  # of the average image: what step1 does not cut away by itself
SMALLEST = 1e-38  # above 0 in float32, so that a logarithm exists
FEW = 500  # images to calibrate on: what they do not show may be as wrong as another test split
DIFFERS = "the test split differs from the training images"
UNCALIBRATED = "; --uncalibrated exports without both outputs"
HINT = DIFFERS + UNCALIBRATED


def classifier_figures(
    trained_spec: dict, file_spec: dict, got: Outputs, expected: Outputs, dataset
) -> dict:
    """What the test split says of a classifier's file: figures, `warnings` in words among them.

    got, expected: the outputs of the file and of the trained network on the test split.
    """
    labels = dataset.test_labels
    figures = {
        "accuracy": float(right_answers(file_spec, got, dataset).mean()),
        "accuracy_trained": float((expected.main.argmax(1) == labels).mean()),
    }
    if not np.isfinite(got.main).all():  # compare_outputs() has found this fault
        return {**figures, "warnings": []}

    promised, warnings = check_promises(trained_spec, got, labels)
    figures |= promised
    figures["warnings"] = warnings + check_fit(trained_spec)
    figures |= calibration_figures(trained_spec, got.main, labels)
    if got.known is not None:
        figures["familiar"] = {"test split": familiarity_figures(got.known)}
    return figures


def check_fit(spec: dict) -> list[str]:
    """A warning, in words, if cropping cuts away much of the images."""
    unseen = spec.get("unseen") or 0
    if unseen <= MUCH_UNSEEN:
        return []
    part = f"{unseen:.0%} of the average image is cut away by --fit {spec['fit']}"
    return [f"{part}, and the network does not see it: step1 has --fit letterbox"]


def right_answers(spec: dict, outputs: Outputs, dataset) -> np.ndarray:
    """Which images of the test split are classified correctly, bool [n].

    By name, as a user reads the answers: a wrong order of the names costs accuracy here.
    """
    answers = np.array(spec["classes"])[outputs.main.argmax(1)]
    truths = np.array(dataset.classes)[dataset.test_labels]
    return answers == truths


def check_promises(spec: dict, got: Outputs, labels: np.ndarray) -> tuple[dict, list[str]]:
    """Does the test split bear out what calibrated outputs promise?

    Returns figures, and warnings in words.
    """
    kept, warnings = check_thresholds(spec, got.known)
    entropy, more_warnings = check_temperature(spec, got.main, labels)
    warnings += more_warnings
    if warnings:
        warnings.append(hint_of(spec))
    return kept | entropy, warnings


def hint_of(spec: dict) -> str:
    """What may be the reason, and the way out."""
    images = (spec.get("calibration") or {}).get("images", FEW)
    if images >= FEW:
        return HINT
    return f"{DIFFERS}, or {images:,} images were too few to calibrate on{UNCALIBRATED}"


def check_thresholds(spec: dict, known: np.ndarray | None) -> tuple[dict, list[str]]:
    """Do thresholds of `known` [n] keep the share of the test split that they promise?

    The share may be off by three deviations of the two samples that it depends on, the test split
    and the held-out images, and by half a point. Returns figures, and warnings in words.
    """
    if known is None or not spec.get("known"):
        return {}, []

    shares = {}
    warnings = []
    for keep in KEPT:
        share = kept_share(known, keep)
        shares[f"{keep:g}"] = share

        variance = keep * (1 - keep) * (1 / len(known) + 1 / spec["known"]["images"])
        if not abs(share - keep) <= DEVIATIONS * math.sqrt(variance) + MARGIN:
            warnings.append(
                f"--reject {keep:g}, which should keep {keep:.0%} of the test split, "
                f"keeps {share:.1%}"
            )
    return {"kept": shares}, warnings


def compare_thresholds(expected: np.ndarray | None, got: np.ndarray | None) -> list[str]:
    """Do thresholds of an int8 file's `known` [n] keep what those of the network keep?

    int8 moves the scores, and the file has a table of its own for them: here a difference is a
    fault, unless so few images cannot show it. Returns failures in words.
    """
    if expected is None or got is None:
        return []

    failures = []
    for keep in KEPT:
        wanted = kept_share(expected, keep)
        share = kept_share(got, keep)
        # A shifted test split has more images near the threshold than the share to keep says.
        variance = max(keep * (1 - keep), wanted * (1 - wanted)) / len(got)
        if not abs(share - wanted) <= DEVIATIONS * math.sqrt(variance) + MARGIN:
            failures.append(
                f"--reject {keep:g} keeps {share:.1%} of the test split, the network's {wanted:.1%}"
            )
    return failures


def check_drop(
    before: np.ndarray, after: np.ndarray, max_drop: float | None
) -> tuple[float, list[str], list[str]]:
    """How much accuracy does an int8 file lose, and is that too much?

    before, after: bool [n], which images of the test split the network and the file classify
    correctly. max_drop: the user's own limit in points; for None it is MAX_DROP, and what chance
    explains on so many images. Returns the points lost, and failures and warnings in words.
    """
    count = len(before)
    lost = int((before & ~after).sum())
    won = int((~before & after).sum())
    drop = round(100 * (lost - won) / count, 3)
    limit = MAX_DROP if max_drop is None else max_drop
    if drop <= limit:
        return drop, [], []

    loses = f"it loses {drop:.2f} points of accuracy ({lost - won:,} of {count:,} images)"
    # If a changed answer were as likely a gain as a loss, this would be the standard deviation.
    deviation = 100 * math.sqrt(lost + won) / count
    if max_drop is None and drop - LOSS_DEVIATIONS * deviation <= limit:
        return (
            drop,
            [],
            [f"{loses}, more than {limit:g}, but so few images may lose that by chance"],
        )

    enough = math.ceil(100 * drop) / 100
    return drop, [f"{loses}, --max-drop allows {limit:g}: --max-drop {enough:g} accepts it"], []


def check_temperature(
    spec: dict, probabilities: np.ndarray, labels: np.ndarray
) -> tuple[dict, list[str]]:
    """Does the temperature make the cross entropy of the test split no worse?

    It may, within three standard errors. Returns figures, and warnings in words.
    """
    if not spec.get("temperature"):
        return {}, []

    # The logarithm of a probability is a logit, up to a constant that softmax removes.
    logits = torch.from_numpy(probabilities).double().clamp(min=SMALLEST).log()
    targets = torch.from_numpy(labels).long()
    after = F.cross_entropy(logits, targets, reduction="none").numpy()  # [n]
    uncalibrated = logits * spec["temperature"]  # undoes the division in the graph
    before = F.cross_entropy(uncalibrated, targets, reduction="none").numpy()

    figures = {}
    worse = after - before
    if np.isfinite(worse).all():
        figures = {"nll": float(after.mean()), "nll_uncalibrated": float(before.mean())}
    if worse.mean() <= DEVIATIONS * worse.std() / math.sqrt(len(labels)):
        return figures, []

    means = f"from {before.mean():.4f} to {after.mean():.4f}"
    return figures, [f"the temperature worsens the cross entropy of the test split, {means}"]


def calibration_figures(spec: dict, probabilities: np.ndarray, labels: np.ndarray) -> dict:
    """Coverage and calibration errors with their noise floors, also as without the temperature."""
    figures = {
        "coverage": metrics.accuracy_at_coverage(probabilities, labels),
        "calibration_error": metrics.calibration_error(probabilities, labels),
        "calibration_error_floor": metrics.calibration_error_floor(probabilities),
    }
    if spec.get("temperature"):
        before = metrics.with_temperature(probabilities, 1 / spec["temperature"])
        figures["calibration_error_uncalibrated"] = metrics.calibration_error(before, labels)
        figures["calibration_error_floor_uncalibrated"] = metrics.calibration_error_floor(before)
    return figures


def familiarity_figures(known: np.ndarray) -> dict:
    """Of images of one kind with `known` [n]: how many there are, the share that a threshold which
    keeps the most of KEPT calls unknown, and how many fall into each bin of `known`.
    """
    histogram, _ = np.histogram(known, KNOWN_BINS, (0, 1))
    return {
        "images": len(known),
        "unknown": float((known < known_threshold(KEPT[0])).mean()),
        "histogram": histogram.tolist(),
    }


def kept_share(known: np.ndarray, keep: float) -> float:
    """The share of images with `known` [n] that --reject `keep` keeps."""
    return float((known >= known_threshold(keep)).mean())


def known_threshold(keep: float) -> np.float32:
    """The least `known` that is kept, as step3 compares: 1 - 0.99 is a little more than 0.01."""
    return np.float32(round(1 - keep, 6))
