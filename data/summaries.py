"""All images of a dataset in a row, a hash and a thumbnail of each, and which have equal pixels."""

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F

from data.dataset import SPLITS, Dataset

BLOCK_BYTES = 4 << 20  # of pixels at a time
THUMBNAIL = 8  # the most pixels of a thumbnail in a row and in a column


class AllImages:
    """The images of all splits of a dataset, one after the other: training, validation, test.

    labels: int64 [N]. A row is the position of an image among all of them.
    """

    def __init__(self, dataset: Dataset):
        self.dataset = dataset
        self.parts = {}  # by split: uint8 [n, H, W, C]
        labels = []

        for split in SPLITS:
            images = dataset.images_of(split)
            if images is not None:
                self.parts[split] = images
                labels.append(dataset.labels_of(split))

        self.labels = np.concatenate(labels)

    def place(self, row: int) -> tuple[str, int]:
        """The split of an image, and its number in it."""
        number = int(row)
        for split, images in self.parts.items():
            if number < len(images):
                return split, number
            number -= len(images)
        raise IndexError(f"the dataset has no image {row}")

    def take(self, rows: np.ndarray) -> np.ndarray:
        """The images of these rows: uint8 [n, H, W, C]."""
        images = []
        for row in rows:
            split, number = self.place(row)
            images.append(self.parts[split][number])
        return np.stack(images)

    def name(self, row: int) -> str:
        """What to call an image in a message, with its label."""
        split, number = self.place(row)
        label = self.dataset.classes[self.labels[row]]
        return f"{self.dataset.name_of(split, number)} ({label})"

    def blocks(self) -> Iterator[np.ndarray]:
        """All images in order, uint8 [n, H, W, C], a few MB at a time."""
        image_bytes = self.dataset.train_images[0].nbytes
        step = max(1, BLOCK_BYTES // image_bytes)

        for images in self.parts.values():
            for start in range(0, len(images), step):
                yield images[start : start + step]


def summaries(images: AllImages) -> tuple[np.ndarray, np.ndarray]:
    """A hash of each image, uint64 [N], and its grey thumbnail, float32 [N, 64 or fewer]."""
    image_bytes = images.dataset.train_images[0].nbytes
    words = -(-image_bytes // 8)  # rounded up

    # Odd random factors: a multilinear hash of an image's 64-bit words, modulo 2 ** 64.
    factors = np.random.default_rng(0).integers(0, 1 << 63, words, dtype=np.uint64) * 2 + 1

    hashes = []
    thumbnails = []
    for block in images.blocks():
        pixels = block.reshape(len(block), -1)
        padding = -image_bytes % 8
        if padding:
            pixels = np.pad(pixels, ((0, 0), (0, padding)))

        hashes.append(pixels.view(np.uint64) @ factors)
        thumbnails.append(shrink(block, THUMBNAIL).reshape(len(block), -1))

    return np.concatenate(hashes), np.concatenate(thumbnails)


def thumbnail_shape(images: np.ndarray) -> tuple[int, int]:
    """The height and width of the thumbnails of images [N, H, W, C]."""
    height, width = images.shape[1:3]
    return min(height, THUMBNAIL), min(width, THUMBNAIL)


def shrink(images: np.ndarray, side: int) -> np.ndarray:
    """Grey float32 [n, h, w] of uint8 [n, H, W, C], where h and w are `side` or less."""
    planes = torch.from_numpy(images).permute(0, 3, 1, 2)  # [n, C, H, W]
    size = [min(length, side) for length in planes.shape[2:]]

    if list(planes.shape[2:]) != size:  # while it is uint8, for which torch is fastest
        planes = F.interpolate(planes, size, mode="bilinear", antialias=True)
    return planes.float().mean(1).numpy()


def first_equal(images: AllImages, hashes: np.ndarray) -> np.ndarray:
    """The row of the first image with the same pixels as each, mostly its own: int64 [N]."""
    _, first, inverse = np.unique(hashes, return_index=True, return_inverse=True)
    same = first[inverse]

    # Images that differ may have equal hashes: the pixels decide.
    for row in np.flatnonzero(same != np.arange(len(same))):
        image, earlier = images.take([row, same[row]])
        if not np.array_equal(image, earlier):
            same[row] = row
    return same
