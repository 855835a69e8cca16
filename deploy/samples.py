"""Test samples with their expected outputs: the golden samples inside a file, and the samples of a bundle."""

import base64
import io

import numpy as np
from PIL import Image


def one_of_each_class(dataset, count: int) -> list[int]:
    """Indices of the first test image of each of the first `count` classes; for regression the first rows."""
    if dataset.task == "regression":
        return list(range(min(count, len(dataset.test_labels))))
    labels = np.unique(dataset.test_labels)[:count]
    return [int(np.flatnonzero(dataset.test_labels == label)[0]) for label in labels]


def golden_samples(inputs: np.ndarray, outputs: np.ndarray) -> list[dict]:
    """Inputs, images as base64 PNG, each with its outputs: uint8 [N, H, W, C] and probabilities [N, classes].

    For regression: features [N, n] and predictions [N, 1].
    """
    if inputs.ndim == 2:
        pairs = zip(inputs.tolist(), outputs.tolist(), strict=True)
        return [{"features": features, "prediction": prediction} for features, prediction in pairs]
    samples = []
    for image, probabilities in zip(inputs, outputs.tolist(), strict=True):
        encoded = base64.b64encode(to_png(image)).decode()
        samples.append({"image": encoded, "probabilities": [round(p, 7) for p in probabilities]})
    return samples


def bundle_samples(inputs: np.ndarray, outputs: np.ndarray, classes: list[str]) -> list[tuple]:
    """Each sample as the bytes of a PNG, None for regression, and what step3 --format json prints of it."""
    if inputs.ndim == 2:
        pairs = zip(inputs.tolist(), outputs[:, 0].tolist(), strict=True)
        return [(None, {"values": features, "prediction": prediction}) for features, prediction in pairs]
    samples = []
    for image, probabilities in zip(inputs, outputs.tolist(), strict=True):
        ranked = sorted(zip(classes, probabilities, strict=True), key=lambda pair: -pair[1])[:3]
        top = [{"label": label, "probability": round(probability, 6)} for label, probability in ranked]
        samples.append((to_png(image), {**top[0], "top": top}))
    return samples


def to_png(image: np.ndarray) -> bytes:
    """uint8 [H, W, C] as the bytes of a PNG."""
    png = io.BytesIO()
    Image.fromarray(image.squeeze(-1) if image.shape[2] == 1 else image).save(png, "PNG")
    return png.getvalue()
