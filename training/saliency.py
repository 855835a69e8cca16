"""Where a network looked: a hint of what its answers rest on, and no proof."""

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import model

SIDE = 7  # pixels, at least, of the maps that are looked at
SHOWN = 6  # images whose answers are right, and as many of wrong ones
COLOUR = np.array((213, 94, 0))


def where_looked(deployable: model.Deployable, image: torch.Tensor) -> np.ndarray:
    """How much each place of an image counts for its answer: float32 [H, W], from 0 to 1.

    image: uint8 [H, W, C] of the network's own size. The output of the last convolution with maps
    of SIDE pixels or more, or else the image, is multiplied by its gradient (HiResCAM, Draelos and
    Carin 2020).
    """
    network = deployable.network.eval()
    batch = image[None].to(deployable.mean.device)
    x = deployable.normalise(batch).requires_grad_()  # [1, C, H, W]

    convolutions = []
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d):
            convolutions.append(name)
    with model.watched(network, convolutions) as seen:
        answer = network(x).amax()

    maps = x
    for _, output in seen:  # [1, channels, h, w]
        if min(output.shape[2:]) >= SIDE:
            maps = output
    (gradient,) = torch.autograd.grad(answer, maps)

    looked = (maps * gradient).sum(1, keepdim=True).clamp(min=0)
    looked = F.interpolate(looked, image.shape[:2], mode="bilinear")[0, 0]
    looked = looked / looked.amax().clamp(min=1e-12)
    return looked.detach().cpu().numpy()


def examples(
    deployable: model.Deployable,
    images: torch.Tensor,
    labels: np.ndarray,
    probabilities: np.ndarray,
    classes: list[str],
) -> list[tuple]:
    """Test images as (image, the same with what counted in colour, class, answer), right ones
    first.

    images: uint8 [N, H, W, C] of the network's own size; labels [N]; probabilities [N, classes].
    """
    guesses = probabilities.argmax(1)
    found = []
    for row in rows_to_show(guesses == labels):
        looked = where_looked(deployable, images[row])[..., None]  # [H, W, 1]
        height, width = looked.shape[:2]
        image = np.broadcast_to(images[row].cpu().numpy(), (height, width, 3))
        grey = image.mean(2, keepdims=True)
        coloured = (1 - looked) * grey + looked * COLOUR

        true = f"true: {classes[labels[row]]}"
        answer = f"answer: {classes[guesses[row]]} {probabilities[row].max():.0%}"
        found.append((image, coloured.astype(np.uint8), true, answer))
    return found


def rows_to_show(right: np.ndarray) -> Iterator[int]:
    """About SHOWN rows where bool [N] is true, then as many where it is not, evenly spread."""
    for rows in (np.flatnonzero(right), np.flatnonzero(~right)):
        if len(rows):
            yield from rows[:: -(-len(rows) // SHOWN)]
