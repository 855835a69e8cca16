"""Static int8 quantization of an exported ONNX file by onnxruntime's own quantizer.

Weights and activations become 8-bit integers between QuantizeLinear and DequantizeLinear nodes,
their ranges taken from calibration images that run through the graph's own preprocessing.
Preprocessing, softmax and the layer that reads the image, which int8 makes slower, stay in float32.
Weights have 7 bits and a scale for each channel: their products cannot saturate, so processors with
and without VNNI compute the same. Activations are unsigned, which onnxruntime runs fastest; in a
file of fixed size they are signed, with zero point 0, because TensorRT and NPUs take nothing else.
"""

import contextlib
import io
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import onnx

from deploy.comparing import predictions
from deploy.onnx_file import finish_onnx
from inference.images import fit_to_input
from inference.predict import Model

# The least opset: the first with GELU as one operator. In pieces it would be quantized in pieces.
OPSET = 20
WEIGHTED = ("Conv", "Gemm", "MatMul")
# And what else onnxruntime has int8 kernels for, so that values stay int8 from layer to layer.
OP_TYPES = (
    *WEIGHTED,
    "Add",
    "AveragePool",
    "Clip",
    "Concat",
    "GlobalAveragePool",
    "MaxPool",
    "Relu",
)
CALIBRATION, CHECK = 256, 1000  # training images to calibrate with, and others to try the result on
BATCH_SIZE = 16
HISTOGRAM_PIXELS = 1 << 20  # of images: percentile calibration keeps all activations in memory
MOST_CHANNELS = 4  # of a first layer that reads an image


@dataclass(frozen=True)
class Quantization:
    """One way to quantize. calibration: the method that finds the ranges, MinMax or Percentile.
    early_in_float: how many layers after the first stay in float32.
    """

    name: str
    calibration: str = "MinMax"
    last_in_float: bool = False
    early_in_float: int = 0


# What is tried, in this order, until one is accurate enough.
QUANTIZATIONS = (
    Quantization("7-bit weights per channel"),
    Quantization("percentile calibration", calibration="Percentile"),
    Quantization("the last layer in float32", last_in_float=True),
    # Few channels with wide ranges, as in a first depthwise block: of all layers, these lose most.
    Quantization(
        "the first three layers and the last in float32", last_in_float=True, early_in_float=2
    ),
)


# ----------------------------------------------------------------------------------------- choosing
def choose(
    source: str,
    images: np.ndarray,
    labels: np.ndarray,
    max_drop: float,
    threads: int | None = None,
) -> tuple[str, dict]:
    """Quantize an ONNX file in one way after another until one is accurate enough.

    If none is, the best is taken. images, labels: of the training split, uint8
    [n, H, W, channels] and [n]; max_drop: how many points of accuracy may be lost. Returns the path
    of the quantized file, and figures of what was tried. Raises ValueError.
    """
    spec = Model(source, threads).spec
    batch = spec["fixed"]["batch"] if spec["fixed"] else None
    calibration, check = pick_images(len(images))
    calibration_images = fit_to_input(images[calibration], spec)
    check_images = fit_to_input(images[check], spec)
    check_labels = labels[check]

    before = accuracy(source, check_images, check_labels, threads)
    files = []
    tried = []
    for number, quantization in enumerate(QUANTIZATIONS):
        file = f"{source}.{number}.onnx"
        try:
            quantize(source, file, calibration_images, quantization, fixed=spec["fixed"])
        except OSError:  # a full disk
            raise
        except Exception as error:  # onnxruntime's quantizer raises anything at all
            raise ValueError(" ".join(str(error).split())) from None

        after = accuracy(file, check_images, check_labels, threads)
        drop = round(100 * (before - after), 3)
        files.append(file)
        tried.append({"quantization": quantization.name, "drop_training": drop})
        # Half of it, because images that the network was trained on are easier than others.
        if drop <= max_drop / 2:
            break

    drops = [trial["drop_training"] for trial in tried]
    best = drops.index(min(drops))
    move_table(source, files[best], check_images, batch)
    return files[best], {**tried[best], "tried": tried}


def pick_images(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices of training images to calibrate with, and of others to measure the accuracy on.

    A dataset that is too small for others is measured on the same.
    """
    order = np.random.default_rng(0).permutation(count)
    calibration = np.sort(order[:CALIBRATION])
    others = np.sort(order[CALIBRATION : CALIBRATION + CHECK])
    if len(others) < CALIBRATION:
        return calibration, calibration
    return calibration, others


def accuracy(
    file: str, images: np.ndarray, labels: np.ndarray, threads: int | None = None
) -> float:
    """The share of uint8 images [n, H, W, channels] that an exported file classifies correctly."""
    probabilities = predictions(Model(file, threads), images).main
    return float((probabilities.argmax(1) == labels).mean())


# --------------------------------------------------------------------------------------- quantizing
def quantize(
    source: str,
    target: str,
    images: np.ndarray,
    quantization: Quantization,
    fixed: dict | None = None,
) -> None:
    """Write `target`, the ONNX file `source` in int8.

    images: [n, H, W, channels] to calibrate with, as the file takes them. fixed: that of its spec.
    Raises whatever onnxruntime's quantizer raises, and ValueError if nothing can be quantized.
    """
    from onnxruntime.quantization import CalibrationMethod, QuantType, quantize_static

    if quantization.calibration != "MinMax":
        pixels = images.shape[1] * images.shape[2]
        images = images[: max(BATCH_SIZE, HISTOGRAM_PIXELS // pixels)]
        # onnxruntime joins the activations of all batches, which must be of one size for that.
        size = (fixed and fixed["batch"]) or BATCH_SIZE
        images = images[: max(len(images) // size, 1) * size]
    feeds = ({"image": batch} for batch in batches(images, fixed and fixed["batch"]))
    reader = SimpleNamespace(get_next=lambda: next(feeds, None))  # all that is used of a reader

    # A fully connected layer may leave float32: logits in 8 bits would make coarse probabilities.
    options = {"OpTypesToExcludeOutputQuantization": ["Gemm", "MatMul"]}
    activation_type = QuantType.QUInt8
    if fixed:
        activation_type = QuantType.QInt8
        options |= {"ActivationSymmetric": True, "QuantizeBias": False}  # TensorRT takes no int32

    proto = onnx.load(source)
    # torch's exporter has folded its constants: without this entry the quantizer advises to.
    proto.metadata_props.add(key="onnx.quant.pre_process", value="onnxruntime.quant")
    onnx.save(proto, target)
    with contextlib.redirect_stdout(io.StringIO()):
        quantize_static(
            model_input=target,
            model_output=target,
            calibration_data_reader=reader,
            op_types_to_quantize=list(OP_TYPES),
            nodes_to_exclude=nodes_in_float(proto.graph, quantization),
            per_channel=True,
            reduce_range=True,  # 7 bits
            activation_type=activation_type,
            weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod[quantization.calibration],
            extra_options=options,
        )


def batches(images: np.ndarray, only_size: int | None) -> Iterator[np.ndarray]:
    """Batches of 16 images [n, H, W, channels], or full ones of the size that a file takes."""
    size = only_size or BATCH_SIZE
    end = len(images) - only_size + 1 if only_size else len(images)
    for start in range(0, end, size):
        yield np.ascontiguousarray(images[start : start + size])


def nodes_in_float(graph, quantization: Quantization) -> list[str]:
    """The names of nodes that stay in float32. Raises ValueError if nothing is left to quantize.

    They are preprocessing, softmax, sums with a constant, a first layer that reads the image, and
    of the layers after it and the last those that the quantization leaves in float32.
    """
    constants = {tensor.name: tensor for tensor in graph.initializer}
    main = nodes_for(graph, graph.output[0].name)
    # Resizing multiplies by matrices, too, but computes them.
    weighted = [node for node in main if node.op_type in WEIGHTED and node.input[1] in constants]
    if not weighted:
        raise ValueError("the network has no layer to quantize")
    first = weighted[0]
    last = weighted[-1]

    main_names = {node.name for node in main}
    names = [node.name for node in graph.node]
    excluded = names[: names.index(first.name)] + names[names.index(last.name) + 1 :]
    for node in graph.node:
        belongs_to_known = node.name not in main_names  # which must stay exact
        adds_constant = node.op_type == "Add" and constants.keys() & set(node.input)
        if belongs_to_known or adds_constant:
            excluded.append(node.name)

    if len(weighted) > 1:
        reads_image = first.op_type == "Conv" and input_channels(first, constants) <= MOST_CHANNELS
        if reads_image:
            excluded.append(first.name)
        if quantization.last_in_float:
            excluded.append(last.name)
        early = weighted[1 : 1 + quantization.early_in_float]
        if len(weighted) > 2 + len(early):  # something is left between them
            excluded += [node.name for node in early]
    return excluded


def input_channels(conv, constants: dict) -> int:
    """The number of channels that a convolution reads; its weights are [out, in, height, width]."""
    return constants[conv.input[1]].dims[1]


def nodes_for(graph, output: str) -> list:
    """The nodes that an output depends on, in their order."""
    needed = {output}
    nodes = []
    for node in reversed(graph.node):
        if needed & set(node.output):
            needed |= set(node.input)
            nodes.append(node)
    nodes.reverse()
    return nodes


# -------------------------------------------------------------------------------------------- known
def move_table(source: str, quantized: str, images: np.ndarray, batch: int | None) -> None:
    """Give a quantized file a table of its own for `known`, as int8 moves the scores it compares.

    Each entry moves as the scores of equal rank do, from `source` to `quantized`, over images
    [n, H, W, channels] of the training split as the files take them, in batches of `batch`. Without
    `known` there is nothing to do.
    """
    proto = onnx.load(quantized)
    if len(proto.graph.output) < 2:
        return

    before = np.sort(scores(source, images, batch))
    after = np.sort(scores(quantized, images, batch))

    table_name, _ = table_and_score(proto.graph)
    table = next(tensor for tensor in proto.graph.initializer if tensor.name == table_name)
    entries = onnx.numpy_helper.to_array(table)
    moved = np.sort(entries + np.interp(entries, before, after - before)).astype(np.float32)
    table.CopyFrom(onnx.numpy_helper.from_array(moved, table.name))
    onnx.save(proto, quantized)


def table_and_score(graph) -> list[str]:
    """The names of the two values whose comparison makes `known`: table < score."""
    comparison = next(node for node in nodes_for(graph, "known") if node.op_type == "Less")
    return list(comparison.input)


def scores(file: str, images: np.ndarray, batch: int | None) -> np.ndarray:
    """The scores [n] that a file compares with its table, of images [n, H, W, channels]."""
    import onnxruntime

    proto = onnx.load(file)
    _, score = table_and_score(proto.graph)
    output = onnx.helper.make_tensor_value_info(score, onnx.TensorProto.FLOAT, None)
    proto.graph.output.append(output)
    session = onnxruntime.InferenceSession(
        proto.SerializeToString(), providers=["CPUExecutionProvider"]
    )

    parts = []
    for part in batches(images, batch):
        (found,) = session.run([score], {"image": part})
        parts.append(found.ravel())
    return np.concatenate(parts)


# ---------------------------------------------------------------------------------------- finishing
def finish_int8(path: str, spec: dict, opset: int) -> bytes:
    """The bytes of a quantized file with the spec inside, and without what only takes space.

    In a small network names, and constants that are stored twice, take as much space as a layer.
    """
    proto = onnx.load(path)
    short_names = {"": ""}  # of an optional input that is left out
    for value in (*proto.graph.input, *proto.graph.output):
        short_names[value.name] = value.name

    short_names |= merge_constants(proto.graph)
    for node in proto.graph.node:
        for name in node.output:
            short_names.setdefault(name, f"t{len(short_names)}")
        node.input[:] = [short_names[name] for name in node.input]
        node.output[:] = [short_names[name] for name in node.output]
        node.ClearField("name")
        node.ClearField("doc_string")
    return finish_onnx(proto, spec, opset)


def merge_constants(graph) -> dict[str, str]:
    """Store equal constants once, under a short name; returns the short name of each old one."""
    short_names = {}
    kept = {}  # bytes without the name -> the constant
    for tensor in graph.initializer:
        old_name = tensor.name
        tensor.name = ""
        content = tensor.SerializeToString()
        if content not in kept:
            kept[content] = tensor
            tensor.name = f"c{len(kept)}"
        short_names[old_name] = kept[content].name

    merged = list(kept.values())
    del graph.initializer[:]
    graph.initializer.extend(merged)
    return short_names
