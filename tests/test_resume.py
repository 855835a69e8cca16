"""Runs that are stopped, killed or out of disk, and go on to the very same end."""

import csv
import dataclasses
import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT

import data
import step1_train
from data.dataset import with_fingerprint
from training import cpu, optimizers, runs

sys.path.insert(0, str(ROOT / "tests" / "benchmarks"))
import soak_resume

# Dropout, both kinds of state in the optimizer, a schedule and augmentation: whatever could come
# out differently.
RUN = [
    "--model",
    "mynet",
    "--epochs",
    "4",
    "--batch-size",
    "100",
    "--augment",
    "translate",
    "flip",
    "cutout",
    "cutmix",
]
RUN += ["--device", "cpu", "--precision", "fp32"]


def result(run):
    """The weights and the metrics of a run, without times."""
    checkpoint = torch.load(run / "checkpoint.pt", weights_only=True)
    rows = list(csv.DictReader((run / "metrics.csv").read_text().splitlines()))
    return checkpoint["state_dict"], [
        {k: v for k, v in row.items() if k != "seconds"} for row in rows
    ]


def assert_same(run, other):
    (weights, rows), (their_weights, their_rows) = result(run), result(other)
    assert rows == their_rows
    assert not [key for key, value in weights.items() if not torch.equal(value, their_weights[key])]


def stop_at(monkeypatch, epoch, batch, number=signal.SIGINT):
    """Send this process a signal at a step, as Ctrl-C or a cluster's scheduler would."""
    set_rate = optimizers.set_rate  # which each step calls once
    calls = iter(range(1, 10**6))

    def counting(optimizer, part):
        # 15 steps in an epoch of RUN
        if next(calls) == (epoch - 1) * 15 + batch:
            os.kill(os.getpid(), number)
        set_rate(optimizer, part)

    monkeypatch.setattr(optimizers, "set_rate", counting)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    place = tmp_path_factory.mktemp("undisturbed")
    before = os.getcwd()
    os.chdir(place)
    assert step1_train.main([*RUN, "--name", "a"]) == 0
    assert step1_train.main([*RUN, "--name", "val", "--val-fraction", "0.2", "--quiet"]) == 0
    os.chdir(before)
    return place / "runs"


@pytest.mark.parametrize(
    ("epoch", "batch", "number"), [(1, 1, 2), (2, 7, 15), (3, 15, 2), (4, 14, 2)]
)
def test_a_stopped_run_goes_on_to_the_very_same_end(
    call, here, undisturbed, monkeypatch, epoch, batch, number
):
    with monkeypatch.context() as patch:
        stop_at(patch, epoch, batch, number)
        stopped = call(step1_train.main, *RUN)
    assert stopped.code == 128 + number
    epochs = f"{epoch - 1} epoch{'' if epoch == 2 else 's'}"
    steps = f"{batch} step{'' if batch == 1 else 's'}"
    assert f"stopped and saved after {epochs} and {steps}; to continue:" in stopped.err
    assert "step1_train.py --resume digits-mynet" in stopped.err and "Traceback" not in stopped.err
    assert not (here / "runs" / "digits-mynet" / "summary.json").exists()
    resumed = call(step1_train.main, "--resume").done()
    assert "runs/digits-mynet: test accuracy" in resumed.out
    assert_same(here / "runs" / "digits-mynet", undisturbed / "a")
    assert {path.name for path in (here / "runs" / "digits-mynet").iterdir()} >= {"summary.json"}
    assert not list((here / "runs" / "digits-mynet").glob("*previous*"))


def test_the_best_epoch_on_the_validation_split_survives_a_stop(
    call, here, undisturbed, monkeypatch
):
    with monkeypatch.context() as patch:
        stop_at(patch, 3, 2)
        assert call(step1_train.main, *RUN, "--val-fraction", 0.2).code == 130
    call(step1_train.main, "--resume", "digits-mynet").done()
    assert_same(here / "runs" / "digits-mynet", undisturbed / "val")


@pytest.mark.calibrated
def test_a_run_stopped_while_its_twin_trains_ends_with_the_same_calibration(
    call, here, undisturbed, monkeypatch
):
    with monkeypatch.context() as patch:
        stop_at(patch, 5, 14)  # 4 epochs of the run, and 14 steps of its twin
        stopped = call(step1_train.main, *RUN)
    assert stopped.code == 130 and "stopped and saved after 4 epochs" in stopped.err
    twin = here / "runs" / "digits-mynet" / "twin"
    assert (twin / "checkpoint.pt").exists()
    resumed = call(step1_train.main, "--resume").done()
    assert "runs/digits-mynet: test accuracy" in resumed.out
    assert_same(here / "runs" / "digits-mynet", undisturbed / "a")
    places = here / "runs" / "digits-mynet", undisturbed / "a"
    one, other = (torch.load(place / "checkpoint.pt", weights_only=True) for place in places)
    assert one["spec"]["temperature"] == other["spec"]["temperature"]
    assert not [
        k for k, v in one["familiarity"].items() if not torch.equal(v, other["familiarity"][k])
    ]
    assert not (here / "runs" / "digits-mynet" / "twin").exists()


@pytest.mark.calibrated
def test_a_kill_while_the_twin_writes_its_first_checkpoint_loses_nothing(
    call, here, undisturbed, monkeypatch
):
    with monkeypatch.context() as patch:
        stop_at(patch, 5, 14)
        assert call(step1_train.main, *RUN).code == 130
    twin = here / "runs" / "digits-mynet" / "twin"
    shutil.rmtree(twin)
    twin.mkdir()
    (twin / ".checkpoint.pt-1a2b3c4d.tmp").write_bytes(b"half")
    call(step1_train.main, "--resume").done()
    assert_same(here / "runs" / "digits-mynet", undisturbed / "a")


@pytest.mark.slow
def test_muon_resumes_exactly(call, here, monkeypatch):
    arguments = ["--width", "0.06", "--epochs", "3", "--batch-size", "100", "--device", "cpu"]
    call(step1_train.main, *arguments, "--name", "a").done()
    with monkeypatch.context() as patch:
        stop_at(patch, 2, 4)
        assert call(step1_train.main, *arguments, "--name", "b").code == 130
    call(step1_train.main, "--resume", "b").done()
    assert_same(here / "runs" / "a", here / "runs" / "b")


@pytest.mark.parametrize("schedule", ["onecycle", "cosine", "constant"])
def test_the_learning_rate_of_a_resumed_run_is_that_of_an_undisturbed_one(
    call, here, monkeypatch, schedule
):
    arguments = [*RUN, "--epochs", 2, "--schedule", schedule, "--optimizer", "sgd", "--lr", 0.05]
    call(step1_train.main, *arguments, "--name", "a").done()
    with monkeypatch.context() as patch:
        stop_at(patch, 2, 9)
        assert call(step1_train.main, *arguments, "--name", "b").code == 130
    resumed = call(step1_train.main, "--resume", "b").done()
    assert "warn" not in resumed.err.lower()
    assert_same(here / "runs" / "a", here / "runs" / "b")


def test_a_run_is_resumed_with_the_threads_it_began_with_whatever_the_load(call, here, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(cpu, "usable_cpus", lambda: 2)
    monkeypatch.setattr(cpu, "cpus_taken", lambda: 0.0)
    with monkeypatch.context() as patch:
        stop_at(patch, 2, 4)
        stopped = call(step1_train.main, *RUN, "--epochs", 2, "--name", "a")
    assert stopped.code == 130 and "2 threads" in stopped.out
    monkeypatch.setattr(cpu, "cpus_taken", lambda: 2.0)  # by now the machine is busy
    assert "2 threads" in call(step1_train.main, "--resume", "a").done().out
    assert "1 thread," in call(step1_train.main, *RUN, "--epochs", 1, "--name", "b").done().out


def test_a_checkpoint_of_an_earlier_version_is_not_resumed(call, run):
    checkpoint = torch.load(run / "checkpoint.pt", weights_only=True)
    torch.save({**checkpoint, "schema": 1}, run / "checkpoint.pt")
    before = (run / "checkpoint.pt").read_bytes()
    call(step1_train.main, "--resume", "a").error(
        1, "earlier version", "cannot be continued", "exported"
    )
    assert (run / "checkpoint.pt").read_bytes() == before


def test_a_checkpoint_of_a_newer_version_is_not_resumed(call, run):
    checkpoint = torch.load(run / "checkpoint.pt", weights_only=True)
    torch.save({**checkpoint, "schema": 99}, run / "checkpoint.pt")
    call(step1_train.main, "--resume", "a").error(1, "schema 99", "update")


def start(here, *arguments):
    """Step 1 as a process of its own, once it has printed the row of its first epoch."""
    command = [sys.executable, str(ROOT / "step1_train.py"), *RUN, *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, cwd=here, **pipes)
    while not process.stdout.readline().startswith("    1 "):
        assert process.poll() is None, process.stderr.read()
    return process


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)],
)
def test_signals_stop_a_real_process_with_its_exit_code(here, number, code):
    process = start(here, "--epochs", "50", "--name", "a")
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code and "Traceback" not in err
    assert re.search(r"python \S*step1_train.py --resume a$", err.strip())


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
def test_a_killed_run_goes_on_to_the_very_same_end(call, here, undisturbed):
    process = start(here, "--name", "a", "--checkpoint-every", "3")
    process.kill()
    process.communicate()
    assert not (here / "runs" / "a" / "summary.json").exists()
    assert "resumed   after" in call(step1_train.main, "--resume", "a").done().out
    assert_same(here / "runs" / "a", undisturbed / "a")


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
def test_kills_at_random_moments_lose_nothing(tmp_path):
    counts = soak_resume.soak(kills=10, seed=1, place=tmp_path)
    assert counts["killed"] == 10 and counts["finished"] >= 1
    assert (counts["unreadable"], counts["lost"], counts["different"]) == (0, 0, 0)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run that was stopped in its third epoch. Read only."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("stopped"))
        stop_at(patch, 3, 5)
        assert step1_train.main([*RUN, "--name", "a"]) == 130
        return Path.cwd() / "runs" / "a"


@pytest.fixture
def run(stopped, here):
    """The same, free to be altered, in an empty working directory: runs/a."""
    return shutil.copytree(stopped, here / "runs" / "a")


def test_a_corrupt_checkpoint_falls_back_to_the_one_before(call, undisturbed, run):
    content = (run / "checkpoint.pt").read_bytes()
    (run / "checkpoint.pt").write_bytes(content[: len(content) // 2])
    result = call(step1_train.main, "--resume", "a").done()
    assert (
        "checkpoint.pt is truncated" in result.err and "going on from the one before" in result.err
    )
    assert "resumed   after 2 epochs and 0 steps" in result.out
    assert_same(run, undisturbed / "a")


def test_both_checkpoints_corrupt_is_one_line(call, run):
    for path in run.glob("checkpoint*"):
        path.write_bytes(b"no checkpoint")
    call(step1_train.main, "--resume", "a").error(1, "runs/a/checkpoint.pt is truncated")


def test_a_run_without_checkpoint_and_configuration_is_one_line(call, run):
    for path in run.glob("checkpoint*"):
        path.unlink()
    (run / "config.json").write_text("{")
    call(step1_train.main, "--resume", "a").error(
        1, "runs/a/config.json is damaged", "there is no checkpoint"
    )


def test_a_file_system_without_links_keeps_the_checkpoint_before(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    for content in (b"first", b"second"):
        runs.write(str(tmp_path), "checkpoint.pt", content, previous="checkpoint.previous.pt")
    assert (tmp_path / "checkpoint.pt").read_bytes() == b"second"
    assert (tmp_path / "checkpoint.previous.pt").read_bytes() == b"first"


def test_a_run_killed_before_its_first_checkpoint_starts_again(call, undisturbed, run):
    for path in run.glob("checkpoint*"):
        path.unlink()
    call(step1_train.main, "--resume").done()
    assert_same(run, undisturbed / "a")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--lr", 0.5], ["--lr 0.5", "was 0.04", "leave it out"]),
        (["--augment", "none", "--seed", 3], ["--augment", "--seed 3"]),
        (["--epochs", 2], ["--epochs can only be raised"]),
    ],
)
def test_what_would_alter_the_course_is_refused(call, arguments, words, run):
    before = (run / "checkpoint.pt").read_bytes()
    call(step1_train.main, "--resume", "a", *arguments).error(2, *words)
    assert (run / "checkpoint.pt").read_bytes() == before


def test_saying_the_same_again_is_no_change(call, undisturbed, run):
    call(step1_train.main, *RUN, "--resume", "a").done()
    assert_same(run, undisturbed / "a")


def test_more_epochs_say_what_becomes_of_the_schedule(call, here, undisturbed, monkeypatch):
    shutil.copytree(undisturbed / "a", here / "runs" / "a")
    result = call(step1_train.main, "--resume", "a", "--epochs", 6).done()
    assert "a course of 6 epochs from here on, not of 4" in result.err
    assert [
        row["epoch"] for row in csv.DictReader((here / "runs" / "a" / "metrics.csv").open())
    ] == list("123456")
    assert json.loads((here / "runs" / "a" / "summary.json").read_text())["epochs"] == 6


def test_nothing_to_resume_is_said(call, here, undisturbed):
    call(step1_train.main, "--resume").error(2, "no unfinished run")
    call(step1_train.main, "--resume", "x").error(2, "no run 'x'")
    shutil.copytree(undisturbed / "a", here / "runs" / "a")
    call(step1_train.main, "--resume").error(2, "no unfinished run")
    call(step1_train.main, "--resume", "a").error(2, "is finished", "--epochs above 4")


def test_another_dataset_is_noticed(call, run, monkeypatch):
    digits = data.load("digits")
    changed = dataclasses.replace(
        digits, train_labels=digits.train_labels[::-1].copy(), fingerprint={}
    )
    monkeypatch.setattr(data, "load", lambda *_, **__: with_fingerprint(changed))
    line = call(step1_train.main, "--resume", "a").error(1, "not what runs/a was trained with")
    assert "the train split has other images, or the same with other labels" in line


def test_two_processes_do_not_resume_the_same_run(call, run):
    with runs.locked(str(run)):
        call(step1_train.main, "--resume", "a").error(1, "is being trained by another process")


def test_a_full_disk_keeps_the_last_checkpoint_and_the_run_goes_on(
    call, undisturbed, run, monkeypatch
):
    before = (run / "checkpoint.pt").read_bytes()
    replacing = runs.replacing

    def full(path):
        return (
            open("/dev/full", "wb", buffering=0)
            if path.endswith("checkpoint.pt")
            else replacing(path)
        )

    with monkeypatch.context() as patch:
        patch.setattr(runs, "replacing", full)
        result = call(step1_train.main, "--resume", "a")
    error = result.error(1, "cannot write runs/a/checkpoint.pt", "No space left")
    assert "--resume a" in error and (run / "checkpoint.pt").read_bytes() == before
    call(step1_train.main, "--resume", "a").done()
    assert_same(run, undisturbed / "a")


def test_a_run_directory_that_vanishes_is_one_line(call, here, monkeypatch):
    criterion = step1_train.criterion

    def removing(*args):
        shutil.rmtree(here / "runs", ignore_errors=True)
        return criterion(*args)

    monkeypatch.setattr(step1_train, "criterion", removing)
    call(step1_train.main, *RUN).error(
        1, "cannot write runs/digits-mynet/checkpoint.pt", "No such file"
    )


def test_a_loss_that_is_not_finite_says_where_and_keeps_the_checkpoint(call, here, monkeypatch):
    set_rate = optimizers.set_rate
    criterion = step1_train.criterion
    steps = []

    def counting(*args):
        steps.append(args)
        set_rate(*args)

    def diverging(outputs, *rest):
        loss = criterion(outputs, *rest)
        return loss * float("nan") if len(steps) == 15 + 4 else loss

    monkeypatch.setattr(optimizers, "set_rate", counting)
    monkeypatch.setattr(step1_train, "criterion", diverging)
    call(step1_train.main, *RUN).error(
        1, "became nan in epoch 2, step 4", "learning rate 0.0", "smaller --lr"
    )
    checkpoint = torch.load(here / "runs" / "digits-mynet" / "checkpoint.pt", weights_only=True)
    assert checkpoint["epoch"] == 1


def test_checkpoints_within_an_epoch(call, here, monkeypatch):
    saved, write = [], runs.write_checkpoint

    def watch(run_dir, checkpoint):
        saved.append(checkpoint["training"]["progress"]["steps"])
        write(run_dir, checkpoint)

    monkeypatch.setattr(runs, "write_checkpoint", watch)
    run = [*RUN, "--epochs", 1, "--calibration", "none"]
    call(step1_train.main, *run, "--checkpoint-every", 6).done()
    assert saved == [6, 12, 0]
    clock = iter(range(0, 10**6, 30))
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))  # half a minute passes at each look
    saved.clear()
    call(step1_train.main, *run, "--checkpoint-every", "2m").done()
    assert len(saved) == 4
    for wrong in ("soon", "0m", "0.0m", "0", "-5"):
        call(step1_train.main, *RUN, f"--checkpoint-every={wrong}").error(2, f"'{wrong}'", "10m")
