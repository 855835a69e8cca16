"""How fast files run on this machine. Speed is reported, and decides nothing."""

import time
import timeit
from collections.abc import Callable

import numpy as np

from inference.images import fit_to_input
from inference.predict import Model

LATENCY_RUNS = 30
BATCH_SIZES = (1, 64)
FASTER = 1.05  # times; less is within what two measurements differ by
FEWEST_TIMES = 5
FASTEST = 0.2  # the share of the runs that counts


def measure_latency(exported: Model, image: np.ndarray) -> dict:
    """Milliseconds for one decoded image, on all threads: median, 10th and 90th percentile."""
    times = timeit.repeat(lambda: exported.predict(image), number=1, repeat=LATENCY_RUNS)
    low, median, high = np.percentile(times, (10, 50, 90))
    return {
        "latency_ms": round(1000 * float(median), 4),
        "latency_spread": [round(1000 * float(low), 4), round(1000 * float(high), 4)],
    }


def measure_int8(
    unquantized: str, quantized: str, images: np.ndarray, threads: int | None = None
) -> dict:
    """How much faster an int8 file is on uint8 images [N, H, W, channels].

    Returns `speedup` by batch size, and a `warning` if there is none.
    """
    slow = Model(unquantized, threads)
    fast = Model(quantized, threads)
    speedups = {}
    for size in [fast.batch] if fast.batch else BATCH_SIZES:
        # np.resize repeats the images if there are fewer than the batch holds.
        batch = np.resize(images[:size], (size, *images.shape[1:]))
        batch = fit_to_input(batch, fast.spec)
        speedups[str(size)] = round(speedup(slow.predict, fast.predict, batch), 2)

    figures = {"speedup": speedups}
    if min(speedups.values()) < FASTER:
        measured = speed_in_words(speedups)
        figures["warning"] = f"it is not faster than float32 on this machine ({measured})"
    return figures


def speedup(slow: Callable, fast: Callable, inputs: np.ndarray, seconds: float = 0.3) -> float:
    """How many times as fast `fast(inputs)` is as `slow(inputs)`, timed in turn.

    Another process, on a shared machine, delays now one and now the other: the fastest fifth of
    each counts.
    """
    slow_timer = timeit.Timer(lambda: slow(inputs))
    fast_timer = timeit.Timer(lambda: fast(inputs))
    slow_timer.timeit(1)  # the first run is slower, and does not count
    fast_timer.timeit(1)

    # In turn rather than one after the other: what slows the machine down hits both.
    slow_times = []
    fast_times = []
    until = time.perf_counter() + seconds
    while time.perf_counter() < until or len(slow_times) < FEWEST_TIMES:
        slow_times.append(slow_timer.timeit(1))
        fast_times.append(fast_timer.timeit(1))
    return float(np.quantile(slow_times, FASTEST) / np.quantile(fast_times, FASTEST))


def speed_in_words(figures: dict[str, float]) -> str:
    """2.00 times at batch size 1 and 3.00 times at batch size 64"""
    return " and ".join(
        f"{times:.2f} times at batch size {size}" for size, times in figures.items()
    )
