"""A doctor for datasets: what may be wrong with the images, said in a line each; nothing is ever deleted.

Exact copies have equal pixels; images that were saved, scaled or brightened anew are nearly the same. Hashes
of thumbnails propose pairs: signs of random projections (Charikar 2002) of this dataset's own principal
components, as most bits of a fixed hash are equal for all images of some datasets. Then the pixels decide.
How like is too like depends on the dataset, too: two sevens of MNIST are closer than two copies of a photo.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F

from data.dataset import SPLITS, Dataset
from data.notes import note

BLOCK, TABLES, BITS, COMPONENTS = 4 << 20, 6, 32, 24  # the first: bytes of pixels at a time
NEXT, SURPLUS = 3, 5  # hashes are compared with the next in order, if they share log2(N) + SURPLUS bits
MOST_PAIRS, CLOSE = 2048, 0.95  # whose pixels are compared, those with the closest thumbnails
THUMBNAIL, LARGEST, SAMPLE, LEAST_LIKENESS = 8, 32, 512, 0.8
FEWEST, TAIL, SHOWN = 20, 0.1, 6  # images of a class whose light is judged; see note_dark; pairs shown


@dataclass(frozen=True)
class Findings:
    same: np.ndarray  # int64 [images of all splits]: the first with the same pixels, mostly the image itself
    leaked: np.ndarray  # bool [test images]: is it, or nearly the same, in the training split?
    pairs: list[tuple]  # (image, image, name, name), up to SHOWN, the worst first


class Rows:
    """The images of all splits of a dataset, one after the other."""

    def __init__(self, dataset: Dataset):
        splits = [name for name in SPLITS if getattr(dataset, f"{name}_images") is not None]
        self.parts = {name: getattr(dataset, f"{name}_images") for name in splits}
        self.labels = np.concatenate([getattr(dataset, f"{name}_labels") for name in splits])
        self.dataset = dataset

    def place(self, row: int) -> tuple[str, int]:
        """The split of an image, and its number in it."""
        for split, images in self.parts.items():
            if row < len(images):
                return split, int(row)
            row -= len(images)

    def take(self, rows: np.ndarray) -> np.ndarray:
        """The images [n, H, W, C] of these rows."""
        return np.stack([self.parts[split][number] for split, number in map(self.place, rows)])

    def name(self, row: int) -> str:
        """The path of an image, or else its place, and its label."""
        (split, number), label = self.place(row), self.dataset.classes[self.labels[row]]
        paths = self.dataset.paths.get(split)
        return f"{paths[number] if paths else f'{split} image {number}'} ({label})"


def examined(dataset: Dataset) -> Dataset:
    """The dataset with its `Findings`, after noting them. A regression is returned as it is."""
    if dataset.task != "classification":
        return dataset
    rows = Rows(dataset)
    hashes, thumbnails = summaries(rows)
    same = first_equal(rows, hashes)
    everyone, trained = np.arange(len(same)), len(dataset.train_images)
    near = find_near(rows, thumbnails, np.flatnonzero(same == everyone))
    copies = np.stack([same, everyone], 1)[same != everyone]
    doubles = np.concatenate([copies, near])
    unlike = rows.labels[doubles[:, 0]] != rows.labels[doubles[:, 1]]
    of_training = near[(near[:, 0] < trained) & (near[:, 1] >= trained), 1]
    leaked = (same < trained) | np.isin(same, of_training)
    leaked[: -len(dataset.test_images)] = False
    crossing = (doubles[:, 0] < trained) & leaked[doubles[:, 1]]
    note_pairs(rows, "exact copies of an image", copies)
    note_pairs(rows, "pairs of images that are nearly the same", near)
    note_pairs(rows, "pairs of these that have two labels", doubles[unlike])
    note_pairs(rows, "test images that are also in the training split", doubles[crossing], leaked.sum())
    note_dark(rows, thumbnails.mean(1))
    worst = doubles[np.lexsort((~crossing, ~unlike))[:SHOWN]]
    pairs = [(*rows.take(pair), *map(rows.name, pair)) for pair in worst]
    return replace(dataset, findings=Findings(same, leaked[-len(dataset.test_images) :], pairs))


def note_pairs(rows: Rows, kind: str, pairs: np.ndarray, count: int | None = None) -> None:
    """Note how many there are of a kind, and the first of the pairs [n, 2]."""
    if len(pairs):
        note(f"{kind}: {count or len(pairs):,}, the first: {' and '.join(map(rows.name, pairs[0]))}")


def note_dark(rows: Rows, light: np.ndarray) -> None:
    """Note a class darker than nearly all other images: a network may learn the light alone. light: [N]."""
    for label, name in enumerate(rows.dataset.classes):
        own, others = light[rows.labels == label], light[rows.labels != label]
        if min(len(own), len(others)) >= FEWEST and np.quantile(own, 1 - TAIL) < np.quantile(others, TAIL):
            levels = f"its mean is {own.mean():.0f} of 255, that of the others {others.mean():.0f}"
            note(f"class {name!r} is much darker than the others, which alone tells it apart: {levels}")


def summaries(rows: Rows) -> tuple[np.ndarray, np.ndarray]:
    """A hash of each image, uint64 [N], and its grey thumbnail, float32 [N, THUMBNAIL**2 or less]."""
    hashes, thumbnails, image = [], [], rows.dataset.train_images[0]
    factors = np.random.default_rng(0).integers(0, 1 << 63, -(-image.nbytes // 8), dtype=np.uint64) * 2 + 1
    step, parts = max(1, BLOCK // image.nbytes), rows.parts.values()
    for block in (part[start : start + step] for part in parts for start in range(0, len(part), step)):
        pixels = block.reshape(len(block), -1)
        if image.nbytes % 8:
            pixels = np.pad(pixels, ((0, 0), (0, -image.nbytes % 8)))
        hashes.append(pixels.view(np.uint64) @ factors)
        thumbnails.append(shrink(block, THUMBNAIL).reshape(len(block), -1))
    return np.concatenate(hashes), np.concatenate(thumbnails)


def shrink(images: np.ndarray, side: int) -> np.ndarray:
    """Grey float32 [n, H, W] of uint8 [n, H, W, C], with `side` or less as height and as width."""
    planes = torch.from_numpy(images).permute(0, 3, 1, 2)
    size = [min(length, side) for length in planes.shape[2:]]
    if list(planes.shape[2:]) != size:  # while it is uint8, for which torch is fastest
        planes = F.interpolate(planes, size, mode="bilinear", antialias=True)
    return planes.float().mean(1).numpy()


def first_equal(rows: Rows, hashes: np.ndarray) -> np.ndarray:
    """The first image with the same pixels as each: int64 [N]. Images that differ may have equal hashes."""
    _, first, inverse = np.unique(hashes, return_index=True, return_inverse=True)
    same = first[inverse]
    for row in np.flatnonzero(same != np.arange(len(same))):
        if not np.array_equal(*rows.take([row, same[row]])):
            same[row] = row
    return same


def unit(vectors: np.ndarray) -> np.ndarray:
    """Vectors [n, d] without their own mean and of length 1; 0 if they are constant."""
    vectors = vectors - vectors.mean(1, keepdims=True)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-6)


def find_near(rows: Rows, thumbnails: np.ndarray, unique: np.ndarray) -> np.ndarray:
    """Pairs of the rows `unique` that are nearly the same: int64 [n, 2], in order."""
    if len(unique) < 3 or thumbnails.shape[1] < 16:
        return np.empty((0, 2), np.int64)
    described = unit(thumbnails[unique])
    pairs = unique[propose(described)]
    pairs = pairs[likeness(rows, pairs) > least_likeness(rows, described, unique)]
    return pairs[np.lexsort(pairs.T[::-1])]


def propose(described: np.ndarray) -> np.ndarray:
    """The closest pairs [n <= MOST_PAIRS, 2] of unit vectors [N, d] among those with like hashes."""
    count, centred, found = len(described), described - described.mean(0), []
    variances, components = np.linalg.eigh(centred.T @ centred / count)
    components = components[:, -COMPONENTS:] / np.maximum(variances[-COMPONENTS:], 1e-6) ** 0.25
    directions = np.random.default_rng(0).standard_normal((components.shape[1], TABLES * BITS))
    bits = centred @ (components @ directions).astype(np.float32) > 0
    unlike = np.uint32(1 << max(BITS - count.bit_length() - SURPLUS, 0))
    for codes in np.packbits(bits, axis=1).view(">u4").astype(np.uint32).T:
        order = np.argsort(codes, kind="stable")
        codes = codes[order]
        for step in range(1, NEXT + 1):
            close = np.flatnonzero((codes[step:] ^ codes[:-step]) < unlike)
            low, high = np.sort([order[close], order[close + step]], axis=0)
            alike = np.einsum("ij,ij->i", described[low], described[high])
            best = np.argsort(-alike, kind="stable")[:MOST_PAIRS]
            found.append((low[best] * count + high[best], alike[best]))
    pairs, alike = map(np.concatenate, zip(*found, strict=True))
    pairs, first = np.unique(pairs, return_index=True)
    best = np.argsort(-alike[first], kind="stable")[:MOST_PAIRS]
    return np.stack(np.divmod(pairs[best][alike[first][best] > CLOSE], count), 1)


def likeness(rows: Rows, pairs: np.ndarray) -> np.ndarray:
    """The correlation [n] of the gradients of pairs [n, 2], in the whole image or in its middle: the smaller.

    By grey levels, any two ships on the sea are alike, and by whole images any two in the same frame.
    """
    scores = np.ones(len(pairs))
    for some in np.array_split(np.arange(len(pairs)), len(pairs) // 256 + 1) if len(pairs) else ():
        whole = shrink(rows.take(pairs[some].ravel()), LARGEST)
        middle, centre = (slice(side // 4, side - side // 4) for side in whole.shape[1:])
        for part in (whole, whole[:, middle, centre]):
            vectors = unit(np.concatenate([np.diff(part, axis=n).reshape(len(part), -1) for n in (1, 2)], 1))
            scores[some] = np.minimum(scores[some], (vectors[::2] * vectors[1::2]).sum(1))
    return scores


def least_likeness(rows: Rows, described: np.ndarray, unique: np.ndarray) -> float:
    """The likeness that about one pair of all images, [N, d] by their thumbnails, reaches by chance.

    The distance to the closest image follows a Weibull distribution, here in a sample. Its median and its
    90 % quantile, which copies hardly change, tell the distance with probability 1 / N**2 for a pair.
    """
    count = len(unique)
    chosen = np.linspace(0, count - 1, min(count, SAMPLE)).astype(int)
    np.fill_diagonal(alike := described[chosen] @ described[chosen].T, -2)
    closest = np.stack([unique[chosen], unique[chosen[alike.argmax(1)]]], 1)
    half, most = np.maximum(np.quantile(1 - likeness(rows, closest), [0.5, 0.9]), [1e-6, 2e-6])
    slope = np.log(np.log(10) / np.log(2)) / max(np.log(most / half), 1e-6)
    return max(1 - half * (len(chosen) / count**2 / np.log(2)) ** (1 / slope), LEAST_LIKENESS)
