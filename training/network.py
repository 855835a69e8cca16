"""The network that a run begins with: built, with its preprocessing and weights, on the machine."""

import argparse
import math
from dataclasses import replace

import torch
from torch import nn

import data
import model
from inference.errors import Problem, one_line
from training import cpu, optimizers, weights
from training.processes import Machine

WHITENING_PIXELS = 1 << 23  # at most, in the images that the whitening layer is made from
WHITENING_IMAGES = 2000  # at most


def build_deployable(
    settings: argparse.Namespace,
    dataset: data.Dataset,
    checkpoint: dict | None,
    machine: Machine,
) -> model.Deployable:
    """The network with its preprocessing, and with the weights of the checkpoint if any, on the
    machine.

    What is random follows from the seed of the settings. Raises Problem.
    """
    torch.manual_seed(settings.seed)
    network, mean, std = build_network(settings, dataset, checkpoint)
    if settings.freeze_backbone:
        optimizers.freeze_backbone(network)
    if mean is None:
        mean, std = statistics_of_inputs(dataset)

    kind = model.Deployable if dataset.has_images else model.Regressor
    deployable = kind(network, settings.image_size, mean, std, settings.fit)

    is_fresh = not settings.pretrained and not checkpoint
    if is_fresh and dataset.has_images and isinstance(network, model.Network):
        images = whitening_images(dataset, settings)
        network.prepare(deployable.normalise(images))

    memory_format = model.traits(settings.model).memory_format
    deployable.to(machine.device, memory_format=memory_format)
    if machine.device.type == "cpu" and machine.dtype is not None:
        cpu.lay_side_by_side(deployable.network)
    return deployable


def build_network(
    settings: argparse.Namespace, dataset: data.Dataset, checkpoint: dict | None
) -> tuple[nn.Module, list[float] | None, list[float] | None]:
    """The network with its first weights, and the mean and std that belong to them, if any.

    Raises Problem.
    """
    channels = dataset.train_images.shape[-1]
    network = random_network(settings, dataset)
    try:
        mean, std = weights.load_into(network, settings, channels, checkpoint)
    except ValueError as error:
        source = ""
        if settings.pretrained not in (None, "default"):
            source = f"--pretrained {settings.pretrained}: "
        raise Problem(f"{source}{error}", 2) from None

    if model.is_timm(settings.model) and not checkpoint:
        refuse_unexportable(network, settings, channels)
    norms_batches = settings.batch_norm == "trained" and has_batch_norm(network)
    if settings.batch_size == 1 and norms_batches:
        reason = f"{settings.model} has batch norm, which needs --batch-size 2 or more"
        raise Problem(reason, 2)
    return network, mean, std


def random_network(settings: argparse.Namespace, dataset: data.Dataset) -> nn.Module:
    """The network of the settings with random weights. Raises Problem."""
    try:
        return model.build(
            settings.model,
            channels=dataset.train_images.shape[-1],
            classes=len(dataset.classes),
            image_size=settings.image_size,
            width=settings.width,
            hidden=settings.hidden,
            activation=settings.activation,
            dropout=settings.dropout,
        )
    except ValueError as error:
        raise Problem(error, 2) from None


def with_fitting_precision(
    machine: Machine, settings: argparse.Namespace, dataset: data.Dataset
) -> Machine:
    """The machine as chosen, but in fp32 where the precision is open and the network gains nothing
    from bf16.

    Our own networks know it; of others, the layers tell. Raises Problem.
    """
    if settings.precision != "auto" or machine.dtype is None:
        return machine

    gains = model.traits(settings.model).bf16
    is_ours = settings.model in model.MODELS
    if not is_ours and machine.device.type == "cpu":
        network = random_network(settings, dataset)
        channels = dataset.train_images.shape[-1]
        gains = cpu.gains_from_bf16(network, (channels, *settings.image_size))
    return machine if gains else replace(machine, dtype=None)


def refuse_unexportable(network: nn.Module, settings: argparse.Namespace, channels: int) -> None:
    """Raise Problem for a network that step2 could not export: better now than after training."""
    example = torch.zeros(2, channels, *settings.image_size)  # [batch, channels, H, W]
    free_batch = {0: torch.export.Dim.DYNAMIC}
    try:
        torch.export.export(network.eval(), (example,), dynamic_shapes=(free_batch,))
    except Exception as error:  # each architecture fails in its own way
        reason = f"{settings.model} cannot be exported ({one_line(error)})"
        raise Problem(f"{reason}: choose another --model", 2) from None
    network.train()


def has_batch_norm(network: nn.Module) -> bool:
    """Does a layer of the network need several images to be trained?"""
    kind = nn.modules.batchnorm._BatchNorm
    return any(isinstance(module, kind) for module in network.modules())


def statistics_of_inputs(dataset: data.Dataset) -> tuple[list[float], list[float]]:
    """The mean and std to normalise images by, [channels] each; features stay as they are."""
    if not dataset.has_images:
        features = dataset.train_images.shape[-1]
        return [0.0] * features, [1.0] * features
    return data.mean_and_std(dataset.train_images)


def whitening_images(dataset: data.Dataset, settings: argparse.Namespace) -> torch.Tensor:
    """Some training images of the network's own size, for `Network.prepare`: [n, H, W, C]."""
    wanted = min(WHITENING_IMAGES, WHITENING_PIXELS // math.prod(settings.image_size))
    wanted = max(wanted, 1)
    stride = -(-len(dataset.train_images) // wanted)
    images = torch.from_numpy(dataset.train_images[::stride])
    return model.resize(images, settings.image_size, settings.fit)
