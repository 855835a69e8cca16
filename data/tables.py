"""CSV lists: the path of an image, its label, and perhaps its split in each row."""

import csv
import os
import re
import shlex
from dataclasses import dataclass

import numpy as np

from data.dataset import SPLITS
from data.files import Files, Options, count_of, split_called
from data.notes import note
from inference.errors import Problem, problems
from inference.spec import MAX_NAME

# The names of columns that are taken without --image-column and --label-column, the first found.
IMAGE_COLUMNS = ("filepath", "filename", "path", "image")
LABEL_COLUMNS = ("label", "class", "target")
GROUP_COLUMNS = ("group",)
# With one of these words, a column's name begins that probably tells which images belong together.
GROUP_WORDS = ("patient", "subject", "participant", "scene", "clip", "video", "session", "lesion")
SPLIT_COLUMN = "split"
LONGEST_NUMBER = 20  # characters of a label that is still sorted as a number


@dataclass(frozen=True)
class Columns:
    """Where in a row the image and the label are, and the split and the group if there are any."""

    image: int
    label: int
    split: int | None
    group: int | None


@dataclass(frozen=True)
class Row:
    """What one row of a CSV file says."""

    path: str
    label: str
    split: str
    group: str = ""


def list_csv(file: str, options: Options) -> tuple[list[str], dict[str, Files]]:
    """The classes and the splits of a CSV file and of --test-csv; rows are for training by default.

    Raises Problem.
    """
    rows = read_images(file, options, default="train")
    if "train" not in rows:
        raise Problem(f"{file} has no row whose {SPLIT_COLUMN} is train")
    sources = dict.fromkeys(rows, file)

    if options.test_csv is not None:
        if "test" in rows:
            raise Problem(f"{file} has rows whose {SPLIT_COLUMN} is test: leave out --test-csv", 2)
        rows["test"] = read_test_images(options)
        sources["test"] = options.test_csv

    classes = sort_classes({row.label for row in rows["train"]})
    if len(classes) < 2:
        raise Problem(f"{file} has only one class, {classes[0]!r}: classification needs two")

    splits = {}
    for split in SPLITS:
        if split in rows:
            splits[split] = to_files(rows[split], classes, sources[split], options)
    return classes, splits


def read_test_images(options: Options) -> list[Row]:
    """The rows of --test-csv. Raises Problem if one of them is for another split."""
    rows = read_images(options.test_csv, options, default="test")
    if set(rows) != {"test"}:
        raise Problem(f"{options.test_csv} has rows whose {SPLIT_COLUMN} is not test", 2)
    return rows["test"]


def sort_classes(names: set[str]) -> list[str]:
    """The classes in order: by value if all are whole numbers, otherwise as text."""

    # isdecimal() also holds for digits of other scripts, which int() reads.
    def is_number(name: str) -> bool:
        return name.removeprefix("-").isdecimal() and len(name) < LONGEST_NUMBER

    if all(is_number(name) for name in names):
        return sorted(names, key=int)
    return sorted(names)


def to_files(rows: list[Row], classes: list[str], source: str, options: Options) -> Files:
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

    root = options.image_root or os.path.dirname(source)
    return Files(root=root, paths=paths, labels=np.array(labels, np.int64), groups=groups)


def read_images(file: str, options: Options, default: str) -> dict[str, list[Row]]:
    """The rows by split, all `default` if the file does not say. Raises Problem."""
    lines = read_lines(file)
    header = [name.strip() for name in lines[0]]
    columns = find_columns(file, header, options)
    root = options.image_root or os.path.dirname(file)

    rows = {}
    incomplete = []
    for number, cells in enumerate(lines[1:], start=2):
        if not any(cells):  # spreadsheets like to end with empty rows
            continue
        place = f"{file}, row {number}"
        if len(cells) != len(header):
            raise Problem(f"{place}: expected {len(header)} fields, got {cells}")

        row = read_row(cells, columns, root, default, place)
        if row is None:
            incomplete.append(number)
        else:
            rows.setdefault(row.split, []).append(row)

    if incomplete:
        report_incomplete(file, incomplete, options.strict)
    note_outside(file, root, rows)
    if not rows:
        raise Problem(f"{file} lists no images below its first line")
    if columns.split is not None:
        note_splits(file, header[columns.split], rows)
    return rows


def read_row(
    cells: list[str],
    columns: Columns,
    root: str,
    default: str,
    place: str,
) -> Row | None:
    """What a row says; None if its image, its label or its split is empty.

    place: of the row, for messages. Raises Problem for a split of an unknown name.
    """
    image = cells[columns.image].strip()
    label = cells[columns.label].strip()
    if not image or not label:
        return None

    split = default
    if columns.split is not None:
        name = cells[columns.split].strip()
        if not name:
            return None
        split = split_called(name)
        if split is None:
            raise Problem(f"{place}: {SPLIT_COLUMN} {name!r} is none of train, val and test")

    group = "" if columns.group is None else cells[columns.group].strip()
    return Row(path=find_image(root, image), label=label, split=split, group=group)


def find_image(root: str, image: str) -> str:
    """The path of an image below `root`, where a list from Windows separates folders by \\."""
    path = os.path.join(root, image)
    if "\\" in image and not os.path.lexists(path):
        return os.path.join(root, image.replace("\\", "/"))
    return path


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


def read_lines(file: str) -> list[list[str]]:
    """The lines of a UTF-8 file separated by commas, semicolons or tabs; at least one.

    Raises Problem.
    """
    unreadable = problems(
        f"cannot read {file}",
        OSError,
        code=2,
        form="{}: {}; --dataset csv takes --data-dir FILE.csv",
    )
    malformed = problems(f"{file} is not a CSV file", csv.Error)

    try:
        with unreadable, malformed, open(file, newline="", encoding="utf-8-sig") as stream:
            # The first line only names columns, so the separator is the commonest one in it.
            first_line = stream.readline()
            delimiter = max(",;\t", key=first_line.count)
            stream.seek(0)
            lines = list(csv.reader(stream, delimiter=delimiter, strict=True))
    except UnicodeDecodeError as error:
        reason = f"{error.reason} at byte {error.start}"
        raise Problem(f"{file} is not UTF-8 text ({reason}): save it as CSV UTF-8") from None

    if not lines:
        raise Problem(f"{file} is empty: its first line must name the columns, path and label")
    return lines


def find_columns(file: str, header: list[str], options: Options) -> Columns:
    """Which columns of a file to read. Raises Problem."""
    for name in header:
        if header.count(name) > 1:
            raise Problem(f"{file} names the column {name!r} twice in its first line")

    image = find_column(file, header, "--image-column", options.image_column, IMAGE_COLUMNS)
    label = find_column(file, header, "--label-column", options.label_column, LABEL_COLUMNS)

    split = None
    for number, name in enumerate(header):
        is_split = name.lower() == SPLIT_COLUMN and number not in (image, label)
        if is_split and split is None:
            split = number

    # A list of test images needs no groups: only --data-dir's images are split.
    is_test = file == options.test_csv
    group = None
    if options.group_by is None:
        group = find_group(file, header, None if is_test else options.group_column)
    return Columns(image=image, label=label, split=split, group=group)


def find_group(file: str, header: list[str], given: str | None) -> int | None:
    """Where the column of the groups is, if any. Raises Problem if the given one is missing."""
    lower_case = [name.lower() for name in header]
    if given is None and not set(GROUP_COLUMNS) & set(lower_case):
        note_possible_groups(file, header)
        return None
    return find_column(file, header, "--group-column", given, GROUP_COLUMNS)


def note_possible_groups(file: str, header: list[str]) -> None:
    """Note a column whose name says that it may tell which images belong together."""
    for name in header:
        words = re.split(r"[\W_]+", name.lower())
        if words[0].rstrip("s") in GROUP_WORDS:
            note(
                f"{file} has a column {name!r}: if its images belong together, add "
                f"--group-column {shlex.quote(name)}"
            )
            return


def find_column(
    file: str,
    header: list[str],
    option: str,
    given: str | None,
    usual: tuple[str, ...],
) -> int:
    """Where the column is that the user has named with `option`, else the first of the usual ones.

    Case does not matter. Raises Problem.
    """
    lower_case = [name.lower() for name in header]
    wanted = (given.lower(),) if given else usual
    for name in wanted:
        if name in lower_case:
            return lower_case.index(name)

    missing = repr(given) if given else " or ".join(usual)
    present = ", ".join(header) or "none"
    raise Problem(f"{file} has no column {missing}, it has {present}; name one with {option}")
