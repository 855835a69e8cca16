"""How much training fits into the minutes that --minutes allows.

A few steps and evaluations are timed on a copy of the network, before the run begins. The epochs
follow from them, and with the epochs the course of the learning rate: a run that is resumed keeps
both.
"""

import argparse
import copy
import time
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F

from data.dataset import Dataset
from data.notes import note
from data.split import Split
from training import optimizers, recipes
from training.calibration import GAUSSIAN_IMAGES, TWIN_PART, epochs_of_twin
from training.features import Trainee, WholeNetwork
from training.network import build_deployable
from training.processes import Machine

FIRST_STEPS = 2  # not timed: they prepare kernels and memory
FEWEST_STEPS = 3
LEAST_SECONDS = 2.0  # timed at least, so that other work on the machine evens out
LEAST_PART = 0.02  # of --minutes, where that is less
REPORT_SECONDS = 5.0  # what summary, pictures and report take

MANY_EPOCHS = 50  # after which a small dataset has been seen often enough


class Pace(NamedTuple):
    """What one thing takes, in seconds: a training step, and an image that is evaluated."""

    step: float
    image: float

    def times(self, factor: float) -> "Pace":
        return Pace(step=factor * self.step, image=factor * self.image)


class Width(NamedTuple):
    """A width of airbench. time: of a step, as a part of width 1's. images: how many it must see,
    over all epochs, to beat the next smaller width. Both are rough, from single runs on CIFAR-10:
    see tests/benchmarks/NOTES.md.
    """

    width: float
    time: float
    images: int


WIDTHS = (
    Width(width=1.0, time=1.0, images=225_000),
    Width(width=0.5, time=0.33, images=75_000),
    Width(width=0.25, time=0.15, images=0),
)


def choose_width(
    deadline: float,
    dataset: Dataset,
    splits: dict[str, Split],
    settings: argparse.Namespace,
    machine: Machine,
) -> float | None:
    """The width of airbench that should do best until the deadline: the largest that sees enough
    images until then. That of the settings if --minutes leaves it alone.

    deadline: by time.perf_counter().
    """
    if not recipes.chooses_width(settings):
        return settings.width

    tried = WIDTHS[1]
    settings = argparse.Namespace(**{**vars(settings), "width": tried.width})
    deployable = build_deployable(settings, dataset, None, machine)
    trainee = WholeNetwork(deployable=deployable, splits=splits, classes=len(dataset.classes))
    pace = measure(trainee, settings, machine)

    seconds = deadline - time.perf_counter()
    for width in WIDTHS:
        pace_of_width = pace.times(width.time / tried.time)
        epochs = epochs_in(seconds, splits, settings, machine, pace_of_width)
        if epochs >= MANY_EPOCHS or epochs * len(splits["train"]) >= width.images:
            return width.width
    return WIDTHS[-1].width


def choose_epochs(
    deadline: float, trainee: Trainee, settings: argparse.Namespace, machine: Machine
) -> int:
    """How many epochs can be trained until the deadline, at least 1. Those of the settings without
    --minutes.

    What follows them is included: evaluation, twin, calibration and report. deadline: by
    time.perf_counter().
    """
    if not settings.minutes:
        return settings.epochs

    pace = measure(trainee, settings, machine)
    seconds = max(deadline - time.perf_counter(), 0)
    epochs = epochs_in(seconds, trainee.splits, settings, machine, pace)

    expected = seconds_of(epochs, trainee.splits, settings, machine, pace)
    if expected > 1.1 * seconds:
        note(
            f"an epoch, calibration and report take about {expected:.0f} s, "
            f"and of --minutes {settings.minutes:g} there are {seconds:.0f} s left"
        )
    return epochs


def epochs_in(
    seconds: float,
    splits: dict[str, Split],
    settings: argparse.Namespace,
    machine: Machine,
    pace: Pace,
) -> int:
    """The most epochs that a run of so many seconds may have, at least 1."""
    epochs = 1
    while seconds_of(epochs + 1, splits, settings, machine, pace) <= seconds:
        epochs += 1
    return epochs


def seconds_of(
    epochs: int,
    splits: dict[str, Split],
    settings: argparse.Namespace,
    machine: Machine,
    pace: Pace,
) -> float:
    """How long a run of so many epochs will take, with all that follows them."""
    steps = splits["train"].count_batches(settings.batch_size, machine.processes.count)
    watched = splits["val"] if "val" in splits else splits["test"]
    seconds = epochs * (steps * pace.step + len(watched) * pace.image)

    if "val" in splits:
        seconds += len(splits["test"]) * pace.image
    if settings.calibration != "none":
        described = min(len(splits["train"]), GAUSSIAN_IMAGES)
        seconds += 2 * described * pace.image  # as they are, and in other light
    if settings.calibration == "twin":
        held_out = TWIN_PART * len(splits["train"])
        epoch = (1 - TWIN_PART) * steps * pace.step + held_out * pace.image
        of_run = argparse.Namespace(**{**vars(settings), "epochs": epochs})
        seconds += epochs_of_twin(of_run) * epoch + held_out * pace.image
    return seconds + REPORT_SECONDS


def measure(trainee: Trainee, settings: argparse.Namespace, machine: Machine) -> Pace:
    """Time some steps and evaluations on a copy of the network."""
    deployable = copy.deepcopy(trainee.deployable)
    trainee = trainee.with_network(deployable, trainee.splits)
    train = trainee.splits["train"]

    optimizer = optimizers.make_optimizer(deployable.network, settings)
    optimizers.train_mode(deployable.network, settings.batch_norm)

    def step(batch: tuple) -> None:
        images, labels, _ = batch
        with machine.autocast():
            outputs = trainee.network(trainee.normalise(images))  # [batch, classes]
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(outputs.float(), labels).backward()
        optimizer.step()

    def batches() -> Iterable[tuple]:
        share = machine.processes.share
        return train.shuffled(
            settings.batch_size, settings.augment, epoch=1, seed=settings.seed, share=share
        )

    least = min(LEAST_SECONDS, LEAST_PART * 60 * settings.minutes)
    seconds_of_step = time_each(step, batches, least, machine)

    @torch.inference_mode()
    def evaluate(batch: tuple) -> None:
        images, _ = batch
        with machine.autocast():
            trainee.network(trainee.normalise(images))

    deployable.network.eval()
    seconds_of_batch = time_each(evaluate, train.in_order, least, machine)
    images_of_batch = len(next(train.in_order())[0])
    return Pace(step=seconds_of_step, image=seconds_of_batch / images_of_batch)


def time_each(
    work: Callable, make_batches: Callable[[], Iterable[tuple]], least: float, machine: Machine
) -> float:
    """The mean seconds that a batch takes, its making included.

    make_batches: gives an epoch's batches each time it is called. least: seconds to measure.
    """
    done = -FIRST_STEPS
    started = 0.0
    while True:
        for batch in make_batches():
            if done == 0:
                started = time.perf_counter()
            work(batch)
            if machine.device.type == "cuda":
                torch.cuda.synchronize(machine.device)
            done += 1
            seconds = time.perf_counter() - started
            if done >= FEWEST_STEPS and seconds >= least:
                return seconds / done
