"""Work on many files, handed out to all cores in chunks."""

import contextlib
import multiprocessing
import signal
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

from tqdm import tqdm

from data import notes
from inference.cpus import usable_cpus
from inference.errors import problems, silence_pillow
from inference.limits import LARGE_PIXELS

CHUNK = 256  # files that a worker takes at a time
MOST_WORKERS = 61  # Windows has no larger pool

# Held while a large image is in memory: in a worker, a lock that all workers share.
large_image = contextlib.nullcontext()

# Forked workers start at once and share what is imported, but only Linux' libraries all survive it.
START_METHOD = "fork" if sys.platform == "linux" else "spawn"


def run_parallel(
    function: Callable[[list[str], int], list],
    paths: list[str],
    title: str,
) -> Iterator:
    """Yield everything that function(paths of a chunk, number of its first path) returns, in order.

    function: of a module, or a functools.partial of one, so that it can be sent to a worker. title:
    of the progress bar. Raises Problem if a worker is killed, and whatever the function raises.
    """
    starts = range(0, len(paths), CHUNK)
    chunks = [paths[start : start + CHUNK] for start in starts]
    workers = min(usable_cpus(), len(chunks), MOST_WORKERS)

    killed = "a decoding process was killed, perhaps because memory ran out"
    with contextlib.ExitStack() as stack:
        stack.enter_context(problems(killed, BrokenProcessPool, form="{}"))
        bar = stack.enter_context(progress_bar(len(paths), title))

        if workers > 1:
            pool = stack.enter_context(worker_pool(workers))
            results = pool.map(function, chunks, starts)
        else:
            results = map(function, chunks, starts)

        for chunk, found in zip(chunks, results, strict=True):
            yield from found
            bar.update(len(chunk))


def progress_bar(count: int, title: str) -> tqdm:
    """A bar over `count` files, shown on a terminal only and never with --quiet."""
    hidden = True if notes.silent else None  # None: tqdm hides it unless it has a terminal
    return tqdm(total=count, desc=title, unit="file", leave=False, disable=hidden)


@contextlib.contextmanager
def worker_pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    """A pool of processes; what has not been started when the block is left is cancelled."""
    context = multiprocessing.get_context(START_METHOD)
    pool = ProcessPoolExecutor(
        max_workers=workers,
        mp_context=context,
        initializer=begin_worker,
        initargs=(context.Lock(),),
    )
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def begin_worker(lock) -> None:
    """Prepare a worker. lock: of multiprocessing, shared by all workers."""
    global large_image
    large_image = lock
    silence_pillow()  # a worker that is spawned does not know that its parent has

    # Ctrl-C reaches all processes, and the parent alone answers it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def one_at_a_time(size: tuple[int, int]) -> contextlib.AbstractContextManager:
    """The block in which an image of this size may be in memory.

    Of images with more than LARGE_PIXELS, only one is, over all workers.
    """
    width, height = size
    if width * height > LARGE_PIXELS:
        return large_image
    return contextlib.nullcontext()
