"""int8: what its file holds, and what its own gate refuses."""

import re
import time

import numpy as np
import onnx
import pytest
from test_step2 import parity_of

import data
import step1_train
import step2_export
import step3_infer
from deploy import int8


@pytest.fixture
def int8_of(call, trained, here, in_process):
    """int8_of(*options) -> (Result, the directory it wrote to): step 2 on the trained run, as int8."""

    def export(*options):
        arguments = ["--run", trained.run, "--format", "onnx-int8", "--out", here / "out", *options]
        return call(step2_export.main, *arguments), here / "out"

    return export


@pytest.fixture
def one_alternative(monkeypatch):
    """Try the first quantization only."""
    monkeypatch.setattr(int8, "ALTERNATIVES", {"the only one": {}})


def speeds(monkeypatch, *values):
    """Let int8 files be measured to be this many times as fast, one value a measurement, the last for all others."""
    left = list(values)
    monkeypatch.setattr(int8, "speedup", lambda *_: left.pop(0) if len(left) > 1 else left[0])


def test_the_file_is_small_accurate_and_says_how_it_was_made(call, int8_of, trained, monkeypatch):
    speeds(monkeypatch, 2.0)
    result, out = int8_of()
    result.done()
    file, figures = out / "model.int8.onnx", parity_of(out)["onnx-int8"]
    assert file.stat().st_size < 0.28 * (trained.export / "model.onnx").stat().st_size
    assert figures["passed"] and figures["drop"] <= 0.5 and figures["samples"] == 360
    assert figures["accuracy"] == pytest.approx(figures["accuracy_trained"], abs=0.005)
    assert (
        figures["speedup"] == {"1": 2.0, "64": 2.0}
        and figures["tried"][-1]["quantization"] in int8.ALTERNATIVES
    )
    spec = step3_infer.Model(str(file)).spec
    assert figures["quantization"] in spec["quantization"] and figures["quantization"] in result.out
    assert "2.0 times at batch 64" in result.out and "WARNING" not in result.out + result.err
    call(step3_infer.main, "--model", file, "--self-test").done()


def test_the_layers_are_int8_and_the_preprocessing_is_not(int8_of, monkeypatch, one_alternative):
    speeds(monkeypatch, 2.0)
    graph = onnx.load(int8_of()[1] / "model.int8.onnx").graph
    makers = {output: node for node in graph.node for output in node.output}
    kinds = [node.op_type for node in graph.node]

    def is_int8(node):
        return all(makers[name].op_type == "DequantizeLinear" for name in node.input[:2] if name in makers)

    layers = [node for node in graph.node if node.op_type in ("Conv", "Gemm")]
    assert [is_int8(node) for node in layers] == [False] + 7 * [True]  # the first one reads the image
    assert "DequantizeLinear" not in [
        makers[node.input[0]].op_type for node in graph.node if node.op_type == "Softmax"
    ]
    assert {len(n.input) for n in graph.node if n.op_type == "DequantizeLinear"} == {
        3
    }  # onnxruntime 1.17 needs zero points
    weights = [
        tensor
        for tensor in graph.initializer
        if tensor.data_type == onnx.TensorProto.INT8 and len(tensor.dims) > 1
    ]
    assert (
        len(weights) == 7 and max(abs(onnx.numpy_helper.to_array(w).astype(int)).max() for w in weights) <= 64
    )
    assert kinds.count("Gelu") == 7 and "Resize" in kinds


def test_same_bytes_twice(int8_of, monkeypatch, one_alternative):
    speeds(monkeypatch, 2.0)
    first = (int8_of()[1] / "model.int8.onnx").read_bytes()
    assert (int8_of()[1] / "model.int8.onnx").read_bytes() == first


def test_slower_than_float32_is_refused(int8_of, monkeypatch, one_alternative):
    speeds(monkeypatch, 2.0, 0.9)
    result, out = int8_of()
    result.error(
        1, "onnx-int8", "model.int8.onnx is not written", "not faster than float32", "0.9", "--keep-slower"
    )
    assert not (out / "model.int8.onnx").exists() and not parity_of(out)["onnx-int8"]["passed"]


def test_slower_is_kept_on_request_with_a_warning(int8_of, monkeypatch):
    speeds(monkeypatch, 0.9)
    result, out = int8_of("--keep-slower")
    assert "warning: " in result.done().err and "not faster than float32" in result.err
    assert (out / "model.int8.onnx").exists() and len(parity_of(out)["onnx-int8"]["tried"]) == 1


def test_alternatives_are_tried_in_order_until_one_will_do(int8_of, monkeypatch):
    speeds(monkeypatch, 0.9, 0.9, 2.0, 0.9, 2.0)
    result, out = int8_of()
    names, figures = list(int8.ALTERNATIVES), parity_of(out)["onnx-int8"]
    assert [trial["quantization"] for trial in figures["tried"]] == names[:3]
    assert figures["quantization"] == names[2] and names[2] in result.done().out


@pytest.fixture
def spoiled(monkeypatch):
    """Quantized files whose weights are half their size: fast, and wrong."""
    quantize = int8.quantize

    def spoil(source, target, images, **settings):
        quantize(source, target, images, **settings)
        graph = onnx.load(target)
        for tensor in graph.graph.initializer:
            if tensor.data_type == onnx.TensorProto.INT8 and len(tensor.dims) == 4:
                values = np.roll(onnx.numpy_helper.to_array(tensor), 1, axis=0)
                tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
        onnx.save(graph, target)

    monkeypatch.setattr(int8, "quantize", spoil)


def test_inaccurate_is_refused_and_an_earlier_file_taken_away(int8_of, monkeypatch, one_alternative, spoiled):
    speeds(monkeypatch, 3.0)
    result, out = int8_of("--keep-slower")
    line = result.error(1, "model.int8.onnx is not written", "points of accuracy", "--max-drop allows 0.5")
    lost = float(re.search(r"loses ([\d.]+) points", line)[1])
    assert lost > 0.5 and not (out / "model.int8.onnx").exists()
    result, out = int8_of("--max-drop", 100)
    assert result.done() and (out / "model.int8.onnx").exists()


def test_a_regression_has_no_int8(call, here):
    call(step1_train.main, "--dataset", "linear", "--epochs", 1).done()
    call(step2_export.main, "--format", "onnx-int8").error(2, "onnx-int8", "regression")


@pytest.mark.parametrize("option", ["--max-drop -1", "--max-drop nan", "--max-drop much"])
def test_wrong_limit(call, here, option):
    call(step2_export.main, *option.split()).error(2, "--max-drop", option.split()[1])


def test_speedup_is_how_many_times_as_fast():
    ratio = int8.speedup(lambda _: time.sleep(0.012), lambda _: time.sleep(0.003), None, seconds=0.1)
    assert 2 < ratio < 6


def test_every_alternative_can_be_made(trained, tmp_path):
    source, images = str(trained.export / "model.onnx"), data.load("digits").train_images[:32]
    for settings in int8.ALTERNATIVES.values():
        int8.quantize(source, str(tmp_path / "out.onnx"), images, **settings)
        probabilities = step3_infer.Model(str(tmp_path / "out.onnx")).predict(images)
        assert np.allclose(probabilities.sum(1), 1, atol=1e-3)
