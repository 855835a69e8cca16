"""Is honest work ever refused, and is every fault caught? Run by hand.

    python tests/benchmarks/bench_honest.py DATASETS --work work/honest --processes 2

DATASETS holds MNIST/raw and cifar10/train/<class>/*. Of these and of the bundled digits 200 sets of
100 to 5,000 images are made (honest_sets.py): random ones, ones with a darker and noisier test
split, ones with a long-tailed training split, and ones that step1 splits itself. Each is trained
briefly by step1 and exported by step2, every third also as int8, with the gate as it is. Into every
eighth export faults are planted (faults.py), which the gate must catch.

Training is short on purpose: what is measured is the gate, not accuracy. --work keeps what is done:
a second call goes on, with more --sets or after an interruption. Then the table is written.
"""

import argparse
import contextlib
import io
import json
import multiprocessing
import os
import re
import shutil
import sys
import time
import traceback
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from benchmarks import faults  # noqa: E402
from benchmarks.honest_sets import KINDS, Pool, Recipe, recipe, write_set  # noqa: E402
from benchmarks.results import add_results_option, command_line, write_result  # noqa: E402

SETS = 200
SIZE = "28"  # the least that all these networks take
STOPPED = (130, 143)  # the exit codes after a signal
PLANTED = 8  # faults are planted into one of so many exports
# The kinds of warnings of step2, by a part of their words.
WARNINGS = {
    "temperature": "the temperature worsens",
    "threshold": "--reject",
    "int8 accuracy": "it loses",
    "int8 speed": "not faster than float32",
}


# --------------------------------------------------------------------------------------- one set
def measure(number: int, datasets: Path, work: Path) -> dict:
    """Make a set, train on it, export it, and perhaps plant faults; returns its figures."""
    chosen = recipe(number)
    place = work / f"set-{number:03}"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)

    started = time.perf_counter()
    data_dir = write_set(chosen, Pool(chosen.source, datasets), place / "images")
    with contextlib.chdir(place):
        figures = asdict(chosen) | train_and_export(chosen, data_dir)
        if figures["exported"] and number % PLANTED == 0:
            figures["faults"] = plant(place)
    figures["seconds"] = time.perf_counter() - started
    shutil.rmtree(place)
    return figures


def train_and_export(chosen: Recipe, data_dir: Path) -> dict:
    """Run step1 and step2 in the current directory as their commands do."""
    import step1_train
    import step2_export
    from deploy.trust import HINT

    options = ["--data-dir", str(data_dir), "--dataset", chosen.layout, "--model", chosen.model]
    options += ["--epochs", str(chosen.epochs), "--name", "run", "--image-size", SIZE]
    if chosen.model == "airbench":
        options += ["--width", "0.25"]
    code, output = call(step1_train.main, [*options, "--seed", str(chosen.number)])
    if code != 0:
        return {"trained": False, "exported": False, "refusal": last_error(output)}

    summary = json.loads(Path("runs", "run", "summary.json").read_text(encoding="utf-8"))
    formats = ["onnx", "onnx-int8"] if chosen.int8 else ["onnx"]
    code, output = call(step2_export.main, ["--format", *formats])
    parity = {}
    if Path("exports", "run", "parity.json").exists():
        parity = json.loads(Path("exports", "run", "parity.json").read_text(encoding="utf-8"))
    warnings = Counter()
    for line in output.splitlines():
        if line.startswith("warning: ") and not line.endswith(HINT):
            warnings[kind_of(line)] += 1
    return {
        "trained": True,
        "exported": code == 0,
        "refusal": None if code == 0 else last_error(output),
        "accuracy": summary["test_accuracy"],
        "warnings": dict(warnings),
        "drop": parity.get("onnx-int8", {}).get("drop"),
    }


def call(main, arguments: list[str]) -> tuple[int, str]:
    """The exit code of a step, and all that it prints. A traceback counts as a refusal."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        try:
            code = main(arguments)
        except SystemExit as stop:
            code = stop.code
        except Exception:
            traceback.print_exc(file=output)
            code = 1
    if code in STOPPED:
        raise KeyboardInterrupt  # no refusal: nothing of this set is kept
    return code, output.getvalue()


def last_error(output: str) -> str:
    lines = output.strip().splitlines()
    errors = [number for number, line in enumerate(lines) if line.startswith("error: ")]
    return "\n".join(lines[errors[0] :] if errors else lines[-5:])


def kind_of(line: str) -> str:
    for kind, words in WARNINGS.items():
        if words in line:
            return kind
    *_, words = line.split(": ", 2)  # after the path
    return re.sub(r"[\d.]+", "N", words)[:60]


def plant(place: Path) -> dict[str, list[str]]:
    """What the gate says of each planted fault, by its name."""
    import step2_export
    from deploy.reference import reference

    trained = step2_export.read_run(str(place / "runs" / "run"))
    dataset = step2_export.load_data(trained, splits=("train", "test"))
    expected = reference(trained, dataset.test_images)
    exports = place / "exports" / "run"
    return dict(faults.plant_all(trained, dataset, expected, exports, place))


# -------------------------------------------------------------------------------------- all sets
def work_on(job: tuple[int, Path, Path]) -> dict:
    """Measure one set unless an earlier call has, and keep its figures in --work."""
    number, datasets, work = job
    file = work / f"{number:03}.json"
    if file.exists():
        return json.loads(file.read_text(encoding="utf-8"))

    figures = measure(number, datasets, work)
    beside = file.with_suffix(".part")
    beside.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    os.replace(beside, file)
    return figures


def begin() -> None:
    """Prepare a process: no pictures are drawn, which take longer than the training here."""
    import torch

    from deploy import camera
    from report import drawing, page

    torch.set_num_threads(1)
    drawing.draw_run = lambda *args, **more: []
    page.draw_familiar = lambda *args: None
    camera.survey = lambda *args: []


def summarise(sets: list[dict]) -> dict:
    """The figures of the results file."""
    by_kind = {}
    for kind in KINDS:
        of_kind = [figures for figures in sets if figures["kind"] == kind]
        warned = Counter()
        for figures in of_kind:
            warned.update(figures.get("warnings", {}).keys())
        by_kind[kind] = {
            "sets": len(of_kind),
            "refused": sum(not figures["exported"] for figures in of_kind),
            "warned": dict(warned),
        }

    found = {}
    for figures in sets:
        for name, failures in figures.get("faults", {}).items():
            entry = found.setdefault(name.replace("_", " "), {"planted": 0, "caught": 0})
            entry["planted"] += 1
            entry["caught"] += bool(failures)

    refusals = [
        {"set": figures["number"], "kind": figures["kind"], "said": figures["refusal"]}
        for figures in sets
        if not figures["exported"]
    ]
    return {
        "sets": len(sets),
        "int8": sum(figures["int8"] for figures in sets),
        "images": [min(f["images"] for f in sets), max(f["images"] for f in sets)],
        "kinds": by_kind,
        "refusals": refusals,
        "faults": found,
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("datasets", type=Path, metavar="DATASETS")
    parser.add_argument("--work", type=Path, required=True, metavar="DIR")
    parser.add_argument("--sets", type=int, default=SETS, metavar="N")
    parser.add_argument("--processes", type=int, default=1, metavar="N")
    add_results_option(parser)
    args = parser.parse_args()

    work = args.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    jobs = [(number, args.datasets.resolve(), work) for number in range(args.sets)]
    sets = []
    context = multiprocessing.get_context("spawn")  # of a fork, torch's threads would hang
    # Not multiprocessing's own pool: its processes may not start others, which decode the images.
    with ProcessPoolExecutor(args.processes, context, begin) as pool:
        for figures in pool.map(work_on, jobs):
            said = figures["refusal"] or ", ".join(figures.get("warnings", {})) or "-"
            number = figures["number"]
            print(
                f"{number:3} {figures['kind']:11} {figures['seconds']:5.1f} s  {said}", flush=True
            )
            sets.append(figures)

    write_result("honest", summarise(sets), command_line(), args.results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
