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
from collections.abc import Iterator

IMPORT_STARTED = time.perf_counter()
try:
    import numpy  # noqa: F401
    import PIL  # noqa: F401
except ImportError as error:  # on a new device: one line instead of a traceback
    sys.exit(f"error: numpy and Pillow are needed ({error}): pip install numpy pillow")

from inference.command_line import Parser, number, say  # noqa: E402
from inference.cpus import usable_cpus  # noqa: E402
from inference.engines import find_model  # noqa: E402
from inference.errors import Problem, guarded, terminable  # noqa: E402
from inference.files import output_stream  # noqa: E402
from inference.finding import find_images, note_files  # noqa: E402
from inference.images import note_seen  # noqa: E402
from inference.limits import MAX_PIXELS, MAX_SIDE, allow_pixels  # noqa: E402
from inference.options import (  # noqa: E402
    add_evaluation_options,
    add_field_options,
    check_model,
    check_options,
    check_same_classes,
    refuse_overwriting,
)
from inference.predict import Model, predict, predict_files  # noqa: E402, F401  predict: for others
from inference.results import write_figures, write_images, write_values  # noqa: E402

IMPORT_SECONDS = time.perf_counter() - IMPORT_STARTED

BATCH_SIZE, TOP_K, COLLECTED = 16, 3, 500  # by default


# --------------------------------------------------------------------------------- the command line
def build_parser() -> Parser:
    parser = Parser(
        description="Predict with a file that step2_export.py wrote.",
        epilog="example: python step3_infer.py --model model.onnx --top-k 3 photos/",
    )
    count = number(int, 1, 999_999)
    share = number(float, 0, 1)

    add = parser.add_argument
    add(
        "paths",
        nargs="*",
        metavar="PATH",
        help="images, directories, globs, or - for stdin: one image, or a stream of JPEGs and PNGs",
    )
    add(
        "--values",
        action="append",
        metavar="X,X,...",
        help="features for a regression model, as -1,0.5; may be repeated",
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
        help="json: one object per line (default: text, or what the name of --output ends with)",
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
    add(
        "--output",
        metavar="FILE",
        help="write to FILE instead of standard output; with --evaluate: write every row there",
    )

    add_field_options(parser)

    group = parser.add_argument_group("instead of predicting")
    group.add_argument(
        "--evaluate",
        action="store_true",
        help="say how good the answers on PATH are, by class folders or --labels",
    )
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
    add_evaluation_options(parser)
    parser.add_argument_group("with --verify").add_argument(
        "--sums-sha256",
        metavar="HEX",
        help="the SHA-256 that SHA256SUMS itself must have",
    )
    return parser


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The arguments with their defaults; exits if one of them has no effect."""
    parser = build_parser()
    args = parser.parse_args(with_values_attached(sys.argv[1:] if argv is None else argv))
    args.format = args.format or format_of(args)
    check_options(parser, args)

    args.device = args.device or "cpu"
    args.format = args.format or "text"
    args.top_k = args.top_k or TOP_K
    args.collect_at_most = args.collect_at_most or COLLECTED
    args.threads = args.threads or usable_cpus()
    args.max_pixels = args.max_pixels or MAX_PIXELS
    allow_pixels(args.max_pixels)
    return args


def with_values_attached(argv: list[str]) -> list[str]:
    """`--values -1,2` as `--values=-1,2`: argparse takes what begins with a minus for an option."""
    attached = []
    for argument in argv:
        is_negative = argument.startswith("-") and argument[1:2] in tuple("0123456789.")
        if attached and attached[-1] == "--values" and is_negative:
            attached[-1] = f"--values={argument}"
        else:
            attached.append(argument)
    return attached


def format_of(args: argparse.Namespace) -> str | None:
    """The format that the name of --output asks for, if it does. What --evaluate writes there are
    rows, whose format is their own."""
    name = (args.output or "").lower()
    if args.evaluate:
        return None
    if name.endswith(".csv"):
        return "csv"
    return "json" if name.endswith((".json", ".jsonl")) else None


# ---------------------------------------------------------------------------------------- the work
def run(args: argparse.Namespace) -> int:
    """Do what the command line asks for and return the exit code. Raises Problem."""
    if args.verify:
        return run_verify(args)
    read = [args.model, args.labels, args.monitor, *(args.compare or []), *args.paths]
    refuse_overwriting(args.output, read, args.collect)
    if args.compare:
        return run_compare(args)
    if args.monitor and not args.paths:
        return run_show_monitor(args)

    path = args.model or find_model(program_folder())
    refuse_overwriting(args.output, [path])
    warn_of_code(path)
    if args.benchmark:
        return run_benchmark(path, args)
    if args.self_test:
        return run_self_test(path, args)
    if args.values:
        return run_values(path, args)
    if args.evaluate:
        return run_evaluate(path, args)
    return run_predict(path, args)


def run_predict(path: str, args: argparse.Namespace) -> int:
    """Find -> decode -> predict -> write."""
    others = []  # files in directories that are not images
    found = find_images(args.paths, others)
    # The pictures of a stream are predicted one by one, as they come.
    first = [] if "-" in args.paths else take_first(found, args)
    workers = max(1, min(args.threads, len(first)))

    model = load(path, args, workers, once=len(first) == 1)
    top_k = min(args.top_k, len(model.spec["classes"]))
    needed = max(top_k, 2) if args.collect else top_k
    watchers, failed = make_watchers(model, args, top_k)
    with contextlib.ExitStack() as stack:
        out = stack.enter_context(output_stream(args.output))
        if "-" in args.paths:
            rows = predict_input(model, args, needed, others)
        else:
            batch_size = batch_size_for(model, args, len(first), workers)
            files = itertools.chain(first, found)
            rows = predict_files(model, files, workers, batch_size, needed)
        stack.enter_context(contextlib.closing(rows))

        for watcher in watchers:
            rows = watcher.watch(rows)
            stack.enter_context(contextlib.closing(rows))
        code = write_images(rows, args.format, top_k, out)
    if any(watcher.failed for watcher in watchers):
        code = 1
    code = max(code, failed)

    note_seen(model.seen, model.spec["ground"])
    note_files("skipped", others, "that Pillow cannot read")
    return code


def predict_input(
    model: Model, args: argparse.Namespace, top_k: int, others: list
) -> Iterator[list[dict]]:
    """What predict_files() yields for paths with - for standard input, row by row."""
    from inference.stream import frames_of_input, predict_stream

    for is_input, paths in itertools.groupby(args.paths, "-".__eq__):
        if is_input:
            frames = frames_of_input(args.every or 1, args.live)
            yield from predict_stream(model, frames, top_k, with_content=bool(args.collect))
        else:
            found = find_images(list(paths), others)
            yield from predict_files(model, found, workers=1, batch_size=1, top_k=top_k)


def make_watchers(model: Model, args: argparse.Namespace, top_k: int) -> tuple[list, int]:
    """What looks at the predictions before they are written, by the options; and the exit code for
    those that cannot begin, which is said: a device must not go blind because its disk is full.

    Each has a generator watch(), which takes and yields lists of rows as predict_files() does, and
    a flag `failed` for work of its own that failed.
    """
    makers = []
    if args.collect:
        from inference.collect import Collector

        makers.append(lambda: Collector(args.collect, args.collect_at_most, model, top_k))
    if args.monitor:
        from inference.monitor import Monitor, note_without_reference

        note_without_reference(model)
        makers.append(lambda: Monitor(model, args.monitor, args.bet_every))

    watchers = []
    failed = 0
    for make in makers:
        try:
            watchers.append(make())
        except Problem as problem:
            say(f"error: {problem}; the predictions go on without it")
            failed = max(failed, problem.code)
    return watchers, failed


def run_evaluate(path: str, args: argparse.Namespace) -> int:
    """Find -> decode -> predict -> judge by the labels -> write."""
    from inference.evaluate import RowsOut, evaluate, note_left_out, read_answers, write_evaluation
    from inference.labels import labels_for

    others = []
    with contextlib.ExitStack() as stack:
        rows_out = None
        if args.output:
            out = stack.enter_context(output_stream(args.output))
            rows_out = RowsOut(out, is_csv=args.output.lower().endswith(".csv"))

        found = find_images(args.paths, others)
        first = take_first(found, args)
        workers = max(1, min(args.threads, len(first)))
        model = load(path, args, workers, once=len(first) == 1)
        classes = model.spec["classes"]
        labels = labels_for(args.labels, classes, args.paths)

        batch_size = batch_size_for(model, args, len(first), workers)
        rows = predict_files(model, itertools.chain(first, found), workers, batch_size, top_k=1)
        stack.enter_context(contextlib.closing(rows))
        answers = read_answers(rows, labels, model, rows_out)

    note_seen(model.seen, model.spec["ground"])
    note_files("skipped", others, "that Pillow cannot read")
    note_left_out(answers, classes)
    if answers.are_errors_only():
        return 1  # each has been said
    figures = evaluate(answers, model, path)
    with output_stream(None) as out:
        write_evaluation(figures, args.format, out)

    if args.min_accuracy is not None and figures["accuracy"] < args.min_accuracy:
        limit = f"--min-accuracy {args.min_accuracy}"
        say(f"error: the accuracy is {figures['accuracy']:.2%}, which is below {limit}")
        return 1
    return 1 if answers.errors else 0


def run_show_monitor(args: argparse.Namespace) -> int:
    from inference.monitor_file import show_monitor

    with output_stream(args.output) as out:
        show_monitor(args.monitor, args.format, out)
    return 0


def run_values(path: str, args: argparse.Namespace) -> int:
    model = Model(path, args.threads, args.device)
    check_model(model, path, args)
    with output_stream(args.output) as out:
        return write_values(model, args.values, args.format, out)


def run_compare(args: argparse.Namespace) -> int:
    from inference.compare import compare_models, count_flips
    from inference.labels import labels_for

    others = []
    found = find_images(args.paths, others)
    first = take_first(found, args)
    workers = max(1, min(args.threads, len(first)))

    models = []
    for path in args.compare:
        warn_of_code(path)
        models.append(load(path, args, workers, once=len(first) == 1))
    check_same_classes(models, args.compare)

    classes = models[0].spec["classes"]
    labels = labels_for(args.labels, classes, args.paths)
    files = itertools.tee(itertools.chain(first, found), len(models))
    with contextlib.ExitStack() as stack:
        out = stack.enter_context(output_stream(args.output))
        results = []
        for model, own_files in zip(models, files, strict=True):
            batch_size = batch_size_for(model, args, len(first), workers)
            rows = predict_files(model, own_files, workers, batch_size, top_k=len(classes))
            results.append(stack.enter_context(contextlib.closing(rows)))

        figures, code = compare_models(models, args.compare, results, labels)
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
    samples = "1 golden sample" if result.samples == 1 else f"{result.samples} golden samples"
    print(f"self-test {verdict}: {samples}, {difference}")
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


def load(path: str, args: argparse.Namespace, workers: int, once: bool) -> Model:
    """The file as the command line wants it, for so many threads that use it. Raises Problem.

    once: for a single image.
    """
    model = Model(path, args.threads // workers, args.device, once=once)
    check_model(model, path, args)
    model.max_pixels = args.max_pixels
    if args.reject is not None:
        model.reject = args.reject
    if args.min_probability is not None:
        model.min_probability = args.min_probability
    return model


def take_first(found, args: argparse.Namespace) -> list:
    """The first files, enough to tell how many threads are of use."""
    return list(itertools.islice(found, args.threads * (args.batch_size or BATCH_SIZE)))


def batch_size_for(model: Model, args: argparse.Namespace, count: int, workers: int) -> int:
    """The batch size that keeps all workers busy. count: of the first files."""
    if model.batch:
        return model.batch
    return max(1, min(args.batch_size or BATCH_SIZE, count // workers))


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    with terminable():
        return guarded(run, args, closed_pipe=0)


if __name__ == "__main__":
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # a shell's background job ignores it
        signal.signal(signal.SIGINT, signal.default_int_handler)
    exit_code = main()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # pressed again while the threads end
    sys.exit(exit_code)
