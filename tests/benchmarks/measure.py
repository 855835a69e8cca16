"""Time and memory of whole commands, and times of functions taken in turn."""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

# On Linux the peak memory of a process includes what its parent held before exec. So a small
# process starts the command and measures it, whatever the benchmark itself has imported by then.
METER = """
import json, resource, subprocess, sys, time
started = time.perf_counter()
with open(sys.argv[1], "wb") as out, open(sys.argv[2], "wb") as err:
    code = subprocess.call(sys.argv[3:], stdout=out, stderr=err)
wall = time.perf_counter() - started
usage = resource.getrusage(resource.RUSAGE_CHILDREN)
scale = 1 if sys.platform == "darwin" else 1024
print(json.dumps({
    "code": code,
    "wall": wall,
    "cpu": usage.ru_utime + usage.ru_stime,
    "peak": usage.ru_maxrss * scale,
}))
"""


@dataclass
class Measured:
    """What one command took, and what it printed."""

    wall: float  # seconds
    cpu: float  # seconds of all its threads and child processes
    peak: int  # bytes: the largest resident set of the command or of one of its children
    out: str
    err: str


def run_measured(command: Sequence, cwd: Path | None = None) -> Measured:
    """Run a command to its end. Ends this process if the command fails."""
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary, "out")
        err = Path(temporary, "err")

        words = [str(word) for word in command]
        meter = [sys.executable, "-S", "-c", METER, str(out), str(err), *words]
        done = subprocess.run(meter, cwd=cwd, stdout=subprocess.PIPE, check=True)

        figures = json.loads(done.stdout)
        printed = out.read_text(encoding="utf-8", errors="replace")
        complaints = err.read_text(encoding="utf-8", errors="replace")

    if figures["code"] != 0:
        sys.exit(f"error: {' '.join(words)} ended with exit code {figures['code']}:\n{complaints}")

    return Measured(
        wall=figures["wall"],
        cpu=figures["cpu"],
        peak=figures["peak"],
        out=printed,
        err=complaints,
    )


def fastest_fifth(functions: Sequence[Callable[[], object]], seconds: float) -> list[float]:
    """Milliseconds of each function, called in turn for so many seconds: the 20th percentile.

    Another process, on a shared machine, delays now one and now the other: the fastest fifth of
    each counts. The first round is left out, because memory is allocated in it.
    """
    import numpy as np

    rounds = []  # [rounds][functions]
    until = time.perf_counter() + seconds
    while time.perf_counter() < until or len(rounds) < 6:
        times = []
        for function in functions:
            started = time.perf_counter()
            function()
            times.append(time.perf_counter() - started)
        rounds.append(times)

    fifths = np.quantile(rounds[1:], 0.2, axis=0)  # [functions]
    return [1000 * float(fifth) for fifth in fifths]
