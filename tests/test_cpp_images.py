"""deploy/cpp/image.h, built here without an engine: it decodes files to the pixels that they hold,
or refuses them by the name of their format."""

import shutil
import struct
import subprocess
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from odd_files import odd_files
from PIL import Image
from turned_files import turned_files

from inference.images import decode_image

# Reads lines of channels, white, the ground's level (-1: none) and a path; prints for each a line
# and the pixels, or a line with the error.
PIXEL_READER = r"""
#include <fstream>
#include <iostream>
#include <sstream>

#include "image.h"

int main() {
  int channels;
  int white;
  int level;
  while (std::cin >> channels >> white >> level) {
    std::string path;
    std::getline(std::cin >> std::ws, path);
    std::ostringstream content;
    content << std::ifstream(path, std::ios::binary).rdbuf();

    std::optional<int> ground;
    if (level >= 0) ground = level;
    try {
      const Image image = decode(content.str(), channels, white, ground, MAX_PIXELS);
      std::cout << "pixels " << image.height << " " << image.width << "\n";
      std::cout.write(reinterpret_cast<const char*>(image.pixels.data()), image.pixels.size());
    } catch (const Problem& problem) {
      std::cout << problem.what() << "\n";
    }
  }
}
"""
LEVELS = {"white": 255, "black": 0, None: -1}
READ = (".png", ".jpg", ".bmp", ".gif")
NAMES = {  # of the formats that the program refuses, by suffix
    ".webp": "WebP",
    ".tif": "TIFF",
    ".tga": "TGA",
    ".jp2": "JPEG 2000",
    ".dds": "DDS",
    ".dib": "DIB",
    ".ppm": "PNM",
    ".pgm": "PNM",
    ".pbm": "PNM",
    ".pcx": "PCX",
    ".sgi": "SGI",
    ".ico": "ICO",
    ".qoi": "QOI",
    ".avif": "AVIF",
}


@pytest.fixture(scope="module")
def read_pixels(tmp_path_factory):
    """read_pixels([(path, channels, white, ground)]) -> for each the pixels: uint8 [height, width,
    channels], or the text of the error."""
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("needs a C++ compiler (apt install g++)")

    place = tmp_path_factory.mktemp("images")
    (place / "reader.cpp").write_text(PIXEL_READER)
    headers = ["-I", ROOT / "deploy" / "cpp", "-I", "/usr/include/stb", "-I", "/usr/local/include"]
    command = [
        compiler,
        "-std=c++17",
        "-O0",
        *headers,
        place / "reader.cpp",
        "-o",
        place / "reader",
    ]
    built = subprocess.run(command, capture_output=True, text=True)
    if "stb_image.h: No such file" in built.stderr:
        pytest.skip("needs stb_image.h (apt install libstb-dev)")
    assert built.returncode == 0, built.stderr

    def read_pixels(asked):
        lines = [
            f"{channels} {white} {LEVELS[ground]} {path}\n"
            for path, channels, white, ground in asked
        ]
        done = subprocess.run(
            [place / "reader"], input="".join(lines).encode(), capture_output=True, timeout=100
        )
        assert done.returncode == 0, done.stderr

        rest = done.stdout
        found = []
        for _, channels, _, _ in asked:
            line, _, rest = rest.partition(b"\n")
            if not line.startswith(b"pixels "):
                found.append(line.decode())
                continue
            height, width = map(int, line.split()[1:])
            size = height * width * channels
            pixels = np.frombuffer(rest[:size], np.uint8).reshape(height, width, channels)
            found.append(pixels)
            rest = rest[size:]
        return found

    return read_pixels


def farthest(pixels, expected):
    """The largest difference of two images in levels; infinite for other sizes."""
    if pixels.shape != expected.shape:
        return np.inf
    return np.abs(pixels.astype(int) - expected).max()


@pytest.mark.parametrize("channels", [1, 3])
def test_odd_files_have_the_pixels_that_they_hold(read_pixels, tmp_path, channels):
    files = list(odd_files())
    for file in files:
        (tmp_path / file.name).write_bytes(file.content)
    asked = [(tmp_path / file.name, channels, file.white, file.ground) for file in files]

    wrong = {}
    for file, found in zip(files, read_pixels(asked), strict=True):
        expected = file.rgb if channels == 3 else file.grey[..., None]
        suffix = Path(file.name).suffix
        if suffix in READ:
            is_right = not isinstance(found, str) and farthest(found, expected) <= 1
        else:
            refusal = f"is a file in the format {NAMES[suffix]}, which this program cannot read"
            is_right = isinstance(found, str) and refusal in found
        if not is_right:
            wrong[file.name] = found
    assert not wrong


def test_exif_turns_images_by_its_orientation_alone(read_pixels, tmp_path):
    """As in Python: see turned_files.py for what else the EXIF holds."""
    files = [file for file in turned_files() if Path(file[0]).suffix in READ]
    for name, content, _ in files:
        (tmp_path / name).write_bytes(content)
    asked = [(tmp_path / name, 3, 65535, None) for name, _, _ in files]

    wrong = []
    for (name, _, expected), found in zip(files, read_pixels(asked), strict=True):
        theirs = decode_image(str(tmp_path / name), 3)
        if farthest(found, expected) > 1 or farthest(theirs, expected) > 1:
            wrong.append(name)
    assert not wrong


def test_the_fourth_byte_of_a_plain_bmp_is_no_transparency(read_pixels, tmp_path):
    rgba = np.random.default_rng(0).integers(0, 255, (7, 5, 4), dtype=np.uint8)
    rows = rgba[::-1, :, [2, 1, 0, 3]].tobytes()
    info = struct.pack("<IiiHHIIiiII", 40, 5, 7, 1, 32, 0, len(rows), 0, 0, 0, 0)
    head = b"BM" + struct.pack("<IHHI", 54 + len(rows), 0, 0, 54)
    (tmp_path / "plain.bmp").write_bytes(head + info + rows)

    (found,) = read_pixels([(tmp_path / "plain.bmp", 3, 65535, "white")])
    assert farthest(found, rgba[..., :3]) == 0


def test_without_a_ground_colours_under_alpha_are_those_that_the_file_holds(read_pixels, tmp_path):
    """As files exported before there was a ground decode them."""
    rgba = np.random.default_rng(0).integers(0, 255, (9, 8, 4), dtype=np.uint8)
    Image.fromarray(rgba).save(tmp_path / "rgba.png")
    paths = [(tmp_path / "rgba.png", 3, 65535, ground) for ground in (None, "white", "black")]

    dropped, on_white, on_black = read_pixels(paths)
    assert farthest(dropped, rgba[..., :3]) == 0
    assert (on_white >= on_black).all() and farthest(on_white, on_black) > 200
