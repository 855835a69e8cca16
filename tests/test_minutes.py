"""--minutes: how long a run takes, and what follows from that."""

import argparse
import json
import time

import pytest

import step1_train
from training import minutes
from training.minutes import Pace
from training.processes import Processes

SETTINGS = argparse.Namespace(
    augment=[],
    batch_size=10,
    calibration="none",
    epochs=1,
    pretrained=None,
    freeze_backbone=False,
)


class Images:
    """A split of so many images."""

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def count_batches(self, batch_size, processes):
        return self.count // batch_size


SPLITS = {"train": Images(100), "test": Images(50)}
MACHINE = argparse.Namespace(processes=Processes(rank=0, count=1, local_rank=0))


PACE = Pace(step=0.5, image=0.01, exact=0.02)


def seconds(epochs, **changed):
    settings = argparse.Namespace(**{**vars(SETTINGS), **changed})
    return minutes.seconds_of(epochs, SPLITS, settings, MACHINE, PACE) - minutes.REPORT_SECONDS


def test_everything_that_takes_time_is_counted():
    epoch = 10 * 0.5 + 50 * 0.01
    result = 50 * (0.02 - 0.01)  # the last evaluation is in fp32
    assert seconds(1) == pytest.approx(epoch + result)
    assert seconds(20) == pytest.approx(20 * epoch + result)

    described = 2 * 100 * 0.02  # as they are, and in other light
    with_held_out = seconds(1, calibration="validation") - seconds(1)
    assert with_held_out == pytest.approx(described + 50 * 0.02)

    epoch_of_twin = 8 * 0.5 + 20 * 0.01
    with_twin = seconds(20, calibration="twin") - seconds(20)
    twin = 10 * epoch_of_twin + 20 * 0.02
    assert with_twin == pytest.approx(described + twin)

    tuned = {"calibration": "twin", "pretrained": "default", "freeze_backbone": False}
    compared = 2 * 20 * 0.02  # the network as trained and with the head alone
    trained_norm = seconds(20, batch_norm="trained", **tuned)
    assert trained_norm == pytest.approx(seconds(20) + with_twin + compared)
    averaged = 2 * 20 * 0.02 + 50 * 0.02  # compared with the twin; the average on the test split
    assert seconds(20, batch_norm="frozen", **tuned) == pytest.approx(trained_norm + averaged)
    mixed = {**tuned, "augment": ["cutmix"]}  # which stands in for the average
    assert seconds(20, batch_norm="frozen", **mixed) == pytest.approx(trained_norm)


def test_estimating_batch_norm_anew_is_counted():
    def anew(epochs):
        pace = PACE._replace(momentum=0.1)
        lagging = minutes.seconds_of(epochs, SPLITS, SETTINGS, MACHINE, pace)
        return lagging - minutes.seconds_of(epochs, SPLITS, SETTINGS, MACHINE, PACE)

    assert anew(5) == pytest.approx(5 * 100 * 0.02)  # each epoch, 100 images in fp32
    assert anew(20) == 0  # 200 steps are enough for a momentum of 0.1


@pytest.mark.parametrize(
    ("budget", "epochs"),
    [(0, 1), (16.7, 2), (60.7, 10), (20.5, 2), (60.4, 10), (20.9, 2), (21.4, 3)],
)
def test_epochs_fill_the_time(budget, epochs):
    assert minutes.epochs_in(budget, SPLITS, SETTINGS, MACHINE, PACE) == epochs


@pytest.mark.slow
def test_a_run_takes_about_so_long_and_goes_on_with_what_was_derived(call, here):
    asked = ["--model", "mlp", "--hidden", "512", "--calibration", "none", "--threads", 1]
    started = time.perf_counter()
    run = call(step1_train.main, *asked, "--minutes", 0.12, "--name", "timed").done()
    took = time.perf_counter() - started
    config = json.loads((here / "runs/timed/config.json").read_text())
    assert f"{config['epochs']} epoch" in run.out and "(--minutes 0.12)" in run.out
    assert took < 40  # 7 s were asked for; the machine may be busy

    resumed = call(step1_train.main, "--resume", "timed", "--epochs", config["epochs"] + 1).done()
    assert f"a course of {config['epochs'] + 1} epochs" in resumed.err


def test_minutes_that_cannot_be(call, here):
    call(step1_train.main, "--minutes", 1, "--epochs", 2).error(2, "--minutes", "--epochs")
    call(step1_train.main, "--minutes", 0).error(2, "--minutes")
    call(step1_train.main, "--dataset", "linear", "--minutes", 1).error(2, "--minutes")


def test_the_width_follows_from_the_time(monkeypatch):
    monkeypatch.setattr(minutes, "build_deployable", lambda *_: None)
    monkeypatch.setattr(minutes, "measure", lambda *_: Pace(step=0.05, image=0.0001, exact=0.0001))
    dataset = argparse.Namespace(classes=["a", "b"])
    settings = argparse.Namespace(
        **{**vars(SETTINGS), "minutes": 1, "model": "airbench", "width": None}
    )
    splits = {"train": Images(50_000), "test": Images(10_000)}

    def width_after(budget):
        deadline = time.perf_counter() + budget
        return minutes.choose_width(deadline, dataset, splits, settings, MACHINE)

    assert [width_after(60), width_after(700), width_after(5000)] == [0.25, 0.5, 1.0]
    settings.width = 0.75
    assert width_after(60) == 0.75
