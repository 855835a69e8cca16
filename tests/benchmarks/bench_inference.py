"""Compare step 3 with baselines: cold start, files a second, memory, a large photo. Needs a quiet
machine.

    python tests/benchmarks/bench_inference.py --run runs/NAME --export exports/NAME --images DIR

NAME: a classifier of colour images, such as CIFAR-10; DIR: at least --files images of one size, in
any folders. For each row, step3_infer.py and its baseline, one of the scripts below, run in turns,
each in a new process, and the medians are compared. Times are wall-clock times of whole processes;
but the engine alone and the DataLoader loop time themselves, the first without imports and
decoding, the second without imports.
"""

import argparse
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from benchmarks.measure import Measured, run_measured  # noqa: E402
from benchmarks.results import (  # noqa: E402
    add_results_option,
    command_line,
    cpu_count,
    write_result,
)

STEP3 = ROOT / "step3_infer.py"
MEGABYTE = 1e6
PARTS = ("cold", "throughput", "photo", "clocks")

# ------------------------------------------------------------------------------------ the baselines

BARE = """
import sys
import numpy as np
import PIL.Image
import onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
image = np.asarray(PIL.Image.open(sys.argv[2]).convert("RGB"))
probabilities = session.run(None, {"image": image[None]})[0][0]
print(probabilities.argmax(), probabilities.max())
"""

TORCH = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import numpy as np
import torch
from PIL import Image
import model
checkpoint = torch.load(sys.argv[1], map_location="cpu", weights_only=True)
spec = checkpoint["spec"]
options = {{name: spec["arguments"][name] for name in model.options_of(spec["model"])}}
options = {{name: value for name, value in options.items() if value is not None}}
options["channels"] = spec["channels"]
options["classes"] = len(spec["classes"])
options["image_size"] = spec["image_size"]
network = model.build(spec["model"], **options)
network.load_state_dict(checkpoint["state_dict"])
network = model.Deployable(network, spec["image_size"], spec["mean"], spec["std"]).eval()
"""

TORCH_ONE = (
    TORCH
    + """
image = np.array(Image.open(sys.argv[2]).convert("RGB"))
with torch.no_grad():
    probabilities = network(torch.from_numpy(image)[None])[0]
print(int(probabilities.argmax()), float(probabilities.max()))
"""
)

LOOP = (
    TORCH
    + """
import time
from torchvision.transforms.functional import pil_to_tensor
class Files(torch.utils.data.Dataset):
    def __init__(self, paths):
        self.paths = paths
    def __len__(self):
        return len(self.paths)
    def __getitem__(self, index):
        return pil_to_tensor(Image.open(self.paths[index]).convert("RGB")).permute(1, 2, 0)
if __name__ == "__main__":
    files = Files(open(sys.argv[2]).read().split("\\n"))
    loader = torch.utils.data.DataLoader(files, batch_size=64, num_workers=2)
    started, answers = time.perf_counter(), []
    with torch.inference_mode():
        for batch in loader:
            answers += network(batch).argmax(1).tolist()
    print(len(answers) / (time.perf_counter() - started))
"""
)

ALONE = """
import sys, time
import numpy as np
import PIL.Image
import onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
paths = open(sys.argv[2]).read().split("\\n")[:2048]
images = np.stack([np.asarray(PIL.Image.open(path).convert("RGB")) for path in paths])
best = 0
for batch in (1, 8, 32, 64, 128):
    session.run(None, {"image": images[:batch]})
    count = len(images) if batch > 1 else 512
    started = time.perf_counter()
    for start in range(0, count, batch):
        session.run(None, {"image": images[start : start + batch]})
    best = max(best, count / (time.perf_counter() - started))
print(best)
"""

PHOTO = """
import json, sys
import numpy as np
import PIL.Image
import onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
height, width = json.loads(session.get_modelmeta().custom_metadata_map["spec"])["image_size"]
image = PIL.Image.open(sys.argv[2]).resize((width, height), PIL.Image.Resampling.BILINEAR)
probabilities = session.run(None, {"image": np.asarray(image)[None]})[0][0]
print(probabilities.argmax(), probabilities.max())
"""

MAKE_PHOTO = """
import sys
import numpy as np
from PIL import Image
rng = np.random.default_rng(0)
coarse = Image.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8))
smooth = np.asarray(coarse.resize((4000, 3000), Image.Resampling.BICUBIC))
noisy = smooth + rng.integers(-12, 13, (3000, 4000, 1))
Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(sys.argv[1], quality=90)
Image.open(sys.argv[2]).save(sys.argv[3])
"""


# ------------------------------------------------------------------------------------ the measuring


def run_python(*arguments) -> Measured:
    return run_measured([sys.executable, *arguments])


def alternate(rounds: int, commands: dict[str, Sequence]) -> dict[str, list[Measured]]:
    """Run Python's commands in turns. A first round, which is left out, warms the disk cache."""
    results = {name: [] for name in commands}
    for turn in range(rounds + 1):
        for name, command in commands.items():
            measured = run_python(*command)
            if turn > 0:
                results[name].append(measured)
    return results


def wall(runs: list[Measured]) -> float:
    return median(run.wall for run in runs)


def cpu(runs: list[Measured]) -> float:
    return median(run.cpu for run in runs)


def peak(runs: list[Measured]) -> float:
    """Megabytes."""
    return median(run.peak for run in runs) / MEGABYTE


def printed_rate(runs: list[Measured]) -> float:
    """What a baseline that times itself prints: files a second."""
    return median(float(run.out) for run in runs)


@dataclass
class Row:
    """A figure of step3 beside that of a baseline, and the ratio that is aimed at."""

    key: str  # by which render.py finds it
    what: str
    ours: float
    baseline: float
    unit: str
    target: float
    higher_is_better: bool = False

    def is_reached(self) -> bool:
        ratio = self.ours / self.baseline
        return ratio >= self.target if self.higher_is_better else ratio <= self.target

    def show(self) -> dict:
        """Print the row of the table; returns its figures."""
        sign = ">=" if self.higher_is_better else "<="
        figures = f"{self.ours:.4g} {self.unit} | {self.baseline:.4g} {self.unit}"
        ratio = f"{self.ours / self.baseline:.3f}"
        reached = "yes" if self.is_reached() else "no"
        print(
            f"| {self.what} | {figures} | {ratio} | {sign} {self.target:.3g} | {reached} |",
            flush=True,
        )
        return {
            "key": self.key,
            "what": self.what,
            "ours": self.ours,
            "baseline": self.baseline,
            "unit": self.unit,
            "target": self.target,
            "higher_is_better": self.higher_is_better,
            "reached": self.is_reached(),
        }


@dataclass
class Place:
    """Where the temporary scripts and images lie, and what is measured."""

    folder: Path
    models: dict[str, Path]  # "fp32" and perhaps "int8"
    archive: Path  # step3 as it is shipped, if step2 wrote it
    checkpoint: Path
    paths: list[Path]  # of the images
    rounds: int

    def script(self, name: str) -> Path:
        return self.folder / f"{name}.py"

    def one(self) -> Path:
        """A single PNG."""
        return self.folder / "one.png"


def bench_cold(place: Place) -> list[dict]:
    """One image in a new process, beside the shortest script there is and beside torch."""
    model = place.models["fp32"]
    step3 = [STEP3, "--model", model, place.one()]

    bare = [place.script("bare"), model, place.one()]
    results = alternate(4 * place.rounds, {"ours": step3, "bare": bare})
    start = Row(
        key="cold",
        what="cold start, one PNG / bare onnxruntime script",
        ours=wall(results["ours"]),
        baseline=wall(results["bare"]),
        unit="s",
        target=1.10,
    )
    work = Row(
        key="cold cpu",
        what="its CPU time / the same",
        ours=cpu(results["ours"]),
        baseline=cpu(results["bare"]),
        unit="s",
        target=1.10,
    )

    rows = [start, work]
    if place.archive.exists():
        rows.append(bench_archive(place, step3))

    torch = [place.script("torch_one"), place.checkpoint, place.one()]
    results = alternate(max(3, place.rounds), {"ours": step3, "torch": torch})
    beside_torch = Row(
        key="cold torch",
        what="cold start, one PNG / torch, model.py and checkpoint",
        ours=wall(results["ours"]),
        baseline=wall(results["torch"]),
        unit="s",
        target=1 / 8,
    )
    memory = Row(
        key="cold memory",
        what="its peak memory / the same",
        ours=peak(results["ours"]),
        baseline=peak(results["torch"]),
        unit="MB",
        target=1 / 8,
    )
    rows += [beside_torch, memory]
    return [row.show() for row in rows]


def bench_archive(place: Place, step3: list) -> Row:
    """The one file that is shipped, beside the script and the package that it is made of."""
    shipped = [place.archive, "--model", place.models["fp32"], place.one()]
    results = alternate(4 * place.rounds, {"shipped": shipped, "script": step3})
    return Row(
        key="archive",
        what="CPU time of a cold step3_infer.pyz / step3_infer.py",
        ours=cpu(results["shipped"]),
        baseline=cpu(results["script"]),
        unit="s",
        target=1.05,
    )


def link_images(place: Place) -> Path:
    """All images in one directory, as a user would give it."""
    linked = place.folder / "files"
    linked.mkdir()
    for index, path in enumerate(place.paths):
        target = linked / f"{index:06}{path.suffix}"
        try:
            os.link(path, target)
        except OSError:  # another disk
            os.symlink(path, target)
    return linked


def bench_throughput(place: Place) -> list[dict]:
    """Files a second of the whole process, beside the engine alone and a DataLoader loop."""
    linked = link_images(place)
    listed = place.folder / "paths.txt"
    listed.write_text("\n".join(str(path) for path in place.paths))

    commands = {"loop": [place.script("loop"), place.checkpoint, listed]}
    for name, model in place.models.items():
        options = ["--format", "json", "--output", place.folder / "out.jsonl"]
        commands[name] = [STEP3, "--model", model, *options, linked]
        commands[f"{name} alone"] = [place.script("alone"), model, listed]
    results = alternate(place.rounds, commands)

    rows = []
    targets = {"fp32": 0.90, "int8": 0.80}
    for name in place.models:
        rate = len(place.paths) / wall(results[name])
        alone = Row(
            key=f"files, {name}",
            what=f"{name}, {len(place.paths):,} files / the engine alone on decoded arrays",
            ours=rate,
            baseline=printed_rate(results[f"{name} alone"]),
            unit="/s",
            target=targets[name],
            higher_is_better=True,
        )
        loop = Row(
            key=f"loop, {name}",
            what=f"{name}, the same / DataLoader loop, 2 workers, eager fp32",
            ours=rate,
            baseline=printed_rate(results["loop"]),
            unit="/s",
            target=2.5,
            higher_is_better=True,
        )
        rows += [alone.show(), loop.show()]

    hundred = sorted(linked.iterdir())[:100]
    few = [STEP3, "--model", place.models["fp32"], "--output", place.folder / "out.txt", *hundred]
    small = alternate(place.rounds, {"few": few})["few"]
    memory = Row(
        key="files memory",
        what=f"peak memory, {len(place.paths):,} files / 100 files",
        ours=peak(results["fp32"]),
        baseline=peak(small),
        unit="MB",
        target=1.2,
    )
    return [*rows, memory.show()]


def bench_photo(place: Place) -> list[dict]:
    """A 12-megapixel JPEG."""
    model = place.models["fp32"]
    photo = place.folder / "photo.jpg"
    step3 = [STEP3, "--model", model, photo]
    pillow = [place.script("photo"), model, photo]
    results = alternate(4 * place.rounds, {"ours": step3, "pillow": pillow})

    time_taken = Row(
        key="photo",
        what="12-megapixel JPEG / Pillow decoding and resizing, engine",
        ours=wall(results["ours"]),
        baseline=wall(results["pillow"]),
        unit="s",
        target=0.95,
    )
    memory = Row(
        key="photo memory",
        what="its peak memory / 250 MB",
        ours=peak(results["ours"]),
        baseline=250,
        unit="MB",
        target=1,
    )
    return [time_taken.show(), memory.show()]


def bench_clocks(place: Place) -> dict:
    """Does --benchmark agree with an outside clock?

    Its import, load and first run beside a cold process.
    """
    model = place.models["fp32"]
    printed = run_python(STEP3, "--model", model, "--benchmark", "--format", "json").out
    figures = json.loads(printed)
    inside = figures["import_seconds"] + figures["load_seconds"] + figures["first_run_ms"] / 1000

    empty = alternate(4 * place.rounds, {"empty": ["-c", "pass"]})["empty"]
    bare = [place.script("bare"), model, place.one()]
    started = alternate(4 * place.rounds, {"bare": bare})["bare"]
    outside = wall(started) - wall(empty)

    print(f"\n--benchmark: import, load and first run: {inside:.3f} s")
    print(f"bare script, without the start of Python: {outside:.3f} s")
    print(json.dumps(figures, indent=1))
    return {"inside": inside, "outside": outside, "benchmark": figures}


def find_images(directory: Path, count: int) -> list[Path]:
    """So many images below a directory, chosen at random, the same each time."""
    found = []
    for path in directory.rglob("*"):
        if path.suffix.lower() in (".jpg", ".jpeg", ".png"):
            found.append(path.resolve())
    return random.Random(0).sample(sorted(found), min(count, len(found)))


def prepare(folder: Path, args: argparse.Namespace) -> Place:
    """Write the baselines, a photo and a PNG below `folder`."""
    scripts = {
        "bare": BARE,
        "torch_one": TORCH_ONE,
        "loop": LOOP,
        "alone": ALONE,
        "photo": PHOTO,
    }
    for name, text in scripts.items():
        (folder / f"{name}.py").write_text(text)

    models = {}
    for name, file in (("fp32", "model.onnx"), ("int8", "model.int8.onnx")):
        if (args.export / file).exists():
            models[name] = args.export / file

    place = Place(
        folder=folder,
        models=models,
        archive=args.export / "step3_infer.pyz",
        checkpoint=args.run / "checkpoint.pt",
        paths=find_images(args.images, args.files),
        rounds=args.rounds,
    )
    run_python("-c", MAKE_PHOTO, folder / "photo.jpg", place.paths[0], place.one())
    return place


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--run",
        type=Path,
        required=True,
        help="its checkpoint.pt is what the torch baselines load",
    )
    parser.add_argument(
        "--export",
        type=Path,
        required=True,
        help="with model.onnx, and model.int8.onnx if there is one",
    )
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--files", type=int, default=10_000)
    parser.add_argument(
        "--rounds",
        type=int,
        default=3,
        help="of the long rows; the short ones run 4 times as often",
    )
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    add_results_option(parser)
    args = parser.parse_args()
    started = time.perf_counter()

    figures = {"files": args.files, "rows": []}
    with tempfile.TemporaryDirectory() as temporary:
        place = prepare(Path(temporary), args)
        print("| what | step3 | baseline | ratio | target | reached |\n|---|---|---|---|---|---|")
        if "cold" in args.only:
            figures["rows"] += bench_cold(place)
        if "throughput" in args.only:
            figures["rows"] += bench_throughput(place)
        if "photo" in args.only:
            figures["rows"] += bench_photo(place)
        if "clocks" in args.only:
            figures["clocks"] = bench_clocks(place)

    print(f"\n{time.perf_counter() - started:.0f} s in all, {cpu_count()} CPUs")
    write_result("inference", figures, command_line(), args.results)


if __name__ == "__main__":
    main()
