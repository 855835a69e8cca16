"""Images that no dataset is about: does `known` tell them apart?"""

from collections.abc import Iterator

import numpy as np


def unknown_kinds(height: int, width: int, channels: int, count: int = 100) -> Iterator[tuple]:
    """Images that no dataset is about, by kind: uint8 [count, height, width, channels]; of plain ones one."""
    rng, shape = np.random.default_rng(0), (count, height, width, channels)
    yield "uniform noise", rng.integers(0, 256, shape, dtype=np.uint8)
    yield "Gaussian noise", np.clip(rng.normal(128, 64, shape), 0, 255).astype(np.uint8)
    yield "smooth blobs", smooth_blobs(rng, shape)
    colours = rng.integers(0, 256, (count, 1, 1, channels), dtype=np.uint8)
    yield "solid colours", np.repeat(np.repeat(colours, height, 1), width, 2)
    yield "black", np.zeros((1, *shape[1:]), np.uint8)
    yield "white", np.full((1, *shape[1:]), 255, np.uint8)


def smooth_blobs(rng, shape):
    """4x4 random levels, enlarged by cosines to [count, height, width, channels], 0 to 255 in each image."""
    count, height, width, channels = shape
    levels, places = rng.random((count, 4, 4, channels)), [np.arange(n)[:, None] for n in (height, width)]
    down, across = (np.cos(np.pi * (place + 0.5) * np.arange(4) / len(place)) for place in places)
    waves = np.einsum("hi,nijc,wj->nhwc", down, 2 * levels - 1, across)
    low, high = waves.min((1, 2, 3), keepdims=True), waves.max((1, 2, 3), keepdims=True)
    return (255 * (waves - low) / np.maximum(high - low, 1e-9)).astype(np.uint8)
