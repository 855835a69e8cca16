"""Few photos and a backbone with weights: step1, fastai and timm's own training script on the same
images and weights. Run by hand.

    python tests/benchmarks/bench_pretrained.py --weights FILE --data DIR

DIR has class folders, train/<class>/* and test/<class>/*; the first images by name are enlarged to
--size, and each program gets the same files. step1 runs with its defaults, step2 exports, and the
exported file is judged. fastai runs `vision_learner(...).fine_tune(3)` with its default transforms,
and again with as many epochs as fill step1's time. timm's script runs with its defaults and as many
epochs as step1. It is not in timm's wheel: give a copy of train.py by --timm-script. What is not
installed is left out. CPU seconds are those of the whole command with its children, without
judging. Images of the test split judge; none of them chooses anything. --work keeps what was
measured: a later call there goes on, and its results hold what earlier calls have measured, too.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from benchmarks.measure import run_measured  # noqa: E402
from benchmarks.results import add_results_option, command_line, write_result  # noqa: E402

from inference import metrics  # noqa: E402
from inference.predict import Model  # noqa: E402

COUNTS = (100, 500, 2000, 10_000)
WATCHED = 5  # test images of each class that the programs see after their epochs
USUAL_EPOCHS = 3  # of fastai's fine_tune, after one of the head alone

# Trains, prints its own CPU seconds, and writes the probabilities [n, classes] of all test images.
FASTAI = """
import json, resource, sys, time
import numpy as np, torch
from fastai.vision.all import *
data, weights, name, size, epochs, threads, seed, out = sys.argv[1:]
torch.set_num_threads(int(threads))
set_seed(int(seed), reproducible=True)
loaders = ImageDataLoaders.from_folder(
    data, train="train", valid="test", item_tfms=Resize(int(size)), batch_tfms=aug_transforms(),
    num_workers=0)
learner = vision_learner(
    loaders, name, metrics=accuracy, pretrained_cfg_overlay={"file": weights})
before = time.process_time()
with learner.no_bar(), learner.no_logging():
    learner.fine_tune(int(epochs))
trained = time.process_time() - before
total = sum(resource.getrusage(who).ru_utime + resource.getrusage(who).ru_stime
            for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
images = sorted(get_image_files(data + "/judged"))
test = loaders.test_dl(images)
with learner.no_bar():
    answers, _ = learner.get_preds(dl=test)
given = [loaders.vocab.o2i[image.parent.name] for image in images]
right = (answers.argmax(1).numpy() == np.array(given)).mean()
json.dump({"cpu": total, "trained": trained, "accuracy": float(right)}, open(out, "w"))
"""

# Judges the last checkpoint of timm's script.
TIMM = """
import json, sys
import numpy as np, timm, torch
from pathlib import Path
from PIL import Image
data, checkpoint, name, threads, out = sys.argv[1:]
torch.set_num_threads(int(threads))
classes = sorted(folder.name for folder in Path(data, "train").iterdir())
network = timm.create_model(name, num_classes=len(classes), checkpoint_path=checkpoint).eval()
config = network.pretrained_cfg
mean, std = (torch.tensor(config[key])[:, None, None] for key in ("mean", "std"))
right = []
for number, label in enumerate(classes):
    for path in Path(data, "judged", label).iterdir():
        pixels = torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1) / 255
        with torch.inference_mode():
            right.append(network(((pixels - mean) / std)[None]).argmax().item() == number)
json.dump({"accuracy": float(np.mean(right))}, open(out, "w"))
"""


# ------------------------------------------------------------------------------------------- images
def prepare(args: argparse.Namespace, place: Path, count: int) -> Path:
    """A directory: train/ of `count` images, test/ of a few, judged/ of those that judge."""
    source = args.data
    size = args.size
    data = place / f"{count}-{size}"
    if data.exists():
        return data

    classes = sorted(folder.name for folder in (source / "train").iterdir() if folder.is_dir())
    classes = [name for name in classes if not name.startswith(".")]
    beside = data.with_suffix(".part")
    shutil.rmtree(beside, ignore_errors=True)
    for name in classes:
        resize_all(source / "train" / name, beside / "train" / name, count // len(classes), size)
        resize_all(source / "test" / name, beside / "test" / name, WATCHED, size)
        judged = beside / "judged" / name
        shared = place / f"judged-{size}" / name
        resize_all(source / "test" / name, shared, args.judged, size)
        judged.parent.mkdir(exist_ok=True)
        judged.symlink_to(shared.resolve())
    beside.rename(data)
    return data


def resize_all(source: Path, target: Path, count: int | None, size: int) -> None:
    """Write the first `count` images of a folder by name, all if None, to another folder."""
    if target.exists():
        return
    target.mkdir(parents=True)
    for path in sorted(source.iterdir())[:count]:
        with Image.open(path) as image:
            resized = image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR)
        resized.save(target / f"{path.stem}.jpg", quality=95)


def judge(file: Path, judged: Path, threads: int) -> dict:
    """The accuracy and calibration error of an exported file on the images in class folders."""
    model = Model(file, threads=threads)
    answers = []
    labels = []
    for folder in sorted(judged.iterdir()):
        number = model.spec["classes"].index(folder.name)
        for path in sorted(folder.iterdir()):
            with Image.open(path) as image:
                probabilities, _ = model.run(np.asarray(image)[None])  # [1, classes]
            answers.append(probabilities[0])
            labels.append(number)

    found = np.stack(answers)  # [images, classes]
    given = np.array(labels)
    return {
        "accuracy": float((found.argmax(1) == given).mean()),
        "calibration_error": metrics.calibration_error(found, given),
    }


# ----------------------------------------------------------------------------------------- programs
def run_ours(data: Path, seed: int, work: Path, args: argparse.Namespace) -> dict:
    """step1 and step2 with their defaults; the exported file is judged."""
    name = f"{data.name}-{seed}"
    for folder in ("runs", "exports"):
        shutil.rmtree(work / folder / name, ignore_errors=True)
    step1 = [sys.executable, ROOT / "step1_train.py", "--data-dir", data, "--name", name]
    step1 += ["--model", f"timm/{args.model}", "--pretrained", args.weights.resolve()]
    step1 += ["--image-size", args.size, "--threads", args.threads, "--seed", seed, "--quiet"]
    step2 = [sys.executable, ROOT / "step2_export.py", "--run", name]
    trained = run_measured(step1, work)
    exported = run_measured(step2, work)

    summary = json.loads((work / "runs" / name / "summary.json").read_text())
    file = work / "exports" / name / "model.onnx"
    return {
        "program": "step1, step2",
        "epochs": summary["epochs"],
        "cpu": trained.cpu + exported.cpu,
        **judge(file, data / "judged", args.threads),
    }


def run_fastai(data: Path, seed: int, epochs: int, work: Path, args: argparse.Namespace) -> dict:
    """fastai's fine_tune. trained: the CPU seconds of it alone."""
    out = work / "fastai.json"
    command = [args.fastai_python, "-c", FASTAI, data, args.weights.resolve(), args.model]
    run_measured([*command, args.size, epochs, args.threads, seed, out], work)
    found = json.loads(out.read_text())
    return {"program": f"fastai, fine_tune({epochs})", "epochs": epochs, **found}


def run_timm(data: Path, seed: int, epochs: int, work: Path, args: argparse.Namespace) -> dict:
    """timm's own script with its defaults."""
    name = f"timm-{data.name}-{seed}"
    shutil.rmtree(work / name, ignore_errors=True)
    classes = len(list((data / "train").iterdir()))
    command = [sys.executable, args.timm_script.resolve(), "--data-dir", data]
    command += ["--train-split", "train", "--val-split", "test", "--model", args.model]
    command += ["--pretrained", "--pretrained-path", args.weights.resolve()]
    command += ["--num-classes", classes, "--input-size", 3, args.size, args.size]
    command += ["--epochs", epochs, "--warmup-epochs", 1, "--seed", seed, "--device", "cpu"]
    command += ["--workers", 0, "--output", work, "--experiment", name]
    trained = run_measured(command, work)

    out = work / "timm.json"
    checkpoint = work / name / "last.pth.tar"
    judge = [sys.executable, "-c", TIMM, data, checkpoint, args.model, args.threads, out]
    run_measured(judge, work)
    return {"program": "timm's train.py", "epochs": epochs, "cpu": trained.cpu} | json.loads(
        out.read_text()
    )


def compare(data: Path, seed: int, work: Path, args: argparse.Namespace) -> list[dict]:
    """Every program that is installed, in turn."""
    ours = run_ours(data, seed, work, args)
    rows = [ours]
    if args.fastai_python:
        usual = run_fastai(data, seed, USUAL_EPOCHS, work, args)
        rows.append(usual)
        per_epoch = usual["trained"] / (USUAL_EPOCHS + 1)
        fitting = round((ours["cpu"] - usual["cpu"]) / per_epoch) + USUAL_EPOCHS
        if fitting > USUAL_EPOCHS:
            rows.append(run_fastai(data, seed, fitting, work, args))
    if args.timm_script:
        rows.append(run_timm(data, seed, ours["epochs"], work, args))
    return rows


# --------------------------------------------------------------------------------------------- main
def find_fastai(given: str | None) -> str | None:
    """The absolute path of the interpreter with fastai; this one is looked into if none is given.

    None if fastai is not installed here. Ends this process if the given interpreter does not have
    it.
    """
    python = given or sys.executable
    # Links stay as they are: a virtual environment's interpreter is one. Trainings run elsewhere.
    found = shutil.which(python)
    if found is None:
        sys.exit(f"error: --fastai-python {python} is no program that can be run")

    python = os.path.abspath(found)
    look = "import importlib.util, sys; sys.exit(importlib.util.find_spec('fastai') is None)"
    if subprocess.run([python, "-c", look], capture_output=True).returncode == 0:
        return python
    if given:
        sys.exit(f"error: --fastai-python {given}: this is no Python with fastai")
    print("fastai is not installed, and left out", file=sys.stderr)
    return None


def check_paths(args: argparse.Namespace) -> None:
    """End this process if a path of the command line is missing: trainings take hours."""
    if not args.weights.is_file():
        sys.exit(f"error: --weights {args.weights}: there is no such file")
    for split in ("train", "test"):
        if not (args.data / split).is_dir():
            sys.exit(f"error: --data {args.data}: there is no directory {split} in it")
    if args.timm_script and not args.timm_script.is_file():
        sys.exit(f"error: --timm-script {args.timm_script}: there is no such file")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--weights", type=Path, required=True, metavar="FILE", help="of the network, ImageNet's")
    add("--data", type=Path, required=True, metavar="DIR", help="class folders train/, test/")
    add("--model", default="tf_efficientnet_lite0", metavar="NAME", help="of timm")
    add("--size", type=int, default=128, metavar="N", help="side of the images (default: 128)")
    add("--counts", type=int, nargs="+", default=COUNTS, metavar="N", help="training images")
    add("--seeds", type=int, nargs="+", default=[0], metavar="N")
    add("--threads", type=int, default=1, metavar="N")
    add("--judged", type=int, metavar="N", help="test images of each class (default: all)")
    add("--work", type=Path, default=Path("pretrained-work"), metavar="DIR")
    add("--fastai-python", metavar="FILE", help="the Python with fastai (default: this one)")
    add("--timm-script", type=Path, metavar="FILE", help="train.py of timm's repository")
    add_results_option(parser)
    args = parser.parse_args()

    check_paths(args)
    args.fastai_python = find_fastai(args.fastai_python)
    if args.timm_script is None:
        print("no --timm-script: timm's own training is left out", file=sys.stderr)

    args.work.mkdir(parents=True, exist_ok=True)
    work = args.work.resolve()
    for seed in args.seeds:
        for count in args.counts:
            data = prepare(args, work, count)
            measured = work / f"{data.name}-{seed}.json"
            if not measured.exists():
                measured.write_text(json.dumps(compare(data, seed, work, args)))

            for row in json.loads(measured.read_text()):
                said = f"{count:6,} images, seed {seed}: {row['program']:24} "
                print(f"{said}{row['accuracy']:7.2%} {row['cpu']:7.0f} CPU s", flush=True)

            # Written each time: a run of hours that is stopped keeps what it has measured.
            judged = sum(1 for _ in (data / "judged").glob("*/*"))
            rows = measured_rows(work, args.size)
            figures = {"model": args.model, "size": args.size, "judged": judged, "rows": rows}
            write_result("pretrained", figures, command_line(), args.results)
    means(rows)


def measured_rows(work: Path, size: int) -> list[dict]:
    """All rows that --work has for images of this size, by seed and number of images."""
    rows = []
    for file in work.glob(f"*-{size}-*.json"):
        count, _, seed = file.stem.split("-")
        for row in json.loads(file.read_text()):
            rows.append({"images": int(count), "seed": int(seed), **row})
    return sorted(rows, key=lambda row: (row["seed"], row["images"]))


def means(rows: list[dict]) -> None:
    """Print the mean accuracy of each program over its seeds."""
    keys = sorted({(row["images"], row["program"]) for row in rows})
    for images, program in keys:
        of_program = [
            row["accuracy"] for row in rows if (row["images"], row["program"]) == (images, program)
        ]
        print(f"{images:6,} images: {program:24} {statistics.fmean(of_program):.2%} on average")


if __name__ == "__main__":
    main()
