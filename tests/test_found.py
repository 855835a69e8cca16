"""Which files count as images, and where links lead: alike in step 1 and step 3."""

import json
import os
import shutil
import sys

import pytest
from PIL import Image
from test_listing import fill, sizes

import data
import step3_infer
from data.folders import list_folder
from inference.errors import Problem
from inference.finding import find_images
from inference.images import decode_image

HEIC = b"\0\0\0\x18ftypheic\0\0\0\0heicmif1"


def found_by_step3(root):
    """The files that step 3 takes in a directory, and those that it leaves."""
    others = []
    taken = [path for path, problem in find_images([str(root)], others) if problem is None]
    return taken, others


def listed(root):
    """The files that step 1 trains on."""
    _, splits = list_folder(str(root))
    return splits["train"].paths


# --------------------------------------------------------------------------------- links to folders
@pytest.fixture
def linked(tmp_path):
    """a/ with a link to a folder of 3 more images; b is a link to a folder itself: 5 + 3 + 5."""
    root = tmp_path / "photos"
    fill(root / "a", 5)
    fill(tmp_path / "elsewhere" / "b", 5)
    fill(tmp_path / "elsewhere" / "batch2", 3)
    os.symlink(tmp_path / "elsewhere" / "b", root / "b")
    os.symlink(tmp_path / "elsewhere" / "batch2", root / "a" / "batch2")
    return root


def test_links_to_folders_are_followed_by_both_steps(linked, capsys):
    taken, others = found_by_step3(linked)
    assert taken == listed(linked)
    assert len(taken) == 13 and others == []
    assert "skipped" not in capsys.readouterr().err


def test_links_that_lead_up_or_round_in_a_circle_add_nothing(linked):
    os.symlink(linked, linked / "a" / "all")
    os.symlink(linked / "a", linked / "a" / "batch2" / "back")
    os.symlink("loop", linked / "a" / "loop")
    taken, _ = found_by_step3(linked)
    assert taken == listed(linked)
    assert len(taken) == 13


def test_a_folder_that_two_links_lead_to_is_counted_once(linked):
    os.symlink(linked / "a" / "batch2", linked / "a" / "again")
    taken, _ = found_by_step3(linked)
    assert taken == listed(linked)
    assert len(taken) == 13


# --------------------------------------------------------------------------------- unknown suffixes
ODD_NAMES = ("0.jpg_large", "1.jpg?size=big", "2.001", "3.JPG~", "4.0")


def test_content_decides_where_the_suffix_is_unknown(tmp_path, capsys):
    for label in "ab":
        fill(tmp_path / label, 5, ".jpg")
        for number, name in enumerate(ODD_NAMES):
            (tmp_path / label / f"{number}.jpg").rename(tmp_path / label / name)
        texts = {"a.txt": "P3 is a text", "b.log": "BMW 1, BMW 2, BMW 3", "c.xml": "<a/>"}
        for name, text in texts.items():
            (tmp_path / label / name).write_text(text)
        Image.new("RGB", (9, 9)).save(tmp_path / label / "raw.dng", "TIFF")

    taken, others = found_by_step3(tmp_path)
    assert taken == listed(tmp_path)
    assert len(taken) == 10 and len(others) == 8
    assert "skipped 8 files" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------- HEIC
@pytest.mark.parametrize("name", ["photo.heic", "photo.jpg", "photo"])
def test_a_heic_photo_is_named_with_the_package_that_reads_it(tmp_path, name):
    (tmp_path / name).write_bytes(HEIC)
    with pytest.raises(Problem, match="is a HEIC photo: pip install pillow-heif to read it"):
        decode_image(str(tmp_path / name), 3)


def test_a_heic_photo_that_step3_is_given(call, small, tmp_path):
    shutil.copy(small.export / "model.onnx", tmp_path)
    (tmp_path / "photo.heic").write_bytes(HEIC)
    arguments = ["--model", tmp_path / "model.onnx", tmp_path / "photo.heic"]
    call(step3_infer.main, *arguments).error(1, "photo.heic", "pip install pillow-heif")


# --------------------------------------------------------------------------- names that are no text
@pytest.mark.skipif(sys.platform != "linux", reason="names there are text")
@pytest.mark.parametrize("content", [True, False], ids=["image", "broken"])
def test_a_name_that_is_no_utf8_makes_valid_json(call, small, tmp_path, content):
    path = os.path.join(os.fsencode(tmp_path), b"gr\xfcn.png")
    with open(path, "wb") as file:
        if content:
            Image.new("L", (8, 8)).save(file, "PNG")

    arguments = ["--model", small.export / "model.onnx", "--format", "json", tmp_path]
    result = call(step3_infer.main, *arguments)
    row = json.loads(result.out)
    row["path"].encode()  # fails for half of a surrogate pair
    assert row["path"] == str(tmp_path / "gr\\udcfcn.png")
    assert ("error" in row) != content


@pytest.mark.skipif(sys.platform != "linux", reason="names there are text")
def test_step1_reads_files_whose_names_are_no_utf8(tmp_path):
    for label in "ab":
        fill(tmp_path / label, 5)
        folder = os.path.join(os.fsencode(tmp_path), label.encode())
        os.rename(os.path.join(folder, b"0.png"), os.path.join(folder, b"gr\xfcn.png"))
    assert sizes(data.load("folder", str(tmp_path))) == {"train": 8, "test": 2}
