"""What all images are decoded to: size, channels and white level, as given or as suits the files.

The headers of the files tell. They are read once; later runs find the result in a small JSON file.
"""

import contextlib
import functools
import math
import os
from collections import Counter
from typing import NamedTuple

import numpy as np
from PIL import Image

from data import shape
from data.contents import WHITES, Contents, choose_ground, contents_of, has_more, smallest_white
from data.files import NO_GROUND, InputSizes, Options, count_of, name_some
from data.json_files import read_json, write_json
from data.notes import note
from data.parallel import run_parallel
from inference.formats import open_image
from inference.limits import MAX_PIXELS, allow_pixels, check_size
from inference.orientation import orientation_of
from inference.transparency import GROUNDS

GREY_MODES = {"1", "L", "LA", "La", "I", "I;16", "I;16L", "I;16B", "I;16N"}
LARGEST_OWN_SIZE = 64  # images that all have one size up to this keep it
FAR_SMALLER = 16  # an image of less than the median area divided by this is named
TRAINING, ALL = 1, 2  # places of the counts in Probed.aspects
TIFF_WIDTH, TIFF_HEIGHT = 256, 257  # tags
FIRST_SIDEWAYS = 5  # the EXIF orientations from here on exchange width and height


class Target(NamedTuple):
    """What every file is decoded to: uint8 [*image_size, channels], 16-bit `white` becoming 255.

    ground: what transparent pixels are laid on, "white" or "black"; None drops the transparency.
    """

    image_size: tuple[int, int]  # height, width
    channels: int
    white: int
    ground: str | None
    fit: str  # how an image gets that size
    unseen: float | None = None  # the part of the average image that is cut away, if it is known

    def row_bytes(self) -> int:
        """The size of one decoded image in bytes."""
        height, width = self.image_size
        return height * width * self.channels


class Header(NamedTuple):
    """What is read of a file before it is decoded."""

    number: int  # of the file
    size: tuple[int, int]  # height, width
    mode: str  # Pillow's
    has_pages: bool  # more than one
    contents: Contents

    def area(self) -> int:
        return math.prod(self.size)

    def aspect(self) -> float:
        """The width by the height, to four digits: there are few different ones."""
        height, width = self.size
        return float(f"{width / height:.4g}")


class Probed(NamedTuple):
    """What the headers say of all files; the JSON file has these keys."""

    sizes: int  # how many different ones there are
    smallest: tuple[int, int]  # by area: height, width
    largest: tuple[int, int]
    channels: int
    white: int  # the level of 16-bit pixels that becomes 255
    ground: str  # what transparent pixels are laid on
    transparent: int  # how many files have some
    paged: int  # how many files have more than one page
    small: list[int]  # the numbers of the files that are far smaller than the rest
    aspects: list[tuple[float, int, int]]  # width / height; training images of it, and all images

    def of_each(self, counted: int) -> np.ndarray:
        """The aspects of images, float64 [n]: of the training images (1), or of all images (2)."""
        counts = [entry[counted] for entry in self.aspects]
        return np.repeat([entry[0] for entry in self.aspects], counts)


# ---------------------------------------------------------------------------------------- deciding
def choose_target(paths: list[str], train: int, probe_file: str, options: Options) -> Target:
    """What to decode to, as the options say or as suits the images.

    train: how many of the files, the first ones, are for training. probe_file: where the result of
    reading all headers is kept for later runs.
    """
    given = (options.image_size, options.channels, options.white, options.ground, options.fit)
    if None not in given:
        return Target(
            image_size=tuple(options.image_size),
            channels=options.channels,
            white=options.white,
            ground=ground_of(options),
            fit=options.fit,
        )

    probed = read_probed(probe_file)
    if probed is None:
        probed = probe(paths, train, options.max_pixels or MAX_PIXELS)
        write_json(probe_file, probed._asdict())

    note_small_images(paths, probed)
    if options.white is None and probed.white != WHITES[-1]:
        bits = probed.white.bit_length()
        note(f"the 16-bit images use {bits} bits only: {probed.white} is taken as white")
    note_unused(probed, options)

    size, fit, unseen = choose_size_and_fit(probed, options)
    return Target(
        image_size=size,
        channels=options.channels or probed.channels,
        white=options.white or probed.white,
        ground=ground_of(options) if options.ground else probed.ground,
        fit=fit,
        unseen=unseen,
    )


def ground_of(options: Options) -> str | None:
    """The ground that the options give, None if they drop transparency."""
    return None if options.ground == NO_GROUND else options.ground


def read_probed(path: str) -> Probed | None:
    """What an earlier run found in the headers; None if there is nothing or it makes no sense."""
    with contextlib.suppress(FileNotFoundError, ValueError, TypeError):
        probed = Probed(**read_json(path))
        is_sane = probed.channels in (1, 3) and probed.white in WHITES
        if is_sane and probed.ground in GROUNDS:
            return probed
    return None


def note_small_images(paths: list[str], probed: Probed) -> None:
    """Note the images that are far smaller than the others: they may be thumbnails."""
    if not probed.small:
        return
    count = count_of(len(probed.small), "image")
    names = name_some(paths[number] for number in probed.small)
    limit = f"less than 1/{FAR_SMALLER} of the median area"
    note(f"far smaller than the others, {limit}: {count}, {names}")


def note_unused(probed: Probed, options: Options) -> None:
    """Note how many images hold more than their pixels show, or than is used of them."""
    if probed.transparent and options.ground is None:
        images = count_of(probed.transparent, "image")
        note(f"{images} with transparency, laid on {probed.ground}")
    if probed.paged:
        images = count_of(probed.paged, "image")
        note(f"{images} of several pages, of which the first is used")


def choose_size_and_fit(probed: Probed, options: Options) -> tuple[tuple[int, int], str, float]:
    """The size (height, width), as given or as suits the images; how they get it; and the part of
    the average image that is cut away.

    Notes that images are resized, what is cut away, and if the most of the input is bars.
    """
    trained = probed.of_each(TRAINING)
    size = options.image_size or choose_size(probed, trained, options.input_sizes)
    fit = options.fit or shape.choose_fit(trained, size)

    smallest = tuple(probed.smallest)
    have_that_size = smallest == tuple(probed.largest) == tuple(size)
    if probed.sizes and not have_that_size:
        have = f"{as_text(smallest)} pixels"
        if probed.sizes > 1:
            have = (
                f"{probed.sizes:,} sizes, {as_text(smallest)} to {as_text(probed.largest)} pixels"
            )
        shape.note_resized(have, size, fit)

    everywhere = probed.of_each(ALL)
    shape.note_bars(everywhere, size, fit)
    unseen = shape.note_unseen(everywhere, size, fit)
    return tuple(size), fit, unseen


def choose_size(probed: Probed, aspects: np.ndarray, sizes: InputSizes) -> tuple[int, int]:
    """The size (height, width) of images that are all small and of one size, else one of about the
    usual area.

    aspects: of the training images, [n].
    """
    size = tuple(probed.largest)
    is_small = probed.sizes == 1 and max(size) <= LARGEST_OWN_SIZE
    if is_small and not sizes.squares_only:
        return size
    return shape.choose_shape(aspects, sizes)


def as_text(size: tuple[int, int]) -> str:
    """(height, width) as people write it, width first."""
    height, width = size
    return f"{width}x{height}"


# ----------------------------------------------------------------------------------------- probing
def probe(paths: list[str], train: int, max_pixels: int = MAX_PIXELS) -> Probed:
    """Read the headers of all files, and the pixels of those with 16 bits or transparency.

    The images are grey (1 channel) if all files are. The white level is the smallest of WHITES that
    holds the pixels of the 16-bit files; choose_ground() gets the transparent ones. Of both, only
    those of the training split count, the first `train` files.
    """
    probe_these = functools.partial(probe_chunk, max_pixels=max_pixels)
    headers = list(run_parallel(probe_these, paths, "reading headers"))
    if not headers:  # decoding says why
        return Probed(
            sizes=0,
            smallest=(0, 0),
            largest=(0, 0),
            channels=3,
            white=WHITES[-1],
            ground="white",
            transparent=0,
            paged=0,
            small=[],
            aspects=[],
        )

    sizes = {header.size for header in headers}
    by_area = sorted(sizes, key=lambda size: (math.prod(size), size))

    modes = {header.mode for header in headers}
    channels = 1 if modes <= GREY_MODES else 3

    contents = [header.contents for header in headers if header.number < train]
    # Without a 16-bit file all are 0, and the level does not matter.
    brightest = max((part.brightest for part in contents), default=0) or WHITES[-1]
    white_shares = [part.white_share for part in contents if part.white_share is not None]

    median_area = np.median([header.area() for header in headers])
    small = [header.number for header in headers if header.area() < median_area / FAR_SMALLER]

    return Probed(
        sizes=len(by_area),
        smallest=by_area[0],
        largest=by_area[-1],
        channels=channels,
        white=smallest_white(brightest),
        ground=choose_ground(white_shares),
        transparent=sum(header.contents.transparent for header in headers),
        paged=sum(header.has_pages for header in headers),
        small=small,
        aspects=count_aspects(headers, train),
    )


def count_aspects(headers: list[Header], train: int) -> list[tuple[float, int, int]]:
    """What Probed holds of the aspects of files, of which the first `train` are for training."""
    trained = Counter(header.aspect() for header in headers if header.number < train)
    everywhere = Counter(header.aspect() for header in headers)
    return [(aspect, trained[aspect], count) for aspect, count in sorted(everywhere.items())]


def probe_chunk(paths: list[str], start: int, max_pixels: int = MAX_PIXELS) -> list[Header]:
    """The headers of files from number `start` on.

    Files that cannot be read, or are too large, are left out: decoding reports them.
    """
    allow_pixels(max_pixels)
    headers = []
    for number, path in enumerate(paths, start):
        # Opening a named pipe would block forever.
        if not os.path.isfile(path):
            continue
        # Pillow's plugins raise any exception on broken files.
        with contextlib.suppress(Exception), open_image(path) as image:
            check_size(image.size, max_pixels)
            holds_more = has_more(path, image)  # asked first: the size may need the pixels
            header = Header(
                number=number,
                size=size_as_shown(image),
                mode=image.mode,
                has_pages=image.format == "TIFF" and image.is_animated,
                contents=Contents(),
            )
            headers.append(header)

            if holds_more:
                contents = contents_of(path)
                mode = "LA" if contents.grey else header.mode
                headers[-1] = header._replace(mode=mode, contents=contents)
    return headers


def size_as_shown(image: Image.Image) -> tuple[int, int]:
    """The height and width of an image after its EXIF rotation."""
    width, height = image.size

    if image.format == "TIFF":  # some versions of Pillow have rotated its size already
        width = image.tag_v2[TIFF_WIDTH]
        height = image.tag_v2[TIFF_HEIGHT]

    # Pillow decodes the pixels of a PNG to see whether EXIF follows them, which is rare. Only the
    # size of small images must be exact.
    is_large = max(width, height) > LARGEST_OWN_SIZE
    if image.format == "PNG" and is_large and "exif" not in image.info:
        return height, width
    if (orientation_of(image) or 1) >= FIRST_SIDEWAYS:
        return width, height
    return height, width
