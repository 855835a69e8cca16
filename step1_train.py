#!/usr/bin/env python3
"""Step 1 of 3: train a network on a dataset.

    python step1_train.py                              # the bundled digits, a minute on a laptop
    python step1_train.py --dataset cifar10 --epochs 10
    python step1_train.py --data-dir photos --model mobilenet_v3_small --pretrained
    python step1_train.py --dataset linear             # a regression, no images at all
    python step1_train.py --resume                     # continue the last unfinished run
    torchrun --nproc-per-node=4 step1_train.py ...     # four processes, on GPUs if there are any

Writes runs/<name>/ and never over an earlier run:

    checkpoint.pt    the network, its spec, and the state for --resume; torch.load reads it
    config.json      every argument, derived ones included, before the first step
    metrics.csv      a row for each epoch: loss and accuracy on both splits, learning rate, seconds
    summary.json     the result; report.html shows it with its pictures

What the command line leaves open is derived from the dataset and the network, and printed before
work starts. Next: python step2_export.py
"""

import signal
import sys

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports below: no traceback

import argparse
import contextlib
import copy
import math
import os
import time
from typing import NamedTuple

import data
from data.notes import note, silenced
from inference.command_line import Parser, number
from inference.errors import Problem, guarded
from inference.limits import MAX_PIXELS, MAX_SIDE
from training import command_line, listing, recipes


# ------------------------------------------------------------------------------------- command line
def build_parser() -> Parser:
    parser = Parser(
        description="Train a network on a dataset; writes runs/<name>/.",
        epilog="example: python step1_train.py --dataset mnist --epochs 2",
    )
    add_data_options(parser)
    add_own_image_options(parser)
    add_network_options(parser)
    add_training_options(parser)
    add_machine_options(parser)
    return parser


def add_data_options(parser: Parser) -> None:
    add = parser.add_argument_group("data").add_argument
    add(
        "--dataset",
        default="digits",
        metavar="NAME",
        help="name of the dataset, see --list-datasets (default: digits)",
    )
    add(
        "--data-dir",
        metavar="PATH",
        help="your images: a directory of class folders or a CSV file; with --dataset, where its "
        "files are or go (default: data/)",
    )
    add(
        "--image-size",
        type=command_line.image_size,
        metavar="N|HxW",
        help="size of the network's input (default: see data/README.md)",
    )
    add(
        "--fit",
        choices=("stretch", "crop", "letterbox"),
        help="how images get that size (default: crop for your own images if that cuts away "
        "little, else letterbox; stretch for the named datasets)",
    )
    add(
        "--augment",
        nargs="+",
        choices=(*data.AUGMENTATIONS, "none"),
        metavar="A",
        help=f"{', '.join(data.AUGMENTATIONS)}, or none (default: see data/README.md)",
    )
    add(
        "--val-fraction",
        type=number(float, 0, 0.9, above=True),
        metavar="X",
        help="hold out this part of the training split and keep the epoch that does best on it",
    )
    add(
        "--patience",
        type=number(int, 1),
        metavar="N",
        help="stop after N epochs without a better one",
    )
    add(
        "--class-weights",
        choices=("balanced",),
        help="make rare classes count as much as frequent ones",
    )
    add("--list-datasets", action="store_true", help="list the datasets and exit")


def add_own_image_options(parser: Parser) -> None:
    add = parser.add_argument_group("your own images (folder, csv)").add_argument
    add(
        "--cache-dir",
        metavar="DIR",
        help="directory for decoded images (default: .threestep beside the data)",
    )
    add("--strict", action="store_true", help="fail on unreadable files instead of skipping them")
    add(
        "--max-pixels",
        type=number(int, 1, MAX_SIDE**2),
        metavar="N",
        help=f"skip images of more pixels (default: {MAX_PIXELS:,})",
    )
    add(
        "--test-csv",
        metavar="FILE",
        help="CSV file of the test split (default: hold out a part of each class)",
    )
    add(
        "--image-root",
        metavar="DIR",
        help="directory that paths are relative to (default: the CSV file's)",
    )
    add(
        "--image-column",
        metavar="NAME",
        help="column of the paths (default: filepath, filename, path, image, ...)",
    )
    add(
        "--label-column",
        metavar="NAME",
        help="column of the labels (default: label, class, target, ...)",
    )
    add(
        "--group-column",
        metavar="NAME",
        help="column that says which images belong together, on one side of every split (default: "
        "group, if there is one)",
    )
    add(
        "--group-by",
        type=command_line.group_by,
        metavar="REGEX",
        help="the same by the paths: the first bracket names the group; none: no groups (default: "
        "the folders inside class folders, or --group-column)",
    )


def add_network_options(parser: Parser) -> None:
    add = parser.add_argument_group("network").add_argument
    add(
        "--model",
        metavar="NAME",
        help="name of the network, see --list-models; timm/NAME for one of timm (default: "
        "airbench, or mobilenet_v3_small for few photos if this machine has its weights; linear "
        "for --dataset linear)",
    )
    add(
        "--width",
        type=number(float, 0, recipes.MOST_WIDTH, above=True),
        metavar="X",
        help="factor for the channels of airbench",
    )
    add(
        "--hidden",
        type=number(int, 1),
        nargs="*",
        metavar="N",
        help="sizes of the hidden layers of mlp (default: 128)",
    )
    add(
        "--dropout",
        type=number(float, 0, 0.99),
        metavar="P",
        help="dropout of mlp (default: 0) and mynet (default: 0.1)",
    )
    add(
        "--activation",
        choices=recipes.ACTIVATIONS,
        metavar="NAME",
        help=f"of tiny: {', '.join(recipes.ACTIVATIONS)} (default: hardswish)",
    )
    add(
        "--pretrained",
        nargs="?",
        const="default",
        metavar="FILE",
        help="start from torchvision's or timm's default weights, or from a file of weights",
    )
    add("--freeze-backbone", action="store_true", help="train the last layer only, for small data")
    add(
        "--list-models",
        nargs="?",
        const="",
        metavar="PATTERN",
        help="list the networks and exit; those of timm by a pattern such as 'timm/*lite*'",
    )


def add_training_options(parser: Parser) -> None:
    title = "training (defaults: a recipe for the network and the dataset)"
    add = parser.add_argument_group(title).add_argument
    add("--epochs", type=number(int, 1), metavar="N", help="passes over the training split")
    add(
        "--minutes",
        type=number(float, 0, above=True),
        metavar="N",
        help="take about so long, all in all: the epochs, and the width of airbench, follow",
    )
    add("--batch-size", type=number(int, 1), metavar="N", help="images per step")
    add(
        "--optimizer",
        choices=tuple(recipes.OPTIMIZERS),
        metavar="NAME",
        help=", ".join(recipes.OPTIMIZERS),
    )
    add("--lr", type=number(float, 0, above=True), metavar="X", help="highest learning rate")
    add(
        "--momentum",
        type=number(float, 0, 0.9999),
        metavar="X",
        help="momentum of sgd and muon (Nesterov)",
    )
    add(
        "--weight-decay",
        type=number(float, 0),
        metavar="X",
        help="weight decay; biases and norms have none",
    )
    add(
        "--schedule",
        choices=recipes.SCHEDULES,
        metavar="NAME",
        help=f"course of the learning rate: {', '.join(recipes.SCHEDULES)}",
    )
    add(
        "--layer-decay",
        type=number(float, 0, 1, above=True),
        metavar="X",
        help="learning rate of the first layer, as a part of the last one's; those between follow "
        "(default: 0.1 with --pretrained, else 1)",
    )
    add(
        "--batch-norm",
        choices=recipes.BATCH_NORMS,
        help="normalise by the statistics of each batch, or by those that came with the weights "
        "(default: frozen with --pretrained, else trained)",
    )
    add(
        "--keep-start",
        type=number(float, 0, 1),
        metavar="PART",
        help="part of the result that the weights make up which training began with (default: 0.6 "
        "or less with --pretrained, the fewer images the more, else 0)",
    )
    add(
        "--label-smoothing",
        type=number(float, 0, 0.99),
        metavar="X",
        help="label smoothing of the training loss",
    )
    add(
        "--calibration",
        choices=recipes.CALIBRATIONS[1:],
        metavar="HOW",
        help="images that calibrate the probabilities: held-out, twin (those that a second "
        "network has not seen), cross-fit (all, with --pretrained) or none (default: see "
        "deploy/README.md)",
    )


def add_machine_options(parser: Parser) -> None:
    add = parser.add_argument_group("machine and run").add_argument
    add(
        "--precision",
        choices=("auto", "fp32", "bf16"),
        default="auto",
        help="precision of training; exports are fp32 (default: auto)",
    )
    add(
        "--device",
        default="auto",
        metavar="NAME",
        help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)",
    )
    add(
        "--threads",
        type=number(int, 1, 1024),
        metavar="N",
        help="number of CPU threads (default: as many as are free)",
    )
    add(
        "--seed",
        type=number(int, 0, 2**31),
        default=0,
        metavar="N",
        help="random seed; CPU runs are reproducible (default: 0)",
    )
    add(
        "--sync-batchnorm",
        action="store_true",
        help="with torchrun on GPUs: share batch norm among the processes",
    )
    add("--name", help="name of the run (default: <dataset>-<model>, with -2, -3, ... if taken)")
    add(
        "--resume",
        nargs="?",
        const="",
        metavar="RUN",
        help="continue a run to the very same result (default: the newest unfinished run); "
        "--epochs may be raised",
    )
    add(
        "--checkpoint-every",
        type=command_line.checkpoint_interval,
        metavar="N|Nm",
        help="save within an epoch as well: every N steps, or every N minutes",
    )
    add("--quiet", action="store_true", help="print the result only")


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, dict]:
    """All arguments of the command line, and the options given explicitly, by name."""
    parser = build_parser()
    args = parser.parse_args(argv)

    # Parsed again without defaults: what is not None was given.
    undefined = argparse.Namespace(**dict.fromkeys(vars(args)))
    explicit = parser.parse_args(argv, undefined)
    given = {name: value for name, value in vars(explicit).items() if value is not None}
    return args, given


def asks_for_list(args: argparse.Namespace) -> bool:
    return args.list_datasets or args.list_models is not None


def answer_at_once(args: argparse.Namespace, given: dict) -> int | None:
    """Do what needs no torch, which loads for seconds: the exit code, None to go on.

    Raises Problem.
    """
    if asks_for_list(args):
        return listing.list_names(args)
    if args.resume is None:
        recipes.resolve(args, given)
    return None


if __name__ == "__main__" and os.environ.get("RANK", "0") == "0":  # torchrun: one process is enough
    code = guarded(answer_at_once, *parse(None), closed_pipe=0)
    if code is not None:
        sys.exit(code)

# ruff: noqa: E402
import numpy as np
import torch

import model
from data import doctor, shape
from data.split import Split, make_splits
from report import drawing, page
from training import (
    balance,
    batch_norm,
    calibration,
    console,
    cpu,
    cutmix,
    fine_tuning,
    minutes,
    optimizers,
    processes,
    runs,
    saliency,
    weights,
)
from training.calibration import CrossFitted
from training.checkpoints import Saver, Unsaved, restore
from training.describe import describe_run, with_result
from training.evaluation import accuracy_to_compare, criterion, evaluate
from training.features import (
    LastLayer,
    Trainee,
    WholeNetwork,
    choose_trainee,
    is_regression,
    set_to_zero,
    start_head,
)
from training.network import build_deployable, with_fitting_precision
from training.processes import Machine, Processes, Signals, Stopped
from training.progress import (
    Evaluation,
    Metrics,
    Progress,
    Tally,
    is_average,
    is_kept_head,
    is_out_of_patience,
    keep_best,
    record_epoch,
)
from training.result import Outcome, find_warnings, summarise, summarise_classes
from training.suspects import find_suspects

SAMPLES = 25  # augmented images in the report


# ----------------------------------------------------------------------------------------- training
def train(
    trainee: Trainee,
    optimizer: torch.optim.Optimizer,
    settings: argparse.Namespace,
    machine: Machine,
    progress: Progress,
    saver: Saver,
    start: dict[str, torch.Tensor] | None,
) -> Evaluation | None:
    """Train for the epochs that are left; evaluate and save after each.

    start: the weights that training began with, if the last epoch goes back towards them.
    Returns the last evaluation where it is the result: on the test split, after an epoch. Raises
    Problem, and Stopped after a signal.
    """
    # The test split never selects: with a validation split, it is not looked at before the end.
    watched = "val" if "val" in trainee.splits else "test"
    network = processes.parallel(trainee.network, machine, settings.sync_batchnorm)
    steps = steps_per_epoch(trainee, settings, machine)
    momentum = batch_norm.lagging_momentum(
        trainee.deployable.network, settings.batch_norm, settings.epochs * steps
    )
    evaluated = None

    if progress.epoch <= settings.epochs:
        if momentum is not None:
            console.note_lagging(settings.epochs * steps, momentum)
        console.print_header(watched)
    for epoch in range(progress.epoch, settings.epochs + 1):
        if is_out_of_patience(progress, settings.patience):
            break

        trained = train_epoch(network, optimizer, trainee, settings, machine, progress, saver)
        if start and epoch == settings.epochs:
            optimizers.move_weights(trainee.deployable.network, start, settings.keep_start)
        if momentum is not None:
            batch_norm.estimate_anew(trainee, settings, machine, progress)
        evaluated = evaluate_epoch(trainee, watched, settings, machine, progress)

        if watched == "val":
            accuracy = accuracy_to_compare(trainee, evaluated)
            keep_best(progress, trainee.deployable.network, accuracy, evaluated.loss)
        rate = settings.lr * optimizers.rate_at(settings, epoch, 0, steps)
        record_epoch(progress, watched, trained, evaluated, rate)

        test_accuracy = evaluated.accuracy if watched == "test" else None
        saver.save(trainee.deployable.network, optimizer, progress, test_accuracy)
        console.print_row(progress.rows[-1], watched, settings.epochs)
        saver.stop_if_asked()
    return evaluated if watched == "test" else None


def train_epoch(
    network: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    trainee: Trainee,
    settings: argparse.Namespace,
    machine: Machine,
    progress: Progress,
    saver: Saver,
) -> Metrics:
    """Train for an epoch, or for what a resumed run has left of it.

    network: the trainee's, as several processes run it. Returns what was measured while training.
    Raises Problem, and Stopped after a signal.
    """
    cpu.give_back_memory()  # what the last epoch left in holes of the heap
    optimizers.train_mode(trainee.deployable.network, settings.batch_norm)

    split = trainee.splits["train"]
    steps = steps_per_epoch(trainee, settings, machine)
    tally = Tally(progress, machine.device, is_regression(split))
    log_priors = None
    if settings.class_weights:
        log_priors = balance.log_priors(split, trainee.classes, machine.device)
    batches = split.shuffled(
        settings.batch_size,
        settings.augment,
        progress.epoch,
        settings.seed,
        done=progress.steps,
        share=machine.processes.share,
    )

    bar = console.progress_bar(batches, progress, settings.epochs, steps)
    for images, labels, batch_size in bar:
        # What is random in a step depends on seed, epoch and step alone, so that a run can be
        # resumed at any step.
        machine.seed(settings.seed, progress.epoch, progress.steps)
        rate = optimizers.rate_at(settings, progress.epoch, progress.steps, steps)
        optimizers.set_rate(optimizer, rate)

        mixed = cutmix.mix(images) if "cutmix" in settings.augment else None
        if mixed:
            images = mixed.images

        with machine.autocast():
            outputs = network(trainee.normalise(images))  # [batch, classes]
        losses = criterion(outputs, labels, settings.label_smoothing, log_priors)  # [batch]
        if mixed:
            others = labels[mixed.others]
            of_others = criterion(outputs, others, settings.label_smoothing, log_priors)
            losses = losses.lerp(of_others, mixed.share)

        # The mean over the whole batch: DistributedDataParallel averages over the processes.
        loss = losses.sum() * machine.processes.count / batch_size

        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

        tally.add(losses, outputs, labels)
        progress.steps += 1

        # Reading a number from a GPU waits for it, and so is done rarely there.
        if machine.device.type == "cpu" or progress.steps % 50 == 0 or progress.steps == steps:
            tally.refuse_infinite_loss(progress, optimizer, settings.lr)
            done = (progress.epoch - 1) * steps + progress.steps
            saver.save_or_stop(trainee.deployable.network, optimizer, progress, tally, done)

    measured = tally.metrics(machine.processes)
    progress.seconds = tally.seconds()
    return measured


def steps_per_epoch(trainee: Trainee, settings: argparse.Namespace, machine: Machine) -> int:
    """How many batches an epoch has, over all processes."""
    return trainee.splits["train"].count_batches(settings.batch_size, machine.processes.count)


# --------------------------------------------------------------------------------------- evaluation
def evaluate_epoch(
    trainee: Trainee,
    watched: str,
    settings: argparse.Namespace,
    machine: Machine,
    progress: Progress,
) -> Evaluation:
    """Evaluate a split after an epoch, whose seconds grow by it.

    Raises Problem if the loss is not finite.
    """
    started = time.perf_counter()
    split = trainee.splits[watched]
    if progress.epoch == settings.epochs:
        evaluated = evaluate(trainee, split, machine)  # the result is measured in fp32
    else:
        with machine.autocast():
            evaluated = evaluate(trainee, split, machine)

    if not math.isfinite(evaluated.loss):
        reason = f"the loss on the {watched} split became {evaluated.loss}"
        raise Problem(f"{reason}: try a smaller --lr")
    progress.seconds += time.perf_counter() - started
    return evaluated


# --------------------------------------------------------------------------------- data and network
def load_dataset(settings: argparse.Namespace, checkpoint: dict | None) -> data.Dataset:
    """Load the dataset of the settings. Raises Problem, also for an unknown network.

    checkpoint: of the run that goes on, whose classes keep their order.
    """
    try:
        input_sizes = weights.input_sizes(settings.model)
    except ValueError as error:
        raise Problem(error, 2) from None

    return data.load(
        settings.dataset,
        settings.data_dir,
        input_sizes=input_sizes,
        classes=checkpoint["training"]["data"]["classes"] if checkpoint else None,
        seed=settings.seed,
        **data_options(settings),
    )


def data_options(settings: argparse.Namespace) -> dict:
    """The settings that say how one's own images are read, by the name of the option."""
    names = ("image_size", "fit", *data.OPTIONS)
    return {name: getattr(settings, name) for name in names if name != "seed"}


# ------------------------------------------------------------------------------------------- result
def with_best_epoch(trainee: Trainee, progress: Progress) -> Trainee:
    """What the run ends with: the epoch that did best on the validation split, if there is one."""
    if progress.best is None:
        return trainee
    deployable = copy.deepcopy(trainee.deployable)
    deployable.network.load_state_dict(progress.best["state_dict"])
    return trainee.with_network(deployable, trainee.splits)


class Chosen(NamedTuple):
    """What a run ends with, and what calibrates it: a twin, or the logits [n, classes] of
    cross-fitting. seconds_of_others: spent on training other networks for that.
    """

    trainee: Trainee
    twin: Trainee | None = None
    logits: torch.Tensor | None = None
    seconds_of_others: float = 0.0


def choose_result(
    trainee: Trainee,
    dataset: data.Dataset,
    settings: argparse.Namespace,
    machine: Machine,
    progress: Progress,
    saver: Saver,
) -> Chosen:
    """Train the other networks that the calibration takes, and choose what the run ends with.

    Raises Problem, and Stopped after a signal.
    """
    final = with_best_epoch(trainee, progress)
    if settings.calibration == "cross-fit":
        if isinstance(final, LastLayer):
            crossed = cross_fit_last_layers(final, settings, machine, saver)
        else:
            crossed = cross_fit_networks(final, dataset, settings, machine, saver)
        final, logits = fine_tuning.choose_result_by_folds(
            final, crossed, progress, dataset, settings, machine
        )
        return Chosen(final, logits=logits, seconds_of_others=crossed.seconds)

    twin = None
    seconds = 0.0
    if settings.calibration == "twin":
        twin, seconds = train_twin(trainee, dataset, settings, machine, saver)
    final, twin = fine_tuning.choose_result(final, twin, progress, dataset, settings, machine)
    return Chosen(final, twin, seconds_of_others=seconds)


def calibrate(
    chosen: Chosen, images: Split, settings: argparse.Namespace, machine: Machine
) -> calibration.Calibration | None:
    """Calibrate the network that a run ends with, as its settings want it, in the first process.

    images: of the training split, whatever is trained. Raises Problem.
    """
    if machine.processes.rank > 0 or settings.calibration == "none":
        return None
    trainee = chosen.trainee
    if chosen.logits is not None:
        return calibration.calibrate_by_cross_fitting(trainee, chosen.logits, images)
    if chosen.twin:
        return calibration.calibrate_by_twin(trainee, chosen.twin, images)
    if settings.calibration == "validation":
        held_out = trainee.splits["val"]
        source = "the validation split"
    else:
        held_out = trainee.splits["held-out"]
        source = "a part of the training split, held out"
    return calibration.calibrate_on_held_out(trainee, held_out, source, images)


def cross_fit_last_layers(
    trainee: LastLayer, settings: argparse.Namespace, machine: Machine, saver: Saver
) -> CrossFitted:
    """Train last layers like the run's, each without a fold of the images, and ask them about it.

    Raises Problem, and Stopped after a signal.
    """
    train_split = trainee.splits["train"]
    logits = torch.zeros(len(train_split), trainee.classes)
    seconds = 0.0
    saver = Unsaved(**vars(saver))
    for rows, splits in calibration.splits_of_folds(train_split, settings.seed):
        other = trainee.with_network(copy.deepcopy(trainee.deployable), splits)
        set_to_zero(other.network)  # it has seen the fold
        start_head(other, settings)

        optimizer = optimizers.make_optimizer(other.deployable.network, settings)
        progress = Progress()
        with console.training_other("last layer"):
            evaluated = train(other, optimizer, settings, machine, progress, saver, start=None)
        logits[rows] = torch.from_numpy(evaluated.outputs)
        seconds += progress.elapsed
    return CrossFitted(logits, seconds)


def cross_fit_networks(
    trainee: WholeNetwork,
    dataset: data.Dataset,
    settings: argparse.Namespace,
    machine: Machine,
    saver: Saver,
) -> CrossFitted:
    """Train networks like the run's, each without a fold of the images and for as long as a twin,
    and ask them about it.

    Raises Problem, and Stopped after a signal.
    """
    epochs = calibration.epochs_of_twin(settings)
    settings = argparse.Namespace(**{**vars(settings), "epochs": epochs})

    untrained = build_deployable(settings, dataset, None, machine)
    train_split = trainee.splits["train"]
    logits = torch.zeros(len(train_split), trainee.classes)
    heads = torch.zeros_like(logits)
    like_average = torch.zeros_like(logits)
    average = trainee.with_network(copy.deepcopy(trainee.deployable), trainee.splits)
    networks = 1
    seconds = 0.0
    saver = Unsaved(**vars(saver))

    for rows, splits in calibration.splits_of_folds(train_split, settings.seed):
        other = trainee.with_network(copy.deepcopy(untrained), splits)
        network = other.deployable.network
        with machine.processes.first_of_each_machine_first():
            start_head(other, settings)
        start = copy.deepcopy(network.state_dict())
        heads[rows] = torch.from_numpy(evaluate(other, splits["test"], machine).outputs)

        optimizer = optimizers.make_optimizer(network, settings)
        progress = Progress()
        with console.training_other(f"network {networks} of {calibration.FOLDS}"):
            evaluated = train(other, optimizer, settings, machine, progress, saver, start)
        logits[rows] = torch.from_numpy(evaluated.outputs)
        seconds += progress.elapsed

        networks += 1
        weights_now = network.state_dict()
        optimizers.move_weights(average.deployable.network, weights_now, 1 / networks)
        optimizers.move_weights(network, start, 1 - calibration.DISTANCE_OF_AVERAGE)
        nearer = evaluate(other, splits["test"], machine)
        like_average[rows] = torch.from_numpy(nearer.outputs)
    return CrossFitted(logits, seconds, heads, average, like_average)


def train_twin(
    trainee: Trainee,
    dataset: data.Dataset,
    settings: argparse.Namespace,
    machine: Machine,
    saver: Saver,
) -> tuple[Trainee, float]:
    """Train another network like the first, on a part of its images; it can be resumed, too.

    saver: of the first. Returns the twin, and the seconds that its training took. Raises Problem,
    and Stopped after a signal.
    """
    twin_dir, checkpoint = machine.processes.from_first(lambda: runs.begin_twin(saver.run_dir))
    epochs = calibration.epochs_of_twin(settings)
    settings = argparse.Namespace(**{**vars(settings), "epochs": epochs})

    deployable = build_deployable(settings, dataset, checkpoint, machine)
    train_split = trainee.splits["train"]
    splits = calibration.splits_of_twin(train_split, settings.seed, dataset.classes)
    twin = trainee.with_network(deployable, splits)
    if not checkpoint:
        with machine.processes.first_of_each_machine_first():
            start_head(twin, settings)

    start = fine_tuning.weights_at_start(twin, dataset, settings, machine, checkpoint)
    optimizer = optimizers.make_optimizer(deployable.network, settings)
    progress = restore(checkpoint, optimizer, machine.processes.rank)
    saver = Saver(
        run_dir=twin_dir,
        spec=describe_run(settings, dataset, deployable),
        fingerprint=dataset.fingerprint,
        machine=machine,
        signals=saver.signals,
        interval=settings.checkpoint_every,
    )
    with console.training_other("twin"):
        train(twin, optimizer, settings, machine, progress, saver, start)
    return twin, progress.elapsed


def write_result(
    outcome: Outcome,
    dataset: data.Dataset,
    splits: dict[str, Split],
    settings: argparse.Namespace,
    progress: Progress,
    saver: Saver,
) -> None:
    """Write summary.json and report.html, and print what the run has reached. splits: of images."""
    summary = summarise(settings, progress, outcome)
    unequal = False
    if dataset.has_images:
        kept = summary["epoch_kept"]
        trained = 0.0  # unknown of a fitted head that was kept
        if kept > 0:
            trained = progress.rows[kept - 1]["train_accuracy"]
        summary |= summarise_classes(dataset, outcome)
        summary["warnings"] = find_warnings(dataset, outcome, trained)
        unequal = balance.is_unequal(splits["train"], len(dataset.classes))
    runs.write_json(saver.run_dir, runs.SUMMARY, summary)
    write_pictures(outcome, dataset, splits, settings, progress, saver)
    runs.tidy(saver.run_dir)

    if settings.dataset == "linear" and settings.model == "linear":
        console.print_coefficients(outcome.deployable.network)
    console.print_result(saver.run_dir, dataset, summary, unequal)


def write_pictures(
    outcome: Outcome,
    dataset: data.Dataset,
    splits: dict[str, Split],
    settings: argparse.Namespace,
    progress: Progress,
    saver: Saver,
) -> None:
    """Draw a finished run's pictures and write its report.html. Raises CannotWrite."""
    cpu.give_back_memory()
    shown = drawing.Result(
        spec=with_result(saver.spec, outcome.evaluated.accuracy),
        rows=progress.rows,
        labels=dataset.test_labels,
        outputs=outcome.outputs,
    )
    if dataset.has_images:
        shown.images = dataset.test_images
        shown.duplicates = dataset.findings.pairs
        shown.looked = saliency.examples(
            outcome.deployable,
            splits["test"].images,
            dataset.test_labels,
            outcome.outputs,
            dataset.classes,
        )
        shown.suspects = find_suspects(saver.run_dir, dataset, outcome.outputs, outcome.calibration)
        shown.augmented = augmented_samples(splits["train"], settings)

    try:
        try:
            drawing.draw_run(saver.run_dir, shown)
        except ImportError as error:
            note(f"no pictures without matplotlib ({error}); pip install matplotlib")
        page.write_report(saver.run_dir, runs.RUNS, runs.EXPORTS)
    except OSError as error:
        reason = error.strerror or error
        note(f"the run is complete, but its report cannot be written: {reason}")


def augmented_samples(train: Split, settings: argparse.Namespace) -> tuple[np.ndarray, np.ndarray]:
    """Some training images as training sees them, but not mixed by cutmix: uint8 [n, H, W, C], and
    their labels [n].
    """
    batches = train.shuffled(SAMPLES, settings.augment, epoch=1, seed=settings.seed)
    images, labels, _ = next(batches)
    return images.cpu().numpy(), labels.cpu().numpy()


# --------------------------------------------------------------------------------------------- main
def train_and_report(args: argparse.Namespace, given: dict) -> int:
    """Step 1 in this process, or in each of torchrun's. Returns the exit code; raises Problem."""
    deadline = time.perf_counter() + 60 * (args.minutes or 0)  # what --minutes asks for
    cpu.keep_freed_memory()
    with processes.joined() as group, contextlib.ExitStack() as stack:
        if args.resume is None:
            settings = recipes.resolve(args, given)
            run_dir = None
            checkpoint = None
        else:
            settings, run_dir, checkpoint = resume(args, given, group, stack)
        stack.enter_context(silenced(settings.quiet or group.rank > 0))

        if args.resume is None:
            announce_dataset(settings, args, group)
            settings = group.from_first(lambda: better_start(settings, args, given))
        with group.first_of_each_machine_first():
            dataset = load_dataset(settings, checkpoint)
        if checkpoint:
            data.refuse_changes(run_dir, checkpoint["training"]["data"], dataset.fingerprint)
        if run_dir is not None:
            recipes.check_resumed(settings, dataset, run_dir)

        traits = model.traits(settings.model)
        if run_dir is None:
            settings = recipes.adapt_to_images(settings, given, dataset, traits)
        dataset = shape.with_unseen(dataset, settings.image_size, settings.fit)
        settings.threads, threads_reason = cpu.set_threads(given.get("threads"), settings.threads)
        dataset = doctor.examined(dataset, flips="flip" in settings.augment)
        if run_dir is None:
            settings = recipes.heed_mirror(settings, given, dataset)

        machine = processes.choose_machine(settings, group)
        machine = with_fitting_precision(machine, settings, dataset)
        trainee, splits = put_together(settings, dataset, checkpoint, machine, deadline)

        if run_dir is None:
            run_dir = group.from_first(lambda: stack.enter_context(runs.claimed(settings)))
        stack.enter_context(runs.removed_if_empty(run_dir, group.rank))
        if group.rank == 0:
            write_config(run_dir, settings, machine)
        console.print_settings(settings, dataset, trainee, machine, run_dir, threads_reason)
        return complete(trainee, splits, dataset, settings, machine, run_dir, checkpoint)


def put_together(
    settings: argparse.Namespace,
    dataset: data.Dataset,
    checkpoint: dict | None,
    machine: Machine,
    deadline: float,
) -> tuple[Trainee, dict[str, Split]]:
    """The network and the data, ready to be trained; the splits of images, by name.

    deadline: by time.perf_counter(), if --minutes was given; the width of the network and the
    epochs that follow from it are put into the settings. Raises Problem.
    """
    group = machine.processes
    splits = make_splits(dataset, settings, machine.device)
    if not checkpoint:
        settings.width = group.from_first(
            lambda: minutes.choose_width(deadline, dataset, splits, settings, machine)
        )

    deployable = build_deployable(settings, dataset, checkpoint, machine)
    with group.first_of_each_machine_first():
        trainee = choose_trainee(splits, deployable, settings, len(dataset.classes))
        if not checkpoint:
            start_head(trainee, settings)

    is_last_layer = isinstance(trainee, LastLayer)
    if settings.calibration == "cross-fit" and settings.freeze_backbone and not is_last_layer:
        settings.calibration = recipes.calibration_of_whole(len(splits["train"]))
    if not checkpoint:
        calibration.refuse_too_few(trainee.splits, settings)
        settings.epochs = group.from_first(
            lambda: minutes.choose_epochs(deadline, trainee, settings, machine)
        )
    return trainee, splits


def complete(
    trainee: Trainee,
    splits: dict[str, Split],
    dataset: data.Dataset,
    settings: argparse.Namespace,
    machine: Machine,
    run_dir: str,
    checkpoint: dict | None,
) -> int:
    """Train from the checkpoint on, or from the start, to the result. Returns the exit code.

    splits: of images, whatever is trained. Raises Problem.
    """
    group = machine.processes
    network = trainee.deployable.network
    start = fine_tuning.weights_at_start(trainee, dataset, settings, machine, checkpoint)
    optimizer, progress = go_on(trainee, settings, machine, checkpoint)
    signals = Signals()
    saver = Saver(
        run_dir=run_dir,
        spec=describe_run(settings, dataset, trainee.deployable),
        fingerprint=dataset.fingerprint,
        machine=machine,
        signals=signals,
        interval=settings.checkpoint_every,
    )
    # A signal is noted until the next place to stop; once the result is there, it is written.
    with signals:
        try:
            evaluated = train(trainee, optimizer, settings, machine, progress, saver, start)
            chosen = choose_result(trainee, dataset, settings, machine, progress, saver)
            saver.stop_if_asked()
        except Stopped as stop:
            if group.rank == 0:
                console.print_how_to_resume(progress, run_dir)
            group.wait()  # torchrun ends all processes as soon as one has ended
            return 128 + stop.signal

        final = chosen.trainee
        if evaluated is None or progress.best:
            evaluated = evaluate(final, final.splits["test"], machine)
        calibrated = calibrate(chosen, splits["train"], settings, machine)
        show_what_is_kept(progress, settings)
        if calibrated:
            saver = saver.with_calibration(calibrated)
        if progress.best or calibrated:
            saver.save(network, optimizer, progress, evaluated.accuracy)

        if group.rank == 0:
            seconds = progress.elapsed + chosen.seconds_of_others
            outcome = Outcome(final.deployable, evaluated, calibrated, seconds)
            write_result(outcome, dataset, splits, settings, progress, saver)
    return 0


def show_what_is_kept(progress: Progress, settings: argparse.Namespace) -> None:
    """Say which network is the result, if it is not that of the last epoch."""
    if is_average(progress):
        others = "its twin" if settings.calibration == "twin" else "those that calibrate it"
        console.show(f"the result is the average of the network and {others}, weight by weight")
    elif progress.best and not is_kept_head(progress):
        best = progress.best["epoch"]
        console.show(f"epoch {best} did best on the validation split and is kept")


def go_on(
    trainee: Trainee, settings: argparse.Namespace, machine: Machine, checkpoint: dict | None
) -> tuple[torch.optim.Optimizer, Progress]:
    """The optimizer and the progress of the checkpoint, after saying where it goes on, or new ones.

    Raises Problem.
    """
    optimizer = optimizers.make_optimizer(trainee.deployable.network, settings)
    progress = restore(checkpoint, optimizer, machine.processes.rank)
    if not checkpoint:
        return optimizer, progress

    if is_kept_head(progress) or is_average(progress):
        progress.best = None  # to be found anew after what follows
    rate = optimizers.rate_at(
        settings, progress.epoch, progress.steps, steps_per_epoch(trainee, settings, machine)
    )
    epochs_before = checkpoint["arguments"]["epochs"]
    console.print_resumed(progress, settings, epochs_before, settings.lr * rate)
    return optimizer, progress


def resume(
    args: argparse.Namespace, given: dict, group: Processes, stack: contextlib.ExitStack
) -> tuple[argparse.Namespace, str, dict | None]:
    """Lock and read the run to resume; returns its settings, directory and checkpoint.

    Raises Problem.
    """
    run_dir = group.from_first(lambda: runs.find(args.resume, unfinished=True))
    if group.rank == 0:
        stack.enter_context(runs.locked(run_dir))
        runs.remove_leftovers(run_dir)

    arguments, checkpoint = group.from_first(lambda: runs.read(run_dir))
    is_finished = runs.is_finished(run_dir)
    settings = recipes.resolve_resumed(args, given, arguments, run_dir, is_finished)
    return settings, run_dir, checkpoint


def announce_dataset(
    settings: argparse.Namespace, args: argparse.Namespace, group: Processes
) -> None:
    """Refuse a name that is taken, and say what the data was taken for, before it is read.

    Raises Problem.
    """
    if settings.name:
        group.from_first(lambda: runs.refuse_taken(settings.name))
    if settings.dataset != args.dataset:
        note(f"taking {settings.data_dir} as --dataset {settings.dataset}")


def better_start(
    settings: argparse.Namespace, args: argparse.Namespace, given: dict
) -> argparse.Namespace:
    """The settings for a pretrained network, if the command line leaves it open, there are few
    photos, and this machine has its weights; else the settings as they are.

    given: the options given explicitly, by name. Raises Problem.
    """
    if not recipes.leaves_network_open(settings, given):
        return settings
    found = weights.cached_start()
    if found is None:
        return settings

    name, path = found
    count, size = data.survey(settings.dataset, settings.data_dir, **data_options(settings))
    if not recipes.are_few_photos(count, size):
        return settings

    note(
        f"{count:,} photos are few to start from nothing: starting from the weights of {name} in "
        f"{path} (--model airbench starts from nothing)"
    )
    args = argparse.Namespace(**{**vars(args), "model": name, "pretrained": "default"})
    return recipes.resolve(args, given)


def write_config(run_dir: str, settings: argparse.Namespace, machine: Machine) -> None:
    """Write config.json: the settings, and the machine that was chosen. Raises CannotWrite."""
    config = {
        **vars(settings),
        "run": run_dir,
        "device_used": str(machine.device),
        "precision_used": "bf16" if machine.dtype else "fp32",
    }
    runs.write_json(run_dir, runs.CONFIG, config)


def main(argv: list[str] | None = None) -> int:
    args, given = parse(argv)
    if asks_for_list(args):
        return guarded(listing.list_names, args, closed_pipe=0)
    return guarded(train_and_report, args, given)


if __name__ == "__main__":
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main())
