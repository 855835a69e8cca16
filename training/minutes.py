"""How much training fits into the minutes that --minutes allows.

A few steps and evaluations are timed on a copy of the network, before the run begins. The epochs
follow from them, and with the epochs the course of the learning rate: a run that is resumed keeps
both.
"""

import argparse
import copy
import math
import time
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F

from data.dataset import Dataset
from data.notes import note
from data.split import Split
from training import batch_norm, optimizers, recipes
from training.calibration import FOLDS, GAUSSIAN_IMAGES, TWIN_PART, epochs_of_twin
from training.features import Trainee, WholeNetwork, fits_head_first
from training.fine_tuning import averages_networks
from training.network import build_deployable
from training.processes import Machine

FIRST_STEPS = 2  # not timed: they prepare kernels and memory
FEWEST_STEPS = 3
LEAST_SECONDS = 4.0  # timed at least, so that other work on the machine evens out
LEAST_PART = 0.02  # of --minutes, where that is less
REPORT_SECONDS = 5.0  # what summary, pictures and report take
MOST_OVER = 0.05  # of the time there is: the last epoch may exceed it by so much

MOST_EPOCHS = 1_000_000
MANY_EPOCHS = 50  # after which a small dataset has been seen often enough


class Pace(NamedTuple):
    """What one thing takes, in seconds: a training step, an image that is evaluated after an epoch,
    and one of which the result is made, in fp32.

    momentum: the smallest of the network's batch norm, see training/batch_norm.py.
    """

    step: float
    image: float
    exact: float
    momentum: float = math.inf

    def times(self, factor: float) -> "Pace":
        return self._replace(
            step=factor * self.step, image=factor * self.image, exact=factor * self.exact
        )


class Width(NamedTuple):
    """A width of airbench. time: of a step, as a part of width 1's. images: how many it must see,
    over all epochs, to beat the next smaller width. Both are rough, from single runs on CIFAR-10:
    see tests/benchmarks/NOTES.md.
    """

    width: float
    time: float
    images: int


WIDTHS = (
    Width(width=1.0, time=1.0, images=185_000),
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
    if settings.minutes:
        note("timing some steps, from which the number of epochs follows")
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
    """The epochs of a run that comes closest to so many seconds, at least 1.

    It may take a little longer: where epochs are long, the most that fit could leave much of the
    time unused.
    """

    def needed(epochs: int) -> float:
        return seconds_of(epochs, splits, settings, machine, pace)

    # The most epochs that fit, between those that do and those that do not.
    fit = 1
    too_many = 2
    while needed(too_many) <= seconds and too_many < MOST_EPOCHS:
        fit = too_many
        too_many *= 2
    while too_many - fit > 1:
        middle = (fit + too_many) // 2
        if needed(middle) <= seconds:
            fit = middle
        else:
            too_many = middle

    over = needed(fit + 1) - seconds
    is_nearer = 0 < over <= min(MOST_OVER * seconds, seconds - needed(fit))
    return fit + 1 if is_nearer else fit


def seconds_of(
    epochs: int,
    splits: dict[str, Split],
    settings: argparse.Namespace,
    machine: Machine,
    pace: Pace,
) -> float:
    """How long a run of so many epochs will take, with all that follows them."""
    train = len(splits["train"])
    steps = splits["train"].count_batches(settings.batch_size, machine.processes.count)
    watched = splits["val"] if "val" in splits else splits["test"]

    seconds = seconds_of_epochs(epochs, steps, len(watched), settings, pace)
    seconds += len(watched) * (pace.exact - pace.image)  # after the last epoch, in fp32
    if "val" in splits:
        seconds += len(splits["test"]) * pace.exact

    if settings.calibration == "none":
        return seconds + REPORT_SECONDS

    described = min(train, GAUSSIAN_IMAGES)
    seconds += 2 * described * pace.exact  # as they are, and in other light
    unseen = splits.get(settings.calibration, watched)  # by which it calibrates
    held_out = len(unseen)
    if settings.calibration == "twin":
        held_out = round(TWIN_PART * train)
        seconds += seconds_of_twin(epochs, steps, held_out, settings, pace)
    elif settings.calibration == "cross-fit" and not settings.freeze_backbone:
        held_out = train
        seconds += FOLDS * seconds_of_twin(epochs, steps, held_out // FOLDS, settings, pace)

    seconds += held_out * pace.exact
    if fits_head_first(settings):
        seconds += 2 * held_out * pace.exact  # as trained, and with the head that it began with
        if averages_networks(settings):
            seconds += (2 * held_out + len(splits["test"])) * pace.exact
    return seconds + REPORT_SECONDS


def seconds_of_twin(
    epochs: int, steps: int, held_out: int, settings: argparse.Namespace, pace: Pace
) -> float:
    """How long a twin of a run of so many epochs and steps takes, trained without `held_out`."""
    of_run = argparse.Namespace(**{**vars(settings), "epochs": epochs})
    twin_steps = round((1 - TWIN_PART) * steps)
    return seconds_of_epochs(epochs_of_twin(of_run), twin_steps, held_out, settings, pace)


def seconds_of_epochs(
    epochs: int, steps: int, watched: int, settings: argparse.Namespace, pace: Pace
) -> float:
    """How long epochs of so many steps take, each with an evaluation of `watched` images."""
    seconds = epochs * (steps * pace.step + watched * pace.image)
    if batch_norm.lags(pace.momentum, epochs * steps):
        estimated = min(batch_norm.images_to_see(settings.batch_size), steps * settings.batch_size)
        seconds += epochs * estimated * pace.exact
    return seconds


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

    momentum = batch_norm.smallest_momentum(deployable.network, settings.batch_norm)
    least = min(LEAST_SECONDS, LEAST_PART * 60 * settings.minutes)
    seconds_of_step = time_each(step, batches, least, machine)

    @torch.inference_mode()
    def evaluate(batch: tuple) -> None:
        images, _ = batch
        trainee.network(trainee.normalise(images))

    def evaluate_fast(batch: tuple) -> None:
        with machine.autocast():
            evaluate(batch)

    deployable.network.eval()
    images_of_batch = len(next(train.in_order())[0])
    exact = time_each(evaluate, train.in_order, least / 2, machine) / images_of_batch
    fast = exact
    if machine.dtype is not None:
        fast = time_each(evaluate_fast, train.in_order, least / 2, machine) / images_of_batch
    return Pace(step=seconds_of_step, image=fast, exact=exact, momentum=momentum)


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
