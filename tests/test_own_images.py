"""The `folder` and `csv` datasets: listing, decoding, caching, and their errors, through the real
scripts."""

import csv
import errno
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
import step1_train
import step2_export
import step3_infer
from data import cache, holdout
from data.files import InputSizes
from inference.metrics import per_class

QUICK = ["--model", "mlp", "--hidden", "16", "--epochs", "2"]


def picture(rng, label, size=(24, 20)):
    """A noisy RGB image whose brightest channel tells its class."""
    pixels = rng.integers(0, 120, (*size, 3), dtype=np.uint8)
    pixels[..., label] += 100
    return Image.fromarray(pixels)


def exif(orientation):
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


# One way of saving for each kind of file that people have: (suffix, conversion, options of save).
KINDS = [
    (".png", lambda image: image, {}),
    (".jpg", lambda image: image, {}),
    (".JPEG", lambda image: image, {"exif": exif(6)}),
    (".webp", lambda image: image, {}),
    (".gif", lambda image: image.convert("P"), {}),
    (".bmp", lambda image: image, {}),
    (".tif", lambda image: image, {}),
    (".png", lambda image: image.convert("RGBA"), {}),
    (".png", lambda image: image.quantize(16), {}),
    (".jpg", lambda image: image.convert("CMYK"), {}),
    (".png", lambda image: image.convert("L"), {}),
    (".png", lambda image: image.convert("LA"), {}),
    (
        ".png",
        lambda image: Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257),
        {},
    ),
]


@pytest.fixture
def mixed(tmp_path):
    """200 files of every kind and many sizes in two classes, four of them unreadable."""
    rng, folder = np.random.default_rng(0), tmp_path / "mixed"
    for label, name in enumerate(("red ones", "grün")):
        (folder / name).mkdir(parents=True)
        for index in range(98):
            suffix, convert, options = KINDS[index % len(KINDS)]
            size = tuple(rng.integers(16, 90, 2))
            convert(picture(rng, label, size)).save(
                folder / name / f"{index:03}{suffix}", **options
            )
    whole = (folder / "grün" / "001.jpg").read_bytes()
    (folder / "grün" / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "grün" / "empty.png").write_bytes(b"")
    (folder / "red ones" / "noise.webp").write_bytes(rng.bytes(300))
    (folder / "red ones" / "text.png").write_text("not an image")
    return folder


BROKEN = ("cut.jpg", "empty.png", "noise.webp", "text.png")


@pytest.fixture
def folder(tmp_path):
    """A plain folder: train and test, three classes of 16x16 colour PNGs."""
    rng, root = np.random.default_rng(0), tmp_path / "plain"
    for split, n in (("train", 12), ("test", 4)):
        for label, name in enumerate("abc"):
            (root / split / name).mkdir(parents=True)
            for index in range(n):
                picture(rng, label, (16, 16)).save(root / split / name / f"{index}.png")
    return root


def write_csv(path, rows, header=("path", "label"), encoding="utf-8"):
    with open(path, "w", newline="", encoding=encoding) as stream:
        csv.writer(stream).writerows([header, *rows])
    return path


@pytest.fixture
def listing(folder):
    """A CSV over the folder's training images, with paths relative to it."""
    rows = [
        (path.relative_to(folder), path.parent.name)
        for path in sorted(folder.glob("train/*/*.png"))
    ]
    return write_csv(folder / "list.csv", rows)


def run_of(here):
    return max((here / "runs").iterdir(), key=lambda path: path.stat().st_mtime)


def test_mixed_files_train_export_and_predict_as_evaluated(call, here, mixed, in_process):
    arguments = ["--dataset", "folder", "--data-dir", mixed, *QUICK, "--epochs", 4]
    trained = call(step1_train.main, *arguments).done()
    left_out = [line for line in trained.err.splitlines() if line.startswith("note: skipped: ")]
    for name in BROKEN:
        assert sum(name in line for line in left_out) == 1
    assert "64x64 colour" in trained.out and " of 196 training images held out" in trained.err
    call(step2_export.main, "--format", "torchscript").done()

    exported = here / "exports" / run_of(here).name / "model.pt"
    predicted = call(step3_infer.main, "--model", exported, "--format", "json", mixed)
    answers = {row["path"]: row for row in map(json.loads, predicted.out.splitlines())}
    assert predicted.code == 1 and len(answers) == 200
    assert {path.rsplit("/", 1)[1] for path, row in answers.items() if "error" in row} == set(
        BROKEN
    )

    # What step 1's evaluation says of the same files, read from its own cache.
    run = step2_export.read_run(str(run_of(here)))
    dataset = data.load("folder", str(mixed), image_size=(64, 64), channels=3)
    readable = dataset.paths["train"] + dataset.paths["test"]
    images = np.concatenate([dataset.train_images, dataset.test_images])
    with torch.inference_mode():
        expected = run.network(run.deployable().normalise(torch.from_numpy(images))).softmax(1)
    assert len(readable) == len(expected) == 196
    classes = dataset.classes
    assert [answers[path]["label"] for path in readable] == [classes[i] for i in expected.argmax(1)]


def test_12_bit_images_are_predicted_as_evaluated(call, here, tmp_path, in_process):
    rng, folder = np.random.default_rng(0), tmp_path / "scope"
    for label, name in enumerate("ab"):
        (folder / name).mkdir(parents=True)
        for index in range(20):
            pixels = rng.integers(0, 2000, (16, 16)) + 2000 * label
            Image.fromarray(pixels.astype(np.uint16)).save(folder / name / f"{index}.tif")
    trained = call(
        step1_train.main, "--dataset", "folder", "--data-dir", folder, *QUICK, "--epochs", 4
    ).done()
    assert "12 bits only: 4095 is taken as white" in trained.err
    run = step2_export.read_run(str(run_of(here)))
    assert run.spec["white"] == 4095
    dataset = data.load("folder", str(folder))
    with torch.inference_mode():
        images = run.deployable().normalise(torch.from_numpy(dataset.test_images))
        expected = run.network(images).softmax(1).max(1).values
    call(step2_export.main, "--format", "onnx").done()
    predicted = call(step3_infer.main, "--format", "json", folder).done()
    answers = {row["path"]: row for row in map(json.loads, predicted.out.splitlines())}
    assert (
        all(row["label"] == path.split("/")[-2] for path, row in answers.items())
        and len(answers) == 40
    )
    exported = [answers[path]["probability"] for path in dataset.paths["test"]]
    assert exported == pytest.approx(expected.tolist(), abs=1e-4)


def test_strict_refuses_what_is_otherwise_left_out(call, here, mixed):
    refused = call(step1_train.main, "--dataset", "folder", "--data-dir", mixed, *QUICK, "--strict")
    refused.error(1, "4 of 200", "--strict")
    assert all(name in refused.err for name in BROKEN)
    assert not (here / "runs").exists()


def test_csv_whose_paths_are_relative_to_another_directory(call, here, folder, listing):
    moved = shutil.move(listing, here / "list.csv")
    arguments = ["--data-dir", moved, *QUICK]
    call(step1_train.main, *arguments).error(1, "36 of 36", "no such file", "--image-root")
    call(step1_train.main, *arguments, "--image-root", folder).done()


def test_step2_names_data_dir_where_the_data_has_moved(call, here, folder, in_process):
    (here / "old").mkdir()
    photos = shutil.move(folder, here / "old" / "photos")
    rows = [(path.name, path.parent.name) for path in sorted(Path(photos, "train").glob("*/*"))]
    rows = [(f"{label}/{name}", label) for name, label in rows]
    write_csv(here / "old" / "list.csv", rows)
    root = here / "old" / "photos" / "train"
    arguments = ["--data-dir", here / "old" / "list.csv", "--image-root", root, *QUICK]
    call(step1_train.main, *arguments).done()

    shutil.move(here / "old", here / "new")
    export = [step2_export.main, "--format", "torchscript"]
    call(*export).error(2, "list.csv", "--data-dir says where the data of runs/list-mlp is now")
    call(*export, "--data-dir", here / "new" / "list.csv").done()


def test_stops_when_more_than_half_are_unreadable(call, here, folder):
    for path in sorted(folder.glob("*/*/*.png"))[:25]:
        path.write_bytes(b"")
    call(step1_train.main, "--dataset", "folder", "--data-dir", folder, *QUICK).error(
        1, "25 of 48", "empty"
    )
    assert not list((folder / ".threestep").glob("*.u8")) and not list(
        (folder / ".threestep").glob("*.tmp")
    )


def test_size_colour_and_augmentation_are_derived_and_printed(call, here, folder):
    out = call(step1_train.main, "--dataset", "folder", "--data-dir", folder, *QUICK).done().out
    assert "36 train, 12 test; 3 classes, 16x16 colour" in out and "augment flip translate" in out
    for path in folder.glob("*/*/*.png"):
        Image.open(path).convert("L").save(path)
    out = call(step1_train.main, "--dataset", "folder", "--data-dir", folder, *QUICK).done().out
    assert "16x16 grey" in out and "augment translate" in out
    Image.new("L", (80, 80)).save(folder / "train" / "a" / "large.png")
    out = call(step1_train.main, "--dataset", "folder", "--data-dir", folder, *QUICK).done().out
    assert "64x64 grey" in out


def note_of_sizes(capsys, folder, **options):
    """What loading a folder says of the sizes of its images."""
    data.load("folder", str(folder), **options)
    lines = [line for line in capsys.readouterr().err.splitlines() if "resized" in line]
    assert len(lines) <= 1
    return lines[0] if lines else None


def test_derived_size_that_is_not_that_of_the_images_is_said(capsys, folder):
    assert note_of_sizes(capsys, folder) is None  # all are 16x16, and stay so
    for path in folder.glob("*/*/*.png"):
        Image.new("RGB", (90, 60)).save(path)
    option = "--image-size 48x72 (height x width)"
    end = f"(width x height); they are resized to 72x48 by --fit crop and {option}"
    for _ in range(2):  # the second time from the cache
        assert note_of_sizes(capsys, folder) == f"note: the images have 90x60 pixels {end}"
    Image.new("RGB", (10, 20)).save(folder / "train" / "a" / "0.png")
    Image.new("RGB", (400, 300)).save(folder / "train" / "a" / "1.png")
    assert (
        note_of_sizes(capsys, folder)
        == f"note: the images have 3 sizes, 10x20 to 400x300 pixels {end}"
    )
    large = InputSizes(usual=224, multiple=32)
    assert "resized to 288x192" in note_of_sizes(capsys, folder, input_sizes=large)
    assert "resized to 32x32" in note_of_sizes(capsys, folder, image_size=(32, 32))


def test_photos_of_the_usual_size_are_not_said_to_be_resized(capsys, folder):
    for path in folder.glob("*/*/*.png"):
        Image.new("RGB", (96, 96)).save(path)
    assert note_of_sizes(capsys, folder, input_sizes=InputSizes(usual=96)) is None
    assert "96x96" in note_of_sizes(capsys, folder)


def test_quiet_prints_no_notes(call, here, folder):
    (folder / "train" / "a" / "broken.png").write_bytes(b"")
    (folder / "train" / "b" / "notes.txt").write_text("not an image")
    Image.new("RGB", (90, 60)).save(folder / "train" / "a" / "0.png")
    shutil.rmtree(folder / "test")
    arguments = ["--data-dir", folder, *QUICK]
    loud = call(step1_train.main, *arguments).done().err.splitlines()
    assert len(loud) >= 6 and all(line.startswith("note: ") for line in loud)
    shutil.rmtree(folder / ".threestep")
    quiet = call(step1_train.main, *arguments, "--quiet").done()
    assert quiet.err == "" and len(quiet.out.splitlines()) == 1
    with_validation = call(step1_train.main, *arguments, "--quiet", "--val-fraction", 0.2).done()
    assert with_validation.err == "" and len(with_validation.out.splitlines()) == 1
    assert call(step1_train.main, *arguments).done().err  # silent in that run only
    refused = call(step1_train.main, *arguments, "--quiet", "--strict")
    refused.error(1, "1 of 37", "--strict", "broken.png is empty")
    (folder / "train" / "a" / "0.png").write_bytes(b"")
    stopped = call(step1_train.main, "--resume", "plain-mlp-2", "--epochs", 3)
    assert (
        stopped.err.startswith("error: ") and len(stopped.err.splitlines()) == 1
    )  # it was begun quietly


def test_second_run_reads_the_cache_and_a_changed_folder_does_not(call, here, folder):
    arguments = ["--dataset", "folder", "--data-dir", folder, "--seed", 3, *QUICK]
    assert "decoded 48 files" in call(step1_train.main, *arguments).done().err
    first = torch.load(run_of(here) / "checkpoint.pt", weights_only=True)["state_dict"]
    assert "decoded" not in call(step1_train.main, *arguments).done().err
    second = torch.load(run_of(here) / "checkpoint.pt", weights_only=True)["state_dict"]
    assert all(torch.equal(first[key], second[key]) for key in first)
    Image.new("RGB", (16, 16)).save(folder / "train" / "a" / "0.png")
    assert "decoded 48 files" in call(step1_train.main, *arguments).done().err
    assert len(list((folder / ".threestep").glob("*.u8"))) == 1  # the outdated one is gone


def test_damaged_cache_is_built_again(call, here, folder):
    arguments = ["--dataset", "folder", "--data-dir", folder, *QUICK]
    call(step1_train.main, *arguments).done()
    (pixels,) = (folder / ".threestep").glob("*.u8")
    pixels.write_bytes(pixels.read_bytes()[:-1])
    assert "decoded 48 files" in call(step1_train.main, *arguments).done().err


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
def test_two_runs_at_once_build_one_whole_cache(here, folder, tmp_path):
    import subprocess
    import sys

    from conftest import ROOT

    command = [
        sys.executable,
        ROOT / "step1_train.py",
        "--dataset",
        "folder",
        "--data-dir",
        folder,
        *QUICK,
    ]
    running = [subprocess.Popen(command, cwd=here, stdout=subprocess.DEVNULL) for _ in range(2)]
    assert [process.wait(100) for process in running] == [0, 0]
    assert sorted(path.name for path in (here / "runs").iterdir()) == ["plain-mlp", "plain-mlp-2"]
    assert len(list((folder / ".threestep").glob("*.u8"))) == 1
    assert not list((folder / ".threestep").glob("*.tmp"))
    dataset = data.load("folder", str(folder))
    assert np.array_equal(
        dataset.train_images[0], np.asarray(Image.open(folder / "train" / "a" / "0.png"))
    )


def test_cache_dir_that_cannot_be_written(call, here, folder, tmp_path):
    (tmp_path / "file").write_text("")
    place = tmp_path / "file" / "cache"
    arguments = ["--dataset", "folder", "--data-dir", folder, "--cache-dir", place, *QUICK]
    call(step1_train.main, *arguments).error(1, place, "--cache-dir")


@pytest.fixture
def read_only(monkeypatch):
    """read_only(*folders): nothing can be made in them, also not by root."""
    makedirs = os.makedirs

    def read_only(*folders):
        def refuse(path, *args, **options):
            if Path(path).parent in folders:
                raise OSError(errno.EROFS, "Read-only file system", str(path))
            makedirs(path, *args, **options)

        monkeypatch.setattr(os, "makedirs", refuse)

    return read_only


def test_read_only_images_are_cached_for_the_user(call, here, folder, read_only, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(here / "home"))
    read_only(folder)
    arguments = ["--dataset", "folder", "--data-dir", folder, *QUICK]
    said = call(step1_train.main, *arguments).done().err
    (place,) = (here / "home" / "threestep").iterdir()
    assert f"{folder / '.threestep'} cannot be written" in said and str(place) in said
    assert "decoded" in said and len(list(place.glob("*.u8"))) == 1

    assert "decoded" not in call(step1_train.main, *arguments).done().err
    call(step2_export.main, "--format", "torchscript").done()
    assert len(list(place.glob("*.u8"))) == 1  # the same one
    call(step1_train.main, *arguments, "--cache-dir", here / "own").done()
    assert len(list((here / "own" / "threestep-cache").glob("*.u8"))) == 1


def test_no_place_for_the_cache_is_one_error(call, here, folder, read_only, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(here / "home"))
    read_only(folder, here / "home" / "threestep")
    arguments = ["--dataset", "folder", "--data-dir", folder, *QUICK]
    call(step1_train.main, *arguments).error(1, folder, here / "home", "--cache-dir")


@pytest.mark.parametrize(
    ("system", "variable", "expected"),
    [
        ("linux", "XDG_CACHE_HOME", "set"),
        ("linux", None, ".cache"),
        ("darwin", None, "Library/Caches"),
        ("win32", "LOCALAPPDATA", "set"),
    ],
)
def test_where_a_system_keeps_caches(here, monkeypatch, system, variable, expected):
    for name in ("XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(here))
    if variable:
        monkeypatch.setenv(variable, str(here / "set"))
    monkeypatch.setattr(cache.sys, "platform", system)
    assert cache.user_cache_dir() == str(here / expected)


def test_full_disk_while_caching(call, here, folder, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    arguments = ["--dataset", "folder", "--data-dir", folder, *QUICK]
    call(step1_train.main, *arguments).error(1, "No space left on device", "--cache-dir")
    assert not list((folder / ".threestep").glob("*.u8")) and not list(
        (folder / ".threestep").glob("*.tmp")
    )


def test_folder_without_class_folders(call, here, tmp_path):
    picture(np.random.default_rng(0), 0).save(tmp_path / "lonely.png")
    shutil.rmtree(here)
    here.mkdir()
    (tmp_path / "data").mkdir()
    arguments = ["--dataset", "folder", *QUICK]
    call(step1_train.main, *arguments).error(2, "--data-dir")
    call(step1_train.main, *arguments, "--data-dir", tmp_path / "nowhere").error(2, "nowhere")
    call(step1_train.main, *arguments, "--data-dir", tmp_path / "data").error(1, "no class folders")


def test_empty_and_unknown_class_folders(call, here, folder):
    arguments = ["--dataset", "folder", "--data-dir", folder, *QUICK]
    (folder / "train" / "d").mkdir()
    call(step1_train.main, *arguments).error(1, folder / "train" / "d", "no images")
    (folder / "train" / "d").rmdir()
    shutil.copytree(folder / "test" / "a", folder / "test" / "zebra")
    call(step1_train.main, *arguments).error(1, "zebra")


def test_csv_trains_like_the_folder(call, here, folder, listing):
    rows = [(path, path.parent.name) for path in sorted(folder.glob("test/*/*.png"))]
    test_csv = write_csv(folder / "test.csv", rows, header=("Filename", "Class"))
    arguments = ["--dataset", "csv", "--data-dir", listing, "--test-csv", test_csv, *QUICK]
    assert (
        "36 train, 12 test; 3 classes, 16x16 colour"
        in call(step1_train.main, *arguments).done().out
    )
    by_csv = torch.load(run_of(here) / "checkpoint.pt", weights_only=True)
    call(step1_train.main, "--dataset", "folder", "--data-dir", folder, *QUICK).done()
    by_folder = torch.load(run_of(here) / "checkpoint.pt", weights_only=True)
    assert all(
        torch.equal(by_csv["state_dict"][key], by_folder["state_dict"][key])
        for key in by_csv["state_dict"]
    )


def test_csv_with_numbers_a_root_and_named_columns(call, here, folder, in_process):
    rows = [
        (path.name, 10 + "abc".index(path.parent.name), "x")
        for path in sorted(folder.glob("train/*/*.png"))
    ]
    rows = [(f"{'abc'[int(label) - 10]}/{name}", label, extra) for name, label, extra in rows]
    file = write_csv(here / "list.csv", rows, header=("which file", "kind", "comment"))
    arguments = ["--dataset", "csv", "--data-dir", file, "--image-root", folder / "train", *QUICK]
    call(step1_train.main, *arguments).error(1, "filepath", "which file", "--image-column")
    arguments += ["--image-column", "which file", "--label-column", "kind"]
    assert "of 36 training images" in call(step1_train.main, *arguments).done().err
    assert torch.load(run_of(here) / "checkpoint.pt", weights_only=True)["spec"]["classes"] == [
        "10",
        "11",
        "12",
    ]
    call(step2_export.main, "--format", "torchscript").done()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda rows: [
                ("path", "name", "place"),
                *((path, label, label) for path, label in rows[1:]),
            ],
            ["label or class or target", "--label-column"],
        ),
        (lambda rows: [("path", "path"), *rows[1:]], ["'path'", "twice"]),
        (lambda rows: [rows[0], *((path, "a") for path, _ in rows[1:])], ["one class", "'a'"]),
        (
            lambda rows: [rows[0], *((path + ".gone", label) for path, label in rows[1:])],
            ["no such file", "36 of 36"],
        ),
        (lambda rows: [*rows[:3], ("only one field",)], ["row 4", "2 fields"]),
        (lambda rows: rows[:1], ["no images"]),
        (lambda rows: [], ["is empty"]),
    ],
    ids=[
        "no-label-column",
        "duplicate-header",
        "one-class",
        "missing-files",
        "short-row",
        "header-only",
        "empty",
    ],
)
def test_bad_csv(call, here, listing, change, words):
    with open(listing, newline="") as stream:
        rows = [tuple(row) for row in csv.reader(stream)]
    rows = change(rows)
    write_csv(listing, rows[1:], header=rows[0] if rows else ())
    call(step1_train.main, "--dataset", "csv", "--data-dir", listing, *QUICK).error(1, *words)
    assert not (here / "runs").exists()


def test_csv_of_a_wrong_encoding_or_absent(call, here, listing):
    arguments = ["--dataset", "csv", *QUICK, "--data-dir"]
    listing.write_bytes(listing.read_bytes().decode().replace(",a", ",ä").encode("latin-1"))
    call(step1_train.main, *arguments, listing).error(1, "UTF-8")
    call(step1_train.main, *arguments, here / "absent.csv").error(2, "absent.csv")


def test_csv_with_a_test_label_that_training_lacks(call, here, folder, listing):
    test_csv = write_csv(folder / "test.csv", [("test/a/0.png", "a"), ("test/b/0.png", "ostrich")])
    arguments = ["--dataset", "csv", "--data-dir", listing, "--test-csv", test_csv, *QUICK]
    call(step1_train.main, *arguments).error(1, "ostrich", "test.csv")


def test_stratified_takes_the_fraction_of_each_class():
    labels = np.repeat([0, 1, 2, 3], [100, 50, 3, 1])
    chosen = holdout.stratified(labels, 0.2, seed=0)
    assert np.bincount(labels[chosen], minlength=4).tolist() == [20, 10, 1, 0]
    assert np.array_equal(chosen, holdout.stratified(labels, 0.2, seed=0))
    assert not np.array_equal(chosen, holdout.stratified(labels, 0.2, seed=1))


@pytest.mark.parametrize("dataset", ["folder", "csv"])
def test_one_image_a_class_leaves_none_to_test_on(call, here, folder, dataset):
    for path in sorted(folder.glob("train/*/*.png")):
        if path.stem != "0":
            path.unlink()
    rows = [(path, path.parent.name) for path in folder.glob("train/*/0.png")]
    listing = write_csv(here / "list.csv", rows)
    source = {"folder": folder / "train", "csv": listing}[dataset]
    words = (source, "one image of each class", "two or more")
    call(step1_train.main, "--dataset", dataset, "--data-dir", source, *QUICK).error(1, *words)


def test_validation_split_selects_and_the_test_split_is_evaluated_once(
    call, here, folder, monkeypatch, in_process
):
    evaluated, evaluate = [], step1_train.evaluate

    def watch(trainer, split, *rest):
        evaluated.append(len(split))
        return evaluate(trainer, split, *rest)

    monkeypatch.setattr(step1_train, "evaluate", watch)
    arguments = [
        "--dataset",
        "folder",
        "--data-dir",
        folder,
        "--val-fraction",
        0.25,
        *QUICK,
        "--epochs",
        5,
    ]
    out = call(step1_train.main, *arguments).done().out
    assert "27 train, 9 val, 12 test" in out
    assert evaluated == [9] * 5 + [12]
    run = run_of(here)
    summary = json.loads((run / "summary.json").read_text())
    with open(run / "metrics.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    best = max(rows, key=lambda row: (float(row["val_accuracy"]), -float(row["val_loss"])))
    assert summary["epoch_kept"] == int(best["epoch"]) and "test_accuracy" not in rows[0]
    call(step2_export.main, "--format", "torchscript").done()


def test_validation_folder_chooses_the_epoch(call, here, folder):
    (folder / "test").rename(folder / "Valid")
    out = call(step1_train.main, "--dataset", "folder", "--data-dir", folder, *QUICK).done().out
    assert "30 train, 12 val, 6 test" in out
    header = (run_of(here) / "metrics.csv").read_text().splitlines()[0]
    assert "val_accuracy" in header and "test_accuracy" not in header


def test_class_weights_balanced_adjusts_by_the_shares_of_the_classes(
    call, here, folder, monkeypatch
):
    for path in sorted((folder / "train" / "a").iterdir())[:9]:
        path.unlink()
    seen, criterion = [], step1_train.criterion

    def watch(outputs, targets, smoothing=0.0, log_priors=None):
        seen.append(log_priors)
        return criterion(outputs, targets, smoothing, log_priors)

    monkeypatch.setattr(step1_train, "criterion", watch)
    arguments = ["--dataset", "folder", "--data-dir", folder, "--class-weights", "balanced", *QUICK]
    call(step1_train.main, *arguments).done()
    shares = np.array([3 / 27, 12 / 27, 12 / 27])
    assert seen[0].tolist() == pytest.approx((0.85 * np.log(shares)).tolist())


def test_per_class_figures_follow_their_definitions():
    labels = torch.tensor([0, 0, 0, 1, 1, 2])
    predicted = torch.tensor([0, 0, 1, 1, 0, 1])
    figures = per_class(labels.numpy(), predicted.numpy(), ["a", "b", "c"])
    assert figures["a"] == pytest.approx(
        {"precision": 2 / 3, "recall": 2 / 3, "f1": 2 / 3, "support": 3}
    )
    assert figures["b"] == pytest.approx(
        {"precision": 1 / 3, "recall": 1 / 2, "f1": 2 / 5, "support": 2}
    )
    assert figures["c"] == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 1}
