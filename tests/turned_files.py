"""Small image files whose EXIF says how they are turned, in the ways that cameras, phones and
programs write it, each with its pixels when it is upright."""

import io
import struct
from collections.abc import Iterator

import numpy as np
from odd_files import chunk
from PIL import Image

HEADER = b"Exif\0\0"
XMP_HEADER = b"http://ns.adobe.com/xap/1.0/\0"
XMP_KEYWORD = b"XML:com.adobe.xmp\0\0\0"  # not compressed
ORIENTATION = 0x0112
BYTE, ASCII, SHORT, LONG, RATIONAL = 1, 2, 3, 4, 5  # EXIF's types
SIGNED_BYTE, SIGNED_SHORT, SIGNED_LONG, FLOAT = 6, 8, 9, 11
LETTERS = {BYTE: "B", SHORT: "H", LONG: "I", SIGNED_BYTE: "b", SIGNED_SHORT: "h", SIGNED_LONG: "i"}
UPRIGHT = {
    1: lambda pixels: pixels,
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.swapaxes(0, 1),
    6: lambda pixels: np.rot90(pixels, -1),
    7: lambda pixels: np.rot90(pixels, 2).swapaxes(0, 1),
    8: lambda pixels: np.rot90(pixels),
}


def exif(*entries: tuple[int, int, int, bytes], order: str = "<") -> bytes:
    """EXIF of one directory, of (tag, type, count, 4 bytes of value)."""
    block = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "IH", 8, len(entries))
    for tag, kind, count, value in entries:
        block += struct.pack(order + "HHI", tag, kind, count) + value
    return block + bytes(4)


def orientation(turn: int, kind: int = SHORT, order: str = "<") -> tuple[int, int, int, bytes]:
    return ORIENTATION, kind, 1, struct.pack(order + LETTERS[kind], turn).ljust(4, b"\0")


def blocks() -> np.ndarray:
    """Colours in blocks of 16 pixels, which a JPEG of the best quality keeps: [32, 48, 3]."""
    colours = np.random.default_rng(3).integers(0, 256, (2, 3, 3), dtype=np.uint8)
    return colours.repeat(16, 0).repeat(16, 1)


def stored(file_format: str, **options) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(blocks()).save(stream, file_format, **options)
    return stream.getvalue()


def jpeg(*segments: bytes) -> bytes:
    """A JPEG with these APP1 segments."""
    whole = stored("JPEG", quality=100, subsampling=0)
    parts = [b"\xff\xe1" + struct.pack(">H", 2 + len(segment)) + segment for segment in segments]
    return whole[:2] + b"".join(parts) + whole[2:]


def png(block: bytes, at_end: bool = False) -> bytes:
    """A PNG with this EXIF, before its pixels or after them."""
    return png_with(b"eXIf", block, at_end)


def png_with(kind: bytes, data: bytes, at_end: bool = False) -> bytes:
    """A PNG with this chunk, before its pixels or after them."""
    whole = stored("PNG")
    place = len(whole) - 12 if at_end else 33  # before IEND, or after IHDR
    return whole[:place] + chunk(kind, data) + whole[place:]


def webp(block: bytes) -> bytes:
    return stored("WEBP", lossless=True, exif=block)


# Entries beside the orientation that Pillow or a strict reader would stumble over.
MISTYPED = {
    "rational-as-short": (0x011A, SHORT, 1, b"\x48\0\0\0"),
    "text-as-float": (0x0131, FLOAT, 1, b"\0\0\x80\x3f"),
    "directory-as-text": (0x8769, ASCII, 4, b"abc\0"),
    "directory-as-float": (0x8769, FLOAT, 1, b"\0\0\x80\x3f"),
    "place-as-float": (0x8825, FLOAT, 1, b"\0\0\x80\x3f"),
    "points-nowhere": (0x010F, ASCII, 60_000, b"\xff\xff\xff\x7f"),
    "unknown-type": (0x0100, 99, 1, b"\1\0\0\0"),
    "text-as-rational": (0x0132, RATIONAL, 1, b"\x08\0\0\0"),
}


def turned_files() -> Iterator[tuple[str, bytes, np.ndarray]]:
    """Yield (name, content, the upright pixels: uint8 [height, width, 3])."""
    pixels = blocks()
    for turn, upright in UPRIGHT.items():
        block = exif(orientation(turn))
        yield f"turned-{turn}.jpg", jpeg(HEADER + block), upright(pixels)
        yield f"turned-{turn}.png", png(block), upright(pixels)
        yield f"turned-{turn}.webp", webp(block), upright(pixels)

    upright = UPRIGHT[6](pixels)
    for order, letter in (("<", "little"), (">", "big")):
        for kind in LETTERS:
            block = exif(orientation(6, kind, order), order=order)
            yield f"type-{kind}-{letter}.jpg", jpeg(HEADER + block), upright

    for name, entry in MISTYPED.items():
        before = exif(entry, orientation(6))
        after = exif(orientation(6), entry)
        yield f"{name}-before.jpg", jpeg(HEADER + before), upright
        yield f"{name}-after.jpg", jpeg(HEADER + after), upright
        yield f"{name}.png", png(before), upright

    block = exif(orientation(6))
    yield "doubled.jpg", jpeg(HEADER + HEADER + block), upright
    yield "tripled.jpg", jpeg(3 * HEADER + block), upright
    yield "doubled.png", png(HEADER + HEADER + block), upright
    yield "doubled.webp", webp(HEADER + HEADER + block), upright
    yield "at-the-end.png", png(block, at_end=True), upright
    yield "after-another.jpg", jpeg(XMP_HEADER + b"<x/>", HEADER + block), upright
    yield "split.jpg", jpeg(HEADER + block[:14], HEADER + block[14:]), upright

    for name, text in (("attribute", b'tiff:Orientation="6"'), ("element", b"tiff:Orientation>6<")):
        yield f"xmp-{name}.jpg", jpeg(XMP_HEADER + text), upright
        yield f"xmp-{name}.png", png_with(b"iTXt", XMP_KEYWORD + b"\0\0" + text), upright
        yield f"xmp-{name}.webp", stored("WEBP", lossless=True, xmp=text), upright
    both = jpeg(XMP_HEADER + b'tiff:Orientation="3"', HEADER + block)
    yield "exif-counts-before-xmp.jpg", both, upright

    # What says nothing of an orientation leaves the image as it is.
    for turn in (0, 9, 60_000):
        yield f"no-turn-{turn}.jpg", jpeg(HEADER + exif(orientation(turn))), pixels
    yield "cut.jpg", jpeg(HEADER + block[:12]), pixels
    yield "no-order.jpg", jpeg(HEADER + b"XX" + block[2:]), pixels
    yield "none.jpg", jpeg(), pixels
