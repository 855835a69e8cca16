"""How files are written whole or not at all, kept for one process, and recognised by content."""

import contextlib
import os
import sys
from collections.abc import Iterator

from inference.command_line import say
from inference.errors import Problem, problems

try:
    import fcntl
except ImportError:  # Windows has no lock for directories, nor for files that are replaced
    fcntl = None

BLOCK = 1 << 20  # bytes that are hashed at a time


@contextlib.contextmanager
def replacing(path, mode: str = "wb", **open_options) -> Iterator:
    """Open a file that replaces `path` as a whole if the block succeeds. Raises OSError.

    Symbolic links are followed. A device or a named pipe cannot be replaced: it is written to.
    """
    is_special = os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path)
    if is_special:
        with open(path, mode, **open_options) as file:
            yield file
        return

    path = os.path.realpath(path)  # of /dev/stdout, that may be no path
    folder, name = os.path.split(path)
    temporary = os.path.join(folder, f".{name[:40]}-{os.urandom(4).hex()}.tmp")
    try:
        with open(temporary, mode.replace("w", "x"), **open_options) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):  # it is gone once it has replaced the other
            os.unlink(temporary)


def open_locked(path: str, flags: int = os.O_RDONLY) -> int | None:
    """Open a file or directory and lock it: a descriptor; None on Windows, where there is no lock.

    The lock goes with the descriptor, and with the process, however that ends. Raises
    BlockingIOError if another process has it, and OSError.
    """
    if fcntl is None:
        return None
    descriptor = os.open(path, flags, 0o666)
    try:
        lock(descriptor)
    except BlockingIOError:
        os.close(descriptor)
        raise
    return descriptor


def lock(descriptor: int) -> None:
    """Lock an open file; a file system without locks keeps nobody apart. Raises BlockingIOError."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if isinstance(error, BlockingIOError):
            raise


@contextlib.contextmanager
def locked(path: str) -> Iterator[None]:
    """Keep a directory for this process alone. Raises what open_locked() does."""
    descriptor = open_locked(path)
    try:
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


@contextlib.contextmanager
def output_stream(path: str | None) -> Iterator:
    """Standard output, or a text file that replaces `path` as a whole. Raises Problem."""
    if path is None:
        if sys.stdout is None:
            raise Problem("standard output is closed; give --output FILE")
        yield sys.stdout
        return

    was_there = os.path.exists(path)
    text = {"encoding": "utf-8", "errors": "backslashreplace", "newline": ""}
    try:
        with problems(f"cannot write {path}", OSError), replacing(path, "w", **text) as out:
            yield out
    except (KeyboardInterrupt, SystemExit):  # SystemExit: see terminable()
        say(f"note: {path} is as it was before" if was_there else f"note: {path} was not written")
        raise


def sha256(path) -> str:
    """The SHA-256 of a file, in hexadecimal. Raises OSError."""
    import hashlib  # only where it is needed: importing it loads OpenSSL

    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()
