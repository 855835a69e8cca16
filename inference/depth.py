"""Pixels of 16 bits a channel, all of whose bits are read and scaled to 8.

Pillow has modes for greys of 16 bits only. Of colours, its unpackers keep one byte of each two: the
high one for the byte order of the file, the low one for the other. So a file is decoded twice.
"""

import re
import sys
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from PIL import Image

from inference.bands import bands
from inference.errors import Problem
from inference.formats import open_image
from inference.limits import check_rows, content_of

TOP = 65535  # the highest level of 16 bits
MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}  # by the number of channels

RAW_COLOURS = re.compile("(?:RGB|RGBX|RGBA|RGBa);16([BLN])")  # Pillow's raw modes
NATIVE = "L" if sys.byteorder == "little" else "B"
OTHER = {"L": "B", "B": "L"}

# TIFF tags.
BITS_PER_SAMPLE = 258
PHOTOMETRIC = 262
PLANAR = 284
SAMPLE_FORMAT = 339

SIGNED_SAMPLES = 2  # of SAMPLE_FORMAT
SIGNED = "has signed pixels, which have no fixed black: save it unsigned"

CODESTREAM = b"\xff\x4f\xff\x51"  # of JPEG 2000, then its sizes
OFFSET_OF_BITS = 42  # of the first channel, from there


class Depth(NamedTuple):
    """How the samples of 16 bits of an opened file are read."""

    high: str = ""  # the byte order that unpacks the high bytes; empty if Pillow has all bits
    low: str = ""
    top: int = TOP  # the level that the file declares to be white
    in_pairs: bool = False  # grey and alpha, read as the four bytes of a pixel
    inverted: bool = False  # 0 is white
    premultiplied: bool = False  # with the alpha
    is_cut: bool = False  # the low bytes are out of reach


def depth_of(source, image: Image.Image) -> Depth | None:
    """How to read an image that is opened and not loaded; None if 8 bits a channel are enough.

    Raises Problem for a file of more that cannot be read right.
    """
    if image.mode.startswith("I"):  # "I;16" in either byte order, or "I" if Pillow has widened it
        return Depth(inverted=is_inverted(image))
    if is_signed(image):  # of 8 bits: Pillow takes -128 for 128
        raise Problem(SIGNED)
    if image.format == "JPEG2000":
        bits = jpeg2000_bits(source)
        if bits > 8:  # Pillow rounds up without a limit
            fault = "whose brightest pixels Pillow turns black"
            raise Problem(f"is a JPEG 2000 of {bits} bits a channel, {fault}: save it as PNG")
        return None
    if not image.tile:
        return None

    decoder = image.tile[0][0]
    if image.format == "PPM":
        return depth_of_ppm(image, decoder)
    if image.format == "SGI":
        has_16_bits = decoder == "SGI16" or (decoder == "sgi_rle" and image.tile[0][3][-1] == 2)
        return Depth(is_cut=True) if has_16_bits else None
    if image.format == "TIFF" and image.tag_v2.get(PLANAR) == 2:
        return depth_of_planes(image, decoder)
    return depth_by_raw_mode(raw_mode_of(image.tile[0]))


def depth_by_raw_mode(raw: str) -> Depth | None:
    """What depth_of() returns for a PNG or a TIFF, by Pillow's raw mode."""
    if raw == "LA;16B":
        return Depth(high="B", in_pairs=True)
    match = RAW_COLOURS.fullmatch(raw)  # 16 bits of CMYK are ink, whose full scale is certain
    if match is None:
        return None
    order = match[1].replace("N", NATIVE)
    return Depth(high=order, low=OTHER[order], premultiplied=raw.startswith("RGBa"))


def depth_of_ppm(image: Image.Image, decoder: str) -> Depth | None:
    """What depth_of() returns for a colour PPM, which declares its highest level."""
    if decoder not in ("ppm", "ppm_plain"):
        return None
    top = image.tile[0][3][1]
    if decoder == "ppm":
        return Depth(high="B", low="L", top=top) if top > 255 else None
    return Depth(is_cut=True) if top == TOP else None  # else Pillow scales by the level


def depth_of_planes(image: Image.Image, decoder: str) -> Depth | None:
    """What depth_of() returns for a TIFF whose channels are stored one after the other."""
    if set(image.tag_v2.get(BITS_PER_SAMPLE, ())) != {16}:
        return None
    if decoder != "raw":
        return Depth(is_cut=True)
    order = "L" if image.tag_v2.prefix == b"II" else "B"
    return Depth(high=order, low=OTHER[order])


def is_inverted(image: Image.Image) -> bool:
    """Is this a TIFF of 16-bit greys in which 0 is white? Pillow inverts 8 bits only."""
    if image.format != "TIFF" or not image.tile:
        return False
    plain = ("I;16", "I;16B", "I;16N")
    return image.tag_v2.get(PHOTOMETRIC) == 0 and raw_mode_of(image.tile[0]) in plain


def is_signed(image: Image.Image) -> bool:
    """Is this a TIFF whose pixels may be below 0?"""
    return image.format == "TIFF" and SIGNED_SAMPLES in image.tag_v2.get(SAMPLE_FORMAT, ())


def jpeg2000_bits(source) -> int:
    """The bits of the first channel of a JPEG 2000 file, 0 if they are not found."""
    content = content_of(source)
    start = content.find(CODESTREAM)
    bits = content[start + OFFSET_OF_BITS : start + OFFSET_OF_BITS + 1]
    return (bits[0] & 0x7F) + 1 if start >= 0 and bits else 0


# ------------------------------------------------------------------------------------------ reading
def raw_mode_of(tile) -> str:
    """Pillow's name for how the pixels of a part of a file are stored, empty if it has none."""
    arguments = tile[3]
    raw = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
    return raw if isinstance(raw, str) else ""


def set_raw_modes(image: Image.Image, order: str, in_pairs: bool) -> None:
    """Let an opened image unpack one byte of each two: the high one for the file's own order."""
    tiles = []
    for tile in image.tile:
        decoder, box, offset, arguments = tile
        kind = raw_mode_of(tile).split(";")[0].replace("a", "A")
        raw = "RGBA" if in_pairs else f"{kind};16{order}"

        if decoder == "ppm":
            decoder = "raw"
            arguments = (raw, 0, 1)
        elif isinstance(arguments, tuple):
            arguments = (raw, *arguments[1:])
        else:
            arguments = raw

        parts = (decoder, box, offset, arguments)
        tiles.append(type(tile)(*parts) if hasattr(tile, "_fields") else parts)
    image.tile = tiles


def load_all_bits(source, image: Image.Image, depth: Depth) -> Image.Image | None:
    """Load an opened image; return a second one with its low bytes, if they are apart."""
    if depth.high:
        set_raw_modes(image, depth.high, depth.in_pairs)
    image.load()
    if not depth.low:
        return None

    with open_image(source) as second:
        set_raw_modes(second, depth.low, depth.in_pairs)
        second.load()
        return second


def sample_bands(
    image: Image.Image, low: Image.Image | None, depth: Depth
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (top row, uint16 [rows, width, channels]) of what load_all_bits() has loaded.

    The samples are those of the file, 0 to `depth.top`. Raises Problem for more than 16 bits,
    and below 0.
    """
    for top, bottom, band in bands(image):
        pixels = np.asarray(band)
        if image.mode == "RGBX":  # of older versions of Pillow
            pixels = pixels[..., :3]
        if depth.in_pairs:
            pairs = pixels.astype(np.uint16)  # [rows, width, high and low of grey and of alpha]
            yield top, pairs[..., ::2] << 8 | pairs[..., 1::2]
        elif depth.is_cut:
            planes = pixels.reshape(*pixels.shape[:2], -1)
            yield top, planes.astype(np.uint16) * 257
        elif low is not None:
            low_band = low.crop((0, top, image.width, bottom))
            low_pixels = np.asarray(low_band)[..., : pixels.shape[2]]
            yield top, pixels.astype(np.uint16) << 8 | low_pixels
        else:
            if pixels.min() < 0 and is_signed(image):
                raise Problem(SIGNED)
            if pixels.min() < 0 or pixels.max() > TOP:
                raise Problem("has integer pixels of more than 16 bits: save it with 8 or 16 bits")
            yield top, pixels.astype(np.uint16)[..., None]


# ------------------------------------------------------------------------------------------ scaling
def load_as_8_bits(source, image: Image.Image, white: int) -> Image.Image:
    """Load an opened image; return it with 8 bits a channel, `white` of its 16 bits being 255.

    Raises Problem, also for bits that are out of reach.
    """
    depth = depth_of(source, image)
    low = None
    if depth is None:
        image.load()
    else:
        low = load_all_bits(source, image, depth)
    if image.format == "PNG":
        check_rows(source, image)

    if depth is None:
        return image
    if not depth.is_cut:
        return scale_to_8_bits(image, low, depth, white)
    if white == TOP:  # the high byte is right to a level then
        return image
    reason = "has 16 bits a channel in a form of which Pillow keeps only 8"
    raise Problem(f"{reason}, and white is {white}: save it as PNG")


def scaling_table(white: int) -> np.ndarray:
    """What each level of 16 bits becomes, so that `white` becomes 255: uint8 [65536]."""
    levels = np.arange(TOP + 1)
    return ((np.minimum(levels, white) * 255 + white // 2) // white).astype(np.uint8)


def scale_to_8_bits(
    image: Image.Image, low: Image.Image | None, depth: Depth, white: int
) -> Image.Image:
    """What load_all_bits() has loaded as an image of 8 bits a channel, `white` being 255.

    A transparent colour becomes an alpha channel. Raises Problem for more than 16 bits.
    """
    table = scaling_table(white)
    if depth.inverted:
        table = 255 - table
    key = image.info.get("transparency")

    result = None
    for top, samples in sample_bands(image, low, depth):
        colours, alpha = split_alpha(samples)
        if depth.premultiplied:
            colours = divided_by_alpha(colours, alpha)
        if depth.top != TOP:
            colours = stretched(colours, depth.top)
        parts = [table[colours]]

        if alpha is not None:
            parts.append(scaling_table(TOP)[alpha])
        elif key is not None:
            is_key = (samples == key).all(axis=2, keepdims=True)
            parts.append(np.where(is_key, 0, 255).astype(np.uint8))

        pixels = np.concatenate(parts, axis=2)  # uint8 [rows, width, channels]
        channels = pixels.shape[2]
        if result is None:
            result = Image.new(MODES[channels], image.size)
        result.paste(Image.fromarray(pixels[..., 0] if channels == 1 else pixels), (0, top))
    return result


def split_alpha(samples: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """Samples [..., 1 to 4] as colours or grey, and alpha [..., 1], None of 1 or 3 channels."""
    if samples.shape[2] in (1, 3):
        return samples, None
    return samples[..., :-1], samples[..., -1:]


def divided_by_alpha(colours: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Colours that were multiplied by the alpha, uint16 [..., 3], as they were before."""
    alpha = np.maximum(alpha, 1).astype(np.uint32)
    divided = (colours.astype(np.uint32) * TOP + alpha // 2) // alpha
    return np.minimum(divided, TOP).astype(np.uint16)


def stretched(samples: np.ndarray, top: int) -> np.ndarray:
    """Samples of 0 to `top` as samples of 0 to 65535."""
    samples = np.minimum(samples, top).astype(np.uint32)
    return ((samples * TOP + top // 2) // top).astype(np.uint16)
