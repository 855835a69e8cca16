"""What makes training fast on a CPU: threads, bf16, a heap that keeps memory, convolutions side by side."""

import contextlib
import ctypes
import functools
import math
import os
import time

import torch
import torch.nn.functional as F
from torch import nn

from inference.cpus import usable_cpus

BUSY = 0.5  # CPUs used by other programs, above which a thread less is taken


# -------------------------------------------------------------------------------------------------- threads
def snapshot() -> tuple[float, float, float]:
    """Now, the CPU seconds that the usable CPUs were busy, 0 if unknown, and this process with children."""
    times, busy = os.times(), 0.0
    unknown = contextlib.suppress(OSError, ValueError, IndexError, AttributeError)
    with unknown, open("/proc/stat", encoding="ascii") as file:
        usable = {f"cpu{number}" for number in os.sched_getaffinity(0)}
        for name, user, nice, system, _idle, _wait, *other in map(str.split, file):
            if name in usable:
                busy += sum(map(int, (user, nice, system, *other[:3]))) / os.sysconf("SC_CLK_TCK")
    return time.perf_counter(), busy, sum(times[:4])


AT_START = snapshot()


def cpus_taken() -> float:
    """How many CPUs other programs have used on average since this module was imported."""
    (start, busy_before, own_before), (now, busy, own) = AT_START, snapshot()
    return max(0.0, ((busy - busy_before) - (own - own_before)) / max(now - start, 0.01))


def set_threads(asked: int | None, recorded: int | None = None) -> tuple[int | None, str]:
    """Choose how many threads torch computes with; returns the number and, if it is unusual, why in words.

    As many as the CPUs that this process may use, less those that other programs are using: a step waits for
    its slowest thread, and OpenMP's threads wait busily, so that two threads on a busy core take many times
    as long as one thread. recorded: the number that a resumed run began with, as another one rounds
    differently. If OMP_NUM_THREADS is set, it decides, and the number is None.
    """
    if not asked and "OMP_NUM_THREADS" in os.environ:
        return None, ""
    cpus, taken, threads = usable_cpus(), cpus_taken(), asked or recorded
    if threads is None:
        threads = cpus if taken < BUSY else max(1, cpus - math.ceil(taken))
    torch.set_num_threads(threads)
    if asked or recorded or threads == cpus:
        return threads, ""
    return threads, f"other programs use {taken:.1f} of {cpus} CPUs; --threads overrides"


@functools.cache
def supports_bf16() -> bool:
    """Does this processor multiply bf16 matrices in units of its own?"""
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))


# ------------------------------------------------------------------------------------------------------- heap
def keep_freed_memory() -> None:
    """Let glibc keep freed buffers instead of giving them to the kernel, which then zeroes every page again.

    Activations and gradients take tens of megabytes each and are allocated in every step: half of a step went
    into page faults. Without glibc this does nothing.
    """
    m_trim_threshold, m_mmap_max = -1, -4  # malloc.h
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(m_mmap_max, 0)
        libc.mallopt(m_trim_threshold, 2**31 - 1)


def give_back_memory() -> None:
    """Give the kernel what `keep_freed_memory` kept in holes of the heap."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


# ----------------------------------------------------------------------------------------------- side by side
class SideBySide(torch.autograd.Function):
    """A 3x3 convolution, stride 1, padding 1; its weight gradient is taken over images laid side by side.

    x: [n, c, h, w]; weight: [out, c, 3, 3]. oneDNN's gradient fills the tiles of AMX along the width, which
    narrow maps leave nearly empty: at 4x4 pixels it takes four times as long.
    """

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return F.conv2d(x, weight, padding=1)

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        settings = (None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1)  # no bias, stride, padding, dilation, ...
        backward = torch.ops.aten.convolution_backward
        for_x = backward(gradient, x, weight, *settings, [ctx.needs_input_grad[0], False, False])[0]
        x, gradient = side_by_side(x), side_by_side(gradient)
        return for_x, backward(gradient, x, weight, *settings, [False, True, False])[1]


def side_by_side(images: torch.Tensor, width: int = 48) -> torch.Tensor:
    """Images [n, c, h, w], each with a zero column, in rows up to `width`: [n / k, c, h, k * (w + 1)]."""
    n, c, h, w = images.shape
    k = max(k for k in range(1, max(width // (w + 1), 1) + 1) if n % k == 0)
    rows = images.new_zeros(n // k, h, k, w + 1, c)
    rows[..., :w, :] = images.unflatten(0, (-1, k)).permute(0, 3, 1, 4, 2)
    return rows.flatten(2, 3).permute(0, 3, 1, 2)


class Conv3x3(nn.Conv2d):
    """A 3x3 convolution, trained by SideBySide where autocast is on and its maps are narrow."""

    def forward(self, x):
        if not self.training or x.shape[3] >= 10 or not torch.is_autocast_enabled("cpu"):
            return super().forward(x)
        return SideBySide.apply(*(tensor.to(torch.get_autocast_dtype("cpu")) for tensor in (x, self.weight)))


def lay_side_by_side(network: nn.Module) -> None:
    """Train the 3x3 convolutions of a network as Conv3x3; parameters and results stay the same."""
    like = {"kernel_size": (3, 3), "stride": (1, 1), "padding": (1, 1), "dilation": (1, 1), "groups": 1}
    for module in network.modules():
        plain = type(module) is nn.Conv2d and module.bias is None and module.padding_mode == "zeros"
        if plain and all(getattr(module, name) == value for name, value in like.items()):
            module.__class__ = Conv3x3
