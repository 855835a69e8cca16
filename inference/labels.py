"""Which class an image is of, by the folder that it is in or by a list."""

import collections
import os
import re
from collections.abc import Iterable

from inference.command_line import say
from inference.errors import Problem
from inference.lists import IMAGE_COLUMNS, LABEL_COLUMNS, Table, names_image, plain, read_list

HINT = "--labels takes a list of paths and labels, as a CSV file"
SPLIT_COLUMN = "split"
SPLITS = ("train", "training", "val", "valid", "validation", "test", "testing")
TEST = ("test", "testing")
YES = ("1", "1.0", "true")
MAGIC = re.compile("[*?[]")


class FolderLabels:
    """Labels by class folders, below the paths that are predicted."""

    def __init__(self, classes: list[str], paths: Iterable[str]):
        self.classes = set(classes)
        # The longest first: the most that is known of where a file was found.
        self.roots = sorted({root_of(path) for path in paths}, key=len, reverse=True)

    def not_found(self) -> list[str]:
        """The files that have a label and were not predicted: folders name none."""
        return []

    def of(self, path: str) -> str | None:
        """The label of a file; None if it has none. The model may not know it.

        That is the outermost folder below a given path that is called like a class; without one,
        the outermost that is no split's; right below a given path, its own name if it is a class.
        """
        root, folders = self.place_of(path)
        for name in folders:
            if name in self.classes:
                return name

        others = [name for name in folders if name.lower() not in SPLITS]
        if others:
            return others[0]
        own_name = os.path.basename(os.path.abspath(root))
        return own_name if own_name in self.classes else None

    def place_of(self, path: str) -> tuple[str, list[str]]:
        """The given path that a file is below, and the folders between them."""
        folder = os.path.dirname(path)
        for root in self.roots:
            if folder == root.rstrip(os.sep):
                return root, []
            start = os.path.join(root, "")
            if folder.startswith(start):
                return root, [name for name in folder[len(start) :].split(os.sep) if name]
        return folder, []


def labels_for(file: str | None, classes: list[str], paths: list[str]) -> "Labels":
    """The labels of a list, if there is one, or by class folders. Raises Problem."""
    if file is None:
        return FolderLabels(classes, paths)
    return ListLabels(classes, paths, file)


def root_of(path: str) -> str:
    """The folder of a given path that the files found for it are below."""
    if os.path.isdir(path):
        return path
    magic = None if os.path.lexists(path) else MAGIC.search(path)
    return os.path.dirname(path[: magic.start()] if magic else path)


class ListLabels:
    """Labels by a list: its paths are relative to itself, or to a path that is predicted."""

    def __init__(self, classes: list[str], paths: Iterable[str], file: str):
        """Read a list. Raises Problem."""
        folder = os.path.dirname(os.path.abspath(file))

        def is_data(first_row: list[str], has_spaces: bool) -> bool:
            names = {plain(name) for name in first_row}
            is_named = names & {*IMAGE_COLUMNS} and names & {*LABEL_COLUMNS}
            return not is_named and (has_spaces or names_image(first_row, folder))

        table = read_list(file, is_data, HINT)
        self.labels = self.read(table, classes)
        self.asked_for: set[str] = set()  # of the list's paths
        self.roots = [folder, *(os.path.abspath(root_of(path)) for path in paths)]

    def read(self, table: Table, classes: list[str]) -> dict[str, str]:
        """The labels of a list by path, as it names them. Raises Problem."""
        image, label, one_hot, split = find_columns(table, classes)
        rows = [(number, cells) for number, cells in table.rows if any(cells)]
        rows = self.of_test_split(table.file, rows, split)

        incomplete = 0
        labels: dict[str, set[str]] = collections.defaultdict(set)
        for number, cells in rows:
            if len(cells) <= max(image, label or 0, *one_hot, split or 0):
                raise Problem(f"{table.file}, row {number}: cells are missing, there are {cells}")
            text = cells[label].strip() if label is not None else marked(table, cells, one_hot)
            path = tidy(cells[image])
            if path and text and text.lower() != "nan":
                labels[path].add(as_class(text, classes))
            else:
                incomplete += 1

        if incomplete:
            left_out = rows_in_words(incomplete)
            say(f"note: {table.file}: {left_out} left out, without a path or a label")
        several = [path for path, found in labels.items() if len(found) > 1]
        if several:
            files = "1 file" if len(several) == 1 else f"{len(several):,} files"
            say(
                f"warning: {table.file} gives {files} more than one label: left out, the first: "
                f"{several[0]}"
            )
        found = {path: min(texts) for path, texts in labels.items() if len(texts) == 1}
        if not found:
            raise Problem(f"{table.file} lists no image with a label")
        return found

    def of_test_split(self, file: str, rows: list, split: int | None) -> list:
        """The rows of the test split, if the list has one."""
        if split is None:
            return rows
        tested = [row for row in rows if row[1][split].strip().lower() in TEST]
        if not tested:
            say(f"note: {file} has a column split, but no row of the test split: all rows are used")
            return rows
        if len(tested) < len(rows):
            say(f"note: {file}: {rows_in_words(len(tested))} used, those of the test split")
        return tested

    def of(self, path: str) -> str | None:
        """The label of a file; None if it has none. The model may not know it."""
        where = os.path.abspath(path)
        for root in self.roots:
            start = os.path.join(root, "")
            if where.startswith(start):
                below = where[len(start) :].replace(os.sep, "/")
                for name in (below, os.path.splitext(below)[0]):
                    if name in self.labels:
                        self.asked_for.add(name)
                        return self.labels[name]

        name = where.replace(os.sep, "/")
        self.asked_for.add(name)
        return self.labels.get(name)

    def not_found(self) -> list[str]:
        """The files that the list names, as it does, and that were not predicted."""
        return [path for path in self.labels if path not in self.asked_for]


Labels = FolderLabels | ListLabels


# ----------------------------------------------------------------------------------------- columns
def find_columns(table: Table, classes: list[str]) -> tuple[int, int | None, list[int], int | None]:
    """The columns of the path and of the label, or of zeros and ones, and of the split.

    Raises Problem.
    """
    if table.header is None:
        if len(table.rows[0][1]) != 2:
            raise Problem(
                f"the first line of {table.file} is data, {table.rows[0][1]}, and does not name "
                "the columns: add a line such as path,label above it"
            )
        return 0, 1, [], None

    names = [plain(name) for name in table.header]
    image = first_of(IMAGE_COLUMNS, names)
    if image is None:
        raise missing(table, " or ".join(IMAGE_COLUMNS[:4]))
    split = first_of([SPLIT_COLUMN], names)

    label = find_label_column(table, names, classes, taken=(image, split))
    one_hot = [column for column, name in enumerate(table.header) if name in classes]
    if label is None and len(one_hot) < 2:
        raise missing(table, " or ".join(LABEL_COLUMNS[:3]))
    return image, label, one_hot, split


def find_label_column(
    table: Table, names: list[str], classes: list[str], taken: tuple[int | None, ...]
) -> int | None:
    """The column of the labels; None if there is none. Of two, that with the model's classes."""
    usual = [names.index(name) for name in LABEL_COLUMNS if name in names]
    usual = [column for column in usual if column not in taken]

    def count_known(column: int) -> int:
        texts = {cells[column].strip() for _, cells in table.rows if column < len(cells)}
        return len(texts & set(classes))

    if usual:
        return max(usual, key=count_known)
    others = [column for column, name in enumerate(names) if name and column not in taken]
    return others[0] if len(others) == 1 else None


def first_of(wanted: Iterable[str], names: list[str]) -> int | None:
    """Where the first of the wanted names is; None if there is none of them."""
    return next((names.index(name) for name in wanted if name in names), None)


def missing(table: Table, wanted: str) -> Problem:
    """The error for a column that is not there."""
    present = ", ".join(table.header) or "none"
    return Problem(f"{table.file} has no column {wanted}, it has {present}")


# ------------------------------------------------------------------------------------------- cells
def marked(table: Table, cells: list[str], one_hot: list[int]) -> str:
    """The class whose column says yes; empty if none or several do."""
    found = [column for column in one_hot if cells[column].strip().lower() in YES]
    return table.header[found[0]] if len(found) == 1 else ""


def as_class(text: str, classes: list[str]) -> str:
    """A label as the model calls it: a table may hold 2.0 for 2."""
    whole = re.fullmatch(r"(-?\d+)\.0*", text)
    return whole[1] if whole and text not in classes and whole[1] in classes else text


def rows_in_words(count: int) -> str:
    """How many rows, with the verb that follows."""
    return "1 row is" if count == 1 else f"{count:,} rows are"


def tidy(path: str) -> str:
    """A path of a list, with slashes and without detours."""
    path = path.strip().replace("\\", "/")
    return os.path.normpath(path).replace(os.sep, "/") if path else ""
