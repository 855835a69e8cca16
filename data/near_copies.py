"""Images that are nearly the same: saved, scaled or brightened anew, and not mirrored or cropped.

Hashes of thumbnails propose pairs: signs of random projections (Charikar 2002) of this dataset's
own principal components, as most bits of a fixed hash are equal for all images of some datasets.
Then the pixels decide. How like is too like depends on the dataset, too: two sevens of MNIST are
closer than two copies of a photo.

Thumbnails are described by vectors [N, d] without their mean and of length 1, so that the product
of two vectors is a correlation.
"""

import numpy as np

from data.summaries import AllImages, shrink

# A thumbnail has a hash of 32 bits in each of several tables, made of its principal components.
TABLES = 6
BITS = 32
COMPONENTS = 24

# In each table, sorted by hash, an image is compared with the next ones. Two images are proposed as
# a pair if their hashes begin with log2(N) + SURPLUS_BITS equal bits.
NEIGHBOURS = 3
SURPLUS_BITS = 5

# The pixels of this many pairs are compared, those with the closest thumbnails.
MOST_PAIRS = 2048
LEAST_THUMBNAIL_CORRELATION = 0.95
COMPARED_SIDE = 32  # the most pixels in a row and in a column of what is compared
PAIRS_AT_A_TIME = 256

SAMPLE = 512  # the images that tell how like two different ones are expected to be
LEAST_LIKENESS = 0.8  # whatever the dataset
TINY = 1e-6  # keeps constant images and equal distances from dividing by zero

FEWEST_IMAGES = 3
FEWEST_DIMENSIONS = 16  # thumbnails of fewer pixels tell nothing


def find_near(images: AllImages, thumbnails: np.ndarray, unique: np.ndarray) -> np.ndarray:
    """Pairs of the rows `unique` that are nearly the same: int64 [n, 2], in order."""
    if len(unique) < FEWEST_IMAGES or thumbnails.shape[1] < FEWEST_DIMENSIONS:
        return np.empty((0, 2), np.int64)

    vectors = unit(thumbnails[unique])
    proposed = unique[propose(vectors)]
    limit = least_likeness(images, vectors, unique)
    pairs = proposed[likeness(images, proposed) > limit]

    by_first_then_second = np.lexsort((pairs[:, 1], pairs[:, 0]))
    return pairs[by_first_then_second]


def unit(vectors: np.ndarray) -> np.ndarray:
    """Vectors [n, d] without their own mean and of length 1; 0 if they are constant."""
    vectors = vectors - vectors.mean(1, keepdims=True)
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.maximum(lengths, TINY)


# --------------------------------------------------------------------------------------- proposing
def propose(vectors: np.ndarray) -> np.ndarray:
    """The closest pairs [n <= MOST_PAIRS, 2] of unit vectors [N, d] among those with like hashes.

    A pair has the lower number first.
    """
    count = len(vectors)
    shared_bits = count.bit_length() + SURPLUS_BITS
    limit = np.uint32(1 << max(BITS - shared_bits, 0))  # codes that share them differ by less

    numbers = []  # of pairs: low * count + high
    correlations = []
    for codes in hash_codes(vectors):
        order = np.argsort(codes, kind="stable")
        codes = codes[order]

        for step in range(1, NEIGHBOURS + 1):
            close = np.flatnonzero((codes[step:] ^ codes[:-step]) < limit)
            low, high = np.sort([order[close], order[close + step]], axis=0)
            correlation = np.einsum("ij,ij->i", vectors[low], vectors[high])

            best = highest(correlation)
            numbers.append(low[best] * count + high[best])
            correlations.append(correlation[best])

    # The tables find many pairs more than once.
    numbers, first = np.unique(np.concatenate(numbers), return_index=True)
    correlation = np.concatenate(correlations)[first]

    best = highest(correlation)
    best = best[correlation[best] > LEAST_THUMBNAIL_CORRELATION]
    low, high = np.divmod(numbers[best], count)
    return np.stack([low, high], axis=1)


def hash_codes(vectors: np.ndarray) -> np.ndarray:
    """Hashes of vectors [N, d], nearly equal for like vectors: uint32 [TABLES, N]."""
    centred = vectors - vectors.mean(0)
    variances, components = np.linalg.eigh(centred.T @ centred / len(vectors))

    # The largest components, whose variances are brought halfway to each other.
    variances = np.maximum(variances[-COMPONENTS:], TINY)
    components = components[:, -COMPONENTS:] / variances**0.25  # [d, COMPONENTS]

    rng = np.random.default_rng(0)
    directions = rng.standard_normal((components.shape[1], TABLES * BITS))
    bits = centred @ (components @ directions).astype(np.float32) > 0  # [N, TABLES * BITS]

    codes = np.packbits(bits, axis=1).view(">u4")  # [N, TABLES]
    return codes.astype(np.uint32).T


def highest(scores: np.ndarray) -> np.ndarray:
    """The positions of the MOST_PAIRS highest scores [n], in falling order."""
    return np.argsort(-scores, kind="stable")[:MOST_PAIRS]


# --------------------------------------------------------------------------------------- comparing
def likeness(images: AllImages, pairs: np.ndarray) -> np.ndarray:
    """How like the images of pairs [n, 2] are, at most 1: float64 [n].

    That is the correlation of their gradients, in the whole image or in its middle: the smaller.
    By grey levels, any two ships on the sea are alike, and by whole images any two in one frame.
    """
    scores = np.ones(len(pairs))
    if len(pairs) == 0:
        return scores

    chunks = len(pairs) // PAIRS_AT_A_TIME + 1
    for chunk in np.array_split(np.arange(len(pairs)), chunks):
        # The two images of a pair follow each other: [2 * pairs, h, w].
        whole = shrink(images.take(pairs[chunk].ravel()), COMPARED_SIDE)
        height, width = whole.shape[1:]
        middle = whole[:, inner_half(height), inner_half(width)]

        for part in (whole, middle):
            vectors = unit(gradients(part))
            correlation = (vectors[::2] * vectors[1::2]).sum(1)
            scores[chunk] = np.minimum(scores[chunk], correlation)

    return scores


def inner_half(side: int) -> slice:
    """The middle half of a side."""
    margin = side // 4
    return slice(margin, side - margin)


def gradients(planes: np.ndarray) -> np.ndarray:
    """The differences of neighbouring pixels, down and across: [n, d] of planes [n, h, w]."""
    down = np.diff(planes, axis=1).reshape(len(planes), -1)
    across = np.diff(planes, axis=2).reshape(len(planes), -1)
    return np.concatenate([down, across], axis=1)


def least_likeness(images: AllImages, vectors: np.ndarray, unique: np.ndarray) -> float:
    """The likeness that about one pair of different images of the whole dataset reaches by chance.

    vectors: of the thumbnails, [N, d], of the rows `unique`. The distance of an image to the
    closest other one follows a Weibull distribution, here in a sample. Its median and its 90 %
    quantile, which copies hardly change, tell the distance with probability 1 / N**2 for a pair.
    """
    count = len(unique)
    sampled = np.linspace(0, count - 1, min(count, SAMPLE)).astype(int)

    correlation = vectors[sampled] @ vectors[sampled].T
    np.fill_diagonal(correlation, -2)  # an image is not its own closest
    closest = sampled[correlation.argmax(1)]

    pairs = np.stack([unique[sampled], unique[closest]], axis=1)
    distances = 1 - likeness(images, pairs)
    median, high = np.quantile(distances, [0.5, 0.9])
    median = max(median, TINY)
    high = max(high, 2 * TINY)

    # P(closest < x) = 1 - exp(-(x / scale) ** shape). Two quantiles give the shape; for small x the
    # probability is ln(2) * (x / median) ** shape, that of a single pair times the sample's size.
    spread = max(np.log(high / median), TINY)
    shape = np.log(np.log(10) / np.log(2)) / spread
    probability = len(sampled) / count**2
    distance = median * (probability / np.log(2)) ** (1 / shape)

    return max(1 - distance, LEAST_LIKENESS)
