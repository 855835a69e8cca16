"""How far a run has come: its state, what an epoch adds to it, and which epoch is kept."""

import copy
import time
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from inference.errors import Problem
from training.processes import Processes


# -------------------------------------------------------------------------------------------- state
@dataclass
class Progress:
    """How far a run has come; a checkpoint holds these fields. Each step seeds its own random
    numbers.

    sums: of loss, correct predictions and images over the current epoch's steps. rows: those of
    metrics.csv. best: with a validation split the `score`, `epoch` and `state_dict` of the best
    epoch; of epoch 0 where training did harm to a pretrained network; with `averaged`, of the
    average with a twin.
    """

    epoch: int = 1  # the current one
    steps: int = 0  # done in it
    sums: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])
    seconds: float = 0.0  # spent in it
    elapsed: float = 0.0  # seconds spent in the epochs before
    rows: list[dict] = field(default_factory=list)
    best: dict | None = None


class Metrics(NamedTuple):
    """Mean loss, and accuracy from 0 to 1; None for a regression."""

    loss: float
    accuracy: float | None


class Evaluation(NamedTuple):
    """A network over a split: mean loss without smoothing; accuracy, None for a regression; its
    outputs.

    outputs: numpy's float32, logits [n, classes], or predictions [n, 1] of a regression.
    """

    loss: float
    accuracy: float | None
    outputs: np.ndarray


# ----------------------------------------------------------------------------------------- an epoch
class Tally:
    """The sums and the time of the epoch that is being trained.

    The sums stay on the device, so that it need not wait for anybody to read them.
    """

    def __init__(self, progress: Progress, device: torch.device, is_regression: bool):
        self.is_regression = is_regression
        number = torch.float32 if device.type == "mps" else torch.float64
        self.sums = torch.tensor(progress.sums, dtype=number, device=device)
        self.started = time.perf_counter() - progress.seconds

    def add(self, losses: torch.Tensor, outputs: torch.Tensor, labels: torch.Tensor) -> None:
        """Count a batch: losses [n], outputs [n, classes], labels [n]; of a regression [n, 1]."""
        losses = losses.detach()
        images = torch.ones_like(losses)
        correct = torch.zeros_like(losses)  # a regression has none
        if not self.is_regression:
            correct = outputs.detach().argmax(1) == labels
        self.sums += torch.stack([losses.sum(), correct.sum(), images.sum()])

    def seconds(self) -> float:
        """The time spent in the epoch, before a stop as well."""
        return time.perf_counter() - self.started

    def refuse_infinite_loss(
        self, progress: Progress, optimizer: torch.optim.Optimizer, lr: float
    ) -> None:
        """Raise Problem if the loss is no longer finite. lr: the highest learning rate."""
        if self.sums[0].isfinite():
            return
        rate = optimizer.param_groups[0]["lr"]
        raise Problem(
            f"the loss became {self.sums[0].item()} in epoch {progress.epoch}, "
            f"step {progress.steps}, at learning rate {rate:.3g}: "
            f"try a smaller --lr than {lr:g}, or another --optimizer"
        )

    def metrics(self, processes: Processes) -> Metrics:
        """What was measured while training, over all processes."""
        loss, correct, images = processes.sum(self.sums).tolist()
        accuracy = None if self.is_regression else correct / images
        return Metrics(loss=loss / images, accuracy=accuracy)


def columns_of(watched: str) -> list[str]:
    """The columns of metrics.csv. watched: the split that is evaluated after each epoch."""
    trained = ["epoch", "train_loss", "train_accuracy"]
    return [*trained, f"{watched}_loss", f"{watched}_accuracy", "lr", "seconds"]


def record_epoch(
    progress: Progress, watched: str, trained: Metrics, evaluated: Evaluation, rate: float
) -> None:
    """Add the epoch's row to those of metrics.csv, and go on to the next epoch.

    watched: the split that was evaluated; rate: the learning rate of the epoch's first step.
    """
    seconds = round(progress.seconds, 3)
    values = [
        progress.epoch,
        trained.loss,
        trained.accuracy,
        evaluated.loss,
        evaluated.accuracy,
        rate,
        seconds,
    ]
    row = dict(zip(columns_of(watched), values, strict=True))
    progress.rows.append(row)
    progress.elapsed += seconds

    progress.epoch += 1
    progress.steps = 0
    progress.seconds = 0.0
    progress.sums = [0.0, 0.0, 0.0]


# ----------------------------------------------------------------------------------- the best epoch
def keep_best(progress: Progress, network: nn.Module, accuracy: float | None, loss: float) -> None:
    """Keep a copy of the network if it does best so far on the validation split: by accuracy, then
    by loss.

    accuracy: balanced if classes are unequal, None for a regression.
    """
    score = [accuracy or 0.0, -loss]
    if progress.best is None or score > progress.best["score"]:
        state = copy.deepcopy(network.state_dict())
        progress.best = {"score": score, "epoch": progress.epoch, "state_dict": state}


def is_kept_head(progress: Progress) -> bool:
    """Does the run end with what it began with, a pretrained network with a fitted head?"""
    return progress.best is not None and progress.best["epoch"] == 0


def is_average(progress: Progress) -> bool:
    """Does the run end with the average of its network and a twin?"""
    return progress.best is not None and progress.best.get("averaged", False)


def is_out_of_patience(progress: Progress, patience: int | None) -> bool:
    """Has the validation split seen no better epoch for `patience` epochs?"""
    if not patience or not progress.best:
        return False
    done = progress.epoch - 1
    return done - progress.best["epoch"] >= patience
