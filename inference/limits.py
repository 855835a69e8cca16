"""Which image files are not decoded: too large, too slow to decode, or cut off."""

import io
import struct
import zlib
from collections.abc import Iterator

import numpy as np
from PIL import Image

from inference.errors import Problem

MAX_SIDE = 65_535  # pixels; the limit of JPEG, which no honest file exceeds
MAX_PIXELS = 178_956_970  # as Pillow's own; --max-pixels of step3 raises it
LARGE_PIXELS = 16_000_000  # of images with more, only one at a time is in memory
MAX_SCANS = 200  # of a progressive JPEG, each of which takes as long as a whole image

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
PNG_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # by colour type
# Adam7: the first column and row of each pass, and its steps.
PASSES = (
    (0, 0, 8, 8),
    (4, 0, 8, 8),
    (0, 4, 4, 8),
    (2, 0, 4, 4),
    (0, 2, 2, 4),
    (1, 0, 2, 2),
    (0, 1, 1, 2),
)
BLOCK = 1 << 16  # bytes that are inflated at a time


class TooLarge(Problem):
    """An image of more pixels than were allowed."""


def allow_pixels(max_pixels: int) -> None:
    """Raise Pillow's own limit for the whole process, which is half of where it refuses."""
    Image.MAX_IMAGE_PIXELS = max(max_pixels // 2 + 1, Image.MAX_IMAGE_PIXELS or 0)


def check_size(size: tuple[int, int], max_pixels: int) -> None:
    """Raise Problem for an image whose size no honest file has, TooLarge for too many pixels."""
    width, height = size
    if max(width, height) > MAX_SIDE:
        raise Problem(f"has a side of {max(width, height):,} pixels, more than {MAX_SIDE:,}")
    if width * height > max_pixels:
        limit = f"more than --max-pixels {max_pixels:,}"
        raise TooLarge(f"has {width:,} x {height:,} pixels, {limit}")


def content_of(source) -> bytes:
    """All bytes of a path or a seekable file object."""
    if hasattr(source, "read"):
        source.seek(0)
        return source.read()
    with open(source, "rb") as file:
        return file.read()


def check_scans(source) -> None:
    """Raise Problem for a progressive JPEG of so many scans that decoding it would take minutes."""
    # In the data of a scan, 0xFF is followed by 0 or a restart marker only.
    scans = content_of(source).count(b"\xff\xda")
    if scans > MAX_SCANS:
        raise Problem(f"is a JPEG of {scans:,} scans, more than {MAX_SCANS}: save it anew")


# ---------------------------------------------------------------------------------------------- PNG
def check_rows(source, image: Image.Image) -> None:
    """Raise Problem for a PNG whose data ends before its last row.

    Pillow leaves the missing rows black. So a look at the last row is enough for most images.
    """
    width, height = image.size
    last_row = np.asarray(image.crop((0, height - 1, width, height)))
    if last_row.any() and not image.info.get("interlace"):
        return

    chunks = dict_of_chunks(content_of(source))
    if b"IHDR" in chunks and not inflates_to(chunks[b"IDAT"], size_of_rows(chunks[b"IHDR"])):
        raise Problem("is cut off: its data ends before its last row")


def dict_of_chunks(content: bytes) -> dict[bytes, bytes]:
    """{type: data} of the chunks of a PNG, data of one type put together."""
    found: dict[bytes, list[bytes]] = {b"IDAT": []}
    if content.startswith(PNG_SIGNATURE):
        for kind, data in read_chunks(io.BytesIO(content[len(PNG_SIGNATURE) :])):
            found.setdefault(kind, []).append(data)
    return {kind: b"".join(parts) for kind, parts in found.items()}


def read_chunks(stream: io.BytesIO) -> Iterator[tuple[bytes, bytes]]:
    """Yield type and data of each chunk up to the end."""
    while len(head := stream.read(8)) == 8:
        length, kind = struct.unpack(">I4s", head)
        yield kind, stream.read(length)
        stream.read(4)  # the checksum, which Pillow has tested


def size_of_rows(header: bytes) -> int:
    """How many bytes the rows of a PNG have, each with its filter byte, by its IHDR chunk."""
    width, height, depth, colour, _, _, interlaced = struct.unpack(">IIBBBBB", header[:13])
    bits = depth * PNG_CHANNELS.get(colour, 1)
    if not interlaced:
        return height * (1 + -(-width * bits // 8))

    size = 0
    for left, top, across, down in PASSES:
        columns = -(-(width - left) // across)
        rows = -(-(height - top) // down)
        if columns > 0 and rows > 0:
            size += rows * (1 + -(-columns * bits // 8))
    return size


def inflates_to(data: bytes, size: int) -> bool:
    """Does zlib data hold so many bytes or more?"""
    inflater = zlib.decompressobj()
    found = 0
    try:
        while data and found < size and not inflater.eof:
            found += len(inflater.decompress(data, BLOCK))
            data = inflater.unconsumed_tail
        found += len(inflater.flush())
    except zlib.error:
        return False
    return found >= size
