"""Step 3: which file it takes as the model, what it refuses, and the self-test."""

import json
import os
import shutil

import numpy as np
import onnx
import pytest
from conftest import onnx_with

import step3_infer
from inference.predict import Model


@pytest.fixture
def changed(trained, here):
    """changed(...) -> path of the trained ONNX file with another spec; see onnx_with."""
    return lambda *spec, **changes: onnx_with(
        trained.export / "model.onnx", here / "changed.onnx", *spec, **changes
    )


def golden_of(trained):
    return Model(str(trained.export / "model.onnx")).spec["golden"]


@pytest.mark.parametrize("name", ["model.onnx", "model.pt"])
def test_both_formats_give_the_same_answers(call, trained, samples, name):
    arguments = ["--format", "json", "--top-k", 10, *samples]
    rows = []
    for file in (trained.export / name, trained.export / "model.onnx"):
        out = call(step3_infer.main, "--model", file, *arguments).done().out
        rows.append(
            [
                {e["label"]: e["probability"] for e in json.loads(line)["top"]}
                for line in out.splitlines()
            ]
        )
    assert all(abs(a[label] - b[label]) < 1e-4 for a, b in zip(*rows, strict=True) for label in a)


@pytest.mark.parametrize("name", ["model.onnx", "model.pt"])
def test_self_test_passes(call, trained, name):
    result = call(step3_infer.main, "--model", trained.export / name, "--self-test").done()
    assert "passed" in result.out and f"{len(golden_of(trained))} golden" in result.out


def test_self_test_fails_when_the_machine_computes_something_else(call, trained, changed):
    golden = golden_of(trained)
    # of the last one only, and within what a reader would overlook
    golden[-1]["probabilities"][0] += 0.01
    result = call(step3_infer.main, "--model", changed(golden=golden), "--self-test")
    assert result.code == 1 and "FAILED" in result.out and "passed" not in result.out


def test_self_test_fails_on_nan(call, trained, here):
    graph = onnx.load(trained.export / "model.onnx")
    floats = [
        tensor for tensor in graph.graph.initializer if tensor.data_type == onnx.TensorProto.FLOAT
    ]
    tensor = max(floats, key=lambda tensor: np.prod(tensor.dims))
    values = onnx.numpy_helper.to_array(tensor) * np.float32("nan")
    tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    onnx.save(graph, here / "nan.onnx")
    result = call(step3_infer.main, "--model", "nan.onnx", "--self-test")
    assert result.code == 1 and "passed" not in result.out


@pytest.mark.parametrize(
    "golden", [[], None, [{"image": "####"}], [{"image": "", "probabilities": [1, 2]}], "text"]
)
def test_self_test_without_usable_golden_samples(call, changed, golden):
    call(step3_infer.main, "--model", changed(golden=golden), "--self-test").error(1, "golden")


def test_self_test_with_golden_samples_of_other_classes(call, trained, changed):
    golden = [{**sample, "probabilities": [0.5, 0.5, 0]} for sample in golden_of(trained)]
    call(step3_infer.main, "--model", changed(golden=golden), "--self-test").error(1, "golden")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("model.onnx", b"hello\n" * 99),
        ("model.onnx", b""),
        ("model.pt", b"hello\n" * 99),
        ("model.pt", b""),
    ],
)
def test_file_that_is_no_model(call, samples, here, name, content):
    (here / name).write_bytes(content)
    call(step3_infer.main, "--model", name, samples[0]).error(1, name, "is not")


def test_truncated_model(call, trained, samples, here):
    for name in ("model.onnx", "model.pt"):
        whole = (trained.export / name).read_bytes()
        (here / name).write_bytes(whole[: len(whole) // 2])
        call(step3_infer.main, "--model", name, samples[0]).error(1, name, "is not")


def test_file_of_an_unknown_kind_is_told_what_is_wanted(call, samples, here):
    (here / "model.txt").write_text("hello")
    call(step3_infer.main, "--model", "model.txt", samples[0]).error(1, "model.txt", ".onnx", ".pt")


def test_checkpoint_is_not_an_export(call, trained, samples):
    result = call(step3_infer.main, "--model", trained.run / "checkpoint.pt", samples[0])
    result.error(1, "checkpoint.pt", "step2_export.py")


@pytest.mark.parametrize("name", ["missing.onnx", "folder.onnx"])
def test_missing_model(call, samples, here, name):
    (here / "folder.onnx").mkdir()
    call(step3_infer.main, "--model", name, samples[0]).error(
        1, f"no model file {name}", "step2_export.py"
    )


def test_a_directory_is_answered_with_the_file_in_it(call, trained, samples):
    (file, *_) = sorted(trained.export.glob("model.onnx"))
    call(step3_infer.main, "--model", trained.export, samples[0]).error(1, "directory", file)


def test_onnx_file_of_someone_else(call, changed, samples):
    call(step3_infer.main, "--model", changed(None), samples[0]).error(
        1, "no spec", "step2_export.py"
    )


@pytest.mark.filterwarnings(r"ignore:`torch\.jit:FutureWarning")
def test_torchscript_file_of_someone_else(call, samples, here):
    import torch

    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), "model.pt")
    call(step3_infer.main, "--model", "model.pt", samples[0]).error(1, "no spec", "step2_export.py")


def test_file_of_a_newer_threestep(call, changed, samples):
    call(step3_infer.main, "--model", changed(schema=99), samples[0]).error(
        1, "schema 99", "step3_infer.py"
    )


@pytest.mark.parametrize(
    "spec", ["hello", "[]", "null", "{}", '{"schema": "new"}', '{"schema": 1, "classes": 3}']
)
def test_malformed_spec(call, changed, samples, spec):
    call(step3_infer.main, "--model", changed(spec), samples[0]).error(1, "malformed spec")


@pytest.mark.parametrize("lie", [{"classes": ["a", "b", "c"]}, {"channels": 3}])
def test_spec_that_does_not_fit_the_graph(call, changed, samples, lie):
    call(step3_infer.main, "--model", changed(**lie), samples[0]).error(1, "spec")


@pytest.mark.parametrize("name", ["model.onnx", "model.pt"])
def test_unknown_provider(call, trained, samples, name):
    result = call(
        step3_infer.main, "--model", trained.export / name, "--provider", "toaster", samples[0]
    )
    result.error(2, "toaster", "cpu")


def test_no_model_anywhere(call, samples, here):
    call(step3_infer.main, samples[0]).error(2, "no model found", "--model", "step2_export.py")


def test_newest_export_is_taken_and_said(call, trained, small, samples, here):
    for age, source in ((1e9, trained), (2e9, small)):
        target = here / "exports" / source.export.name
        shutil.copytree(source.export, target)
        for path in target.iterdir():
            os.utime(path, (age, age))
    assert "exports/small/model.onnx" in call(step3_infer.main, samples[0]).done().err
    (here / "exports" / "small" / "model.onnx").unlink()  # model.pt, which can carry code, stays
    assert "exports/digits-airbench/model.onnx" in call(step3_infer.main, samples[0]).done().err
