"""What a TensorFlow Lite file holds, which the runtime of microcontrollers has, and its C array."""

import re
import string
from dataclasses import dataclass
from pathlib import Path

from inference.errors import problems
from inference.spec import DECIMALS

HERE = Path(__file__).parent
# operator -> (the method of MicroMutableOpResolver that registers it, the first release of
# TensorFlow Lite that has it in int8, by its runtime_version.cc; of SOFTMAX, in float32)
OPERATORS = {
    "ADD": ("AddAdd", "1.14.0"),
    "AVERAGE_POOL_2D": ("AddAveragePool2D", "1.14.0"),
    "CONCATENATION": ("AddConcatenation", "1.14.0"),
    "CONV_2D": ("AddConv2D", "1.14.0"),
    "DEPTHWISE_CONV_2D": ("AddDepthwiseConv2D", "1.14.0"),
    "DEQUANTIZE": ("AddDequantize", "1.14.0"),
    "FULLY_CONNECTED": ("AddFullyConnected", "1.14.0"),
    "HARD_SWISH": ("AddHardSwish", "1.15.0"),
    "LEAKY_RELU": ("AddLeakyRelu", "2.3.0"),
    "LOGISTIC": ("AddLogistic", "1.14.0"),
    "MAX_POOL_2D": ("AddMaxPool2D", "1.14.0"),
    "MEAN": ("AddMean", "1.14.0"),
    "MUL": ("AddMul", "1.14.0"),
    "PAD": ("AddPad", "1.14.0"),
    "PADV2": ("AddPadV2", "1.14.0"),
    "QUANTIZE": ("AddQuantize", "1.15.0"),
    "RELU": ("AddRelu", "2.1.0"),
    "RELU6": ("AddRelu6", "1.14.0"),
    "RESHAPE": ("AddReshape", "1.5.0"),
    "SLICE": ("AddSlice", "1.14.0"),
    "SOFTMAX": ("AddSoftmax", "1.5.0"),
    "SPLIT": ("AddSplit", "1.14.0"),
    "STRIDED_SLICE": ("AddStridedSlice", "1.14.0"),
    "SUB": ("AddSub", "1.14.0"),
    "SUM": ("AddSum", "1.15.0"),
    "TANH": ("AddTanh", "1.14.0"),
    "TRANSPOSE": ("AddTranspose", "1.14.0"),
}
C_BYTES_A_LINE = 16


@dataclass(frozen=True)
class Tensor:
    """An input or output of a file. dtype: of numpy; scale, zero_point: None if not quantized."""

    shape: tuple[int, ...]
    dtype: str
    scale: float | None
    zero_point: int | None


@dataclass(frozen=True)
class MicroFile:
    """What a file holds.

    operators: the name of each kind once, in the order of its first use. in_float: those that
    compute in float32. logit_step: the scale of the logits, None if they are float32. outside: how
    many arrays of weights lie behind the FlatBuffer, which only says where.
    """

    operators: tuple[str, ...]
    in_float: tuple[str, ...]
    input: Tensor
    output: Tensor
    logit_step: float | None
    outside: int = 0


# ------------------------------------------------------------------------------------------ reading
def schema():
    """The reader of FlatBuffers of tflite-micro or of ai-edge-litert. Raises Problem."""
    try:
        from tflite_micro.tensorflow.lite.micro.python import schema_py_generated
    except ImportError:
        missing = "a file for TensorFlow Lite Micro is checked with tflite-micro or ai-edge-litert"
        with problems(f"{missing}: pip install tflite-micro", ImportError, form="{} ({})"):
            from ai_edge_litert import schema_py_generated
    return schema_py_generated


def read_model(content: bytes) -> MicroFile:
    """What the bytes of a TensorFlow Lite file hold. Raises Problem for other bytes."""
    found = schema()
    with problems("this is not a TensorFlow Lite file"):
        model = found.ModelT.InitFromObj(found.Model.GetRootAsModel(content, 0))
        graph = model.subgraphs[0]
        operators = []
        in_float = []
        logit_step = None
        for operator in graph.operators:
            code = model.operatorCodes[operator.opcodeIndex]
            name = operator_name(found, code)
            operators.append(name)

            source = describe_tensor(found, graph.tensors[operator.inputs[0]])
            if name == "DEQUANTIZE":
                logit_step = source.scale  # the last is that of the logits
            elif source.dtype == "float32" and name != "QUANTIZE":
                in_float.append(name)
        (given,) = graph.inputs
        (answer,) = graph.outputs
        return MicroFile(
            operators=tuple(dict.fromkeys(operators)),
            in_float=tuple(dict.fromkeys(in_float)),
            input=describe_tensor(found, graph.tensors[given]),
            output=describe_tensor(found, graph.tensors[answer]),
            logit_step=logit_step,
            outside=sum(buffer.offset > 0 for buffer in model.buffers),
        )


def operator_name(found, code) -> str:
    """The name of an operator; of a custom one, the name it was given."""
    number = max(code.builtinCode, code.deprecatedBuiltinCode)
    if number == found.BuiltinOperator.CUSTOM:
        return f"custom operator {(code.customCode or b'').decode(errors='replace')}"
    return name_of(found.BuiltinOperator, number)


def name_of(enumeration, number: int) -> str:
    names = {value: name for name, value in vars(enumeration).items() if isinstance(value, int)}
    return names.get(number, f"operator {number}")


def describe_tensor(found, tensor) -> Tensor:
    scale = None
    zero_point = None
    quantization = tensor.quantization
    if quantization is not None and quantization.scale is not None and len(quantization.scale):
        scale = float(quantization.scale[0])
        zero_point = int(quantization.zeroPoint[0])
    dtype = name_of(found.TensorType, tensor.type).lower()
    return Tensor(tuple(int(size) for size in tensor.shape), dtype, scale, zero_point)


# ----------------------------------------------------------------------------------------- checking
def check_model(found: MicroFile, spec: dict) -> list[str]:
    """In words: what keeps a file from running on a microcontroller as its spec says."""
    failures = []
    for name in found.operators:
        if name not in OPERATORS:
            failures.append(f"the runtime of microcontrollers has no {name} in int8")
    if found.outside:
        failures.append(
            f"{found.outside} arrays of its weights lie behind the FlatBuffer, where the runtime "
            "of microcontrollers does not look for them"
        )

    height, width = spec["image_size"]
    given = Tensor((1, height, width, spec["channels"]), "uint8", 1.0, 0)
    if found.input != given:
        failures.append(f"its input is {in_words(found.input)}, not {in_words(given)}")
    answer = Tensor((1, len(spec["classes"])), "float32", None, None)
    if found.output != answer:
        failures.append(f"its output is {in_words(found.output)}, not {in_words(answer)}")
    return failures


def in_words(tensor: Tensor) -> str:
    """uint8 [1, 32, 32, 3] of scale 1 and zero point 0"""
    words = f"{tensor.dtype} {list(tensor.shape)}"
    if tensor.scale is None:
        return words
    return f"{words} of scale {tensor.scale:g} and zero point {tensor.zero_point}"


def first_release(found: MicroFile) -> str:
    """The first release of TensorFlow Lite that has all operators of a checked file."""
    releases = [OPERATORS[name][1] for name in found.operators]
    return max(releases, key=lambda release: [int(part) for part in release.split(".")])


# ------------------------------------------------------------------------------------------------ C
def c_sources(content: bytes, found: MicroFile, spec: dict) -> dict[str, bytes]:
    """model_data.h and model_data.cc: the model as a C array, and what a program must know of it.

    content: without the archive. spec: with `micro`.
    """
    height, width = spec["image_size"]
    recalls, least = thresholds(spec)
    methods = [OPERATORS[name][0] for name in found.operators]
    values = {
        "model": c_comment(spec["model"]),
        "size": len(content),
        "arena": spec["micro"]["arena"] or 0,
        "height": height,
        "width": width,
        "channels": spec["channels"],
        "count": len(spec["classes"]),
        "n_operators": len(methods),
        "methods": " \\\n".join(f"  (resolver).{method}();" for method in methods),
        "scale": f"{found.input.scale:g}",
        "zero_point": found.input.zero_point,
        "recalls": "".join(recalls),
        "least": c_threshold(least),
        "labels": "\n".join(f'    "{c_string(name)}",' for name in spec["classes"]),
        "bytes": c_bytes(content),
    }
    files = {}
    for name in ("model_data.h", "model_data.cc"):
        template = (HERE / f"{name}.template").read_text(encoding="utf-8")
        files[name] = string.Template(template).substitute(values).encode()
    return files


def thresholds(spec: dict) -> tuple[list[str], float]:
    """The thresholds of a spec: of each promise of recall a line of C, in the order in which they
    count, and the least probability of the other answers.
    """
    recalls = []
    least = spec["min_probability"] or 0.0
    for promise in spec["promises"] or []:
        if promise["kind"] == "accuracy":
            least = max(least, promise["threshold"])
        else:
            number = spec["classes"].index(promise["name"])
            reached = f"probabilities[{number}] >= {c_threshold(promise['threshold'])}"
            comment = f"recall:{c_comment(promise['name'])}={promise['share']:g}"
            recalls.append(f"  if ({reached}) return {number};  // {comment}\n")
    return recalls, least


def c_threshold(threshold: float) -> str:
    """A threshold as a C literal. step3 compares rounded probabilities with it, C the others."""
    return f"{threshold - 0.5 * 10**-DECIMALS:.9f}f" if threshold else "0.0f"


def c_bytes(content: bytes) -> str:
    lines = []
    for start in range(0, len(content), C_BYTES_A_LINE):
        part = content[start : start + C_BYTES_A_LINE]
        lines.append("    " + " ".join(f"0x{byte:02x}," for byte in part))
    return "\n".join(lines)


def c_string(text: str) -> str:
    """Text between the quotes of a C string: all bytes that are not plain ASCII are escaped.

    In three octal digits, because a longer escape would take in a digit that follows.
    """
    parts = []
    for byte in text.encode():
        is_plain = 32 <= byte < 127 and chr(byte) not in '"\\?'
        parts.append(chr(byte) if is_plain else f"\\{byte:03o}")
    return "".join(parts)


def c_comment(text: str) -> str:
    """A name that cannot end a comment."""
    return re.sub(r"[^\w./-]", "_", text)
