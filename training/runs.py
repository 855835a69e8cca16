"""What a run directory holds, and the only module that knows it: names, lock, checkpoints, and resuming.

    config.json    every argument, before the first step
    checkpoint.pt  see `save_checkpoint`; checkpoint.previous.pt is the one before it, until the run ends
    metrics.csv    a row for each epoch
    summary.json   the result; a run without it is not finished

Every file appears whole or not at all.
"""

import argparse
import contextlib
import csv
import glob
import io
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from inference.command_line import say
from inference.errors import Problem, problems
from inference.files import replacing
from training.recipes import OWN_IMAGES, RESERVED

try:
    import fcntl
except ImportError:  # Windows, where two processes that resume one run are not kept apart
    fcntl = None

SCHEMA = 2  # of checkpoints; 1 can be exported, but not resumed
RUNS, EXPORTS = "runs", "exports"
CHECKPOINT, PREVIOUS = "checkpoint.pt", "checkpoint.previous.pt"
TWIN = "twin"  # the directory of the run that calibrates another, see training/calibration.py
CONFIG, METRICS, SUMMARY = "config.json", "metrics.csv", "summary.json"


class CannotWrite(Problem):
    """The disk is full, or the directory is gone or read-only. The run can go on once that is mended."""


# ---------------------------------------------------------------------------------------------- finding a run
def name_of(settings: argparse.Namespace) -> str:
    """The default name of a run: <dataset>-<model>, or <directory or file>-<model> for your own images."""
    name = settings.dataset
    if name in OWN_IMAGES:
        stem = os.path.basename(os.path.abspath(settings.data_dir)).removesuffix(".csv")
        name = re.sub(r"[^\w.-]+", "-", stem).strip("-.") or name
    name = f"{name}-{settings.model}"
    return f"data-{name}" if RESERVED.match(name) else name


@contextlib.contextmanager
def claimed(settings: argparse.Namespace) -> Iterator[str]:
    """Make a run directory that no other run has, with its config.json, and keep it locked. Raises Problem.

    It appears under its name with the config inside, so that a run killed at any moment can be resumed.
    """
    new = os.path.join(RUNS, f".new-{os.urandom(4).hex()}")
    with problems(f"cannot make a run in {RUNS}/", OSError):
        os.makedirs(new)
    with locked(new):
        try:
            write_json(new, CONFIG, vars(settings))
            run = rename(new, settings.name or name_of(settings), unique=bool(settings.name))
        except BaseException:
            shutil.rmtree(new, ignore_errors=True)
            raise
        yield run


def rename(new: str, base: str, unique: bool) -> str:
    """Name a new directory `base`, or base-2, ... if it is taken, which `unique` refuses. Raises Problem."""
    for number in itertools.count(1):
        run = os.path.join(RUNS, base if number == 1 else f"{base}-{number}")
        if not os.path.lexists(run):
            with contextlib.suppress(OSError):  # another run has taken the name since
                os.rename(new, run)
                return run
        if unique:
            refuse_taken(base)


def refuse_taken(name: str) -> None:
    run = os.path.join(RUNS, name)
    if os.path.lexists(run):
        raise Problem(f"{run} exists and a run never overwrites another; choose another --name", 2)


def find(name: str | None = None, unfinished: bool = False) -> str:
    """The directory of a run by its name or path; without one, the newest. Raises Problem.

    A run has a checkpoint; with `unfinished`, it has only been begun.
    """
    if not name:
        return find_newest(unfinished)
    for run in (os.path.join(RUNS, name), name):
        if os.path.isdir(run) and (unfinished or os.path.isfile(os.path.join(run, CHECKPOINT))):
            return os.path.normpath(run)
    known = sorted(entry for entry in os.listdir(RUNS) if entry[0] != ".") if os.path.isdir(RUNS) else []
    wanted = f"no run {name!r}" + ("" if unfinished else f" with a {CHECKPOINT}")
    raise Problem(f"{wanted} under {RUNS}/; there is: {', '.join(known) or 'none'}", 2)


def find_newest(unfinished: bool) -> str:
    """The newest run with a checkpoint, or `unfinished`, that no process is training. Raises Problem."""
    needed, changed = CONFIG if unfinished else CHECKPOINT, {}
    for run in glob.glob(os.path.join(RUNS, "*")):
        if os.path.isfile(os.path.join(run, needed)) and not (unfinished and is_finished(run)):
            changed[run] = os.path.getmtime(run if unfinished else os.path.join(run, CHECKPOINT))
    newest_first = sorted(changed, key=changed.get, reverse=True)
    for run in newest_first:
        with contextlib.suppress(Problem), locked(run):
            return run
    if newest_first:
        raise Problem(f"{newest_first[0]} is being trained by another process; name a run")
    if unfinished:
        raise Problem(f"no unfinished run under {RUNS}/ to resume", 2)
    raise Problem(f"no trained run under {RUNS}/; python step1_train.py makes one", 2)


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


def is_finished(run: str) -> bool:
    return os.path.exists(os.path.join(run, SUMMARY))


@contextlib.contextmanager
def removed_if_empty(run: str, rank: int) -> Iterator[None]:
    """Remove the run directory after a failure before its first checkpoint, so that its name is free again.

    After a later failure to write, the error names the command that continues the run.
    """
    try:
        yield
    except BaseException as error:
        if rank == 0 and not any(os.path.exists(os.path.join(run, name)) for name in (CHECKPOINT, PREVIOUS)):
            shutil.rmtree(run, ignore_errors=True)
        elif isinstance(error, CannotWrite):
            raise Problem(f"{error}; the last checkpoint: {resume_command(run)}", error.code) from None
        raise


def resume_command(run: str) -> str:
    script = sys.argv[0] if os.path.basename(sys.argv[0]).startswith("step1") else "step1_train.py"
    command = ["python", script, "--resume", os.path.relpath(run, RUNS)]
    return subprocess.list2cmdline(command) if os.name == "nt" else shlex.join(command)


# --------------------------------------------------------------------------------------------------- resuming
def read(run: str) -> tuple[dict, dict | None]:
    """The arguments of a run and its newest whole checkpoint, None before the first. Raises Problem."""
    reasons = []
    for path in (os.path.join(run, CHECKPOINT), os.path.join(run, PREVIOUS)):
        try:
            checkpoint = load_plain(path)
            schema = checkpoint["schema"]
            if schema > SCHEMA:
                raise Problem(f"{path} has schema {schema}, known is up to {SCHEMA}: update Threestep")
            if schema < SCHEMA:
                way_out = "it can still be exported; start a new run to train further"
                raise Problem(f"{path} was written by an earlier version and cannot be continued: {way_out}")
            arguments, training = checkpoint["arguments"], checkpoint["training"]
            training["progress"], training["optimizer"]
        except FileNotFoundError:
            continue
        except (OSError, ValueError, KeyError, TypeError) as error:
            reasons.append(f"{path} is truncated or cannot be resumed from ({error})")
        else:
            if reasons:
                say(f"warning: {reasons[0]}: going on from the one before")
            return arguments, checkpoint
    if reasons:
        raise Problem(reasons[0])
    return read_config(run), None


def load_plain(source) -> dict:
    """torch.load of plain data from a path or binary stream, onto the CPU, without running code from it.

    Raises OSError, and ValueError if the content is anything else; torch's own would advise to run it.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected pickle protocol")
            return torch.load(source, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception:  # torch.load fails in a dozen ways
        raise ValueError("it is damaged, or holds other things than tensors and plain values") from None


def read_config(run: str) -> dict:
    """The arguments in config.json. Raises Problem."""
    try:
        arguments = json.loads(Path(run, CONFIG).read_text(encoding="utf-8"))
        return {**arguments, "image_size": tuple(arguments["image_size"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Problem(f"{run} holds neither a checkpoint nor a {CONFIG} ({error}): start it again") from None


# ---------------------------------------------------------------------------------------------------- writing
def write(run: str, name: str, content: bytes, previous: str | None = None) -> None:
    """Write a file of a run, whole or not at all; `previous` keeps the old one. Raises CannotWrite."""
    path = os.path.join(run, name)
    try:
        with replacing(path) as file:
            file.write(content)
            if previous and os.path.exists(path):
                keep(path, os.path.join(run, previous))
    except OSError as error:
        raise CannotWrite(f"cannot write {path}: {error.strerror or error}") from None


def write_json(run: str, name: str, values: dict) -> None:
    write(run, name, (json.dumps(values, indent=2) + "\n").encode())


def write_table(run: str, name: str, rows: Iterable, end: str = "\n") -> None:
    """Write a CSV file of a run; None becomes an empty cell. Raises CannotWrite."""
    text = io.StringIO()
    csv.writer(text, lineterminator=end).writerows(rows)
    write(run, name, text.getvalue().encode("utf-8", "surrogateescape"))


def save_checkpoint(run: str, spec: dict, state_dict: dict, epoch: int, training: dict, familiarity=None):
    """Write the checkpoint and keep the one before it. Raises CannotWrite.

    state_dict, epoch: the network that is the result so far, and the epoch it is from. training: all else
    that `Trainer.restore` needs to go on. familiarity: the tensors of model.Familiarity, or None.
    """
    checkpoint = {"schema": SCHEMA, "spec": spec, "state_dict": state_dict, "arguments": spec["arguments"]}
    checkpoint |= {"epoch": epoch, "training": training, "familiarity": familiarity}
    content = io.BytesIO()
    torch.save(checkpoint, content)  # not to the file: torch turns a full disk into an error of its own
    write(run, CHECKPOINT, content.getbuffer(), previous=PREVIOUS)


def keep(path: str, previous: str) -> None:
    """Give a file a second name, under which it stays when a new file takes its place."""
    Path(previous).unlink(missing_ok=True)
    try:
        os.link(path, previous)  # so that at no moment there is no file at `path`
    except OSError:  # a file system without links
        os.replace(path, previous)


def begin_twin(run: str) -> tuple[str, dict | None]:
    """The directory of a run's twin, and its checkpoint if it has been begun. Raises Problem."""
    twin = os.path.join(run, TWIN)
    try:
        os.makedirs(twin, exist_ok=True)
    except OSError as error:
        raise CannotWrite(f"cannot make {twin}: {error.strerror}") from None
    remove_leftovers(twin)  # a kill may have come before its first checkpoint was whole
    return twin, read(twin)[1] if os.listdir(twin) else None


def tidy(run: str) -> None:
    """Remove what a finished run does not need: its twin, and the checkpoint before the last."""
    shutil.rmtree(os.path.join(run, TWIN), ignore_errors=True)
    Path(run, PREVIOUS).unlink(missing_ok=True)


def remove_leftovers(run: str) -> None:
    """Remove the half-written files of a process that was killed."""
    for path in glob.glob(os.path.join(glob.escape(run), ".*.tmp")):
        Path(path).unlink(missing_ok=True)
