"""How an exported file does on its test images as a camera would change them. Run by hand.

    python tests/benchmarks/bench_robustness.py exports/NAME --images 2000

Prints accuracy, and the mean of the second output `known` if the file has one, for eleven everyday
changes at three strengths (deploy/camera.py), after Hendrycks and Dietterich (2019). A star marks
changes that no augmentation of the run resembles. Then the mean accuracy over nine changes, which
other networks were compared by. The images are taken evenly from the whole test split, which may be
sorted by class.
"""

import argparse
import statistics
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
from PIL import ImageFilter

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from benchmarks.results import (  # noqa: E402
    add_results_option,
    command_line,
    cpu_count,
    write_result,
)

import data  # noqa: E402
from deploy import camera  # noqa: E402
from deploy.comparing import predictions  # noqa: E402
from inference.predict import Model  # noqa: E402


def gaussian_blur(images: np.ndarray, radius: float, rng: np.random.Generator) -> np.ndarray:
    """Pillow's, of uint8 [n, H, W, C]."""

    def blur(image, _):
        return image.filter(ImageFilter.GaussianBlur(radius))

    return camera.change_each(images, blur)


NINE = [
    (camera.noise, 4),
    (camera.noise, 8),
    (camera.noise, 16),
    (gaussian_blur, 0.7),
    (camera.resolution, 0.5),
    (camera.jpeg, 30),
    (camera.rotation, 10),
    (camera.brightness, 0.6),
    (camera.contrast, 0.5),
]

# Which augmentation of --augment shows a network something like a change, for the changes that have
# one.
RESEMBLED_BY = {
    "pixel noise": "noise",
    "shot noise": "noise",
    "defocus": "blur",
    "lower resolution": "blur",
    "darker": "color",
    "brighter": "color",
    "contrast": "color",
    "shift": "translate",
    "rotation": "rotate",
}


def test_images(spec: dict, data_dir: str | None, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Up to `count` images and labels, evenly spread, of the test split of a run's spec."""
    dataset = data.load_for(spec, data_dir)
    total = len(dataset.test_images)
    taken = min(count, total)
    chosen = np.arange(taken) * total // taken
    return np.asarray(dataset.test_images[chosen]), np.asarray(dataset.test_labels)[chosen]


def survey(file: Model, images: np.ndarray, labels: np.ndarray) -> dict:
    """Accuracy and `known` unchanged, and for each change at its strengths; prints a table."""
    augment = file.spec["arguments"]["augment"]
    clean, *rows = camera.survey(partial(predictions, file), images, labels, (0, 1, 2))
    has_known = clean["known"] is not None

    known = f", known {clean['known']:.3f}" if has_known else ""
    print(f"unchanged: {clean['accuracy']:.2%}{known}\n")
    print("| change | mild | medium | strong |\n|---|---|---|---|")

    changes = []
    for name in camera.CHANGES:
        strengths = [row for row in rows if row["change"] == name]
        if not strengths:  # the images are too small for this change
            continue
        resembled = RESEMBLED_BY.get(name) in augment
        changes.append({"change": name, "resembled": resembled, "strengths": strengths})

        cells = []
        for row in strengths:
            known = f", known {row['known']:.3f}" if has_known else ""
            cells.append(f"{row['strength']}: {row['accuracy']:.2%}{known}")
        star = "" if resembled else " *"
        print(f"| {name}{star} | " + " | ".join(cells) + " |")

    return {"clean": clean, "changes": changes}


def mean_accuracy(changes: list[dict]) -> float:
    accuracies = [row["accuracy"] for change in changes for row in change["strengths"]]
    return statistics.fmean(accuracies)


def print_means(figures: dict) -> None:
    clean = figures["clean"]["accuracy"]
    unlike = [change for change in figures["changes"] if not change["resembled"]]
    for what, group in (("all changes", figures["changes"]), ("those with a star", unlike)):
        mean = mean_accuracy(group)
        print(f"\nmean of {what}: {mean:.2%}, {100 * (clean - mean):.2f} points lost")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "export", type=Path, help="an exported file, or the directory of model.onnx"
    )
    parser.add_argument("--data-dir", help="default: where step1 had it")
    parser.add_argument("--images", type=int, default=2000, metavar="N", help="test images to use")
    parser.add_argument("--threads", type=int, default=cpu_count())
    add_results_option(parser)
    args = parser.parse_args()
    started = time.perf_counter()

    path = args.export / "model.onnx" if args.export.is_dir() else args.export
    file = Model(path, threads=args.threads)
    if file.spec["task"] == "regression":
        sys.exit(f"error: {path} is a regression, which takes no images")

    images, labels = test_images(file.spec, args.data_dir, args.images)
    augment = " ".join(file.spec["arguments"]["augment"]) or "none"
    print(
        f"{path}: {file.spec['dataset']}, {len(images):,} test images, "
        f"trained with augment {augment}"
    )
    figures = survey(file, images, labels)
    print_means(figures)

    nine = []
    for function, strength in NINE:
        accuracy, _ = camera.measure(partial(predictions, file), images, labels, function, strength)
        nine.append(accuracy)
    listed = " ".join(f"{accuracy:.2%}" for accuracy in nine)
    print(f"mean of the nine: {statistics.fmean(nine):.2%} ({listed})")
    print(f"{time.perf_counter() - started:.0f} s")

    figures["export"] = path.parent.name
    figures["images"] = len(images)
    figures["augment"] = augment
    figures["nine"] = nine
    write_result("robustness", figures, command_line(), args.results)


if __name__ == "__main__":
    main()
