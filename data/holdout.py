"""Which images are held out of the training split: a part of each class, copies and groups
together."""

import contextlib
import hashlib
import os
from collections import Counter
from collections.abc import Iterator

import numpy as np

from data.files import Files
from data.groups import join, numbered, pairs_of
from inference.errors import Problem

TEST_FRACTION = 0.2  # held out if the data comes without a test split
MOST_OVERSHOOT = 1.25  # what groups may hold of a class, if there is a choice, times what is wanted
TEST_SEED = 0  # the test split is the same in every run, whatever --seed is


def hold_out_test(splits: dict[str, Files], source: str) -> dict[str, Files]:
    """Turn a part of each class of the training split into the test split. Raises Problem."""
    train = splits["train"]
    same = first_copies(train.paths)
    if train.groups is None:
        held_out = stratified(train.labels, TEST_FRACTION, TEST_SEED, same)
    else:
        groups = join(numbered({"train": train})["train"], pairs_of(same))
        held_out = stratified_groups(train.labels, TEST_FRACTION, TEST_SEED, groups)

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


def stratified_groups(
    labels: np.ndarray, fraction: float, seed: int, groups: np.ndarray
) -> np.ndarray:
    """Choose whole groups at random until about `fraction` of every class is chosen: bool [n].

    groups: int64 [n], equal for what belongs together, whatever its labels are. At least one member
    of every class is chosen and at least one is not; the only member of a class is not. A class for
    which whole groups cannot do that is torn apart, member by member.
    """
    _, group = np.unique(groups, return_inverse=True)
    draw = GroupDraw(labels, group, fraction)
    order = np.random.default_rng(seed).permutation(len(draw.counts)).tolist()

    for number in order:
        if draw.cost(number) < 0 and draw.fits(number):
            draw.choose(number)

    # Where every group is too large, the one that exceeds least. The rarest classes have the fewest
    # groups, and so are served first.
    for label in draw.without_chosen():
        able = [number for number in order if draw.can_serve(number, label)]
        if able:
            draw.choose(min(able, key=draw.cost))

    # Tearing a class apart is better than having none of it to train on or to test on.
    chosen = draw.is_chosen[group]
    one_by_one = choose(labels, fraction, seed)
    for label in draw.without_chosen():
        members = labels == label
        chosen[members] = one_by_one[members]
    return chosen


class GroupDraw:
    """Groups that are being chosen, and how many members of each class they hold.

    labels, group: int64 [n], the class and the group of each member, the groups numbered from 0.
    """

    def __init__(self, labels: np.ndarray, group: np.ndarray, fraction: float):
        self.total = Counter(labels.tolist())  # members by class
        self.chosen = Counter()
        self.wanted = {}
        for label, total in self.total.items():
            self.wanted[label] = min(max(round(total * fraction), 1), total - 1)

        self.is_chosen = np.zeros(group.max() + 1, dtype=bool)
        self.counts = [Counter() for _ in self.is_chosen]  # of each group, members by class
        for number, label in zip(group.tolist(), labels.tolist(), strict=True):
            self.counts[number][label] += 1

    def cost(self, number: int) -> float:
        """How much farther from what is wanted a group brings its classes, as parts of the classes.

        Below 0 if it brings them closer.
        """
        cost = 0.0
        for label, count in self.counts[number].items():
            before = abs(self.chosen[label] - self.wanted[label])
            after = abs(self.chosen[label] + count - self.wanted[label])
            cost += (after - before) / self.total[label]
        return cost

    def fits(self, number: int) -> bool:
        """Would what is chosen exceed what is wanted of no class by much, and leave some of all?"""
        for label, count in self.counts[number].items():
            after = self.chosen[label] + count
            if after > MOST_OVERSHOOT * self.wanted[label] or after == self.total[label]:
                return False
        return True

    def can_serve(self, number: int, label: int) -> bool:
        """Does a group hold some of a class, and would choosing it leave some of all classes?"""
        counts = self.counts[number]
        if label not in counts:
            return False
        return all(self.chosen[each] + counts[each] < self.total[each] for each in counts)

    def choose(self, number: int) -> None:
        """Choose a group."""
        self.chosen.update(self.counts[number])
        self.is_chosen[number] = True

    def without_chosen(self) -> Iterator[int]:
        """The classes of two or more members of which none is chosen yet, the smallest first."""
        for label in sorted(self.total, key=lambda label: (self.total[label], label)):
            if self.total[label] > 1 and self.chosen[label] == 0:
                yield label


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
