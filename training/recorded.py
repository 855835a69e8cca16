"""What a run has recorded of itself, checked before it is used: config.json and checkpoint.pt may
be damaged, or a stranger's.

A new option of step1 is a line in ARGUMENTS. Each check raises ValueError with the reason.
"""

import argparse
import contextlib
import math
import re
import sys

import torch

import data
from inference.spec import MAX_NAME, MAX_SIDE, Rule, is_number, is_whole
from training.command_line import group_by
from training.progress import Progress, columns_of
from training.recipes import (
    ACTIVATIONS,
    BATCH_NORMS,
    CALIBRATIONS,
    MOST_WIDTH,
    OPTIMIZERS,
    SCHEDULES,
)

FITS = ("stretch", "crop", "letterbox")
GROUNDS = ("white", "black")
MAX_COUNT = 1 << 31  # of epochs, images and the like
MAX_TEXT = 4096  # characters of a path or a name
MAX_LAYERS = 1024
INTERVAL = re.compile(r"\d{1,6}(\.\d+)?m")


# ------------------------------------------------------------------------------------------- values
def is_text(value) -> bool:
    """Is it a text that can be a path?"""
    return isinstance(value, str) and len(value) <= MAX_TEXT and "\0" not in value


def is_count(value) -> bool:
    return is_whole(value, 1, MAX_COUNT)


def is_finite(value, low: float = -math.inf, high: float = math.inf) -> bool:
    """Is it a number from low to high that a float can hold?"""
    largest = sys.float_info.max
    return is_number(value, max(low, -largest), min(high, largest))


def is_size(value) -> bool:
    """Is it (height, width)?"""
    is_pair = isinstance(value, (list, tuple)) and len(value) == 2
    return is_pair and all(is_whole(side, 1, MAX_SIDE) for side in value)


def are_layers(value) -> bool:
    is_list = isinstance(value, (list, tuple)) and len(value) <= MAX_LAYERS
    return is_list and all(map(is_count, value))


def are_augmentations(value) -> bool:
    is_list = isinstance(value, list) and len(value) <= MAX_LAYERS
    return is_list and all(name in data.AUGMENTATIONS for name in value)


def is_interval(value) -> bool:
    """Is it a number of steps, or of minutes such as "10m"?"""
    return is_count(value) or (isinstance(value, str) and bool(INTERVAL.fullmatch(value)))


def is_group_by(value) -> bool:
    """Is it what --group-by takes?"""
    with contextlib.suppress(argparse.ArgumentTypeError):
        return is_text(value) and group_by(value) == value
    return False


def one_of(names) -> Rule:
    names = list(names)
    return (lambda value: isinstance(value, str) and value in names, f"one of {', '.join(names)}")


def maybe(rule: Rule) -> Rule:
    """The same rule, or None."""
    is_valid, wanted = rule
    return (lambda value: value is None or is_valid(value), f"{wanted}, or nothing")


def between(low: float, high: float) -> Rule:
    return (lambda value: is_finite(value, low, high), f"a number from {low:g} to {high:g}")


TEXT: Rule = (is_text, "a text")
COUNT: Rule = (is_count, f"a whole number from 1 to {MAX_COUNT}")
SWITCH: Rule = (lambda value: isinstance(value, bool), "true or false")
POSITIVE: Rule = (lambda value: is_finite(value, 0) and value > 0, "a number above 0")
AT_LEAST_ZERO: Rule = (lambda value: is_finite(value, 0), "a number from 0")

# The options of step1 as a run records them: (test, what it must be).
ARGUMENTS: dict[str, Rule] = {
    "dataset": one_of(data.DATASETS),
    "data_dir": maybe(TEXT),
    "image_size": (is_size, f"(height, width), each from 1 to {MAX_SIDE}"),
    "fit": one_of(FITS),
    "augment": (are_augmentations, f"a list of {', '.join(data.AUGMENTATIONS)}"),
    "val_fraction": maybe(between(0, 0.9)),
    "patience": maybe(COUNT),
    "class_weights": maybe(one_of(["balanced"])),
    "cache_dir": maybe(TEXT),
    "strict": SWITCH,
    "max_pixels": maybe(COUNT),
    "test_csv": maybe(TEXT),
    "image_root": maybe(TEXT),
    "image_column": maybe(TEXT),
    "label_column": maybe(TEXT),
    "group_column": maybe(TEXT),
    "group_by": maybe((is_group_by, "a regular expression with a bracket")),
    "model": TEXT,
    "width": maybe(between(1e-6, MOST_WIDTH)),
    "activation": maybe(one_of(ACTIVATIONS)),
    "hidden": maybe((are_layers, "a list of whole numbers")),
    "dropout": maybe(between(0, 0.99)),
    "pretrained": maybe(TEXT),
    "freeze_backbone": SWITCH,
    "epochs": COUNT,
    "minutes": maybe(POSITIVE),
    "batch_size": COUNT,
    "optimizer": one_of(OPTIMIZERS),
    "lr": POSITIVE,
    "momentum": maybe(between(0, 0.9999)),
    "weight_decay": AT_LEAST_ZERO,
    "schedule": one_of(SCHEDULES),
    "layer_decay": between(1e-6, 1),
    "batch_norm": one_of(BATCH_NORMS),
    "keep_start": between(0, 1),
    "label_smoothing": between(0, 0.99),
    "calibration": one_of(CALIBRATIONS),
    "precision": one_of(("auto", "fp32", "bf16")),
    "device": TEXT,
    "threads": maybe((lambda value: is_whole(value, 1, 1024), "a whole number from 1 to 1024")),
    "seed": (lambda value: is_whole(value, 0, MAX_COUNT), f"a whole number to {MAX_COUNT}"),
    "sync_batchnorm": SWITCH,
    "name": maybe(TEXT),
    "checkpoint_every": maybe((is_interval, "a number of steps, or of minutes such as 10m")),
    "quiet": SWITCH,
}
# Of metrics.csv, with a validation split and without.
COLUMNS = (columns_of("val"), columns_of("test"))

# What a run cannot go on without; step1's own defaults stand for options that came later.
REQUIRED = (
    "dataset",
    "data_dir",
    "image_size",
    "augment",
    "model",
    "width",
    "hidden",
    "dropout",
    "epochs",
    "batch_size",
    "optimizer",
    "lr",
    "weight_decay",
    "schedule",
    "label_smoothing",
    "seed",
)


def check_arguments(arguments) -> None:
    """Raise ValueError naming the first argument of a run that is missing or cannot be."""
    if not isinstance(arguments, dict):
        raise ValueError("its arguments are no dict")

    for name, rule in ARGUMENTS.items():
        if name in arguments:
            check(name, arguments[name], rule)
        elif name in REQUIRED:
            raise ValueError(f"its arguments lack {name}")

    if arguments["optimizer"] in ("sgd", "muon"):
        check("momentum", arguments.get("momentum"), between(0, 0.9999))
    if arguments["dataset"] == "linear" and arguments["model"] not in ("linear", "mlp"):
        raise ValueError("its dataset has features, and its model takes images")


def check(name: str, value, rule: Rule) -> None:
    """Raise ValueError if a value breaks its rule."""
    is_valid, wanted = rule
    if not is_valid(value):
        raise ValueError(f"{name} must be {wanted}")


# -------------------------------------------------------------------------------------- checkpoints
def check_training(training) -> None:
    """Raise ValueError if the state that training goes on from cannot be one."""
    if not isinstance(training, dict):
        raise ValueError("its training state is no dict")
    check_progress(training["progress"])
    check_fingerprint(training["data"])

    if not isinstance(training["optimizer"], dict):
        raise ValueError("its optimizer's state is no dict")
    if training["network"] is not None:
        check_state_dict(training["network"])


def check_progress(progress) -> None:
    """Raise ValueError if a checkpoint's progress cannot be one."""
    names = set(vars(Progress()))
    if not isinstance(progress, dict) or set(progress) != names:
        raise ValueError(f"its progress does not have the keys {', '.join(sorted(names))}")

    whole = (lambda value: is_whole(value, 0, MAX_COUNT), "a whole number")
    check("epoch", progress["epoch"], COUNT)
    check("steps", progress["steps"], whole)
    check("seconds", progress["seconds"], AT_LEAST_ZERO)
    check("elapsed", progress["elapsed"], AT_LEAST_ZERO)
    check("sums", progress["sums"], (are_sums, "three numbers"))
    check("rows", progress["rows"], (are_rows, "a list of a row for each epoch"))
    if len(progress["rows"]) != progress["epoch"] - 1:
        raise ValueError("it has not one row of metrics for each epoch")
    if progress["steps"] and progress["sums"][2] <= 0:
        raise ValueError("it has done steps, and seen no images")
    if progress["best"] is not None:
        check_best(progress["best"])


def are_sums(value) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(map(is_finite, value))


def are_rows(value) -> bool:
    """Are these rows of metrics.csv, with the same columns each?"""
    if not isinstance(value, list):
        return False
    for row in value:
        is_row = isinstance(row, dict) and list(row) in COLUMNS and list(row) == list(value[0])
        if not is_row or not all(map(is_cell, row.values())):
            return False
    return True


def is_cell(value) -> bool:
    return value is None or is_finite(value)


def check_best(best) -> None:
    """Raise ValueError if this cannot be the best epoch."""
    if not isinstance(best, dict) or not {"score", "epoch", "state_dict"} <= best.keys():
        raise ValueError("its best epoch lacks keys")
    score = best["score"]
    if not isinstance(score, list) or len(score) != 2 or not all(map(is_finite, score)):
        raise ValueError("the score of its best epoch must be two numbers")
    check("epoch", best["epoch"], (lambda value: is_whole(value, 0), "a whole number from 0"))
    check_state_dict(best["state_dict"])


def check_fingerprint(fingerprint) -> None:
    """Raise ValueError if this cannot be a dataset's; see data.dataset.differences."""
    if not isinstance(fingerprint, dict) or not are_texts(fingerprint.get("classes")):
        raise ValueError("its fingerprint of the data has no classes")

    for split in ("train", "val", "test"):
        part = fingerprint.get(split)
        if part is None:
            continue
        is_part = isinstance(part, dict) and {"images", "hash"} <= part.keys()
        if not is_part or not is_whole(part["images"], 0, MAX_COUNT):
            raise ValueError(f"its fingerprint of the {split} split is malformed")


def are_texts(value) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(text, str) for text in value)


def check_state_dict(state) -> None:
    """Raise ValueError if this does not map names to tensors."""
    if not isinstance(state, dict) or not state:
        raise ValueError("it holds no weights")
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise ValueError("its weights are no tensors")


# ----------------------------------------------------------------------------------------- the spec
def are_numbers(value) -> bool:
    return isinstance(value, list) and bool(value) and all(map(is_finite, value))


def are_versions(value) -> bool:
    return isinstance(value, dict) and all(map(is_text, [*value.keys(), *value.values()]))


def are_classes(value) -> bool:
    """Is it a list of different names that an exported file can carry?"""
    if not are_texts(value) or not value or len(set(value)) != len(value):
        return False
    return all(1 <= len(name) <= MAX_NAME for name in value)


def is_calibration(value) -> bool:
    keys = isinstance(value, dict) and {"source", "images"} <= value.keys()
    return keys and is_text(value["source"]) and is_whole(value["images"], 0, MAX_COUNT)


def is_known(value) -> bool:
    keys = isinstance(value, dict) and {"layers", "images"} <= value.keys()
    return keys and are_texts(value["layers"]) and is_whole(value["images"], 0, MAX_COUNT)


# The keys of a checkpoint's spec that no reader of exported files checks; see inference.spec.RULES.
SPEC: dict[str, Rule] = {
    "classes": (are_classes, f"a list of different names of at most {MAX_NAME} characters"),
    "channels": COUNT,
    "image_size": (is_size, f"(height, width), each from 1 to {MAX_SIDE}"),
    "mean": (are_numbers, "a list of numbers"),
    "std": (are_numbers, "a list of numbers"),
    "dataset": one_of(data.DATASETS),
    "model": TEXT,
    "parameters": (lambda value: is_whole(value, 0, 1 << 53), "a whole number"),
    "test_accuracy": maybe(between(0, 1)),
    "versions": (are_versions, "texts by text"),
}
SPEC_LATER: dict[str, Rule] = {
    "created": TEXT,
    "white": (lambda value: is_whole(value, 1, 65535), "a whole number from 1 to 65535"),
    "ground": maybe(one_of(GROUNDS)),
    "fit": maybe(one_of(FITS)),
    "unseen": maybe(between(0, 1)),
    "temperature": maybe(POSITIVE),
    "calibration": maybe((is_calibration, "a source and a number of images")),
    "known": maybe((is_known, "layers and a number of images")),
}


def check_spec(spec) -> None:
    """Raise ValueError naming the first key of a checkpoint's spec that is missing or cannot be."""
    if not isinstance(spec, dict):
        raise ValueError("its spec is no dict")
    for name, rule in SPEC.items():
        if name not in spec:
            raise ValueError(f"its spec lacks {name}")
        check(name, spec[name], rule)
    for name, rule in SPEC_LATER.items():
        if name in spec:
            check(name, spec[name], rule)
    check_arguments(spec.get("arguments"))

    channels = spec["channels"]
    if len(spec["mean"]) != channels or len(spec["std"]) != channels:
        raise ValueError("its mean and std do not fit its channels")
