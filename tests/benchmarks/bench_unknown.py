"""How well `known` of an exported file tells other kinds of pictures from its test images. Run by hand.

    python tests/benchmarks/bench_unknown.py exports/NAME [MORE ...]

Prints for each kind the AUROC against the test split, in %, by `known` and by the largest probability, and
the share that a threshold which keeps 99 % calls unknown. Kinds: the synthetic ones of step2, the bundled
digits, crops of two pictures that matplotlib brings, and each directory in MORE, with images in any folders.
"""

import argparse
import os
import statistics
import sys
from pathlib import Path

import matplotlib
import numpy as np
from bench_robustness import test_images

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

import data  # noqa: E402
from deploy import unknown  # noqa: E402
from deploy.comparing import predictions, threshold  # noqa: E402
from inference.images import decode_image, find_images  # noqa: E402
from inference.predict import Model  # noqa: E402

COUNT = 500  # images of a kind
PHOTOS = ("grace_hopper.jpg", "Minduka_Present_Blue_Pack.png")


def kinds(spec: dict, more: list[str]):
    """(name, images uint8 [n, H, W, channels]), some of other sizes than the network's."""
    rng, channels = np.random.default_rng(0), spec["channels"]
    for name, images in unknown.unknown_kinds(*spec["image_size"], channels, COUNT):
        if len(images) > 1:
            yield name, images
    if spec["dataset"] != "digits":
        digits = data.load("digits").test_images
        yield "bundled digits", np.repeat(digits, channels, axis=3)
    samples, crops = Path(matplotlib.get_data_path(), "sample_data"), []
    for photo in PHOTOS:
        pixels = decode_image(samples / photo, channels)
        for _ in range(COUNT // 2):
            side = rng.integers(32, min(pixels.shape[:2]) // 2)
            top, left = (rng.integers(0, n - side + 1) for n in pixels.shape[:2])
            crops.append(pixels[top : top + side, left : left + side])
    yield "photo crops", crops
    for folder in more:
        paths = [path for path, problem in find_images([folder], []) if problem is None]
        chosen = rng.permutation(len(paths))[:COUNT]
        yield os.path.basename(os.path.abspath(folder)), [decode_image(paths[k], channels) for k in chosen]


def scores(file: Model, images) -> tuple[np.ndarray, np.ndarray]:
    """`known` [n], and the largest probability [n]."""
    if isinstance(images, np.ndarray):
        main, known = predictions(file, images)
    else:
        parts = [file.run(image[None]) for image in images]
        main, known = (np.concatenate(column) for column in zip(*parts, strict=True))
    return known, main.max(1)


def auroc(lower: np.ndarray, higher: np.ndarray) -> float:
    """The chance that a value of `higher` [n] is above one of `lower` [m], ties counted half."""
    order = np.sort(lower)
    left, right = (np.searchsorted(order, higher, side) for side in ("left", "right"))
    return float((left + right).mean() / 2 / len(lower))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("export", type=Path, help="an exported file, or the directory of model.onnx")
    parser.add_argument("more", nargs="*", help="directories of images of other kinds")
    parser.add_argument("--data-dir", help="default: where step1 had it")
    parser.add_argument("--images", type=int, default=5000, metavar="N", help="test images to use")
    args = parser.parse_intermixed_args()
    path = args.export / "model.onnx" if args.export.is_dir() else args.export
    file = Model(path)
    if not file.spec["known"]:
        sys.exit(f"error: {path} has no output known")
    familiar = scores(file, test_images(file.spec, args.data_dir, args.images)[0])
    kept = np.mean(familiar[0] >= threshold(0.99))
    print(f"{path}: keeps {kept:.2%} of the test images at 99 %\n")
    print(
        "| kind | images | AUROC of known | of the largest probability | unknown |\n|---|---:|---:|---:|---:|"
    )
    rows = []
    for name, images in kinds(file.spec, args.more):
        known, sure = scores(file, images)
        rows.append((auroc(known, familiar[0]), auroc(sure, familiar[1]), np.mean(known < threshold(0.99))))
        cells = " | ".join(f"{100 * value:.1f}" for value in rows[-1])
        print(f"| {name} | {len(images)} | {cells} |", flush=True)
    means = " | ".join(f"{100 * statistics.fmean(column):.1f}" for column in zip(*rows, strict=True))
    print(f"| mean | | {means} |")


if __name__ == "__main__":
    main()
