"""Training: the tutorials' own loops against step1_train.py, in one run on the same data. Run by
hand.

    python tests/benchmarks/bench_training.py --cifar DIR --mnist DIR            # an hour
    python tests/benchmarks/bench_training.py --cifar DIR --mnist DIR --short    # times only

--cifar takes class folders, train/<class>/* and test/<class>/*; --mnist takes what step1 takes as
--data-dir. The baselines are the tutorials' ways, written afresh: a DataLoader over PIL images with
ToTensor, batch 10, 2 workers, MyNet, SGD 0.001/0.9; and for MNIST the residual network, batch 512,
OneCycle up to 0.5. Ours runs as its users run it, through step1 and step2; its accuracy is that of
the exported file.
"""

import argparse
import contextlib
import csv
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.functional import to_tensor

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from benchmarks.measure import run_measured  # noqa: E402
from benchmarks.results import add_results_option, command_line, write_result  # noqa: E402

import data  # noqa: E402
import model  # noqa: E402
import step1_train  # noqa: E402

EPOCHS = 10  # of the tutorials


# ------------------------------------------------------------------------- the tutorials' own loops


class Pictures(Dataset):
    """What the tutorials iterate over: one PIL image at a time, turned into a tensor."""

    def __init__(self, images: np.ndarray, labels: np.ndarray):
        self.images = []
        for image in images:  # [H, W, C]
            pixels = image.squeeze(-1) if image.shape[2] == 1 else image
            self.images.append(Image.fromarray(pixels))
        self.labels = labels

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return to_tensor(self.images[index]), int(self.labels[index])


@dataclass
class Tutorial:
    """One tutorial's set-up."""

    network: str
    batch_size: int
    make_optimizer: Callable
    make_schedule: Callable | None = None


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.001, momentum=0.9)


def fast_sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.5, momentum=0.9)


def one_cycle(optimizer, steps):
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.5, total_steps=steps)


MYNET = Tutorial(network="mynet", batch_size=10, make_optimizer=sgd)
RESBLOCK = Tutorial(
    network="resblock", batch_size=512, make_optimizer=fast_sgd, make_schedule=one_cycle
)


def run_tutorial(
    tutorial: Tutorial, dataset, epochs: int, part: float = 1.0
) -> tuple[float, float]:
    """Train by the tutorial's loop on `part` of the training split.

    Returns the seconds of an epoch of the whole split, and the test accuracy.
    """
    torch.manual_seed(12)
    height, width, channels = dataset.train_images.shape[1:]
    network = model.build(
        tutorial.network,
        channels=channels,
        classes=len(dataset.classes),
        image_size=[height, width],
    )

    count = int(len(dataset.train_images) * part)
    chosen = np.random.default_rng(0).permutation(len(dataset.train_images))[:count]
    pictures = Pictures(dataset.train_images[chosen], dataset.train_labels[chosen])
    loader = DataLoader(pictures, tutorial.batch_size, shuffle=True, num_workers=2)

    optimizer = tutorial.make_optimizer(network.parameters())
    schedule = None
    if tutorial.make_schedule:
        schedule = tutorial.make_schedule(optimizer, epochs * len(loader))

    seconds = []
    for _ in range(epochs):
        started = time.perf_counter()
        network.train()
        for images, labels in loader:
            optimizer.zero_grad()
            loss = F.cross_entropy(network(images), labels)
            loss.backward()
            optimizer.step()
            if schedule:
                schedule.step()
        seconds.append((time.perf_counter() - started) / part)

    tests = DataLoader(Pictures(dataset.test_images, dataset.test_labels), 500)
    return statistics.mean(seconds), accuracy_of(network, tests)


def accuracy_of(network, loader) -> float:
    network.eval()
    right = 0
    with torch.inference_mode():
        for images, labels in loader:
            answers = network(images).argmax(1)
            right += int((answers == labels).sum())
    return right / len(loader.dataset)


# --------------------------------------------------------------------------------------------- ours


@dataclass
class Ours:
    """One run through step1 and step2."""

    train_seconds: float
    accuracy: float  # of the exported file
    peak: int  # bytes that step1 held at most
    epoch_seconds: list[float]
    epoch_accuracies: list[float]  # of the test split, after each epoch


def run_ours(place: Path, *arguments) -> Ours:
    """Train and export with the scripts, in processes of their own, below `place`."""
    name = f"run{len(list(place.glob('runs/*')))}"
    train = [sys.executable, ROOT / "step1_train.py", "--name", name, *arguments]
    measured = run_measured(train, cwd=place)

    export = [sys.executable, ROOT / "step2_export.py", "--run", name, "--format", "onnx"]
    run_measured(export, cwd=place)

    parity = json.loads((place / "exports" / name / "parity.json").read_text())
    summary = json.loads((place / "runs" / name / "summary.json").read_text())
    with open(place / "runs" / name / "metrics.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))

    accuracy = parity["onnx"]["accuracy"]
    words = " ".join(str(argument) for argument in arguments[-4:])
    print(f"  {words}: {accuracy:.2%} in {summary['train_seconds']:.1f} s", file=sys.stderr)
    return Ours(
        train_seconds=summary["train_seconds"],
        accuracy=accuracy,
        peak=measured.peak,
        epoch_seconds=[float(row["seconds"]) for row in rows],
        epoch_accuracies=[float(row["test_accuracy"]) for row in rows],
    )


class Clock:
    """Seconds inside forward, backward and step; when the first began and the last ended.

    Its methods are torch's own hooks. Evaluation, which has no gradients, is left out, and so is
    what follows the last step: some pictures of the report need a backward pass.
    """

    def __init__(self):
        self.inside = 0.0
        self.pending = 0.0  # counts once an optimizer step follows
        self.first: float | None = None
        self.last = 0.0
        self.depth = 0  # of nested modules: only the outermost one counts
        self.started = 0.0

    def start(self) -> None:
        self.started = time.perf_counter()
        if self.first is None:
            self.first = self.started

    def stop(self) -> None:
        self.pending += time.perf_counter() - self.started

    def before_forward(self, module, inputs) -> None:
        if not (module.training and torch.is_grad_enabled()):
            return
        if self.depth == 0:
            self.start()
        self.depth += 1

    def after_forward(self, module, inputs, output) -> None:
        if not (module.training and torch.is_grad_enabled()):
            return
        self.depth -= 1
        if self.depth == 0:
            self.stop()

    def before_step(self, optimizer, args, kwargs) -> None:
        self.start()

    def after_step(self, optimizer, args, kwargs) -> None:
        self.stop()
        self.inside += self.pending
        self.pending = 0.0
        self.last = time.perf_counter()


@contextlib.contextmanager
def clock_of_training() -> Iterator[Clock]:
    """Time what trains in this process."""
    clock = Clock()
    hooks = [
        register_module_forward_pre_hook(clock.before_forward),
        register_module_forward_hook(clock.after_forward),
        register_optimizer_step_pre_hook(clock.before_step),
        register_optimizer_step_post_hook(clock.after_step),
    ]

    # There is no hook of a whole backward pass.
    backward = torch.Tensor.backward

    def timed_backward(*args, **kwargs):
        clock.start()
        backward(*args, **kwargs)
        clock.stop()

    torch.Tensor.backward = timed_backward
    try:
        yield clock
    finally:
        torch.Tensor.backward = backward
        for hook in hooks:
            hook.remove()


def share_outside_compute(*arguments) -> float:
    """The share of a training epoch that is spent outside forward, backward and optimizer step."""
    here = os.getcwd()
    with tempfile.TemporaryDirectory() as place, clock_of_training() as clock:
        os.chdir(place)
        try:
            words = [str(argument) for argument in arguments]
            # A second network, for the calibration, would be counted as well.
            code = step1_train.main([*words, "--epochs", "1", "--calibration", "none"])
        finally:
            os.chdir(here)

    assert code == 0
    assert clock.first is not None
    return 1 - clock.inside / (clock.last - clock.first)


# --------------------------------------------------------------------------------------- the tables


def bench_cifar(directory: Path, place: Path, short: bool, seeds: range) -> dict:
    """Figures of CIFAR-10; prints them. Seconds of the tutorial are those of all its ten epochs."""
    cache = place / "cache"
    dataset = data.load("folder", str(directory), cache_dir=str(cache))
    folder = ["--dataset", "folder", "--data-dir", directory.resolve(), "--cache-dir", cache]
    epochs = 1 if short else EPOCHS

    epoch_seconds, reached = run_tutorial(
        MYNET, dataset, epochs=epochs, part=0.25 if short else 1.0
    )
    tutorial_seconds = EPOCHS * epoch_seconds
    told = "from a quarter epoch" if short else f"{reached:.2%}"
    print(f"tutorial's loop, MyNet: {tutorial_seconds:.0f} s for {EPOCHS} epochs ({told})")

    outside = share_outside_compute(*folder)
    print(f"default network: {outside:.1%} of an epoch outside forward, backward and step")

    runs = [run_ours(place, *folder, "--epochs", epochs, "--seed", seed) for seed in seeds]
    took = [run.train_seconds for run in runs]
    ratio = statistics.median(took) / tutorial_seconds
    print(
        f"default network: {[round(s) for s in took]} s, / tutorial's {EPOCHS} epochs {ratio:.2f}"
    )
    accuracies = [run.accuracy for run in runs]
    print(f"default network: exported accuracy {mean_and_spread(accuracies)}")

    # What step1 is allowed to hold: the whole dataset as bytes, and 1.2 GB.
    allowed = dataset.train_images.nbytes + dataset.test_images.nbytes + 1.2e9
    peak = max(run.peak for run in runs)
    print(f"default network: peak {peak / 1e9:.2f} GB, / (uint8 set + 1.2 GB) {peak / allowed:.2f}")

    figures = {
        "tutorial_epoch_seconds": epoch_seconds,
        "tutorial_accuracy": None if short else reached,
        "outside": outside,
        "epochs": epochs,
        "train_seconds": took,
        "accuracies": accuracies,
        "peak": peak,
        "allowed": allowed,
    }

    small = ["--model", "mynet", "--augment", "flip", "--dropout", 0]
    small += ["--epochs", 1 if short else 3]
    mynet = run_ours(place, *folder, *small)
    figures["mynet"] = bench_mynet(mynet, reached, tutorial_seconds, short)
    return figures


def bench_mynet(run: Ours, reached: float, tutorial_seconds: float, short: bool) -> dict:
    """When our training of the tutorial's own network passed the tutorial's accuracy."""
    elapsed = list(itertools.accumulate(run.epoch_seconds))
    per_epoch = elapsed[-1] / len(elapsed)

    passed = None
    for seconds, accuracy in zip(elapsed, run.epoch_accuracies, strict=True):
        if passed is None and accuracy >= reached:
            passed = seconds

    if short:
        passed = None  # the tutorial's accuracy is that of a quarter epoch
    elif passed is None:
        print(f"MyNet: the tutorial's {reached:.2%} not reached in {elapsed[-1]:.1f} s")
    else:
        part = tutorial_seconds / passed
        print(f"MyNet: the tutorial's {reached:.2%} after {passed:.1f} s, 1/{part:.1f} of its time")
    print(f"MyNet: exported accuracy {run.accuracy:.2%}, {per_epoch:.1f} s an epoch")

    return {
        "epochs": len(elapsed),
        "epoch_seconds": per_epoch,
        "accuracy": run.accuracy,
        "seconds_to_tutorial": passed,
    }


def bench_mnist(directory: Path, place: Path, short: bool, seeds: range) -> dict:
    dataset = data.load("mnist", str(directory))
    mnist = ["--dataset", "mnist", "--data-dir", directory.resolve()]
    epochs = 1 if short else EPOCHS

    epoch_seconds, reached = run_tutorial(RESBLOCK, dataset, epochs=epochs)
    tutorial_seconds = EPOCHS * epoch_seconds
    print(
        f"tutorial's loop, ResBlock on MNIST: {tutorial_seconds:.0f} s for {EPOCHS} epochs, "
        f"{reached:.2%} after {epochs}"
    )

    # Three epochs of the default network end above ten of the tutorial's.
    ours = 1 if short else 3
    runs = [run_ours(place, *mnist, "--epochs", ours, "--seed", seed) for seed in seeds]
    took = [run.train_seconds for run in runs]
    ratio = statistics.median(took) / tutorial_seconds
    print(f"default network on MNIST: {[round(s) for s in took]} s, / tutorial's {ratio:.2f}")
    accuracies = [run.accuracy for run in runs]
    print(f"default network on MNIST: exported accuracy {mean_and_spread(accuracies)}")

    return {
        "tutorial_epoch_seconds": epoch_seconds,
        "tutorial_accuracy": None if short else reached,
        "epochs": ours,
        "train_seconds": took,
        "accuracies": accuracies,
    }


def mean_and_spread(values: list[float]) -> str:
    listed = ", ".join(f"{value:.2%}" for value in values)
    return f"{statistics.mean(values):.2%} ({listed})"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cifar", type=Path, metavar="DIR", help="class folders of CIFAR-10")
    parser.add_argument("--mnist", type=Path, metavar="DIR", help="torchvision's MNIST")
    parser.add_argument("--short", action="store_true", help="one epoch each, one seed")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="0 to N-1")
    add_results_option(parser)
    args = parser.parse_args()

    seeds = range(1 if args.short else args.seeds)
    threads = torch.get_num_threads()
    capability = torch.backends.cpu.get_cpu_capability()
    print(f"torch {torch.__version__}, {threads} threads, {capability}")

    figures = {"short": args.short}
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        if args.cifar:
            figures["cifar"] = bench_cifar(args.cifar, place, args.short, seeds)
        if args.mnist:
            figures["mnist"] = bench_mnist(args.mnist, place, args.short, seeds)

    write_result("training", figures, command_line(), args.results)


if __name__ == "__main__":
    main()
