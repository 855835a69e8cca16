"""Do mirrored images look like images of other classes? Then flip would teach wrong labels.

Left and right arrows, b and d, keep-left and keep-right signs become each other in a mirror. The
data tells: an image and the same mirrored are both looked up among the other training images, by
thumbnails. Where mirroring means nothing, each finds its own class as often as the other.
"""

import math
from typing import NamedTuple

import numpy as np

from data.near_copies import unit

MOST_IMAGES = 3000  # that are looked up, evenly spread over the training split
AT_A_TIME = 500
# Of the images for which mirroring decides whether the nearest one has their class, this part may
# lose it: some things are photographed more often from one side than from the other.
USUAL_LOSS = 0.55
LEVEL = 5e-4  # of each of two tests: flip is wrongly called harmful once in a thousand datasets


class Mirrored(NamedTuple):
    """The shares of images whose nearest other image has another class, unmirrored and mirrored."""

    plain: float
    mirrored: float


def harm_of_flip(
    thumbnails: np.ndarray, shape: tuple[int, int], labels: np.ndarray, groups: np.ndarray
) -> Mirrored | None:
    """What mirroring does to images of different classes, if it significantly makes them look like
    others; None if it does not.

    thumbnails: of the training images, float32 [N, h * w]; shape: (h, w); labels: int64 [N];
    groups: int64 [N], equal for images that are copies of each other or belong together.
    """
    chosen = np.arange(0, len(labels), -(-len(labels) // MOST_IMAGES))
    planes = thumbnails[chosen].reshape(-1, *shape)  # [n, h, w]
    labels = labels[chosen]
    groups = groups[chosen]

    # What lies anywhere in the image is compared in its middle, as well.
    for views in (planes, centred(planes)):
        plain = finds_own_class(views, views, labels, groups)
        mirrored = finds_own_class(views[:, :, ::-1], views, labels, groups)
        lost = int((plain & ~mirrored).sum())
        won = int((mirrored & ~plain).sum())
        if chance_of(lost, lost + won) < LEVEL:
            return Mirrored(plain=float(1 - plain.mean()), mirrored=float(1 - mirrored.mean()))
    return None


def finds_own_class(
    views: np.ndarray, planes: np.ndarray, labels: np.ndarray, groups: np.ndarray
) -> np.ndarray:
    """bool [n]: is the plane most like each view of an image, but not of its group, of its class?

    A plane is as like as its negative: letters may be darker or lighter than their ground. views:
    [n, h, w], made from planes [n, h, w]; labels, groups: [n].
    """
    queries = unit(views.reshape(len(views), -1))
    vectors = unit(planes.reshape(len(planes), -1))

    found = np.empty(len(queries), bool)
    for start in range(0, len(queries), AT_A_TIME):
        part = slice(start, start + AT_A_TIME)
        likeness = np.abs(queries[part] @ vectors.T)  # [part, n]
        likeness[groups[part, None] == groups] = -1  # of itself and those of its group
        found[part] = labels[likeness.argmax(1)] == labels[part]
    return found


def centred(planes: np.ndarray) -> np.ndarray:
    """Planes [n, h, w] moved so that what differs from their ground is in the middle."""
    height, width = planes.shape[1:]
    distance = np.abs(planes - np.median(planes, (1, 2), keepdims=True))
    usual = distance.mean((1, 2), keepdims=True)
    weights = np.maximum(distance - usual, 0) ** 2 + 1e-6

    # By fractions of a pixel: a shift multiplies frequencies by a phase.
    total = weights.sum((1, 2))
    down = (weights.sum(2) @ np.arange(height)) / total - (height - 1) / 2
    right = (weights.sum(1) @ np.arange(width)) / total - (width - 1) / 2
    rows = np.fft.fftfreq(height)[:, None] * down[:, None, None]
    columns = np.fft.rfftfreq(width) * right[:, None, None]
    phases = np.exp(2j * np.pi * (rows + columns))
    moved = np.fft.irfft2(np.fft.rfft2(planes) * phases, (height, width))
    return moved.astype(np.float32)


def chance_of(lost: int, count: int) -> float:
    """The probability that `lost` or more of `count` images lose their class, each with
    USUAL_LOSS."""
    logarithms = []
    for number in range(lost, count + 1):
        ways = math.lgamma(count + 1) - math.lgamma(number + 1) - math.lgamma(count - number + 1)
        chance = number * math.log(USUAL_LOSS) + (count - number) * math.log(1 - USUAL_LOSS)
        logarithms.append(ways + chance)
    return sum(map(math.exp, logarithms))
