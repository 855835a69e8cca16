"""Which options of step3 go together, and which fit a model."""

import argparse
import functools
import glob
import os
from collections.abc import Iterator

from inference.command_line import Parser, number
from inference.errors import Problem
from inference.finding import is_image
from inference.predict import Model
from inference.task import task_of

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
        "--labels",
    ],
    "--evaluate": [
        "PATH",
        "--model",
        "--threads",
        "--device",
        "--batch-size",
        "--format",
        "--output",
        "--reject",
        "--min-probability",
        "--max-pixels",
        "--labels",
        "--min-accuracy",
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
        "--every",
        "--live",
        "--collect",
        "--collect-at-most",
        "--monitor",
        "--bet-every",
    ],
    "--monitor": ["--format", "--output"],
}

MOST_NAMED = 9  # classes, in an error

# Options that have an effect on another only.
NEEDS = {"--collect-at-most": "--collect DIR", "--bet-every": "--monitor FILE"}


def add_evaluation_options(parser: Parser) -> None:
    share = number(float, 0, 1)
    add = parser.add_argument_group("with --evaluate and --compare").add_argument
    add(
        "--labels",
        metavar="FILE",
        help="a CSV list of paths and labels (default: the names of class folders)",
    )
    add(
        "--min-accuracy",
        type=share,
        metavar="X",
        help="fail if --evaluate finds a lower accuracy",
    )
    add(
        "--max-flips",
        type=share,
        metavar="X",
        help="fail if --compare finds a larger share of answers changed",
    )


def add_field_options(parser: Parser) -> None:
    count = number(int, 1, 999_999)
    add = parser.add_argument_group("in the field").add_argument
    add(
        "--every",
        type=count,
        metavar="N",
        help="predict one in N of the images that standard input brings",
    )
    add(
        "--live",
        action="store_true",
        help="always take the newest of them, and count those that are left out",
    )
    add(
        "--collect",
        metavar="DIR",
        help="copy the images that are worth a label into DIR/<answer>/: the least certain ones",
    )
    add(
        "--collect-at-most",
        type=count,
        metavar="N",
        help="the best N images of all that were seen (default: 500)",
    )
    add(
        "--monitor",
        metavar="FILE",
        help="keep statistics in FILE and raise an alarm if the images have changed; "
        "without PATH, show what FILE says",
    )
    add(
        "--bet-every",
        type=count,
        metavar="N",
        help="the alarm looks at one image in N (default: derived from how much neighbouring ones "
        "depend on one another)",
    )


def check_options(parser: Parser, args: argparse.Namespace) -> None:
    """Exit with an error if nothing is asked for, or if an option would have no effect."""
    given = []
    for name, value in vars(args).items():
        if value not in (None, False, []):
            given.append("PATH" if name == "paths" else f"--{name.replace('_', '-')}")

    asked = next((name for name in TAKES if name in given), None)
    needs_path = (args.compare or args.evaluate) and not args.paths
    if asked is None or needs_path:
        parser.error(
            "give at least one PATH: an image, a directory or a glob; or --values for a regression"
        )

    for name in given:
        if name != asked and name not in TAKES[asked]:
            parser.error(has_no_effect(name, asked))

    check_together(parser, args, asked, given)


def has_no_effect(name: str, asked: str) -> str:
    """The error for an option that does nothing for what is asked for, and what it goes with."""
    if asked == "--monitor":
        return f"{name} has no effect on --monitor without PATH, which shows its file: leave it out"
    others = [other for other, takes in TAKES.items() if name in takes and other != "PATH"]
    if others:
        return f"{name} has no effect on {asked}: it goes with {' or '.join(others)}"
    return f"{name} has no effect on {asked}, which takes only {' '.join(TAKES[asked])}"


def check_together(parser: Parser, args: argparse.Namespace, asked: str, given: list[str]) -> None:
    """Exit with an error for options that do not go together."""
    for name, needed in NEEDS.items():
        if name in given and needed.split()[0] not in given:
            parser.error(f"{name} needs {needed}")
    if (args.every or args.live) and "-" not in args.paths:
        parser.error("--every and --live are for a stream on standard input: give - as PATH")
    if args.collect:
        refuse_inside(parser, args.collect, args.paths)

    if asked in ("--benchmark", "--compare", "--evaluate", "--monitor") and args.format == "csv":
        parser.error(f"{asked} writes --format text or json, not csv")
    if args.output == "-":
        parser.error("standard output is the default: leave out --output -")
    if asked in ("--compare", "--evaluate") and "-" in args.paths:
        parser.error(f"{asked} takes files, not - for standard input")


def refuse_inside(parser: Parser, directory: str, paths: list[str]) -> None:
    """Exit with an error if images would be collected into a directory that is predicted, or from
    the one that they are collected into.
    """
    target = os.path.join(os.path.realpath(directory), "")
    real = functools.cache(os.path.realpath)  # thousands of files lie in few folders
    for path in paths:
        if os.path.isdir(path) and target.startswith(os.path.join(real(path), "")):
            parser.error(f"--collect {directory} lies in {path}, which is predicted: give another")

        for each in named(path):
            folder = each if os.path.isdir(each) else os.path.dirname(each)
            if os.path.join(real(folder), "").startswith(target):
                parser.error(f"{path} lies in --collect {directory}: give another directory")


def named(path: str) -> Iterator[str]:
    """The files and directories that a PATH names, which may be a glob."""
    if os.path.lexists(path):
        yield path
    else:
        yield from glob.iglob(path, recursive=True)


def refuse_overwriting(
    output: str | None, inputs: list[str | None], collect: str | None = None
) -> None:
    """Raise Problem if --output names a file that is read, or an image below such a directory, or a
    file in the directory of --collect."""
    if output is None:
        return
    place = os.path.realpath(output)
    if collect and place.startswith(os.path.join(os.path.realpath(collect), "")):
        raise Problem(f"--output {output} lies in --collect {collect}: give another file", 2)

    is_there = os.path.isfile(output)
    for path in inputs:
        if path is None:
            continue
        found = named(path) if is_there else [path]
        for each in map(os.path.realpath, found):
            is_below = place.startswith(os.path.join(each, "")) and is_image(place) and is_there
            if place == each or is_below:
                reason = f"is read, as {path}" if path != output else "is read"
                raise Problem(f"--output {output} {reason}: give another file", 2)


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
        differences = []
        for path, only in zip(paths, (old - new, new - old), strict=True):
            if only:
                more = ", ..." if len(only) > MOST_NAMED else ""
                named = ", ".join(sorted(only)[:MOST_NAMED])
                differences.append(f"only {path} has {named}{more}")
        reason = "; ".join(differences)
        raise Problem(f"--compare takes files of the same classes, but {reason}", 2)
