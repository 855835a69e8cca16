"""Files of every mode and depth are decoded as an independent decoder says: tests/odd_files.py."""

import io
import struct
from collections import Counter

import numpy as np
import pytest
from odd_files import HEIGHT, WIDTH, odd_files, picture, png, stored, with_alpha
from PIL import Image
from turned_files import UPRIGHT

import data
import step3_infer
from data.target import probe
from inference.errors import Problem
from inference.images import Seen, decode_image


def test_odd_files_are_decoded_as_they_were_written():
    wrong = []
    count = 0
    for file in odd_files():
        for channels, wanted in ((1, file.grey[..., None]), (3, file.rgb)):
            content = io.BytesIO(file.content)
            found = decode_image(content, channels, file.white, ground=file.ground)
            difference = np.abs(found.astype(int) - wanted).max()
            if difference > 1:
                wrong.append((file.name, channels, difference))
        count += 1
    assert not wrong
    assert count > 150


# ------------------------------------------------------------------------------ 16 bits in training
def class_folders(root, contents: dict[str, bytes]):
    """Two classes of four files each, from file names without a class."""
    for label in "ab":
        (root / label).mkdir(parents=True)
        for name, content in contents.items():
            (root / label / name).write_bytes(content)
    return str(root)


def test_white_is_derived_from_16_bit_colours_too(tmp_path, capsys):
    pixels = {f"{number}.png": picture(3, 1023, number) for number in range(4)}
    folder = class_folders(tmp_path, {name: png(image, 16) for name, image in pixels.items()})
    dataset = data.load("folder", folder)
    assert dataset.white == 1023 and dataset.train_images.max() == 255
    assert "10 bits only: 1023 is taken as white" in capsys.readouterr().err
    wanted = {np.rint(image / 1023 * 255).astype(np.uint8).tobytes() for image in pixels.values()}
    assert {image.tobytes() for image in dataset.train_images} <= wanted


@pytest.mark.parametrize("channels", [2, 4])
def test_alpha_says_nothing_of_white(tmp_path, channels):
    path = tmp_path / "a.png"
    path.write_bytes(png(with_alpha(channels, 1023), 16))
    probed = probe([str(path)], 1)
    assert probed.white == 1023
    assert probed.channels == (1 if channels == 2 else 3)


def sgi_of_16_bits(pixels):
    height, width = pixels.shape
    head = struct.pack(">HBBHHHH", 474, 0, 2, 2, width, height, 1).ljust(512, b"\0")
    return head + pixels[::-1].astype(">u2").tobytes()


def test_files_whose_low_bytes_are_out_of_reach_are_refused_if_they_count(tmp_path):
    path = tmp_path / "a.sgi"
    full = picture(1, 65535)
    path.write_bytes(sgi_of_16_bits(full))
    found = decode_image(path, 1)[..., 0]
    assert np.abs(found.astype(int) - np.rint(full / 257)).max() <= 1
    assert probe([str(path)], 1).white == 65535

    path.write_bytes(sgi_of_16_bits(picture(1, 1023)))
    white = probe([str(path)], 1).white
    assert white == 1023
    with pytest.raises(Problem, match=r"keeps only 8, and white is 1023: save it as PNG"):
        decode_image(path, 1, white)


# ----------------------------------------------------------------------------------- transparency
def test_nothing_changes_without_a_ground():
    rgba = with_alpha(4)
    content = png(rgba, 8)
    assert np.array_equal(decode_image(io.BytesIO(content), 3), rgba[..., :3])


@pytest.mark.parametrize(("level", "ground"), [(0, "white"), (200, "white"), (255, "black")])
def test_shapes_drawn_in_alpha_alone_are_seen(tmp_path, capsys, level, ground):
    rgba = np.full((12, 12, 4), level, np.uint8)
    rgba[..., 3] = 0
    rgba[3:9, 5:8, 3] = 255
    mask = rgba[..., 3] > 0
    folder = class_folders(tmp_path, {f"{number}.png": png(rgba, 8) for number in range(4)})

    dataset = data.load("folder", folder)
    assert dataset.ground == ground
    assert f"note: 8 images with transparency, laid on {ground}" in capsys.readouterr().err
    behind = 255 if ground == "white" else 0
    assert (dataset.train_images[0][mask] == level).all()
    assert (dataset.train_images[0][~mask] == behind).all()

    data.load("folder", folder)  # from the cache
    assert "8 images with transparency" in capsys.readouterr().err
    old = data.load("folder", folder, channels=3, image_size=(12, 12), white=65535, ground="none")
    assert old.ground is None and (old.train_images == level).all()


def test_the_test_split_does_not_choose_the_ground(tmp_path):
    paths = []
    for name, level in (("train", 0), ("test 1", 255), ("test 2", 255)):
        rgba = with_alpha(4)
        rgba[..., :3] = level
        path = tmp_path / f"{name}.png"
        path.write_bytes(png(rgba, 8))
        paths.append(str(path))
    probed = probe(paths, 1)
    assert probed.ground == "white" and probed.transparent == 3


def test_opaque_images_with_an_alpha_channel_are_not_counted(tmp_path):
    rgba = with_alpha(4)
    rgba[..., 3] = 255
    (tmp_path / "a.png").write_bytes(png(rgba, 8))
    assert probe([str(tmp_path / "a.png")], 1).transparent == 0
    seen = Seen()
    decode_image(tmp_path / "a.png", 3, ground="white", seen=seen)
    assert seen.transparent == 0


# ------------------------------------------------------------------------------------------- pages
def tiff_of_pages() -> bytes:
    pages = [Image.fromarray(picture(3, seed=number)) for number in range(3)]
    return stored(pages[0], "TIFF", save_all=True, append_images=pages[1:])


def test_step1_counts_what_is_not_used(tmp_path, capsys):
    contents = {"1.tif": tiff_of_pages(), "2.png": png(picture(3), 8)}
    data.load("folder", class_folders(tmp_path, contents | {"3.png": png(picture(3, seed=9), 8)}))
    assert "note: 2 images of several pages, of which the first is used" in capsys.readouterr().err


def test_step3_counts_what_is_not_used(call, small, here):
    (here / "1.tif").write_bytes(tiff_of_pages())
    (here / "2.png").write_bytes(png(with_alpha(4), 8))
    (here / "3.png").write_bytes(png(with_alpha(2), 16))
    result = call(
        step3_infer.main,
        "--model",
        small.export / "model.onnx",
        "--format",
        "json",
        *here.iterdir(),
    )
    lines = Counter(result.err.splitlines())
    assert lines["note: 1 image of several pages, of which the first is used"] == 1
    dropped = "note: 2 images with transparency, which the model file drops, as its training did"
    assert lines[dropped] == 1
    assert "note" not in result.out


# -------------------------------------------------------------------------------------------- EXIF
TAGS = (0x0100, 0x010F, 0x0110, 0x011A, 0x0128, 0x0132, 0x0213, 0x8298, 0x8769, 0x8825, 0x9003)


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP"])
def test_no_other_tag_of_the_exif_loses_the_photo(file_format):
    pixels = picture(3)
    options = {"lossless": True} if file_format == "WEBP" else {}
    upright = stored(Image.fromarray(pixels), file_format, **options)
    wanted = np.rot90(decode_image(io.BytesIO(upright), 3), -1)  # orientation 6
    assert wanted.shape == (WIDTH, HEIGHT, 3)
    for tag in TAGS:
        for kind in range(14):
            for value in (b"\0\0\0\x2a", b"\xff\xff\xff\xff"):
                entries = [struct.pack(">HHIHH", 0x0112, 3, 1, 6, 0)]
                entries.append(struct.pack(">HHI", tag, kind, 1) + value)
                exif = b"Exif\0\0MM\0*\0\0\0\x08" + struct.pack(">H", 2)
                exif += b"".join(sorted(entries)) + b"\0" * 4
                content = stored(Image.fromarray(pixels), file_format, exif=exif, **options)
                assert np.array_equal(decode_image(io.BytesIO(content), 3), wanted), (tag, kind)


def test_an_exif_header_that_is_there_twice():
    tags = Image.Exif()
    tags[0x0112] = 6
    image = Image.fromarray(picture(3))
    once = stored(image, "JPEG", exif=tags.tobytes())
    twice = stored(image, "JPEG", exif=b"Exif\0\0" + tags.tobytes())
    assert twice.count(b"Exif\0\0") == 2
    found = decode_image(io.BytesIO(twice), 3)
    assert np.array_equal(found, decode_image(io.BytesIO(once), 3))
    assert found.shape == (WIDTH, HEIGHT, 3)


def tiff_with(tag: int, kind: int) -> bytes:
    """A TIFF of HEIGHT x WIDTH pixels with orientation 6 and one tag of any type."""
    pixels = picture(3).tobytes()
    values = {256: WIDTH, 257: HEIGHT, 258: 8, 259: 1, 262: 2, 273: 8, 274: 6, 277: 3, 278: HEIGHT}
    entries = [(number, 3, value) for number, value in values.items()]
    entries += [(279, 4, len(pixels)), (tag, kind, 42)]
    table = b"".join(struct.pack("<HHII", n, k, 1, value) for n, k, value in sorted(entries))
    start = struct.pack("<I", 8 + len(pixels))
    return b"II*\0" + start + pixels + struct.pack("<H", len(entries)) + table + bytes(4)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("tag", [271, 282, 306, 315, 700, 33432, 34377])
def test_no_other_tag_of_a_tiff_loses_the_photo(tag):
    for kind in range(1, 14):
        found = decode_image(io.BytesIO(tiff_with(tag, kind)), 3)
        assert np.array_equal(found, np.rot90(picture(3), -1)), kind


# ------------------------------------------------------------------------------------------ refused
def test_colours_that_pillow_gets_wrong_are_refused():
    content = bytearray(stored(Image.fromarray(picture(3)), "JPEG2000", irreversible=False))
    bits = content.index(b"\xff\x4f\xff\x51") + 42
    assert content[bits] == 7  # 8 bits
    content[bits] = 11
    with pytest.raises(Problem, match=r"JPEG 2000 of 12 bits a channel.*save it as PNG"):
        decode_image(io.BytesIO(content), 3)


def test_kinds_of_tiff_that_pillow_does_not_know_are_named():
    of_8_bits = struct.pack("<HHII", 258, 3, 1, 8)
    of_64_bits = struct.pack("<HHII", 258, 3, 1, 64)
    content = tiff_with(700, 7).replace(of_8_bits, of_64_bits)
    with pytest.raises(Problem, match="a kind of TIFF that Pillow cannot read: save it as PNG"):
        decode_image(io.BytesIO(content), 3)


# ------------------------------------------------------------------------------ TIFFs that lie down
COMPRESSIONS = (None, "tiff_adobe_deflate", "tiff_lzw")


def image_of(mode: str) -> Image.Image:
    """Noise of a mode, larger across than down."""
    if mode == "1":
        return Image.fromarray(picture(1)[:9] > 100)
    if mode == "I;16":
        return Image.fromarray(picture(1, 65535)[:9])
    channels = len(Image.new(mode, (1, 1)).getbands())
    image = Image.fromarray(picture(channels)[:9], mode)
    if mode == "P":
        image.putpalette(np.random.default_rng(1).integers(0, 256, 768, dtype=np.uint8).tobytes())
    return image


@pytest.mark.parametrize("mode", ["L", "I;16", "RGB", "RGBA", "LA", "1", "P", "CMYK"])
def test_a_tiff_that_lies_on_its_side_is_turned_whatever_it_holds(tmp_path, mode):
    image = image_of(mode)
    path = tmp_path / "turned.tif"
    upright = decode_image(io.BytesIO(stored(image, "TIFF")), 3, ground="white")
    for compression in COMPRESSIONS:
        for turn, turned in UPRIGHT.items():
            image.save(path, compression=compression, tiffinfo={274: turn})
            wanted = turned(upright)
            content = io.BytesIO(path.read_bytes())
            for source in (path, content):
                found = decode_image(source, 3, ground="white")
                assert np.array_equal(found, wanted), (compression, turn, source)
            assert tuple(probe([str(path)], 1).smallest) == wanted.shape[:2]


@pytest.mark.parametrize("bits", [8, 16, 32])
def test_signed_pixels_are_refused_by_name(tmp_path, bits):
    tifffile = pytest.importorskip("tifffile")
    path = tmp_path / "signed.tif"
    pixels = picture(1, 100).astype(f"int{bits}")
    tifffile.imwrite(path, pixels - 20)
    with pytest.raises(Problem, match="has signed pixels"):
        decode_image(path, 1)

    if bits > 8:  # Pillow writes such files itself, with nothing below 0
        tifffile.imwrite(path, pixels)
        assert np.array_equal(decode_image(path, 1, white=255)[..., 0], pixels)
