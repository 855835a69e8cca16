"""What benchmarks/prove_arm64.sh compares between processors, and how it refuses wrong usage."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from benchmarks import answers
from conftest import ROOT

from deploy import archive

PROVE = ROOT / "tests" / "benchmarks" / "prove_arm64.sh"


def keep(path, **changes):
    """Answers to two images, of two classes, by a file whose `known` may differ by 0.005."""
    about = {"files": {"model.onnx": {"limit": 1e-6, "known_limit": 5e-3}}}
    arrays = {"pixels": ["a", "b"], "probabilities": np.float32([[0.75, 0.25], [0.5, 0.5]])}
    arrays = {**arrays, "known": np.float32([0.5, 0.25]), **changes}
    np.savez(
        path,
        about=json.dumps(about),
        **{f"model.onnx/{name}": kept for name, kept in arrays.items()},
    )
    return path


@pytest.mark.parametrize(
    ("changes", "cells"),
    [
        ({}, "2 | 0 | 0 | 0.0e+00 | 0 | 0.0e+00 | passed"),
        ({"pixels": ["a", "c"]}, "2 | 1 | 0 | 0.0e+00 | 0 | 0.0e+00 | FAILED"),
        ({"known": np.float32([0.5, 0.375])}, "2 | 0 | 0 | 0.0e+00 | 0 | 1.2e-01 | FAILED"),
        (
            {"probabilities": np.float32([[0.25, 0.75], [0.5, 0.5]])},
            "2 | 0 | 1 | 5.0e-01 | 1 | 0.0e+00 | FAILED",
        ),
        (
            {"probabilities": np.float32([[0.75, 0.25], [0.500002, 0.499998]])},
            "2 | 0 | 0 | 2.0e-06 | 0 | 0.0e+00 | FAILED",
        ),
        (
            {"probabilities": np.float32([[0.75, 0.25], [np.nan, 0.5]])},
            "2 | 0 | 0 | nan | 0 | 0.0e+00 | FAILED",
        ),
    ],
)
def test_each_kind_of_difference_is_seen(tmp_path, capsys, changes, cells):
    here, there = keep(tmp_path / "here.npz"), keep(tmp_path / "there.npz", **changes)
    code = answers.compare(here, there, "model.onnx")
    assert capsys.readouterr().out.strip() == cells
    assert code == (0 if cells.endswith("passed") else 1)


def test_one_machine_gives_the_same_answers_twice(small, tmp_path, execute):
    bundle = tmp_path / "bundle"
    shutil.copytree(ROOT / "data" / "samples", bundle / "samples")
    shutil.copy(small.export / "model.onnx", bundle)
    archive.write_program(str(bundle))
    program = ROOT / "tests" / "benchmarks" / "answers.py"
    for name in ("one.npz", "two.npz"):
        execute(program, "keep", bundle, tmp_path / name, ROOT / "data" / "samples").done()
    compared = execute(
        program, "compare", tmp_path / "one.npz", tmp_path / "two.npz", "model.onnx"
    ).done()
    assert compared.out.startswith("20 | 0 | 0 | 0.0e+00 | 0 | ") and "passed" in compared.out
    assert "onnxruntime " in execute(program, "versions", tmp_path / "one.npz").done().out
    assert sorted(path.name for path in bundle.iterdir()) == [
        "model.onnx",
        "samples",
        "step3_infer.pyz",
    ]
    (bundle / "samples" / "broken.png").write_bytes(b"no image")
    refused = execute(program, "keep", bundle, tmp_path / "three.npz")
    assert refused.code == 1 and refused.err.startswith("error: ") and "broken.png" in refused.err


def test_a_finished_table_is_recorded(tmp_path):
    (tmp_path / "table").write_text("| cortex-a53 | model.onnx | passed, 2.4e-7 | 223 |\n")
    answers.record(tmp_path / "table", ["QEMU 10.0"], tmp_path)
    figures = json.loads((tmp_path / "arm64.json").read_text())["figures"]
    assert figures["rows"] == [["cortex-a53", "model.onnx", "passed, 2.4e-7", "223"]]
    assert figures["notes"] == ["QEMU 10.0"]


@pytest.mark.skipif(sys.platform != "linux", reason="the proof needs Debian or Ubuntu")
@pytest.mark.parametrize("arguments", [[], ["nowhere.zip"], [ROOT / "data"], [ROOT / "README.md"]])
def test_wrong_usage_of_the_proof_is_one_line(arguments, tmp_path):
    variables = {"PATH": "/usr/bin:/bin", "CACHE": str(tmp_path), "PYTHON": sys.executable}
    done = subprocess.run(
        ["bash", PROVE, *arguments], env=variables, capture_output=True, text=True
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
