"""Everyday changes of a picture, after Hendrycks and Dietterich (2019): is it still seen right?

Each change is a pure function of uint8 images [n, H, W, channels], a strength and a numpy
generator, and returns as many images of the same shape. Their lengths are in pixels of the images
as they are given; those of CHANGES grow with the images, so that they are as strong on any.
"""

import io
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

PART = 500  # images that are changed, and run, together
FINE = 8  # subpixels on a pixel's side, for the disc of `defocus`
DIRECTIONS = 8  # of motion blur
ALONG = 64  # points on a line of motion blur, at least
USUAL_SIDE = 32  # pixels of the images that the lengths of CHANGES are given for
# Smaller images would be blurred by less than a pixel, or have too few pixels left at half the
# resolution.
BLURRED_SIDE = 24
BILINEAR = Image.Resampling.BILINEAR


def to_bytes(pixels: np.ndarray) -> np.ndarray:
    return pixels.round().clip(0, 255).astype(np.uint8)


# ---------------------------------------------------------------------------------- noise and light
def noise(images: np.ndarray, sigma: float, rng: np.random.Generator) -> np.ndarray:
    """Normal noise of `sigma` grey levels, alike in all pixels, as in dim light."""
    return to_bytes(images + sigma * rng.standard_normal(images.shape, np.float32))


def shot_noise(images: np.ndarray, photons: float, rng: np.random.Generator) -> np.ndarray:
    """Each pixel counts its photons, a white one so many: noise grows with the light."""
    return to_bytes(rng.poisson(images * (photons / 255)) * (255 / photons))


def brightness(images: np.ndarray, factor: float, rng: np.random.Generator) -> np.ndarray:
    """Less or more light."""
    return to_bytes(images * np.float32(factor))


def contrast(images: np.ndarray, factor: float, rng: np.random.Generator) -> np.ndarray:
    """Towards the mean of each image, as through haze."""
    mean = images.mean((1, 2, 3), keepdims=True, dtype=np.float32)
    return to_bytes(mean + (images - mean) * np.float32(factor))


# --------------------------------------------------------------------------------------------- blur
def defocus(images: np.ndarray, radius: float, rng: np.random.Generator) -> np.ndarray:
    """Every point becomes a disc."""
    reach = math.ceil(radius)
    size = 2 * reach + 1
    # A pixel counts by how many of its subpixels the disc covers.
    side = (np.arange(FINE * size) + 0.5) / FINE - reach - 0.5
    squared_distance = side[:, None] ** 2 + side**2  # [FINE * size, FINE * size]
    disc = (squared_distance <= (radius + 0.25) ** 2).astype(float)
    kernel = disc.reshape(size, FINE, size, FINE).mean((1, 3))
    return convolve(images, kernel)


def motion_blur(images: np.ndarray, length: float, rng: np.random.Generator) -> np.ndarray:
    """Every point becomes a line, in one of eight directions."""
    directions = rng.integers(0, DIRECTIONS, len(images))
    reach = math.ceil(length / 2)
    along = np.linspace(-length / 2, length / 2, max(ALONG, 4 * reach))

    changed = np.empty_like(images)
    for direction in range(DIRECTIONS):
        angle = direction * math.pi / DIRECTIONS
        rows = (along * math.sin(angle) + reach).round().astype(int)
        columns = (along * math.cos(angle) + reach).round().astype(int)
        kernel = np.zeros((2 * reach + 1, 2 * reach + 1))
        np.add.at(kernel, (rows, columns), 1)

        chosen = directions == direction
        changed[chosen] = convolve(images[chosen], kernel)
    return changed


def convolve(images: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """uint8 images [n, H, W, C] by a kernel [k, k] scaled to a sum of 1; the edge is repeated."""
    weights = torch.from_numpy(kernel / kernel.sum()).float()[None, None]  # [1, 1, k, k]
    reach = len(kernel) // 2

    convolved = np.empty_like(images)
    for number, image in enumerate(images):
        planes = torch.from_numpy(image).permute(2, 0, 1)[:, None].float()  # [C, 1, H, W]
        padded = F.pad(planes, (reach, reach, reach, reach), "replicate")
        convolved[number] = to_bytes(F.conv2d(padded, weights)[:, 0].permute(1, 2, 0).numpy())
    return convolved


def pad(images: np.ndarray, pixels: int, mode: str) -> np.ndarray:
    return np.pad(images, ((0, 0), (pixels, pixels), (pixels, pixels), (0, 0)), mode)


# ----------------------------------------------------------------------------------------- geometry
def shift(images: np.ndarray, pixels: int, rng: np.random.Generator) -> np.ndarray:
    """By so many pixels up or down and left or right; the edge is repeated."""
    height, width = images.shape[1:3]
    padded = pad(images, pixels, "edge")
    # The top left corner of what is cut out: at 0 or at twice the shift, in both directions.
    corners = 2 * pixels * rng.integers(0, 2, (len(images), 2))

    cut = []
    for image, (top, left) in zip(padded, corners, strict=True):
        cut.append(image[top : top + height, left : left + width])
    return np.stack(cut)


def rotation(images: np.ndarray, degrees: float, rng: np.random.Generator) -> np.ndarray:
    """To the left or to the right, mirrored at the edge."""
    height, width = images.shape[1:3]
    signs = rng.choice((-1, 1), len(images))
    margin = max(height, width) // 3
    padded = pad(images, margin, "symmetric")  # or the corners would turn black

    def turned(image: Image.Image, number: int) -> Image.Image:
        return image.rotate(degrees * signs[number], BILINEAR)

    changed = change_each(padded, turned)
    return changed[:, margin : margin + height, margin : margin + width]


# ------------------------------------------------------------------------------------- what is lost
def jpeg(images: np.ndarray, quality: float, rng: np.random.Generator) -> np.ndarray:
    """Compressed and decompressed."""

    def compressed(image: Image.Image, number: int) -> Image.Image:
        file = io.BytesIO()
        image.save(file, "JPEG", quality=int(quality))
        return Image.open(file)

    return change_each(images, compressed)


def resolution(images: np.ndarray, factor: float, rng: np.random.Generator) -> np.ndarray:
    """Made smaller by a factor below 1, and large again."""
    height, width = images.shape[1:3]
    small = max(1, round(width * factor)), max(1, round(height * factor))

    def blurred(image: Image.Image, number: int) -> Image.Image:
        return image.resize(small, BILINEAR).resize((width, height), BILINEAR)

    return change_each(images, blurred)


def change_each(images: np.ndarray, change: Callable) -> np.ndarray:
    """change(Pillow image, its number) for each of uint8 [n, H, W, channels]."""
    is_grey = images.shape[3] == 1
    changed = []
    for number, image in enumerate(images):
        picture = Image.fromarray(image[..., 0] if is_grey else image)
        changed.append(np.asarray(change(picture, number)))

    stacked = np.stack(changed)
    return stacked[..., None] if is_grey else stacked


# ------------------------------------------------------------------------------------------- survey
@dataclass(frozen=True)
class Change:
    """An everyday change.

    strengths: mild, medium and strong. form: how a strength is printed. is_length: is the strength
    in pixels of images with a side of USUAL_SIDE? is_whole: in whole pixels, at least one?
    smallest: the side of images from which the change means something.
    """

    function: Callable[[np.ndarray, float, np.random.Generator], np.ndarray]
    strengths: tuple[float, float, float]
    form: str
    is_length: bool = False
    is_whole: bool = False
    smallest: int = 1

    def strength(self, level: int, side: int) -> float:
        """The strength of a level, 0 for mild to 2 for strong, for images with a side of pixels."""
        strength = self.strengths[level]
        if self.is_length:
            strength = strength * side / USUAL_SIDE
        if self.is_whole:
            strength = max(1, round(strength))
        return strength


CHANGES = {
    "pixel noise": Change(noise, (4, 8, 16), "sigma {:g}"),
    "shot noise": Change(shot_noise, (500, 250, 100), "{:g} photons"),
    "defocus": Change(defocus, (0.5, 1, 1.5), "{:.2g} px", is_length=True, smallest=BLURRED_SIDE),
    "motion blur": Change(
        motion_blur, (2, 3, 5), "{:.2g} px", is_length=True, smallest=BLURRED_SIDE
    ),
    "lower resolution": Change(resolution, (0.75, 0.5, 0.33), "x{:g}", smallest=BLURRED_SIDE),
    "darker": Change(brightness, (0.8, 0.6, 0.4), "x{:g}"),
    "brighter": Change(brightness, (1.2, 1.5, 2), "x{:g}"),
    "contrast": Change(contrast, (0.7, 0.5, 0.3), "x{:g}"),
    "JPEG": Change(jpeg, (60, 30, 15), "quality {:g}"),
    "shift": Change(shift, (1, 2, 3), "{:g} px", is_length=True, is_whole=True),
    "rotation": Change(rotation, (5, 10, 15), "{:g} degrees"),
}


def survey(
    run: Callable, images: np.ndarray, labels: np.ndarray, levels: tuple[int, ...] = (1,)
) -> Iterator[dict]:
    """How a classifier does on the images as they are, then under each of CHANGES.

    run(images): its probabilities [n, classes] and `known` [n] or None, as Model.run gives them.
    images: uint8 [n, H, W, channels], test images with their labels [n]; a thousand tell a
    difference of 3 points. levels: 0 for mild to 2 for strong. Changes that such small images do
    not bear are left out.

    Yields {change, strength, accuracy, known}; known: the mean of that output, None without it.
    """
    accuracy, known = measure(run, images, labels)
    yield {"change": "none", "strength": "", "accuracy": accuracy, "known": known}

    side = min(images.shape[1:3])
    for name, change in CHANGES.items():
        if side < change.smallest:
            continue
        for level in levels:
            strength = change.strength(level, side)
            accuracy, known = measure(run, images, labels, change.function, strength)
            yield {
                "change": name,
                "strength": change.form.format(strength),
                "accuracy": accuracy,
                "known": known,
            }


def measure(
    run: Callable,
    images: np.ndarray,
    labels: np.ndarray,
    function: Callable | None = None,
    strength: float = 0,
) -> tuple[float, float | None]:
    """Accuracy and the mean of `known` (None without that output) on images changed by `function`.

    The same images get the same random numbers in every call.
    """
    all_probabilities = []
    all_known = []
    for start in range(0, len(images), PART):
        part = np.ascontiguousarray(images[start : start + PART])
        if function is not None:
            rng = np.random.default_rng((start, len(images)))  # alike in every call
            part = function(part, strength, rng)
        probabilities, known = run(part)
        all_probabilities.append(probabilities)
        all_known.append(known)

    answers = np.concatenate(all_probabilities).argmax(1)
    accuracy = float((answers == labels).mean())
    if all_known[0] is None:
        return accuracy, None
    return accuracy, float(np.concatenate(all_known).mean())
