"""A doctor for datasets: what may be wrong with the images, said in a line each.

Exact copies have equal pixels; see near_copies.py for images that are nearly the same. Nothing is
ever deleted.
"""

from dataclasses import dataclass, replace

import numpy as np

from data.dataset import Dataset
from data.groups import join
from data.mirrored import Mirrored, harm_of_flip
from data.near_copies import find_near
from data.notes import note
from data.summaries import AllImages, first_equal, summaries, thumbnail_shape

MOST_SHOWN = 6  # pairs of images that the report shows
FEWEST_JUDGED = 20  # images of a class, and of all others, whose light is compared
LEAST_DARKER = 32  # grey levels of 255: as light as this changes from photo to photo
TAIL = 0.1  # of a class and of the others, the part that may overlap where one is called darker


@dataclass(frozen=True)
class Findings:
    """What the doctor has found. A row is the position of an image in training, validation, test.

    pairs: up to MOST_SHOWN, the worst first, each (image, image, name, name). mirrored: None unless
    mirrored images look like those of other classes, or if that was not asked.
    """

    same: np.ndarray  # int64 [rows]: the first row with the same pixels, mostly the row itself
    alike: np.ndarray  # int64 [n, 2]: pairs of rows that are copies or nearly the same
    leaked: np.ndarray  # bool [test images]: is it, or nearly the same, in the training split?
    pairs: list[tuple]
    mirrored: Mirrored | None = None


@dataclass(frozen=True)
class Copies:
    """Images that a dataset has more than once. Pairs are int64 [n, 2], the lower row first."""

    same: np.ndarray  # int64 [rows], see Findings
    exact: np.ndarray  # pairs with equal pixels
    near: np.ndarray  # pairs that are nearly the same
    leaked: np.ndarray  # bool [rows]: a test image whose like is in the training split

    def pairs(self) -> np.ndarray:
        """All pairs, the exact ones first."""
        return np.concatenate([self.exact, self.near])


def examined(dataset: Dataset, flips: bool = False) -> Dataset:
    """The dataset with its `Findings`, after noting them. A regression is returned as it is.

    flips: will images be mirrored in training?
    """
    if not dataset.has_images:
        return dataset

    images = AllImages(dataset)
    hashes, thumbnails = summaries(images)
    copies = find_copies(images, hashes, thumbnails)

    pairs = copies.pairs()
    first, second = pairs.T
    conflicting = images.labels[first] != images.labels[second]
    crossing = (first < len(dataset.train_images)) & copies.leaked[second]

    note_pairs(images, "exact copies of an image", copies.exact)
    note_pairs(images, "near-duplicate pairs of images", copies.near)
    note_pairs(images, "copies with conflicting labels", pairs[conflicting])
    note_leaked(images, pairs[crossing], copies.leaked.sum())
    note_dark_classes(images, thumbnails.mean(1))

    mirrored = None
    if flips:
        mirrored = look_in_a_mirror(images, thumbnails, copies)

    # Conflicting labels are worst, then leaks; lexsort's last key is its first criterion.
    worst_first = np.lexsort((~crossing, ~conflicting))
    shown = pairs[worst_first[:MOST_SHOWN]]
    findings = Findings(
        same=copies.same,
        alike=pairs,
        leaked=copies.leaked[-len(dataset.test_images) :],
        pairs=[describe_pair(images, pair) for pair in shown],
        mirrored=mirrored,
    )
    return replace(dataset, findings=findings)


def find_copies(images: AllImages, hashes: np.ndarray, thumbnails: np.ndarray) -> Copies:
    """The exact and the near copies, from the images' hashes [N] and grey thumbnails [N, d]."""
    same = first_equal(images, hashes)
    rows = np.arange(len(same))
    is_first = same == rows

    exact = np.stack([same, rows], axis=1)[~is_first]
    near = find_near(images, thumbnails, np.flatnonzero(is_first))

    trained = len(images.dataset.train_images)
    crosses = (near[:, 0] < trained) & (near[:, 1] >= trained)
    near_training = near[crosses, 1]

    # A copy of a test image leaks if that image is near one of the training split.
    leaked = (same < trained) | np.isin(same, near_training)
    leaked[: -len(images.dataset.test_images)] = False

    return Copies(same=same, exact=exact, near=near, leaked=leaked)


def look_in_a_mirror(images: AllImages, thumbnails: np.ndarray, copies: Copies) -> Mirrored | None:
    """Do the training images, mirrored, look like images of other classes? See `harm_of_flip`."""
    trained = len(images.dataset.train_images)
    pairs = copies.pairs()
    within = (pairs < trained).all(1)
    groups = images.dataset.groups.get("train", np.arange(trained))
    return harm_of_flip(
        thumbnails[:trained],
        thumbnail_shape(images.dataset.train_images),
        images.dataset.train_labels,
        join(groups, pairs[within]),
    )


def describe_pair(images: AllImages, pair: np.ndarray) -> tuple:
    """Two images, uint8 [H, W, C], and their names."""
    first, second = images.take(pair)
    first_name, second_name = [images.name(row) for row in pair]
    return first, second, first_name, second_name


# ------------------------------------------------------------------------------------------- notes
def note_pairs(images: AllImages, kind: str, pairs: np.ndarray) -> None:
    """Note how many pairs [n, 2] of a kind there are, and name the first."""
    if len(pairs):
        note(f"{kind}: {len(pairs):,}, the first: {name_pair(images, pairs[0])}")


def note_leaked(images: AllImages, pairs: np.ndarray, count: int) -> None:
    """Note how many test images leaked, and name the first of the pairs [n, 2] that show it."""
    if len(pairs):
        kind = "test images that are also in the training split"
        note(f"{kind}: {count:,}, the first: {name_pair(images, pairs[0])}")


def name_pair(images: AllImages, pair: np.ndarray) -> str:
    first, second = pair
    return f"{images.name(first)} and {images.name(second)}"


def note_dark_classes(images: AllImages, light: np.ndarray) -> None:
    """Note a class darker than nearly all other images: a network may learn the light alone.

    light: the mean grey level of each image, [N].
    """
    for label, name in enumerate(images.dataset.classes):
        own = light[images.labels == label]
        others = light[images.labels != label]
        if min(len(own), len(others)) < FEWEST_JUDGED:
            continue

        difference = others.mean() - own.mean()
        overlaps = np.quantile(own, 1 - TAIL) >= np.quantile(others, TAIL)
        if difference >= LEAST_DARKER and not overlaps:
            note(
                f"class {name!r} is much darker than the others: a network may tell it apart by "
                f"brightness alone (mean {own.mean():.0f} of 255, others {others.mean():.0f})"
            )
