"""A list of images and labels as rows of cells: CSV, JSON lines, or a path and a label a line."""

import contextlib
import csv
import io
import json
import os
import re
import shlex
import stat
from collections.abc import Callable
from dataclasses import dataclass

from inference.errors import Problem, problems
from inference.finding import is_image
from inference.formats import IMAGE_SUFFIXES

LIST_SUFFIXES = (".csv", ".tsv", ".txt", ".lst", ".jsonl", ".ndjson")
JSON_SUFFIXES = (".jsonl", ".ndjson")
UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")  # Excel's "Unicode text" begins with one
SEPARATORS = ",;\t"
# The names of columns that hold the path or the label, the first found. Case does not matter, and a
# space or "-" is as good as "_".
IMAGE_COLUMNS = (
    *("filepath", "filename", "path", "image", "file_name", "file_path", "image_path", "img_path"),
    *("filepaths", "image_name", "img_name", "file", "img", "fname"),
    *("image_id", "img_id", "id_code", "id"),
)
LABEL_COLUMNS = ("label", "class", "target", "labels", "class_name", "label_name", "category")
MAX_PIPED_BYTES = 256 << 20  # of a list that is no regular file: a device may never end
SPREADSHEET = b"PK\x03\x04"  # how an .xlsx or .ods file begins


@dataclass(frozen=True)
class Table:
    """The rows of a list, each with the number of its line or row in the file.

    header: the names of the columns; None if the first row is an image already.
    """

    file: str
    header: list[str] | None
    rows: list[tuple[int, list[str]]]

    def is_json(self) -> bool:
        """Is the file one of JSON lines?"""
        return self.file.lower().endswith(JSON_SUFFIXES)


def read_list(file: str, is_data: Callable[[list[str], bool], bool], hint: str) -> Table:
    """Read a list, whatever its form.

    is_data: whether a first row names an image and not the columns; called with that row and with
    whether the list separates by spaces. hint: which option takes what, for errors. Raises Problem.
    """
    text = read_text(file, hint)
    if not text.strip():
        raise Problem(f"{file} is empty: its first line must name the columns, path and label")
    if file.lower().endswith(JSON_SUFFIXES):
        return table_of_json(file, text)
    if text.lstrip().startswith(("[", "{")):
        refuse_json(file, text)

    first_row, text = without_excel_line(text)
    has_spaces = is_spaced(text)
    lines = rows_of_spaces(text) if has_spaces else rows_of_csv(file, text)

    numbered = list(enumerate(lines, start=first_row))
    header = [name.strip() for name in lines[0]]
    if is_data(header, has_spaces):
        return Table(file=file, header=None, rows=numbered)
    return Table(file=file, header=header, rows=numbered[1:])


def names_image(row: list[str], root: str) -> bool:
    """Does a cell of a row name an image, by its suffix or as a file below `root`?"""
    for cell in row:
        if cell.lower().endswith(IMAGE_SUFFIXES):
            return True
        # A column may well be called like a folder, so only a file tells.
        if cell and os.path.isfile(os.path.join(root, cell)):
            return True
    return False


def plain(name: str) -> str:
    """A column's name as it is compared with others."""
    return re.sub(r"[\s-]+", "_", name.strip().lower())


# ---------------------------------------------------------------------------------------- decoding
def read_text(file: str, hint: str) -> str:
    """The text of a file in UTF-8 or, with a byte order mark, UTF-16. Raises Problem."""
    form = f"{{}}: {{}}; {hint}"
    with problems(f"cannot read {file}", OSError, code=2, form=form), open(file, "rb") as opened:
        is_regular = stat.S_ISREG(os.fstat(opened.fileno()).st_mode)
        content = opened.read(-1 if is_regular else MAX_PIPED_BYTES + 1)
    if not is_regular and len(content) > MAX_PIPED_BYTES:
        reason = f"it brought more than {MAX_PIPED_BYTES >> 20} MiB and is no regular file"
        raise Problem(f"cannot read {file}: {reason}; {hint}", 2)

    if content.startswith(SPREADSHEET):
        raise Problem(f"{file} is not text but perhaps a spreadsheet: save it as CSV UTF-8", 2)
    encoding = "utf-16" if content.startswith(UTF16_MARKS) else "utf-8-sig"
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        if is_image(file):
            raise Problem(f"{file} is an image: {hint}", 2) from None
        reason = f"{error.reason} at byte {error.start}"
        raise Problem(f"{file} is not UTF-8 text ({reason}): save it as CSV UTF-8") from None

    if "\0" in text:
        raise Problem(f"{file} is not UTF-8 text (it has zero bytes): save it as CSV UTF-8")
    return text


def without_excel_line(text: str) -> tuple[int, str]:
    """The number of the first row, and the text from it on.

    A line such as "sep=;" tells Excel the separator, which shows in the next line as well.
    """
    first_line, _, rest = text.partition("\n")
    if first_line.strip().strip('"').lower().startswith("sep=") and rest.strip():
        return 2, rest
    return 1, text


# ------------------------------------------------------------------------------------------- forms
def rows_of_csv(file: str, text: str) -> list[list[str]]:
    """The rows of text separated by commas, semicolons or tabs. Raises Problem."""
    # The first line names columns, so the separator is the commonest one in it.
    first_line = text.lstrip("\r\n").partition("\n")[0]
    delimiter = max(SEPARATORS, key=first_line.count)
    with problems(f"{file} is not a CSV file", csv.Error):
        rows = list(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True))

    while not rows[0]:  # empty lines above the first one
        rows = rows[1:]
    return rows


def is_spaced(text: str) -> bool:
    """Is this a list in which a space separates path and label, as ImageNet's are?"""
    first_line = text.strip().partition("\n")[0]
    return len(first_line.split()) > 1 and not any(mark in first_line for mark in SEPARATORS)


def rows_of_spaces(text: str) -> list[list[str]]:
    """A path and a label a line. A path may hold spaces, the label after it does not."""
    return [line.strip().rsplit(None, 1) for line in text.strip().splitlines()]


def table_of_json(file: str, text: str) -> Table:
    """The table of JSON lines, an object each, as Hugging Face's metadata.jsonl. Raises Problem."""
    objects = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        value = parsed(line)
        if not isinstance(value, dict):
            raise Problem(
                f"{file}, line {number} is not a JSON object such as "
                '{"file_name": "a.jpg", "label": "cat"}'
            )
        objects.append((number, value))

    header = list(dict.fromkeys(name for _, value in objects for name in value))
    rows = []
    for number, value in objects:
        rows.append((number, [text_of(value.get(name)) for name in header]))
    return Table(file=file, header=[name.strip() for name in header], rows=rows)


def refuse_json(file: str, text: str) -> None:
    """Raise Problem if a list is JSON, but not called or not written as JSON lines are."""
    stem = os.path.splitext(file)[0]
    lines = "JSON is read as lines, an object each, in a file called .jsonl"

    content = parsed(text)
    if isinstance(content, list):
        program = f"import json; [print(json.dumps(row)) for row in json.load(open({file!r}))]"
        way_out = f'convert it: python -c "{program}" > {shlex.quote(stem + ".jsonl")}'
        raise Problem(f"{file} is a JSON array, but {lines}; {way_out}")
    if isinstance(content, dict):
        way_out = "write one, or a CSV file with the columns path and label"
        raise Problem(f"{file} is a single JSON object, but {lines}: {way_out}")

    first_line = text.strip().partition("\n")[0]
    if isinstance(parsed(first_line), dict):
        raise Problem(f"{file} holds JSON lines, but {lines}: rename it to {stem}.jsonl")


def parsed(text: str):
    """What a text of JSON holds; None if it is no JSON."""
    with contextlib.suppress(ValueError, RecursionError):
        return json.loads(text)
    return None


def text_of(value) -> str:
    """A value of JSON as a cell; lists and objects as JSON."""
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value)
