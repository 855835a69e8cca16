"""Step 3 and what is put in front of it: many files, standard input, odd names, large photos,
Ctrl-C."""

import argparse
import csv
import hashlib
import importlib
import io
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import ROOT, onnx_with
from PIL import Image

import step3_infer
from inference.command_line import number
from inference.errors import Problem
from inference.files import replacing, sha256
from inference.finding import find_images
from inference.images import decode_image
from inference.predict import Model, predict_files

SCRIPT = ROOT / "step3_infer.py"
predict_module = importlib.import_module(
    "inference.predict"
)  # in the package, the function has the name


@pytest.fixture
def predict(call, small):
    """predict(*arguments) -> Result, with a small network's ONNX file."""
    return lambda *arguments: call(
        step3_infer.main, "--model", small.export / "model.onnx", *arguments
    )


def rows_of(result):
    return [json.loads(line) for line in result.out.splitlines()]


@pytest.fixture
def many(here):
    """500 tiny images of three sizes in two directories, and a broken one among them."""
    rng = np.random.default_rng(0)
    for k in range(500):
        folder = here / "many" / f"{k // 250}"
        folder.mkdir(parents=True, exist_ok=True)
        side = (8, 9, 11)[k % 3]
        Image.fromarray(rng.integers(0, 256, (side, side), dtype=np.uint8)).save(
            folder / f"{k:04}.png"
        )
    (here / "many" / "0" / "0100.png").write_bytes(b"broken")
    return here / "many"


def test_threads_change_neither_order_nor_answers(predict, many):
    alone, threaded = (rows_of(predict("--format", "json", "--threads", n, many)) for n in (1, 5))
    assert [row["path"] for row in alone] == [str(path) for path in sorted(many.rglob("*.png"))]
    assert [row["path"] for row in threaded] == [row["path"] for row in alone]
    for a, b in zip(alone, threaded, strict=True):
        assert a.get("error") == b.get("error") and a.get("label") == b.get("label")
        assert "error" in a or abs(a["probability"] - b["probability"]) < 1e-5
    assert sum("error" in row for row in alone) == 1


def test_first_answers_come_before_the_last_files_are_read(small, many, monkeypatch):
    decoded, decode = [], decode_image
    monkeypatch.setattr(
        predict_module, "decode_image", lambda path, *_: decoded.append(path) or decode(path, 1)
    )
    model = Model(small.export / "model.onnx", 1)
    results = predict_files(model, find_images([str(many)], []), 3, 4, 1)
    assert len(next(results)) == 4 and len(decoded) < 60
    results.close()
    time.sleep(0.2)
    assert len(decoded) < 100  # and nobody goes on when nobody listens


def test_nobody_decodes_on_when_nobody_listens(small, many, monkeypatch):
    decoded, decode = [], decode_image

    def slow(path, *options):
        time.sleep(0.01)
        decoded.append(path)
        return decode(path, *options)

    monkeypatch.setattr(predict_module, "decode_image", slow)
    model = Model(small.export / "model.onnx", 1)
    results = predict_files(model, find_images([str(many)], []), 2, 60, 1)
    next(results)
    results.close()
    count = len(decoded)
    time.sleep(0.5)
    assert len(decoded) <= count + 4


@pytest.mark.parametrize(
    ("window", "expected"), [(1 << 20, [7, 3]), (1, [1] * 10), (150, [2, 1, 2, 1, 1, 2, 1])]
)
def test_images_of_one_size_run_together_until_the_window_is_full(
    small, window, expected, monkeypatch
):
    batches = []
    model = Model(small.export / "model.onnx", 1)
    run = model._run
    monkeypatch.setattr(model, "_run", lambda inputs: batches.append(len(inputs)) or run(inputs))
    monkeypatch.setattr(predict_module, "WINDOW_BYTES", window)
    sides = iter([8, 8, 9, 8, 8, 9, 9, 8, 8, 8])
    monkeypatch.setattr(
        predict_module, "decode_image", lambda *_: np.zeros((next(sides), 8, 1), np.uint8)
    )
    (results,) = predict_files(model, iter([("x", None)] * 10), 1, 16, 1)
    assert len(results) == 10
    assert batches == expected


def test_large_directories_are_walked_lazily(tmp_path, monkeypatch):
    for name in "abc":
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.png").touch()
    scanned, scan = [], os.scandir
    monkeypatch.setattr(os, "scandir", lambda place: scanned.append(place) or scan(place))
    found = find_images([str(tmp_path)], [])
    assert next(found)[0].endswith("a/1.png") and len(scanned) == 2


def test_files_of_directories_that_are_no_images_are_named(predict, here, samples):
    for name in ("a/x.png", "b/y.png"):
        os.makedirs(os.path.dirname(name))
        shutil.copy(samples[0], name)
    others = ["a/photo.HEIC", "a/labels.txt", "b/notes", "b/other.heic"]
    for name in [*others, "a/Thumbs.db", "b/.DS_Store", "b/._y.png"]:
        (here / name).write_text("not an image")
    result = predict("--format", "json", "a", "b", "a/labels.txt")
    assert [row["path"] for row in rows_of(result)] == ["a/x.png", "b/y.png", "a/labels.txt"]
    (note,) = (
        line for line in result.err.splitlines() if not line.startswith("error: a/labels.txt")
    )
    assert note == (
        "note: skipped 4 files that Pillow cannot read (.heic, .txt, no suffix): "
        "a/labels.txt, a/photo.HEIC, b/notes, ...; pip install pillow-heif to read .heic"
    )
    os.unlink("b/notes")
    os.unlink("b/other.heic")
    assert predict("b").done().err == ""


def test_directories_that_cannot_be_read_are_named(predict, here, samples, monkeypatch):
    shutil.copy(samples[0], here / "a.png")
    (here / "locked").mkdir()
    scan = os.scandir

    def refuse(place):
        if os.path.basename(place) == "locked":
            raise PermissionError(13, "Permission denied", place)
        return scan(place)

    monkeypatch.setattr(os, "scandir", refuse)
    result = predict(".")
    result.error(1, "./locked", "Permission denied")
    assert "./a.png" in result.out


def test_link_loops_end(predict, here, samples):
    shutil.copy(samples[0], here / "a.png")
    os.symlink("loop.png", here / "loop.png")
    os.symlink(".", here / "below")
    result = predict("--format", "json", ".")
    result.error(1, "./loop.png", "cannot be read")
    assert [row["path"] for row in rows_of(result)] == ["./a.png", "./loop.png"]


def test_an_image_from_standard_input(execute, small, samples, here):
    arguments = [SCRIPT, "--model", small.export / "model.onnx", "--format", "json"]
    for given in (["-"], [samples[0], "-"]):
        with open(samples[3], "rb") as stdin:
            rows = rows_of(execute(*arguments, *given, cwd=here, stdin=stdin).done())
        alone = rows_of(execute(*arguments, samples[3], cwd=here).done())
        assert rows[-1] == {**alone[0], "path": "-"}
    execute(*arguments, "-", cwd=here, stdin=subprocess.DEVNULL).error(1, "-: is empty")
    execute(*arguments, "-", cwd=here, close="<&-").error(1, "-: is empty")
    execute(*arguments, "-", cwd=here, close="0>only-to-write").error(1, "-: cannot be read")


def test_no_more_than_a_limit_is_read_of_an_endless_stream():
    taken = []

    class Endless(io.RawIOBase):
        def seekable(self):
            return False

        def read(self, size=-1):
            taken.append(size)
            return bytes(1000)

    with pytest.raises(Problem, match="not an image"):
        decode_image(Endless(), 3)
    assert taken == [256 << 20]


def test_names_that_are_no_utf8(execute, small, samples, here):
    name = os.fsencode(str(here)) + b"/b\xffd.png"
    model = os.fsencode(str(here)) + b"/m\xff.onnx"
    shutil.copy(samples[0], name)
    shutil.copy(small.export / "model.onnx", model)
    result = execute(SCRIPT, "--model", os.fsdecode(model), ".", cwd=here).done()
    assert "./b\\udcffd.png  " in result.out
    assert "missing\\udcff" in execute(
        SCRIPT, "--model", os.fsdecode(model), "missing\udcff", cwd=here
    ).error(1)


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@SUM(A1)", "\tx", "\rx"])
def test_spreadsheets_run_no_class_name(call, small, here, samples, text):
    model = onnx_with(
        small.export / "model.onnx", here / "m.onnx", classes=[text + str(k) for k in range(10)]
    )
    shutil.copy(samples[0], here / "=cmd().png")
    out = call(step3_infer.main, "--model", model, "--format", "csv", "=cmd().png").done().out
    (row,) = csv.DictReader(io.StringIO(out, newline=""))
    label = "'" + text if text.isprintable() else repr(text)[1:-1]
    assert row["path"] == "'=cmd().png" and row["label"].startswith(label)
    assert row["label_2"].startswith(label) and 0 < float(row["probability"]) <= 1


@pytest.mark.parametrize("name", ["\x1b[31mred", "two\nlines", "\u202eright to left"])
def test_terminals_run_no_class_name(call, small, here, samples, name):
    classes = [f"{name}{k}" for k in range(10)]
    model = onnx_with(small.export / "model.onnx", here / "m.onnx", classes=classes)
    out = call(step3_infer.main, "--model", model, samples[0]).done().out
    assert out.count("\n") == 1 and out.rstrip("\n").isprintable()
    assert (
        rows_of(call(step3_infer.main, "--model", model, "--format", "json", samples[0]))[0][
            "label"
        ]
        in classes
    )


@pytest.mark.parametrize("size", [(1, 1), (20000, 1), (1, 20000), (3000, 400)])
@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "I;16"])
def test_every_size_becomes_the_pixels_that_pillow_has(tmp_path, size, mode):
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    if mode == "I;16":
        image = Image.fromarray(rng.integers(0, 256, size[::-1], dtype=np.uint16) * 257)
    image = image if mode == "I;16" else image.convert(mode)
    image.save(tmp_path / "image.png")
    got = decode_image(tmp_path / "image.png", 3)
    if mode == "I;16":
        image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
    assert got.shape == (size[1], size[0], 3) and np.array_equal(
        got, np.asarray(image.convert("RGB"))
    )


def test_a_photo_needs_little_more_than_its_pixels(execute, small, here):
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8))
    coarse.resize((4000, 3000)).save(here / "photo.jpg")
    if not os.path.exists("/proc/self/status"):
        pytest.skip("this system does not say how much memory a process held")
    peak = "; import step3_infer, sys; step3_infer.main(sys.argv[1:])"
    peak += "; print(open('/proc/self/status').read())"
    command = f"import sys; sys.path.insert(0, {str(ROOT)!r}){peak}"
    out = (
        execute("-c", command, "--model", small.export / "model.onnx", "photo.jpg", cwd=here)
        .done()
        .out
    )
    assert int(out.split("VmHWM:")[1].split()[0]) < 250 << 10  # kB


def test_postscript_is_not_run(predict, here):
    Image.new("RGB", (8, 8)).save(here / "x.eps")
    os.rename("x.eps", "x.png")
    predict("x.png").error(1, "x.png", "not an image")


def test_formats_that_pillow_loads_late_are_known_in_every_thread(execute, small, here):
    for k in range(16):
        Image.new("L", (8, 8), 16 * k).save(here / f"{k:02}.sgi")
        os.rename(f"{k:02}.sgi", f"{k:02}.png")
    arguments = ["--model", small.export / "model.onnx", "--threads", 8, "--batch-size", 1, "."]
    assert execute(SCRIPT, *arguments, cwd=here).done().out.count("\n") == 16


def interrupted(command, here, wait):
    process = subprocess.Popen(
        command, cwd=here, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    wait(process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    return process.returncode, out, err


def test_ctrl_c_at_work(small, samples, here):
    (here / "old.txt").write_text("of yesterday")
    os.mkfifo(here / "results")
    command = [sys.executable, SCRIPT, "--model", small.export / "model.onnx", "--format", "json"]
    command += [*samples * 300, "--output", "old.txt"]
    code, _, err = interrupted(
        command, here, lambda _: wait_for(lambda: list(here.glob(".old.txt-*.tmp")))
    )
    assert code == 130 and err == "note: old.txt is as it was before\ninterrupted\n"
    assert (
        sorted(os.listdir()) == ["old.txt", "results"]
        and (here / "old.txt").read_text() == "of yesterday"
    )


def test_ctrl_c_while_importing(here, tmp_path):
    (tmp_path / "numpy.py").write_text(
        "print('importing', flush=True)\nimport time\ntime.sleep(20)\n"
    )
    command = ["env", f"PYTHONPATH={tmp_path}", sys.executable, SCRIPT, "x.png"]
    code, _, err = interrupted(command, here, lambda process: process.stdout.readline())
    assert code in (130, -signal.SIGINT) and err == ""


def wait_for(condition):
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_importers_get_the_same_answers(small, samples, predict):
    model = Model(small.export / "model.onnx")
    row = rows_of(predict("--format", "json", samples[2]).done())[0]
    del row["path"]
    pixels = np.array(Image.open(samples[2]).convert("L"))
    with open(samples[2], "rb") as file:
        for given in (
            samples[2],
            str(samples[2]),
            file,
            pixels,
            pixels[..., None],
            pixels[::-1][::-1],
        ):
            answer = predict_module.predict(given, model)
            assert (
                answer["label"] == row["label"]
                and abs(answer["probability"] - row["probability"]) < 1e-5
            )
            assert [entry["label"] for entry in answer["top"]] == [
                entry["label"] for entry in row["top"]
            ]
    assert len(predict_module.predict(pixels, model, top_k=1)["top"]) == 1


def test_importers_may_use_threads(small, samples):
    from concurrent.futures import ThreadPoolExecutor

    model = Model(small.export / "model.onnx", 1)
    alone = [predict_module.predict(path, model) for path in samples]
    with ThreadPoolExecutor(8) as pool:
        assert (
            list(pool.map(lambda path: predict_module.predict(path, model), samples * 10))
            == alone * 10
        )


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("missing.png", "missing.png no such file"),
        (np.zeros((8, 8), np.float32), "uint8"),
        (np.zeros((8, 8, 3), np.uint8), r"\[8, 8, 3\]"),
        (np.zeros((0, 8), np.uint8), r"\[0, 8\]"),
    ],
    ids=["missing", "float", "colour", "nothing"],
)
def test_importers_are_told_what_is_wrong(small, here, given, words):
    with pytest.raises(Problem, match=words):
        predict_module.predict(given, Model(small.export / "model.onnx"))


def test_long_names_of_output_files(predict, here, samples):
    predict("--output", "字" * 84, samples[0]).done()
    assert (here / ("字" * 84)).exists()


def test_mode_of_output_files_is_the_usual_one(predict, samples, here):
    predict("--output", "out.txt", samples[0]).done()
    (here / "usual").touch()
    assert stat.S_IMODE(os.stat("out.txt").st_mode) == stat.S_IMODE(os.stat("usual").st_mode)


def test_replacing_is_whole_or_not_at_all(here):
    for text in ("first", "second"):
        with replacing("a.txt", "w", encoding="utf-8") as file:
            file.write(text)
            assert not (here / "a.txt").exists() or (here / "a.txt").read_text() == "first"
        assert (here / "a.txt").read_text() == text and os.listdir() == ["a.txt"]
    with replacing(here / "b.bin") as file:
        file.write(b"bytes")
    assert (here / "b.bin").read_bytes() == b"bytes"


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), KeyboardInterrupt(), Problem("x")]
)
def test_replacing_leaves_nothing_after_an_error(here, error):
    (here / "a.txt").write_text("before")
    with pytest.raises(type(error)) as caught, replacing("a.txt") as file:
        file.write(b"half of it")
        raise error
    assert caught.value is error
    assert os.listdir() == ["a.txt"] and (here / "a.txt").read_text() == "before"


def test_replacing_is_on_the_disk_before_the_name_changes(here, monkeypatch):
    done = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda number: done.append("fsync") or fsync(number))
    monkeypatch.setattr(os, "replace", lambda *paths: done.append("replace") or replace(*paths))
    with replacing("a.txt") as file:
        file.write(b"content")
    assert done == ["fsync", "replace"]


@pytest.mark.parametrize("path", ["folder", "missing/a.txt", "file/a.txt"])
def test_replacing_where_nothing_can_be_written(here, path):
    (here / "folder").mkdir()
    (here / "file").touch()
    with pytest.raises(OSError), replacing(path) as file:
        file.write(b"content")
    assert sorted(os.listdir()) == ["file", "folder"]


def test_replacing_follows_a_link_and_writes_to_a_device(here):
    (here / "real.txt").write_text("before")
    os.symlink("real.txt", "link.txt")
    with replacing("link.txt", "w") as file:
        file.write("after")
    assert os.path.islink("link.txt") and (here / "real.txt").read_text() == "after"
    with replacing(os.devnull) as file:
        file.write(b"content")
    assert not os.path.isfile(os.devnull)


def test_sha256_of_a_file(here):
    content = bytes(range(256)) * 5000  # more than one block
    (here / "a").write_bytes(content)
    assert sha256("a") == sha256(here / "a") == hashlib.sha256(content).hexdigest()
    with pytest.raises(OSError):
        sha256("missing")


@pytest.mark.parametrize(
    ("parse", "accepted", "refused", "limit"),
    [
        (
            number(int, 1, 9),
            {"1": 1, "9": 9},
            ["0", "10", "-1", "1.5", "", "x", "1e3"],
            "a whole number from 1 to 9",
        ),
        (number(int, 0), {"0": 0, "123456": 123456}, ["-1", "inf", "nan"], "a whole number from 0"),
        (
            number(float, 0, above=True),
            {"1e-9": 1e-9, "2": 2.0},
            ["0", "inf", "nan", "-1"],
            "a number above 0",
        ),
        (
            number(float, 0, 1),
            {"0": 0.0, "1": 1.0},
            ["1.01", "-0.01", "nan"],
            "a number from 0 to 1",
        ),
    ],
)
def test_numbers_of_the_command_line(parse, accepted, refused, limit):
    for text, value in accepted.items():
        assert parse(text) == value and type(parse(text)) is type(value)
    for text in refused:
        with pytest.raises(argparse.ArgumentTypeError) as caught:
            parse(text)
        assert str(caught.value) == f"{text!r} is not {limit}"
