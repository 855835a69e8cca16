"""How well --monitor watches: false alarms, images to the alarm, accuracy without labels, its cost.
Run by hand.

    python tests/benchmarks/bench_field.py exports/cifar10-0 exports/mnist-0 exports/digits-0 \\
        --corrupted DIR

The exports are of this version of step2, and their data is where step1 had it. DIR holds what
corrupt.py made of every fifth test image, which --save writes. A file whose reference is the test
split gets one of every other test image, and the streams are drawn from the rest.
"""

import argparse
import resource
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from benchmarks.bench_unknown import kinds  # noqa: E402
from benchmarks.results import add_results_option, command_line, write_result  # noqa: E402

import data  # noqa: E402
from deploy.comparing import Outputs, predictions, take  # noqa: E402
from deploy.watching import monitor_reference  # noqa: E402
from inference.drift import LIMIT, Drift, unplaced  # noqa: E402
from inference.monitor import Monitor  # noqa: E402
from inference.predict import Model, predict_files  # noqa: E402
from inference.spacing import FIRST_LOOK  # noqa: E402

EVERY = 5  # test images of which one is changed
CLEAN_STREAMS, CLEAN_LENGTH = 10_000, 5000
AT_ONCE = 2000  # streams
STREAMS = 50  # of each change
MUCH = 0.1  # of the accuracy: a change that costs more must be found
REPEATS, REPEATED_STREAMS = 10, 100
TIMED = 320  # images
ROUNDS = 15
FRAMES = 1_000_000


# ------------------------------------------------------------------------------------ simulations
def first_alarms(reference: dict, outputs: Outputs, streams: np.ndarray) -> np.ndarray:
    """After how many images each stream alarms, 0 for never: what Drift.bet() does, many at a time.

    streams: rows of `outputs`, [streams, images].
    """
    drift = Drift(reference)
    known = np.zeros(len(outputs.main)) if outputs.known is None else outputs.known
    largest = outputs.main.max(1).astype(np.float64).round(6)
    answers = outputs.main.argmax(1)
    rows = np.searchsorted(drift.known_edges, known.astype(np.float64).round(6), side="right")
    columns = np.searchsorted(drift.probability_edges, largest, side="right")
    cells = rows * drift.columns + columns

    count = len(streams)
    on_cells = np.zeros((count, drift.payoffs.shape[1]))
    on_classes = np.zeros((count, *drift.hit.shape))
    cell_weights = drift.weights[: on_cells.shape[1]]
    class_weights = drift.weights[on_cells.shape[1] :]
    alarms = np.zeros(count, int)
    running = np.arange(count)
    for image in range(1, streams.shape[1] + 1):
        shown = streams[running, image - 1]
        placed = unplaced(image) - unplaced(image + 1)
        on_cells = (on_cells + placed) * drift.payoffs[cells[shown]]
        on_classes += placed
        each = np.arange(len(running))
        own = on_classes[each, answers[shown]] * drift.hit[answers[shown]]
        on_classes *= drift.miss
        on_classes[each, answers[shown]] = own

        evidence = on_cells @ cell_weights + unplaced(image + 1)
        evidence += on_classes.reshape(len(running), -1) @ class_weights
        raised = evidence >= LIMIT
        if raised.any():
            alarms[running[raised]] = image
            running = running[~raised]
            on_cells = on_cells[~raised]
            on_classes = on_classes[~raised]
        if not len(running):
            break
    return alarms


def count_false_alarms(reference: dict, clean: Outputs, rng: np.random.Generator) -> int:
    """Of CLEAN_STREAMS shuffled streams; of few images, they are drawn again and again."""
    images = len(clean.main)
    alarms = 0
    for _ in range(0, CLEAN_STREAMS, AT_ONCE):
        if images >= CLEAN_LENGTH:
            order = [rng.permutation(images)[:CLEAN_LENGTH] for _ in range(AT_ONCE)]
            streams = np.stack(order)
        else:
            streams = rng.integers(0, images, (AT_ONCE, CLEAN_LENGTH))
        alarms += int((first_alarms(reference, clean, streams) > 0).sum())
    return alarms


def judge_change(
    name: str, reference: dict, outputs: Outputs, labels: np.ndarray | None, rng
) -> dict:
    """Accuracy, estimate and images to the alarm of changed images, in shuffled streams."""
    images = len(outputs.main)
    streams = np.stack([rng.permutation(images) for _ in range(STREAMS)])
    alarms = first_alarms(reference, outputs, streams)
    # As a file is watched by default: no image is bet on before the first look at their spacing.
    after = np.where(alarms > 0, alarms + FIRST_LOOK, np.inf)
    found = after <= images
    median = float(np.median(np.where(found, after, np.inf)))
    estimate = (outputs.main.max(1).astype(np.float64).round(6) > reference["threshold"]).mean()
    return {
        "change": name,
        "images": images,
        "accuracy": None if labels is None else float((outputs.main.argmax(1) == labels).mean()),
        "estimate": float(estimate),
        "found": float(found.mean()),
        "median": median if np.isfinite(median) else None,
    }


def late_alarms(reference: dict, clean: Outputs, changed: Outputs, rng) -> float | None:
    """The median of images to the alarm if the change comes after CLEAN_LENGTH images."""
    main = np.concatenate([clean.main, changed.main])
    known = np.concatenate([clean.known, changed.known])
    streams = []
    for _ in range(STREAMS):
        before = rng.integers(0, len(clean.main), CLEAN_LENGTH)
        after = len(clean.main) + rng.permutation(len(changed.main))
        streams.append(np.concatenate([before, after]))
    alarms = first_alarms(reference, Outputs(main, known), np.stack(streams))
    after = np.where(alarms > CLEAN_LENGTH, alarms - CLEAN_LENGTH, np.inf)
    median = float(np.median(after))
    return median if np.isfinite(median) else None


# ------------------------------------------------------------------------------- the product itself
def as_rows(outputs: Outputs, classes: list[str]) -> list[dict]:
    """The rows that predict() gives for outputs."""
    rows = []
    known = [None] * len(outputs.main) if outputs.known is None else outputs.known.tolist()
    for probabilities, share in zip(outputs.main, known, strict=True):
        best = {
            "label": classes[probabilities.argmax()],
            "probability": round(float(probabilities.max()), 6),
        }
        rows.append({**best, "known": share, "top": [best]})
    return rows


def count_repeated(model: Model, rows: list[dict], rng, bet_every: int | None) -> int:
    """False alarms of streams in which each image stays for REPEATS frames."""
    alarms = 0
    for _ in range(REPEATED_STREAMS):
        monitor = Monitor(model, bet_every=bet_every)
        for number in rng.permutation(len(rows))[: CLEAN_LENGTH // REPEATS]:
            for _ in range(REPEATS):
                monitor.update(rows[number])
        alarms += monitor.alarm is not None
    return alarms


def measure_cost(model: Model, images: np.ndarray) -> dict:
    """CPU seconds of an image, predicted from a PNG file and watched, in alternation."""
    predicting, watching = [], []
    with tempfile.TemporaryDirectory() as folder:
        paths = []
        for number, image in enumerate(images[:TIMED]):
            path = f"{folder}/{number}.png"
            Image.fromarray(image.squeeze()).save(path)
            paths.append((path, None))

        for number in range(ROUNDS):
            # The same images again and again would raise the alarm, after which no bet is placed.
            monitor = Monitor(model, f"{folder}/monitor-{number}.json")
            started = time.process_time()
            lists = list(predict_files(model, iter(paths), workers=1, batch_size=16, top_k=3))
            predicted = time.process_time()
            for row in [row for rows in lists for row in rows]:
                monitor.update(row)
            watching.append((time.process_time() - predicted) / len(paths))
            predicting.append((predicted - started) / len(paths))
            assert monitor.alarm is None
            monitor.close()
    return {
        "predicting": statistics.median(predicting),
        "watching": statistics.median(watching),
    }


def measure_memory(model: Model, rows: list[dict]) -> dict:
    """The largest resident size of this process, in MB, and the file's in bytes, over FRAMES."""
    figures = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "monitor.json")
        monitor = Monitor(model, str(path))
        for frame in range(1, FRAMES + 1):
            monitor.update(rows[frame % len(rows)])
            if frame in (FRAMES // 100, FRAMES):
                monitor.save()
                peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
                figures[str(frame)] = {"mb": peak, "file": path.stat().st_size}
        monitor.close()
    return figures


# ------------------------------------------------------------------------------------------- a file
def survey(path: Path, corrupted: Path | None, rng: np.random.Generator) -> dict:
    """All figures of one export."""
    model = Model(path / "model.onnx", threads=1)
    dataset = data.load_for(model.spec, None)
    clean = predictions(model, dataset.test_images)
    labels = dataset.test_labels
    reference = model.spec["monitor"]
    if reference["source"] == "the test split":
        order = rng.permutation(len(labels))
        half, rest = order[::2], order[1::2]
        reference = monitor_reference(take(clean, half), labels[half], "half of the test split")
        model.spec["monitor"] = reference
        clean = take(clean, rest)
        labels = labels[rest]

    figures = {
        "export": path.name,
        "source": reference["source"],
        "compared": reference["images"],
        "images": len(labels),
        "accuracy": float((clean.main.argmax(1) == labels).mean()),
        "streams": CLEAN_STREAMS,
        "length": CLEAN_LENGTH,
        "false_alarms": count_false_alarms(reference, clean, rng),
    }
    judge = partial(judge_change, reference=reference, rng=rng)
    changes = [judge("none", outputs=clean, labels=labels)]
    for number, name in enumerate(dataset.classes):
        own = labels == number
        changes.append(judge(f"only {name}", outputs=take(clean, own), labels=labels[own]))
    for name, images in kinds(model.spec, []):
        if isinstance(images, np.ndarray):
            changes.append(judge(name, outputs=predictions(model, images), labels=None))

    late = []
    for file in sorted(corrupted.glob("*.npy")) if corrupted and path.name[0] == "c" else []:
        changed = predictions(model, np.load(file))
        row = judge(file.stem, outputs=changed, labels=dataset.test_labels[::EVERY])
        changes.append(row)
        if figures["accuracy"] - row["accuracy"] >= MUCH:
            late.append(late_alarms(reference, clean, changed, rng))
        print(row, flush=True)
    figures["changes"] = changes
    figures["late"] = late

    # The test split may be sorted by class, which would raise the alarm, and end the bets.
    shuffled = rng.permutation(len(labels))
    rows = as_rows(take(clean, shuffled), model.spec["classes"])
    figures["repeated"] = count_repeated(model, rows, rng, None)
    figures["repeated_each"] = count_repeated(model, rows, rng, 1)
    figures["cost"] = measure_cost(model, rng.permutation(dataset.test_images))
    figures["memory"] = measure_memory(model, rows)
    return figures


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("exports", type=Path, nargs="+")
    parser.add_argument("--corrupted", type=Path, metavar="DIR")
    parser.add_argument("--save", metavar="FILE.npz", help="write the images for corrupt.py")
    add_results_option(parser)
    args = parser.parse_args()
    if args.save:
        spec = Model(args.exports[0] / "model.onnx").spec
        np.savez(args.save, images=data.load_for(spec, None).test_images[::EVERY])
        return

    rng = np.random.default_rng(0)
    surveyed = []
    for path in args.exports:
        figures = survey(path, args.corrupted, rng)
        surveyed.append(figures)
        print({key: value for key, value in figures.items() if key != "changes"}, flush=True)
        write_result("field", {"exports": surveyed}, command_line(), args.results)


if __name__ == "__main__":
    main()
