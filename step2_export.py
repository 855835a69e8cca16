#!/usr/bin/env python3
"""Step 2 of 3: export a trained run to files that predict on their own, and prove that they do.

    python step2_export.py                                 # the newest run, as ONNX and as TorchScript
    python step2_export.py --run mnist-mlp --format onnx
    python step2_export.py --bundle --format onnx onnx-int8     # all that an edge machine needs, in a zip

Writes exports/<name>/: a file for each format, and parity.json with the figures of the proof. Resizing,
normalising and softmax are inside the graph; class names, provenance and golden samples in the file's `spec`.

Each file is run with step3's own code and compared with the trained network, by the rules of deploy/gate.py.
A file that does not agree is not published, and the exit code is 1. int8 may lose some accuracy: --max-drop.
Next: python step3_infer.py image.png
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports ends without a traceback

import argparse
import hashlib
import io
import json
import os
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from deploy import onnx_file
from inference.command_line import Parser, number, say
from inference.errors import Problem, guarded, problems
from inference.files import replacing
from inference.predict import Model

FORMAT_NAMES = ("torchscript", "onnx", "onnx-int8", "pt2", "executorch", "litert")  # of FORMATS, below
COMPILED = ("executorch", "litert")  # always of a fixed size
# option: (its default, the formats that it belongs to)
FORMAT_OPTIONS = {
    "opset": (18, ("onnx", "onnx-int8")),
    "tolerance": (1e-4, ("torchscript", "onnx", "pt2", *COMPILED)),
    "max_drop": (0.5, ("onnx-int8",)),
    "fixed": (None, ("torchscript", "onnx", "onnx-int8", *COMPILED)),
    "input": ("uint8", ("torchscript", "onnx", "onnx-int8", *COMPILED)),
}


# ------------------------------------------------------------------------------------------- the command line
def build_parser() -> Parser:
    parser = Parser(
        description="Export a trained run and prove that the files agree with it; writes exports/<name>/.",
        epilog="example: python step2_export.py --run digits-airbench --format onnx",
    )
    opset, tolerance, drop = (f"(default: {default:g})" for default, _ in [*FORMAT_OPTIONS.values()][:3])
    add, names = parser.add_argument, f"one or more of {', '.join(FORMAT_NAMES)} (default: torchscript onnx)"
    add("--run", metavar="NAME", help="a run under runs/, or its path (default: the newest)")
    add("--format", nargs="+", choices=FORMAT_NAMES, metavar="FORMAT", help=names)
    text = "also files of the network's own size, for compilers: of N images, or any number"
    add("--fixed", nargs="?", const=0, type=number(int, 1, 1024), metavar="N", help=text)
    text = "pixels that files of a fixed size take, for compilers without uint8 (default: uint8)"
    add("--input", choices=("uint8", "float"), metavar="TYPE", help=text)
    add("--bundle", action="store_true", help="put all that an edge machine needs in one folder and one zip")
    add("--opset", type=int, choices=tuple(onnx_file.OPSETS), metavar="N", help=f"of ONNX, 18 to 23 {opset}")
    limit = f"largest probability difference allowed {tolerance}"
    add("--tolerance", type=number(float, 1e-9, 0.999), metavar="X", help=limit)
    points = f"points of accuracy that int8 may lose {drop}"
    add("--max-drop", type=number(float, 0, 100), metavar="X", help=points)
    share = number(float, 0, 1)
    text = "keep this share of familiar images by default, such as 0.99, and call others unknown"
    add("--reject", type=share, metavar="X", help=text)
    add("--min-probability", type=share, metavar="P", help="call answers of less unsure, by default")
    add("--uncalibrated", action="store_true", help="export without temperature and without known")
    add("--threads", type=number(int, 1, 1024), metavar="N", help="CPU threads (default: all that are free)")
    add("--data-dir", metavar="DIR", help="where the test split is (default: where step1 had it)")
    add("--out", metavar="DIR", help="default: exports/<name of the run>")
    return parser


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The arguments with their defaults; exits if one has no effect on the requested formats."""
    parser = build_parser()
    args = parser.parse_args(argv)
    args.format = args.format or ["torchscript", "onnx"]
    if args.bundle and "onnx" not in args.format:
        parser.error("--bundle needs --format onnx, which runs without torch, and in the browser")
    for name, (default, formats) in FORMAT_OPTIONS.items():
        if getattr(args, name) is None:
            setattr(args, name, default)
        elif not set(formats) & set(args.format):
            parser.error(f"--{name.replace('_', '-')} belongs to --format {' or '.join(formats)}")
    if args.input != "uint8" and args.fixed is None and not set(COMPILED) & set(args.format):
        parser.error("--input belongs to --fixed")
    return args


if __name__ == "__main__":
    parse()  # --help and wrong options do not wait for the imports that follow, which take seconds

import torch  # noqa: E402

import data  # noqa: E402
import model  # noqa: E402
from data.notes import silenced  # noqa: E402
from deploy import bundle, device, fixed, gate, int8  # noqa: E402
from deploy.comparing import predictions, some  # noqa: E402
from deploy.fixed import example_of, free_sizes  # noqa: E402
from deploy.gate import Run  # noqa: E402
from deploy.samples import GOLDEN_SAMPLES, golden_samples, one_of_each_class  # noqa: E402
from inference.metrics import per_class  # noqa: E402
from report import card, page  # noqa: E402
from report.text import device_needs  # noqa: E402
from training import cpu, runs  # noqa: E402

# -------------------------------------------------------------------------------------------------- exporters
# Each writes one file with the spec inside, and may return what parity.json should say of how it was made.


def export_torchscript(deployable: model.Deployable, spec: dict, path: str, opset: int, **unused) -> None:
    """Write a traced TorchScript file with the spec as its extra file spec.json."""
    with warnings.catch_warnings():  # deprecated in favour of torch.export, which LibTorch cannot read yet
        warnings.filterwarnings("ignore", r"`torch\.jit\.", FutureWarning)
        traced = torch.jit.trace(deployable, (example_of(spec),), check_trace=False)  # the gate checks more
        content = io.BytesIO()  # torch.jit.save aborts the process on a full disk
        torch.jit.save(traced, content, _extra_files={"spec.json": json.dumps(spec)})
    write_file(path, content.getbuffer())


def export_onnx(deployable: model.Deployable, spec: dict, path: str, opset: int, **unused) -> None:
    """Write an ONNX file by torch.export; batch, height and width are free.

    uint8 `image` [batch, height, width, channels] to float32 `probabilities` [batch, classes], or for a
    regression float32 `features` [batch, n] to float32 `prediction` [batch, 1].
    """
    regression = spec["task"] == "regression"
    program = torch.onnx.export(
        deployable,
        (example_of(spec),),
        dynamo=True,
        opset_version=opset,
        input_names=["features" if regression else "image"],
        output_names=["prediction"] if regression else ["probabilities", "known"][: 1 + bool(spec["known"])],
        dynamic_shapes=(dict(enumerate(free_sizes(spec))),),
        verbose=False,
    )
    write_file(path, onnx_file.finish(program.model_proto, spec, opset))


def export_int8(
    deployable: model.Deployable, spec: dict, path: str, opset: int, *, dataset, max_drop: float, threads
) -> dict:
    """Write an int8 ONNX file, calibrated on training images, with its own golden samples. Raises Problem."""
    opset, unquantized = max(opset, int8.OPSET), f"{path}.float.onnx"
    export_onnx(deployable, spec, unquantized, opset)
    images, labels = dataset.train_images, dataset.train_labels
    with problems("this network cannot be quantized", ValueError):
        quantized, figures = int8.choose(unquantized, images, labels, max_drop, threads)
    images = dataset.test_images[one_of_each_class(dataset, GOLDEN_SAMPLES)]
    spec = {
        **spec,
        "quantization": f"int8, {figures['quantization']}",
        "golden": golden_samples(images, predictions(Model(quantized, threads), images), spec),
        "self_test_tolerance": gate.INT8_SELF_TEST_TOLERANCE,
        "known": spec["known"] and {**spec["known"], "tolerance": gate.INT8_KNOWN_TOLERANCE},
    }
    write_file(path, int8.finish(quantized, spec, opset))
    return figures | int8.measure_speed(unquantized, path, dataset.test_images, threads)


def export_pt2(deployable: model.Deployable, spec: dict, path: str, opset: int, **unused) -> None:
    """Write a torch.export file; batch, height and width are free; the spec is its extra file spec.json."""
    sizes = dict.fromkeys(range(len(free_sizes(spec))), torch.export.Dim.DYNAMIC)
    program = torch.export.export(deployable, (example_of(spec),), dynamic_shapes=(sizes,))
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # paths of this machine
    content = io.BytesIO()
    torch.export.save(program, content, extra_files={"spec.json": json.dumps(spec)})
    write_file(path, content.getbuffer())


class Format(NamedTuple):
    file: str  # its name in exports/<name>/
    export: Callable[..., dict | None]
    runs_with: str  # the package that runs it


FORMATS = {
    "torchscript": Format("model.pt", export_torchscript, "torch"),
    "onnx": Format("model.onnx", export_onnx, "onnxruntime"),
    "onnx-int8": Format("model.int8.onnx", export_int8, "onnxruntime"),
    "pt2": Format("model.pt2", export_pt2, "torch"),
    "torchscript-fixed": Format("model.fixed.pt", export_torchscript, "torch"),
    "onnx-fixed": Format("model.fixed.onnx", export_onnx, "onnxruntime"),
    "onnx-int8-fixed": Format("model.fixed.int8.onnx", export_int8, "onnxruntime"),
    "executorch": Format("model.pte", fixed.export_executorch, "executorch"),
    "litert": Format("model.tflite", fixed.export_litert, "ai-edge-litert"),
}


# -------------------------------------------------------------------------------------- write, prove, publish
def export(run: Run, dataset: data.Dataset, out: str, args: argparse.Namespace) -> list[str]:
    """Write, prove and publish each format, parity.json, and the bundle; returns the formats that failed."""
    expected = gate.reference(run, dataset.test_images)
    gate.check_reference(run, dataset, expected.main)
    golden = one_of_each_class(dataset, GOLDEN_SAMPLES)
    spec = {
        **run.spec,
        "versions": {**run.spec["versions"], "torch_export": str(torch.__version__)},
        "golden": golden_samples(dataset.test_images[golden], some(expected, golden), {"fixed": None}),
        "self_test_tolerance": gate.SELF_TEST_TOLERANCE,
        "known": run.spec.get("known") and {**run.spec["known"], "tolerance": gate.KNOWN_TOLERANCE},
        "fixed": None,
        "reject": args.reject,
        "min_probability": args.min_probability,
        "device": device.needs(run.network, *run.input_shape),
    }
    formats = [*dict.fromkeys(args.format)]
    if args.fixed is not None:
        formats += [f"{name}-fixed" for name in formats if f"{name}-fixed" in FORMATS]
    parity = bundle.earlier_parity(out, spec["checkpoint_sha256"], FORMATS)
    print(f"{'format':15} {'file':36} {'size':>8} {'max diff':>9} {'accuracy':>9}", flush=True)
    # Files are written and proven in a directory of their own, so that `out` never holds an unproven one.
    with tempfile.TemporaryDirectory(dir=out, prefix=".export-") as workspace:
        for name in formats:
            file = os.path.join(workspace, FORMATS[name].file)
            parity[name] = write_and_prove(name, run, spec, file, dataset, expected, args)
            if parity[name]["passed"]:
                publish(name, file, out, parity[name])
            else:
                withdraw(name, out, parity[name]["failures"])
        write_file(os.path.join(out, "parity.json"), json.dumps(parity, indent=2, allow_nan=False).encode())
        failed = [name for name in formats if not parity[name]["passed"]]
        if args.bundle and failed:
            bundle.remove(out)  # of an earlier export
            say("no bundle is made, as not every format passed")
        elif args.bundle:
            parity = {name: parity[name] for name in formats}
            publish_bundle(workspace, out, parity, args.opset, spec, dataset, expected)
    print(f"one input needs {device_needs(spec['device'])}", flush=True)
    return failed


def write_and_prove(name, run, spec, file, dataset, expected, args) -> dict:
    """Write the file of one format and prove it; returns its entry in parity.json."""
    more = {"dataset": dataset, "max_drop": args.max_drop, "threads": run.threads}
    if name.endswith("-fixed") or name in COMPILED:
        batch = args.fixed or (1 if name in COMPILED else None)
        spec = fixed.of_fixed_size(run, spec, dataset, batch, args.input)
    try:
        made = FORMATS[name].export(run.deployable(not spec["fixed"]), spec, file, args.opset, **more)
        if name.startswith("onnx-int8"):
            figures, failures = gate.prove_int8(run, file, dataset, expected, args.max_drop)
        else:
            figures, failures = gate.prove(run, file, dataset, expected, args.tolerance)
    except Problem as problem:  # it cannot be quantized, or step3 cannot load or run the file
        made, figures, failures = {}, gate.NO_FIGURES, [str(problem)]
    return {
        **(made or {}),
        **figures,
        "file": FORMATS[name].file,
        "runs_with": FORMATS[name].runs_with,
        "passed": not failures,
        "failures": failures,
        "checkpoint_sha256": spec["checkpoint_sha256"],
    }


def publish(name: str, file: str, out: str, figures: dict) -> None:
    """Copy a proven file into the export directory, and print its row."""
    final = os.path.join(out, figures["file"])
    write_file(final, Path(file).read_bytes())
    accuracy = "-" if figures["accuracy"] is None else f"{figures['accuracy']:.2%}"
    size, difference = f"{os.path.getsize(final) / 1e6:5.2f} MB", figures["max_abs_diff"]
    print(f"{name:15} {final:36} {size} {difference:9.1e} {accuracy:>9}", flush=True)
    if "speedup" in figures:
        speed = int8.speed_in_words(figures["speedup"])
        print(f"{'':15} {figures['quantization']}; speed relative to float32: {speed}", flush=True)
    if "warning" in figures:
        say(f"warning: {final}: {figures['warning']}")


def withdraw(name: str, out: str, failures: list[str]) -> None:
    """Say why a file is not published; remove that of an earlier export, which would be taken for it."""
    final = os.path.join(out, FORMATS[name].file)
    Path(final).unlink(missing_ok=True)
    say(f"error: {name} does not pass the gate, {final} is not written: {failures[0]}")
    for failure in failures[1:]:
        say(f"  {failure}")


def publish_bundle(workspace, out, parity, opset, spec, dataset, expected) -> None:
    """Make the bundle of the proven files in `workspace`, with samples of the test split. Raises Problem."""
    newest = max(opset, int8.OPSET) if "onnx-int8" in parity else opset
    onnxruntime = onnx_file.OPSETS[newest][1]
    described = spec
    if dataset.task != "regression":
        predicted = expected.main.argmax(1)
        figures = per_class(dataset.test_labels, predicted, spec["classes"])
        described = {**spec, "per_class": figures}
    model_card = card.model_card(described, parity)
    with problems(f"cannot write the bundle in {out}", OSError):
        archive = bundle.publish(out, workspace, parity, onnxruntime, spec, dataset, expected, model_card)
    print(f"{'bundle':15} {archive:36} {os.path.getsize(archive) / 1e6:5.2f} MB", flush=True)


def write_file(path: str, content) -> None:
    """Write bytes to a file, whole or not at all. Raises OSError that names the file."""
    try:
        with replacing(path) as file:
            file.write(content)
    except OSError as error:
        raise OSError(error.errno, error.strerror, path) from None


# --------------------------------------------------------------------------------------------------- the work
def read_run(path: str) -> Run:
    """Rebuild the trained network from the checkpoint in a run directory. Raises Problem."""
    file = os.path.join(path, runs.CHECKPOINT)
    try:
        content = Path(file).read_bytes()
        checkpoint = runs.load_plain(io.BytesIO(content))
        schema, spec, epoch = checkpoint["schema"], checkpoint["spec"], checkpoint.get("epoch", 0)
        if schema > runs.SCHEMA:
            raise Problem(f"{file} has schema {schema}, known is up to {runs.SCHEMA}: update Threestep")
        run = gate.rebuild(path, spec, checkpoint["state_dict"], checkpoint.get("familiarity"))
        epochs = spec["arguments"]["epochs"]
        run.fingerprint = checkpoint["training"]["data"] if schema > 1 else None
        if not {"data_dir", *data.OPTIONS} <= spec["arguments"].keys():
            raise ValueError("its arguments lack keys")
        stopped = epoch < epochs and not runs.is_finished(path)
    except Problem:
        raise
    except Exception as error:  # torch.load fails in a dozen ways on a truncated or foreign file
        reason = str(error).split("\n")[0]
        raise Problem(f"{file} is truncated or not a Threestep checkpoint ({reason}); train again") from None
    spec["checkpoint_sha256"] = hashlib.sha256(content).hexdigest()
    if stopped:
        say(f"note: {path} stopped after epoch {epoch} of {epochs}: not its final result")
    return run


def load_data(run: Run, data_dir: str | None = None, splits: tuple[str, ...] = ("test",)) -> data.Dataset:
    """The dataset of a run, perhaps from another `data_dir`, with `splits` as they were. Raises Problem."""
    name = run.spec["dataset"]
    if data_dir is not None and name in ("digits", "linear"):
        raise Problem(f"--data-dir belongs to datasets read from files; {run.path} was trained on {name}", 2)
    with silenced(True):  # step1 has said it
        dataset = data.load_for(run.spec, data_dir)
    if run.fingerprint is not None:
        data.refuse_changes(run.path, run.fingerprint, dataset.fingerprint, splits)
    return dataset


def run_export(args: argparse.Namespace) -> int:
    """The work of main: returns the exit code, raises Problem."""
    path = runs.find(args.run)
    if args.run is None:
        say(f"run: {path}")
    run = read_run(path)
    if run.regression and "onnx-int8" in args.format:
        raise Problem(f"onnx-int8 is for classification, {path} is a regression: leave it out of --format", 2)
    if run.regression and (args.fixed is not None or set(COMPILED) & set(args.format)):
        raise Problem(f"{path} is a regression: leave out --fixed, executorch and litert", 2)
    if args.uncalibrated:
        run = run.without_calibration()
    if args.reject is not None and not run.spec.get("known"):
        raise Problem("--reject needs --calibration in step1's run, and no --uncalibrated here", 2)
    if args.min_probability is not None and run.regression:
        raise Problem(f"--min-probability is for classification, and {path} is a regression", 2)
    run.threads, reason = cpu.set_threads(args.threads)
    if reason:
        say(f"note: running on {run.threads} CPU threads: {reason}")
    dataset = load_data(run, args.data_dir, ("train", "test") if "onnx-int8" in args.format else ("test",))
    out = args.out or os.path.join(runs.EXPORTS, os.path.basename(path))
    try:
        os.makedirs(out, exist_ok=True)
        failed = export(run, dataset, out, args)
    except OSError as error:
        if error.filename is None:  # standard output
            raise
        raise Problem(f"cannot write {out}: {error.strerror or error}") from None
    try:
        page.write_report(path, os.path.dirname(path) or ".", runs.EXPORTS, out)
    except OSError as error:
        say(f"note: {path}/report.html is as it was before the export: {error.strerror or error}")
    return 1 if failed else 0


def main(argv: list[str] | None = None) -> int:
    return guarded(run_export, parse(argv))


if __name__ == "__main__":
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main())
