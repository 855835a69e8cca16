"""What shipping costs and keeps: int8 beside float32, and the file in every engine installed. Run by hand.

    python tests/benchmarks/bench_export.py runs/cifar10-airbench --threads 1

Exports the run in all formats with a bundle, into a temporary directory, and prints two tables: the figures of int8
and of the self-test, and the largest difference of a probability from the trained network in eager float32, by engine,
over the whole test split and over enlarged test images and noise. Timings are each one's quickest fifth, taken in turn.
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
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from runtimes import RUNTIMES, version  # noqa: E402

import data  # noqa: E402
import model  # noqa: E402
import step2_export  # noqa: E402
from deploy import int8  # noqa: E402
from step3_infer import Model  # noqa: E402

SIZES = ((64, 64), (57, 43), (480, 640), (3000, 4000))
SLOW = {"ONNX reference": 64}  # test images, where all of them would take hours


def export(run, place, threads):
    """All formats and the bundle of a run, by step 2 as its users call it. -> (directory, its parity.json)."""
    torch.set_num_threads(threads)
    arguments = [
        "--run",
        str(run),
        "--out",
        str(place),
        "--bundle",
        "--format",
        "torchscript",
        "onnx",
        "onnx-int8",
        "pt2",
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        code = step2_export.main([*arguments, "--keep-slower"])
    if code:
        sys.exit("the export failed")
    return json.loads((place / "parity.json").read_text())


def load(run, data_dir):
    """The run's data, as step 2 loads them."""
    spec = run.spec
    options = {name: spec["arguments"][name] for name in step2_export.LOADING[1:]}
    shape = {"image_size": tuple(spec["image_size"]), "channels": spec["channels"], "resize": model.resize}
    return data.load(spec["dataset"], data_dir or spec["arguments"]["data_dir"], **shape, **options)


def speedups(place, images, threads, seconds):
    """How many times as fast as model.onnx model.int8.onnx is, for batches of 1 and 64."""
    slow, fast = (
        Model(str(place / name), threads=threads).predict for name in ("model.onnx", "model.int8.onnx")
    )
    return {n: int8.speedup(slow, fast, np.ascontiguousarray(images[:n]), seconds) for n in (1, 64)}


def cold_self_test(place):
    """Seconds that --self-test of the unpacked bundle takes in a new process: (median of 7, the first)."""
    with tempfile.TemporaryDirectory() as edge:
        (archive,) = place.glob("*.zip")
        zipfile.ZipFile(archive).extractall(edge)
        (folder,), times = Path(edge).iterdir(), []
        for _ in range(7):
            started = time.perf_counter()
            subprocess.run(
                [sys.executable, "step3_infer.py", "--self-test"], cwd=folder, check=True, capture_output=True
            )
            times.append(time.perf_counter() - started)
    return statistics.median(times), times[0]


def enlarged(images, size):
    """A few test images, uint8 [N, H, W, C], at another size; one of noise comes last, which shows antialiasing."""
    count = 2 if size[0] > 1000 else 8
    pictures = [
        Image.fromarray(np.asarray(image).squeeze()).resize(size[::-1], Image.BICUBIC)
        for image in images[:count]
    ]
    smooth = np.stack([np.asarray(picture).reshape(*size, images.shape[3]) for picture in pictures])
    return smooth, np.random.default_rng(0).integers(0, 256, (1, *size, images.shape[3]), dtype=np.uint8)


def difference(predict, images, expected):
    """-> (largest difference of a probability, answers changed) over images in batches of 64, or of 1 if large."""
    step = 64 if images.shape[1] < 1000 else 1
    parts = [predict(np.ascontiguousarray(images[k : k + step])) for k in range(0, len(images), step)]
    got = np.concatenate(parts)
    return np.abs(got - expected).max(), int((got.argmax(1) != expected.argmax(1)).sum())


def engines_table(run, place, images, threads):
    """Print the differences, one row for each engine that is installed."""
    probes = {f"{h}x{w}": enlarged(images, (h, w)) for h, w in SIZES}
    expected = step2_export.reference(run, images)
    others = {name: [step2_export.reference(run, part) for part in parts] for name, parts in probes.items()}
    heads = [
        "engine",
        "test split",
        "changed",
        *(f"{name} {kind}" for name in probes for kind in ("image", "noise")),
    ]
    print("\n| " + " | ".join(heads) + " |\n|---|" + "---:|" * (len(heads) - 1))
    for name, (package, _, loader) in RUNTIMES.items():
        if version(name) is None:
            print(f"| {name}: not installed (pip install {package}) |")
            continue
        predict, n = loader(place, threads), SLOW.get(name, len(images))
        worst, changed = difference(predict, images[:n], expected[:n])
        cells = [f"{name} {version(name)}", f"{worst:.1e}", f"{changed} of {n:,}"]
        for size, parts in probes.items():
            for part, wanted in zip(parts, others[size], strict=True):
                skip = name in SLOW and part.shape[1] > 1000
                cells.append("-" if skip else f"{difference(predict, part, wanted)[0]:.1e}")
        print("| " + " | ".join(cells) + " |", flush=True)


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
    images = np.asarray(load(run, args.data_dir).test_images)
    with tempfile.TemporaryDirectory() as parent:
        place = Path(parent) / args.run.name
        figures = export(args.run, place, args.threads)["onnx-int8"]
        sizes = [(place / name).stat().st_size for name in ("model.int8.onnx", "model.onnx")]
        faster = speedups(place, images, args.threads, args.seconds)
        median, first = cold_self_test(place)
        print(
            f"{args.run.name}: {run.spec['dataset']}, {run.spec['model']}, {len(images):,} test images, ",
            end="",
        )
        print(f"{args.threads} threads, torch {torch.__version__}")
        print(
            f"int8: {figures['quantization']}, {len(figures['tried'])} tried\n\n| what | figure |\n|---|---:|"
        )
        print(f"| int8 file / float32 file | {sizes[0] / sizes[1]:.4f} ({sizes[0]:,} / {sizes[1]:,} bytes) |")
        for n, times in faster.items():
            print(f"| int8 throughput / float32 throughput, batch {n} | {times:.2f} |")
        before, after = figures["accuracy_trained"], figures["accuracy"]
        print(f"| int8 accuracy drop, points | {figures['drop']:.2f} ({before:.2%} -> {after:.2%}, ", end="")
        print(f"{(1 - figures['top1_agreement']) * len(images):.0f} answers changed) |")
        print(
            f"| --self-test of the bundle in a new process, seconds | {median:.2f} (the first {first:.2f}) |",
            flush=True,
        )
        engines_table(run, place, images, args.threads)
    print(f"\n{time.perf_counter() - started:.0f} s in all")


if __name__ == "__main__":
    main()
