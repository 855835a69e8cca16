"""What a finished run has reached: the figures of summary.json."""

import statistics
from datetime import datetime, timezone

import numpy as np
import torch

from inference import metrics


def summarise(trainer, deployable, evaluated) -> tuple[dict, np.ndarray]:
    """The figures of a run, and the outputs that they are of: [n, classes] probabilities, or [n, 1].

    deployable: the network that is the result; evaluated: over the test split.
    """
    settings, dataset, best = trainer.settings, trainer.dataset, trainer.progress.best
    summary = {
        "dataset": settings.dataset,
        "model": settings.model,
        "epochs": settings.epochs,
        "test_accuracy": evaluated.accuracy,
        "test_loss": evaluated.loss,
        "train_seconds": round(trainer.progress.elapsed, 3),
        "parameters": sum(p.numel() for p in deployable.network.parameters()),
        "seed": settings.seed,
        "epoch_kept": best["epoch"] if best else settings.epochs,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    if dataset.task == "regression":
        return summary, evaluated.outputs
    logits, labels = torch.from_numpy(evaluated.outputs), dataset.test_labels
    probabilities = logits.softmax(1).numpy()
    if trainer.calibration:
        summary["temperature"] = trainer.calibration.temperature
        logits = logits / trainer.calibration.temperature
        loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(labels).long()).item()
        summary |= {"test_loss_uncalibrated": evaluated.loss, "test_loss": loss}
        summary["calibration_error_uncalibrated"] = metrics.calibration_error(probabilities, labels)
        probabilities = logits.softmax(1).numpy()
    summary["calibration_error"] = metrics.calibration_error(probabilities, labels)
    summary["calibration_error_floor"] = metrics.calibration_error_floor(probabilities)
    per_class = metrics.per_class(labels, evaluated.outputs.argmax(1), dataset.classes)
    leaked, right = dataset.findings.leaked, evaluated.outputs.argmax(1) == labels
    if leaked.any():  # test images that are also in the training split
        summary["test_images_in_train"] = int(leaked.sum())
        summary["test_accuracy_without_them"] = None if leaked.all() else float(right[~leaked].mean())
    seen = [row for row in per_class.values() if row["support"]]
    summary["balanced_accuracy"] = statistics.fmean(row["recall"] for row in seen)
    summary |= {"macro_f1": statistics.fmean(row["f1"] for row in seen), "per_class": per_class}
    return summary, probabilities
