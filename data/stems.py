"""What file names have in common, as `scene12_rot.jpg` and `scene12_crop.jpg` do: such images may
belong together, and step1 suggests the option that keeps them so."""

import os
import re
import shlex
from collections import Counter
from typing import NamedTuple

from data.files import Files, count_of
from data.notes import note

MOST_WORDS = 3  # of a name that may be a stem

# The least share of the images that must have a stem in common with another one. Words may be equal
# by chance; what a system appends to the name of a copy may not.
SHARED_WORDS = 0.5
SHARED_COPIES = 0.02

# A camera's day, as in IMG_20240131_120000.jpg, tells no scene.
DAY = re.compile(r"(19|20)\d\d[-_]?[01]\d[-_]?[0-3]\d$")
# Stems with a number, as "clip3", are probably made for telling things apart, and those without, as
# "IMG", by a camera, unless there are many with few images each.
FEWEST_STEMS = 5
FEWEST_NAMES = 10
MOST_IMAGES_OF_A_NAME = 20
MOST_OF_A_CLASS = 0.9  # that may have one stem: otherwise it is the name of the class, or none


class Shared(NamedTuple):
    """What an expression finds in the names of images. Both are counted without single images."""

    images: int
    stems: int
    example: str  # the name of one of the images


class Name(NamedTuple):
    """The name of an image, and where it counts: its split and its class, and its folder."""

    text: str
    part: tuple[str, int]
    folder: str


def suggest_groups(splits: dict[str, Files]) -> None:
    """Note that images share stems, and the --group-by that would keep them together."""
    names = []
    seen = set()
    for split, files in splits.items():
        for path, label in zip(files.paths, files.labels.tolist(), strict=True):
            if path in seen:  # a list may name a file twice
                continue
            seen.add(path)
            folder, text = os.path.split(path)
            names.append(Name(text=text, part=(split, label), folder=folder))

    for expression, least in candidates():
        shared = shared_stems(names, expression, least)
        if shared is not None:
            note(
                f"{count_of(shared.images, 'image')} share {count_of(shared.stems, 'stem')}, as in "
                f"{shared.example}; if these belong together, add --group-by {quoted(expression)}"
            )
            return


def candidates() -> list[tuple[str, float]]:
    """Expressions whose bracket takes the stem of a name, the coarsest first, each with the part of
    all images that must share one."""
    found = []
    for separator in "_- ":
        word = f"[^/.{separator}]+"
        if separator == " ":
            word = "[^/. (]+"  # IMG_1234(1).jpg
        # The first word, or the first few.
        for words in range(1, MOST_WORDS + 1):
            stem = separator.join([word] * words)
            found.append((f"({stem})[^/]*$", SHARED_WORDS))

    copy = r"(?: ?\(\d+\)| - Copy.*| copy.*)?"
    found += [
        (r"(?:^|/)([A-Za-z]{3,}\d+)[^/]*$", SHARED_WORDS),  # scene12a.jpg
        (r"([A-Za-z]+\d+)\.[^/.]+$", SHARED_WORDS),  # rot_scene12.jpg
        (r"([^/]+)\.rf\.[^/]*$", SHARED_COPIES),  # scene12_jpg.rf.1a2b3c.jpg, by Roboflow
        (rf"([^/]+?){copy}\.[^/.]+$", SHARED_COPIES),  # IMG_1234 (1).jpg
    ]
    return found


def shared_stems(names: list[Name], expression: str, least: float) -> Shared | None:
    """What an expression finds in names; None if that tells no groups.

    least: the part of all images that must share their stem with another one. Only images of one
    class and one folder count as sharing it: each class may count its images from 1.
    """
    search = re.compile(expression).search
    totals = Counter(name.part for name in names)
    counts = Counter()
    examples = {}

    for name in names:
        match = search(name.text)
        if match:
            key = (name.part, name.folder, match[1])
            counts[key] += 1
            # Of the longest name, one sees best what it has in common with others.
            examples[key] = max(examples.get(key, ""), name.text, key=len)

    shared = {key: count for key, count in counts.items() if count > 1}
    images = sum(shared.values())
    if not shared or images < least * len(names):
        return None
    for (part, _, _), count in shared.items():
        if count > MOST_OF_A_CLASS * totals[part]:
            return None

    stems = {stem for _, _, stem in shared}
    if not tell_apart(stems, images):
        return None
    first = next(iter(shared))
    return Shared(images=images, stems=len(stems), example=examples[first])


def tell_apart(stems: set[str], images: int) -> bool:
    """Are these stems of so many images likely to have been chosen for telling scenes apart?"""
    if sum(bool(DAY.search(stem)) for stem in stems) > len(stems) / 2:
        return False
    with_number = sum(any(map(str.isdecimal, stem)) for stem in stems)
    if with_number >= len(stems) / 2:
        return len(stems) >= FEWEST_STEMS
    return len(stems) >= FEWEST_NAMES and images <= MOST_IMAGES_OF_A_NAME * len(stems)


def quoted(text: str) -> str:
    """A text as it is typed as one argument."""
    return f'"{text}"' if os.name == "nt" else shlex.quote(text)
