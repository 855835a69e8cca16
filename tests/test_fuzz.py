"""The short form of benchmarks/fuzz_inference.py: broken images and model files, and the real
command."""

import pytest
from benchmarks import fuzz_inference


@pytest.mark.parametrize("count", [60, pytest.param(600, marks=pytest.mark.slow)])
def test_broken_images_with_whole_ones_among_them(small, tmp_path, count):
    model = small.export / "model.onnx"
    faults, refused = fuzz_inference.fuzz_images(model, count, tmp_path, seed=1, batch=100)
    assert not faults and count / 3 < refused < count


def test_15_broken_model_files(small, tmp_path):
    faults, refused = fuzz_inference.fuzz_models(
        [small.export / "model.onnx"], 15, tmp_path, seed=1, jobs=2
    )
    assert not faults and 3 < refused < 15


@pytest.mark.parametrize(
    ("result", "fault"),
    [
        (("hang", "", ""), "hang"),
        ((-11, "", ""), "signal"),
        ((1, "", "Traceback (most recent call last):\nValueError"), "traceback"),
        (
            (0, '{"path": "a.png", "error": "is empty"}\n', "error: a.png: is empty\n"),
            "exit code 0",
        ),
        ((0, "", ""), "missing"),
        ((0, '{"path": "b.png", "label": "1", "probability": 0.5}\n', ""), "out of order"),
        ((0, '{"path": "a.png", "label": "2", "probability": 0.5}\n', ""), "answer changed"),
        (
            (0, '{"path": "a.png", "label": "1", "probability": 0.5}\n', "Warning: x\n"),
            "standard error",
        ),
        ((0, "EP Error\n", ""), "standard output"),
    ],
)
def test_the_fuzz_sees_each_kind_of_fault(result, fault):
    alone = {"a.png": {"path": "a.png", "label": "1", "probability": 0.5}}
    assert any(fault in found for found in fuzz_inference.faults_of(result, ["a.png"], alone))
    whole = 0, '{"path": "a.png", "label": "1", "probability": 0.5}\n', ""
    assert fuzz_inference.faults_of(whole, ["a.png"], alone) == []


def test_the_fuzz_sees_a_real_hang(tmp_path, monkeypatch):
    monkeypatch.setattr(fuzz_inference, "LIMIT", 1)
    (tmp_path / "endless.py").write_text("while True: pass\n")
    monkeypatch.setattr(fuzz_inference, "STEP3", tmp_path / "endless.py")
    assert fuzz_inference.command()[0] == "hang"
