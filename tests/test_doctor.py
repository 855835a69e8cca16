"""What step1 says of a dataset before it trains, and that it keeps copies of an image in one
split."""

import csv
import json
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image, ImageFilter

import data
import step1_train
from data import doctor, holdout
from training import suspects

QUICK = [
    "--dataset",
    "folder",
    "--model",
    "mlp",
    "--hidden",
    "16",
    "--epochs",
    "1",
    "--calibration",
    "none",
]

pytestmark = pytest.mark.usefixtures("here")  # runs go to an empty directory


def photo(rng, size=48, light=0):
    """A picture with soft shapes and some detail, unlike all others."""
    pixels = rng.integers(0, 256, (size // 4, size // 4, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).resize((size, size)).filter(ImageFilter.GaussianBlur(2))
    detail = rng.normal(light, 12, (size, size, 3))
    return Image.fromarray(np.clip(np.asarray(image) + detail, 0, 255).astype(np.uint8))


@pytest.fixture
def photos(tmp_path):
    """Two classes, split into 2 x 30 training and 2 x 8 test images without copies."""
    rng, root = np.random.default_rng(0), tmp_path / "photos"
    for part, n in (("train", 30), ("test", 8)):
        for name in ("cat", "dog"):
            (root / part / name).mkdir(parents=True)
            for index in range(n):
                photo(rng).save(root / part / name / f"{index}.png")
    return root


def notes(result):
    """The lines about the images: the kind before the colon, and the rest."""
    return dict(re.findall(r"^note: ([^:\n]+): (.*)$", result.err, re.M))


def summary_of(here):
    (path,) = (here / "runs").glob("*/summary.json")
    return json.loads(path.read_text())


def test_sound_images_cause_no_note(call, here, photos):
    result = call(step1_train.main, *QUICK, "--data-dir", photos).done()
    words = ("copies", "near-duplicate", "dark")
    assert not [line for line in result.err.splitlines() if any(word in line for word in words)]
    assert "test_images_in_train" not in summary_of(here) and "without" not in result.out
    assert not list((here / "runs").glob("*/duplicates.png"))


@pytest.mark.pictures
def test_copies_are_named_and_the_accuracy_is_given_without_them(call, here, photos):
    shutil.copy(photos / "train/cat/3.png", photos / "test/cat/again.png")
    Image.open(photos / "train/dog/5.png").save(photos / "test/dog/anew.jpg", quality=60)
    Image.open(photos / "train/dog/6.png").resize((60, 60)).save(photos / "test/dog/scaled.png")
    shutil.copy(photos / "train/cat/4.png", photos / "train/dog/mistaken.png")
    result = call(step1_train.main, *QUICK, "--data-dir", photos).done()
    said, train, test = notes(result), photos / "train", photos / "test"
    first = f"the first: {train / 'cat/3.png'} (cat) and {test / 'cat/again.png'} (cat)"
    assert (
        f"2, the first: {train / 'cat/4.png'} (cat) and {train / 'dog/mistaken.png'} (dog)"
        in result.err
    )
    assert said["near-duplicate pairs of images"].startswith("2, ")
    assert said["copies with conflicting labels"].startswith("1, ")
    assert said["test images that are also in the training split"] == f"3, {first}"
    summary, (run,) = summary_of(here), (here / "runs").iterdir()
    assert summary["test_images_in_train"] == 3
    right = summary["test_accuracy"] * 19
    assert right - 3 <= round(summary["test_accuracy_without_them"] * 16) <= right
    assert (
        f"{summary['test_accuracy_without_them']:.2%} without 3 images also in train" in result.out
    )
    report = (run / "report.html").read_text(encoding="utf-8")
    assert "without 3 images also in the training split" in report
    assert "Images that are in the data twice" in report
    assert (run / "duplicates.png").stat().st_size > 1000
    assert (test / "cat/again.png").exists()  # nothing is ever deleted


def test_quiet_leaves_the_notes_out(call, photos):
    shutil.copy(photos / "train/cat/3.png", photos / "test/cat/again.png")
    result = call(step1_train.main, *QUICK, "--quiet", "--data-dir", photos).done()
    assert "note:" not in result.err and "also in train" in result.out


def test_a_small_image_and_a_dark_class_are_named(call, photos):
    rng = np.random.default_rng(1)
    for path in photos.glob("*/dog/*"):
        photo(rng, light=-110).save(path)
    photo(rng, size=8).save(photos / "train/cat/tiny.png")
    said = notes(call(step1_train.main, *QUICK, "--data-dir", photos).done())
    small = said["far smaller than the others, less than 1/16 of the median area"]
    assert "1 image" in small and "cat/tiny.png" in small
    (dark,) = [kind for kind in said if "much darker" in kind]
    assert "'dog'" in dark


@pytest.mark.parametrize(("difference", "is_said"), [(3, False), (60, True)])
def test_a_class_is_dark_only_by_a_difference_that_shows(capsys, difference, is_said):
    labels = np.repeat([0, 1], 30)
    light = np.where(labels == 0, 100 - difference, 100.0)  # the two do not overlap
    images = SimpleNamespace(dataset=SimpleNamespace(classes=["green", "red"]), labels=labels)
    doctor.note_dark_classes(images, light)
    assert ("class 'green' is much darker" in capsys.readouterr().err) == is_said


@pytest.mark.parametrize("held", [[], ["--val-fraction", "0.3"], ["--calibration", "held-out"]])
def test_step1_puts_copies_on_one_side(call, photos, monkeypatch, held):
    """Without a test split, and where step1 holds out images for the epoch or for the
    calibration."""
    if not held:
        shutil.rmtree(photos / "test")
    for name in ("cat", "dog"):
        for index in range(20):
            shutil.copy(
                photos / f"train/{name}/{index}.png", photos / f"train/{name}/{index}-copy.png"
            )
    made, make = [], step1_train.make_splits

    def recorded(*arguments):
        made.append(make(*arguments))
        return made[-1]

    monkeypatch.setattr(step1_train, "make_splits", recorded)
    result = call(step1_train.main, *QUICK, *held, "--data-dir", photos).done()
    (splits,) = made
    other = splits["val" if "--val-fraction" in held else "held-out" if held else "test"]
    assert len(other) >= 4
    contents = [
        {part.images[row].numpy().tobytes() for row in part.members}
        for part in (splits["train"], other)
    ]
    assert not contents[0] & contents[1]
    assert "copies of an image: 40" in result.err and "also in the training split" not in result.err


def test_a_picture_with_two_labels_is_never_held_out():
    labels, same = np.arange(40) % 2, np.arange(40)
    same[21] = 0  # a copy of the first image, which has the other label
    for seed in range(20):
        chosen = holdout.stratified(labels, 0.5, seed, same)
        assert not chosen[0] and not chosen[21] and 16 <= chosen.sum() <= 22
    assert np.array_equal(
        holdout.stratified(labels, 0.5, 3, np.arange(40)), holdout.stratified(labels, 0.5, 3)
    )  # without copies the choice is what it always was


def test_bundled_digits_have_no_near_copies_though_they_look_alike(capsys):
    findings = doctor.examined(data.load("digits")).findings
    assert not findings.pairs and not findings.leaked.any()
    assert "note:" not in capsys.readouterr().err


def test_digits_without_files_are_named_by_number(capsys):
    digits = data.load("digits")
    digits.test_images[7] = digits.train_images[12]
    findings = doctor.examined(digits).findings
    assert np.flatnonzero(findings.leaked).tolist() == [7]
    name = f"train image 12 ({digits.train_labels[12]}) and test image 7 ({digits.test_labels[7]})"
    assert f"exact copies of an image: 1, the first: {name}" in capsys.readouterr().err


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 3), (8, 8, 1), (33, 5, 3), (224, 300, 3)])
@pytest.mark.parametrize("alike", [True, False])
def test_any_shape_and_flat_images_pass(shape, alike):
    rng = np.random.default_rng(0)
    images = (
        np.full((40, *shape), 9, np.uint8)
        if alike
        else rng.integers(0, 256, (40, *shape), dtype=np.uint8)
    )
    labels = np.arange(40) % 2
    dataset = data.Dataset("x", ["a", "b"], images, labels, images[:2] // 2, labels[:2])
    same = doctor.examined(dataset).findings.same
    rows = np.concatenate([images, images[:2] // 2])
    for row, first in enumerate(same):
        assert np.array_equal(rows[row], rows[first]) and first <= row
    if alike:
        assert same[:40].max() == 0


def test_images_with_equal_hashes_are_compared(monkeypatch):
    monkeypatch.setattr(
        doctor, "summaries", lambda rows: (np.zeros(5, np.uint64), np.zeros((5, 1)))
    )
    images = np.arange(4, dtype=np.uint8).reshape(4, 1, 1, 1)
    dataset = data.Dataset(
        "x", ["a"], images, np.zeros(4, np.int64), images[:1], np.zeros(1, np.int64)
    )
    assert doctor.examined(dataset).findings.same.tolist() == [0, 1, 2, 3, 0]


def test_files_of_one_size_are_told_apart_and_a_missing_one_is_passed_over(tmp_path):
    paths = [tmp_path / name for name in "abcde"]
    for path, content in zip(paths, (b"xy", b"yx", b"xy", b"xyz"), strict=False):
        path.write_bytes(content)
    assert holdout.first_copies(list(map(str, paths))).tolist() == [0, 1, 0, 3, 4]


def test_the_linear_regression_is_not_examined():
    dataset = data.load("linear")
    assert doctor.examined(dataset) is dataset and dataset.findings is None


@pytest.mark.pictures
def test_images_whose_labels_look_wrong_are_listed(call, tmp_path, here):
    rng = np.random.default_rng(0)
    for name, light in (("dark", 0), ("light", 120)):
        for split, count in (("train", 110), ("test", 10)):
            (tmp_path / "own" / split / name).mkdir(parents=True)
            for k in range(count):
                photo(rng, light=light).save(tmp_path / "own" / split / name / f"{k}.png")
    photo(rng, light=120).save(tmp_path / "own/test/dark/wrong, it is light.png")
    asked = ("--data-dir", tmp_path / "own", "--model", "mlp", "--epochs", 3, "--threads", 1)
    said = call(step1_train.main, *asked).done().err
    first, *others = csv.DictReader((here / "runs/own-mlp/suspects.csv").open(encoding="utf-8"))
    assert first["image"].endswith("wrong, it is light.png")
    assert (first["label"], first["suggested"]) == ("dark", "light")
    assert f"look wrong: {1 + len(others)}, listed in runs/own-mlp/suspects.csv" in said
    assert (here / "runs/own-mlp/suspects.png").exists()
    assert "its own mistakes" not in said


def test_a_network_that_is_often_wrong_is_no_judge_of_labels(tmp_path, capsys):
    images = np.zeros((4, 1, 1, 1), np.uint8)
    labels = np.array([0, 0, 1, 1])
    dataset = data.Dataset("x", ["a", "b"], images, labels, images, labels)
    probabilities = np.array([[0.99, 0.01], [0.02, 0.98], [0.1, 0.9], [0.6, 0.4]])
    found = suspects.find_suspects(str(tmp_path), dataset, probabilities, None)
    assert len(found["images"]) == 1
    said = capsys.readouterr().err
    assert "look wrong: 1, listed" in said and "is right about only 50%" in said
