"""Files of one fixed size: their graph, how step3 runs them, and what is refused."""

import base64
import json
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image

import model
import step2_export
import step3_infer
from deploy import reference
from inference import images as image_module
from inference.errors import Problem
from inference.images import resize
from inference.predict import Model


def noise(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize("size", [(32, 32), (8, 8), (57, 43), (1, 300), (480, 641)])
def test_step3_resizes_as_the_network(size):
    image = noise(*size, 3)
    wanted = model.resize(torch.from_numpy(image)[None], (32, 28))[0].numpy()
    assert np.abs(resize(image, (32, 28)) - wanted).max() < 1e-3


def test_the_graph_is_fixed_and_casts_first(fixed_files):
    graph = onnx.load(fixed_files / "model.fixed.onnx").graph
    shape = graph.input[0].type.tensor_type.shape.dim
    assert [dim.dim_value for dim in shape] == [4, 32, 32, 1]
    assert [node.op_type for node in graph.node if "image" in node.input] == ["Cast"]
    assert not {"Shape", "Range", "Resize"} & {node.op_type for node in graph.node}


def test_int8_is_symmetric(fixed_files):
    graph = onnx.load(fixed_files / "model.fixed.int8.onnx").graph
    constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    points = [
        constants[node.input[2]] for node in graph.node if node.op_type.endswith("QuantizeLinear")
    ]
    assert points and all(point.dtype == np.int8 and not point.any() for point in points)


@pytest.mark.parametrize("size", [(8, 8), (32, 32), (43, 57)])
def test_step3_gives_it_resized_images(fixed_files, trained, size):
    run, images = step2_export.read_run(str(trained.run)), noise(4, *size, 1)
    rounded = model.resize(torch.from_numpy(images), (32, 32)).round().byte().numpy()
    got = Model(fixed_files / "model.fixed.onnx").run(images)
    wanted = reference.reference(run, rounded)
    assert (
        np.abs(got[0] - wanted.main).max() <= 1e-4 and np.abs(got[1] - wanted.known).max() <= 5e-3
    )


@pytest.mark.parametrize("name", ["model.fixed.onnx", "model.fixed.int8.onnx"])
def test_golden_tensors_are_for_any_engine(fixed_files, name):
    session = onnxruntime.InferenceSession(fixed_files / name)
    spec = json.loads(session.get_modelmeta().custom_metadata_map["spec"])
    assert spec["fixed"] == {"batch": 4, "input": "uint8"}
    tensors = [
        np.frombuffer(base64.b64decode(sample["tensor"]), np.uint8) for sample in spec["golden"]
    ]
    got = session.run(None, {"image": np.stack(tensors).reshape(4, 32, 32, 1)})[0]
    wanted = np.array([sample["probabilities"] for sample in spec["golden"]])
    assert np.abs(got - wanted).max() <= spec["self_test_tolerance"]


def test_batches(call, fixed_files, samples, here):
    file = fixed_files / "model.fixed.onnx"
    exported = Model(file)
    assert exported.batch == 4 and len(exported.predict(noise(3, 20, 20, 1))) == 3
    with pytest.raises(Problem, match="batches of 4, not of 5"):
        exported.predict(noise(5, 32, 32, 1))
    Image.fromarray(noise(40, 30)).save(here / "odd.png")
    result = call(
        step3_infer.main, "--model", file, "--top-k", "1", *samples[:5], here / "odd.png"
    ).done()
    assert len(result.out.splitlines()) == 6
    call(step3_infer.main, "--model", file, "--self-test").done()
    refused = call(step3_infer.main, "--model", file, "--batch-size", "5", samples[0])
    assert refused.code == 2 and "takes batches of 4: leave out --batch-size" in refused.err


def test_float_input_is_not_rounded(call, small_run, here, plant, in_process):
    plant()
    call(
        step2_export.main, "--format", "onnx", "--fixed", "--input", "float", "--out", "out"
    ).done()
    exported, images = Model(here / "out" / "model.fixed.onnx"), noise(7, 43, 57, 1)
    wanted = reference.reference(step2_export.read_run(str(small_run)), images).main
    assert exported.batch is None and np.abs(exported.predict(images) - wanted).max() <= 1e-4
    parity = json.loads((here / "out" / "parity.json").read_text())
    assert parity["onnx-fixed"]["passed"] and parity["onnx"]["passed"]


def test_gate_catches_another_resizing_outside(call, small_run, here, monkeypatch, in_process):
    shift = resize
    for module in (image_module, reference):
        monkeypatch.setattr(
            module, "resize", lambda image, *sizes: shift(np.roll(image, 1, axis=0), *sizes)
        )
    result = call(step2_export.main, "--format", "torchscript", "--fixed")
    assert result.code == 1 and "resizes differently" in result.err
    assert not (here / "exports" / "small" / "model.fixed.pt").exists()


def test_spec_that_lies(fixed_files, here, call, samples):
    shutil.copy(fixed_files / "model.fixed.onnx", here / "model.onnx")
    proto = onnx.load(here / "model.onnx")
    spec = json.loads(next(entry.value for entry in proto.metadata_props if entry.key == "spec"))
    for lie in ({"batch": 0, "input": "uint8"}, {"batch": 4, "input": "int64"}, {"batch": 4}, 7):
        onnx.helper.set_model_props(proto, {"spec": json.dumps({**spec, "fixed": lie})})
        onnx.save(proto, here / "model.onnx")
        result = call(step3_infer.main, "--model", here / "model.onnx", samples[0])
        assert (
            result.code == 1
            and len(result.err.splitlines()) == 1
            and "malformed spec" in result.err
        )


def test_what_is_refused(call, here, monkeypatch, small_run):
    result = call(step2_export.main, "--input", "float")
    assert result.code == 2 and "--input requires --fixed" in result.err
    result = call(step2_export.main, "--fixed", "0")
    assert result.code == 2
    result = call(step2_export.main, "--fixed", "--format", "pt2")
    assert result.code == 2 and "--fixed only applies to --format torchscript or onnx" in result.err
    for name, package in (("executorch", "executorch"), ("litert", "litert_torch")):
        monkeypatch.setitem(sys.modules, package, None)
        result = call(step2_export.main, "--format", name)
        assert result.code == 1 and f"pip install {package.replace('_', '-')}" in result.err


def test_network_that_a_format_cannot_hold(call, here, monkeypatch, small_run):
    def convert(*_):
        raise NotImplementedError("no such operator\nand a stack trace")

    monkeypatch.setitem(sys.modules, "litert_torch", SimpleNamespace(convert=convert))
    result = call(step2_export.main, "--format", "litert")
    result.error(
        1, "model.tflite is not written", "LiteRT cannot hold this network: no such operator"
    )
