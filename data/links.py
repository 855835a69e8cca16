"""Links among class folders: those that lead nowhere, and those that put images in two classes."""

import os

import numpy as np

from data.files import count_of, name_some
from data.notes import note, warn
from inference.errors import problems
from inference.finding import is_visible


def note_dead_links(directory: str) -> None:
    """Note the links in a directory that lead nowhere: one may be a class that is missing."""
    dead = []
    with problems(f"cannot read {directory}", OSError), os.scandir(directory) as entries:
        for entry in entries:
            if entry.is_symlink() and is_visible(entry.name) and not os.path.exists(entry.path):
                dead.append(f"{entry.name} -> {os.readlink(entry.path)}")

    if dead:
        count = count_of(len(dead), "link")
        note(f"{count} in {directory} not used, leading nowhere: {name_some(sorted(dead))}")


def warn_of_shared_folders(classes: list[str], paths: list[str], labels: np.ndarray) -> None:
    """Warn of images that are in two classes because one has a link to a folder of the other.

    labels: of the images of these paths, int64 [n], index into `classes`.
    """
    first = {}  # by the real folder: the first class that has it
    real = {}  # by the folder of a path, for speed
    shared = {}  # by a pair of classes: the number of images
    for path, label in zip(paths, labels.tolist(), strict=True):
        folder = os.path.dirname(path)
        if folder not in real:
            real[folder] = os.path.realpath(folder)
        owner = first.setdefault(real[folder], label)
        if owner != label:
            shared[owner, label] = shared.get((owner, label), 0) + 1

    for (owner, label), count in shared.items():
        warn(
            f"{count_of(count, 'image')} in class {classes[owner]!r} and in class "
            f"{classes[label]!r}, through a link to a folder: remove the link, as an image has "
            "one class here"
        )
