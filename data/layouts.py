"""Directories whose images are labelled by lists inside them, as other programs write them.

Each function returns None for a directory of another kind. data/README.md has a table of the
layouts.
"""

import os
from dataclasses import replace

from data.dataset import SPLITS
from data.files import Files, Options, count_of, name_some, split_called
from data.notes import note
from data.tables import Row, list_rows, note_splits, read_images
from data.texts import read_table
from inference.finding import is_visible, walk
from inference.formats import IMAGE_SUFFIXES
from inference.lists import LABEL_COLUMNS, plain

HUGGING_FACE = ("metadata.csv", "metadata.jsonl")
ROBOFLOW = ("_classes.csv",)
FILE_NAME = "file_name"  # the column that Hugging Face's lists must have
ANNOTATIONS = "_annotations.txt"  # of TinyImageNet: val/val_annotations.txt beside val/images/
IMAGES = "images"


def list_annotated(
    directory: str, folders: dict[str, str], options: Options, has_class_folders: bool
) -> tuple[list[str], dict[str, Files]] | None:
    """The classes and splits of a directory that has a list, or whose split folders have.

    folders: the split folders by split; empty if there are none. has_class_folders: whether the
    folders tell the classes, too. None if there is no list that says the labels. Raises Problem.
    """
    lists = find_lists(directory, folders, ROBOFLOW)
    if not lists:
        lists = find_lists(directory, folders, HUGGING_FACE)
        if not lists or not has_labels(lists["train"], options, has_class_folders):
            return None

    without = [folders[split] for split in folders if split not in lists]
    if without and lists["train"] != os.path.join(directory, os.path.basename(lists["train"])):
        note(f"not used, for want of a list of the labels: {name_some(without)}")
    return list_of_lists(directory, lists, options)


def find_lists(directory: str, folders: dict[str, str], names: tuple[str, ...]) -> dict[str, str]:
    """The lists of such names by split; one in the directory itself goes by "train".

    Empty if there is none for training.
    """
    found = {}
    for split, folder in [("train", directory), *folders.items()]:
        for name in names:
            path = os.path.join(folder, name)
            if os.path.isfile(path):
                found[split] = path
    if "train" not in found:
        return {}
    return {split: found[split] for split in SPLITS if split in found}


def has_labels(path: str, options: Options, has_class_folders: bool) -> bool:
    """Does a list of Hugging Face's hold labels, or else only captions, boxes and the like?

    Without class folders it must.
    """
    header = [plain(name) for name in read_table(path).header or ()]
    if FILE_NAME not in header:
        return False
    named = options.label_column is not None or any(name in header for name in LABEL_COLUMNS)
    return named or not has_class_folders


def list_of_lists(
    directory: str, lists: dict[str, str], options: Options
) -> tuple[list[str], dict[str, Files]]:
    """The classes and the splits that lists in a directory tell. Raises Problem."""
    rows = {}
    sources = {}
    for default, path in lists.items():
        listed = read_images(path, options, default, root=os.path.dirname(path))
        if list(lists) == ["train"] and list(listed) == ["train"]:
            listed = by_first_folder(path, listed["train"])
        for split, more in listed.items():
            rows.setdefault(split, []).extend(more)
            sources.setdefault(split, path)

    note(f"{directory} is labelled by {', '.join(lists.values())}, not by its folders")
    note_unlisted(lists, rows)
    return list_rows(rows, sources, dict.fromkeys(rows, directory), options)


def note_unlisted(lists: dict[str, str], rows: dict[str, list[Row]]) -> None:
    """Note the images beside lists that none of the rows names."""
    listed = set()
    for split in rows.values():
        listed.update(os.path.normpath(row.path) for row in split)

    unlisted = {}
    for file in lists.values():
        for path, problem in walk(os.path.dirname(file), is_visible, follow=True):
            is_picture = problem is None and path.lower().endswith(IMAGE_SUFFIXES)
            if is_picture and os.path.normpath(path) not in listed:
                unlisted[path] = file

    if unlisted:
        count = count_of(len(unlisted), "image")
        files = ", ".join(dict.fromkeys(unlisted.values()))
        note(f"{count} not used, as {files} does not list them: {name_some(unlisted)}")


def by_first_folder(file: str, rows: list[Row]) -> dict[str, list[Row]]:
    """The rows by split, if the paths of all of them begin with the name of one, as train/0.jpg."""
    folder = os.path.dirname(file)
    splits = {}
    for row in rows:
        first = os.path.relpath(row.path, folder).split(os.sep)[0]
        split = split_called(first)
        if split is None:
            return {"train": rows}
        splits.setdefault(split, []).append(replace(row, split=split))

    if "train" not in splits:
        return {"train": rows}
    note_splits(file, "path", splits)
    return splits


def list_annotations(folder: str) -> list[Row] | None:
    """The rows of a split folder in TinyImageNet's form: images/ and a list with their labels.

    None if the folder is not of that form. Raises Problem.
    """
    images = os.path.join(folder, IMAGES)
    name = os.path.basename(folder).lower() + ANNOTATIONS
    path = os.path.join(folder, name)
    if not (os.path.isdir(images) and os.path.isfile(path)):
        return None

    # The path, the label, and the corners of a box that is of no use here.
    rows = []
    for _, cells in read_table(path).rows:
        if len(cells) > 1:
            place = os.path.join(images, cells[0].strip())
            rows.append(Row(path=place, label=cells[1].strip(), split=""))
    note(f"the labels of {images} are those of {path}")
    return rows
