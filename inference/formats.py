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
