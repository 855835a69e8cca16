"""What a dataset is, its statistics, and the fingerprint by which a later run recognises it."""

import hashlib
import math
from dataclasses import dataclass, field, replace

import numpy as np

from inference.errors import Problem

SPLITS = ("train", "val", "test")
SAMPLED = 100  # of a split's images go into its fingerprint with their content


@dataclass(frozen=True)
class Dataset:
    """Images as uint8 [N, height, width, channels], labels as int64 [N] indexing `classes`.

    val_images and val_labels are None unless the data has a validation split of its own. white is the level
    of 16-bit pixels that became 255. fingerprint: see `differences`. paths: of the files, if any, by split.
    findings: of data/doctor.py, once it has examined the dataset.

    For task "regression": features float32 [N, n], targets float32 [N, 1], and `classes` names the target.
    """

    name: str
    classes: list[str]
    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    task: str = "classification"
    val_images: np.ndarray | None = None
    val_labels: np.ndarray | None = None
    white: int = 65535
    fingerprint: dict = field(default_factory=dict)
    paths: dict[str, list[str]] = field(default_factory=dict)
    findings: object = None


def with_fingerprint(dataset: Dataset) -> Dataset:
    """The dataset with the fingerprint of its arrays: of all labels and the content of some images."""
    fingerprint = {"classes": list(dataset.classes)}
    for split in ("train", "test"):
        images, labels = (getattr(dataset, f"{split}_{what}") for what in ("images", "labels"))
        some = images[:: max(1, len(images) // SAMPLED)]
        content = (str(images.shape).encode(), labels.tobytes(), some.tobytes())
        fingerprint[split] = {"images": len(images), "hash": digest(*content)}
    return replace(dataset, fingerprint=fingerprint)


def digest(*contents: bytes) -> str:
    """A short hash, in hexadecimal."""
    return hashlib.sha256(b"".join(contents)).hexdigest()[:16]


def differences(old: dict, new: dict, splits: tuple[str, ...] = SPLITS) -> list[str]:
    """What has changed between two fingerprints of a dataset, in words; empty if nothing has.

    A fingerprint is {"classes": names, split: {"images": their number, "hash": of them}}, which JSON can
    hold. It does not depend on where the data is, nor on file times, so that a copy has the same.
    """
    changes = [f"class {name!r} is gone" for name in old["classes"] if name not in new["classes"]]
    changes += [f"class {name!r} is new" for name in new["classes"] if name not in old["classes"]]
    for split in splits:
        before, now = old.get(split), new.get(split)
        if before == now:
            continue
        if before is None or now is None:
            changes.append(f"the {split} split is {'new' if before is None else 'gone'}")
        elif before["images"] != now["images"]:
            changes.append(f"the {split} split has {now['images']:,} images, it had {before['images']:,}")
        else:
            changes.append(f"the {split} split has other images, or the same with other labels")
    return changes


def refuse_changes(run: str, before: dict, now: dict, splits: tuple[str, ...] = SPLITS) -> None:
    """Raise Problem if one of these splits is not what the run was trained with; see `differences`."""
    changes = differences(before, now, splits)
    if changes:
        raise Problem(f"the data is not what {run} was trained with: {'; '.join(changes)}")


def mean_and_std(images: np.ndarray) -> tuple[list[float], list[float]]:
    """The mean and standard deviation of each channel of uint8 [N, H, W, C], scaled to 0..1.

    Both are exact: they come from a histogram, which also keeps the memory small.
    """
    levels, means, stds = np.arange(256), [], []
    parts = [images[start : start + 1024] for start in range(0, len(images), 1024)]
    for channel in range(images.shape[3]):
        counts = sum(np.bincount(part[..., channel].ravel(), minlength=256) for part in parts)
        mean = np.average(levels, weights=counts)
        std = math.sqrt(np.average((levels - mean) ** 2, weights=counts))
        means.append(float(mean / 255))
        stds.append(std / 255 or 1.0)  # a constant channel has nothing to scale
    return means, stds
