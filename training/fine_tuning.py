"""What a pretrained network ends with: a part of its start, its head alone, or an average.

Few images say less than the many that the weights come from, and training can do harm. What is kept
is decided on images that were not trained on.
"""

import argparse
import copy
import math

import numpy as np
import torch

import data
from data.notes import note
from data.split import Split
from inference.errors import Problem
from model import Deployable
from training import optimizers
from training.calibration import CrossFitted
from training.evaluation import evaluate
from training.features import Trainee, fits_head_first, start_head
from training.network import build_deployable
from training.processes import Machine
from training.progress import Evaluation, Progress

# The split that a network was not trained on, by --calibration; of a twin, its test split.
UNSEEN = {"validation": "val", "held-out": "held-out", "twin": "test"}


def with_fitted_head(
    trainee: Trainee, dataset: data.Dataset, settings: argparse.Namespace, machine: Machine
) -> Trainee:
    """A pretrained network as its training began: with nothing fitted but its head.

    Raises Problem if the features cannot be kept.
    """
    deployable = build_deployable(settings, dataset, None, machine)
    start = trainee.with_network(deployable, trainee.splits)
    with machine.processes.first_of_each_machine_first():
        start_head(start, settings)
    return start


def weights_at_start(
    trainee: Trainee,
    dataset: data.Dataset,
    settings: argparse.Namespace,
    machine: Machine,
    checkpoint: dict | None,
) -> dict[str, torch.Tensor] | None:
    """The state_dict that training began with, if --keep-start wants a part of it in the result.

    A resumed run makes it again; if the weights are gone meanwhile, none of them is kept, which is
    noted.
    """
    if not settings.keep_start:
        return None
    if checkpoint:
        try:
            trainee = with_fitted_head(trainee, dataset, settings, machine)
        except Problem as problem:
            note(f"the result keeps no part of the weights that training began with: {problem}")
            return None
    return copy.deepcopy(trainee.deployable.network.state_dict())


def choose_result(
    final: Trainee,
    twin: Trainee | None,
    progress: Progress,
    dataset: data.Dataset,
    settings: argparse.Namespace,
    machine: Machine,
) -> tuple[Trainee, Trainee | None]:
    """What a run ends with, and its twin: as trained, averaged with the twin, or with the fitted
    head alone if that does better on images that neither was trained on. Without such images, as
    trained.

    A network that goes back to its head counts as kept from epoch 0. Raises Problem.
    """
    if settings.calibration not in UNSEEN or not fits_head_first(settings):
        return final, twin

    judged = twin or final
    split = judged.splits[UNSEEN[settings.calibration]]
    head = with_fitted_head(judged, dataset, settings, machine)
    with_head = right_of(evaluate(head, split, machine).outputs, split)
    trained = right_of(evaluate(judged, split, machine).outputs, split)
    if did_harm(trained, with_head):
        start = with_fitted_head(final, dataset, settings, machine) if twin else head
        keep_head(start, trained, with_head, progress)
        return start, head if twin else None

    if averages_networks(settings):
        final = average_with_twin(final, twin, progress, machine)
    return final, twin


def choose_result_by_folds(
    final: Trainee,
    crossed: CrossFitted,
    progress: Progress,
    dataset: data.Dataset,
    settings: argparse.Namespace,
    machine: Machine,
) -> tuple[Trainee, torch.Tensor]:
    """The same for a network that cross-fitting calibrates. Returns what the run ends with, and the
    logits [n, classes] that calibrate it. Raises Problem."""
    if crossed.heads is None:
        return final, crossed.logits

    train = final.splits["train"]
    logits = crossed.logits
    averaged = None
    if averages_networks(settings):
        averaged = evaluate(crossed.average, train, machine)
        # All images were learned by most of its networks: it must do better on them than each
        # network on those that it has not seen, or the networks are too far apart.
        if averaged.accuracy < right_of(logits.numpy(), train).mean():
            averaged = None
        else:
            logits = crossed.like_average

    trained = right_of(logits.numpy(), train)
    with_head = right_of(crossed.heads.numpy(), train)
    if did_harm(trained, with_head):
        start = with_fitted_head(final, dataset, settings, machine)
        keep_head(start, trained, with_head, progress)
        return start, crossed.heads

    if averaged:
        keep_average(crossed.average.deployable, averaged, progress)
        final = crossed.average
    return final, logits


def right_of(logits: np.ndarray, split: Split) -> np.ndarray:
    """Which images of a split logits [n, classes] are right about: bool [n]."""
    return logits.argmax(1) == split.labels_of_members()


def did_harm(trained: np.ndarray, with_head: np.ndarray) -> bool:
    """Is training worse than the fitted head alone, by more than one standard error?

    Which images each is right about, bool [n]. Of few images, chance alone would often prefer the
    head: by McNemar's test, only those count that one of the two is right about.
    """
    lost = (with_head & ~trained).sum()
    gained = (trained & ~with_head).sum()
    return bool(lost - gained > math.sqrt(lost + gained))


def keep_head(
    start: Trainee, trained: np.ndarray, with_head: np.ndarray, progress: Progress
) -> None:
    """Let a run end with what its training began with, and note why.

    trained, with_head: which images that were not trained on each is right about, bool [n].
    """
    note(
        f"training did harm: of {len(trained):,} images that were not trained on, "
        f"{trained.mean():.1%} are right, and {with_head.mean():.1%} with the pretrained layers as "
        "they were and the new head alone, which is kept"
    )
    state = start.deployable.network.state_dict()
    progress.best = {"score": [float(with_head.mean()), 0.0], "epoch": 0, "state_dict": state}


def averages_networks(settings: argparse.Namespace) -> bool:
    """Is the result the average of a network and of those that calibrate it, weight by weight?

    That takes networks that began with the same trained weights, and whose batch norm has kept its
    statistics: those of an average are none of theirs. Cutmix does as much for a network alone, and
    an average with others, which are trained for fewer epochs, undoes it.
    """
    if settings.calibration not in ("twin", "cross-fit") or "cutmix" in settings.augment:
        return False
    return fits_head_first(settings) and settings.batch_norm == "frozen"


def average_with_twin(
    final: Trainee, twin: Trainee, progress: Progress, machine: Machine
) -> Trainee:
    """A fine-tuned network whose weights are the average of its own and its twin's.

    That mostly does better on new images than either (see optimizers.move_weights). As the network
    has learned the images that its twin has not, the average must do better on these than the twin;
    if it does not, the two are too far apart, and the network stays as it was trained.
    """
    deployable = copy.deepcopy(final.deployable)
    state = twin.deployable.network.state_dict()
    optimizers.move_weights(deployable.network, state, 0.5)

    held_out = twin.splits["test"]
    averaged = evaluate(twin.with_network(deployable, twin.splits), held_out, machine)
    if averaged.accuracy < evaluate(twin, held_out, machine).accuracy:
        return final

    keep_average(deployable, averaged, progress)
    return final.with_network(deployable, final.splits)


def keep_average(deployable: Deployable, averaged: Evaluation, progress: Progress) -> None:
    """Let a run end with an average. averaged: how good it is on images that it has learned."""
    progress.best = {
        "score": [averaged.accuracy, -averaged.loss],
        "epoch": progress.epoch - 1,
        "state_dict": deployable.network.state_dict(),
        "averaged": True,
    }
