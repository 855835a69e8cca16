"""Give broken images and broken model files to the real command. Run by hand; the tests run a short form.

    python tests/benchmarks/fuzz_inference.py exports/NAME --images 10000 --models 2000

Images of every format that Pillow writes are damaged and given to step3_infer.py in batches, with intact ones
among them; the directory's model files are damaged and given one at a time. Faults are: a traceback, a
process that computes for more than 10 seconds or dies by a signal, an exit code that contradicts the results,
results missing or out of order, and an intact image whose result changes. The exit code is 1 if any occur.
"""

import argparse
import collections
import io
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

STEP3 = Path(__file__).resolve().parent.parent.parent / "step3_infer.py"
LIMIT = 10  # seconds of processor time: a busy machine is no hang
WAIT = 120  # seconds of wall-clock time, for a hang without computing
MEMORY = 8 << 30  # bytes of address space: a mutated size must not take the machine down
MODES = ("L", "RGB", "RGBA", "1", "P", "I;16", "CMYK", "F", "LA", "I", "YCbCr")


def whole_images(rng):
    """Small images, {name: bytes}, in every format and mode that Pillow writes, some of odd sizes."""
    Image.init()
    files = {}
    for file_format, mode in itertools.product(sorted(Image.SAVE), MODES):
        if file_format in ("PDF", "EPS"):  # step 3 cannot read the first and refuses the second
            continue
        width, height = rng.choice([(8, 8), (8, 8), (32, 32), (17, 5), (1, 1), (1, 300)])
        noise = np.random.default_rng(rng.getrandbits(32))
        pixels = noise.integers(0, 256, (height, width, 3), dtype=np.uint8)
        stream = io.BytesIO()
        try:
            image = Image.fromarray(pixels)
            if mode in ("F", "I", "I;16", "LA"):
                image = image.convert("L")
            image.convert(mode).save(stream, file_format)
        except Exception:  # Pillow says in a dozen ways that a format has no such mode
            continue
        files[f"{file_format}-{mode.replace(';', '')}.{file_format.lower()}"] = stream.getvalue()
    return files


def mutate(content, others, rng):
    """Damage a file's content in one of several ways; half of the changes are near its ends: the headers."""

    def position():
        near = rng.randrange(min(len(content), 600))
        anywhere = rng.randrange(len(content)), rng.randrange(len(content))
        return rng.choice([near, len(content) - 1 - near, *anywhere])

    broken, kind = bytearray(content), rng.randrange(7)
    if kind == 0:  # flipped bits
        for _ in range(rng.choice([1, 1, 2, 8, 64])):
            broken[position()] ^= 1 << rng.randrange(8)
    elif kind == 1:  # any bytes
        for _ in range(rng.choice([1, 4, 32])):
            broken[position()] = rng.choice([0, 255, 127, 128, rng.randrange(256)])
    elif kind == 2:  # truncated
        del broken[position() :]
    elif kind == 3:  # another file's beginning
        other = rng.choice(others)
        size = rng.choice([4, 16, 64, 512])
        broken[:size] = other[:size]
    elif kind == 4:  # a part twice, or missing
        start, size = position(), rng.choice([1, 4, 100])
        broken[start : start + size] = broken[start : start + size] * rng.choice([0, 2, 50])
    elif kind == 5:  # a large number
        start = position()
        broken[start : start + 4] = rng.choice(
            [b"\xff\xff\xff\x7f", b"\xff\xff\xff\xff", b"\x00\x00\x01\x00"]
        )
    else:  # another file behind it
        broken = broken[: position()] + rng.choice(others)
    return bytes(broken)


def command(*arguments):
    """Run step 3 and return (exit code or "hang", standard output, standard error)."""
    import resource

    def limit():
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        resource.setrlimit(resource.RLIMIT_CPU, (LIMIT, LIMIT + 1))

    try:
        done = subprocess.run(
            [sys.executable, STEP3, "--format", "json", *map(str, arguments)],
            capture_output=True,
            timeout=WAIT,
            preexec_fn=limit,
        )
    except subprocess.TimeoutExpired:
        return "hang", "", ""
    if done.returncode == -signal.SIGXCPU:
        return "hang", "", ""
    return done.returncode, done.stdout.decode(), done.stderr.decode(errors="replace")


def faults_of(result, paths, whole=None):
    """What is wrong with a result, in words. paths: the images given; whole: the results of intact ones."""
    code, out, err = result
    if code == "hang":
        return ["hang"]
    if code < 0:
        return [f"died by signal {-code}"]
    if "Traceback" in err:
        return ["traceback"]
    lines = err.splitlines()
    try:
        rows = [json.loads(line) for line in out.splitlines()]
    except ValueError:
        return ["standard output holds something else"]
    failed = [row for row in rows if "error" in row]
    others = [line for line in lines if not line.startswith(("error: ", "note: "))]
    faults = [f"on standard error: {line[:200]}" for line in others[:1]]
    errors = [line for line in lines if line.startswith("error: ")]
    if not rows and code in (1, 2) and len(errors) == 1:
        return faults if whole is None else [*faults, "no answers at all"]  # the model was refused
    if [row["path"] for row in rows] != [str(path) for path in paths] or len(errors) != len(failed):
        faults.append("answers missing, out of order, or errors not named")
    if code != (1 if failed else 0):
        faults.append(f"exit code {code} with {len(failed)} failed")
    for row in rows:
        alone = (whole or {}).get(row["path"])
        if alone and ("error" in row or row["label"] != alone["label"] or differs(row, alone)):
            faults.append(f"answer changed for {row['path']}")
    return faults


def differs(row, alone):
    return abs(row["probability"] - alone["probability"]) > 1e-5


def fuzz_images(model, count, place, seed=0, batch=100):
    """Give `count` mutated images to step 3, `batch` at a time. Files that cause a fault are kept.

    Returns (Counter of faults, how many images were refused).
    """
    rng, faults, refused = random.Random(seed), collections.Counter(), 0
    (place / "whole").mkdir()
    files, answers = whole_images(rng), {}
    for name, content in files.items():
        (place / "whole" / name).write_bytes(content)
    paths = [place / "whole" / name for name in files]
    code, out, err = command("--model", model, *paths)
    assert code in (0, 1) and "Traceback" not in err, err
    for line in out.splitlines():  # formats that Pillow writes and does not read back are errors here
        row = json.loads(line)
        if "error" not in row:
            answers[row["path"]] = row
    assert len(answers) > len(files) / 2
    names, contents = zip(*files.items(), strict=True)
    for start in range(0, count, batch):
        folder = place / f"{start:06}"
        folder.mkdir()
        given = []
        for index in range(min(batch, count - start)):
            chosen = rng.randrange(len(names))
            path = folder / f"{index:03}-{names[chosen]}"
            path.write_bytes(mutate(contents[chosen], contents, rng))
            given += [path, Path(rng.choice(list(answers)))] if index % 10 == 0 else [path]
        result = command("--model", model, *given)
        found = faults_of(result, given, answers)
        refused += result[1].count('"error"')
        faults.update(found)
        if found:
            print(f"{folder}: {'; '.join(found)}\n{result[2][-1000:]}", flush=True)
        else:
            for path in folder.iterdir():
                path.unlink()
            folder.rmdir()
    return faults, refused


def fuzz_models(models, count, place, seed=0, jobs=1):
    """Give `count` mutated model files to step 3, each with one image; returns what fuzz_images() returns."""
    faults, refused = collections.Counter(), 0
    image = place / "image.png"
    Image.new("RGB", (8, 8), (200, 100, 50)).save(image)
    contents = {path: path.read_bytes() for path in models}

    def one(index):
        own = random.Random(f"{seed}-{index}")
        source = models[index % len(models)]
        path = place / f"{index:05}{source.suffix}"
        path.write_bytes(mutate(contents[source], list(contents.values()), own))
        result = command("--model", path, image)
        found = faults_of(result, [image])
        if found:
            print(f"{path}: {'; '.join(found)}\n{result[2][-1000:]}", flush=True)
        else:
            path.unlink()
        return result[0] == 1, found

    with ThreadPoolExecutor(jobs) as pool:
        for was_refused, found in pool.map(one, range(count)):
            refused += was_refused
            faults.update(found)
    return faults, refused


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "export", type=Path, help="a directory with model.onnx, perhaps model.int8.onnx, .pt, .pt2"
    )
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument(
        "--models", type=int, default=2_000, help="of .onnx files; a tenth more of .pt and .pt2 each"
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="model files tried at once")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    place = Path(tempfile.mkdtemp(prefix="fuzz-"))
    total = collections.Counter()
    faults, refused = fuzz_images(args.export / "model.onnx", args.images, place, args.seed)
    print(f"{args.images} mutated images: {refused} refused by a line, faults: {dict(faults) or 'none'}")
    total += faults
    groups = ((".onnx", args.models), (".pt", args.models // 10), (".pt2", args.models // 10))
    for suffix, count in groups:
        models = sorted(args.export.glob(f"model*{suffix}"))
        if models and count:
            folder = place / suffix[1:]
            folder.mkdir()
            faults, refused = fuzz_models(models, count, folder, args.seed, args.jobs)
            outcome = f"{refused} refused by a line, faults: {dict(faults) or 'none'}"
            print(f"{count} mutated {suffix} files: {outcome}")
            total += faults
    print(f"what caused a fault is kept in {place}" if total else "no fault")
    return 1 if total else 0


if __name__ == "__main__":
    sys.exit(main())
