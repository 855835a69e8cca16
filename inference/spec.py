"""What the spec inside an exported file says: its keys, their types and their meaning.

A new key is a line in Spec; if older files lack it, a line in DEFAULTS; if this program relies on
it, a line in RULES; and a line in deploy/README.md.
"""

import json
import math
import os
from collections.abc import Callable
from typing import TypedDict

from inference.errors import Problem
from inference.task import TASKS

SCHEMA = 1  # the newest that this program understands
KNOWN_TOLERANCE = 5e-3  # of `known` in the self-test, in files that do not say
DECIMALS = 6  # of probabilities and of `known`, in results and in comparisons with thresholds
OWN_IMAGES = ("folder", "csv")  # of `dataset`: images with a name of their own

# Limits that no file of step2_export.py reaches. The C++ program and the page have the same.
MAX_BYTES = 32 << 20  # of the spec's text
MAX_DEPTH = 16  # of lists and objects inside each other
MAX_WHOLE = 1 << 53  # which JavaScript still counts exactly
MAX_NAME = 256  # characters of a class name
MAX_GOLDEN = 64  # samples
MAX_SIDE = 4096  # pixels that the network sees, as in step1
MAX_BATCH = 1024
MAX_PROMISES = 1024
MAX_FIXED_VALUES = 1 << 28  # of the only input size of a file of fixed size
MAX_EDGES = 100  # of the bins that --monitor counts images in
MAX_TOLERANCE = 5e-2  # of the self-test: more would pass anything


class Known(TypedDict):
    """How `known` was made: see model.Familiarity."""

    layers: list[str]  # whose outputs it looks at
    images: int  # how many held-out images an image is compared with
    tolerance: float  # largest difference that the self-test allows


class Calibration(TypedDict):
    """Which images the temperature was fitted on."""

    source: str  # in words
    images: int


class Monitored(TypedDict):
    """What --monitor compares images with: how the file answered images that it was not trained on.

    Bins are those between the edges, which belong to the upper one.
    """

    source: str  # where the images came from, in words
    images: int
    accuracy: float  # of these images, a fraction
    threshold: float  # exceeded by the probability of as many answers as were right
    known: list[float]  # edges of bins; none for a file without `known`
    probability: list[float]  # edges of bins, of the largest probability
    counts: list[list[int]]  # images by bin of `known`, and by bin of the probability
    answers: list[int]  # how often each class was the answer


class Fixed(TypedDict):
    """What a file of fixed size takes."""

    batch: int | None  # the only batch size; None for any
    input: str  # "uint8" or "float32"


class Micro(TypedDict):
    """What a file for microcontrollers takes there. arena: bytes of working memory, None if the
    exporting machine could not measure them."""

    runtime: str  # that proved it, with its version
    arena: int | None
    operators: list[str]  # that a program must register


class Device(TypedDict):
    """What one input needs: numbers, times 4 for bytes in float32."""

    weights: int
    activations: int  # held at a time
    multiply_adds: int


class Promise(TypedDict):
    """A threshold that keeps what was promised: see inference.promise."""

    kind: str  # "accuracy" of what is answered, or "recall" of a class
    name: str | None  # of the class
    share: float  # at least this part of the answers is right, or of the class is called so
    confidence: float  # that the threshold keeps it
    threshold: float  # of the largest probability, or of the class's own
    images: int  # that it was chosen on: of a class, those of the class
    source: str  # of these images, in words
    chosen: dict  # how it is kept on them
    test: dict  # and on the test split: images, kept, share; answered, or false_alarms


class Spec(TypedDict, total=False):
    """All keys. Those of DEFAULTS may be missing in older files; read_spec() fills them in."""

    schema: int  # raised when an older reader would misread the file
    task: str  # "classification" or "regression"
    classes: list[str]  # in the order of the probabilities; of a regression, the name of the number
    channels: int  # 1 for grey, 3 for RGB; of a regression, the number of features
    image_size: list[int]  # [height, width] that the network sees
    resize: str | None  # how the graph resizes
    fit: str | None  # how an image gets that size: "stretch", "crop" or "letterbox"
    unseen: float | None  # the part of the average image that `fit` cuts away; None: not known
    mean: list[float]  # of each channel, of pixels scaled to 0..1
    std: list[float]
    white: int  # the level of 16-bit pixels that becomes 255
    ground: str | None  # what transparent pixels lie on: "white" or "black"; None: alpha is dropped

    temperature: float | None  # what the logits are divided by
    calibration: Calibration | None
    known: Known | None  # None for a file without the output `known`
    monitor: Monitored | None  # None for a file that --monitor can only count for
    reject: float | None  # keep this share of familiar images; the others are "unknown"
    min_probability: float | None  # answers with less are "unsure"
    promises: list[Promise] | None  # of recall, the first whose threshold is reached is the answer

    dataset: str
    model: str  # the name of the network
    parameters: int
    test_accuracy: float | None  # a fraction
    arguments: dict  # step1's options
    versions: dict[str, str]
    created: str  # ISO 8601
    checkpoint_sha256: str
    device: Device
    opset: int  # of ONNX
    onnxruntime_min: str  # the oldest version that runs the file
    quantization: str  # of int8 files, in words

    golden: list[dict]  # samples with their expected outputs
    self_test_tolerance: float  # largest difference of an output
    fixed: Fixed | None  # None for a file that takes images of any size
    micro: Micro | None  # None for a file that is not for microcontrollers


DEFAULTS = {
    "fit": None,
    "white": 65535,
    "ground": None,
    "known": None,
    "monitor": None,
    "reject": None,
    "min_probability": None,
    "promises": None,
    "fixed": None,
    "micro": None,
    "golden": [],
    "self_test_tolerance": None,
}


def read_spec(text: str | None, path: str) -> Spec:
    """Parse and validate the spec that the file `path` carries.

    Raises Problem if there is none, if it needs a newer reader, or naming the first key that is
    wrong.
    """
    if not text:
        raise Problem(f"{path} carries no spec: it was not written by step2_export.py")
    malformed = f"{path} has a malformed spec"

    if len(text) > MAX_BYTES:
        raise Problem(f"{malformed}: it has more than {MAX_BYTES >> 20} MiB")
    try:
        spec = DEFAULTS | json.loads(text, parse_constant=refuse_constant)
        check_values(spec)
    except (ValueError, TypeError, RecursionError) as error:
        reason = error if isinstance(error, Refused) else "it is not a JSON object"
        raise Problem(f"{malformed}: {reason}") from None

    schema = spec.get("schema")
    if is_whole(schema, 1) and schema > SCHEMA:
        raise Problem(f"{path} has a spec of schema {schema}: it needs a newer step3_infer.py")

    validate(spec, RULES, malformed)
    if TASKS[spec["task"]].has_images:
        validate(spec, IMAGE_RULES, malformed)
        check_fixed_size(spec, malformed)
        check_monitor(spec, malformed)
        check_promises(spec, malformed)
    if spec["reject"] is not None and spec["known"] is None:
        raise Problem(f"{malformed}: reject needs known, which the file does not have")

    if spec["known"] is not None:
        spec["known"] = {"tolerance": KNOWN_TOLERANCE} | spec["known"]
    return spec


class Refused(ValueError):
    """JSON that Python reads and other readers do not, or that no honest file contains."""


def refuse_constant(name: str) -> None:
    """Refuse NaN, Infinity and -Infinity, which are no JSON."""
    raise Refused(f"it contains {name}")


def check_values(spec: dict) -> None:
    """Raise Refused for values that the readers in C++ and JavaScript would not take."""
    waiting = [(spec, 1)]
    while waiting:
        value, depth = waiting.pop()
        if depth > MAX_DEPTH:
            raise Refused(f"it is more than {MAX_DEPTH} levels deep")

        if isinstance(value, dict):
            waiting += [(part, depth + 1) for part in (*value.keys(), *value.values())]
        elif isinstance(value, list):
            waiting += [(part, depth + 1) for part in value]
        elif isinstance(value, (int, float)) and not is_exact(value):
            raise Refused("it contains a number that is too large")
        elif isinstance(value, str) and not is_unicode(value):
            raise Refused("it contains half of a surrogate pair")


def is_exact(value: float) -> bool:
    """Is a number finite and, if it is whole, exact in JavaScript?"""
    return math.isfinite(value) if isinstance(value, float) else abs(value) <= MAX_WHOLE


def is_unicode(text: str) -> bool:
    """Can the text be encoded, or does it contain half of a surrogate pair?"""
    return text.isascii() or text == text.encode(errors="ignore").decode()


def check_fixed_size(spec: dict, malformed: str) -> None:
    """Raise Problem if the only input size of a file would not fit into memory."""
    if spec["fixed"] is None:
        return
    height, width = spec["image_size"]
    values = (spec["fixed"]["batch"] or 1) * height * width * spec["channels"]
    if values > MAX_FIXED_VALUES:
        raise Problem(f"{malformed}: its fixed input has {values:,} values")


def check_monitor(spec: dict, malformed: str) -> None:
    """Raise Problem if what --monitor compares with is not of the file's own classes."""
    if spec["monitor"] is not None and len(spec["monitor"]["answers"]) != len(spec["classes"]):
        raise Problem(f"{malformed}: monitor must count the answers of each class")


def promised_recalls(spec: Spec) -> set[str]:
    """The classes that a file has promised to recall."""
    promises = spec.get("promises") or []
    return {promise["name"] for promise in promises if promise["kind"] == "recall"}


def check_promises(spec: dict, malformed: str) -> None:
    """Raise Problem if a promise is about a class that the file does not have."""
    for promise in spec["promises"] or []:
        if promise["kind"] == "recall" and promise["name"] not in spec["classes"]:
            raise Problem(f"{malformed}: a promise names a class that the file does not have")


def validate(spec: dict, rules: dict, malformed: str) -> None:
    """Raise Problem for the first key that is missing or breaks its rule."""
    for key, (is_valid, wanted) in rules.items():
        if key not in spec:
            raise Problem(f"{malformed}: {key} is missing")
        if not is_valid(spec[key]):
            raise Problem(f"{malformed}: {key} must be {wanted}")


def is_whole(value, low: int, high: int = 1 << 31) -> bool:
    """Is it a whole number from low to high? JSON's true and false are none."""
    return type(value) is int and low <= value <= high


def is_number(value, low: float, high: float = math.inf) -> bool:
    """Is it a number from low to high? NaN is not."""
    return type(value) in (int, float) and low <= value <= high


def is_share(value) -> bool:
    return value is None or is_number(value, 0, 1)


def are_names(value, least: int = 1) -> bool:
    """Is it a list of `least` different names or more?"""
    if not isinstance(value, list) or len(value) < least:
        return False
    return all(map(is_name, value)) and len(set(value)) == len(value)


def is_name(value) -> bool:
    return isinstance(value, str) and 1 <= len(value) <= MAX_NAME


def is_size(value) -> bool:
    """Is it [height, width] in pixels?"""
    is_pair = isinstance(value, list) and len(value) == 2
    return is_pair and all(is_whole(side, 1, MAX_SIDE) for side in value)


def is_known(value) -> bool:
    if value is None:
        return True
    return isinstance(value, dict) and is_number(value.get("tolerance", KNOWN_TOLERANCE), 0)


def is_monitor(value) -> bool:
    if value is None:
        return True
    keys = Monitored.__annotations__.keys()
    if not isinstance(value, dict) or not keys <= value.keys():
        return False

    edges = (value["known"], value["probability"])
    if not isinstance(value["source"], str) or not all(map(are_edges, edges)):
        return False
    rows = value["counts"]
    if not isinstance(rows, list) or len(rows) != len(value["known"]) + 1:
        return False

    columns = len(value["probability"]) + 1
    return (
        all(are_counts(row, value["images"]) and len(row) == columns for row in rows)
        and sum(map(sum, rows)) == value["images"]
        and are_counts(value["answers"], value["images"])
        and is_number(value["accuracy"], 0, 1)
        and is_number(value["threshold"], 0, 1)
    )


def are_edges(value) -> bool:
    """Is it a list of rising numbers?"""
    if not isinstance(value, list) or len(value) > MAX_EDGES:
        return False
    return all(is_number(edge, 0, 1) for edge in value) and value == sorted(set(value))


def are_counts(value, total) -> bool:
    """Is it a list of numbers of images, of which there are `total`?"""
    if not isinstance(value, list) or not is_whole(total, 1):
        return False
    return all(is_whole(count, 0, total) for count in value)


def is_fixed(value) -> bool:
    if value is None:
        return True
    if not isinstance(value, dict) or not {"batch", "input"} <= value.keys():
        return False

    is_batch = value["batch"] is None or is_whole(value["batch"], 1, MAX_BATCH)
    return is_batch and value["input"] in INPUTS


def are_promises(value) -> bool:
    if value is None:
        return True
    return isinstance(value, list) and len(value) <= MAX_PROMISES and all(map(is_promise, value))


def is_promise(value) -> bool:
    if not isinstance(value, dict) or value.get("kind") not in ("accuracy", "recall"):
        return False
    if value["kind"] == "recall" and not is_name(value.get("name")):
        return False
    return is_number(value.get("threshold"), 0, 1) and is_number(value.get("share"), 0, 1)


def are_golden(value) -> bool:
    if not isinstance(value, list) or len(value) > MAX_GOLDEN:
        return False
    return all(isinstance(sample, dict) for sample in value)


INPUTS = ("uint8", "float32")
GROUNDS = (None, "white", "black")
FITS = (None, "stretch", "crop", "letterbox")
Rule = tuple[Callable[[object], bool], str]

# key -> (test, what it must be)
RULES: dict[str, Rule] = {
    "schema": (lambda value: is_whole(value, 1), "a whole number"),
    "task": (lambda value: value in list(TASKS), " or ".join(TASKS)),
    "classes": (are_names, f"a list of different names of 1 to {MAX_NAME} characters"),
    "channels": (lambda value: is_whole(value, 1), "a whole number"),
    "white": (lambda value: is_whole(value, 1, 65535), "a whole number from 1 to 65535"),
    "ground": (lambda value: value in GROUNDS, "white, black or null"),
    "known": (is_known, "null, or an object whose tolerance is a number"),
    "monitor": (is_monitor, "null, or counts of images by bin that add up to their number"),
    "reject": (is_share, "a number from 0 to 1, or null"),
    "min_probability": (is_share, "a number from 0 to 1, or null"),
    "promises": (
        are_promises,
        f"null, or a list of at most {MAX_PROMISES} promises, each with a kind (accuracy or "
        "recall), a threshold and a share from 0 to 1 and, of recall, a name",
    ),
    "fit": (lambda value: value in FITS, "stretch, crop, letterbox or null"),
    "fixed": (
        is_fixed,
        f"null, or a batch (1 to {MAX_BATCH}, or null) and an input (uint8 or float32)",
    ),
    "micro": (lambda value: value is None or isinstance(value, dict), "null, or an object"),
    "golden": (are_golden, f"a list of at most {MAX_GOLDEN} samples"),
    "self_test_tolerance": (
        lambda value: value is None or is_number(value, 0),
        "a number from 0, or null",
    ),
}
IMAGE_RULES: dict[str, Rule] = {
    "classes": (lambda value: are_names(value, least=2), "two different names or more"),
    "channels": (lambda value: is_whole(value, 1) and value in (1, 3), "1 or 3"),
    "image_size": (is_size, f"[height, width], each from 1 to {MAX_SIDE}"),
}


def data_name(spec: dict) -> str:
    """What people call a model's data: of own images the directory or file, as a run's name."""
    data_dir = (spec.get("arguments") or {}).get("data_dir")
    if spec["dataset"] not in OWN_IMAGES or not data_dir:
        return spec["dataset"]

    name = os.path.basename(os.path.abspath(data_dir))
    if spec["dataset"] == "csv":
        name = os.path.splitext(name)[0]
    return name or spec["dataset"]
