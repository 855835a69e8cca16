"""Training from a cache larger than the memory allowed, and the rate of decoding. Run by hand, as root, on
Linux.

    python tests/benchmarks/bench_memory.py DIR --image-size 128 --limit-mb 1200

DIR: class folders. Decodes them into a fresh cache beside a Pillow-only loop over the same files, then trains
one epoch of MyNet in a memory control group (version 1 or 2) limited to --limit-mb, page cache included.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent.parent


def pillow_only(files):
    """Files a second of the shortest loop there is, on one core."""
    started = time.perf_counter()
    for file in files:
        with Image.open(file) as image:
            np.asarray(image)
    return len(files) / (time.perf_counter() - started)


def limited(megabytes):
    """A new memory control group below this process's own. -> its directory."""
    lines = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    own = {controllers: path for _, controllers, path in lines}
    if "memory" in own:
        group, limit = (
            Path("/sys/fs/cgroup/memory" + own["memory"], f"bench-{os.getpid()}"),
            "memory.limit_in_bytes",
        )
    else:
        group, limit = Path("/sys/fs/cgroup" + own[""], f"bench-{os.getpid()}"), "memory.max"
    group.mkdir()
    (group / limit).write_text(str(megabytes << 20))
    return group


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", type=Path)
    parser.add_argument("--image-size", type=int, default=128)
    parser.add_argument("--limit-mb", type=int, default=1200)
    args = parser.parse_args()
    files = sorted(args.directory.glob("**/*.jpg"))
    print(f"Pillow alone, one core: {pillow_only(files[::10]):,.0f} files a second")
    with tempfile.TemporaryDirectory(dir=args.directory.parent) as place:
        command = [
            sys.executable,
            ROOT / "step1_train.py",
            "--dataset",
            "folder",
            "--data-dir",
            args.directory.resolve(),
        ]
        command += ["--cache-dir", place, "--model", "mynet", "--epochs", "1"]
        print("at the images' own size, then the same again from the cache:", flush=True)
        for _ in range(2):
            started = time.perf_counter()
            subprocess.run(command, cwd=place, check=True, stdout=subprocess.DEVNULL)
            print(f"{time.perf_counter() - started:.1f} s in all, one epoch of MyNet included")
        command += ["--image-size", str(args.image_size)]
        group = limited(args.limit_mb)
        enter = f'echo $$ > {group}/cgroup.procs && exec "$@"'
        subprocess.run(["sh", "-c", enter, "sh", *map(str, command)], cwd=place, check=True)
        size = max(file.stat().st_size for file in Path(place).glob("*.u8"))
        print(f"cache {size / 2**20:,.0f} MB, limit {args.limit_mb:,} MB")
        group.rmdir()


if __name__ == "__main__":
    main()
