"""Well-known tutorials' set-ups through step1: their network, optimizer and learning rate. Run by
hand.

    python tests/benchmarks/bench_tutorials.py --mnist DIR --cifar DIR --fashion-mnist DIR

Runs the set-ups whose data is given, one run each, and reports the test accuracy (of the
regression: its loss) beside what the tutorial publishes. --cifar takes class folders; the others
take what step1 takes as --data-dir.
"""

import argparse
import json
import shlex
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from benchmarks.measure import run_measured  # noqa: E402
from benchmarks.results import add_results_option, command_line, write_result  # noqa: E402


@dataclass
class Tutorial:
    """A tutorial, what it publishes, and how step1 runs its set-up."""

    key: str
    title: str
    published: str
    dataset: str
    options: str  # of step1, without those that name the data

    def command(self) -> str:
        """What a user types."""
        return f"step1_train.py --dataset {self.dataset} {self.options}"


TUTORIALS = [
    Tutorial(
        key="mnist-feed-forward",
        title="MNIST, feed-forward, Adam 1e-3, batch 32, 10 epochs",
        published="95.4 %",
        dataset="mnist",
        options="--model mlp --lr 0.001 --schedule constant --augment none --epochs 10",
    ),
    Tutorial(
        key="mnist-128",
        title="MNIST, 784-128-10, Adam, 5 epochs, 50,000 + 10,000",
        published="97.20 %",
        dataset="mnist",
        options="--model mlp --hidden 128 --schedule constant --augment none --epochs 5 "
        "--val-fraction 0.16667",
    ),
    Tutorial(
        key="fashion-mnist",
        title="Fashion-MNIST, 784-512-512-10, SGD 1e-3, 5 epochs",
        published="-",
        dataset="fashion-mnist",
        options="--model mlp --hidden 512 512 --optimizer sgd --lr 0.001 --momentum 0 "
        "--weight-decay 0 --schedule constant --batch-size 64 --augment none --epochs 5",
    ),
    Tutorial(
        key="cifar10-mynet",
        title="CIFAR-10, MyNet, SGD 0.001/0.9, batch 10, 10 epochs",
        published="71.83 %",
        dataset="cifar10",
        options="--model mynet --optimizer sgd --lr 0.001 --weight-decay 0 --schedule constant "
        "--batch-size 10 --augment none --epochs 10 --precision fp32",
    ),
    Tutorial(
        key="mnist-resblock",
        title="MNIST, ResBlock, OneCycle 0.5, batch 512, 10 epochs, seed 12",
        published="99.24 %",
        dataset="mnist",
        options="--model resblock --weight-decay 0 --augment none --seed 12",
    ),
    Tutorial(
        key="linear",
        title="linear regression, 5 features, SGD 1e-3, 10 steps",
        published="loss 880 to 810 (0.920)",
        dataset="linear",
        options="--momentum 0 --lr 0.001 --epochs 10",
    ),
]


def run_tutorial(tutorial: Tutorial, folders: dict[str, Path], place: Path) -> dict | None:
    """The figures of one run, or None if its data is not given."""
    where = []
    if tutorial.dataset != "linear":
        directory = folders[tutorial.dataset]
        if directory is None:
            return None
        # The copy of CIFAR-10 lies in class folders, as one's own images do.
        name = "folder" if tutorial.dataset == "cifar10" else tutorial.dataset
        where = ["--dataset", name, "--data-dir", directory.resolve()]
        if name == "folder":
            where += ["--cache-dir", place / "cache"]
    else:
        where = ["--dataset", "linear"]

    options = shlex.split(tutorial.options)
    # Calibration would only add a network that the tutorial does not have.
    if tutorial.dataset != "linear":
        options += ["--calibration", "none"]
    command = [sys.executable, ROOT / "step1_train.py", "--name", tutorial.key, *where, *options]
    run_measured(command, cwd=place)

    run = place / "runs" / tutorial.key
    summary = json.loads((run / "summary.json").read_text())
    if tutorial.dataset == "linear":
        return losses(run)
    print(
        f"{tutorial.title}: {summary['test_accuracy']:.2%}, published {tutorial.published}",
        flush=True,
    )
    return {"accuracy": summary["test_accuracy"], "train_seconds": summary["train_seconds"]}


def losses(run: Path) -> dict:
    """The first and the last training loss of the regression."""
    lines = (run / "metrics.csv").read_text().splitlines()
    column = lines[0].split(",").index("train_loss")
    first = float(lines[1].split(",")[column])
    last = float(lines[-1].split(",")[column])
    print(f"linear regression: loss {first:.1f} to {last:.1f} ({last / first:.3f})", flush=True)
    return {"first_loss": first, "last_loss": last}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mnist", type=Path, metavar="DIR")
    parser.add_argument("--fashion-mnist", type=Path, metavar="DIR")
    parser.add_argument("--cifar", type=Path, metavar="DIR", help="class folders of CIFAR-10")
    keys = [tutorial.key for tutorial in TUTORIALS]
    parser.add_argument("--only", nargs="+", choices=keys, default=keys)
    add_results_option(parser)
    args = parser.parse_args()

    folders = {
        "mnist": args.mnist,
        "fashion-mnist": args.fashion_mnist,
        "cifar10": args.cifar,
    }
    figures = {}
    with tempfile.TemporaryDirectory() as temporary:
        for tutorial in TUTORIALS:
            if tutorial.key not in args.only:
                continue
            row = run_tutorial(tutorial, folders, Path(temporary))
            if row is not None:
                figures[tutorial.key] = row

    write_result("tutorials", figures, command_line(), args.results)


if __name__ == "__main__":
    main()
