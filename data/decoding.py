"""Image files probed and decoded by all cores: what a worker does, and how the work is handed out."""

import contextlib
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool

import numpy as np
from PIL import Image
from tqdm import tqdm

from step3_infer import ORIENTATION, Problem, decode_image, usable_cpus

CHUNK = 256  # files a worker takes at a time
CHUNK_BYTES = 64 << 20  # of decoded pixels that a worker holds
GREY_MODES = {"1", "L", "LA", "La", "I", "I;16", "I;16L", "I;16B", "I;16N"}
LARGEST_OWN_SIZE = 64  # images that are all of one size up to this keep it


def run_parallel(function: Callable, jobs: list[tuple], total: int, title: str) -> Iterator:
    """Yield function(*job) for all jobs in any order, computed on all cores.

    The first item of a job is its list of files, which the progress bar counts; `total` is their number.
    Raises Problem.
    """
    workers = usable_cpus()
    with tqdm(total=total, desc=title, unit="file", leave=False, disable=None) as bar:
        if workers == 1 or len(jobs) == 1:
            for job in jobs:
                yield function(*job)
                bar.update(len(job[0]))
            return
        forking = "fork" in multiprocessing.get_all_start_methods()
        context = multiprocessing.get_context("fork" if forking else "spawn")
        # The workers ignore SIGINT: the parent alone answers Ctrl-C.
        ignore = (signal.SIGINT, signal.SIG_IGN)
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


def probe(paths: list[str]) -> tuple[tuple[int, int] | None, int]:
    """The size (height, width) and the number of channels that suit the files, from their headers.

    The size is None if the files differ in size or are larger than 64 pixels; the images are grey (1 channel)
    if all files are.
    """
    sizes, modes = set(), set()
    for chunk_sizes, chunk_modes in run_parallel(probe_chunk, chunks(paths), len(paths), "reading headers"):
        sizes |= chunk_sizes
        modes |= chunk_modes
    size = sizes.pop() if len(sizes) == 1 else None
    own = size if size and max(size) <= LARGEST_OWN_SIZE else None
    return own, 1 if modes and modes <= GREY_MODES else 3


def probe_chunk(paths: list[str], start: int) -> tuple[set, set]:
    """The sizes and the modes in the headers of some files; decoding reports those that cannot be read."""
    sizes, modes = set(), set()
    for path in paths:
        if not os.path.isfile(path):  # opening a named pipe would block for ever
            continue
        with contextlib.suppress(Exception), Image.open(path) as image:
            width, height = image.size
            on_its_side = image.getexif().get(ORIENTATION, 1) >= 5
            sizes.add((width, height) if on_its_side else (height, width))
            modes.add(image.mode)
    return sizes, modes


def decode_chunk(
    paths: list[str], start: int, file: str, image_size: tuple[int, int], channels: int, resize: Callable
) -> list[tuple[int, str]]:
    """Decode some files and write them to the rows from `start` on of `file`.

    Returns (index, reason) of those that cannot be read.
    """
    block = np.zeros((len(paths), *image_size, channels), dtype=np.uint8)
    failures = []
    for row, path in enumerate(paths):
        try:
            image = decode_image(path, channels)
        except Problem as problem:
            failures.append((start + row, str(problem)))
            continue
        if image.shape[:2] != tuple(image_size):
            image = resize_one(image, image_size, resize)
        block[row] = image
    with open(file, "r+b") as stream:
        stream.seek(start * block[0].nbytes)
        stream.write(block)
    return failures


def resize_one(image: np.ndarray, image_size: tuple[int, int], resize: Callable) -> np.ndarray:
    """One uint8 image [height, width, channels], resized."""
    import torch  # here, because images that all have the right size do not need it

    if multiprocessing.parent_process() is not None:
        torch.set_num_threads(1)  # the workers already share the cores
    return resize(torch.from_numpy(image.copy())[None], image_size)[0].numpy()
