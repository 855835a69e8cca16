"""Which pictures are worth a label: the least certain ones, none like another, at most so many.

A picture is worth the more, the smaller the margin between the probabilities of its two best
classes is (margin sampling, Scheffer et al. 2001); those called unknown come first, then those
called unsure. Of near copies the least certain one is kept.
"""

import contextlib
import io
import json
import os
import re
import zlib
from base64 import b64decode, b64encode
from collections.abc import Iterator

import numpy as np

from inference.command_line import say
from inference.errors import Problem, one_line, problems
from inference.files import open_locked, replacing
from inference.formats import SUFFIXES, open_image
from inference.images import decode_image
from inference.predict import ONE_LARGE, Model
from inference.spec import DECIMALS

INDEX = ".collected.jsonl"  # hidden, so that no program takes it for data
FIRST_LINE = {"collected by": "step3_infer.py", "version": 1}
SPARE_LINES = 1000  # of the index beyond those in use, before it is written anew

# Worth: the lower, the more. A margin is at most 1, so that these come one after the other.
UNKNOWN, UNSURE, ANSWERED = 0, 1, 2

CELLS = 12  # of a thumbnail, in a row and in a column
LIKE = 0.1  # of its range, by which a cell may differ in a near copy,
LEAST_LEVELS, MOST_LEVELS = 4, 24  # but not fewer and not more than these grey levels of 255

# What some file system does not take in a name.
UNSAFE = re.compile(r'[\x00-\x1f\x7f/\\<>:"|?*]+')
RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)
MAX_NAME_BYTES = 100
FRAME = re.compile(r"-(#\d+)?")  # the path of a picture on standard input


class Collector:
    """The pictures in a directory, in a folder for each answer.

    failed: whether something could not be written, which is said once.
    """

    def __init__(self, directory: str, most: int, model: Model, top_k: int):
        """Begin, or go on where an earlier run with this directory ended. Raises Problem.

        most: how many pictures the directory may hold. top_k: how many classes a row that was
        looked at keeps; it comes with two or more.
        """
        self.directory = directory
        self.model = model
        self.top_k = top_k
        self.folders = folder_names([*model.spec["classes"], "unknown", "unsure"])
        self.failed = False
        self.seen = 0
        self.new: set[str] = set()  # names
        self.copies = 0

        # The first `count` entries are in use. Pages of zeros take no memory before they are.
        self.count = 0
        self.most = most
        self.names: list[str] = []
        self.worth = np.zeros(most)
        self.thumbnails = np.zeros((most, CELLS * CELLS * model.spec["channels"]), np.uint8)

        taken = f"{directory} is in use by another process: give each a directory of its own"
        with problems(f"cannot collect into {directory}", OSError, form="{}: {}"):
            os.makedirs(directory, exist_ok=True)
            with problems(taken, BlockingIOError, form="{}"):
                self.lock = open_locked(directory)
            self.read_index()
            self.write_index()

    # -------------------------------------------------------------------------------- predictions
    def watch(self, results: Iterator[list[dict]]) -> Iterator[list[dict]]:
        """Collect from lists of rows, and yield them on.

        Those of a stream bring the picture itself as `content`.
        """
        try:
            for rows in results:
                for row in rows:
                    content = row.pop("content", None)
                    if "error" not in row:
                        self.consider(row, content)
                        row["top"] = row["top"][: self.top_k]
                yield rows
        finally:
            self.report()
            if self.lock is not None:
                os.close(self.lock)

    def consider(self, row: dict, content: bytes | None) -> None:
        """Keep a picture if it is among the best. content: None to read the file at its path."""
        self.seen += 1
        worth = worth_of(row)
        if self.is_full() and worth >= self.worth[: self.count].max():
            return

        try:
            if content is None:
                with open(row["path"], "rb") as file:
                    content = file.read()
            thumbnail = thumbnail_of(content, self.model)
            self.keep(row, worth, content, thumbnail)
        except (OSError, Problem) as error:
            if not self.failed:
                reason = str(error) if isinstance(error, Problem) else one_line(error)
                if getattr(error, "filename", None):
                    reason = f"{error.filename}: {reason}"
                say(f"error: cannot collect into {self.directory}: {reason}; the predictions go on")
            self.failed = True

    def is_full(self) -> bool:
        return self.count == self.most

    def keep(self, row: dict, worth: float, content: bytes, thumbnail: np.ndarray) -> None:
        """Write a picture in the place of its near copies or of the worst. Raises OSError."""
        copies = near_copies(thumbnail, self.thumbnails[: self.count])
        if (self.worth[copies] <= worth).any():
            self.copies += 1
            return

        name = os.path.join(self.folders[row["label"]], file_name(row["path"], content))
        path = os.path.join(self.directory, name)
        if os.path.lexists(path):  # it was there before, or somebody put it there
            return

        # Named before it exists: what the index names and is not there, does not count.
        self.append_line(entry(name, worth, thumbnail))
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with replacing(path) as file:
            file.write(content)

        for slot in sorted(copies, reverse=True):
            self.remove(slot)
        if self.is_full():
            self.remove(int(self.worth.argmax()))
        self.add(name, worth, thumbnail)
        self.new.add(name)
        self.copies += len(copies)

    def add(self, name: str, worth: float, thumbnail: np.ndarray) -> None:
        self.names.append(name)
        self.worth[self.count] = worth
        self.thumbnails[self.count] = thumbnail
        self.count += 1

    def remove(self, slot: int) -> None:
        """Delete the picture of an entry; the last entry takes its place. Raises OSError."""
        path = os.path.join(self.directory, self.names[slot])
        if is_own_file(path):  # somebody may have moved it away
            os.unlink(path)
        with contextlib.suppress(OSError):  # there may be others in its folder
            os.rmdir(os.path.dirname(path))

        self.new.discard(self.names[slot])
        last = self.names.pop()
        self.count -= 1
        if slot < self.count:
            self.names[slot] = last
            self.worth[slot] = self.worth[self.count]
            self.thumbnails[slot] = self.thumbnails[self.count]

    def report(self) -> None:
        """Note what was collected."""
        copies = f", {self.copies:,} near copies left out" if self.copies else ""
        pictures = "1 picture that is" if self.count == 1 else f"{self.count:,} pictures that are"
        say(
            f"note: {self.directory} holds {pictures} worth a label, {len(self.new):,} new, "
            f"of {self.seen:,} seen{copies}"
        )

    # -------------------------------------------------------------------------------------- index
    def read_index(self) -> None:
        """Take over what an earlier run has kept and is still there. Raises OSError, Problem."""
        path = os.path.join(self.directory, INDEX)
        if not os.path.lexists(path):
            return
        if not is_own_file(path):
            raise Problem(f"cannot collect into {self.directory}: {INDEX} in it is no regular file")

        with open(path, encoding="utf-8", errors="replace") as file:
            lines = file.read().splitlines()
        if not lines or as_json(lines[0]) != FIRST_LINE:
            raise Problem(
                f"cannot collect into {self.directory}: {INDEX} in it is damaged; "
                "give another directory"
            )

        entries = {}  # by name: a picture may have come, gone, and come again
        for line in lines[1:]:
            found = read_entry(line, self.thumbnails.shape[1])
            if found and is_own_file(os.path.join(self.directory, found[0])):
                entries[found[0]] = found
        if len(entries) > self.most:
            raise Problem(
                f"{self.directory} holds {len(entries):,} pictures, more than --collect-at-most "
                f"{self.most:,}: move some of them away, or allow more",
                2,
            )
        for name, worth, thumbnail in entries.values():
            self.add(name, worth, thumbnail)
        self.note_others()

    def note_others(self) -> None:
        """Note the files in the folders that the index does not name. Raises OSError."""
        others = 0
        for folder in self.folders.values():
            path = os.path.join(self.directory, folder)
            if not os.path.isdir(path):
                continue
            names = {os.path.join(folder, name) for name in os.listdir(path)}
            others += len(names.difference(self.names))
        if others:
            files = "1 file" if others == 1 else f"{others:,} files"
            say(
                f"note: {self.directory} holds {files} besides, which {INDEX} does not name: they "
                "stay, and do not count"
            )

    def write_index(self) -> None:
        """Write the index anew, with what is kept now. Raises OSError."""
        with replacing(os.path.join(self.directory, INDEX), "w", encoding="utf-8") as file:
            file.write(json.dumps(FIRST_LINE) + "\n")
            for slot, name in enumerate(self.names):
                file.write(entry(name, self.worth[slot], self.thumbnails[slot]))
        self.lines = self.count

    def append_line(self, line: str) -> None:
        """Add a line to the index. Raises OSError."""
        if self.lines > self.most + SPARE_LINES:
            self.write_index()
        with open(os.path.join(self.directory, INDEX), "a", encoding="utf-8") as file:
            file.write(line)
        self.lines += 1


def entry(name: str, worth: float, thumbnail: np.ndarray) -> str:
    """A line of the index."""
    packed = b64encode(thumbnail.tobytes()).decode()
    return json.dumps({"file": name, "worth": float(worth), "thumbnail": packed}) + "\n"


def read_entry(line: str, size: int) -> tuple[str, float, np.ndarray] | None:
    """Name, worth and thumbnail of a line; None for one that is cut off or of another model's.

    size: of a thumbnail, in bytes.
    """
    found = as_json(line)
    try:
        name = found["file"]
        worth = float(found["worth"])
        thumbnail = np.frombuffer(b64decode(found["thumbnail"]), np.uint8)
    except (TypeError, KeyError, ValueError):
        return None

    # An index may come from a stranger, and files that it names may be deleted.
    parts = name.split(os.sep) if isinstance(name, str) else []
    is_below = len(parts) == 2 and all(parts) and not {".", ".."} & set(parts)
    is_whole = len(thumbnail) == size and 0 <= worth <= ANSWERED + 1
    return (name, worth, thumbnail) if is_below and is_whole else None


def as_json(line: str):
    """The value of a line of JSON, None if it is none."""
    try:
        return json.loads(line)
    except ValueError:
        return None


def is_own_file(path: str) -> bool:
    """Is it a regular file, and no link to one?"""
    return os.path.isfile(path) and not os.path.islink(path)


# ------------------------------------------------------------------------------------------- worth
def worth_of(row: dict) -> float:
    """What a picture is sorted by, lowest first: the kind of answer, then the margin."""
    first, second = row["top"][:2]
    margin = min(max(first["probability"] - second["probability"], 0.0), 1.0)
    kind = {"unknown": UNKNOWN, "unsure": UNSURE}.get(row["label"], ANSWERED)
    if row["label"] == first["label"]:  # a class may be called "unknown"
        kind = ANSWERED
    return round(kind + margin, DECIMALS)


def thumbnail_of(content: bytes, model: Model) -> np.ndarray:
    """The mean grey levels of cells of an image, uint8 [CELLS * CELLS * channels].

    Raises Problem if the image cannot be decoded, which it could before.
    """
    spec = model.spec
    with ONE_LARGE:  # so that no other large image is in memory
        image = decode_image(
            io.BytesIO(content), spec["channels"], spec["white"], model.max_pixels, spec["ground"]
        )
    for axis in (0, 1):
        side = image.shape[axis]
        starts = np.arange(CELLS) * side // CELLS  # of an image that has fewer pixels, some repeat
        sums = np.add.reduceat(image, starts, axis, np.float32)
        counts = np.maximum(np.diff(starts, append=side), 1)
        image = sums / np.expand_dims(counts, (1 - axis, 2))
    return np.rint(image).astype(np.uint8).ravel()


def near_copies(thumbnail: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Which of thumbnails [n, d] are of near copies of one [d]: their numbers.

    Of a near copy, saved anew, a little brighter or a frame later, no cell differs by more than a
    tenth of the range of its levels, but for the mean. A difference that is averaged over the whole
    picture would miss a small object that has come into it.
    """
    one = thumbnail.astype(np.float32)
    limit = np.clip(LIKE * np.ptp(one), LEAST_LEVELS, MOST_LEVELS)
    differences = others - one  # [n, d]
    differences -= differences.mean(1, keepdims=True)
    return np.flatnonzero(np.abs(differences).max(1, initial=0) <= limit)


# ------------------------------------------------------------------------------------------- names
def folder_names(labels: list[str]) -> dict[str, str]:
    """A folder's name for each label: the label itself, as far as file systems take it."""
    folders = {}
    taken = set()
    for label in labels:
        if label in folders:
            continue
        name = safe_name(label) or "class"
        number = 2
        candidate = name
        while candidate.casefold() in taken:  # some file systems do not tell A from a
            candidate = f"{name}-{number}"
            number += 1
        folders[label] = candidate
        taken.add(candidate.casefold())
    return folders


def safe_name(text: str) -> str:
    """A text as a name of a file or folder that any file system takes; it may be empty."""
    text = text.encode("utf-8", "replace").decode()  # halves of surrogate pairs
    name = UNSAFE.sub("-", text).lstrip(". -").rstrip(". ")
    name = name.encode()[:MAX_NAME_BYTES].decode(errors="ignore").rstrip(". ")
    return f"{name}-" if RESERVED.fullmatch(name) else name


def file_name(path: str, content: bytes) -> str:
    """A name for a copy of the picture at a path, which tells it from others of that name."""
    stem, suffix = os.path.splitext(os.path.basename(path))
    if FRAME.fullmatch(path):
        stem = f"frame{stem[1:].replace('#', '-')}"
        kind = open_image(io.BytesIO(content)).format
        suffix = SUFFIXES.get(kind, SUFFIXES["JPEG"])[0]  # Pillow calls some JPEGs by other names
    suffix = safe_name(suffix)
    end = f".{suffix}" if suffix else ""
    return f"{safe_name(stem) or 'picture'}-{zlib.crc32(content):08x}{end}"
