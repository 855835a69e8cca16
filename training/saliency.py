"""Where a network looked: a hint of what its answers rest on, and no proof."""

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

    image: uint8 [H, W, C] of the network's own size. The output of the last convolution with maps of SIDE
    pixels or more, or else the image, is multiplied by its gradient (HiResCAM, Draelos and Carin 2020).
    """
    network = deployable.network.eval()
    x = deployable.normalise(image[None].to(deployable.mean.device)).requires_grad_()
    convolutions = [name for name, module in network.named_modules() if isinstance(module, nn.Conv2d)]
    with model.watched(network, convolutions) as seen:
        answer = network(x).amax()
    maps = [x, *(maps for _, maps in seen if min(maps.shape[2:]) >= SIDE)][-1]
    (gradient,) = torch.autograd.grad(answer, maps)
    looked = (maps * gradient).sum(1, keepdim=True).clamp(min=0)
    looked = F.interpolate(looked, image.shape[:2], mode="bilinear")[0, 0]
    return (looked / looked.amax().clamp(min=1e-12)).detach().cpu().numpy()


def examples(trainer, deployable: model.Deployable, probabilities: np.ndarray) -> list[tuple]:
    """Test images as (image, the same with what counted in colour, class, answer), right answers first."""
    split, classes, found = trainer.splits["test"], trainer.dataset.classes, []
    images, guesses = getattr(split, "images_split", split).images, probabilities.argmax(1)
    right = guesses == trainer.dataset.test_labels
    for rows in (np.flatnonzero(right), np.flatnonzero(~right)):
        for row in rows[:: -(-len(rows) // SHOWN) or 1]:
            looked = where_looked(deployable, images[row])[..., None]
            image = np.broadcast_to(images[row].cpu().numpy(), (*looked.shape[:2], 3))
            coloured = (1 - looked) * image.mean(2, keepdims=True) + looked * COLOUR
            answer = f"{classes[guesses[row]]} {probabilities[row].max():.0%}"
            true = classes[trainer.dataset.test_labels[row]]
            found.append((image, coloured.astype(np.uint8), f"true: {true}", f"answer: {answer}"))
    return found
