"""Class folders: DIR/<class>/*, or such folders below DIR/train, DIR/val and DIR/test."""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from data.files import Files, Options, count_of, name_some, refuse_missing, split_called
from data.layouts import list_annotated, list_annotations
from data.links import note_dead_links, warn_of_shared_folders
from data.notes import note
from data.tables import sort_classes, to_files
from inference.errors import Problem, problems
from inference.finding import is_image, is_visible, walk
from inference.formats import HEIF_HINT, IMAGE_SUFFIXES, SUFFIXES
from inference.lists import LIST_SUFFIXES

SPLIT_WORDS = {"train": "training", "val": "validation", "test": "test"}
# The only folder in a split folder whose images have no labels.
UNLABELLED = (["images"], ["test"], ["unknown"], ["unlabeled"], ["unlabelled"])
# The least class folders beside train/ that make it one, too: a single one may be anything.
CLASSES_BESIDE_TRAIN = 2
# The folders of torchvision's datasets, and their names here.
TORCHVISION = {
    "MNIST": "mnist",
    "FashionMNIST": "fashion-mnist",
    "KMNIST": "kmnist",
    "cifar-10-batches-py": "cifar10",
    "cifar-100-python": "cifar100",
}


@dataclass(frozen=True)
class ClassFolders:
    """What the class folders of one directory hold."""

    classes: list[str]  # in order
    paths: list[str]  # of the images, class by class
    labels: np.ndarray  # int64 [images], index into `classes`
    groups: list[str]  # of each image, the first folder below its class, or empty
    skipped: list[str]  # the other files

    def files(self, root: str, labels: np.ndarray) -> Files:
        """The images as the files of a split of the data in `root`, with the labels it has."""
        return Files(root=root, paths=self.paths, labels=labels, groups=self.groups)


def list_folder(
    directory: str, options: Options | None = None
) -> tuple[list[str], dict[str, Files]]:
    """The classes and the splits of DIR/<class>/*, or of DIR/train/<class>/* and so on.

    A list inside the directory may tell the labels instead: see data/layouts.py. Raises Problem.
    """
    options = options or Options()
    refuse_missing(directory)
    if not os.path.isdir(directory):
        raise Problem(f"{directory} is a file: --dataset csv reads a list of images", 2)

    directory = without_extra_folder(directory)
    note_dead_links(directory)
    folders = {}
    for split, folder in find_splits(directory).items():
        folders[split] = without_extra_folder(folder)
        note_dead_links(folders[split])

    has_class_folders = has_classes(folders.get("train", directory))
    annotated = list_annotated(directory, folders, options, has_class_folders)
    if annotated is not None:
        return annotated

    for option, name in (("image", options.image_column), ("label", options.label_column)):
        if name is not None:
            raise Problem(f"{directory} has no list: leave out --{option}-column", 2)
    return list_class_folders(directory, folders, options)


def list_class_folders(
    directory: str, folders: dict[str, str], options: Options
) -> tuple[list[str], dict[str, Files]]:
    """The classes and the splits of class folders; `folders` are those of the splits, if any.

    Raises Problem.
    """
    train = list_classes(folders.get("train", directory), least=2, known=options.classes)
    splits = {"train": train.files(directory, train.labels)}
    skipped = list(train.skipped)

    for split in ("val", "test"):
        if split not in folders:
            continue
        folder = folders[split]
        rows = list_annotations(folder)
        if rows is not None:
            splits[split] = to_files(rows, train.classes, folder, directory)
        elif is_unlabelled(folder):
            count = count_of(sum(1 for _ in files_below(folder)), "file")
            note(f"{folder} ({count}) has no class folders, and so no labels: it is not used")
        else:
            found = list_classes(folder, least=1)
            labels = labels_of_training(found, train, folder, folders["train"])
            splits[split] = found.files(directory, labels)
            skipped += found.skipped

    if skipped:
        note_skipped(directory, skipped)
    return train.classes, splits


def without_extra_folder(directory: str) -> str:
    """The directory, or that in it which has the same name and is all there is: a zip's."""
    name = os.path.basename(os.path.abspath(directory))
    with problems(f"cannot read {directory}", OSError):
        entries = [entry for entry in os.listdir(directory) if is_visible(entry)]
    inner = os.path.join(directory, entries[0]) if len(entries) == 1 else ""
    if not os.path.isdir(inner) or entries[0].lower() != name.lower():
        return directory

    note(f"reading {inner}, which is all that {directory} holds")
    return without_extra_folder(inner)


def is_unlabelled(folder: str) -> bool:
    """Has a split folder images, but no folders that tell their classes?"""
    names = subfolders(folder)
    return not names or [name.lower() for name in names] in UNLABELLED


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

    if list(found) == ["train"] and is_class(found["train"], directory, others):
        name = os.path.basename(found["train"])
        note(
            f"{name}/ of {directory} holds images and no folders: it is taken as a class, as are "
            f"{name_some(f'{other}/' for other in others)}"
        )
        return {}

    if others:
        used = ", ".join(f"{os.path.basename(path)}/" for path in found.values())
        note(f"{directory} is split into {used}; not used: {name_some(others)}")
    return found


def is_class(folder: str, directory: str, others: list[str]) -> bool:
    """Is a folder called train, the only split folder, a class beside the classes `others`?

    A training split of images only has a list that tells their labels.
    """
    if subfolders(folder) or way_out_by_list(directory) or way_out_by_list(folder):
        return False
    for name in others:
        if any(split_called(word) for word in re.split(r"[\W_]+", name)):
            return False

    filled = [name for name in others if has_image_name(os.path.join(directory, name))]
    return has_image_name(folder) and len(filled) >= CLASSES_BESIDE_TRAIN


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


def list_classes(directory: str, least: int, known: list[str] | None = None) -> ClassFolders:
    """What the class folders of a directory hold, `least` classes or more.

    known: the classes of an earlier run, in its order. Raises Problem.
    """
    classes = sort_classes(set(subfolders(directory)), known)
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

    # One folder in each class, such as images/, holds all there is, and groups nothing.
    if len(set(groups)) == 1:
        groups = [""] * len(paths)

    labels = np.repeat(np.arange(len(classes), dtype=np.int64), counts)
    warn_of_shared_folders(classes, paths, labels)
    return ClassFolders(classes=classes, paths=paths, labels=labels, groups=groups, skipped=skipped)


def folder_below(folder: str, path: str) -> str:
    """The name of the first folder on the way from a folder to a file in it; empty if none is."""
    way = path.removeprefix(os.path.join(folder, "")).split(os.sep)
    return way[0] if len(way) > 1 else ""


def check_classes(directory: str, classes: list[str], least: int) -> None:
    """Raise Problem if there are too few class folders, or if an exported file cannot name them."""
    refuse_torchvision(directory, classes)
    if not classes:
        raise Problem(
            f"{directory} has no class folders: put the images of each class into a folder "
            f"named after the class{way_out_by_list(directory)}"
        )

    if len(classes) < least:
        way_out = f"classification needs at least two{way_out_by_list(directory)}"
        inner = find_below(os.path.join(directory, classes[0]))
        if inner is not None:
            way_out = f"give --data-dir {inner}"
        raise Problem(f"{directory} has only one class folder, {classes[0]!r}: {way_out}")

    refuse_renamed_splits(directory, classes)
    for name in classes:
        # Bytes of a name that are no UTF-8 arrive as surrogates, which no exported file can hold.
        if name != name.encode(errors="ignore").decode():
            folder = os.path.join(directory, name)
            raise Problem(f"the name of the class folder {folder} is not UTF-8: rename it")


def refuse_torchvision(directory: str, names: list[str]) -> None:
    """Raise Problem if a directory holds one of torchvision's datasets, and no class folders."""
    for folder, dataset in TORCHVISION.items():
        if folder in names and not has_classes(directory):
            raise Problem(f"{directory} holds {folder}/ of torchvision: add --dataset {dataset}", 2)


def refuse_renamed_splits(directory: str, classes: list[str]) -> None:
    """Raise Problem if the class folders are splits by other names, such as seg_train/ and
    seg_test/, which have class folders of their own."""
    splits = {}
    for name in classes:
        for word in re.split(r"[\W_]+", name):
            if split_called(word) and subfolders(os.path.join(directory, name)):
                splits.setdefault(split_called(word), name)

    if "train" in splits and len(splits) > 1:
        renamed = " and ".join(f"{name}/ {split}/" for split, name in splits.items())
        raise Problem(f"the folders of {directory} look like splits, not classes: call {renamed}")


def way_out_by_list(directory: str) -> str:
    """What to type if a directory without class folders has lists; empty if it has none."""
    lists = {}
    for name in sorted(os.listdir(directory)):
        stem, suffix = os.path.splitext(name.lower())
        if suffix in LIST_SUFFIXES and is_visible(name):
            words = re.split(r"[\W_]+", stem)
            splits = [split_called(word) for word in words if split_called(word)]
            lists.setdefault(splits[0] if splits else "any", os.path.join(directory, name))

    train = lists.get("train", lists.get("any"))
    if train is None:
        return ""
    test = lists.get("test", lists.get("val")) if "train" in lists else None
    more = f", with --test-csv {test} if that has labels" if test else ""
    return f"; or, if it lists them, give --data-dir {train}{more}"


def find_below(folder: str) -> str | None:
    """The folder that holds a dataset, below folders that each hold only the next; or None."""
    while not has_classes(folder):
        names = subfolders(folder)
        if len(names) != 1:
            return None
        folder = os.path.join(folder, names[0])
    return folder


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
    """Are there two or more class folders with images in them, perhaps in a training folder?

    Only names are read, for speed.
    """
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
    """Is there a file with an image's suffix in a folder?"""
    return any(path.lower().endswith(IMAGE_SUFFIXES) for path in files_below(folder))


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
