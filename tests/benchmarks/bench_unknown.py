"""How well `known` of an exported file tells other kinds of pictures from its test images. Run by
hand.

    python tests/benchmarks/bench_unknown.py exports/NAME [MORE ...]

Prints for each kind the AUROC against the test split, in %, by `known` and by the largest
probability, and the share that a threshold which keeps 99 % calls unknown. Kinds: the synthetic
ones of step2, the bundled digits, crops of two pictures that matplotlib brings, and each directory
in MORE, with images in any folders.
"""

import argparse
import os
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path

import matplotlib
import numpy as np

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from benchmarks.bench_robustness import test_images  # noqa: E402
from benchmarks.results import add_results_option, command_line, write_result  # noqa: E402

import data  # noqa: E402
from deploy.comparing import predictions  # noqa: E402
from deploy.trust import known_threshold  # noqa: E402
from deploy.unknown import unknown_kinds  # noqa: E402
from inference.finding import find_images  # noqa: E402
from inference.images import decode_image  # noqa: E402
from inference.predict import Model  # noqa: E402

COUNT = 500  # images of a kind
PHOTOS = ("grace_hopper.jpg", "Minduka_Present_Blue_Pack.png")

# One array [n, H, W, channels], or a list of images [H, W, channels] of different sizes; all uint8.
Images = np.ndarray | list[np.ndarray]


def kinds(spec: dict, more: list[str]) -> Iterator[tuple[str, Images]]:
    """Name and images of each kind that the network was not trained on."""
    rng = np.random.default_rng(0)
    channels = spec["channels"]
    height, width = spec["image_size"]

    for name, images in unknown_kinds(height, width, channels, COUNT):
        if len(images) > 1:  # a single black or white image has no AUROC
            yield name, images

    if spec["dataset"] != "digits":
        digits = data.load("digits").test_images
        yield "bundled digits", np.repeat(digits, channels, axis=3)

    yield "photo crops", photo_crops(channels, rng)

    for folder in more:
        paths = [path for path, problem in find_images([folder], []) if problem is None]
        chosen = rng.permutation(len(paths))[:COUNT]
        images = [decode_image(paths[index], channels) for index in chosen]
        yield os.path.basename(os.path.abspath(folder)), images


def photo_crops(channels: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Squares of matplotlib's sample pictures, at random places and of random sizes."""
    samples = Path(matplotlib.get_data_path(), "sample_data")
    crops = []
    for photo in PHOTOS:
        pixels = decode_image(samples / photo, channels)  # [H, W, channels]
        height, width = pixels.shape[:2]
        for _ in range(COUNT // 2):
            side = rng.integers(32, min(height, width) // 2)
            top = rng.integers(0, height - side + 1)
            left = rng.integers(0, width - side + 1)
            crops.append(pixels[top : top + side, left : left + side])
    return crops


def scores(file: Model, images: Images) -> tuple[np.ndarray, np.ndarray]:
    """`known` [n], and the largest probability [n]."""
    if isinstance(images, np.ndarray):
        probabilities, known = predictions(file, images)
        return known, probabilities.max(1)

    all_known = []
    largest = []
    for image in images:
        probabilities, known = file.run(image[None])  # [1, classes], [1]
        all_known.append(known)
        largest.append(probabilities.max(1))
    return np.concatenate(all_known), np.concatenate(largest)


def auroc(lower: np.ndarray, higher: np.ndarray) -> float:
    """The chance that a value of `higher` [n] is above one of `lower` [m], ties counted half."""
    order = np.sort(lower)
    below = np.searchsorted(order, higher, "left")
    up_to = np.searchsorted(order, higher, "right")
    return float((below + up_to).mean() / 2 / len(lower))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "export", type=Path, help="an exported file, or the directory of model.onnx"
    )
    parser.add_argument("more", nargs="*", help="directories of images of other kinds")
    parser.add_argument("--data-dir", help="default: where step1 had it")
    parser.add_argument("--images", type=int, default=5000, metavar="N", help="test images to use")
    add_results_option(parser)
    args = parser.parse_intermixed_args()

    path = args.export / "model.onnx" if args.export.is_dir() else args.export
    file = Model(path)
    if not file.spec["known"]:
        sys.exit(f"error: {path} has no output known")

    limit = known_threshold(0.99)
    images, _ = test_images(file.spec, args.data_dir, args.images)
    familiar, sure = scores(file, images)
    kept = float(np.mean(familiar >= limit))
    print(f"{path}: keeps {kept:.2%} of the test images at 99 %\n")
    print("| kind | images | AUROC of known | of the largest probability | unknown |")
    print("|---|---:|---:|---:|---:|")

    rows = []
    for name, images in kinds(file.spec, args.more):
        known, probability = scores(file, images)
        row = {
            "kind": name,
            "images": len(images),
            "auroc": auroc(known, familiar),
            "auroc_of_probability": auroc(probability, sure),
            "unknown": float(np.mean(known < limit)),
        }
        rows.append(row)
        print(f"| {name} | {len(images)} | {cells(row)} |", flush=True)

    mean = {}
    for key in ("auroc", "auroc_of_probability", "unknown"):
        mean[key] = statistics.fmean(row[key] for row in rows)
    print(f"| mean | | {cells(mean)} |")

    figures = {"export": path.parent.name, "kept": kept, "kinds": rows, "mean": mean}
    write_result("unknown", figures, command_line(), args.results)


def cells(row: dict) -> str:
    values = (row["auroc"], row["auroc_of_probability"], row["unknown"])
    return " | ".join(f"{100 * value:.1f}" for value in values)


if __name__ == "__main__":
    main()
