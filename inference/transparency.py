"""Transparent pixels, and the ground that they are laid on."""

import numpy as np
from PIL import Image

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


def composite(image: Image.Image, ground: int) -> Image.Image:
    """An image of mode RGBA on a ground of one level, 0 to 255: mode RGB."""
    pixels = np.asarray(image).astype(np.uint16)  # [height, width, 4]
    colours = pixels[..., :3]
    alpha = pixels[..., 3:]
    mixed = (colours * alpha + ground * (255 - alpha) + 127) // 255  # no sum exceeds 16 bits
    return Image.fromarray(mixed.astype(np.uint8))
