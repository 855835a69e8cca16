"""Transparent pixels, and the ground that they are laid on."""

import numpy as np
from PIL import Image

MAY_BE_EMPTY = ("BMP", "DIB", "TGA")  # formats of which many files have an alpha that says nothing
GROUNDS = {"white": 255, "black": 0}
RAW_BITS = {"L;2": 2, "L;4": 4}  # of greys, by Pillow's raw mode


def mend_key(image: Image.Image) -> None:
    """Scale the transparent level of an opened PNG of 2 or 4 bits, whose pixels Pillow scales."""
    key = image.info.get("transparency")
    if image.format != "PNG" or image.mode not in ("L", "RGB") or key is None or not image.tile:
        return

    raw = image.tile[0][3]
    if raw in RAW_BITS:
        top = 2 ** RAW_BITS[raw] - 1
        image.info["transparency"] = (key & top) * 255 // top
    elif raw == "L":
        image.info["transparency"] = key & 255
    elif raw == "RGB":
        image.info["transparency"] = tuple(level & 255 for level in key)


def as_rgba(image: Image.Image) -> Image.Image:
    """An image with transparency in mode RGBA."""
    if image.mode == "La":  # multiplied by its alpha; Pillow converts it to LA only
        image = image.convert("LA")
    return image.convert("RGBA")


def without_empty_alpha(image: Image.Image) -> Image.Image:
    """A loaded BMP or TGA without its alpha channel if that is 0 everywhere.

    Many programs write 32 bits a pixel and leave the last 8 at 0; the picture is meant to be seen.
    """
    if image.format not in MAY_BE_EMPTY or image.mode not in ("RGBA", "LA"):
        return image
    _, most = image.getchannel("A").getextrema()
    return image if most else image.convert(image.mode[:-1])


def composite(image: Image.Image, ground: int) -> Image.Image:
    """An image of mode RGBA on a ground of one level, 0 to 255: mode RGB."""
    pixels = np.asarray(image).astype(np.uint16)  # [height, width, 4]
    colours = pixels[..., :3]
    alpha = pixels[..., 3:]
    mixed = (colours * alpha + ground * (255 - alpha) + 127) // 255  # no sum exceeds 16 bits
    return Image.fromarray(mixed.astype(np.uint8))
