"""What shipping costs and keeps: int8 beside float32, and the bundle's self-test. Run by hand.

    python tests/benchmarks/bench_export.py runs/cifar10-airbench --threads 1

Exports the run in four formats with a bundle, into a temporary directory, and prints the figures of int8 and
of the self-test. Timings are the fastest fifth of each file's, in turn. bench_engines.py compares engines.
"""

import argparse
import contextlib
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import step2_export  # noqa: E402
from deploy import int8  # noqa: E402
from inference.predict import Model  # noqa: E402

FORMATS = ("torchscript", "onnx", "onnx-int8", "pt2")


def export(run, data_dir, folder, threads):
    """Export a run in all formats and as a bundle, as users of step 2 do; returns (parity.json, seconds)."""
    torch.set_num_threads(threads)
    arguments = ["--run", str(run), "--out", str(folder), "--bundle", "--format", *FORMATS]
    if data_dir:
        arguments += ["--data-dir", data_dir]
    started = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        code = step2_export.main(arguments)
    if code:
        sys.exit("the export failed")
    return json.loads((folder / "parity.json").read_text()), time.perf_counter() - started


def speedups(folder, images, threads, seconds):
    """How many times as fast model.int8.onnx is as model.onnx, for batches of 1 and 64."""
    slow = Model(str(folder / "model.onnx"), threads=threads).predict
    fast = Model(str(folder / "model.int8.onnx"), threads=threads).predict
    return {n: int8.speedup(slow, fast, np.ascontiguousarray(images[:n]), seconds) for n in (1, 64)}


def cold_self_test(folder):
    """Seconds that --self-test of the unpacked bundle takes in a new process: (median of 7, the first)."""
    with tempfile.TemporaryDirectory() as edge:
        (archive,) = folder.glob("*.zip")
        zipfile.ZipFile(archive).extractall(edge)
        (unpacked,), times = Path(edge).iterdir(), []
        for _ in range(7):
            started = time.perf_counter()
            subprocess.run(
                [sys.executable, "step3_infer.py", "--self-test"],
                cwd=unpacked,
                check=True,
                capture_output=True,
            )
            times.append(time.perf_counter() - started)
    return statistics.median(times), times[0]


def int8_table(folder, figures, images, args):
    """Print what int8 saves and costs."""
    sizes = [(folder / name).stat().st_size for name in ("model.int8.onnx", "model.onnx")]
    print(f"int8: {figures['quantization']}, {len(figures['tried'])} tried\n\n| what | figure |\n|---|---:|")
    print(f"| int8 file / float32 file | {sizes[0] / sizes[1]:.4f} ({sizes[0]:,} / {sizes[1]:,} bytes) |")
    for n, times in speedups(folder, images, args.threads, args.seconds).items():
        print(f"| int8 throughput / float32 throughput, batch {n} | {times:.2f} |")
    accuracy = f"{figures['accuracy_trained']:.2%} -> {figures['accuracy']:.2%}"
    changed = f"{(1 - figures['top1_agreement']) * len(images):.0f} predictions changed"
    print(f"| int8 accuracy drop, points | {figures['drop']:.2f} ({accuracy}, {changed}) |", flush=True)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="a run's directory")
    parser.add_argument("--data-dir", help="default: where step1 had it")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--seconds", type=float, default=10, help="of each timing")
    args = parser.parse_args()
    started, run = time.perf_counter(), step2_export.read_run(str(args.run))
    images = np.asarray(step2_export.load_data(run, args.data_dir).test_images)
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / args.run.name
        parity, seconds = export(args.run, args.data_dir, folder, args.threads)
        spec = f"{run.spec['dataset']}, {run.spec['model']}, {len(images):,} test images"
        print(f"{args.run.name}: {spec}, {args.threads} threads, torch {torch.__version__}")
        int8_table(folder, parity["onnx-int8"], images, args)
        median, first = cold_self_test(folder)
        print(f"| export in all formats and bundle, seconds | {seconds:.0f} |")
        print(
            f"| --self-test of the bundle in a new process, seconds | {median:.2f} (the first {first:.2f}) |"
        )
    print(f"\n{time.perf_counter() - started:.0f} s in all")


if __name__ == "__main__":
    main()
