"""Keeping a run directory for one process."""

import contextlib
import os
from collections.abc import Iterator

from step3_infer import Problem, problems

try:
    import fcntl
except ImportError:  # Windows, where two processes that resume one run are not kept apart
    fcntl = None


def is_locked(run: str) -> bool:
    """Is another process training this run?"""
    with contextlib.suppress(Problem), locked(run):
        return False
    return True


@contextlib.contextmanager
def locked(run: str) -> Iterator[None]:
    """Keep the run directory for this process alone. Raises Problem if another process trains in it."""
    if not fcntl:
        yield
        return
    with problems(f"cannot read {run}", OSError):
        handle = os.open(run, os.O_RDONLY)
    try:
        with problems(f"{run} is being trained by another process", BlockingIOError, form="{}"):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)
