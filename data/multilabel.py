"""Lists that give an image several labels, which is not supported."""

import re

from data.columns import Columns
from data.files import Options, count_of
from inference.errors import Problem
from inference.lists import Table, plain

PLURAL = ("labels", "tags")  # columns in which other programs separate labels so:
SEPARATORS = re.compile(r"[\s,;|]+")


def refuse_several_labels(table: Table, columns: Columns, options: Options) -> None:
    """Raise Problem if the column of labels holds several of them in a row, such as "car person".

    A label of several words is one if its words are not labels, too. --label-column makes each text
    a class.
    """
    if table.header is None or columns.label is None or options.label_column is not None:
        return
    name = table.header[columns.label]
    if plain(name) not in PLURAL:
        return

    texts = {}  # by the number of the row
    for number, cells in table.rows:
        if columns.label < len(cells) and cells[columns.label].strip():
            texts[number] = cells[columns.label].strip()
    several = {number: text for number, text in texts.items() if len(parts_of(text)) > 1}
    if not several or not are_combined(set(texts.values())):
        return

    first, text = next(iter(several.items()))
    raise Problem(
        f"the column {name!r} of {table.file} holds several labels in "
        f"{count_of(len(several), 'row')} of {len(texts):,}, the first: row {first} ({text}). "
        "Multi-label data is not supported: leave one label in each row; if each text is one "
        f"class, add --label-column {name}"
    )


def parts_of(text: str) -> list[str]:
    """The words of a label."""
    return [part for part in SEPARATORS.split(text) if part]


def are_combined(texts: set[str]) -> bool:
    """Are some of these different labels combinations of others?

    Then all words of one are labels of their own, or there are more labels than words.
    """
    words = set()
    for text in texts:
        parts = parts_of(text)
        words.update(parts)
        if len(parts) > 1 and set(parts) <= texts:
            return True
    return len(texts) > len(words)
