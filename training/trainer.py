"""A run in progress: what works on it and how far it has come; it counts, seeds, stops, saves and resumes."""

import copy
import importlib.metadata
import platform
import time
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import NamedTuple

import numpy as np
import torch

from data.split import Split, seed_of
from inference.errors import Problem
from inference.spec import SCHEMA
from training import cpu, features, optimizers, runs
from training.calibration import Calibration
from training.processes import Signals, Stopped

# The part of the logarithms of classes' shares that --class-weights takes. 1: best recall, lowest accuracy.
ADJUSTMENT = 0.85
# If one class has more than so many times the images of another, plain accuracy says little of small classes.
UNEQUAL = 3


@dataclass
class Progress:
    """How far a run has come; a checkpoint holds these fields. Each step seeds its own random numbers.

    sums: of loss, correct predictions and images over the current epoch's steps. rows: those of metrics.csv.
    best: with a validation split the `score`, `epoch` and `state_dict` of the best epoch.
    """

    epoch: int = 1  # the current one
    steps: int = 0  # done in it
    sums: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])
    seconds: float = 0.0  # spent in it
    elapsed: float = 0.0  # seconds spent in the epochs before
    rows: list[dict] = field(default_factory=list)
    best: dict | None = None


class Evaluation(NamedTuple):
    """A network over a split: mean loss without smoothing; accuracy, None for a regression; and its outputs.

    outputs: numpy's float32, logits [n, classes], or predictions [n, 1] of a regression.
    """

    loss: float
    accuracy: float | None
    outputs: np.ndarray


class Trainer:
    """The network of a run with its optimizer, data and progress, in one of `processes` that train together.

    run: its directory. dataset: a data.Dataset. splits: "train", "test", and "val" or "held-out" if there is
    one. deployable: the network with its preprocessing, on the device that trains. machine: a
    processes.Machine. is_twin: it prints nothing. calibration: made at the end.
    """

    def __init__(self, settings, run, dataset, splits: dict[str, Split], deployable, machine, is_twin):
        self.settings, self.run, self.dataset, self.splits = settings, run, dataset, splits
        self.deployable, self.machine, self.is_twin = deployable, machine, is_twin
        self.dtype, self.processes = machine.dtype, machine.processes
        self.progress, self.device = Progress(), deployable.mean.device
        self.watched = "val" if "val" in splits else "test"  # measured after each epoch; test never selects
        self.network, self.normalise = features.parts(deployable, splits["train"])
        if settings.sync_batchnorm:
            self.network = torch.nn.SyncBatchNorm.convert_sync_batchnorm(self.network)
        self.optimizer = optimizers.make_optimizer(deployable.network, settings)
        if self.processes.count > 1 and any(p.requires_grad for p in self.network.parameters()):
            devices = [self.device] if self.device.type == "cuda" else None
            self.network = torch.nn.parallel.DistributedDataParallel(self.network, device_ids=devices)
        self.log_priors, self.unequal = None, False
        if dataset.task == "classification":
            shares = splits["train"].class_shares(len(dataset.classes))
            self.unequal = bool(shares.max() > UNEQUAL * shares.min())
            if settings.class_weights:
                self.log_priors = (ADJUSTMENT * shares.log()).to(self.device)
        self.steps_per_epoch = splits["train"].count_batches(settings.batch_size, self.processes.count)
        self.saved_at = time.monotonic()
        self.calibration: Calibration | None = None

    def start_epoch(self, signals: Signals) -> None:
        """Prepare to count: sums on the device, the clock, and memory that the last epoch left in holes."""
        cpu.give_back_memory()
        self.signals = signals
        self.started = time.perf_counter() - self.progress.seconds
        number = torch.float32 if self.device.type == "mps" else torch.float64
        self.sums = torch.tensor(self.progress.sums, dtype=number, device=self.device)

    def batches(self):
        """The rest of the current epoch, as Split.shuffled yields it, for this process."""
        settings, progress = self.settings, self.progress
        order = progress.epoch, settings.seed, progress.steps, self.processes.share
        return self.splits["train"].shuffled(settings.batch_size, settings.augment, *order)

    def start_step(self) -> None:
        """Set the learning rate, and seed dropout by the step, so that a run can be resumed at any of them.

        Not by torch.manual_seed, which asks for every possible device and takes a hundred times as long.
        """
        optimizers.set_rate(self.optimizer, self.rate(self.progress.steps))
        on_cpu = self.device.type == "cpu"
        generator = torch.default_generator if on_cpu else torch.get_device_module(self.device)
        at = self.progress.epoch, self.progress.steps
        generator.manual_seed(seed_of(self.settings.seed, *at, self.processes.rank))

    def autocast(self):
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None)

    def rate(self, steps: int) -> float:
        """The learning rate after so many steps of the current epoch, as a part of the highest."""
        done = (self.progress.epoch - 1) * self.steps_per_epoch + min(steps, self.steps_per_epoch)
        return optimizers.rate(self.settings.schedule, done, self.settings.epochs * self.steps_per_epoch)

    def finish_step(self, losses: torch.Tensor, outputs: torch.Tensor, labels: torch.Tensor) -> None:
        """Add losses [n], outputs [n, classes], labels [n]; save if due. Raises Stopped, Problem at NaN."""
        losses, outputs = losses.detach(), outputs.detach()
        correct = torch.zeros_like(losses) if labels.is_floating_point() else outputs.argmax(1) == labels
        self.sums += torch.stack([losses.sum(), correct.sum(), torch.ones_like(losses).sum()])
        self.progress.steps += 1
        # Reading a number from a GPU waits for it, and so is done rarely there.
        last = self.progress.steps == self.steps_per_epoch
        if self.device.type == "cpu" or self.progress.steps % 50 == 0 or last:
            if not self.sums[0].isfinite():
                at = f"in epoch {self.progress.epoch}, step {self.progress.steps}"
                at += f", at learning rate {self.optimizer.param_groups[0]['lr']:.3g}"
                way_out = f"try a smaller --lr than {self.settings.lr:g}, or another --optimizer"
                raise Problem(f"the loss became {self.sums[0].item()} {at}: {way_out}")
            self.save_or_stop()

    def training_metrics(self) -> tuple[float, float | None]:
        """Mean loss and accuracy over the epoch as measured while training; a regression has no accuracy."""
        loss, correct, images = self.processes.sum(self.sums).tolist()
        self.progress.seconds = time.perf_counter() - self.started
        return loss / images, None if self.dataset.task == "regression" else correct / images

    def finish_epoch(self, trained: tuple, evaluated: Evaluation) -> None:
        """Record an epoch, keep the best network, and save; trained, evaluated: loss and accuracy of each."""
        progress, watched = self.progress, self.watched
        names = ("train_loss", "train_accuracy", f"{watched}_loss", f"{watched}_accuracy")
        row = {"epoch": progress.epoch, **dict(zip(names, (*trained, *evaluated[:2]), strict=True))}
        row["lr"] = self.settings.lr * self.rate(0)
        row["seconds"] = round(time.perf_counter() - self.started, 3)
        if watched == "val":
            self.keep_best(evaluated)
        progress.rows.append(row)
        progress.elapsed += row["seconds"]
        progress.epoch, progress.steps, progress.seconds = progress.epoch + 1, 0, 0.0
        progress.sums = [0.0, 0.0, 0.0]
        self.save(row.get("test_accuracy"))

    def keep_best(self, evaluated: Evaluation) -> None:
        """Keep a copy of the network if it does best so far: by accuracy, or balanced accuracy if classes are
        unequal, then by loss."""
        progress, split, accuracy = self.progress, self.splits["val"], evaluated.accuracy or 0.0
        if self.unequal:
            predicted = torch.from_numpy(evaluated.outputs.argmax(1))
            accuracy = balanced_accuracy(split.labels.cpu()[split.members], predicted)
        score = [accuracy, -evaluated.loss]
        if progress.best is None or score > progress.best["score"]:
            state = copy.deepcopy(self.deployable.network.state_dict())
            progress.best = {"score": score, "epoch": progress.epoch, "state_dict": state}

    def out_of_patience(self) -> bool:
        """Has the validation split seen no better epoch for --patience epochs?"""
        best, patience = self.progress.best, self.settings.patience
        return bool(patience and best) and self.progress.epoch - 1 - best["epoch"] >= patience

    def save_or_stop(self) -> None:
        """Save if a checkpoint is due or a signal came to any process; after a signal raise Stopped."""
        caught, due = self.processes.maximum([self.signals.caught, self.is_due()], self.device)
        if caught or due:
            self.progress.sums = self.processes.sum(self.sums.clone()).tolist()
            self.progress.seconds = time.perf_counter() - self.started
            self.save()
        if caught:
            raise Stopped(caught)

    def is_due(self) -> bool:
        """Is it time for a checkpoint within the epoch?"""
        every = self.settings.checkpoint_every
        if isinstance(every, int):
            steps = (self.progress.epoch - 1) * self.steps_per_epoch + self.progress.steps
            return steps % every == 0
        return bool(every) and time.monotonic() - self.saved_at >= 60 * float(every[:-1])

    def save(self, test_accuracy: float | None = None) -> None:
        """Write checkpoint and metrics, once for all processes. Raises Problem."""
        self.saved_at = time.monotonic()
        if self.processes.rank > 0:
            return
        best, state = self.progress.best, self.deployable.network.state_dict()
        if not all(value.isfinite().all() for value in state.values()):
            raise Problem(f"the weights are no longer finite: try a smaller --lr than {self.settings.lr:g}")
        familiarity = self.calibration.familiarity if self.calibration else None
        training = {"progress": vars(self.progress), "optimizer": self.optimizer.state_dict()}
        training["network"] = state if best else None  # else it is the checkpoint's state_dict
        training["data"] = self.dataset.fingerprint
        result, epoch = (best["state_dict"], best["epoch"]) if best else (state, self.progress.epoch - 1)
        runs.save_checkpoint(self.run, self.spec(test_accuracy), result, epoch, training, familiarity)
        if self.progress.rows:
            rows = self.progress.rows[0], *map(dict.values, self.progress.rows)
            runs.write_table(self.run, runs.METRICS, rows)

    def spec(self, test_accuracy: float | None) -> dict:
        """What the exported file will say of itself; deploy/README.md explains the keys."""
        settings, dataset, calibration = self.settings, self.dataset, self.calibration
        versions = {"python": platform.python_version(), "torch": str(torch.__version__)}
        versions["torchvision"] = importlib.metadata.version("torchvision")  # importing it takes a second
        return {
            "schema": SCHEMA,
            "task": dataset.task,
            "classes": list(dataset.classes),
            "channels": dataset.train_images.shape[-1],  # for regression: the number of features
            "image_size": list(settings.image_size),
            "resize": None if dataset.task == "regression" else "bilinear antialias",
            "fit": None if dataset.task == "regression" else settings.fit,
            "mean": self.deployable.mean.flatten().tolist(),
            "std": self.deployable.std.flatten().tolist(),
            "dataset": settings.dataset,
            "model": settings.model,
            "parameters": sum(p.numel() for p in self.deployable.network.parameters()),
            "test_accuracy": test_accuracy,
            "arguments": vars(settings),
            "versions": versions,
            "white": dataset.white,  # the level of 16-bit pixels that becomes 255
            "temperature": calibration.temperature if calibration else None,
            "calibration": calibration and {"source": calibration.source, "images": calibration.images},
            "known": calibration and {"layers": calibration.layers, "images": calibration.compared},
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        }

    def restore(self, training: dict) -> None:
        """Continue from what `save` wrote as `training`."""
        self.progress = Progress(**training["progress"])
        if self.processes.rank > 0:
            self.progress.sums = [0.0, 0.0, 0.0]  # the first process has those of all
        self.optimizer.load_state_dict(training["optimizer"])


def train_mode(network: torch.nn.Module) -> None:
    """Training mode, but eval mode for layers that are frozen, such as a backbone's batch norm."""
    network.train()
    for module in network.modules():
        parameters = list(module.parameters(recurse=False))
        if parameters and not any(parameter.requires_grad for parameter in parameters):
            module.eval()


def balanced_accuracy(labels: torch.Tensor, predicted: torch.Tensor) -> float:
    """The mean recall of the classes that occur; labels and predicted: whole numbers [n]."""
    counts, hits = torch.bincount(labels), torch.bincount(labels, weights=(labels == predicted).double())
    return (hits / counts)[counts > 0].mean().item()
