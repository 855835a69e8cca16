"""How an image file is decoded, and fitted to a size."""

import io
import os
import re
import threading

import numpy as np
from PIL import Image, UnidentifiedImageError

from inference.bands import bands
from inference.command_line import say
from inference.errors import Problem, one_line
from inference.formats import HEIF_HINT, can_read_heif, first_bytes, is_heif, open_image
from inference.limits import MAX_PIXELS, TooLarge, check_scans, check_size
from inference.orientation import forget_odd_xmp, orientation_of, turn_upright
from inference.transparency import GROUNDS, as_rgba, composite, mend_key, without_empty_alpha

DEEP_FORMATS = ("PNG", "TIFF", "PPM", "JPEG2000", "SGI")  # that may have 16 bits a channel
TIFF_SIGNATURES = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
MAX_STREAM_BYTES = 256 << 20  # read from a pipe at most: nobody's image file is larger


class Seen:
    """How many of the images that were decoded hold more than is used of them.

    transparent: images with pixels that are not opaque. paged: TIFFs of more than one page. Threads
    may share one.
    """

    def __init__(self):
        self.transparent = 0
        self.paged = 0
        self.lock = threading.Lock()

    def add(self, transparent: bool, paged: bool) -> None:
        with self.lock:
            self.transparent += transparent
            self.paged += paged


# ------------------------------------------------------------------------------------------- decode
def decode_image(
    source,
    channels: int,
    white: int = 65535,
    max_pixels: int = MAX_PIXELS,
    ground: str | None = None,
    seen: Seen | None = None,
) -> np.ndarray:
    """Decode one image file to uint8 [height, width, channels].

    source: a path or a binary file object. channels: 1 for grey, 3 for RGB. white: the level of
    16-bit pixels from which on a channel becomes 255. ground: what transparent pixels lie on,
    "white" or "black"; None drops the transparency. The EXIF orientation is applied; an animation
    gives its first frame, a TIFF its first page. seen: counts what the image holds besides. Raises
    Problem, to which the caller adds the file name, and TooLarge for more than max_pixels.
    """
    try:
        source = prepared(source)
        return read_pixels(source, channels, white, max_pixels, ground, seen or Seen())
    except UnidentifiedImageError:
        reason = why_unidentified(source)
    except FileNotFoundError:
        reason = "no such file"
    except Image.DecompressionBombError as error:  # Pillow's own limit comes first
        raise TooLarge(beyond(max_pixels, str(error))) from None
    except MemoryError:
        reason = "is too large for this machine's memory"
    except Problem:
        raise
    except Exception as error:  # Pillow's plugins raise any exception on broken files
        reason = f"cannot be read: {one_line(error)}"
    raise Problem(reason)


def beyond(max_pixels: int, bomb: str) -> str:
    """What to say of an image that Pillow calls a bomb, with the number of its pixels."""
    count = re.search(r"\d+", bomb)
    has = f"{int(count[0]):,} pixels" if count else "many pixels"
    return f"has {has}, more than --max-pixels {max_pixels:,}"


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
    if first_bytes(source).startswith(TIFF_SIGNATURES):
        return "is a kind of TIFF that Pillow cannot read: save it as PNG, or with 8 bits a channel"
    return "is not an image that Pillow can read"


def size_of(source) -> int:
    """The size of a file or a file object in bytes."""
    if not hasattr(source, "read"):
        return os.path.getsize(source)
    return source.seek(0, os.SEEK_END)


def read_pixels(
    source, channels: int, white: int, max_pixels: int, ground: str | None, seen: Seen
) -> np.ndarray:
    """Read an image as uint8 [height, width, channels]; decode_image() explains the errors."""
    with open_image(source) as image:
        has_pages = image.format == "TIFF" and image.is_animated
        loaded = load_8_bits(source, image, white, max_pixels)
        turned = turn_upright(loaded, orientation_of(image))
        del loaded  # a photo in memory once more
        pixels, is_transparent = to_array(turned, channels, ground)

    seen.add(transparent=is_transparent, paged=has_pages)
    return pixels


def load_8_bits(source, image: Image.Image, white: int, max_pixels: int) -> Image.Image:
    """Load an opened image with 8 bits a channel, `white` of its 16 bits being 255."""
    check_size(image.size, max_pixels)
    if image.mode == "F":
        raise Problem(
            "has 32-bit float pixels, which have no fixed range: save it with 8 or 16 bits"
        )
    if image.info.get("progression"):
        check_scans(source)

    mend_key(image)
    forget_odd_xmp(image)
    if image.format in DEEP_FORMATS:
        from inference.depth import load_as_8_bits  # later: a JPEG starts faster without it

        return load_as_8_bits(source, image, white)
    image.load()
    return without_empty_alpha(image)


def to_array(image: Image.Image, channels: int, ground: str | None) -> tuple[np.ndarray, bool]:
    """Convert an image to uint8 [height, width, channels], grey or RGB, on its ground.

    Returns also whether some of it is transparent. It goes band by band: to convert a whole photo
    at once takes twice the time and memory.
    """
    mode = "L" if channels == 1 else "RGB"
    has_alpha = image.has_transparency_data
    is_transparent = False

    width, height = image.size
    pixels = np.empty((height, width, channels), np.uint8)
    for top, bottom, band in bands(image):
        if has_alpha:
            rgba = as_rgba(band)
            is_transparent = is_transparent or rgba.getextrema()[3][0] < 255
            if ground is not None:
                band = composite(rgba, GROUNDS[ground])
            elif image.mode == "La":
                band = rgba
        pixels[top:bottom] = np.asarray(band.convert(mode)).reshape(-1, width, channels)
    return pixels, is_transparent


def note_seen(seen: Seen, ground: str | None) -> None:
    """Note how many images held more than what was used of them."""
    if seen.transparent:
        of_ground = f"laid on {ground}, as the model's images were"
        if ground is None:
            of_ground = "which the model file drops, as its training did"
        say(f"note: {images_of(seen.transparent)} with transparency, {of_ground}")
    if seen.paged:
        say(f"note: {images_of(seen.paged)} of several pages, of which the first is used")


def images_of(count: int) -> str:
    return "1 image" if count == 1 else f"{count:,} images"


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
