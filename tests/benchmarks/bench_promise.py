"""How well the thresholds of --promise keep what they promise. Run by hand.

    python tests/benchmarks/bench_promise.py exports/NAME [MORE ...] --data-dir DATA

For each exported file, the test split is cut 400 times into held-out images, which a threshold is
chosen on, and the others, which judge it. A promise is broken if the others miss it. Since the two
parts are made of the same 10,000 images, what one is lucky with the other lacks, and the judges are
few: chance adds to what is counted. So the thresholds are judged once more without chance: by the
whole test split, with held-out images drawn from it with replacement.

A threshold exists if the best one that hindsight finds on the judging images answers a tenth of
them. For comparison: how often the best single test that hindsight allows would find none.
"""

import argparse
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from benchmarks.bench_robustness import test_images  # noqa: E402
from benchmarks.results import add_results_option, command_line, write_result  # noqa: E402

from deploy.promises import outputs_of  # noqa: E402
from inference import promise as promises  # noqa: E402
from inference.predict import Model  # noqa: E402
from inference.promise import ACCURACY, RECALL, Labelled, NotKept, Promise  # noqa: E402

SPLITS = 400
HELD_OUT = (500, 1000, 2500)
SHARES = (0.9, 0.95, 0.98)
RECALLED = 0.95
LEAST_ANSWERED = 0.1  # by the best threshold in hindsight, so that one exists


@dataclass
class Counts:
    """What the splits of one kind came to.

    existing: splits with a threshold in hindsight, none: those of them without one found, broken:
    promises that did not hold. cost, best: the share answered, or of false alarms, with the
    threshold found and in hindsight.
    """

    splits: int = 0
    existing: int = 0
    none: int = 0
    broken: int = 0
    cost: list[float] = field(default_factory=list)
    best: list[float] = field(default_factory=list)

    def add(self, found: float | None, held: bool, cost: float, best: float | None) -> None:
        self.splits += 1
        self.existing += best is not None
        if found is None:
            self.none += best is not None
            return
        self.broken += not held
        if best is not None:
            self.cost.append(cost)
            self.best.append(best)

    def as_figures(self) -> dict:
        return {
            "splits": self.splits,
            "existing": self.existing,
            "none": self.none / max(self.existing, 1),
            "broken": self.broken / max(self.splits, 1),
            "cost": statistics.fmean(self.cost) if self.cost else None,
            "best": statistics.fmean(self.best) if self.best else None,
        }


def splits(
    outputs: Labelled, count: int, is_drawn: bool, seed: int
) -> Iterator[tuple[Labelled, Labelled]]:
    """Held-out images, and those that judge. is_drawn: with replacement, judged by all."""
    rng = np.random.default_rng(seed)
    for _ in range(SPLITS):
        if is_drawn:
            yield outputs.take(rng.integers(0, len(outputs), count)), outputs
        else:
            order = rng.permutation(len(outputs))
            yield outputs.take(order[:count]), outputs.take(order[count:])


# ---------------------------------------------------------------------------------------- accuracy
def best_answered(judges: Labelled, share: float) -> float | None:
    """The largest share that a threshold answers with accuracy on the judging images."""
    steps = ranked(judges)
    kept = np.flatnonzero(steps >= share * np.arange(1, len(steps) + 1))
    answered = (kept[-1] + 1) / len(steps) if len(kept) else 0.0
    return answered if answered >= LEAST_ANSWERED else None


def ranked(outputs: Labelled) -> np.ndarray:
    """How many of the k most probable answers are right, [n] for k from 1."""
    order = np.argsort(-outputs.probabilities.max(1), kind="stable")
    return (outputs.best == outputs.labels)[order].cumsum()


def try_accuracy(outputs: Labelled, share: float, count: int, is_drawn: bool, seed: int) -> Counts:
    counts = Counts()
    for held_out, judges in splits(outputs, count, is_drawn, seed):
        best = best_answered(judges, share)
        steps = promises.accuracy_steps(held_out, (), 0.0)
        chosen = promises.choose_least(steps, share)
        if chosen is None:
            counts.add(None, True, 0.0, best)
            continue

        threshold = float(steps.thresholds[chosen])
        answered = judges.probabilities.max(1) >= threshold
        right = (judges.best == judges.labels)[answered]
        counts.add(threshold, right.mean() >= share, float(answered.mean()), best)
    return counts


def none_at_best(outputs: Labelled, share: float, count: int) -> float:
    """How often the one test that is most likely to succeed, in hindsight, finds no threshold."""
    right = ranked(outputs)
    logs = promises.log_factorials(count)
    likely = 0.0
    for answered in range(1, count + 1, max(count // 200, 1)):
        allowed = promises.mistakes_allowed(answered, share, logs)
        last = round(answered * len(right) / count)
        rate = 1 - right[last - 1] / last
        if allowed >= 0:
            likely = max(likely, promises.tail(allowed, answered, rate))
    return 1 - likely


# ------------------------------------------------------------------------------------------ recall
def false_alarms(judges: Labelled, number: int, threshold: float) -> float:
    """The share of images of other classes that are called class `number`."""
    others = judges.take(judges.labels != number)
    answers = promises.final_answers(others, promises.Thresholds(((number, threshold),)))
    return float((answers == number).mean())


def try_recall(outputs: Labelled, number: int, count: int, is_drawn: bool, seed: int) -> Counts:
    """Splits with too few images of the class, which any test refuses, are left out."""
    counts = Counts()
    promise = Promise(RECALL, RECALLED, str(number))
    for held_out, judges in splits(outputs, count, is_drawn, seed):
        if (held_out.labels == number).sum() < promises.fewest_images(RECALLED):
            continue
        own = np.sort(judges.probabilities[judges.labels == number, number])
        best_threshold = own[int((1 - RECALLED) * len(own))]
        best = false_alarms(judges, number, best_threshold) if best_threshold > 0 else None
        try:
            threshold = promises.promise_recall(held_out, promise, number)
        except NotKept:
            counts.add(None, True, 0.0, best)
            continue
        held = (own >= threshold).mean() >= RECALLED
        counts.add(threshold, held, false_alarms(judges, number, threshold), best)
    return counts


# ------------------------------------------------------------------------------------------ figures
def measure(path: Path, data_dir: str | None) -> Iterator[dict]:
    """A row for each promise and number of held-out images of one file; prints them."""
    file = Model(path)
    images, labels = test_images(file.spec, data_dir, 10**9)
    outputs = outputs_of(file, images, labels)
    network = path.parent.name
    print(f"{network}: {(outputs.best == labels).mean():.2%} of {len(labels):,}", flush=True)

    for count in HELD_OUT:
        if count > len(labels) // 2:
            continue
        for share in SHARES:
            yield accuracy_row(outputs, share, count, network)
        for number, name in enumerate(file.spec["classes"]):
            yield from recall_row(outputs, number, count, network, name)


def accuracy_row(outputs: Labelled, share: float, count: int, network: str) -> dict:
    parts = try_accuracy(outputs, share, count, is_drawn=False, seed=count)
    drawn = try_accuracy(outputs, share, count, is_drawn=True, seed=count)
    row = {
        "network": network,
        "kind": ACCURACY,
        "share": share,
        "class": None,
        "held_out": count,
        "parts": parts.as_figures(),
        "drawn": drawn.as_figures(),
        "none_at_best": none_at_best(outputs, share, count),
    }
    show(row)
    return row


def recall_row(
    outputs: Labelled, number: int, count: int, network: str, name: str
) -> Iterator[dict]:
    parts = try_recall(outputs, number, count, is_drawn=False, seed=count)
    drawn = try_recall(outputs, number, count, is_drawn=True, seed=count)
    if parts.splits < SPLITS / 2:
        return
    row = {
        "network": network,
        "kind": RECALL,
        "share": RECALLED,
        "class": name,
        "held_out": count,
        "parts": parts.as_figures(),
        "drawn": drawn.as_figures(),
    }
    show(row)
    yield row


def show(row: dict) -> None:
    parts, drawn = row["parts"], row["drawn"]
    subject = row["kind"] if row["class"] is None else f"{row['kind']}:{row['class']}"
    cost = "-" if parts["cost"] is None else f"{parts['cost']:.3f} for {parts['best']:.3f}"
    print(
        f"  {subject}={row['share']:g} {row['held_out']:5}: none {parts['none']:.1%}, "
        f"broken {parts['broken']:.1%}, drawn {drawn['broken']:.1%}, {cost}",
        flush=True,
    )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("exports", nargs="+", type=Path, help="files, or directories of model.onnx")
    parser.add_argument("--data-dir", help="default: where step1 had it")
    add_results_option(parser)
    args = parser.parse_args()

    rows = []
    for export in args.exports:
        path = export / "model.onnx" if export.is_dir() else export
        rows += measure(path, args.data_dir)
    write_result("promise", {"splits": SPLITS, "rows": rows}, command_line(), args.results)


if __name__ == "__main__":
    main()
