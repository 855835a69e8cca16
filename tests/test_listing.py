"""Which files become which split: folders and CSV lists as people have them, through data.load."""

import csv
import io
import os
import shutil
import sys
import types

import numpy as np
import pytest
from PIL import Image, ImageFile, PngImagePlugin

import data
import step1_train
from inference.errors import Problem
from inference.finding import find_images
from inference.formats import load_plugins
from inference.images import decode_image


@pytest.fixture(autouse=True)
def forget_plugins():
    """Pillow's formats as they are without what a test registers."""
    Image.init()
    load_plugins.cache_clear()
    kept = [dict(table) for table in (Image.EXTENSION, Image.OPEN)], list(Image.ID)
    yield
    for table, before in zip((Image.EXTENSION, Image.OPEN), kept[0], strict=True):
        table.clear()
        table.update(before)
    Image.ID[:] = kept[1]
    load_plugins.cache_clear()


def fill(folder, count=5, suffix=".png", size=(8, 8)):
    """Images of random pixels: 0.png, 1.png, ..."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(len(os.fspath(folder)))
    for index in range(count):
        pixels = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(
            folder / f"{index}{suffix}", "TGA" if suffix == ".TGA" else None
        )


def split_folders(root, *names, count=5):
    for name in names:
        for label in "ab":
            fill(root / name / label, count)
    return root


def sizes(dataset):
    """The number of images in each split."""
    splits = {"train": dataset.train_labels, "val": dataset.val_labels, "test": dataset.test_labels}
    return {name: len(labels) for name, labels in splits.items() if labels is not None}


def refused(name, path, **options):
    """The message of the Problem that loading raises."""
    with pytest.raises(Problem) as caught:
        data.load(name, str(path), **options)
    return str(caught.value)


def write_csv(path, *rows):
    with open(path, "w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows(rows)
    return path


# ------------------------------------------------------------------------------------------ folders


@pytest.mark.parametrize(
    "names",
    [
        ("train", "test"),
        ("Train", "Test"),
        ("training", "testing"),
        ("TRAINING", "val", "test"),
        ("train", "Valid", "Testing"),
        ("Train", "validation", "TEST"),
    ],
)
def test_split_folders_in_any_spelling(tmp_path, names):
    dataset = data.load("folder", str(split_folders(tmp_path, *names)))
    assert dataset.classes == ["a", "b"]
    assert sizes(dataset) == dict.fromkeys(["train", *["val"][: len(names) - 2], "test"], 10)
    train = np.asarray(Image.open(tmp_path / names[0] / "b" / "4.png"))
    test = np.asarray(Image.open(tmp_path / names[-1] / "b" / "4.png"))
    assert np.array_equal(dataset.train_images[-1], train) and np.array_equal(
        dataset.test_images[-1], test
    )
    if dataset.val_images is not None:
        val = np.asarray(Image.open(tmp_path / names[1] / "b" / "4.png"))
        assert (
            np.array_equal(dataset.val_images[-1], val)
            and dataset.val_labels.tolist() == [0] * 5 + [1] * 5
        )


@pytest.mark.parametrize("name", ["val", "valid", "Validation"])
def test_validation_folder_alone_stays_the_validation_split(tmp_path, capsys, name):
    dataset = data.load("folder", str(split_folders(tmp_path, "train", name)))
    assert sizes(dataset) == {"train": 8, "val": 10, "test": 2}
    notes = [line for line in capsys.readouterr().err.splitlines() if "validation split" in line]
    assert len(notes) == 1 and "no test split" in notes[0] and "2 of 10 training images" in notes[0]


@pytest.mark.parametrize(
    ("names", "both"),
    [
        (("train", "val", "valid", "test"), ("val/", "valid/", "validation split")),
        (("train", "Training", "test"), ("train/", "Training/", "training split")),
        (("train", "test", "testing"), ("test/", "testing/", "test split")),
    ],
)
def test_two_spellings_of_one_split_are_refused(tmp_path, names, both):
    message = refused("folder", split_folders(tmp_path, *names))
    assert all(word in message for word in (*both, str(tmp_path)))


@pytest.mark.parametrize("names", [("val", "test"), ("test",), ("valid", "unlabelled")])
def test_split_folders_without_one_for_training_are_no_classes(tmp_path, names):
    assert "no folder train/ or training/" in refused("folder", split_folders(tmp_path, *names))


def test_split_folders_without_class_folders_are_no_classes(tmp_path):
    fill(tmp_path / "Train")
    fill(tmp_path / "Test")
    assert f"{tmp_path / 'Train'} has no class folders" in refused("folder", tmp_path)


def test_class_may_have_the_name_of_a_held_out_split(tmp_path):
    fill(tmp_path / "valid")
    fill(tmp_path / "invalid")
    assert data.load("folder", str(tmp_path)).classes == ["invalid", "valid"]


def test_folders_beside_the_splits_are_named_and_not_used(tmp_path, capsys):
    dataset = data.load("folder", str(split_folders(tmp_path, "train", "test", "extra")))
    assert sizes(dataset) == {"train": 10, "test": 10}
    assert "not used: extra" in capsys.readouterr().err


def test_images_beside_class_folders_are_named_and_not_used(tmp_path, capsys):
    fill(tmp_path / "a")
    fill(tmp_path / "b")
    fill(tmp_path, 1)
    assert sizes(data.load("folder", str(tmp_path))) == {"train": 8, "test": 2}
    assert "beside the class folders" in capsys.readouterr().err


def test_folder_within_a_folder_is_pointed_out(tmp_path):
    split_folders(tmp_path / "photos", "train", "test")
    assert f"give --data-dir {tmp_path / 'photos'}" in refused("folder", tmp_path)


@pytest.mark.skipif(sys.platform != "linux", reason="names there are text")
def test_class_name_that_is_not_text_is_refused(tmp_path):
    fill(tmp_path / "a")
    shutil.copytree(tmp_path / "a", os.fsdecode(os.path.join(os.fsencode(tmp_path), b"gr\xfcn")))
    message = refused("folder", tmp_path)
    assert "not UTF-8" in message and "rename it" in message


@pytest.mark.parametrize("split", ["val", "test"])
def test_held_out_class_that_training_lacks_is_refused(tmp_path, split):
    fill(split_folders(tmp_path, "train", "val", "test") / split / "zebra")
    message = refused("folder", tmp_path)
    assert "'zebra'" in message and str(tmp_path / split) in message


def test_held_out_split_may_lack_classes(tmp_path):
    split_folders(tmp_path, "train", "val", "test")
    shutil.rmtree(tmp_path / "val" / "a")
    dataset = data.load("folder", str(tmp_path))
    assert dataset.val_labels.tolist() == [1] * 5


# --------------------------------------------------------------------------------- what is an image


def test_every_suffix_of_pillow_and_files_without_one_are_taken(tmp_path, capsys):
    Image.init()
    last = ".qoi" if "QOI" in Image.SAVE else ".ppm"  # older versions of Pillow only read QOI
    for name in "ab":
        fill(tmp_path / name)
        for suffix in (".jfif", ".jpe", ".TGA", ".sgi", ".mpo", last):
            fill(tmp_path / name / suffix[1:], 1, suffix)
        fill(tmp_path / name / "bare", 1)
        (tmp_path / name / "bare" / "0.png").rename(tmp_path / name / "bare" / "0")
    dataset = data.load("folder", str(tmp_path))
    assert sum(sizes(dataset).values()) == 24
    assert "skipped" not in capsys.readouterr().err


def test_other_files_are_counted_in_one_line(tmp_path, capsys):
    for name in "ab":
        fill(tmp_path / name)
        for file in ("notes.txt", "labels.xml", "README", "photo.HEIC"):
            (tmp_path / name / file).write_text("not an image")
    data.load("folder", str(tmp_path))
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "skipped" in line]
    assert "8 files" in line and os.path.join("a", "README") in line and "5 more" in line
    assert "pip install pillow-heif" in line and line.startswith("note: ")


def test_folder_of_unknown_images_says_what_would_read_them(tmp_path):
    for name in "ab":
        fill(tmp_path / name, 3)
    for path in sorted((tmp_path / "a").iterdir()):
        path.rename(path.with_suffix(".heic"))
    message = refused("folder", tmp_path)
    assert f"{tmp_path / 'a'} has no images" in message and "pip install pillow-heif" in message


def test_what_systems_leave_in_folders_is_skipped_silently(tmp_path, capsys):
    for name in "ab":
        fill(tmp_path / name)
        for file in (
            "._0.jpg",
            ".DS_Store",
            "Thumbs.db",
            "desktop.ini",
            ".hidden/0.png",
            "__MACOSX/._0.png",
        ):
            (tmp_path / name / file).parent.mkdir(exist_ok=True)
            (tmp_path / name / file).write_text("not an image")
    (tmp_path / "__MACOSX" / "a").mkdir(parents=True)
    assert sizes(data.load("folder", str(tmp_path))) == {"train": 8, "test": 2}
    assert "skipped" not in capsys.readouterr().err


def test_installed_pillow_heif_is_used(tmp_path, monkeypatch):
    """A stand-in for it reads PNGs behind a signature that Pillow does not know."""

    def register():
        def read(file, name):
            return PngImagePlugin.PngImageFile(io.BytesIO(file.read()[4:]))

        Image.register_open("HEIF", read, lambda start: start[:4] == b"heic")
        Image.register_extension("HEIF", ".heic")

    for name in "ab":
        fill(tmp_path / name, 3)
        (tmp_path / name / "photo.heic").write_bytes(
            b"heic" + (tmp_path / name / "0.png").read_bytes()
        )
    module = types.ModuleType("pillow_heif")
    module.register_heif_opener = register
    monkeypatch.setitem(sys.modules, "pillow_heif", module)
    assert sum(sizes(data.load("folder", str(tmp_path))).values()) == 8
    found = [path for path, _ in find_images([str(tmp_path)], [])]
    assert len(found) == 8 and sum(path.endswith(".heic") for path in found) == 2


def test_step3_finds_the_files_that_training_took(tmp_path):
    for name in "ab":
        fill(tmp_path / name)
        fill(tmp_path / name / "deeper", 1, ".TGA")
        (tmp_path / name / "0.png").rename(tmp_path / name / "bare")
        for file in ("._0.jpg", ".DS_Store", "Thumbs.db", "notes.txt", "README", ".hidden.png"):
            (tmp_path / name / file).write_text("not an image")
    from data.folders import list_folder

    found = [path for path, problem in find_images([str(tmp_path)], []) if problem is None]
    assert found == list_folder(str(tmp_path))[1]["train"].paths and len(found) == 12


def test_probe_decodes_only_16_bit_files(tmp_path, monkeypatch):
    for name in "ab":
        fill(tmp_path / name, size=(90, 80))
    deep = Image.fromarray(np.full((90, 80), 700, np.uint16))
    deep.save(tmp_path / "a" / "deep.png")
    decoded, load = [], ImageFile.ImageFile.load
    monkeypatch.setattr(
        ImageFile.ImageFile, "load", lambda self: decoded.append(self.filename) or load(self)
    )
    from data.target import probe_chunk

    paths = sorted(map(str, tmp_path.glob("*/*.png")))
    found = probe_chunk(paths, 0)
    assert {os.path.basename(path) for path in decoded} == {"deep.png"}
    assert max(header.contents.brightest for header in found) == 700
    assert len(found) == 11 and {header.size for header in found} == {(90, 80)}


# ---------------------------------------------------------------------------------------- CSV files


@pytest.fixture
def images(tmp_path):
    """a/0.png to b/4.png."""
    for name in "ab":
        fill(tmp_path / name)
    return tmp_path


def listed(images):
    return [(f"{name}/{index}.png", name) for name in "ab" for index in range(5)]


def test_split_column_is_used_and_said(images, capsys):
    splits = ["train", "Training", "VALID", "validation", "test"] * 2
    rows = [(*row, split) for row, split in zip(listed(images), splits, strict=True)]
    file = write_csv(images / "list.csv", ("path", "label", "Split"), *rows)
    dataset = data.load("csv", str(file))
    assert sizes(dataset) == {"train": 4, "val": 4, "test": 2}
    assert np.array_equal(dataset.test_images[1], np.asarray(Image.open(images / "b" / "4.png")))
    assert "'Split'" in (err := capsys.readouterr().err) and "4 train, 4 val, 2 test" in err


def test_split_column_without_test_rows_holds_out_a_test_split(images, capsys):
    rows = [(*row, "val" if "0.png" in row[0] else "train") for row in listed(images)]
    dataset = data.load(
        "csv", str(write_csv(images / "list.csv", ("path", "label", "split"), *rows))
    )
    assert sizes(dataset) == {"train": 6, "val": 2, "test": 2}
    assert "no test split" in capsys.readouterr().err


def test_split_column_that_cannot_be_followed_is_refused(images):
    header, rows = ("path", "label", "split"), listed(images)
    odd = write_csv(images / "odd.csv", header, *((*row, "fold3") for row in rows))
    assert all(
        word in refused("csv", odd) for word in ("odd.csv, row 2", "'fold3'", "train, val and test")
    )
    held = write_csv(images / "held.csv", header, *((*row, "test") for row in rows))
    assert "no row whose split is train" in refused("csv", held)
    both = [(*row, "test" if "0.png" in row[0] else "train") for row in rows]
    both = write_csv(images / "both.csv", header, *both)
    assert "leave out --test-csv" in refused("csv", both, test_csv=str(held))
    plain = write_csv(images / "plain.csv", ("path", "label"), *rows)
    assert "split is not test" in refused("csv", plain, test_csv=str(both))
    assert sizes(data.load("csv", str(plain), test_csv=str(held))) == {"train": 10, "test": 10}


def test_label_of_a_held_out_row_that_training_lacks_is_refused(images):
    rows = [(*row, "train") for row in listed(images)] + [("a/0.png", "ostrich", "val")]
    file = write_csv(images / "list.csv", ("path", "label", "split"), *rows)
    assert "'ostrich'" in refused("csv", file)


def test_rows_without_a_label_or_a_path_are_counted(images, capsys):
    rows = listed(images)
    rows[3], rows[7] = (rows[3][0], " "), ("", rows[7][1])
    file = write_csv(images / "list.csv", ("path", "label"), *rows)
    assert sum(sizes(data.load("csv", str(file))).values()) == 8
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "without an image" in line]
    assert line.startswith("note: skipped 2 rows ") and "row 5" in line and "list.csv" in line
    message = refused("csv", file, strict=True)
    assert "2 rows" in message and "--strict" in message


def test_backslashes_in_paths_separate_folders(images):
    rows = [(path.replace("/", "\\"), label) for path, label in listed(images)]
    file = write_csv(images / "list.csv", ("path", "label"), *rows)
    dataset = data.load("csv", str(file))
    assert sum(sizes(dataset).values()) == 10


@pytest.mark.skipif(os.name == "nt", reason="no such name there")
def test_backslash_in_a_file_name_is_kept(images):
    for name in "ab":
        (images / name / "0.png").rename(images / f"{name}\\0.png")
    rows = [(path.replace("/", "\\"), label) for path, label in listed(images)]
    file = write_csv(images / "list.csv", ("path", "label"), *rows)
    assert sum(sizes(data.load("csv", str(file))).values()) == 10


# ------------------------------------------------------------------------- unreadable, few, changed


def test_unreadable_files_are_not_counted_among_the_images(tmp_path, capsys):
    for name in "ab":
        fill(tmp_path / name, 10)
    for index in range(3):
        (tmp_path / "a" / f"{index}.png").write_bytes(b"broken")
    dataset = data.load("folder", str(tmp_path))
    total = sum(sizes(dataset).values())
    assert total == 17
    assert f"{sizes(dataset)['test']} of 17 training images held out" in capsys.readouterr().err


def test_class_without_readable_images_says_how_many_there_were(tmp_path):
    fill(tmp_path / "a", 10)
    fill(tmp_path / "b", 3)
    for path in (tmp_path / "b").iterdir():
        path.write_bytes(b"broken")
    message = refused("folder", tmp_path)
    assert "class 'b'" in message and "of 3 listed" in message  # one of them is for testing


def test_class_with_few_images_is_named(tmp_path, capsys):
    fill(tmp_path / "a", 10)
    fill(tmp_path / "b", 3)
    fill(tmp_path / "c", 1)
    data.load("folder", str(tmp_path))
    (line,) = [
        line for line in capsys.readouterr().err.splitlines() if "few training images" in line
    ]
    assert "'b' 2 (test 1), 'c' 1 (test 0)" in line and "'a'" not in line


def test_fingerprint_is_that_of_a_copy(tmp_path):
    fill(tmp_path / "photos" / "a", 10)
    fill(tmp_path / "photos" / "b", 10)
    first = data.load("folder", str(tmp_path / "photos")).fingerprint
    shutil.copytree(tmp_path / "photos", tmp_path / "copy", copy_function=shutil.copyfile)
    again = data.load("folder", str(tmp_path / "copy")).fingerprint
    assert again == first and data.differences(first, again) == []
    assert first["classes"] == ["a", "b"] and first["train"]["images"] == 16
    other_size = data.load(
        "folder", str(tmp_path / "photos"), image_size=(8, 8), channels=1
    ).fingerprint
    assert other_size == first


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            lambda root: [shutil.rmtree(root / split / "b") for split in ("train", "test")],
            [
                "class 'b' is gone",
                "the train split has 20 images",
                "the test split has 6 images, it had 9",
            ],
        ),
        (
            lambda root: fill(root / "train" / "d", 10),
            ["class 'd' is new", "the train split has 40 images, it had 30"],
        ),
        (lambda root: (root / "train" / "a" / "3.png").unlink(), ["the train split has 29 images"]),
        (lambda root: swap(root / "train" / "a" / "0.png"), ["the train split has other images"]),
        (
            lambda root: shutil.rmtree(root / "test"),
            ["the train split has 24 images", "the test split has 6 images"],
        ),
        (lambda root: fill(root / "val" / "a", 2), ["the val split is new"]),
    ],
    ids=["class-gone", "class-new", "fewer-images", "swapped", "test-gone", "val-new"],
)
def test_changed_images_are_described(tmp_path, change, expected):
    for split, count in (("train", 10), ("test", 3)):
        for name in "abc":
            fill(tmp_path / split / name, count)
    before = data.load("folder", str(tmp_path)).fingerprint
    change(tmp_path)
    changes = data.differences(before, data.load("folder", str(tmp_path)).fingerprint)
    assert len(changes) == len(expected), changes
    assert all(one.startswith(words) for one, words in zip(changes, expected, strict=True)), changes


def swap(path):
    """Another image under the same name, of the same size in bytes."""
    size = path.stat().st_size
    Image.new("RGB", (8, 8)).save(path)
    path.write_bytes(path.read_bytes().ljust(size, b"\0"))


def test_differences_of_one_split_only():
    old = {
        "classes": ["a"],
        "train": {"images": 3, "hash": "x"},
        "test": {"images": 2, "hash": "y"},
    }
    new = {**old, "train": {"images": 3, "hash": "z"}}
    assert data.differences(old, new) and not data.differences(old, new, ("test",))


def test_fingerprint_of_arrays(mnist):
    digits = data.load("digits").fingerprint
    assert digits == data.load("digits").fingerprint and digits["test"]["images"] == 360
    assert data.load("linear", seed=0).fingerprint != data.load("linear", seed=1).fingerprint
    before = data.load("mnist", str(mnist)).fingerprint
    path = mnist / "MNIST" / "raw" / "t10k-labels-idx1-ubyte"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    (change,) = data.differences(before, data.load("mnist", str(mnist)).fingerprint)
    assert change.startswith("the test split")


# ---------------------------------------------------------------------------------------- odd names


def test_odd_names_are_read_and_cached(tmp_path, capsys):
    classes = ["grün", "it's 100%", "two  spaces", "日本"]
    for name in classes:
        fill(tmp_path / name, 4)
        (tmp_path / name / "0.png").rename(tmp_path / name / "-- it's ünï (1).png")
    if os.name != "nt":
        odd = [b"\xff\xfe.png", b"new\nline.png", b"co:lon?.png", b"back\\slash.png"]
        for folder, name in zip(map(os.fsencode, classes), odd, strict=True):
            folder = os.path.join(os.fsencode(tmp_path), folder)
            os.rename(os.path.join(folder, b"1.png"), os.path.join(folder, name))
    for _ in range(2):
        dataset = data.load("folder", str(tmp_path))
        assert dataset.classes == sorted(classes) and sum(sizes(dataset).values()) == 16
    assert capsys.readouterr().err.count("decoded") == 1
    reserved = set('<>:"|?*')
    for path in (tmp_path / ".threestep").iterdir():
        assert not set(path.name) & reserved and not path.name.endswith((".", " "))


def test_no_text_is_read_in_the_locale_s_encoding(execute, images):
    file = write_csv(images / "list.csv", ("path", "label"), *listed(images))
    code = "import sys; sys.path.insert(0, {!r}); import data"
    code += "; data.load('csv', {!r}); data.load('csv', {!r})"
    root = os.path.dirname(step1_train.__file__)
    command = code.format(root, str(file), str(file))
    result = execute("-X", "warn_default_encoding", "-c", command, cwd=images).done()
    own = [line for line in result.err.splitlines() if "EncodingWarning" in line and root in line]
    assert not own and "decoded 10 files" in result.err


@pytest.mark.slow
def test_workers_start_where_processes_cannot_be_forked(tmp_path, monkeypatch):
    from data import parallel

    folder = tmp_path / "photos"
    for name in "ab":
        fill(folder / name, 8)
    monkeypatch.setattr(parallel, "CHUNK", 4)
    monkeypatch.setattr(parallel, "usable_cpus", lambda: 2)
    options = {"image_size": (6, 6)}  # not that of the images: each worker must be able to resize
    forked = data.load("folder", str(folder), cache_dir=str(tmp_path / "first"), **options)
    monkeypatch.setattr(parallel, "START_METHOD", "spawn")
    spawned = data.load("folder", str(folder), cache_dir=str(tmp_path / "second"), **options)
    assert (
        np.array_equal(forked.train_images, spawned.train_images)
        and len(spawned.train_images) == 12
    )


# ------------------------------------------------------------------------- 10, 12 and 14 bits in 16


def grey16(folder, peak, count=5, dtype=np.uint16, suffix=".png"):
    """Images whose pixels go up to `peak`."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for index in range(count):
        pixels = rng.integers(0, peak + 1, (8, 8)).astype(dtype)
        pixels[0, 0] = peak
        Image.fromarray(pixels).save(folder / f"{index}{suffix}")


@pytest.mark.parametrize(
    ("peak", "white"),
    [(200, 255), (1023, 1023), (1024, 4095), (4000, 4095), (16000, 16383), (16384, 65535)],
)
@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_white_of_16_bit_files_is_derived_from_the_brightest(tmp_path, capsys, peak, white, suffix):
    for name in "ab":
        grey16(tmp_path / name, peak, suffix=suffix)
    dataset = data.load("folder", str(tmp_path))
    assert dataset.white == white
    pixels = np.asarray(Image.open(tmp_path / "b" / f"4{suffix}")).astype(int)
    expected = (pixels * 255 + white // 2) // white
    images = np.concatenate([dataset.train_images, dataset.test_images])[..., 0]
    assert any(np.array_equal(image, expected) for image in images)
    line = f"{white.bit_length()} bits only: {white} is taken as white"
    assert (line in capsys.readouterr().err) == (white != 65535)
    # which the cache of the headers remembers, too
    assert data.load("folder", str(tmp_path)).white == white
    assert line in capsys.readouterr().err or white == 65535


def test_white_is_not_derived_from_what_is_held_out(tmp_path):
    for name in "ab":
        grey16(tmp_path / "train" / name, 4000)
        grey16(tmp_path / "test" / name, 60000)
    dataset = data.load("folder", str(tmp_path))
    assert dataset.white == 4095 and dataset.test_images.max() == 255
    assert np.median(dataset.test_images) == 255  # clipped


def test_given_white_and_8_bit_files(tmp_path, capsys):
    for name in "ab":
        grey16(tmp_path / name, 4000, 3)
        fill(tmp_path / name / "eight", 3)
    derived = data.load("folder", str(tmp_path))
    assert derived.white == 4095
    given = data.load("folder", str(tmp_path), image_size=(8, 8), channels=3, white=4095)
    assert np.array_equal(derived.train_images, given.train_images)
    plain = data.load("folder", str(tmp_path), white=65535)
    assert plain.white == 65535 and not np.array_equal(plain.train_images, derived.train_images)


def test_decoding_clips_above_white(tmp_path):
    pixels = np.array([[0, 2048, 4095, 5000, 65535]], np.uint16)
    Image.fromarray(pixels).save(tmp_path / "x.png")
    decoded = decode_image(str(tmp_path / "x.png"), 1, 4095)[0, :, 0]
    assert decoded.tolist() == [0, 128, 255, 255, 255]
    assert decode_image(str(tmp_path / "x.png"), 1)[0, :, 0].tolist() == [0, 8, 16, 19, 255]
