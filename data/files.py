"""Images of one's own: class folders or a CSV list -> the paths and labels of a training and a test split."""

import csv
import os

import numpy as np

from step3_infer import IMAGE_SUFFIXES, Problem, say

TEST_FRACTION = 0.2  # held out where the data comes without a test split
IMAGE_COLUMNS = ("filepath", "filename", "path", "image")
LABEL_COLUMNS = ("label", "class", "target")


def stratified(labels, fraction, seed):
    """Choose `fraction` of every class at random: bool [N]. A class of two or more gives at least one and keeps one."""
    rng, chosen = np.random.default_rng(seed), np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        count = min(max(round(len(members) * fraction), 1), len(members) - 1)
        chosen[rng.permutation(members)[:count]] = True
    return chosen


def list_folder(directory):
    """DIR/train/<class>/* with DIR/test (or val)/<class>/*, or only DIR/<class>/*.

    -> (classes, train, test), a split being (paths, labels int64 [N]). Raises Problem.
    """
    if not os.path.isdir(directory):
        raise Problem(
            f"no directory {directory}: --dataset folder reads DIR/train/<class>/* or DIR/<class>/*", 2
        )
    if not os.path.isdir(os.path.join(directory, "train")):
        classes, split = list_classes(directory)
        return classes, *split_off_test(split)
    classes, train = list_classes(os.path.join(directory, "train"))
    held_out = [name for name in ("test", "val") if os.path.isdir(os.path.join(directory, name))]
    if not held_out:
        return classes, *split_off_test(train)
    if len(held_out) == 2:
        say(
            f"note: {directory} has test/ and val/; test/ is the test split, val/ is not used (see --val-fraction)"
        )
    test_classes, (paths, labels) = list_classes(os.path.join(directory, held_out[0]))
    unknown = [name for name in test_classes if name not in classes]
    if unknown:
        raise Problem(
            f"{os.path.join(directory, held_out[0])} has a class {unknown[0]!r} that train/ has not"
        )
    index = np.array([classes.index(name) for name in test_classes], dtype=np.int64)
    return classes, train, (paths, index[labels])


def refuse(error):
    """What os.walk does with a directory that it cannot read, instead of passing over it in silence."""
    raise Problem(f"cannot read {error.filename}: {error.strerror}")


def list_classes(directory):
    """One class per folder, in name order, its images found recursively. -> (classes, (paths, labels))."""
    try:
        classes = sorted(e.name for e in os.scandir(directory) if not e.name.startswith(".") and e.is_dir())
    except OSError as error:
        refuse(error)
    if not classes:
        raise Problem(
            f"{directory} has no class folders: put the images of each class into a folder of its name"
        )
    if len(classes) == 1:
        raise Problem(
            f"{directory} has one class folder only, {classes[0]!r}: classification needs two or more"
        )
    paths, labels = [], []
    for label, name in enumerate(classes):
        before = len(paths)
        for root, subdirectories, files in os.walk(os.path.join(directory, name), onerror=refuse):
            subdirectories.sort()
            paths += [
                os.path.join(root, file) for file in sorted(files) if file.lower().endswith(IMAGE_SUFFIXES)
            ]
        if len(paths) == before:
            raise Problem(f"class folder {os.path.join(directory, name)} has no images: fill it or remove it")
        labels += [label] * (len(paths) - before)
    return classes, (paths, np.array(labels, dtype=np.int64))


def split_off_test(split):
    """Hold out a stratified test split, the same at every run whatever its --seed, and say so."""
    paths, labels = split
    held = stratified(labels, TEST_FRACTION, seed=0)
    count = f"{held.sum():,} of {len(paths):,} images"
    say(
        f"note: no test split given: {count} held out for it, {TEST_FRACTION:.0%} of each class (at least one)"
    )
    parts = [([paths[i] for i in np.flatnonzero(mask)], labels[mask]) for mask in (~held, held)]
    return parts[0], parts[1]


def list_csv(file, test_csv=None, image_root=None, image_column=None, label_column=None):
    """The images that a CSV file lists, paths relative to it or to `image_root`; returns as list_folder does."""
    columns = (image_column, label_column)
    paths, names = read_csv(file, image_root, *columns)
    numbers = all(name.removeprefix("-").isdecimal() and len(name) < 20 for name in names)
    classes = sorted(set(names), key=int if numbers else None)
    if len(classes) < 2:
        raise Problem(f"{file} has one class only, {classes[0]!r}: classification needs two or more")
    index = {name: label for label, name in enumerate(classes)}
    train = paths, np.array([index[name] for name in names], dtype=np.int64)
    if test_csv is None:
        return classes, *split_off_test(train)
    paths, names = read_csv(test_csv, image_root, *columns)
    unknown = [name for name in names if name not in index]
    if unknown:
        raise Problem(f"{test_csv} has a label {unknown[0]!r} that {file} has not")
    return classes, train, (paths, np.array([index[name] for name in names], dtype=np.int64))


def read_csv(file, image_root, image_column, label_column):
    """-> (paths, labels as text) of the rows of one CSV file. Raises Problem."""
    root = image_root or os.path.dirname(file)
    try:
        with open(file, newline="", encoding="utf-8-sig") as stream:
            first = stream.readline()
            delimiter = max(",;\t", key=first.count)
            stream.seek(0)
            rows = list(csv.reader(stream, delimiter=delimiter, strict=True))
    except UnicodeDecodeError as error:
        raise Problem(
            f"{file} is not UTF-8 text ({error.reason} at byte {error.start}): save it as CSV UTF-8"
        ) from None
    except csv.Error as error:
        raise Problem(f"{file} is not a CSV file: {error}") from None
    except OSError as error:
        hint = "--dataset csv takes --data-dir FILE.csv"
        raise Problem(f"cannot read {file}: {error.strerror}; {hint}", 2) from None
    if not rows:
        raise Problem(f"{file} is empty: its first line names the columns, path and label")
    header = [name.strip() for name in rows[0]]
    if len(set(header)) < len(header):
        twice = next(name for name in header if header.count(name) > 1)
        raise Problem(f"{file} names the column {twice!r} twice in its first line")
    at_image = find_column(file, header, image_column, IMAGE_COLUMNS, "--image-column")
    at_label = find_column(file, header, label_column, LABEL_COLUMNS, "--label-column")
    paths, labels = [], []
    for line, row in enumerate(rows[1:], start=2):
        if not any(row):
            continue
        if len(row) != len(header) or not row[at_image].strip() or not row[at_label].strip():
            raise Problem(
                f"{file}, row {line}: expected {len(header)} fields with an image and a label, got {row}"
            )
        paths.append(os.path.join(root, row[at_image].strip()))
        labels.append(row[at_label].strip())
    if not paths:
        raise Problem(f"{file} lists no images below its first line")
    return paths, labels


def find_column(file, header, given, usual, option):
    """The index of a column: the one given, else the first of the usual names that the header has."""
    lower = [name.lower() for name in header]
    for name in [given.lower()] if given else usual:
        if name in lower:
            return lower.index(name)
    wanted = repr(given) if given else " or ".join(usual)
    raise Problem(
        f"{file} has no column {wanted}, it has {', '.join(header) or 'none'}; name one with {option}"
    )
