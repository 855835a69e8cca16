"""What step1 prints: the settings, a table of the epochs, how to resume.

Only the first process prints.
"""

import argparse
import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import nn
from tqdm import tqdm

import data
import model
from data import notes
from data.files import count_of
from inference.command_line import say
from training import recipes, runs
from training.features import Trainee
from training.processes import Machine
from training.progress import Progress

FEW_TEST_IMAGES = 100  # the result then says how many they were
LONG_RUN = 50  # epochs; of longer runs, the table has about ROWS
ROWS = 20
LONG_EPOCH = 30  # seconds; each of these has its row: a table without news looks as if it hung
CALIBRATION = {  # in words
    "validation": "on the validation split",
    "held-out": "on the images held out",
    "twin": "with a second network trained for half the epochs",
    "cross-fit": "with five more networks, each trained without a fifth of the images",
}

other = None  # what is trained besides the run's own network, in words: see `training_other`


def show(text: str) -> None:
    """Print to standard output what --quiet leaves out."""
    if not notes.silent:
        print(text, flush=True)


# ----------------------------------------------------------------------------------------- settings
def print_settings(
    settings: argparse.Namespace,
    dataset: data.Dataset,
    trainee: Trainee,
    machine: Machine,
    run_dir: str,
    threads_reason: str,
) -> None:
    """Print the resolved settings before work starts.

    threads_reason: why there are fewer threads than usual, if there are.
    """
    epochs = f"{count_of(settings.epochs, 'epoch')} of batch {settings.batch_size}"
    if settings.minutes:
        epochs += f" (--minutes {settings.minutes:g})"
    rate = f"lr {settings.lr:g} {settings.schedule}"
    decay = f"weight decay {settings.weight_decay:g}"
    augment = " ".join(settings.augment) or "none"

    show(f"dataset   {settings.dataset}: {contents(dataset, trainee)}")
    show(f"network   {description(settings, dataset, trainee.deployable.network)}")
    show(f"training  {epochs}, {settings.optimizer} {rate}, {decay},")
    show(f"          label smoothing {settings.label_smoothing:g}, augment {augment}")
    for line in about_calibration(settings, dataset, trainee):
        show(line)
    show(f"machine   {computer(machine)}, seed {settings.seed}")
    if threads_reason:
        show(f"          ({threads_reason})")
    show(f"run       {run_dir}")


def about_calibration(
    settings: argparse.Namespace, dataset: data.Dataset, trainee: Trainee
) -> list[str]:
    """What calibrates the probabilities, or, of few images, how to get that."""
    if settings.calibration in CALIBRATION:
        how = CALIBRATION[settings.calibration]
        return [f"calibrate {how}", "          (--calibration none: not at all)"]

    # A validation split or many images calibrate by default: who has them has asked for none.
    is_few = len(trainee.splits["train"]) < recipes.FEW_TO_CALIBRATE
    if not dataset.has_images or "val" in trainee.splits or not is_few:
        return []

    offered = "cross-fit" if settings.pretrained else "twin"
    return [
        "calibrate not at all",
        f"          (--calibration {offered}: {CALIBRATION[offered]})",
    ]


def contents(dataset: data.Dataset, trainee: Trainee) -> str:
    """How many images there are, and of what kind."""
    sizes = ", ".join(f"{len(split):,} {name}" for name, split in trainee.splits.items())
    # [N, height, width, channels] of images, [N, n] of features.
    *size, channels = dataset.train_images.shape[1:]
    if not size:
        return f"{sizes}; {channels} features"

    height, width = size
    colour = "grey" if channels == 1 else "colour"
    return f"{sizes}; {len(dataset.classes)} classes, {height}x{width} {colour}"


def description(settings: argparse.Namespace, dataset: data.Dataset, network: nn.Module) -> str:
    """A network, its options and its size."""
    options = ""
    for name in model.options_of(settings.model):
        value = getattr(settings, name)
        if value is not None:
            options += f", {name} {value}"

    parameters = sum(parameter.numel() for parameter in network.parameters())
    trained = sum(
        parameter.numel() for parameter in network.parameters() if parameter.requires_grad
    )
    text = f"{settings.model}{options}: {parameters:,} parameters, {trained:,} trained"
    if not dataset.has_images:
        return text
    height, width = settings.image_size
    return f"{text}, input {height}x{width}, fit {settings.fit}"


def computer(machine: Machine) -> str:
    """The device, processes, threads and precision that train."""
    several = ""
    if machine.processes.count > 1:
        several = f"{machine.processes.count} processes of "
    threads = count_of(torch.get_num_threads(), "thread")
    precision = "bf16" if machine.dtype else "fp32"
    return f"{machine.device.type}, {several}{threads}, {precision}"


# ------------------------------------------------------------------------------------------- epochs
@contextlib.contextmanager
def training_other(name: str) -> Iterator[None]:
    """Print no table of epochs within the block, and let the bars say what is trained."""
    global other
    other = name
    try:
        yield
    finally:
        other = None


def note_lagging(steps: int, momentum: float) -> None:
    """Say that batch norm is estimated anew, as so many steps are too few for its momentum."""
    if other:
        return
    few = f"batch norm's momentum of {momentum:g} wants more than {count_of(steps, 'step')}"
    notes.note(f"{few}: its statistics are estimated anew before the network is evaluated")


def print_header(watched: str) -> None:
    """Print the head of the table of epochs. watched: the split that is evaluated after each."""
    if other:
        return
    show(f"epoch   train loss  accuracy  {watched:>8} loss  accuracy   seconds")


def print_row(row: dict, watched: str, epochs: int) -> None:
    """Print a row of metrics.csv, without the rate; of long runs of short epochs, every 20th part
    only.
    """
    epoch = row["epoch"]
    is_long = epochs > LONG_RUN and row["seconds"] < LONG_EPOCH
    is_left_out = is_long and epoch % (epochs // ROWS) and 1 < epoch < epochs
    if other or is_left_out:
        return

    train_accuracy = share(row["train_accuracy"])
    loss = row[f"{watched}_loss"]
    accuracy = share(row[f"{watched}_accuracy"])
    trained = f"{epoch:5d}   {row['train_loss']:10.4f}  {train_accuracy:>8}"
    show(f"{trained}  {loss:13.4f}  {accuracy:>8}  {row['seconds']:8.1f}")


def share(value: float | None) -> str:
    """A share in percent, or a dash."""
    return "-" if value is None else f"{value:.2%}"


def progress_bar(batches: Iterable, progress: Progress, epochs: int, steps: int) -> tqdm:
    """The rest of an epoch's `steps` batches, with a bar on standard error if it is a terminal."""
    what = f"{other}, epoch" if other else "epoch"
    return tqdm(
        batches,
        f"{what} {progress.epoch}/{epochs}",
        total=steps,
        initial=progress.steps,
        leave=False,
        disable=notes.silent or None,  # None: where there is no terminal
    )


# ----------------------------------------------------------------------------------------- resuming
def print_resumed(
    progress: Progress, settings: argparse.Namespace, epochs_before: int, rate: float
) -> None:
    """Say where the run goes on, and what a raised --epochs does.

    epochs_before: those it began with. rate: the learning rate of the next step.
    """
    show(f"resumed   after {done(progress)} of the next")
    if epochs_before != settings.epochs:
        course = f"a course of {settings.epochs} epochs from here on, not of {epochs_before}"
        notes.note(f"the learning rate follows {course}; the next one is {rate:.3g}")


def print_how_to_resume(progress: Progress, run_dir: str) -> None:
    """Say that the run was stopped and saved, and what to type."""
    say(f"stopped and saved after {done(progress)}; to continue:")
    say(f"  {runs.resume_command(run_dir)}")


def done(progress: Progress) -> str:
    """How far a run has come, in words."""
    epochs = count_of(progress.epoch - 1, "epoch")
    steps = count_of(progress.steps, "step")
    return f"{epochs} and {steps}"


# ------------------------------------------------------------------------------------------- result
def print_result(run_dir: str, dataset: data.Dataset, summary: dict, unequal: bool) -> None:
    """Print the figures of summary.json that matter most. unequal: whether the classes are."""
    result = f"test loss {summary['test_loss']:.4g}"
    if dataset.has_images:
        result = f"test accuracy {summary['test_accuracy']:.2%}"
        if unequal:
            result += f", balanced {summary['balanced_accuracy']:.2%}"
        if summary.get("test_accuracy_without_them") is not None:
            leaked = count_of(summary["test_images_in_train"], "image")
            without = f"{summary['test_accuracy_without_them']:.2%} without {leaked}"
            result += f", {without} also in train"
        images = len(dataset.test_labels)
        # An accuracy on a few images is known to a few percent only.
        if images < FEW_TEST_IMAGES:
            result += f", on only {count_of(images, 'image')}"
    print(f"{run_dir}: {result} in {summary['train_seconds']:.0f} s", flush=True)
    for warning in summary.get("warnings", []):
        say(f"warning: {warning}")


def print_coefficients(network: nn.Module) -> None:
    """Print what the linear regression has learned beside the truth, as the tutorial does."""
    learned = torch.cat([parameter.flatten() for parameter in network.parameters()]).tolist()
    true = [*data.LINEAR_WEIGHTS, data.LINEAR_BIAS]  # in the order of the parameters
    names = [f"x{number}" for number in range(1, len(learned))] + ["bias"]

    print("          learned     true")
    for name, ours, theirs in zip(names, learned, true, strict=True):
        print(f"{name:>6} {ours:10.4f} {theirs:8.4f}")
