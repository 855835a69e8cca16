"""What a dataset is, its statistics, and the fingerprint by which a later run recognises it."""

import hashlib
import math
from dataclasses import dataclass, field, replace

import numpy as np

from inference.errors import Problem
from inference.task import TASKS

SPLITS = ("train", "val", "test")
SAMPLED = 100  # how many images of a split enter its fingerprint with their content
STATISTICS_BLOCK = 1024  # images at a time, so that a mapped dataset is never in memory as a whole


@dataclass(frozen=True)
class Dataset:
    """Images as uint8 [N, height, width, channels], labels as int64 [N] that index `classes`.

    val_images and val_labels are None unless the data has a validation split of its own. For task
    "regression": features float32 [N, n], targets float32 [N, 1], and `classes` names the target.
    """

    name: str
    classes: list[str]
    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    task: str = "classification"  # a name in inference.task.TASKS
    val_images: np.ndarray | None = None
    val_labels: np.ndarray | None = None
    white: int = 65535  # the level of 16-bit pixels that became 255
    ground: str | None = None  # what transparent pixels were laid on, of files only
    fit: str = (
        "stretch"  # how images got their size, and others get it, unless another is asked for
    )
    unseen: float | None = None  # the part of the average image that was cut away, if it is known
    fingerprint: dict = field(default_factory=dict)  # see `differences`
    paths: dict[str, list[str]] = field(default_factory=dict)  # of the files, if any, by split
    # The number of each image's group by split, int64 [n], if there are groups; see groups.py.
    groups: dict[str, np.ndarray] = field(default_factory=dict)
    findings: object = None  # doctor.Findings, once the doctor has examined the dataset

    @property
    def has_images(self) -> bool:
        """Are these images with classes, and not features with targets?"""
        return TASKS[self.task].has_images

    def images_of(self, split: str) -> np.ndarray | None:
        """The images of "train", "val" or "test"; None if there is no such split."""
        images = {"train": self.train_images, "val": self.val_images, "test": self.test_images}
        return images[split]

    def labels_of(self, split: str) -> np.ndarray | None:
        """The labels of "train", "val" or "test"; None if there is no such split."""
        labels = {"train": self.train_labels, "val": self.val_labels, "test": self.test_labels}
        return labels[split]

    def name_of(self, split: str, number: int) -> str:
        """What to call an image in a message: its path, or its split and number if it has none."""
        if split in self.paths:
            return self.paths[split][number]
        return f"{split} image {number}"


# ----------------------------------------------------------------------------------- fingerprints
def with_fingerprint(dataset: Dataset) -> Dataset:
    """The dataset with a fingerprint of its arrays: all labels, and the content of some images."""
    fingerprint = {"classes": list(dataset.classes)}

    for split in ("train", "test"):
        images = dataset.images_of(split)
        labels = dataset.labels_of(split)
        sampled = images[:: sampling_step(len(images))]

        shape = str(images.shape).encode()
        fingerprint[split] = {
            "images": len(images),
            "hash": digest(shape, labels.tobytes(), sampled.tobytes()),
        }

    return replace(dataset, fingerprint=fingerprint)


def sampling_step(count: int) -> int:
    """Every how many of `count` images one is taken, so that about SAMPLED are."""
    return max(1, count // SAMPLED)


def digest(*contents: bytes) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of the contents one after the other."""
    return hashlib.sha256(b"".join(contents)).hexdigest()[:16]


def differences(old: dict, new: dict, splits: tuple[str, ...] = SPLITS) -> list[str]:
    """What has changed between two fingerprints of a dataset, in words; empty if nothing has.

    A fingerprint is {"classes": names, split: {"images": count, "hash": digest}, ...}, which JSON
    can hold. It depends neither on where the data is nor on file times: a copy has the same.
    """
    changes = []

    for name in old["classes"]:
        if name not in new["classes"]:
            changes.append(f"class {name!r} is gone")

    for name in new["classes"]:
        if name not in old["classes"]:
            changes.append(f"class {name!r} is new")

    for split in splits:
        before = old.get(split)
        now = new.get(split)
        if before != now:
            changes.append(describe_change(split, before, now))

    return changes


def describe_change(split: str, before: dict | None, now: dict | None) -> str:
    """How a split differs from what it was, given its two unequal fingerprints."""
    if before is None:
        return f"the {split} split is new"
    if now is None:
        return f"the {split} split is gone"
    if before["images"] != now["images"]:
        return f"the {split} split has {now['images']:,} images, it had {before['images']:,}"
    return f"the {split} split has other images, or the same with other labels"


def refuse_changes(
    run_dir: str,
    before: dict,
    now: dict,
    splits: tuple[str, ...] = SPLITS,
) -> None:
    """Raise Problem if one of these splits is not what the run was trained with."""
    changes = differences(before, now, splits)
    if changes:
        raise Problem(f"the data is not what {run_dir} was trained with: {'; '.join(changes)}")


# ------------------------------------------------------------------------------------- statistics
def mean_and_std(images: np.ndarray) -> tuple[list[float], list[float]]:
    """The mean and standard deviation of each channel of uint8 [N, H, W, C], scaled to 0..1.

    Both are exact: they come from a histogram, which also keeps the memory small.
    """
    levels = np.arange(256)
    means = []
    stds = []

    for channel in range(images.shape[3]):
        counts = count_levels(images, channel)
        mean = np.average(levels, weights=counts)
        variance = np.average((levels - mean) ** 2, weights=counts)

        means.append(float(mean / 255))
        # A constant channel has nothing to scale, and must not divide by zero.
        stds.append(math.sqrt(variance) / 255 or 1.0)

    return means, stds


def count_levels(images: np.ndarray, channel: int) -> np.ndarray:
    """How many pixels have each level in one channel of uint8 [N, H, W, C]: int64 [256]."""
    counts = np.zeros(256, dtype=np.int64)
    for start in range(0, len(images), STATISTICS_BLOCK):
        block = images[start : start + STATISTICS_BLOCK, ..., channel]
        counts += np.bincount(block.ravel(), minlength=256)
    return counts
