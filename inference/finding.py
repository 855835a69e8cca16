"""How image files are found: globs expanded, directories walked."""

import contextlib
import glob
import os
from collections.abc import Callable, Iterator

from inference.command_line import say
from inference.errors import Problem
from inference.formats import IMAGE_SUFFIXES, SUFFIXES, can_read_heif, open_image

SYSTEM_FILES = ("thumbs.db", "ehthumbs.db", "desktop.ini", "__macosx")
NAMED = 3  # files that a note names


def is_image(path: str) -> bool:
    """Is a file an image, by its suffix or, if it has none, by its content?"""
    suffix = os.path.splitext(path)[1].lower()
    if suffix:
        return suffix in IMAGE_SUFFIXES and (suffix not in SUFFIXES["HEIF"] or can_read_heif())

    if not os.path.isfile(path):  # opening a named pipe would wait for ever
        return False
    with contextlib.suppress(Exception):  # Pillow's plugins raise any exception on broken files
        open_image(path).close()
        return True
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
    for path, problem in walk(directory, is_visible):
        if problem or is_image(path):
            is_empty = False
            yield path, problem
        else:
            others.append(path)

    if is_empty:
        yield directory, Problem("no images in this directory")


def walk(folder: str, accept: Callable | None = None) -> Iterator[tuple[str, Problem | None]]:
    """Yield (path, None) for the files below a folder, in name order.

    accept: a test of the names of files and folders that are wanted. Links to folders are yielded
    as files and not followed. Folders that cannot be read come last, with a Problem.
    """
    accept = accept or bool
    unreadable = []

    for place, folders, files in os.walk(folder, onerror=unreadable.append):
        links = [name for name in folders if os.path.islink(os.path.join(place, name))]
        folders[:] = sorted(filter(accept, folders))  # os.walk goes on with these
        for name in sorted(filter(accept, files + links)):
            yield os.path.join(place, name), None

    for error in unreadable:
        yield error.filename, Problem(f"cannot be read: {error.strerror}")


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
    if {".heic", ".heif"} & suffixes:
        hint = "; pip install pillow-heif to read .heic"

    say(f"note: {did} {count} {why} ({kinds}): {names}{hint}")
