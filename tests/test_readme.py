"""The README's own commands do what it says."""

import json
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, right
from PIL import Image

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```bash\n(.*?)```", README, re.DOTALL | re.MULTILINE)


def test_first_command_trains_exports_and_predicts(tmp_path):
    commands = [command.strip() for command in BLOCKS[0].split("&&")]
    assert commands[:2] == ["python3 -m venv .venv", ".venv/bin/pip install -r requirements.txt"]
    for command in commands[2:]:
        python, script, *arguments = shlex.split(command)
        assert python == ".venv/bin/python"
        arguments = [str(ROOT / argument) for argument in arguments]  # data/samples
        done = subprocess.run(
            [sys.executable, ROOT / script, *arguments], cwd=tmp_path, capture_output=True, text=True
        )
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
        subprocess.run([sys.executable, ROOT / s, "--help"], capture_output=True, text=True).stdout
        for s in scripts
    ]
    known = set(re.findall(r"--[a-z0-9-]+", "".join(helps)))
    used = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", README))
    others = {  # pip's, torchrun's, cmake's, curl's, http.server's, the benchmarks'
        *("--index-url", "--nproc-per-node", "--nnodes", "--rdzv-backend", "--rdzv-endpoint"),
        *(
            "--build",
            "--data-binary",
            "--directory",
            "--kills",
            "--cifar",
            "--mnist",
            "--run",
            "--export",
            "--images",
        ),
    }
    assert used - known <= others


@pytest.mark.parametrize("path", sorted(set(re.findall(r"\]\((?!http)([^)]+)\)", README))))
def test_links_within_the_repository_lead_somewhere(path):
    headings = re.findall(r"^#+ (.*)", README, re.MULTILINE)
    anchors = {"#" + re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    assert path in anchors or (ROOT / path).exists()


def commands(*words):
    """The README's lines that hold one of these words, without their comments."""
    lines = [line.split("  #")[0].strip() for block in BLOCKS[2:] for line in block.splitlines()]
    return [line for line in lines if any(word in line for word in words)]


def run_here(command, place):
    command = re.sub(r"\bpython\b", shlex.quote(sys.executable), command)
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command], cwd=place, capture_output=True, text=True
    )
    assert done.returncode == 0, (command, done.stderr)
    return done.stdout


def test_every_step3_command_runs_beside_a_model(small, tmp_path):
    shutil.copy(ROOT / "step3_infer.py", tmp_path)
    shutil.copy(small.export / "model.onnx", tmp_path)
    shutil.copytree(ROOT / "data" / "samples", tmp_path / "photos")
    (tmp_path / "more").mkdir()
    for name in ("more/a.jpg", "cat.jpg"):
        Image.open(ROOT / "data" / "samples" / "digit_3.png").save(tmp_path / name)
    lines = [
        line
        for line in commands("python step3_infer.py")
        if "--values" not in line and "--verify" not in line
    ]
    assert len(lines) >= 7
    for line in lines:
        assert run_here(line, tmp_path) or ">" in line or "--output" in line
    assert len((tmp_path / "predictions.jsonl").read_text().splitlines()) == 10
    assert len(list((tmp_path / "drawn").iterdir())) == 10


def test_the_regression_commands_run(tmp_path):
    lines = commands("--dataset linear  ", "--values") or []
    train = next(line for line in commands("--dataset linear") if "--lr" not in line)
    for line in (train, "python step2_export.py", lines[-1]):
        out = run_here(re.sub(r"(step\d_\w+\.py)", lambda name: str(ROOT / name[1]), line), tmp_path)
    assert out.startswith("0.1,0.2,0.3,0.4,0.5  ")
