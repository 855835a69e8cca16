"""The image files of a dataset by split, whichever list they come from, and the options to read them with."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from step3_infer import Problem, say

TEST_FRACTION = 0.2  # held out where the data comes without a test split


@dataclass(frozen=True)
class Options:
    """How `folder` and `csv` are read; most fields are command line options of the same name.

    image_size (height, width) and channels are derived from the images if None. usual_size is the image size
    if the images differ in size or are large. resize is the exported graph's own function, from a uint8
    tensor [1, height, width, channels] and a size to the resized tensor.
    """

    image_size: tuple[int, int] | None = None
    channels: int | None = None
    usual_size: int = 64
    resize: Callable | None = None
    strict: bool = False
    cache_dir: str | None = None
    image_root: str | None = None
    test_csv: str | None = None
    image_column: str | None = None
    label_column: str | None = None


@dataclass(frozen=True)
class Files:
    """The files of one split: their paths, and their labels as int64 [n]."""

    paths: list[str]
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.paths)

    def part(self, chosen: np.ndarray) -> "Files":
        """The files that bool [n] chooses."""
        return Files([self.paths[i] for i in np.flatnonzero(chosen)], self.labels[chosen])


@dataclass(frozen=True)
class Listing:
    """The files of a dataset: the names of its classes, and its splits by name, "train" first."""

    classes: list[str]
    splits: dict[str, Files]


def stratified(labels: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Choose `fraction` of every class at random: bool [n].

    At least one member of every class is chosen and at least one is not; the only member of a class is not.
    """
    rng, chosen = np.random.default_rng(seed), np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        count = min(max(round(len(members) * fraction), 1), len(members) - 1)
        chosen[rng.permutation(members)[:count]] = True
    return chosen


def hold_out_test(listing: Listing, source: str) -> Listing:
    """Turn a stratified part of the training split into the test split. Raises Problem.

    The choice is the same in every run, whatever its --seed.
    """
    train = listing.splits["train"]
    held = stratified(train.labels, TEST_FRACTION, seed=0)
    if not held.any():
        raise Problem(
            f"{source} has one image of each class, which leaves none to test on: "
            "each class needs two or more images"
        )
    say(
        f"note: no test split given: {held.sum():,} of {len(train):,} images held out for it, "
        f"{TEST_FRACTION:.0%} of each class (at least one)"
    )
    splits = {**listing.splits, "train": train.part(~held), "test": train.part(held)}
    return Listing(listing.classes, splits)
