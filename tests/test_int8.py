"""int8: what its file holds, and what its own gate refuses."""

import re
import shutil
import time

import numpy as np
import onnx
import pytest
from test_step2 import parity_of

import data
import step2_export
import step3_infer
from deploy import exporters, gate, int8, speed, trust
from deploy.exporters import Source, export_onnx
from deploy.reference import reference
from inference.predict import Model

NAMES = [quantization.name for quantization in int8.QUANTIZATIONS]


@pytest.fixture(scope="session")
def unquantized(once, trained):
    """Path of the trained network as ONNX for the quantizer, which takes seconds to export. Read
    only."""
    return once("unquantized", export_unquantized, trained)


def export_unquantized(place, trained):
    run = step2_export.read_run(str(trained.run))
    spec = Model(str(trained.export / "model.onnx")).spec
    source = Source(run.deployable(), spec, opset=int8.OPSET)
    export_onnx(source, str(place / "model.onnx"))
    return place / "model.onnx"


@pytest.fixture
def digits():
    return data.load("digits")


def accuracies(monkeypatch, *values):
    """Let the network have the first of these accuracies on training images, and what is tried the
    others."""
    left = list(values)
    monkeypatch.setattr(int8, "accuracy", lambda *_: left.pop(0))
    monkeypatch.setattr(
        int8, "quantize", lambda source, target, *_, **__: shutil.copy(source, target)
    )


# ------------------------------------------------------------------------------ what the file holds


def test_the_file_is_small_accurate_and_says_how_it_was_made(call, all_formats):
    file = all_formats / "model.int8.onnx"
    figures = parity_of(all_formats)["onnx-int8"]
    known = 4 * (80 * 80 + 80 + 1000)  # bytes: the float32 of the second output, in both files
    assert file.stat().st_size - known < 0.28 * (all_formats / "model.onnx").stat().st_size
    assert figures["passed"] and figures["drop"] <= 0.5 and figures["samples"] == 360
    assert figures["accuracy"] == pytest.approx(figures["accuracy_trained"], abs=0.005)
    assert figures["speedup"].keys() == {"1", "64"}
    assert figures["tried"][-1]["quantization"] in NAMES
    assert (figures["file"], figures["runs_with"]) == ("model.int8.onnx", "onnxruntime")
    spec = Model(str(file)).spec
    assert figures["quantization"] in spec["quantization"]
    assert spec["self_test_tolerance"] == 2e-2
    call(step3_infer.main, "--model", file, "--self-test").done()


def test_the_layers_are_int8_and_the_preprocessing_is_not(all_formats):
    graph = onnx.load(all_formats / "model.int8.onnx").graph
    makers = {output: node for node in graph.node for output in node.output}
    kinds = [node.op_type for node in graph.node]

    def is_int8(node):
        return all(
            makers[name].op_type == "DequantizeLinear" for name in node.input[:2] if name in makers
        )

    # without those of `known`, which stay in float32
    main = int8.nodes_for(graph, graph.output[0].name)
    layers = [node for node in main if node.op_type in ("Conv", "Gemm")]
    # the first one reads the image
    assert [is_int8(node) for node in layers] == [False] + 7 * [True]
    softmax = [node for node in graph.node if node.op_type == "Softmax"]
    assert "DequantizeLinear" not in [makers[node.input[0]].op_type for node in softmax]
    dequantize = [node for node in graph.node if node.op_type == "DequantizeLinear"]
    assert {len(node.input) for node in dequantize} == {3}  # onnxruntime 1.17 needs zero points
    weights = [
        onnx.numpy_helper.to_array(tensor).astype(int)
        for tensor in graph.initializer
        if tensor.data_type == onnx.TensorProto.INT8 and len(tensor.dims) > 1
    ]
    assert len(weights) == 7 and max(abs(values).max() for values in weights) <= 64
    # resizing: six bands, then columns
    assert kinds.count("Gelu") == 7 and kinds.count("MatMul") == 7


def test_every_quantization_can_be_made(trained, digits, tmp_path):
    source = str(trained.export / "model.onnx")
    for count in (10, 40):  # no multiple of the batch size
        images = digits.train_images[:count]
        for quantization in int8.QUANTIZATIONS:
            int8.quantize(source, str(tmp_path / "out.onnx"), images, quantization)
            probabilities = Model(str(tmp_path / "out.onnx")).predict(images)
            assert np.allclose(probabilities.sum(1), 1, atol=1e-3)


# ----------------------------------------------------------------------------------- what is chosen


@pytest.fixture
def choose(unquantized, digits, tmp_path):
    """choose() -> the figures of what step 2 would choose for the trained network."""

    def choose():
        source = shutil.copy(unquantized, tmp_path)
        return int8.choose(source, digits.train_images, digits.train_labels, max_drop=0.5)[1]

    return choose


def test_quantizations_are_tried_in_order_until_one_is_accurate_enough(choose, monkeypatch):
    accuracies(monkeypatch, 0.99, 0.9, 0.9876)
    names, figures = NAMES, choose()
    assert figures["tried"] == [
        {"quantization": names[0], "drop_training": 9.0},
        # half of --max-drop is allowed on training images
        {"quantization": names[1], "drop_training": 0.24},
    ]
    assert figures["quantization"] == names[1]


def test_all_are_tried_at_most_and_the_most_accurate_is_taken(choose, monkeypatch):
    accuracies(monkeypatch, 0.99, 0.9, 0.95, 0.93, 0.92)
    names, figures = NAMES, choose()
    assert [trial["drop_training"] for trial in figures["tried"]] == [9.0, 4.0, 6.0, 7.0]
    assert len(names) == 4
    assert figures["quantization"] == names[1] and figures["drop_training"] == 4.0


def test_early_layers_stay_in_float32_on_request(unquantized):
    graph = onnx.load(unquantized).graph
    usual = int8.nodes_in_float(graph, int8.Quantization("usual"))
    early = int8.nodes_in_float(graph, int8.Quantization("early", early_in_float=2))
    kinds = {node.name: node.op_type for node in graph.node}
    assert [kinds[name] for name in early[len(usual) :]] == ["Conv", "Conv"]
    assert not set(early[len(usual) :]) & set(usual)


# --------------------------------------------------------------------- what is published or refused


def test_slower_than_float32_is_published_with_a_warning_and_in_the_same_bytes(
    call, trained, all_formats, unquantized, here, in_process, monkeypatch
):
    speeds = [2.0, 0.9]  # at batch sizes 1 and 64
    monkeypatch.setattr(speed, "speedup", lambda *_: speeds.pop(0))
    monkeypatch.setattr(exporters, "export_onnx", lambda _, path: shutil.copy(unquantized, path))
    command = ["--run", trained.run, "--format", "onnx-int8", "--out", here / "out"]
    result = call(step2_export.main, *command).done()
    figures = parity_of(here / "out")["onnx-int8"]
    assert figures["passed"] and figures["failures"] == []
    assert figures["speedup"] == {"1": 2.0, "64": 0.9}
    assert [trial["quantization"] for trial in figures["tried"]] == NAMES[:1]
    assert figures["quantization"] in result.out and "2.00 times at batch size 1" in result.out
    assert "not faster than float32" in figures["warning"]
    assert "0.90 times at batch size 64" in figures["warning"]
    (line,) = [line for line in result.err.splitlines() if line.startswith("warning: ")]
    assert "out/model.int8.onnx" in line and figures["warning"] in line
    made = (here / "out" / "model.int8.onnx").read_bytes()
    assert made == (all_formats / "model.int8.onnx").read_bytes()


def spoil(source, target):
    """Copy a quantized file with the channels of its convolutions in the wrong order."""
    graph = onnx.load(source)
    for tensor in graph.graph.initializer:
        if tensor.data_type == onnx.TensorProto.INT8 and len(tensor.dims) == 4:
            values = np.roll(onnx.numpy_helper.to_array(tensor), 1, axis=0)
            tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    onnx.save(graph, target)


def test_a_file_that_loses_more_than_max_drop_is_refused(
    trained, all_formats, digits, tmp_path, in_process
):
    file = str(tmp_path / "model.int8.onnx")
    spoil(all_formats / "model.int8.onnx", file)
    run = step2_export.read_run(str(trained.run))
    expected = reference(run, digits.test_images)
    _, failures = gate.prove_int8(run, file, digits, expected, max_drop=0.5)
    lost = re.search(
        r"it loses ([\d.]+) points of accuracy .* --max-drop allows 0.5: --max-drop \d", failures[0]
    )
    assert float(lost[1]) > 0.5
    _, failures = gate.prove_int8(run, file, digits, expected, max_drop=100)
    assert not [words for words in failures if "loses" in words]


@pytest.mark.parametrize(
    ("images", "lost", "won", "limit", "said"),
    [
        (50, 1, 0, None, "warning"),  # 2 points, but one image
        (54, 3, 1, None, "warning"),
        (50, 12, 0, None, "failure"),
        (10_000, 90, 5, None, "failure"),  # 0.85 points, and no chance
        (10_000, 60, 20, None, "nothing"),
        (50, 1, 0, 0.5, "failure"),  # the user's own limit
        (50, 1, 0, 2, "nothing"),
    ],
)
def test_a_loss_that_chance_explains_is_no_fault(images, lost, won, limit, said):
    before = np.ones(images, bool)
    before[lost : lost + won] = False
    after = np.ones(images, bool)
    after[:lost] = False
    drop, failures, warnings = trust.check_drop(before, after, limit)
    assert drop == pytest.approx(100 * (lost - won) / images, abs=1e-3)
    assert (len(failures), len(warnings)) == (said == "failure", said == "warning")
    if failures and limit:  # the way out that it names works
        enough = float(re.search(r"--max-drop ([\d.]+) accepts", failures[0])[1])
        assert not trust.check_drop(before, after, enough)[1]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--format onnx-int8", "onnx-int8"),
        ("--fixed --format onnx", "--fixed"),
        ("--reject 0.9", "--reject"),
        ("--min-probability 0.9", "--min-probability"),
    ],
)
def test_a_regression_has_neither_int8_nor_fixed_sizes_nor_thresholds(
    call, linear, here, options, words
):
    command = ["--run", linear.run, "--out", here / "out", *options.split()]
    call(step2_export.main, *command).error(2, words, "regression")


def test_a_network_without_layers_cannot_be_quantized(tmp_path):
    graph = onnx.helper.make_graph([], "empty", [], [onnx.ValueInfoProto(name="probabilities")])
    with pytest.raises(ValueError, match="no layer to quantize"):
        int8.nodes_in_float(graph, int8.QUANTIZATIONS[0])


@pytest.mark.parametrize("option", ["--max-drop -1", "--max-drop nan", "--max-drop much"])
def test_wrong_limit(call, here, option):
    call(step2_export.main, "--format", "onnx-int8", *option.split()).error(2, *option.split())


def test_speedup_is_how_many_times_as_fast():
    ratio = speed.speedup(lambda _: time.sleep(0.08), lambda _: time.sleep(0.02), None, seconds=0.1)
    assert 2 < ratio < 6
