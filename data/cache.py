"""Image files decoded once, in parallel, into one memory-mapped uint8 array that later runs reuse.

A cache is two files: <key>.u8, the pixels [N, height, width, channels], and <key>.json, written last, with the shape
and the files that could not be read. The key is a hash of the file list with sizes and times and of the options, so
a changed folder gets a cache of its own and the old one is removed.
"""

import contextlib
import hashlib
import json
import mmap
import multiprocessing
import os
import signal
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool

import numpy as np
import PIL
from PIL import Image
from tqdm import tqdm

from step3_infer import Problem, decode_image, say

CHUNK = 256  # files a worker takes at a time
STALE = 24 * 3600  # seconds after which the remains of a killed build are removed
GREY_MODES = {"1", "L", "LA", "La", "I", "I;16", "I;16L", "I;16B", "I;16N"}
LARGEST_OWN_SIZE = 64


def load_images(paths, source, cache_dir, image_size, channels, usual_size, resize, strict):
    """Decode every file once. -> (uint8 memory map [kept, height, width, channels], kept: bool [len(paths)]).

    source: names the list (a directory or a CSV file). image_size, channels: None derives them, see `probe`.
    resize: function from a uint8 tensor [1, h, w, c] and a size to the resized tensor. Raises Problem.
    """
    source = os.path.abspath(source)
    beside = source if os.path.isdir(source) else os.path.dirname(source)
    cache_dir = cache_dir or os.path.join(beside, ".threestep")
    try:
        os.makedirs(cache_dir, exist_ok=True)
        files = fingerprint(paths)
        if image_size is None or channels is None:
            own_size, own_channels = probe(paths, os.path.join(cache_dir, f"probe-{files}.json"))
            image_size, channels = (
                image_size or own_size or (usual_size, usual_size),
                channels or own_channels,
            )
        options = digest(json.dumps([source, *image_size, channels, PIL.__version__]))
        base = os.path.join(cache_dir, f"{options}-{files}")
        if not is_whole(base):
            remove_old(cache_dir, options, os.path.basename(base))
            build(paths, base, image_size, channels, resize)
        with open(base + ".json") as stream:
            about = json.load(stream)
        report(paths, about["unreadable"], strict)
        pixels = np.memmap(base + ".u8", np.uint8, "c", shape=tuple(about["shape"]))
    except OSError as error:
        reason = error.strerror or error
        raise Problem(
            f"cannot keep the image cache in {cache_dir}: {reason}; give --cache-dir a place for it"
        ) from None
    kept = np.ones(len(paths), dtype=bool)
    kept[[index for index, _ in about["unreadable"]]] = False
    return pixels, kept


def prefetch(images, index):
    """Ask the system to read the rows `index` of a memory map from disk, without waiting; does nothing to arrays.

    Called for the next batch while this one computes. The first call turns off the kernel's own reading ahead, which
    for rows in random order reads mostly what nobody asked for (8 MB a row on one machine).
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


def digest(text):
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:16]


def fingerprint(paths):
    """A hash of the files' paths, sizes and modification times; a file that is missing counts as such."""
    lines = []
    for path in paths:
        try:
            status = os.stat(path)
            lines.append(f"{path}\0{status.st_size}\0{status.st_mtime_ns}")
        except (OSError, ValueError):  # ValueError: a NUL in the path
            lines.append(f"{path}\0missing")
    return digest("\n".join(lines))


def run_parallel(function, jobs, total, title):
    """Yield function(*job) for all jobs, in any order, on all cores, with a progress bar over `total` files."""
    with tqdm(total=total, desc=title, unit="file", leave=False, disable=None) as bar:
        workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        if workers == 1 or len(jobs) == 1:
            for job in jobs:
                yield function(*job)
                bar.update(len(job[0]))
            return
        # Workers inherit SIGINT being ignored: the parent alone answers Ctrl-C.
        context = multiprocessing.get_context(
            "fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn"
        )
        ignore = (signal.SIGINT, signal.SIG_IGN)
        with ProcessPoolExecutor(workers, context, signal.signal, ignore) as pool:
            try:
                futures = {pool.submit(function, *job): len(job[0]) for job in jobs}
                for future in as_completed(futures):
                    yield future.result()
                    bar.update(futures[future])
            except BrokenProcessPool:
                raise Problem(
                    "a decoding process was killed, by the system for lack of memory perhaps"
                ) from None
            finally:
                pool.shutdown(cancel_futures=True)


def chunks(paths, row=1):
    """[(some paths, the index of the first)], few enough for rows of `row` bytes to take 64 MB at most."""
    size = min(CHUNK, max(1, (64 << 20) // row))
    return [(paths[start : start + size], start) for start in range(0, len(paths), size)]


def probe(paths, file):
    """What the images are: ((height, width) where all agree and are 64 or less, else None; 1 if all grey, else 3)."""
    with contextlib.suppress(FileNotFoundError, ValueError, TypeError), open(file) as stream:
        size, channels = json.load(stream)
        if channels in (1, 3) and (size is None or isinstance(size, list)):
            return size and tuple(size), channels
    sizes, modes = set(), set()
    for part in run_parallel(probe_chunk, chunks(paths), len(paths), "looking"):
        sizes |= part[0]
        modes |= part[1]
    own = sizes.pop() if len(sizes) == 1 else None
    own = own if own and max(own) <= LARGEST_OWN_SIZE else None
    channels = 1 if modes and modes <= GREY_MODES else 3
    replace_with(file, json.dumps([own, channels]).encode())
    return own, channels


def probe_chunk(paths, start):
    """-> (sizes, modes) found in the headers of some files; those that cannot be read count for nothing."""
    sizes, modes = set(), set()
    for path in paths:
        if not os.path.isfile(path):  # a named pipe would wait for ever
            continue
        with (
            contextlib.suppress(Exception),
            Image.open(path) as image,
        ):  # decoding will say what is wrong with it
            width, height = image.size
            turned = image.getexif().get(0x0112, 1) >= 5  # orientations 5 to 8 lie on their side
            sizes.add((width, height) if turned else (height, width))
            modes.add(image.mode)
    return sizes, modes


def is_whole(base):
    """Is there a cache of this name, with as many bytes as its description says?"""
    try:
        with open(base + ".json") as stream:
            about = json.load(stream)
        indices = [index for index, _ in about["unreadable"]]
        whole = os.path.getsize(base + ".u8") == int(np.prod(about["shape"])) and len(about["shape"]) == 4
        return whole and all(isinstance(index, int) for index in indices)
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return False


def build(paths, base, image_size, channels, resize):
    """Decode all files into <base>.u8 and describe it in <base>.json. Raises Problem or OSError.

    Each build writes to a file of its own and swaps it in, so that two at once do no harm.
    """
    row = image_size[0] * image_size[1] * channels
    temporary = f"{base}.{os.getpid()}.tmp"
    unreadable, started = [], time.perf_counter()
    try:
        with open(temporary, "w+b") as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(
                    file.fileno(), 0, row * len(paths)
                )  # a full disk is found now, not in an hour
            jobs = [(*chunk, temporary, image_size, channels, resize) for chunk in chunks(paths, row)]
            for failures in run_parallel(decode_chunk, jobs, len(paths), "decoding"):
                unreadable += failures
            unreadable.sort()
            if 2 * len(unreadable) > len(paths):
                index, reason = unreadable[0]
                raise Problem(
                    f"{len(unreadable):,} of {len(paths):,} files cannot be read, the first: {paths[index]} {reason}"
                )
            kept = close_gaps(file, {index for index, _ in unreadable}, len(paths), row)
            file.truncate(kept * row)
            os.fsync(file.fileno())
        os.replace(temporary, base + ".u8")
        about = {"shape": [kept, *image_size, channels], "unreadable": unreadable}
        replace_with(base + ".json", json.dumps(about).encode())
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
    seconds = time.perf_counter() - started
    say(
        f"decoded {len(paths):,} files in {seconds:.1f} s ({len(paths) / seconds:,.0f} a second), cached for later runs"
    )


def decode_chunk(paths, start, temporary, image_size, channels, resize):
    """Decode some files to rows `start`... of the cache. -> [(index, reason)] of those that cannot be read."""
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
    with open(temporary, "r+b") as file:
        file.seek(start * block[0].nbytes)
        file.write(block)
    return failures


def resize_one(image, image_size, resize):
    import torch  # only where sizes differ

    if multiprocessing.parent_process() is not None:
        torch.set_num_threads(1)  # the workers share the cores already
    return resize(torch.from_numpy(image.copy())[None], image_size)[0].numpy()


def close_gaps(file, missing, count, row):
    """Move the rows behind each missing one up, in place. -> the number of rows left."""
    if not missing:
        return count
    pixels = np.memmap(file, np.uint8, "r+", shape=(count, row))
    target = 0
    for source in range(count):
        if source not in missing:
            if source != target:
                pixels[target] = pixels[source]
            target += 1
    pixels.flush()
    return target


def report(paths, unreadable, strict):
    """Name the files that were left out, each with its reason; with `strict` refuse them by a Problem."""
    for index, reason in unreadable:
        say(f"left out: {paths[index]} {reason}")
    if unreadable and strict:
        raise Problem(
            f"{len(unreadable)} of {len(paths):,} files cannot be read and --strict was given: mend or remove them"
        )


def remove_old(cache_dir, options, current):
    """Remove caches of the same options over an earlier state of the files, and what killed builds left.

    Not those of the name `current`: another run may be publishing them at this moment.
    """
    for entry in os.scandir(cache_dir):
        stale = entry.name.endswith(".tmp") and time.time() - entry.stat().st_mtime > STALE
        if stale or (
            entry.name.startswith(options)
            and not entry.name.startswith(current)
            and entry.name.endswith((".u8", ".json"))
        ):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(entry.path)


def replace_with(path, content):
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with open(temporary, "wb") as file:
            file.write(content)
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
