"""An alarm for images that differ from those that a network was tested with, hardly ever false.

Each image falls into a cell: by how familiar it looks, by the probability of its answer, and by the
answer. Bets are placed on the next image: each pays out by its cell, on average at most the stake
as long as the images are like those of the reference, of which the spec says how many fell into
each cell. What the bets have made of a stake of 1 is then an e-process: it ever reaches LIMIT in at
most one of LIMIT streams (Ville's inequality; Shafer and Vovk 2019, Ramdas et al. 2023). It grows
if the images have changed.

The reference is a sample. A bet pays by its mean over the sample and DEVIATIONS standard errors
more, so that chance in the sample raises no alarm.
"""

import math
from bisect import bisect_right

import numpy as np

LIMIT = 1000  # the alarm is raised here
DEVIATIONS = 4  # standard errors of the reference that a bet allows for
# The bins of `known` and of the probability, as quantiles of the reference.
LEVELS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99)

# If ranks u are spread evenly, u**a is a distribution of lower ranks for an exponent a < 1.
LOWER = (0.8, 0.6, 0.4, 0.2)  # exponents of the bets that the ranks have become lower
BOTH_LOWER = (0.8, 0.6, 0.4)  # that both have
HIGHER = (0.6, 0.3)  # that they have become higher
TAKEN_OVER = (0.5, 0.8)  # the part of the other answers that one class takes over
ON_CLASSES = 0.2  # the part of the stake that is on classes

# What the bets of a group say, in the words of the alarm.
UNFAMILIAR = "the images look less familiar"
UNCERTAIN = "the answers are less certain"
BOTH = "the images look less familiar, and the answers are less certain"
FAMILIAR = "the images look more alike and familiar"
CERTAIN = "the answers are more certain"


class Drift:
    """Bets against a reference, and what they have made of their stake of 1 so far.

    A change can come at any time: the stake is not placed at once, but a part of it at every image,
    so that some of it bets on a change from here on. (An e-detector: Shin, Ramdas and Rinaldo
    2023.)

    reference: `monitor` of a spec. payoffs: of the bets on cells, [cells, bets]; hit and miss: of
    the bets on classes, [classes, bets]. stakes: what each bet holds, float64 [bets], to be kept
    with `images`, the number that were bet on.
    """

    def __init__(self, reference: dict):
        self.payoffs, self.meanings = cell_bets(np.array(reference["counts"], float))
        self.hit, self.miss = class_bets(np.array(reference["answers"], float))
        self.known_edges = reference["known"]
        self.probability_edges = reference["probability"]
        self.columns = len(self.probability_edges) + 1

        on_cells = self.payoffs.shape[1]
        on_classes = self.hit.size
        self.weights = np.concatenate(
            [
                np.full(on_cells, (1 - ON_CLASSES) / on_cells),
                np.full(on_classes, ON_CLASSES / on_classes),
            ]
        )
        self.stakes = np.zeros(on_cells + on_classes)
        self.images = 0
        self.unplaced = unplaced(1)

        # For `bet`, which runs for every image: lists of rows are faster to index than arrays.
        # What all bets pay by the cell, as if none were on the class of the answer; what those that
        # are pay instead; and the stakes of these, by class, which are written through.
        misses = np.broadcast_to(self.miss.ravel(), (len(self.payoffs), on_classes))
        self.cell_rows = list(np.hstack([self.payoffs, misses]))  # [cells] of [bets]
        self.hits_for_misses = list(self.hit / self.miss)  # [classes] of [bets on the class]
        self.class_stakes = list(self.stakes[on_cells:].reshape(self.hit.shape))  # likewise

    def place(self, known: float | None, probability: float) -> tuple[int, int]:
        """The bins that an image falls into: of `known`, and of the probability of its answer."""
        row = bisect_right(self.known_edges, known) if self.known_edges else 0
        return row, bisect_right(self.probability_edges, probability)

    def bet(self, place: tuple[int, int], answer: int) -> float:
        """Bet on one image; returns the evidence so far. answer: the number of the class."""
        self.images += 1
        before = self.unplaced
        self.unplaced = unplaced(self.images + 1)
        self.stakes += before - self.unplaced

        row, column = place
        self.stakes *= self.cell_rows[row * self.columns + column]
        of_answer = self.class_stakes[answer]
        of_answer *= self.hits_for_misses[answer]
        return self.evidence()

    def evidence(self) -> float:
        """What the bets have made of a stake of 1, with the part that has not been placed."""
        return float(self.weights.dot(self.stakes)) + self.unplaced  # `@` takes twice as long

    def restore(self, stakes: list[float], images: int) -> None:
        """Go on from the stakes that were kept."""
        self.stakes[:] = stakes
        self.images = images
        self.unplaced = unplaced(images + 1)

    def reason(self, classes: list[str]) -> str:
        """In words, what the bets say that have won most."""
        won = self.weights * self.stakes
        on_cells = len(self.meanings)
        groups: dict[str, float] = {}
        for meaning, share in zip(self.meanings, won[:on_cells], strict=True):
            groups[meaning] = groups.get(meaning, 0) + share
        by_class = won[on_cells:].reshape(len(classes), -1).sum(1)

        best = max(groups, key=groups.get)
        if by_class.max() > groups[best]:
            return f"more answers are {classes[by_class.argmax()]}"
        return best


def unplaced(image: int) -> float:
    """The part of the stake that is not placed before this image, counted from 1.

    It shrinks slowly, so that even after a million images something is left to place: a change is
    found after three to four times as many images then as at the start.
    """
    return 1 / (1 + math.log(image))


# --------------------------------------------------------------------------------------- the bets
def cell_bets(counts: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """What bets on the cells pay, [cells, bets], and what each means.

    counts: of the reference, [bins of known, bins of the probability]. With one bin of `known`, of
    files without it, none bets on it.
    """
    rows, columns = counts.shape
    known = counts.sum(1)
    probability = counts.sum(0)
    # [rows, 1] and [1, columns]: a bet on one of the two pays the same whatever the other is.
    flat = np.ones((rows, columns))

    bets = []
    for exponent in LOWER:
        bets.append((UNFAMILIAR, lower(known, exponent)[:, None] * flat))
        bets.append((UNCERTAIN, lower(probability, exponent) * flat))
    for exponent in BOTH_LOWER:
        bets.append((BOTH, np.outer(lower(known, exponent), lower(probability, exponent))))
    for exponent in HIGHER:
        bets.append((FAMILIAR, higher(known, exponent)[:, None] * flat))
        bets.append((CERTAIN, higher(probability, exponent) * flat))
    if rows == 1:
        bets = [bet for bet in bets if bet[0] in (UNCERTAIN, CERTAIN)]

    payoffs = [fair(payoff.ravel(), counts.ravel()) for _, payoff in bets]
    meanings = [meaning for meaning, _ in bets]
    return np.stack(payoffs, axis=1), meanings


def lower(counts: np.ndarray, exponent: float) -> np.ndarray:
    """What a bet pays, by bin, that ranks u are spread like u**exponent. counts: [bins]."""
    smooth = counts + 0.5  # no bin is impossible
    share = smooth / smooth.sum()
    end = share.cumsum()
    start = np.append(0, end[:-1])
    return (end**exponent - start**exponent) / share


def higher(counts: np.ndarray, exponent: float) -> np.ndarray:
    return lower(counts[::-1], exponent)[::-1]


def fair(payoff: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """A bet's payoff, such that images like the reference pay at most the stake on average.

    payoff, counts: [cells]. The mean over the reference may be too small by chance: it is taken
    with one more image, in the cell that pays most, and DEVIATIONS standard errors more.
    """
    counts = counts.copy()
    counts[payoff.argmax()] += 1
    images = counts.sum()
    mean = (counts * payoff).sum() / images
    variance = (counts * (payoff - mean) ** 2).sum() / images
    return payoff / (mean + DEVIATIONS * math.sqrt(variance / images))


def class_bets(answers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What bets that a class takes over pay if it is the answer, and if not: [classes, bets] each.

    answers: of the reference, how often each class was the answer, [classes].
    """
    images = answers.sum() + 1
    share = (answers + 1) / images
    most = share + DEVIATIONS * np.sqrt(share * (1 - share) / images)
    most = np.minimum(most, 1 - 1 / images)[:, None]
    then = most + (1 - most) * np.array(TAKEN_OVER)  # [classes, bets]
    return then / most, (1 - then) / (1 - most)
