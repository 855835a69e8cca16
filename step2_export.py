#!/usr/bin/env python3
"""Step 2 of 3: export a trained run to files that predict on their own, and prove that they do.

    python step2_export.py                                 # the newest run, as ONNX and TorchScript
    python step2_export.py --run mnist-mlp --format onnx
    python step2_export.py --bundle --format onnx onnx-int8     # all that an edge machine needs
    python step2_export.py --promise accuracy=0.95              # or "unsure": see README.md

Writes exports/<name>/: a file for each format, step3_infer.pyz, which runs them on another machine,
and parity.json with the figures of the proof. Resizing, normalising and softmax are inside the
graph; class names, provenance and golden samples are in the file's spec.

Each file is run with step3's own code and compared with the trained network, by the rules of
deploy/gate.py. A file that does not agree is not published, and the exit code is 1. An int8 file
may lose some accuracy instead: --max-drop.
Next: python step3_infer.py image.png
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports: no traceback

import argparse
import contextlib
import hashlib
import io
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from deploy import formats, onnx_file
from deploy.exporters import Source, write_file
from deploy.formats import Format
from deploy.promises import read_promise, twice
from inference.command_line import Parser, number, say
from inference.errors import Problem, guarded, one_line, problems

DEFAULT_FORMATS = ["torchscript", "onnx"]
LEAST_WIDTH = 36  # characters of the column of paths


# --------------------------------------------------------------------------------- the command line
def build_parser() -> Parser:
    parser = Parser(
        description="Export a trained run and prove that the files agree with it; "
        "writes exports/<name>/.",
        epilog="example: python step2_export.py --run digits-airbench --format onnx",
    )
    defaults = formats.DEFAULTS
    share = number(float, 0, 1)

    add = parser.add_argument
    add("--run", metavar="NAME", help="a run under runs/, or its path (default: the newest)")
    add(
        "--format",
        nargs="+",
        choices=formats.NAMES,
        metavar="FORMAT",
        help=f"one or more of {', '.join(formats.NAMES)} (default: {' '.join(DEFAULT_FORMATS)})",
    )
    add("--out", metavar="DIR", help="output directory (default: exports/<name of the run>)")
    add("--bundle", action="store_true", help="also write a folder and a zip for edge machines")
    add("--data-dir", metavar="DIR", help="where the test split is (default: where step1 had it)")
    add(
        "--threads",
        type=number(int, 1, 1024),
        metavar="N",
        help="number of CPU threads (default: all that are free)",
    )

    add = parser.add_argument_group("what the files do").add_argument
    add(
        "--reject",
        type=share,
        metavar="X",
        help="by default, keep this share of familiar images (0.99) and call others unknown",
    )
    add(
        "--min-probability",
        type=share,
        metavar="P",
        help="by default, call answers below this probability unsure",
    )
    add(
        "--promise",
        nargs="+",
        action="extend",
        type=read_promise,
        metavar="PROMISE",
        help="accuracy=0.95: of what is answered, at least 95 %% is right, other answers are "
        "unsure; recall:CLASS=0.99: at least 99 %% of a class is called that class",
    )
    add(
        "--uncalibrated",
        action="store_true",
        help="export without the temperature and without the output known",
    )

    add = parser.add_argument_group("single formats").add_argument
    add(
        "--opset",
        type=int,
        choices=tuple(onnx_file.OPSETS),
        metavar="N",
        help=f"ONNX opset, 18 to 23 (default: {defaults['opset']})",
    )
    add(
        "--tolerance",
        type=number(float, 1e-9, 0.999),
        metavar="X",
        help=f"largest allowed difference of a probability (default: {defaults['tolerance']:g})",
    )
    add(
        "--max-drop",
        type=number(float, 0, 100),
        metavar="X",
        help="points of accuracy that int8 may lose "
        f"(default: {formats.MAX_DROP:g}, and what chance explains)",
    )
    add(
        "--small-arena",
        action="store_true",
        default=None,
        help="tflite-micro: replace GELU by hard-swish, which takes less working memory and costs "
        "more accuracy",
    )
    add(
        "--fixed",
        nargs="?",
        const=0,
        type=number(int, 1, 1024),
        metavar="N",
        help="also write files for compilers, which take the network's own image size only: "
        "N images at once, or any number",
    )
    add(
        "--input",
        choices=("uint8", "float"),
        metavar="TYPE",
        help="pixels that files of a fixed size take: uint8 or float (default: uint8)",
    )
    return parser


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The arguments with their defaults; exits if one has no effect on the requested formats."""
    parser = build_parser()
    args = parser.parse_args(argv)
    args.format = args.format or DEFAULT_FORMATS
    if args.bundle and "onnx" not in args.format:
        parser.error("--bundle requires --format onnx, which runs without torch and in the browser")

    for name, default in formats.DEFAULTS.items():
        usable = formats.formats_with(name)
        if getattr(args, name) is None:
            setattr(args, name, default)
        elif not set(usable) & set(args.format):
            option = name.replace("_", "-")
            parser.error(f"--{option} only applies to --format {' or '.join(usable)}")

    args.promise = args.promise or []
    repeated = twice(args.promise)
    if repeated:
        parser.error(f"--promise {repeated} is given twice")

    takes_pixels = any(each.fixed and not each.micro for each in chosen_formats(args))
    if args.input != formats.DEFAULTS["input"] and not takes_pixels:
        parser.error("--input requires --fixed")
    return args


def chosen_formats(args: argparse.Namespace) -> list[Format]:
    return formats.chosen_formats(args.format, with_fixed=args.fixed is not None)


if __name__ == "__main__":
    parse()  # --help and wrong options do not wait for the imports that follow, which take seconds
    # torch's OpenMP threads would spin while they wait for one another: beside other programs, the
    # network would take several times the CPU time.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch  # noqa: E402

import data  # noqa: E402
from data.notes import silenced  # noqa: E402
from data.unseen import SOURCES, TEST, Unseen, unseen_images  # noqa: E402
from deploy import (  # noqa: E402
    archive,
    bundle,
    describe,
    gate,
    int8,
    micro_gate,
    parity,
    promises,
    publish,
    reference,
    speed,
)
from deploy.comparing import Outputs, take  # noqa: E402
from deploy.facts import Facts, add_facts, find_facts  # noqa: E402
from deploy.reference import TrainedRun  # noqa: E402
from deploy.samples import (  # noqa: E402
    GOLDEN_SAMPLES,
    golden_images,
    golden_samples,
    one_of_each_class,
)
from deploy.watching import monitor_reference  # noqa: E402
from inference.engines import MODEL_NAMES  # noqa: E402
from inference.files import sha256  # noqa: E402
from inference.images import fit_to_input  # noqa: E402
from inference.metrics import per_class  # noqa: E402
from inference.predict import Model  # noqa: E402
from report import card, page  # noqa: E402
from report.promises import promise_line  # noqa: E402
from report.text import counted, device_needs  # noqa: E402
from training import cpu, recorded, runs  # noqa: E402


# ---------------------------------------------------------------------------- write, prove, publish
@dataclass(frozen=True)
class Job:
    """What all formats of an export are made from.

    spec: of the files that take images of any size. expected: the trained network's outputs on the
    test split of `dataset`. unseen: images that --monitor compares with, and that promises are
    chosen on; None for a regression.
    """

    trained: TrainedRun
    dataset: data.Dataset
    expected: Outputs
    facts: Facts
    unseen: Unseen | None
    spec: dict
    args: argparse.Namespace


def export(
    trained: TrainedRun, dataset: data.Dataset, out: str, args: argparse.Namespace
) -> list[str]:
    """Write, prove and publish each format; returns the names of those that failed.

    `out` gets parity.json, step3_infer.pyz and perhaps the bundle as well. Raises Problem, OSError.
    """
    expected = reference.reference(trained, dataset.test_images)
    gate.check_reference(trained, dataset, expected.main)
    facts = find_facts(trained, dataset)  # once for all formats
    unseen = images_to_compare_with(trained, dataset)
    monitor = compare_with(trained, unseen, expected)
    spec = describe_files(trained, dataset, expected, facts, monitor, args)
    job = Job(trained, dataset, expected, facts, unseen, spec, args)
    if args.promise:
        check_promises(job)

    earlier = parity.read_earlier(out, spec["checkpoint_sha256"])
    chosen = chosen_formats(args)
    width = width_of_paths(out, chosen, args.bundle)
    print(f"{'format':15} {'file':{width}} {'size':>8} {'max diff':>9} {'accuracy':>9}", flush=True)

    # Files are written and proven in a directory of their own: `out` never holds an unproven one,
    # and an earlier export stays as it is until a new file has passed.
    with publish.workspace(out) as workspace:
        proofs = {}
        for each in chosen:
            file = os.path.join(workspace, each.file)
            proofs[each.name] = write_and_prove(each, file, job)
            report_proof(each, file, out, proofs[each.name], width)

        failed = [name for name, proof in proofs.items() if not proof["passed"]]
        if len(failed) == len(chosen) and earlier.has_files():
            say(f"note: the earlier export in {out} stays as it was")
            return failed

        published = publish_files(workspace, out, earlier, proofs)
        if args.bundle and failed:
            say("no bundle was written because not every format passed")
        elif args.bundle:
            publish_bundle(workspace, out, proofs, job, width)

    print(f"one input needs {device_needs(facts.device)}", flush=True)
    print_how_to_ship(published)
    return failed


def images_to_compare_with(trained: TrainedRun, dataset: data.Dataset) -> Unseen | None:
    """The images whose answers --monitor compares with those in the field.

    They are some that the network was not trained on; of a run that a twin calibrated, or that is
    not calibrated, only those of the test split are. None for a regression.
    """
    if not trained.task.has_images:
        return None

    changes = []
    if trained.fingerprint is not None:
        changes = data.differences(trained.fingerprint, dataset.fingerprint, ("train", "val"))
    if changes:
        what = "--monitor will compare with the test split"
        say(f"note: {what}, as the data is not what the run was trained with: {changes[0]}")
    else:
        unseen = unseen_images(dataset, trained.spec["arguments"])
        if unseen:
            return unseen
    return Unseen(dataset.test_images, dataset.test_labels, TEST)


def compare_with(trained: TrainedRun, unseen: Unseen | None, expected: Outputs) -> dict | None:
    """`monitor` of the spec. expected: the network's outputs on the test split."""
    if unseen is None:
        return None
    outputs = expected
    if unseen.source != TEST:
        outputs = reference.reference(trained, unseen.images)
    return monitor_reference(outputs, unseen.labels, unseen.source)


def describe_files(
    trained: TrainedRun,
    dataset: data.Dataset,
    expected: Outputs,
    facts: Facts,
    monitor: dict | None,
    args: argparse.Namespace,
) -> dict:
    """The spec of the files that take images of any size. monitor: what --monitor compares with."""
    outputs = take(expected, one_of_each_class(dataset, GOLDEN_SAMPLES))
    return describe.describe_export(
        trained.spec,
        golden=golden_samples(golden_images(dataset), outputs, {"fixed": None}),
        device=facts.device,
        torch_version=str(torch.__version__),
        monitor=monitor,
        reject=args.reject,
        min_probability=args.min_probability,
    )


def check_promises(job: Job) -> None:
    """Raise Problem if the trained network cannot promise what is wanted: nothing is exported."""
    unseen = job.unseen
    if unseen.source == TEST:
        raise promises.refuse_seen(job.trained.path)
    outputs = reference.reference(job.trained, unseen.images)
    on_unseen = promises.as_labelled(outputs, unseen.labels, job.spec)
    promises.choose(job.args.promise, job.spec, on_unseen, unseen.source)


def describe_file(chosen: Format, job: Job) -> dict:
    """The spec of the file of one format. One of fixed size has golden samples of its own."""
    if not chosen.fixed:
        return job.spec

    batch = job.args.fixed or chosen.batch
    input_type = "float32" if job.args.input == "float" else "uint8"
    if chosen.micro:  # it takes nothing else, whatever the other formats are given
        batch = chosen.batch
        input_type = "uint8"
    spec = describe.describe_fixed(job.spec, batch, input_type)

    # Its engine is given rounded pixels, which change the outputs a little.
    images = golden_images(job.dataset)
    outputs = reference.reference(job.trained, fit_to_input(images, spec))
    return describe.with_golden(spec, golden_samples(images, outputs, spec))


def write_and_prove(chosen: Format, file: str, job: Job) -> dict:
    """Write the file of one format and prove it; returns its entry in parity.json."""
    source = Source(
        deployable=job.trained.deployable(any_size=not chosen.fixed),
        spec=describe_file(chosen, job),
        opset=job.args.opset,
        dataset=job.dataset,
        max_drop=formats.MAX_DROP if job.args.max_drop is None else job.args.max_drop,
        small_arena=job.args.small_arena,
        threads=job.trained.threads,
        unseen=job.unseen,
    )
    try:
        made = chosen.export(source, file) or {}
        promised = keep_promises(chosen, source, file, job)
        figures, failures = prove(chosen, file, job)
        if promised:
            made = {**made, "promises": promised}
            figures["warnings"] += promises.warnings_of(promised)
    except Problem as problem:  # it cannot be quantized, or step3 cannot load or run the file
        made = {}
        figures = gate.NO_FIGURES
        failures = [str(problem)]
    return {
        **made,
        **add_facts(figures, job.facts),
        "file": chosen.file,
        "runs_with": chosen.runs_with,
        "passed": not failures,
        "failures": failures,
        "checkpoint_sha256": job.spec["checkpoint_sha256"],
    }


def keep_promises(chosen: Format, source: Source, file: str, job: Job) -> list[dict]:
    """Choose the thresholds of a file by its own outputs, and write them into its spec.

    Returns its promises. Raises Problem if it cannot keep them.
    """
    if not job.args.promise:
        return []
    unseen = job.unseen
    exported = Model(file, job.trained.threads)
    on_unseen = promises.outputs_of(exported, unseen.images, unseen.labels)
    on_test = promises.outputs_of(exported, job.dataset.test_images, job.dataset.test_labels)
    wanted = job.args.promise
    kept = promises.promises_of(wanted, exported.spec, on_unseen, on_test, unseen.source)
    promises.rewrite(chosen, source, file, kept)
    return kept


def prove(chosen: Format, file: str, job: Job) -> tuple[dict, list[str]]:
    """Figures of the comparison with the trained network, and failures in words. Raises Problem."""
    limit = job.args.max_drop
    if chosen.micro:
        return micro_gate.prove_micro(job.trained, file, job.dataset, job.expected, limit)
    if chosen.quantized:
        return gate.prove_int8(job.trained, file, job.dataset, job.expected, limit)
    return gate.prove(job.trained, file, job.dataset, job.expected, job.args.tolerance)


def width_of_paths(out: str, chosen: list[Format], has_bundle: bool) -> int:
    """How wide the column of paths is: no path of a file in `out` is longer."""
    paths = [os.path.join(out, each.file) for each in chosen]
    if has_bundle:
        paths.append(bundle.archive_path(out))
    return max(LEAST_WIDTH, *(len(path) for path in paths))


def report_proof(chosen: Format, file: str, out: str, proof: dict, width: int) -> None:
    """Print the row of a proven file, or say why a file is not published.

    width: of the column of paths.
    """
    final = os.path.join(out, chosen.file)
    if not proof["passed"]:
        reason, *more = proof["failures"]
        judged = proof["samples"] > 0  # else it could not be written, or not be run
        why = f"{chosen.name} does not pass the gate: {reason}" if judged else reason
        say(f"error: {final} is not written: {why}")
        for failure in more:
            say(f"  {failure}")
        return

    size = f"{os.path.getsize(file) / 1e6:5.2f} MB"
    accuracy = "-" if proof["accuracy"] is None else f"{proof['accuracy']:.2%}"
    difference = f"{proof['max_abs_diff']:9.1e}"
    print(f"{chosen.name:15} {final:{width}} {size} {difference} {accuracy:>9}", flush=True)
    if "speedup" in proof:
        measured = speed.speed_in_words(proof["speedup"])
        how = f"{proof['quantization']}; speed relative to float32: {measured}"
        print(f"{'':15} {how}", flush=True)
    for promise in proof.get("promises", []):
        print(f"{'':15} {promise_line(promise)}", flush=True)
    if "arena" in proof:
        print(f"{'':15} {micro_in_words(proof)}", flush=True)
    for warning in (*proof["warnings"], proof.get("warning")):
        if warning:
            say(f"warning: {final}: {warning}")


def micro_in_words(proof: dict) -> str:
    """What a microcontroller needs for a file, and what proved it."""
    arena = (
        "an unknown arena" if proof["arena"] is None else f"an arena of {proof['arena']:,} bytes"
    )
    needs = f"{proof['quantization']}; {proof['model_bytes']:,} bytes of flash, {arena}"
    return f"{needs}; proven in {proof['runtime']} on {counted(proof['samples'], 'image')}"


def publish_files(
    workspace: str, out: str, earlier: parity.Earlier, proofs: dict[str, dict]
) -> dict[str, dict]:
    """Copy the proven files to `out`, with parity.json and step3_infer.pyz beside them.

    A file of this checkpoint that was proven before stays, also if its format has failed now. Files
    of another checkpoint are removed last. Returns the entries of parity.json. Raises OSError.
    """
    written = dict(earlier.current)
    published = set()
    for name, proof in proofs.items():
        if proof["passed"]:
            for file in formats.FORMATS[name].files:
                write_file(os.path.join(out, file), Path(workspace, file).read_bytes())
            published.add(name)
        if proof["passed"] or not written.get(name, {}).get("passed"):
            written[name] = proof

    if any(proof["passed"] for proof in written.values()):
        write_file(os.path.join(out, archive.NAME), archive.program_bytes())
    write_file(os.path.join(out, parity.NAME), parity.to_bytes(written))
    parity.remove_stale(out, earlier.stale, published)
    return written


def publish_bundle(workspace: str, out: str, proofs: dict[str, dict], job: Job, width: int) -> None:
    """Make the bundle of the proven files in `workspace` and print its row. Raises Problem.

    width: of the column of paths.
    """
    chosen = [formats.FORMATS[name] for name in proofs]
    # One environment has to run all files of the bundle.
    opset = job.args.opset
    if any(each.quantized for each in chosen):
        opset = max(opset, int8.OPSET)

    contents = bundle.Contents(
        models=[os.path.join(workspace, file) for each in chosen for file in each.files],
        parity=proofs,
        spec=job.spec,
        onnxruntime=onnx_file.OPSETS[opset].onnxruntime,
        dataset=job.dataset,
        expected=job.expected,
        has_fixed=any(each.fixed_version_of for each in chosen),
        card=card.model_card(describe_classes(job), proofs),
    )
    with problems(f"cannot write the bundle in {out}", OSError):
        path = bundle.write_bundle(out, workspace, contents)
    print(f"{'bundle':15} {path:{width}} {os.path.getsize(path) / 1e6:5.2f} MB", flush=True)
    print(f"{'':15} SHA-256 {sha256(path)}", flush=True)


def describe_classes(job: Job) -> dict:
    """The spec with the figures of each class, for the model card."""
    if not job.trained.task.has_images:
        return job.spec
    predicted = job.expected.main.argmax(1)
    figures = per_class(job.dataset.test_labels, predicted, job.spec["classes"])
    return {**job.spec, "per_class": figures}


def print_how_to_ship(proofs: dict[str, dict]) -> None:
    """Name the two files that another machine needs, and the packages that run them."""
    passed = {proof["file"]: proof for proof in proofs.values() if proof["passed"]}
    if not passed:
        return
    # The file that step3 would take by itself, else any.
    first = next(name for name in (*MODEL_NAMES, *passed) if name in passed)

    packages = f"numpy, Pillow, {passed[first]['runs_with']}"
    print(f"to ship: {first} and {archive.NAME}, with Python, {packages}", flush=True)
    if any(proof.get("model_bytes") for proof in passed.values()):
        print(
            "to a microcontroller: model_data.h and model_data.cc, see deploy/ENGINES.md",
            flush=True,
        )


# ----------------------------------------------------------------------------------------- the work
def read_run(path: str) -> TrainedRun:
    """Rebuild the trained network from the checkpoint in a run directory. Raises Problem."""
    file = os.path.join(path, runs.CHECKPOINT)
    try:
        content = Path(file).read_bytes()
        checkpoint = runs.load_plain(io.BytesIO(content))
        check_schema(file, checkpoint["schema"])
        trained = rebuild(path, checkpoint)
        epoch = checkpoint.get("epoch", 0)
        epochs = trained.spec["arguments"]["epochs"]
        is_finished = runs.is_finished(path)
        trained.is_unfinished = epoch < epochs and not is_finished
        wants_calibration = trained.spec["arguments"].get("calibration", "none") != "none"
        is_calibrated = trained.spec["temperature"] is not None or not wants_calibration
    except Problem:
        raise
    except Exception as error:  # torch.load fails in a dozen ways on a truncated or foreign file
        raise Problem(
            f"{file} is truncated or not a Threestep checkpoint ({one_line(error)}); train again"
        ) from None

    trained.spec["checkpoint_sha256"] = hashlib.sha256(content).hexdigest()
    if trained.is_unfinished:
        say(f"note: {path} stopped after epoch {epoch} of {epochs}: this is not its final result")
    elif not is_finished and not is_calibrated:
        say(f"note: {path} stopped before its calibration: this is not its final result")
    return trained


def check_schema(file: str, schema: int) -> None:
    """Raise Problem for a checkpoint of a newer version."""
    if schema > runs.SCHEMA:
        raise Problem(f"{file} has schema {schema}, known is up to {runs.SCHEMA}: update Threestep")


def rebuild(path: str, checkpoint: dict) -> TrainedRun:
    """The trained network of a checkpoint.

    Any exception means that it is damaged or not one of ours.
    """
    recorded.check_spec(checkpoint["spec"])
    trained = reference.rebuild(
        path, checkpoint["spec"], checkpoint["state_dict"], checkpoint.get("familiarity")
    )
    if checkpoint["schema"] > 1:  # the first did not say which data it was trained with
        trained.fingerprint = checkpoint["training"]["data"]
        recorded.check_fingerprint(trained.fingerprint)
    return trained


def load_data(
    trained: TrainedRun, data_dir: str | None = None, splits: tuple[str, ...] = ("test",)
) -> data.Dataset:
    """The dataset of a run, perhaps from another `data_dir`.

    Raises Problem if one of `splits` is not what the run was trained with.
    """
    name = trained.spec["dataset"]
    is_built_in = name in ("digits", "linear")
    if data_dir is not None and is_built_in:
        raise Problem(
            "--data-dir only applies to datasets that are read from files; "
            f"{trained.path} was trained on {name}",
            2,
        )

    try:
        with silenced(True):  # step1 has said it
            dataset = data.load_for(trained.spec, data_dir)
        if trained.fingerprint is not None:
            data.refuse_changes(trained.path, trained.fingerprint, dataset.fingerprint, splits)
    except Problem as problem:
        if data_dir is not None or is_built_in:
            raise
        way_out = f"--data-dir says where the data of {trained.path} is now"
        raise Problem(f"{problem}; {way_out}", problem.code) from None
    return dataset


def check_run(trained: TrainedRun, args: argparse.Namespace) -> None:
    """Raise Problem if an option or a format does not fit the run."""
    if trained.task.has_images:
        if args.reject is not None and not trained.spec.get("known"):
            raise Problem(
                "--reject requires a run of step1 with --calibration, and no --uncalibrated", 2
            )
        promises.check_classes(args.promise, trained.spec["classes"])
        if args.promise and trained.spec["arguments"].get("calibration") not in SOURCES:
            raise promises.refuse_seen(trained.path)
        return

    is_regression = f"{trained.path} is a regression"
    chosen = chosen_formats(args)
    quantized = [each.name for each in chosen if each.quantized]
    if quantized:
        raise Problem(f"{quantized[0]} only applies to classification, and {is_regression}", 2)
    if any(each.fixed for each in chosen):
        reason = "--fixed, executorch and litert only apply to classification"
        raise Problem(f"{reason}, and {is_regression}", 2)
    if args.promise:
        raise Problem(f"--promise only applies to classification, and {is_regression}", 2)
    if args.reject is not None or args.min_probability is not None:
        option = "--min-probability" if args.reject is None else "--reject"
        raise Problem(f"{option} only applies to classification, and {is_regression}", 2)


def run_export(args: argparse.Namespace) -> int:
    """Export as the arguments say. Returns the exit code; raises Problem."""
    path = runs.find(args.run)
    if args.run is None:
        say(f"run: {path}")
    trained = read_run(path)
    if args.uncalibrated:
        trained = trained.without_calibration()
    check_run(trained, args)

    trained.threads, reason = cpu.set_threads(args.threads)
    if reason:
        say(f"note: running on {counted(trained.threads, 'CPU thread')}: {reason}")

    # Only what the export uses must be as it was: the test split, for int8 the training split, and
    # for promises what lies in neither.
    splits = ["test"]
    if args.promise or any(each.quantized for each in chosen_formats(args)):
        splits.append("train")
    if args.promise:
        splits.append("val")
    dataset = load_data(trained, args.data_dir, tuple(splits))
    out = args.out or os.path.join(runs.EXPORTS, os.path.basename(path))
    try:
        os.makedirs(out, exist_ok=True)
        failed = export(trained, dataset, out, args)
    except OSError as error:
        if error.filename is None:  # standard output
            raise
        raise Problem(f"cannot write {out}: {error.strerror or error}") from None
    finally:
        with contextlib.suppress(OSError):  # it holds files, unless nothing could be exported
            os.rmdir(out)

    update_report(path, out)
    return 1 if failed else 0


def update_report(run_dir: str, out: str) -> None:
    """Show the export in the run's report, if that can be written."""
    try:
        page.write_report(run_dir, os.path.dirname(run_dir) or ".", runs.EXPORTS, out)
    except OSError as error:
        reason = error.strerror or error
        say(f"note: {run_dir}/report.html is as it was before the export: {reason}")


def main(argv: list[str] | None = None) -> int:
    return guarded(run_export, parse(argv))


if __name__ == "__main__":
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main())
