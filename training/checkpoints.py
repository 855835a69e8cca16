"""When a run saves its state, what a checkpoint holds, and how training goes on from it."""

import time
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from inference.errors import Problem, problems
from training import describe, runs
from training.calibration import Calibration
from training.processes import Machine, Signals, Stopped
from training.progress import Progress, Tally


@dataclass
class Saver:
    """Saves a run: where, when, and what a checkpoint says of the run besides its state.

    spec: see `describe.describe_run`. fingerprint: of the dataset, so that resuming notices another
    one. interval: of --checkpoint-every, steps or text such as "10m", None for the end of each
    epoch only. familiarity: the tensors of `model.Familiarity`, made at the end.
    """

    run_dir: str
    spec: dict
    fingerprint: dict
    machine: Machine
    signals: Signals
    interval: int | str | None
    familiarity: dict[str, torch.Tensor] | None = None
    saved_at: float = field(default_factory=lambda: time.monotonic())

    def with_calibration(self, calibration: Calibration) -> "Saver":
        """The same for a network that has been calibrated."""
        spec = describe.with_calibration(self.spec, calibration)
        return replace(self, spec=spec, familiarity=calibration.familiarity)

    def is_due(self, steps: int) -> bool:
        """Is it time for a checkpoint within the epoch? steps: those done since the run began."""
        if self.interval is None:
            return False
        if isinstance(self.interval, int):
            return steps % self.interval == 0
        minutes = float(self.interval.removesuffix("m"))
        return time.monotonic() - self.saved_at >= 60 * minutes

    def save_or_stop(
        self,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        progress: Progress,
        tally: Tally,
        steps: int,
    ) -> None:
        """Save if it is due, or if a signal came to any process: then raise Stopped."""
        processes = self.machine.processes
        wanted = [self.signals.caught, self.is_due(steps)]
        caught, due = processes.maximum(wanted, self.machine.device)
        if not caught and not due:
            return

        # A checkpoint holds the sums of all processes, so that any number of them can resume it.
        progress.sums = processes.sum(tally.sums.clone()).tolist()
        progress.seconds = tally.seconds()
        self.save(network, optimizer, progress)
        if caught:
            raise Stopped(caught)

    def stop_if_asked(self) -> None:
        """Raise Stopped if a signal came to any process; everything is saved."""
        (caught,) = self.machine.processes.maximum([self.signals.caught], self.machine.device)
        if caught:
            raise Stopped(caught)

    def save(
        self,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        progress: Progress,
        test_accuracy: float | None = None,
    ) -> None:
        """Write checkpoint and metrics, once for all processes. Raises Problem."""
        self.saved_at = time.monotonic()
        if self.machine.processes.rank > 0:
            return
        # A checkpoint that cannot be used must not take the place of one that can.
        refuse_infinite_weights(network, self.spec["arguments"]["lr"])

        spec = describe.with_result(self.spec, test_accuracy)
        checkpoint = make_checkpoint(
            spec, network, optimizer, progress, self.fingerprint, self.familiarity
        )
        runs.write_checkpoint(self.run_dir, checkpoint)
        runs.write_metrics(self.run_dir, progress.rows)


class Unsaved(Saver):
    """Saves nothing of what is soon done again, and stops it after a signal."""

    def save_or_stop(self, *state) -> None:
        self.stop_if_asked()

    def save(self, *state) -> None:
        pass


def refuse_infinite_weights(network: nn.Module, lr: float) -> None:
    """Raise Problem if a weight is no longer finite. lr: the highest learning rate."""
    for value in network.state_dict().values():
        if not value.isfinite().all():
            raise Problem(f"the weights are no longer finite: try a smaller --lr than {lr:g}")


def make_checkpoint(
    spec: dict,
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    fingerprint: dict,
    familiarity: dict[str, torch.Tensor] | None,
) -> dict:
    """What checkpoint.pt holds: plain values and tensors.

    state_dict, epoch: the network that is the result so far, and the epoch it is from. training:
    all else that `restore` and `weights.load_into` need to go on. familiarity: the tensors of
    model.Familiarity, or None.
    """
    state = network.state_dict()
    training = {
        "progress": vars(progress),
        "optimizer": optimizer.state_dict(),
        "network": None,  # then it is the checkpoint's state_dict
        "data": fingerprint,
    }
    # What the run would end with if it stopped here, which step2 exports.
    result = state
    epoch = progress.epoch - 1
    if progress.best:
        result = progress.best["state_dict"]
        epoch = progress.best["epoch"]
        training["network"] = state

    return {
        "schema": runs.SCHEMA,
        "spec": spec,
        "state_dict": result,
        "arguments": spec["arguments"],
        "epoch": epoch,
        "training": training,
        "familiarity": familiarity,
    }


def restore(checkpoint: dict | None, optimizer: torch.optim.Optimizer, rank: int) -> Progress:
    """The progress in a checkpoint, after giving the optimizer its state; or that of a new run.

    Raises Problem if the state does not fit.
    """
    if checkpoint is None:
        return Progress()

    training = checkpoint["training"]
    progress = Progress(**training["progress"])
    if rank > 0:
        progress.sums = [0.0, 0.0, 0.0]  # the first process has those of all

    # Rates, momentum and the like follow from the settings: only what they act on is taken.
    options = [without_parameters(group) for group in optimizer.param_groups]
    unfit = "the state of the optimizer in the checkpoint does not fit its network"
    with problems(unfit, form="{} ({}): start a new run"):
        optimizer.load_state_dict(training["optimizer"])
        for group, own in zip(optimizer.param_groups, options, strict=True):
            group.update(own)
            for parameter in group["params"]:
                check_state(optimizer, parameter)
    return progress


def without_parameters(group: dict) -> dict:
    """The options of a group of an optimizer."""
    return {name: value for name, value in group.items() if name != "params"}


def check_state(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> None:
    """Raise ValueError if an optimizer's state of a parameter cannot be one."""
    state = optimizer.state.get(parameter, {})
    needed = set()
    if state and isinstance(optimizer, torch.optim.Adam):  # AdamW is one
        needed = {"step", "exp_avg", "exp_avg_sq"}
    if not needed <= state.keys():
        raise ValueError("a key is missing")

    for name, value in state.items():
        shape = torch.Size() if name == "step" else parameter.shape
        if value is not None and (value.shape != shape or not value.is_floating_point()):
            raise ValueError(f"{name} has another shape")
