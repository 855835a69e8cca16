"""The file of --monitor: read and checked, locked against another process, written whole, shown."""

import contextlib
import json
import os
import stat

from inference.drift import LIMIT
from inference.errors import Problem, problems
from inference.files import lock, open_locked, replacing
from inference.results import write_figures
from inference.spec import is_number, is_whole

SCHEMA = 1
# What the accuracy is estimated of: the class that a promise of recall forces may be another.
ANSWER, MOST_PROBABLE = "answer", "most probable class"
MAX_BYTES = 64 << 20
MAX_COUNT = 1 << 53


class MonitorFile:
    """A monitor file that this process has for itself until close(). Raises Problem.

    The lock is on the file itself, and goes with the process, however that ends. As a new file
    takes its place with each write(), the new one is locked before.
    """

    def __init__(self, path: str):
        self.path = path
        self.lock = None
        self.is_empty = False  # made here, and not yet written
        check_usable(path)

        taken = f"{path} is in use by another process: give each a file of its own"
        is_new = not os.path.exists(path)
        with problems(f"cannot open {path}", OSError), problems(taken, BlockingIOError, form="{}"):
            self.lock = open_locked(path, os.O_RDWR | os.O_CREAT)
        if self.lock is None:
            return

        # The other process may have replaced it just now.
        if not is_same_file(self.lock, path):
            self.close()
            raise Problem(taken)
        self.is_empty = is_new

    def read(self, fingerprint: str) -> dict | None:
        """What the file holds, None if it is new or empty. Raises Problem.

        fingerprint: of the model, to which it must belong.
        """
        if not os.path.exists(self.path) or os.path.getsize(self.path) == 0:
            return None
        try:
            kept = read_monitor(self.path)
            if kept["model"] != fingerprint:
                raise Problem(
                    f"{self.path} belongs to another model file: give a new --monitor FILE for "
                    "this one",
                    2,
                )
        except Problem:
            self.close()
            raise
        return kept

    def write(self, content: dict) -> None:
        """Replace the file as a whole. Raises OSError."""
        new = None
        with replacing(self.path, "w", encoding="utf-8") as file:
            file.write(json.dumps(content) + "\n")
            if self.lock is not None:
                new = os.dup(file.fileno())  # keeps the lock when the file is closed
                lock(new)
        self.is_empty = False
        if new is not None:
            self.close()
            self.lock = new

    def close(self) -> None:
        """Give the lock up. A new file that could not be written goes with it."""
        if self.lock is not None:
            if self.is_empty:
                with contextlib.suppress(OSError):  # somebody may have removed it
                    os.unlink(self.path)
            os.close(self.lock)
            self.lock = None


def is_same_file(descriptor: int, path: str) -> bool:
    """Is this open file the one at the path?"""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except OSError:
        return False


def check_usable(path: str) -> None:
    """Raise Problem if a file cannot be replaced: said before there is anything to lose."""
    folder = os.path.dirname(os.path.realpath(path))
    if not os.path.isdir(folder):
        raise Problem(f"cannot write {path}: there is no directory {folder}")
    if os.path.exists(path):
        mode = os.stat(path).st_mode
        if not stat.S_ISREG(mode):
            raise Problem(f"cannot use {path} for --monitor: it is not a regular file")
        # Of root, os.access() asks no more than whether the disk can be written.
        if not mode & 0o222 or not os.access(path, os.W_OK):
            raise Problem(f"{path} is read-only: make it writable, or give another --monitor FILE")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise Problem(f"{folder} is read-only, and {path} is replaced there: give another FILE")


def read_monitor(path: str) -> dict:
    """The content of a monitor file. Raises Problem if it cannot be read, or is damaged."""
    if os.path.exists(path) and not os.path.isfile(path):  # a pipe would be waited for
        raise Problem(f"cannot read {path}: it is not a regular file")
    with problems(f"cannot read {path}", OSError), open(path, "rb") as file:
        content = file.read(MAX_BYTES + 1)
    if not content:
        raise Problem(f"{path} is empty: no process with --monitor has written to it yet")

    try:
        kept = json.loads(content.decode())
        schema = kept["schema"]
        if is_whole(schema, 1) and schema > SCHEMA:
            raise Problem(f"{path} was written by a newer step3_infer.py: use that")
        check(kept)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise damaged(path) from None
    return kept


def damaged(path: str) -> Problem:
    way_out = "give another --monitor FILE, or delete this one if it is a monitor's"
    return Problem(f"{path} is damaged, or no file of --monitor: {way_out}")


def check(kept: dict) -> None:
    """Raise an exception for a monitor file that does not hold what it should."""
    state = kept["state"]
    counts = [kept[name] for name in ("images", "errors", "unknown", "unsure", "bet_every")]
    counts += kept["answers"].values()
    counts += [state[name] for name in ("above", "frames", "since", "step", "bets")]
    numbers = [*state["stakes"], *(number for values in state["values"] for number in values)]

    alarm = kept["alarm"]
    is_right = [
        all(is_whole(count, 0, MAX_COUNT) for count in counts),
        is_whole(kept["schema"], 1),
        kept["bet_every"] >= 1,
        state["step"] >= 1,
        len({len(values) for values in state["values"]}) <= 1,
        all(is_number(number, 0, LIMIT**4) for number in numbers),
        all(isinstance(kept[name], str) for name in ("model", "started", "updated")),
        alarm is None or (isinstance(alarm["message"], str) and is_whole(alarm["images"], 1)),
    ]
    estimate = kept["estimated_accuracy"]
    if estimate is not None:
        is_right += [is_number(estimate[name], 0, 1) for name in ("value", "low", "high")]
    if kept["evidence"] is not None:
        is_right.append(is_number(kept["evidence"], 0))
    if not all(is_right):
        raise ValueError


def show_monitor(path: str, output_format: str, out) -> None:
    """Write what a monitor file says to `out`, as text or as one line of JSON. Raises Problem."""
    kept = read_monitor(path)
    del kept["state"]
    if output_format == "json":
        write_figures(kept, "json", out)
        return

    images = kept["images"]
    figures = {
        "since": kept["started"],
        "last written": kept["updated"],
        "images": f"{images:,}",
        "errors": f"{kept['errors']:,}",
    }
    answers = sorted(kept["answers"].items(), key=lambda item: -item[1])
    rows = [*answers, ("unknown", kept["unknown"]), ("unsure", kept["unsure"])]
    figures["answers"] = [f"{name}  {part(count, images)}" for name, count in rows if count]
    figures["estimated accuracy"] = estimate_in_words(kept)
    figures["alarm"] = alarm_in_words(kept)
    write_figures(figures, "text", out)


def part(count: int, images: int) -> str:
    return f"{count:,} ({count / max(images, 1):.1%})"


def estimate_in_words(kept: dict) -> str:
    estimate = kept["estimated_accuracy"]
    if estimate is not None:
        limits = f"{estimate['low']:.1%} to {estimate['high']:.1%}"
        of_best = ""
        if kept.get("estimate_of") == MOST_PROBABLE:
            of_best = "; of the most probable class, promises of recall aside"
        return f"{estimate['value']:.1%} ({limits}), without labels{of_best}"
    if kept["alarm"]:
        return "withheld since the alarm"
    return "none yet" if kept["evidence"] is not None else "none: the model file has no reference"


def alarm_in_words(kept: dict) -> str:
    if kept["alarm"]:
        return f"{kept['alarm']['message']} ({kept['alarm'].get('time')})"
    if kept["evidence"] is None:
        return "none: the model file has no reference"
    every = f"; bets on one image in {kept['bet_every']:,}" if kept["bet_every"] > 1 else ""
    return f"none (evidence {kept['evidence']:.3g}, alarm at {LIMIT:,}{every})"
