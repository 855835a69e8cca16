"""Images in bands of rows, which take less time and memory than a whole photo at once."""

from collections.abc import Iterator

from PIL import Image

BAND_PIXELS = 1 << 18  # converted at a time: they fit the processor's cache


def bands(image: Image.Image) -> Iterator[tuple[int, int, Image.Image]]:
    """Yield (top, bottom, these rows) of an image, which together fit the processor's cache."""
    width, height = image.size
    rows = max(1, BAND_PIXELS // width)
    for top in range(0, height, rows):
        bottom = min(top + rows, height)
        yield top, bottom, image.crop((0, top, width, bottom))
