"""Directories and lists as people have them: what is read, what is said, and what is refused."""

import json
import os
import unicodedata

import pytest
import torch
from test_listing import fill, refused, sizes

import data
import step1_train
import step2_export
from data import folders


def put(path, text, encoding="utf-8"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode(encoding))
    return path


@pytest.fixture
def photos(tmp_path):
    """photos/a/0.png to photos/b/2.png."""
    for label in "ab":
        fill(tmp_path / "photos" / label, 3)
    return tmp_path / "photos"


ROWS = [f"{label}/{number}.png" for label in "ab" for number in range(3)]


def listed(photos, header, row, name="list.csv", encoding="utf-8"):
    """A list of the six photos: the header, and what row(path, number) gives for each."""
    lines = [row(path, number) + "\n" for number, path in enumerate(ROWS)]
    return put(photos / name, header + "".join(lines), encoding)


def loaded(path, **options):
    """The dataset that --data-dir alone gives."""
    return data.load(data.guess(str(path)), str(path), **options)


def labels(dataset, split="train"):
    """The names of the labels of a split."""
    return [dataset.classes[label] for label in dataset.labels_of(split)]


# --------------------------------------------------------------------- --data-dir without --dataset
def test_data_dir_alone_means_images_of_ones_own(photos, mnist):
    file = listed(photos, "path,label\n", lambda path, number: f"{path},{path[0]}", "list.CSV")
    for path in (file, put(photos / "train.txt", "a/0.png 0\n"), photos / "a" / "0.png"):
        assert data.guess(str(path)) == "csv"
    named_like_a_file = put(photos.parent / "x.csv" / "note", "").parent
    for directory in (photos, photos / "a", mnist, named_like_a_file):
        assert data.guess(str(directory)) == "folder"


def test_a_mistyped_data_dir_names_the_nearest(call, here, photos):
    wrong = f"{photos.parent}/Fotos/train"
    (photos.parent / "fotos").mkdir()
    result = call(step1_train.main, "--data-dir", wrong)
    result.error(2, f"no file or directory {wrong}", f"did you mean {photos.parent / 'fotos'}?")
    assert refused("folder", f"{photos}s").endswith(f"did you mean {photos}?")
    call(step1_train.main, "--data-dir", "/nowhere").error(2, "a directory of class folders")


def test_wrong_directories_say_what_is_missing(call, here, photos, mnist):
    def error(path, *words):
        call(step1_train.main, "--data-dir", path).error(*words)

    error(photos / "a", 1, "has no class folders", "named after the class")
    (photos / "only").mkdir()
    (photos / "a").rename(photos / "only" / "a")
    error(photos / "only", 1, "only one class folder, 'a'", "needs at least two")
    error(mnist, 2, "holds MNIST/ of torchvision: add --dataset mnist")

    put(photos / "a" / "train.csv", "")
    put(photos / "a" / "test.csv", "")
    fill(photos / "a")
    words = f"give --data-dir {photos / 'a' / 'train.csv'}, with --test-csv {photos / 'a'}"
    error(photos / "a", 1, words)


def test_a_zips_extra_folder_is_entered(tmp_path, photos, capsys):
    (tmp_path / "outer").mkdir()
    photos = photos.rename(tmp_path / "outer" / "outer")
    assert loaded(tmp_path / "outer").classes == ["a", "b"]
    assert f"reading {photos}, which is all that {tmp_path / 'outer'} holds" in (
        capsys.readouterr().err
    )
    photos.rename(tmp_path / "outer" / "inner")
    message = refused("folder", tmp_path / "outer")
    assert f"give --data-dir {tmp_path / 'outer' / 'inner'}" in message


def test_split_folders_that_hold_a_folder_of_the_same_name(tmp_path):
    for split in ("train", "test"):
        for label in "ab":
            fill(tmp_path / split / split / label, 3)
    dataset = loaded(tmp_path)
    assert dataset.classes == ["a", "b"]
    assert sizes(dataset) == {"train": 6, "test": 6}


def test_splits_by_other_names_are_no_classes(tmp_path):
    for split in ("seg_train", "seg_test"):
        for label in "ab":
            fill(tmp_path / split / label, 3)
    message = refused("folder", tmp_path)
    assert "seg_train/ train/" in message and "seg_test/ test/" in message


# ------------------------------------------------------------------------------------ class folders
def test_class_folders_that_are_numbers_are_sorted_as_such(tmp_path):
    for name in ("1", "2", "10"):
        fill(tmp_path / name, 3)
    assert loaded(tmp_path).classes == ["1", "2", "10"]


def test_runs_of_an_earlier_order_of_classes_go_on(call, here, tmp_path, monkeypatch, in_process):
    for name in ("1", "2", "10"):
        fill(tmp_path / "numbers" / name, 5)
    arguments = ["--data-dir", tmp_path / "numbers", "--model", "mlp", "--hidden", "4"]
    with monkeypatch.context() as earlier:
        earlier.setattr(folders, "sort_classes", lambda names, known: sorted(names))
        call(step1_train.main, *arguments, "--epochs", 1).done()

    assert "onnx" in call(step2_export.main, "--format", "onnx").done().out
    resumed = call(step1_train.main, "--resume", "numbers-mlp", "--epochs", 2)
    checkpoint = torch.load(here / "runs" / "numbers-mlp" / "checkpoint.pt", weights_only=True)
    assert resumed.done() and checkpoint["spec"]["classes"] == ["1", "10", "2"]


def test_links_between_classes_and_to_nowhere_are_said(photos, capsys):
    (photos / "c").symlink_to("a")
    (photos / "lost").symlink_to("/nowhere/lost")
    assert loaded(photos).classes == ["a", "b", "c"]
    said = capsys.readouterr().err
    assert "warning: 3 images in class 'a' and in class 'c', through a link" in said
    assert f"1 link in {photos} not used, leading nowhere: lost -> /nowhere/lost" in said


def test_a_class_called_train(photos, capsys):
    fill(photos / "train", 3)
    assert loaded(photos).classes == ["a", "b", "train"]
    assert "train/ of" in capsys.readouterr().err
    # Images with a list are a training split, and so are those beside folders of other splits.
    put(photos / "train.csv", "path,label\n")
    assert "train has no class folders" in refused("folder", photos)
    (photos / "train.csv").unlink()
    (photos / "b").rename(photos / "my_test")
    assert "train has no class folders" in refused("folder", photos)


def test_class_names_that_may_be_mistyped_are_noted(tmp_path, capsys):
    for name in ("Cat", "cat", "Dog ", "bird"):
        fill(tmp_path / name, 3)
    assert len(loaded(tmp_path).classes) == 4
    assert "a class of its own: 'Cat', 'cat', 'Dog '\n" in capsys.readouterr().err


def test_an_unlabelled_test_folder_is_not_used(tmp_path, photos, capsys):
    (tmp_path / "kaggle").mkdir()
    photos.rename(tmp_path / "kaggle" / "train")
    fill(tmp_path / "kaggle" / "test", 7)
    assert sizes(loaded(tmp_path / "kaggle")) == {"train": 4, "test": 2}
    assert "test (7 files) has no class folders, and so no labels" in capsys.readouterr().err


# ------------------------------------------------------------------------- lists inside a directory
@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl"])
def test_hugging_face(tmp_path, capsys, name):
    for split, count in (("train", 6), ("test", 4)):
        fill(tmp_path / split, count)
        rows = [(f"{number}.png", "ab"[number % 2]) for number in range(count)]
        if name.endswith("csv"):
            text = "file_name,label\n" + "".join(f"{path},{label}\n" for path, label in rows)
        else:
            lines = [json.dumps({"file_name": path, "label": label}) for path, label in rows]
            text = "\n".join(lines)
        put(tmp_path / split / name, text)

    dataset = loaded(tmp_path)
    assert dataset.classes == ["a", "b"]
    assert labels(dataset, "train") == ["a", "b"] * 3
    assert labels(dataset, "test") == ["a", "b"] * 2
    assert f"is labelled by {tmp_path / 'train' / name}" in capsys.readouterr().err


def test_images_that_metadata_does_not_list_are_counted(tmp_path, capsys):
    fill(tmp_path, 8)
    lines = [f"./{number}.png,{'ab'[number % 2]}\n" for number in range(6)]
    put(tmp_path / "metadata.csv", "file_name,label\n" + "".join(lines))
    assert sizes(loaded(tmp_path)) == {"train": 4, "test": 2}
    assert "2 images not used, as" in capsys.readouterr().err


def test_hugging_face_with_one_list_for_all_splits(tmp_path):
    lines = ["file_name,label"]
    for split, count in (("train", 6), ("test", 4)):
        fill(tmp_path / split, count)
        lines += [f"{split}/{number}.png,{'ab'[number % 2]}" for number in range(count)]
    put(tmp_path / "metadata.csv", "\n".join(lines))
    assert sizes(loaded(tmp_path)) == {"train": 6, "test": 4}


def test_metadata_without_labels_leaves_class_folders_as_they_are(photos):
    rows = [f"{path},a photo {number}\n" for number, path in enumerate(ROWS)]
    put(photos / "metadata.csv", "file_name,text\n" + "".join(rows))
    assert loaded(photos).classes == ["a", "b"]
    # Captions are no classes, even if they are all that there is.
    message = refused("csv", photos / "metadata.csv")
    assert "no column label or class or target, it has file_name, text" in message


def roboflow(tmp_path, row):
    for split, count in (("train", 6), ("valid", 4), ("test", 2)):
        fill(tmp_path / split, count)
        lines = [f"{number}.png, {row(number)}\n" for number in range(count)]
        put(tmp_path / split / "_classes.csv", "filename, cat, dog\n" + "".join(lines))


def test_roboflow(tmp_path):
    roboflow(tmp_path, lambda number: "1, 0" if number % 2 else "0, 1")
    dataset = loaded(tmp_path)
    assert dataset.classes == ["cat", "dog"]
    assert labels(dataset) == ["dog", "cat"] * 3
    assert sizes(dataset) == {"train": 6, "val": 4, "test": 2}


def test_images_of_several_classes_are_refused_with_their_number(tmp_path):
    roboflow(tmp_path, lambda number: "1, 1" if number < 2 else "0, 1")
    message = refused("folder", tmp_path)
    assert "2 rows" in message and "more than one class" in message
    assert "row 2 (cat, dog)" in message and "_classes.csv" in message


def test_tiny_imagenet(tmp_path, capsys):
    for wnid in ("n01", "n02"):
        fill(tmp_path / "train" / wnid / "images", 4, ".JPEG")
        put(tmp_path / "train" / wnid / f"{wnid}_boxes.txt", "0.JPEG\t0\t0\t9\t9\n")
    fill(tmp_path / "val" / "images", 4, ".JPEG")
    fill(tmp_path / "test" / "images", 4, ".JPEG")
    lines = [f"{number}.JPEG\tn0{1 + number % 2}\t0\t0\t9\t9\n" for number in range(4)]
    put(tmp_path / "val" / "val_annotations.txt", "".join(lines))

    dataset = loaded(tmp_path)
    assert labels(dataset, "val") == ["n01", "n02"] * 2
    assert sizes(dataset) == {"train": 6, "val": 4, "test": 2}
    said = capsys.readouterr().err
    assert "test (4 files) has no class folders" in said and "val_annotations.txt" in said


# -------------------------------------------------------------------------------- columns of a list
def test_path_and_label_separated_by_a_space(tmp_path, capsys):
    fill(tmp_path / "my cats", 6)
    train = put(tmp_path / "train.txt", "".join(f"my cats/{n}.png {n % 2}\n" for n in range(4)))
    val = put(tmp_path / "val.txt", "".join(f"my cats/{n}.png {n % 2}\n" for n in (4, 5)))
    dataset = loaded(train, test_csv=str(val))
    assert dataset.classes == ["0", "1"]
    assert sizes(dataset) == {"train": 4, "test": 2}
    assert "no line that names its columns" in capsys.readouterr().err


@pytest.mark.parametrize("header", ["", "id label\n"])
def test_ids_and_labels_separated_by_a_space(photos, header):
    file = listed(photos, header, lambda path, number: f"{path[:-4]} {path[0]}", "list.txt")
    assert sizes(loaded(file)) == {"train": 4, "test": 2}


def test_a_column_for_each_class(photos, capsys):
    marks = ("1,0,0", "0,1,0", "0,0,1")
    file = listed(photos, "id,healthy,rust,scab\n", lambda path, n: f"{path[:-4]},{marks[n % 3]}")
    dataset = loaded(file)
    assert dataset.classes == ["healthy", "rust", "scab"]
    assert "a column for each of 3 classes: healthy, rust, scab" in capsys.readouterr().err


def test_the_only_other_column_holds_the_labels(photos, capsys):
    file = listed(photos, "id_code,diagnosis\n", lambda path, number: f"{path[:-4]},{number % 2}")
    assert loaded(file).classes == ["0", "1"]
    said = capsys.readouterr().err
    assert "the labels are those of 'diagnosis'" in said
    assert f"6 paths of {file} have no suffix: 'a/0' is read from {photos}/a/0.png" in said


@pytest.mark.parametrize(
    ("column", "values", "expected"),
    [
        ("is_valid", ("True", "False", "False"), {"train": 2, "val": 2, "test": 2}),
        ("is_valid", ("1", "0", "0"), {"train": 2, "val": 2, "test": 2}),
        ("is_valid", ("yes", "no", "No"), {"train": 2, "val": 2, "test": 2}),
        ("is_test", ("Y", "N", "N"), {"train": 4, "test": 2}),
        ("is_test", ("t", "F", "f"), {"train": 4, "test": 2}),
        ("is_train", ("0", "1", "1"), {"train": 4, "test": 2}),
        ("subset", ("test", "train", "train"), {"train": 4, "test": 2}),
        ("data set", ("test", "train", "valid"), {"train": 2, "val": 2, "test": 2}),
    ],
)
def test_other_columns_that_tell_the_split(photos, capsys, column, values, expected):
    header = f"{column},path,label\n"
    file = listed(photos, header, lambda path, number: f"{values[number % 3]},{path},{path[0]}")
    assert sizes(loaded(file)) == expected
    said = capsys.readouterr().err
    assert f"the column {column!r} of {file} says which split" in said
    assert "not read" not in said


@pytest.mark.parametrize(
    ("column", "values", "words"),
    [
        ("subset", ("train", "holdout", "train"), "its values are holdout, train, and only train"),
        ("set", ("A", "B", "C"), "its values are A, B, C, and only train, val and test are known"),
        ("is_test", ("0", "2", "0"), "its values are 0, 2, and only yes and no are known"),
    ],
)
def test_split_columns_that_are_not_understood_are_said(photos, capsys, column, values, words):
    header = f"{column},path,label\n"
    file = listed(photos, header, lambda path, number: f"{values[number % 3]},{path},{path[0]}")
    loaded(file)
    said = capsys.readouterr().err
    assert f"warning: the column {column!r} of {file} is not read as the split: {words}" in said


def test_a_second_column_that_tells_the_split_is_said(photos, capsys):
    header = "is_valid,is_test,path,label\n"
    file = listed(photos, header, lambda path, n: f"{n == 0},{n == 1},{path},{path[0]}")
    loaded(file)
    assert "the column 'is_test'" in capsys.readouterr().err
    # A column of labels is no split, whatever its name, and neither is one of origins.
    file = listed(photos, "set,path\n", lambda path, n: f"{path[0]},{path}")
    assert loaded(file).classes == ["a", "b"]
    file = listed(photos, "split,dataset,path,label\n", lambda path, n: f"train,x,{path},{path[0]}")
    loaded(file)
    assert "warning" not in capsys.readouterr().err


def test_several_labels_in_a_row_are_refused_with_their_number(photos):
    values = ("car", "car person", "person")
    header = "fname,labels,is_valid\n"
    file = listed(photos, header, lambda path, n: f"{path},{values[n % 3]},{n == 5}")
    message = refused("csv", file)
    assert "'labels'" in message and "2 rows of 6, the first: row 3 (car person)" in message
    assert "Multi-label data is not supported" in message
    assert loaded(file, label_column="labels").classes == ["car", "car person", "person"]


def test_a_label_of_several_words_is_one(photos):
    values = ("golden retriever", "labrador retriever", "hot dog")
    file = listed(photos, "fname,labels\n", lambda path, n: f"{path},{values[n % 3]}")
    assert loaded(file).classes == sorted(values)


def test_files_that_a_list_repeats_are_counted(tmp_path, capsys):
    fill(tmp_path / "x", 10)
    rows = [f"x/{number}.png,{'ab'[number % 2]}\n" for number in range(10)]
    more = [*rows[:8], "x/9.png,a\n"]
    file = put(tmp_path / "list.csv", "path,label\n" + "".join(rows + more))
    loaded(file)
    said = capsys.readouterr().err
    assert f"note: rows of {file} that name a file again: 9 ({tmp_path}/x/0.png" in said
    assert f"warning: {file} gives 1 file more than one label: {tmp_path}/x/9.png (b, a)" in said
    assert "share" not in said  # no stems


def test_a_line_of_columns_is_wanted_only_where_the_first_line_is_data(photos):
    file = listed(photos, "x/1,cat\n", lambda path, n: f"{path},{'cat' if n else 'dog'}")
    assert "insert a line path,label before it" in refused("csv", file)
    file = listed(photos, "path,label\n", lambda path, number: f"{path},{path[0]}")
    assert "insert a line" not in refused("csv", file, label_column="lable")


def test_names_are_taken_and_not_their_numbers(photos, capsys):
    names = {"a": "cat", "b": "dog"}
    header = "path,label,class\n"
    file = listed(
        photos, header, lambda path, number: f"{path},{path[0] == 'b':d},{names[path[0]]}"
    )
    assert loaded(file).classes == ["cat", "dog"]
    assert "the labels are those of 'class'; --label-column" in capsys.readouterr().err
    assert loaded(file, label_column="label").classes == ["0", "1"]
    assert loaded(file, classes=["0", "1"]).classes == ["0", "1"]  # as an earlier run took it


def test_labels_that_became_floats(photos):
    values = ("1.0", "2.0", "10.0")
    file = listed(photos, "path,label\n", lambda path, number: f"{path},{values[number % 3]}")
    assert loaded(file).classes == ["1", "2", "10"]
    earlier = ["1.0", "10.0", "2.0"]
    assert loaded(file, classes=earlier).classes == earlier


def test_rows_whose_label_is_nan_are_skipped(photos, capsys):
    file = listed(photos, "path,label\n", lambda path, n: f"{path},{'nan' if n == 1 else n % 2}")
    assert sizes(loaded(file)) == {"train": 3, "test": 2}
    assert "skipped 1 row" in capsys.readouterr().err


def test_a_list_without_a_header(photos, capsys):
    file = listed(photos, "", lambda path, number: f"{path},{path[0]}")
    assert sizes(loaded(file)) == {"train": 4, "test": 2}
    assert "taken as path, then label" in capsys.readouterr().err
    file = listed(photos, "", lambda path, number: f"{path},{path[0]},9")
    assert "is data, ['a/0.png', 'a', '9']" in refused("csv", file)
    assert "leave out --label-column" in refused("csv", file, label_column="label")


@pytest.mark.parametrize(
    ("header", "row", "encoding"),
    [
        ("sep=;\npath;label\n", "{};{}", "utf-8"),
        ("path\tlabel\n", "{}\t{}", "utf-16"),
        ("path,label\r\n", '"{}","{}, etc."\r', "utf-8-sig"),
        ("\npath,label,,\n", "{},{},,", "utf-8"),
        ("path,label\n", "{},{},", "utf-8"),
    ],
    ids=["sep", "utf-16", "crlf", "empty-columns", "empty-cells"],
)
def test_lists_that_excel_writes(photos, header, row, encoding):
    file = listed(photos, header, lambda path, _: row.format(path, path[0]), encoding=encoding)
    dataset = loaded(file)
    assert [name[0] for name in dataset.classes] == ["a", "b"]
    assert sizes(dataset) == {"train": 4, "test": 2}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b"\n\r\n", "is empty"),
        (b"path,label\n", "lists no images"),
        (b"PK\x03\x04...", "perhaps a spreadsheet: save it as CSV UTF-8"),
        (b"p\0a\0t\0h\0", "zero bytes"),
        (b"path,label\na/0.png,\xff\n", "is not UTF-8 text"),
        (b"path,label\na/0.png,a,b\n", "row 2: expected 2 fields"),
        (b"path,label\na/0.png\n", "row 2: expected 2 fields"),
    ],
)
def test_lists_that_cannot_be_read(photos, content, words):
    (photos / "list.csv").write_bytes(content)
    assert words in refused("csv", photos / "list.csv")


def test_json_lines_that_cannot_be_read(photos):
    assert "line 1 is not a JSON object" in refused("csv", put(photos / "x.jsonl", "[1]"))
    several = '{"file_name": "a/0.png", "label": ["cat", "dog"]}'
    assert "an image has one class here" in refused("csv", put(photos / "x.jsonl", several))


def test_json_that_is_no_lines_says_how_to_convert_it(photos):
    rows = [{"image": path, "label": path[0]} for path in ROWS]
    array = put(photos / "list.json", json.dumps(rows, indent=1))
    message = refused("csv", array)
    assert "is a JSON array" in message and 'convert it: python -c "import json;' in message
    lines = put(photos / "list.json", "\n".join(map(json.dumps, rows)))
    assert f"rename it to {photos / 'list.jsonl'}" in refused("csv", lines)


def test_a_test_list_that_is_missing_names_the_nearest(photos):
    file = listed(photos, "path,label\n", lambda path, number: f"{path},{path[0]}", "train.csv")
    put(photos / "test.csv", "path,label\n")
    message = refused("csv", file, test_csv=str(photos / "tset.csv"))
    assert f"no file or directory {photos / 'tset.csv'}: did you mean" in message
    assert "--test-csv takes a list" in refused("csv", file, test_csv="/nowhere/x")


def test_an_image_is_no_list(photos):
    assert "is an image" in refused("csv", photos / "a" / "0.png")


# ---------------------------------------------------------------------------------- paths of a list
@pytest.mark.parametrize(
    ("spelled", "words"),
    [
        (lambda path, photos: f"file://{photos}/{path}", "are file:// addresses"),
        (
            lambda path, photos: "C:\\Users\\me\\" + path.replace("/", "\\"),
            "begin with C:\\Users\\",
        ),
        (lambda path, photos: f"/home/me/photos/{path}", "begin with /home/me/photos/, which is"),
        (lambda path, photos: f"photos/{path}", "begin with photos/, which is not there"),
        (lambda path, photos: path.upper(), "differ from the file's name in case"),
        (lambda path, photos: path[:-4], "have no suffix"),
    ],
)
def test_paths_that_fit_one_file_are_read_and_said(photos, capsys, spelled, words):
    def row(path, number):
        return f"{spelled(path, photos)},{path[0]}"

    file = listed(photos, "path,label\n", row)
    dataset = loaded(file)
    assert dataset.paths["train"] + dataset.paths["test"]
    assert sizes(dataset) == {"train": 4, "test": 2}
    assert all(
        os.path.samefile(os.path.dirname(path), photos / label)
        for path, label in zip(dataset.paths["train"], labels(dataset), strict=True)
    )
    assert f"6 paths of {file} {words}" in capsys.readouterr().err


def test_a_list_in_the_working_directory(photos, monkeypatch):
    listed(photos, "id,label\n", lambda path, number: f"{path[:-4]},{path[0]}", "list.csv")
    monkeypatch.chdir(photos)
    assert sizes(loaded("list.csv")) == {"train": 4, "test": 2}


def test_paths_in_another_unicode_form(tmp_path):
    name = "grün"
    fill(tmp_path / unicodedata.normalize("NFD", name), 3)
    fill(tmp_path / "a", 3)
    composed = unicodedata.normalize("NFC", name)
    rows = [f"{label}/{number}.png,{label}" for label in ("a", composed) for number in range(3)]
    dataset = loaded(put(tmp_path / "list.csv", "path,label\n" + "\n".join(rows)))
    assert dataset.classes == ["a", composed]
    assert sizes(dataset) == {"train": 4, "test": 2}


def test_images_in_a_folder_beside_the_list(photos, capsys):
    fill(photos / "train_images", 6)
    rows = "".join(f"{number},{number % 2}\n" for number in range(6))
    file = put(photos / "list.csv", "image_id,label\n" + rows)
    # The folders a and b have files of such names as well.
    assert "6 of 6 files cannot be read" in refused("csv", file)
    said = "in several folders, a/, b/, train_images/: --image-root takes one"
    assert said in capsys.readouterr().err
    for label in "ab":
        (photos / label).rename(photos.parent / label)
    assert sizes(loaded(file)) == {"train": 4, "test": 2}
    assert "are in train_images/" in capsys.readouterr().err


def test_an_id_may_be_called_like_a_folder(photos):
    fill(photos, 6)
    (photos / "a").rename(photos / "3")
    rows = "".join(f"{number},{number % 2}\n" for number in range(6))
    assert sizes(loaded(put(photos / "list.csv", "id,label\n" + rows))) == {"train": 4, "test": 2}


def test_two_paths_do_not_become_one_file(photos):
    fill(photos / "flat", 3)
    file = put(
        photos / "flat" / "list.csv", "path,label\n" + "".join(f"{p},{p[0]}\n" for p in ROWS)
    )
    assert "6 of 6 files cannot be read" in refused("csv", file)


def test_a_suffix_that_may_be_one_of_two_is_not_guessed(photos, capsys):
    fill(photos / "a", 1, ".jpg")
    file = listed(photos, "path,label\n", lambda path, number: f"{path[:-4]},{path[0]}")
    loaded(file)
    said = capsys.readouterr().err
    assert "5 paths" in said and f"skipped: {photos}/a/0 no such file" in said


def test_advice_about_missing_files_is_not_given_twice(tmp_path, photos):
    rows = "".join(f"x{number},{number % 2}\n" for number in range(4))
    file = put(photos / "list.csv", "id,label\n" + rows)
    assert "--image-root says what" in refused("csv", file)
    (tmp_path / "empty").mkdir()
    message = refused("csv", file, image_root=str(tmp_path / "empty"))
    assert f"relative to step1's --image-root {tmp_path / 'empty'}" in message
    assert "the nearest file there is img_0001.png" in refused(
        "csv", nearly(photos / "a", "img_001.png", "img_0001.png")
    )


def nearly(folder, name, file):
    """A list with a name that is nearly that of a file."""
    fill(folder, 1)
    (folder / "0.png").rename(folder / file)
    return put(folder / "list.csv", f"path,label\n{name},a\n{name},a\n{name}x,b\n")
