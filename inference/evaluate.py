"""How good a file's answers are on labelled images: the figures that --evaluate writes."""

import collections
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np

from inference import metrics
from inference.command_line import encodable, printable, say
from inference.errors import Problem
from inference.finding import note_files
from inference.images import images_of
from inference.labels import Labels, ListLabels
from inference.predict import Model
from inference.promise import NOT_ANSWERED, check, is_chance, wanted
from inference.spec import DECIMALS, promised_recalls
from inference.tables import csv_line

WORST = 20  # mistakes that are named
MOST_CONFUSIONS, FEW_CONFUSIONS = 20, 10  # pairs of classes that are listed, and in text
NAMED = 9  # labels that a note names
MOST_CLASSES = 30  # that text lists; of more, the FEWEST_CLASSES with the lowest F1
FEWEST_CLASSES = 20
NAME_WIDTH = 26  # columns of a class's name in text
ROW_KEYS = ("path", "error", "truth", "label", "probability", "known", "answer")


@dataclass
class Judged:
    """One image with its label, and what the file answers; truth, best and answer are classes.

    best: the most probable class. answer: the same, or the class that a promise of recall makes the
    answer; probability: of the answer. label: what the file says, which may be unknown or unsure.
    """

    path: str
    truth: int
    best: int
    confidence: float  # the probability of the best class
    answer: int
    probability: float
    known: float | None
    label: str


@dataclass
class Answers:
    """The answers for all images.

    judged: those whose label the file knows. unknown_labels: how many images have each of the
    others. unlabelled: the paths of files without one. errors: how many inputs could not be used.
    not_found: the files that a list names, and that were not among the inputs. repeated: how many
    rows were of a file that had one before.
    """

    judged: list[Judged] = field(default_factory=list)
    unknown_labels: collections.Counter = field(default_factory=collections.Counter)
    unlabelled: list[str] = field(default_factory=list)
    errors: int = 0
    not_found: list[str] = field(default_factory=list)
    repeated: int = 0

    def are_errors_only(self) -> bool:
        """Could nothing be used of all that was asked for?"""
        others = (self.judged, self.unknown_labels, self.unlabelled)
        return self.errors > 0 and not any(others)


# ----------------------------------------------------------------------------------------- reading
def read_answers(
    results: Iterator[list[dict]], labels: Labels, model: Model, rows_out: "RowsOut | None"
) -> Answers:
    """The answers of rows as predict_files() yields them; each is written to `rows_out`.

    A file counts once, also if it was given twice, such as by its folder and by its own path.
    """
    numbers = {name: number for number, name in enumerate(model.spec["classes"])}
    promised = promised_recalls(model.spec)
    answers = Answers()
    seen = set()
    for rows in results:
        for row in rows:
            place = os.path.abspath(row["path"])
            if place in seen:
                answers.repeated += 1
                continue
            seen.add(place)

            truth = labels.of(row["path"])
            if rows_out is not None:
                rows_out.write(row, truth)

            # A list says which files count: whether another can be read does not matter.
            is_unlisted = isinstance(labels, ListLabels) and truth is None
            if is_unlisted and os.path.exists(row["path"]):
                answers.unlabelled.append(row["path"])
            elif "error" in row:
                answers.errors += 1
                say(f"error: {row['path']}: {row['error']}")
            elif truth is None:
                answers.unlabelled.append(row["path"])
            elif truth not in numbers:
                answers.unknown_labels[truth] += 1
            else:
                answers.judged.append(judge(row, numbers[truth], numbers, promised))
    answers.not_found = labels.not_found()
    return answers


def judge(row: dict, truth: int, numbers: dict[str, int], promised: set[str]) -> Judged:
    """What counts of a row. numbers: of the classes. promised: see promised_recalls()."""
    best = row["top"][0]
    answered = row if row["label"] in promised else best
    return Judged(
        path=row["path"],
        truth=truth,
        best=numbers[best["label"]],
        confidence=best["probability"],
        answer=numbers[answered["label"]],
        probability=answered["probability"],
        known=row["known"],
        label=row["label"],
    )


class RowsOut:
    """Every row with its label, as JSON lines, or as CSV in a file of that suffix."""

    def __init__(self, out, is_csv: bool):
        self.out = out
        self.is_csv = is_csv
        if is_csv:
            out.write(csv_line(ROW_KEYS))

    def write(self, row: dict, truth: str | None) -> None:
        """answer: the best class, which `label` is not where a threshold decided."""
        whole = {**row, "truth": truth}
        if "error" not in row:
            whole["answer"] = row["top"][0]["label"]
        listed = {key: whole[key] for key in ROW_KEYS if key in whole}
        if self.is_csv:
            self.out.write(csv_line([listed.get(key) for key in ROW_KEYS]))
        else:
            self.out.write(json.dumps(encodable(listed)) + "\n")


def note_left_out(answers: Answers, classes: list[str]) -> None:
    """Note the images that are not judged."""
    if answers.repeated:
        say(f"note: {images_of(answers.repeated)} given more than once, counted once")
    note_files("left out", answers.unlabelled, "without a label")
    note_files("did not find", answers.not_found, "that --labels names below PATH")
    if not answers.unknown_labels:
        return
    named = []
    for label, count in answers.unknown_labels.most_common(NAMED):
        named.append(f"{label} {count:,}")
    if len(answers.unknown_labels) > NAMED:
        named.append("...")
    images = images_of(answers.unknown_labels.total())
    are_none = f"whose labels are none of the file's {len(classes):,} classes"
    say(f"note: left out {images} {are_none}: {', '.join(named)}")


# ----------------------------------------------------------------------------------------- figures
def evaluate(answers: Answers, model: Model, path: str) -> dict:
    """The figures; path: of the model's file. Raises Problem if no image has a usable label."""
    classes = model.spec["classes"]
    judged = answers.judged
    count = len(judged)
    if count == 0:
        some = ", ".join(classes[:NAMED]) + (", ..." if len(classes) > NAMED else "")
        raise Problem(
            f"no image has a label that {path} knows (its classes: {some}): name the classes so, "
            "in the folders of the images or in --labels FILE"
        )

    truths = np.array([image.truth for image in judged])
    predicted = np.array([image.answer for image in judged])
    confidence = np.array([image.confidence for image in judged])
    best_right = truths == np.array([image.best for image in judged])

    per_class = class_figures(truths, predicted, classes)
    seen = [row for row in per_class.values() if row["images"]]
    hits = int((truths == predicted).sum())
    without_recalls = rounded(best_right.mean()) if promised_recalls(model.spec) else None
    return {
        "model": path,
        "images": count,
        "errors": answers.errors,
        "unlabelled": len(answers.unlabelled),
        "not_found": len(answers.not_found),
        "unknown_labels": dict(answers.unknown_labels.most_common()),
        "accuracy": rounded(hits / count),
        "accuracy_interval": interval(hits, count),
        "accuracy_without_recalls": without_recalls,
        "balanced_accuracy": rounded(metrics.balanced_accuracy(truths, predicted)),
        "macro_f1": rounded(np.mean([row["f1"] for row in seen])),
        "calibration_error": rounded(metrics.binned_error(confidence, best_right)),
        "calibration_error_floor": rounded(metrics.binned_error_floor(confidence)),
        **threshold_figures(judged, model),
        "promises": promise_figures(judged, model),
        "per_class": per_class,
        "confusions": most_confused(judged, classes),
        "worst": worst_mistakes(judged, classes),
    }


def threshold_figures(judged: list[Judged], model: Model) -> dict:
    """What the thresholds leave, and how much of that is right."""
    unknown = unsure = answered = hits = 0
    for image in judged:
        answer = final_answer(image, model)
        if answer != NOT_ANSWERED:
            answered += 1
            hits += answer == image.truth
        elif image.label == "unknown":
            unknown += 1
        else:
            unsure += 1

    count = len(judged)
    return {
        "reject": model.reject,
        "min_probability": model.min_probability,
        "unknown": rounded(unknown / count),
        "unsure": rounded(unsure / count),
        "answered": rounded(answered / count),
        "accuracy_answered": rounded(hits / answered) if answered else None,
        "accuracy_answered_interval": interval(hits, answered) if answered else None,
    }


def final_answer(image: Judged, model: Model) -> int:
    """The class that the file answers, NOT_ANSWERED for unknown and unsure."""
    classes = model.spec["classes"]
    is_answered = image.label == classes[image.answer]  # a class may be called "unknown"
    return image.answer if is_answered else NOT_ANSWERED


def promise_figures(judged: list[Judged], model: Model) -> list[dict]:
    """Whether each promise of the file held on these images, with counts."""
    answers = np.array([final_answer(image, model) for image in judged])
    truths = np.array([image.truth for image in judged])
    figures = []
    for promise in model.promises:
        number = None
        if promise["kind"] == "recall":
            number = model.spec["classes"].index(promise["name"])
        found = check(wanted(promise), answers, truths, number)
        held = None
        if found["images"]:
            held = found["share"] >= promise["share"]
        explained = held is False and is_chance(found, promise["share"])
        name = str(wanted(promise))
        figures.append({"promise": name, "held": held, "chance_explains": explained, **found})
    return figures


def class_figures(truths: np.ndarray, predicted: np.ndarray, classes: list[str]) -> dict[str, dict]:
    """{class: its figures}; images: how many there are of it, answers: how many are called it."""
    called = np.bincount(predicted, minlength=len(classes))
    figures = {}
    for number, (name, row) in enumerate(metrics.per_class(truths, predicted, classes).items()):
        figures[name] = {
            "recall": rounded(row["recall"]),
            "precision": rounded(row["precision"]),
            "f1": rounded(row["f1"]),
            "images": row["support"],
            "answers": int(called[number]),
        }
    return figures


def most_confused(judged: Iterable[Judged], classes: list[str]) -> list[dict]:
    """The most frequent pairs of a class and the one that it is called instead."""
    pairs = collections.Counter()
    for image in judged:
        if image.truth != image.answer:
            pairs[image.truth, image.answer] += 1

    rows = []
    for (truth, answer), count in pairs.most_common(MOST_CONFUSIONS):
        rows.append({"truth": classes[truth], "answer": classes[answer], "count": count})
    return rows


def worst_mistakes(judged: Iterable[Judged], classes: list[str]) -> list[dict]:
    """The wrong answers that are given the highest probability."""
    mistakes = [image for image in judged if image.truth != image.answer]
    mistakes.sort(key=lambda image: -image.probability)
    rows = []
    for image in mistakes[:WORST]:
        rows.append(
            {
                "path": image.path,
                "truth": classes[image.truth],
                "answer": classes[image.answer],
                "probability": image.probability,
                "known": image.known,
            }
        )
    return rows


def interval(hits: int, count: int) -> list[float]:
    """The 95 % interval of a share."""
    return [rounded(limit) for limit in metrics.wilson_interval(hits, count)]


def rounded(value: float) -> float:
    return round(float(value), DECIMALS)


# -------------------------------------------------------------------------------------------- text
def write_evaluation(figures: dict, output_format: str, out) -> None:
    """Write the figures as one line of JSON, or as text of 80 columns."""
    if output_format == "json":
        out.write(json.dumps(encodable(figures)) + "\n")
        return

    lines = [*summary_lines(figures), "", *class_lines(figures["per_class"])]
    if figures["confusions"]:
        lines += ["", "most frequent confusions"]
        for row in figures["confusions"][:FEW_CONFUSIONS]:
            lines.append(f"{row['count']:7,}  {called(row)}")
    if figures["worst"]:
        lines += ["", "worst mistakes, by the probability of the answer"]
        for row in figures["worst"]:
            known = "" if row["known"] is None else f"  known {row['known']:6.1%}"
            lines.append(f"{row['probability']:7.2%}{known}  {called(row)}  {row['path']}")
    for line in lines:
        out.write(printable(line) + "\n")


def summary_lines(figures: dict) -> list[str]:
    """The figures of all classes together, a line each."""
    floor = f"(calibrated probabilities would show {figures['calibration_error_floor']:.2%})"
    rows = [
        ("images", f"{figures['images']:,}", ""),
        ("accuracy", f"{figures['accuracy']:.2%}", between(figures["accuracy_interval"])),
        *without_recalls(figures),
        ("balanced accuracy", f"{figures['balanced_accuracy']:.2%}", ""),
        ("macro F1", f"{figures['macro_f1']:.2%}", ""),
        ("calibration error", f"{figures['calibration_error']:.2%}", floor),
    ]
    if figures["reject"] is not None:
        rows.append(("unknown", f"{figures['unknown']:.2%}", f"(reject {figures['reject']:g})"))
    if figures["min_probability"] is not None:
        below = f"(min-probability {figures['min_probability']:g})"
        rows.append(("unsure", f"{figures['unsure']:.2%}", below))
    has_thresholds = figures["reject"] is not None or figures["min_probability"] is not None
    if has_thresholds or figures["answered"] < 1:
        rows.append(("answered", f"{figures['answered']:.2%}", ""))
        if figures["accuracy_answered"] is not None:
            right = between(figures["accuracy_answered_interval"])
            rows.append(("right of these", f"{figures['accuracy_answered']:.2%}", right))
    lines = [f"{name:18} {value:>8}  {remark}".rstrip() for name, value, remark in rows]
    return lines + [promise_line(promise) for promise in figures["promises"]]


def without_recalls(figures: dict) -> list[tuple[str, str, str]]:
    """What a file that promises recall would reach without: no row for another."""
    accuracy = figures["accuracy_without_recalls"]
    if accuracy is None:
        return []
    return [("most probable", f"{accuracy:.2%}", "(the most probable class, promises aside)")]


def promise_line(figures: dict) -> str:
    """Whether a promise held."""
    name = f"promise {figures['promise']}"
    if figures["held"] is None:
        return f"{name}: no image is about it"
    verdict = "held" if figures["held"] else "NOT held"
    if figures["chance_explains"]:
        verdict += ", which chance explains"
    counts = f"{figures['kept']:,} of {figures['images']:,}"
    cost = ""
    if figures.get("false_alarms") is not None:
        cost = f", false alarms {figures['false_alarms']:.2%}"
    return f"{name}: {verdict}, {figures['share']:.2%} ({counts}){cost}"


def between(limits: list[float]) -> str:
    """An interval in words."""
    low, high = limits
    return f"({low:.2%} to {high:.2%} with 95 % confidence)"


def class_lines(per_class: dict[str, dict]) -> list[str]:
    """The table of the classes; of many, those with the lowest F1."""
    names = list(per_class)
    remark = []
    if len(names) > MOST_CLASSES:
        seen = [name for name in names if per_class[name]["images"]]
        names = sorted(seen, key=lambda name: per_class[name]["f1"])[:FEWEST_CLASSES]
        remark = [f"({len(names)} of {len(per_class):,} classes, by F1; --format json has all)"]

    width = max(5, *(len(short(name)) for name in names))
    head = (
        f"{'class':{width}}  {'recall':>8} {'precision':>9} {'F1':>8} {'images':>8} {'answers':>8}"
    )
    lines = [head]
    for name in names:
        row = per_class[name]
        # Without images of a class or answers that name it, there is no such share.
        recall = f"{row['recall']:.2%}" if row["images"] else "-"
        precision = f"{row['precision']:.2%}" if row["answers"] else "-"
        f1 = f"{row['f1']:.2%}" if row["images"] + row["answers"] else "-"
        counts = f"{row['images']:8,} {row['answers']:8,}"
        lines.append(f"{short(name):{width}}  {recall:>8} {precision:>9} {f1:>8} {counts}")
    return lines + remark


def called(row: dict) -> str:
    """What a class was called instead."""
    return f"{short(row['truth'])} called {short(row['answer'])}"


def short(name: str) -> str:
    """A class's name as text shows it: cut in the middle if it is long."""
    name = printable(name)
    if len(name) <= NAME_WIDTH:
        return name
    half = (NAME_WIDTH - 3) // 2
    return f"{name[: half + 1]}...{name[-half:]}"
