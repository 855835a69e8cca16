"""Where the files are that a list names.

Lists travel: their paths may lack the suffix, be those of another machine, or spell a name in
another case or Unicode form. A path that no file has is looked for in these ways, and read where it
fits one file only, which is said.
"""

import contextlib
import os
import re
import unicodedata
import urllib.parse

from data.files import Options, count_of, name_some
from data.notes import note
from inference.finding import is_visible
from inference.formats import IMAGE_SUFFIXES

DRIVE = re.compile(r"^[A-Za-z]:[\\/]")
TRIED = 20  # paths that tell whether a folder has the files of a list
SUFFIX, SPELLING = "suffix", "spelling"  # how a path differs from the file's


class Folders:
    """The names in folders, read when they are first asked for."""

    def __init__(self):
        self.names = {}  # by folder: {spelling: [names]}
        self.stems = {}  # by folder: {spelling of the stem: [names of images]}

    def read(self, folder: str) -> None:
        if folder in self.names:
            return
        self.names[folder] = {}
        self.stems[folder] = {}
        with contextlib.suppress(OSError, ValueError):
            for name in sorted(os.listdir(folder or ".")):
                stem, suffix = os.path.splitext(name)
                self.names[folder].setdefault(spelling(name), []).append(name)
                if suffix.lower() in IMAGE_SUFFIXES and is_visible(name):
                    self.stems[folder].setdefault(spelling(stem), []).append(name)

    def find(self, folder: str, parts: list[str]) -> tuple[str, set[str]] | None:
        """The one file with such a path below a folder, and how the path differs from it."""
        differences = set()
        for number, part in enumerate(parts, start=1):
            is_last = number == len(parts)
            path = os.path.join(folder, part)
            if not os.path.lexists(path) or (is_last and os.path.isdir(path)):
                self.read(folder)
                found = self.alike(folder, part, is_last)
                if found is None:
                    return None
                part, difference = found
                differences.add(difference)
            folder = os.path.join(folder, part)
        return (folder, differences) if os.path.isfile(folder) else None

    def alike(self, folder: str, part: str, is_last: bool) -> tuple[str, str] | None:
        """The one name in a folder that is meant by a part of a path, and how they differ."""
        names = self.names[folder].get(spelling(part), [])
        if is_last:  # an image may have the name of a folder beside it, and a suffix
            names = [name for name in names if not os.path.isdir(os.path.join(folder, name))]
        if len(names) == 1:
            return names[0], SPELLING
        if not is_last or names:
            return None

        names = self.stems[folder].get(spelling(part), [])
        exact = [name for name in names if os.path.splitext(name)[0] == part]
        if len(exact or names) != 1:
            return None
        return (exact or names)[0], SUFFIX


def spelling(name: str) -> str:
    """What names have in common that differ in case or in their Unicode form only."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


class Lookup:
    """Finds the files of a list below `root`, and keeps in mind what it did for it."""

    def __init__(self, root: str, options: Options):
        self.root = root
        self.folders = Folders()
        self.skipped = 0  # parts of the path that find_below() found last
        # An --image-root was given because the files are there, and not in a folder below.
        self.places = [] if options.image_root else subfolders(root)
        self.done = {}  # by what was done: {text: path}

    def find_all(self, file: str, texts: list[str]) -> list[str]:
        """The path of each file that a list, `file`, names; below `root` if there is none."""
        paths = {text: os.path.join(self.root, text) for text in texts}
        missing = []
        for text, path in paths.items():
            if not os.path.lexists(path) or os.path.isdir(path):
                missing.append(text)
        exact = set(paths.values()).difference(paths[text] for text in missing)

        places = {text: self.find(text) for text in missing}
        unknown = [text for text, place in places.items() if place is None]
        places |= self.find_in_one_folder(file, unknown)

        meant = {}
        for text, place in places.items():
            meant.setdefault(place, []).append(text)
        for place, several in meant.items():
            # One file cannot be meant by two paths.
            if place is None or len(several) > 1 or place in exact:
                self.forget(several)
            else:
                paths[several[0]] = place
        self.note_done(file)
        return [paths[text] for text in texts]

    def find(self, text: str) -> str | None:
        """The one file that may be meant by a path that no file has."""
        cleaned = plain_path(text)
        parts = split_path(cleaned)
        if not parts or "\0" in text:
            return None

        found = self.find_absolute(cleaned, parts) or self.find_below(text, parts)
        if found is None:
            return None
        place, differences = found
        if is_address(text):
            self.keep("are file:// addresses", text, place)
        self.keep_differences(differences, text, place)
        return place

    def find_absolute(self, cleaned: str, parts: list[str]):
        """The file of an absolute path, as one of this machine."""
        if not os.path.isabs(cleaned):
            return None
        anchor = os.path.splitdrive(cleaned)[0] + os.sep
        if not os.path.lexists(os.path.join(anchor, parts[0])):
            return None
        return self.folders.find(anchor, parts)

    def find_below(self, text: str, parts: list[str]):
        """The file below `root` with such a path, or with the end of it."""
        if len(parts) > 1 and os.path.lexists(os.path.join(self.root, parts[0])):
            return self.folders.find(self.root, parts)

        # What was left out of one path is left out of most paths of a list.
        for skipped in (self.skipped, *range(len(parts))):
            remaining = parts[skipped:]
            found = self.folders.find(self.root, remaining) if remaining else None
            if found:
                self.skipped = skipped
                if skipped:
                    self.keep(without_start(text, parts, skipped), text, found[0])
                return found
        return None

    def find_in_one_folder(self, file: str, texts: list[str]) -> dict[str, str]:
        """The files of paths that are all in one folder of `root`, as Kaggle's train_images/."""
        holding = {}
        for folder in self.places:
            if any(self.find_in(folder, text) for text in texts[:TRIED]):
                found = {text: self.find_in(folder, text) for text in texts}
                holding[folder] = {text: match for text, match in found.items() if match}

        if len(holding) > 1:
            names = name_some(f"{folder}/" for folder in holding)
            note(f"paths of {file} are in several folders, {names}: --image-root takes one")
        if len(holding) != 1:
            return {}

        places = {}
        ((folder, found),) = holding.items()
        for text, (place, differences) in found.items():
            self.keep(f"are in {folder}/", text, place)
            self.keep_differences(differences, text, place)
            places[text] = place
        return places

    def find_in(self, folder: str, text: str):
        """The file of such a path in a folder of `root`; None if the path begins in `root`."""
        parts = split_path(plain_path(text))
        if not parts or "\0" in text or os.path.lexists(os.path.join(self.root, parts[0])):
            return None
        return self.folders.find(os.path.join(self.root, folder), parts)

    def keep_differences(self, differences: set[str], text: str, place: str) -> None:
        if SUFFIX in differences:
            self.keep("have no suffix", text, place)
        if SPELLING in differences:
            self.keep("differ from the file's name in case or Unicode form", text, place)

    def keep(self, what: str, text: str, place: str) -> None:
        self.done.setdefault(what, {})[text] = place

    def forget(self, texts: list[str]) -> None:
        for places in self.done.values():
            for text in texts:
                places.pop(text, None)

    def note_done(self, file: str) -> None:
        """Note how many paths were not read as they stand in the file."""
        for what, places in self.done.items():
            if places:
                text, place = next(iter(places.items()))
                count = count_of(len(places), "path")
                note(f"{count} of {file} {what}: {text!r} is read from {place}")


def without_start(text: str, parts: list[str], skipped: int) -> str:
    """That a path was read without its first `skipped` parts, in words."""
    remaining = "/".join(parts[skipped:])
    if text.replace("\\", "/").endswith(remaining):
        left_out = text[: -len(remaining)]
    else:
        left_out = "/".join(parts[:skipped]) + "/"
    return f"begin with {left_out}, which is not there"


def split_path(path: str) -> list[str]:
    """The names in a path, the separators of either system between them."""
    return [part for part in re.split(r"[\\/]", path) if part not in ("", ".")]


def is_address(text: str) -> bool:
    return text.lower().startswith("file:")


def plain_path(text: str) -> str:
    """The path of a file:// address or of Windows, as it is written here."""
    if is_address(text):
        text = urllib.parse.unquote(urllib.parse.urlsplit(text).path)
        text = re.sub("^/(?=[A-Za-z]:)", "", text)  # file:///C:/photos
    if os.name == "nt":
        return text
    return DRIVE.sub("/", text).replace("\\", "/")


def subfolders(directory: str) -> list[str]:
    """The names of the visible folders in a directory, sorted; none if it cannot be read."""
    names = []
    with contextlib.suppress(OSError), os.scandir(directory or ".") as entries:
        names = [entry.name for entry in entries if is_visible(entry.name) and entry.is_dir()]
    return sorted(names)
