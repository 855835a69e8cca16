"""Images that no dataset is about: does `known` tell them apart?"""

from collections.abc import Iterator

import numpy as np


def unknown_kinds(
    height: int, width: int, channels: int, count: int = 100
) -> Iterator[tuple[str, np.ndarray]]:
    """(kind, uint8 [count, height, width, channels]); of black and of white there is one image."""
    rng = np.random.default_rng(0)  # the same images for every network
    shape = (count, height, width, channels)
    yield "uniform noise", rng.integers(0, 256, shape, dtype=np.uint8)
    yield "Gaussian noise", np.clip(rng.normal(128, 64, shape), 0, 255).astype(np.uint8)
    yield "smooth blobs", smooth_blobs(rng, shape)
    # One colour for each image, repeated over its height and width.
    colours = rng.integers(0, 256, (count, 1, 1, channels), dtype=np.uint8)
    yield "solid colours", np.repeat(np.repeat(colours, height, 1), width, 2)
    yield "black", np.zeros((1, height, width, channels), np.uint8)
    yield "white", np.full((1, height, width, channels), 255, np.uint8)


def smooth_blobs(rng: np.random.Generator, shape: tuple[int, int, int, int]) -> np.ndarray:
    """4x4 random levels, enlarged by cosines to [count, height, width, channels], 0 to 255."""
    count, height, width, channels = shape
    levels = 2 * rng.random((count, 4, 4, channels)) - 1  # -1 to 1
    down = cosines(height)
    across = cosines(width)
    waves = np.einsum("hi,nijc,wj->nhwc", down, levels, across)

    # Each image uses all grey levels.
    low = waves.min((1, 2, 3), keepdims=True)
    high = waves.max((1, 2, 3), keepdims=True)
    return (255 * (waves - low) / np.maximum(high - low, 1e-9)).astype(np.uint8)


def cosines(size: int) -> np.ndarray:
    """The first four cosines over `size` places, [size, 4]."""
    places = np.arange(size)[:, None]
    return np.cos(np.pi * (places + 0.5) * np.arange(4) / size)
