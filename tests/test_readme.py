"""The documentation is true: its commands run, and its options, links and names exist."""

import re
import shlex
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, first_command, right
from PIL import Image

from deploy import archive

NAMES = (
    *("README.md", "data/README.md", "deploy/README.md", "deploy/cpp/README.md"),
    *("data/digits.md", "tests/benchmarks/README.md", "tests/benchmarks/NOTES.md"),
    ".github/SECURITY.md",
)
PAGES = {name: (ROOT / name).read_text(encoding="utf-8") for name in NAMES}
README = PAGES["README.md"]
OF_OTHERS = {  # the options of pip, torchrun, cmake, curl, http.server, model_signing, rpicam-vid
    *("--index-url", "--nproc-per-node", "--nnodes", "--rdzv-backend", "--rdzv-endpoint"),
    *("--build", "--data-binary", "--directory", "--signature", "--private_key", "--public_key"),
    "--codec",
}


def blocks(name):
    """The bash blocks of a page."""
    return re.findall(r"^```bash\n(.*?)```", PAGES[name], re.DOTALL | re.MULTILINE)


def commands(name):
    """The lines of a page's bash blocks, without comments and without the README's set-up
    commands."""
    chosen = blocks(name)[2:] if name == "README.md" else blocks(name)
    return [line.split("  #")[0].strip() for block in chosen for line in block.splitlines()]


def run_here(command, directory, scripts):
    """Run a page's command in `directory`, with the scripts in `scripts`, and return what it
    prints."""
    command = re.sub(
        r"\S*\bpython (step\d_\w+\.pyz?)",
        lambda found: f"{shlex.quote(sys.executable)} {shlex.quote(str(scripts / found[1]))}",
        command,
    )
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command], cwd=directory, capture_output=True, text=True
    )
    assert done.returncode == 0, (command, done.stderr)
    return done.stdout


def test_first_command_trains_exports_and_predicts(trained):
    steps = [" ".join(step) for step in first_command()]
    assert steps[:2] == ["python3 -m venv .venv", ".venv/bin/pip install -r requirements.txt"]
    assert len(trained.printed) == len(steps[2:]) == 3
    answers = [re.split(r"  | ", line)[:2] for line in trained.printed[2].out.splitlines()]
    assert len(answers) == 10 and right(answers) >= 9


def test_the_small_torch_is_offered_before_the_large_one():
    assert "--index-url https://download.pytorch.org/whl/cpu" in README.split("```bash")[0]


def test_second_command_is_what_ci_runs():
    assert blocks("README.md")[1].strip() in (ROOT / ".ci" / "run").read_text()


def test_every_option_named_exists():
    scripts = ["step1_train.py", "step2_export.py", "step3_infer.py"]
    scripts.append("deploy/serving/ray_bundle.py")
    helps = [
        subprocess.run(
            [sys.executable, ROOT / script, "--help"], capture_output=True, text=True
        ).stdout
        for script in scripts
    ]
    # The help of the Ray script needs ray.
    helps.append((ROOT / "deploy" / "serving" / "ray_bundle.py").read_text(encoding="utf-8"))
    known = set(re.findall(r"--[a-z0-9-]+", "".join(helps)))
    # The benchmarks' page also speaks of options that were tried and removed: only its commands
    # count.
    texts = [PAGES[name] for name in NAMES if not name.startswith("tests")]
    texts += re.findall(r"`(step\d_[^`]*)`", PAGES["tests/benchmarks/README.md"])
    assert len(texts) > len(NAMES)
    used = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9_-]+", "\n".join(texts)))
    assert used - known <= OF_OTHERS


def anchors(name):
    """The anchors that GitHub makes of a page's headings."""
    text = (ROOT / name).read_text(encoding="utf-8")
    headings = re.findall(r"^#+ (.*)", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize(
    ("name", "link"),
    sorted(
        {
            (name, link)
            for name in NAMES
            for link in re.findall(r"\]\((?!http)([^)]+)\)", PAGES[name])
        }
    ),
)
def test_links_within_the_repository_lead_somewhere(name, link):
    path, _, anchor = link.partition("#")
    target = (ROOT / name).parent / path if path else ROOT / name
    assert target.exists()
    if anchor:
        assert anchor in anchors(target.resolve().relative_to(ROOT.resolve()).as_posix())


def test_contributing_names_what_exists():
    section = README.split("## Contributing")[1]
    named = re.findall(r"`(\w+)`(?: and `(\w+)`)? in `([\w/]+\.py)`", section)
    assert len(named) >= 7
    for *names, path in named:
        text = (ROOT / path).read_text(encoding="utf-8")
        for name in filter(None, names):
            defined = rf"^(def {name}\(|class {name}\b|{name}\b.* = )"
            assert re.search(defined, text, re.MULTILINE), (name, path)


@pytest.mark.slow
def test_every_step3_command_runs_beside_a_model(trained, tmp_path):
    shutil.copy(ROOT / "step3_infer.py", tmp_path)
    shutil.copytree(ROOT / "inference", tmp_path / "inference")
    archive.write_program(str(tmp_path))
    for name in ("model.onnx", "old.onnx"):
        shutil.copy(trained.export / "model.onnx", tmp_path / name)
    shutil.copytree(ROOT / "data" / "samples", tmp_path / "photos")
    for path in sorted((tmp_path / "photos").iterdir()):
        (tmp_path / "labelled" / path.stem[-1]).mkdir(parents=True)
        shutil.copy(path, tmp_path / "labelled" / path.stem[-1])
    listed = [f"digit_{digit}.png,{digit}" for digit in range(10)]
    (tmp_path / "list.csv").write_text("\n".join(["path,label", *listed]))
    (tmp_path / "more").mkdir()
    for name in ("more/a.jpg", "cat.jpg"):
        Image.open(ROOT / "data" / "samples" / "digit_3.png").save(tmp_path / name)
    lines = [line for name in NAMES for line in commands(name) if "python step3_infer." in line]
    elsewhere = ("--values", "--verify")  # a regression's, below; a bundle's, in test_bundle.py
    lines = [line for line in lines if not any(option in line for option in elsewhere)]
    assert len(lines) >= 8
    for line in lines:
        assert run_here(line, tmp_path, tmp_path) or ">" in line or "--output" in line
    assert len((tmp_path / "predictions.jsonl").read_text().splitlines()) == 10


def test_the_regression_commands_run(linear):
    block = next(block for block in blocks("data/README.md") if "--dataset linear" in block)
    train, export, infer = (line.split("  #")[0].strip() for line in block.splitlines())
    assert (train, export) == ("python step1_train.py --dataset linear", "python step2_export.py")
    assert "learned" in linear.printed[0].out
    assert run_here(infer, linear.place, ROOT).startswith("0.1,0.2,0.3,0.4,0.5  ")
