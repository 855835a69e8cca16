"""The gate between an export and its users: a file passes if it predicts what the trained network predicts.

The reference is the trained network in eager float32, spelled out from the spec. Each file is run by the code
of step3_infer.py, in batches of 1, 7 and 64. A tolerance limits the largest difference of any output; where a
regression predicts more than 1, the relative difference. "What is proven" in README.md lists all tolerances,
with reasons. The spec inside the file must be the network's, too; speed and trust are measured only.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

import model
from deploy import archive
from deploy.comparing import Outputs, compare, latency, predictions, some, test_figures
from deploy.samples import to_png
from inference.errors import Problem, problems
from inference.images import fit_to_input, resize
from inference.predict import Model

RESIZE_TOLERANCE = 1e-3  # grey levels
KNOWN_TOLERANCE, INT8_KNOWN_TOLERANCE = 5e-3, 5e-2
ACCURACY_TOLERANCE = 0.005
SELF_TEST_TOLERANCE, INT8_SELF_TEST_TOLERANCE = 1e-4, 2e-2
ISOLATED_SAMPLES = 16
SPEC_KEYS = ("task", "classes", "channels", "image_size", "mean", "std", "temperature", "checkpoint_sha256")
# The figures of a file that cannot be run.
NO_FIGURES = {"max_abs_diff": None, "top1_agreement": None, "accuracy": None, "samples": 0}


# ---------------------------------------------------------------------------------------- the trained network
@dataclass
class Run:
    """A trained run, read back from its checkpoint: its spec, and the network in eval mode on the CPU."""

    path: str
    spec: dict
    network: torch.nn.Module
    familiarity: dict | None = None  # the tensors of model.Familiarity
    fingerprint: dict | None = None  # of the data it was trained with, see data.dataset.differences
    threads: int | None = None  # that files are run with

    @property
    def regression(self) -> bool:
        return self.spec["task"] == "regression"

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Of what the network itself takes, without the batch."""
        return (self.spec["channels"], *(() if self.regression else self.spec["image_size"]))

    def deployable(self, any_size: bool = True) -> model.Deployable:
        cls, spec = model.Regressor if self.regression else model.Deployable, self.spec
        more = {"fit": spec.get("fit") or "stretch", "temperature": spec.get("temperature") or 1.0}
        if self.familiarity:
            more["familiarity"] = model.Familiarity(self.familiarity, spec["known"]["layers"])
        made = cls(self.network, spec["image_size"], spec["mean"], spec["std"], **more).eval()
        made.any_size = any_size
        return made

    def without_calibration(self) -> "Run":
        """The same run as if --calibration none had been given."""
        none = dict.fromkeys(("temperature", "calibration", "known"))
        return replace(self, spec={**self.spec, **none}, familiarity=None)


def rebuild(path: str, spec: dict, state_dict: dict, familiarity: dict | None = None) -> Run:
    """The network of a checkpoint. Any exception means that the checkpoint is damaged or not one of ours."""
    channels, options = spec["channels"], {k: spec["arguments"][k] for k in model.options_of(spec["model"])}
    shape = {"channels": channels, "classes": len(spec["classes"]), "image_size": spec["image_size"]}
    network = model.build(spec["model"], **shape, **options)
    network.load_state_dict(state_dict)
    run = Run(path, spec, network.eval(), familiarity)
    run.deployable()
    if not {"dataset", "test_accuracy", "parameters", "versions"} <= spec.keys():
        raise ValueError("its spec lacks keys")
    if len(spec["mean"]) != channels or len(spec["std"]) != channels:
        raise ValueError("its mean or std do not fit its channels")
    return run


@torch.inference_mode()
def reference(run: Run, inputs: np.ndarray) -> Outputs:
    """What training computed: the network in eager fp32 on uint8 [N, H, W, C], calibrated.

    For regression: on float32 [N, n]. Spelled out instead of calling Deployable, to catch errors there, too.
    """
    spec, parts = run.spec, []
    mean, std = (torch.tensor(spec[key]) for key in ("mean", "std"))
    if run.regression:
        return Outputs(run.network((torch.from_numpy(inputs) - mean) / std).numpy(), None)
    mean, std = mean[:, None, None], std[:, None, None]
    for part in torch.from_numpy(inputs).split(64):
        pixels = model.resize(part, spec["image_size"], spec.get("fit") or "stretch")
        pixels = (pixels.permute(0, 3, 1, 2) / 255.0 - mean) / std  # [batch, channels, H, W]
        if run.familiarity is None:
            parts.append((run.network(pixels), torch.empty(0)))
        else:
            parts.append(model.run_with_statistics(run.network, pixels, tuple(spec["known"]["layers"])))
    logits, statistics = (torch.cat(column) for column in zip(*parts, strict=True))
    probabilities = (logits / (spec.get("temperature") or 1)).softmax(1).numpy()
    return Outputs(probabilities, run.familiarity and share_below(run.familiarity, statistics, logits))


def share_below(familiarity: dict, statistics: torch.Tensor, logits: torch.Tensor) -> np.ndarray:
    """`known` [N]: the place of each image's score in the sorted table; see model.Familiarity."""
    state = {name: tensor.double().numpy() for name, tensor in familiarity.items()}
    squared = ((statistics.double().numpy() @ state["weight"] + state["bias"]) ** 2).sum(1)
    factor, offset, limit = state["logit"]
    score = np.minimum(logits.amax(1).double().numpy() * factor + offset, limit) - np.log(squared)
    return (np.searchsorted(state["table"], score) / len(state["table"])).astype(np.float32)


def resized_outside(run: Run, spec: dict, inputs: np.ndarray) -> np.ndarray:
    """What step3 gives a file of this spec for inputs [N, ...]. Raises Problem if it resizes otherwise."""
    if not spec.get("fixed") or inputs.shape[1:3] == tuple(run.spec["image_size"]):
        return inputs
    sizes = run.spec["image_size"], run.spec.get("fit") or "stretch"
    for part in np.array_split(inputs, -(-len(inputs) // 64)):
        wanted = model.resize(torch.from_numpy(part), *sizes).numpy()
        resized = np.stack([resize(image, *sizes) for image in part])
        difference = np.abs(resized - wanted).max()
        if not difference <= RESIZE_TOLERANCE:
            raise Problem(f"step3_infer.py resizes otherwise, by {difference:.1e} grey levels")
    return fit_to_input(inputs, spec)


def check_reference(run: Run, dataset, expected: np.ndarray) -> None:
    """Is this the test split that the run reported on? Raises Problem if class names or accuracy say no."""
    if list(dataset.classes) != run.spec["classes"]:
        changed = "another dataset, or a changed checkpoint"
        raise Problem(f"the classes of {run.path} are not those of its dataset: {changed}")
    reported = run.spec["test_accuracy"]
    if reported is None:  # a regression, or a run that --val-fraction left before its end
        return
    accuracy = (expected.argmax(1) == dataset.test_labels).mean()
    second, first = np.sort(expected, axis=1)[:, -2:].T
    ties = (first - second < 1e-3).mean()  # which another machine or batch size may decide otherwise
    if abs(accuracy - reported) > ACCURACY_TOLERANCE + ties:
        found = f"the network of {run.path} has {accuracy:.2%} on this test split"
        changed = "another test split (--data-dir), or a changed checkpoint"
        raise Problem(f"{found}, training reported {reported:.2%}: {changed}")


def probes(spec: dict) -> Iterator[tuple[str, np.ndarray]]:
    """Inputs that no dataset holds, by name: random, black and white, at the network's size and at others."""
    rng, (H, W), channels = np.random.default_rng(0), spec["image_size"], spec["channels"]
    if spec["task"] == "regression":
        yield "random", rng.standard_normal((64, channels), dtype=np.float32)
        yield "zeros", np.zeros((1, channels), np.float32)
        yield "large", np.full((1, channels), 1e6, np.float32)
        return
    sizes = {"native": (H, W), "twice": (2 * H, 2 * W), "larger": (3 * H + 5, 2 * W + 9)}
    sizes |= {"smaller": (H // 2 + 1, W // 2 + 1), "thin": (2 * H + 1, 1), "photo": (480, 641)}
    for name, (h, w) in sizes.items():
        shape = (4 if name == "photo" else 64, h, w, channels)
        yield f"random {name} {h}x{w}", rng.integers(0, 256, shape, dtype=np.uint8)
        for colour, level in (("black", 0), ("white", 255)):
            yield f"{colour} {name} {h}x{w}", np.full((1, h, w, channels), level, np.uint8)


# ------------------------------------------------------------------------------------------------- the proofs
def prove(run: Run, file: str, dataset, expected: Outputs, tolerance: float) -> tuple[dict, list[str]]:
    """Compare a file with the trained network; returns figures for parity.json, and failures in words.

    expected: outputs of the reference on the test split. Raises Problem if step3 cannot run it.
    """
    exported, images = Model(file, run.threads), dataset.test_images
    got, given = predictions(exported, images), resized_outside(run, exported.spec, images)
    expected = expected if given is images else reference(run, given)
    figures, failures = compare(expected, got, tolerance, KNOWN_TOLERANCE)
    failures = [f"test split: {failure}" for failure in failures]
    if run.regression:
        figures["accuracy"] = figures["top1_agreement"] = None
        figures["mean_squared_error"] = float(((got.main - dataset.test_labels) ** 2).mean())
    else:
        more, found = test_figures(run.spec, exported, got, expected, dataset)
        figures, failures = figures | more, failures + found
    figures["probes"] = {}
    for name, probe in probes(run.spec):
        wanted = reference(run, resized_outside(run, exported.spec, probe))
        got = predictions(exported, probe)
        figures["probes"][name], found = compare(wanted, got, tolerance, KNOWN_TOLERANCE)
        failures += [f"{name}: {failure}" for failure in found]
    return prove_rest(run, file, exported, images, expected, tolerance, figures, failures)


def prove_int8(run: Run, file: str, dataset, expected: Outputs, max_drop: float) -> tuple[dict, list[str]]:
    """The same for an int8 file, which may lose `max_drop` points of accuracy instead."""
    exported, images = Model(file, run.threads), dataset.test_images
    got = predictions(exported, images)
    figures, _ = compare(expected, got, 1.0)
    more, failures = test_figures(run.spec, exported, got, expected, dataset)
    figures |= more
    drop = figures["drop"] = round(100 * (figures["accuracy_trained"] - figures["accuracy"]), 3)
    if not drop <= max_drop:
        failures.insert(0, f"it loses {drop:.2f} points of accuracy, --max-drop allows {max_drop:g}")
    for name, probe in probes(run.spec):
        if not np.allclose(predictions(exported, probe).main.sum(1), 1, atol=1e-3):
            failures.append(f"{name}: the probabilities do not add up to 1")
    return prove_rest(run, file, exported, images, got, SELF_TEST_TOLERANCE, figures, failures)


def prove_rest(run: Run, file, exported: Model, inputs, expected: Outputs, tolerance, figures, failures):
    """Add to figures and failures what is alike for all files: spec, latency, and the isolated process."""
    wrong = [key for key in SPEC_KEYS if exported.spec.get(key) != run.spec.get(key)]
    failures = [f"spec: the file's {key} are not the network's" for key in wrong] + failures
    figures |= latency(exported, inputs[:1])
    figures["isolated"], found = prove_isolated(run, file, inputs, expected, tolerance)
    return figures, failures + [f"isolated: {failure}" for failure in found]


def prove_isolated(run: Run, file: str, inputs: np.ndarray, expected: Outputs, tolerance: float):
    """Compare the first inputs again, predicted by a process that has only step3_infer.pyz and the file."""
    try:
        got = predict_isolated(run.spec, file, inputs[:ISOLATED_SAMPLES])
    except Problem as problem:
        return {"samples": 0}, [str(problem)]
    return compare(some(expected, slice(ISOLATED_SAMPLES)), got, tolerance, KNOWN_TOLERANCE)


def predict_isolated(spec: dict, file: str, inputs: np.ndarray) -> Outputs:
    """Outputs for inputs [N, ...], images as PNG files, from an otherwise empty directory. Raises Problem."""
    place, regression = tempfile.TemporaryDirectory, spec["task"] == "regression"
    command = [sys.executable, "-I", archive.NAME, "--format", "json", "--model", os.path.basename(file)]
    with problems("no temporary directory to run it in", OSError), place() as folder, place() as pictures:
        archive.write_program(folder)
        shutil.copy(file, folder)
        if regression:
            command += ["--values=" + ",".join(map(str, row)) for row in inputs.tolist()]
        else:
            command += ["--top-k", str(len(spec["classes"])), pictures]
            for index, image in enumerate(inputs):
                Path(pictures, f"{index:03}.png").write_bytes(to_png(image))
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, encoding="utf-8")
    if done.returncode != 0:
        raise Problem(f"{archive.NAME} failed: {done.stderr.strip()}")
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    if regression:
        return Outputs(np.array([[row["prediction"]] for row in rows], np.float32), None)
    probabilities = [{entry["label"]: entry["probability"] for entry in row["top"]} for row in rows]
    main = [[each.get(name, np.nan) for name in spec["classes"]] for each in probabilities]
    known = None if rows[0]["known"] is None else np.array([row["known"] for row in rows], np.float32)
    return Outputs(np.array(main, np.float32), known)
