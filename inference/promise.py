"""Promises: thresholds chosen on labelled images so that, with 95 % confidence, a share is kept.

Two kinds. accuracy=0.95: of what is answered, at least 95 % is right; the answer is "unsure" where
the largest probability is below the threshold. recall:CLASS=0.99: at least 99 % of the images of a
class are called that class; the answer is the class wherever its own probability reaches the
threshold, whatever the others are.

The images must be drawn like those that the promise is about, and be new to the network. Thresholds
are tried in an order that no label decides, each is tested by the binomial tail, and the last one
before the first that fails is taken (fixed-sequence testing: Angelopoulos et al. 2021, Learn then
Test; the idea for networks: Geifman and El-Yaniv 2017).
"""

import functools
import math
from dataclasses import dataclass, replace

import numpy as np

from inference.spec import DECIMALS

ACCURACY, RECALL = "accuracy", "recall"
CONFIDENCE = 0.95
ALPHA = 1 - CONFIDENCE
STEPS = 100  # thresholds that are tried, so that each adds 1 % of the answers
LEAST_SHARE, SHARE_STEP = 0.5, 0.005  # of what could be promised instead
MOST_IMAGES = 1000  # times as many as there are: more help no promise
NOT_ANSWERED = -1
FORCED = 2.0  # above every probability


@dataclass(frozen=True)
class Promise:
    """What is wanted. name: of the class, None for accuracy."""

    kind: str
    share: float
    name: str | None = None

    def __str__(self) -> str:
        subject = self.kind if self.name is None else f"{self.kind}:{self.name}"
        return f"{subject}={self.share:g}"


@dataclass(frozen=True)
class Thresholds:
    """recalls: (class, threshold of its probability), the first counts. least: of the others."""

    recalls: tuple[tuple[int, float], ...] = ()
    least: float = 0.0


@dataclass(frozen=True)
class Labelled:
    """What a file computes for images with labels, int64 [n].

    probabilities: float64 [n, classes], rounded as predictions are. best: the most probable class,
    int64 [n]. is_unknown: bool [n].
    """

    probabilities: np.ndarray
    best: np.ndarray
    is_unknown: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows) -> "Labelled":
        return Labelled(
            probabilities=self.probabilities[rows],
            best=self.best[rows],
            is_unknown=self.is_unknown[rows],
            labels=self.labels[rows],
        )


class NotKept(Exception):
    """No threshold keeps a promise on these images; the message says what would help."""


def labelled(
    probabilities: np.ndarray, known: np.ndarray | None, labels: np.ndarray, reject: float | None
) -> Labelled:
    """Outputs [n, classes] and [n] as the programs compare them with thresholds."""
    is_unknown = np.zeros(len(labels), bool)
    if reject is not None and known is not None:
        is_unknown = known.astype(np.float64).round(DECIMALS) < round(1 - reject, DECIMALS)
    return Labelled(
        probabilities=probabilities.astype(np.float64).round(DECIMALS),
        best=probabilities.argmax(1),  # rounding makes ties
        is_unknown=is_unknown,
        labels=labels,
    )


# ------------------------------------------------------------------------------------------- rule
def forced_classes(outputs: Labelled, recalls) -> np.ndarray:
    """The class [n] that a promise of recall makes the answer, or NOT_ANSWERED."""
    forced = np.full(len(outputs), NOT_ANSWERED)
    for number, threshold in reversed(recalls):  # the first promise has the last word
        forced[outputs.probabilities[:, number] >= threshold] = number
    forced[outputs.is_unknown] = NOT_ANSWERED
    return forced


def final_answers(outputs: Labelled, thresholds: Thresholds) -> np.ndarray:
    """The class [n] that is answered; NOT_ANSWERED for what is unknown or unsure."""
    forced = forced_classes(outputs, thresholds.recalls)
    is_sure = outputs.probabilities.max(1) >= thresholds.least
    best = np.where(is_sure, outputs.best, NOT_ANSWERED)
    best[outputs.is_unknown] = NOT_ANSWERED
    return np.where(forced == NOT_ANSWERED, best, forced)


# ------------------------------------------------------------------------------------------- tests
@functools.lru_cache(maxsize=16)
def log_factorials(count: int) -> np.ndarray:
    """The logarithms of 0! to count!, [count + 1]."""
    return np.array([math.lgamma(number + 1) for number in range(count + 1)])


def log_chances(count: int, rate: float, most: int, logs: np.ndarray) -> np.ndarray:
    """The logarithm of the chance of 0 to `most` mistakes among `count` answers, [most + 1]."""
    mistakes = np.arange(most + 1)
    ways = logs[count] - logs[mistakes] - logs[count - mistakes]
    rest = (count - mistakes) * math.log1p(-rate)
    return ways + mistakes * math.log(rate) + rest


def tail(mistakes: int, count: int, rate: float) -> float:
    """The chance of so few mistakes, or fewer, among `count` answers if each is one at `rate`."""
    if not 0 < rate < 1:
        return 1.0 if rate <= 0 or mistakes >= count else 0.0
    if mistakes < 0:
        return 0.0
    logs = log_factorials(count)
    chances = log_chances(count, rate, min(mistakes, count), logs)
    return float(min(np.exp(chances).sum(), 1.0))


def mistakes_allowed(count: int, share: float, logs: np.ndarray) -> int:
    """With how many mistakes among `count` answers `share` can be promised; -1: not even with none.

    logs: log_factorials() of `count` or more.
    """
    most = math.ceil(count * (1 - share))  # more are never few
    sums = np.exp(log_chances(count, 1 - share, most, logs)).cumsum()
    return int(np.searchsorted(sums, ALPHA, "right")) - 1


def fewest_images(share: float) -> int:
    """How many images a promise takes if there is not one mistake."""
    return math.ceil(math.log(ALPHA) / math.log(share))


def lower_bound(mistakes: int, count: int) -> float:
    """The largest share that so few mistakes promise (Clopper and Pearson 1934)."""
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        if tail(mistakes, count, 1 - middle) <= ALPHA:
            low = middle
        else:
            high = middle
    return low


# ---------------------------------------------------------------------------------------- accuracy
@dataclass(frozen=True)
class Steps:
    """What is tried for accuracy, from the strictest threshold on: arrays [steps].

    expected: how many mistakes the probabilities, which are calibrated, lead to expect.
    """

    thresholds: np.ndarray
    answered: np.ndarray
    mistakes: np.ndarray
    expected: np.ndarray


def accuracy_steps(outputs: Labelled, recalls, min_probability: float) -> Steps:
    """Thresholds between equal shares of the answers. recalls: what is answered in any case."""
    answers = final_answers(outputs, Thresholds(recalls, min_probability))
    rows = np.flatnonzero(answers != NOT_ANSWERED)
    answers = answers[rows]
    is_mistake = answers != outputs.labels[rows]
    chance = outputs.probabilities[rows, answers]  # [n], as the next
    score = outputs.probabilities[rows].max(1)
    score[forced_classes(outputs.take(rows), recalls) != NOT_ANSWERED] = FORCED

    order = np.argsort(-score, kind="stable")
    score = score[order]
    mistakes = is_mistake[order].cumsum()
    expected = (1 - chance[order]).cumsum()

    count = len(rows)
    ranks = np.unique(np.ceil(np.arange(1, STEPS + 1) / STEPS * count).astype(int))
    thresholds = np.unique(score[ranks - 1])[::-1] if count else np.zeros(0)
    thresholds = thresholds[thresholds < FORCED]
    # Answers of equal probability are given together.
    answered = np.searchsorted(-score, -thresholds, "right")
    last = answered - 1
    # What is as improbable as nothing that was seen would be answered, too.
    thresholds = np.where(answered == count, 0.0, thresholds)
    return Steps(thresholds, answered, mistakes[last], expected[last])


def choose_least(steps: Steps, share: float) -> int | None:
    """The step of the lowest threshold that keeps accuracy, None if none does.

    The first test is the one that is most likely to succeed, by the probabilities alone; from there
    on each adds answers, until one fails.
    """
    if not len(steps.answered):
        return None
    logs = log_factorials(int(steps.answered[-1]))
    allowed = np.array([mistakes_allowed(int(n), share, logs) for n in steps.answered])
    usable = np.flatnonzero(allowed >= 0)
    if not len(usable):
        return None

    rate = steps.expected / steps.answered
    deviation = np.sqrt(np.maximum(steps.expected * (1 - rate), 0.05))
    likely = (allowed + 0.5 - steps.expected) / deviation  # in normal deviations
    start = usable[np.argmax(likely[usable])]

    chosen = None
    for step in range(start, len(allowed)):
        if steps.mistakes[step] > allowed[step]:
            break
        chosen = step
    return chosen


def promise_accuracy(
    outputs: Labelled, promise: Promise, recalls=(), min_probability: float = 0.0
) -> float:
    """The threshold of the largest probability. Raises NotKept."""
    steps = accuracy_steps(outputs, recalls, min_probability)
    chosen = choose_least(steps, promise.share)
    if chosen is not None:
        return float(steps.thresholds[chosen])

    possible = possible_accuracy(steps, promise)
    instead = f"{possible} could be promised" if possible else "no share could be promised"
    fewest = fewest_images(promise.share)
    answered = int(steps.answered[-1]) if len(steps.answered) else 0
    if answered < fewest:
        raise NotKept(
            f"cannot promise {promise}: it takes {fewest:,} answers, if none is wrong, and "
            f"{answered:,} of {len(outputs):,} images are answered; {instead}"
        )

    needed = needed_factor(steps, promise.share)
    more = "more images would not help"
    if needed == 1.0:  # as many would do, had the first test not been at another threshold
        more = "the probabilities, which say where to look for one, are too far off"
    elif needed is not None:
        more = f"it may take {round_up(needed * len(outputs)):,} images"
    if recalls:
        more += " (wrong answers by a promise of recall count)"
    raise NotKept(
        f"cannot promise {promise}: no threshold keeps it on {len(outputs):,} images with "
        f"{CONFIDENCE:.0%} confidence, and {more}; {instead}"
    )


def possible_accuracy(steps: Steps, promise: Promise) -> Promise | None:
    """The highest accuracy below the wanted one that could be promised."""
    last = math.ceil(round(promise.share / SHARE_STEP, DECIMALS)) - 1
    first = round(LEAST_SHARE / SHARE_STEP)
    for number in range(last, first - 1, -1):
        share = round(number * SHARE_STEP, DECIMALS)
        if choose_least(steps, share) is not None:
            return replace(promise, share=share)
    return None


def needed_factor(steps: Steps, share: float) -> float | None:
    """With how many times as many images, of as few mistakes, some threshold would keep `share`."""
    factor = 1.0
    while factor <= MOST_IMAGES:
        for answered, mistakes in zip(steps.answered, steps.mistakes, strict=True):
            count = int(answered * factor)
            expected = mistakes * factor
            # In normal deviations: the exact tail of so many answers takes long.
            spread = math.sqrt(count * share * (1 - share))
            if count >= fewest_images(share) and expected <= count * (1 - share) - 1.645 * spread:
                return factor
        factor *= 1.1
    return None


def round_up(count: float) -> int:
    """With two digits, as the number is an estimate."""
    unit = 10 ** max(len(str(int(count))) - 2, 0)
    return math.ceil(count / unit) * unit


# ------------------------------------------------------------------------------------------ recall
def promise_recall(outputs: Labelled, promise: Promise, number: int, earlier=()) -> float:
    """The threshold of the probability of class `number`. Raises NotKept.

    earlier: (class, threshold) of the promises that count before this one. Their thresholds depend
    on images of other classes alone, and so this test is as exact as theirs.
    """
    outputs = outputs.take(outputs.labels == number)
    count = len(outputs)
    fewest = fewest_images(promise.share)
    if count < fewest:
        could = possible_recall(promise, 0, count)
        raise NotKept(
            f"cannot promise {promise}: it takes {fewest:,} images of {promise.name}, if none is "
            f"missed, and there are {count:,}; {could}"
        )

    is_lost = outputs.is_unknown | (forced_classes(outputs, earlier) != NOT_ANSWERED)
    own = np.sort(outputs.probabilities[~is_lost, number])
    lost = int(is_lost.sum())
    allowed = mistakes_allowed(count, promise.share, log_factorials(count)) - lost

    threshold = 0.0
    if 0 <= allowed < len(own):
        threshold = float(own[allowed])
    if threshold > 0:
        return threshold

    never = lost + int((own == 0).sum())
    why = f"{never:,} of its {count:,} images are unknown, have a probability of 0"
    if earlier:
        why += " or are taken by an earlier promise"
    could = possible_recall(promise, never, count)
    raise NotKept(f"cannot promise {promise}: {why}; {could}")


def possible_recall(promise: Promise, mistakes: int, count: int) -> str:
    """What could be promised instead, in words."""
    share = math.floor(1000 * lower_bound(mistakes, count)) / 1000 if count else 0.0
    if share <= 0 or share >= promise.share:
        return "no share could be promised"
    return f"{replace(promise, share=share)} could be promised"


# ------------------------------------------------------------------------------------ all together
def choose_thresholds(
    outputs: Labelled, promises: list[Promise], classes: list[str], min_probability: float = 0.0
) -> Thresholds:
    """The thresholds that keep all promises, each with 95 % confidence. Raises NotKept.

    Accuracy is tested with the thresholds of recall applied. So that these do not come from the
    same images, each kind gets a half of the images if there are both.
    """
    of_recall = [promise for promise in promises if promise.kind == RECALL]
    of_accuracy = [promise for promise in promises if promise.kind == ACCURACY]
    for_recall = for_accuracy = outputs
    if of_recall and of_accuracy:
        order = np.random.default_rng(0).permutation(len(outputs))
        order = order[np.argsort(outputs.labels[order], kind="stable")]  # a half of each class
        for_recall = outputs.take(order[::2])
        for_accuracy = outputs.take(order[1::2])

    recalls: tuple[tuple[int, float], ...] = ()
    for promise in of_recall:
        number = classes.index(promise.name)
        threshold = promise_recall(for_recall, promise, number, recalls)
        recalls = (*recalls, (number, threshold))

    least = 0.0
    for promise in of_accuracy:
        least = promise_accuracy(for_accuracy, promise, recalls, min_probability)
    return Thresholds(recalls, least)


# -------------------------------------------------------------------------------------- how it went
def wanted(promise: dict) -> Promise:
    """What a promise in a spec promises."""
    return Promise(promise["kind"], promise["share"], promise.get("name"))


def check(promise: Promise, answers: np.ndarray, labels: np.ndarray, number: int | None) -> dict:
    """How a promise held for answers [n] to images with labels [n]. number: of its class.

    images: that it is about, kept: how many of them as promised, share: the part of them, None of
    no image; others: of accuracy the share answered, of recall the share of other images that are
    called the class, which are false alarms.
    """
    if promise.kind == ACCURACY:
        concerned = answers != NOT_ANSWERED
        others = concerned
    else:
        concerned = labels == number
        others = (answers == number)[~concerned]
    kept = (answers == labels)[concerned]

    name = "answered" if promise.kind == ACCURACY else "false_alarms"
    return {
        "images": len(kept),
        "kept": int(kept.sum()),
        "share": round(float(kept.mean()), DECIMALS) if len(kept) else None,
        name: round(float(others.mean()), DECIMALS) if len(others) else None,
    }


def is_chance(found: dict, share: float) -> bool:
    """Can images that miss a promise of `share` by so much be explained by chance?

    found: of check(). The promise may still be kept then.
    """
    missed = found["images"] - found["kept"]
    return 1 - tail(missed - 1, found["images"], 1 - share) > ALPHA
