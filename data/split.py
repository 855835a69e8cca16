"""A split ready to be trained on: batches gathered from uint8 images by index and augmented as a whole."""

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

    def in_order(self, batch_size):
        """Yield (images, labels) of every member once, as they are."""
        yield from self._batches(self.members.split(batch_size), lambda index: self.images[index])

    def shuffled(self, batch_size, augment, epoch, generator, first_flips):
        """Yield (images, labels) of every member once, in random order, augmented; see `gather`.

        flip alternates (Jordan 2024): an image is mirrored every other epoch, first_flips [N] of them in even ones.
        """
        flips = first_flips ^ (epoch % 2 == 1)
        order = self.members[torch.randperm(len(self), generator=generator)]
        indices = order.split(batch_size)
        if len(indices) > 1 and len(indices[-1]) == 1:
            indices = indices[:-1]  # batch norm cannot train on a single image
        yield from self._batches(indices, lambda index: gather(self.images, index, augment, flips, generator))

    def _batches(self, indices, pick):
        mapped = isinstance(self.source, np.memmap) and self.images.data_ptr() == self.source.ctypes.data
        for index, following in zip(indices, (*indices[1:], ()), strict=True):
            if mapped:
                prefetch(self.source, following)
            yield pick(index).to(self.labels.device), self.labels[index.to(self.labels.device)]


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


def gather(images, index, augment, flips, generator):
    """One batch, augmented: uint8 [batch, H, W, C] gathered from `images` [N, H, W, C] by `index` [batch].

    translate shifts by up to 1/16 of the size, mirroring at the edge; flip mirrors left to right where `flips` [N] is
    true; cutout (DeVries and Taylor 2017) greys a square of 3/8 of the size.
    """
    flips, index = flips[index].to(images.device), index.to(images.device)
    if not augment:
        return images[index]
    _, height, width, _ = images.shape
    device, n = images.device, len(index)
    rows = torch.arange(height, device=device).expand(n, -1)
    columns = torch.arange(width, device=device).expand(n, -1)
    keep = None
    if "cutout" in augment:
        middles = (torch.rand(n, 2, generator=generator) * torch.tensor([height, width])).int().to(device)
        away = [(rows - middles[:, :1]).abs() < height * 3 // 16, (columns - middles[:, 1:]).abs() < width * 3 // 16]
        keep = ~(away[0][:, :, None] & away[1][:, None, :])[..., None]
    if "translate" in augment:
        shift = [max(1, size // 16) for size in (height, width)]
        dy, dx = (torch.randint(-s, s + 1, (n, 1), generator=generator).to(device) for s in shift)
        rows, columns = mirror(rows + dy, height), mirror(columns + dx, width)
    if "flip" in augment:
        columns = torch.where(flips[:, None], width - 1 - columns, columns)
    batch = images[index[:, None, None], rows[:, :, None], columns[:, None, :]]
    return batch if keep is None else torch.where(keep, batch, 128)


def mirror(position, size):
    """Positions outside 0..size-1 reflected back inside, the edge itself not repeated."""
    return (size - 1 - (size - 1 - position.abs()).abs()).clamp(0, size - 1)
