"""The exported file and step3_infer.pyz are enough: processes that can import nothing else, with
proof."""

import ast
import json
import os
import shutil
import stat
import zipfile

import numpy as np
import pytest
from conftest import ROOT, right
from PIL import Image

from deploy import archive

OWN = ["model", "data", "training", "deploy", "report"]
FORBIDDEN = {
    "model.onnx": ["torch", "torchvision", "onnx", *OWN],
    "model.int8.onnx": ["torch", "torchvision", "onnx", *OWN],
    "model.pt": ["torchvision", "onnx", "onnxruntime", *OWN],
    "model.pt2": ["torchvision", "onnx", "onnxruntime", *OWN],
}


@pytest.fixture
def edge(tmp_path, all_formats):
    """edge(name) -> a directory with step3_infer.pyz and this file, and an environment that poisons
    imports."""

    def edge(name):
        place, poison = tmp_path / "edge", tmp_path / "poison"
        place.mkdir()
        poison.mkdir()
        archive.write_program(str(place))
        shutil.copy(all_formats / name, place)
        for module in FORBIDDEN[name]:
            (poison / f"{module}.py").write_text(f"raise ImportError('{module} is poisoned')\n")
        # PYTHONPATH comes before the installed packages, and after the archive itself.
        return place, {**os.environ, "PYTHONPATH": str(poison), "PYTHONDONTWRITEBYTECODE": "1"}

    return edge


# The files that step3 runs with torch start slowly: it is imported again for each.
NEED_TORCH = [pytest.param(name, marks=pytest.mark.slow) for name in ("model.pt", "model.pt2")]


@pytest.mark.parametrize("name", ["model.onnx", "model.int8.onnx", *NEED_TORCH])
def test_predicts_with_everything_else_poisoned(edge, execute, samples, tmp_path, name):
    place, environment = edge(name)
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (1203, 1601, 3), dtype=np.uint8)).save(
        tmp_path / "photo.jpg"
    )
    folder = tmp_path / "folder" / "below"
    folder.mkdir(parents=True)
    for path in samples[:3]:
        shutil.copy(path, folder)
    paths = [*samples, tmp_path / "photo.jpg", tmp_path / "folder"]
    chosen = [] if name.endswith(".onnx") else ["--model", name]  # such a file can carry code
    command = ["step3_infer.pyz", "--format", "json", *chosen, *paths]
    result = execute(*command, cwd=place, env=environment).done()
    rows = [json.loads(line) for line in result.out.splitlines()]
    assert len(rows) == 14 and not [row for row in rows if "error" in row]
    assert right([(row["path"], row["label"]) for row in rows[:10]]) >= 9
    assert rows[10]["path"].endswith("photo.jpg") and 0 < rows[10]["probability"] <= 1
    assert [(row["label"], row["top"]) for row in rows[11:]] == [
        (row["label"], row["top"]) for row in rows[:3]
    ]
    assert chosen or name in result.err  # it says which model it took: the one beside it
    assert sorted(os.listdir(place)) == sorted(["step3_infer.pyz", name])


@pytest.mark.parametrize("name", ["model.onnx", "model.pt"])
def test_the_poison_works(edge, execute, name):
    place, environment = edge(name)
    attempt = (
        "import importlib, sys\nfor name in sys.argv[1:]:\n try: importlib.import_module(name)\n"
    )
    attempt += " except ImportError as error: print(error)\n else: print(name, 'was imported')"
    result = execute("-c", attempt, *FORBIDDEN[name], cwd=place, env=environment).done()
    assert result.out.splitlines() == [f"{module} is poisoned" for module in FORBIDDEN[name]]
    # And a script that needs what is poisoned cannot run there.
    shutil.copy(ROOT / "step1_train.py", place)
    result = execute("step1_train.py", "--help", cwd=place, env=environment)
    assert result.code == 1 and "is poisoned" in result.err


@pytest.mark.parametrize(
    ("name", "other", "needs"),
    [("model.onnx", "model.pt", "torch"), ("model.pt", "model.onnx", "onnxruntime")],
)
def test_what_is_missing_is_said_with_the_way_out(
    edge, execute, samples, trained, name, other, needs
):
    place, environment = edge(name)
    arguments = ["--model", trained.export / other, samples[0]]
    result = execute("step3_infer.pyz", *arguments, cwd=place, env=environment)
    line = result.error(1, other, f"needs {needs}", f"pip install {needs}")
    if needs == "torch":  # whose usual wheel brings gigabytes of CUDA
        assert ".onnx" in line and line.endswith("https://download.pytorch.org/whl/cpu")


def test_onnxruntime_keeps_no_id_of_the_device(execute, samples, trained, tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    environment = {k: v for k, v in os.environ.items() if k != "ORT_DISABLE_TELEMETRY"}
    environment |= {"HOME": str(home), "XDG_CACHE_HOME": str(home / "cache")}
    script, model = ROOT / "step3_infer.py", trained.export / "model.onnx"
    execute(script, "--model", model, samples[0], cwd=tmp_path, env=environment).done()
    assert not list(home.rglob("*"))


# --------------------------------------------------------------------------------- step3_infer.pyz


def test_the_archive_is_the_same_in_every_clone(execute, tmp_path):
    clone = tmp_path / "clone"
    for path in ("step3_infer.py", "deploy/archive.py", "deploy/archive_main.py", "inference"):
        copy = shutil.copytree if (ROOT / path).is_dir() else shutil.copy
        (clone / path).parent.mkdir(parents=True, exist_ok=True)
        copy(ROOT / path, clone / path)
    for path in clone.rglob("*.py"):
        # As git may write them on Windows.
        path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
        path.chmod(0o600)
    (clone / "inference" / "leftover.pyc").write_bytes(b"of one machine")

    code = "import os, sys; os.umask(0o077); from deploy import archive; archive.write_program('.')"
    environment = {**os.environ, "TZ": "Asia/Kolkata", "PYTHONPATH": str(clone)}
    execute("-c", code, cwd=clone, env=environment).done()
    assert (clone / archive.NAME).read_bytes() == archive.program_bytes()


def test_the_archive_holds_sources_only_with_fixed_dates_and_modes(tmp_path):
    path = archive.write_program(str(tmp_path))
    with zipfile.ZipFile(path) as program:
        entries = program.infolist()
    names = [entry.filename for entry in entries]
    assert names == sorted(names) and all(name.endswith(".py") for name in names)
    assert {"__main__.py", "step3_infer.py", "inference/predict.py"} <= set(names)
    assert {entry.date_time for entry in entries} == {(1980, 1, 1, 0, 0, 0)}
    assert {stat.filemode(entry.external_attr >> 16) for entry in entries} == {"-rw-r--r--"}


def test_the_archive_tells_an_older_python_in_one_line(execute, tmp_path):
    archive.write_program(str(tmp_path))
    older = "import runpy, sys; sys.version_info = (3, 6, 15, 'final', 0); "
    older += "sys.version = '3.6.15 (main)'; "
    older += f"runpy.run_path({archive.NAME!r}, run_name='__main__')"
    result = execute("-c", older, cwd=tmp_path)
    assert (result.code, result.out) == (1, "")
    assert result.err == "error: Python 3.10 or newer is needed, this is Python 3.6.15\n"


def test_an_older_python_can_parse_the_start_of_the_archive():
    source = (ROOT / "deploy" / "archive_main.py").read_text()
    names = {type(node).__name__ for node in ast.walk(ast.parse(source))}
    newer = {"JoinedStr", "NamedExpr", "AnnAssign", "Match", "AsyncFunctionDef", "Starred"}
    assert not names & newer and source.isascii()


def test_the_archive_has_the_exit_codes_of_the_script(execute, tmp_path):
    archive.write_program(str(tmp_path))
    assert "step3_infer.pyz" in execute(archive.NAME, "--help", cwd=tmp_path).done().out
    execute(archive.NAME, "--top-k", "0", "x.png", cwd=tmp_path).error(2, "--top-k")
    result = execute(archive.NAME, "--model", "no.onnx", "x.png", cwd=tmp_path)
    result.error(1, "no model file no.onnx")
