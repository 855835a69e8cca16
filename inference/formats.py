"""Which image formats are read, and how a file of one is opened."""

import contextlib
import functools
import importlib
import itertools
import os

from PIL import Image, UnidentifiedImageError

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

# Raw photos of cameras, which are TIFF files with a thumbnail: that is not the picture.
RAW_SUFFIXES = (
    *(".3fr", ".arw", ".cr2", ".dcr", ".dng", ".erf", ".fff", ".iiq", ".kdc", ".mos"),
    *(".nef", ".nrw", ".orf", ".pef", ".raw", ".rw2", ".srw"),
)

# How files begin that may be images. What follows must fit as well: see is_image_inside().
SIGNATURES = (
    b"\xff\xd8\xff",  # JPEG
    b"\x89PNG\r\n",
    b"GIF8",
    b"BM",
    b"II*\0",  # TIFF
    b"MM\0*",
    *(b"P%d" % number for number in range(1, 7)),  # PNM
    b"\0\0\0\x0cjP",  # JPEG 2000
    b"\xff\x4f\xff\x51",
    b"\0\0\1\0",  # ICO
    b"qoif",
    b"\x01\xda",  # SGI
    b"DDS ",
)
HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
AVIF_BRANDS = (b"avif", b"avis")
HEIF_HINT = "pip install pillow-heif"


def open_image(source) -> Image.Image:
    """Image.open for the formats of SUFFIXES, and no others.

    First the format of the file's suffix alone: to load all plugins takes 30 ms of CPU time.
    """
    image = None
    expected = load_plugin_of(source)
    if expected:
        with contextlib.suppress(UnidentifiedImageError):
            image = Image.open(source, formats=(expected,))
    if image is None:
        image = Image.open(source, formats=load_plugins())

    if image.format == "TIFF":
        # Pillow maps an uncompressed file that has a name into memory, newer versions with the
        # width and height of the wrong way up, which gives stripes. So the file has no name.
        image.filename = ""
    return image


def load_plugin_of(source) -> str | None:
    """Load the plugin for a path's suffix; return its format, None if there is none."""
    if hasattr(source, "read"):
        return None

    suffix = os.path.splitext(os.fsdecode(source))[1].lower()
    for name, suffixes in SUFFIXES.items():
        if suffix in suffixes and name in PLUGINS:
            load_plugin(PLUGINS[name])
            return name if name in Image.OPEN else None
    return None


def load_plugin(plugin: str) -> None:
    """Import one of Pillow's plugins, if Pillow was built with it."""
    with contextlib.suppress(ImportError):
        module = importlib.import_module(f"PIL.{plugin}")
        if plugin == "TiffImagePlugin":
            # Pillow can unpack this kind, but its table lacks it: big-endian greys, 0 being white.
            kind = (b"MM", 0, (1,), 1, (16,), ())
            module.OPEN_INFO.setdefault(kind, ("I;16B", "I;16B"))


@functools.cache
def load_plugins() -> tuple[str, ...]:
    """Load the plugins of all formats of SUFFIXES; return the formats that can be opened now."""
    for plugin in set(PLUGINS.values()):
        load_plugin(plugin)

    with contextlib.suppress(ImportError):
        import pillow_heif

        pillow_heif.register_heif_opener()

    return tuple(name for name in SUFFIXES if name in Image.OPEN)


def can_read_heif() -> bool:
    """Is pillow-heif installed?"""
    return "HEIF" in load_plugins()


def first_bytes(source) -> bytes:
    """The beginning of a file or a file object, in which its format shows."""
    if hasattr(source, "read"):
        source.seek(0)
        return source.read(16)
    with open(source, "rb") as file:
        return file.read(16)


def is_heif(start: bytes) -> bool:
    """Does a HEIC photo begin like this?"""
    return start[4:8] == b"ftyp" and start[8:12] in HEIF_BRANDS


def is_image_inside(path: str) -> bool:
    """Does a file of no known suffix hold an image? Raises any exception for a broken one.

    A TGA file has no signature, and so is known by its suffix only.
    """
    start = first_bytes(path)
    is_webp = start[:4] == b"RIFF" and start[8:12] == b"WEBP"
    is_avif = start[4:8] == b"ftyp" and start[8:12] in AVIF_BRANDS
    if not (start.startswith(SIGNATURES) or is_webp or is_avif or is_heif(start)):
        return False

    # A text may begin like an image, "BMW" for instance: the whole header decides.
    open_image(path).close()
    return True
