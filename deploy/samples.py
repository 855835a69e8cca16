"""Samples with their expected outputs: the golden samples inside a file, and those of a bundle."""

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
BUNDLE_TOP_K = 3
CALIBRATION_IMAGES, CALIBRATION_BYTES = 256, 4 << 20  # at most


def one_of_each_class(dataset, count: int) -> list[int]:
    """Indices of the first test image of each of the first `count` classes.

    Of a regression, those of the first rows.
    """
    if dataset.task == "regression":
        return list(range(min(count, len(dataset.test_labels))))
    _, first = np.unique(dataset.test_labels, return_index=True)
    return first[:count].tolist()


def golden_images(dataset) -> np.ndarray:
    """The test inputs that become golden samples, [n, H, W, channels] or [n, features]."""
    return dataset.test_images[one_of_each_class(dataset, GOLDEN_SAMPLES)]


def golden_samples(
    inputs: np.ndarray, outputs: Outputs, spec: dict, with_tensors: bool = True
) -> list[dict]:
    """Golden samples for a spec: each input with its outputs.

    inputs: images uint8 [n, H, W, channels], which become base64 PNG, or features [n, k]. A file of
    fixed size also gets the tensor that its engine takes, [height, width, channels], as base64,
    unless with_tensors is false, because the inputs have its size already.
    """
    if inputs.ndim == 2:
        pairs = zip(inputs.tolist(), outputs.main.tolist(), strict=True)
        return [{"features": features, "prediction": prediction} for features, prediction in pairs]

    samples = []
    for number, image in enumerate(inputs):
        probabilities = outputs.main[number].tolist()
        sample = {
            "image": base64.b64encode(to_png(image)).decode(),
            # float32 has seven digits; more would only take space.
            "probabilities": [round(probability, 7) for probability in probabilities],
        }
        if spec.get("fixed") and with_tensors:  # other engines get no resized image from step3
            tensor = fit_to_input(image[None], spec)
            sample["tensor"] = base64.b64encode(tensor.tobytes()).decode()
        if outputs.known is not None:
            sample["known"] = known_of(outputs, number)
        samples.append(sample)
    return samples


def known_of(outputs: Outputs, number: int) -> float | None:
    """`known` of one input, as it is written."""
    if outputs.known is None:
        return None
    return round(float(outputs.known[number]), 6)


def calibration_images(spec: dict, dataset) -> np.ndarray:
    """Training images, spread over the split, uint8 [n, *image_size, channels]."""
    # Spread evenly, because class folders are read one after another.
    bytes_each = math.prod(spec["image_size"]) * spec["channels"]
    wanted = min(CALIBRATION_IMAGES, max(1, CALIBRATION_BYTES // bytes_each))
    step = -(-len(dataset.train_images) // wanted)
    images = np.asarray(dataset.train_images[::step])
    return fit_to_input(images, {**spec, "fixed": {"batch": None, "input": "uint8"}})


def write_samples(folder: str, classes: list[str], dataset, expected: Outputs) -> None:
    """Write samples/ of a bundle: test images, and what step3 --format json prints of them."""
    rows = []
    for number, index in enumerate(one_of_each_class(dataset, BUNDLE_SAMPLES)):
        if dataset.task == "regression":
            values = dataset.test_images[index].tolist()
            rows.append({"values": values, "prediction": expected.main[index].tolist()[0]})
            continue

        name = f"samples/{number:02}.png"
        Path(folder, name).write_bytes(to_png(dataset.test_images[index]))
        top = ranked(classes, expected.main[index])[:BUNDLE_TOP_K]
        rows.append({"path": name, **top[0], "known": known_of(expected, index), "top": top})

    lines = [json.dumps(row) + "\n" for row in rows]
    Path(folder, "samples", "expected.jsonl").write_bytes("".join(lines).encode())


def ranked(classes: list[str], probabilities: np.ndarray) -> list[dict]:
    """Labels with their probabilities [classes], the most probable first."""
    pairs = zip(classes, probabilities.tolist(), strict=True)
    # sorted() is stable: equal probabilities stay in the order of the classes, as in step3.
    best_first = sorted(pairs, key=lambda pair: -pair[1])
    return [
        {"label": label, "probability": round(probability, 6)} for label, probability in best_first
    ]


def to_png(image: np.ndarray) -> bytes:
    """uint8 [H, W, channels] as the bytes of a PNG."""
    png = io.BytesIO()
    pixels = image.squeeze(-1) if image.shape[2] == 1 else image  # grey: [H, W]
    Image.fromarray(pixels).save(png, "PNG")
    return png.getvalue()
