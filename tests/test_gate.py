"""The parity gate: a fault planted anywhere in an export is caught, and no faulty file is left."""

import copy
import os
import shutil
import subprocess
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from conftest import onnx_with
from test_step2 import parity_of

import data
import model
import step1_train
import step2_export
from deploy import comparing, gate, isolated
from deploy.exporters import Source
from deploy.formats import FORMATS
from deploy.reference import TrainedRun, reference
from inference.errors import Problem
from inference.predict import Model


@pytest.fixture(scope="module")
def trusted(small):
    """What files of the small run are compared with: the run, the dataset, the network's outputs on
    its test split, and the spec of its files. Read only."""
    run = step2_export.read_run(str(small.run))
    dataset = data.load("digits")
    expected = reference(run, dataset.test_images)
    spec = Model(str(small.export / "model.onnx")).spec
    return SimpleNamespace(run=run, dataset=dataset, expected=expected, spec=spec)


@pytest.fixture
def prove(trusted, in_process):
    """prove(file) -> (figures, failures) of the gate, without the process of its own."""

    def prove(file, tolerance=1e-4):
        return gate.prove(trusted.run, str(file), trusted.dataset, trusted.expected, tolerance)

    return prove


@pytest.fixture
def write(trusted, tmp_path):
    """write(format, change) -> a file of the small network, of which `change` may alter what is
    exported."""

    def write(name, change=lambda deployable: deployable):
        chosen = FORMATS[name]
        deployable = change(copy.deepcopy(trusted.run).deployable())
        chosen.export(Source(deployable, trusted.spec), str(tmp_path / chosen.file))
        return tmp_path / chosen.file

    return write


def assert_caught(proof, *words):
    """The failures of a proof hold all words; returns its figures."""
    figures, failures = proof
    text = "\n".join(failures)
    assert failures and not [word for word in words if word not in text], failures
    return figures


def perturb(deployable):
    with torch.no_grad():
        deployable.network.layers[-1].weight[3, 5] += 0.05
    return deployable


# ------------------------------------------------------------------- faults of the exported network


def test_without_a_fault_it_passes(write, prove):
    figures, failures = prove(write("torchscript"))
    assert not failures and figures["max_abs_diff"] <= 1e-4


def test_dropout_left_in_training_mode(write, prove):
    file = write("torchscript", lambda deployable: deployable.train())
    assert assert_caught(prove(file), "differ by up to")["max_abs_diff"] > 1e-4


@pytest.mark.parametrize("name", ["torchscript", "pt2"])
def test_weights_perturbed(write, prove, name):
    assert_caught(prove(write(name, perturb)), "differ by up to")


def test_mean_and_std_swapped(write, prove, monkeypatch):
    init = model.Deployable.__init__

    def swapped(self, network, size, mean, std, **more):
        init(self, network, size, std, mean, **more)

    monkeypatch.setattr(model.Deployable, "__init__", swapped)
    assert_caught(prove(write("torchscript")), "differ by up to")


def test_wrong_resize_shows_at_other_sizes_only(write, prove, monkeypatch):
    def forward(self, image):
        # nearest
        planes = torch.nn.functional.interpolate(image.permute(0, 3, 1, 2), size=self.image_size)
        image = self.normalise(planes.permute(0, 2, 3, 1))
        logits, statistics = model.run_with_statistics(self.network, image, self.familiarity.layers)
        return self.calibrated(logits), self.familiarity(statistics, logits)

    monkeypatch.setattr(model.Deployable, "forward", forward)
    figures = assert_caught(prove(write("torchscript")), "random")
    assert figures["max_abs_diff"] <= 1e-4  # the test split has the native size


def test_missing_softmax(write, prove, monkeypatch):
    monkeypatch.setattr(model.Deployable, "calibrated", lambda self, logits: logits)
    assert_caught(prove(write("torchscript")), "differ by up to")


# -------------------------------------------------------------------------- faults of the ONNX file


def edit_weights(source, target, change):
    """Copy an ONNX file with its largest tensor of weights changed."""
    graph = onnx.load(source)
    floats = [
        tensor for tensor in graph.graph.initializer if tensor.data_type == onnx.TensorProto.FLOAT
    ]
    tensor = max(floats, key=lambda tensor: np.prod(tensor.dims))
    changed = change(onnx.numpy_helper.to_array(tensor))
    tensor.CopyFrom(onnx.numpy_helper.from_array(changed, tensor.name))
    onnx.save(graph, target)
    return target


@pytest.mark.parametrize("factor", [1.01, float("nan")])
def test_onnx_weights_changed(small, prove, tmp_path, factor):
    file = tmp_path / "model.onnx"
    edit_weights(small.export / "model.onnx", file, lambda weights: weights * np.float32(factor))
    assert_caught(prove(file), "differ by up to")


@pytest.mark.parametrize("expected", [True, False])
def test_an_output_known_that_one_side_lacks(trusted, expected):
    whole = trusted.expected
    lacking = comparing.Outputs(whole.main, None)
    pair = (whole, lacking) if expected else (lacking, whole)
    _, failures = comparing.compare_outputs(*pair, 1e-4, 1e-4)
    assert failures == [f"the file has {'no' if expected else 'an unexpected'} output 'known'"]


def test_wrong_order_of_class_names(small, trusted, prove, tmp_path):
    reverse = trusted.spec["classes"][::-1]
    file = onnx_with(small.export / "model.onnx", tmp_path / "model.onnx", classes=reverse)
    figures = assert_caught(prove(file), "classes")
    # whoever reads the names gets wrong answers
    assert figures["accuracy"] < figures["accuracy_trained"]


@pytest.mark.parametrize(
    ("key", "wrong"), [("checkpoint_sha256", "0" * 64), ("mean", [0.5]), ("image_size", [9, 9])]
)
def test_spec_of_another_network(small, prove, tmp_path, key, wrong):
    file = onnx_with(small.export / "model.onnx", tmp_path / "model.onnx", **{key: wrong})
    assert_caught(prove(file), key)


def fix_dimensions(good, path):
    graph = onnx.load(good)
    for dim, size in zip(
        graph.graph.input[0].type.tensor_type.shape.dim, (1, 8, 8, 1), strict=True
    ):
        dim.dim_value = size
    onnx.save(graph, path)


def write_text(good, path):
    path.write_text("not a model")


@pytest.mark.parametrize(
    ("fault", "words"),
    [(fix_dimensions, "cannot run"), (write_text, "not an ONNX file"), (onnx_with, "no spec")],
)
def test_file_that_step3_cannot_run(small, prove, tmp_path, fault, words):
    fault(small.export / "model.onnx", tmp_path / "model.onnx")
    with pytest.raises(Problem, match=words):
        prove(tmp_path / "model.onnx")


def test_tolerance_is_the_users(small, prove, tmp_path):
    file = tmp_path / "model.onnx"
    edit_weights(small.export / "model.onnx", file, lambda weights: weights * np.float32(1.001))
    assert_caught(prove(file), "differ by up to")
    figures, failures = prove(file, tolerance=0.1)
    assert not failures and figures["tolerance"] == 0.1


# --------------------------------------------------------------------------------- the second proof


def test_the_second_proof_catches_it_as_well(small, trusted, tmp_path):
    file = edit_weights(
        small.export / "model.onnx", tmp_path / "model.onnx", lambda weights: -weights
    )
    proof = gate.prove(trusted.run, str(file), trusted.dataset, trusted.expected, 1e-4)
    assert_caught(proof, "isolated: outputs differ")


def test_a_file_that_does_not_run_in_isolation(small, trusted, monkeypatch):
    failed = subprocess.CompletedProcess([], 1, "", "error: onnxruntime is missing\n")
    monkeypatch.setattr(isolated.subprocess, "run", lambda *_, **__: failed)
    file = str(small.export / "model.onnx")
    proof = gate.prove(trusted.run, file, trusted.dataset, trusted.expected, 1e-4)
    assert_caught(proof, "isolated", "onnxruntime is missing")


# ----------------------------------------------------------------------------------- through step 2


@pytest.mark.parametrize(
    "fault", [lambda good, path: edit_weights(good, path, lambda weights: -weights), onnx_with]
)
def test_a_refused_file_leaves_the_earlier_one_as_it_was(
    call, small, small_run, here, plant, in_process, fault
):
    out = here / "exports" / "small"
    shutil.copytree(small.export, out)
    plant(fault)
    call(step2_export.main, "--format", "onnx", "torchscript").error(
        1, "onnx", "model.onnx is not written"
    )
    assert sorted(os.listdir(out)) == sorted(os.listdir(small.export))
    assert (out / "model.onnx").read_bytes() == (small.export / "model.onnx").read_bytes()
    figures = parity_of(out)
    assert figures["torchscript"]["passed"] is True
    assert figures["onnx"] == parity_of(small.export)["onnx"]


@pytest.mark.usefixtures("few_digits")
# of a check that only training mode has
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_batch_norm_left_in_training_mode(call, here, monkeypatch, in_process):
    original = TrainedRun.deployable
    call(
        step1_train.main, *["--model", "mynet", "--dropout", "0", "--epochs", "1", "--name", "norm"]
    ).done()
    monkeypatch.setattr(
        TrainedRun, "deployable", lambda *args, **more: original(*args, **more).train()
    )
    result = call(step2_export.main, "--format", "torchscript")
    result.error(1, "torchscript", "model.pt is not written", "differ by up to")
    assert os.listdir(here / "exports" / "norm") == ["parity.json"]
    assert parity_of(here / "exports" / "norm")["torchscript"]["max_abs_diff"] > 1e-4
