"""Training: the tutorials' own loops against step1_train.py, in one run on the same data. Run by hand.

    python tests/benchmarks/bench_training.py --cifar DIR --mnist DIR   # the full table; an hour on 2 cores
    python tests/benchmarks/bench_training.py --cifar DIR --short              # minutes: one epoch each, no
    accuracies

--cifar: class folders, train/<class>/* and test/<class>/*; --mnist: what --data-dir takes. The baselines are
the tutorials' ways, written afresh: a DataLoader over PIL images with ToTensor, batch 10, 2 workers, MyNet,
SGD 0.001/0.9; and for MNIST the residual network, batch 512, OneCycle up to 0.5. Ours runs as its users run
it, through step1, step2 and step3; accuracy is what step3's code computes from the exported file.
"""

import argparse
import csv
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.functional import to_tensor

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

import data  # noqa: E402
import model  # noqa: E402
import step1_train  # noqa: E402
from inference.predict import Model  # noqa: E402


class Pictures(Dataset):
    """What the tutorials iterate over: one PIL image and its label at a time, turned into a tensor."""

    def __init__(self, images, labels):
        self.images = [
            Image.fromarray(image.squeeze(-1) if image.shape[2] == 1 else image) for image in images
        ]
        self.labels = labels

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return to_tensor(self.images[index]), int(self.labels[index])


def accuracy_of(network, loader):
    network.eval()
    with torch.inference_mode():
        right = sum((network(x).argmax(1) == y).sum().item() for x, y in loader)
    return right / len(loader.dataset)


def tutorial(name, dataset, epochs, batch_size, optimizer, schedule=None, part=1.0):
    """The tutorial's loop over `part` of the training split.

    -> (seconds an epoch [epochs], test accuracy).
    """
    torch.manual_seed(12)
    *size, channels = dataset.train_images.shape[1:]
    network = model.build(name, channels=channels, classes=len(dataset.classes), image_size=size)
    count = int(len(dataset.train_images) * part)
    chosen = np.random.default_rng(0).permutation(len(dataset.train_images))[:count]
    train = Pictures(dataset.train_images[chosen], dataset.train_labels[chosen])
    loader = DataLoader(train, batch_size, shuffle=True, num_workers=2)
    optimizer = optimizer(network.parameters())
    schedule = schedule and schedule(optimizer, epochs * len(loader))
    seconds = []
    for _ in range(epochs):
        started = time.perf_counter()
        network.train()
        for x, y in loader:
            optimizer.zero_grad()
            F.cross_entropy(network(x), y).backward()
            optimizer.step()
            if schedule:
                schedule.step()
        seconds.append((time.perf_counter() - started) / part)
    return seconds, accuracy_of(network, DataLoader(Pictures(dataset.test_images, dataset.test_labels), 500))


# Prints the peak memory of the command that follows. Linux counts what its parent held before exec as its
# own, so that the parent must be a small process.
PEAK = """import resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)"""


def ours(place, dataset, *arguments):
    """Steps 1 to 3 as processes.

    -> dict of summary, rows of metrics.csv, peak memory in bytes, exported accuracy.
    """
    name = f"run{len(list(place.glob('runs/*')))}"
    command = [
        sys.executable,
        "-c",
        PEAK,
        sys.executable,
        ROOT / "step1_train.py",
        "--name",
        name,
        *map(str, arguments),
    ]
    peak = int(subprocess.run(command, cwd=place, check=True, stdout=subprocess.PIPE).stdout)
    command = [sys.executable, ROOT / "step2_export.py", "--run", name, "--format", "onnx"]
    subprocess.run(command, cwd=place, check=True, stdout=subprocess.DEVNULL)
    exported = Model(str(place / "exports" / name / "model.onnx"))
    answers = [
        exported.predict(np.ascontiguousarray(part)).argmax(1)
        for part in np.array_split(dataset.test_images, 100)
    ]
    with open(place / "runs" / name / "metrics.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    summary = json.loads((place / "runs" / name / "summary.json").read_text())
    answer, seconds = (np.concatenate(answers) == dataset.test_labels).mean(), summary["train_seconds"]
    print(f"  {' '.join(map(str, arguments[-4:]))}: {answer:.2%} in {seconds:.1f} s", file=sys.stderr)
    return {"summary": summary, "rows": rows, "peak": peak, "accuracy": float(answer)}


def outside_compute(*arguments):
    """The share of a training epoch spent outside forward, backward and optimizer step, by timing what is
    outside."""
    spent, train_epoch = {"inside": 0.0, "all": 0.0, "training": False}, step1_train.train_epoch

    def timed(function):
        def wrapper(*args, **kwargs):
            started = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                if spent["training"]:
                    spent["inside"] += time.perf_counter() - started

        return wrapper

    def epoch(trainer):
        trainer.network.forward = timed(trainer.network.forward)
        trainer.optimizer.step = timed(trainer.optimizer.step)
        started, spent["training"] = time.perf_counter(), True
        try:
            return train_epoch(trainer)
        finally:
            spent["all"] += time.perf_counter() - started
            spent["training"] = False  # evaluation is no part of it

    backward = torch.Tensor.backward
    step1_train.train_epoch, torch.Tensor.backward = epoch, timed(backward)
    with tempfile.TemporaryDirectory() as place:
        here = os.getcwd()
        os.chdir(place)
        try:
            assert step1_train.main([*map(str, arguments), "--epochs", "1"]) == 0
        finally:
            os.chdir(here)
            step1_train.train_epoch, torch.Tensor.backward = train_epoch, backward
    return 1 - spent["inside"] / spent["all"]


def mean_and_spread(values):
    return f"{statistics.mean(values):.2%} ({', '.join(f'{value:.2%}' for value in values)})"


def bench_cifar(directory, place, short, seeds):
    cache = place / "cache"
    dataset = data.load("folder", str(directory), cache_dir=str(cache))
    folder = ["--dataset", "folder", "--data-dir", directory.resolve(), "--cache-dir", cache]

    def sgd(parameters):
        return torch.optim.SGD(parameters, lr=0.001, momentum=0.9)

    seconds, reached = tutorial("mynet", dataset, 1 if short else 10, 10, sgd, part=0.25 if short else 1.0)
    ten = 10 * statistics.mean(seconds)
    print(
        f"tutorial's loop, MyNet: {ten:.0f} s for 10 epochs"
        f"{' (from a quarter epoch)' if short else f', {reached:.2%}'}"
    )
    share = outside_compute(*folder)
    print(f"default network: {share:.1%} of an epoch outside forward, backward and step")
    runs = [ours(place, dataset, *folder, "--epochs", 1 if short else 10, "--seed", seed) for seed in seeds]
    took = [run["summary"]["train_seconds"] for run in runs]
    allowed = dataset.train_images.nbytes + dataset.test_images.nbytes + 1.2e9
    print(
        f"default network: {[round(s) for s in took]} s, "
        f"/ tutorial's 10 epochs {statistics.median(took) / ten:.2f}"
    )
    print(f"default network: exported accuracy {mean_and_spread([run['accuracy'] for run in runs])}")
    peak = max(run["peak"] for run in runs)
    print(f"default network: peak {peak / 1e9:.2f} GB, / (uint8 set + 1.2 GB) {peak / allowed:.2f}")
    if not short:
        three = ours(place, dataset, *folder, "--epochs", 3)
        part = three["summary"]["train_seconds"] / ten
        print(
            f"default network, 3 epochs: exported accuracy {three['accuracy']:.2%}, "
            f"/ tutorial's 10 epochs {part:.2f}"
        )
    small = ours(
        place,
        dataset,
        *folder,
        "--model",
        "mynet",
        "--augment",
        "flip",
        "--dropout",
        0,
        "--epochs",
        1 if short else 3,
    )
    rows = small["rows"]
    elapsed = list(itertools.accumulate(float(row["seconds"]) for row in rows))
    there = [t for t, row in zip(elapsed, rows, strict=True) if float(row["test_accuracy"]) >= reached]
    if there:
        print(
            f"MyNet: the tutorial's {reached:.2%} after {there[0]:.1f} s, 1/{ten / there[0]:.1f} of its time"
        )
    else:
        print(f"MyNet: the tutorial's {reached:.2%} not reached in {elapsed[-1]:.1f} s")
    print(f"MyNet: exported accuracy {small['accuracy']:.2%}, {elapsed[-1] / len(rows):.1f} s an epoch")


def bench_mnist(directory, place, short, seeds):
    dataset = data.load("mnist", str(directory))
    mnist = ["--dataset", "mnist", "--data-dir", directory.resolve()]

    def sgd(parameters):
        return torch.optim.SGD(parameters, lr=0.5, momentum=0.9)

    def onecycle(optimizer, steps):
        return torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.5, total_steps=steps)

    seconds, reached = tutorial("resblock", dataset, 1 if short else 10, 512, sgd, onecycle)
    ten = 10 * statistics.mean(seconds)
    print(f"tutorial's loop, ResBlock on MNIST: {ten:.0f} s for 10 epochs, {reached:.2%}")
    runs = [ours(place, dataset, *mnist, "--epochs", 1 if short else 10, "--seed", seed) for seed in seeds]
    took = [run["summary"]["train_seconds"] for run in runs]
    print(
        f"default network on MNIST: {[round(s) for s in took]} s, "
        f"/ tutorial's {statistics.median(took) / ten:.2f}"
    )
    print(f"default network on MNIST: exported accuracy {mean_and_spread([run['accuracy'] for run in runs])}")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cifar", type=Path)
    parser.add_argument("--mnist", type=Path)
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    seeds = range(1 if args.short else args.seeds)
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, "
        f"{torch.backends.cpu.get_cpu_capability()}"
    )
    with tempfile.TemporaryDirectory() as place:
        if args.cifar:
            bench_cifar(args.cifar, Path(place), args.short, seeds)
        if args.mnist:
            bench_mnist(args.mnist, Path(place), args.short, seeds)


if __name__ == "__main__":
    main()
