"""The tensor tutorial's regression through the same three scripts."""

import csv
import dataclasses
import json

import numpy as np
import pytest

import data
import step1_train
import step2_export
import step3_infer
from deploy.formats import FORMATS
from inference.predict import Model

TUTORIAL = [
    "--dataset",
    "linear",
    "--optimizer",
    "sgd",
    "--momentum",
    "0",
    "--lr",
    "0.001",
    "--epochs",
    "10",
]


def test_rows_are_the_tutorials():
    dataset = data.load("linear")
    x, y = dataset.train_images, dataset.train_labels
    assert x.shape == (20, 5) and x.dtype == np.float32 and x.min() >= 0 and x.max() < 1
    assert np.allclose(y[:, 0], x @ [0.3, 4.0, 0.2, 2.5, 18.0] + 17.0, atol=1e-4)


def test_ten_steps_of_plain_descent_follow_the_tutorials_course(call, here):
    out = call(step1_train.main, *TUTORIAL).done().out
    with open(here / "runs" / "linear-linear" / "metrics.csv", newline="") as stream:
        losses = [float(row["train_loss"]) for row in csv.DictReader(stream)]
    assert len(losses) == 10 and losses == sorted(losses, reverse=True)
    # the tutorial's: about 880 to 810
    assert 600 < losses[0] < 1200 and 0.9 < losses[-1] / losses[0] < 0.95
    assert "learned     true" in out and "18.0000" in out


def test_coefficients_are_recovered_and_printed(linear):
    rows = [line.split() for line in linear.printed[0].out.splitlines()]
    learned = {
        row[0]: row[1:] for row in rows if row and row[0] in ("x1", "x2", "x3", "x4", "x5", "bias")
    }
    assert len(learned) == 6
    assert all(
        float(ours) == pytest.approx(float(true), abs=0.01) for ours, true in learned.values()
    )
    summary = json.loads((linear.run / "summary.json").read_text())
    assert summary["test_accuracy"] is None and summary["test_loss"] < 1e-4


@pytest.mark.parametrize("file", ["model.onnx", "model.pt"])
def test_exported_file_predicts_from_values(call, linear, file):
    arguments = [
        "--model",
        linear.export / file,
        "--values",
        "0,0,0,0,0",
        "--values",
        "-1,1,0.5,0,2",
    ]
    rows = call(step3_infer.main, *arguments, "--format", "json").done().out.splitlines()
    first, second = map(json.loads, rows)
    assert first == {"values": [0] * 5, "prediction": pytest.approx(17.0, abs=0.01)}
    assert second["prediction"] == pytest.approx(-0.3 + 4.0 + 0.1 + 36.0 + 17.0, abs=0.02)
    assert call(step3_infer.main, *arguments[:4]).done().out.startswith("0,0,0,0,0  17")
    assert (
        call(step3_infer.main, *arguments[:4], "--format", "csv")
        .done()
        .out.startswith("values,prediction\n")
    )
    assert (
        "passed"
        in call(step3_infer.main, "--model", linear.export / file, "--self-test").done().out
    )


def test_spec_and_parity(linear):
    report = json.loads((linear.export / "parity.json").read_text())
    assert {figures["passed"] for figures in report.values()} == {True}
    spec = Model(str(linear.export / "model.onnx")).spec
    assert spec["task"] == "regression" and spec["channels"] == 5 and spec["resize"] is None


def test_wrong_inputs(call, here, linear, trained, samples):
    model = ["--model", linear.export / "model.onnx"]
    call(step3_infer.main, *model, "--values", "1,2,3").error(
        2, "1,2,3 is not a list of 5 finite numbers"
    )
    call(step3_infer.main, *model, "--values", "1,2,3,4,x").error(
        2, "not a list of 5 finite numbers"
    )
    call(step3_infer.main, *model, "--values", "1,2,3,4,nan").error(2, "5 finite numbers")
    call(step3_infer.main, *model, samples[0]).error(2, "--values")
    call(step3_infer.main, "--model", trained.export / "model.onnx", "--values", "1,2").error(
        2, "images"
    )
    call(step3_infer.main, *model, samples[0], "--values", "1,2,3,4,5").error(2, "PATH", "--values")
    for more in (["--augment", "flip"], ["--class-weights", "balanced"], ["--model", "airbench"]):
        refused = call(step1_train.main, "--dataset", "linear", *more)
        refused.error(2)


def test_gate_catches_a_changed_coefficient(call, here, linear, monkeypatch):
    torchscript = FORMATS["torchscript"]

    def perturbed(source, path):
        source.deployable.network.layers[-1].bias.data += 0.01
        torchscript.export(source, path)
        source.deployable.network.layers[-1].bias.data -= 0.01

    changed = dataclasses.replace(torchscript, export=perturbed)
    monkeypatch.setitem(FORMATS, "torchscript", changed)
    arguments = ["--run", linear.run, "--format", "torchscript", "--out", here / "out"]
    call(step2_export.main, *arguments).error(1, "torchscript", "differ")
    assert not (here / "out" / "model.pt").exists()
