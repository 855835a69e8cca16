"""Image files decoded to rows of a file: what a worker does."""

import multiprocessing

import numpy as np

from data.target import Target
from inference.errors import Problem
from inference.images import decode_image


def decode_chunk(
    paths: list[str],
    start: int,
    file: str,
    target: Target,
    fit: str,
) -> list[tuple[int, str]]:
    """Decode files into the rows of `file` from `start` on, each uint8 [height, width, channels].

    Returns the number of each file that cannot be read, and the reason.
    """
    failures = []
    with open(file, "r+b") as stream:
        for number, path in enumerate(paths, start):
            try:
                image = decode_image(path, target.channels, target.white)
            except Problem as problem:
                failures.append((number, str(problem)))
                continue

            if image.shape[:2] != target.image_size:
                image = resize_as_graph(image, target.image_size, fit)
            stream.seek(number * target.row_bytes())
            stream.write(image.tobytes())
    return failures


def resize_as_graph(image: np.ndarray, image_size: tuple[int, int], fit: str) -> np.ndarray:
    """Resize uint8 [height, width, channels] as the exported graph does, and round."""
    # Here, because images that all have the right size do not need torch, which loads for seconds.
    import torch

    from model import resize

    if multiprocessing.parent_process() is not None:
        torch.set_num_threads(1)  # the workers already share the cores

    batch = torch.from_numpy(image.copy())[None]  # [1, height, width, channels]
    return resize(batch, image_size, fit)[0].round().byte().numpy()
