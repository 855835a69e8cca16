"""Keep what a benchmark measured, together with what it was measured on; render.py makes tables of
it.

Every benchmark writes one file, results/<name>.json, and replaces it as a whole, so that all
figures of a file come from one run on one machine. Only the standard library is imported: some
benchmarks must stay small processes.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
RESULTS = Path(__file__).resolve().parent / "results"
PACKAGES = ("torch", "onnxruntime", "numpy")

# Whether a processor has these decides how fast bf16 and int8 are.
INSTRUCTIONS = ("avx2", "avx512_bf16", "avx512_vnni", "avx_vnni", "amx_bf16", "amx_int8")


def add_results_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--results",
        type=Path,
        default=RESULTS,
        metavar="DIR",
        help="where the results file is written (default: tests/benchmarks/results)",
    )


def write_result(name: str, figures: dict, command: str, directory: Path = RESULTS) -> Path:
    """Write directory/<name>.json and return its path.

    figures: JSON of plain numbers, unrounded; render.py decides how they are shown. command: what a
    reader types to measure them again, see command_line().
    """
    result = {
        "figures": figures,
        "command": command,
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "processor": processor(),
        "versions": versions(),
    }

    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{name}.json"
    beside = path.with_suffix(".part")
    beside.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    os.replace(beside, path)

    print(f"wrote {path}", file=sys.stderr)
    return path


def read_results(directory: Path = RESULTS) -> dict[str, dict]:
    """What write_result() wrote, by name. A benchmark without results is missing."""
    results = {}
    for path in sorted(directory.glob("*.json")):
        results[path.stem] = json.loads(path.read_text(encoding="utf-8"))
    return results


def command_line() -> str:
    """The command that runs in this process, with the script's path relative to the repository."""
    script = Path(sys.argv[0]).resolve()
    if script.is_relative_to(ROOT):
        script = script.relative_to(ROOT)

    # Where the results go is no part of how they are measured.
    arguments = list(sys.argv[1:])
    if "--results" in arguments:
        start = arguments.index("--results")
        del arguments[start : start + 2]

    return shlex.join(["python", script.as_posix(), *arguments])


def commit() -> str | None:
    """The commit that is checked out, marked if the code differs from it; None without git."""
    git = ["git", "-c", "safe.directory=*", "-C", str(ROOT)]
    try:
        head = subprocess.run(
            [*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        )
        # Results and the tables made of them change while the benchmarks run one after the other.
        code = [".", ":(exclude)*.md", ":(exclude)tests/benchmarks/results"]
        status = subprocess.run(
            [*git, "status", "--porcelain", "--untracked-files=no", "--", *code],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None

    revision = head.stdout.strip()
    return f"{revision} with changes" if status.stdout.strip() else revision


def processor() -> dict:
    """Name and number of the CPUs that this process may use, and their INSTRUCTIONS."""
    name = platform.processor() or platform.machine()
    flags: set[str] = set()

    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                name = value.strip()
            if key.strip() == "flags":
                flags = set(value.split())

    return {
        "name": name,
        "cores": cpu_count(),
        "instructions": [name for name in INSTRUCTIONS if name in flags],
    }


def cpu_count() -> int:
    """CPUs that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
