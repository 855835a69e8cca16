"""The specs of exported files: pure functions from the spec of a run, or of another file.

inference/spec.py says what each key means; training/ makes the spec of a run. Each function
returns a new dict.
"""

from inference.command_line import encodable
from inference.self_test import INT8_TOLERANCE, TOLERANCE
from inference.spec import KNOWN_TOLERANCE

INT8_KNOWN_TOLERANCE = 5e-2  # of `known` in the self-test of an int8 file


def describe_export(
    run_spec: dict,
    *,
    golden: list[dict],
    device: dict[str, int],
    torch_version: str,
    monitor: dict | None = None,
    reject: float | None = None,
    min_probability: float | None = None,
) -> dict:
    """The spec of the files that take images of any size, from that of their run.

    golden: samples with their expected outputs; device: what one input needs; monitor: what
    --monitor compares with; reject, min_probability: the files' own thresholds.
    """
    return {
        **encodable(run_spec),  # of step1's arguments, a path need not be text
        "versions": {**run_spec["versions"], "torch_export": torch_version},
        "golden": golden,
        "self_test_tolerance": TOLERANCE,
        "known": with_tolerance(run_spec.get("known"), KNOWN_TOLERANCE),
        "monitor": monitor,
        "fixed": None,
        "reject": reject,
        "min_probability": min_probability,
        "promises": None,
        "device": device,
    }


def describe_fixed(spec: dict, batch: int | None, input_type: str) -> dict:
    """The spec of a file that takes images of the network's own size only.

    batch: the only batch size, None for any. input_type: of pixels, uint8 or float32. Golden
    samples for it follow by with_golden().
    """
    return {**spec, "fixed": {"batch": batch, "input": input_type}}


def describe_int8(
    spec: dict, quantization: str, golden: list[dict], monitor: dict | None = None
) -> dict:
    """The spec of an int8 file, from that of the file that was quantized.

    quantization: how, in words. golden: samples with the int8 file's own outputs. monitor: what
    --monitor compares with, by these outputs, too.
    """
    return {
        **spec,
        "quantization": f"int8, {quantization}",
        "golden": golden,
        "monitor": monitor,
        "self_test_tolerance": INT8_TOLERANCE,
        "known": with_tolerance(spec["known"], INT8_KNOWN_TOLERANCE),
    }


def describe_micro(spec: dict, quantization: str, golden: list[dict], micro: dict) -> dict:
    """The spec of a file for microcontrollers, from that of a file of fixed size.

    Such a file has no output `known`, and so no threshold of it; what --monitor compares with would
    take more space than it is worth there. golden: samples with its own
    outputs. micro: see inference.spec.Micro.
    """
    return {
        **spec,
        "quantization": f"int8, {quantization}",
        "golden": golden,
        "self_test_tolerance": INT8_TOLERANCE,
        "known": None,
        "reject": None,
        "monitor": None,
        "micro": micro,
    }


def describe_onnx(spec: dict, opset: int, onnxruntime_min: str) -> dict:
    """The spec of an ONNX file. onnxruntime_min: the oldest version known to run it."""
    return {**spec, "opset": opset, "onnxruntime_min": onnxruntime_min}


def with_golden(spec: dict, golden: list[dict]) -> dict:
    """The spec with other golden samples."""
    return {**spec, "golden": golden}


def with_promises(spec: dict, promises: list[dict]) -> dict:
    """The spec with the promises that its file keeps."""
    return {**spec, "promises": promises}


def with_tolerance(known: dict | None, tolerance: float) -> dict | None:
    """What a spec says of `known`, with the tolerance of the self-test; None without the output."""
    if not known:
        return None
    return {**known, "tolerance": tolerance}
