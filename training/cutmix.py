"""Cutmix (Yun et al. 2019): a rectangle of each image comes from another image of its batch.

Both labels then count, each by its share of the pixels. Few images that a network knows by heart
become ever new ones, which are harder: training takes more epochs, and no longer ends with all of
them right.
"""

from dataclasses import dataclass

import torch

MIXED = 0.5  # of the batches; the others show images as they are


@dataclass(frozen=True)
class Batch:
    """Images of which each has a rectangle of another one.

    images: [n, H, W, C]. others: the index [n] of the image that each rectangle comes from. share:
    of the pixels that are another's.
    """

    images: torch.Tensor
    others: torch.Tensor
    share: float


def mix(images: torch.Tensor) -> Batch | None:
    """The images [n, H, W, C] of a batch mixed, or None where the batch stays as it is.

    Draws from torch's generator, which training seeds before each step.
    """
    if torch.rand(()) >= MIXED:
        return None

    count, height, width = images.shape[:3]
    others = torch.randperm(count).to(images.device)
    side = torch.rand(()).sqrt()  # of the rectangle, so that its area is spread evenly
    high = round(float(side) * height)
    wide = round(float(side) * width)
    top = int(torch.randint(height - high + 1, ()))
    left = int(torch.randint(width - wide + 1, ()))

    mixed = images.clone()
    rectangle = (slice(None), slice(top, top + high), slice(left, left + wide))
    mixed[rectangle] = images[others][rectangle]
    return Batch(mixed, others, high * wide / (height * width))
