"""Give broken images and broken model files to the real command. Run by hand; the tests run a short
form.

    python tests/benchmarks/fuzz_inference.py exports/NAME --images 10000 --models 2000

Images of every format that Pillow writes are damaged and given to step3_infer.py in batches, with
intact ones among them; the directory's model files are damaged and given one at a time. Faults are:
a traceback, a process that computes for more than 10 seconds or dies by a signal, an exit code that
contradicts the results, results missing or out of order, and an intact image whose result changes.
The exit code is 1 if any occur.
"""

import argparse
import collections
import io
import itertools
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from benchmarks.results import (  # noqa: E402
    add_results_option,
    command_line,
    cpu_count,
    write_result,
)

STEP3 = ROOT / "step3_infer.py"
LIMIT = 10  # seconds of processor time: a busy machine is no hang
WAIT = 120  # seconds of wall-clock time, for a hang without computing
MEMORY = 8 << 30  # bytes of address space: a mutated size must not take the machine down
MODES = ("L", "RGB", "RGBA", "1", "P", "I;16", "CMYK", "F", "LA", "I", "YCbCr")


def whole_images(rng: random.Random) -> dict[str, bytes]:
    """Small images by file name, in every format and mode that Pillow writes, some of odd sizes."""
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

        name = f"{file_format}-{mode.replace(';', '')}.{file_format.lower()}"
        files[name] = stream.getvalue()
    return files


def choose_position(length: int, rng: random.Random) -> int:
    """A position in a file; half of them are near its ends, where the headers are."""
    near = rng.randrange(min(length, 600))
    anywhere = rng.randrange(length)
    elsewhere = rng.randrange(length)
    return rng.choice([near, length - 1 - near, anywhere, elsewhere])


def mutate(content: bytes, others: Sequence[bytes], rng: random.Random) -> bytes:
    """Damage a file's content in one of several ways."""
    broken = bytearray(content)
    kind = rng.randrange(7)

    def position() -> int:
        return choose_position(len(content), rng)

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
        start = position()
        size = rng.choice([1, 4, 100])
        repeats = rng.choice([0, 2, 50])
        broken[start : start + size] = broken[start : start + size] * repeats
    elif kind == 5:  # a large number
        start = position()
        numbers = [b"\xff\xff\xff\x7f", b"\xff\xff\xff\xff", b"\x00\x00\x01\x00"]
        broken[start : start + 4] = rng.choice(numbers)
    else:  # another file behind it
        broken = broken[: position()] + rng.choice(others)

    return bytes(broken)


# The exit code (or "hang"), standard output and standard error of one command.
Outcome = tuple[int | str, str, str]


def command(*arguments) -> Outcome:
    """Run step 3 with limits on its time and memory."""
    import resource  # which Windows lacks

    def limit():
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        resource.setrlimit(resource.RLIMIT_CPU, (LIMIT, LIMIT + 1))

    words = [str(argument) for argument in arguments]
    try:
        done = subprocess.run(
            [sys.executable, STEP3, "--format", "json", *words],
            capture_output=True,
            timeout=WAIT,
            preexec_fn=limit,
        )
    except subprocess.TimeoutExpired:
        return "hang", "", ""

    if done.returncode == -signal.SIGXCPU:
        return "hang", "", ""
    return done.returncode, done.stdout.decode(), done.stderr.decode(errors="replace")


def faults_of(outcome: Outcome, paths: list, whole: dict | None = None) -> list[str]:
    """What is wrong with an outcome, in words.

    paths: the images given, in order. whole: the rows of intact images by path, if there were any.
    """
    code, out, err = outcome
    if code == "hang":
        return ["hang"]
    if code < 0:
        return [f"died by signal {-code}"]
    if "Traceback" in err:
        return ["traceback"]
    try:
        rows = [json.loads(line) for line in out.splitlines()]
    except ValueError:
        return ["standard output holds something else"]

    lines = err.splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    others = [line for line in lines if not line.startswith(("error: ", "note: "))]
    faults = [f"on standard error: {line[:200]}" for line in others[:1]]

    if not rows and code in (1, 2) and len(errors) == 1:  # the model was refused
        return faults if whole is None else [*faults, "no answers at all"]

    failed = [row for row in rows if "error" in row]
    answered = [row["path"] for row in rows]
    given = [str(path) for path in paths]
    if answered != given or len(errors) != len(failed):
        faults.append("answers missing, out of order, or errors not named")
    if code != (1 if failed else 0):
        faults.append(f"exit code {code} with {len(failed)} failed")

    for row in rows:
        alone = (whole or {}).get(row["path"])
        if alone and is_other_answer(row, alone):
            faults.append(f"answer changed for {row['path']}")
    return faults


def is_other_answer(row: dict, alone: dict) -> bool:
    if "error" in row or row["label"] != alone["label"]:
        return True
    return abs(row["probability"] - alone["probability"]) > 1e-5


def answers_alone(model: Path, paths: list[Path]) -> dict[str, dict]:
    """The rows of intact images, by path, without formats that Pillow does not read back."""
    code, out, err = command("--model", model, *paths)
    assert code in (0, 1) and "Traceback" not in err, err

    answers = {}
    for line in out.splitlines():
        row = json.loads(line)
        if "error" not in row:
            answers[row["path"]] = row
    assert len(answers) > len(paths) / 2
    return answers


def report_or_remove(path: Path, faults: list[str], outcome: Outcome) -> None:
    """Keep what caused a fault, and say so; remove the rest."""
    if faults:
        print(f"{path}: {'; '.join(faults)}\n{outcome[2][-1000:]}", flush=True)
    elif path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def fuzz_images(
    model: Path, count: int, place: Path, seed: int = 0, batch: int = 100
) -> tuple[collections.Counter, int]:
    """Give `count` mutated images to step 3, `batch` at a time. Files that cause a fault are kept.

    Returns how often each fault occurred, and how many images were refused.
    """
    rng = random.Random(seed)
    faults: collections.Counter = collections.Counter()
    refused = 0

    (place / "whole").mkdir()
    files = whole_images(rng)
    paths = []
    for name, content in files.items():
        path = place / "whole" / name
        path.write_bytes(content)
        paths.append(path)
    answers = answers_alone(model, paths)
    intact = [Path(path) for path in answers]

    names = list(files)
    contents = list(files.values())
    for start in range(0, count, batch):
        folder = place / f"{start:06}"
        folder.mkdir()

        given = []
        for index in range(min(batch, count - start)):
            chosen = rng.randrange(len(names))
            path = folder / f"{index:03}-{names[chosen]}"
            path.write_bytes(mutate(contents[chosen], contents, rng))
            given.append(path)
            if index % 10 == 0:
                given.append(rng.choice(intact))

        outcome = command("--model", model, *given)
        found = faults_of(outcome, given, answers)
        faults.update(found)
        refused += outcome[1].count('"error"')
        report_or_remove(folder, found, outcome)
    return faults, refused


def fuzz_models(
    models: list[Path], count: int, place: Path, seed: int = 0, jobs: int = 1
) -> tuple[collections.Counter, int]:
    """Give `count` mutated model files to step 3, each with one image. Returns as fuzz_images()."""
    faults: collections.Counter = collections.Counter()
    refused = 0

    image = place / "image.png"
    Image.new("RGB", (8, 8), (200, 100, 50)).save(image)
    contents = {path: path.read_bytes() for path in models}

    def try_one(index: int) -> tuple[bool, list[str]]:
        rng = random.Random(f"{seed}-{index}")
        source = models[index % len(models)]
        path = place / f"{index:05}{source.suffix}"
        path.write_bytes(mutate(contents[source], list(contents.values()), rng))

        outcome = command("--model", path, image)
        found = faults_of(outcome, [image])
        report_or_remove(path, found, outcome)
        return outcome[0] == 1, found

    with ThreadPoolExecutor(jobs) as pool:
        for was_refused, found in pool.map(try_one, range(count)):
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
        "--models",
        type=int,
        default=2_000,
        help="of .onnx files; a tenth more of .pt and .pt2 each",
    )
    parser.add_argument("--jobs", type=int, default=cpu_count(), help="model files tried at once")
    parser.add_argument("--seed", type=int, default=0)
    add_results_option(parser)
    args = parser.parse_args()

    place = Path(tempfile.mkdtemp(prefix="fuzz-"))
    model = args.export / "model.onnx"
    faults, refused = fuzz_images(model, args.images, place, args.seed)
    print(
        f"{args.images} mutated images: {refused} refused by a line, "
        f"faults: {dict(faults) or 'none'}"
    )
    rows = [{"what": "images", "given": args.images, "refused": refused, "faults": faults.total()}]

    counts = {".onnx": args.models, ".pt": args.models // 10, ".pt2": args.models // 10}
    for suffix, count in counts.items():
        models = sorted(args.export.glob(f"model*{suffix}"))
        if not models or count == 0:
            continue
        folder = place / suffix[1:]
        folder.mkdir()
        faults, refused = fuzz_models(models, count, folder, args.seed, args.jobs)
        outcome = f"{refused} refused by a line, faults: {dict(faults) or 'none'}"
        print(f"{count} mutated {suffix} files: {outcome}")
        rows.append(
            {
                "what": f"{suffix} files",
                "given": count,
                "refused": refused,
                "faults": faults.total(),
            }
        )

    found_any = any(row["faults"] for row in rows)
    if found_any:
        print(f"what caused a fault is kept in {place}")
    else:
        print("no fault")
        shutil.rmtree(place)
    write_result("fuzz", {"rows": rows}, command_line(), args.results)
    return 1 if found_any else 0


if __name__ == "__main__":
    sys.exit(main())
