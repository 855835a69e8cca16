#!/usr/bin/env python3
"""Step 1 of 3: train a network on a dataset.

    python step1_train.py                                  # the bundled digits, a minute on a laptop
    python step1_train.py --dataset cifar10 --epochs 10
    python step1_train.py --data-dir photos --model mobilenet_v3_small --pretrained
    python step1_train.py --dataset linear                 # a regression, no images at all
    python step1_train.py --resume                         # continue the last unfinished run
    torchrun --nproc-per-node=4 step1_train.py ...         # four processes, each on a GPU if there are any

Writes runs/<name>/ and never over an earlier run:

    checkpoint.pt    the network, its spec, and the state for --resume; plain data that torch.load reads
    config.json      every argument, derived ones included, before the first step
    metrics.csv      a row for each epoch: loss and accuracy on both splits, learning rate, seconds
    summary.json     the result; report.html shows it with its pictures

What the command line leaves open is derived from the dataset and the network, and printed before work starts.
Next: python step2_export.py
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

import data
from data.notes import note, silenced
from inference.command_line import Parser, number
from inference.errors import Problem, guarded
from training import command_line, recipes


def build_parser():
    parser = Parser(
        description="Train a network on a dataset; writes runs/<name>/.",
        epilog="example: python step1_train.py --dataset mnist --epochs 2",
    )
    add_data_options(parser)
    add_training_options(parser)
    add = parser.add_argument_group("machine and run").add_argument
    precisions = ("auto", "fp32", "bf16")
    add("--precision", choices=precisions, default="auto", help="exports are fp32 (default: auto)")
    add("--device", default="auto", metavar="NAME", help="cpu, cuda, cuda:1, ... (default: a GPU if any)")
    add("--threads", type=number(int, 1, 1024), metavar="N", help="of the CPU (default: as many as are free)")
    seed = number(int, 0, 2**31)
    add("--seed", type=seed, default=0, metavar="N", help="repeats bit for bit on the CPU (default: 0)")
    add("--sync-batchnorm", action="store_true", help="torchrun on GPUs: batch norm over all processes")
    add("--name", help="of the run (default: <dataset>-<model>, with -2, -3, ... if taken)")
    text = "continue a run to the very same result (default: the newest unfinished); --epochs may be raised"
    add("--resume", nargs="?", const="", metavar="RUN", help=text)
    text = "also within an epoch: every N steps, or every N minutes"
    add("--checkpoint-every", type=command_line.checkpoint_interval, metavar="N|Nm", help=text)
    add("--quiet", action="store_true", help="print the result only")
    return parser


def add_data_options(parser):
    add = parser.add_argument_group("data").add_argument
    add("--dataset", default="digits", metavar="NAME", help="see --list-datasets (default: digits)")
    add("--data-dir", metavar="PATH", help="of the files, or for downloads (default: data/); the CSV file")
    size = command_line.image_size
    add("--image-size", type=size, metavar="N|HxW", help="of the network (default: see data/README.md)")
    text = "how images get that size (default: crop, to keep the shape of your own; stretch for the others)"
    add("--fit", choices=("stretch", "crop", "letterbox"), help=text)
    text = f"{', '.join(data.AUGMENTATIONS)}, or none (default: see data/README.md)"
    add("--augment", nargs="+", choices=(*data.AUGMENTATIONS, "none"), metavar="A", help=text)
    fraction = number(float, 0, 0.9, above=True)
    text = "hold out this part of the training split and keep the epoch that does best on it"
    add("--val-fraction", type=fraction, metavar="X", help=text)
    add("--patience", type=number(int, 1), metavar="N", help="stop after N epochs without a better one")
    add("--class-weights", choices=("balanced",), help="make rare classes count as much as others")
    add("--list-datasets", action="store_true", help="list the datasets and exit")
    add = parser.add_argument_group("your own images (folder, csv)").add_argument
    add("--cache-dir", metavar="DIR", help="for the decoded images (default: .threestep beside the data)")
    add("--strict", action="store_true", help="refuse unreadable files instead of leaving them out")
    add("--test-csv", metavar="FILE", help="the test split (default: a part of each class, held out)")
    add("--image-root", metavar="DIR", help="what paths are relative to (default: the CSV file's directory)")
    add("--image-column", metavar="NAME", help="default: filepath, filename, path or image")
    add("--label-column", metavar="NAME", help="default: label, class or target")


def add_training_options(parser):
    count, positive, optimizers = number(int, 1), number(float, 0, above=True), tuple(recipes.OPTIMIZERS)
    add = parser.add_argument_group("network").add_argument
    add("--model", metavar="NAME", help="see --list-models (default: airbench; linear for --dataset linear)")
    add("--width", type=positive, metavar="X", help="multiplies the channels of airbench")
    add("--hidden", type=count, nargs="*", metavar="N", help="sizes of mlp's hidden layers (default: 128)")
    add("--dropout", type=number(float, 0, 0.99), metavar="P", help="of mlp (default: 0) and mynet (0.1)")
    text = "start from torchvision's default weights, or from a local state_dict or checkpoint"
    add("--pretrained", nargs="?", const="default", metavar="FILE", help=text)
    add("--freeze-backbone", action="store_true", help="train the last layer only, for small data")
    add("--list-models", action="store_true", help="list the networks and exit")
    title = "training (defaults: a recipe for the network and the dataset)"
    add = parser.add_argument_group(title).add_argument
    add("--epochs", type=count, metavar="N", help="passes over the training split")
    add("--batch-size", type=count, metavar="N", help="images a step")
    add("--optimizer", choices=optimizers, metavar="NAME", help=", ".join(optimizers))
    add("--lr", type=positive, metavar="X", help="the highest learning rate")
    add("--momentum", type=number(float, 0, 0.9999), metavar="X", help="of sgd, muon; Nesterov's if above 0")
    add("--weight-decay", type=number(float, 0), metavar="X", help="of layers' weights, not biases and norms")
    schedules = recipes.SCHEDULES
    add("--schedule", choices=schedules, metavar="NAME", help=f"of the rate: {', '.join(schedules)}")
    add("--label-smoothing", type=number(float, 0, 0.99), metavar="X", help="in the training loss")
    text = "how sure the network may be, by held-out images, by a twin, or none (default: deploy/README.md)"
    add("--calibration", choices=recipes.CALIBRATIONS[1:], metavar="HOW", help=text)


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, dict]:
    """All arguments of the command line, and by name those that were typed."""
    parser = build_parser()
    args = parser.parse_args(argv)
    typed = parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(vars(args))))  # None is no default
    return args, {name: value for name, value in vars(typed).items() if value is not None}


def answer_at_once(args: argparse.Namespace, given: dict) -> int | None:
    """Do what needs no torch, which loads for seconds: the exit code, None to go on. Raises Problem."""
    if args.list_models or args.list_datasets:
        return command_line.list_names(args)
    if args.resume is None:
        recipes.resolve(args, given)
    return None


if __name__ == "__main__" and os.environ.get("RANK", "0") == "0":  # torchrun: one process is enough
    code = guarded(answer_at_once, *parse(None), closed_pipe=0)
    if code is not None:
        sys.exit(code)

# ruff: noqa: E402
import torch
import torch.nn.functional as F

import model
from data import doctor
from data.split import Split, make_splits
from report import drawing, page
from training import calibration, console, cpu, features, optimizers, processes, runs, weights
from training.result import summarise
from training.saliency import examples
from training.suspects import find_suspects
from training.trainer import Evaluation, Trainer, train_mode

WHITENING_PIXELS = 1 << 23  # at most, in the images that the whitening layer is made from


# --------------------------------------------------------------------------------------------------- training
def fit(trainer: Trainer) -> Evaluation | None:
    """Train; returns the result on the test split, None with a validation split. Raises Problem, Stopped."""
    settings, watched, evaluated = trainer.settings, trainer.watched, None
    console.print_header(trainer)
    with processes.Signals() as signals:
        for epoch in range(trainer.progress.epoch, settings.epochs + 1):
            if trainer.out_of_patience():
                break
            last = epoch == settings.epochs
            trainer.start_epoch(signals)
            trained = train_epoch(trainer)
            # Epochs before the last are evaluated at the training precision; the result is measured in fp32.
            with contextlib.nullcontext() if last else trainer.autocast():
                evaluated = evaluate(trainer, trainer.splits[watched])
            if not math.isfinite(evaluated.loss):
                raise Problem(f"the loss on the {watched} split became {evaluated.loss}: try a smaller --lr")
            trainer.finish_epoch(trained, evaluated)
            console.print_row(trainer)
            (caught,) = trainer.processes.maximum([signals.caught], trainer.device)
            if caught:
                raise processes.Stopped(caught)
    return evaluated if watched == "test" else None


def train_epoch(trainer: Trainer) -> tuple[float, float | None]:
    """Train for an epoch, or what a resumed run has left of it; returns loss and accuracy while training."""
    train_mode(trainer.deployable.network)
    for images, labels, batch_size in console.progress_bar(trainer, trainer.batches()):
        trainer.start_step()
        with trainer.autocast():
            outputs = trainer.network(trainer.normalise(images))
        losses = criterion(outputs, labels, trainer.settings.label_smoothing, trainer.log_priors)
        # The mean over the whole batch: DistributedDataParallel averages the gradients of the processes.
        loss = losses.sum() * trainer.processes.count / batch_size
        trainer.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        trainer.optimizer.step()
        trainer.finish_step(losses, outputs, labels)
    return trainer.training_metrics()


def criterion(outputs, targets, label_smoothing=0.0, log_priors=None):
    """The cross entropy [batch] of logits [batch, classes] and int64 labels [batch].

    log_priors [classes]: see `Trainer`; added to the logits, so that the network itself learns to ignore how
    frequent classes are (logit adjustment, Menon et al. 2021). Smoothing then follows them, too: if spread
    evenly, it would favour rare classes. Targets of floats [batch, n]: the squared error, averaged over n.
    """
    if targets.is_floating_point():
        return F.mse_loss(outputs.float(), targets, reduction="none").mean(1)
    if log_priors is None:
        return F.cross_entropy(outputs.float(), targets, label_smoothing=label_smoothing, reduction="none")
    labels = F.one_hot(targets, len(log_priors))
    wanted = (1 - label_smoothing) * labels + label_smoothing * log_priors.softmax(0)
    return F.cross_entropy(outputs.float() + log_priors, wanted, reduction="none")


@torch.inference_mode()
def evaluate(trainer: Trainer, split: Split, deployable: torch.nn.Module | None = None) -> Evaluation:
    """The network in eval mode over a whole split, shared by all processes."""
    deployable = deployable or trainer.deployable
    deployable.network.eval()
    network, normalise = features.parts(deployable, split)
    share = trainer.processes.share
    labels, loss, parts = split.labels[split.members], 0.0, []
    outputs = torch.zeros(len(labels), len(trainer.dataset.classes), device=labels.device)
    for images, targets in split.in_order(share):
        logits = network(normalise(images)).float()
        loss += criterion(logits, targets).sum().item()
        parts.append(logits)
    if parts:
        outputs[share] = torch.cat(parts)
    outputs = trainer.processes.sum(outputs)  # zero for the images of other processes
    loss = trainer.processes.sum(torch.tensor(loss, device=trainer.device)).item() / len(split)
    if trainer.dataset.task == "regression":
        return Evaluation(loss, None, outputs.cpu().numpy())
    accuracy = (outputs.argmax(1) == labels).sum().item() / len(split)
    return Evaluation(loss, accuracy, outputs.cpu().numpy())


# ------------------------------------------------------------------------------------------- data and network
def load_dataset(settings: argparse.Namespace) -> data.Dataset:
    """Load the dataset of the settings. Raises Problem, also for an unknown network."""
    try:
        usual_size = weights.usual_size(settings.model)
    except ValueError as error:
        raise Problem(error, 2) from None
    options = {name: getattr(settings, name) for name in ("image_size", "fit", *data.OPTIONS)}
    options["usual_size"] = usual_size
    return data.load(settings.dataset, settings.data_dir, **options)


def build(machine: processes.Machine, settings, dataset: data.Dataset, checkpoint) -> model.Deployable:
    """The network with its preprocessing, and with the weights of the checkpoint if any, on the machine.

    What is random follows from the seed of the settings. Raises Problem.
    """
    torch.manual_seed(settings.seed)
    regression, channels = dataset.task == "regression", dataset.train_images.shape[-1]
    options = {name: getattr(settings, name) for name in ("width", "hidden", "dropout")}
    shape = {"channels": channels, "classes": len(dataset.classes), "image_size": settings.image_size}
    try:
        network = model.build(settings.model, **shape, **options)
        mean, std = weights.load(network, settings, channels, checkpoint)
    except ValueError as error:
        source = "" if settings.pretrained in (None, "default") else f"--pretrained {settings.pretrained}: "
        raise Problem(f"{source}{error}", 2) from None
    norms = torch.nn.modules.batchnorm._BatchNorm
    if settings.batch_size == 1 and any(isinstance(module, norms) for module in network.modules()):
        raise Problem(f"{settings.model} has batch norm, which needs --batch-size 2 or more", 2)
    if settings.freeze_backbone:
        optimizers.freeze_backbone(network)
    if mean is None and regression:
        mean, std = [0.0] * channels, [1.0] * channels
    elif mean is None:
        mean, std = data.mean_and_std(dataset.train_images)
    cls = model.Regressor if regression else model.Deployable
    deployable = cls(network, settings.image_size, mean, std, settings.fit)
    fresh = not settings.pretrained and not checkpoint
    if fresh and not regression and isinstance(network, model.Network):
        wanted = min(2000, WHITENING_PIXELS // math.prod(settings.image_size))
        some = torch.from_numpy(dataset.train_images[:: -(-len(dataset.train_images) // wanted)])
        network.prepare(deployable.normalise(model.resize(some, settings.image_size, settings.fit)))
    deployable.to(machine.device, memory_format=model.traits(settings.model).memory_format)
    if machine.device.type == "cpu" and machine.dtype is not None:
        cpu.lay_side_by_side(deployable.network)
    return deployable


# ----------------------------------------------------------------------------------------------------- result
def train_twin(trainer: Trainer, parts: dict[str, Split], epochs: int) -> model.Deployable:
    """Train another network like the first, on `parts`; it can be resumed, too. See calibration.of_run."""
    directory, checkpoint = trainer.processes.from_first(lambda: runs.begin_twin(trainer.run))
    settings = argparse.Namespace(**{**vars(trainer.settings), "epochs": epochs})
    dataset, machine = trainer.dataset, trainer.machine
    deployable = build(machine, settings, dataset, checkpoint)
    fit(start(settings, directory, dataset, parts, deployable, machine, checkpoint, is_twin=True))
    return deployable


def write_result(trainer: Trainer, evaluated: Evaluation | None) -> None:
    """Calibrate the network that is the result, measure it, and write summary.json and report.html."""
    best, deployable = trainer.progress.best, trainer.deployable
    if best:
        deployable = copy.deepcopy(deployable)
        deployable.network.load_state_dict(best["state_dict"])
    evaluated = evaluated or evaluate(trainer, trainer.splits["test"], deployable)
    trainer.calibration = calibration.of_run(trainer, deployable, train_twin)
    if trainer.processes.rank > 0:
        return
    if best:
        console.show(f"epoch {best['epoch']} did best on the validation split and is kept")
    if best or trainer.calibration:
        trainer.save(evaluated.accuracy)
    summary, outputs = summarise(trainer, deployable, evaluated)
    runs.write_json(trainer.run, runs.SUMMARY, summary)
    write_pictures(trainer, deployable, evaluated.accuracy, outputs)
    runs.tidy(trainer.run)
    console.print_result(trainer, deployable.network, summary)


def write_pictures(trainer, deployable, accuracy, outputs) -> None:
    """Draw a finished run's pictures and write its report.html. outputs: those of the test split."""
    settings = trainer.settings
    dataset = trainer.dataset
    cpu.give_back_memory()

    result = drawing.Result(
        spec=trainer.spec(accuracy),
        rows=trainer.progress.rows,
        labels=dataset.test_labels,
        outputs=outputs,
    )
    if dataset.task == "classification":
        result.images = dataset.test_images
        result.duplicates = dataset.findings.pairs
        result.looked = examples(trainer, deployable, outputs)
        result.suspects = find_suspects(trainer, outputs)
        train = trainer.splits["train"]
        train = getattr(train, "images_split", train)  # what features were made of
        augmented, labels, _ = next(train.shuffled(25, settings.augment, 1, settings.seed))
        result.augmented = augmented.cpu().numpy(), labels.cpu().numpy()

    try:
        try:
            drawing.draw_run(trainer.run, result)
        except ImportError as error:
            note(f"no pictures without matplotlib ({error}); pip install matplotlib")
        page.write_report(trainer.run, runs.RUNS, runs.EXPORTS)
    except OSError as error:
        note(f"the run is complete, but its report cannot be written: {error.strerror or error}")


# ------------------------------------------------------------------------------------------------------- main
def run(args: argparse.Namespace, given: dict) -> int:
    """Step 1 in this process, or in each of torchrun's. Returns the exit code; raises Problem."""
    cpu.keep_freed_memory()
    with processes.joined() as group, contextlib.ExitStack() as stack:
        directory = checkpoint = None
        if args.resume is None:
            settings = recipes.resolve(args, given)
        else:
            settings, directory, checkpoint = resume(args, given, group, stack)
        stack.enter_context(silenced(settings.quiet or group.rank > 0))
        if args.resume is None and settings.name:
            group.from_first(lambda: runs.refuse_taken(settings.name))
        if args.resume is None and settings.dataset != args.dataset:
            note(f"taking {settings.data_dir} as --dataset {settings.dataset}")
        with group.first_of_each_machine_first():
            dataset = load_dataset(settings)
        if checkpoint:
            data.refuse_changes(directory, checkpoint["training"]["data"], dataset.fingerprint)
        if directory is None:
            settings = recipes.fit_to_images(settings, given, dataset, model.traits(settings.model))
        settings.threads, reason = cpu.set_threads(given.get("threads"), settings.threads)
        dataset = doctor.examined(dataset)
        machine = processes.choose_machine(settings, group, model.traits(settings.model).bf16)
        deployable = build(machine, settings, dataset, checkpoint)
        splits = make_splits(dataset, settings, machine.device)
        if directory is None:
            directory = group.from_first(lambda: stack.enter_context(runs.claimed(settings)))
        stack.enter_context(runs.removed_if_empty(directory, group.rank))
        trainer = start(settings, directory, dataset, splits, deployable, machine, checkpoint)
        announce(trainer, checkpoint, reason)
        try:
            write_result(trainer, fit(trainer))
        except processes.Stopped as stop:
            console.print_how_to_resume(trainer)
            return 128 + stop.args[0]
        return 0


def start(settings, directory, dataset, splits, deployable, machine, checkpoint, is_twin=False) -> Trainer:
    """A new or resumed run, on features if the network is frozen. Raises Problem."""
    with machine.processes.first_of_each_machine_first():
        splits = features.prepare(splits, deployable, settings, not checkpoint)
    trainer = Trainer(settings, directory, dataset, splits, deployable, machine, is_twin)
    if checkpoint:
        trainer.restore(checkpoint["training"])
    return trainer


def resume(args, given, group, stack):
    """Lock and read the run to resume; returns its settings, directory and checkpoint. Raises Problem."""
    directory = group.from_first(lambda: runs.find(args.resume, unfinished=True))
    if group.rank == 0:
        stack.enter_context(runs.locked(directory))
        runs.remove_leftovers(directory)
    arguments, checkpoint = group.from_first(lambda: runs.read(directory))
    settings = recipes.resumed(args, given, arguments, directory, runs.is_finished(directory))
    return settings, directory, checkpoint


def announce(trainer, checkpoint, reason):
    """Write config.json, and print what is about to be done."""
    if trainer.processes.rank == 0:
        used = {"device_used": str(trainer.device), "precision_used": "bf16" if trainer.dtype else "fp32"}
        runs.write_json(trainer.run, runs.CONFIG, {**vars(trainer.settings), "run": trainer.run, **used})
    console.print_settings(trainer, reason)
    if checkpoint:
        console.print_resumed(trainer, checkpoint["arguments"]["epochs"])


def main(argv=None):
    args, given = parse(argv)
    if args.list_models or args.list_datasets:
        return guarded(command_line.list_names, args, closed_pipe=0)
    return guarded(run, args, given)


if __name__ == "__main__":
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main())
