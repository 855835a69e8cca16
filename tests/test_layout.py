"""The project's shape: what lies where, who may import whom, and help that fits a terminal."""

import ast
import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT

import step1_train
import step2_export
import step3_infer

MAY_IMPORT = {
    "step3_infer.py": set(),
    "model.py": set(),
    "data": {"data", "step3_infer"},
    "training": {"training", "model", "data", "step3_infer"},
    "deploy": {"deploy", "step3_infer"},
    "report": {"report", "deploy.reliability", "step3_infer"},
    "step1_train.py": {"data", "model", "training", "report", "step3_infer"},
    "step2_export.py": {"data", "model", "training.runs", "training.cpu", "deploy", "report", "step3_infer"},
}
MAY_IMPORT_AS_WELL = {"deploy/gate.py": {"model"}}
OWN = {"step1_train", "step2_export", "step3_infer", "data", "model", "training", "deploy", "report", "tests"}
TOP_LEVEL = {*MAY_IMPORT, "tests", "requirements.txt", "README.md", "LICENSE"}

LINES_OF_STEP3S_LIBRARY = 400  # up to its ruler


def sources(name):
    return [ROOT / name] if name.endswith(".py") else sorted((ROOT / name).rglob("*.py"))


def imports(node):
    """Every module that an import below `node` names, with dots; what `from x import y` takes counts as
    x.y."""
    for found in ast.walk(node):
        if isinstance(found, ast.Import):
            yield from (alias.name for alias in found.names)
        elif isinstance(found, ast.ImportFrom):
            assert found.level == 0, "relative imports hide who imports whom"
            yield from (f"{found.module}.{alias.name}" for alias in found.names)


@pytest.mark.parametrize("name", MAY_IMPORT)
def test_who_may_import_whom(name):
    for path in sources(name):
        modules = [module for module in imports(ast.parse(path.read_text())) if module.split(".")[0] in OWN]
        allowed = MAY_IMPORT[name] | MAY_IMPORT_AS_WELL.get(path.relative_to(ROOT).as_posix(), set())
        assert not [m for m in modules if not any(m == a or m.startswith(f"{a}.") for a in allowed)], path


def test_step3_is_a_library_first_and_a_program_after_its_ruler():
    lines = (ROOT / "step3_infer.py").read_text(encoding="utf-8").splitlines()
    (ruler,) = [number for number, line in enumerate(lines) if re.fullmatch(r"# =+ .*program.*", line)]
    assert ruler < LINES_OF_STEP3S_LIBRARY
    library = ast.parse("\n".join(lines[:ruler]))
    defined = {node.name for node in library.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    assert {"Problem", "Model", "decode_image", "predict"} <= defined
    assert "argparse" not in {module for node in library.body for module in imports(node)}


def test_step3_imports_only_numpy_and_pillow_until_it_needs_more():
    tree = ast.parse((ROOT / "step3_infer.py").read_text())
    of_module = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    at_once = {module.split(".")[0] for node in of_module for module in imports(node)}
    assert at_once - sys.stdlib_module_names == {"numpy", "PIL"}
    later = {module.split(".")[0] for module in imports(tree)} - at_once
    assert later - sys.stdlib_module_names <= {
        "onnxruntime",
        "torch",
        "pillow_heif",
        "executorch",
        "ai_edge_litert",
    }


def test_nothing_else_lies_at_the_top_level():
    # What git tracks, not what happens to lie there: runs, exports, a virtual environment.
    command = ["git", "-c", "safe.directory=*", "ls-files"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
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
