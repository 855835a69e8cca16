"""Training from a cache larger than the memory allowed, and the rate of decoding. Run by hand, as
root, on Linux.

    python tests/benchmarks/bench_memory.py DIR --image-size 128 --limit-mb 1200

DIR: class folders. Decodes them into a fresh cache beside a Pillow-only loop over the same files,
then trains one epoch of MyNet in a memory control group (version 1 or 2) limited to --limit-mb,
page cache included.
"""

import argparse
import os
import re
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from benchmarks.measure import Measured, run_measured  # noqa: E402
from benchmarks.results import add_results_option, command_line, write_result  # noqa: E402


def decode_with_pillow(files: list[Path]) -> float:
    """Files a second of the shortest loop there is, on one core."""
    started = time.perf_counter()
    for file in files:
        with Image.open(file) as image:
            np.asarray(image)
    return len(files) / (time.perf_counter() - started)


def make_limited_group(megabytes: int) -> Path:
    """Make a memory control group below this process's own; returns its directory."""
    own = {}
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        own[controllers] = path

    name = f"bench-{os.getpid()}"
    if "memory" in own:  # version 1
        group = Path("/sys/fs/cgroup/memory" + own["memory"], name)
        limit = "memory.limit_in_bytes"
    else:
        group = Path("/sys/fs/cgroup" + own[""], name)
        limit = "memory.max"

    group.mkdir()
    (group / limit).write_text(str(megabytes << 20))
    return group


def train_limited(command: list, place: Path, limit_mb: int) -> Measured:
    """Run a command in a control group of its own."""
    group = make_limited_group(limit_mb)
    try:
        enter = f'echo $$ > {group}/cgroup.procs && exec "$@"'
        return run_measured(["sh", "-c", enter, "sh", *command], cwd=place)
    finally:
        group.rmdir()


def decoding_rate(printed: str) -> float:
    """Files a second that step1 says it decoded."""
    (rate,) = re.findall(r"decoded .* \(([\d,]+) per second\)", printed)
    return float(rate.replace(",", ""))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", type=Path)
    parser.add_argument("--image-size", type=int, default=128)
    parser.add_argument("--limit-mb", type=int, default=1200)
    add_results_option(parser)
    args = parser.parse_args()

    files = sorted(args.directory.glob("**/*.jpg"))
    figures = {"files": len(files), "pillow_rate": decode_with_pillow(files[::10])}
    print(f"Pillow alone, one core: {figures['pillow_rate']:,.0f} files a second")

    with tempfile.TemporaryDirectory(dir=args.directory.parent) as temporary:
        # step1 runs there, so that a relative path would mean another place to it.
        place = Path(temporary).resolve()
        command = [sys.executable, ROOT / "step1_train.py", "--dataset", "folder"]
        command += ["--data-dir", args.directory.resolve(), "--cache-dir", place]
        command += ["--model", "mynet", "--epochs", 1]

        print("at the images' own size, then the same again from the cache:", flush=True)
        first = run_measured(command, cwd=place)
        again = run_measured(command, cwd=place)
        for run in (first, again):
            print(f"{run.wall:.1f} s in all, one epoch of MyNet included")
        figures["first_seconds"] = first.wall
        figures["cached_seconds"] = again.wall
        figures["step1_rate"] = decoding_rate(first.out + first.err)

        enlarged = [*command, "--image-size", args.image_size]
        limited = train_limited(enlarged, place, args.limit_mb)
        cache = max(file.stat().st_size for file in place.rglob("*.u8"))
        print(limited.out)
        print(f"cache {cache / 2**20:,.0f} MB, limit {args.limit_mb:,} MB")
        figures["limited"] = {
            "image_size": args.image_size,
            "limit_mb": args.limit_mb,
            "cache_mb": cache / 2**20,
            "seconds": limited.wall,
        }

    write_result("memory", figures, command_line(), args.results)


if __name__ == "__main__":
    main()
