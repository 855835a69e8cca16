"""The parity gate: a fault planted anywhere in an export is caught, and no faulty file is left."""

import copy
import json
import os
import shutil
import subprocess

import numpy as np
import onnx
import pytest
import torch
from conftest import onnx_with
from test_step2 import parity_of

import model
import step1_train
import step2_export
from deploy import gate


@pytest.fixture
def plant(monkeypatch, small):
    """plant(format, fault): let the fault(good file, path, deployable, spec) write the format's file."""

    def plant(name, fault):
        original = step2_export.FORMATS[name]

        def write(deployable, spec, path, opset, **unused):
            fault(small.export / original.file, path, deployable, spec)
            return {}

        monkeypatch.setitem(step2_export.FORMATS, name, original._replace(export=write))

    return plant


def assert_caught(result, name, out, *words):
    file = step2_export.FORMATS[name].file
    result.error(1, name, file, *words)
    assert not (out / file).exists()
    figures = parity_of(out)[name]
    assert figures["passed"] is False and figures["failures"]
    assert not [left for left in os.listdir(out) if left.startswith(".")]
    return figures


def deployable_with(monkeypatch, change):
    """Let `change` alter what the export is made from, but not the trained network itself."""
    original = gate.Run.deployable

    def changed(run, any_size=True):
        return change(original(copy.deepcopy(run), any_size))

    monkeypatch.setattr(gate.Run, "deployable", changed)


def test_without_a_fault_it_passes(call, small_run, in_process):
    call(step2_export.main, "--format", "torchscript").done()


def test_dropout_left_in_training_mode(call, small_run, here, monkeypatch, in_process):
    deployable_with(monkeypatch, lambda deployable: deployable.train())
    result = call(step2_export.main, "--format", "torchscript")
    figures = assert_caught(result, "torchscript", here / "exports" / "small", "differ by up to")
    assert figures["max_abs_diff"] > 1e-4


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # of a check that only training mode has
def test_batch_norm_left_in_training_mode(call, here, monkeypatch, in_process):
    call(step1_train.main, *"--model mynet --dropout 0 --epochs 1 --name norm".split()).done()
    deployable_with(monkeypatch, lambda deployable: deployable.train())
    result = call(step2_export.main, "--format", "torchscript")
    figures = assert_caught(result, "torchscript", here / "exports" / "norm", "differ by up to")
    assert figures["max_abs_diff"] > 1e-4


def test_pt2_weights_perturbed(call, small_run, here, monkeypatch, in_process):
    deployable_with(monkeypatch, perturb)
    result = call(step2_export.main, "--format", "pt2")
    assert_caught(result, "pt2", here / "exports" / "small", "differ by up to")


def perturb(deployable):
    with torch.no_grad():
        deployable.network.layers[-1].weight[3, 5] += 0.05
    return deployable


def test_torchscript_weights_perturbed(call, small_run, here, monkeypatch, in_process):
    deployable_with(monkeypatch, perturb)
    result = call(step2_export.main, "--format", "torchscript")
    assert_caught(result, "torchscript", here / "exports" / "small", "differ by up to")


def edit_initializer(change):
    """A fault: the good ONNX file with its largest tensor of weights changed."""

    def fault(good, path, deployable, spec):
        graph = onnx.load(good)
        floats = [tensor for tensor in graph.graph.initializer if tensor.data_type == onnx.TensorProto.FLOAT]
        tensor = max(floats, key=lambda tensor: np.prod(tensor.dims))
        tensor.CopyFrom(onnx.numpy_helper.from_array(change(onnx.numpy_helper.to_array(tensor)), tensor.name))
        onnx.save(graph, path)

    return fault


@pytest.mark.parametrize(
    "change", [lambda w: w * np.float32(1.01), lambda w: w * np.float32("nan")], ids=["perturbed", "NaN"]
)
def test_onnx_weights_changed(call, small_run, here, plant, in_process, change):
    plant("onnx", edit_initializer(change))
    result = call(step2_export.main, "--format", "onnx")
    assert_caught(result, "onnx", here / "exports" / "small", "differ by up to")


def test_the_second_proof_catches_it_as_well(call, small_run, here, plant):
    plant("onnx", edit_initializer(lambda weights: -weights))
    assert call(step2_export.main, "--format", "onnx").code == 1
    failures = parity_of(here / "exports" / "small")["onnx"]["failures"]
    assert [failure for failure in failures if failure.startswith("isolated: ")]


def test_a_file_that_does_not_run_in_isolation(call, small_run, here, plant, monkeypatch):
    plant("onnx", lambda good, path, deployable, spec: shutil.copy(good, path))
    failed = subprocess.CompletedProcess([], 1, "", "error: onnxruntime is missing\n")
    monkeypatch.setattr(gate.subprocess, "run", lambda *_, **__: failed)
    result = call(step2_export.main, "--format", "onnx")
    assert_caught(result, "onnx", here / "exports" / "small", "isolated", "onnxruntime is missing")


def test_wrong_order_of_class_names(call, small_run, here, plant, in_process):
    plant("onnx", lambda good, path, deployable, spec: onnx_with(good, path, classes=spec["classes"][::-1]))
    result = call(step2_export.main, "--format", "onnx")
    figures = assert_caught(result, "onnx", here / "exports" / "small", "classes")
    assert figures["accuracy"] < figures["accuracy_trained"]  # whoever reads the names gets wrong answers


@pytest.mark.parametrize("key", ["checkpoint_sha256", "mean", "image_size"])
def test_spec_of_another_network(call, small_run, here, plant, in_process, key):
    wrong = {"checkpoint_sha256": "0" * 64, "mean": [0.5], "image_size": [9, 9]}
    plant("onnx", lambda good, path, deployable, spec: onnx_with(good, path, **{key: wrong[key]}))
    assert_caught(call(step2_export.main, "--format", "onnx"), "onnx", here / "exports" / "small", key)


def test_mean_and_std_swapped(call, small_run, here, monkeypatch, in_process):
    init = model.Deployable.__init__

    def swapped(self, network, size, mean, std, **more):
        init(self, network, size, std, mean, **more)

    monkeypatch.setattr(model.Deployable, "__init__", swapped)
    result = call(step2_export.main, "--format", "torchscript")
    assert_caught(result, "torchscript", here / "exports" / "small", "differ by up to")


def test_wrong_resize_shows_at_other_sizes_only(call, small_run, here, monkeypatch, in_process):
    def forward(self, image):
        planes = torch.nn.functional.interpolate(image.permute(0, 3, 1, 2), size=self.image_size)  # nearest
        image = self.normalise(planes.permute(0, 2, 3, 1))
        logits, statistics = model.run_with_statistics(self.network, image, self.familiarity.layers)
        return self.calibrated(logits), self.familiarity(statistics, logits)

    monkeypatch.setattr(model.Deployable, "forward", forward)
    result = call(step2_export.main, "--format", "torchscript")
    figures = assert_caught(result, "torchscript", here / "exports" / "small", "random")
    assert figures["max_abs_diff"] <= 1e-4  # the test split has the native size


def test_missing_softmax(call, small_run, here, monkeypatch, in_process):
    monkeypatch.setattr(model.Deployable, "calibrated", lambda self, logits: logits)
    result = call(step2_export.main, "--format", "torchscript")
    assert_caught(result, "torchscript", here / "exports" / "small", "differ by up to")


def fix_dimensions(good, path, deployable, spec):
    graph = onnx.load(good)
    for dim, size in zip(graph.graph.input[0].type.tensor_type.shape.dim, (1, 8, 8, 1), strict=True):
        dim.dim_value = size
    onnx.save(graph, path)


def write_text(good, path, deployable, spec):
    with open(path, "w") as stream:
        stream.write("not a model")


@pytest.mark.parametrize(
    "fault", [fix_dimensions, write_text, lambda good, path, _, spec: onnx_with(good, path)]
)
def test_file_that_step3_cannot_run(call, small_run, here, plant, in_process, fault, small):
    out = here / "exports" / "small"
    shutil.copytree(small.export, out)
    plant("onnx", fault)
    assert_caught(call(step2_export.main, "--format", "onnx"), "onnx", out)


def test_failed_format_takes_its_earlier_file_away_and_no_other(
    call, small, small_run, here, plant, in_process
):
    out = here / "exports" / "small"
    shutil.copytree(small.export, out)
    plant("onnx", edit_initializer(lambda weights: -weights))
    result = call(step2_export.main, "--format", "onnx", "torchscript")
    assert_caught(result, "onnx", out)
    assert sorted(os.listdir(out)) == ["model.pt", "parity.json"] and parity_of(out)["torchscript"]["passed"]


def test_tolerance_is_the_users(call, small_run, here, plant, in_process):
    plant("onnx", edit_initializer(lambda weights: weights * np.float32(1.001)))
    assert_caught(call(step2_export.main, "--format", "onnx"), "onnx", here / "exports" / "small")
    call(step2_export.main, "--format", "onnx", "--tolerance", "0.1").done()
    figures = json.loads((here / "exports" / "small" / "parity.json").read_text())["onnx"]
    assert figures["passed"] and figures["tolerance"] == 0.1
