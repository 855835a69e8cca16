"""An exported directory in every engine that is installed: do they agree, and how fast are they?
Run by hand.

    python tests/benchmarks/bench_engines.py exports/NAME --images 200 --threads 1

Runs each model file of the directory in each engine that takes it, in a process of its own, because
engines crash: on test images of the network's own size, and on a few of them enlarged to six sizes
with noise of 30 grey levels, which shows missing antialiasing. Files of fixed size are given what
step3 resizes them to.

Prints a row for each engine and file: the largest difference of a probability from onnxruntime with
the same file at each size, how many answers changed, and the time to load and to run one image of
the network's size, the fastest fifth, with onnxruntime's time for the same file, taken in turn with
it. An ExecuTorch or LiteRT file is compared with model.fixed.onnx.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from benchmarks.measure import fastest_fifth  # noqa: E402
from benchmarks.results import (  # noqa: E402
    add_results_option,
    command_line,
    cpu_count,
    write_result,
)
from runtimes import RUNTIMES, onnxruntime, version  # noqa: E402

from inference.engines import MODEL_NAMES  # noqa: E402
from inference.images import fit_to_input  # noqa: E402
from inference.predict import Model  # noqa: E402

SIZES = ((64, 64), (57, 43), (20, 27), (32, 300), (480, 640), (3000, 4000))  # height, width
NOISE = 30  # grey levels
SECONDS = 2  # of a timing
MEGAPIXEL = 1 << 20
BATCH = 32  # of a file that takes any


def enlarge(images: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The first eight images (one if the size is large) enlarged, noisy: uint8 [n, *size, C]."""
    rng = np.random.default_rng(0)
    height, width = size
    count = 8 if height * width < MEGAPIXEL else 1

    enlarged = []
    for image in images[:count]:
        picture = Image.fromarray(image.squeeze()).resize((width, height), Image.Resampling.BICUBIC)
        pixels = np.asarray(picture, np.float32).reshape(height, width, images.shape[3])
        noisy = pixels + rng.normal(0, NOISE, pixels.shape)
        enlarged.append(np.clip(noisy, 0, 255).astype(np.uint8))
    return np.stack(enlarged)


def fixed_batch(spec: dict) -> int | None:
    """The only batch size that a file takes, or None if it takes any."""
    return spec["fixed"]["batch"] if spec["fixed"] else None


def run_batches(run, images: np.ndarray, batch: int | None) -> np.ndarray:
    """Probabilities of images [N, H, W, C], in batches of BATCH.

    batch: the only size that the file takes; the last batch is filled up to it.
    """
    size = batch or BATCH
    parts = []
    for start in range(0, len(images), size):
        part = images[start : start + size]
        missing = size - len(part) if batch else 0
        filled = np.concatenate([part, part[:1].repeat(missing, 0)])
        parts.append(run(np.ascontiguousarray(filled)))
    return np.concatenate(parts)[: len(images)]


def measure(name: str, file: str, beside: str, inputs: str, threads: int) -> dict:
    """What one engine does with one file, as a row: `max` by size, `changed`, `answers`, and times
    in ms.

    beside: the ONNX file whose answers in onnxruntime are right, and which onnxruntime is timed
    with. inputs: an .npz of uint8 images [N, H, W, C] by size.
    """
    _, _, load = RUNTIMES[name]
    started = time.perf_counter()
    run = load(file, threads)
    row = {"load": 1000 * (time.perf_counter() - started), "max": {}, "changed": 0, "answers": 0}

    spec = Model(file, threads).spec
    expected_spec = Model(beside, threads).spec
    run_expected = onnxruntime(beside, threads)
    arrays = np.load(inputs)

    for size in arrays.files:
        images = fit_to_input(arrays[size], spec)
        try:
            probabilities = run_batches(run, images, fixed_batch(spec))  # [N, classes]
        except Exception as error:  # engines raise anything
            row["max"][size] = type(error).__name__
            continue
        expected_images = fit_to_input(arrays[size], expected_spec)
        expected = run_batches(run_expected, expected_images, fixed_batch(expected_spec))

        row["max"][size] = float(np.abs(probabilities - expected).max())
        row["changed"] += int((probabilities.argmax(1) != expected.argmax(1)).sum())
        row["answers"] += len(images)

    native = arrays[arrays.files[0]]
    one = fit_to_input(native[: fixed_batch(spec) or 1], spec)
    row["run"], row["onnxruntime"] = fastest_fifth(
        [lambda: run(one), lambda: run_expected(one)], SECONDS
    )
    return row


def print_row(label: str, row: dict) -> None:
    cells = []
    for worst in row["max"].values():
        cells.append(worst if isinstance(worst, str) else f"{worst:.0e}")
    times = f"{row['load']:.0f} | {row['run']:.2f} | {row['run'] / row['onnxruntime']:.2f}"
    changed = f"{row['changed']} of {row['answers']}"
    print(f"| {label} | {' | '.join(cells)} | {changed} | {times} |", flush=True)


def measure_in_process(name: str, file: Path, inputs: str, threads: int) -> dict | str:
    """What measure() returns in a new process, or why there is no row."""
    beside = file if file.suffix == ".onnx" else file.with_name("model.onnx")
    if file.suffix in (".pte", ".tflite"):
        beside = file.with_name("model.fixed.onnx")

    command = [sys.executable, __file__, "--one", name, str(file), str(beside), inputs]
    command += ["--threads", str(threads)]
    done = subprocess.run(command, capture_output=True, text=True)

    # Engines print what they like; the row is the last line that is an object.
    rows = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if rows:
        return json.loads(rows[-1])
    if done.returncode < 0:
        return f"crashed, signal {-done.returncode}"
    complaints = [line for line in done.stderr.splitlines() if line.strip()]
    return complaints[-1][:100] if complaints else "failed without a message"


def measure_all(files: list[Path], arrays: dict[str, np.ndarray], threads: int) -> list[dict]:
    """A row for each engine and each file that it takes; prints them."""
    measured = []
    with tempfile.TemporaryDirectory() as folder:
        inputs = str(Path(folder, "images.npz"))
        np.savez(inputs, **arrays)

        for name, (package, suffix, _) in RUNTIMES.items():
            if version(name) is None:
                print(f"| {name}: not installed (pip install {package}) |")
                continue
            for file in files:
                if file.suffix != suffix:
                    continue
                label = f"{name} {version(name)}, {file.name}"
                row = measure_in_process(name, file, inputs, threads)
                about = {"engine": name, "version": version(name), "file": file.name}
                if isinstance(row, str):
                    print(f"| {label}: {row} |", flush=True)
                    # The rest of a message names paths of this machine.
                    measured.append({**about, "failed": row.split(":")[0]})
                else:
                    print_row(label, row)
                    measured.append({**about, **row})
    return measured


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("export", type=Path, nargs="?", help="the directory of an export")
    parser.add_argument("--data-dir", help="default: where step1 had it")
    parser.add_argument("--images", type=int, default=200, metavar="N", help="test images to use")
    parser.add_argument("--threads", type=int, default=cpu_count())
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    add_results_option(parser)
    args = parser.parse_args()

    if args.one:  # in the process of one engine
        print("\n" + json.dumps(measure(*args.one, args.threads)))
        return

    # It imports torch, which the processes of the engines must not have to.
    from benchmarks.bench_robustness import test_images

    names = (*MODEL_NAMES, "model.pt", "model.pt2", "model.pte", "model.tflite")
    files = [args.export / name for name in names if (args.export / name).exists()]
    if not files:
        parser.error(f"there is no model file in {args.export}")
    spec = Model(files[0]).spec
    images, _ = test_images(spec, args.data_dir, args.images)

    height, width = images.shape[1:3]
    arrays = {f"{height}x{width}": images}
    for size in SIZES:
        arrays[f"{size[0]}x{size[1]}"] = enlarge(images, size)

    print(f"{args.export.name}: {len(images)} test images, {args.threads} threads\n")
    print(f"| engine, file | {' | '.join(arrays)} | changed | load, ms | run, ms | / onnxruntime |")
    print("|---|" + "---:|" * (len(arrays) + 4))
    rows = measure_all(files, arrays, args.threads)

    figures = {
        "export": args.export.resolve().name,
        "images": len(images),
        "threads": args.threads,
        "sizes": list(arrays),
        "rows": rows,
    }
    write_result("engines", figures, command_line(), args.results)


if __name__ == "__main__":
    main()
