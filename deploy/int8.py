"""Static int8 quantization of an exported ONNX file by onnxruntime's own quantizer, and what else it can be asked for.

Weights and activations become 8-bit integers between QuantizeLinear and DequantizeLinear nodes, their ranges taken from
calibration images that run through the graph's own preprocessing. Preprocessing and softmax stay float32.
"""

import contextlib
import io
import logging
import time

import numpy as np
import onnx

WEIGHTED = ("Conv", "Gemm", "MatMul")
# Beside those, what onnxruntime has int8 kernels for, so that values need not become float32 between two layers.
OP_TYPES = (*WEIGHTED, "Add", "AveragePool", "Clip", "Concat", "GlobalAveragePool", "MaxPool", "Relu")
HISTOGRAM_PIXELS = (
    1 << 20
)  # of images for percentile and entropy, which keep every activation of every image in memory
FASTER = 1.05  # times; less is within what two measurements differ by
# What onnxruntime's guidance names, in the order tried. The first: weights per channel in 7 bits, whose products cannot
# saturate, so that processors with and without VNNI compute the same; activations uint8 from their least to their
# largest value; the layer that reads the image in float32, which int8 makes slower.
ALTERNATIVES = {
    "7-bit weights per channel": {},
    "percentile calibration": {"calibration": "Percentile"},
    "entropy calibration": {"calibration": "Entropy"},
    "the last layer in float32": {"last_in_float": True},
    "8-bit weights": {"reduce_range": False},
    "weights per tensor": {"per_channel": False},
    "signed activations": {"activations": "QInt8"},
    "the first layer in int8": {"first_in_float": False},
}


def quantize(
    source,
    target,
    images,
    *,
    calibration="MinMax",
    activations="QUInt8",
    reduce_range=True,
    per_channel=True,
    first_in_float=True,
    last_in_float=False,
):
    """Write `target`, the ONNX file `source` in int8, calibrated on uint8 images [N, H, W, C].

    Raises whatever onnxruntime's quantizer does, and ValueError where nothing is there to quantize.
    """
    from onnxruntime.quantization import CalibrationMethod, QuantType, quantize_static

    if calibration != "MinMax":
        images = images[: max(16, HISTOGRAM_PIXELS // (images.shape[1] * images.shape[2]))]
    excluded = nodes_in_float(onnx.load(source).graph, first_in_float, last_in_float)
    with quiet():
        quantize_static(
            source,
            target,
            Batches(images),
            op_types_to_quantize=list(OP_TYPES),
            nodes_to_exclude=excluded,
            per_channel=per_channel,
            reduce_range=reduce_range,
            activation_type=QuantType[activations],
            weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod[calibration],
            # A fully connected layer may leave float32: logits in 8 bits would make coarse probabilities.
            extra_options={"OpTypesToExcludeOutputQuantization": ["Gemm", "MatMul"]},
        )


def choose(source, images, check, load, *, max_drop, any_speed):
    """Quantize by one alternative after another until one is accurate enough, and faster here than `source`.

    -> (which of ALTERNATIVES was taken, its file, the figures of all that were tried). images: to calibrate with,
    uint8 [N, H, W, C]; check: others with their labels, to choose by. load: function from a path to a function from
    images to probabilities. max_drop: how many points of accuracy may be lost. any_speed: a slower one will do. Where
    none will, the most accurate is taken. Raises ValueError where onnxruntime cannot do it.
    """
    (inputs, labels), tried, before = check, [], load(source)
    right = (before(inputs).argmax(1) == labels).mean()
    batches = {str(n): np.resize(inputs, (n, *inputs.shape[1:])) for n in (1, 64)}
    for k, (name, settings) in enumerate(ALTERNATIVES.items()):
        file = f"{source}.{k}.onnx"
        try:
            quantize(source, file, images, **settings)
        except Exception as error:  # onnxruntime's quantizer raises anything at all
            raise ValueError(" ".join(str(error).split())) from None
        after = load(file)
        drop = round(100 * float(right - (after(inputs).argmax(1) == labels).mean()), 3)
        speed = {n: round(speedup(before, after, batch), 2) for n, batch in batches.items()}
        tried.append({"quantization": name, "drop_training": drop, "speedup": speed})
        if drop <= max_drop and (any_speed or is_faster(tried[-1])):
            return k, file, tried
    k = min(range(len(tried)), key=lambda k: tried[k]["drop_training"])
    return k, f"{source}.{k}.onnx", tried


def is_faster(figures):
    return min(figures["speedup"].values()) >= FASTER


def nodes_in_float(graph, first_in_float, last_in_float):
    """The names of nodes to leave alone: preprocessing, softmax, sums with a constant, and layers on request."""
    names = [node.name for node in graph.node]
    weighted = [node for node in graph.node if node.op_type in WEIGHTED]
    if not weighted:
        raise ValueError("the network has no layer to quantize")
    constants = {tensor.name: tensor for tensor in graph.initializer}
    excluded = names[: names.index(weighted[0].name)] + names[names.index(weighted[-1].name) + 1 :]
    excluded += [n.name for n in graph.node if n.op_type == "Add" and any(i in constants for i in n.input)]
    first = weighted[0]
    few_channels = first.op_type == "Conv" and constants[first.input[1]].dims[1] <= 4
    if first_in_float and few_channels and len(weighted) > 1:
        excluded.append(first.name)
    if last_in_float and len(weighted) > 1:
        excluded.append(weighted[-1].name)
    return excluded


class Batches:
    """A calibration data reader: uint8 images [N, H, W, C] in batches of 16."""

    def __init__(self, images):
        self.batches = iter([images[start : start + 16] for start in range(0, len(images), 16)])

    def get_next(self):
        batch = next(self.batches, None)
        return None if batch is None else {"image": np.ascontiguousarray(batch)}


@contextlib.contextmanager
def quiet():
    """Without the quantizer's prints, and its advice to preprocess: torch's exporter has folded all there is to."""

    def wanted(record):
        return not str(record.msg).startswith("Please consider")

    logger = logging.getLogger()
    logger.addFilter(wanted)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.removeFilter(wanted)


def finish(path, properties):
    """The bytes of a quantized file with this metadata, a dict of texts, and without what only weighs.

    In a small network names, and constants that are there twice, weigh as much as a layer.
    """
    file = onnx.load(path)
    graph, constants, short = file.graph, {}, {}
    short.update({"": ""}, **{value.name: value.name for value in (*graph.input, *graph.output)})
    for tensor in graph.initializer:
        name, tensor.name = tensor.name, ""
        same = constants.setdefault(tensor.SerializeToString(), tensor)
        short[name] = same.name = same.name or f"c{len(constants)}"
    del graph.initializer[:], graph.value_info[:], file.metadata_props[:]
    graph.initializer.extend(constants.values())
    for node in graph.node:
        for name in node.output:
            short.setdefault(name, f"t{len(short)}")
        inputs, outputs = ([short[name] for name in names] for names in (node.input, node.output))
        for field in ("input", "output", "name", "doc_string"):
            node.ClearField(field)
        node.input.extend(inputs)
        node.output.extend(outputs)
    onnx.helper.set_model_props(file, properties)
    onnx.checker.check_model(file, full_check=True)
    return file.SerializeToString()


def speedup(slow, fast, inputs, seconds=0.6):
    """How many times as fast `fast(inputs)` is as `slow(inputs)`, timed in turn.

    What takes the processor away for a while, on a shared machine, hits one or the other: each one's quickest fifth
    counts.
    """
    times, until = [], time.perf_counter() + seconds
    slow(inputs), fast(inputs)
    while time.perf_counter() < until or len(times) < 10:
        started = time.perf_counter()
        slow(inputs)
        between = time.perf_counter()
        fast(inputs)
        times.append((between - started, time.perf_counter() - between))
    before, after = np.quantile(times, 0.2, axis=0)
    return float(before / after)
