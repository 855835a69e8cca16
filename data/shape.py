"""Which size and fit suit images of these shapes, and what of them the network then does not see.

A shape is an aspect: the width of an image by its height, as it is shown.
"""

import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from data.dataset import Dataset
from data.files import InputSizes, count_of
from data.notes import note

ONE_SHAPE = 1.2  # aspects that differ by at most this factor are one shape
SHARED = 0.9  # the least part of the training images that have the shape of the median
LONGEST = 16  # the most times that an input is longer than wide: narrower images get bars
AREA_WEIGHT = 0.1  # of a size's area, beside what it cuts away

# The most of the average image that `crop` is chosen to cut away. The bars that `letterbox` has
# instead take less than that much of the input, which costs little; and what decides may be there.
MOST_UNSEEN = 0.1
MUCH = 0.25  # of an image, cut away: such images are counted
MOSTLY_BARS = 0.5  # of the input: it is worth saying
LEAST_SAID = 0.001  # of the average image: less comes from rounding


def unseen_shares(aspects: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The part of each image that is cut away if it is cropped to a size (height, width).

    aspects: [n]. Returns float64 [n].
    """
    height, width = size
    wanted = width / height
    return 1 - np.minimum(aspects, wanted) / np.maximum(aspects, wanted)


def choose_fit(aspects: np.ndarray, size: tuple[int, int]) -> str:
    """How training images of these aspects [n] get their size: cropped if that cuts little away."""
    if len(aspects) and unseen_shares(aspects, size).mean() > MOST_UNSEEN:
        return "letterbox"
    return "crop"


def choose_shape(aspects: np.ndarray, sizes: InputSizes) -> tuple[int, int]:
    """The size (height, width) for training images of these aspects [n], of about the usual area.

    A square, unless nearly all images share another shape.
    """
    square = (sizes.usual, sizes.usual)
    if sizes.squares_only or len(aspects) == 0:
        return square

    median = float(np.median(aspects))
    distance = np.maximum(aspects / median, median / aspects)
    is_shared = (distance <= ONE_SHAPE).mean() >= SHARED
    if not is_shared or max(median, 1 / median) <= ONE_SHAPE:
        return square
    return rectangle(min(max(median, 1 / LONGEST), LONGEST), sizes)


def rectangle(aspect: float, sizes: InputSizes) -> tuple[int, int]:
    """The size (height, width) of about this aspect and of about the usual area.

    Of the sizes that the network takes, the one that cuts away least of images of this aspect; the
    area decides where that is nearly equal.
    """

    def cost(size: tuple[int, int]) -> float:
        (cut,) = unseen_shares(np.array([aspect]), size)
        area = math.prod(size) / sizes.usual**2
        return cut + AREA_WEIGHT * abs(math.log(area))

    return min(rectangles(aspect, sizes), key=cost)


def rectangles(aspect: float, sizes: InputSizes) -> Iterator[tuple[int, int]]:
    """Sizes (height, width) near an aspect whose sides are multiples that the network takes."""
    unit = sizes.multiple
    least = -(-sizes.least // unit)  # in units, rounded up
    most = 2 * -(-sizes.usual // unit)

    for short in range(least, max(least, most) + 1):
        long = short * max(aspect, 1 / aspect)
        for rounded in (math.floor(long), math.ceil(long)):
            size = (short * unit, rounded * unit)
            yield size if aspect > 1 else size[::-1]


def note_resized(have: str, size: tuple[int, int], fit: str) -> None:
    """Note how images are resized. have: what sizes they have, in words, width first."""
    height, width = size
    images = f"the images have {have} (width x height)"
    option = f"--image-size {height}x{width} (height x width)"
    note(f"{images}; they are resized to {width}x{height} by --fit {fit} and {option}")


def note_unseen(aspects: np.ndarray, size: tuple[int, int], fit: str) -> float:
    """Note the part of the average image that the network does not see; return it.

    aspects: of all images, [n].
    """
    if fit != "crop" or len(aspects) == 0:
        return 0.0

    shares = unseen_shares(aspects, size)
    unseen = float(shares.mean())
    if unseen < LEAST_SAID:
        return 0.0

    much = int((shares > MUCH).sum())
    of_some = ""
    if 0 < much < len(shares):
        of_some = f", and more than a quarter of {count_of(much, 'image')}"
    part = f"{as_percent(unseen)} of the average picture is not seen{of_some}"
    note(f"{part}: --fit crop cuts it away, --fit letterbox keeps it")
    return unseen


def note_bars(aspects: np.ndarray, size: tuple[int, int], fit: str) -> None:
    """Note that most of the input is black bars, and if its sides may have been mixed up.

    aspects: of all images, [n].
    """
    if fit != "letterbox" or len(aspects) == 0:
        return

    # Bars fill as much of the input as a crop to it would cut away of the image.
    bars = unseen_shares(aspects, size).mean()
    if bars <= MOSTLY_BARS:
        return

    height, width = size
    way_out = ""
    bars_of_turned = unseen_shares(aspects, (width, height)).mean()
    if bars_of_turned < bars:
        turned = f"--image-size {width}x{height} (height x width)"
        way_out = f"; with {turned} it is {as_percent(bars_of_turned)}"
    note(f"{as_percent(bars)} of the network's input is black bars by --fit letterbox{way_out}")


def with_unseen(dataset: Dataset, size: tuple[int, int], fit: str) -> Dataset:
    """The dataset with the part of its average image that is not seen, noted, if it was not known.

    size: (height, width) that its images get.
    """
    if dataset.unseen is not None or not dataset.has_images:
        return dataset
    height, width = dataset.train_images.shape[1:3]
    return replace(dataset, unseen=note_unseen(np.array([width / height]), size, fit))


def as_percent(share: float) -> str:
    """A share in percent, as people say it."""
    if share == 0:
        return "nothing"
    if share < 0.01:
        return "less than 1 %"
    return f"{share:.0%}".replace("%", " %")
