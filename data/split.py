"""A split ready to be trained on: batches of uint8 images, gathered by index and augmented."""

import mmap
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch

from data.augment import gather
from data.groups import join, note_parts
from data.holdout import stratified, stratified_groups
from inference.errors import Problem
from model import resize

# Images held out for the calibration, at most, and as a part of the training split. A temperature
# needs 1,000, a sharp threshold of `known` more.
MOST_HELD_OUT = 2500
LARGEST_PART = 0.05

# A batch that is not trained on has at most so many images and pixels.
MOST_IMAGES = 125
MOST_PIXELS = 1_000_000

RESIZED_AT_A_TIME = 1024  # images


@dataclass
class Split:
    """Images or features with their labels, and which of them belong to the split.

    images: uint8 [N, H, W, C], or float32 features [N, n]. labels: int64 [N], or float32 targets
    [N, 1]. members: int64 [n], the rows of both that belong to the split, on the CPU. source: the
    array that `images` were made from; where it is a memory map of the right size, `images` is that
    map. same: int64 [N], equal for rows with equal pixels. groups: int64 [N], equal for rows that
    belong together, if the data says so.
    """

    images: torch.Tensor
    labels: torch.Tensor
    members: torch.Tensor
    source: np.ndarray
    same: np.ndarray | None = None
    groups: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.members)

    def part(self, chosen: np.ndarray) -> "Split":
        """The split of the members that bool [n] chooses."""
        return replace(self, members=self.members[torch.as_tensor(chosen)])

    def labels_of_members(self) -> np.ndarray:
        """The labels or targets of the members: [n], or [n, 1]."""
        return self.labels.cpu().numpy()[self.members]

    def class_shares(self, classes: int) -> torch.Tensor:
        """The share of each class: float32 [classes]."""
        labels = self.labels.cpu()[self.members]
        return torch.bincount(labels, minlength=classes) / len(self)

    def in_order(self, share: slice = slice(None)) -> Iterator[tuple]:
        """Yield (images, labels) of the members in one process' share, each once, not augmented."""
        device = self.labels.device
        size = evaluation_batch_size(self.images)
        batches = self.members[share].split(size)

        for index, following in with_next(batches):
            self._prefetch(following)
            yield self.images[index].to(device), self.labels[index.to(device)]

    def count_batches(self, batch_size: int, processes: int = 1) -> int:
        """How many batches `shuffled` yields in an epoch."""
        whole, rest = divmod(len(self), batch_size)

        # Batch norm cannot train on a single image, so a process needs two.
        uses_rest = rest >= 2 * processes or whole == 0
        return whole + uses_rest

    def shuffled(
        self,
        batch_size: int,
        augment: list[str],
        epoch: int,
        seed: int,
        done: int = 0,
        share: slice = slice(None),
    ) -> Iterator[tuple]:
        """Yield (images, labels, size of the whole batch) in random order, augmented by `gather`.

        batch_size: over all processes, each of which gets its `share` of a batch. The first `done`
        batches are left out. Order and augmentation follow from seed, epoch and position alone,
        whichever process computes them, so that a run can be resumed anywhere.
        """
        # An image is mirrored in every other epoch (alternating flip, Jordan 2024).
        flips = torch.rand(len(self.images), generator=seeded(seed)) < 0.5  # bool [N]
        if epoch % 2 == 1:
            flips = ~flips

        order = self.members[torch.randperm(len(self), generator=seeded(seed, epoch))]
        processes = share.step or 1
        count = self.count_batches(batch_size, processes)
        batches = order.split(batch_size)[done:count]

        device = self.labels.device
        for position, (index, following) in enumerate(with_next(batches), done):
            self._prefetch(following[share])
            generator = seeded(seed, epoch, position)
            images = gather(self.images, index, augment, flips, generator, share)
            yield images.to(device), self.labels[index[share].to(device)], len(index)

    def _prefetch(self, index: torch.Tensor) -> None:
        """Ask the system to read the next rows of a memory map while this batch computes.

        Read-ahead is turned off: for random rows it reads mostly unneeded pages (8 MB a row on one
        machine).
        """
        is_map = isinstance(self.source, np.memmap)
        is_mapped = is_map and self.images.data_ptr() == self.source.ctypes.data
        if not is_mapped or not hasattr(mmap, "MADV_RANDOM"):
            return

        pages = self.source._mmap
        pages.madvise(mmap.MADV_RANDOM)

        row_bytes = self.source[0].nbytes
        offset = self.source.ctypes.data - np.frombuffer(pages, np.uint8).ctypes.data
        for start in (offset + index * row_bytes).tolist():
            before = start % mmap.PAGESIZE  # advice is for whole pages
            pages.madvise(mmap.MADV_WILLNEED, start - before, before + row_bytes)


def evaluation_batch_size(images: torch.Tensor) -> int:
    """How many of images [N, H, W, C] or features [N, n] to take at a time without training."""
    pixels = images[0, ..., 0].numel()
    return max(1, min(MOST_IMAGES, MOST_PIXELS // pixels))


def with_next(batches: tuple[torch.Tensor, ...]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Each batch of an index with the one after it, which is empty at the end."""
    nothing = torch.empty(0, dtype=torch.int64)
    return pairwise([*batches, nothing])


def seed_of(*numbers: int) -> int:
    """A seed of its own for every tuple of numbers."""
    return zlib.crc32(repr(numbers).encode())


def seeded(*numbers: int) -> torch.Generator:
    """A generator of its own for every tuple of numbers, on the CPU."""
    return torch.Generator().manual_seed(seed_of(*numbers))


# ---------------------------------------------------------------------------------- making splits
def make_splits(dataset, settings, device: torch.device) -> dict[str, Split]:
    """The splits of a `data.Dataset` by name: "train", "test", and perhaps "val" or "held-out".

    settings: image_size, fit, val_fraction, calibration and seed. Raises Problem if a split would
    be empty.
    """

    def make(name: str) -> Split:
        images = dataset.images_of(name)
        labels = dataset.labels_of(name)
        return make_split(images, labels, settings.image_size, settings.fit, device)

    train = make("train")
    if dataset.findings:
        train.same = dataset.findings.same[: len(train)]
    if dataset.groups:
        train.groups = groups_with_copies(dataset)
    splits = {"train": train}

    if dataset.val_images is not None:
        splits["val"] = make("val")
    elif settings.val_fraction:
        splits["train"], splits["val"] = hold_out(train, settings.val_fraction, settings.seed)
        if not all(len(split) for split in splits.values()):
            raise Problem(
                f"--val-fraction {settings.val_fraction:g} leaves a split empty: too few images", 2
            )
        note_groups_of(splits, dataset.classes, settings.val_fraction)
    elif settings.calibration == "held-out":
        fraction = min(LARGEST_PART, MOST_HELD_OUT / len(train))
        splits["train"], splits["held-out"] = hold_out(train, fraction, settings.seed)
        note_groups_of(splits, dataset.classes, fraction)

    splits["test"] = make("test")
    return splits


def groups_with_copies(dataset) -> np.ndarray:
    """The groups of the training images, those with copies in common being one: int64 [n]."""
    groups = dataset.groups["train"]
    if not dataset.findings:
        return groups

    pairs = dataset.findings.alike
    within = (pairs < len(groups)).all(1)
    return join(groups, pairs[within])


def hold_out(split: Split, fraction: float, seed: int) -> tuple[Split, Split]:
    """Two parts of a split, the second with `fraction` of each class, of a regression that of all.

    Copies of an image go to the same part, and so do all images of a group.
    """
    labels = split.labels_of_members()
    if labels.ndim > 1:  # targets, [n, 1]
        labels = np.zeros(len(labels))

    if split.groups is not None:
        chosen = stratified_groups(labels, fraction, seed, split.groups[split.members])
        return split.part(~chosen), split.part(chosen)

    same = None
    if split.same is not None:
        same = split.same[split.members]

    chosen = stratified(labels, fraction, seed, same)
    return split.part(~chosen), split.part(chosen)


def note_groups_of(splits: dict[str, Split], classes: list[str], fraction: float) -> None:
    """Note the groups of what is left of a split and of what `hold_out` took, if there are any."""
    parts = {}
    for name, split in splits.items():
        if split.groups is None:
            return
        parts[name] = (split.labels_of_members(), split.groups[split.members])
    note_parts(parts, classes, fraction)


def make_split(
    images: np.ndarray,
    labels: np.ndarray,
    image_size: tuple[int, int],
    fit: str,
    device: torch.device,
) -> Split:
    """A Split of arrays on the device, images resized as the exported graph does, and rounded.

    On a GPU, a set too large for it stays in the machine's memory.
    """
    tensor = torch.from_numpy(images)

    is_image = tensor.dtype == torch.uint8
    if is_image and tuple(tensor.shape[1:3]) != tuple(image_size):
        tensor = resize_all(tensor, image_size, fit)

    if device.type != "cuda" or tensor.nbytes < torch.cuda.mem_get_info(device)[0] / 2:
        tensor = tensor.to(device)

    return Split(
        images=tensor,
        labels=torch.from_numpy(labels).to(device),
        members=torch.arange(len(labels)),
        source=images,
    )


def resize_all(images: torch.Tensor, image_size: tuple[int, int], fit: str) -> torch.Tensor:
    """Resize uint8 [N, H, W, C] to [N, *image_size, C], some at a time as floats are large."""
    parts = []
    for part in images.split(RESIZED_AT_A_TIME):
        parts.append(resize(part, image_size, fit).round().byte())
    return torch.cat(parts).contiguous()
