#!/usr/bin/env python3
"""Step 2 of 3: export a trained run to files that predict on their own, and prove that they do.

    python step2_export.py                                 # the newest run, as ONNX and as TorchScript
    python step2_export.py --run mnist-mlp --format onnx
    python step2_export.py --bundle --format onnx onnx-int8 torchscript     # all that an edge machine needs, in a zip

Writes exports/<name>/: model.onnx, model.pt, model.int8.onnx, model.pt2 as asked for, and parity.json with the figures
of the proof. Resizing, normalising and softmax are inside the graph; class names, provenance and golden samples are
inside the file, as its `spec`.

The parity gate runs each file with step3's own code against the trained network in eager fp32: over the whole test
split, on random, black and white images, at the native size and at others, and once more from a process that has
only step3_infer.py and the file. A file that does not agree is not left behind, and the exit code is 1. An int8 file
has a gate of its own: it may lose --max-drop points of accuracy, and must be faster here than float32.
Next: python step3_infer.py image.png
"""

import argparse
import base64
import contextlib
import functools
import hashlib
import io
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

import data
import model
import step3_infer
from deploy import bundle, int8, report
from step3_infer import Parser, Problem, guarded, say

SCHEMA = 1  # of checkpoints
RUNS, EXPORTS = "runs", "exports"
BATCHES = (1, 7, 64)
EXACT_TOLERANCE = 1e-4  # of a probability, where every engine sees the same pixels
RESIZED_TOLERANCE = 5e-3  # at least; where resizing may round one grey level differently in 1 % of the pixels
ACCURACY_TOLERANCE = 0.005  # between what step1 reported, perhaps from a GPU, and eager fp32 here
GOLDEN = 4
SAMPLES = 10  # images that a bundle shows
INT8_OPSET = 20  # the first with GELU as one operator; in pieces it is left in pieces between int8 layers
CALIBRATION, CHECK = 512, 2000  # training images to calibrate with, and others to choose the quantization by
# What step1's arguments must say for its test split to be loaded again.
NOTHING = {
    "max_abs_diff": None,
    "top1_agreement": None,
    "accuracy": None,
    "samples": 0,
}  # figures of what cannot run
LOADING = (
    "data_dir",
    "strict",
    "cache_dir",
    "image_root",
    "test_csv",
    "image_column",
    "label_column",
    "seed",
)
# opset: (the IR version it came with, the oldest onnxruntime seen to run the file; before 1.15 none was at hand)
OPSETS = {
    18: (8, "1.15"),
    19: (9, "1.16"),
    20: (9, "1.17"),
    21: (10, "1.18"),
    22: (10, "1.21"),
    23: (11, "1.23"),
}


@dataclass
class Run:
    """A trained run, read back from its checkpoint: the network in eval mode and fp32 on the CPU, and its spec."""

    path: str
    spec: dict
    network: torch.nn.Module

    @property
    def regression(self):
        return self.spec["task"] == "regression"

    def deployable(self):
        cls = model.Regressor if self.regression else model.Deployable
        return cls(self.network, self.spec["image_size"], self.spec["mean"], self.spec["std"]).eval()


# ----------------------------------------------------------------------------------------------------- checkpoint


def find_run(name):
    """The directory of a run: by its name or path, else the newest with a checkpoint. Raises Problem."""
    if name is None:
        runs = [entry.path for entry in os.scandir(RUNS) if entry.is_dir()] if os.path.isdir(RUNS) else []
        runs = [run for run in runs if os.path.isfile(os.path.join(run, "checkpoint.pt"))]
        if not runs:
            raise Problem("no trained run under runs/; python step1_train.py makes one", 2)
        return max(runs, key=lambda run: os.path.getmtime(os.path.join(run, "checkpoint.pt")))
    for run in (os.path.join(RUNS, name), name):
        if os.path.isfile(os.path.join(run, "checkpoint.pt")):
            return os.path.normpath(run)
    known = sorted(entry.name for entry in os.scandir(RUNS)) if os.path.isdir(RUNS) else []
    raise Problem(
        f"no run {name!r} with a checkpoint.pt under runs/; there is: {', '.join(known) or 'none'}", 2
    )


def read_run(path):
    """Rebuild the trained network from runs/<name>/checkpoint.pt. Raises Problem."""
    file = os.path.join(path, "checkpoint.pt")
    try:
        with open(file, "rb") as stream:
            content = stream.read()
        checkpoint = model.load_plain(io.BytesIO(content))
        schema, spec, state = checkpoint["schema"], checkpoint["spec"], checkpoint["state_dict"]
        if schema > SCHEMA:
            raise Problem(f"{file} has schema {schema}, this script knows up to {SCHEMA}: update Threestep")
        arguments = spec["arguments"]
        options = {name: arguments[name] for name in model.options_of(spec["model"])}
        options = {name: value for name, value in options.items() if value is not None}
        shape = {
            "channels": spec["channels"],
            "classes": len(spec["classes"]),
            "image_size": spec["image_size"],
        }
        network = model.build(spec["model"], **shape, **options)
        network.load_state_dict(state)
        run = Run(path, spec, network.eval())
        run.deployable()
        if (
            not {"dataset", "test_accuracy", "parameters", "versions"} <= spec.keys()
            or not set(LOADING) <= arguments.keys()
        ):
            raise ValueError("its spec lacks keys")
        if len(spec["mean"]) != spec["channels"] or len(spec["std"]) != spec["channels"]:
            raise ValueError("its mean or std do not fit its channels")
    except Problem:
        raise
    except Exception as error:  # torch.load fails in a dozen ways on a truncated or foreign file
        reason = str(error).split("\n")[0]
        raise Problem(f"{file} is truncated or not a Threestep checkpoint ({reason}); train again") from None
    spec["checkpoint_sha256"] = hashlib.sha256(content).hexdigest()
    if checkpoint.get("epoch", 0) < arguments["epochs"] and not os.path.exists(
        os.path.join(path, "summary.json")
    ):
        say(
            f"note: {path} stopped after epoch {checkpoint.get('epoch')} of {arguments['epochs']}: not its final result"
        )
    return run


# --------------------------------------------------------------------------------------------------------- export


def example_of(spec):
    """An input to trace with, of no size that the network knows."""
    if spec["task"] == "regression":
        return torch.zeros(2, spec["channels"])
    return torch.zeros(2, 24, 40, spec["channels"], dtype=torch.uint8)


def export_onnx(deployable, spec, path, opset):
    """Write one ONNX file, spec inside, by torch.export; batch, height and width are free.

    uint8 `image` [batch, height, width, channels] -> float32 `probabilities`, or for regression float32 `features`
    [batch, n] -> float32 `prediction`.
    """
    import onnx

    regression = spec["task"] == "regression"
    program = torch.onnx.export(
        deployable,
        (example_of(spec),),
        dynamo=True,
        opset_version=opset,
        input_names=["features" if regression else "image"],
        output_names=["prediction" if regression else "probabilities"],
        dynamic_shapes=({0: "batch"} if regression else {0: "batch", 1: "height", 2: "width"},),
        verbose=False,
    )
    graph = program.model_proto
    for node in graph.graph.node:
        del node.metadata_props[:]  # stack traces of this machine
    reorder_gelu(graph.graph)
    graph.ir_version = OPSETS[opset][0]  # the exporter's own IR version would shut out older onnxruntimes
    onnx.helper.set_model_props(graph, onnx_properties(spec, opset))
    onnx.checker.check_model(graph, full_check=True)
    store(path, graph.SerializeToString())


def onnx_properties(spec, opset):
    """What an ONNX file says of itself: the spec, and the class names once more for foreign readers."""
    spec = {**spec, "opset": opset, "onnxruntime_min": OPSETS[opset][1]}
    return {"spec": json.dumps(spec), "classes": json.dumps(spec["classes"])}


def reorder_gelu(graph):
    """Turn x * (0.5 * (1 + erf)), as the exporter writes GELU before opset 20, into (x * (1 + erf)) * 0.5.

    In this order onnxruntime computes it as one operator: a tenth less time for the default network.
    """
    makers = {output: node for node in graph.node for output in node.output}
    for node in graph.node:
        half = makers.get(node.input[1]) if node.op_type == "Mul" else None
        one_plus = makers.get(half.input[1]) if half is not None and half.op_type == "Mul" else None
        if one_plus is None or one_plus.op_type != "Add" or makers[one_plus.input[0]].op_type != "Erf":
            continue
        constant, x = half.input[0], node.input[0]
        half.input[0], node.input[0], node.input[1] = x, half.output[0], constant


def store(path, content):
    """Write bytes to a file. Raises Problem."""
    try:
        with open(path, "wb") as file:
            file.write(content)
    except OSError as error:
        raise Problem(f"cannot write {path}: {error.strerror}") from None


def export_torchscript(deployable, spec, path, opset):
    """Write a traced TorchScript file with the spec as its extra file spec.json."""
    with warnings.catch_warnings():  # deprecated in favour of torch.export, which LibTorch cannot read yet
        warnings.filterwarnings("ignore", r"`torch\.jit\.", FutureWarning)
        traced = torch.jit.trace(
            deployable, (example_of(spec),), check_trace=False
        )  # the parity gate checks far more
        content = io.BytesIO()  # torch.jit.save aborts the process on a full disk
        torch.jit.save(traced, content, _extra_files={"spec.json": json.dumps(spec)})
    store(path, content.getbuffer())


def export_pt2(deployable, spec, path, opset):
    """Write a torch.export file, batch, height and width free, with the spec as its extra file spec.json."""
    free = torch.export.Dim.DYNAMIC
    sizes = {0: free} if spec["task"] == "regression" else {0: free, 1: free, 2: free}
    program = torch.export.export(deployable, (example_of(spec),), dynamic_shapes=(sizes,))
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # paths of this machine
    content = io.BytesIO()
    torch.export.save(program, content, extra_files={"spec.json": json.dumps(spec)})
    store(path, content.getbuffer())


FORMATS = {
    "torchscript": ("model.pt", export_torchscript),
    "onnx": ("model.onnx", export_onnx),
    "onnx-int8": ("model.int8.onnx", None),  # made from an ONNX file: export_int8
    "pt2": ("model.pt2", export_pt2),
}


# ----------------------------------------------------------------------------------------------------------- int8


def export_int8(run, spec, path, args, dataset):
    """Write the network as int8 ONNX, by the first quantization that does well enough on training images.

    -> how it was made, for parity.json. The spec gets `quantization`, and golden samples with the int8 file's own
    answers: it is asked whether a machine computes what this one did. Raises Problem.
    """
    source, opset = f"{path}.float.onnx", max(args.opset, INT8_OPSET)
    export_onnx(run.deployable(), spec, source, opset)
    order = np.random.default_rng(0).permutation(len(dataset.train_images))
    calibration, check = (np.sort(part) for part in (order[:CALIBRATION], order[CALIBRATION:][:CHECK]))
    check = check if len(check) >= CALIBRATION else calibration
    try:
        k, chosen, tried = int8.choose(
            source,
            dataset.train_images[calibration],
            (dataset.train_images[check], dataset.train_labels[check]),
            lambda file: functools.partial(predictions, step3_infer.Model(file)),
            max_drop=args.max_drop / 2,  # images that it was trained on are easier than others
            any_speed=args.keep_slower,
        )
    except ValueError as error:
        raise Problem(f"this network cannot be quantized: {error}") from None
    how = {**tried[k], "tried": tried}
    outputs = predictions(step3_infer.Model(chosen), dataset.test_images)
    spec = {
        **spec,
        "quantization": f"int8, {how['quantization']}",
        "golden": golden_samples(dataset, outputs),
    }
    store(path, int8.finish(chosen, onnx_properties(spec, opset)))
    return how


def gate_int8(run, file, dataset, expected, how, args):
    """The int8 file's own gate. -> (figures for parity.json, failures in words).

    how: what export_int8 returned; expected: the reference's probabilities over the test split, [N, classes].
    """
    exported = step3_infer.Model(file)
    got = predictions(exported, dataset.test_images)
    figures, _ = compare(expected, got, 1.0)
    figures |= {**how, **accuracies(exported, got, expected, dataset)}
    figures["drop"] = round(100 * (figures["accuracy_trained"] - figures["accuracy"]), 3)
    failures = spec_failures(run, exported)
    if not figures["drop"] <= args.max_drop:
        failures.append(
            f"it loses {figures['drop']:.2f} points of accuracy, --max-drop allows {args.max_drop:g}"
        )
    if not int8.is_faster(figures):
        figures["warning"] = "it is not faster than float32 here"
        times = " and ".join(f"{times} times at batch {n}" for n, times in figures["speedup"].items())
        failures += [] if args.keep_slower else [f"{figures['warning']}: {times} (--keep-slower keeps it)"]
    for name, probe in probes(run.spec):
        if not np.allclose(predictions(exported, probe).sum(1), 1, atol=1e-3):
            failures.append(f"{name}: the probabilities do not add up to 1")
    figures["latency_ms"] = latency(exported, dataset.test_images[:1])
    figures["alone"], differ = alone(run, file, dataset.test_images[:16], got[:16], EXACT_TOLERANCE)
    return figures, failures + [f"alone: {failure}" for failure in differ]


# ---------------------------------------------------------------------------------------------------- parity gate


@torch.inference_mode()
def reference(run, inputs):
    """What training computed: the network in eager fp32 on uint8 [N, H, W, C] -> probabilities [N, classes].

    For regression: on float32 [N, n] -> predictions [N, 1]. Spelled out from the spec instead of calling Deployable,
    so that an error there is caught too.
    """
    spec, parts = run.spec, []
    mean, std = (torch.tensor(spec[key]) for key in ("mean", "std"))
    if run.regression:
        return run.network((torch.from_numpy(inputs) - mean) / std).numpy()
    mean, std = mean[:, None, None], std[:, None, None]
    for part in torch.from_numpy(inputs).split(64):
        pixels = model.resize(part, spec["image_size"]).permute(0, 3, 1, 2)
        parts.append(run.network((pixels / 255.0 - mean) / std).softmax(1))
    return torch.cat(parts).numpy()


def cut(inputs):
    """The inputs in batches of 1, 7, 64, 1, 7, 64, ... so that each file meets every one of these sizes."""
    start = 0
    for size in itertools.cycle(BATCHES):
        if start >= len(inputs):
            return
        yield inputs[start : start + size]
        start += size


def probes(spec, seed=0):
    """Inputs that no dataset holds, by name: random, black and white, at the native size and at others."""
    rng, (height, width), channels = np.random.default_rng(seed), spec["image_size"], spec["channels"]
    if spec["task"] == "regression":
        yield "random", rng.standard_normal((64, channels), dtype=np.float32)
        yield "zeros", np.zeros((1, channels), np.float32)
        yield "large", np.full((1, channels), 1e6, np.float32)
        return
    sizes = {
        "native": (height, width),
        "twice": (2 * height, 2 * width),
        "larger": (3 * height + 5, 2 * width + 9),
        "smaller": (height // 2 + 1, width // 2 + 1),
        "thin": (2 * height + 1, 1),
        "photo": (480, 641),
    }
    for name, (h, w) in sizes.items():
        shape = (4 if name == "photo" else 64, h, w, channels)
        yield f"random {name} {h}x{w}", rng.integers(0, 256, shape, dtype=np.uint8)
        yield f"black {name} {h}x{w}", np.zeros((1, h, w, channels), np.uint8)
        yield f"white {name} {h}x{w}", np.full((1, h, w, channels), 255, np.uint8)


def is_exact(inputs, spec):
    """Do all engines resize these images to the very same pixels? At whole factors they do; features have no size."""
    sizes = zip(inputs.shape[1:3], spec["image_size"], strict=True) if inputs.ndim == 4 else ()
    return all(a % b == 0 or b % a == 0 for a, b in sizes)


@torch.inference_mode()
def rounding_effect(run, inputs, draws=4):
    """How far the reference's outputs move, at most, when resizing rounds otherwise, tried at random.

    One grey level up or down in a hundredth of the pixels; in a whole row of an image; in a whole column: an image one
    pixel wide is resized to rows of equal pixels.
    """
    resized = torch.cat(
        [model.resize(part, run.spec["image_size"]) for part in torch.from_numpy(inputs).split(64)]
    )
    n, height, width, channels = resized.shape
    expected, generator, most = reference(run, resized.numpy()), torch.Generator().manual_seed(0), 0.0
    kinds = ((height, width), 0.01), ((height, 1), 1 / height), ((1, width), 1 / width)
    for size, share in draws * kinds:
        hit, up = (torch.rand(n, *size, channels, generator=generator) < x for x in (share, 0.5))
        disturbed = (resized + hit * (2 * up.int() - 1)).clamp(0, 255).to(torch.uint8)
        most = max(most, float(np.abs(reference(run, disturbed.numpy()) - expected).max()))
    return most


def compare_on(run, inputs, expected, got, tolerance):
    """`compare` with the tolerance that the inputs' size allows.

    Where engines may round differently in resizing, that is RESIZED_TOLERANCE, or twice what such rounding is seen to
    do to this network, as its few samples are not the worst.
    """
    if is_exact(inputs, run.spec):
        return compare(expected, got, tolerance)
    tolerance = max(tolerance, RESIZED_TOLERANCE)
    figures, failures = compare(expected, got, tolerance)
    if failures:
        figures, failures = compare(expected, got, max(tolerance, 2 * rounding_effect(run, inputs)))
    return figures, failures


def compare(expected, got, limit):
    """Figures of one comparison of outputs [N, classes], and the failures among them in words.

    Predictions of a regression above 1 are compared relative to their size.
    """
    difference = (np.abs(expected.astype(np.float64) - got) / np.maximum(1, np.abs(expected))).max(axis=1)
    finite = np.isfinite(difference)
    difference[~finite] = np.inf  # NaN agrees with nothing
    top, got_top = expected.argmax(1), got.argmax(1)
    rows = np.arange(len(expected))
    # An answer may change only where the reference itself holds the two classes to be equal, or nearly.
    changed = (top != got_top) & (expected[rows, top] - expected[rows, got_top] > limit / 5)
    figures = {
        "max_abs_diff": float(difference.max()) if finite.all() else None,
        "quantiles": {
            f"{q:g}": float(np.quantile(difference[finite], q)) for q in (0.5, 0.9, 0.99) if finite.any()
        },
        "top1_agreement": float((top == got_top).mean()),
        "samples": len(expected),
        "tolerance": limit,
    }
    failures = []
    if not difference.max() <= limit:
        failures.append(f"outputs differ by up to {difference.max():.1e} (limit {limit:.0e})")
    if changed.any():
        failures.append(f"{changed.sum()} of {len(expected)} answers changed")
    return figures, failures


def gate(run, file, dataset, expected, tolerance):
    """Prove one exported file against the trained network. -> (figures for parity.json, failures in words).

    expected: the reference's probabilities over the test split, [N, classes].
    """
    exported, spec, images = step3_infer.Model(file), run.spec, dataset.test_images
    failures, got = spec_failures(run, exported), predictions(exported, images)
    figures, differ = compare_on(run, images, expected, got, tolerance)
    failures += [f"test split: {failure}" for failure in differ]
    if run.regression:
        figures["accuracy"] = figures["top1_agreement"] = None
        figures["mean_squared_error"] = float(((got - dataset.test_labels) ** 2).mean())
    else:
        figures |= accuracies(exported, got, expected, dataset)
    figures["probes"] = {}
    for name, probe in probes(spec):
        got = predictions(exported, probe)
        figures["probes"][name], differ = compare_on(run, probe, reference(run, probe), got, tolerance)
        failures += [f"{name}: {failure}" for failure in differ]
    figures["latency_ms"] = latency(exported, dataset.test_images[:1])
    figures["alone"], differ = alone(run, file, dataset.test_images[:16], expected[:16], tolerance)
    return figures, failures + [f"alone: {failure}" for failure in differ]


def predictions(exported, inputs):
    """Outputs [N, classes] of a loaded file for inputs [N, ...], in batches of all sizes."""
    return np.concatenate([exported.predict(batch) for batch in cut(inputs)])


def spec_failures(run, exported):
    keys = "task", "classes", "channels", "image_size", "mean", "std", "checkpoint_sha256"
    wrong = [key for key in keys if exported.spec.get(key) != run.spec[key]]
    return [f"spec: the file's {key} are not the network's" for key in wrong]


def accuracies(exported, got, expected, dataset):
    """By name, as a user reads the answers: a wrong order of the class names costs accuracy here."""
    answers = np.array(exported.spec["classes"])[got.argmax(1)]
    return {
        "accuracy": float((answers == np.array(dataset.classes)[dataset.test_labels]).mean()),
        "accuracy_trained": float((expected.argmax(1) == dataset.test_labels).mean()),
    }


def latency(exported, image, repeats=30):
    """The median time in milliseconds that a file takes for one ready image, on all threads, on this machine."""
    ticks = [time.perf_counter()]
    for _ in range(repeats):
        exported.predict(image)
        ticks.append(time.perf_counter())
    return round(float(np.median(np.diff(ticks))) * 1000, 4)


def alone(run, file, inputs, expected, tolerance):
    """The second proof: predict in a process whose directory holds step3_infer.py and the file, nothing else."""
    spec = run.spec
    with tempfile.TemporaryDirectory() as place, tempfile.TemporaryDirectory() as pictures:
        shutil.copy(step3_infer.__file__, os.path.join(place, "step3_infer.py"))
        shutil.copy(file, place)
        command = [
            sys.executable,
            "-I",
            "step3_infer.py",
            "--model",
            os.path.basename(file),
            "--format",
            "json",
        ]
        if spec["task"] == "regression":
            command += ["--values=" + ",".join(map(str, row)) for row in inputs.tolist()]
        else:
            command += ["--top-k", str(len(spec["classes"])), pictures]
            for index, image in enumerate(inputs):
                store(os.path.join(pictures, f"{index:03}.png"), to_png(image))
        done = subprocess.run(command, cwd=place, capture_output=True, text=True, encoding="utf-8")
    if done.returncode != 0:
        return {"samples": 0}, [f"step3_infer.py failed: {done.stderr.strip()}"]
    got = np.zeros_like(expected)
    for row, line in zip(got, done.stdout.splitlines(), strict=True):
        result = json.loads(line)
        if spec["task"] == "regression":
            row[0] = result["prediction"]
        for entry in result.get("top", ()):
            row[spec["classes"].index(entry["label"])] = entry["probability"]
    return compare_on(run, inputs, expected, got, tolerance)


def to_png(image):
    """uint8 [H, W, C] -> the bytes of a PNG."""
    png = io.BytesIO()
    Image.fromarray(image.squeeze(-1) if image.shape[2] == 1 else image).save(png, "PNG")
    return png.getvalue()


def firsts(dataset, n):
    """Where the first test images of the first n classes are."""
    return [
        int(np.flatnonzero(dataset.test_labels == label)[0]) for label in np.unique(dataset.test_labels)[:n]
    ]


def golden_samples(dataset, expected):
    """A few test inputs, images of different classes as base64 PNG, with the reference's outputs for each."""
    if dataset.task == "regression":
        rows = zip(dataset.test_images[:GOLDEN].tolist(), expected[:GOLDEN].tolist(), strict=True)
        return [{"features": features, "prediction": prediction} for features, prediction in rows]
    samples = []
    for index in firsts(dataset, GOLDEN):
        encoded = base64.b64encode(to_png(np.asarray(dataset.test_images[index]))).decode()
        samples.append({"image": encoded, "probabilities": [round(float(p), 7) for p in expected[index]]})
    return samples


# ------------------------------------------------------------------------------------------------------------ CLI


def number(least, most):
    """An argparse type: a number between two others."""

    def parse(text):
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number from {least:g} to {most:g}")
        return value

    return parse


def build_parser():
    parser = Parser(
        description="Export a trained run and prove that the files agree with it; writes exports/<name>/.",
        epilog="example: python step2_export.py --run digits-airbench --format onnx",
    )
    add = parser.add_argument
    add("--run", metavar="NAME", help="a run under runs/, or its path (default: the newest)")
    formats = f"one or more of {', '.join(FORMATS)}"
    add(
        "--format",
        nargs="+",
        choices=FORMATS,
        default=["torchscript", "onnx"],
        metavar="FORMAT",
        help=formats,
    )
    add(
        "--bundle",
        action="store_true",
        help="put all that an edge machine needs in one folder and one zip archive",
    )
    add("--opset", type=int, choices=tuple(OPSETS), default=18, metavar="N", help="of ONNX, 18 to 23")
    add(
        "--tolerance",
        type=number(1e-9, 0.999),
        default=EXACT_TOLERANCE,
        metavar="X",
        help="largest probability difference allowed",
    )
    add(
        "--max-drop",
        type=number(0, 100),
        default=0.5,
        metavar="X",
        help="points of accuracy that int8 may lose",
    )
    add("--keep-slower", action="store_true", help="keep an int8 file that is not faster here than float32")
    add("--data-dir", metavar="DIR", help="where the test split lies (default: where step1 had it)")
    add("--out", metavar="DIR", help="default: exports/<name of the run>")
    return parser


def check_data(run, dataset, expected):
    """Is this the test split that the run reported on? Raises Problem where class names or accuracy say no."""
    if list(dataset.classes) != run.spec["classes"]:
        raise Problem(
            f"the classes of {run.path} are not those of its dataset: another dataset, or a changed checkpoint"
        )
    if run.spec["test_accuracy"] is None:  # a regression, or a run that --val-fraction left before its end
        return
    accuracy, reported = float((expected.argmax(1) == dataset.test_labels).mean()), run.spec["test_accuracy"]
    best, second = np.sort(expected, axis=1)[:, :-3:-1].T
    ties = float((best - second < 1e-3).mean())  # which another machine or batch size may decide otherwise
    if abs(accuracy - reported) > ACCURACY_TOLERANCE + ties:
        raise Problem(
            f"the network of {run.path} has {accuracy:.2%} on this test split, training reported {reported:.2%}: "
            f"another test split (--data-dir), or a changed checkpoint"
        )


def export(run, out, args, dataset):
    """Export, prove and publish each format, parity.json, and on request the bundle. -> the formats that failed."""
    expected = reference(run, dataset.test_images)
    check_data(run, dataset, expected)
    spec = {
        **run.spec,
        "versions": {**run.spec["versions"], "torch_export": str(torch.__version__)},
        "golden": golden_samples(dataset, expected),
    }
    report, formats = earlier_report(out, spec["checkpoint_sha256"]), list(dict.fromkeys(args.format))
    print(f"{'format':12} {'file':36} {'size':>8} {'max diff':>9} {'accuracy':>9}", flush=True)
    # Written and proven in a directory beside, so that `out` never holds an unproven file.
    with tempfile.TemporaryDirectory(dir=out, prefix=".export-") as place:
        for form in formats:
            unproven, final = (os.path.join(where, FORMATS[form][0]) for where in (place, out))
            figures, failures = make(form, run, spec, unproven, args, dataset, expected)
            report[form] = {**figures, "passed": not failures, "failures": failures}
            report[form]["checkpoint_sha256"] = spec["checkpoint_sha256"]
            if failures:
                remove(final)  # of an earlier export: it would be taken for this one
                say(f"error: {form} does not pass the gate, {final} is not written: {failures[0]}")
                for failure in failures[1:]:
                    say(f"  {failure}")
                continue
            shutil.copyfile(
                unproven, unproven + ".copy"
            )  # the bundle takes the other: `out` may be another's by then
            os.replace(unproven + ".copy", final)
            show(form, final, report[form])
        failed = [form for form in formats if not report[form]["passed"]]
        parity = os.path.join(place, "parity.json")
        store(parity, json.dumps(report, indent=2, allow_nan=False).encode())
        os.replace(parity, os.path.join(out, "parity.json"))
        if args.bundle and failed:
            bundle.remove(out)  # of an earlier export
            say("no bundle is made, as not every format passed")
        elif args.bundle:
            ship(place, out, {form: report[form] for form in formats}, args.opset, spec, dataset, expected)
    return failed


def make(form, run, spec, path, args, dataset, expected):
    """Write one format's file and prove it. -> (figures for parity.json, failures in words)."""
    if form == "onnx-int8":
        try:
            how = export_int8(run, spec, path, args, dataset)
            return gate_int8(run, path, dataset, expected, how, args)
        except Problem as problem:
            return {**NOTHING}, [str(problem)]
    FORMATS[form][1](run.deployable(), spec, path, args.opset)
    try:
        return gate(run, path, dataset, expected, args.tolerance)
    except Problem as problem:  # step3 cannot load or run it
        return {**NOTHING}, [str(problem)]


def show(form, path, figures):
    """A line of the table, and what is to be said of an int8 file."""
    accuracy = "-" if figures["accuracy"] is None else f"{figures['accuracy']:.2%}"
    size, difference = f"{os.path.getsize(path) / 1e6:5.2f} MB", figures["max_abs_diff"]
    print(f"{form:12} {path:36} {size} {difference:9.1e} {accuracy:>9}", flush=True)
    if form == "onnx-int8":
        times = " and ".join(f"{times:.1f} times at batch {n}" for n, times in figures["speedup"].items())
        print(f"{'':12} {figures['quantization']}: {times} as fast as float32 here", flush=True)
        if "warning" in figures:
            say(f"warning: {path} is kept although {figures['warning']}")


def ship(place, out, parity, opset, spec, dataset, expected):
    """Make the bundle of the proven files in `place`, its samples from the test split. Raises Problem."""
    if dataset.task == "regression":
        rows = zip(dataset.test_images[:SAMPLES].tolist(), expected[:SAMPLES, 0].tolist(), strict=True)
        samples = [(None, {"values": values, "prediction": prediction}) for values, prediction in rows]
    else:
        spec = {
            **spec,
            "per_class": report.per_class(dataset.test_labels, expected.argmax(1), spec["classes"]),
        }
        samples = []
        for index in firsts(dataset, SAMPLES):
            ranked = sorted(
                zip(spec["classes"], expected[index].tolist(), strict=True), key=lambda pair: -pair[1]
            )[:3]
            top = [{"label": label, "probability": round(probability, 6)} for label, probability in ranked]
            samples.append((to_png(np.asarray(dataset.test_images[index])), {**top[0], "top": top}))
    models = [os.path.join(place, FORMATS[form][0]) for form in parity]
    newest = max(opset, INT8_OPSET) if "onnx-int8" in parity else opset
    facts = {
        "script": step3_infer.__file__,
        "onnxruntime": OPSETS[newest][1],
        "spec": spec,
        "samples": samples,
    }
    try:
        archive = bundle.publish(out, place, models, parity, **facts)
    except OSError as error:
        raise Problem(f"cannot write the bundle in {out}: {error.strerror or error}") from None
    print(f"{'bundle':12} {archive:36} {os.path.getsize(archive) / 1e6:5.2f} MB", flush=True)


def earlier_report(out, checkpoint_sha256):
    """What parity.json says of files of the same checkpoint; files of another one are removed."""
    try:
        with open(os.path.join(out, "parity.json")) as stream:
            report = {k: v for k, v in json.load(stream).items() if k in FORMATS and isinstance(v, dict)}
    except (FileNotFoundError, ValueError, AttributeError):
        report = {}
    kept = {
        form: figures
        for form, figures in report.items()
        if figures.get("checkpoint_sha256") == checkpoint_sha256
    }
    for form in report.keys() - kept.keys():
        remove(os.path.join(out, FORMATS[form][0]))
    return kept


def remove(path):
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def run_export(args):
    """The work of main: returns the exit code, raises Problem."""
    if args.bundle and "onnx" not in args.format:
        raise Problem(
            "--bundle needs onnx among the formats: it is what runs without torch, and in the browser", 2
        )
    path = find_run(args.run)
    if args.run is None:
        say(f"run: {path}")
    run = read_run(path)
    if run.regression and "onnx-int8" in args.format:
        raise Problem(f"onnx-int8 is for classification, {path} is a regression: leave it out of --format", 2)
    arguments = run.spec["arguments"]
    dataset = data.load(
        run.spec["dataset"],
        args.data_dir or arguments["data_dir"],
        image_size=None if run.regression else tuple(run.spec["image_size"]),
        channels=run.spec["channels"],
        resize=model.resize,
        **{name: arguments[name] for name in LOADING[1:]},
    )
    out = args.out or os.path.join(EXPORTS, os.path.basename(path))
    try:
        os.makedirs(out, exist_ok=True)
        failed = export(run, out, args, dataset)
    except OSError as error:
        if error.filename is None:  # standard output
            raise
        raise Problem(f"cannot write {out}: {error.strerror or error}") from None
    try:
        report.write_report(path, os.path.dirname(path) or ".", EXPORTS, out)
    except OSError as error:
        say(f"note: {path}/report.html is as it was before the export: {error.strerror or error}")
    return 1 if failed else 0


def main(argv=None):
    return guarded(run_export, build_parser().parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
