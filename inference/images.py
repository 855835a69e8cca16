"""How an image file is decoded, and fitted to a size."""

import io
import os
import struct
from collections.abc import Iterator

import numpy as np
from PIL import Image, UnidentifiedImageError

from inference.errors import Problem, one_line
from inference.formats import HEIF_HINT, can_read_heif, first_bytes, is_heif, open_image
from inference.limits import MAX_PIXELS, TooLarge, check_rows, check_scans, check_size

MAX_STREAM_BYTES = 256 << 20  # read from a pipe at most: nobody's image file is larger
BAND_PIXELS = 1 << 18  # converted at a time: they fit the processor's cache
EXIF_HEADER = b"Exif\0\0"
ORIENTATION = 0x0112  # the EXIF tag
WHOLE_TYPES = {1: "B", 3: "H", 4: "I"}  # of EXIF, in struct's letters
TRANSPOSED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


# ------------------------------------------------------------------------------------------- decode
def decode_image(
    source, channels: int, white: int = 65535, max_pixels: int = MAX_PIXELS
) -> np.ndarray:
    """Decode one image file to uint8 [height, width, channels].

    source: a path or a binary file object. channels: 1 for grey, 3 for RGB. white: the level of
    16-bit greys from which on a pixel becomes 255. The EXIF orientation is applied; an animation
    gives its first frame. Raises Problem, to which the caller adds the file name, and TooLarge for
    more than max_pixels.
    """
    try:
        source = prepared(source)
        return read_pixels(source, channels, white, max_pixels)
    except UnidentifiedImageError:
        reason = why_unidentified(source)
    except FileNotFoundError:
        reason = "no such file"
    except Image.DecompressionBombError:  # Pillow's own limit comes first
        raise TooLarge(f"has more pixels than --max-pixels {max_pixels:,}") from None
    except MemoryError:
        reason = "is too large for this machine's memory"
    except Problem:
        raise
    except Exception as error:  # Pillow's plugins raise any exception on broken files
        reason = f"cannot be read: {one_line(error)}"
    raise Problem(reason)


def prepared(source):
    """The source in a form that Pillow can seek in. Raises Problem for what must not be opened."""
    if hasattr(source, "read"):
        return source if source.seekable() else io.BytesIO(source.read(MAX_STREAM_BYTES))

    if os.path.exists(source) and not os.path.isfile(source):  # opening a named pipe waits for ever
        raise Problem("is not a regular file")
    return source


def why_unidentified(source) -> str:
    """Why Pillow does not know the format of a file or a file object."""
    if not size_of(source):
        return "is empty"
    if is_heif(first_bytes(source)) and not can_read_heif():
        return f"is a HEIC photo: {HEIF_HINT} to read it"
    return "is not an image that Pillow can read"


def size_of(source) -> int:
    """The size of a file or a file object in bytes."""
    if not hasattr(source, "read"):
        return os.path.getsize(source)
    return source.seek(0, os.SEEK_END)


def read_pixels(source, channels: int, white: int, max_pixels: int) -> np.ndarray:
    """Read an image as uint8 [height, width, channels]; decode_image() explains the errors."""
    with open_image(source) as image:
        check_size(image.size, max_pixels)
        if image.mode == "F":
            raise Problem(
                "has 32-bit float pixels, which have no fixed range: save it with 8 or 16 bits"
            )
        if image.info.get("progression"):
            check_scans(source)

        image.load()
        if image.format == "PNG":
            check_rows(source, image)
        turned = turn_upright(image)

        # "I;16" in either byte order, or "I" if Pillow has widened the pixels.
        if turned.mode.startswith("I"):
            return scale_to_8_bits(turned, channels, white)
        return to_array(turned, channels)


def turn_upright(image: Image.Image) -> Image.Image:
    """The image as its EXIF orientation shows it, whatever else the EXIF holds."""
    exif = image.info.get("exif", b"")
    orientation = orientation_in(exif) if isinstance(exif, bytes) else None
    if orientation is None:  # in a TIFF's own tags, or in XMP
        orientation = image.getexif().get(ORIENTATION)

    method = TRANSPOSED.get(orientation) if isinstance(orientation, int) else None
    return image if method is None else image.transpose(method)


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


def bands(image: Image.Image) -> Iterator[tuple[int, int, Image.Image]]:
    """Yield (top, bottom, these rows) of an image, which together fit the processor's cache."""
    width, height = image.size
    rows = max(1, BAND_PIXELS // width)
    for top in range(0, height, rows):
        bottom = min(top + rows, height)
        yield top, bottom, image.crop((0, top, width, bottom))


def to_array(image: Image.Image, channels: int) -> np.ndarray:
    """Convert an image to uint8 [height, width, channels], grey or RGB.

    It goes band by band: to convert a whole photo at once takes twice the time and memory.
    """
    mode = "L" if channels == 1 else "RGB"
    width, height = image.size
    pixels = np.empty((height, width, channels), np.uint8)
    for top, bottom, band in bands(image):
        pixels[top:bottom] = np.asarray(band.convert(mode)).reshape(-1, width, channels)
    return pixels


def scale_to_8_bits(image: Image.Image, channels: int, white: int) -> np.ndarray:
    """Scale greys of up to 16 bits to uint8 [height, width, channels], so that `white` becomes 255.

    Raises Problem for more bits.
    """
    levels = np.arange(65536)
    table = ((np.minimum(levels, white) * 255 + white // 2) // white).astype(np.uint8)

    width, height = image.size
    pixels = np.empty((height, width, channels), np.uint8)
    for top, bottom, band in bands(image):
        values = np.asarray(band)  # [rows, width]
        if values.min() < 0 or values.max() > 65535:
            raise Problem("has integer pixels of more than 16 bits: save it with 8 or 16 bits")
        pixels[top:bottom] = table[values][..., None]
    return pixels


# ---------------------------------------------------------------------------------------------- fit
def fit_to_input(images: np.ndarray, spec: dict) -> np.ndarray:
    """What the runtime of a file is given for uint8 images [batch, H, W, channels].

    The graph of most files resizes, and takes the images as they are. A file of fixed size takes
    images of the network's own size, which are resized here.
    """
    fixed = spec["fixed"]
    if not fixed:
        return images

    if images.shape[1:3] != tuple(spec["image_size"]):
        # One by one, so that an image gives the same pixels in any batch.
        resized = [resize(image, spec["image_size"], spec["fit"]) for image in images]
        images = np.stack(resized)
        if fixed["input"] != "float32":
            images = np.rint(images)
    return images.astype(fixed["input"], copy=False)


def resize(image: np.ndarray, image_size, fit: str | None = None) -> np.ndarray:
    """Resize uint8 [H, W, channels] to float32 [*image_size, channels].

    Bilinear and antialiased, not rounded: as the graph of a file and Pillow resize. fit: "stretch"
    or None; "crop" keeps the aspect ratio and the middle; "letterbox" keeps the aspect ratio and
    all of the image, between black bars.
    """
    factors = np.divide(image.shape[:2], image_size)  # input pixels to one output pixel
    if fit == "crop":
        factors[:] = factors.min()
    elif fit == "letterbox":
        factors[:] = factors.max()

    for axis in (0, 1):
        image = resize_axis(image, axis, image_size[axis], factors[axis])
    return image


def resize_axis(image: np.ndarray, axis: int, n_out: int, factor: float) -> np.ndarray:
    """Resize one axis of [H, W, channels] to n_out pixels of `factor` input pixels each."""
    n_in = image.shape[axis]
    source = np.arange(n_in) - (n_in - 1) / 2
    target = np.arange(n_out)[:, None] - (n_out - 1) / 2

    # A triangle around each output pixel: [n_out, n_in].
    weights = np.maximum(1 - np.abs(target * factor - source) / max(factor, 1), 0)
    weights /= np.maximum(weights.sum(1, keepdims=True), 1e-6)

    lines = []
    for weight in weights:
        reached = np.flatnonzero(weight)  # so that a photo is never whole in memory as floats
        part = np.take(image, reached, axis).astype(np.float32)
        lines.append(np.tensordot(weight[reached].astype(np.float32), part, (0, axis)))
    return np.stack(lines, axis)
