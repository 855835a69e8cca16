"""Several processes under torch's own launcher: as one run, and down as one."""

import csv
import json
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT

import data
import step1_train
from data import split
from inference.errors import Problem
from training import processes

# 101: shares of 51 and 50
RUN = ["--model", "mlp", "--epochs", "3", "--batch-size", "101", "--device", "cpu"]
LAUNCH = [
    sys.executable,
    "-m",
    "torch.distributed.run",
    "--nproc-per-node=2",
    "--standalone",
    "--local-addr=127.0.0.1",
]
# Step 1, which leaves the names of the threads that run on when Python is about to end.
LISTING = """
import atexit, os, pathlib, runpy, sys

@atexit.register
def write_threads():
    names = [path.read_text() for path in pathlib.Path("/proc/self/task").glob("*/comm")]
    pathlib.Path("threads-" + os.environ["RANK"]).write_text("".join(names))

sys.argv.pop(0)
sys.path.insert(0, os.path.dirname(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def launch(here, *arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    (here / "listing.py").write_text(LISTING)
    command = [*LAUNCH, "listing.py", str(ROOT / "step1_train.py"), *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=here, env=environment, **pipes)


def rows(run):
    return list(csv.DictReader((run / "metrics.csv").read_text().splitlines()))


def test_shares_of_a_batch_are_the_whole_batch_as_one_process_sees_it():
    images = torch.randint(0, 256, (50, 8, 8, 3), dtype=torch.uint8)
    whole = split.Split(images, torch.arange(50), torch.arange(50), images.numpy())
    alone = list(whole.shuffled(11, data.AUGMENTATIONS, 1, 5))
    shares = [
        list(whole.shuffled(11, data.AUGMENTATIONS, 1, 5, 0, slice(k, None, 2))) for k in range(2)
    ]
    assert len(alone) == len(shares[0]) == len(shares[1]) == whole.count_batches(11, 2) == 5
    for (pixels, labels, batch), first, second in zip(alone, *shares, strict=True):
        for k, (part, part_labels, part_batch) in enumerate((first, second)):
            assert torch.equal(part, pixels[k::2]) and torch.equal(part_labels, labels[k::2])
            assert part_batch == batch == len(labels)


def test_the_first_process_says_what_all_find_and_others_name_themselves():
    second = processes.Processes(rank=1, count=2)
    with pytest.raises(SystemExit), processes.failures_named(second):
        raise Problem("a wrong option", 2)
    with pytest.raises(Problem, match="process 1: its own"), processes.failures_named(second):
        raise Problem("its own")
    lost = pytest.raises(Problem, match="process 1 lost the others: Connection closed")
    with lost, processes.failures_named(second):
        raise RuntimeError("Connection closed")


def test_a_batch_is_too_small_for_its_processes():
    settings = SimpleNamespace(batch_size=3, device="cpu", precision="fp32", sync_batchnorm=False)
    with pytest.raises(Problem, match="--batch-size 3 is too small for 2 processes"):
        processes.choose_machine(settings, processes.Processes(count=2))


@pytest.mark.slow
def test_two_processes_train_as_one_and_either_resumes_the_other(call, here):
    call(step1_train.main, *RUN, "--name", "one").done()
    process = launch(here, *RUN, "--name", "two")
    out, err = process.communicate(timeout=100)
    assert process.returncode == 0, err
    threads = [(here / f"threads-{rank}").read_text() for rank in range(2)]
    assert "gloo" not in "".join(
        threads
    )  # one that wants Python's lock at the end aborts its process
    assert (
        out.count("epoch   train loss") == 1 and "2 processes" in out
    )  # only the first one prints
    assert {path.name for path in (here / "runs").iterdir()} == {"one", "two"}
    for alone, together in zip(
        rows(here / "runs" / "one"), rows(here / "runs" / "two"), strict=True
    ):
        assert float(together["train_loss"]) == pytest.approx(float(alone["train_loss"]), rel=1e-4)
        assert float(together["test_loss"]) == pytest.approx(float(alone["test_loss"]), rel=1e-4)
    summaries = [
        json.loads((here / "runs" / name / "summary.json").read_text()) for name in ("one", "two")
    ]
    supports = [[row["support"] for row in summary["per_class"].values()] for summary in summaries]
    assert sum(supports[1]) == 360 and supports[0] == supports[1]  # each test image counted once
    assert summaries[1]["test_accuracy"] == pytest.approx(summaries[0]["test_accuracy"], abs=0.006)
    call(step1_train.main, "--resume", "two", "--epochs", 4).done()  # another number of processes


@pytest.mark.slow
def test_a_process_that_dies_takes_the_others_with_it_and_the_run_goes_on(call, here):
    process = launch(here, *RUN, "--epochs", 50)
    while not process.stdout.readline().startswith("    1 "):
        assert process.poll() is None, process.stderr.read()
    children = subprocess.run(
        ["pgrep", "-P", str(process.pid)], capture_output=True, text=True
    ).stdout.split()
    os.kill(int(children[-1]), signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode != 0
    assert not [child for child in children if os.path.exists(f"/proc/{child}")]
    checkpoint = torch.load(here / "runs" / "digits-mlp" / "checkpoint.pt", weights_only=True)
    assert checkpoint["epoch"] >= 1


@pytest.mark.slow
def test_wrong_arguments_are_said_once(here):
    process = launch(here, "--model", "mlq")
    _, err = process.communicate(timeout=60)
    assert process.returncode != 0 and err.count("error: unknown model 'mlq'") == 1


def test_what_needs_more_or_other_hardware_is_refused(call, here, monkeypatch):
    call(step1_train.main, *RUN, "--sync-batchnorm").error(2, "--sync-batchnorm needs GPUs")
    assert not (here / "runs").exists()
