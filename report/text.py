"""Figures as text, tables, Markdown and templates: what report.html and MODEL_CARD.md share."""

import math
import re
import string
from pathlib import Path

from inference.command_line import printable

HERE = Path(__file__).parent
LONGEST = 300  # characters of a text from outside; class names have at most 256
MISSING = "-"  # in place of a figure that is not there

# Characters that mean something to Markdown.
MARKDOWN = re.compile(r"([\\`*_{}\[\]<>()#|~!&$])")


# ------------------------------------------------------------------------------------------ numbers
def formatted(value: object, style: str, unit: str = "") -> str:
    """A number in the given format, with its unit, or a dash if it is not a number."""
    try:
        return format(value, style) + unit
    except (TypeError, ValueError, OverflowError):
        return MISSING


def cells(figures: dict, styles: dict[str, str]) -> list[str]:
    """The figures that `styles` names, in its order, each `formatted` in its style."""
    return [formatted(figures.get(name), style) for name, style in styles.items()]


def counted(number: int, noun: str) -> str:
    """A number with its noun in the singular or plural: 1 epoch, 1,000 epochs."""
    if number == 1:
        return f"{number:,} {noun}"
    return f"{number:,} {noun}s"


def rounded_down(probability: float) -> str:
    """A probability with at most four decimals that, used as a threshold, still lets it through."""
    return f"{math.floor(1e4 * probability) / 1e4:g}"


def device_needs(device: dict[str, int]) -> str:
    """What one image needs in float32, in words. device: the counts of deploy/device.py."""
    weights = 4e-6 * device["weights"]  # MB, at 4 bytes each
    activations = 4e-6 * device["activations"]
    multiply_adds = 1e-6 * device["multiply_adds"]
    memory = f"{weights:,.2f} MB of weights, {activations:,.2f} MB of activations"
    return f"{memory}, {multiply_adds:,.1f} M multiply-adds"


def busy_note(figures: dict) -> str | None:
    """A note that other work slowed the measurement of the latency down.

    None if the 90th percentile is within twice the 10th, or if there are no such figures.
    """
    try:
        low, high = map(float, figures.get("latency_spread"))
    except (TypeError, ValueError):
        return None

    if not 0 < 2 * low < high:
        return None
    return f"busy machine: {high / low:.3g}x spread of the latency"


# ------------------------------------------------------------------------------------------- tables
def without_empty_columns(head: list[str], rows: list[list[str]]) -> tuple[list, list]:
    """The head and rows of a table without the columns that contain only dashes."""
    kept = []
    for column in range(len(head)):
        if any(row[column] != MISSING for row in rows):
            kept.append(column)

    kept_head = [head[column] for column in kept]
    kept_rows = [[row[column] for column in kept] for row in rows]
    return kept_head, kept_rows


def merged_if_equal(columns: dict[str, list]) -> dict[str, list]:
    """Columns by format or file; the first alone, named "", if all say the same.

    Facts about the network hold for every file that was made of it: a table shows them once.
    """
    first, *others = columns.values()
    if all(column == first for column in others):
        return {"": first}
    return columns


def camera_table(
    measured: dict[str, list[dict]], styles: dict[str, str]
) -> tuple[list[str], list[list[str]]]:
    """A table of the changes that cameras make: the names of its groups of columns, and its rows.

    measured: by format or file, the list that deploy/camera.py makes, of the same changes in the
    same order. A row says what changed, then for each group the figures that `styles` names. There
    is a group for each format or file, or one named "" if all have the same figures.
    """
    columns = {}
    for name, changes in measured.items():
        columns[name] = [cells(figures, styles) for figures in changes]
    columns = merged_if_equal(columns)

    first_measured = next(iter(measured.values()))
    rows = []
    for number, figures in enumerate(first_measured):
        row = [f"{figures['change']} {figures['strength']}"]
        for column in columns.values():
            row += column[number]
        rows.append(row)
    return list(columns), rows


# ------------------------------------------------------------------------------ Markdown, templates
def as_shown(text: object) -> str:
    """Untrusted text as it may be shown: printable, and cut in its middle if it is long."""
    text = str(text)
    if len(text) > LONGEST:
        text = f"{text[: LONGEST // 2]}…{text[-LONGEST // 2 :]}"
    return printable(text)


def markdown(text: object) -> str:
    """Untrusted text with the characters escaped that mean something to Markdown."""
    return MARKDOWN.sub(r"\\\1", as_shown(text))


def markdown_table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table without empty columns; those after the first are aligned to the right."""
    head, rows = without_empty_columns(head, rows)
    ruler = ["---"] + ["---:"] * (len(head) - 1)
    lines = ["| " + " | ".join(row) + " |" for row in [head, ruler, *rows]]
    return "\n".join(lines)


def filled(template: str, **values: object) -> str:
    """The text of a template of this directory with its placeholders replaced."""
    text = (HERE / template).read_text(encoding="utf-8")
    return string.Template(text).substitute(values)
