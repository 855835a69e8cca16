"""What a microcontroller's int8 file keeps and takes: accuracy, differences, bytes, instructions.
Run by hand.

    python tests/benchmarks/bench_micro.py runs/digits-tiny runs/cifar10-tiny

Needs litert-torch, ai-edge-quantizer and tflite-micro. For each run, one of resnet8.py's too:
exports it by step2 as tflite-micro and as int8 ONNX, into a temporary directory, and reads the
figures that the gate measured. Both exports must pass it. Instructions are those of the micro
runtime's reference kernels on this processor, counted by valgrind where that is installed: more
than a microcontroller's own kernels take, but the same whatever else this machine does.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from benchmarks.bench_export import export  # noqa: E402
from benchmarks.results import add_results_option, command_line, write_result  # noqa: E402

from inference.engines import read_spec_at_end  # noqa: E402

STEP2 = (Path(__file__).with_name("resnet8.py"), "step2_export.py")  # which knows ResNet-8, too
COUNTED = 10  # images whose instructions are counted, to the mean

# Runs a file in the micro runtime on so many images of one grey.
RUN = """
import json, sys
from pathlib import Path
import numpy as np
sys.path.insert(0, sys.argv[1])
from deploy.micro_runtime import load_micro
run, _ = load_micro(Path(sys.argv[2]).read_bytes())
run(np.full([int(sys.argv[4]), *json.loads(sys.argv[3])], 128, np.uint8))
"""


def count_instructions(file: Path, shape: list[int]) -> int | None:
    """Instructions of one image [H, W, C] in the micro runtime; None without valgrind."""
    if not shutil.which("valgrind"):
        return None
    totals = []
    for images in (1, 1 + COUNTED):
        command = ["valgrind", "--tool=cachegrind", "--cache-sim=no"]
        command += ["--cachegrind-out-file=/dev/null", sys.executable, "-c", RUN, str(ROOT)]
        command += [str(file), json.dumps(shape), str(images)]
        # Python's own work depends on the order of its sets.
        environment = {**os.environ, "PYTHONHASHSEED": "0"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        (total,) = re.findall(r"I\s+refs:\s+([\d,]+)", done.stderr)
        totals.append(int(total.replace(",", "")))
    return (totals[1] - totals[0]) // COUNTED


def bench_run(run: Path, data_dir: str | None, place: Path, more: list[str]) -> dict:
    """Export one run and gather its figures; what was not measured is None. more: for step2."""
    folder = place / run.name
    measured = export(run, folder, data_dir, "--format", "tflite-micro", *more, program=STEP2)
    export(run, folder, data_dir, "--format", "onnx-int8", *more, program=STEP2)

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
        "instructions": count_instructions(file, [*spec["image_size"], spec["channels"]]),
        "export_cpu": measured.cpu,
        "export_wall": measured.wall,
    }


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="directories of runs")
    parser.add_argument("--data-dir", help="default: where step1 had it")
    parser.add_argument("--max-drop", metavar="POINTS", help="as step2's, of all runs")
    add_results_option(parser)
    args = parser.parse_args()
    more = ["--max-drop", args.max_drop] if args.max_drop else []

    rows = []
    with tempfile.TemporaryDirectory() as parent:
        for run in args.runs:
            figures = bench_run(run, args.data_dir, Path(parent), more)
            print(json.dumps(figures, indent=1), flush=True)
            rows.append(figures)

    write_result("micro", {"runs": rows}, command_line(), args.results)


if __name__ == "__main__":
    main()
