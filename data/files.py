"""The image files of a dataset by split, whichever list they come from, and how to read them."""

import contextlib
import difflib
import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from data.dataset import digest, sampling_step
from inference.errors import Problem, problems

# The names of each split's folder, or in a split column, in lower case.
SPELLINGS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}
NO_GROUND = "none"  # transparency is dropped, as before there was a ground
NAMES_SHOWN = 3  # how many of many files or classes a message names
DATA_DIR_TAKES = "--data-dir takes a directory of class folders, or a CSV file"
HASHED_BYTES = 1 << 16  # of a sampled file, the part whose content enters the fingerprint


class InputSizes(NamedTuple):
    """The sizes of images that a network takes; sides are in pixels."""

    usual: int = 64  # the side of the square that it is usually given
    multiple: int = 8  # of which the sides of a rectangle are a multiple
    least: int = 1  # the shortest side
    squares_only: bool = False  # of the usual side


ANY_SIZE = InputSizes()


@dataclass(frozen=True)
class Options:
    """How `folder` and `csv` are read; most fields are command line options of the same name.

    image_size (height, width), fit, channels and white (the level of 16-bit pixels that becomes
    255) are derived from the images if None; input_sizes are those that the network takes. ground
    is what transparent pixels are laid on, "white" or "black", derived if None; NO_GROUND drops the
    transparency. max_pixels is of one file, by default inference.limits.MAX_PIXELS. classes:
    those of an earlier run in its order, which is kept.
    """

    image_size: tuple[int, int] | None = None
    channels: int | None = None
    white: int | None = None
    ground: str | None = None
    fit: str | None = None
    input_sizes: InputSizes = ANY_SIZE
    strict: bool = False
    max_pixels: int | None = None
    cache_dir: str | None = None
    image_root: str | None = None
    test_csv: str | None = None
    image_column: str | None = None
    label_column: str | None = None
    group_column: str | None = None
    group_by: str | None = None
    classes: list[str] | None = None


@dataclass(frozen=True)
class Files:
    """The files of one split: paths, most of them below `root`, and labels, int64 [n].

    groups: the name of the group of each file, see groups.py; None if no files belong together.
    """

    root: str
    paths: list[str]
    labels: np.ndarray
    groups: list[str] | None = None

    def __len__(self) -> int:
        return len(self.paths)

    def part(self, chosen: np.ndarray) -> "Files":
        """The files that bool [n] chooses."""
        numbers = np.flatnonzero(chosen)
        paths = [self.paths[number] for number in numbers]
        groups = None
        if self.groups is not None:
            groups = [self.groups[number] for number in numbers]
        return replace(self, paths=paths, labels=self.labels[chosen], groups=groups)

    def fingerprint(self, sizes: np.ndarray) -> dict:
        """{"images": count, "hash": of names, sizes, labels and the content of some files}.

        sizes: of the files in bytes, int64 [n]. Raises Problem if a file can no longer be read.
        """
        names = "\n".join(self.relative_paths())
        contents = [encoded(names), sizes.tobytes(), self.labels.tobytes()]
        if self.groups is not None:
            contents.append(encoded("\n".join(self.groups)))

        for path in self.paths[:: sampling_step(len(self.paths))]:
            with problems(f"{path} can no longer be read", OSError), open(path, "rb") as file:
                contents.append(file.read(HASHED_BYTES))

        return {"images": len(self), "hash": digest(*contents)}

    def relative_paths(self) -> list[str]:
        """The paths below `root`, with / on every system."""
        root = os.path.join(self.root, "")  # with a separator at its end
        return [path.removeprefix(root).replace(os.sep, "/") for path in self.paths]


def encoded(text: str) -> bytes:
    """The bytes of a text that may hold file names that are no UTF-8."""
    return text.encode("utf-8", "surrogateescape")


def split_called(name: str) -> str | None:
    """The split that goes by this name, in any case: "train", "val", "test", or None."""
    for split, spellings in SPELLINGS.items():
        if name.lower() in spellings:
            return split
    return None


def name_some(names: Iterable[str]) -> str:
    """The first names of a list, and how many there are besides."""
    names = list(names)
    shown = ", ".join(names[:NAMES_SHOWN])

    remaining = len(names) - NAMES_SHOWN
    if remaining > 0:
        return f"{shown} and {remaining:,} more"
    return shown


def count_of(count: int, noun: str) -> str:
    """The count and the noun, which gets an "s" unless there is just one: "1 file", "2 files"."""
    plural = "" if count == 1 else "s"
    return f"{count:,} {noun}{plural}"


def refuse_missing(path: str, hint: str = DATA_DIR_TAKES) -> None:
    """Raise Problem if there is no such file or directory, with the nearest name that there is.

    hint: what is said where no name is near.
    """
    if os.path.exists(path):
        return

    missing = os.path.normpath(path)
    while not os.path.isdir(os.path.dirname(missing) or "."):
        missing = os.path.dirname(missing)
    folder, name = os.path.split(missing)

    names = []
    with contextlib.suppress(OSError):
        names = [entry for entry in os.listdir(folder or ".") if not entry.startswith(".")]
    nearest = nearest_name(name, names)
    if nearest is not None:
        hint = f"did you mean {os.path.join(folder, nearest)}?"
    raise Problem(f"no file or directory {path}: {hint}", 2)


def nearest_name(name: str, names: list[str]) -> str | None:
    """The name that is most like another, whatever their case; None if none is like it."""
    by_lower = {candidate.lower(): candidate for candidate in sorted(names)}
    nearest = difflib.get_close_matches(name.lower(), by_lower, n=1)
    return by_lower[nearest[0]] if nearest else None
