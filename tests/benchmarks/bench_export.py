"""What shipping costs and keeps: int8 beside float32, exporting, the bundle's self-test. Run by
hand.

    python tests/benchmarks/bench_export.py runs/cifar10-airbench --threads 1

For each run: exports it as ONNX and as int8, each by itself, and as a bundle, into a temporary
directory, and prints what that took and what int8 saves and costs. Timings are the fastest fifth of
each file's, in turn. bench_engines.py compares engines.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from benchmarks.bench_robustness import test_images  # noqa: E402
from benchmarks.measure import Measured, fastest_fifth, run_measured  # noqa: E402
from benchmarks.results import (  # noqa: E402
    add_results_option,
    command_line,
    cpu_count,
    write_result,
)

from inference.predict import Model  # noqa: E402

BATCHES = (1, 64)
SELF_TESTS = 7


def export(
    run: Path,
    out: Path,
    data_dir: str | None,
    *arguments: str,
    program: Sequence = (ROOT / "step2_export.py",),
) -> Measured:
    """Export a run by step2, as its users do."""
    command = [sys.executable, *program, "--run", run.resolve(), "--out", out]
    if data_dir:
        command += ["--data-dir", data_dir]
    return run_measured([*command, *arguments])


def measure_speedups(folder: Path, images: np.ndarray, threads: int, seconds: float) -> dict:
    """How many times as fast model.int8.onnx is as model.onnx, for each of BATCHES."""
    float32 = Model(str(folder / "model.onnx"), threads=threads)
    int8 = Model(str(folder / "model.int8.onnx"), threads=threads)

    speedups = {}
    for size in BATCHES:
        batch = np.ascontiguousarray(images[:size])  # [size, H, W, C]
        runs = [lambda batch=batch: float32.predict(batch), lambda batch=batch: int8.predict(batch)]
        slow, fast = fastest_fifth(runs, seconds)
        speedups[str(size)] = {"float32_ms": slow, "int8_ms": fast, "speedup": slow / fast}
    return speedups


def time_self_test(archive: Path) -> float:
    """Seconds of --self-test of the unpacked bundle in a new process, the median of SELF_TESTS."""
    with tempfile.TemporaryDirectory() as edge:
        zipfile.ZipFile(archive).extractall(edge)
        (bundle,) = Path(edge).iterdir()
        (program,) = bundle.glob("step3_infer.py*")
        command = [sys.executable, program.name, "--self-test"]
        times = [run_measured(command, cwd=bundle).wall for _ in range(SELF_TESTS)]
    return statistics.median(times)


def bench_run(run: Path, args: argparse.Namespace, place: Path) -> dict:
    """Export one run and gather its figures."""
    folder = place / run.name
    onnx = export(run, folder, args.data_dir, "--format", "onnx")
    int8 = export(run, folder, args.data_dir, "--format", "onnx-int8")
    bundled = export(
        run, place / "bundled" / run.name, args.data_dir, "--bundle", "--format", "onnx"
    )
    (archive,) = (place / "bundled" / run.name).glob("*.zip")

    parity = json.loads((folder / "parity.json").read_text())
    quantized = parity["onnx-int8"]
    spec = Model(str(folder / "model.onnx")).spec
    images, _ = test_images(spec, args.data_dir, max(BATCHES))

    return {
        "run": run.name,
        "dataset": spec["dataset"],
        "model": spec["model"],
        "parameters": spec["parameters"],
        "images": quantized["samples"],
        "bytes": (folder / "model.onnx").stat().st_size,
        "int8_bytes": (folder / "model.int8.onnx").stat().st_size,
        "accuracy": quantized["accuracy_trained"],
        "int8_accuracy": quantized["accuracy"],
        "changed": round((1 - quantized["top1_agreement"]) * quantized["samples"]),
        "tried": len(quantized["tried"]),
        "quantization": quantized["quantization"],
        "threads": args.threads,
        "speedups": measure_speedups(folder, images, args.threads, args.seconds),
        "onnx_cpu": onnx.cpu,
        "onnx_wall": onnx.wall,
        "int8_cpu": int8.cpu,
        "int8_wall": int8.wall,
        "bundle_wall": bundled.wall,
        "self_test_wall": time_self_test(archive),
    }


def print_table(figures: dict) -> None:
    dataset = f"{figures['dataset']}, {figures['model']}, {figures['images']:,} test images"
    print(f"\n{figures['run']}: {dataset}, {figures['threads']} threads")
    print(f"int8: {figures['quantization']}, {figures['tried']} tried")
    print("\n| what | figure |\n|---|---:|")

    sizes = f"{figures['int8_bytes']:,} / {figures['bytes']:,} bytes"
    print(
        f"| int8 file / float32 file | {figures['int8_bytes'] / figures['bytes']:.4f} ({sizes}) |"
    )
    for size, times in figures["speedups"].items():
        print(f"| int8 throughput / float32 throughput, batch {size} | {times['speedup']:.2f} |")

    drop = 100 * (figures["accuracy"] - figures["int8_accuracy"])
    accuracy = f"{figures['accuracy']:.2%} -> {figures['int8_accuracy']:.2%}"
    changed = f"{figures['changed']} predictions changed"
    print(f"| int8 accuracy drop, points | {drop:.2f} ({accuracy}, {changed}) |")

    cpu = f"{figures['onnx_cpu']:.0f}, {figures['int8_cpu']:.0f}"
    print(f"| CPU seconds of exporting ONNX, int8 | {cpu} |")
    print(f"| --self-test of the bundle, seconds | {figures['self_test_wall']:.2f} |", flush=True)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="directories of runs")
    parser.add_argument("--data-dir", help="default: where step1 had it")
    parser.add_argument("--threads", type=int, default=cpu_count(), help="of the timings")
    parser.add_argument("--seconds", type=float, default=10, help="of each timing")
    add_results_option(parser)
    args = parser.parse_args()

    # Processes that this one starts take as many threads.
    os.environ["OMP_NUM_THREADS"] = str(args.threads)

    rows = []
    with tempfile.TemporaryDirectory() as parent:
        for run in args.runs:
            figures = bench_run(run, args, Path(parent))
            print_table(figures)
            rows.append(figures)

    write_result("export", {"runs": rows}, command_line(), args.results)


if __name__ == "__main__":
    main()
