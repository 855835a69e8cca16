"""What step1 prints: the settings, a table of the epochs, how to resume. Only the first process prints."""

import torch
from tqdm import tqdm

import data
import model
from data import notes
from inference.command_line import say
from training import runs

FEW = 100  # test images: the result then says how many they were
CALIBRATION = {  # in words
    "validation": "on the validation split",
    "held-out": "on the images held out",
    "twin": "by a twin, trained afterwards for half as long",
}


def show(text: str) -> None:
    """Print to standard output what --quiet leaves out."""
    if not notes.silent:
        print(text, flush=True)


def print_settings(trainer, threads: str = "") -> None:
    """Print the resolved settings before work starts; threads: why there are fewer than usual, in words."""
    settings, dataset, network = trainer.settings, trainer.dataset, trainer.deployable.network
    parameters = sum(p.numel() for p in network.parameters())
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    options = [(name, getattr(settings, name)) for name in model.options_of(settings.model)]
    options = "".join(f", {name} {value}" for name, value in options if value is not None)
    sizes = ", ".join(f"{len(split):,} {name}" for name, split in trainer.splits.items())
    *size, channels = dataset.train_images.shape[1:]
    kind, given = f"{channels} features", ""
    if size:
        kind = f"{len(dataset.classes)} classes, {size[0]}x{size[1]} {'grey' if channels == 1 else 'colour'}"
        given = ", input {}x{}".format(*settings.image_size)
    several = f"{trainer.processes.count} processes of " if trainer.processes.count > 1 else ""
    machine = f"{trainer.device.type}, {several}{count_of(torch.get_num_threads(), 'thread')}"
    epochs = f"{count_of(settings.epochs, 'epoch')} of batch {settings.batch_size}"
    rate, augment = f"lr {settings.lr:g} {settings.schedule}", " ".join(settings.augment) or "none"
    show(f"dataset   {settings.dataset}: {sizes}; {kind}")
    show(f"network   {settings.model}{options}: {parameters:,} parameters, {trained:,} trained{given}")
    show(f"training  {epochs}, {settings.optimizer} {rate}, weight decay {settings.weight_decay:g},")
    show(f"          label smoothing {settings.label_smoothing:g}, augment {augment}")
    if settings.calibration in CALIBRATION:
        show(f"calibrate {CALIBRATION[settings.calibration]} (--calibration none: not at all)")
    show(f"machine   {machine}, {'bf16' if trainer.dtype else 'fp32'}, seed {settings.seed}")
    if threads:
        show(f"          ({threads})")
    show(f"run       {trainer.run}")


def print_header(trainer) -> None:
    if not trainer.is_twin and trainer.progress.epoch <= trainer.settings.epochs:
        show(f"epoch   train loss  accuracy  {trainer.watched:>8} loss  accuracy   seconds")


def print_row(trainer) -> None:
    """Print the last row of metrics.csv, without the rate; of long runs, every 20th part only."""
    epoch, train_loss, train_accuracy, loss, accuracy, _, seconds = trainer.progress.rows[-1].values()
    epochs = trainer.settings.epochs
    if trainer.is_twin or (epochs > 50 and epoch % (epochs // 20) and epoch < epochs):
        return
    first, second = ("-" if value is None else f"{value:.2%}" for value in (train_accuracy, accuracy))
    show(f"{epoch:5d}   {train_loss:10.4f}  {first:>8}  {loss:13.4f}  {second:>8}  {seconds:8.1f}")


def progress_bar(trainer, batches):
    """The batches of an epoch, with a bar on standard error if it is a terminal."""
    title = f"{'twin' if trainer.is_twin else 'epoch'} {trainer.progress.epoch}/{trainer.settings.epochs}"
    steps = {"total": trainer.steps_per_epoch, "initial": trainer.progress.steps}
    return tqdm(batches, title, leave=False, disable=notes.silent or None, **steps)


def print_resumed(trainer, epochs_before: int) -> None:
    """Say where the run continues, and what a raised --epochs does. epochs_before: those it began with."""
    epochs = trainer.settings.epochs
    show(f"resumed   after {done(trainer.progress)} of the next")
    if epochs_before != epochs:
        course = f"a course of {epochs} epochs from here on, not of {epochs_before}"
        rate = trainer.settings.lr * trainer.rate(trainer.progress.steps)
        notes.note(f"the learning rate follows {course}; the next one is {rate:.3g}")


def print_how_to_resume(trainer) -> None:
    if trainer.processes.rank == 0:
        say(f"stopped and saved after {done(trainer.progress)}; to continue:")
        say(f"  {runs.resume_command(trainer.run)}")
    trainer.processes.wait()  # torchrun ends all processes as soon as one has ended


def print_result(trainer, network, summary: dict) -> None:
    """Print the result, the figures of summary.json; of the linear regression, the coefficients first."""
    settings, count = trainer.settings, len(trainer.splits["test"])
    result = f"test loss {summary['test_loss']:.4g}"
    if trainer.dataset.task == "classification":
        result = f"test accuracy {summary['test_accuracy']:.2%}"
        if trainer.unequal:
            result += f", balanced {summary['balanced_accuracy']:.2%}"
        if summary.get("test_accuracy_without_them") is not None:
            leaked = count_of(summary["test_images_in_train"], "image")
            result += f", {summary['test_accuracy_without_them']:.2%} without {leaked} also in train"
        if count < FEW:
            result += f", on only {count_of(count, 'image')}"
    if settings.dataset == "linear" and settings.model == "linear":  # what the tensor tutorial ends with
        learned = torch.cat([p.flatten() for p in network.parameters()]).tolist()
        names = [f"x{i}" for i in range(1, len(learned))] + ["bias"]
        print("          learned     true")
        for name, ours, true in zip(names, learned, (*data.LINEAR_WEIGHTS, data.LINEAR_BIAS), strict=True):
            print(f"{name:>6} {ours:10.4f} {true:8.4f}")
    print(f"{trainer.run}: {result} in {summary['train_seconds']:.0f} s")


def done(progress) -> str:
    return f"{count_of(progress.epoch - 1, 'epoch')} and {count_of(progress.steps, 'step')}"


def count_of(number: int, noun: str) -> str:
    """'1 epoch', '2 epochs'."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
