"""Decoding: one policy for every kind of image file, and one clear reason for every file that is
none."""

import io
import os
import struct

import numpy as np
import pytest
from PIL import Image, ImageOps

from inference.errors import Problem
from inference.finding import find_images
from inference.images import decode_image

RNG = np.random.default_rng(0)
COLOUR = RNG.integers(0, 256, (12, 10, 3), dtype=np.uint8)
GREY = COLOUR[..., 0]


def stored(image, file_format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return io.BytesIO(buffer.getvalue())


def pillow(image, mode):
    return np.asarray(image.convert(mode)).reshape(image.height, image.width, -1)


MODES = {
    "grey": Image.fromarray(GREY),
    "colour": Image.fromarray(COLOUR),
    "one bit": Image.fromarray(GREY > 100),
    "palette": Image.fromarray(COLOUR).quantize(16),
    "palette with alpha": Image.fromarray(COLOUR).quantize(16),
    "grey with alpha": Image.fromarray(np.dstack([GREY, GREY[::-1]])),
    "colour with alpha": Image.fromarray(np.dstack([COLOUR, GREY])),
}


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
@pytest.mark.parametrize("kind", MODES)
def test_modes_go_through_pillows_convert(kind, channels, mode):
    options = {"transparency": 3} if kind == "palette with alpha" else {}
    source = stored(MODES[kind], **options)
    expected = pillow(Image.open(source), mode)
    got = decode_image(source, channels)
    assert (
        got.dtype == np.uint8 and got.shape == (12, 10, channels) and np.array_equal(got, expected)
    )


def test_colours_are_the_right_way_round():
    assert np.array_equal(decode_image(stored(Image.fromarray(COLOUR)), 3), COLOUR)
    assert np.array_equal(decode_image(stored(Image.fromarray(GREY)), 1)[..., 0], GREY)


def test_cmyk_jpeg():
    source = stored(
        Image.new("CMYK", (10, 12), (0, 255, 255, 0)), "JPEG", quality=95
    )  # pure red ink
    red = decode_image(source, 3)
    assert red[..., 0].min() > 240 and red[..., 1:].max() < 15


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation):
    tags = Image.Exif()
    tags[0x0112] = orientation
    turns = {1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud}
    turns |= {
        5: lambda a: a.T,
        6: lambda a: np.rot90(a, -1),
        7: lambda a: np.rot90(a, 2).T,
        8: np.rot90,
    }
    source = stored(Image.fromarray(GREY), exif=tags)
    assert np.array_equal(decode_image(source, 1)[..., 0], turns[orientation](GREY))


@pytest.mark.parametrize("file_format", ["PNG", "TIFF"])
def test_16_bits_are_scaled_not_clipped(file_format):
    values = np.array(
        [[0, 1, 128, 129, 256, 1000], [257, 25700, 32768, 65278, 65407, 65535]], dtype=np.uint16
    )
    got = decode_image(stored(Image.fromarray(values), file_format), 1)[..., 0]
    assert np.array_equal(got, np.rint(values / 257)) and got[1, 5] == 255
    assert np.array_equal(
        decode_image(stored(Image.fromarray(values), file_format), 3), np.dstack([got] * 3)
    )


def test_every_grey_level_survives_16_bits():
    levels = np.arange(256, dtype=np.uint16)[None]
    assert np.array_equal(decode_image(stored(Image.fromarray(levels * 257)), 1)[..., 0], levels)


def test_first_frame_of_an_animation():
    frames = [Image.new("L", (6, 5), level) for level in (10, 200, 90)]
    source = stored(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert Image.open(source).n_frames == 3
    assert decode_image(source, 1).max() == 10


def test_float_pixels_are_refused():
    with pytest.raises(Problem, match="float"):
        decode_image(stored(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"), 1)


def test_32_bit_pixels_are_refused_where_they_do_not_fit():
    with pytest.raises(Problem, match="more than 16 bits"):
        decode_image(stored(Image.fromarray(np.full((4, 4), 70000, np.int32)), "TIFF"), 1)


def test_decompression_bomb(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    with pytest.raises(Problem, match="pixels, more than --max-pixels"):
        decode_image(stored(Image.fromarray(COLOUR)), 3)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # step 3 switches them off as well
@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM"])
def test_a_file_cut_anywhere_is_a_problem_or_an_image(file_format):
    whole = stored(
        Image.fromarray(RNG.integers(0, 256, (16, 16, 3), dtype=np.uint8)), file_format
    ).getvalue()
    reasons = set()
    for size in range(0, len(whole) // 2, 7):
        with pytest.raises(Problem) as problem:
            decode_image(io.BytesIO(whole[:size]), 3)
        reasons.add(str(problem.value))
    assert all(reason and "\n" not in reason for reason in reasons)


def test_damaged_headers_are_a_problem(tmp_path):
    # Pillow's plugins raise all kinds of errors on these: NotImplementedError here.
    damaged = bytearray(stored(Image.fromarray(COLOUR), "DDS").getvalue())
    damaged[80:84] = struct.pack("<I", 26)  # pixel format flags that mean nothing
    (tmp_path / "image.dds").write_bytes(damaged)
    with pytest.raises(Problem):
        decode_image(tmp_path / "image.dds", 3)


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"", "is empty"), (b"hello\n" * 50, "is not an image"), (None, "no such file")],
    ids=["empty", "text", "missing"],
)
def test_reason_why_a_file_is_no_image(tmp_path, content, reason):
    path = tmp_path / "image.png"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(Problem, match=reason):
        decode_image(path, 3)


def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(Problem, match="not a regular file"):
        decode_image(tmp_path / "pipe.png", 3)


def test_directories_are_walked_in_name_order(tmp_path):
    for name in ("b/2.JPG", "b/1.png", "a/x/3.tif", "c.png", "notes.txt", "b/model.onnx"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = [os.path.relpath(path, tmp_path) for path, problem in find_images([str(tmp_path)], [])]
    assert found == ["c.png", "a/x/3.tif", "b/1.png", "b/2.JPG"]


def exif_with(orientation, tag, kind, value):
    """EXIF of two entries: an orientation, and a tag of any type, which Pillow may fail to
    write."""
    entries = [struct.pack(">HHIHH", 0x0112, 3, 1, orientation, 0)]
    entries.append(struct.pack(">HHI", tag, kind, 1) + value)
    entries.sort()
    return b"Exif\0\0MM\0*\0\0\0\x08" + struct.pack(">H", 2) + b"".join(entries) + b"\0" * 4


@pytest.mark.parametrize("orientation", range(2, 9))
def test_orientation_counts_whatever_else_the_exif_holds(tmp_path, orientation):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    for tag, kind in ((0x010F, 5), (0x011A, 2), (0x8769, 2), (0x0132, 12), (0x9003, 4)):
        exif = exif_with(orientation, tag, kind, b"\0\0\0\x2a")
        Image.fromarray(pixels).save(tmp_path / "odd.png", exif=exif)
        plain = Image.Exif()
        plain[0x0112] = orientation
        Image.fromarray(pixels).save(tmp_path / "plain.png", exif=plain)
        expected = np.asarray(ImageOps.exif_transpose(Image.open(tmp_path / "plain.png")))
        assert np.array_equal(decode_image(str(tmp_path / "odd.png"), 3), expected)
