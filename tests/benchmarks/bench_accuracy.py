"""What the three steps reach with their defaults: accuracy, time and file size. Run by hand on a
quiet machine.

    python tests/benchmarks/bench_accuracy.py --cifar DIR --mnist DIR --keep work

Trains the default network on the bundled digits and on what the options name, exports it as ONNX
and as int8, and reports the accuracy of the exported files. --cifar takes class folders,
train/<class>/* and test/<class>/*; --mnist takes what step1 takes as --data-dir. --keep leaves
runs/ and exports/ in a directory: the other benchmarks need them.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from benchmarks.measure import run_measured  # noqa: E402
from benchmarks.results import add_results_option, command_line, write_result  # noqa: E402


def train(place: Path, name: str, arguments: list) -> dict:
    """Train one run below `place` with step1; returns its summary."""
    run_measured([sys.executable, ROOT / "step1_train.py", "--name", name, *arguments], cwd=place)
    summary = place / "runs" / name / "summary.json"
    return json.loads(summary.read_text())


def export(place: Path, name: str) -> dict:
    """Export a run as ONNX and as int8 with step2; returns its parity.json."""
    formats = ["--format", "onnx", "onnx-int8"]
    run_measured([sys.executable, ROOT / "step2_export.py", "--run", name, *formats], cwd=place)
    parity = place / "exports" / name / "parity.json"
    return json.loads(parity.read_text())


def measure_run(place: Path, name: str, arguments: list) -> dict:
    """Train, export, and gather the figures of one seed. Accuracies are fractions."""
    summary = train(place, name, arguments)
    parity = export(place, name)

    # What users hold in the end is the file: its accuracy and size count, not the network's.
    exported = place / "exports" / name

    figures = {
        "epochs": summary["epochs"],
        "train_seconds": summary["train_seconds"],
        "accuracy": parity["onnx"]["accuracy"],
        "int8_accuracy": parity["onnx-int8"]["accuracy"],
        "bytes": (exported / "model.onnx").stat().st_size,
        "int8_bytes": (exported / "model.int8.onnx").stat().st_size,
        "calibration_error": parity["onnx"].get("calibration_error"),
        "calibration_error_floor": parity["onnx"].get("calibration_error_floor"),
        "calibration_error_uncalibrated": parity["onnx"].get("calibration_error_uncalibrated"),
        "kept": parity["onnx"].get("kept"),
    }
    print(
        f"{name}: {figures['accuracy']:.2%}, int8 {figures['int8_accuracy']:.2%}, "
        f"{figures['train_seconds']:.1f} s, "
        f"{figures['bytes']:,} bytes, int8 {figures['int8_bytes']:,} bytes",
        flush=True,
    )
    return figures


def measure_seeds(place: Path, name: str, arguments: list, seeds: int) -> list[dict]:
    rows = []
    for seed in range(seeds):
        figures = measure_run(place, f"{name}-{seed}", [*arguments, "--seed", seed])
        rows.append({"seed": seed, **figures})
    return rows


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cifar", type=Path, metavar="DIR", help="class folders of CIFAR-10")
    parser.add_argument("--mnist", type=Path, metavar="DIR", help="torchvision's MNIST")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="leave runs/ and exports/ here")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="of the digits: 0 to N-1")
    parser.add_argument(
        "--large-seeds", type=int, default=1, metavar="N", help="of MNIST and CIFAR-10"
    )
    parser.add_argument("--digits-epochs", type=int, metavar="N", help="default: step1's own")
    parser.add_argument("--mnist-epochs", type=int, default=3, metavar="N")
    parser.add_argument("--cifar-epochs", type=int, default=3, metavar="N")
    add_results_option(parser)
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as temporary:
        place = args.keep.resolve() if args.keep else Path(temporary)
        place.mkdir(parents=True, exist_ok=True)

        figures = {}
        # The digits take the recipe's epochs; the larger sets fewer, for time.
        digits = ["--epochs", args.digits_epochs] if args.digits_epochs else []
        figures["digits"] = measure_seeds(place, "digits", digits, args.seeds)

        if args.mnist:
            mnist = ["--dataset", "mnist", "--data-dir", args.mnist.resolve()]
            mnist += ["--epochs", args.mnist_epochs]
            figures["mnist"] = measure_seeds(place, "mnist", mnist, args.large_seeds)

        if args.cifar:
            # The images may lie where nothing can be written, so the cache lies elsewhere.
            cifar = ["--data-dir", args.cifar.resolve(), "--cache-dir", place / "cache"]
            cifar += ["--epochs", args.cifar_epochs]
            figures["cifar"] = measure_seeds(place, "cifar10", cifar, args.large_seeds)

    write_result("accuracy", figures, command_line(), args.results)


if __name__ == "__main__":
    main()
