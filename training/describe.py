"""The spec of a run: what a checkpoint, and then each exported file, says of itself.

deploy/README.md explains the keys.
"""

import argparse
import importlib.metadata
import platform
from datetime import datetime, timezone

import torch

import model
from data import Dataset
from inference.spec import SCHEMA
from training.calibration import Calibration


def describe_run(
    settings: argparse.Namespace, dataset: Dataset, deployable: model.Deployable
) -> dict:
    """The spec of a run before its first epoch: without a result, and not calibrated."""
    resize = None
    fit = None
    if dataset.has_images:
        resize = "bilinear antialias"
        fit = settings.fit
    parameters = sum(parameter.numel() for parameter in deployable.network.parameters())
    versions = {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "torchvision": importlib.metadata.version("torchvision"),  # importing it takes a second
    }
    if model.is_timm(settings.model):
        versions["timm"] = importlib.metadata.version("timm")
    return {
        "schema": SCHEMA,
        "task": dataset.task,
        "classes": list(dataset.classes),
        "channels": dataset.train_images.shape[-1],  # for regression: the number of features
        "image_size": list(settings.image_size),
        "resize": resize,
        "fit": fit,
        "unseen": dataset.unseen,
        "mean": deployable.mean.flatten().tolist(),
        "std": deployable.std.flatten().tolist(),
        "dataset": settings.dataset,
        "model": settings.model,
        "parameters": parameters,
        "test_accuracy": None,
        "arguments": vars(settings),
        "versions": versions,
        "white": dataset.white,  # the level of 16-bit pixels that becomes 255
        "ground": dataset.ground,  # what transparent pixels lie on
        "temperature": None,
        "calibration": None,
        "known": None,
        "created": now(),
    }


def with_result(spec: dict, test_accuracy: float | None) -> dict:
    """The spec of a checkpoint that is written now. test_accuracy: None if it is not known."""
    return {**spec, "test_accuracy": test_accuracy, "created": now()}


def with_calibration(spec: dict, calibration: Calibration) -> dict:
    """The spec of a network that has been calibrated."""
    return {
        **spec,
        "temperature": calibration.temperature,
        "calibration": {"source": calibration.source, "images": calibration.images},
        "known": {"layers": calibration.layers, "images": calibration.compared},
    }


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
