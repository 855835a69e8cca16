"""Run a file as its user will: in a process of its own, with step3_infer.pyz and the file alone.

The process starts in an otherwise empty directory, ignores the environment (python -I) and decodes
images from PNG files. What the file or the program lacked would show here.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from deploy import archive
from deploy.comparing import Outputs
from deploy.samples import to_png
from inference.errors import Problem, problems
from inference.task import task_of


def predict(spec: dict, file: str, inputs: np.ndarray) -> Outputs:
    """Outputs for images [N, H, W, channels] or features [N, n]. Raises Problem."""
    # -I: no PYTHONPATH, no user site, no current directory to import from.
    command = [sys.executable, "-I", archive.NAME, "--format", "json"]
    command += ["--model", os.path.basename(file)]
    has_images = task_of(spec).has_images

    with (
        problems("no temporary directory to run it in", OSError),
        tempfile.TemporaryDirectory() as folder,
        tempfile.TemporaryDirectory() as pictures,
    ):
        archive.write_program(folder)
        shutil.copy(file, folder)
        if has_images:
            write_pictures(pictures, inputs)
            # All classes, so that every probability can be compared.
            command += ["--top-k", str(len(spec["classes"])), pictures]
        else:
            # With "=", as a value may start with a minus sign.
            command += ["--values=" + ",".join(map(str, row)) for row in inputs.tolist()]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, encoding="utf-8")

    if done.returncode != 0:
        raise Problem(f"{archive.NAME} failed: {done.stderr.strip()}")
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    return read_answers(rows, spec["classes"]) if has_images else read_values(rows)


def write_pictures(folder: str, images: np.ndarray) -> None:
    """Write images [N, H, W, channels] as files whose names keep their order."""
    for number, image in enumerate(images):
        Path(folder, f"{number:03}.png").write_bytes(to_png(image))


def read_answers(rows: list[dict], classes: list[str]) -> Outputs:
    """Probabilities [N, classes] and `known` [N] from the program's JSON lines."""
    main = []
    for row in rows:
        probabilities = {entry["label"]: entry["probability"] for entry in row["top"]}
        main.append([probabilities.get(name, np.nan) for name in classes])

    known = None
    if rows[0]["known"] is not None:
        known = np.array([row["known"] for row in rows], np.float32)
    return Outputs(np.array(main, np.float32), known)


def read_values(rows: list[dict]) -> Outputs:
    """Predictions [N, 1] from the program's JSON lines."""
    return Outputs(np.array([[row["prediction"]] for row in rows], np.float32), None)
