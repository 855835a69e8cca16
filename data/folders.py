"""Class folders: DIR/<class>/*, or DIR/train/<class>/* and DIR/test/<class>/*."""

import os

import numpy as np

from data.files import Files, Listing
from step3_infer import IMAGE_SUFFIXES, Problem, say


def list_folder(directory: str) -> Listing:
    """The images of DIR/train/<class>/* and DIR/test (or val)/<class>/*, or of DIR/<class>/* alone.

    Raises Problem.
    """
    if not os.path.isdir(directory):
        raise Problem(
            f"no directory {directory}: --dataset folder reads DIR/train/<class>/* or DIR/<class>/*", 2
        )
    if not os.path.isdir(os.path.join(directory, "train")):
        classes, train = list_classes(directory)
        return Listing(classes, {"train": train})
    classes, train = list_classes(os.path.join(directory, "train"))
    held_out = [name for name in ("test", "val") if os.path.isdir(os.path.join(directory, name))]
    if not held_out:
        return Listing(classes, {"train": train})
    if len(held_out) == 2:
        say(
            f"note: {directory} has test/ and val/; "
            "test/ is the test split, val/ is not used (see --val-fraction)"
        )
    test = list_split(os.path.join(directory, held_out[0]), classes)
    return Listing(classes, {"train": train, "test": test})


def list_split(directory: str, classes: list[str]) -> Files:
    """The images below a split's class folders, labelled by the classes of the training split."""
    names, files = list_classes(directory)
    unknown = [name for name in names if name not in classes]
    if unknown:
        raise Problem(f"{directory} has a class {unknown[0]!r} that the training split does not have")
    index = np.array([classes.index(name) for name in names], dtype=np.int64)
    return Files(files.paths, index[files.labels])


def list_classes(directory: str) -> tuple[list[str], Files]:
    """The class folders of a directory in the order of their names, and the images below them.

    Raises Problem.
    """
    classes = subfolders(directory)
    if not classes:
        raise Problem(
            f"{directory} has no class folders: put the images of each class into a folder of its name"
        )
    if len(classes) == 1:
        raise Problem(f"{directory} has only one class folder, {classes[0]!r}: classification needs two")
    paths, labels = [], []
    for label, name in enumerate(classes):
        found = list_images(os.path.join(directory, name))
        if not found:
            raise Problem(f"class folder {os.path.join(directory, name)} has no images: fill it or remove it")
        paths += found
        labels += [label] * len(found)
    return classes, Files(paths, np.array(labels, dtype=np.int64))


def subfolders(directory: str) -> list[str]:
    """The names of the folders in a directory that are not hidden, sorted. Raises Problem."""
    try:
        with os.scandir(directory) as entries:
            return sorted(e.name for e in entries if not e.name.startswith(".") and e.is_dir())
    except OSError as error:
        refuse(error)


def list_images(directory: str) -> list[str]:
    """The paths of the images below a directory, the files of a folder before those of its subfolders."""
    paths = []
    for folder, subdirectories, names in os.walk(directory, onerror=refuse):
        subdirectories.sort()
        images = sorted(name for name in names if name.lower().endswith(IMAGE_SUFFIXES))
        paths += [os.path.join(folder, name) for name in images]
    return paths


def refuse(error: OSError) -> None:
    """Stop at a directory that cannot be read, which os.walk would pass over in silence. Raises Problem."""
    raise Problem(f"cannot read {error.filename}: {error.strerror}")
