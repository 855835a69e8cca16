#!/usr/bin/env python3
"""Kill a small training run again and again, with SIGKILL at random moments, resume it, and look what was
lost.

    python tests/benchmarks/soak_resume.py --kills 100     # 10 minutes or so

Prints the checkpoints that could not be read, the completed epochs that were lost, and whether the weights
and metrics at the end are those of a run that nobody disturbed. Exit code 0 when nothing was lost.
"""

import argparse
import csv
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

STEP1 = Path(__file__).resolve().parents[2] / "step1_train.py"
# Dropout, augmentation, momentum and a schedule: everything that could come out differently.
RUN = "--model mynet --epochs 8 --batch-size 64 --augment translate cutout".split()
RUN += "--device cpu --precision fp32".split()


def start(place, *arguments):
    command = [sys.executable, str(STEP1), *arguments]
    return subprocess.Popen(command, cwd=place, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def whole(process):
    """Let a process end; -> what it printed."""
    out = process.communicate()[0]
    if process.returncode:
        raise SystemExit(f"error: step1 failed on its own: {out}")
    return out


def read(run):
    """-> (the checkpoint, the metrics without their times)."""
    rows = list(csv.DictReader((run / "metrics.csv").read_text().splitlines()))
    rows = [{key: value for key, value in row.items() if key != "seconds"} for row in rows]
    return torch.load(run / "checkpoint.pt", weights_only=True), rows


def completed(out):
    """The last epoch of which a row was printed."""
    rows = re.findall(r"^ +(\d+)   ", out, re.MULTILINE)
    return int(rows[-1]) if rows else 0


def kill_once(place, name, rng):
    """Start or resume the run and kill it at a random moment. -> (what it printed, was it done by then?)"""
    begun = (place / "runs" / name / "config.json").exists()
    process = start(
        place, *(("--resume", name) if begun else (*RUN, "--name", name, "--checkpoint-every", "3"))
    )
    if rng.random() < 0.9:  # from the first step on; otherwise at any moment, while it still loads
        first = ""
        for line in process.stdout:
            first += line
            if line.startswith("epoch "):
                break
    else:
        first = ""
    time.sleep(rng.random() * 1.5)
    process.kill()
    return first + process.communicate()[0], (place / "runs" / name / "summary.json").exists()


def soak(kills, seed, place):
    """-> {"killed", "finished", "unreadable", "lost", "different"}: how often each happened."""
    rng, counts = (
        random.Random(seed),
        dict.fromkeys(("killed", "finished", "unreadable", "lost", "different"), 0),
    )
    whole(start(place, *RUN, "--name", "undisturbed"))
    reference, reference_rows = read(place / "runs" / "undisturbed")
    name, known = "run-1", 0  # known: the last epoch that was printed as done
    while counts["killed"] < kills or known:
        last = counts["killed"] >= kills
        if last:
            whole(start(place, "--resume", name))
            ended = True
        else:
            out, ended = kill_once(place, name, rng)
            counts["killed"] += not ended
            known = max(known, completed(out))
        run = place / "runs" / name
        if known or (run / "checkpoint.pt").exists():
            try:
                checkpoint = torch.load(run / "checkpoint.pt", weights_only=True)
                counts["lost"] += checkpoint["training"]["progress"]["epoch"] - 1 < known
            except Exception as error:  # whatever torch.load makes of a broken file
                counts["unreadable"] += 1
                print(f"unreadable: {error}")
        if ended:
            checkpoint, rows = read(run)
            same = all(
                torch.equal(value, reference["state_dict"][key])
                for key, value in checkpoint["state_dict"].items()
            )
            counts["different"] += not same or rows != reference_rows
            counts["finished"] += 1
            name, known = f"run-{counts['finished'] + 1}", 0
    return counts


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    place = Path(tempfile.mkdtemp())
    counts = soak(args.kills, args.seed, place)
    shutil.rmtree(place)
    print(
        f"{counts['killed']} kills: {counts['unreadable']} unreadable checkpoints, "
        f"{counts['lost']} lost completed epochs; {counts['finished']} runs ended, "
        f"{counts['different']} with other weights or metrics"
    )
    return 1 if counts["unreadable"] or counts["lost"] or counts["different"] else 0


if __name__ == "__main__":
    sys.exit(main())
