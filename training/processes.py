"""Several processes that train as one under torchrun, their devices, and what stops a run."""

import argparse
import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn

from data.split import seed_of
from inference.errors import Problem, one_line, problems
from training import cpu

LONGEST_WAIT = timedelta(hours=6)  # of processes for each other: decoding the images may take hours


# ---------------------------------------------------------------------------------------- processes
@dataclass(frozen=True)
class Processes:
    """This process among those that train together.

    It is number `rank` of `count`, and number `local_rank` on its machine.
    """

    rank: int = 0
    count: int = 1
    local_rank: int = 0

    @property
    def share(self) -> slice:
        """Which images of a batch this process takes: every `count`-th."""
        return slice(self.rank, None, self.count)

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of a tensor over all processes, in place."""
        if self.count > 1:
            dist.all_reduce(tensor)
        return tensor

    def maximum(self, numbers: list[int], device: torch.device) -> list[int]:
        """The greatest of each number over all processes, so that all stop or save at one step."""
        if self.count == 1:
            return numbers
        tensor = torch.tensor(numbers, device=device)
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return tensor.tolist()

    def from_first(self, work: Callable):
        """Call `work` in the first process only, and return its result in all of them."""
        results = [None]
        if self.rank == 0:
            results = [work()]
        if self.count > 1:
            dist.broadcast_object_list(results, 0)
        return results[0]

    def wait(self) -> None:
        """Wait until all processes have come here."""
        if self.count > 1:
            dist.barrier()

    @contextlib.contextmanager
    def first_of_each_machine_first(self) -> Iterator[None]:
        """Run a block in the first process of each machine, then in others, which find files."""
        if self.local_rank > 0:
            self.wait()
        yield
        if self.local_rank == 0:
            self.wait()


@contextlib.contextmanager
def joined() -> Iterator[Processes]:
    """Join the processes that torchrun started, nccl between GPUs, gloo between CPUs; alone without
    it.

    Only the first process prints. A failure names its process, and a wrong command line is reported
    once. All leave together, and then no thread of the group is left.
    """
    processes = Processes(
        rank=int(os.environ.get("RANK", 0)),
        count=max(int(os.environ.get("WORLD_SIZE", 0)), 1),
        local_rank=int(os.environ.get("LOCAL_RANK", 0)),
    )
    if processes.count == 1:
        yield processes
        return

    with contextlib.ExitStack() as stack:
        if processes.rank > 0:
            nowhere = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
        stack.enter_context(failures_named(processes))
        start_group(stack)
        yield processes
        processes.wait()  # the others for the first, which writes the result


def start_group(stack: contextlib.ExitStack) -> None:
    """Start torch's process group, which the stack destroys."""
    # Its functions keep the group that exists on import as their default. DistributedDataParallel
    # imports it: the group would never be freed, and gloo's threads would run into Python's end.
    import torch.distributed.nn

    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=LONGEST_WAIT)
    stack.callback(dist.destroy_process_group)


@contextlib.contextmanager
def failures_named(processes: Processes) -> Iterator[None]:
    """Name the process in its errors, and report once what all of them find."""
    try:
        yield
    except Problem as problem:
        if processes.rank == 0:
            raise
        if problem.code == 2:
            raise SystemExit(2) from None  # the first process says the same
        raise Problem(f"process {processes.rank}: {problem}", problem.code) from None
    except RuntimeError as error:
        if "memory" in str(error):
            raise
        reason = one_line(error)
        raise Problem(f"process {processes.rank} lost the others: {reason}") from None


# ------------------------------------------------------------------------------------------ machine
@dataclass(frozen=True)
class Machine:
    """What trains: a device, and this process among others.

    dtype: of autocast, None for fp32.
    """

    device: torch.device
    dtype: torch.dtype | None
    processes: Processes

    def autocast(self) -> torch.autocast:
        """The block in which the network computes at the training precision."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None)

    def seed(self, *numbers: int) -> None:
        """Seed the device's random numbers, those of dropout, by these numbers and the rank.

        Not by torch.manual_seed, which asks for every possible device and takes a hundred times as
        long.
        """
        seed = seed_of(*numbers, self.processes.rank)
        if self.device.type == "cpu":
            torch.default_generator.manual_seed(seed)
        else:
            torch.get_device_module(self.device).manual_seed(seed)


def choose_machine(settings: argparse.Namespace, processes: Processes) -> Machine:
    """The machine that the settings ask for. Raises Problem if it cannot be had.

    settings: device, precision, batch_size, sync_batchnorm.
    """
    if processes.count > 1 and settings.batch_size < 2 * processes.count:
        reason = f"--batch-size {settings.batch_size} is too small for {processes.count} processes"
        raise Problem(reason, 2)

    device = choose_device(settings.device, processes)
    if settings.sync_batchnorm and device.type != "cuda":
        raise Problem("--sync-batchnorm needs GPUs: torch has none for the CPU", 2)

    uses_bf16 = settings.precision == "bf16"
    if settings.precision == "auto":
        uses_bf16 = supports_bf16(device)
    return Machine(device=device, dtype=torch.bfloat16 if uses_bf16 else None, processes=processes)


def choose_device(name: str, processes: Processes) -> torch.device:
    """The device that `--device` names; for auto, a GPU if there is one.

    Raises Problem if it is unusable.
    """
    chosen = name
    if name == "auto":
        chosen = best_device()
    if chosen == "cuda" and processes.count > 1:
        chosen = f"cuda:{processes.local_rank}"

    unusable = f"--device {name} cannot be used here"
    form = "{} ({}); --device cpu always works"
    with problems(unusable, (RuntimeError, AssertionError), 2, form):
        device = torch.device(chosen)
        torch.zeros(1, device=device).item()
    return device


def best_device() -> str:
    """The name of the fastest kind of device that this machine has."""
    if torch.cuda.is_available():
        return "cuda"
    if torch.backends.mps.is_available():
        return "mps"
    return "cpu"


def supports_bf16(device: torch.device) -> bool:
    """Is this device faster in bf16?"""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    return device.type == "cpu" and cpu.supports_bf16()


def parallel(network: nn.Module, machine: Machine, sync_batchnorm: bool) -> nn.Module:
    """The network as the steps of several processes run it: they share gradients, and perhaps batch
    norm.

    Its parameters are those of `network`, and alone it is that network.
    """
    if sync_batchnorm:
        network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
    is_trained = any(parameter.requires_grad for parameter in network.parameters())
    if machine.processes.count == 1 or not is_trained:
        return network

    devices = [machine.device] if machine.device.type == "cuda" else None
    return nn.parallel.DistributedDataParallel(network, device_ids=devices)


# ------------------------------------------------------------------------------------------ signals
class Stopped(Exception):
    """A signal came, and the run was saved."""

    def __init__(self, number: int):
        super().__init__(number)
        self.signal = number


class Signals:
    """In its block SIGINT and SIGTERM are only noted, as the number `caught`, which else is 0.

    A second SIGINT interrupts at once.
    """

    def __enter__(self):
        self.caught = 0
        self.handlers = {}
        for number in (signal.SIGINT, signal.SIGTERM):
            self.handlers[number] = signal.signal(number, self.note)
        return self

    def note(self, number, frame) -> None:
        self.caught = number
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def __exit__(self, *error):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
