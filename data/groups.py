"""Which images belong together: pictures of one scene, patient or clip stay on one side of every
split.

The groups are the folders inside class folders, or what the group column of a CSV file says, or
what --group-by finds in the paths. A group is known by its name, in whichever class or split its
images are.
"""

import re
from dataclasses import replace

import numpy as np

from data import NO_GROUPS
from data.files import Files, count_of, name_some
from data.notes import note, warn
from inference.errors import Problem

ALONE = ""  # the group of an image that belongs to no other
FAR_FROM_FRACTION = 0.1  # a class of which this much more or less is held out is named


# ---------------------------------------------------------------------------------- finding groups
def with_groups(splits: dict[str, Files], group_by: str | None) -> dict[str, Files]:
    """The files with their groups: as they were listed, or by --group-by.

    `Files.groups` is None in every split if no image is in a group. Raises Problem if --group-by is
    found in no path.
    """
    if group_by == NO_GROUPS:
        splits = {split: replace(files, groups=None) for split, files in splits.items()}
    elif group_by is not None:
        splits = group_by_path(splits, group_by)

    # A split without groups beside one that has them: each of its images is alone.
    found = any(any(files.groups or ()) for files in splits.values())
    grouped = {}
    for split, files in splits.items():
        groups = None
        if found:
            groups = files.groups or [ALONE] * len(files)
        grouped[split] = replace(files, groups=groups)
    return grouped


def group_by_path(splits: dict[str, Files], expression: str) -> dict[str, Files]:
    """The files with the groups that the first bracket of a regular expression names.

    The expression is searched in the path below the data's root, with / on every system. Raises
    Problem if it is found in none.
    """
    pattern = re.compile(expression)
    grouped = {}
    unmatched = []
    total = 0

    for split, files in splits.items():
        groups = []
        for path in files.relative_paths():
            match = pattern.search(path)
            name = match[1] if match else None
            groups.append(name or ALONE)
            if not name:
                unmatched.append(path)
        grouped[split] = replace(files, groups=groups)
        total += len(files)

    if len(unmatched) == total:
        raise Problem(f"--group-by {expression!r} is found in no path, such as {unmatched[0]}", 2)
    if unmatched:
        some = f"{len(unmatched):,} of {count_of(total, 'path')}"
        note(f"--group-by is not found in {some}, each in no group: {name_some(unmatched)}")
    return grouped


def numbered(splits: dict[str, Files]) -> dict[str, np.ndarray]:
    """A number for the group of each file, the same in all splits: int64 [n] by split.

    Empty if the files have no groups.
    """
    numbers = {}
    numbers_by_name = {}
    count = 0

    for split, files in splits.items():
        if files.groups is None:
            continue
        of_split = np.empty(len(files), dtype=np.int64)
        for position, name in enumerate(files.groups):
            number = count
            if name != ALONE:
                number = numbers_by_name.setdefault(name, count)
            of_split[position] = number
            count += 1
        numbers[split] = of_split

    return numbers


def join(groups: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """Groups [n] of which those are one that a pair of rows, int64 [pairs, 2], connects: int64 [n].

    Copies of an image connect the groups they are in.
    """
    _, group = np.unique(groups, return_inverse=True)
    parents = list(range(group.max() + 1))

    def root_of(number: int) -> int:
        while parents[number] != number:
            parents[number] = parents[parents[number]]
            number = parents[number]
        return number

    for first, second in group[pairs].tolist():
        low, high = sorted((root_of(first), root_of(second)))
        parents[high] = low

    roots = np.array([root_of(number) for number in range(len(parents))], dtype=np.int64)
    return roots[group]


def pairs_of(same: np.ndarray) -> np.ndarray:
    """The rows that have an earlier copy, with that copy: int64 [pairs, 2] of `same`, int64 [n]."""
    rows = np.flatnonzero(same != np.arange(len(same)))
    return np.stack([same[rows], rows], axis=1)


# --------------------------------------------------------------------------- what a user is told
def note_groups(splits: dict[str, Files], source: str) -> None:
    """Note how many groups the images of all splits form. source: what says so."""
    names = [name for files in splits.values() for name in files.groups]
    alone = names.count(ALONE)
    groups = len(set(names) - {ALONE})

    rest = f"; {count_of(alone, 'other image')} in none" if alone else ""
    note(
        f"{count_of(len(names) - alone, 'image')} in {count_of(groups, 'group')}, each on one side "
        f"of every split{rest} ({source})"
    )


def note_parts(
    parts: dict[str, tuple[np.ndarray, np.ndarray]], classes: list[str], fraction: float
) -> None:
    """Note how many groups and images two parts of a split have, and warn of what is torn apart.

    parts: by name, the labels and groups, int64 [n] each, of the rest and of what was held out.
    fraction: of each class that was to be held out.
    """
    counts = []
    for name, (_, groups) in parts.items():
        counts.append(f"{name} {len(np.unique(groups)):,} of {count_of(len(groups), 'image')}")
    note(f"groups: {', '.join(counts)}")

    (rest_labels, rest_groups), (labels, groups) = parts.values()
    torn = np.intersect1d(rest_groups, groups)
    rest = np.bincount(rest_labels, minlength=len(classes))
    held_out = np.bincount(labels, minlength=len(classes))
    warn_torn(labels[np.isin(groups, torn)], classes, list(parts))

    shares = held_out / np.maximum(rest + held_out, 1)
    far = np.flatnonzero(np.abs(shares - fraction) > FAR_FROM_FRACTION)
    far = [number for number in far if rest[number] + held_out[number] > 1]
    if len(far):
        named = name_some(f"{classes[number]!r} {shares[number]:.0%}" for number in far)
        note(f"whole groups cannot give {list(parts)[1]} {fraction:.0%} of each class: {named}")


def warn_torn(labels: np.ndarray, classes: list[str], parts: list[str]) -> None:
    """Warn of classes that had to be torn apart. labels: of the images that were held out so."""
    torn = np.unique(labels)
    if len(torn) == 0:
        return
    named = name_some(repr(classes[number]) for number in torn)
    kind = "class has" if len(torn) == 1 else "classes have"
    warn(
        f"{len(torn):,} {kind} too few groups for {' and '.join(parts)}, so that images that "
        f"belong together are in both: {named}; results for them are too good"
    )


def warn_shared(splits: dict[str, Files]) -> None:
    """Warn of groups that the data itself has put on both sides of the test or validation split."""
    for split in ("val", "test"):
        if split not in splits or splits[split].groups is None:
            continue
        known = set(splits["train"].groups) - {ALONE}
        shared = [name for name in splits[split].groups if name in known]
        if shared:
            names = list(dict.fromkeys(shared))
            images = f"{len(shared):,} of {count_of(len(splits[split]), 'image')}"
            warn(
                f"{count_of(len(names), 'group')} of the {split} split, {images}, are also in the "
                f"training split: {name_some(names)}; results on it are too good"
            )
