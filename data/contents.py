"""What must be read from the pixels of a file before any is decoded: levels and transparency."""

from typing import NamedTuple

import numpy as np
from PIL import Image

from data import parallel
from inference.bands import bands
from inference.depth import (
    Depth,
    depth_of,
    load_all_bits,
    sample_bands,
    scale_to_8_bits,
    split_alpha,
)
from inference.formats import open_image
from inference.orientation import forget_odd_xmp
from inference.transparency import as_rgba, mend_key, without_empty_alpha

WHITES = (255, 1023, 4095, 16383, 65535)  # of 8, 10, 12, 14 and 16 bits
NEARLY_WHITE = 224  # of 255, the least of red, green and blue


class Contents(NamedTuple):
    """What the pixels of a file hold."""

    grey: bool = False  # although Pillow opens it as colour
    brightest: int = 0  # level of 16-bit pixels, 0 of others
    transparent: bool = False  # are some pixels not opaque?
    white_share: float | None = None  # of what is visible of a transparent image, if anything is


def has_more(path: str, image: Image.Image) -> bool:
    """Has a file that is opened and not loaded 16 bits a channel, or transparency?"""
    return image.has_transparency_data or depth_of(path, image) is not None


def contents_of(path: str) -> Contents:
    """What the pixels of a file hold. Raises whatever Pillow's plugins raise, and Problem."""
    with open_image(path) as image:
        return read_contents(path, image)


def read_contents(path: str, image: Image.Image) -> Contents:
    """What contents_of() returns, of an opened image, which is loaded."""
    mend_key(image)
    forget_odd_xmp(image)
    depth = depth_of(path, image)

    with parallel.one_at_a_time(image.size):
        low = None
        brightest = 0
        if depth is None:
            image.load()
            image = without_empty_alpha(image)
        else:
            low = load_all_bits(path, image, depth)
            brightest = brightest_level(image, low, depth)

        if not image.has_transparency_data:
            return Contents(brightest=brightest)
        if depth is not None and not depth.is_cut:
            white = smallest_white(brightest)
            image = scale_to_8_bits(image, low, depth, white)
        is_transparent, white_share = look_at_alpha(image)

    is_grey = depth is not None and depth.in_pairs
    return Contents(is_grey, brightest, is_transparent, white_share)


def brightest_level(image: Image.Image, low: Image.Image | None, depth: Depth) -> int:
    """The highest level of the channels of 16 bits, the alpha left out."""
    brightest = 0
    for _, samples in sample_bands(image, low, depth):
        colours, _ = split_alpha(samples)
        brightest = max(brightest, int(colours.max()))
    return brightest


def smallest_white(brightest: int) -> int:
    """The smallest of WHITES that is not exceeded."""
    return min(white for white in WHITES if white >= brightest)


def look_at_alpha(image: Image.Image) -> tuple[bool, float | None]:
    """Is some of an image transparent, and which share of what is visible is nearly white?

    Pixels count by their alpha. The share is None if nothing is visible or nothing is transparent.
    """
    is_transparent = False
    visible = 0
    white = 0
    for _, _, band in bands(image):
        pixels = np.asarray(as_rgba(band))  # uint8 [rows, width, 4]
        alpha = pixels[..., 3]
        is_transparent = is_transparent or bool(alpha.min() < 255)
        visible += int(alpha.sum(dtype=np.int64))
        is_white = pixels[..., :3].min(axis=2) >= NEARLY_WHITE
        white += int(alpha[is_white].sum(dtype=np.int64))

    if not is_transparent or not visible:
        return is_transparent, None
    return True, white / visible


def choose_ground(white_shares: list[float]) -> str:
    """What transparent pixels are laid on, given the share of white in each transparent image.

    White, unless most of what is visible would vanish on it.
    """
    return "black" if white_shares and np.mean(white_shares) > 0.5 else "white"
