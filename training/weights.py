"""Weights to start from, published ones or a file's, adapted to other classes and channels."""

import argparse
import contextlib
import os
import sys
from collections.abc import Iterable

import torch
from torch import nn

import model
from data.files import InputSizes
from inference.errors import Problem, problems
from training import recipes, timm_weights
from training.weight_files import read_weights

LEAST_SIDE = 96  # pixels of an image for torchvision's networks; inception_v3 needs 75


def load_into(
    network: nn.Module, settings: argparse.Namespace, channels: int, checkpoint: dict | None
) -> tuple[list | None, list | None]:
    """Give a network the weights of the checkpoint to resume, or else those of --pretrained.

    Returns the mean and standard deviation of the inputs, [channels] each, or None twice if the
    weights do not come with them. Raises ValueError, or Problem if a download fails.
    """
    if checkpoint:
        load_checkpoint(network, checkpoint, channels)
        return checkpoint["spec"]["mean"], checkpoint["spec"]["std"]

    if not settings.pretrained:
        return None, None

    names = network.state_dict().keys()
    state, mean, std = pretrained(settings.model, settings.pretrained, channels, names)
    if model.is_timm(settings.model) and not fits(network, state):
        state = timm_weights.converted(settings.model, state, channels, settings.image_size)
    load_pretrained(network, state)
    return mean, std


def load_checkpoint(network: nn.Module, checkpoint: dict, channels: int) -> None:
    """Give a network the weights of the checkpoint to resume. Raises Problem if they do not fit."""
    unfit = "the weights in the checkpoint do not fit its network"
    with problems(unfit, (RuntimeError, ValueError), form="{} ({}): start a new run"):
        if len(checkpoint["spec"]["mean"]) != channels:
            raise ValueError("they are for another number of channels")

        best = checkpoint["training"]["progress"]["best"]
        if best:  # it is loaded at the end of the run; now is the time to find that it does not fit
            network.load_state_dict(best["state_dict"])

        # "network" is None where the result so far is also what training continues from.
        network.load_state_dict(checkpoint["training"]["network"] or checkpoint["state_dict"])


def pretrained(
    name: str, source: str, channels: int, names: Iterable[str]
) -> tuple[dict, list | None, list | None]:
    """The state_dict to start a network from, and the mean and std it was trained with.

    source: "default" for torchvision's or timm's default weights, else the path of a file of
    weights. names: of the network's own state_dict. mean, std: [channels], or None if they are not
    known. Raises ValueError, or Problem if a download fails.
    """
    if source != "default":
        state, spec = read_weights(source, names)
        if len(spec.get("mean", ())) == channels:
            return state, spec["mean"], spec["std"]
    elif model.is_timm(name):
        state, _ = read_weights(timm_weights.download(name), names)
    else:
        state = download(name)
    return state, *usual_statistics(name, channels)


def usual_statistics(name: str, channels: int) -> tuple[list | None, list | None]:
    """The mean and std that a network's published weights expect, [channels] each.

    Where there are not three channels, each gets the average. None twice for a network of ours.
    """
    if model.is_timm(name):
        mean, std = timm_weights.usual_statistics(name)
    else:
        weights = torchvision_weights(name)
        if weights is None:
            return None, None
        mean, std = weights.transforms().mean, weights.transforms().std

    if channels == 3:
        return list(mean), list(std)
    return [sum(mean) / 3] * channels, [sum(std) / 3] * channels


def cached_start() -> tuple[str, str] | None:
    """A good small network whose published weights are in a cache of this machine, and the path of
    their file; None if there is none. Nothing is downloaded.
    """
    places = {
        recipes.START: place_of_download(recipes.START),
        recipes.START_OF_TIMM: timm_weights.cached(recipes.START_OF_TIMM),
    }
    for name, path in places.items():
        if path and os.path.isfile(path):
            return name, path
    return None


def place_of_download(name: str) -> str:
    """Where torch keeps torchvision's default weights of a network, once it has them."""
    url = torchvision_weights(name).url
    return os.path.join(torch.hub.get_dir(), "checkpoints", os.path.basename(url))


def download(name: str) -> dict:
    """torchvision's weights, downloaded unless torch has them.

    Raises ValueError if there are none, Problem if the download fails.
    """
    weights = torchvision_weights(name)
    if weights is None:
        reason = f"{name} has no default weights; --pretrained FILE takes a local state_dict"
        raise ValueError(reason)
    try:
        # torch reports downloads on standard output, where only the result belongs.
        with contextlib.redirect_stdout(sys.stderr):
            return weights.get_state_dict(progress=True, check_hash=True)
    except (OSError, RuntimeError) as error:
        place = place_of_download(name)
        raise Problem(
            f"cannot download the weights of {name} ({error}): put {weights.url} at {place}, "
            "or give --pretrained FILE, or train from scratch without --pretrained"
        ) from None


# ----------------------------------------------------------------------- other classes and channels
def fits(network: nn.Module, state: dict) -> bool:
    """Has a state_dict the network's names and shapes, but for its head?"""
    own = network.state_dict()
    if own.keys() != state.keys():
        return False
    backbone = own.keys() - set(head_keys(network))
    return all(own[key].shape == state[key].shape for key in backbone)


def load_pretrained(network: nn.Module, state: dict) -> None:
    """Load a state_dict that was trained on other classes or channels.

    A head of another size stays as it was initialised. A first convolution for another number of
    channels gets the mean over them, scaled to the same response to grey. Raises ValueError naming
    the first key that does not fit, the sign of another architecture.
    """
    own = network.state_dict()
    head = set(head_keys(network))
    state = without_auxiliary_heads(state, own)
    adapt_first_convolution(network, state)

    # Only the head may differ, and the counters that old files lack and training does not need.
    counters = [key for key in own.keys() | state.keys() if key.endswith(".num_batches_tracked")]
    optional = head.union(counters)
    wrong = {}
    for key in own.keys() - state.keys() - optional:
        wrong[key] = "is missing"
    for key in state.keys() - own.keys() - optional:
        wrong[key] = "is unknown to it"
    for key in own.keys() & state.keys() - head:
        if own[key].shape != state[key].shape:
            wrong[key] = f"is {size_of(state[key])} instead of {size_of(own[key])}"
    if wrong:
        key = min(wrong)
        entries = "1 entry differs" if len(wrong) == 1 else f"{len(wrong):,} entries differ"
        reason = f"{entries} (the first: {key!r} {wrong[key]})"
        raise ValueError(f"does not fit this architecture: {reason}")

    fitting = {key: state[key] for key in own.keys() & state.keys()}
    fitting = {key: value for key, value in fitting.items() if own[key].shape == value.shape}
    if head - fitting.keys():
        # Half of a head is of no use: all of it or none.
        fitting = {key: value for key, value in fitting.items() if key not in head}
    network.load_state_dict(fitting, strict=False)


def size_of(tensor: torch.Tensor) -> str:
    """Its shape, as 64x3x7x7."""
    return "x".join(map(str, tensor.shape)) or "a single number"


def without_auxiliary_heads(state: dict, own: dict) -> dict:
    """A state_dict without the classifiers that GoogLeNet and Inception only have for training."""
    kept = {}
    for key, value in state.items():
        if key in own or not key.startswith(("aux", "AuxLogits")):
            kept[key] = value
    return kept


def adapt_first_convolution(network: nn.Module, state: dict) -> None:
    """Change the first convolution of a state_dict to the network's channels, in place."""
    convolutions = (item for item in network.named_modules() if isinstance(item[1], nn.Conv2d))
    name, layer = next(convolutions, ("", None))
    first = f"{name}.weight"
    if first not in state or state[first].ndim != 4:
        return

    wanted = layer.weight.shape[1]
    given = state[first].shape[1]
    if given != wanted:
        mean = state[first].mean(1, keepdim=True)  # [out, 1, height, width]
        state[first] = mean.repeat(1, wanted, 1, 1) * (given / wanted)


# ------------------------------------------------------------------------------- what a network has
def torchvision_weights(name: str):
    """torchvision's default weights entry of a network, or None for one of ours."""
    if name in model.MODELS:
        return None
    from torchvision import models

    return models.get_model_weights(name).DEFAULT


def input_sizes(name: str) -> InputSizes:
    """The sizes of images that a network takes: the usual side is 64 pixels for our networks, else
    that of the published weights.

    Raises ValueError for an unknown name.
    """
    model.options_of(name)  # raises ValueError
    traits = model.traits(name)
    if model.is_timm(name):
        return InputSizes(
            usual=timm_weights.usual_size(name),
            multiple=traits.side_multiple,
            least=LEAST_SIDE,
            squares_only=model.timm_config(name).fixed_input_size,
        )

    weights = torchvision_weights(name)
    if weights is None:
        return InputSizes(multiple=traits.side_multiple, least=traits.min_size)

    return InputSizes(
        usual=weights.transforms().crop_size[0],
        multiple=traits.side_multiple,
        least=LEAST_SIDE,
        squares_only=not model.takes_rectangles(name),
    )


def head_keys(network: nn.Module) -> list[str]:
    """The state_dict keys of the classifier; of its last layer and norm, if nothing names it."""
    keys = list(network.state_dict())
    heads = heads_of_timm(network)
    if heads:
        return [key for key in keys if key.startswith(tuple(f"{head}." for head in heads))]

    last = ""
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            last = name

    # Its norm, if it has one, follows it.
    return keys[keys.index(f"{last}.weight") :]


def heads_of_timm(network: nn.Module) -> list[str]:
    """The names of the classifiers of a network of timm, which may have two; none of others."""
    if not hasattr(network, "get_classifier"):
        return []
    classifiers = network.get_classifier()
    if not isinstance(classifiers, tuple | list):
        classifiers = [classifiers]
    return [name for name, module in network.named_modules() if module in classifiers]
