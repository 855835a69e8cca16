"""Pieces of HTML: text, figures and tables."""

import html
import os

from deploy.card import formatted, without_empty_columns
from step3_infer import printable


def text(value):
    """Any value as text for HTML."""
    return html.escape(printable(str(value)))


def duration(seconds):
    if not isinstance(seconds, (int, float)) or seconds < 60:
        return formatted(seconds, ".3g", " s")
    return f"{seconds // 60:.0f} min {seconds % 60:02.0f} s"


def file_size(path):
    if not os.path.isfile(path):
        return "-"
    size = os.path.getsize(path)
    return f"{size:,} bytes" if size < 1e5 else f"{size / 1e6:.2f} MB"


def table(head, rows, marked=None):
    """An HTML table that scrolls if it is wide; cells are HTML, `marked` is the index of the row to mark."""
    head, rows = without_empty_columns(head, rows)
    head = "".join(f"<th scope=col>{cell}</th>" for cell in head)
    lines = []
    for number, (first, *cells) in enumerate(rows):
        cells = "".join(cell if cell.startswith("<td") else f"<td>{cell}</td>" for cell in cells)
        mark = " class=mark aria-current=true" if number == marked else ""
        lines.append(f"<tr{mark}><th scope=row>{first}</th>{cells}</tr>\n")
    body = f"<thead><tr>{head}</tr></thead><tbody>\n{''.join(lines)}</tbody>"
    return f"<div class=scroll><table>{body}</table></div>"
