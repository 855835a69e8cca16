"""Predictions from a process whose directory holds step3_infer.py and an exported file, and nothing else."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

import step3_infer
from deploy.comparing import Outputs
from deploy.samples import to_png
from step3_infer import Problem, problems


def predict_isolated(spec: dict, file: str, inputs: np.ndarray) -> Outputs:
    """Outputs for inputs [N, ...], images as PNG files, of a file that `spec` describes. Raises Problem."""
    place = tempfile.TemporaryDirectory
    with problems("no temporary directory to run it in", OSError), place() as folder, place() as images:
        done = run_step3(spec, file, inputs, folder, images)
    if done.returncode != 0:
        raise Problem(f"step3_infer.py failed: {done.stderr.strip()}")
    outputs, known = [], []
    for line in done.stdout.splitlines():
        result = json.loads(line)
        if spec["task"] == "regression":
            outputs.append([result["prediction"]])
        else:
            probabilities = {entry["label"]: entry["probability"] for entry in result["top"]}
            outputs.append([probabilities.get(name, np.nan) for name in spec["classes"]])
            known.append(result["known"])
    has_known = known and known[0] is not None
    return Outputs(np.array(outputs, np.float32), np.array(known, np.float32) if has_known else None)


def run_step3(spec: dict, file: str, inputs: np.ndarray, folder: str, pictures: str):
    """Run step3_infer.py in the empty directory `folder`; returns the subprocess.CompletedProcess."""
    shutil.copy(step3_infer.__file__, os.path.join(folder, "step3_infer.py"))
    shutil.copy(file, folder)
    command = [sys.executable, "-I", "step3_infer.py", "--format", "json", "--model", os.path.basename(file)]
    if spec["task"] == "regression":
        command += ["--values=" + ",".join(map(str, row)) for row in inputs.tolist()]
    else:
        command += ["--top-k", str(len(spec["classes"])), pictures]
        for index, image in enumerate(inputs):
            Path(pictures, f"{index:03}.png").write_bytes(to_png(image))
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, encoding="utf-8")
