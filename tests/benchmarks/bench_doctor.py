"""The doctor for datasets: planted copies found, false alarms, and its time beside decoding. Run by
hand.

    python tests/benchmarks/bench_doctor.py FOLDER

FOLDER holds images in train/<class>/ and test/<class>/. The script copies it to a temporary
directory and adds test images there: 100 exact copies of training images and, for each way to
change an image, as many changed copies. The pairs found before that are what the images themselves
have, and worth a look. Seconds are those of the processor, over all processes, as other programs
disturb these least; wall time is shown, too.
"""

import argparse
import os
import resource
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageEnhance

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from benchmarks.results import add_results_option, command_line, write_result  # noqa: E402

import data  # noqa: E402
from data import doctor  # noqa: E402

COUNT = 100  # planted images of a kind


def save_75(image: Image.Image, path: Path) -> None:
    image.save(path, quality=75)


def save_40(image: Image.Image, path: Path) -> None:
    image.save(path, quality=40)


def save_larger(image: Image.Image, path: Path) -> None:
    scale(image, 1.5).save(path, quality=95)


def save_smaller(image: Image.Image, path: Path) -> None:
    scale(image, 0.75).save(path, quality=95)


def save_brighter(image: Image.Image, path: Path) -> None:
    ImageEnhance.Brightness(image).enhance(1.2).save(path, quality=95)


def scale(image: Image.Image, factor: float) -> Image.Image:
    width, height = image.size
    size = (round(width * factor), round(height * factor))
    return image.resize(size, Image.Resampling.BICUBIC)


# Each way to change an image, and the function that saves an image so changed.
CHANGES = [
    ("JPEG of quality 75", save_75),
    ("JPEG of quality 40", save_40),
    ("1.5 times the size", save_larger),
    ("three quarters of the size", save_smaller),
    ("20 % brighter", save_brighter),
]
KINDS = ["exact copies", *(name for name, _ in CHANGES)]


@dataclass
class Seconds:
    cpu: float  # of this process and of the decoding processes that have ended
    wall: float

    def __sub__(self, other: "Seconds") -> "Seconds":
        return Seconds(cpu=self.cpu - other.cpu, wall=self.wall - other.wall)


def now() -> Seconds:
    cpu = 0.0
    for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN):
        usage = resource.getrusage(who)
        cpu += usage.ru_utime + usage.ru_stime
    return Seconds(cpu=cpu, wall=time.perf_counter())


def examine(folder: Path, cache: str, size: tuple[int, int] | None):
    """The dataset as the doctor leaves it, and the Seconds of decoding and of examining."""
    started = now()
    dataset = data.load(
        "folder",
        str(folder),
        cache_dir=cache,
        image_size=size,
    )
    decoded = now()
    dataset = doctor.examined(dataset)
    return dataset, decoded - started, now() - decoded


def link_or_copy(source: str, target: str) -> None:
    """Links are made at once, but only within one disk."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy(source, target)


def plant(root: Path) -> None:
    """Add copies of training images to the test split; the files of one kind share a prefix."""
    paths = sorted((root / "train").glob("*/*"))
    chosen = np.random.default_rng(0).permutation(len(paths))[: COUNT * len(KINDS)]

    for number, index in enumerate(chosen):
        path = paths[index]
        kind = number // COUNT
        place = root / "test" / path.parent.name

        if kind == 0:
            shutil.copy(path, place / f"planted-0-{number}{path.suffix}")
            continue
        _, save = CHANGES[kind - 1]
        with Image.open(path) as image:
            save(image.convert("RGB"), place / f"planted-{kind}-{number}.jpg")


def count_found(dataset) -> list[dict]:
    """How many planted images of each kind the doctor calls copies of training images."""
    names = [Path(path).name for path in dataset.paths["test"]]
    rows = []
    for kind, what in enumerate(KINDS):
        planted = [index for index, name in enumerate(names) if name.startswith(f"planted-{kind}-")]
        found = int(dataset.findings.leaked[planted].sum())
        print(f"{what}: {found} of {len(planted)} found")
        rows.append({"copies": what, "planted": len(planted), "found": found})
    return rows


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--image-size", type=int, metavar="N", help="default: that of the images, or 64"
    )
    add_results_option(parser)
    args = parser.parse_args()
    size = (args.image_size, args.image_size) if args.image_size else None

    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary, "images")
        shutil.copytree(args.folder, root, copy_function=link_or_copy)

        dataset, decoding, examining = examine(root, temporary, size)
        images = len(dataset.train_images) + len(dataset.test_images)
        leaked = int(dataset.findings.leaked.sum())
        print(f"{images:,} images; test images in train as they are: {leaked}")
        for name in ("cpu", "wall"):
            one = getattr(decoding, name)
            other = getattr(examining, name)
            print(f"{name} seconds: decoding {one:.2f}, the doctor {other:.2f} ({other / one:.1%})")

        plant(root)
        dataset, _, _ = examine(root, temporary, size)
        rows = count_found(dataset)

    figures = {
        "folder": args.folder.resolve().name,
        "images": images,
        "leaked": leaked,
        "decoding_cpu": decoding.cpu,
        "doctor_cpu": examining.cpu,
        "copies": rows,
    }
    write_result("doctor", figures, command_line(), args.results)


if __name__ == "__main__":
    main()
