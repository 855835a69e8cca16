"""The optimizers, what each does to which parameters, and the learning rate of each step."""

import argparse
import math

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from training import cpu
from training.weights import head_keys

WARM_UP = 0.3  # the part of onecycle's steps in which the rate rises
FIRST_OF_ONECYCLE = 1 / 25  # of the highest rate
DEPTHS = 10  # groups of layers that have a rate of their own


# -------------------------------------------------------------------------------- the learning rate
def rate(schedule: str, step: int, steps: int) -> float:
    """The learning rate of a step, counted from 0 of `steps`, as a part of the highest rate.

    constant: 1. linear: from 1 to 0. cosine: from 1 to 0 along half a cosine. onecycle (Smith and
    Topin 2018): from 1/25 up to 1 in the first 30 % of the steps and down to 0, both along half a
    cosine.
    """
    done = step / steps
    if schedule == "constant":
        return 1.0
    if schedule == "linear":
        return 1 - done
    if schedule == "cosine":
        return half_cosine(done, 1)
    if schedule == "onecycle":
        if done < WARM_UP:
            rise = (1 - math.cos(math.pi * done / WARM_UP)) / 2
            return FIRST_OF_ONECYCLE + (1 - FIRST_OF_ONECYCLE) * rise
        return half_cosine(done - WARM_UP, 1 - WARM_UP)
    raise ValueError(f"unknown schedule {schedule!r}")


def rate_at(settings: argparse.Namespace, epoch: int, step: int, steps_per_epoch: int) -> float:
    """The rate of a step of an epoch, counted from 0 and 1. settings: schedule and epochs."""
    done = (epoch - 1) * steps_per_epoch + min(step, steps_per_epoch)
    return rate(settings.schedule, done, settings.epochs * steps_per_epoch)


def half_cosine(done: float, whole: float) -> float:
    """From 1 at done = 0 to 0 at done = whole."""
    return (1 + math.cos(math.pi * done / whole)) / 2


def set_rate(optimizer: torch.optim.Optimizer, part: float) -> None:
    """Set every group's learning rate to this part of its highest."""
    for group in optimizer.param_groups:
        group["lr"] = part * group["highest_lr"]


# ----------------------------------------------------------------------------- which parameters how
def freeze_backbone(network: nn.Module) -> None:
    """Let only the last layer be trained."""
    head = head_keys(network)
    for key, parameter in network.named_parameters():
        parameter.requires_grad = key in head


@torch.no_grad()
def move_weights(network: nn.Module, towards: dict[str, torch.Tensor], part: float) -> None:
    """Move all weights by this part of the way to those of another state_dict.

    Between two networks that began with the same trained weights, and between one and what it began
    with, lie networks that do better on new images than either (model soups and WiSE-FT, Wortsman
    et al. 2022).
    """
    for key, tensor in network.state_dict().items():
        if tensor.is_floating_point():  # a count of steps is no weight
            tensor.lerp_(towards[key], part)


def train_mode(network: nn.Module, norm: str) -> None:
    """Training mode, but eval mode for layers that are frozen, such as a backbone's batch norm.

    norm: "frozen" lets batch norm use the statistics that came with the weights, "trained" those of
    each batch. In eval mode its scale and shift are still trained.
    """
    network.train()
    for module in network.modules():
        parameters = list(module.parameters(recurse=False))
        is_frozen = bool(parameters) and not any(p.requires_grad for p in parameters)
        keeps_statistics = norm == "frozen" and isinstance(module, _BatchNorm)
        if is_frozen or keeps_statistics:
            module.eval()


def make_optimizer(network: nn.Module, settings: argparse.Namespace) -> torch.optim.Optimizer:
    """The optimizer that the settings name, over the parameters that are not frozen.

    settings: optimizer, lr, momentum, weight_decay. Weight decay acts on the weights of layers, not
    on biases and norms, whatever the optimizer. On the filters whose norm Muon holds it would have
    no effect.
    """
    groups = parameter_groups(network, settings)
    if settings.optimizer == "muon":
        return Muon(groups, settings.momentum)
    if settings.optimizer == "sgd":
        momentum = settings.momentum
        return torch.optim.SGD(groups, momentum=momentum, nesterov=momentum > 0)
    if settings.optimizer == "adam":
        return torch.optim.Adam(groups, fused=True)
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(groups, fused=True)
    raise ValueError(f"unknown optimizer {settings.optimizer!r}")


def parameter_groups(network: nn.Module, settings: argparse.Namespace) -> list[dict]:
    """The parameters that are trained, in groups of one rate and one weight decay.

    With a layer_decay below 1 the rate falls from the last layer to the first: see `by_depth`.
    """
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    weights = [parameter for parameter in trained if parameter.ndim > 1]
    others = [parameter for parameter in trained if parameter.ndim <= 1]

    groups = [{"params": weights}, {"params": others, "weight_decay": 0.0}]
    if settings.optimizer == "muon":
        # Orthogonal steps for all weights but those of the first and the last layer; the rest goes
        # to SGD.
        ends = ids_of_first_and_last_layer(network)
        inner = [parameter for parameter in weights if id(parameter) not in ends]
        outer = [parameter for parameter in weights if id(parameter) in ends]
        groups[:1] = [{"params": inner, "orthogonal": True}, {"params": outer}]
        # From 0.2 to 5 times the filters' rate was worth half a point on CIFAR-10.
        groups[-1]["lr"] = 4 * settings.lr

    filled = []
    for group in groups:
        for part, parameters in by_depth(group["params"], trained, settings.layer_decay):
            group = {"lr": settings.lr, "weight_decay": settings.weight_decay, **group}
            rate = part * group["lr"]
            # set_rate takes its part of the highest rate.
            filled.append({**group, "params": parameters, "lr": rate, "highest_lr": rate})
    return filled


def by_depth(
    parameters: list[nn.Parameter], trained: list[nn.Parameter], layer_decay: float
) -> list[tuple[float, list[nn.Parameter]]]:
    """Parameters in groups of one rate, each with its part of the last layer's: layer_decay for the
    first layer, and from there on geometrically up to 1.

    trained: all parameters, from the first layer to the last. The first layers of a pretrained
    network know what suits all pictures, and should move least (Howard and Ruder 2018).
    """
    depths = {}
    for number, parameter in enumerate(trained):
        depths[id(parameter)] = DEPTHS * number // len(trained)

    groups = {}
    for parameter in parameters:
        level = depths[id(parameter)]
        part = layer_decay ** (1 - level / (DEPTHS - 1))
        groups.setdefault(part, []).append(parameter)
    return list(groups.items())


def ids_of_first_and_last_layer(network: nn.Module) -> set[int]:
    """The ids of the first weight of a network, and of the parameters of its last layer."""
    named = dict(network.named_parameters())
    first = next(parameter for parameter in named.values() if parameter.ndim > 1)
    ids = {id(first)}
    for key in head_keys(network):
        if key in named:  # a buffer of the norm is no parameter
            ids.add(id(named[key]))
    return ids


# --------------------------------------------------------------------------------------------- Muon
class Muon(torch.optim.SGD):
    """Muon (Jordan et al. 2024), also for filters of convolutions, which torch.optim.Muon does not
    take.

    In the groups marked `orthogonal` the step is the momentum, seen as a matrix [out, rest], with
    all its singular values brought near 1; filters are also held at norm sqrt(out), which the batch
    norm behind them leaves free. The other groups are torch's SGD with Nesterov momentum, of
    Jordan's 0.85.
    """

    SGD_MOMENTUM = 0.85

    def __init__(self, groups: list[dict], momentum: float):
        plain = {"orthogonal": False, "momentum": self.SGD_MOMENTUM, "nesterov": True}
        # Muon's momentum is applied before SGD's step, which then adds none of its own.
        special = {"momentum": 0, "nesterov": False, "muon_momentum": momentum}

        complete = []
        for group in groups:
            added = special if group.get("orthogonal") else plain
            complete.append({**group, **added})
        super().__init__(complete)

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            if not group["orthogonal"]:
                continue
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.orthogonalise(parameter, group["muon_momentum"])
        return super().step(closure)

    def orthogonalise(self, parameter: torch.Tensor, momentum: float) -> None:
        """Put Muon's step in the place of the gradient, and a filter back to its norm."""
        state = self.state[parameter]
        if "past" not in state:
            state["past"] = torch.zeros_like(parameter.grad)

        past = state["past"].mul_(momentum).add_(parameter.grad)
        update = parameter.grad.add_(past, alpha=momentum)  # Nesterov's
        matrix = update.flatten(1)  # [out, rest]
        parameter.grad = orthogonal(matrix).view_as(parameter).to(parameter.dtype)

        if parameter.ndim == 4:
            parameter.mul_(len(parameter) ** 0.5 / parameter.norm())


def orthogonal(matrix: torch.Tensor, steps: int = 3) -> torch.Tensor:
    """A matrix [m, n] with its singular values brought near 1, by Newton-Schulz steps.

    The polynomial of degree five is Jordan's.
    """
    x = matrix.bfloat16() if cpu.supports_bf16() else matrix.float()
    x = x / (x.norm() + 1e-7)

    is_tall = len(x) > x.shape[1]
    wide = x.T if is_tall else x  # the smaller Gram matrix is the cheaper one
    for _ in range(steps):
        gram = wide @ wide.T
        polynomial = torch.addmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        wide = torch.addmm(wide, polynomial, wide, beta=3.4445)
    return wide.T if is_tall else wide
