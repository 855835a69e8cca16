"""Samples with their expected outputs: the golden samples inside a file, and those that a bundle has."""

import base64
import io
import json
import math
from pathlib import Path

import numpy as np
from PIL import Image

from deploy.comparing import Outputs
from inference.images import fit_to_input

GOLDEN_SAMPLES, BUNDLE_SAMPLES = 4, 10
CALIBRATION_IMAGES, CALIBRATION_BYTES = 256, 4 << 20  # at most


def one_of_each_class(dataset, count: int) -> list[int]:
    """Indices of the first test image of each of the first `count` classes; for regression the first rows."""
    if dataset.task == "regression":
        return list(range(min(count, len(dataset.test_labels))))
    return np.unique(dataset.test_labels, return_index=True)[1][:count].tolist()


def golden_samples(inputs: np.ndarray, outputs: Outputs, spec: dict) -> list[dict]:
    """Inputs, images uint8 [N, H, W, C] as base64 PNG, or features [N, n], each with its outputs.

    Of a file of fixed size also the tensors that an engine is given, [height, width, C], as base64.
    """
    if inputs.ndim == 2:
        pairs = zip(inputs.tolist(), outputs.main.tolist(), strict=True)
        return [{"features": features, "prediction": prediction} for features, prediction in pairs]
    samples = []
    for number, (image, probabilities) in enumerate(zip(inputs, outputs.main.tolist(), strict=True)):
        encoded = base64.b64encode(to_png(image)).decode()
        sample = {"image": encoded, "probabilities": [round(p, 7) for p in probabilities]}
        if spec.get("fixed"):
            sample["tensor"] = base64.b64encode(fit_to_input(image[None], spec).tobytes()).decode()
        samples.append(sample if outputs.known is None else {**sample, "known": known_of(outputs, number)})
    return samples


def known_of(outputs: Outputs, number: int) -> float | None:
    return None if outputs.known is None else round(float(outputs.known[number]), 6)


def calibration_images(spec: dict, dataset) -> np.ndarray:
    """Training images, spread over the split, uint8 [N, *image_size, C]."""
    fitting = CALIBRATION_BYTES // (math.prod(spec["image_size"]) * spec["channels"])
    wanted = min(CALIBRATION_IMAGES, max(1, fitting))
    images = dataset.train_images[:: -(-len(dataset.train_images) // wanted)]
    return fit_to_input(np.asarray(images), {**spec, "fixed": {"batch": None, "input": "uint8"}})


def write_samples(folder: str, classes: list[str], dataset, expected: Outputs) -> None:
    """Write samples/ of a bundle: test images, and what step3 --format json prints of them."""
    lines = []
    for number, k in enumerate(one_of_each_class(dataset, BUNDLE_SAMPLES)):
        inputs, outputs = dataset.test_images[k], expected.main[k].tolist()
        if dataset.task == "regression":
            line = {"values": inputs.tolist(), "prediction": outputs[0]}
        else:
            name = f"samples/{number:02}.png"
            Path(folder, name).write_bytes(to_png(inputs))
            ranked = sorted(zip(classes, outputs, strict=True), key=lambda pair: -pair[1])[:3]
            top = [{"label": label, "probability": round(probability, 6)} for label, probability in ranked]
            line = {"path": name, **top[0], "known": known_of(expected, k), "top": top}
        lines.append(json.dumps(line) + "\n")
    Path(folder, "samples", "expected.jsonl").write_bytes("".join(lines).encode())


def to_png(image: np.ndarray) -> bytes:
    """uint8 [H, W, C] as the bytes of a PNG."""
    png = io.BytesIO()
    Image.fromarray(image.squeeze(-1) if image.shape[2] == 1 else image).save(png, "PNG")
    return png.getvalue()
