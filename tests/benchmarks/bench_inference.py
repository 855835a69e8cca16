"""Compare step 3 with baselines: cold start, files a second, memory, a large photo. Needs a quiet machine.

    python tests/benchmarks/bench_inference.py --run runs/NAME --export exports/NAME --images DIR

NAME: a classifier of colour images, such as CIFAR-10; DIR: at least --files images of one size, in any
folders. For each row, step3_infer.py and its baseline, one of the scripts below, run in turns, each in a new
process, and the medians are compared. Times are wall-clock times of whole processes; but the engine alone and
the DataLoader loop time themselves, the first without imports and decoding, the second without imports.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent.parent
STEP3 = ROOT / "step3_infer.py"
# This process imports nothing large: a child's peak memory would count from what its parent holds.

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
shape = {{"channels": spec["channels"], "classes": len(spec["classes"]), "image_size": spec["image_size"]}}
network = model.build(spec["model"], **shape, **options)
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


def measured(*command):
    """Run a Python process; returns (wall-clock seconds, peak memory in MB, what it printed)."""
    with tempfile.TemporaryFile() as out:
        started = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, *map(str, command)], stdout=out, stderr=subprocess.DEVNULL
        )
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        text = out.read().decode()
    assert process.returncode == 0, (command, process.returncode)
    return wall, usage.ru_maxrss / 1024, text


def alternate(rounds, **commands):
    """Run the commands in turns: {name: [measured(), ...]}. A round before them warms the disk cache."""
    results = {name: [] for name in commands}
    for turn in range(rounds + 1):
        for name, command in commands.items():
            result = measured(*command)
            if turn:
                results[name].append(result)
    return results


def wall(results):
    return median(result[0] for result in results)


def memory(results):
    return median(result[1] for result in results)


def row(what, ours, reference, unit, target, higher=False):
    """Print one row of the table: the two figures, their ratio and whether the target is reached."""
    ratio = ours / reference
    reached = ratio >= target if higher else ratio <= target
    limit = f"{'>=' if higher else '<='} {target:.3g}"
    figures = f"{ours:.4g} {unit} | {reference:.4g} {unit} | {ratio:.3f} | {limit}"
    print(f"| {what} | {figures} | {'yes' if reached else 'no'} |", flush=True)


def cold(folder, model, checkpoint, one, rounds):
    step3 = [STEP3, "--model", model, one]
    results = alternate(rounds, ours=step3, bare=[folder / "bare.py", model, one])
    row("cold, one PNG / bare onnxruntime script", wall(results["ours"]), wall(results["bare"]), "s", 1.10)
    results = alternate(max(3, rounds // 4), ours=step3, torch=[folder / "torch_one.py", checkpoint, one])
    row(
        "the same / torch, model.py and checkpoint", wall(results["ours"]), wall(results["torch"]), "s", 1 / 8
    )
    row("its peak memory / the same way", memory(results["ours"]), memory(results["torch"]), "MB", 1 / 8)


def throughput(folder, models, checkpoint, paths, rounds):
    """Files a second over all paths, of the whole process, the engine alone and the DataLoader loop."""
    linked = folder / "files"  # one directory, as a user would give it
    linked.mkdir()
    for index, path in enumerate(paths):
        link = os.link if same_disk(path, folder) else os.symlink
        link(path, linked / f"{index:06}{path.suffix}")
    listed = folder / "paths.txt"
    listed.write_text("\n".join(str(path) for path in paths))
    commands = {"loop": [folder / "loop.py", checkpoint, listed]}
    for name, model in models.items():
        options = ["--format", "json", "--output", folder / "out.jsonl"]
        commands[name] = [STEP3, "--model", model, *options, linked]
        commands[f"{name} alone"] = [folder / "alone.py", model, listed]
    results = alternate(rounds, **commands)
    loop = median(float(result[2]) for result in results["loop"])
    for name, target in (("fp32", 0.90), ("int8", 0.80)):
        if name in models:
            rate = len(paths) / wall(results[name])
            alone = median(float(result[2]) for result in results[f"{name} alone"])
            what = f"{name}, {len(paths):,} files / the engine alone on ready arrays"
            row(what, rate, alone, "/s", target, True)
            row(f"{name}, the same / DataLoader loop, 2 workers, eager fp32", rate, loop, "/s", 2.5, True)
    few = [STEP3, "--model", models["fp32"], "--output", folder / "out.txt", *sorted(linked.iterdir())[:100]]
    small = alternate(rounds, few=few)["few"]
    row(f"peak memory, {len(paths):,} files / 100 files", memory(results["fp32"]), memory(small), "MB", 1.2)


def same_disk(path, folder):
    return path.stat().st_dev == folder.stat().st_dev


def photo(folder, model, rounds):
    results = alternate(
        rounds,
        ours=[STEP3, "--model", model, folder / "photo.jpg"],
        pillow=[folder / "photo.py", model, folder / "photo.jpg"],
    )
    what = "12-megapixel JPEG / Pillow decode and resize, engine"
    row(what, wall(results["ours"]), wall(results["pillow"]), "s", 0.95)
    row("its peak memory / 250 MB", memory(results["ours"]), 250, "MB", 1)


def clocks(folder, model, one, rounds):
    """Does --benchmark agree with an outside clock? Its import, load and first run beside a cold process."""
    figures = json.loads(measured(STEP3, "--model", model, "--benchmark", "--format", "json")[2])
    inside = figures["import_seconds"] + figures["load_seconds"] + figures["first_run_ms"] / 1000
    empty = wall(alternate(rounds, empty=["-c", "pass"])["empty"])
    outside = wall(alternate(rounds, bare=[folder / "bare.py", model, one])["bare"]) - empty
    print(f"\n--benchmark: import, load and first run: {inside:.3f} s")
    print(f"bare script, without the start of Python: {outside:.3f} s")
    print(json.dumps(figures, indent=1))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--run", type=Path, required=True, help="its checkpoint.pt is what the torch baselines load"
    )
    parser.add_argument(
        "--export", type=Path, required=True, help="with model.onnx, and model.int8.onnx if there is one"
    )
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--files", type=int, default=10_000)
    parser.add_argument(
        "--rounds", type=int, default=3, help="of the long rows; the short ones run 4 times as often"
    )
    parser.add_argument("--only", nargs="+", choices=("cold", "throughput", "photo", "clocks"))
    args = parser.parse_args()
    paths = sorted(
        p.resolve() for p in args.images.rglob("*") if p.suffix.lower() in (".jpg", ".jpeg", ".png")
    )
    paths = random.Random(0).sample(paths, min(args.files, len(paths)))
    models = {"fp32": args.export / "model.onnx", "int8": args.export / "model.int8.onnx"}
    models = {name: model for name, model in models.items() if model.exists()}
    checkpoint, started = args.run / "checkpoint.pt", time.time()
    wanted = args.only or ("cold", "throughput", "photo", "clocks")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        scripts = {"bare": BARE, "torch_one": TORCH_ONE, "loop": LOOP, "alone": ALONE, "photo": PHOTO}
        for name, text in scripts.items():
            (folder / f"{name}.py").write_text(text)
        one = folder / "one.png"
        measured("-c", MAKE_PHOTO, folder / "photo.jpg", paths[0], one)
        print("| what | step3 | baseline | ratio | target | reached |\n|---|---|---|---|---|---|")
        if "cold" in wanted:
            cold(folder, models["fp32"], checkpoint, one, 4 * args.rounds)
        if "throughput" in wanted:
            throughput(folder, models, checkpoint, paths, args.rounds)
        if "photo" in wanted:
            photo(folder, models["fp32"], 4 * args.rounds)
        if "clocks" in wanted:
            clocks(folder, models["fp32"], one, 4 * args.rounds)
    print(f"\n{time.time() - started:.0f} s in all, {os.cpu_count()} CPUs")


if __name__ == "__main__":
    main()
