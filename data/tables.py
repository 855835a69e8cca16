"""CSV lists: the path of an image and its label in each row."""

import csv
import os

import numpy as np

from data.files import Files, Listing, Options
from step3_infer import Problem

IMAGE_COLUMNS = ("filepath", "filename", "path", "image")
LABEL_COLUMNS = ("label", "class", "target")


def list_csv(file: str, options: Options) -> Listing:
    """The images that a CSV file lists; those of `options.test_csv` are the test split. Raises Problem."""
    paths, names = read_images(file, options)
    classes = sort_classes(set(names))
    if len(classes) < 2:
        raise Problem(f"{file} has one class only, {classes[0]!r}: classification needs two or more")
    splits = {"train": Files(paths, to_labels(names, classes))}
    if options.test_csv is not None:
        paths, names = read_images(options.test_csv, options)
        unknown = [name for name in names if name not in classes]
        if unknown:
            raise Problem(f"{options.test_csv} has a label {unknown[0]!r} that {file} does not have")
        splits["test"] = Files(paths, to_labels(names, classes))
    return Listing(classes, splits)


def sort_classes(names: set[str]) -> list[str]:
    """Sorted as numbers if all of them are whole numbers, otherwise as text."""
    numbers = all(name.removeprefix("-").isdecimal() and len(name) < 20 for name in names)
    return sorted(names, key=int if numbers else None)


def to_labels(names: list[str], classes: list[str]) -> np.ndarray:
    index = {name: label for label, name in enumerate(classes)}
    return np.array([index[name] for name in names], dtype=np.int64)


def read_images(file: str, options: Options) -> tuple[list[str], list[str]]:
    """The paths of the images and their labels as text. Raises Problem."""
    root = options.image_root or os.path.dirname(file)
    rows = read_rows(file)
    header = [name.strip() for name in rows[0]]
    if len(set(header)) < len(header):
        twice = next(name for name in header if header.count(name) > 1)
        raise Problem(f"{file} names the column {twice!r} twice in its first line")
    image_at = find_column(file, header, options.image_column, IMAGE_COLUMNS, "--image-column")
    label_at = find_column(file, header, options.label_column, LABEL_COLUMNS, "--label-column")
    paths, labels = [], []
    for line, row in enumerate(rows[1:], start=2):
        if not any(row):
            continue
        if len(row) != len(header) or not row[image_at].strip() or not row[label_at].strip():
            wanted = f"expected {len(header)} fields with an image and a label"
            raise Problem(f"{file}, row {line}: {wanted}, got {row}")
        paths.append(os.path.join(root, row[image_at].strip()))
        labels.append(row[label_at].strip())
    if not paths:
        raise Problem(f"{file} lists no images below its first line")
    return paths, labels


def read_rows(file: str) -> list[list[str]]:
    """The rows of a UTF-8 file separated by commas, semicolons or tabs; at least one. Raises Problem."""
    try:
        with open(file, newline="", encoding="utf-8-sig") as stream:
            first = stream.readline()
            delimiter = max(",;\t", key=first.count)
            stream.seek(0)
            rows = list(csv.reader(stream, delimiter=delimiter, strict=True))
    except UnicodeDecodeError as error:
        reason = f"{error.reason} at byte {error.start}"
        raise Problem(f"{file} is not UTF-8 text ({reason}): save it as CSV UTF-8") from None
    except csv.Error as error:
        raise Problem(f"{file} is not a CSV file: {error}") from None
    except OSError as error:
        hint = "--dataset csv takes --data-dir FILE.csv"
        raise Problem(f"cannot read {file}: {error.strerror}; {hint}", 2) from None
    if not rows:
        raise Problem(f"{file} is empty: its first line must name the columns, path and label")
    return rows


def find_column(file: str, header: list[str], given: str | None, usual: tuple[str, ...], option: str) -> int:
    """The index of the given column, or of the first of the usual names that the header has."""
    lower = [name.lower() for name in header]
    for name in [given.lower()] if given else usual:
        if name in lower:
            return lower.index(name)
    wanted = repr(given) if given else " or ".join(usual)
    raise Problem(
        f"{file} has no column {wanted}, it has {', '.join(header) or 'none'}; name one with {option}"
    )
