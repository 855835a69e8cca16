"""Weights to start from: torchvision's, or a file's, fitted to other classes and channels."""

import argparse
import contextlib
import os
import sys

import torch
from torch import nn

import model
from inference.errors import Problem
from training.runs import load_plain


def load(network: nn.Module, settings: argparse.Namespace, channels: int, checkpoint: dict | None) -> tuple:
    """Load the weights of a checkpoint to resume, or else of --pretrained, into a network.

    Returns the inputs' (mean, std), [channels] each, or None if they are not known. Raises ValueError, or
    Problem if the weights cannot be downloaded.
    """
    if checkpoint:
        network.load_state_dict(checkpoint["training"]["network"] or checkpoint["state_dict"])
        return checkpoint["spec"]["mean"], checkpoint["spec"]["std"]
    if not settings.pretrained:
        return None, None
    state, mean, std = pretrained(settings.model, settings.pretrained, channels)
    load_pretrained(network, state)
    return mean, std


def read_weights(path: str) -> tuple[dict, dict]:
    """The (state_dict, spec) in a file of weights; the spec is empty unless it is a checkpoint of step1.

    Takes a state_dict, or a dict with one under `state_dict` or `model`, as torchvision and timm write them,
    with or without DataParallel's prefix `module.`. Raises ValueError.
    """
    try:
        content = load_plain(path)
    except FileNotFoundError:
        raise ValueError("no such file") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot be loaded as plain weights: {error}") from None
    state, spec = content, {}
    for name in ("model", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(name), dict):
            state, spec = content[name], content.get("spec", {})
    names = state.keys() if isinstance(state, dict) else ()
    if not names or not all(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in state.items()):
        raise ValueError("is not a state_dict: it holds other things than tensors")
    state = {name.removeprefix("module."): value for name, value in state.items()}
    return state, spec if isinstance(spec, dict) else {}


def pretrained(name: str, source: str, channels: int) -> tuple[dict, list | None, list | None]:
    """The (state_dict, mean, std) to start a network from; mean and std are None if they are not known.

    source: "default" for torchvision's default weights, else the path of a state_dict or checkpoint. mean,
    std: what the weights were trained with, [channels]; grey takes the middle of the three. Raises
    ValueError.
    """
    weights, mean, std = torchvision_weights(name), None, None
    if weights is not None:
        usual = weights.transforms().mean, weights.transforms().std
        mean, std = ([sum(x) / 3] * channels if channels != 3 else list(x) for x in usual)
    if source != "default":
        state, spec = read_weights(source)
        if len(spec.get("mean", ())) == channels:
            mean, std = spec["mean"], spec["std"]
        return state, mean, std
    if weights is None:
        raise ValueError(f"{name} has no default weights; --pretrained FILE takes a local state_dict")
    try:
        with contextlib.redirect_stdout(sys.stderr):
            return weights.get_state_dict(progress=True, check_hash=True), mean, std
    except (OSError, RuntimeError) as error:
        place = os.path.join(torch.hub.get_dir(), "checkpoints", os.path.basename(weights.url))
        way_out = "give --pretrained FILE, or train from scratch without --pretrained"
        failure = f"cannot download the weights of {name} ({error})"
        raise Problem(f"{failure}: put {weights.url} at {place}, or {way_out}") from None


def load_pretrained(network: torch.nn.Module, state: dict) -> None:
    """Load a state_dict trained on other classes or channels: a head of another size is left as initialised.

    A first convolution for another number of channels gets the mean over them, scaled to the same response to
    grey. Raises ValueError naming the first key that does not fit, the sign of another architecture.
    """
    own, head = network.state_dict(), set(head_keys(network))
    state = {key: v for key, v in state.items() if key in own or not key.startswith(("aux", "AuxLogits"))}
    first = next((key for key, value in own.items() if value.ndim == 4), None)
    if first in state and state[first].ndim == 4 and state[first].shape[1] != own[first].shape[1]:
        n_from, n_to = state[first].shape[1], own[first].shape[1]
        state[first] = state[first].mean(1, keepdim=True).repeat(1, n_to, 1, 1) * (n_from / n_to)
    wrong = [key for key in own.keys() ^ state.keys() if key not in head]
    wrong += [key for key in own.keys() & state.keys() - head if own[key].shape != state[key].shape]
    if wrong:
        raise ValueError(f"does not fit this architecture: {len(wrong)} entries differ, as {min(wrong)!r}")
    fitting = {key: value for key, value in state.items() if own[key].shape == value.shape}
    if head - fitting.keys():
        fitting = {key: value for key, value in fitting.items() if key not in head}  # all of the head or none
    network.load_state_dict(fitting, strict=False)


def torchvision_weights(name: str):
    """torchvision's default weights entry of a network, or None for one of ours."""
    if name in model.MODELS:
        return None
    from torchvision import models

    return models.get_model_weights(name).DEFAULT


def usual_size(name: str) -> int:
    """The usual image size in pixels: 64 for ours, theirs for torchvision's. Raises ValueError if unknown."""
    model.options_of(name)
    weights = torchvision_weights(name)
    return weights.transforms().crop_size[0] if weights else 64


def head_keys(network: nn.Module) -> list[str]:
    """The state_dict keys of the last linear or convolutional layer and its norm: what classes decide."""
    last = [name for name, module in network.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)][-1]
    keys = list(network.state_dict())
    return keys[keys.index(f"{last}.weight") :]
