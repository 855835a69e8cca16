"""A split ready to be trained on: batches gathered from uint8 images by index and augmented as a whole."""

import functools
import mmap
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch

from data.augment import gather
from data.files import stratified
from inference.errors import Problem

# Images held out for the calibration, at most. A temperature needs 1,000, a sharp threshold of `known` more.
HELD_OUT, LARGEST_PART = 2500, 0.05
MOST_PIXELS = 1_000_000  # in a batch that is not trained on


@dataclass
class Split:
    """images: uint8 [N, H, W, C], or float32 features [N, n]; labels: int64 [N], or float32 targets [N, 1].

    members: int64 [n], the rows of both that belong to the split, on the CPU. source: the array that `images`
    were made from; where it is a memory map of the right size, `images` is that map. same: int64 [N], equal
    for rows with equal pixels.
    """

    images: torch.Tensor
    labels: torch.Tensor
    members: torch.Tensor
    source: np.ndarray
    same: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.members)

    def part(self, chosen: np.ndarray) -> "Split":
        """The split of the members that bool [n] chooses."""
        return replace(self, members=self.members[torch.as_tensor(chosen)])

    def class_shares(self, classes: int) -> torch.Tensor:
        """The share of each class: float32 [classes]."""
        return torch.bincount(self.labels.cpu()[self.members], minlength=classes) / len(self)

    def in_order(self, share: slice = slice(None)) -> Iterator[tuple]:
        """Yield (images, labels) of the members in one process' share, each once and not augmented."""
        device, size = self.labels.device, max(1, min(125, MOST_PIXELS // self.images[0, ..., 0].numel()))
        for index, following in pairwise([*self.members[share].split(size), self.members[:0]]):
            self._prefetch(following)
            yield self.images[index].to(device), self.labels[index.to(device)]

    def count_batches(self, batch_size: int, processes: int = 1) -> int:
        """How many batches `shuffled` yields in an epoch."""
        whole, rest = divmod(len(self), batch_size)
        return whole + (rest >= 2 * processes or whole == 0)  # batch norm cannot train on a single image

    def shuffled(self, batch_size: int, augment: list[str], epoch: int, seed: int, done=0, share=slice(None)):
        """Yield (images, labels, how many the whole batch has) in random order, augmented; see `gather`.

        batch_size: over all processes, each of which gets its `share` of a batch, see `Processes`. The first
        `done` batches are left out. Order and augmentation follow from seed, epoch and position alone,
        whichever process computes them, so that a run can be resumed anywhere. flip alternates (Jordan 2024):
        an image is mirrored in every other epoch.
        """
        flips = (torch.rand(len(self.images), generator=seeded(seed)) < 0.5) ^ (epoch % 2 == 1)
        order = self.members[torch.randperm(len(self), generator=seeded(seed, epoch))]
        batches = order.split(batch_size)[: self.count_batches(batch_size, share.step or 1)]
        device = self.labels.device
        for position, (index, following) in enumerate(pairwise([*batches[done:], order[:0]]), done):
            self._prefetch(following[share])
            images = gather(self.images, index, augment, flips, seeded(seed, epoch, position), share)
            yield images.to(device), self.labels[index[share].to(device)], len(index)

    def _prefetch(self, index):
        """Ask the system to read the next rows of a memory map from disk while this batch computes.

        Read-ahead is turned off: for random rows it reads mostly unneeded pages (8 MB a row on one machine).
        """
        mapped = isinstance(self.source, np.memmap) and self.images.data_ptr() == self.source.ctypes.data
        if not mapped or not hasattr(mmap, "MADV_RANDOM"):
            return
        pages, row = self.source._mmap, self.source[0].nbytes
        pages.madvise(mmap.MADV_RANDOM)
        first = self.source.ctypes.data - np.frombuffer(pages, np.uint8).ctypes.data
        for start in (first + index * row).tolist():
            before = start % mmap.PAGESIZE  # advice is for whole pages
            pages.madvise(mmap.MADV_WILLNEED, start - before, before + row)


def seed_of(*numbers: int) -> int:
    """A seed of its own for every tuple of numbers."""
    return zlib.crc32(repr(numbers).encode())


def seeded(*numbers: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed_of(*numbers))


def make_splits(dataset, settings, device: torch.device, resize: Callable) -> dict[str, Split]:
    """The splits of a `data.Dataset` by name: "train", "test", and perhaps "val" or "held-out".

    settings: image_size, val_fraction, calibration and seed. Raises Problem if a split would be empty.
    """
    images = settings.image_size, device, functools.partial(resize, fit=settings.fit)
    splits = {"train": make_split(dataset.train_images, dataset.train_labels, *images)}
    if dataset.findings:
        splits["train"].same = dataset.findings.same[: len(dataset.train_images)]
    if dataset.val_images is not None:
        splits["val"] = make_split(dataset.val_images, dataset.val_labels, *images)
    elif settings.val_fraction:
        splits["train"], splits["val"] = hold_out(splits["train"], settings.val_fraction, settings.seed)
        if not all(len(split) for split in splits.values()):
            raise Problem(f"--val-fraction {settings.val_fraction:g} leaves a split empty: too few images", 2)
    elif settings.calibration == "held-out":
        fraction = min(LARGEST_PART, HELD_OUT / len(splits["train"]))
        splits["train"], splits["held-out"] = hold_out(splits["train"], fraction, settings.seed)
    splits["test"] = make_split(dataset.test_images, dataset.test_labels, *images)
    return splits


def hold_out(split: Split, fraction: float, seed: int) -> tuple[Split, Split]:
    """Two parts of a split, the second with `fraction` of each class, of a regression that of all.

    Copies of an image go to the same part.
    """
    labels = split.labels.cpu().numpy()[split.members]
    same = None if split.same is None else split.same[split.members]
    chosen = stratified(labels if labels.ndim == 1 else np.zeros(len(labels)), fraction, seed, same)
    return split.part(~chosen), split.part(chosen)


def make_split(images: np.ndarray, labels: np.ndarray, size, device: torch.device, resize: Callable) -> Split:
    """A Split of arrays on the device, images resized to `size` by `resize`, the graph's own, and rounded.

    On a GPU, a set too large for it stays in the machine's memory.
    """
    tensor = torch.from_numpy(images)
    if tensor.dtype == torch.uint8 and tuple(tensor.shape[1:3]) != tuple(size):
        tensor = torch.cat([resize(part, size).round().byte() for part in tensor.split(1024)]).contiguous()
    if device.type != "cuda" or tensor.nbytes < torch.cuda.mem_get_info(device)[0] / 2:
        tensor = tensor.to(device)
    return Split(tensor, torch.from_numpy(labels).to(device), torch.arange(len(labels)), images)
