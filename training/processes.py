"""Several processes that train as one under torchrun, their devices, and the signals that stop a run."""

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from inference.errors import Problem, one_line, problems
from training import cpu


@dataclass(frozen=True)
class Processes:
    """This process among those that train together: `rank` of `count`, and `local_rank` on its machine."""

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
        """The greatest of each number over all processes: all of them then stop or save at the same step."""
        if self.count == 1:
            return numbers
        tensor = torch.tensor(numbers, device=device)
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return tensor.tolist()

    def from_first(self, work: Callable):
        """Call `work` in the first process only, and return its result in all of them."""
        results = [work() if self.rank == 0 else None]
        if self.count > 1:
            dist.broadcast_object_list(results, 0)
        return results[0]

    def wait(self) -> None:
        if self.count > 1:
            dist.barrier()

    @contextlib.contextmanager
    def first_of_each_machine_first(self) -> Iterator[None]:
        """Run a block in the first process of each machine, then in the others, which find its downloads."""
        if self.local_rank > 0:
            self.wait()
        yield
        if self.local_rank == 0:
            self.wait()


@contextlib.contextmanager
def joined() -> Iterator[Processes]:
    """Join the processes that torchrun started, nccl between GPUs, gloo between CPUs; alone without torchrun.

    Only the first process prints. A failure names its process, and a wrong command line is reported once. All
    leave together, and then no thread of the group is left.
    """
    numbers = [int(os.environ.get(name, 0)) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")]
    processes = Processes(numbers[0], max(numbers[1], 1), numbers[2])
    if processes.count == 1:
        yield processes
        return
    with contextlib.ExitStack() as stack:
        if processes.rank > 0:
            nowhere = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
        try:
            # Its functions keep the group that exists on import as their default. DistributedDataParallel
            # imports it: the group would never be freed, and gloo's threads would run into Python's end.
            import torch.distributed.nn

            backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
            dist.init_process_group(backend, timeout=timedelta(hours=6))  # decoding the images may take hours
            stack.callback(dist.destroy_process_group)
            yield processes
            processes.wait()  # the others for the first, which writes the result
        except Problem as problem:
            if processes.rank == 0:
                raise
            if problem.code == 2:
                raise SystemExit(2) from None  # the first process says the same
            raise Problem(f"process {processes.rank}: {problem}", problem.code) from None
        except RuntimeError as error:
            if "memory" in str(error):
                raise
            raise Problem(f"process {processes.rank} lost the others: {one_line(error)}") from None


def choose_device(name: str, processes: Processes) -> torch.device:
    """The device that `--device` names, with auto a GPU if there is one. Raises Problem if it is unusable."""
    others = "mps" if torch.backends.mps.is_available() else "cpu"
    auto = "cuda" if torch.cuda.is_available() else others
    chosen = auto if name == "auto" else name
    if chosen == "cuda" and processes.count > 1:
        chosen = f"cuda:{processes.local_rank}"
    unusable, form = f"--device {name} cannot be used here", "{} ({}); --device cpu always works"
    with problems(unusable, (RuntimeError, AssertionError), 2, form):
        device = torch.device(chosen)
        torch.zeros(1, device=device).item()
    return device


@dataclass(frozen=True)
class Machine:
    """What trains: a device, the dtype of autocast or None for fp32, and this process among others."""

    device: torch.device
    dtype: torch.dtype | None
    processes: Processes


def choose_machine(settings, processes: Processes, bf16_pays: bool) -> Machine:
    """The machine that the settings ask for. Raises Problem if it cannot be had.

    settings: device, precision, batch_size, sync_batchnorm. bf16_pays: whether the network gains from it.
    """
    if processes.count > 1 and settings.batch_size < 2 * processes.count:
        raise Problem(f"--batch-size {settings.batch_size} is too small for {processes.count} processes", 2)
    device = choose_device(settings.device, processes)
    if settings.sync_batchnorm and device.type != "cuda":
        raise Problem("--sync-batchnorm needs GPUs: torch has none for the CPU", 2)
    bf16 = settings.precision == "bf16"
    if settings.precision == "auto" and bf16_pays and device.type in ("cuda", "cpu"):
        bf16 = torch.cuda.is_bf16_supported() if device.type == "cuda" else cpu.supports_bf16()
    return Machine(device, torch.bfloat16 if bf16 else None, processes)


class Stopped(Exception):
    """A signal came, and the run was saved; the argument is the signal's number."""


class Signals:
    """In its block SIGINT and SIGTERM are only noted, in `caught`; a second SIGINT interrupts at once."""

    def __enter__(self):
        self.caught, numbers = 0, (signal.SIGINT, signal.SIGTERM)
        self.handlers = {number: signal.signal(number, self.note) for number in numbers}
        return self

    def note(self, number, frame) -> None:
        self.caught = number
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def __exit__(self, *error):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
