"""How a failure becomes one `error:` line with the right exit code."""

import contextlib
import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator

from inference.command_line import say

FAILED, INTERRUPTED = 1, 130  # exit codes


class Problem(Exception):
    """A failure that the user can fix: it is printed as one `error:` line, without a traceback.

    code: the exit code; 1 if the work failed, 2 if the command line is wrong.
    """

    def __init__(self, message: str, code: int = FAILED):
        super().__init__(message)
        self.code = code


def one_line(error: Exception) -> str:
    """The reason of an exception in one line: torch, for example, appends its C++ call stack."""
    reason = getattr(error, "strerror", None)  # of an OSError, without the number and the path
    if reason:
        return reason

    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


@contextlib.contextmanager
def problems(message: str, kinds=Exception, code: int = 1, form: str = "{}: {}") -> Iterator[None]:
    """Turn exceptions of these kinds into a Problem.

    form: how the message and the reason of the exception are put together. The default kind is
    Exception because the exceptions of the runtimes have no narrower base in common.
    """
    try:
        yield
    except kinds as error:
        raise Problem(form.format(message, one_line(error)), code) from None


def guarded(work: Callable[..., int], *args, closed_pipe: int = FAILED) -> int:
    """Run work(*args) as a program does: report each expected failure in one line.

    closed_pipe: the exit code after `| head` has closed the pipe. Returns the exit code. Exceptions
    that are bugs are not caught.
    """
    prepare_output()
    try:
        code = work(*args)
        flush_output()
        return code
    except BrokenPipeError:
        message, code = "error: stopped, since standard output is no longer read", closed_pipe
    except KeyboardInterrupt:
        message, code = "interrupted", INTERRUPTED
    except Exception as error:
        explained = explain(error)
        if explained is None:
            raise
        message, code = explained

    if code != 0:
        say(message)
    discard_unwritable_output()
    return code


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """Let SIGTERM, and SIGHUP of a terminal that is closed, end the program as Ctrl-C does: with
    what has to be written or removed at the end. The exit code is 143, or 129.

    A signal that is ignored, as by nohup, stays so.
    """
    if threading.current_thread() is not threading.main_thread():  # which alone may set handlers
        yield
        return

    def stop(number, _):
        raise SystemExit(128 + number)

    before = {}
    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
            before[number] = signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def explain(error: Exception) -> tuple[str, int] | None:
    """The line and the exit code for an exception; None for a bug, which needs its traceback."""
    if isinstance(error, Problem):
        return f"error: {error}", error.code

    # torch and onnxruntime report a lack of memory as a RuntimeError.
    no_memory = isinstance(error, RuntimeError) and "memory" in str(error).lower()
    if isinstance(error, MemoryError) or no_memory:
        return f"error: not enough memory: {one_line(error)}; use smaller inputs", FAILED

    # An OSError without a file name comes from writing to standard output.
    if isinstance(error, OSError) and error.filename is None:
        return f"error: cannot write to standard output: {error.strerror}", FAILED

    return None


def prepare_output() -> None:
    """Make printing safe: no name can fail to be encoded, and a closed stderr cannot break us."""
    silence_pillow()

    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            encoding = None if stream.isatty() else "utf-8"
            stream.reconfigure(encoding=encoding, errors="backslashreplace")

    if sys.stderr is None:  # closed by `2>&-`; progress bars and runtimes write to it all the same
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  open until the end


def silence_pillow() -> None:
    """Print nothing of what Pillow warns of and logs: decode_image reports what matters."""
    warnings.filterwarnings("ignore", module=r"PIL\.")
    logging.getLogger("PIL").addHandler(logging.NullHandler())


def flush_output() -> None:
    """Flush standard output, which may be closed."""
    print(end="", flush=True)


def discard_unwritable_output() -> None:
    """Send what cannot be written to nowhere; otherwise Python's flush at exit fails again."""
    try:
        flush_output()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
