"""Step 3's --collect: which pictures it keeps, where, and what happens when it cannot."""

import errno
import io
import json
import os
import shutil
import zlib

import numpy as np
import pytest
from PIL import Image

import step3_infer
from inference import collect as collecting
from inference.collect import INDEX, folder_names, near_copies, safe_name
from inference.files import locked


@pytest.fixture
def collect(call, small):
    """collect(*arguments) -> Result, of a prediction that collects into `kept`."""
    return lambda *arguments: call(
        step3_infer.main, "--model", small.export / "model.onnx", "--collect", "kept", *arguments
    )


@pytest.fixture
def pictures(here):
    """Thirty different pictures."""
    rng = np.random.default_rng(0)
    for number in range(30):
        pixels = rng.integers(0, 256, (24, 24), dtype=np.uint8)
        (here / "in" / str(number % 3)).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(here / "in" / str(number % 3) / f"{number}.png")
    return here / "in"


def kept(here):
    return sorted(path.relative_to(here / "kept") for path in (here / "kept").rglob("*.png"))


def margins(call, small, place):
    """{content: margin} of all pictures, and {content: answer}."""
    arguments = ["--model", small.export / "model.onnx", "--format", "json", place]
    rows = map(json.loads, call(step3_infer.main, *arguments).out.splitlines())
    found = {}
    for row in rows:
        with open(row["path"], "rb") as file:
            first, second = row["top"][:2]
            found[file.read()] = (first["probability"] - second["probability"], row["label"])
    return found


@pytest.mark.parametrize("option", [[], ["--threads", 1, "--batch-size", 1]])
def test_the_least_certain_are_kept_by_answer(call, collect, pictures, small, here, option):
    result = collect("--collect-at-most", 7, "--format", "json", "--top-k", 1, *option, "in").done()
    assert {len(json.loads(line)["top"]) for line in result.out.splitlines()} == {1}
    found = margins(call, small, "in")
    best = sorted(found, key=found.get)[:7]
    assert {(here / "kept" / path).read_bytes() for path in kept(here)} == set(best)
    for path in kept(here):
        assert path.parts[0] == found[(here / "kept" / path).read_bytes()][1]
    assert "holds 7 pictures" in result.err and "of 30 seen" in result.err


def test_it_goes_on_after_a_restart_and_takes_nothing_else_away(collect, pictures, here):
    collect("--collect-at-most", 7, "in").done()
    at_once = kept(here)
    shutil.rmtree("kept")
    (here / "kept" / "3").mkdir(parents=True)
    (here / "kept" / "3" / "mine.png").write_bytes(b"mine")
    for part in ("0", "1", "2", "0"):
        collect("--collect-at-most", 7, f"in/{part}").done()
    assert (here / "kept" / "3" / "mine.png").read_bytes() == b"mine"
    (here / "kept" / "3" / "mine.png").unlink()
    assert kept(here) == at_once


def test_what_was_moved_away_makes_room(collect, pictures, here):
    collect("--collect-at-most", 7, "in").done()
    taken = kept(here)[0]
    (here / "kept" / taken).rename(here / "labelled.png")
    collect("--collect-at-most", 7, "in").done()
    assert len(kept(here)) == 7


def test_no_folder_is_left_empty(collect, samples, here):
    collect("--collect-at-most", 1, *samples).done()
    folders = [path.name for path in (here / "kept").iterdir() if path.is_dir()]
    assert folders == [path.parts[0] for path in kept(here)]


def test_unknown_and_unsure_come_first(collect, pictures, here):
    result = collect("--collect-at-most", 5, "--min-probability", 0.35, "--format", "json", "in")
    labels = [json.loads(line)["label"] for line in result.done().out.splitlines()]
    folders = [path.parts[0] for path in kept(here)]
    assert folders.count("unsure") == min(5, labels.count("unsure")) > 0


def test_near_copies_are_kept_once(collect, here, samples):
    (here / "in").mkdir()
    image = Image.open(samples[3]).resize((64, 64), Image.Resampling.BICUBIC).convert("L")
    image.save("in/a.png")
    image.save("in/b.jpg", quality=70)
    image.point(lambda level: min(255, level + 8)).save("in/c.png")
    image.resize((80, 80)).save("in/d.png")
    Image.open(samples[4]).save("in/e.png")
    result = collect("in").done()
    assert len([p for p in (here / "kept").rglob("*.*") if p.name != INDEX]) == 2
    assert "3 near copies left out" in result.err


def test_a_small_object_makes_another_picture():
    rng = np.random.default_rng(0)
    scene = rng.integers(0, 256, 144).astype(np.uint8)
    same = np.clip(scene + rng.normal(0, 3, 144), 0, 255).astype(np.uint8)
    other = scene.copy()
    other[70] = 255 if scene[70] < 128 else 0
    assert near_copies(same, np.stack([other, scene])).tolist() == [1]
    assert near_copies(same, np.empty((0, 144), np.uint8)).tolist() == []


def test_a_full_disk_is_one_error_and_predictions_go_on(collect, pictures, here, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    real = collecting.replacing

    def replacing(path, *more, **options):
        return (real if INDEX in path else full)(path, *more, **options)

    monkeypatch.setattr(collecting, "replacing", replacing)
    result = collect("in")
    result.error(1, "cannot collect into kept", "No space left", "go on")
    assert len(result.out.splitlines()) == 30 and kept(here) == []


def test_directories_that_cannot_be_used(collect, pictures, here):
    (here / "kept").write_text("a file")
    collect("in").error(1, "cannot collect into kept")
    (here / "kept").unlink()
    collect("--collect", "in/0/new", "in").error(2, "lies in in")
    for path in ("in/0", "in/0/0.png", "in/*/0.png"):
        collect("--collect", "in", path).error(2, f"{path} lies in --collect in")
    (here / "kept").mkdir()
    (here / "kept" / INDEX).write_text("something else\n")
    damaged = collect("in")
    damaged.error(1, "damaged", "the predictions go on")
    assert len(damaged.out.splitlines()) == 30
    shutil.rmtree("kept")
    collect("in").done()
    collect("--collect-at-most", 3, "in").error(2, "holds 30 pictures")


def test_a_directory_belongs_to_one_process(collect, pictures, here):
    (here / "kept").mkdir()
    with locked("kept"):
        result = collect("in")
    result.error(1, "kept is in use by another process", "the predictions go on")
    assert len(result.out.splitlines()) == 30 and not kept(here)
    collect("in").done()


def test_a_file_system_without_locks_will_do(collect, pictures, here, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("inference.files.fcntl.flock", no_locks)
    collect("--monitor", "monitor.json", "in").done()
    assert kept(here) and (here / "monitor.json").stat().st_size


@pytest.mark.parametrize(
    ("path", "kind", "name"),
    [
        ("-#7", "JPEG", "frame-7-{}.jpg"),
        ("-", "BMP", "frame-{}.bmp"),
        ("-", "TGA", "frame-{}.tga"),
        ("-dash.png", "BMP", "dash-{}.png"),
        ("in/none", "BMP", "none-{}"),
    ],
)
def test_names_of_copies(path, kind, name):
    written = io.BytesIO()
    Image.new("L", (8, 8)).save(written, kind)
    content = written.getvalue()
    assert collecting.file_name(path, content) == name.format(f"{zlib.crc32(content):08x}")


def test_pictures_that_a_damaged_index_has_lost_are_counted(collect, pictures, here):
    collect("in").done()
    index = here / "kept" / INDEX
    index.write_text("".join(index.read_text().splitlines(keepends=True)[:11]))
    said = collect("--collect-at-most", 30, "in").done().err
    assert "holds 20 files besides" in said


def test_an_index_of_a_stranger_deletes_nothing_outside(collect, pictures, here, small):
    collect("--collect-at-most", 3, "in").done()
    index = here / "kept" / INDEX
    (here / "precious.png").write_bytes(b"precious")
    lines = [json.loads(line) for line in index.read_text().splitlines()]
    for number, name in enumerate(["../precious.png", f"{here}/precious.png", "a/../precious.png"]):
        lines[1 + number] |= {"file": name, "worth": 2.999}
    index.write_text("\n".join(map(json.dumps, lines)) + "\ncut o")
    collect("--collect-at-most", 3, "in").done()
    assert (here / "precious.png").read_bytes() == b"precious"


def test_the_index_stays_small(collect, pictures, here, monkeypatch):
    monkeypatch.setattr(collecting, "SPARE_LINES", 5)
    collect("--collect-at-most", 2, "in").done()
    assert len((here / "kept" / INDEX).read_text().splitlines()) <= 2 + 5 + 3
    assert len(kept(here)) == 2


@pytest.mark.parametrize(
    ("name", "safe"),
    [
        ("polar bear", "polar bear"),
        ("a/b", "a-b"),
        ("..", ""),
        ("../x", "x"),
        ("nul", "nul-"),
        ("ü" * 200, "ü" * 50),
        ("what?", "what-"),
    ],
)
def test_names_that_any_file_system_takes(name, safe):
    assert safe_name(name) == safe


def test_no_two_classes_share_a_folder():
    names = folder_names(["a/b", "a-b", "A-B", "..", "unknown"])
    assert len({name.casefold() for name in names.values()}) == 5 and all(names.values())
    assert os.sep not in "".join(names.values())
