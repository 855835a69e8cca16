"""The project's shape: what lies where, who may import whom, and help that fits a terminal."""

import ast
import os
import subprocess
import sys

import pytest
from conftest import ROOT

import step1_train
import step2_export
import step3_infer

MAY_IMPORT = {
    "inference": {"inference"},
    "model.py": set(),
    "data": {"data", "inference", "model.resize"},
    "training": {"training", "model", "data", "inference"},
    "deploy": {"deploy", "inference"},
    "report": {"report", "inference"},
    "step1_train.py": {"data", "model", "training", "report", "inference"},
    "step2_export.py": {
        "data",
        "model",
        "training.runs",
        "training.recorded",
        "training.cpu",
        "deploy",
        "report",
        "inference",
    },
    "step3_infer.py": {"inference"},
}
MAY_IMPORT_AS_WELL = {"deploy/reference.py": {"model"}}
OWN = {*(name.removesuffix(".py") for name in MAY_IMPORT), "tests"}
TOP_LEVEL = {*MAY_IMPORT, "tests", "requirements.txt", "README.md", "LICENSE"}
# What inference/ may import beside the standard library; the runtimes only inside their loaders.
AT_ONCE = {"numpy", "PIL"}
LATER = {"onnxruntime", "torch", "pillow_heif", "executorch", "ai_edge_litert"}


def sources(name):
    return [ROOT / name] if name.endswith(".py") else sorted((ROOT / name).rglob("*.py"))


def imports(node):
    """Every module that an import below `node` names, with dots; what `from x import y` takes
    counts as x.y."""
    for found in ast.walk(node):
        if isinstance(found, ast.Import):
            yield from (alias.name for alias in found.names)
        elif isinstance(found, ast.ImportFrom):
            assert found.level == 0, "relative imports hide who imports whom"
            yield from (f"{found.module}.{alias.name}" for alias in found.names)


@pytest.mark.parametrize("name", MAY_IMPORT)
def test_who_may_import_whom(name):
    for path in sources(name):
        modules = [
            module for module in imports(ast.parse(path.read_text())) if module.split(".")[0] in OWN
        ]
        allowed = MAY_IMPORT[name] | MAY_IMPORT_AS_WELL.get(
            path.relative_to(ROOT).as_posix(), set()
        )
        assert not [
            m for m in modules if not any(m == a or m.startswith(f"{a}.") for a in allowed)
        ], path


@pytest.mark.parametrize("path", sources("inference"), ids=lambda path: path.name)
def test_inference_imports_only_numpy_and_pillow_until_it_needs_more(path):
    tree = ast.parse(path.read_text())
    of_module = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    at_once = {module.split(".")[0] for node in of_module for module in imports(node)}
    assert at_once - sys.stdlib_module_names <= {*AT_ONCE, "inference"}
    later = {module.split(".")[0] for module in imports(tree)} - at_once
    assert later - sys.stdlib_module_names <= {*LATER, "inference"}


def test_nothing_else_lies_at_the_top_level():
    # What git tracks, not what happens to lie there: runs, exports, a virtual environment.
    command = ["git", "-c", "safe.directory=*", "ls-files"]
    listed = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    names = {path.split("/")[0] for path in listed}
    assert {"step1_train.py", "step2_export.py", "step3_infer.py", "model.py", "data"} <= names
    assert {name for name in names if not name.startswith(".")} <= TOP_LEVEL


@pytest.mark.parametrize("script", [step1_train, step2_export, step3_infer])
def test_help_fits_a_terminal(call, monkeypatch, script):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys, "argv", [os.path.basename(script.__file__)])
    text = call(script.main, "--help").done().out
    assert sys.argv[0] in text and "example:" in text
    assert max(len(line) for line in text.splitlines()) <= 80


@pytest.mark.parametrize("script", [step1_train, step2_export, step3_infer])
def test_every_option_is_explained(script):
    assert not [action.dest for action in script.build_parser()._actions if not action.help]
