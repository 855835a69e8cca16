"""What is left to do on an ONNX file after torch's exporter: clean-up, IR version, spec, check."""

import json
from typing import NamedTuple

from deploy import describe


class Opset(NamedTuple):
    """The IR version that an opset came with, and the oldest onnxruntime seen to run such files."""

    ir_version: int
    onnxruntime: str


# 1.15 is the oldest onnxruntime that was tried.
OPSETS = {
    18: Opset(8, "1.15"),
    19: Opset(9, "1.16"),
    20: Opset(9, "1.17"),
    21: Opset(10, "1.18"),
    22: Opset(10, "1.21"),
    23: Opset(11, "1.23"),
}


def finish_onnx(proto, spec: dict, opset: int) -> bytes:
    """The bytes of an onnx.ModelProto with the spec inside.

    The class names get an entry of their own, for other readers.
    """
    import onnx  # not at the top: step2's parser needs OPSETS and does not wait for it

    remove_traces(proto.graph)
    reorder_gelu(proto.graph)
    pool_maxima(proto.graph)

    # The exporter's own IR version would shut out older onnxruntimes.
    proto.ir_version = OPSETS[opset].ir_version
    spec = describe.describe_onnx(spec, opset, OPSETS[opset].onnxruntime)
    properties = {"spec": json.dumps(spec), "classes": json.dumps(spec["classes"])}
    onnx.helper.set_model_props(proto, properties)
    onnx.checker.check_model(proto, full_check=True)
    return proto.SerializeToString()


def remove_traces(graph) -> None:
    """Remove what tells of the exporting machine, and what some engines cannot read."""
    for node in graph.node:
        del node.metadata_props[:]  # stack traces of this machine
        if (
            node.op_type == "Reshape"
        ):  # OpenCV refuses allowzero, which means nothing without a zero
            del node.attribute[:]
    del graph.value_info[:]  # tract takes the names of free sizes in it for different ones


def reorder_gelu(graph) -> None:
    """Turn x * (0.5 * (1 + erf)) into (x * (1 + erf)) * 0.5.

    The first is how the exporter writes GELU before opset 20. The second onnxruntime computes as
    one operator, which takes a tenth less time for the default network.
    """
    producers = {output: node for node in graph.node for output in node.output}

    def producer(node, position: int, op_type: str):
        """The node that makes an input of a node, or None if it is of another type."""
        made_by = producers.get(node.input[position]) if node is not None else None
        return made_by if made_by is not None and made_by.op_type == op_type else None

    for product in graph.node:
        if product.op_type != "Mul":
            continue
        half = producer(product, 1, "Mul")
        one_plus = producer(half, 1, "Add")
        erf = producer(one_plus, 0, "Erf")
        if erf is None:
            continue

        constant = half.input[0]
        half.input[0] = product.input[0]  # x
        product.input[0] = half.output[0]
        product.input[1] = constant


def pool_maxima(graph) -> None:
    """Turn ReduceMax over height and width into GlobalMaxPool and Flatten.

    ncnn knows no ReduceMax.
    """
    import onnx

    constants = {tensor.name: tensor for tensor in graph.initializer}
    # From the last node on, so that inserting a node does not move those that are still to come.
    for number in reversed(range(len(graph.node))):
        node = graph.node[number]
        if not is_max_of_maps(node, constants):
            continue
        pooled = f"{node.output[0]}_pooled"
        pool = onnx.helper.make_node("GlobalMaxPool", [node.input[0]], [pooled])
        node.CopyFrom(onnx.helper.make_node("Flatten", [pooled], [node.output[0]], axis=1))
        graph.node.insert(number, pool)

    used = {output.name for output in graph.output}
    for node in graph.node:
        used.update(node.input)
    for name, tensor in constants.items():
        if name not in used:
            graph.initializer.remove(tensor)


def is_max_of_maps(node, constants: dict) -> bool:
    """Is this node the maximum over height and width, which it removes?"""
    import onnx

    if node.op_type != "ReduceMax" or len(node.input) < 2 or node.input[1] not in constants:
        return False
    axes = onnx.numpy_helper.to_array(constants[node.input[1]]).tolist()
    keep_dimensions = 1  # the operator's default
    for attribute in node.attribute:
        if attribute.name == "keepdims":
            keep_dimensions = attribute.i
    return sorted(axes) in ([2, 3], [-2, -1]) and not keep_dimensions
