"""What a pretrained network ends with: a part of its start, its head alone, or an average.

Few images say less than the many that the weights come from, and training can do harm. What is kept
is decided on images that were not trained on.
"""

import argparse
import copy

import torch

import data
from data.notes import note
from inference.errors import Problem
from training import optimizers
from training.evaluation import evaluate
from training.features import Trainee, fits_head_first, start_head
from training.network import build_deployable
from training.processes import Machine
from training.progress import Progress

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


def better_of_head_and_training(
    final: Trainee,
    twin: Trainee | None,
    progress: Progress,
    dataset: data.Dataset,
    settings: argparse.Namespace,
    machine: Machine,
) -> tuple[Trainee, Trainee | None]:
    """What a run ends with, and its twin: as trained, or with the fitted head alone if that does
    better on images that neither was trained on. Without such images, as trained.

    A network that goes back to its head counts as kept from epoch 0. Raises Problem.
    """
    if settings.calibration == "none" or not fits_head_first(settings):
        return final, twin

    judged = twin or final
    split = judged.splits[UNSEEN[settings.calibration]]
    head = with_fitted_head(judged, dataset, settings, machine)
    with_head = evaluate(head, split, machine).accuracy
    trained = evaluate(judged, split, machine).accuracy
    if trained >= with_head:
        return final, twin

    images = f"{len(split):,} images that were not trained on"
    note(
        f"training did harm: of {images}, {trained:.1%} are right, and {with_head:.1%} with the "
        "pretrained layers as they were and the new head alone, which is kept"
    )
    start = with_fitted_head(final, dataset, settings, machine) if twin else head
    state = start.deployable.network.state_dict()
    progress.best = {"score": [with_head, 0.0], "epoch": 0, "state_dict": state}
    return start, head if twin else None


def averages_with_twin(settings: argparse.Namespace) -> bool:
    """Is the result the average of a network and its twin, weight by weight?

    That takes networks that began with the same trained weights, and whose batch norm has kept its
    statistics: those of an average are none of theirs. Cutmix does as much for a network alone, and
    an average with a twin, which is trained for fewer epochs, undoes it.
    """
    if settings.calibration != "twin" or "cutmix" in settings.augment:
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
    average = twin.with_network(deployable, twin.splits)
    averaged = evaluate(average, held_out, machine)
    if averaged.accuracy < evaluate(twin, held_out, machine).accuracy:
        return final

    score = [averaged.accuracy, -averaged.loss]
    progress.best = {
        "score": score,
        "epoch": progress.epoch - 1,
        "state_dict": deployable.network.state_dict(),
        "averaged": True,
    }
    return final.with_network(deployable, final.splits)
