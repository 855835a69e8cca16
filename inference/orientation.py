"""Which way up an image is, by its EXIF."""

import struct

from PIL import Image

EXIF_HEADER = b"Exif\0\0"
ORIENTATION = 0x0112  # the EXIF tag
WHOLE_TYPES = {1: "B", 3: "H", 4: "I", 6: "b", 8: "h", 9: "i"}  # of EXIF, in struct's letters
TRANSPOSED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def turn_upright(image: Image.Image, orientation: int | None) -> Image.Image:
    """The image as its EXIF orientation shows it."""
    method = TRANSPOSED.get(orientation)
    return image if method is None else image.transpose(method)


def orientation_of(opened: Image.Image) -> int | None:
    """The EXIF orientation of a file's image, whatever else the EXIF holds; None if there is none.

    Of a PNG that has no EXIF before its pixels, this decodes the pixels.
    """
    exif = opened.info.get("exif", b"")
    orientation = orientation_in(exif) if isinstance(exif, bytes) else None
    if orientation is None:  # in a TIFF's own tags, or in XMP
        orientation = opened.getexif().get(ORIENTATION)
    return orientation if isinstance(orientation, int) else None


def forget_odd_xmp(opened: Image.Image) -> None:
    """Drop XMP that is no text, from a TIFF with a tag of an odd type: Pillow stumbles over it."""
    if not isinstance(opened.info.get("xmp", b""), (bytes, str)):
        del opened.info["xmp"]


def orientation_in(exif: bytes) -> int | None:
    """The orientation in EXIF; None if there is none, or if the EXIF is cut off before it.

    Pillow gives up on the whole EXIF if another tag has an odd type or points nowhere.
    """
    while exif.startswith(EXIF_HEADER):  # some programs write it twice
        exif = exif[len(EXIF_HEADER) :]

    order = {b"II": "<", b"MM": ">"}.get(exif[:2])
    if order is None:
        return None
    try:
        (start,) = struct.unpack_from(order + "I", exif, 4)
        (count,) = struct.unpack_from(order + "H", exif, start)
        for number in range(count):
            entry = start + 2 + 12 * number  # tag, type, count, value: 2, 2, 4 and 4 bytes
            tag, kind = struct.unpack_from(order + "HH", exif, entry)
            if tag == ORIENTATION and kind in WHOLE_TYPES:
                return struct.unpack_from(order + WHOLE_TYPES[kind], exif, entry + 8)[0]
    except struct.error:
        return None
    return None
