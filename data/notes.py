"""Notes: lines on standard error that a user may want to know of, but that --quiet leaves out."""

import contextlib
from collections.abc import Iterator

from inference.command_line import say

silent = False  # of the whole process: notes come from places that know no settings


def note(message: str) -> None:
    """Print one `note:` line to standard error, unless notes are silenced."""
    if not silent:
        say(f"note: {message}")


def warn(message: str) -> None:
    """Print one `warning:` line to standard error, unless notes are silenced.

    It says that a result is not what it seems to be.
    """
    if not silent:
        say(f"warning: {message}")


@contextlib.contextmanager
def silenced(quiet: bool) -> Iterator[None]:
    """Print no notes within the block if `quiet`."""
    global silent
    before = silent
    silent = quiet
    try:
        yield
    finally:
        silent = before
