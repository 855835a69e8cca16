"""Image files probed and decoded by all cores: what a worker does, and how the work is handed out."""

import contextlib
import math
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import NamedTuple

import numpy as np
from PIL import ExifTags
from tqdm import tqdm

from data import notes
from step3_infer import Problem, decode_image, open_image, usable_cpus

CHUNK = 256  # files a worker takes at a time
CHUNK_BYTES = 64 << 20  # of decoded pixels that a worker holds
# Forked workers start at once and share what is imported; only Linux' libraries all survive being forked.
START_METHOD = "fork" if sys.platform == "linux" else "spawn"
GREY_MODES = {"1", "L", "LA", "La", "I", "I;16", "I;16L", "I;16B", "I;16N"}
LARGEST_OWN_SIZE = 64  # images that are all of one size up to this keep it
FAR_SMALLER = 16  # an image of less than the median area divided by this is named
WHITES = (255, 1023, 4095, 16383, 65535)  # of 8, 10, 12, 14 and 16 bits


def run_parallel(function: Callable, jobs: list[tuple], total: int, title: str) -> Iterator:
    """Yield function(*job) for all jobs in any order, computed on all cores.

    The first item of a job is its list of files, which the progress bar counts up to `total`. Raises Problem.
    """
    workers = min(usable_cpus(), len(jobs), 61)  # Windows has no pool of more
    hidden = True if notes.silent else None  # None: unless standard error is a terminal
    with tqdm(total=total, desc=title, unit="file", leave=False, disable=hidden) as bar:
        if workers <= 1:
            for job in jobs:
                yield function(*job)
                bar.update(len(job[0]))
            return
        context = multiprocessing.get_context(START_METHOD)
        ignore = signal.SIGINT, signal.SIG_IGN  # the parent alone answers Ctrl-C
        with ProcessPoolExecutor(workers, context, signal.signal, ignore) as pool:
            try:
                futures = {pool.submit(function, *job): len(job[0]) for job in jobs}
                for future in as_completed(futures):
                    yield future.result()
                    bar.update(futures[future])
            except BrokenProcessPool:
                raise Problem("a decoding process was killed, perhaps because memory ran out") from None
            finally:
                pool.shutdown(cancel_futures=True)


def chunks(paths: list[str], row_bytes: int = 1) -> list[tuple[list[str], int]]:
    """[(some paths, the index of the first)], each few enough for one worker."""
    size = min(CHUNK, max(1, CHUNK_BYTES // row_bytes))
    return [(paths[start : start + size], start) for start in range(0, len(paths), size)]


class Found(NamedTuple):
    """What the headers of some files say, and the brightest of the 16-bit pixels, 0 without any.

    areas: in pixels, by the number of the file.
    """

    sizes: set[tuple[int, int]]  # (height, width)
    modes: set[str]  # Pillow's
    brightest: int
    areas: dict[int, int]


class Probed(NamedTuple):
    """What is known of all files: how many sizes they have, the smallest and the largest by area (height,
    width), the channels, the white level of 16-bit pixels, and the numbers of those that are far smaller than
    the rest."""

    sizes: int
    smallest: tuple[int, int]
    largest: tuple[int, int]
    channels: int
    white: int
    small: list[int]


def probe(paths: list[str], train: int) -> Probed:
    """Read the headers of all files.

    The images are grey (1 channel) if all files are. The white level is the smallest of WHITES that holds the
    pixels of the 16-bit files, of which only those of the training split count, the first `train` files.
    """
    sizes, modes, brightest, areas = set(), set(), 0, {}
    jobs = [(*chunk, train) for chunk in chunks(paths)]
    for some in run_parallel(probe_chunk, jobs, len(paths), "reading headers"):
        sizes, modes, brightest = sizes | some.sizes, modes | some.modes, max(brightest, some.brightest)
        areas |= some.areas
    by_area = sorted(sizes, key=lambda size: (math.prod(size), size)) or [(0, 0)]
    white = next(white for white in WHITES if brightest <= white) if brightest else WHITES[-1]
    channels = 1 if modes and modes <= GREY_MODES else 3
    usual = np.median(list(areas.values())) if areas else 0
    small = sorted(number for number, area in areas.items() if area < usual / FAR_SMALLER)
    return Probed(len(sizes), by_area[0], by_area[-1], channels, white, small)


def probe_chunk(paths: list[str], start: int, train: int) -> Found:
    """What is found in files from number `start` on, but those that cannot be read: decoding reports them."""
    sizes, modes, brightest, areas = set(), set(), 0, {}
    for number, path in enumerate(paths, start):
        if not os.path.isfile(path):  # opening a named pipe would block for ever
            continue
        with contextlib.suppress(Exception), open_image(path) as image:
            width, height = image.size
            # Pillow decodes a whole PNG for its EXIF; only small images keep their size.
            small = max(image.size) <= LARGEST_OWN_SIZE
            on_its_side = small and image.getexif().get(ExifTags.Base.Orientation, 1) >= 5
            sizes.add((width, height) if on_its_side else (height, width))
            modes.add(image.mode)
            areas[number] = width * height
            if image.mode.startswith("I") and number < train:
                pixels = np.asarray(image)
                if pixels.min() >= 0 and pixels.max() <= WHITES[-1]:
                    brightest = max(brightest, int(pixels.max()))
    return Found(sizes, modes, brightest, areas)


class Target(NamedTuple):
    """What every file is decoded to: uint8 [*image_size, channels], 16-bit `white` becoming 255."""

    image_size: tuple[int, int]  # height, width
    channels: int
    white: int

    def row_bytes(self) -> int:
        return self.image_size[0] * self.image_size[1] * self.channels


def decode_chunk(paths: list[str], start: int, file: str, target: Target, resize: Callable | None) -> list:
    """Decode files to the rows from `start` on of `file`; returns (index, reason) of those it cannot read."""
    block = np.zeros((len(paths), *target.image_size, target.channels), dtype=np.uint8)
    failures = []
    for row, path in enumerate(paths):
        try:
            image = decode_image(path, target.channels, target.white)
        except Problem as problem:
            failures.append((start + row, str(problem)))
            continue
        if image.shape[:2] != target.image_size:
            import torch  # here, because images that all have the right size do not need it

            if multiprocessing.parent_process() is not None:
                torch.set_num_threads(1)  # the workers already share the cores
            image = resize(torch.from_numpy(image.copy())[None], target.image_size)[0].round().byte().numpy()
        block[row] = image
    with open(file, "r+b") as stream:
        stream.seek(start * target.row_bytes())
        stream.write(block)
    return failures
