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
def one_quantization(monkeypatch):
    """Try the first quantization only."""
    monkeypatch.setattr(int8, "QUANTIZATIONS", {"the only one": {}})


@pytest.fixture
def speeds(monkeypatch):
    """speeds(a, b): int8 is a times as fast at batch size 1, and b times at 64; without a call 2 and 2."""

    def patch(*values):
        left = list(values)
        monkeypatch.setattr(int8, "speedup", lambda *_: left.pop(0))

    monkeypatch.setattr(int8, "speedup", lambda *_: 2.0)
    return patch


def accuracies(monkeypatch, *values):
    """Let the network have the first of these accuracies on training images, and what is tried the others."""
    left = list(values)
    monkeypatch.setattr(int8, "accuracy", lambda *_: left.pop(0))


def test_the_file_is_small_accurate_and_says_how_it_was_made(call, int8_of, trained, speeds):
    result, out = int8_of()
    result.done()
    file, figures = out / "model.int8.onnx", parity_of(out)["onnx-int8"]
    known = 4 * (80 * 80 + 80 + 1000)  # bytes: the float32 of the second output, in both files
    assert file.stat().st_size - known < 0.28 * (trained.export / "model.onnx").stat().st_size
    assert figures["passed"] and figures["drop"] <= 0.5 and figures["samples"] == 360
    assert figures["accuracy"] == pytest.approx(figures["accuracy_trained"], abs=0.005)
    assert figures["speedup"] == {"1": 2.0, "64": 2.0} and "warning" not in figures
    assert figures["tried"][-1]["quantization"] in int8.QUANTIZATIONS
    assert (figures["file"], figures["runs_with"]) == ("model.int8.onnx", "onnxruntime")
    spec = step3_infer.Model(str(file)).spec
    assert figures["quantization"] in spec["quantization"] and figures["quantization"] in result.out
    assert spec["self_test_tolerance"] == 2e-2
    assert "2.00 times at batch size 64" in result.out and "warning" not in (result.out + result.err).lower()
    call(step3_infer.main, "--model", file, "--self-test").done()


def test_the_layers_are_int8_and_the_preprocessing_is_not(int8_of, speeds, one_quantization):
    graph = onnx.load(int8_of()[1] / "model.int8.onnx").graph
    makers = {output: node for node in graph.node for output in node.output}
    kinds = [node.op_type for node in graph.node]

    def is_int8(node):
        return all(makers[name].op_type == "DequantizeLinear" for name in node.input[:2] if name in makers)

    main = int8.nodes_for(graph, graph.output[0].name)  # without those of `known`, which stay in float32
    layers = [node for node in main if node.op_type in ("Conv", "Gemm")]
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
    assert kinds.count("Gelu") == 7 and kinds.count("MatMul") == 7  # resizing: six bands, then columns


def test_same_bytes_twice(int8_of, speeds, one_quantization):
    first = (int8_of()[1] / "model.int8.onnx").read_bytes()
    assert (int8_of()[1] / "model.int8.onnx").read_bytes() == first


def test_slower_than_float32_is_published_with_a_warning(int8_of, speeds, one_quantization):
    speeds(2.0, 0.9)
    result, out = int8_of()
    figures = parity_of(out)["onnx-int8"]
    assert (out / "model.int8.onnx").exists() and figures["passed"] and figures["failures"] == []
    assert figures["speedup"] == {"1": 2.0, "64": 0.9}
    assert (
        "not faster than float32" in figures["warning"]
        and "0.90 times at batch size 64" in figures["warning"]
    )
    (line,) = [line for line in result.done().err.splitlines() if line.startswith("warning: ")]
    assert "out/model.int8.onnx" in line and figures["warning"] in line


def test_speed_does_not_choose_the_quantization(int8_of, speeds):
    speeds(0.5, 0.5)
    figures = parity_of(int8_of()[1])["onnx-int8"]
    assert [trial["quantization"] for trial in figures["tried"]] == list(int8.QUANTIZATIONS)[:1]


def test_quantizations_are_tried_in_order_until_one_is_accurate_enough(int8_of, speeds, monkeypatch):
    accuracies(monkeypatch, 0.99, 0.9, 0.9876)
    result, out = int8_of()
    names, figures = list(int8.QUANTIZATIONS), parity_of(out)["onnx-int8"]
    assert figures["tried"] == [
        {"quantization": names[0], "drop_training": 9.0},
        {"quantization": names[1], "drop_training": 0.24},  # half of --max-drop is allowed on training images
    ]
    assert figures["quantization"] == names[1] and names[1] in result.done().out


def test_three_are_tried_at_most_and_the_most_accurate_is_taken(int8_of, speeds, monkeypatch):
    accuracies(monkeypatch, 0.99, 0.9, 0.95, 0.93)
    names, figures = list(int8.QUANTIZATIONS), parity_of(int8_of()[1])["onnx-int8"]
    assert [trial["drop_training"] for trial in figures["tried"]] == [9.0, 4.0, 6.0] and len(names) == 3
    assert figures["quantization"] == names[1] and figures["drop_training"] == 4.0


@pytest.fixture
def spoiled(monkeypatch):
    """Quantized files whose channels are in the wrong order."""
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


def test_inaccurate_is_refused_and_an_earlier_file_taken_away(int8_of, speeds, one_quantization, spoiled):
    result, out = int8_of()
    line = result.error(1, "model.int8.onnx is not written", "points of accuracy", "--max-drop allows 0.5")
    lost = float(re.search(r"loses ([\d.]+) points", line)[1])
    assert lost > 0.5 and not (out / "model.int8.onnx").exists()
    result, out = int8_of("--max-drop", 100, "--uncalibrated")
    assert result.done() and (out / "model.int8.onnx").exists()


def test_a_regression_has_no_int8(call, here):
    call(step1_train.main, "--dataset", "linear", "--epochs", 1).done()
    call(step2_export.main, "--format", "onnx-int8").error(2, "onnx-int8", "regression")


@pytest.mark.parametrize("option", ["--max-drop -1", "--max-drop nan", "--max-drop much"])
def test_wrong_limit(call, here, option):
    call(step2_export.main, "--format", "onnx-int8", *option.split()).error(2, *option.split())


def test_speedup_is_how_many_times_as_fast():
    ratio = int8.speedup(lambda _: time.sleep(0.08), lambda _: time.sleep(0.02), None, seconds=0.1)
    assert 2 < ratio < 6


def test_every_quantization_can_be_made(trained, tmp_path):
    source, images = str(trained.export / "model.onnx"), data.load("digits").train_images[:32]
    for settings in int8.QUANTIZATIONS.values():
        int8.quantize(source, str(tmp_path / "out.onnx"), images, **settings)
        probabilities = step3_infer.Model(str(tmp_path / "out.onnx")).predict(images)
        assert np.allclose(probabilities.sum(1), 1, atol=1e-3)
