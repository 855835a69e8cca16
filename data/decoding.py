"""Image files decoded to rows of a file: what a worker does."""

import multiprocessing

import numpy as np

from data import parallel
from data.target import Target
from inference.errors import Problem
from inference.images import decode_image
from inference.limits import LARGE_PIXELS, MAX_PIXELS, TooLarge, allow_pixels


def decode_chunk(
    paths: list[str],
    start: int,
    file: str,
    target: Target,
    max_pixels: int = MAX_PIXELS,
) -> list[tuple[int, str]]:
    """Decode files into the rows of `file` from `start` on, each uint8 [height, width, channels].

    Returns the number of each file that cannot be read, and the reason.
    """
    allow_pixels(max_pixels)
    failures = []
    with open(file, "r+b") as stream:
        for number, path in enumerate(paths, start):
            try:
                image = decode_to(path, target, max_pixels)
            except Problem as problem:
                failures.append((number, str(problem)))
                continue

            stream.seek(number * target.row_bytes())
            stream.write(image.tobytes())
    return failures


def decode_to(path: str, target: Target, max_pixels: int) -> np.ndarray:
    """Decode and resize a file to uint8 [*image_size, channels]. Raises Problem.

    Of large images, only one at a time is decoded, over all workers.
    """
    try:
        return decode_and_resize(path, target, min(LARGE_PIXELS, max_pixels))
    except TooLarge:
        if max_pixels <= LARGE_PIXELS:
            raise

    with parallel.large_image:
        return decode_and_resize(path, target, max_pixels)


def decode_and_resize(path: str, target: Target, max_pixels: int) -> np.ndarray:
    """What `decode_to` returns; raises Problem, and TooLarge for more than `max_pixels`."""
    image = decode_image(path, target.channels, target.white, max_pixels, target.ground)
    if image.shape[:2] == target.image_size:
        return image
    return resize_as_graph(image, target.image_size, target.fit)


def resize_as_graph(image: np.ndarray, image_size: tuple[int, int], fit: str) -> np.ndarray:
    """Resize uint8 [height, width, channels] as the exported graph does, and round."""
    # Here, because images that all have the right size do not need torch, which loads for seconds.
    import torch

    from model import resize

    if multiprocessing.parent_process() is not None:
        torch.set_num_threads(1)  # the workers already share the cores

    batch = torch.from_numpy(image.copy())[None]  # [1, height, width, channels]
    return resize(batch, image_size, fit)[0].round().byte().numpy()
