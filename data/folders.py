"""Class folders: DIR/<class>/*, or such folders below DIR/train, DIR/val and DIR/test."""

import os
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from data.files import Files, count_of, name_some, split_called
from data.notes import note
from inference.errors import Problem, problems
from inference.finding import is_image, is_visible, walk
from inference.formats import HEIF_HINT, SUFFIXES

SPLIT_WORDS = {"train": "training", "val": "validation", "test": "test"}


@dataclass(frozen=True)
class ClassFolders:
    """What the class folders of one directory hold."""

    classes: list[str]  # sorted
    paths: list[str]  # of the images, class by class
    labels: np.ndarray  # int64 [images], index into `classes`
    groups: list[str]  # of each image, the first folder below its class, or empty
    skipped: list[str]  # the other files

    def files(self, root: str, labels: np.ndarray) -> Files:
        """The images as the files of a split of the data in `root`, with the labels it has."""
        return Files(root=root, paths=self.paths, labels=labels, groups=self.groups)


def list_folder(directory: str) -> tuple[list[str], dict[str, Files]]:
    """The classes and the splits of DIR/<class>/*, or of DIR/train/<class>/* and so on.

    Raises Problem.
    """
    if not os.path.isdir(directory):
        raise Problem(f"no directory {directory}: --dataset folder reads DIR/[train/]<class>/*", 2)

    folders = find_splits(directory)
    train = list_classes(folders.get("train", directory), least=2)
    splits = {"train": train.files(directory, train.labels)}
    skipped = list(train.skipped)

    for split in ("val", "test"):
        if split in folders:
            found = list_classes(folders[split], least=1)
            labels = labels_of_training(found, train, folders[split], folders["train"])
            splits[split] = found.files(directory, labels)
            skipped += found.skipped

    if skipped:
        note_skipped(directory, skipped)
    return train.classes, splits


def find_splits(directory: str) -> dict[str, str]:
    """The paths of a directory's split folders by split; empty if its folders are classes.

    Raises Problem.
    """
    found = {}
    others = []

    for name in subfolders(directory):
        split = split_called(name)
        if split is None:
            others.append(name)
            continue
        if split in found:
            both = f"{os.path.basename(found[split])}/ and {name}/"
            raise Problem(
                f"{directory} has {both}, both of which are its {SPLIT_WORDS[split]} split: "
                "keep one"
            )
        found[split] = os.path.join(directory, name)

    if "train" not in found:
        refuse_without_training(directory, found, others)
        return {}

    if others:
        used = ", ".join(f"{os.path.basename(path)}/" for path in found.values())
        note(f"{directory} is split into {used}; not used: {name_some(others)}")
    return found


def refuse_without_training(directory: str, found: dict[str, str], others: list[str]) -> None:
    """Raise Problem if a directory has split folders, `found`, but none for training."""
    if not found:
        return

    # A class may be called "valid", but then there are images in its folder and not folders, and
    # there are other classes.
    have_subfolders = any(subfolders(path) for path in found.values())
    if others and not have_subfolders:
        return

    split = SPLIT_WORDS["test" if "test" in found else "val"]
    raise Problem(f"{directory} has a {split} split, but no folder train/ or training/")


def labels_of_training(
    held_out: ClassFolders,
    train: ClassFolders,
    folder: str,
    train_folder: str,
) -> np.ndarray:
    """The labels of a held-out split as the training split numbers its classes: int64 [images].

    folder, train_folder: where both lie. Raises Problem for a class that training lacks.
    """
    for name in held_out.classes:
        if name not in train.classes:
            raise Problem(f"{folder} has a class {name!r}, {train_folder} does not")

    numbers = [train.classes.index(name) for name in held_out.classes]
    return np.array(numbers, dtype=np.int64)[held_out.labels]


def list_classes(directory: str, least: int) -> ClassFolders:
    """What the class folders of a directory hold, `least` classes or more. Raises Problem."""
    classes = subfolders(directory)
    check_classes(directory, classes, least)
    note_loose_images(directory)

    paths = []
    groups = []
    counts = []
    skipped = []

    for name in classes:
        folder = os.path.join(directory, name)
        images, others = sort_out(folder)
        if not images:
            hint = plugin_hint(others)
            raise Problem(f"class folder {folder} has no images{hint}: fill it or remove it")
        paths += images
        groups += [folder_below(folder, path) for path in images]
        counts.append(len(images))
        skipped += others

    labels = np.repeat(np.arange(len(classes), dtype=np.int64), counts)
    return ClassFolders(classes=classes, paths=paths, labels=labels, groups=groups, skipped=skipped)


def folder_below(folder: str, path: str) -> str:
    """The name of the first folder on the way from a folder to a file in it; empty if none is."""
    way = path.removeprefix(os.path.join(folder, "")).split(os.sep)
    return way[0] if len(way) > 1 else ""


def check_classes(directory: str, classes: list[str], least: int) -> None:
    """Raise Problem if there are too few class folders, or if an exported file cannot name them."""
    if not classes:
        raise Problem(
            f"{directory} has no class folders: put the images of each class into a folder "
            "named after the class"
        )

    if len(classes) < least:
        way_out = "classification needs at least two"
        inner = os.path.join(directory, classes[0])
        if has_classes(inner):
            way_out = f"give --data-dir {inner}"
        raise Problem(f"{directory} has only one class folder, {classes[0]!r}: {way_out}")

    for name in classes:
        # Bytes of a name that are no UTF-8 arrive as surrogates, which no exported file can hold.
        if name != name.encode(errors="ignore").decode():
            folder = os.path.join(directory, name)
            raise Problem(f"the name of the class folder {folder} is not UTF-8: rename it")


def note_loose_images(directory: str) -> None:
    """Note the images that lie beside the class folders."""
    loose = []
    for entry in os.scandir(directory):
        if entry.is_file() and is_visible(entry.name) and is_image(entry.path):
            loose.append(entry.name)

    if loose:
        names = name_some(sorted(loose))
        note(f"images beside the class folders of {directory} are not used: {names}")


def note_skipped(directory: str, skipped: list[str]) -> None:
    """Note the files in class folders that are no images."""
    names = name_some(os.path.relpath(path, directory) for path in skipped)
    hint = plugin_hint(skipped)
    count = count_of(len(skipped), "file")
    note(f"skipped {count} in {directory} that Pillow cannot read: {names}{hint}")


def sort_out(folder: str) -> tuple[list[str], list[str]]:
    """The images and the other files in a folder and its subfolders. Raises Problem."""
    images = []
    others = []
    for path in files_below(folder):
        if is_image(path):
            images.append(path)
        else:
            others.append(path)
    return images, others


def has_classes(directory: str) -> bool:
    """Are there two or more class folders with images in them, perhaps in a training folder?"""
    for name in subfolders(directory):
        if split_called(name) == "train":
            directory = os.path.join(directory, name)
            break

    filled = 0
    for name in subfolders(directory):
        if has_image_name(os.path.join(directory, name)):
            filled += 1
        if filled == 2:
            return True
    return False


def has_image_name(folder: str) -> bool:
    """Is there a file with an image's suffix in a folder? Only names are read, for speed."""
    for path in files_below(folder):
        suffix = os.path.splitext(path)[1]
        if suffix and is_image(path):  # without a suffix, is_image would open the file
            return True
    return False


def subfolders(directory: str) -> list[str]:
    """The names of the folders in a directory that are not hidden, sorted. Raises Problem."""
    names = []
    with problems(f"cannot read {directory}", OSError), os.scandir(directory) as entries:
        for entry in entries:
            if is_visible(entry.name) and entry.is_dir():
                names.append(entry.name)
    return sorted(names)


def files_below(directory: str) -> Iterator[str]:
    """The files below a directory that are not hidden, a folder's before its subfolders'.

    Raises Problem.
    """
    for path, problem in walk(directory, is_visible, follow=True):
        if problem:
            raise Problem(f"{path} {problem}")
        yield path


def plugin_hint(paths: list[str]) -> str:
    """How to let Pillow read some of these files, in brackets; empty if nothing is known."""
    suffixes = {os.path.splitext(path)[1].lower() for path in paths}
    readable = sorted(suffixes.intersection(SUFFIXES["HEIF"]))
    if not readable:
        return ""
    return f" ({HEIF_HINT} to read {', '.join(readable)})"
