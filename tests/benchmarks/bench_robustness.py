"""How an exported file does on its test images as a camera would change them. Run by hand.

    python tests/benchmarks/bench_robustness.py exports/NAME --images 2000

Prints accuracy, and the mean of the second output `known` if the file has one, for eleven everyday changes at
three strengths (deploy/camera.py), after Hendrycks and Dietterich (2019). A star marks changes that no
augmentation of the run resembles. Then the mean accuracy over nine changes, which other networks were
compared by. The images are taken evenly from the whole test split, which may be sorted by class.
"""

import argparse
import os
import statistics
import sys
import time
from pathlib import Path

import numpy as np
from PIL import ImageFilter

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

import data  # noqa: E402
from deploy import camera  # noqa: E402
from inference.predict import Model  # noqa: E402


def gaussian_blur(images: np.ndarray, radius: float, rng: np.random.Generator) -> np.ndarray:
    """Pillow's, of uint8 [n, H, W, C]."""
    return camera.each(images, lambda image, _: image.filter(ImageFilter.GaussianBlur(radius)))


NINE = (
    *((camera.noise, sigma) for sigma in (4, 8, 16)),
    (gaussian_blur, 0.7),
    (camera.resolution, 0.5),
    (camera.jpeg, 30),
    (camera.rotation, 10),
    (camera.brightness, 0.6),
    (camera.contrast, 0.5),
)
# Which augmentation of --augment shows a network something like a change, for those that have one.
RESEMBLED_BY = {
    **dict.fromkeys(("pixel noise", "shot noise"), "noise"),
    **dict.fromkeys(("defocus", "lower resolution"), "blur"),
    **dict.fromkeys(("darker", "brighter", "contrast"), "color"),
    "shift": "translate",
    "rotation": "rotate",
}


def test_images(spec: dict, data_dir: str | None, count: int) -> tuple[np.ndarray, np.ndarray]:
    """So many images and labels of the test split that the run of this spec had, evenly spread over it."""
    dataset = data.load_for(spec, data_dir)
    total = len(dataset.test_images)
    chosen = np.arange(min(count, total)) * total // min(count, total)
    return np.asarray(dataset.test_images[chosen]), np.asarray(dataset.test_labels)[chosen]


def print_table(file: Model, images: np.ndarray, labels: np.ndarray) -> None:
    """One line for each change: accuracy, lost points and `known` at each strength."""
    augment, rows = file.spec["arguments"]["augment"], list(camera.survey(file, images, labels, (0, 1, 2)))
    clean, rows = rows[0], rows[1:]
    known = "" if clean["known"] is None else f", known {clean['known']:.3f}"
    print(
        f"unchanged: {clean['accuracy']:.2%}{known}\n\n| change | mild | medium | strong |\n|---|---|---|---|"
    )
    for name in camera.CHANGES:
        cells = [row for row in rows if row["change"] == name]
        texts = [f"{row['strength']}: {row['accuracy']:.2%}" for row in cells]
        if clean["known"] is not None:
            texts = [f"{text}, known {row['known']:.3f}" for text, row in zip(texts, cells, strict=True)]
        star = "" if RESEMBLED_BY.get(name) in augment else " *"
        print(f"| {name}{star} | " + " | ".join(texts) + " |")
    unlike = [row for row in rows if RESEMBLED_BY.get(row["change"]) not in augment]
    for what, group in (("all changes", rows), ("those with a star", unlike)):
        mean = statistics.fmean(row["accuracy"] for row in group)
        print(f"\nmean of {what}: {mean:.2%}, {100 * (clean['accuracy'] - mean):.2f} points lost")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("export", type=Path, help="an exported file, or the directory of model.onnx")
    parser.add_argument("--data-dir", help="default: where step1 had it")
    parser.add_argument("--images", type=int, default=2000, metavar="N", help="test images to use")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    args = parser.parse_args()
    started = time.perf_counter()
    path = args.export / "model.onnx" if args.export.is_dir() else args.export
    file = Model(path, threads=args.threads)
    if file.spec["task"] == "regression":
        sys.exit(f"error: {path} is a regression, which takes no images")
    images, labels = test_images(file.spec, args.data_dir, args.images)
    augment = " ".join(file.spec["arguments"]["augment"]) or "none"
    print(f"{path}: {file.spec['dataset']}, {len(images):,} test images, trained with augment {augment}")
    print_table(file, images, labels)
    nine = [camera.measure(file, images, labels, *change)[0] for change in NINE]
    print(f"mean of the nine: {statistics.fmean(nine):.2%} (" + " ".join(f"{x:.2%}" for x in nine) + ")")
    print(f"{time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
