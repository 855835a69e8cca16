"""How rows become CSV that a spreadsheet shows and does not run."""

import csv
import io
import re
from collections.abc import Iterable

from inference.command_line import printable

# How a cell begins that a spreadsheet runs as a formula, in ASCII and full width. Where a semicolon
# or a tab separates cells, a cell may begin in the middle of one of ours.
FORMULA = re.compile("(^|[;\t])([=+\\-@＝＋－＠])")  # noqa: RUF001  full width is meant


def csv_line(cells: Iterable, end: str = "\n") -> str:
    """A line of CSV; None is an empty cell. In texts, an apostrophe precedes what would be run."""
    line = io.StringIO()
    csv.writer(line, lineterminator=end).writerow(map(csv_cell, cells))
    return line.getvalue()


def csv_cell(value) -> str:
    """One cell. Control characters of texts are escaped; numbers stay as they are."""
    if value is None:
        return ""
    if isinstance(value, (int, float)):
        return str(value)
    return printable(FORMULA.sub(r"\1'\2", str(value)))
