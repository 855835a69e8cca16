"""How an export takes the place of an earlier one: proven first, then swapped in, at any kill."""

import contextlib
import ctypes
import errno
import glob
import os
import shutil
import time
from collections.abc import Iterator

from inference.files import locked

PREFIX = ".export-"  # of the directories where files are written and proven
ABANDONED_SECONDS = 60  # after which an unlocked one is taken for that of a killed process
BUNDLE, EARLIER = "bundle", "earlier"
# A directory is there already; the last is what Windows says of one.
TAKEN = (errno.ENOTEMPTY, errno.EEXIST, errno.EACCES)
ATTEMPTS = 100  # of two processes to put their directories in the same place
AT_FDCWD, RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h


@contextlib.contextmanager
def workspace(out: str) -> Iterator[str]:
    """A new directory in `out`, to write and to prove files in; removed at the end.

    What killed processes left is removed first. Raises OSError.
    """
    remove_abandoned(out)
    path = os.path.join(out, f"{PREFIX}{os.urandom(4).hex()}")
    os.mkdir(path)
    try:
        with locked(path):
            yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def remove_abandoned(out: str) -> None:
    """Remove the workspaces of killed processes, and put back a bundle that one had moved aside."""
    pattern = os.path.join(glob.escape(out), f"{PREFIX}{'[0-9a-f]' * 8}")
    for path in glob.glob(pattern):
        with contextlib.suppress(OSError):  # another process has it, or removes it, too
            age = time.time() - os.stat(path).st_mtime
            if age < ABANDONED_SECONDS or os.path.islink(path):
                continue
            with locked(path):
                restore_bundle(path, out)
                shutil.rmtree(path, ignore_errors=True)


def restore_bundle(path: str, out: str) -> None:
    """Put the earlier bundle back that a killed process had moved into its workspace `path`."""
    final = os.path.join(out, BUNDLE)
    for earlier in sorted(glob.glob(os.path.join(glob.escape(path), f"{EARLIER}*"))):
        if not os.path.exists(final):
            os.replace(earlier, final)


def swap_in(new: str, final: str, aside: str) -> None:
    """Replace the directory `final` by `new` as a whole, and move the earlier one to `aside`.

    In one step where the system can: then there is a whole directory at `final` at any moment. Of
    two processes that do so at once, the later one's stays. Raises OSError.
    """
    if exchange(new, final):
        os.replace(new, aside)
        return

    for attempt in range(ATTEMPTS):
        with contextlib.suppress(FileNotFoundError):
            os.replace(final, f"{aside}-{attempt}")
        try:
            os.replace(new, final)
            return
        except OSError as error:  # another process has put its own there since: try again
            if error.errno not in TAKEN or attempt == ATTEMPTS - 1:
                raise


def exchange(one: str, other: str) -> bool:
    """Exchange two directories in one step; False if there are not two, or the system cannot.

    renameat2 of Linux, on the file systems that have it.
    """
    try:
        renameat2 = ctypes.CDLL(None).renameat2
    except (OSError, AttributeError, TypeError):  # another system, or an old C library
        return False

    names = (os.fsencode(one), os.fsencode(other))
    return renameat2(AT_FDCWD, names[0], AT_FDCWD, names[1], RENAME_EXCHANGE) == 0
