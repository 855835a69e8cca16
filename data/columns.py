"""Which columns of a list hold the image, the label and the split."""

import re
import shlex
from dataclasses import dataclass, replace

from data.files import Options, name_some, split_called
from data.notes import note, warn
from inference.errors import Problem
from inference.lists import IMAGE_COLUMNS, LABEL_COLUMNS, Table, plain

SPLIT_COLUMN = "split"
# Columns that tell the split as well, if all of their values do.
SPLIT_COLUMNS = ("subset", "set", "data_set", "dataset", "partition")
# Of columns of yes and no, the split of the rows with yes and that of the others.
FLAG_COLUMNS = {
    "is_valid": ("val", "train"),
    "is_val": ("val", "train"),
    "is_validation": ("val", "train"),
    "is_test": ("test", "train"),
    "is_train": ("train", "test"),
}
FLAGS = {
    **dict.fromkeys(("true", "t", "yes", "y", "1", "1.0"), True),
    **dict.fromkeys(("false", "f", "no", "n", "0", "0.0"), False),
}
ONE_HOT = {
    "0": False,
    "1": True,
    "0.0": False,
    "1.0": True,
    "false": False,
    "true": True,
    "": False,
}
GROUP_COLUMN = "group"
# With one of these words, a column's name begins that probably tells which images belong together.
GROUP_WORDS = ("patient", "subject", "participant", "scene", "clip", "video", "session", "lesion")
MOST_DIFFERENT = 0.5  # of the rows may have a label of their own in a column that nobody has named


@dataclass(frozen=True)
class Columns:
    """Where in a row the image and the label are, and the split and the group if there are any.

    one_hot: the columns of a list that has one for each class, in which 1 marks the class of a row;
    `label` is None then. flag: the split of the rows whose `split` is true, and that of the others,
    for a column such as is_valid; None for a column that holds the names of splits.
    """

    image: int
    label: int | None
    split: int | None = None
    flag: tuple[str, str] | None = None
    group: int | None = None
    one_hot: tuple[int, ...] = ()


def find_columns(table: Table, options: Options) -> Columns:
    """Which columns of a table to read. Raises Problem."""
    if table.header is None:
        return columns_without_names(table, options)

    check_names(table)
    names = [plain(name) for name in table.header]
    found = columns_by_name(table, names, options)
    warn_of_unread_splits(table, names, found)
    return found


def columns_by_name(table: Table, names: list[str], options: Options) -> Columns:
    """Which columns of a table to read, whose names are `names`. Raises Problem."""
    image = find_image_column(table, names, options)
    label = None
    if options.label_column:
        label = named_column(table, names, "--label-column", options.label_column)
    split, flag = find_split_column(table, names, taken=(image, label))
    group = find_group_column(table, names, options)
    found = Columns(image=image, label=label, split=split, flag=flag, group=group)
    if label is not None:
        return found

    taken = (image, split, group)
    label = find_label_column(table, names, options, taken)
    if label is not None:
        return replace(found, label=label)

    one_hot = find_one_hot(table, names, taken)
    if one_hot:
        shown = name_some(table.header[column] for column in one_hot)
        note(f"{table.file} has a column for each of {len(one_hot)} classes: {shown}")
        return replace(found, one_hot=one_hot)

    return replace(found, label=find_only_other_column(table, names, taken))


def check_names(table: Table) -> None:
    """Raise Problem if two columns have the same name."""
    for name in table.header:
        if name and table.header.count(name) > 1:
            raise Problem(f"{table.file} names the column {name!r} twice in its first line")


def columns_without_names(table: Table, options: Options) -> Columns:
    """The columns of a list whose first row is an image: the path, then the label.

    Raises Problem.
    """
    first_row = table.rows[0][1]
    for option, name in (
        ("--image-column", options.image_column),
        ("--label-column", options.label_column),
        ("--group-column", options.group_column),
    ):
        if name:
            reason = f"has no line that names its columns: leave out {option}, or add the line"
            raise Problem(f"{table.file} {reason}", 2)

    if len(first_row) != 2:
        raise Problem(
            f"the first line of {table.file} is data, {first_row}, and does not name the columns: "
            "add a line such as path,label above it"
        )
    note(f"{table.file} has no line that names its columns: taken as path, then label")
    return Columns(image=0, label=1)


# ---------------------------------------------------------------------------------- image and label
def find_image_column(table: Table, names: list[str], options: Options) -> int:
    """The column of the paths, as --image-column says or as it is usually called.

    Raises Problem.
    """
    given = options.image_column
    if given:
        return named_column(table, names, "--image-column", given)
    for name in IMAGE_COLUMNS:
        if name in names:
            return names.index(name)
    raise missing_column(table, "--image-column", " or ".join(IMAGE_COLUMNS[:4]))


def find_label_column(
    table: Table, names: list[str], options: Options, taken: tuple[int | None, ...]
) -> int | None:
    """The column of the labels, as it is usually called; None if there is none.

    Of two, that of the names is taken and not that of their numbers.
    """
    usual = [names.index(name) for name in LABEL_COLUMNS if name in names]
    usual = [column for column in usual if column not in taken]
    if len(usual) < 2:
        return usual[0] if usual else None

    chosen = choose_label_column(table, usual, options.classes)
    named = " and ".join(repr(table.header[column]) for column in usual)
    note(
        f"{table.file} has the columns {named}: the labels are those of "
        f"{table.header[chosen]!r}; --label-column takes another"
    )
    return chosen


def choose_label_column(table: Table, usual: list[int], known: list[str] | None) -> int:
    """Of columns that may all hold the labels, the one to take.

    known: the classes of an earlier run with this list, which then took the column with these.
    """
    if known is not None:
        for column in usual:
            if values_of(table, column) <= set(known):
                return column

    for column in usual:
        if not all(map(is_number, values_of(table, column))):
            return column
    return usual[0]


def find_one_hot(table: Table, names: list[str], taken: tuple[int | None, ...]) -> tuple[int, ...]:
    """The columns of zeros and ones, if there are several: one for each class."""
    columns = []
    for column, name in enumerate(names):
        if column in taken or not name:
            continue
        values = {value.lower() for value in values_of(table, column)}
        if values and values <= set(ONE_HOT):
            columns.append(column)
    return tuple(columns) if len(columns) > 1 else ()


def find_only_other_column(table: Table, names: list[str], taken: tuple[int | None, ...]) -> int:
    """The only column that is left for the labels. Raises Problem if it cannot be that."""
    others = []
    for column, name in enumerate(names):
        if column not in taken and name:
            others.append(column)

    wanted = " or ".join(LABEL_COLUMNS[:3])
    if len(others) != 1:
        raise missing_column(table, "--label-column", wanted)

    (column,) = others
    different = len(values_of(table, column))
    if different > max(2, MOST_DIFFERENT * len(table.rows)):
        raise missing_column(table, "--label-column", wanted)
    note(f"{table.file} has no column {wanted}: the labels are those of {table.header[column]!r}")
    return column


def named_column(table: Table, names: list[str], option: str, given: str) -> int:
    """The column that the user has named with `option`. Raises Problem."""
    if plain(given) in names:
        return names.index(plain(given))
    raise missing_column(table, option, repr(given))


def missing_column(table: Table, option: str, wanted: str) -> Problem:
    """The error for a column that is not there."""
    present = ", ".join(table.header) or "none"
    reason = f"{table.file} has no column {wanted}, it has {present}; name one with {option}"
    if has_data_as_header(table):
        reason += (
            ". If its first line is that of an image, and names no columns, insert a line "
            "path,label before it"
        )
    return Problem(reason)


def has_data_as_header(table: Table) -> bool:
    """Is the first line probably one of the images, as a label in it comes again below it?"""
    for column, name in enumerate(table.header):
        if name and (is_number(name) or "/" in name or name in values_of(table, column)):
            return True
    return False


# ------------------------------------------------------------------------------------------- split
def find_split_column(
    table: Table, names: list[str], taken: tuple[int | None, ...]
) -> tuple[int | None, tuple[str, str] | None]:
    """The column that tells the split, and the splits of the rows where it is true and false.

    The second is None for a column of names. Both are None if there is no such column.
    """
    if SPLIT_COLUMN in names and names.index(SPLIT_COLUMN) not in taken:
        return names.index(SPLIT_COLUMN), None

    for name in SPLIT_COLUMNS:
        if name in names:
            column = names.index(name)
            values = values_of(table, column)
            if column not in taken and values and all(map(split_called, values)):
                return column, None

    for name, flag in FLAG_COLUMNS.items():
        if name in names:
            column = names.index(name)
            values = {value.lower() for value in values_of(table, column)}
            if column not in taken and values and values <= set(FLAGS):
                return column, flag
    return None, None


def warn_of_unread_splits(table: Table, names: list[str], found: Columns) -> None:
    """Warn of columns that may tell the split and are not read: their test rows are trained on."""
    read = (found.image, found.label, found.split, found.group, *found.one_hot)
    for name in (*SPLIT_COLUMNS, *FLAG_COLUMNS):
        if name not in names or names.index(name) in read:
            continue
        column = names.index(name)
        values = values_of(table, column)
        if not values:
            continue

        shown = f"the column {table.header[column]!r} of {table.file} is not read"
        if found.split is not None:
            # Beside a split, a column "dataset" of other values says where the images are from.
            if name in SPLIT_COLUMNS and not any(map(split_called, values)):
                continue
            chosen = table.header[found.split]
            warn(
                f"{shown}, as {chosen!r} tells the split: if both do, write one column split "
                "with train, val and test"
            )
            continue

        known = "yes and no" if name in FLAG_COLUMNS else "train, val and test"
        warn(
            f"{shown} as the split: its values are {name_some(sorted(values))}, and only {known} "
            "are known; if it tells the split, call it split and write train, val and test"
        )


def find_group_column(table: Table, names: list[str], options: Options) -> int | None:
    """The column of the groups, if there is one. Raises Problem if the given one is missing."""
    if options.group_by is not None:
        return None
    # A list of test images needs no groups: only --data-dir's images are split.
    if options.group_column and table.file != options.test_csv:
        return named_column(table, names, "--group-column", options.group_column)
    if GROUP_COLUMN in names:
        return names.index(GROUP_COLUMN)
    note_possible_groups(table)
    return None


def note_possible_groups(table: Table) -> None:
    """Note a column whose name says that it may tell which images belong together."""
    for name in table.header:
        words = re.split(r"[\W_]+", name.lower())
        if words[0].rstrip("s") in GROUP_WORDS:
            note(
                f"{table.file} has a column {name!r}: if its images belong together, add "
                f"--group-column {shlex.quote(name)}"
            )
            return


# ------------------------------------------------------------------------------------------ values
def values_of(table: Table, column: int) -> set[str]:
    """The different values of a column; empty cells are left out."""
    values = set()
    for _, cells in table.rows:
        if column < len(cells):
            values.add(cells[column].strip())
    return values - {""}


def is_number(text: str) -> bool:
    """Is a label a number, such as 3 or 3.0?"""
    try:
        float(text)
    except ValueError:
        return False
    return True
