"""What an exported file promises: --promise of step2, for each file by its own probabilities.

Thresholds are chosen on images that are in neither the training nor the test split, and checked on
the test split. inference/promise.py has the statistics.
"""

import argparse
import difflib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np

from deploy import describe, micro, micro_file
from deploy.comparing import Outputs, join
from deploy.exporters import Source, without_archive, write_file, write_with_spec
from deploy.formats import Format
from inference import promise as statistics
from inference.engines import read_spec_at_end
from inference.errors import Problem
from inference.predict import Model
from inference.promise import ACCURACY, RECALL, Labelled, NotKept, Promise, Thresholds

BATCH_SIZE = 64
SPEC_AT_END = (".pte", ".tflite")  # files with their spec in an archive behind the model
FORM = "give accuracy=0.95 or recall:CLASS=0.99"
WAY_OUT = (
    "train with --calibration held-out (or --val-fraction) to keep images that the run is not "
    "trained on"
)


# ------------------------------------------------------------------------------- the command line
def read_promise(text: str) -> Promise:
    """The promise that an argument of --promise asks for. Raises ArgumentTypeError."""
    subject, equals, number = text.rpartition("=")  # the name of a class may contain one
    kind, _, name = subject.partition(":")
    is_accuracy = subject == ACCURACY
    is_recall = kind == RECALL and bool(name)
    if not equals or not (is_accuracy or is_recall):
        raise argparse.ArgumentTypeError(f"{text!r} is no promise: {FORM}")

    try:
        share = float(number)
    except ValueError:
        share = float("nan")
    if not 0 < share < 1:
        hint = ""
        if 1 < share < 100:
            hint = f"; {share:g} % is {share / 100:g}"
        raise argparse.ArgumentTypeError(
            f"{text!r}: a share above 0 and below 1 can be promised{hint}"
        )
    return Promise(kind, share, name if is_recall else None)


def twice(promises: list[Promise]) -> str | None:
    """What is promised twice, if anything is."""
    seen = set()
    for promise in promises:
        subject = (promise.kind, promise.name)
        if subject in seen:
            return promise.kind if promise.name is None else f"{promise.kind}:{promise.name}"
        seen.add(subject)
    return None


def check_classes(promises: list[Promise], classes: list[str]) -> None:
    """Raise Problem for a class that does not exist."""
    for promise in promises:
        if promise.kind != RECALL or promise.name in classes:
            continue
        nearest = difflib.get_close_matches(promise.name, classes, n=1)
        hint = f"the classes are {', '.join(classes[:10])}"
        if len(classes) > 10:
            hint += f" and {len(classes) - 10:,} more"
        if nearest:
            hint = f"did you mean {nearest[0]!r}?"
        raise Problem(f"--promise {promise}: there is no class {promise.name!r}; {hint}", 2)


def refuse_seen(run_dir: str) -> Problem:
    """The error for a run that has been trained on all images beside the test split."""
    return Problem(
        f"--promise needs images that were not trained on, and {run_dir} has seen all but the test "
        f"split: {WAY_OUT}",
        2,
    )


# -------------------------------------------------------------------------------------- choosing
def choose(wanted: list[Promise], spec: dict, on_unseen: Labelled, source: str) -> Thresholds:
    """The thresholds that keep what is wanted on images of this source. Raises Problem."""
    least = spec["min_probability"] or 0.0
    try:
        return statistics.choose_thresholds(on_unseen, wanted, spec["classes"], least)
    except NotKept as reason:
        used = source
        if len({promise.kind for promise in wanted}) > 1:
            used += ", one half for accuracy and one for recall"
        raise Problem(f"{reason} (images: {used}; --val-fraction of step1 keeps more)") from None


def promises_of(
    wanted: list[Promise], spec: dict, on_unseen: Labelled, on_test: Labelled, source: str
) -> list[dict]:
    """What a file promises, for its spec. Raises Problem if it cannot promise all that is wanted.

    spec: of the file. on_unseen, on_test: what it computes for the images that thresholds are
    chosen on, and for the test split. source: of the first, in words.
    """
    thresholds = choose(wanted, spec, on_unseen, source)
    by_class = dict(thresholds.recalls)
    least = max(thresholds.least, spec["min_probability"] or 0.0)
    rule = Thresholds(thresholds.recalls, least)
    answers = statistics.final_answers(on_unseen, rule)
    test_answers = statistics.final_answers(on_test, rule)

    promises = []
    for promise in wanted:
        number = None
        threshold = thresholds.least
        if promise.kind == RECALL:
            number = spec["classes"].index(promise.name)
            threshold = by_class[number]

        promises.append(
            {
                "kind": promise.kind,
                "name": promise.name,
                "share": promise.share,
                "confidence": statistics.CONFIDENCE,
                "threshold": threshold,
                "images": len(on_unseen),
                "source": source,
                "chosen": statistics.check(promise, answers, on_unseen.labels, number),
                "test": statistics.check(promise, test_answers, on_test.labels, number),
            }
        )
    return promises


def outputs_of(exported: Model, images: np.ndarray, labels: np.ndarray) -> Labelled:
    """What a loaded file computes for images [n, H, W, channels] with labels [n]."""
    size = exported.batch or BATCH_SIZE
    parts = []
    for start in range(0, len(images), size):
        parts.append(Outputs(*exported.run(images[start : start + size])))
    return as_labelled(join(parts), labels, exported.spec)


def as_labelled(outputs: Outputs, labels: np.ndarray, spec: dict) -> Labelled:
    """Outputs with labels [n], as the programs compare them with thresholds."""
    return statistics.labelled(outputs.main, outputs.known, labels, spec["reject"])


# ------------------------------------------------------------------------------------- in the file
def rewrite(chosen: Format, source: Source, file: str, promises: list[dict]) -> None:
    """Give a file that was written from `source` a spec with promises. Raises Problem.

    Nothing that takes long is done again where the spec can be exchanged.
    """
    if file.endswith(".onnx"):
        rewrite_onnx(file, promises)
    elif file.endswith(SPEC_AT_END):
        rewrite_archive(chosen, file, promises)
    else:
        spec = describe.with_promises(source.spec, promises)
        chosen.export(replace(source, spec=spec), file)


def rewrite_onnx(file: str, promises: list[dict]) -> None:
    """The same for an ONNX file."""
    import onnx  # not at the top: step2's parser does not wait for it

    proto = onnx.load(file)
    properties = {entry.key: entry.value for entry in proto.metadata_props}
    spec = describe.with_promises(json.loads(properties["spec"]), promises)
    del proto.metadata_props[:]
    onnx.helper.set_model_props(proto, {**properties, "spec": json.dumps(spec)})
    write_file(file, proto.SerializeToString())


def rewrite_archive(chosen: Format, file: str, promises: list[dict]) -> None:
    """The same for a file with its spec in an archive at its end, and for the C array beside it."""
    spec = describe.with_promises(json.loads(read_spec_at_end(file)), promises)
    content = without_archive(Path(file).read_bytes())
    write_with_spec(file, content, spec, compressed=chosen.micro)
    if chosen.micro:
        micro.write_c_sources(file, content, micro_file.read_model(content), spec)


# --------------------------------------------------------------------------------------- warnings
def warnings_of(promises: list[dict]) -> list[str]:
    """In words: the promises that the test split does not bear out."""
    warnings = []
    for promise in promises:
        test = promise["test"]
        if test["share"] is None or test["share"] >= promise["share"]:
            continue
        is_chance = statistics.is_chance(test, promise["share"])
        explained = ", which chance explains" if is_chance else ""
        what = "of what is answered is right"
        if promise["kind"] == RECALL:
            what = f"of {promise['name']} is called so"
        warnings.append(
            f"promise {statistics.wanted(promise)}: on the test split {test['share']:.2%} {what} "
            f"({test['kept']:,} of {test['images']:,} images){explained}"
        )
    return warnings
