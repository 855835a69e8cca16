"""Image files decoded once into a memory-mapped uint8 array, which later runs reuse.

A cache is two files: <key>.u8 with the pixels [N, height, width, channels], and <key>.json, written last,
with the shape and the files that could not be read. The key is a hash of the list of files with their sizes
and times and of the options. A changed folder therefore gets a new cache, and the old one is removed.
"""

import contextlib
import functools
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL

from data.dataset import digest
from data.decoding import (
    LARGEST_OWN_SIZE,
    WHITES,
    Probed,
    Target,
    decode_chunk,
    probe,
    run_parallel,
)
from data.files import Options, name_some
from data.notes import note
from inference.errors import Problem, problems
from inference.files import replacing

STALE = 24 * 3600  # seconds after which the temporary file of a killed build is removed


def load_images(paths: list[str], train: int, source: str, options: Options) -> tuple:
    """Decode every file, or reuse the cache of an earlier run. Raises Problem.

    train: how many of the files, the first ones, are for training. source: their directory or CSV file.
    Returns which files could be read, bool [files]; their pixels, a uint8 memory map [n, height, width,
    channels]; their sizes in bytes, int64 [n]; and the level of 16-bit pixels that became 255.
    """
    source = os.path.abspath(source)
    directory = directory_for(source, options.cache_dir)
    failure, form = f"cannot keep the image cache in {directory}", "{}: {}; choose another --cache-dir"
    with problems(failure, OSError, form=form):
        os.makedirs(directory, exist_ok=True)
        state, sizes = state_of(paths)
        target = choose_target(paths, train, os.path.join(directory, f"probe-{state}-{train}.json"), options)
        key = digest(json.dumps([source, *target, options.fit, PIL.__version__]).encode())
        base = os.path.join(directory, f"{key}-{state}")
        if not is_whole(base):
            remove_outdated(directory, key, os.path.basename(base))
            resize = options.resize and functools.partial(options.resize, fit=options.fit)
            build(paths, base, target, resize)
        about = read_json(base + ".json")
        for index, reason in about["unreadable"]:
            note(f"left out: {paths[index]} {reason}")
        if about["unreadable"] and options.strict:
            refuse(paths, about["unreadable"], "; --strict was given: repair or remove them")
        pixels = np.memmap(base + ".u8", np.uint8, "c", shape=tuple(about["shape"]))
    kept = np.ones(len(paths), dtype=bool)
    kept[[index for index, _ in about["unreadable"]]] = False
    return kept, pixels, sizes[kept], target.white


def directory_for(source: str, cache_dir: str | None) -> str:
    """Where to keep what is computed of a directory or a file: in --cache-dir, or beside it."""
    beside = source if os.path.isdir(source) else os.path.dirname(source)
    return cache_dir or os.path.join(beside, ".threestep")


def read_json(path: str):
    return json.loads(Path(path).read_text(encoding="utf-8"))


def write_json(path: str, content) -> None:
    with replacing(path) as file:
        file.write(json.dumps(content).encode())


def state_of(paths: list[str]) -> tuple[str, np.ndarray]:
    """A hash of the files' paths, sizes and modification times, and the sizes, 0 for a missing file."""
    lines, sizes = [], np.zeros(len(paths), dtype=np.int64)
    for index, path in enumerate(paths):
        try:
            status = os.stat(path)
            sizes[index] = status.st_size
            lines.append(f"{path}\0{status.st_size}\0{status.st_mtime_ns}")
        except (OSError, ValueError):  # ValueError: a NUL in the path
            lines.append(f"{path}\0missing")
    return digest("\n".join(lines).encode("utf-8", "surrogateescape")), sizes


def choose_target(paths: list[str], train: int, file: str, options: Options) -> Target:
    """What to decode to, as the options say or as it suits the images; found in `file` by later runs."""
    if None not in (options.image_size, options.channels, options.white):
        return Target(tuple(options.image_size), options.channels, options.white)
    found = None
    with contextlib.suppress(FileNotFoundError, ValueError, TypeError):
        found = Probed(**read_json(file))
    if found is None or found.channels not in (1, 3) or found.white not in WHITES:
        found = probe(paths, train)
        write_json(file, found._asdict())
    white, small = found.white, [paths[number] for number in found.small]
    if small:
        count = f"{len(small):,} image{'s' if len(small) > 1 else ''}"
        note(f"far smaller than the others, a 16th of their area or less: {count}, {name_some(small)}")
    if options.white is None and white != WHITES[-1]:
        note(f"the 16-bit images use {white.bit_length()} bits only: {white} is taken as white")
    size = options.image_size or choose_size(found, options.usual_size, options.fit)
    return Target(tuple(size), options.channels or found.channels, options.white or white)


def choose_size(found: Probed, usual_size: int, fit: str) -> tuple[int, int]:
    """The size (height, width) of images that are all small and of one size; else, noted, the usual size."""
    smallest, largest, size = tuple(found.smallest), tuple(found.largest), (usual_size, usual_size)
    if found.sizes == 1 and max(largest) <= LARGEST_OWN_SIZE:
        return largest
    if found.sizes and (smallest, largest) != (size, size):
        low, high = ("{1}x{0}".format(*shape) for shape in (smallest, largest))
        have = f"{low} pixels" if found.sizes == 1 else f"{found.sizes:,} sizes, {low} to {high} pixels"
        resized = f"resized to {usual_size}x{usual_size} (--image-size) by --fit {fit}"
        note(f"the images have {have}; they are {resized}")
    return size


def is_whole(base: str) -> bool:
    """Is there a cache of this name, with as many bytes as its description says?"""
    try:
        about = read_json(base + ".json")
        whole = os.path.getsize(base + ".u8") == int(np.prod(about["shape"])) and len(about["shape"]) == 4
        return whole and all(isinstance(index, int) for index, _ in about["unreadable"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return False


def build(paths: list[str], base: str, target: Target, resize: Callable | None) -> None:
    """Decode all files into <base>.u8 and describe it in <base>.json. Raises Problem or OSError.

    Each build writes to a file of its own and swaps it in, so that two at once do no harm. A whole cache is
    never replaced, because other runs may have mapped it: Windows refuses that.
    """
    temporary, row_bytes, started = f"{base}.{os.getpid()}.tmp", target.row_bytes(), time.perf_counter()
    try:
        with open(temporary, "w+b") as file:
            if hasattr(os, "posix_fallocate"):  # a full disk is found now, not in an hour
                os.posix_fallocate(file.fileno(), 0, row_bytes * len(paths))
            unreadable = list(run_parallel(decode_chunk, paths, "decoding", temporary, target, resize))
            if 2 * len(unreadable) > len(paths):  # the list is wrong then, not the files
                absent = not os.path.lexists(paths[unreadable[0][0]])
                way_out = "; --image-root says what the paths of a CSV file are relative to" if absent else ""
                refuse(paths, unreadable, way_out)
            kept = np.delete(np.arange(len(paths)), [index for index, _ in unreadable])
            if unreadable:
                pixels = np.memmap(file, np.uint8, "r+", shape=(len(paths), row_bytes))
                for row, index in enumerate(kept[unreadable[0][0] :], unreadable[0][0]):
                    pixels[row] = pixels[index]
                pixels.flush()
            file.truncate(len(kept) * row_bytes)
            os.fsync(file.fileno())
        if not is_whole(base):  # or else another run has been faster
            os.replace(temporary, base + ".u8")
            shape = [len(kept), *target.image_size, target.channels]
            write_json(base + ".json", {"shape": shape, "unreadable": unreadable})
    except PermissionError:
        if not is_whole(base):  # or else the other run has published it at this very moment
            raise
    finally:
        Path(temporary).unlink(missing_ok=True)
    seconds = time.perf_counter() - started
    rate = f"{len(paths) / seconds:,.0f} a second"
    note(f"decoded {len(paths):,} files in {seconds:.1f} s ({rate}), cached for later runs")


def refuse(paths: list[str], unreadable: list[tuple[int, str]], way_out: str) -> None:
    """Raise Problem, as files cannot be read; way_out: what can be done, in words."""
    index, reason = unreadable[0]
    count = f"{len(unreadable):,} of {len(paths):,} files cannot be read"
    raise Problem(f"{count}, the first: {paths[index]} {reason}{way_out}")


def remove_outdated(directory: str, key: str, current: str) -> None:
    """Remove caches with these options of an earlier state of the files, and what killed builds left.

    Those of the name `current` stay: another run may be publishing them at this moment.
    """
    for entry in os.scandir(directory):
        stale = entry.name.endswith(".tmp") and time.time() - entry.stat().st_mtime > STALE
        cached = entry.name.startswith(key) and entry.name.endswith((".u8", ".json"))
        if stale or (cached and not entry.name.startswith(current)):
            with contextlib.suppress(OSError):  # another run removes it, too, or on Windows still uses it
                os.unlink(entry.path)
