"""Step 3's - for standard input: a stream of pictures, whole and broken, and always the newest."""

import io
import json
import os
import struct
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

import step3_infer
from inference import frames, stream
from inference.frames import Splitter


def picture(kind="JPEG", seed=0, side=24, **options):
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side), dtype=np.uint8)
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, kind, **options)
    return content.getvalue()


def with_thumbnail(content):
    """A JPEG with another inside its EXIF."""
    exif = b"Exif\0\0" + b"MM\0*\0\0\0\x08\0\0\0\0\0\0" + picture(seed=99, side=8)
    return content[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + content[2:]


def without_tables(content):
    """A JPEG without its Huffman tables, as in MJPEG."""
    result, at = content[:2], 2
    while content[at + 1] != 0xDA:
        end = at + 2 + struct.unpack_from(">H", content, at + 2)[0]
        if content[at + 1] != 0xC4:
            result += content[at:end]
        at = end
    return result + content[at:]


def split(content, size=None):
    """The pictures of a stream that comes in blocks of `size`."""
    splitter = Splitter()
    size = size or len(content)
    found = []
    for start in range(0, len(content), size):
        found += splitter.feed(content[start : start + size])
    return [frame.content for frame in [*found, *splitter.finish()]]


WHOLE = [
    picture(),
    picture("PNG", 1),
    with_thumbnail(picture(seed=2)),
    picture(seed=3, progressive=True),
    picture(seed=4, restart_marker_blocks=1),
    picture("PNG", 5),
    picture(seed=6, side=90),
]


@pytest.mark.parametrize(
    "between", [b"", b"\r\n--frame\r\nContent-Type: image/jpeg\r\n\r\n", b"\xff\0"]
)
@pytest.mark.parametrize("size", [1, 7, 1000, None])
def test_pictures_are_found_whole_however_they_come(between, size):
    assert split(between + between.join(WHOLE) + between, size) == WHOLE


@pytest.mark.parametrize("cut", [*range(3, 700, 9), -40, -2, -1])
@pytest.mark.parametrize("first", [picture(seed=8, side=64), picture("PNG", 8, side=64)])
def test_a_picture_that_breaks_off_costs_no_other(first, cut):
    found = split(first[:cut] + WHOLE[0] + WHOLE[1] + first[:cut] + WHOLE[1], 50)
    assert found.count(WHOLE[0]) == 1 and found.count(WHOLE[1]) == 2 and len(found) <= 5


def test_frames_of_mjpeg_get_the_usual_tables():
    (found,) = split(without_tables(WHOLE[0]))
    assert np.array_equal(Image.open(io.BytesIO(found)), Image.open(io.BytesIO(WHOLE[0])))


def test_further_pictures_of_one_file_are_no_pictures_of_the_stream():
    several = io.BytesIO()
    image = Image.open(io.BytesIO(WHOLE[0]))
    image.save(several, "MPO", save_all=True, append_images=[Image.open(io.BytesIO(WHOLE[6]))])
    found = split(several.getvalue() + WHOLE[6], 100)
    assert len(found) == 2 and found[1] == WHOLE[6]


def test_a_picture_that_never_ends_takes_no_more_memory(monkeypatch):
    monkeypatch.setattr(frames, "MAX_FRAME", 10_000)
    splitter = Splitter()
    endless = WHOLE[0][:-2]
    found = list(splitter.feed(endless))
    for _ in range(50):
        found += splitter.feed(bytes(1000))
        assert len(splitter.buffer) <= 11_000
    assert [frame.reason is not None for frame in found] == [True]
    assert [frame.content for frame in splitter.feed(WHOLE[1])] == [WHOLE[1]]


# ------------------------------------------------------------------------------------ command line
@pytest.fixture
def predict(call, small, monkeypatch):
    """predict(content, *arguments) -> Result, with this content on standard input."""

    def predict(content, *arguments):
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(content)))
        return call(step3_infer.main, "--model", small.export / "model.onnx", *arguments)

    return predict


def rows_of(result):
    return [json.loads(line) for line in result.out.splitlines()]


def test_a_row_for_each_and_an_error_for_a_broken_one(predict):
    content = b"junk" + WHOLE[0] + WHOLE[6][:900] + WHOLE[1]
    result = predict(content, "--format", "json", "-")
    rows = rows_of(result)
    assert [row["path"] for row in rows] == ["-#1", "-#2", "-#3"]
    assert ["error" in row for row in rows] == [False, True, False]
    result.error(1, "-#2")
    assert "note: passed over 4 bytes of standard input" in result.err
    alone = rows_of(predict(WHOLE[1], "--format", "json", "-").done())
    assert alone == [{**rows[2], "path": "-"}]


def test_what_is_of_no_picture_is_counted(predict):
    between = WHOLE[0] + picture("BMP") + WHOLE[1] + b"the end"
    said = predict(between, "-").done().err
    assert f"passed over {len(picture('BMP')) + 7:,} bytes of standard input" in said
    assert "passed over" not in predict(WHOLE[0] + WHOLE[1], "-").done().err


def test_one_in_so_many(predict):
    rows = rows_of(predict(b"".join(WHOLE), "--format", "json", "--every", 3, "-").done())
    assert [row["path"] for row in rows] == ["-#1", "-#4", "-#7"]


@pytest.mark.parametrize("content", [b"", b"no picture at all" * 9])
def test_a_stream_that_is_no_picture_is_one_error(predict, content):
    predict(content, "-").error(1, "-: is")


def test_a_stream_that_never_begins_says_so_once(predict, monkeypatch):
    monkeypatch.setattr("inference.stream.LONG_SEARCH", 1 << 20)
    result = predict(b"y\n" * (1 << 20), "-")
    assert result.code == 1 and result.err.count("in the first 1 MiB of standard input") == 1


def test_another_format_is_one_picture(predict):
    for kind in ("BMP", "TIFF", "WEBP", "TGA", "GIF"):
        assert [
            row["path"] for row in rows_of(predict(picture(kind), "--format", "json", "-"))
        ] == ["-"]


def test_files_beside_a_stream_keep_their_order(predict, samples):
    content = WHOLE[0] + WHOLE[1]
    rows = rows_of(predict(content, "--format", "json", samples[0], "-", samples[1]).done())
    assert [row["path"] for row in rows] == [str(samples[0]), "-#1", "-#2", str(samples[1])]


@pytest.mark.parametrize("option", [["--live"], ["--every", 2]])
def test_what_is_for_streams_needs_one(predict, samples, option):
    predict(b"", *option, samples[0]).error(2, "give - as PATH")


def test_a_row_comes_as_soon_as_its_picture(small):
    command = [sys.executable, ROOT / "step3_infer.py", "--model", small.export / "model.onnx", "-"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        for number, content in enumerate(WHOLE[:3], start=1):
            process.stdin.write(content)
            process.stdin.flush()
            assert process.stdout.readline().startswith(b"-#%d  " % number)
        process.stdin.close()
        assert process.wait(20) == 0


def test_live_takes_the_newest_and_counts_the_others(monkeypatch, capsys):
    reading, writing = os.pipe()
    buffer = os.fdopen(reading, "rb")
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=buffer))
    last = threading.Event()

    def write():
        with open(writing, "wb", buffering=0) as out:
            out.write(WHOLE[0])
            taken.wait(10)
            for content in WHOLE[1:]:
                out.write(content)
        last.set()

    taken = threading.Event()
    threading.Thread(target=write).start()
    found = []
    for path, frame in stream.frames_of_input(1, live=True):
        found.append((path, frame.content))
        taken.set()
        last.wait(10)
        time.sleep(0.1)
    assert found == [("-#1", WHOLE[0]), ("-#7", WHOLE[6])]
    assert "predicted 2 images; 5 came meanwhile" in capsys.readouterr().err


@pytest.mark.slow
def test_a_long_stream_takes_no_more_memory(small):
    code = "import resource, sys, step3_infer; step3_infer.main(sys.argv[1:]); "
    code += "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)"
    peaks = []
    for count in (5_000, 100_000):
        command = [sys.executable, "-c", code, "--model", small.export / "model.onnx", "-"]
        with subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=-1
        ) as process:
            for _ in range(count // 10):
                process.stdin.write(WHOLE[0] * 10)
            process.stdin.close()
            peaks.append(int(process.stderr.read().split()[-1]))
    assert peaks[1] < 1.05 * peaks[0]
