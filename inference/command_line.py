"""How a command line is read, and how text from outside is made safe to print."""

import argparse
import contextlib
import math
import sys
from collections.abc import Callable

MOST_ACCENTS = 6  # on one letter: Hebrew with vowels and cantillation has five
WIDTH = 78  # columns of --help, which then fits an 80-column terminal


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors and a fixed width of the help text.

    Asking the terminal for its width would import shutil, bz2, lzma and more at every start.
    """

    def __init__(self, **settings):
        super().__init__(formatter_class=fixed_width, **settings)

    def parse_args(self, args=None, namespace=None):
        """As argparse does. An empty value, mostly of a variable that is not set, is an error."""
        parsed = super().parse_args(args, namespace)
        for action in self._actions:
            value = getattr(parsed, action.dest, None)
            values = value if isinstance(value, list) else [value]
            if "" in values and action.const != "":
                self.error(f"{'/'.join(action.option_strings) or action.metavar} is empty")
        return parsed

    def error(self, message):
        self.exit(2, f"error: {printable(message)} (--help shows all options)\n")


def fixed_width(prog: str) -> argparse.HelpFormatter:
    return argparse.HelpFormatter(prog, width=WIDTH)


def number(kind: type, low: float, high: float = math.inf, above: bool = False) -> Callable:
    """An argparse type for finite numbers of a kind, int or float.

    low, high: the smallest and the largest number allowed; `above` excludes `low` itself.
    """

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan

        is_high_enough = value > low if above else value >= low
        if is_high_enough and value <= high and value != math.inf:
            return value

        what = "whole number" if kind is int else "number"
        limits = f"above {low}" if above else f"from {low}"
        if high != math.inf:
            limits += f" to {high}"
        raise argparse.ArgumentTypeError(f"{text!r} is not a {what} {limits}")

    return parse


def printable(text: str) -> str:
    """Escape what must not be printed of text from outside: paths, class names, specs.

    That is control characters, line breaks, characters that turn the direction of a text, and of a
    heap of accents all but the first ones, which would be drawn across other lines.
    """
    if text.isascii() and text.isprintable():
        return text

    characters = []
    accents = 0
    for character in text:
        accents = accents + 1 if is_accent(character) else 0
        if accents > MOST_ACCENTS or not character.isprintable():
            character = character.encode("unicode_escape").decode()
        characters.append(character)
    return "".join(characters)


def is_accent(character: str) -> bool:
    """Is it drawn over the character before it?"""
    if character.isascii():
        return False
    import unicodedata  # most texts do not need it

    return unicodedata.category(character) in ("Mn", "Me")


def encodable(value):
    """The value, which JSON can hold, without bytes of names that are no UTF-8.

    They arrive as halves of surrogate pairs, which only Python reads in JSON; each becomes text
    such as \\udcfc, as it is printed.
    """
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, dict):
        return {encodable(key): encodable(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [encodable(part) for part in value]
    return value


def say(message: str) -> None:
    """Print one line to standard error. If that cannot be written, such as to a log on a full disk,
    the line is lost and the work goes on: there is nobody left to tell.
    """
    with contextlib.suppress(OSError):
        print(printable(message), file=sys.stderr, flush=True)
