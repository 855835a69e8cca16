"""Lists of images: the path of an image, its label, and perhaps its split in each row."""

import os
from dataclasses import dataclass, replace

import numpy as np

from data.columns import FLAGS, ONE_HOT, Columns, find_columns
from data.dataset import SPLITS
from data.files import Files, Options, count_of, name_some, refuse_missing, split_called
from data.lookup import Lookup
from data.multilabel import refuse_several_labels
from data.notes import note, warn
from data.texts import read_table
from inference.errors import Problem
from inference.lists import Table
from inference.spec import MAX_NAME

LONGEST_NUMBER = 20  # characters of a label that is still sorted as a number
NOT_A_NUMBER = "nan"  # what programs write for a label that is missing


@dataclass(frozen=True)
class Row:
    """What one row of a list says."""

    path: str
    label: str
    split: str
    group: str = ""


def list_csv(file: str, options: Options) -> tuple[list[str], dict[str, Files]]:
    """The classes and the splits of a list and of --test-csv; rows are for training by default.

    Raises Problem.
    """
    if options.test_csv is not None:
        refuse_missing(options.test_csv, hint="--test-csv takes a list, as a CSV file")

    rows = read_images(file, options, default="train")
    if "train" not in rows:
        raise Problem(f"{file} has no row whose split is train")
    sources = dict.fromkeys(rows, file)

    if options.test_csv is not None:
        if "test" in rows:
            raise Problem(f"{file} has rows whose split is test: leave out --test-csv", 2)
        rows["test"] = read_test_images(options)
        sources["test"] = options.test_csv

    roots = {split: root_of(source, options) for split, source in sources.items()}
    return list_rows(rows, sources, roots, options)


def list_rows(
    rows: dict[str, list[Row]],
    sources: dict[str, str],
    roots: dict[str, str],
    options: Options,
) -> tuple[list[str], dict[str, Files]]:
    """The classes and the splits of rows by split; sources: the list that each split is from.

    roots: the folder that the paths of each split are below. Raises Problem.
    """
    rows = with_whole_numbers(rows, options.classes)
    classes = sort_classes({row.label for row in rows["train"]}, options.classes)
    if len(classes) < 2:
        source = sources["train"]
        raise Problem(f"{source} has only one class, {classes[0]!r}: classification needs two")

    splits = {}
    for split in SPLITS:
        if split in rows:
            splits[split] = to_files(rows[split], classes, sources[split], roots[split])
    return classes, splits


def root_of(file: str, options: Options) -> str:
    """The folder that the paths in a list are relative to."""
    return options.image_root or os.path.dirname(file)


def read_test_images(options: Options) -> list[Row]:
    """The rows of --test-csv. Raises Problem if one of them is for another split."""
    rows = read_images(options.test_csv, options, default="test")
    if set(rows) != {"test"}:
        raise Problem(f"{options.test_csv} has rows whose split is not test", 2)
    return rows["test"]


# ------------------------------------------------------------------------------------------ classes
def sort_classes(names: set[str], known: list[str] | None = None) -> list[str]:
    """The classes in order: by value if all are whole numbers, otherwise as text.

    known: the classes of an earlier run, whose order is kept if they are the same.
    """
    if known is not None and len(known) == len(names) and set(known) == names:
        return list(known)

    # isdecimal() also holds for digits of other scripts, which int() reads.
    def is_whole(name: str) -> bool:
        return name.removeprefix("-").isdecimal() and len(name) < LONGEST_NUMBER

    if all(map(is_whole, names)):
        return sorted(names, key=lambda name: (int(name), name))
    return sorted(names)


def with_whole_numbers(rows: dict[str, list[Row]], known: list[str] | None) -> dict[str, list[Row]]:
    """The rows with labels such as 2.0 as 2, if all labels are whole numbers.

    A table gets such labels where one of them was missing. known: the classes of an earlier run,
    which may have kept them.
    """
    labels = {row.label for split in rows.values() for row in split}
    if known is not None and labels <= set(known):
        return rows

    whole = {}
    for label in labels:
        number, point, zeros = label.partition(".")
        if not number.removeprefix("-").isdecimal() or zeros.strip("0") or (point and not zeros):
            return rows
        whole[label] = number
    if all(label == number for label, number in whole.items()):
        return rows

    tidied = {}
    for split, listed in rows.items():
        tidied[split] = [replace(row, label=whole[row.label]) for row in listed]
    return tidied


def to_files(rows: list[Row], classes: list[str], source: str, root: str) -> Files:
    """The files of one split, which `source` lists. Raises Problem for an unknown label."""
    numbers = {name: number for number, name in enumerate(classes)}

    paths = []
    labels = []
    groups = []
    for row in rows:
        if len(row.label) > MAX_NAME:
            shown = repr(row.label[:MAX_NAME])
            raise Problem(f"{source} has a label of more than {MAX_NAME} characters: {shown}...")
        if row.label not in numbers:
            raise Problem(f"{source} has a label {row.label!r} that no training image has")
        paths.append(row.path)
        labels.append(numbers[row.label])
        groups.append(row.group)

    return Files(root=root, paths=paths, labels=np.array(labels, np.int64), groups=groups)


# ------------------------------------------------------------------------------------------- rows
def read_images(
    file: str, options: Options, default: str, root: str | None = None
) -> dict[str, list[Row]]:
    """The rows of a list by split, all `default` if it does not say.

    root: the folder that paths are relative to, if not the usual one. Raises Problem.
    """
    root = root or root_of(file, options)
    table = read_table(file, root)
    columns = find_columns(table, options)
    if columns.one_hot:
        refuse_several_classes(table, columns)
    refuse_several_labels(table, columns, options)

    listed = []
    incomplete = []
    for number, cells in table.rows:
        if not any(cells):  # spreadsheets like to end with empty rows
            continue
        place = f"{file}, row {number}"
        check_length(table, cells, place)

        row = read_row(table, cells, columns, default, place, options.classes)
        if row is None:
            incomplete.append(number)
        else:
            listed.append(row)

    if incomplete:
        report_incomplete(file, incomplete, options.strict)
    if not listed:
        raise Problem(f"{file} lists no images below its first line")

    rows = with_places(file, listed, root, options)
    note_outside(file, root, rows)
    note_repeated(file, rows)
    if columns.split is not None:
        note_splits(file, table.header[columns.split], rows)
    return rows


def with_places(file: str, listed: list[Row], root: str, options: Options) -> dict[str, list[Row]]:
    """The rows by split, with the paths of their files instead of what the list says."""
    texts = [row.path for row in listed]
    paths = Lookup(root, options).find_all(file, texts)

    rows = {}
    for row, path in zip(listed, paths, strict=True):
        rows.setdefault(row.split, []).append(replace(row, path=path))
    return rows


def check_length(table: Table, cells: list[str], place: str) -> None:
    """Raise Problem if a row has not as many cells as there are columns; empty ones may follow."""
    expected = len(table.header or table.rows[0][1])
    if len(cells) < expected or any(cells[expected:]):
        raise Problem(f"{place}: expected {expected} fields, got {cells}")


def read_row(
    table: Table,
    cells: list[str],
    columns: Columns,
    default: str,
    place: str,
    known: list[str] | None,
) -> Row | None:
    """What a row says; None if its image, its label or its split is empty.

    place: of the row, for messages. known: the classes of an earlier run, one of which may be
    called "nan". Raises Problem for a split of an unknown name.
    """
    image = cells[columns.image].strip()
    label = label_of(table, cells, columns)
    if label.startswith(("[", "{")) and table.is_json():
        raise Problem(f"{place}: the label is {label}, and an image has one class here")
    if label.lower() == NOT_A_NUMBER and label not in (known or ()):
        label = ""
    if not image or not label:
        return None

    split = default
    if columns.split is not None:
        split = split_of(cells[columns.split].strip(), columns, place)
        if split is None:
            return None

    group = "" if columns.group is None else cells[columns.group].strip()
    return Row(path=image, label=label, split=split, group=group)


def label_of(table: Table, cells: list[str], columns: Columns) -> str:
    """The label of a row; empty if it has none."""
    if not columns.one_hot:
        return cells[columns.label].strip()
    marked = marked_classes(cells, columns)
    return table.header[marked[0]] if marked else ""


def split_of(name: str, columns: Columns, place: str) -> str | None:
    """The split that a cell tells; None if it is empty. Raises Problem for an unknown name."""
    if not name:
        return None
    if columns.flag is not None:
        if_true, if_false = columns.flag
        return if_true if FLAGS[name.lower()] else if_false

    split = split_called(name)
    if split is None:
        raise Problem(f"{place}: split {name!r} is none of train, val and test")
    return split


def marked_classes(cells: list[str], columns: Columns) -> list[int]:
    """The columns of the classes that a row of zeros and ones marks."""
    return [column for column in columns.one_hot if ONE_HOT[cells[column].strip().lower()]]


def refuse_several_classes(table: Table, columns: Columns) -> None:
    """Raise Problem if a row of zeros and ones marks more than one class."""
    several = []
    for number, cells in table.rows:
        if len(cells) >= len(table.header):
            marked = marked_classes(cells, columns)
            if len(marked) > 1:
                several.append((number, marked))
    if not several:
        return

    number, marked = several[0]
    names = name_some(table.header[column] for column in marked)
    raise Problem(
        f"{count_of(len(several), 'row')} of {table.file} of {len(table.rows):,} have more than "
        f"one class, the first: row {number} ({names}). An image has one class here: remove these "
        "rows, or write a column label yourself"
    )


# ------------------------------------------------------------------------------------------- notes
def note_outside(file: str, root: str, rows: dict[str, list[Row]]) -> None:
    """Note the paths that lead out of `root` by their text: they may be what nobody expects."""
    folder = os.path.join(os.path.abspath(root), "")
    outside = []
    for split in rows.values():
        for row in split:
            if not os.path.abspath(row.path).startswith(folder):
                outside.append(row.path)

    if outside:
        count = count_of(len(outside), "image")
        note(f"{file} lists {count} outside {folder}, the first: {outside[0]}")


def note_repeated(file: str, rows: dict[str, list[Row]]) -> None:
    """Note the rows whose file an earlier row has, and warn of those with another label."""
    labels = {}  # by path, of the first row with it
    repeated = []
    contradicting = {}  # by path: both labels
    for split in rows.values():
        for row in split:
            if row.path not in labels:
                labels[row.path] = row.label
                continue

            repeated.append(row.path)
            label = labels[row.path]
            if label != row.label:
                contradicting.setdefault(row.path, f"{row.path} ({label}, {row.label})")

    if repeated:
        names = name_some(dict.fromkeys(repeated))
        note(f"rows of {file} that name a file again: {len(repeated):,} ({names})")
    if contradicting:
        count = count_of(len(contradicting), "file")
        warn(f"{file} gives {count} more than one label: {name_some(contradicting.values())}")


def report_incomplete(file: str, incomplete: list[int], strict: bool) -> None:
    """Note the rows, by number, in which something is missing. Raises Problem if `strict`."""
    rows = f"{count_of(len(incomplete), 'row')} of {file}"
    missing = f"without an image, a label or a split, the first: row {incomplete[0]}"
    if strict:
        raise Problem(f"{rows} {missing}; --strict was given: fill in or remove them")
    note(f"skipped {rows} {missing}")


def note_splits(file: str, column: str, rows: dict[str, list[Row]]) -> None:
    """Note how many rows the split column puts into each split."""
    counts = []
    for split in SPLITS:
        if split in rows:
            counts.append(f"{len(rows[split]):,} {split}")
    note(f"the column {column!r} of {file} says which split a row is in: {', '.join(counts)}")
