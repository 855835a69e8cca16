"""Everyday changes of a picture, after Hendrycks and Dietterich (2019): does a network still see it right?

Each is a pure function of uint8 images [n, H, W, C], a strength and a numpy generator, and returns as many
images of the same shape. Lengths are in pixels of the images as they are given.
"""

import io
import math
from collections.abc import Callable, Iterator

import numpy as np
from PIL import Image

from inference.predict import Model

PART = 500  # images that are changed, and run, together


def to_bytes(pixels: np.ndarray) -> np.ndarray:
    return pixels.round().clip(0, 255).astype(np.uint8)


def noise(images: np.ndarray, sigma: float, rng: np.random.Generator) -> np.ndarray:
    """Normal noise of a standard deviation of `sigma` grey levels, alike in all pixels, as in a dim light."""
    return to_bytes(images + sigma * rng.standard_normal(images.shape, np.float32))


def shot_noise(images: np.ndarray, photons: float, rng: np.random.Generator) -> np.ndarray:
    """Each pixel counts its photons, of which a white one has so many: noise grows with the light."""
    return to_bytes(rng.poisson(images * (photons / 255)) * (255 / photons))


def defocus(images: np.ndarray, radius: float, rng: np.random.Generator) -> np.ndarray:
    """Every point becomes a disc."""
    fine, reach = 8, math.ceil(radius)
    side = (np.arange(fine * (2 * reach + 1)) + 0.5) / fine - reach - 0.5
    disc = (side[:, None] ** 2 + side**2 <= (radius + 0.25) ** 2).astype(float)
    kernel = disc.reshape(2 * reach + 1, fine, 2 * reach + 1, fine).mean((1, 3))
    return convolve(images, kernel)


def motion_blur(images: np.ndarray, length: float, rng: np.random.Generator) -> np.ndarray:
    """Every point becomes a line, in one of eight directions."""
    directions, changed = rng.integers(0, 8, len(images)), np.empty_like(images)
    reach, along = math.ceil(length / 2), np.linspace(-length / 2, length / 2, 64)
    for direction in range(8):
        kernel = np.zeros((2 * reach + 1, 2 * reach + 1))
        angle = direction * math.pi / 8
        rows, columns = along * math.sin(angle) + reach, along * math.cos(angle) + reach
        np.add.at(kernel, (rows.round().astype(int), columns.round().astype(int)), 1)
        changed[directions == direction] = convolve(images[directions == direction], kernel)
    return changed


def convolve(images: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """uint8 images [n, H, W, C] by a kernel [k, k] that is scaled to a sum of 1, repeating the edge."""
    reach, (height, width) = len(kernel) // 2, images.shape[1:3]
    padded = pad(images, reach, "edge").astype(np.float32)
    total = np.zeros(images.shape, np.float32)
    for (row, column), weight in np.ndenumerate(kernel / kernel.sum()):
        if weight:
            total += np.float32(weight) * padded[:, row : row + height, column : column + width]
    return to_bytes(total)


def pad(images: np.ndarray, pixels: int, mode: str) -> np.ndarray:
    return np.pad(images, ((0, 0), (pixels, pixels), (pixels, pixels), (0, 0)), mode)


def brightness(images: np.ndarray, factor: float, rng: np.random.Generator) -> np.ndarray:
    """Less or more light."""
    return to_bytes(images * np.float32(factor))


def contrast(images: np.ndarray, factor: float, rng: np.random.Generator) -> np.ndarray:
    """Towards the mean of each image, as through haze."""
    mean = images.mean((1, 2, 3), keepdims=True, dtype=np.float32)
    return to_bytes(mean + (images - mean) * np.float32(factor))


def shift(images: np.ndarray, pixels: int, rng: np.random.Generator) -> np.ndarray:
    """By so many pixels up or down and left or right, repeating the edge."""
    padded, (height, width) = pad(images, pixels, "edge"), images.shape[1:3]
    corners = 2 * pixels * rng.integers(0, 2, (len(images), 2))
    cut = [image[y : y + height, x : x + width] for image, (y, x) in zip(padded, corners, strict=True)]
    return np.stack(cut)


def rotation(images: np.ndarray, degrees: float, rng: np.random.Generator) -> np.ndarray:
    """To the left or to the right, mirrored at the edge."""
    (height, width), signs = images.shape[1:3], rng.choice((-1, 1), len(images))
    margin = min(height, width) // 3
    padded = pad(images, margin, "symmetric")
    turned = each(padded, lambda image, k: image.rotate(degrees * signs[k], Image.Resampling.BILINEAR))
    return turned[:, margin : margin + height, margin : margin + width]


def jpeg(images: np.ndarray, quality: float, rng: np.random.Generator) -> np.ndarray:
    """Compressed and decompressed."""

    def compressed(image, _):
        file = io.BytesIO()
        image.save(file, "JPEG", quality=int(quality))
        return Image.open(file)

    return each(images, compressed)


def resolution(images: np.ndarray, factor: float, rng: np.random.Generator) -> np.ndarray:
    """Made smaller by a factor below 1, and large again."""
    height, width = images.shape[1:3]
    small = max(1, round(width * factor)), max(1, round(height * factor))
    bilinear = Image.Resampling.BILINEAR
    return each(images, lambda image, _: image.resize(small, bilinear).resize((width, height), bilinear))


def each(images: np.ndarray, function: Callable) -> np.ndarray:
    """A function of a Pillow image and its number, for each of uint8 [n, H, W, C]."""
    grey = images.shape[3] == 1
    pictures = (Image.fromarray(image[..., 0] if grey else image) for image in images)
    changed = np.stack([np.asarray(function(picture, k)) for k, picture in enumerate(pictures)])
    return changed[..., None] if grey else changed


CHANGES = {  # name: (function, how mild, medium and strong are, how to print a strength)
    "pixel noise": (noise, (4, 8, 16), "sigma {:g}"),
    "shot noise": (shot_noise, (500, 250, 100), "{:g} photons"),
    "defocus": (defocus, (0.5, 1, 1.5), "{:g} px"),
    "motion blur": (motion_blur, (2, 3, 5), "{:g} px"),
    "lower resolution": (resolution, (0.75, 0.5, 0.33), "x{:g}"),
    "darker": (brightness, (0.8, 0.6, 0.4), "x{:g}"),
    "brighter": (brightness, (1.2, 1.5, 2), "x{:g}"),
    "contrast": (contrast, (0.7, 0.5, 0.3), "x{:g}"),
    "JPEG": (jpeg, (60, 30, 15), "quality {:g}"),
    "shift": (shift, (1, 2, 3), "{:g} px"),
    "rotation": (rotation, (5, 10, 15), "{:g} degrees"),
}


def survey(model: Model, images: np.ndarray, labels: np.ndarray, levels=(1,)) -> Iterator[dict]:
    """How a file does on the images as they are, then under each of CHANGES at each of these levels, 0 to 2.

    images: uint8 [n, H, W, C], test images with their labels [n]; a thousand tell a difference of 3 points.
    Yields change, strength, accuracy, and `known`, the mean of that output, None without it.
    """
    tried = [("none", "", None, 0)]
    for name, (function, strengths, form) in CHANGES.items():
        tried += [(name, form.format(strengths[k]), function, strengths[k]) for k in levels]
    for name, strength, *change in tried:
        accuracy, known = measure(model, images, labels, *change)
        yield {"change": name, "strength": strength, "accuracy": accuracy, "known": known}


def measure(model: Model, images, labels, function: Callable | None = None, strength: float = 0) -> tuple:
    """Accuracy and the mean of `known` (None without that output) on images changed by a function of these.

    The same images get the same random numbers in every call.
    """
    parts, size = [], model.batch or PART
    for start in range(0, len(images), size):
        part = np.ascontiguousarray(images[start : start + size])
        if function is not None:
            part = function(part, strength, np.random.default_rng((start, len(images))))
        parts.append(model.run(part))
    probabilities, known = zip(*parts, strict=True)
    accuracy = float((np.concatenate(probabilities).argmax(1) == labels).mean())
    return accuracy, None if known[0] is None else float(np.concatenate(known).mean())
