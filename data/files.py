"""The image files of a dataset by split, whichever list they come from, and the options to read them with."""

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from data.dataset import SAMPLED, digest
from inference.errors import Problem, problems

TEST_FRACTION = 0.2  # held out if the data comes without a test split
SPELLINGS = {"train": "train training", "val": "val valid validation", "test": "test testing"}
NAMED = 3  # of many files or classes, how many a message names


@dataclass(frozen=True)
class Options:
    """How `folder` and `csv` are read; most fields are command line options of the same name.

    image_size (height, width), channels and white (the level of 16-bit pixels that becomes 255) are derived
    from the images if None. usual_size is the image size if the images differ in size or are large. resize is
    the exported graph's own function, from a uint8 tensor [1, height, width, channels], a size and `fit` to
    the resized tensor.
    """

    image_size: tuple[int, int] | None = None
    channels: int | None = None
    white: int | None = None
    usual_size: int = 64
    resize: Callable | None = None
    fit: str = "stretch"
    strict: bool = False
    cache_dir: str | None = None
    image_root: str | None = None
    test_csv: str | None = None
    image_column: str | None = None
    label_column: str | None = None


@dataclass(frozen=True)
class Files:
    """The files of one split: paths, most of them below `root`, and labels, int64 [n]."""

    root: str
    paths: list[str]
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.paths)

    def part(self, chosen: np.ndarray) -> "Files":
        """The files that bool [n] chooses."""
        return Files(self.root, [self.paths[i] for i in np.flatnonzero(chosen)], self.labels[chosen])

    def fingerprint(self, sizes: np.ndarray) -> dict:
        """{"images": number, "hash": of names, sizes [n], labels and the content of some}. Raises Problem."""
        root = os.path.join(self.root, "")
        names = "\n".join(path.removeprefix(root) for path in self.paths).replace(os.sep, "/")
        contents = [names.encode("utf-8", "surrogateescape"), sizes.tobytes(), self.labels.tobytes()]
        for path in self.paths[:: max(1, len(self.paths) // SAMPLED)]:
            with problems(f"{path} can no longer be read", OSError), open(path, "rb") as file:
                contents.append(file.read(1 << 16))
        return {"images": len(self), "hash": digest(*contents)}


def split_called(name: str) -> str | None:
    """The split that goes by this name, in any case: "train", "val", "test", or None."""
    return next((split for split, words in SPELLINGS.items() if name.lower() in words.split()), None)


def name_some(names: Iterable[str]) -> str:
    """The first names of a list, and how many there are besides."""
    names = list(names)
    rest = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {rest:,} more" if rest > 0 else "")


def stratified(labels: np.ndarray, fraction: float, seed: int, same: np.ndarray | None = None) -> np.ndarray:
    """Choose `fraction` of every class at random: bool [n].

    Copies, of equal numbers in `same` [n], are chosen or not as one, and not if they have several labels. At
    least one member of every class is chosen and at least one is not; the only member of a class is not.
    """
    if same is not None:
        _, first, group = np.unique(same, return_index=True, return_inverse=True)
        unlike = np.bincount(group, labels != labels[first][group]) > 0
        together = (stratified(labels[first], fraction, seed) & ~unlike)[group]
        alone = stratified(labels, fraction, seed)
        for members in (labels == label for label in np.unique(labels)):
            if not 0 < together[members].mean() < 1:  # a class of copies alone: better this than none
                together[members] = alone[members]
        return together
    rng, chosen = np.random.default_rng(seed), np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        count = min(max(round(len(members) * fraction), 1), len(members) - 1)
        chosen[rng.permutation(members)[:count]] = True
    return chosen


def first_copies(paths: list[str]) -> np.ndarray:
    """The first file with the same content as each, itself if it cannot be read: int64 [n].

    Only files of equal sizes are read, which photos from a camera hardly ever have.
    """
    same, by_size = np.arange(len(paths)), {}
    for number, path in enumerate(paths):
        with contextlib.suppress(OSError, ValueError):
            if os.path.isfile(path):  # reading a named pipe would block for ever
                by_size.setdefault(os.path.getsize(path), []).append(number)
    for numbers in by_size.values():
        found = {}
        for number in numbers if len(numbers) > 1 else ():
            with contextlib.suppress(OSError), open(paths[number], "rb") as file:
                same[number] = found.setdefault(hashlib.sha256(file.read()).digest(), number)
    return same


def hold_out_test(splits: dict[str, Files], source: str) -> dict[str, Files]:
    """Turn a stratified part of the training split, always the same, into the test split. Raises Problem."""
    train = splits["train"]
    held = stratified(train.labels, TEST_FRACTION, 0, first_copies(train.paths))
    if not held.any():
        raise Problem(f"{source} has one image of each class, none to test on: each needs two or more")
    return splits | {"train": train.part(~held), "test": train.part(held)}
