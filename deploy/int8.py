"""Static int8 quantization of an exported ONNX file by onnxruntime's own quantizer.

Weights and activations become 8-bit integers between QuantizeLinear and DequantizeLinear nodes, their ranges
taken from calibration images that run through the graph's own preprocessing. Preprocessing, softmax and the
layer that reads the image, which int8 makes slower, stay in float32. Weights have 7 bits and a scale for each
channel: their products cannot saturate, so processors with and without VNNI compute the same. Activations are
unsigned, which onnxruntime runs fastest; in a file of fixed size they are signed, with zero point 0, because
TensorRT and NPUs take nothing else.
"""

import contextlib
import io
import time
import timeit
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import numpy as np
import onnx

from deploy import onnx_file
from deploy.comparing import predictions
from inference.images import fit_to_input
from inference.predict import Model

OPSET = 20  # at least: the first with GELU as one operator, which in pieces would be quantized piece by piece
WEIGHTED = ("Conv", "Gemm", "MatMul")
# And what else onnxruntime has int8 kernels for, so that values stay int8 from layer to layer.
OP_TYPES = (*WEIGHTED, "Add", "AveragePool", "Clip", "Concat", "GlobalAveragePool", "MaxPool", "Relu")
CALIBRATION, CHECK = 256, 1000  # training images to calibrate with, and others to measure the accuracy on
HISTOGRAM_PIXELS = 1 << 20  # of images: percentile calibration keeps all their activations in memory
FASTER = 1.05  # times; less is within what two measurements differ by
# What is tried, in this order, until one is accurate enough: settings of `quantize`.
QUANTIZATIONS = {
    "7-bit weights per channel": {},
    "percentile calibration": {"calibration": "Percentile"},
    "the last layer in float32": {"last_in_float": True},
}


# ------------------------------------------------------------------------------------------------- quantizing
def choose(source: str, images: np.ndarray, labels: np.ndarray, max_drop: float, threads: int | None = None):
    """Quantize an ONNX file in one way after another until one is accurate enough, else take the best.

    images, labels: of the training split, uint8 [N, H, W, C] and [N]; max_drop: how many points of accuracy
    may be lost. Returns the quantized file's path, and figures of what was tried. Raises ValueError.
    """
    order = np.random.default_rng(0).permutation(len(images))
    calibration, check = np.sort(order[:CALIBRATION]), np.sort(order[CALIBRATION : CALIBRATION + CHECK])
    exported = Model(source, threads)
    check = check if len(check) >= CALIBRATION else calibration  # of a small dataset
    calibration_images = fit_to_input(images[calibration], exported.spec)
    check_images, check_labels = fit_to_input(images[check], exported.spec), labels[check]
    before, tried = accuracy(source, check_images, check_labels, threads), []
    for number, (name, settings) in enumerate(QUANTIZATIONS.items()):
        file = f"{source}.{number}.onnx"
        try:
            quantize(source, file, calibration_images, fixed=exported.spec["fixed"], **settings)
        except Exception as error:  # onnxruntime's quantizer raises anything at all
            raise ValueError(" ".join(str(error).split())) from None
        drop = round(100 * (before - accuracy(file, check_images, check_labels, threads)), 3)
        tried.append({"quantization": name, "drop_training": drop})
        if drop <= max_drop / 2:  # images that the network was trained on are easier than others
            break
    best = min(range(len(tried)), key=lambda number: tried[number]["drop_training"])
    move_table(source, f"{source}.{best}.onnx", check_images, exported.batch)
    return f"{source}.{best}.onnx", {**tried[best], "tried": tried}


def accuracy(file: str, images: np.ndarray, labels: np.ndarray, threads: int | None = None) -> float:
    """The share of uint8 images [N, H, W, C] that an exported file classifies correctly."""
    return float((predictions(Model(file, threads), images).main.argmax(1) == labels).mean())


def batches(images: np.ndarray, size: int | None) -> Iterator[np.ndarray]:
    """Batches of 16 images [N, H, W, C], or of `size`, the only one that a file takes."""
    last, size = len(images) - (size or 1) + 1, size or 16
    return (np.ascontiguousarray(images[start : start + size]) for start in range(0, last, size))


def quantize(source, target, images: np.ndarray, *, fixed=None, calibration="MinMax", last_in_float=False):
    """Write `target`, the ONNX file `source` in int8, calibrated on images [N, H, W, C] as it takes them.

    fixed: that of its spec. calibration: the method, MinMax or Percentile. Raises whatever onnxruntime's
    quantizer raises, and ValueError if nothing can be quantized.
    """
    from onnxruntime.quantization import CalibrationMethod, QuantType, quantize_static

    if calibration != "MinMax":
        images = images[: max(16, HISTOGRAM_PIXELS // (images.shape[1] * images.shape[2]))]
    # A fully connected layer may leave float32: logits in 8 bits would make coarse probabilities.
    options = {"OpTypesToExcludeOutputQuantization": ["Gemm", "MatMul"]}
    if fixed:
        options |= {"ActivationSymmetric": True, "QuantizeBias": False}  # TensorRT takes no int32
    feeds = ({"image": batch} for batch in batches(images, fixed and fixed["batch"]))
    reader = SimpleNamespace(get_next=lambda: next(feeds, None))  # what is used of a CalibrationDataReader
    proto = onnx.load(source)  # torch's exporter has folded its constants, which would be advised otherwise
    proto.metadata_props.add(key="onnx.quant.pre_process", value="onnxruntime.quant")
    onnx.save(proto, target)
    with contextlib.redirect_stdout(io.StringIO()):
        quantize_static(
            *(target, target, reader),
            op_types_to_quantize=list(OP_TYPES),
            nodes_to_exclude=nodes_in_float(proto.graph, last_in_float),
            per_channel=True,
            reduce_range=True,  # 7 bits
            activation_type=QuantType.QInt8 if fixed else QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod[calibration],
            extra_options=options,
        )


def nodes_in_float(graph, last_in_float: bool) -> list[str]:
    """The names of nodes that stay in float32. Raises ValueError if that leaves nothing to quantize.

    They are preprocessing, softmax, sums with a constant, a first layer of images, and on request the last.
    """
    names = [node.name for node in graph.node]
    main = nodes_for(graph, graph.output[0].name)
    constants = {tensor.name: tensor for tensor in graph.initializer}
    # Resizing multiplies by matrices, too, but computes them.
    weighted = [node for node in main if node.op_type in WEIGHTED and node.input[1] in constants]
    if not weighted:
        raise ValueError("the network has no layer to quantize")
    first, last = weighted[0], weighted[-1]
    excluded = names[: names.index(first.name)] + names[names.index(last.name) + 1 :]
    excluded += [node.name for node in graph.node if node not in main]  # of `known`, which must stay exact
    excluded += [node.name for node in main if node.op_type == "Add" and constants.keys() & set(node.input)]
    if len(weighted) > 1:
        if first.op_type == "Conv" and constants[first.input[1]].dims[1] <= 4:  # channels of an image
            excluded.append(first.name)
        if last_in_float:
            excluded.append(last.name)
    return excluded


def nodes_for(graph, output: str) -> list:
    """The nodes that an output depends on, in their order."""
    needed, nodes = {output}, []
    for node in reversed(graph.node):
        if needed & set(node.output):
            needed |= set(node.input)
            nodes.insert(0, node)
    return nodes


# ------------------------------------------------------------------------------------------------------ known
def move_table(source: str, quantized: str, images: np.ndarray, size: int | None) -> None:
    """Give a quantized file a table of its own for `known`, as int8 moves the scores that it compares.

    Each entry moves as the scores of equal rank do, from `source` to `quantized`, over images [N, H, W, C] of
    the training split as the files take them, in batches of `size`. Without `known` there is nothing to do.
    """
    proto = onnx.load(quantized)
    if len(proto.graph.output) < 2:
        return
    before, after = (np.sort(scores(file, images, size)) for file in (source, quantized))
    name, _ = table_and_score(proto.graph)
    table = next(tensor for tensor in proto.graph.initializer if tensor.name == name)
    entries = onnx.numpy_helper.to_array(table)
    moved = np.sort(entries + np.interp(entries, before, after - before)).astype(np.float32)
    table.CopyFrom(onnx.numpy_helper.from_array(moved, table.name))
    onnx.save(proto, quantized)


def table_and_score(graph) -> list[str]:
    """The names of the two values whose comparison makes `known`."""
    return list(next(node for node in nodes_for(graph, "known") if node.op_type == "Less").input)


def scores(file: str, images: np.ndarray, size: int | None) -> np.ndarray:
    """The scores [N] that a file compares with its table, of images [N, H, W, C] in batches of `size`."""
    import onnxruntime

    proto = onnx.load(file)
    score = table_and_score(proto.graph)[1]
    proto.graph.output.append(onnx.helper.make_tensor_value_info(score, onnx.TensorProto.FLOAT, None))
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.concatenate([session.run([score], {"image": b})[0].ravel() for b in batches(images, size)])


# -------------------------------------------------------------------------------------------------- finishing
def finish(path: str, spec: dict, opset: int) -> bytes:
    """The bytes of a quantized file with the spec inside, and without what only takes space.

    In a small network names, and constants that are stored twice, take as much space as a layer.
    """
    proto = onnx.load(path)
    short_names = {value.name: value.name for value in (*proto.graph.input, *proto.graph.output)}
    short_names[""] = ""  # of an optional input that is left out
    constants = {}  # equal ones are stored once
    for tensor in proto.graph.initializer:
        name = tensor.name
        tensor.name = ""
        same = constants.setdefault(tensor.SerializeToString(), tensor)
        same.name = short_names[name] = same.name or f"c{len(constants)}"
    merged = list(constants.values())
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(merged)
    for node in proto.graph.node:
        for name in node.output:
            short_names.setdefault(name, f"t{len(short_names)}")
        node.input[:] = [short_names[name] for name in node.input]
        node.output[:] = [short_names[name] for name in node.output]
        node.ClearField("name")
        node.ClearField("doc_string")
    return onnx_file.finish(proto, spec, opset)


# ------------------------------------------------------------------------------------------------------ speed
def measure_speed(unquantized: str, quantized: str, images: np.ndarray, threads: int | None = None) -> dict:
    """How much faster it is on uint8 [N, H, W, C]: `speedup` by batch size, and perhaps a `warning`."""
    slow, fast = (Model(file, threads) for file in (unquantized, quantized))
    figures = {}
    for size in [fast.batch] if fast.batch else (1, 64):
        batch = fit_to_input(np.resize(images[:size], (size, *images.shape[1:])), fast.spec)
        figures[str(size)] = round(speedup(slow.predict, fast.predict, batch), 2)
    warning = f"it is not faster than float32 on this machine ({speed_in_words(figures)})"
    return {"speedup": figures} | ({} if min(figures.values()) >= FASTER else {"warning": warning})


def speedup(slow: Callable, fast: Callable, inputs: np.ndarray, seconds: float = 0.3) -> float:
    """How many times as fast `fast(inputs)` is as `slow(inputs)`, timed in turn.

    Another process, on a shared machine, delays now one and now the other: the fastest fifth of each counts.
    """
    timers = [timeit.Timer(lambda run=run: run(inputs)) for run in (slow, fast)]
    times = [[timer.timeit(1) for timer in timers]]  # of the first run, which is slower
    until = time.perf_counter() + seconds
    while time.perf_counter() < until or len(times) < 6:
        times.append([timer.timeit(1) for timer in timers])
    slow_time, fast_time = np.quantile(times[1:], 0.2, axis=0)
    return float(slow_time / fast_time)


def speed_in_words(figures: dict[str, float]) -> str:
    return " and ".join(f"{times:.2f} times at batch size {size}" for size, times in figures.items())
