"""Your own images: listed, decoded, and checked to be enough to train on and to test on."""

import numpy as np

from data.cache import load_images, look_at_images
from data.dataset import Dataset
from data.files import Files, Options, name_some
from data.folders import list_folder
from data.groups import note_groups, note_parts, numbered, warn_shared, with_groups
from data.holdout import TEST_FRACTION, hold_out_test
from data.lookup import spelling
from data.notes import note, silenced
from data.stems import suggest_groups
from data.tables import list_csv
from inference.errors import Problem

FEW_TRAINING_IMAGES = 5  # a class with fewer is named in a note


def load_own(name: str, data_dir: str, options: Options) -> Dataset:
    """Load `folder` or `csv`. Raises Problem."""
    classes, listed = list_files(name, data_dir, options)
    note_alike(classes)
    listed = with_groups(listed, options.group_by)
    say_groups(name, listed, options)

    in_training = listed["train"]
    holds_out_test = "test" not in listed
    if holds_out_test:
        listed = hold_out_test(listed, data_dir)

    # The files of all splits share one cache, in the order of the splits.
    paths = [path for files in listed.values() for path in files.paths]
    decoded = load_images(paths, len(listed["train"]), data_dir, options)

    arrays = {}
    splits = {}
    fingerprint = {"classes": classes}
    first_file = 0
    first_image = 0  # unreadable files have no row in the cache

    for split, files in listed.items():
        readable = files.part(decoded.readable[first_file : first_file + len(files)])
        rows = slice(first_image, first_image + len(readable))

        splits[split] = readable
        fingerprint[split] = readable.fingerprint(decoded.sizes[rows])
        arrays[f"{split}_images"] = decoded.pixels[rows]
        arrays[f"{split}_labels"] = readable.labels

        first_file += len(files)
        first_image += len(readable)

    check_classes(data_dir, classes, in_training, splits["train"])
    check_splits(data_dir, listed, splits)
    groups = numbered(splits)
    if holds_out_test:
        note_held_out(data_dir, splits)
        if groups:
            parts = {split: (splits[split].labels, groups[split]) for split in ("train", "test")}
            note_parts(parts, classes, TEST_FRACTION)
    note_small_classes(classes, splits)

    return Dataset(
        name=name,
        classes=classes,
        white=decoded.target.white,
        ground=decoded.target.ground,
        fit=decoded.target.fit,
        unseen=decoded.target.unseen,
        fingerprint=fingerprint,
        paths={split: files.paths for split, files in splits.items()},
        groups=groups,
        **arrays,
    )


def survey_own(name: str, data_dir: str, options: Options) -> tuple[int, tuple[int, int]]:
    """How many training images `load_own` would load, and the size (height, width) they would get.

    Reads no more than the headers of the files, and says nothing. Raises Problem.
    """
    with silenced(True):
        _, listed = list_files(name, data_dir, options)
        listed = with_groups(listed, options.group_by)
        if "test" not in listed:
            listed = hold_out_test(listed, data_dir)
        paths = [path for files in listed.values() for path in files.paths]
        target = look_at_images(paths, len(listed["train"]), data_dir, options)
    return len(listed["train"]), target.image_size


def list_files(name: str, data_dir: str, options: Options) -> tuple[list[str], dict[str, Files]]:
    """The classes and the files of each split of `folder` or `csv`. Raises Problem."""
    if name == "folder":
        return list_folder(data_dir, options)
    return list_csv(data_dir, options)


def say_groups(name: str, listed: dict[str, Files], options: Options) -> None:
    """Say which images belong together, or may do so; warn of those in more than one split."""
    if listed["train"].groups is None:
        if options.group_by is None:
            suggest_groups(listed)
        return

    if options.group_by is not None:
        source = "--group-by"
    elif name == "csv":
        source = "by the column of groups"
    else:
        source = "the folders inside class folders; --group-by none undoes this"
    note_groups(listed, source)

    # Folders of one name in train/ and test/ may be called "batch1", and mean nothing.
    if name == "csv" or options.group_by is not None:
        warn_shared(listed)


def check_classes(data_dir: str, classes: list[str], listed: Files, train: Files) -> None:
    """Raise Problem if no file of a class can be read.

    listed: all files for training, before some were held out. train: the readable ones that remain.
    """
    counts = count_images(train, len(classes))
    if counts.min() == 0:
        label = counts.argmin()
        total = (listed.labels == label).sum()
        raise Problem(
            f"class {classes[label]!r} of {data_dir} has no readable image left to train on, "
            f"of {total} listed"
        )


def check_splits(data_dir: str, listed: dict[str, Files], splits: dict[str, Files]) -> None:
    """Raise Problem if no file of a split can be read.

    listed: all files by split. splits: the readable ones.
    """
    for split, files in splits.items():
        if len(files) == 0:
            total = len(listed[split])
            raise Problem(
                f"the {split} split of {data_dir} has no readable image left, of {total} listed"
            )


def note_alike(classes: list[str]) -> None:
    """Note classes whose names differ in case or spaces only, or end with a space: mistypes."""
    by_spelling = {}
    for name in classes:
        by_spelling.setdefault(spelling(" ".join(name.split())), []).append(name)

    odd = []
    for names in by_spelling.values():
        if len(names) > 1 or names[0] != names[0].strip():
            odd += names
    if odd:
        shown = ", ".join(map(repr, odd))
        note(f"class names that may be mistyped, each a class of its own: {shown}")


def note_held_out(data_dir: str, splits: dict[str, Files]) -> None:
    """Note why and how many images were held out of the training split."""
    if "val" in splits:
        reason = f"{data_dir} has a validation split, which chooses the epoch, but no test split"
    else:
        reason = "no test split given"

    held_out = len(splits["test"])
    total = held_out + len(splits["train"])
    how = "in whole groups" if splits["train"].groups else "at least one"
    note(
        f"{reason}: {held_out:,} of {total:,} training images held out for testing, "
        f"{TEST_FRACTION:.0%} of each class ({how})"
    )


def note_small_classes(classes: list[str], splits: dict[str, Files]) -> None:
    """Note the classes that have few training images."""
    train = count_images(splits["train"], len(classes))
    test = count_images(splits["test"], len(classes))

    small = []
    for name, train_count, test_count in zip(classes, train, test, strict=True):
        if train_count < FEW_TRAINING_IMAGES:
            small.append(f"{name!r} {train_count} (test {test_count})")

    if small:
        note(f"classes with few training images: {name_some(small)}")


def count_images(files: Files, classes: int) -> np.ndarray:
    """How many images of a split each class has: int64 [classes]."""
    return np.bincount(files.labels, minlength=classes)
