"""What is left to do on an ONNX file after torch's exporter: graph clean-up, IR version, metadata, check."""

import json

# opset: (the IR version it came with, the oldest onnxruntime seen to run the file; 1.15 is the oldest tried)
OPSETS = {18: (8, "1.15"), 19: (9, "1.16"), 20: (9, "1.17"), 21: (10, "1.18"), 22: (10, "1.21")}
OPSETS[23] = (11, "1.23")


def finish(proto, spec: dict, opset: int) -> bytes:
    """The bytes of an onnx.ModelProto with the spec inside, and the class names again for other readers."""
    import onnx  # not at the top: step2's parser needs OPSETS and does not wait for it

    for node in proto.graph.node:
        del node.metadata_props[:]  # stack traces of this machine
        if node.op_type == "Reshape":  # OpenCV refuses allowzero, which means nothing without a zero
            del node.attribute[:]
    del proto.graph.value_info[:]  # tract takes the names of free sizes in it for different ones
    reorder_gelu(proto.graph)
    pool_maxima(proto.graph)
    proto.ir_version = OPSETS[opset][0]  # the exporter's own IR version would shut out older onnxruntimes
    spec = {**spec, "opset": opset, "onnxruntime_min": OPSETS[opset][1]}
    onnx.helper.set_model_props(proto, {"spec": json.dumps(spec), "classes": json.dumps(spec["classes"])})
    onnx.checker.check_model(proto, full_check=True)
    return proto.SerializeToString()


def pool_maxima(graph) -> None:
    """Turn ReduceMax over height and width into GlobalMaxPool and Flatten: ncnn knows no ReduceMax."""
    import onnx

    constants = {tensor.name: tensor for tensor in graph.initializer}
    for number, node in reversed(list(enumerate(graph.node))):
        if node.op_type == "ReduceMax" and len(node.input) > 1 and node.input[1] in constants:
            axes = onnx.numpy_helper.to_array(constants[node.input[1]]).tolist()
            keep = next((attribute.i for attribute in node.attribute if attribute.name == "keepdims"), 1)
            if sorted(axes) in ([2, 3], [-2, -1]) and not keep:
                pooled = f"{node.output[0]}_pooled"
                pool = onnx.helper.make_node("GlobalMaxPool", [node.input[0]], [pooled])
                node.CopyFrom(onnx.helper.make_node("Flatten", [pooled], [node.output[0]], axis=1))
                graph.node.insert(number, pool)
    used = {name for node in graph.node for name in node.input} | {output.name for output in graph.output}
    for name in constants.keys() - used:
        graph.initializer.remove(constants[name])


def reorder_gelu(graph) -> None:
    """Turn x * (0.5 * (1 + erf)), as the exporter writes GELU before opset 20, into (x * (1 + erf)) * 0.5.

    In this order onnxruntime computes it as one operator: a tenth less time for the default network.
    """
    producers = {output: node for node in graph.node for output in node.output}
    for node in graph.node:
        half = producers.get(node.input[1]) if node.op_type == "Mul" else None
        one_plus = producers.get(half.input[1]) if half is not None and half.op_type == "Mul" else None
        erf = producers.get(one_plus.input[0]) if one_plus is not None and one_plus.op_type == "Add" else None
        if erf is None or erf.op_type != "Erf":
            continue
        constant, x = half.input[0], node.input[0]
        half.input[0], node.input[0], node.input[1] = x, half.output[0], constant
