"""What makes training fast on a CPU: threads, bf16, a heap that keeps memory, and convolutions that
are computed side by side."""

import contextlib
import ctypes
import functools
import math
import os
import time
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from inference.cpus import usable_cpus

# Multiply-adds of other layers for each value of a depthwise convolution, from which on bf16 pays:
# tests/benchmarks/NOTES.md has what was measured.
DENSE_ENOUGH = 300
BUSY = 0.5  # CPUs used by other programs, above which a thread less is taken


# ------------------------------------------------------------------------------------------ threads
class Usage(NamedTuple):
    """The clock and what has been computed so far, in seconds.

    busy: of all usable CPUs, 0 if unknown. own: of this process and its children.
    """

    now: float
    busy: float
    own: float


def snapshot() -> Usage:
    """The usage up to now."""
    busy = 0.0
    # Not every system has these, and a container may hide them.
    with contextlib.suppress(OSError, ValueError, IndexError, AttributeError):
        busy = busy_seconds()

    own = sum(os.times()[:4])  # user and system time, of the process and of its children
    return Usage(now=time.perf_counter(), busy=busy, own=own)


def busy_seconds() -> float:
    """How long the usable CPUs have computed, by Linux's /proc/stat."""
    usable = {f"cpu{number}" for number in os.sched_getaffinity(0)}
    ticks = 0
    with open("/proc/stat", encoding="ascii") as file:
        for line in file:
            name, *counts = line.split()
            if name in usable:
                user, nice, system, _idle, _waiting, *others = map(int, counts)
                # The others are interrupts, and what a hypervisor has given away.
                ticks += user + nice + system + sum(others[:3])
    return ticks / os.sysconf("SC_CLK_TCK")


AT_START = snapshot()


def cpus_taken() -> float:
    """How many CPUs other programs have used on average since this module was imported."""
    now = snapshot()
    busy = now.busy - AT_START.busy
    own = now.own - AT_START.own
    seconds = max(now.now - AT_START.now, 0.01)
    return max(0.0, (busy - own) / seconds)


def set_threads(asked: int | None, recorded: int | None = None) -> tuple[int | None, str]:
    """Choose how many threads torch computes with; returns the number and, if it is unusual, the
    reason.

    As many as the CPUs that this process may use, less those that other programs are using: a step
    waits for its slowest thread, and OpenMP's threads wait busily, so that two threads on a busy
    core take many times as long as one thread. asked: the user's number, if any. recorded: the
    number that a resumed run began with, as another one rounds differently. If OMP_NUM_THREADS is
    set, it decides, and the number is None.
    """
    if not asked and "OMP_NUM_THREADS" in os.environ:
        return None, ""

    wanted = asked or recorded
    if wanted:
        torch.set_num_threads(wanted)
        return wanted, ""

    cpus = usable_cpus()
    taken = cpus_taken()
    threads = cpus
    reason = ""
    if taken >= BUSY:
        threads = max(1, cpus - math.ceil(taken))
    if threads < cpus:
        reason = f"other programs use {taken:.1f} of {cpus} CPUs; --threads overrides"
    torch.set_num_threads(threads)
    return threads, reason


@functools.cache
def supports_bf16() -> bool:
    """Does this processor multiply bf16 matrices in units of its own?"""
    if not hasattr(torch.cpu, "get_capabilities"):
        return False
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))


@torch.no_grad()
def gains_from_bf16(network: nn.Module, shape: tuple[int, int, int]) -> bool:
    """Does training this network in bf16 take less time here than in fp32?

    Depthwise convolutions take longer in bf16, by how many values they read and write; all other
    layers take less, by their multiply-adds. Both are counted for one image. shape: of the image,
    [channels, H, W].
    """
    multiply_adds = 0
    values = 0

    def count(layer: nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        nonlocal multiply_adds, values
        if is_depthwise(layer):
            values += inputs[0].numel() + output.numel()
        else:
            multiply_adds += output.numel() * layer.weight[0].numel()

    with contextlib.ExitStack() as stack:
        for layer in network.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                stack.enter_context(layer.register_forward_hook(count))
        network.eval()(torch.zeros(1, *shape))
    return multiply_adds >= DENSE_ENOUGH * values


def is_depthwise(layer: nn.Module) -> bool:
    """Is this a convolution in which each channel has filters of its own?"""
    return isinstance(layer, nn.Conv2d) and layer.groups == layer.in_channels > 1


# --------------------------------------------------------------------------------------------- heap
def keep_freed_memory() -> None:
    """Let glibc keep freed buffers instead of giving them to the kernel, which then zeroes every
    page again.

    Activations and gradients take tens of megabytes each and are allocated in every step: half of a
    step went into page faults. Without glibc this does nothing.
    """
    m_trim_threshold = -1  # these two are from malloc.h
    m_mmap_max = -4
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(m_mmap_max, 0)
        libc.mallopt(m_trim_threshold, 2**31 - 1)


def give_back_memory() -> None:
    """Give the kernel what `keep_freed_memory` kept in holes of the heap."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


# ------------------------------------------------------------------------------------- side by side
class SideBySide(torch.autograd.Function):
    """A 3x3 convolution, stride 1, padding 1; its weight gradient is taken over images laid side by
    side.

    x: [n, c, h, w]; weight: [out, c, 3, 3]. oneDNN's gradient fills the tiles of AMX along the
    width, which narrow maps leave nearly empty: at 4x4 pixels it takes four times as long.
    """

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return F.conv2d(x, weight, padding=1)

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        for_x, _ = gradients(gradient, x, weight, wanted=[ctx.needs_input_grad[0], False, False])

        # The zero columns between the images keep their borders apart.
        x = side_by_side(x)
        gradient = side_by_side(gradient)
        _, for_weight = gradients(gradient, x, weight, wanted=[False, True, False])
        return for_x, for_weight


def gradients(gradient, x, weight, wanted: list[bool]) -> tuple:
    """The gradients of a 3x3 convolution to x and weight, None where not wanted.

    wanted: for x, weight and bias.
    """
    found = torch.ops.aten.convolution_backward(
        gradient,
        x,
        weight,
        bias_sizes=None,
        stride=[1, 1],
        padding=[1, 1],
        dilation=[1, 1],
        transposed=False,
        output_padding=[0, 0],
        groups=1,
        output_mask=wanted,
    )
    return found[0], found[1]


def side_by_side(images: torch.Tensor, width: int = 48) -> torch.Tensor:
    """Images [n, c, h, w] in rows of k, each with a zero column: [n / k, c, h, k * (w + 1)].

    A row is at most `width` pixels wide, if more than one image is in it.
    """
    n, c, h, w = images.shape
    k = 1  # how many images fit into a row: a divisor of n
    for count in range(1, width // (w + 1) + 1):
        if n % count == 0:
            k = count

    rows = images.new_zeros(n // k, h, k, w + 1, c)
    rows[..., :w, :] = images.unflatten(0, (-1, k)).permute(0, 3, 1, 4, 2)
    return rows.flatten(2, 3).permute(0, 3, 1, 2)


class Conv3x3(nn.Conv2d):
    """A 3x3 convolution, trained by SideBySide where autocast is on and its maps are narrow."""

    def forward(self, x):
        is_narrow = x.shape[3] < 10
        if not self.training or not is_narrow or not torch.is_autocast_enabled("cpu"):
            return super().forward(x)
        dtype = torch.get_autocast_dtype("cpu")  # autocast does not reach into SideBySide
        return SideBySide.apply(x.to(dtype), self.weight.to(dtype))


def lay_side_by_side(network: nn.Module) -> None:
    """Train the 3x3 convolutions of a network as Conv3x3; parameters and results stay the same."""
    for module in network.modules():
        if is_plain_3x3(module):
            # Not by a new module, which would draw random numbers for weights that it does not
            # need.
            module.__class__ = Conv3x3


def is_plain_3x3(module: nn.Module) -> bool:
    """Is this a 3x3 convolution as SideBySide computes it?"""
    return (
        type(module) is nn.Conv2d
        and module.kernel_size == (3, 3)
        and module.stride == (1, 1)
        and module.padding == (1, 1)
        and module.dilation == (1, 1)
        and module.groups == 1
        and module.bias is None
        and module.padding_mode == "zeros"
    )
