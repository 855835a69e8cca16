"""Which images are held out of the training split: a part of each class, copies together."""

import contextlib
import hashlib
import os

import numpy as np

from data.files import Files
from inference.errors import Problem

TEST_FRACTION = 0.2  # held out if the data comes without a test split
TEST_SEED = 0  # the test split is the same in every run, whatever --seed is


def hold_out_test(splits: dict[str, Files], source: str) -> dict[str, Files]:
    """Turn a part of each class of the training split into the test split. Raises Problem."""
    train = splits["train"]
    same = first_copies(train.paths)
    held_out = stratified(train.labels, TEST_FRACTION, TEST_SEED, same)

    if not held_out.any():
        raise Problem(
            f"{source} has only one image of each class, which leaves none to test on: "
            "at least one class needs two or more"
        )
    return splits | {"train": train.part(~held_out), "test": train.part(held_out)}


def stratified(
    labels: np.ndarray,
    fraction: float,
    seed: int,
    same: np.ndarray | None = None,
) -> np.ndarray:
    """Choose `fraction` of every class at random: bool [n].

    same: int64 [n], equal for copies of one image; copies are chosen together or not at all, and
    not if their labels differ. At least one member of every class is chosen and at least one is
    not; the only member of a class is not.
    """
    if same is None:
        return choose(labels, fraction, seed)
    return choose_with_copies(labels, fraction, seed, same)


def choose(labels: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """What `stratified` returns where no image has copies."""
    rng = np.random.default_rng(seed)
    chosen = np.zeros(len(labels), dtype=bool)

    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        count = max(round(len(members) * fraction), 1)
        count = min(count, len(members) - 1)
        chosen[rng.permutation(members)[:count]] = True

    return chosen


def choose_with_copies(
    labels: np.ndarray,
    fraction: float,
    seed: int,
    same: np.ndarray,
) -> np.ndarray:
    """What `stratified` returns where copies belong together."""
    # A group is an image with its copies: group [n] says which one a member belongs to.
    _, first, group = np.unique(same, return_index=True, return_inverse=True)
    group_labels = labels[first]

    differs = labels != group_labels[group]
    conflicting = np.bincount(group, weights=differs) > 0
    chosen_groups = choose(group_labels, fraction, seed) & ~conflicting
    chosen = chosen_groups[group]

    # A class whose images are all copies of each other is on one side now. Tearing its copies
    # apart is better than having none of it to train on or to test on.
    one_by_one = choose(labels, fraction, seed)
    for label in np.unique(labels):
        members = labels == label
        share = chosen[members].mean()
        if share in (0, 1):
            chosen[members] = one_by_one[members]

    return chosen


def first_copies(paths: list[str]) -> np.ndarray:
    """The number of the first file with the same content as each: int64 [n].

    A file that cannot be read counts as its own first copy. Only files of equal sizes are read,
    which photos from a camera hardly ever have.
    """
    first = np.arange(len(paths))

    for numbers in group_by_size(paths):
        if len(numbers) == 1:
            continue

        by_content = {}
        for number in numbers:
            with contextlib.suppress(OSError), open(paths[number], "rb") as file:
                content = hashlib.sha256(file.read()).digest()
                first[number] = by_content.setdefault(content, number)

    return first


def group_by_size(paths: list[str]) -> list[list[int]]:
    """The numbers of the files that exist, those of equal sizes together, each group in order."""
    by_size = {}
    for number, path in enumerate(paths):
        with contextlib.suppress(OSError, ValueError):  # ValueError: a NUL in the path
            # Reading a named pipe would block forever.
            if os.path.isfile(path):
                by_size.setdefault(os.path.getsize(path), []).append(number)
    return list(by_size.values())
