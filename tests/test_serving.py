"""The Ray script on a single machine: over files, and over HTTP. RAY_PYTHON names a Python that has
ray."""

import contextlib
import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
import zipfile

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image
from test_bundle import export

PYTHON = os.environ.get("RAY_PYTHON") or (
    sys.executable if importlib.util.find_spec("ray") else None
)
SCRIPT = ROOT / "deploy" / "serving" / "ray_bundle.py"
needs_ray = pytest.mark.skipif(
    PYTHON is None, reason="ray is not installed: pip install 'ray[data,serve]', or RAY_PYTHON"
)


@pytest.fixture(scope="module")
def edge(small, tmp_path_factory):
    """An unpacked bundle, whose file keeps 99 % of familiar images."""
    folder = tmp_path_factory.mktemp("serving")
    export(small, folder / "small", "--format", "onnx", "--reject", "0.99")
    with zipfile.ZipFile(folder / "small" / "small-bundle.zip") as archive:
        archive.extractall(folder)
    return folder / "small-bundle"


def is_as(expected):
    """What an answer must equal: a line of step 3's JSON for the same image."""
    numbers = {key: pytest.approx(expected[key], abs=1e-4) for key in ("probability", "known")}
    return {**numbers, "label": expected["label"]}


@pytest.fixture
def noise(tmp_path):
    """Path of an image like none of the digits."""
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8)).save(
        tmp_path / "noise.png"
    )
    return tmp_path / "noise.png"


@needs_ray
def test_files(edge, samples, noise, tmp_path):
    samples = [*samples, noise]
    (tmp_path / "photos").mkdir()
    for path in samples:
        shutil.copy(path, tmp_path / "photos")
    command = [PYTHON, SCRIPT, "files", edge, "photos"]
    subprocess.run([*command, "first"], cwd=tmp_path, check=True, capture_output=True, timeout=200)
    (tmp_path / "photos" / "broken.png").write_text("not an image")
    # As many workers as CPUs, and more: the tasks that read must not wait for them.
    command += ["answers", "--replicas", str(os.cpu_count() + 1)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.returncode == 1, done.stderr
    assert (
        f"error: photos: 1 of {len(samples) + 1} files could not be used, see answers"
        in done.stderr
    )
    lines = [
        line for file in (tmp_path / "answers").iterdir() for line in file.read_text().splitlines()
    ]
    answers = {os.path.basename(row["path"]): row for row in map(json.loads, lines)}
    assert answers.keys() == {"broken.png", *(path.name for path in samples)}
    assert "not an image" in answers["broken.png"]["error"]
    command = [sys.executable, "step3_infer.pyz", "--format", "json", *samples]
    done = subprocess.run(command, cwd=edge, check=True, capture_output=True, text=True)
    for row in map(json.loads, done.stdout.splitlines()):
        answer = answers[os.path.basename(row["path"])]
        assert "error" not in answer or answer["error"] is None  # Ray's columns may be null
        assert {key: answer[key] for key in ("probability", "known", "label")} == is_as(row)
        assert [entry["label"] for entry in answer["top"]] == [
            entry["label"] for entry in row["top"]
        ]
    assert answers["noise.png"]["label"] == "unknown"


@needs_ray
def test_http(edge, noise):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [PYTHON, SCRIPT, "serve", edge, "--port", str(port)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as service:
        try:
            assert any("serving on" in line for line in service.stdout)
            expected = json.loads((edge / "samples" / "expected.jsonl").read_text().splitlines()[0])
            content = (edge / expected["path"]).read_bytes()
            with urllib.request.urlopen(
                f"http://127.0.0.1:{port}/", data=content, timeout=60
            ) as reply:
                answer = json.load(reply)
            assert {key: answer[key] for key in ("probability", "known", "label")} == is_as(
                expected
            )
            url = f"http://127.0.0.1:{port}/"
            with urllib.request.urlopen(url, data=noise.read_bytes(), timeout=60) as reply:
                strange = json.load(reply)
            assert strange["label"] == "unknown" and strange["top"][0]["label"] in "0123456789"
            with pytest.raises(urllib.error.HTTPError) as refused:
                urllib.request.urlopen(
                    f"http://127.0.0.1:{port}/", data=b"not an image", timeout=60
                )
            assert refused.value.code == 400 and "not an image" in json.load(refused.value)["error"]
        finally:
            service.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                service.wait(30)
            service.kill()


@needs_ray
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["serve", "nowhere"], "no model.onnx in nowhere"),
        (["files", "here", "source"], "files needs a source and a target"),
        (["serve", "here", "source"], "serve takes neither"),
        (["serve", "here", "--replicas", "0"], "--replicas needs at least one"),
        (["files", "here", "nowhere", "target"], "no file or directory nowhere"),
    ],
)
def test_wrong_use(arguments, words, tmp_path):
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "model.onnx").touch()
    done = subprocess.run(
        [PYTHON, SCRIPT, *arguments], cwd=tmp_path, capture_output=True, text=True
    )
    assert (
        done.returncode == 2 and f"error: {words}" in done.stderr and "Traceback" not in done.stderr
    )
