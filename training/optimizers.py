"""The optimizers, what each does to which parameters, and the learning rate as a function of the step."""

import argparse
import math

import torch

from training import cpu
from training.weights import head_keys

WARM_UP = 0.3  # the part of onecycle's steps in which the rate rises
FIRST_OF_ONECYCLE = 1 / 25  # of the highest rate


def rate(schedule: str, step: int, steps: int) -> float:
    """The learning rate of a step, counted from 0, as a part of the highest rate; `steps` is the end.

    constant: 1; linear: from 1 to 0; cosine: from 1 to 0 along half a cosine; onecycle (Smith and Topin
    2018): from 1/25 up to 1 in the first 30 % of the steps and down to 0, both along half a cosine.
    """
    done = step / steps
    if schedule in ("constant", "linear"):
        return 1.0 if schedule == "constant" else 1 - done
    if schedule not in ("cosine", "onecycle"):
        raise ValueError(f"unknown schedule {schedule!r}")
    start = WARM_UP if schedule == "onecycle" else 0
    if done < start:
        rise = (1 - math.cos(math.pi * done / WARM_UP)) / 2
        return FIRST_OF_ONECYCLE + (1 - FIRST_OF_ONECYCLE) * rise
    return (1 + math.cos(math.pi * (done - start) / (1 - start))) / 2


def set_rate(optimizer: torch.optim.Optimizer, part: float) -> None:
    """Set every group's learning rate to this part of its highest."""
    for group in optimizer.param_groups:
        group["lr"] = part * group["highest_lr"]


def freeze_backbone(network: torch.nn.Module) -> None:
    head = head_keys(network)
    for key, parameter in network.named_parameters():
        parameter.requires_grad = key in head


def make_optimizer(network: torch.nn.Module, settings: argparse.Namespace) -> torch.optim.Optimizer:
    """The optimizer that the settings name, over the parameters that are not frozen.

    Weight decay acts on the weights of layers, not on biases and norms, whatever the optimizer. On the
    filters whose norm Muon holds it would have no effect.
    """
    parameters = [p for p in network.parameters() if p.requires_grad]
    weights, others = [p for p in parameters if p.ndim > 1], [p for p in parameters if p.ndim <= 1]
    groups = [{"params": weights}, {"params": others, "weight_decay": 0.0}]
    if settings.optimizer == "muon":
        # Orthogonal steps for all weights but those of the first and the last layer; the rest goes to SGD.
        named = dict(network.named_parameters())
        first = next(p for p in named.values() if p.ndim > 1)
        ends = {id(p) for p in (first, *(named[key] for key in head_keys(network) if key in named))}
        inner = {"params": [p for p in weights if id(p) not in ends], "orthogonal": True}
        groups[:1] = [inner, {"params": [p for p in weights if id(p) in ends]}]
        # From 0.2 to 5 times the filters' rate was worth half a point on CIFAR-10.
        groups[-1]["lr"] = 4 * settings.lr
    usual = {"lr": settings.lr, "weight_decay": settings.weight_decay}
    groups = [{**usual, **group} for group in groups if group["params"]]
    for group in groups:
        group["highest_lr"] = group["lr"]
    if settings.optimizer == "muon":
        return Muon(groups, settings.momentum)
    if settings.optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=settings.momentum, nesterov=settings.momentum > 0)
    return {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[settings.optimizer](groups, fused=True)


class Muon(torch.optim.SGD):
    """Muon (Jordan et al. 2024) for filters of convolutions, too, which torch.optim.Muon does not take.

    In the groups marked `orthogonal` the step is the momentum, seen as a matrix [out, rest], with all its
    singular values brought near 1; filters are also held at norm sqrt(out), which the batch norm behind them
    leaves free. The other groups are torch's SGD with Nesterov momentum, of Jordan's 0.85.
    """

    SGD_MOMENTUM = 0.85

    def __init__(self, groups: list[dict], momentum: float):
        plain = {"orthogonal": False, "momentum": self.SGD_MOMENTUM, "nesterov": True}
        special = {"momentum": 0, "nesterov": False, "muon_momentum": momentum}  # applied before SGD's step
        super().__init__([{**group, **(special if group.get("orthogonal") else plain)} for group in groups])

    @torch.no_grad()
    def step(self, closure=None):
        for group in filter(lambda group: group["orthogonal"], self.param_groups):
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
        parameter.grad = orthogonal(update.flatten(1)).view_as(parameter).to(parameter.dtype)
        if parameter.ndim == 4:
            parameter.mul_(len(parameter) ** 0.5 / parameter.norm())


def orthogonal(matrix: torch.Tensor, steps: int = 3) -> torch.Tensor:
    """A matrix [m, n] with its singular values brought near 1, by Newton-Schulz steps of Jordan's quintic."""
    x = matrix.bfloat16() if cpu.supports_bf16() else matrix.float()
    x = x / (x.norm() + 1e-7)
    wide = x if len(x) <= x.shape[1] else x.T
    for _ in range(steps):
        gram = wide @ wide.T
        polynomial = torch.addmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        wide = torch.addmm(wide, polynomial, wide, beta=3.4445)
    return wide if len(x) <= x.shape[1] else wide.T
