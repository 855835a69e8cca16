"""The doctor for datasets: planted copies found, false alarms, and its time beside decoding. Run by hand.

    python tests/benchmarks/bench_doctor.py FOLDER

FOLDER holds images in train/<class>/ and test/<class>/. Into a copy of it in a temporary directory go 100
exact copies of training images and, for each way to change an image, as many changed copies, all of them as
test images; the pairs found without them are what the images themselves have, and worth a look. Seconds are
those of the processor, over all processes, as other programs disturb these least; wall time is shown, too.
"""

import argparse
import os
import resource
import shutil
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image, ImageEnhance

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

import data  # noqa: E402
from data import doctor  # noqa: E402

COUNT = 100  # planted images of a kind
CHANGES = {
    "JPEG of quality 75": lambda image, path: image.save(path, quality=75),
    "JPEG of quality 40": lambda image, path: image.save(path, quality=40),
    "1.5 times the size": lambda image, path: scaled(image, 1.5).save(path, quality=95),
    "three quarters of the size": lambda image, path: scaled(image, 0.75).save(path, quality=95),
    "20 % brighter": lambda image, path: ImageEnhance.Brightness(image).enhance(1.2).save(path, quality=95),
}


def scaled(image, factor):
    return image.resize([round(side * factor) for side in image.size], Image.Resampling.BICUBIC)


def seconds():
    """CPU seconds of this process and of the decoding processes that have ended, and the wall clock."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return np.array([sum(one.ru_utime + one.ru_stime for one in used), time.perf_counter()])


def examine(folder, cache, size):
    """The dataset as the doctor leaves it, and the seconds (CPU, wall) of decoding and of examining."""
    start = seconds()
    dataset = data.load("folder", str(folder), cache_dir=cache, image_size=size)
    decoded = seconds()
    dataset = doctor.examined(dataset)
    return dataset, decoded - start, seconds() - decoded


def plant(root):
    """Add changed copies of training images to the test split, each kind in files of one prefix."""
    rng, paths = np.random.default_rng(0), sorted((root / "train").glob("*/*"))
    chosen = rng.permutation(len(paths))[: COUNT * (1 + len(CHANGES))]
    for number, index in enumerate(chosen):
        path, kind = paths[index], number // COUNT
        place = root / "test" / path.parent.name
        if kind == 0:
            shutil.copy(path, place / f"planted-0-{number}{path.suffix}")
        else:
            with Image.open(path) as image:
                change = list(CHANGES.values())[kind - 1]
                change(image.convert("RGB"), place / f"planted-{kind}-{number}.jpg")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--image-size", type=int, metavar="N", help="default: that of the images, or 64")
    args = parser.parse_args()
    size = args.image_size and (args.image_size, args.image_size)
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary, "images")
        shutil.copytree(args.folder, root, copy_function=os.link if os.name == "posix" else shutil.copy)
        dataset, decoding, doctoring = examine(root, temporary, size)
        before = dataset.findings.leaked.sum()
        images = sum(len(getattr(dataset, f"{split}_images")) for split in ("train", "test"))
        print(f"{images:,} images; test images in train as they are: {before}")
        for name, one, other in zip(("CPU", "wall"), decoding, doctoring, strict=True):
            print(f"{name} seconds: decoding {one:.2f}, the doctor {other:.2f} ({other / one:.1%})")
        plant(root)
        dataset, _, _ = examine(root, temporary, size)
        names = [Path(path).name for path in dataset.paths["test"]]
        for kind, name in enumerate(("exact copies", *CHANGES)):
            planted = [n for n, path in enumerate(names) if path.startswith(f"planted-{kind}-")]
            found = dataset.findings.leaked[planted].sum()
            print(f"{name}: {found} of {len(planted)} found")


if __name__ == "__main__":
    main()
