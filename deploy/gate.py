"""The gate between an export and its users: a file passes if it predicts what the network predicts.

The reference is the trained network in eager float32 (deploy/reference.py). Each file is run by the
code of inference/, in batches of 1, 7 and 64, and once more in an isolated process. A tolerance
limits the largest difference of any output; where a regression predicts more than 1, the relative
difference. "What is proven" in README.md lists all tolerances, with reasons. The spec inside the
file must be the network's, too. Speed is only measured.
"""

from collections.abc import Iterator

import numpy as np

from deploy import isolated
from deploy.comparing import Outputs, compare_outputs, predictions, take
from deploy.reference import TrainedRun, reference, seen_by_file
from deploy.speed import measure_latency
from deploy.trust import check_drop, classifier_figures, compare_thresholds, right_answers
from inference.errors import Problem
from inference.predict import Model
from inference.task import task_of

KNOWN_TOLERANCE, INT8_KNOWN_TOLERANCE = 5e-3, 5e-2
ACCURACY_TOLERANCE = 0.005
TIE = 1e-3  # probabilities this close may swap on another machine or in another batch size
TIE_IN_BF16 = 0.05  # the same, if training has evaluated in bfloat16, as it does before its end
SUM_TOLERANCE = 1e-3  # of the probabilities of an int8 file
SELF_TEST_TOLERANCE, INT8_SELF_TEST_TOLERANCE = 1e-4, 2e-2
ISOLATED_SAMPLES = 16
PROBES = 64  # random images of a size; of photos, which take long, fewer
PHOTO_PROBES = 4
LARGE_FEATURE = 1e6
# Keys of the spec that must be alike in the file and in the checkpoint.
SPEC_KEYS = (
    "task",
    "classes",
    "channels",
    "image_size",
    "mean",
    "std",
    "temperature",
    "checkpoint_sha256",
)
# The figures of a file that cannot be run.
NO_FIGURES = {
    "max_abs_diff": None,
    "top1_agreement": None,
    "accuracy": None,
    "samples": 0,
    "warnings": [],
}


# ----------------------------------------------------------------------------------- the test split
def check_reference(trained: TrainedRun, dataset, expected: np.ndarray) -> None:
    """Is this the test split that the run reported on? Raises Problem if it seems to be another.

    expected: the network's probabilities [N, classes] on the test split.
    """
    if list(dataset.classes) != trained.spec["classes"]:
        raise Problem(
            f"the classes of {trained.path} are not those of its dataset: "
            "another dataset, or a changed checkpoint"
        )

    reported = trained.spec["test_accuracy"]
    if reported is None:  # a regression, or a run that --val-fraction left before its end
        return

    accuracy = (expected.argmax(1) == dataset.test_labels).mean()
    ranked = np.sort(expected, axis=1)  # [N, classes], the most probable last
    tie = TIE_IN_BF16 if trained.is_unfinished else TIE
    ties = (ranked[:, -1] - ranked[:, -2] < tie).mean()
    if abs(accuracy - reported) > ACCURACY_TOLERANCE + ties:
        raise Problem(
            f"the network of {trained.path} has {accuracy:.2%} on this test split, "
            f"training reported {reported:.2%}: "
            "another test split (--data-dir), or a changed checkpoint"
        )


# ------------------------------------------------------------------------------------------- probes
def probes(spec: dict) -> Iterator[tuple[str, np.ndarray]]:
    """Inputs that no dataset holds, by name: [N, H, W, channels], or [N, features]."""
    if task_of(spec).has_images:
        return image_probes(spec["image_size"], spec["channels"])
    return feature_probes(spec["channels"])


def feature_probes(count: int) -> Iterator[tuple[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    yield "random", rng.standard_normal((PROBES, count), dtype=np.float32)
    yield "zeros", np.zeros((1, count), np.float32)
    yield "large", np.full((1, count), LARGE_FEATURE, np.float32)


def image_probes(image_size: list[int], channels: int) -> Iterator[tuple[str, np.ndarray]]:
    """Random, black and white images at the network's size and at others."""
    rng = np.random.default_rng(0)
    H, W = image_size
    # Odd sizes and one column of pixels are where resizing goes wrong first.
    sizes = (
        ("native", H, W, PROBES),
        ("twice", 2 * H, 2 * W, PROBES),
        ("larger", 3 * H + 5, 2 * W + 9, PROBES),
        ("smaller", H // 2 + 1, W // 2 + 1, PROBES),
        ("thin", 2 * H + 1, 1, PROBES),
        ("photo", 480, 641, PHOTO_PROBES),
    )
    for name, h, w, count in sizes:
        shape = (count, h, w, channels)
        yield f"random {name} {h}x{w}", rng.integers(0, 256, shape, dtype=np.uint8)
        yield f"black {name} {h}x{w}", np.zeros((1, *shape[1:]), np.uint8)
        yield f"white {name} {h}x{w}", np.full((1, *shape[1:]), 255, np.uint8)


# ------------------------------------------------------------------------------------------- proofs
def prove(
    trained: TrainedRun, file: str, dataset, expected: Outputs, tolerance: float
) -> tuple[dict, list[str]]:
    """Compare a file with the trained network.

    expected: outputs of the reference on the test split. Returns figures for parity.json, and
    failures in words. Raises Problem if step3 cannot run the file.
    """
    exported = Model(file, trained.threads)
    images = dataset.test_images
    got = predictions(exported, images)

    # Of a file that resizes, this is the images themselves.
    given = seen_by_file(trained, exported.spec, images)
    if given is not images:  # resized outside: the network must see the same pixels
        expected = reference(trained, given)

    figures, failures = compare_outputs(expected, got, tolerance, KNOWN_TOLERANCE)
    failures = [f"test split: {failure}" for failure in failures]
    if trained.task.has_images:
        figures |= classifier_figures(trained.spec, exported.spec, got, expected, dataset)
    else:
        figures["warnings"] = []
        figures["accuracy"] = None
        figures["top1_agreement"] = None
        figures["mean_squared_error"] = float(((got.main - dataset.test_labels) ** 2).mean())

    figures["probes"], found = prove_probes(trained, exported, tolerance)
    failures += found

    figures |= measure_latency(exported, images[:1])
    figures["isolated"], found = prove_isolated(trained.spec, file, images, expected, tolerance)
    failures += found
    return figures, check_spec(trained.spec, exported.spec) + failures


def prove_probes(trained: TrainedRun, exported: Model, tolerance: float) -> tuple[dict, list[str]]:
    """Compare the file with the network on probes: figures by probe, and failures in words."""
    figures = {}
    failures = []
    for name, inputs in probes(trained.spec):
        expected = reference(trained, seen_by_file(trained, exported.spec, inputs))
        got = predictions(exported, inputs)
        figures[name], found = compare_outputs(expected, got, tolerance, KNOWN_TOLERANCE)
        failures += [f"{name}: {failure}" for failure in found]
    return figures, failures


def prove_int8(
    trained: TrainedRun, file: str, dataset, expected: Outputs, max_drop: float | None
) -> tuple[dict, list[str]]:
    """The same for an int8 file, which may lose accuracy instead; max_drop: see check_drop()."""
    exported = Model(file, trained.threads)
    images = dataset.test_images
    got = predictions(exported, images)

    # The differences are reported only: 8 bits cannot hold a tolerance of 1e-4.
    figures, _ = compare_outputs(expected, got, tolerance=1.0)
    figures |= classifier_figures(trained.spec, exported.spec, got, expected, dataset)

    before = right_answers(trained.spec, expected, dataset)
    after = right_answers(exported.spec, got, dataset)
    figures["drop"], failures, warnings = check_drop(before, after, max_drop)
    figures["warnings"] += warnings
    failures += compare_thresholds(expected.known, got.known)

    # There is no int8 reference for noise, but a softmax is a softmax.
    for name, inputs in probes(trained.spec):
        sums = predictions(exported, inputs).main.sum(1)
        if not np.allclose(sums, 1, atol=SUM_TOLERANCE):
            failures.append(f"{name}: the probabilities do not add up to 1")

    figures |= measure_latency(exported, images[:1])
    # The isolated process must give what this process gave, not what the network gives.
    figures["isolated"], found = prove_isolated(
        trained.spec, file, images, got, SELF_TEST_TOLERANCE
    )
    failures += found
    return figures, check_spec(trained.spec, exported.spec) + failures


def check_spec(trained_spec: dict, file_spec: dict) -> list[str]:
    """In words: the keys of the file's spec that are not those of the trained network."""
    wrong = [key for key in SPEC_KEYS if file_spec.get(key) != trained_spec.get(key)]
    return [f"spec: the file's {key} are not the network's" for key in wrong]


def prove_isolated(
    spec: dict, file: str, inputs: np.ndarray, expected: Outputs, tolerance: float
) -> tuple[dict, list[str]]:
    """Compare the first inputs again, predicted by a process with only the program and the file."""
    try:
        got = isolated.predict(spec, file, inputs[:ISOLATED_SAMPLES])
    except Problem as problem:
        return {"samples": 0}, [f"isolated: {problem}"]

    first = take(expected, slice(ISOLATED_SAMPLES))
    figures, failures = compare_outputs(first, got, tolerance, KNOWN_TOLERANCE)
    return figures, [f"isolated: {failure}" for failure in failures]
