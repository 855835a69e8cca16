"""What are the pictures worth that step3 collects? Run by hand.

    python tests/benchmarks/bench_collect.py --cifar DIR --keep work

Trains a network on 2,000 CIFAR-10 images and lets its file predict 10,000 that it has not seen,
with `--collect ... --collect-at-most 500`. The collected images, with their labels, are added to
the 2,000, and a network is trained on the 2,500. The same with 500 images drawn at random. All with
the default network at half its width for 20 epochs, and without calibration. With `--weights FILE`,
timm's tf_efficientnet_lite0 is fine-tuned from these weights instead, at 128 pixels for 4 epochs.
The accuracy is that on all 10,000 test images. `--keep DIR` leaves runs and lists there, and goes
on where an earlier call ended.
"""

import argparse
import csv
import json
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from benchmarks.measure import run_measured  # noqa: E402
from benchmarks.results import add_results_option, command_line, write_result  # noqa: E402

TRAINED, UNSEEN, COLLECTED = 2000, 10_000, 500
TRAINING = ["--epochs", "20", "--width", "0.5"]
FINE_TUNING = ["--model", "timm/tf_efficientnet_lite0", "--image-size", "128", "--epochs", "4"]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cifar", type=Path, required=True, metavar="DIR", help="class folders")
    parser.add_argument("--seeds", type=int, default=3, metavar="N")
    parser.add_argument("--threads", type=int, default=1, metavar="N")
    parser.add_argument("--weights", type=Path, metavar="FILE", help="fine-tune from these")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="work there, and leave it")
    add_results_option(parser)
    args = parser.parse_args()

    training = TRAINING
    if args.weights:
        training = [*FINE_TUNING, "--pretrained", args.weights.resolve()]
    options = ["--calibration", "none", "--quiet", "--threads", args.threads]

    with tempfile.TemporaryDirectory() as temporary:
        work = args.keep or Path(temporary)
        rows = []
        for seed in range(args.seeds):
            experiment = Experiment(
                cifar=args.cifar.resolve(),
                work=work.resolve() / str(seed),
                seed=seed,
                options=[*training, *options, "--seed", seed],
            )
            rows.append(experiment.measure())
            print(json.dumps(rows[-1]), flush=True)

    gains = [row["collected"] - row["random"] for row in rows]
    print(f"gain over random: {100 * statistics.fmean(gains):.2f} points")
    figures = {
        "options": training,
        "trained": TRAINED,
        "unseen": UNSEEN,
        "added": COLLECTED,
        "seeds": rows,
    }
    write_result("collect", figures, command_line(), args.results)


@dataclass
class Experiment:
    """One seed's trainings, in a directory of their own."""

    cifar: Path
    work: Path
    seed: int
    options: list  # of step1, besides the images

    def measure(self) -> dict:
        """The accuracies before, and with images added that were collected and drawn at random."""
        self.work.mkdir(parents=True, exist_ok=True)
        train, unseen = self.draw_images()

        first = self.accuracy_of("first", train)
        if not (self.work / "collected.txt").exists():
            self.collect(unseen)
        names = (self.work / "collected.txt").read_text().splitlines()
        collected = [path for path in unseen if str(path) in names]
        assert len(collected) == COLLECTED

        drawn = np.random.default_rng(self.seed + 1).permutation(len(unseen))[:COLLECTED]
        random = [unseen[number] for number in drawn]
        return {
            "seed": self.seed,
            "first": first,
            "collected": self.accuracy_of("collected", train + collected),
            "random": self.accuracy_of("random", train + random),
        }

    def draw_images(self) -> tuple[list[Path], list[Path]]:
        """The images to train on, as many of each class, and those that are not labelled yet."""
        rng = np.random.default_rng(self.seed)
        train = []
        unseen = []
        for folder in sorted((self.cifar / "train").iterdir()):
            files = sorted(folder.iterdir())
            order = rng.permutation(len(files))
            each = TRAINED // 10
            train += [files[number] for number in order[:each]]
            unseen += [files[number] for number in order[each : each + UNSEEN // 10]]
        return train, unseen

    def accuracy_of(self, name: str, images: list[Path]) -> float:
        """The accuracy on the test split of a network that is trained on these images."""
        run = self.work / "runs" / name
        if not (run / "summary.json").exists():
            listed = self.work / f"{name}.csv"
            self.write_list(listed, images)
            command = [sys.executable, ROOT / "step1_train.py", "--data-dir", listed]
            run_measured([*command, "--name", name, *self.options], cwd=self.work)
        return json.loads((run / "summary.json").read_text())["test_accuracy"]

    def write_list(self, path: Path, images: list[Path]) -> None:
        """Write a list of these images for training and of the test split."""
        with open(path, "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["path", "label", "split"])
            for image in images:
                writer.writerow([image, image.parent.name, "train"])
            for image in sorted((self.cifar / "test").rglob("*.*")):
                writer.writerow([image, image.parent.name, "test"])

    def collect(self, unseen: list[Path]) -> None:
        """Let the first network's file collect from the unseen images; write their names."""
        step2 = [sys.executable, ROOT / "step2_export.py", "--run", "first", "--format", "onnx"]
        run_measured(step2, cwd=self.work)

        # Links without the label, as unlabelled pictures come.
        camera = self.work / "camera"
        camera.mkdir(exist_ok=True)
        links = {}
        for number, path in enumerate(unseen):
            link = camera / f"{number:05}{path.suffix}"
            link.unlink(missing_ok=True)
            link.symlink_to(path)
            links[link.stem] = number

        step3 = [sys.executable, ROOT / "step3_infer.py", "--model", "exports/first/model.onnx"]
        step3 += ["--collect", "collected", "--collect-at-most", COLLECTED, camera]
        run_measured(step3, cwd=self.work)
        found = (self.work / "collected").rglob("*.jpg")
        numbers = [path.stem.rpartition("-")[0] for path in found]
        (self.work / "collected.txt").write_text("\n".join(str(unseen[links[n]]) for n in numbers))


if __name__ == "__main__":
    main()
