"""How image files are found: globs expanded, directories walked."""

import contextlib
import glob
import os
from collections.abc import Callable, Iterator

from inference.command_line import say
from inference.errors import Problem
from inference.formats import (
    HEIF_HINT,
    IMAGE_SUFFIXES,
    RAW_SUFFIXES,
    SUFFIXES,
    can_read_heif,
    is_image_inside,
)

SYSTEM_FILES = ("thumbs.db", "ehthumbs.db", "desktop.ini", "__macosx")
NAMED = 3  # files that a note names


def is_image(path: str) -> bool:
    """Is a file an image, by its suffix or, if that is not one of an image, by its content?"""
    suffix = os.path.splitext(path)[1].lower()
    if suffix in SUFFIXES["HEIF"]:
        return can_read_heif()
    if suffix in IMAGE_SUFFIXES:
        return True

    if suffix in RAW_SUFFIXES or not os.path.isfile(path):  # to open a named pipe would wait
        return False
    with contextlib.suppress(Exception):  # Pillow's plugins raise any exception on broken files
        return is_image_inside(path)
    return False


def find_images(paths: list[str], others: list) -> Iterator[tuple[str, Problem | None]]:
    """Yield each file of the given paths: (path, None), or (path, why it cannot be used).

    Globs are expanded and directories walked. Files in directories that are not images are
    appended to `others`.
    """
    for path in paths:
        is_glob = any(character in path for character in "*?[") and not os.path.lexists(path)
        if is_glob:
            yield from expand(path, others)
        elif os.path.isdir(path):
            yield from images_below(path, others)
        else:
            yield path, None


def expand(pattern: str, others: list) -> Iterator[tuple[str, Problem | None]]:
    """What find_images() yields for a glob."""
    matches = sorted(glob.glob(pattern, recursive=True))
    if not matches:
        yield pattern, Problem("matches no file")
        return

    # "**" matches the directories of its files as well, whose files would come twice.
    files = [match for match in matches if not os.path.isdir(match)]
    yield from find_images(files or matches, others)


def images_below(directory: str, others: list) -> Iterator[tuple[str, Problem | None]]:
    """What find_images() yields for a directory."""
    is_empty = True
    for path, problem in walk(directory, is_visible, follow=True):
        if problem or is_image(path):
            is_empty = False
            yield path, problem
        else:
            others.append(path)

    if is_empty:
        yield directory, Problem("no images in this directory")


def walk(
    folder: str, accept: Callable | None = None, follow: bool = False
) -> Iterator[tuple[str, Problem | None]]:
    """Yield (path, None) for the files below a folder, in name order.

    accept: a test of the names of files and folders that are wanted. follow: whether to go where
    links to folders lead, though nowhere twice, nor up; without it they are yielded as files.
    Folders that cannot be read come last, with a Problem.
    """
    accept = accept or bool
    unreadable = []
    entered = {os.path.realpath(folder)}

    for place, folders, files in os.walk(folder, onerror=unreadable.append, followlinks=follow):
        names = sorted(filter(accept, folders))
        if follow:
            folders[:] = [name for name in names if enter(place, name, entered)]
        else:
            files += [name for name in names if os.path.islink(os.path.join(place, name))]
            folders[:] = names  # os.walk goes on with these

        for name in sorted(filter(accept, files)):
            yield os.path.join(place, name), None

    for error in unreadable:
        yield error.filename, Problem(f"cannot be read: {error.strerror}")


def enter(place: str, name: str, entered: set[str]) -> bool:
    """Should a walk go on with this folder of `place`? It is added to those that it has entered."""
    path = os.path.join(place, name)
    real = os.path.realpath(path)
    # A link to a folder above would bring in all that lies beside this one.
    leads_up = os.path.islink(path) and os.path.realpath(place).startswith(os.path.join(real, ""))
    if leads_up or real in entered:
        return False

    entered.add(real)
    return True


def is_visible(name: str) -> bool:
    """Is a name neither hidden, like .DS_Store and ._photo.jpg, nor a file of the system?"""
    return not name.startswith(".") and name.lower() not in SYSTEM_FILES


def note_files(did: str, paths: list[str], why: str = "") -> None:
    """Note, if there are any, how many files something was done to, their kinds and first names."""
    if not paths:
        return

    suffixes = {os.path.splitext(path)[1].lower() for path in paths}
    kinds = ", ".join(sorted(suffix or "no suffix" for suffix in suffixes))
    count = "1 file" if len(paths) == 1 else f"{len(paths):,} files"
    names = ", ".join(paths[:NAMED])
    if len(paths) > NAMED:
        names += ", ..."
    hint = ""
    unread = sorted(suffixes.intersection(SUFFIXES["HEIF"]))
    if unread and not can_read_heif():
        hint = f"; {HEIF_HINT} to read {', '.join(unread)}"

    say(f"note: {did} {count} {why} ({kinds}): {names}{hint}")
