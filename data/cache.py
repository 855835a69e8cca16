"""Image files decoded once into a memory-mapped uint8 array, which later runs reuse.

A cache is two files: <key>.u8 with the pixels [N, height, width, channels], and <key>.json, written last,
with the shape and the files that could not be read. The key is a hash of the list of files with their sizes
and times and of the options. A changed folder therefore gets a new cache, and the old one is removed.
"""

import contextlib
import hashlib
import json
import mmap
import os
import time
from collections.abc import Callable

import numpy as np
import PIL

from data.decoding import chunks, decode_chunk, probe, run_parallel
from data.files import Options
from step3_infer import Problem, replacing, say

STALE = 24 * 3600  # seconds after which the temporary file of a killed build is removed


def load_images(paths: list[str], source: str, options: Options) -> tuple[np.ndarray, np.ndarray]:
    """Decode every file, or reuse the cache of an earlier run. Raises Problem.

    source: the directory or the CSV file that lists the files. Returns a uint8 memory map
    [kept, height, width, channels] and bool [len(paths)], which files were kept.
    """
    source = os.path.abspath(source)
    beside = source if os.path.isdir(source) else os.path.dirname(source)
    directory = options.cache_dir or os.path.join(beside, ".threestep")
    try:
        os.makedirs(directory, exist_ok=True)
        state = state_of(paths)
        image_size, channels = choose_shape(paths, os.path.join(directory, f"probe-{state}.json"), options)
        key = digest(json.dumps([source, *image_size, channels, PIL.__version__]))
        base = os.path.join(directory, f"{key}-{state}")
        if not is_whole(base):
            remove_outdated(directory, key, os.path.basename(base))
            build(paths, base, image_size, channels, options.resize)
        about = read_json(base + ".json")
        report_unreadable(paths, about["unreadable"], options.strict)
        pixels = np.memmap(base + ".u8", np.uint8, "c", shape=tuple(about["shape"]))
    except OSError as error:
        reason = error.strerror or error
        message = f"cannot keep the image cache in {directory}: {reason}; choose another --cache-dir"
        raise Problem(message) from None
    kept = np.ones(len(paths), dtype=bool)
    kept[[index for index, _ in about["unreadable"]]] = False
    return pixels, kept


def prefetch(images: np.ndarray, index: np.ndarray) -> None:
    """Ask the system to read the rows `index` of a memory map from disk, without waiting.

    Called for the next batch while this one computes; arrays in memory need nothing. The first call turns off
    the kernel's read-ahead, which for rows in random order reads mostly pages that are not needed (8 MB a row
    on one machine).
    """
    pages = getattr(images, "_mmap", None)
    if pages is None or not hasattr(mmap, "MADV_RANDOM"):
        return
    pages.madvise(mmap.MADV_RANDOM)
    row = images[0].nbytes
    first = images.ctypes.data - np.frombuffer(pages, np.uint8).ctypes.data
    for i in index:
        start = first + int(i) * row
        start, end = start - start % mmap.PAGESIZE, start + row
        pages.madvise(mmap.MADV_WILLNEED, start, end - start)


def digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:16]


def read_json(path: str):
    with open(path, encoding="utf-8") as file:
        return json.load(file)


def write_json(path: str, content) -> None:
    with replacing(path) as file:
        file.write(json.dumps(content).encode())


def state_of(paths: list[str]) -> str:
    """A hash of the files' paths, sizes and modification times; a missing file counts as such."""
    lines = []
    for path in paths:
        try:
            status = os.stat(path)
            lines.append(f"{path}\0{status.st_size}\0{status.st_mtime_ns}")
        except (OSError, ValueError):  # ValueError: a NUL in the path
            lines.append(f"{path}\0missing")
    return digest("\n".join(lines))


def choose_shape(paths: list[str], file: str, options: Options) -> tuple[tuple[int, int], int]:
    """The image size (height, width) and the channels: the given ones, or what suits the images.

    file: where what was found in the images is kept for later runs.
    """
    if options.image_size is not None and options.channels is not None:
        return options.image_size, options.channels
    own_size, channels = None, None
    with contextlib.suppress(FileNotFoundError, ValueError, TypeError):
        own_size, channels = read_json(file)
    if channels not in (1, 3) or not isinstance(own_size, list | None):
        own_size, channels = probe(paths)
        write_json(file, [own_size, channels])
    usual_size = (options.usual_size, options.usual_size)
    return options.image_size or tuple(own_size or usual_size), options.channels or channels


def is_whole(base: str) -> bool:
    """Is there a cache of this name, with as many bytes as its description says?"""
    try:
        about = read_json(base + ".json")
        indices = [index for index, _ in about["unreadable"]]
        whole = os.path.getsize(base + ".u8") == int(np.prod(about["shape"])) and len(about["shape"]) == 4
        return whole and all(isinstance(index, int) for index in indices)
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return False


def build(
    paths: list[str], base: str, image_size: tuple[int, int], channels: int, resize: Callable | None
) -> None:
    """Decode all files into <base>.u8 and describe it in <base>.json. Raises Problem or OSError.

    Each build writes to a file of its own and swaps it in, so that two at once do no harm.
    """
    row_bytes = image_size[0] * image_size[1] * channels
    temporary = f"{base}.{os.getpid()}.tmp"
    unreadable, started = [], time.perf_counter()
    try:
        with open(temporary, "w+b") as file:
            if hasattr(os, "posix_fallocate"):  # a full disk is found now, not in an hour
                os.posix_fallocate(file.fileno(), 0, row_bytes * len(paths))
            jobs = [(*chunk, temporary, image_size, channels, resize) for chunk in chunks(paths, row_bytes)]
            for failures in run_parallel(decode_chunk, jobs, len(paths), "decoding"):
                unreadable += failures
            unreadable.sort()
            refuse_mostly_unreadable(paths, unreadable)
            kept = close_gaps(file, {index for index, _ in unreadable}, len(paths), row_bytes)
            file.truncate(kept * row_bytes)
            os.fsync(file.fileno())
        os.replace(temporary, base + ".u8")
        about = {"shape": [kept, *image_size, channels], "unreadable": unreadable}
        write_json(base + ".json", about)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
    seconds = time.perf_counter() - started
    rate = f"{len(paths) / seconds:,.0f} a second"
    say(f"decoded {len(paths):,} files in {seconds:.1f} s ({rate}), cached for later runs")


def refuse_mostly_unreadable(paths: list[str], unreadable: list[tuple[int, str]]) -> None:
    """Raise Problem if more than half of the files cannot be read: the list is wrong then, not the files."""
    if 2 * len(unreadable) > len(paths):
        index, reason = unreadable[0]
        count = f"{len(unreadable):,} of {len(paths):,} files cannot be read"
        raise Problem(f"{count}, the first: {paths[index]} {reason}")


def close_gaps(file, missing: set[int], count: int, row_bytes: int) -> int:
    """Move the rows after each missing one up, in place. Returns the number of rows that are left."""
    if not missing:
        return count
    pixels = np.memmap(file, np.uint8, "r+", shape=(count, row_bytes))
    target = 0
    for source in range(count):
        if source not in missing:
            if source != target:
                pixels[target] = pixels[source]
            target += 1
    pixels.flush()
    return target


def report_unreadable(paths: list[str], unreadable: list[tuple[int, str]], strict: bool) -> None:
    """Name the files that were left out, each with its reason. Raises Problem if `strict`."""
    for index, reason in unreadable:
        say(f"left out: {paths[index]} {reason}")
    if unreadable and strict:
        count = f"{len(unreadable)} of {len(paths):,} files cannot be read"
        raise Problem(f"{count} and --strict was given: repair or remove them")


def remove_outdated(directory: str, key: str, current: str) -> None:
    """Remove caches with these options of an earlier state of the files, and what killed builds left.

    Those of the name `current` stay: another run may be publishing them at this moment.
    """
    for entry in os.scandir(directory):
        stale = entry.name.endswith(".tmp") and time.time() - entry.stat().st_mtime > STALE
        cached = entry.name.startswith(key) and entry.name.endswith((".u8", ".json"))
        if stale or (cached and not entry.name.startswith(current)):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(entry.path)
