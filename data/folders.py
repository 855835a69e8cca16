"""Class folders: DIR/<class>/*, or such folders below DIR/train, DIR/val and DIR/test."""

import os
from collections.abc import Iterator

import numpy as np

from data.files import Files, name_some, split_called
from data.notes import note
from inference.errors import Problem, problems
from inference.images import is_image, is_visible, walk

WORDS = {"train": "training", "val": "validation", "test": "test"}
HEIF = {".heic", ".heics", ".heif", ".heifs"}


def list_folder(directory: str) -> tuple[list[str], dict[str, Files]]:
    """The classes and the splits of DIR/<class>/*, or of DIR/train/<class>/* and the like. Raises Problem."""
    if not os.path.isdir(directory):
        raise Problem(f"no directory {directory}: --dataset folder reads DIR/[train/]<class>/*", 2)
    folders, skipped = find_splits(directory), []
    classes, paths, labels = list_classes(folders.get("train", directory), skipped)
    splits = {"train": Files(directory, paths, labels)}
    for split in ("val", "test"):
        if split in folders:
            names, paths, labels = list_classes(folders[split], skipped, least=1)
            unknown = [name for name in names if name not in classes]
            if unknown:
                raise Problem(f"{folders[split]} has a class {unknown[0]!r}, {folders['train']} does not")
            index = np.array([classes.index(name) for name in names], dtype=np.int64)
            splits[split] = Files(directory, paths, index[labels])
    if skipped:
        count = f"{len(skipped):,} file{'s' if len(skipped) > 1 else ''}"
        names = name_some(os.path.relpath(path, directory) for path in skipped) + plugin_hint(skipped)
        note(f"left out {count} of {directory} that Pillow does not know as images: {names}")
    return classes, splits


def find_splits(directory: str) -> dict[str, str]:
    """The paths of a directory's split folders by split; empty if its folders are classes. Raises Problem."""
    names, found = subfolders(directory), {}
    for name in filter(split_called, names):
        split = split_called(name)
        if split in found:
            both = f"{os.path.basename(found[split])}/ and {name}/"
            raise Problem(f"{directory} has {both}, both of which are its {WORDS[split]} split: keep one")
        found[split] = os.path.join(directory, name)
    others = [name for name in names if not split_called(name)]
    if "train" not in found:
        # A class may be called "valid", but it then has images in it and not folders, and there are others.
        if found and (not others or any(map(subfolders, found.values()))):
            raise Problem(f"{directory} has a {WORDS[min(found)]} split, but no folder train/ or training/")
        return {}
    if others:
        used = ", ".join(f"{name}/" for name in names if split_called(name))
        note(f"{directory} is split into {used}; not used: {name_some(others)}")
    return found


def list_classes(directory: str, skipped: list[str], least: int = 2) -> tuple[list[str], list, np.ndarray]:
    """The class folders of a directory, the paths of the images in them, and their labels, int64 [n].

    Classes are sorted by name, `least` or more. Other files are added to `skipped`. Raises Problem.
    """
    classes = subfolders(directory)
    if not classes:
        raise Problem(f"{directory} has no class folders: put the images of each class into one of its name")
    if len(classes) < least:
        inner = os.path.join(directory, classes[0])
        way_out = f"give --data-dir {inner}" if has_classes(inner) else "classification needs two"
        raise Problem(f"{directory} has only one class folder, {classes[0]!r}: {way_out}")
    for name in classes:
        if name != name.encode(errors="ignore").decode():  # which no exported file could hold
            folder = os.path.join(directory, name)
            raise Problem(f"the name of the class folder {folder} is not UTF-8: rename it")
    files = [entry for entry in os.scandir(directory) if entry.is_file() and is_visible(entry.name)]
    loose = sorted(entry.name for entry in files if is_image(entry.path))
    if loose:
        note(f"images beside the class folders of {directory} are not used: {name_some(loose)}")
    paths, counts = [], []
    for name in classes:
        folder, found, others = os.path.join(directory, name), [], []
        for path in files_below(folder):
            (found if is_image(path) else others).append(path)
        if not found:
            raise Problem(f"class folder {folder} has no images{plugin_hint(others)}: fill it or remove it")
        paths += found
        counts.append(len(found))
        skipped += others
    return classes, paths, np.repeat(np.arange(len(classes), dtype=np.int64), counts)


def has_classes(directory: str) -> bool:
    """Are there two or more class folders with images in them? Only names are read, for speed."""
    train = next((name for name in subfolders(directory) if split_called(name) == "train"), "")
    directory = os.path.join(directory, train)
    folders = (files_below(os.path.join(directory, name)) for name in subfolders(directory))
    filled = (any(os.path.splitext(path)[1] and is_image(path) for path in paths) for paths in folders)
    return any(filled) and any(filled)  # the second goes on where the first stopped


def subfolders(directory: str) -> list[str]:
    """The names of the folders in a directory that are not hidden, sorted. Raises Problem."""
    with problems(f"cannot read {directory}", OSError), os.scandir(directory) as entries:
        return sorted(entry.name for entry in entries if is_visible(entry.name) and entry.is_dir())


def files_below(directory: str) -> Iterator[str]:
    """The files below a directory that are not hidden, a folder's before its subfolders'. Raises Problem."""
    for path, problem in walk(directory, is_visible):
        if problem:
            raise Problem(f"{path} {problem}")
        yield path


def plugin_hint(paths: list[str]) -> str:
    """What would let Pillow read some of these files, in brackets; empty if nothing is known."""
    suffixes = HEIF & {os.path.splitext(path)[1].lower() for path in paths}
    return f" (pip install pillow-heif to read {', '.join(sorted(suffixes))})" if suffixes else ""
