"""What a dataset is, and the statistics that its images are normalised with."""

import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Dataset:
    """Images as uint8 [N, height, width, channels], labels as int64 [N] indexing `classes`.

    For task "regression", features as float32 [N, n] take the place of the images and targets as float32
    [N, 1] that of the labels, and `classes` names the target.
    """

    name: str
    classes: list[str]
    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    task: str = "classification"


def mean_and_std(images: np.ndarray) -> tuple[list[float], list[float]]:
    """The mean and standard deviation of each channel of uint8 [N, H, W, C], scaled to 0..1.

    Both are exact: they come from a histogram, which also keeps the memory small.
    """
    levels = np.arange(256)
    means, stds = [], []
    for channel in range(images.shape[3]):
        counts = np.zeros(256, dtype=np.int64)
        for start in range(0, len(images), 1024):
            counts += np.bincount(images[start : start + 1024, ..., channel].ravel(), minlength=256)
        mean = (counts * levels).sum() / counts.sum()
        std = math.sqrt((counts * (levels - mean) ** 2).sum() / counts.sum())
        means.append(float(mean / 255))
        stds.append(std / 255 or 1.0)  # a constant channel has nothing to scale
    return means, stds
