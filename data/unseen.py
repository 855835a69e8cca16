"""Which images a finished run was not trained on, found again by what the run has recorded."""

import argparse
from typing import NamedTuple

import numpy as np
import torch

from data import doctor
from data.dataset import Dataset
from data.notes import silenced
from data.split import make_splits

VALIDATION = "the validation split"
HELD_OUT = "a part of the training split, held out"
TEST = "the test split"

# Where images are that a network was not trained on, by --calibration; a twin has trained on other
# images than the network that it calibrates, which has seen them all.
SOURCES = {"validation": ("val", VALIDATION), "held-out": ("held-out", HELD_OUT)}


class Unseen(NamedTuple):
    """Images uint8 [n, H, W, channels] as the dataset has them, and labels int64 [n]."""

    images: np.ndarray
    labels: np.ndarray
    source: str  # in words


def unseen_images(dataset: Dataset, arguments: dict) -> Unseen | None:
    """The images beside the test split that a run was not trained on; None if it has seen them all.

    arguments: step1's, from the spec of the run. The split is made again as step1 made it, copies
    and groups together, and so the doctor looks for them again.
    """
    if arguments.get("calibration") not in SOURCES:
        return None
    name, source = SOURCES[arguments["calibration"]]
    if name == "val" and dataset.val_images is not None:
        return Unseen(dataset.val_images, dataset.val_labels, source)

    # Which rows are taken does not depend on the size: nothing is resized for it.
    size = tuple(dataset.train_images.shape[1:3])
    settings = argparse.Namespace(**{**arguments, "image_size": size})
    with silenced(True):  # step1 has said it
        examined = doctor.examined(dataset)
        splits = make_splits(examined, settings, torch.device("cpu"))
    rows = np.sort(splits[name].members.numpy())
    return Unseen(dataset.train_images[rows], dataset.train_labels[rows], source)
