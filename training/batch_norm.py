"""Batch norm whose running statistics lag behind, estimated anew before a network is evaluated.

While it trains, batch norm normalises by the statistics of each batch; to evaluate, by running
statistics, which every step moves by a part, the momentum, towards those of its batch. Where that
part is small and steps are few, they still hold some of the values that they began with, and of
early weights: 99 % on the training images can then be chance on any others. Running statistics have
no effect on training itself.
"""

import argparse
import itertools
import math
import time

import torch
from torch import nn

from training import optimizers
from training.features import Trainee
from training.processes import Machine
from training.progress import Progress

# Momentum times steps from which running statistics can be trusted: the first values then count for
# e ** -20, and the last twentieth of the steps for two thirds.
ENOUGH = 20
MOST_IMAGES = 2000  # that statistics are estimated from, about


def trained_layers(network: nn.Module, norm: str) -> list[nn.Module]:
    """The layers of batch norm with running statistics that training changes; a frozen one keeps
    those that came with its weights. The network is in training mode afterwards. norm: see
    optimizers.train_mode.
    """
    optimizers.train_mode(network, norm)
    layers = []
    for module in network.modules():
        is_norm = isinstance(module, nn.modules.batchnorm._BatchNorm)
        if is_norm and module.training and module.running_mean is not None:
            layers.append(module)
    return layers


def lagging_momentum(network: nn.Module, norm: str, steps: int) -> float | None:
    """The smallest momentum of its batch norm, if so many steps are too few for it; else None."""
    smallest = smallest_momentum(network, norm)
    return smallest if lags(smallest, steps) else None


def smallest_momentum(network: nn.Module, norm: str) -> float:
    """The smallest momentum of its batch norm; infinite if training changes no statistics."""
    momenta = []
    for layer in trained_layers(network, norm):
        momenta.append(layer.momentum or 0.0)  # None: the mean over all steps
    return min(momenta, default=math.inf)


def lags(momentum: float, steps: int) -> bool:
    """Are so many steps too few for running statistics of this momentum?"""
    return momentum * steps < ENOUGH


def images_to_see(batch_size: int) -> int:
    """How many images statistics are estimated from, in whole batches, where there are so many."""
    return -(-MOST_IMAGES // batch_size) * batch_size


@torch.no_grad()
def estimate_anew(
    trainee: Trainee, settings: argparse.Namespace, machine: Machine, progress: Progress
) -> None:
    """Set running statistics to the mean over batches of the training split, as training sees them.

    All processes get the same: that of all their batches. The epoch's seconds grow. `update_bn` of
    torch.optim.swa_utils does the same, but resets frozen layers, too, and counts a small last
    batch like the others.
    """
    started = time.perf_counter()
    layers = trained_layers(trainee.deployable.network, settings.batch_norm)
    momenta = [layer.momentum for layer in layers]
    batches = trainee.splits["train"].shuffled(
        settings.batch_size,
        settings.augment,
        progress.epoch,
        settings.seed,
        share=machine.processes.share,
    )

    seen = 0
    count = images_to_see(settings.batch_size) // settings.batch_size
    for number, (images, _, _) in enumerate(itertools.islice(batches, count)):
        machine.seed(settings.seed, progress.epoch, number)  # of dropout
        seen += len(images)
        for layer in layers:
            layer.momentum = len(images) / seen  # 1 at first; then the mean over all images so far
        trainee.network(trainee.normalise(images))

    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum
        for statistics in (layer.running_mean, layer.running_var):
            machine.processes.sum(statistics).div_(machine.processes.count)
    progress.seconds += time.perf_counter() - started
