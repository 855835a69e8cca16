"""What a microcontroller's int8 file keeps and takes: accuracy, differences, bytes. Run by hand.

    python tests/benchmarks/bench_micro.py runs/digits-tiny runs/cifar10-tiny

Needs litert-torch, ai-edge-quantizer and tflite-micro. For each run: exports it by step2 as
tflite-micro and as int8 ONNX, into a temporary directory, and reads the figures that the gate
measured. Both exports must pass it.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from benchmarks.bench_export import export  # noqa: E402
from benchmarks.results import add_results_option, command_line, write_result  # noqa: E402

from inference.engines import read_spec_at_end  # noqa: E402


def bench_run(run: Path, data_dir: str | None, place: Path) -> dict:
    """Export one run and gather its figures; what was not measured is None."""
    folder = place / run.name
    measured = export(run, folder, data_dir, "--format", "tflite-micro")
    export(run, folder, data_dir, "--format", "onnx-int8")

    file = folder / "model.int8.tflite"
    spec = json.loads(read_spec_at_end(str(file)))
    parity = json.loads((folder / "parity.json").read_text(encoding="utf-8"))
    micro, onnx = parity["tflite-micro"], parity["onnx-int8"]
    return {
        "run": run.name,
        "dataset": spec["dataset"],
        "model": spec["model"],
        "parameters": spec["parameters"],
        "multiply_adds": spec["device"]["multiply_adds"],
        "file_bytes": file.stat().st_size,
        "flash_bytes": micro["model_bytes"],
        "arena": micro["arena"],
        "runtime": micro["runtime"],
        "images": micro["samples"],
        "accuracy": micro["accuracy"],
        "accuracy_float": micro["accuracy_trained"],  # on the same images
        "onnx_images": onnx["samples"],
        "onnx_accuracy": onnx["accuracy"],
        "onnx_accuracy_float": onnx["accuracy_trained"],
        "largest_difference": micro["max_abs_diff"],
        "mean_difference": micro["mean_abs_diff"],
        "export_cpu": measured.cpu,
        "export_wall": measured.wall,
    }


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="directories of runs")
    parser.add_argument("--data-dir", help="default: where step1 had it")
    add_results_option(parser)
    args = parser.parse_args()

    rows = []
    with tempfile.TemporaryDirectory() as parent:
        for run in args.runs:
            figures = bench_run(run, args.data_dir, Path(parent))
            print(json.dumps(figures, indent=1), flush=True)
            rows.append(figures)

    write_result("micro", {"runs": rows}, command_line(), args.results)


if __name__ == "__main__":
    main()
