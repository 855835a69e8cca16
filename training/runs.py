"""What a run directory holds, and the only module that knows it: names, lock, checkpoints, and
resuming.

    config.json    every argument, before the first step
    checkpoint.pt  see training/checkpoints.py; until the run ends, the one before it lies beside it
    metrics.csv    a row for each epoch
    summary.json   the result; a run without it is not finished

Every file appears whole or not at all.
"""

import argparse
import contextlib
import errno
import glob
import io
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from data.notes import note
from inference import files
from inference.command_line import encodable, say
from inference.errors import Problem, one_line, problems
from inference.files import replacing
from inference.spec import is_whole
from inference.tables import csv_line
from training import recorded
from training.recipes import LONGEST_NAME, OWN_IMAGES, RESERVED

SCHEMA = 2  # of checkpoints; 1 can be exported, but not resumed
RUNS = "runs"
EXPORTS = "exports"
CONFIG = "config.json"
CHECKPOINT = "checkpoint.pt"
PREVIOUS = "checkpoint.previous.pt"
METRICS = "metrics.csv"
SUMMARY = "summary.json"
NEW = ".new-"  # how a directory begins that has no name yet
MOST_NAMES = 10_000  # runs of one default name
NEW_SECONDS = 60  # after which a directory without a name is abandoned: naming it takes a moment
UNSUPPORTED = re.compile(r"GLOBAL ([\w.]{1,100})")  # in torch.load's error
CLOCK_SECONDS = 300  # by which the clock of a file server may be ahead
TWIN = "twin"  # the directory of the run that calibrates another, see training/calibration.py


class CannotWrite(Problem):
    """The disk is full, or the directory is gone or read-only.

    The run can go on once that is mended.
    """


# ------------------------------------------------------------------------------------- making a run
def name_of(settings: argparse.Namespace) -> str:
    """The default name of a run: <dataset>-<model>; of own images, <directory or file>-<model>.

    Of timm/NAME, the model is NAME. A long name is cut, after saying so.
    """
    network = file_name_of(settings.model)
    name = settings.dataset
    if name in OWN_IMAGES:
        stem = os.path.basename(os.path.abspath(settings.data_dir))
        if name == "csv":
            stem = os.path.splitext(stem)[0]
        name = re.sub(r"[^\w.-]+", "-", stem).strip("-.") or name  # what any file system takes

    if RESERVED.match(f"{name}-{network}"):
        name = f"data-{name}"

    room = LONGEST_NAME - len(f"-{network}-{MOST_NAMES}")
    cut = name.encode()[:room].decode(errors="ignore").rstrip("-.")
    if cut != name:
        note(f"the name of the run is cut, as its directory's would be too long: --name {cut!r}")
    return f"{cut}-{network}"


def file_name_of(network: str) -> str:
    """A network's name as a part of file names, which hold no slash."""
    return network.rpartition("/")[2]


@contextlib.contextmanager
def claimed(settings: argparse.Namespace) -> Iterator[str]:
    """Make a run directory that no other run has, with its config.json, and keep it locked. Raises
    Problem.

    It appears under its name with the config inside, so that a run killed at any moment can be
    resumed.
    """
    remove_abandoned()
    new = os.path.join(RUNS, f"{NEW}{os.urandom(4).hex()}")
    with problems(f"cannot make a run in {RUNS}/", OSError):
        os.makedirs(new)

    with locked(new):
        try:
            write_json(new, CONFIG, vars(settings))
            base = settings.name or name_of(settings)
            run_dir = rename(new, base, unique=bool(settings.name))
        except BaseException:
            shutil.rmtree(new, ignore_errors=True)
            raise
        yield run_dir


def remove_abandoned() -> None:
    """Remove the directories of processes that were killed before they had named them."""
    for path in glob.glob(os.path.join(RUNS, f"{NEW}{'[0-9a-f]' * 8}")):
        with contextlib.suppress(OSError, Problem):
            age = time.time() - os.lstat(path).st_mtime
            if age > NEW_SECONDS and not os.path.islink(path):
                with locked(path):
                    shutil.rmtree(path)


def rename(new: str, base: str, unique: bool) -> str:
    """Name a new directory `base`, or base-2, ... if it is taken, which `unique` refuses.

    Raises Problem.
    """
    for number in range(1, MOST_NAMES + 1):
        name = base if number == 1 else f"{base}-{number}"
        run_dir = os.path.join(RUNS, name)
        if not os.path.lexists(run_dir) and renamed(new, run_dir):
            return run_dir
        if unique:
            refuse_taken(base)

    raise Problem(f"{RUNS}/ has {MOST_NAMES:,} runs of the name {base}: choose another with --name")


def renamed(new: str, run_dir: str) -> bool:
    """Rename a directory; False if another run has taken the name since. Raises Problem."""
    with problems(f"cannot make the run {run_dir}", OSError):
        try:
            os.rename(new, run_dir)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
            return False
    return True


def refuse_taken(name: str) -> None:
    """Raise Problem if there is a run of this name."""
    run_dir = os.path.join(RUNS, name)
    if os.path.lexists(run_dir):
        reason = f"{run_dir} exists and a run never overwrites another; choose another --name"
        raise Problem(reason, 2)


# ------------------------------------------------------------------------------------ finding a run
def find(name: str | None = None, unfinished: bool = False) -> str:
    """The directory of a run by its name or path; without one, the newest. Raises Problem.

    A run has a checkpoint; with `unfinished`, it has only been begun.
    """
    if not name:
        return find_newest_unfinished() if unfinished else find_newest()

    for run_dir in (os.path.join(RUNS, name), name):
        has_checkpoint = os.path.isfile(os.path.join(run_dir, CHECKPOINT))
        if os.path.isdir(run_dir) and (unfinished or has_checkpoint):
            return os.path.normpath(run_dir)

    known = []
    if os.path.isdir(RUNS):
        known = sorted(entry for entry in os.listdir(RUNS) if entry[0] != ".")
    wanted = f"no run {name!r}"
    if not unfinished:
        wanted += f" with a {CHECKPOINT}"
    raise Problem(f"{wanted} under {RUNS}/; there is: {', '.join(known) or 'none'}", 2)


def find_newest() -> str:
    """The newest run with a checkpoint that no process is training. Raises Problem."""
    changed = {}
    for run_dir in glob.glob(os.path.join(RUNS, "*")):
        checkpoint = os.path.join(run_dir, CHECKPOINT)
        if os.path.isfile(checkpoint):
            changed[run_dir] = os.path.getmtime(checkpoint)

    if not changed:
        raise Problem(f"no trained run under {RUNS}/; python step1_train.py makes one", 2)
    return first_unlocked(changed)


def find_newest_unfinished() -> str:
    """The newest run that has been begun and not finished, and that no process is training.

    Raises Problem.
    """
    changed = {}
    for run_dir in glob.glob(os.path.join(RUNS, "*")):
        has_begun = os.path.isfile(os.path.join(run_dir, CONFIG))
        if has_begun and not is_finished(run_dir):
            changed[run_dir] = os.path.getmtime(run_dir)

    if not changed:
        raise Problem(f"no unfinished run under {RUNS}/ to resume", 2)
    return first_unlocked(changed)


def first_unlocked(changed: dict[str, float]) -> str:
    """Of runs and the times of their last change, the newest that no process is training.

    Raises Problem.
    """
    # The lock of a run says whether its process is alive; it is let go at once.
    newest_first = sorted(with_possible_times(changed).items(), key=lambda item: -item[1])
    for run_dir, _ in newest_first:
        with contextlib.suppress(Problem), locked(run_dir):
            return run_dir
    raise Problem(f"{newest_first[0][0]} is being trained by another process; name a run")


def with_possible_times(changed: dict[str, float]) -> dict[str, float]:
    """The same, with runs from the future behind all others, after saying so.

    Any copied archive can bring such times.
    """
    latest = time.time() + CLOCK_SECONDS
    possible = {}
    for run_dir, changed_at in changed.items():
        possible[run_dir] = changed_at
        if changed_at > latest and len(changed) > 1:
            possible[run_dir] = -math.inf
            note(f"{run_dir} is not taken for the newest, as its time lies in the future")
    return possible


@contextlib.contextmanager
def locked(run_dir: str) -> Iterator[None]:
    """Keep the run directory for this process alone.

    Raises Problem if another process trains in it.
    """
    taken = f"{run_dir} is being trained by another process"
    with contextlib.ExitStack() as stack:
        with (
            problems(f"cannot read {run_dir}", OSError),
            problems(taken, BlockingIOError, form="{}"),
        ):
            stack.enter_context(files.locked(run_dir))
        yield


def is_finished(run_dir: str) -> bool:
    """Has the run come to its result?"""
    return os.path.exists(os.path.join(run_dir, SUMMARY))


# ------------------------------------------------------------------------------------ reading a run
def read(run_dir: str) -> tuple[dict, dict | None]:
    """The arguments of a run and its newest whole checkpoint, None before the first.

    Raises Problem.
    """
    damages = []
    # A disk that was full or pulled out can leave the newest one damaged.
    for name in (CHECKPOINT, PREVIOUS):
        path = os.path.join(run_dir, name)
        try:
            checkpoint = read_checkpoint(path)
        except FileNotFoundError:
            continue
        except (OSError, ValueError, KeyError, TypeError) as error:
            damages.append(f"{path} is truncated or cannot be resumed from ({error})")
            continue

        if damages:
            say(f"warning: {damages[0]}: going on from the one before")
        return checkpoint["arguments"], checkpoint

    if damages:
        raise Problem(f"{damages[0]}: start a new run")
    return read_config(run_dir), None


def read_checkpoint(path: str) -> dict:
    """A checkpoint that training can go on from.

    Raises Problem if another version wrote it; OSError, ValueError, KeyError or TypeError if it is
    damaged.
    """
    refuse_special_file(path)
    checkpoint = load_plain(path)
    schema = checkpoint["schema"]
    if not is_whole(schema, 1):
        raise ValueError("its schema is no whole number")
    if schema > SCHEMA:
        raise Problem(f"{path} has schema {schema}, known is up to {SCHEMA}: update Threestep")
    if schema < SCHEMA:
        raise Problem(
            f"{path} was written by an earlier version and cannot be continued: "
            "it can still be exported; start a new run to train further"
        )

    recorded.check_arguments(checkpoint["arguments"])
    recorded.check_spec(checkpoint["spec"])
    recorded.check_state_dict(checkpoint["state_dict"])
    recorded.check_training(checkpoint["training"])
    return checkpoint


def refuse_special_file(path: str) -> None:
    """Raise ValueError for what is no regular file: reading a named pipe would wait for ever."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise ValueError("it is not a regular file")


def load_plain(source) -> dict:
    """torch.load of plain data from a path or binary stream, onto the CPU, without running code
    from it.

    Raises OSError, and ValueError if the content is anything else; torch's own would advise to run
    it.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected pickle protocol")
            warnings.filterwarnings("ignore", "'torch.load' received a zip file that looks like")
            return torch.load(source, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # torch.load fails in a dozen ways
        reason = "it is damaged, or holds other things than tensors and plain values"
        named = UNSUPPORTED.search(str(error))
        if "TorchScript archive" in str(error):
            reason = "it is a TorchScript archive, which is a program and not weights alone"
        elif named:
            reason = f"it holds a {named[1]}, which is neither a tensor nor a plain value"
        raise ValueError(reason) from None


def read_config(run_dir: str) -> dict:
    """The arguments in config.json. Raises Problem."""
    path = os.path.join(run_dir, CONFIG)
    try:
        refuse_special_file(path)
        arguments = json.loads(Path(path).read_text(encoding="utf-8"))
        recorded.check_arguments(arguments)
    except OSError as error:
        reason = f"{run_dir} holds neither a checkpoint nor a {CONFIG} ({error}): start it again"
        raise Problem(reason) from None
    except (ValueError, RecursionError) as error:
        reason = f"{path} is damaged ({one_line(error)}), and there is no checkpoint"
        raise Problem(f"{reason}: start the run again") from None

    # JSON has no tuples.
    return {**arguments, "image_size": tuple(arguments["image_size"])}


def resume_command(run_dir: str) -> str:
    """What to type to go on with a run."""
    script = "step1_train.py"
    if os.path.basename(sys.argv[0]).startswith("step1"):
        script = sys.argv[0]

    command = ["python", script, "--resume", os.path.relpath(run_dir, RUNS)]
    if os.name == "nt":
        return subprocess.list2cmdline(command)
    return shlex.join(command)


# ------------------------------------------------------------------------------------------ writing
def write(run_dir: str, name: str, content: bytes, previous: str | None = None) -> None:
    """Write a file of a run, whole or not at all; `previous` keeps the old one.

    Raises CannotWrite.
    """
    path = os.path.join(run_dir, name)
    try:
        with replacing(path) as file:
            file.write(content)
            if previous and os.path.exists(path):
                keep(path, os.path.join(run_dir, previous))
    except OSError as error:
        raise CannotWrite(f"cannot write {path}: {error.strerror or error}") from None


def keep(path: str, previous: str) -> None:
    """Give a file a second name, under which it stays when a new file takes its place."""
    Path(previous).unlink(missing_ok=True)
    try:
        os.link(path, previous)  # so that at no moment there is no file at `path`
    except OSError:  # a file system without links
        os.replace(path, previous)


def write_json(run_dir: str, name: str, values: dict) -> None:
    """Write a JSON file of a run. Raises CannotWrite."""
    text = json.dumps(encodable(values), indent=2) + "\n"
    write(run_dir, name, text.encode())


def write_table(run_dir: str, name: str, rows: Iterable, end: str = "\n") -> None:
    """Write a CSV file of a run; None becomes an empty cell. Raises CannotWrite."""
    lines = [csv_line(row, end) for row in rows]
    write(run_dir, name, "".join(lines).encode())


def write_metrics(run_dir: str, rows: list[dict]) -> None:
    """Write metrics.csv, a row for each epoch. Raises CannotWrite."""
    if rows:
        header = list(rows[0])
        write_table(run_dir, METRICS, [header, *[list(row.values()) for row in rows]])


def write_checkpoint(run_dir: str, checkpoint: dict) -> None:
    """Write a checkpoint, as training/checkpoints.py makes it, and keep the one before.

    Raises CannotWrite.
    """
    content = io.BytesIO()
    # Not to the file: torch turns a full disk into an error of its own.
    torch.save(checkpoint, content)
    # A view that an error's traceback keeps would crash Python's garbage collector.
    with content.getbuffer() as view:
        write(run_dir, CHECKPOINT, view, previous=PREVIOUS)


def begin_twin(run_dir: str) -> tuple[str, dict | None]:
    """The directory of a run's twin, and its checkpoint if it has been begun. Raises Problem."""
    twin_dir = os.path.join(run_dir, TWIN)
    try:
        os.makedirs(twin_dir, exist_ok=True)
    except OSError as error:
        raise CannotWrite(f"cannot make {twin_dir}: {error.strerror}") from None

    remove_leftovers(twin_dir)  # a kill may have come before its first checkpoint was whole
    if not os.listdir(twin_dir):
        return twin_dir, None
    _, checkpoint = read(twin_dir)
    return twin_dir, checkpoint


# ----------------------------------------------------------------------------------------- removing
@contextlib.contextmanager
def removed_if_empty(run_dir: str, rank: int) -> Iterator[None]:
    """Remove the run directory after a failure before its first checkpoint, so that its name is
    free again.

    After a later failure to write, the error names the command that continues the run.
    """
    try:
        yield
    except BaseException as error:
        checkpoints = [os.path.join(run_dir, name) for name in (CHECKPOINT, PREVIOUS)]
        if rank == 0 and not any(os.path.exists(path) for path in checkpoints):
            shutil.rmtree(run_dir, ignore_errors=True)
        elif isinstance(error, CannotWrite):
            way_out = f"the last checkpoint: {resume_command(run_dir)}"
            raise Problem(f"{error}; {way_out}", error.code) from None
        raise


def remove_leftovers(run_dir: str) -> None:
    """Remove the half-written files of a process that was killed."""
    for path in glob.glob(os.path.join(glob.escape(run_dir), ".*.tmp")):
        Path(path).unlink(missing_ok=True)


def tidy(run_dir: str) -> None:
    """Remove what a finished run does not need: its twin, and the checkpoint before the last."""
    shutil.rmtree(os.path.join(run_dir, TWIN), ignore_errors=True)
    Path(run_dir, PREVIOUS).unlink(missing_ok=True)
