"""Does this machine compute what the exporting one did? The golden samples inside a file."""

import base64
import io
from dataclasses import dataclass

import numpy as np

from inference.errors import Problem
from inference.images import decode_image
from inference.predict import Model
from inference.spec import MAX_TOLERANCE
from inference.task import task_of

# Of files that do not say: what an output may differ.
TOLERANCE, INT8_TOLERANCE = 1e-4, 2e-2


@dataclass
class SelfTest:
    """samples: how many there were. difference: the largest of an output, relative above 1."""

    samples: int
    difference: float
    passed: bool


def self_test(model: Model) -> SelfTest:
    """Run the golden samples of a file and compare. Raises Problem if they cannot be used."""
    spec = model.spec
    if not spec["golden"]:
        raise Problem("this file carries no golden samples to test with")

    tolerance = spec["self_test_tolerance"]
    if tolerance is None:
        tolerance = INT8_TOLERANCE if "quantization" in spec else TOLERANCE
    tolerance = min(tolerance, MAX_TOLERANCE)
    known_tolerance = 0.0
    if spec["known"]:
        known_tolerance = min(spec["known"]["tolerance"], MAX_TOLERANCE)

    # NaN agrees with nothing: np.max keeps it, and no comparison with it is true.
    differences = []
    known_differences = []
    try:
        for sample in spec["golden"]:
            difference, known_difference = compare_sample(model, sample)
            differences.append(difference)
            known_differences.append(known_difference)
    except (ValueError, KeyError, TypeError, OverflowError, Problem) as error:
        raise Problem(f"this file's golden samples are malformed: {error!r}") from None

    worst = float(np.max(differences))
    passed = worst <= tolerance and np.max(known_differences) <= known_tolerance
    return SelfTest(samples=len(spec["golden"]), difference=worst, passed=bool(passed))


def compare_sample(model: Model, sample: dict) -> tuple[float, float]:
    """How much the outputs for a golden sample, and `known`, differ from those in the file."""
    spec = model.spec
    if task_of(spec).has_images:
        file = io.BytesIO(base64.b64decode(sample["image"]))
        inputs = decode_image(file, spec["channels"])[None]  # [1, H, W, channels]
        expected = sample["probabilities"]
    else:
        inputs = np.array([sample["features"]], np.float32)  # [1, features]
        expected = sample["prediction"]
    expected = np.reshape(expected, (1, len(spec["classes"])))

    outputs, known = model.run(inputs)
    relative = np.abs(outputs - expected) / np.maximum(1, np.abs(expected))
    known_difference = 0.0 if known is None else abs(float(known[0]) - sample["known"])
    return float(np.max(relative)), known_difference
