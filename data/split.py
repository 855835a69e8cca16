"""A split ready to be trained on: batches gathered from uint8 images by index and augmented as a whole."""

import zlib
from dataclasses import dataclass

import numpy as np
import torch

from data.cache import prefetch

AUGMENTATIONS = ("flip", "translate", "cutout")


@dataclass
class Split:
    """images: uint8 [N, H, W, C], or float32 features [N, n]; labels: int64 [N], or float32 targets [N, 1].

    members: int64 [n], the rows of both that belong to the split, on the CPU. source: the array that `images` were
    made from; where it is a memory map of the right size, `images` is that map.
    """

    images: torch.Tensor
    labels: torch.Tensor
    members: torch.Tensor
    source: np.ndarray

    def __len__(self):
        return len(self.members)

    def part(self, chosen):
        """The split of the members that bool [n] chooses."""
        return Split(self.images, self.labels, self.members[torch.as_tensor(chosen)], self.source)

    def without_easy(self, losses, skip, epoch, seed):
        """-> (this split without the part `skip` of it, float32 [N]: how many images each row stands for).

        losses: float32 [N], each row's when it was last trained on. Half of what is left has the greatest losses; the
        other half is drawn from all the rest and stands for it (after InfoBatch, Qin et al. 2024).
        """
        hard = half_left(len(self), skip)
        order = losses[self.members].argsort(descending=True, stable=True)
        drawn = order[hard:][torch.randperm(len(self) - hard, generator=seeded(seed, epoch, "easy"))[:hard]]
        kept = torch.zeros(len(self), dtype=torch.bool)
        kept[order[:hard]] = kept[drawn] = True
        counts = torch.ones(len(self.images))
        counts[self.members[drawn]] = (len(self) - hard) / max(len(drawn), 1)
        return self.part(kept), counts

    def in_order(self, batch_size, share=slice(None)):
        """Yield (images, labels) of the members of one process's share, each once, as they are."""
        for index, following in ahead(self.members[share].split(batch_size)):
            images, index = self._pick(index, following, lambda index=index: self.images[index])
            yield images, self.labels[index]

    def count_batches(self, batch_size, processes=1, skip=0.0):
        """How many batches `shuffled` yields; skip: as if `without_easy`."""
        count = min(2 * half_left(len(self), skip), len(self)) if skip else len(self)
        whole, rest = divmod(count, batch_size)
        return whole + (rest >= 2 * processes or whole == 0)  # batch norm cannot train on a single image

    def shuffled(self, batch_size, augment, epoch, seed, done=0, process=0, processes=1):
        """Yield (images, labels, rows of the whole batch) in random order, augmented; see `gather`.

        batch_size: over all processes; this one's share is every `processes`-th of it. The first `done` batches are
        left out. Order and augmentation follow from seed, epoch and position alone, whoever computes what, so that a
        run can go on anywhere. flip alternates (Jordan 2024): an image is mirrored every other epoch.
        """
        flips = (torch.rand(len(self.images), generator=seeded(seed)) < 0.5) ^ (epoch % 2 == 1)
        order = self.members[torch.randperm(len(self), generator=seeded(seed, epoch))]
        indices = order.split(batch_size)[: self.count_batches(batch_size, processes)]
        share = slice(process, None, processes)
        for position, (index, following) in enumerate(ahead(indices[done:]), done):
            generator = seeded(seed, epoch, position)

            def pick(index=index, generator=generator):
                return gather(self.images, index, augment, flips, generator, share)

            images, index = self._pick(index, following[share], pick)
            yield images, self.labels[index[share]], index

    def _pick(self, index, following, pick):
        """The images that `pick` gathers and `index`, both on the device; asks early for `following`."""
        if isinstance(self.source, np.memmap) and self.images.data_ptr() == self.source.ctypes.data:
            prefetch(self.source, following)
        return pick().to(self.labels.device), index.to(self.labels.device)


def half_left(count, skip):
    """Half of what is left of so many images without the part `skip`: at least one."""
    return max(1, round((1 - skip) * count) // 2)


def seed_of(*numbers):
    """A seed of its own for every tuple of numbers."""
    return zlib.crc32(repr(numbers).encode())


def seeded(*numbers):
    return torch.Generator().manual_seed(seed_of(*numbers))


def ahead(indices):
    """Each of the indices with the one that follows it."""
    return zip(indices, (*indices[1:], torch.empty(0, dtype=torch.int64)), strict=False)


def make_split(images, labels, size, device, resize):
    """A Split of arrays on the device, images resized to `size` by `resize`, the exported graph's own.

    On a GPU, a set too large for it stays in the machine's memory.
    """
    tensor = torch.from_numpy(images)
    if tensor.dtype == torch.uint8 and tuple(tensor.shape[1:3]) != tuple(size):
        tensor = torch.cat([resize(part, size) for part in tensor.split(1024)]).contiguous()
    if device.type != "cuda" or tensor.nbytes < torch.cuda.mem_get_info(device)[0] / 2:
        tensor = tensor.to(device)
    return Split(tensor, torch.from_numpy(labels).to(device), torch.arange(len(labels)), images)


def gather(images, index, augment, flips, generator, share=slice(None)):
    """The share of one batch, augmented: uint8 [share, H, W, C] from `images` [N, H, W, C] by `index` [batch].

    translate shifts by up to 1/16 of the size, mirroring at the edge; flip mirrors left to right where `flips` [N] is
    true; cutout (DeVries and Taylor 2017) greys a square of 3/8 of the size.
    """
    n, device = len(index), images.device  # everybody draws for the whole batch and takes what is theirs
    index = index[share]
    flips, index = flips[index].to(device), index.to(device)
    if not augment:
        return images[index]
    _, height, width, _ = images.shape
    rows = torch.arange(height, device=device).expand(len(index), -1)
    columns = torch.arange(width, device=device).expand(len(index), -1)
    keep = None
    if "cutout" in augment:
        middles = (
            (torch.rand(n, 2, generator=generator) * torch.tensor([height, width])).int()[share].to(device)
        )
        away = [
            (rows - middles[:, :1]).abs() < height * 3 // 16,
            (columns - middles[:, 1:]).abs() < width * 3 // 16,
        ]
        keep = ~(away[0][:, :, None] & away[1][:, None, :])[..., None]
    if "translate" in augment:
        shift = [max(1, size // 16) for size in (height, width)]
        dy, dx = (torch.randint(-s, s + 1, (n, 1), generator=generator)[share].to(device) for s in shift)
        rows, columns = mirror(rows + dy, height), mirror(columns + dx, width)
    if "flip" in augment:
        columns = torch.where(flips[:, None], width - 1 - columns, columns)
    batch = images[index[:, None, None], rows[:, :, None], columns[:, None, :]]
    return batch if keep is None else torch.where(keep, batch, 128)


def mirror(position, size):
    """Positions outside 0..size-1 reflected back inside, the edge itself not repeated."""
    return (size - 1 - (size - 1 - position.abs()).abs()).clamp(0, size - 1)
