"""Small image files of every mode and depth that Pillow, tifffile and OpenCV write, and some that
only a hand can write, each with the pixels that a decoder must find in it.

What is expected comes from the arrays that were written, or from OpenCV where a format loses
something, and from a few lines in float64: never from the decoder that is tested. Where tifffile or
OpenCV is missing, its files are left out.
"""

import io
import struct
import zlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from PIL import Image, features
from PIL.TiffImagePlugin import OPEN_INFO

try:
    import cv2
except ImportError:
    cv2 = None
try:
    import tifffile
except ImportError:
    tifffile = None

HEIGHT = 21
WIDTH = 19
DEPTHS = {8: 255, 10: 1023, 12: 4095, 14: 16383, 16: 65535}  # the highest level of each


class OddFile(NamedTuple):
    """A file and what it must be decoded to."""

    name: str  # with the suffix
    content: bytes
    rgb: np.ndarray  # uint8 [height, width, 3]
    grey: np.ndarray  # uint8 [height, width]
    white: int  # of the spec: the level of 16-bit pixels that becomes 255
    ground: str | None  # of the spec: "white", "black", or None to drop transparency


# ----------------------------------------------------------------------------------------- expected
def odd(
    name: str,
    content: bytes,
    pixels: np.ndarray,
    levels: int = 255,
    ground: str | None = "white",
    white: int = 65535,
) -> OddFile:
    """The file, for pixels [height, width] or [height, width, 1 to 4] with `levels` as white.

    2 channels are grey and alpha, 4 are RGB and alpha. The levels of the alpha go to the highest
    of the pixels' type.
    """
    planes = pixels[..., None] if pixels.ndim == 2 else pixels
    count = planes.shape[2]
    has_alpha = count in (2, 4)
    colour = planes[..., : count - has_alpha].astype(np.float64)
    colour = np.rint(np.minimum(colour, levels) * 255 / levels)

    if has_alpha and ground:
        top = np.iinfo(pixels.dtype).max
        alpha = np.rint(planes[..., -1:].astype(np.float64) * 255 / top) / 255
        behind = {"white": 255.0, "black": 0.0}[ground]
        colour = np.rint(colour * alpha + behind * (1 - alpha))

    rgb = np.broadcast_to(colour, (*colour.shape[:2], 3))
    grey = np.rint(rgb @ [0.299, 0.587, 0.114])
    return OddFile(name, content, rgb.astype(np.uint8), grey.astype(np.uint8), white, ground)


def picture(channels: int, levels: int = 255, seed: int = 0) -> np.ndarray:
    """Noise of every level up to `levels`: [height, width] for 1 channel, else with channels."""
    rng = np.random.default_rng([seed, channels, levels])
    kind = np.uint8 if levels <= 255 else np.uint16
    pixels = rng.integers(0, levels + 1, (HEIGHT, WIDTH, channels), dtype=kind)
    pixels[0, 0] = levels
    pixels[0, 1] = 0
    return pixels[..., 0] if channels == 1 else pixels


def with_alpha(channels: int, levels: int = 255) -> np.ndarray:
    """picture() of 2 or 4 channels whose alpha uses the whole range of its type, 0 included."""
    pixels = picture(channels, levels)
    top = np.iinfo(pixels.dtype).max
    pixels[..., -1] = np.random.default_rng(7).integers(0, top + 1, pixels.shape[:2])
    pixels[:3, :, -1] = 0
    pixels[-3:, :, -1] = top
    return pixels


def smooth(channels: int, top: int = 255) -> np.ndarray:
    """A gradient in each channel, which lossy formats keep well: [height, width, channels]."""
    kind = np.uint8 if top <= 255 else np.uint16
    down, across = np.mgrid[0:HEIGHT, 0:WIDTH]
    planes = [
        down / (HEIGHT - 1),
        across / (WIDTH - 1),
        (down + across) / (HEIGHT + WIDTH - 2),
        1 - down / (HEIGHT - 1),
    ]
    return np.rint(np.stack(planes[:channels], axis=2) * top).astype(kind)


def stored(image: Image.Image, file_format: str, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, file_format, **options)
    return stream.getvalue()


def odd_files() -> Iterator[OddFile]:
    """All files, in the same order and with the same bytes each time."""
    yield from png_files()
    yield from pillow_files()
    yield from palette_files()
    yield from handmade_files()
    yield from lossy_files()
    if tifffile:
        yield from tiff_files()
    if cv2:
        yield from opencv_files()


# ---------------------------------------------------------------------------------------------- PNG
PNG_COLOURS = {1: 0, 2: 4, 3: 2, 4: 6}  # the colour type of so many channels
PASSES = (
    (0, 0, 8, 8),
    (0, 4, 8, 8),
    (4, 0, 8, 4),
    (0, 2, 4, 4),
    (2, 0, 4, 2),
    (0, 1, 2, 2),
    (1, 0, 2, 1),
)


def chunk(kind: bytes, data: bytes) -> bytes:
    checksum = struct.pack(">I", zlib.crc32(kind + data))
    return struct.pack(">I", len(data)) + kind + data + checksum


def packed_rows(pixels: np.ndarray, depth: int) -> bytes:
    """The rows of [height, width, channels], each after a filter byte of 0."""
    rows = b""
    for row in pixels:
        samples = row.reshape(-1)
        if depth == 16:
            data = samples.astype(">u2").tobytes()
        elif depth == 8:
            data = samples.astype(np.uint8).tobytes()
        else:
            bits = (samples[:, None] >> np.arange(depth - 1, -1, -1)) & 1
            data = np.packbits(bits.astype(np.uint8).reshape(-1)).tobytes()
        rows += b"\0" + data
    return rows


def png(
    pixels: np.ndarray,
    depth: int,
    colour: int | None = None,
    interlaced: bool = False,
    before: bytes = b"",
) -> bytes:
    """A PNG of samples of `depth` bits. before: chunks before the pixels, such as tRNS."""
    planes = pixels[..., None] if pixels.ndim == 2 else pixels
    height, width, channels = planes.shape
    colour = PNG_COLOURS[channels] if colour is None else colour
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlaced)

    rows = b""
    if interlaced:
        for top, left, down, across in PASSES:
            part = planes[top::down, left::across]
            rows += packed_rows(part, depth) if part.size else b""
    else:
        rows = packed_rows(planes, depth)

    parts = [chunk(b"IHDR", header), before, chunk(b"IDAT", zlib.compress(rows))]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts) + chunk(b"IEND", b"")


def keyed(pixels: np.ndarray, key, top: int) -> np.ndarray:
    """The pixels with an alpha that is 0 where all channels have the value `key`."""
    planes = pixels[..., None] if pixels.ndim == 2 else pixels
    alpha = np.where((planes == key).all(axis=2, keepdims=True), 0, top)
    return np.concatenate([planes, alpha.astype(pixels.dtype)], axis=2)


def png_files() -> Iterator[OddFile]:
    """Every depth and colour type, plain and interlaced, with alpha and a transparent colour."""
    for interlaced in (False, True):
        end = "-interlaced.png" if interlaced else ".png"
        for depth in (1, 2, 4, 8, 16):
            top = 2**depth - 1
            kind = np.uint16 if depth == 16 else np.uint8
            grey = picture(1, top)
            content = png(grey, depth, interlaced=interlaced)
            yield odd(f"grey-{depth}{end}", content, grey, top)

            key = top // 3
            grey[5:9, 3:8] = key
            transparent = chunk(b"tRNS", struct.pack(">H", key))
            content = png(grey, depth, interlaced=interlaced, before=transparent)
            expected = keyed(grey.astype(kind), key, np.iinfo(kind).max)
            yield odd(f"grey-{depth}-key{end}", content, expected, top)

        for depth in (8, 16):
            top = 2**depth - 1
            for channels, name in ((2, "grey-alpha"), (3, "rgb"), (4, "rgba")):
                pixels = picture(3, top) if channels == 3 else with_alpha(channels, top)
                content = png(pixels, depth, interlaced=interlaced)
                yield odd(f"{name}-{depth}{end}", content, pixels, top)

            pixels = picture(3, top)
            key = (top // 5, top // 3, top)
            pixels[5:9, 3:8] = key
            pixels[5, 3, 2] -= 1  # another colour by the last bit
            transparent = chunk(b"tRNS", struct.pack(">HHH", *key))
            content = png(pixels, depth, interlaced=interlaced, before=transparent)
            yield odd(f"rgb-{depth}-key{end}", content, keyed(pixels, key, top), top)

    for bits in (10, 12, 14):
        top = DEPTHS[bits]
        for channels, name in ((1, "grey"), (2, "grey-alpha"), (3, "rgb"), (4, "rgba")):
            pixels = with_alpha(channels, top) if channels in (2, 4) else picture(channels, top)
            content = png(pixels, 16, interlaced=bits == 14)
            yield odd(f"{name}-{bits}-in-16.png", content, pixels, top, white=top)

    for ground in ("black", None):
        for depth in (8, 16):
            for channels, name in ((2, "grey-alpha"), (4, "rgba")):
                pixels = with_alpha(channels, 2**depth - 1)
                content = png(pixels, depth)
                yield odd(f"{name}-{depth}-on-{ground}.png", content, pixels, 2**depth - 1, ground)


# ------------------------------------------------------------------------------------------- Pillow
def pillow_files() -> Iterator[OddFile]:
    """What Pillow writes without loss, in the formats that are read."""
    plain = {1: ("L", picture(1)), 3: ("RGB", picture(3))}
    transparent = {2: ("LA", with_alpha(2)), 4: ("RGBA", with_alpha(4))}

    writers = [
        ("PNG", ".png", (1, 2, 3, 4), {}),
        ("WEBP", ".webp", (3, 4), {"lossless": True, "exact": True}),
        ("TIFF", ".tif", (1, 2, 3, 4), {}),
        ("TIFF", "-lzw.tif", (1, 2, 3, 4), {"compression": "tiff_lzw"}),
        ("TIFF", "-deflate.tif", (1, 2, 3, 4), {"compression": "tiff_adobe_deflate"}),
        ("TGA", ".tga", (1, 2, 3, 4), {}),
        ("TGA", "-rle.tga", (1, 2, 3, 4), {"compression": "tga_rle"}),
        ("JPEG2000", ".jp2", (1, 2, 3, 4), {"irreversible": False}),
        ("DDS", ".dds", (1, 2, 3, 4), {}),
        ("BMP", ".bmp", (1, 3), {}),
        ("DIB", ".dib", (1, 3), {}),
        ("PPM", ".ppm", (1, 3), {}),
        ("PCX", ".pcx", (1, 3), {}),
        ("SGI", ".sgi", (1, 3, 4), {}),
    ]
    for file_format, end, counts, options in writers:
        for channels in counts:
            mode, pixels = {**plain, **transparent}[channels]
            content = stored(Image.fromarray(pixels, mode), file_format, **options)
            yield odd(f"pillow-{mode}{end}", content, pixels)

    bits = picture(1) > 100
    for file_format, end, options in (
        ("PNG", ".png", {}),
        ("BMP", ".bmp", {}),
        ("PPM", ".pbm", {}),
        ("PCX", ".pcx", {}),
        ("TIFF", ".tif", {}),
        ("TIFF", "-group4.tif", {"compression": "group4"}),
    ):
        content = stored(Image.fromarray(bits), file_format, **options)
        yield odd(f"pillow-1{end}", content, bits.astype(np.uint8) * 255)

    for bits in (10, 12, 16):
        grey = picture(1, DEPTHS[bits])
        for file_format, end in (("PNG", "png"), ("TIFF", "tif")):
            content = stored(Image.fromarray(grey), file_format)
            white = DEPTHS[bits]
            yield odd(f"pillow-I16-{bits}.{end}", content, grey, white, white=white)

    ink = with_alpha(4)
    paper = 255.0 - ink
    rgb = np.rint(paper[..., :3] * paper[..., 3:] / 255).astype(np.uint8)
    content = stored(Image.fromarray(ink, "CMYK"), "TIFF")
    yield odd("pillow-CMYK.tif", content, rgb)

    square = np.zeros((32, 32, 4), np.uint8)
    square[:HEIGHT, :WIDTH] = with_alpha(4)
    for kind in ("png", "bmp"):
        content = stored(
            Image.fromarray(square, "RGBA"), "ICO", sizes=[(32, 32)], bitmap_format=kind
        )
        yield odd(f"pillow-RGBA-{kind}.ico", content, square)


# ----------------------------------------------------------------------------------------- palettes
def palette_picture(count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Indices [height, width], a palette [count, 3], and its alphas [count]."""
    rng = np.random.default_rng(count)
    indices = rng.integers(0, count, (HEIGHT, WIDTH), dtype=np.uint8)
    palette = rng.integers(0, 256, (count, 3), dtype=np.uint8)
    alphas = rng.integers(0, 256, count, dtype=np.uint8)
    alphas[0] = 0
    return indices, palette, alphas


def palette_files() -> Iterator[OddFile]:
    for depth in (1, 2, 4, 8):
        indices, palette, alphas = palette_picture(2**depth)
        colours = chunk(b"PLTE", palette.tobytes())
        content = png(indices, depth, colour=3, before=colours)
        yield odd(f"palette-{depth}.png", content, palette[indices])

        both = np.concatenate([palette, alphas[:, None]], axis=1)
        content = png(indices, depth, colour=3, before=colours + chunk(b"tRNS", alphas.tobytes()))
        yield odd(f"palette-{depth}-alphas.png", content, both[indices])
        yield odd(f"palette-{depth}-alphas-on-black.png", content, both[indices], ground="black")

        only_first = np.concatenate([palette, np.full((len(palette), 1), 255, np.uint8)], axis=1)
        only_first[0, 3] = 0
        content = png(indices, depth, colour=3, before=colours + chunk(b"tRNS", b"\0"))
        yield odd(f"palette-{depth}-one-alpha.png", content, only_first[indices])

    indices, palette, _ = palette_picture(256)
    image = Image.fromarray(indices, "P")
    image.putpalette(palette.tobytes())
    for file_format, end in (("TIFF", "tif"), ("BMP", "bmp"), ("PCX", "pcx"), ("TGA", "tga")):
        yield odd(f"pillow-P.{end}", stored(image, file_format), palette[indices])

    for transparent in (None, 5):
        options = {} if transparent is None else {"transparency": transparent}
        both = np.concatenate([palette, np.full((256, 1), 255, np.uint8)], axis=1)
        if transparent is not None:
            both[transparent, 3] = 0
        for file_format, end in (("GIF", "gif"), ("PNG", "png")):
            content = stored(image, file_format, **options)
            yield odd(f"pillow-P-transparent-{transparent}.{end}", content, both[indices])


# ---------------------------------------------------------------------------------------- by hand
def handmade_files() -> Iterator[OddFile]:
    """Files that no common program writes by default, but cameras, scanners and editors do."""
    for top in (15, 255, 1023, 4095, 65535):
        kind = ">u2" if top > 255 else "u1"
        for channels, magic in ((1, "P5"), (3, "P6")):
            pixels = picture(channels, top)
            head = f"{magic}\n# made by hand\n{WIDTH} {HEIGHT}\n{top}\n".encode()
            end = "pgm" if channels == 1 else "ppm"
            yield odd(f"maxval-{top}.{end}", head + pixels.astype(kind).tobytes(), pixels, top)

            plain = magic.replace("5", "2").replace("6", "3")
            text = " ".join(map(str, pixels.reshape(-1)))
            content = f"{plain}\n{WIDTH} {HEIGHT}\n{top}\n{text}\n".encode()
            yield odd(f"plain-maxval-{top}.{end}", content, pixels, top)

    for bits in (10, 12):
        pixels = picture(3, DEPTHS[bits])
        head = f"P6\n{WIDTH} {HEIGHT}\n65535\n".encode()
        content = head + pixels.astype(">u2").tobytes()
        yield odd(f"{bits}-in-16.ppm", content, pixels, DEPTHS[bits], white=DEPTHS[bits])

    for ground in ("white", "black", None):
        rgba = with_alpha(4)
        yield odd(f"masks-on-{ground}.bmp", bmp_with_masks(rgba), rgba, ground=ground)
        yield odd(f"hand-on-{ground}.qoi", qoi(rgba), rgba, ground=ground)
    rgb = picture(3)
    yield odd("hand.qoi", qoi(rgb), rgb)

    empty = np.concatenate([rgb, np.zeros_like(rgb[..., :1])], axis=2)
    yield odd("empty-alpha.bmp", bmp_with_masks(empty), rgb, ground="white")


def bmp_with_masks(rgba: np.ndarray) -> bytes:
    """A BMP of 32 bits a pixel whose header has masks, that of the alpha included."""
    height, width = rgba.shape[:2]
    data = rgba[::-1, :, [2, 1, 0, 3]].tobytes()
    masks = struct.pack("<IIII", 0x00FF0000, 0x0000FF00, 0x000000FF, 0xFF000000)
    info = struct.pack("<IiiHHIIiiII", 108, width, height, 1, 32, 3, len(data), 2835, 2835, 0, 0)
    info += masks + b"BGRs" + bytes(48)
    start = 14 + len(info)
    return b"BM" + struct.pack("<IHHI", start + len(data), 0, 0, start) + info + data


def qoi(pixels: np.ndarray) -> bytes:
    """A QOI file whose pixels are all written out."""
    height, width, channels = pixels.shape
    tag = b"\xfe" if channels == 3 else b"\xff"
    data = b"".join(tag + pixel.tobytes() for pixel in pixels.reshape(-1, channels))
    return b"qoif" + struct.pack(">IIBB", width, height, channels, 0) + data + bytes(7) + b"\x01"


# -------------------------------------------------------------------------------------------- lossy
def lossy_files() -> Iterator[OddFile]:
    """JPEG, WebP and AVIF of gradients, which lose less than a level at their best quality."""
    rgb = smooth(3)
    grey = smooth(1)[..., 0]
    for name, options in (
        ("444", {"subsampling": 0}),
        ("progressive", {"subsampling": 0, "progressive": True}),
    ):
        yield from decoded_by_opencv(
            f"rgb-{name}.jpg", stored(Image.fromarray(rgb), "JPEG", quality=100, **options)
        )
    yield from decoded_by_opencv("grey.jpg", stored(Image.fromarray(grey), "JPEG", quality=100))
    yield from decoded_by_opencv("rgb.webp", stored(Image.fromarray(rgb), "WEBP", quality=90))


def decoded_by_opencv(name: str, content: bytes, ground: str | None = "white", **levels):
    """Yield the file with what OpenCV finds in it, if OpenCV is there and can read it."""
    found = None
    if cv2:
        found = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_UNCHANGED)
    if found is not None:
        yield odd(name, content, swapped(found), ground=ground, **levels)


def swapped(pixels: np.ndarray) -> np.ndarray:
    """RGB as BGR and the other way round, alpha where it is."""
    if pixels.ndim == 2:
        return pixels
    return pixels[..., [2, 1, 0, 3][: pixels.shape[2]]]


# ----------------------------------------------------------------------------------------- tifffile
def tiff(pixels: np.ndarray, **options) -> bytes:
    stream = io.BytesIO()
    tifffile.imwrite(stream, pixels, **options)
    return stream.getvalue()


def tiff_files() -> Iterator[OddFile]:
    """Byte orders, compressions, strips, tiles, planes, both kinds of alpha, min is white."""
    layouts = {
        "strips": {"rowsperstrip": 5},
        "tiles": {"tile": (16, 16)},
        "deflate": {"compression": "zlib"},
        "deflate-predictor": {"compression": "zlib", "predictor": 2},
        "deflate-tiles": {"compression": "zlib", "tile": (16, 16)},
    }
    for order, letter in (("<", "little"), (">", "big")):
        for layout, options in layouts.items():
            for bits in (8, 16):
                top = DEPTHS[bits]
                end = f"{bits}-{letter}-{layout}.tif"
                options = {**options, "byteorder": order}

                rgb = picture(3, top)
                yield odd(f"rgb-{end}", tiff(rgb, photometric="rgb", **options), rgb, top)

                grey = picture(1, top)
                yield odd(f"grey-{end}", tiff(grey, photometric="minisblack", **options), grey, top)

                content = tiff(top - grey, photometric="miniswhite", **options)
                yield odd(f"miniswhite-{end}", content, grey, top)

                rgba = with_alpha(4, top)
                alpha = {"photometric": "rgb", "extrasamples": ["unassalpha"], **options}
                yield odd(f"rgba-{end}", tiff(rgba, **alpha), rgba, top)

    yield from tiff_of_fewer_bits()
    yield from tiff_planes()
    yield from tiff_alphas()

    rgb = picture(3)
    pages = np.stack([rgb, 255 - rgb])
    yield odd("pages.tif", tiff(pages, photometric="rgb"), rgb)
    yield odd("big.tif", tiff(rgb, photometric="rgb", bigtiff=True), rgb)


def tiff_of_fewer_bits() -> Iterator[OddFile]:
    for bits in (10, 12, 14):
        top = DEPTHS[bits]
        for order, letter in (("<", "little"), (">", "big")):
            for compression in (None, "zlib"):
                options = {"byteorder": order, "compression": compression}
                end = f"{bits}-in-16-{letter}-{compression}.tif"
                rgb = picture(3, top)
                content = tiff(rgb, photometric="rgb", **options)
                yield odd(f"rgb-{end}", content, rgb, top, white=top)


def tiff_planes() -> Iterator[OddFile]:
    """Planes one after the other."""
    for bits in (8, 16):
        top = DEPTHS[bits]
        rgb = picture(3, top)
        planes = np.moveaxis(rgb, 2, 0)
        for order in "<>":
            for compression in (None, "zlib"):
                options = {"byteorder": order, "compression": compression}
                content = tiff(planes, photometric="rgb", planarconfig="separate", **options)
                name = f"planes-{bits}-{'little' if order == '<' else 'big'}-{compression}.tif"
                yield odd(name, content, rgb, top)


def tiff_alphas() -> Iterator[OddFile]:
    """Associated alpha, whose colours are multiplied by it, and samples that are no alpha."""
    for bits in (8, 16):
        top = DEPTHS[bits]
        rgba = with_alpha(4, top)
        alpha = rgba[..., 3:]
        product = np.rint(rgba[..., :3].astype(np.float64) * alpha / top).astype(rgba.dtype)
        associated = np.concatenate([product, alpha], axis=2)
        for ground in ("white", "black"):
            for compression in (None, "zlib"):
                content = tiff(
                    associated,
                    photometric="rgb",
                    extrasamples=["assocalpha"],
                    compression=compression,
                )
                name = f"associated-{bits}-{compression}-on-{ground}.tif"
                yield odd(name, content, rgba, top, ground)

        content = tiff(rgba, photometric="rgb", extrasamples=["unspecified"])
        yield odd(f"unspecified-{bits}.tif", content, rgba[..., :3], top)

    both = with_alpha(2)
    product = np.rint(both[..., :1].astype(np.float64) * both[..., 1:] / 255).astype(np.uint8)
    for kind, first in (("assocalpha", product), ("unassalpha", both[..., :1])):
        pixels = np.concatenate([first, both[..., 1:]], axis=2)
        content = tiff(pixels, photometric="minisblack", planarconfig="contig", extrasamples=[kind])
        if kind == "unassalpha" or ("La", "La") in OPEN_INFO.values():  # of newer Pillows
            yield odd(f"grey-alpha-{kind}.tif", content, both)


# ------------------------------------------------------------------------------------------- OpenCV
def opencv_files() -> Iterator[OddFile]:
    """8 and 16 bits in the formats that OpenCV writes."""
    for bits in (8, 10, 12, 14, 16):
        top = DEPTHS[bits]
        white = 65535 if bits == 8 else top
        for channels in (1, 3, 4):
            pixels = with_alpha(4, top) if channels == 4 else picture(channels, top)
            ends = [".png", ".tif"]
            if channels < 4:
                ends.append(".ppm" if channels == 3 else ".pgm")
            for end in ends:
                done, content = cv2.imencode(end, swapped(pixels))
                if done:
                    name = f"opencv-{channels}-{bits}{end}"
                    yield odd(name, content.tobytes(), pixels, top, white=white)

    for bits in (8, 10, 12):
        yield from avif_of(bits)


def avif_of(bits: int) -> Iterator[OddFile]:
    """AVIF says how many bits it has, so that 10 bits never look like 16."""
    pixels = smooth(3, DEPTHS[bits])
    best = [cv2.IMWRITE_AVIF_QUALITY, 100, cv2.IMWRITE_AVIF_DEPTH, bits]
    done = features.check("avif")
    if done:
        try:
            done, content = cv2.imencode(".avif", swapped(pixels), best)
        except cv2.error:  # built without it
            done = False
    if done:
        yield odd(f"opencv-{bits}.avif", content.tobytes(), pixels, DEPTHS[bits])
