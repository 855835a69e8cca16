"""How fast a file runs on this machine."""

import contextlib
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from inference.predict import Model
from inference.task import task_of

LATENCY_SECONDS = 3  # measured for at least so long, but within these numbers of runs
FEWEST_RUNS, MOST_RUNS = 51, 4999
THROUGHPUT_SECONDS = 2
BUSY = 2  # a machine is: the 90th percentile of the latency is over so many times the 10th


def benchmark(
    path: str, threads: int, provider: str, batch_size: int, import_seconds: float
) -> dict:
    """Time the load, the first run and the latency on all threads, and the throughput.

    batch_size: of the throughput, whose batches run on one thread each; a file's only batch size
    overrides it. import_seconds: measured by the caller. Returns what --benchmark prints. Raises
    Problem.
    """
    started = time.perf_counter()
    model = Model(path, threads, provider)
    load_seconds = time.perf_counter() - started

    batch_size = model.batch or batch_size
    # Random pixels take as long as any others, and need no files.
    inputs = random_inputs(model, batch_size)
    latencies = measure_latencies(model, inputs[:1])  # ms
    first = latencies[0]
    later = latencies[1:]
    low, high = np.percentile(later, (10, 90)).round(4).tolist()
    p50, p95, p99 = np.percentile(later, (50, 95, 99)).round(3).tolist()
    busy = None
    if high > BUSY * low:
        busy = f"busy machine: {high / low:.3g}x spread of the latency"

    return {
        "model": path,
        "threads": threads,
        "batch_size": batch_size,
        "import_seconds": round(import_seconds, 4),
        "load_seconds": round(load_seconds, 4),
        "first_run_ms": round(first, 3),
        "latency_spread": (low, high),  # the 10th and the 90th percentile
        "latency_p50_ms": p50,
        "latency_p95_ms": p95,
        "latency_p99_ms": p99,
        "busy": busy,
        "peak_memory_mb": peak_memory(),
        "images_per_second": measure_throughput(Model(path, 1, provider), inputs, threads),
    }


def random_inputs(model: Model, batch_size: int) -> np.ndarray:
    """Random inputs that the network takes as they are: images of its own size, or features."""
    spec = model.spec
    rng = np.random.default_rng(0)
    if not task_of(spec).has_images:
        return rng.standard_normal((batch_size, spec["channels"]), dtype=np.float32)

    shape = (batch_size, *spec["image_size"], spec["channels"])
    return rng.integers(0, 256, shape, dtype=np.uint8)


def measure_latencies(model: Model, inputs: np.ndarray) -> list[float]:
    """Milliseconds of one run after another; the first is slower."""
    latencies = []
    until = time.perf_counter() + LATENCY_SECONDS
    before = time.perf_counter()
    while len(latencies) < FEWEST_RUNS or (before < until and len(latencies) < MOST_RUNS):
        model.predict(inputs)
        now = time.perf_counter()
        latencies.append(1000 * (now - before))
        before = now
    return latencies


def measure_throughput(model: Model, inputs: np.ndarray, threads: int) -> float:
    """Inputs a second, of a model that computes in the calling thread, in so many threads."""
    done = 0
    # Enough batches that no thread waits for the others at the end of a round.
    batches = [inputs] * 4 * threads
    started = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        while time.perf_counter() - started < THROUGHPUT_SECONDS:
            for outputs in pool.map(model.predict, batches):
                done += len(outputs)
    return round(done / (time.perf_counter() - started), 1)


def peak_memory() -> float | None:
    """The largest memory of this process so far, in units of 2**20 bytes, if the system tells."""
    with (
        contextlib.suppress(OSError, IndexError),
        open("/proc/self/status", encoding="latin-1") as file,
    ):
        kilobytes = file.read().split("VmHWM:")[1].split()[0]
        return round(int(kilobytes) / 1024, 1)
    return None
