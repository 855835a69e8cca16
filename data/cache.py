"""Image files decoded once into a memory-mapped uint8 array, which later runs reuse.

A cache is two files: <key>.u8 with the pixels [N, height, width, channels], and <key>.json, written
last, with the shape and the files that could not be read. The key is a hash of the options and of
the list of files with their sizes and times. A changed folder therefore gets a new cache, and the
old one is removed. Only files with names of our own kind are ever removed.
"""

import contextlib
import errno
import functools
import json
import os
import re
import stat
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import PIL

from data.dataset import digest
from data.decoding import decode_chunk
from data.files import Options, nearest_name
from data.json_files import read_json, write_json
from data.notes import note
from data.parallel import run_parallel
from data.target import Target, choose_target
from inference.errors import Problem, one_line
from inference.limits import MAX_PIXELS

BESIDE = ".threestep"  # the folder beside the data
IN_USER_CACHE = "threestep"  # the folder in the user's cache directory
LONGEST_STEM = 60  # of the name of the data in that folder
READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS)
Result = TypeVar("Result")
IN_CACHE_DIR = "threestep-cache"  # the folder in --cache-dir, which may hold files of others
MOST_COMPARED = 10_000  # files of a folder whose names are compared with a missing one
STALE_SECONDS = 24 * 3600  # after which the temporary file of a killed build is removed

# The temporary files of build_cache() and of files.replacing(), which cuts long names.
TEMPORARY = re.compile(
    r"[0-9a-f]{16}-[0-9a-f]{16}\.\d+\.tmp"
    r"|\.([0-9a-f]{16}|probe|features)-[\w.-]*-[0-9a-f]{8}\.tmp"
)
CACHE = re.compile(r"[0-9a-f]{16}-[0-9a-f]{16}\.(u8|json)")


@dataclass(frozen=True)
class Decoded:
    """The images that a list of files holds."""

    readable: np.ndarray  # bool [files]
    pixels: np.ndarray  # uint8 memory map [readable files, height, width, channels]
    sizes: np.ndarray  # of the readable files in bytes, int64
    target: Target  # what they were decoded to


def load_images(paths: list[str], train: int, source: str, options: Options) -> Decoded:
    """Decode every file, or reuse the cache of an earlier run. Raises Problem.

    train: how many of the files, the first ones, are for training. source: their directory or CSV
    file.
    """
    source = os.path.abspath(source)

    def load(directory: str) -> Decoded:
        return load_from(directory, paths, train, source, options)

    return in_writable_place(load, source, options.cache_dir, "the image cache")


def look_at_images(paths: list[str], train: int, source: str, options: Options) -> Target:
    """What `load_images` would decode every file to. Raises Problem."""
    source = os.path.abspath(source)

    def look(directory: str) -> Target:
        state, _ = state_of(paths)
        return target_of(directory, state, paths, train, options)

    return in_writable_place(look, source, options.cache_dir, "the image cache")


def target_of(directory: str, state: str, paths: list[str], train: int, options: Options) -> Target:
    """What to decode the files to, whose headers are read once. state: see `state_of`."""
    of_limit = f"-{options.max_pixels}" if options.max_pixels else ""
    probe_file = os.path.join(directory, f"probe-{state}-{train}{of_limit}.json")
    return choose_target(paths, train, probe_file, options)


def load_from(
    directory: str, paths: list[str], train: int, source: str, options: Options
) -> Decoded:
    """Decode every file, or reuse the cache in this directory. Raises Problem or OSError."""
    state, sizes = state_of(paths)
    target = target_of(directory, state, paths, train, options)

    key = key_for(source, target, options)
    base = os.path.join(directory, f"{key}-{state}")
    if not is_whole(base):
        remove_outdated(directory, key, os.path.basename(base))
        build_cache(paths, base, target, options)

    description = read_json(base + ".json")
    unreadable = description["unreadable"]
    report_unreadable(paths, unreadable, options.strict)

    # Copy on write: nothing that is done to the images reaches the cache.
    pixels = np.memmap(base + ".u8", np.uint8, mode="c", shape=tuple(description["shape"]))

    readable = np.ones(len(paths), dtype=bool)
    for number, _ in unreadable:
        readable[number] = False
    return Decoded(readable=readable, pixels=pixels, sizes=sizes[readable], target=target)


# ------------------------------------------------------------------------------------------- places
def in_writable_place(
    work: Callable[[str], Result], source: str, cache_dir: str | None, what: str
) -> Result:
    """work(directory) in the first directory that can be written.

    source: the directory or the file that something is computed of. cache_dir: --cache-dir. what is
    kept, in words. Raises Problem.
    """
    places = places_for(os.path.abspath(source), cache_dir)
    tried = []
    for place in places:
        tried.append(place)
        try:
            os.makedirs(place, exist_ok=True)
            return work(place)
        except OSError as error:
            if len(tried) == len(places) or error.errno not in READ_ONLY:
                failure = f"cannot keep {what} in {' or '.join(tried)}: {one_line(error)}"
                raise Problem(f"{failure}; step1 takes another with --cache-dir") from None
        note(f"{place} cannot be written: {what} is kept in {places[len(tried)]}")
    raise AssertionError("there is at least one place")


def places_for(source: str, cache_dir: str | None) -> list[str]:
    """Where what is computed of a directory or a file may be kept, each a folder of our own.

    In --cache-dir; else beside the data, or if that is read-only in the user's cache directory.
    """
    if cache_dir:
        return [os.path.join(cache_dir, IN_CACHE_DIR)]

    beside = source if os.path.isdir(source) else os.path.dirname(source)
    places = [os.path.join(beside, BESIDE)]
    user_cache = user_cache_dir()
    if user_cache:
        name = re.sub(r"[^\w.-]+", "-", os.path.basename(source))[:LONGEST_STEM]
        name = f"{name}-{digest(os.fsencode(source))}"
        places.append(os.path.join(user_cache, IN_USER_CACHE, name))
    return places


def user_cache_dir() -> str | None:
    """Where this system keeps caches of a user; None for a user without a home."""
    home = os.path.expanduser("~")
    if sys.platform == "win32":
        place = os.environ.get("LOCALAPPDATA") or os.path.join(home, "AppData", "Local")
    elif sys.platform == "darwin":
        place = os.path.join(home, "Library", "Caches")
    else:
        place = os.environ.get("XDG_CACHE_HOME") or os.path.join(home, ".cache")
    return place if os.path.isabs(place) else None


def is_own_cache(cache_dir: str) -> bool:
    """Has this user kept a cache in a --cache-dir before?

    A --cache-dir that stands in a file, and was not typed, is used only then.
    """
    try:
        status = os.lstat(os.path.join(cache_dir, IN_CACHE_DIR))
    except (OSError, ValueError):  # ValueError: a NUL in the path
        return False
    is_ours = not hasattr(os, "getuid") or status.st_uid == os.getuid()
    return stat.S_ISDIR(status.st_mode) and is_ours


def state_of(paths: list[str]) -> tuple[str, np.ndarray]:
    """A hash of the files' paths, sizes and modification times; the sizes, int64 [files].

    A missing file has size 0.
    """
    lines = []
    sizes = np.zeros(len(paths), dtype=np.int64)

    for number, path in enumerate(paths):
        try:
            status = os.stat(path)
        except (OSError, ValueError):  # ValueError: a NUL in the path
            lines.append(f"{path}\0missing")
            continue
        sizes[number] = status.st_size
        lines.append(f"{path}\0{status.st_size}\0{status.st_mtime_ns}")

    return digest("\n".join(lines).encode("utf-8", "surrogateescape")), sizes


def key_for(source: str, target: Target, options: Options) -> str:
    """A hash of what a cache is made of, besides the state of the files."""
    pixels = [target.image_size, target.channels, target.white, target.ground, target.fit]
    parts = [source, *pixels, PIL.__version__]
    if options.max_pixels:  # which files can be read depends on it
        parts.append(options.max_pixels)
    return digest(json.dumps(parts).encode())


def is_whole(base: str) -> bool:
    """Is there a cache of this name, with as many bytes as its description says?"""
    try:
        description = read_json(base + ".json")
        shape = description["shape"]
        numbers = [number for number, _ in description["unreadable"]]
        size = os.path.getsize(base + ".u8")
        return (
            len(shape) == 4
            and size == int(np.prod(shape))
            and all(isinstance(number, int) for number in numbers)
        )
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return False


def report_unreadable(paths: list[str], unreadable: list[tuple[int, str]], strict: bool) -> None:
    """Note each file that could not be read, and why. Raises Problem if `strict`."""
    for number, reason in unreadable:
        note(f"skipped: {paths[number]} {reason}")
    if unreadable and strict:
        refuse(paths, unreadable, "; --strict was given: repair or remove them")


def refuse(paths: list[str], unreadable: list[tuple[int, str]], way_out: str) -> None:
    """Raise Problem, as files cannot be read; way_out: what can be done, in words."""
    number, reason = unreadable[0]
    count = f"{len(unreadable):,} of {len(paths):,} files cannot be read"
    raise Problem(f"{count}, the first: {paths[number]} {reason}{way_out}")


# ---------------------------------------------------------------------------------------- building
def build_cache(paths: list[str], base: str, target: Target, options: Options) -> None:
    """Decode all files into <base>.u8 and describe it in <base>.json. Raises Problem or OSError.

    Each build writes to a file of its own and swaps it in, so that two at once do no harm. A whole
    cache is never replaced, because other runs may have mapped it: Windows refuses that.
    """
    started = time.perf_counter()
    temporary = f"{base}.{os.getpid()}.tmp"

    try:
        unreadable = decode_all(paths, temporary, target, options)
        if not is_whole(base):  # or else another run has been faster
            os.replace(temporary, base + ".u8")
            shape = [len(paths) - len(unreadable), *target.image_size, target.channels]
            write_json(base + ".json", {"shape": shape, "unreadable": unreadable})
    except PermissionError:
        if not is_whole(base):  # or else the other run has published it at this very moment
            raise
    finally:
        Path(temporary).unlink(missing_ok=True)

    seconds = time.perf_counter() - started
    rate = f"{len(paths) / seconds:,.0f} per second"
    note(f"decoded {len(paths):,} files in {seconds:.1f} s ({rate}), cached for later runs")


def decode_all(
    paths: list[str], temporary: str, target: Target, options: Options
) -> list[tuple[int, str]]:
    """Decode all files into one, the rows of those that cannot be read removed.

    Returns the number of each file that cannot be read, and the reason. Raises Problem, also if
    more than half of the files cannot be read, or OSError.
    """
    row_bytes = target.row_bytes()

    with open(temporary, "w+b") as file:
        if hasattr(os, "posix_fallocate"):  # a full disk is found now, not in an hour
            os.posix_fallocate(file.fileno(), 0, row_bytes * len(paths))

        decode = functools.partial(
            decode_chunk,
            file=temporary,
            target=target,
            max_pixels=options.max_pixels or MAX_PIXELS,
        )
        unreadable = list(run_parallel(decode, paths, "decoding"))
        if len(unreadable) > len(paths) / 2:  # the list is wrong then, not the files
            refuse(paths, unreadable, way_out_of_missing(paths[unreadable[0][0]], options))

        if unreadable:
            close_gaps(file, len(paths), row_bytes, [number for number, _ in unreadable])
        file.truncate((len(paths) - len(unreadable)) * row_bytes)
        os.fsync(file.fileno())

    return unreadable


def way_out_of_missing(path: str, options: Options) -> str:
    """What to do about a file that cannot be read, if it does not exist; else empty."""
    if os.path.lexists(path):
        return ""

    folder, name = os.path.split(os.path.abspath(path))
    if os.path.isdir(folder):
        nearest = nearest_name(name, os.listdir(folder)[:MOST_COMPARED])
        if nearest is not None:
            return f"; the nearest file there is {nearest}"
    if options.image_root is not None:
        return f"; the paths are relative to step1's --image-root {options.image_root}"
    return "; step1's --image-root says what the paths of a CSV file are relative to"


def close_gaps(file, count: int, row_bytes: int, gaps: list[int]) -> None:
    """Move up the rows of a file of `count` rows that follow the rows `gaps`."""
    pixels = np.memmap(file, np.uint8, "r+", shape=(count, row_bytes))
    kept = np.delete(np.arange(count), gaps)

    # The rows before the first gap stay where they are.
    for row in range(gaps[0], len(kept)):
        pixels[row] = pixels[kept[row]]
    pixels.flush()


def remove_outdated(directory: str, key: str, current: str) -> None:
    """Remove caches of an earlier state of the files, and what killed builds left.

    Those of the name `current` stay: another run may be publishing them at this moment.
    """
    for entry in os.scandir(directory):
        is_cache = CACHE.fullmatch(entry.name) and entry.name.startswith(f"{key}-")
        is_outdated = is_cache and not entry.name.startswith(current)

        # Another run removes it, too, or on Windows still uses it.
        with contextlib.suppress(OSError):
            if is_outdated or is_abandoned(entry):
                os.unlink(entry.path)


def is_abandoned(entry: os.DirEntry) -> bool:
    """Is this the temporary file of a build that was killed? Raises OSError."""
    if not TEMPORARY.fullmatch(entry.name):
        return False
    return time.time() - entry.stat(follow_symlinks=False).st_mtime > STALE_SECONDS
