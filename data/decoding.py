"""Image files probed and decoded by all cores: what a worker does, and how the work is handed out."""

import contextlib
import math
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import NamedTuple

import numpy as np
from PIL import ExifTags
from tqdm import tqdm

from data import notes
from inference.cpus import usable_cpus
from inference.errors import Problem, problems
from inference.images import decode_image, open_image

CHUNK = 256  # files a worker takes at a time
# Forked workers start at once and share what is imported; only Linux' libraries all survive being forked.
START_METHOD = "fork" if sys.platform == "linux" else "spawn"
GREY_MODES = {"1", "L", "LA", "La", "I", "I;16", "I;16L", "I;16B", "I;16N"}
LARGEST_OWN_SIZE = 64  # images that are all of one size up to this keep it
FAR_SMALLER = 16  # an image of less than the median area divided by this is named
WHITES = (255, 1023, 4095, 16383, 65535)  # of 8, 10, 12, 14 and 16 bits


def run_parallel(function: Callable, paths: list[str], title: str, *more) -> Iterator:
    """Yield what function(some paths, the number of the first, *more) finds, for all paths, in their order.

    All cores compute it. Raises Problem.
    """
    jobs = [(paths[start : start + CHUNK], start, *more) for start in range(0, len(paths), CHUNK)]
    workers, run = min(usable_cpus(), len(jobs), 61), map  # Windows has no pool of more
    killed = "a decoding process was killed, perhaps because memory ran out"
    bar = tqdm(total=len(paths), desc=title, unit="file", leave=False, disable=notes.silent or None)
    with bar, contextlib.ExitStack() as stack, problems(killed, BrokenProcessPool, form="{}"):
        if workers > 1:
            context = multiprocessing.get_context(START_METHOD)
            ignore = signal.SIGINT, signal.SIG_IGN  # the parent alone answers Ctrl-C
            pool = stack.enter_context(ProcessPoolExecutor(workers, context, signal.signal, ignore))
            stack.callback(pool.shutdown, cancel_futures=True)
            run = pool.map
        for (some, *_), found in zip(jobs, run(function, *zip(*jobs, strict=True)), strict=True):
            yield from found
            bar.update(len(some))


class Header(NamedTuple):
    """What is read of a file before it is decoded."""

    number: int
    size: tuple[int, int]  # height, width
    mode: str  # Pillow's
    brightest: int  # of 16-bit pixels, else 0


class Probed(NamedTuple):
    """What is known of all files."""

    sizes: int  # how many different ones they have
    smallest: tuple[int, int]  # by area: height, width
    largest: tuple[int, int]
    channels: int
    white: int  # the level of 16-bit pixels that becomes 255
    small: list[int]  # the numbers of those that are far smaller than the rest


def probe(paths: list[str], train: int) -> Probed:
    """Read the headers of all files.

    The images are grey (1 channel) if all files are. The white level is the smallest of WHITES that holds the
    pixels of the 16-bit files, of which only those of the training split count, the first `train` files.
    """
    headers = list(run_parallel(probe_chunk, paths, "reading headers", train))
    if not headers:  # decoding says why
        return Probed(0, (0, 0), (0, 0), 3, WHITES[-1], [])
    sizes = sorted({header.size for header in headers}, key=lambda size: (math.prod(size), size))
    channels = 1 if {header.mode for header in headers} <= GREY_MODES else 3
    brightest = max(header.brightest for header in headers) or WHITES[-1]
    white = next(white for white in WHITES if brightest <= white)
    least = np.median([math.prod(header.size) for header in headers]) / FAR_SMALLER
    small = [header.number for header in headers if math.prod(header.size) < least]
    return Probed(len(sizes), sizes[0], sizes[-1], channels, white, small)


def probe_chunk(paths: list[str], start: int, train: int) -> list[Header]:
    """The headers of files from number `start` on, but those that cannot be read: decoding reports them."""
    headers = []
    for number, path in enumerate(paths, start):
        if not os.path.isfile(path):  # opening a named pipe would block for ever
            continue
        with contextlib.suppress(Exception), open_image(path) as image:
            width, height = image.size
            # Pillow decodes a whole PNG for its EXIF; only small images keep their size.
            small = max(image.size) <= LARGEST_OWN_SIZE
            on_its_side = small and image.getexif().get(ExifTags.Base.Orientation, 1) >= 5
            size = (width, height) if on_its_side else (height, width)
            headers.append(Header(number, size, image.mode, 0))
            if image.mode.startswith("I") and number < train:
                pixels = np.asarray(image)
                if pixels.min() >= 0 and pixels.max() <= WHITES[-1]:
                    headers[-1] = Header(number, size, image.mode, int(pixels.max()))
    return headers


class Target(NamedTuple):
    """What every file is decoded to: uint8 [*image_size, channels], 16-bit `white` becoming 255."""

    image_size: tuple[int, int]  # height, width
    channels: int
    white: int

    def row_bytes(self) -> int:
        return self.image_size[0] * self.image_size[1] * self.channels


def decode_chunk(paths: list[str], start: int, file: str, target: Target, resize: Callable | None) -> list:
    """Decode files to the rows from `start` on of `file`; returns (index, reason) of those it cannot read."""
    failures = []
    with open(file, "r+b") as stream:
        for index, path in enumerate(paths, start):
            try:
                image = decode_image(path, target.channels, target.white)
            except Problem as problem:
                failures.append((index, str(problem)))
                continue
            if image.shape[:2] != target.image_size:
                import torch  # here, because images that all have the right size do not need it

                if multiprocessing.parent_process() is not None:
                    torch.set_num_threads(1)  # the workers already share the cores
                tensor = torch.from_numpy(image.copy())[None]
                image = resize(tensor, target.image_size)[0].round().byte().numpy()
            stream.seek(index * target.row_bytes())
            stream.write(image.tobytes())
    return failures
