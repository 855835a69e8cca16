"""An exported directory in every engine that is installed: do they agree, and how fast are they? Run by hand.

    python tests/benchmarks/bench_engines.py exports/NAME --images 200 --threads 1

Runs each model file of the directory in each engine that takes it, in a process of its own, because engines
crash: on test images of the network's own size, and on a few of them enlarged to six sizes with noise of 30
grey levels, which shows missing antialiasing. Files of fixed size are given what step3 resizes them to.

Prints a row for each engine and file: the largest difference of a probability from onnxruntime with the same
file at each size, how many answers changed, and the time to load and to run one image of the network's size,
the fastest fifth, with onnxruntime's time for the same file, taken in turn with it. An ExecuTorch or LiteRT
file is compared with model.fixed.onnx.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "benchmarks")]

from runtimes import RUNTIMES, onnxruntime, version  # noqa: E402

from inference.engines import MODEL_NAMES  # noqa: E402
from inference.images import fit_to_input
from inference.predict import Model  # noqa: E402

SIZES = ((64, 64), (57, 43), (20, 27), (32, 300), (480, 640), (3000, 4000))
NOISE = 30  # grey levels
SECONDS = 2  # of a timing
MEGABYTE = 1 << 20


def enlarged(images: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Eight test images, one if it is large, uint8 [n, *size, C], with noise."""
    rng, parts = np.random.default_rng(0), []
    for image in images[: 8 if size[0] * size[1] < MEGABYTE else 1]:
        picture = Image.fromarray(image.squeeze()).resize(size[::-1], Image.Resampling.BICUBIC)
        pixels = np.asarray(picture, np.float32).reshape(*size, images.shape[3])
        parts.append(np.clip(pixels + rng.normal(0, NOISE, pixels.shape), 0, 255).astype(np.uint8))
    return np.stack(parts)


def run_batches(run, images: np.ndarray, batch: int | None) -> np.ndarray:
    """Probabilities of images [N, H, W, C], in batches of 32, or of `batch`, of which the last is filled."""
    size, parts = batch or 32, []
    for start in range(0, len(images), size):
        part = images[start : start + size]
        missing = size - len(part) if batch else 0
        parts.append(run(np.ascontiguousarray(np.concatenate([part, part[:1].repeat(missing, 0)]))))
    return np.concatenate(parts)[: len(images)]


def fifth(run, other, inputs: np.ndarray) -> tuple[float, float]:
    """Milliseconds of two functions, taken in turn: the fastest fifth of each."""
    times, until = [], time.perf_counter() + SECONDS
    while time.perf_counter() < until or len(times) < 10:
        ticks = [time.perf_counter()]
        for function in (run, other):
            function(inputs)
            ticks.append(time.perf_counter())
        times.append(np.diff(ticks))
    first, second = 1000 * np.quantile(times, 0.2, axis=0)
    return float(first), float(second)


def measure(name: str, file: str, beside: str, inputs: str, threads: int) -> dict:
    """What one engine does with one file, as a row: `max` by size, `changed`, `answers`, and times in ms.

    beside: the ONNX file whose answers in onnxruntime are right, and which onnxruntime is timed with. inputs:
    an .npz of uint8 images [N, H, W, C] by size.
    """
    started = time.perf_counter()
    run = RUNTIMES[name][2](file, threads)
    row = {"load": 1000 * (time.perf_counter() - started), "max": {}, "changed": 0, "answers": 0}
    spec, right = Model(file, threads).spec, Model(beside, threads).spec
    other = onnxruntime(beside, threads)
    arrays = np.load(inputs)
    for size in arrays.files:
        images = fit_to_input(arrays[size], spec)
        try:
            got = run_batches(run, images, spec["fixed"] and spec["fixed"]["batch"])
        except Exception as error:  # engines raise anything
            row["max"][size] = type(error).__name__
            continue
        expected = run_batches(other, fit_to_input(arrays[size], right), right["fixed"] and right["fixed"]["batch"])
        row["max"][size] = float(np.abs(got - expected).max())
        row["changed"] += int((got.argmax(1) != expected.argmax(1)).sum())
        row["answers"] += len(images)
    one = fit_to_input(arrays[arrays.files[0]][: (spec["fixed"] or {}).get("batch") or 1], spec)
    row["run"], row["onnxruntime"] = fifth(run, other, one)
    return row


def print_row(label: str, row: dict) -> None:
    worst = row["max"].values()
    cells = [value if isinstance(value, str) else f"{value:.0e}" for value in worst]
    times = f"{row['load']:.0f} | {row['run']:.2f} | {row['run'] / row['onnxruntime']:.2f}"
    print(f"| {label} | {' | '.join(cells)} | {row['changed']} of {row['answers']} | {times} |", flush=True)


def in_a_process(name: str, file: Path, inputs: str, threads: int) -> dict | str:
    """`measure` in a new process, or why there is no row."""
    beside = file if file.suffix == ".onnx" else file.with_name("model.onnx")
    if file.suffix in (".pte", ".tflite"):
        beside = file.with_name("model.fixed.onnx")
    command = [sys.executable, __file__, "--one", name, str(file), str(beside), inputs]
    command += ["--threads", str(threads)]
    done = subprocess.run(command, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if lines:
        return json.loads(lines[-1])
    said = [line for line in done.stderr.strip().splitlines() if line.strip()] or ["nothing said"]
    return f"crashed, signal {-done.returncode}" if done.returncode < 0 else said[-1][:100]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("export", type=Path, nargs="?", help="the directory of an export")
    parser.add_argument("--data-dir", help="default: where step1 had it")
    parser.add_argument("--images", type=int, default=200, help="of the test split")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print("\n" + json.dumps(measure(*args.one, args.threads)))
        return
    from bench_robustness import test_images  # which imports torch

    files = [args.export / name for name in MODEL_NAMES if (args.export / name).exists()]
    if not files:
        parser.error(f"there is no model file in {args.export}")
    spec = Model(files[0]).spec
    images, _ = test_images(spec, args.data_dir, args.images)
    arrays = {"x".join(map(str, images.shape[1:3])): images}
    arrays |= {f"{h}x{w}": enlarged(images, (h, w)) for h, w in SIZES}
    print(f"{args.export.name}: {len(images)} test images, {args.threads} threads\n")
    print(f"| engine, file | {' | '.join(arrays)} | changed | load, ms | run, ms | / onnxruntime |")
    print("|---|" + "---:|" * (len(arrays) + 4))
    with tempfile.TemporaryDirectory() as folder:
        inputs = str(Path(folder, "images.npz"))
        np.savez(inputs, **arrays)
        for name, (package, suffix, _) in RUNTIMES.items():
            if version(name) is None:
                print(f"| {name}: not installed (pip install {package}) |")
                continue
            for file in files:
                if file.suffix == suffix:
                    label = f"{name} {version(name)}, {file.name}"
                    row = in_a_process(name, file, inputs, args.threads)
                    if isinstance(row, str):
                        print(f"| {label}: {row} |", flush=True)
                    else:
                        print_row(label, row)


if __name__ == "__main__":
    main()
