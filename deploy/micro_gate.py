"""The proof of a file for microcontrollers: run in their own runtime, with the C array beside it.

Where tflite-micro has no wheel, LiteRT's reference kernels compute in its place, which the figures
say. They have agreed with it to 1e-5, and cannot measure the working memory.
"""

import importlib.util
import os
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from deploy import exporters, gate, micro_file, micro_runtime
from deploy.comparing import Outputs, compare_outputs, take
from deploy.micro import HEADER, SOURCE
from deploy.reference import TrainedRun, reference, seen_by_file
from deploy.trust import check_drop, classifier_figures, right_answers
from inference.engines import read_spec_at_end
from inference.errors import Problem, problems
from inference.images import fit_to_input
from inference.spec import read_spec

MOST_IMAGES = 2000  # of the test split: an image takes up to 60 ms
BOTH_IMAGES = 32  # that both interpreters run
PROBES = 4  # random images of a size
SAME = 1e-4  # the least tolerance between the interpreters, whose float32 softmax may differ


def prove_micro(
    trained: TrainedRun, file: str, dataset, expected: Outputs, max_drop: float | None
) -> tuple[dict, list[str]]:
    """Figures for parity.json, and failures in words; see gate.prove_int8. Raises Problem."""
    part = spread(dataset, MOST_IMAGES)
    expected = take(expected, part.indices)
    figures, failures = prove_file(trained, file, part, expected, max_drop)

    # The isolated process must give what the reference kernels give.
    got = Outputs(figures.pop("outputs"), None)
    figures["isolated"], found = gate.prove_isolated(
        trained.spec, file, part.test_images, got, max(SAME, figures["step"])
    )
    return figures, failures + found


def spread(dataset, most: int) -> SimpleNamespace:
    """At most so many test images, spread over the split, with their `indices` in it."""
    step = -(-len(dataset.test_labels) // most)
    indices = np.arange(0, len(dataset.test_labels), step)
    return SimpleNamespace(
        test_images=dataset.test_images[indices],
        test_labels=dataset.test_labels[indices],
        classes=dataset.classes,
        indices=indices,
    )


def prove_file(
    trained: TrainedRun, file: str, dataset, expected: Outputs, max_drop: float | None
) -> tuple[dict, list[str]]:
    """What prove_micro() proves in this process; the figures hold the `outputs` [n, classes], too.

    expected: the network's outputs on the images of `dataset`.
    """
    with problems(f"{file} is cut off, or not a file of step2_export.py"):
        spec = read_spec(read_spec_at_end(file), file)
    content = exporters.without_archive(Path(file).read_bytes())
    found = micro_file.read_model(content)
    unusable = micro_file.check_model(found, spec)
    if unusable:
        raise Problem("; ".join(unusable))
    failures = gate.check_spec(trained.spec, spec)
    failures += check_c_sources(os.path.dirname(file), content, found, spec)

    # The file sees rounded pixels of the network's size; the network is given the same.
    given = seen_by_file(trained, spec, dataset.test_images)
    if given is not dataset.test_images:
        expected = reference(trained, given)

    run, measured = load(content)
    got = Outputs(run(given), None)
    figures, _ = compare_outputs(expected, got, tolerance=1.0)
    figures["mean_abs_diff"] = float(np.abs(got.main - expected.main).mean())
    figures |= classifier_figures(trained.spec, spec, got, expected, dataset)

    before = right_answers(trained.spec, expected, dataset)
    after = right_answers(spec, got, dataset)
    figures["drop"], found_failures, warnings = check_drop(before, after, max_drop)
    failures += found_failures
    figures["warnings"] += warnings
    if found.in_float:
        left = [name for name in found.in_float if name != "SOFTMAX"]
        if left:
            figures["warnings"].append(f"{', '.join(left)} compute in float32, not in int8")

    failures += check_probes(run, spec)
    step = found.logit_step or 0.0
    both, more = compare_interpreters(content, given[:BOTH_IMAGES], got.main, step)
    failures += more

    arena = measured()
    failures += check_arena(spec, arena)
    figures |= {
        "runtime": micro_runtime.runtime_name(),
        "arena": arena,
        "model_bytes": len(content),
        "operators": list(found.operators),
        "first_release": micro_file.first_release(found),
        "both_interpreters": both,
        "step": step / 2,
        "outputs": got.main,
    }
    return figures, failures


def load(content: bytes):
    """A runner, and a function that gives the bytes of the arena, or None where nobody knows."""
    if micro_runtime.has_micro():
        return micro_runtime.load_micro(content)
    return micro_runtime.load_reference(content), lambda: None


def check_probes(run, spec: dict) -> list[str]:
    """Random, black and white images of any size, as step3 fits them: is a softmax a softmax?"""
    failures = []
    for name, inputs in gate.probes(spec):
        sums = run(fit_to_input(inputs[:PROBES], spec)).sum(1)
        if not np.allclose(sums, 1, atol=gate.SUM_TOLERANCE):
            failures.append(f"{name}: the probabilities do not add up to 1")
    return failures


def compare_interpreters(
    content: bytes, images: np.ndarray, got: np.ndarray, step: float
) -> tuple[dict | None, list[str]]:
    """Do LiteRT's reference kernels give what the micro runtime gave, within one step of a logit?

    step: the scale of the logits. If a logit moves up by it and another down, a probability moves
    by at most half of it. None, if only one of the two is installed.
    """
    if not micro_runtime.has_micro() or importlib.util.find_spec("ai_edge_litert") is None:
        return None, []

    other = micro_runtime.load_reference(content)(images)
    difference = float(np.abs(other.astype(np.float64) - got[: len(images)]).max())
    figures = {"max_abs_diff": difference, "samples": len(images)}
    if difference <= max(SAME, step / 2):
        return figures, []
    return figures, [f"LiteRT's reference kernels differ by {difference:.1e}, more than one step"]


def check_arena(spec: dict, arena: int | None) -> list[str]:
    promised = (spec.get("micro") or {}).get("arena")
    if arena is None or promised == arena:
        return []
    return [f"spec: it promises an arena of {promised:,} bytes, and takes {arena:,}"]


def check_c_sources(
    folder: str, content: bytes, found: micro_file.MicroFile, spec: dict
) -> list[str]:
    """Is the C array the model, and does its header say what is true of it?"""
    failures = []
    for name, wanted in micro_file.c_sources(content, found, spec).items():
        try:
            text = Path(folder, name).read_bytes()
        except OSError as error:
            raise Problem(f"{name} is missing: {error.strerror}") from None
        if text != wanted:
            failures.append(f"{name} does not hold the model")

    # And by another way than it was written.
    array = Path(folder, SOURCE).read_text(encoding="utf-8").split("model_data[] = {")[-1]
    if bytes(int(byte, 16) for byte in re.findall(r"0x([0-9a-f]{2}),", array)) != content:
        failures.append(f"{SOURCE} holds other bytes than the file")
    return failures


__all__ = ["HEADER", "SOURCE", "prove_file", "prove_micro"]
