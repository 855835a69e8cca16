#!/usr/bin/env python3
"""Kill a small training run again and again, with SIGKILL at random moments, resume it, and look
what was lost.

    python tests/benchmarks/soak_resume.py --kills 100     # 10 minutes or so

Prints the checkpoints that could not be read, the completed epochs that were lost, and whether the
weights and metrics at the end are those of a run that nobody disturbed. Exit code 0 when nothing
was lost.
"""

import argparse
import csv
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from benchmarks.results import add_results_option, command_line, write_result  # noqa: E402

STEP1 = ROOT / "step1_train.py"

# Dropout, augmentation, momentum and a schedule: everything that could come out differently.
RUN = ["--model", "mynet", "--epochs", "8", "--batch-size", "64"]
RUN += ["--augment", "translate", "cutout", "--device", "cpu", "--precision", "fp32"]


def start(place: Path, *arguments: str) -> subprocess.Popen:
    command = [sys.executable, str(STEP1), *arguments]
    return subprocess.Popen(
        command,
        cwd=place,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for(process: subprocess.Popen) -> str:
    """Let a process end; returns what it printed."""
    out = process.communicate()[0]
    if process.returncode:
        raise SystemExit(f"error: step1 failed on its own: {out}")
    return out


def read(run_dir: Path) -> tuple[dict, list[dict]]:
    """The checkpoint, and the metrics without their times."""
    rows = list(csv.DictReader((run_dir / "metrics.csv").read_text().splitlines()))
    for row in rows:
        del row["seconds"]
    return torch.load(run_dir / "checkpoint.pt", weights_only=True), rows


def last_epoch(out: str) -> int:
    """The last epoch of which a row was printed, 0 if there is none."""
    epochs = re.findall(r"^ +(\d+)   ", out, re.MULTILINE)
    return int(epochs[-1]) if epochs else 0


def kill_once(place: Path, name: str, rng: random.Random) -> tuple[str, bool]:
    """Start or resume the run and kill it at a random moment.

    Returns what it printed, and whether it had ended by then.
    """
    run_dir = place / "runs" / name
    if (run_dir / "config.json").exists():
        process = start(place, "--resume", name)
    else:
        process = start(place, *RUN, "--name", name, "--checkpoint-every", "3")

    # Most kills come after the first step, the others at any moment, while the process still loads.
    printed = ""
    if rng.random() < 0.9:
        for line in process.stdout:
            printed += line
            if line.startswith("epoch "):
                break
    time.sleep(rng.random() * 1.5)

    process.kill()
    printed += process.communicate()[0]
    return printed, (run_dir / "summary.json").exists()


def soak(kills: int, seed: int, place: Path) -> dict[str, int]:
    """Kill and resume runs below `place` until there were so many kills and the last run has ended.

    Returns how often each happened: "killed", "finished", "unreadable" and "lost" checkpoints, and
    "different" results.
    """
    rng = random.Random(seed)
    counts = {"killed": 0, "finished": 0, "unreadable": 0, "lost": 0, "different": 0}

    wait_for(start(place, *RUN, "--name", "undisturbed"))
    reference = read(place / "runs" / "undisturbed")

    name = "run-1"
    known = 0  # the last epoch that was printed as done
    while counts["killed"] < kills or known:
        if counts["killed"] < kills:
            out, ended = kill_once(place, name, rng)
            if not ended:
                counts["killed"] += 1
            known = max(known, last_epoch(out))
        else:
            wait_for(start(place, "--resume", name))
            ended = True

        run_dir = place / "runs" / name
        if known or (run_dir / "checkpoint.pt").exists():
            look_for_loss(run_dir, known, counts)

        if ended:
            if not is_same(read(run_dir), reference):
                counts["different"] += 1
            counts["finished"] += 1
            name = f"run-{counts['finished'] + 1}"
            known = 0
    return counts


def look_for_loss(run_dir: Path, known: int, counts: dict[str, int]) -> None:
    """Count a checkpoint that cannot be read, or that lacks epochs which were printed as done."""
    try:
        checkpoint = torch.load(run_dir / "checkpoint.pt", weights_only=True)
    except Exception as error:  # whatever torch.load makes of a broken file
        counts["unreadable"] += 1
        print(f"unreadable: {error}")
        return

    if checkpoint["training"]["progress"]["epoch"] - 1 < known:
        counts["lost"] += 1


def is_same(result: tuple[dict, list], reference: tuple[dict, list]) -> bool:
    """Are weights and metrics those of the run that nobody disturbed, bit for bit?"""
    checkpoint, rows = result
    expected, expected_rows = reference
    if rows != expected_rows:
        return False
    for name, tensor in checkpoint["state_dict"].items():
        if not torch.equal(tensor, expected["state_dict"][name]):
            return False
    return True


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    add_results_option(parser)
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as place:
        counts = soak(args.kills, args.seed, Path(place))

    print(
        f"{counts['killed']} kills: {counts['unreadable']} unreadable checkpoints, "
        f"{counts['lost']} lost completed epochs; {counts['finished']} runs ended, "
        f"{counts['different']} with other weights or metrics"
    )
    write_result("resume", counts, command_line(), args.results)
    return 1 if counts["unreadable"] or counts["lost"] or counts["different"] else 0


if __name__ == "__main__":
    sys.exit(main())
