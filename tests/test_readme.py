"""The README's own commands do what it says."""

import json
import re
import shlex
import subprocess
import sys

import pytest
from conftest import ROOT, right

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```bash\n(.*?)```", README, re.DOTALL | re.MULTILINE)


def test_first_command_trains_exports_and_predicts(tmp_path):
    commands = [command.strip() for command in BLOCKS[0].split("&&")]
    assert commands[:2] == ["python3 -m venv .venv", ".venv/bin/pip install -r requirements.txt"]
    for command in commands[2:]:
        python, script, *arguments = shlex.split(command)
        assert python == ".venv/bin/python"
        arguments = [str(ROOT / argument) for argument in arguments]  # data/samples
        done = subprocess.run([sys.executable, ROOT / script, *arguments], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    answers = [re.split(r"  | ", line)[:2] for line in done.stdout.splitlines()]
    assert len(answers) == 10 and right(answers) >= 9
    summary = json.loads((tmp_path / "runs" / "digits-airbench" / "summary.json").read_text())
    assert summary["test_accuracy"] >= 0.98


def test_second_command_is_what_ci_runs():
    assert BLOCKS[1].strip() in (ROOT / ".ci" / "run").read_text()


def test_every_option_named_exists():
    scripts = ("step1_train.py", "step2_export.py", "step3_infer.py")
    helps = [
        subprocess.run([sys.executable, ROOT / s, "--help"], capture_output=True, text=True).stdout for s in scripts
    ]
    known = set(re.findall(r"--[a-z0-9-]+", "".join(helps)))
    used = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", README))
    assert used - known == {"--index-url"}  # pip's


@pytest.mark.parametrize("path", sorted(set(re.findall(r"\]\((?!http)([^)]+)\)", README))))
def test_links_within_the_repository_lead_somewhere(path):
    assert (ROOT / path).exists()
