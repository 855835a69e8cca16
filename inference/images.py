"""How images are found, opened, decoded and fitted to a size."""

import contextlib
import functools
import glob
import importlib
import io
import itertools
import os
import struct
from collections.abc import Callable, Iterator

import numpy as np
from PIL import Image, UnidentifiedImageError

from inference.command_line import say
from inference.errors import Problem, one_line
from inference.limits import MAX_PIXELS, TooLarge, check_rows, check_scans, check_size

# The formats that are read, by Pillow's names, and the suffixes of their files. Pillow knows more,
# and some of those contain others or run programs: an EPS, even one inside an IPTC record, starts
# Ghostscript.
SUFFIXES = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"),
    "PNG": (".png", ".apng"),
    "BMP": (".bmp",),
    "GIF": (".gif",),
    "PPM": (".pgm", ".ppm", ".pbm", ".pnm"),
    "WEBP": (".webp",),
    "TIFF": (".tif", ".tiff"),
    "AVIF": (".avif", ".avifs"),
    "JPEG2000": (".jp2", ".j2k", ".jpc", ".jpf", ".jpx", ".j2c"),
    "TGA": (".tga", ".icb", ".vda", ".vst"),
    "DIB": (".dib",),
    "ICO": (".ico",),
    "PCX": (".pcx",),
    "QOI": (".qoi",),
    "SGI": (".sgi", ".rgb", ".rgba", ".bw"),
    "DDS": (".dds",),
    "HEIF": (".heic", ".heics", ".heif", ".heifs", ".hif"),  # of pillow-heif
}
PLUGINS = {
    "JPEG": "JpegImagePlugin",
    "PNG": "PngImagePlugin",
    "BMP": "BmpImagePlugin",
    "GIF": "GifImagePlugin",
    "PPM": "PpmImagePlugin",
    "WEBP": "WebPImagePlugin",
    "TIFF": "TiffImagePlugin",
    "AVIF": "AvifImagePlugin",
    "JPEG2000": "Jpeg2KImagePlugin",
    "TGA": "TgaImagePlugin",
    "DIB": "BmpImagePlugin",
    "ICO": "IcoImagePlugin",
    "PCX": "PcxImagePlugin",
    "QOI": "QoiImagePlugin",
    "SGI": "SgiImagePlugin",
    "DDS": "DdsImagePlugin",
}
IMAGE_SUFFIXES = tuple(itertools.chain.from_iterable(SUFFIXES.values()))

SYSTEM_FILES = ("thumbs.db", "ehthumbs.db", "desktop.ini", "__macosx")
NAMED = 3  # files that a note names
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
        reason = "is not an image that Pillow can read" if size_of(source) else "is empty"
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


def size_of(source) -> int:
    """The size of a file or a file object in bytes."""
    if not hasattr(source, "read"):
        return os.path.getsize(source)
    return source.seek(0, os.SEEK_END)


def open_image(source) -> Image.Image:
    """Image.open for the formats of SUFFIXES, and no others.

    First the format of the file's suffix alone: to load all plugins takes 30 ms of CPU time.
    """
    expected = load_plugin_of(source)
    if expected:
        with contextlib.suppress(UnidentifiedImageError):
            return Image.open(source, formats=(expected,))

    return Image.open(source, formats=load_plugins())


def load_plugin_of(source) -> str | None:
    """Load the plugin for a path's suffix; return its format, None if there is none."""
    if hasattr(source, "read"):
        return None

    suffix = os.path.splitext(os.fsdecode(source))[1].lower()
    for name, suffixes in SUFFIXES.items():
        if suffix in suffixes and name in PLUGINS:
            with contextlib.suppress(ImportError):
                importlib.import_module(f"PIL.{PLUGINS[name]}")
            return name if name in Image.OPEN else None
    return None


@functools.cache
def load_plugins() -> tuple[str, ...]:
    """Load the plugins of all formats of SUFFIXES; return the formats that can be opened now."""
    for plugin in set(PLUGINS.values()):
        with contextlib.suppress(ImportError):
            importlib.import_module(f"PIL.{plugin}")

    with contextlib.suppress(ImportError):
        import pillow_heif

        pillow_heif.register_heif_opener()

    return tuple(name for name in SUFFIXES if name in Image.OPEN)


def can_read_heif() -> bool:
    """Is pillow-heif installed?"""
    return "HEIF" in load_plugins()


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


# --------------------------------------------------------------------------------------------- find
def is_image(path: str) -> bool:
    """Is a file an image, by its suffix or, if it has none, by its content?"""
    suffix = os.path.splitext(path)[1].lower()
    if suffix:
        return suffix in IMAGE_SUFFIXES and (suffix not in SUFFIXES["HEIF"] or can_read_heif())

    if not os.path.isfile(path):  # opening a named pipe would wait for ever
        return False
    with contextlib.suppress(Exception):  # Pillow's plugins raise any exception on broken files
        open_image(path).close()
        return True
    return False


def find_images(paths: list[str], others: list) -> Iterator[tuple[str, Problem | None]]:
    """Yield each file of the given paths: (path, None), or (path, why it cannot be used).

    Globs are expanded and directories walked. Files in directories that are not images are
    appended to `others`.
    """
    for path in paths:
        is_glob = any(character in path for character in "*?[") and not os.path.lexists(path)
        if is_glob:
            yield from expand(path, others)
        elif os.path.isdir(path):
            yield from images_below(path, others)
        else:
            yield path, None


def expand(pattern: str, others: list) -> Iterator[tuple[str, Problem | None]]:
    """What find_images() yields for a glob."""
    matches = sorted(glob.glob(pattern, recursive=True))
    if not matches:
        yield pattern, Problem("matches no file")
        return

    # "**" matches the directories of its files as well, whose files would come twice.
    files = [match for match in matches if not os.path.isdir(match)]
    yield from find_images(files or matches, others)


def images_below(directory: str, others: list) -> Iterator[tuple[str, Problem | None]]:
    """What find_images() yields for a directory."""
    is_empty = True
    for path, problem in walk(directory, is_visible):
        if problem or is_image(path):
            is_empty = False
            yield path, problem
        else:
            others.append(path)

    if is_empty:
        yield directory, Problem("no images in this directory")


def walk(folder: str, accept: Callable | None = None) -> Iterator[tuple[str, Problem | None]]:
    """Yield (path, None) for the files below a folder, in name order.

    accept: a test of the names of files and folders that are wanted. Links to folders are yielded
    as files and not followed. Folders that cannot be read come last, with a Problem.
    """
    accept = accept or bool
    unreadable = []

    for place, folders, files in os.walk(folder, onerror=unreadable.append):
        links = [name for name in folders if os.path.islink(os.path.join(place, name))]
        folders[:] = sorted(filter(accept, folders))  # os.walk goes on with these
        for name in sorted(filter(accept, files + links)):
            yield os.path.join(place, name), None

    for error in unreadable:
        yield error.filename, Problem(f"cannot be read: {error.strerror}")


def is_visible(name: str) -> bool:
    """Is a name neither hidden, like .DS_Store and ._photo.jpg, nor a file of the system?"""
    return not name.startswith(".") and name.lower() not in SYSTEM_FILES


def note_files(did: str, paths: list[str], why: str = "") -> None:
    """Note, if there are any, how many files something was done to, their kinds and first names."""
    if not paths:
        return

    suffixes = {os.path.splitext(path)[1].lower() for path in paths}
    kinds = ", ".join(sorted(suffix or "no suffix" for suffix in suffixes))
    count = "1 file" if len(paths) == 1 else f"{len(paths):,} files"
    names = ", ".join(paths[:NAMED])
    if len(paths) > NAMED:
        names += ", ..."
    hint = ""
    if {".heic", ".heif"} & suffixes:
        hint = "; pip install pillow-heif to read .heic"

    say(f"note: {did} {count} {why} ({kinds}): {names}{hint}")
