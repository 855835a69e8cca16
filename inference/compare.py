"""How the answers of two exported files differ on the same images."""

import collections
import itertools
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from inference.command_line import say
from inference.labels import Labels
from inference.predict import Model, decode_for

MOST_CHANGED = 20  # images that are named
LATENCY_RUNS = 20


@dataclass
class Change:
    """How two files answer one image.

    change: the largest difference of the probability of a class. truth: the label of the
    image, None if it has none that is a class.
    """

    path: str
    change: float
    old_label: str
    old_probability: float
    new_label: str
    new_probability: float
    truth: str | None

    def as_row(self) -> dict:
        """What --compare writes of it."""
        return {
            "path": self.path,
            "change": self.change,
            "old": self.old_label,
            "p_old": self.old_probability,
            "new": self.new_label,
            "p_new": self.new_probability,
        }


def compare_models(
    models: list[Model], paths: list[str], results: list[Iterator], labels: Labels
) -> tuple[dict | None, int]:
    """Compare the answers of two models, of predict_files() each with all classes.

    paths: of the two files. labels: of the images. Returns the figures that --compare writes, None
    if no image could be compared, and the exit code: 1 if some inputs could not be used.
    """
    changes, code = read_changes(results, labels)
    if not changes:
        return None, 1

    image_path = changes[0].path
    # Both have run by now: neither is timed cold.
    old = file_figures(models[0], paths[0], image_path)
    new = file_figures(models[1], paths[1], image_path)
    return summarise(changes, old, new), code


def read_changes(results: list[Iterator], labels: Labels) -> tuple[list[Change], int]:
    """The changes of all images that both models answer, and the exit code."""
    changes = []
    code = 0
    old_rows, new_rows = (itertools.chain.from_iterable(rows) for rows in results)
    for old, new in zip(old_rows, new_rows, strict=True):
        error = old.get("error") or new.get("error")
        if error:
            code = 1
            say(f"error: {old['path']}: {error}")
        else:
            changes.append(change_between(old, new, labels))
    return changes, code


def change_between(old: dict, new: dict, labels: Labels) -> Change:
    """The change between two rows of one image, as predict() gives them with all classes."""
    old_probabilities = {entry["label"]: entry["probability"] for entry in old["top"]}
    new_probabilities = {entry["label"]: entry["probability"] for entry in new["top"]}
    differences = []
    # By label: the two files may list their classes in different orders.
    for label, probability in old_probabilities.items():
        differences.append(abs(probability - new_probabilities[label]))

    truth = labels.of(old["path"])
    return Change(
        path=old["path"],
        change=round(max(differences), 6),
        old_label=old["top"][0]["label"],
        old_probability=old["top"][0]["probability"],
        new_label=new["top"][0]["label"],
        new_probability=new["top"][0]["probability"],
        truth=truth if truth in old_probabilities else None,
    )


def file_figures(model: Model, path: str, image_path: str) -> dict:
    """The size of a file, and its speed on one image."""
    image = decode_for(model, image_path, model.max_pixels)[None]
    times = []
    for _ in range(LATENCY_RUNS):
        started = time.perf_counter()
        model.predict(image)
        times.append(time.perf_counter() - started)

    return {
        "model": path,
        "bytes": os.path.getsize(path),
        "ms_per_image": round(1000 * float(np.median(times)), 4),
    }


def summarise(changes: list[Change], old: dict, new: dict) -> dict:
    """The figures that --compare writes; old, new: those of each file."""
    flips = collections.Counter()
    old_hits = new_hits = labelled = 0
    for change in changes:
        if change.old_label != change.new_label:
            flips[change.old_label, change.new_label] += 1
        if change.truth is not None:
            labelled += 1
            old_hits += change.old_label == change.truth
            new_hits += change.new_label == change.truth

    pairs = []
    for (old_label, new_label), count in flips.most_common():
        pairs.append({"old": old_label, "new": new_label, "count": count})

    # The images that changed most are the ones to look at.
    largest = sorted(changes, key=lambda change: -change.change)[:MOST_CHANGED]
    return {
        "images": len(changes),
        "agreement": round(1 - flips.total() / len(changes), 6),
        "labelled": labelled,
        "old": {**old, "accuracy": share(old_hits, labelled)},
        "new": {**new, "accuracy": share(new_hits, labelled)},
        "flips": pairs,
        "changed": [change.as_row() for change in largest if change.change > 0],
    }


def share(hits: int, count: int) -> float | None:
    return round(hits / count, 6) if count else None


def count_flips(figures: dict) -> int:
    """How many answers changed, of the figures of compare_models()."""
    return sum(pair["count"] for pair in figures["flips"])
