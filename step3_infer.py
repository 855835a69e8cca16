#!/usr/bin/env python3
"""Step 3 of 3: predict with an exported model file.

A machine needs only that file and this program.

    python step3_infer.py image.png                    # the model beside it, or the newest export
    python step3_infer.py --self-test                  # does this machine compute the same?
    python step3_infer.pyz --model model.onnx photos/  # as step2_export.py ships it: one file

In Python:

    from step3_infer import Model, predict
    predict("image.png", Model("model.onnx"))["label"]

Needs numpy and Pillow, and onnxruntime for .onnx files or torch for .pt and .pt2 files;
preprocessing and class names are inside the file. Exit codes: 0 success, 1 some input could not be
used, 2 wrong usage.
"""

import signal
import sys

if sys.version_info < (3, 10):  # noqa: UP036  an older Python would fail later, with a traceback
    sys.exit("error: Python 3.10 or newer is needed, this is Python " + sys.version.split()[0])
if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports prints no traceback

import argparse
import contextlib
import itertools
import os
import time

IMPORT_STARTED = time.perf_counter()
try:
    import numpy  # noqa: F401
    import PIL  # noqa: F401
except ImportError as error:  # on a new device: one line instead of a traceback
    sys.exit(f"error: numpy and Pillow are needed ({error}): pip install numpy pillow")

from inference.command_line import Parser, number, say  # noqa: E402
from inference.cpus import usable_cpus  # noqa: E402
from inference.engines import find_model  # noqa: E402
from inference.errors import Problem, guarded  # noqa: E402
from inference.files import output_stream  # noqa: E402
from inference.finding import find_images, note_files  # noqa: E402
from inference.images import note_seen  # noqa: E402
from inference.limits import MAX_PIXELS, MAX_SIDE, allow_pixels  # noqa: E402
from inference.predict import Model, predict, predict_files  # noqa: E402, F401  predict: for others
from inference.results import write_figures, write_images, write_values  # noqa: E402
from inference.task import task_of  # noqa: E402

IMPORT_SECONDS = time.perf_counter() - IMPORT_STARTED

BATCH_SIZE, TOP_K = 16, 3  # by default

# What is done, by the first of these that is given, and the options that have an effect on it.
TAKES = {
    "--verify": ["--model", "--sums-sha256"],
    "--self-test": ["--model", "--threads", "--device"],
    "--benchmark": ["--model", "--threads", "--device", "--batch-size", "--format", "--output"],
    "--values": ["--model", "--threads", "--device", "--format", "--output"],
    "--compare": [
        "PATH",
        "--threads",
        "--device",
        "--batch-size",
        "--format",
        "--output",
        "--max-flips",
        "--max-pixels",
    ],
    "PATH": [
        "--model",
        "--threads",
        "--device",
        "--batch-size",
        "--format",
        "--top-k",
        "--output",
        "--reject",
        "--min-probability",
        "--max-pixels",
    ],
}


# --------------------------------------------------------------------------------- the command line
def build_parser() -> Parser:
    parser = Parser(
        description="Predict with a file that step2_export.py wrote.",
        epilog="example: python step3_infer.py --model model.onnx --top-k 3 photos/",
    )
    count = number(int, 1, 999_999)
    share = number(float, 0, 1)

    add = parser.add_argument
    add("paths", nargs="*", metavar="PATH", help="images, directories, globs, or - for stdin")
    add(
        "--values",
        action="append",
        metavar="X,X,...",
        help="features for a regression model; may be repeated",
    )

    add = parser.add_argument_group("model").add_argument
    add("--model", metavar="FILE", help="default: beside this program, or the newest export")
    add("--threads", type=count, metavar="N", help="number of CPU threads (default: all usable)")
    add(
        "--device",
        "--provider",
        metavar="NAME",
        help="where the runtime computes: cpu, cuda, ... (default: cpu)",
    )
    add(
        "--batch-size",
        type=count,
        metavar="N",
        help="images of one size that run at once (default: 16)",
    )
    add(
        "--max-pixels",
        type=number(int, 1, MAX_SIDE**2),
        metavar="N",
        help=f"refuse images of more pixels (default: {MAX_PIXELS:,})",
    )

    add = parser.add_argument_group("results").add_argument
    add(
        "--format",
        choices=("text", "json", "csv"),
        help="json: one object per line (default: text)",
    )
    add("--top-k", type=count, metavar="K", help="number of classes to name (default: 3)")
    add(
        "--reject",
        type=share,
        metavar="X",
        help="keep this share of familiar images (0.99); call others unknown",
    )
    add(
        "--min-probability",
        type=share,
        metavar="P",
        help="call answers below this probability unsure",
    )
    add("--output", metavar="FILE", help="write to FILE instead of standard output")
    add(
        "--max-flips",
        type=share,
        metavar="X",
        help="fail if --compare finds a larger share of answers changed",
    )

    group = parser.add_argument_group("instead of predicting")
    add = group.add_mutually_exclusive_group().add_argument
    add("--self-test", action="store_true", help="check the golden samples inside the file")
    add(
        "--compare",
        nargs=2,
        metavar=("OLD", "NEW"),
        help="show how the answers of two files differ on PATH",
    )
    add("--benchmark", action="store_true", help="time the file on this machine")
    add(
        "--verify",
        action="store_true",
        help="check all files against SHA256SUMS beside the model or program",
    )
    parser.add_argument_group("with --verify").add_argument(
        "--sums-sha256",
        metavar="HEX",
        help="the SHA-256 that SHA256SUMS itself must have",
    )
    return parser


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The arguments with their defaults; exits if one of them has no effect."""
    parser = build_parser()
    args = parser.parse_args(argv)
    check_options(parser, args)

    args.device = args.device or "cpu"
    args.format = args.format or "text"
    args.top_k = args.top_k or TOP_K
    args.threads = args.threads or usable_cpus()
    args.max_pixels = args.max_pixels or MAX_PIXELS
    allow_pixels(args.max_pixels)
    return args


def check_options(parser: Parser, args: argparse.Namespace) -> None:
    """Exit with an error if nothing is asked for, or if an option would have no effect."""
    given = []
    for name, value in vars(args).items():
        if value not in (None, False, []):
            given.append("PATH" if name == "paths" else f"--{name.replace('_', '-')}")

    asked = next((name for name in TAKES if name in given), None)
    if asked is None or (args.compare and not args.paths):
        parser.error(
            "give at least one PATH: an image, a directory or a glob; or --values for a regression"
        )

    for name in given:
        if name != asked and name not in TAKES[asked]:
            takes = " ".join(TAKES[asked])
            parser.error(f"{name} has no effect on {asked}, which takes only {takes}")

    if (args.benchmark or args.compare) and args.format == "csv":
        parser.error(f"{asked} writes --format text or json, not csv")
    if args.compare and "-" in args.paths:
        parser.error("--compare takes files, not - for standard input")


# ---------------------------------------------------------------------------------------- the work
def run(args: argparse.Namespace) -> int:
    """Do what the command line asks for and return the exit code. Raises Problem."""
    if args.verify:
        return run_verify(args)
    if args.compare:
        return run_compare(args)

    path = args.model or find_model(program_folder())
    warn_of_code(path)
    if args.benchmark:
        return run_benchmark(path, args)
    if args.self_test:
        return run_self_test(path, args)
    if args.values:
        return run_values(path, args)
    return run_predict(path, args)


def run_predict(path: str, args: argparse.Namespace) -> int:
    """Find -> decode -> predict -> write."""
    others = []  # files in directories that are not images
    found = find_images(args.paths, others)
    first = take_first(found, args)
    workers = max(1, min(args.threads, len(first)))

    model = Model(path, args.threads // workers, args.device, once=len(first) == 1)
    check_model(model, path, args)
    model.max_pixels = args.max_pixels
    if args.reject is not None:
        model.reject = args.reject
    if args.min_probability is not None:
        model.min_probability = args.min_probability

    top_k = min(args.top_k, len(model.spec["classes"]))
    batch_size = batch_size_for(model, args, len(first), workers)
    files = itertools.chain(first, found)
    results = predict_files(model, files, workers, batch_size, top_k)
    with output_stream(args.output) as out, contextlib.closing(results):
        code = write_images(results, args.format, top_k, out)

    note_seen(model.seen, model.spec["ground"])
    note_files("skipped", others, "that Pillow cannot read")
    return code


def run_values(path: str, args: argparse.Namespace) -> int:
    model = Model(path, args.threads, args.device)
    check_model(model, path, args)
    with output_stream(args.output) as out:
        return write_values(model, args.values, args.format, out)


def run_compare(args: argparse.Namespace) -> int:
    from inference.compare import compare_models, count_flips

    others = []
    found = find_images(args.paths, others)
    first = take_first(found, args)
    workers = max(1, min(args.threads, len(first)))

    models = []
    for path in args.compare:
        warn_of_code(path)
        model = Model(path, args.threads // workers, args.device, once=len(first) == 1)
        check_model(model, path, args)
        model.max_pixels = args.max_pixels
        models.append(model)
    check_same_classes(models, args.compare)

    top_k = len(models[0].spec["classes"])
    files = itertools.tee(itertools.chain(first, found), len(models))
    with contextlib.ExitStack() as stack:
        out = stack.enter_context(output_stream(args.output))
        results = []
        for model, own_files in zip(models, files, strict=True):
            batch_size = batch_size_for(model, args, len(first), workers)
            rows = predict_files(model, own_files, workers, batch_size, top_k)
            results.append(stack.enter_context(contextlib.closing(rows)))

        figures, code = compare_models(models, args.compare, results)
        if figures is not None:
            write_figures(figures, args.format, out)
    note_seen(models[0].seen, models[0].spec["ground"])
    note_files("skipped", others, "that Pillow cannot read")
    if figures is None:
        return code

    flips = count_flips(figures)
    images = figures["images"]
    if args.max_flips is not None and flips / images > args.max_flips:
        limit = f"more than --max-flips {args.max_flips}"
        say(f"error: {flips} of {images} answers changed, {limit}")
        return 1
    return code


def run_benchmark(path: str, args: argparse.Namespace) -> int:
    from inference.benchmark import benchmark

    batch_size = args.batch_size or BATCH_SIZE
    with output_stream(args.output) as out:
        figures = benchmark(path, args.threads, args.device, batch_size, IMPORT_SECONDS)
        write_figures(figures, args.format, out)
    return 0


def run_self_test(path: str, args: argparse.Namespace) -> int:
    from inference.self_test import self_test

    result = self_test(Model(path, args.threads, args.device))
    verdict = "passed" if result.passed else "FAILED"
    difference = f"max difference {result.difference:.1e}"
    print(f"self-test {verdict}: {result.samples} golden samples, {difference}")
    return 0 if result.passed else 1


def run_verify(args: argparse.Namespace) -> int:
    from inference.verify import verify

    folder = program_folder()
    if args.model:
        folder = os.path.dirname(os.path.abspath(args.model))
    return verify(folder, args.sums_sha256)


def program_folder() -> str:
    """The folder of this script, or of the archive that it is in."""
    folder = os.path.dirname(os.path.abspath(__file__))
    is_archive = os.path.isfile(folder)
    return os.path.dirname(folder) if is_archive else folder


def warn_of_code(path: str) -> None:
    if path.lower().endswith((".pt", ".pt2")):
        say(f"note: {path} can carry code; unless you trust its source, use .onnx")


def take_first(found, args: argparse.Namespace) -> list:
    """The first files, enough to tell how many threads are of use."""
    return list(itertools.islice(found, args.threads * (args.batch_size or BATCH_SIZE)))


def batch_size_for(model: Model, args: argparse.Namespace, count: int, workers: int) -> int:
    """The batch size that keeps all workers busy. count: of the first files."""
    if model.batch:
        return model.batch
    return max(1, min(args.batch_size or BATCH_SIZE, count // workers))


def check_model(model: Model, path: str, args: argparse.Namespace) -> None:
    """Raise Problem if a model does not fit the command line."""
    if model.batch and args.batch_size and args.batch_size > model.batch:
        raise Problem(f"{path} takes batches of {model.batch}: leave out --batch-size", 2)

    has_images = task_of(model.spec).has_images
    if has_images and args.values:
        raise Problem(f"{path} predicts from images: give at least one PATH", 2)
    if not has_images and not args.values:
        raise Problem(f"{path} predicts from numbers: it takes --values only", 2)

    if args.reject is not None and not model.spec["known"]:
        reason = "does not say how familiar an image looks"
        raise Problem(f"{path} {reason}: --reject cannot be used", 2)


def check_same_classes(models: list[Model], paths: list[str]) -> None:
    """Raise Problem if two models do not have the same classes."""
    old = set(models[0].spec["classes"])
    new = set(models[1].spec["classes"])
    if old != new:
        only_old = f"only {paths[0]} has {sorted(old - new)[:9]}"
        only_new = f"only {paths[1]} has {sorted(new - old)[:9]}"
        raise Problem(f"--compare takes files of the same classes, but {only_old}, {only_new}", 2)


def main(argv: list[str] | None = None) -> int:
    return guarded(run, parse(argv), closed_pipe=0)


if __name__ == "__main__":
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # a shell's background job ignores it
        signal.signal(signal.SIGINT, signal.default_int_handler)
    exit_code = main()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # pressed again while the threads end
    sys.exit(exit_code)
