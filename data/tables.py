"""CSV lists: the path of an image, its label, and perhaps its split in each row."""

import csv
import os

import numpy as np

from data.dataset import SPLITS
from data.files import Files, Options, split_called
from data.notes import note
from inference.errors import Problem, problems

COLUMNS = {"image": ("filepath", "filename", "path", "image"), "label": ("label", "class", "target")}
SPLIT_COLUMN = "split"


def list_csv(file: str, options: Options) -> tuple[list[str], dict[str, Files]]:
    """The classes and the splits, train unless it says, of a CSV file and of --test-csv. Raises Problem."""
    rows, sources = read_images(file, options, "train"), {}
    if "train" not in rows:
        raise Problem(f"{file} has no row whose {SPLIT_COLUMN} is train")
    if options.test_csv is not None:
        if "test" in rows:
            raise Problem(f"{file} has rows whose {SPLIT_COLUMN} is test: leave out --test-csv", 2)
        tested = read_images(options.test_csv, options, "test")
        if set(tested) != {"test"}:
            raise Problem(f"{options.test_csv} has rows whose {SPLIT_COLUMN} is not test", 2)
        rows, sources = rows | tested, {"test": options.test_csv}
    names = {label for _, label in rows["train"]}
    numbers = all(name.removeprefix("-").isdecimal() and len(name) < 20 for name in names)
    classes = sorted(names, key=int if numbers else None)
    if len(classes) < 2:
        raise Problem(f"{file} has one class only, {classes[0]!r}: classification needs two or more")
    splits, index = {}, {name: label for label, name in enumerate(classes)}
    for split in filter(rows.get, SPLITS):
        source, (paths, names) = sources.get(split, file), zip(*rows[split], strict=True)
        unknown = [name for name in names if name not in index]
        if unknown:
            raise Problem(f"{source} has a label {unknown[0]!r} that no training image has")
        labels = np.array([index[name] for name in names], np.int64)
        splits[split] = Files(options.image_root or os.path.dirname(source), list(paths), labels)
    return classes, splits


def read_images(file: str, options: Options, default: str) -> dict[str, list[tuple[str, str]]]:
    """The rows (path, label) by split, all `default` if the file does not say. Raises Problem."""
    lines = read_lines(file)
    header = [name.strip() for name in lines[0]]
    columns = find_columns(file, header, options)
    rows, incomplete, root = {}, [], options.image_root or os.path.dirname(file)
    for number, cells in enumerate(lines[1:], start=2):
        if not any(cells):
            continue
        if len(cells) != len(header):
            raise Problem(f"{file}, row {number}: expected {len(header)} fields, got {cells}")
        image, label, *named = (cells[column].strip() for column in columns)
        if not all((image, label, *named)):
            incomplete.append(number)
            continue
        split = split_called(named[0]) if named else default
        if split is None:
            raise Problem(f"{file}, row {number}: {SPLIT_COLUMN} {named[0]!r} is none of train, val and test")
        path = os.path.join(root, image)
        if "\\" in image and not os.path.lexists(path):  # it separates folders here, too
            path = os.path.join(root, image.replace("\\", "/"))
        rows.setdefault(split, []).append((path, label))
    if incomplete:
        count = f"{len(incomplete):,} row{'s' if len(incomplete) > 1 else ''} of {file}"
        reason = f"without an image, a label or a split, the first: row {incomplete[0]}"
        if options.strict:
            raise Problem(f"{count} {reason}; --strict was given: fill in or remove them")
        note(f"left out: {count} {reason}")
    if not rows:
        raise Problem(f"{file} lists no images below its first line")
    for column in columns[2:]:
        counts = ", ".join(f"{len(rows[split]):,} {split}" for split in filter(rows.get, SPLITS))
        note(f"the column {header[column]!r} of {file} says which split a row is in: {counts}")
    return rows


def read_lines(file: str) -> list[list[str]]:
    """The lines of a UTF-8 file separated by commas, semicolons or tabs; at least one. Raises Problem."""
    form = "{}: {}; --dataset csv takes --data-dir FILE.csv"
    unreadable = problems(f"cannot read {file}", OSError, 2, form)
    malformed = problems(f"{file} is not a CSV file", csv.Error)
    try:
        with unreadable, malformed, open(file, newline="", encoding="utf-8-sig") as stream:
            first = stream.readline()
            delimiter = max(",;\t", key=first.count)
            stream.seek(0)
            lines = list(csv.reader(stream, delimiter=delimiter, strict=True))
    except UnicodeDecodeError as error:
        reason = f"{error.reason} at byte {error.start}"
        raise Problem(f"{file} is not UTF-8 text ({reason}): save it as CSV UTF-8") from None
    if not lines:
        raise Problem(f"{file} is empty: its first line must name the columns, path and label")
    return lines


def find_columns(file: str, header: list[str], options: Options) -> list[int]:
    """Where the image, the label and, if the file has it, the split are. Raises Problem."""
    if len(set(header)) < len(header):
        twice = next(name for name in header if header.count(name) > 1)
        raise Problem(f"{file} names the column {twice!r} twice in its first line")
    lower, columns = [name.lower() for name in header], []
    for kind, usual in COLUMNS.items():
        given = getattr(options, f"{kind}_column")
        found = [lower.index(name) for name in ([given.lower()] if given else usual) if name in lower]
        if not found:
            wanted, has = repr(given) if given else " or ".join(usual), ", ".join(header) or "none"
            raise Problem(f"{file} has no column {wanted}, it has {has}; name one with --{kind}-column")
        columns.append(found[0])
    splits = [i for i, name in enumerate(lower) if name == SPLIT_COLUMN and i not in columns]
    return [*columns, *splits[:1]]
