#!/usr/bin/env python3
"""Step 1 of 3: train a network on a dataset.

    python step1_train.py                                  # the bundled digits, a minute on a laptop
    python step1_train.py --dataset cifar10 --epochs 10
    python step1_train.py --dataset mnist --model mlp --hidden 512 512

Writes runs/<name>/ and never over an earlier run:

    checkpoint.pt    the network and its spec; torch.load(..., weights_only=True) reads it
    config.json      every argument, derived ones included, before the first step
    metrics.csv      a row for each epoch: loss and accuracy on both splits, learning rate, seconds
    summary.json     the result

What is not said on the command line is derived from the dataset and the network, and printed before work starts.
Next: python step2_export.py
"""

import argparse
import contextlib
import itertools
import json
import os
import platform
import re
import sys
import time
from datetime import datetime, timezone

import torch
import torch.nn.functional as F
from tqdm import tqdm

import data
import model
from data import Problem

SCHEMA = 1
RUNS = "runs"
AUGMENTATIONS = ("flip", "translate")
OPTIMIZERS = {
    "sgd": lambda groups, args: torch.optim.SGD(groups, momentum=args.momentum, nesterov=args.momentum > 0),
    "adam": lambda groups, args: torch.optim.Adam(groups, fused=True),
    "adamw": lambda groups, args: torch.optim.AdamW(groups, fused=True),
}
SCHEDULES = ("constant", "linear", "cosine", "onecycle")

# What the command line leaves open: first by the network and dataset, then by the network, then for all.
RECIPES = {
    ("airbench", "digits"): {"epochs": 20, "batch_size": 64, "width": 0.25, "lr": 0.05, "label_smoothing": 0.0},
    ("airbench", "mnist"): {"width": 0.5},
    ("airbench", "fashion-mnist"): {"width": 0.5},
    ("airbench", "kmnist"): {"width": 0.5},
    ("mlp", "digits"): {"epochs": 50},
    ("mynet", "digits"): {"epochs": 50, "batch_size": 32},
    ("resblock", "digits"): {"epochs": 50, "batch_size": 64, "lr": 0.1},
    ("airbench",): {"label_smoothing": 0.1, "batch_size": 256, "lr": 0.1, "weight_decay": 5e-4},
    ("mlp",): {"optimizer": "adam", "lr": 1e-3, "batch_size": 32, "schedule": "cosine"},
    ("mynet",): {"lr": 0.05, "weight_decay": 5e-4},
    ("resblock",): {"lr": 0.5, "batch_size": 512},
    (): {
        "epochs": 10,
        "batch_size": 128,
        "optimizer": "sgd",
        "lr": 0.05,
        "momentum": 0.9,
        "weight_decay": 0.0,
        "schedule": "onecycle",
        "label_smoothing": 0.0,
    },
}


# ------------------------------------------------------------------------------------------------- configuration


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line."""

    def error(self, message):
        self.exit(2, f"error: {message} (--help shows all options)\n")


def number(kind, low, high=float("inf"), above=False):
    """An argparse type: a finite number from `low` (or above it) to `high`."""

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not (low < value <= high or (value == low and not above)) or value == float("inf"):
            wanted = "a whole number" if kind is int else "a number"
            limit = f"{'above' if above else 'from'} {low}" + (f" to {high}" if high != float("inf") else "")
            raise argparse.ArgumentTypeError(f"{text!r} is not {wanted} {limit}")
        return value

    return parse


def image_size(text):
    """'32' or '48x64' -> (height, width)."""
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", text)
    size = match and (int(match[1]), int(match[2] or match[1]))
    if not size or not 1 <= min(size) <= max(size) <= 4096:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 32 or 48x64 (height x width, 1 to 4096)")
    return size


def build_parser():
    parser = Parser(
        description="Train a network on a dataset; writes runs/<name>/.",
        epilog="example: python step1_train.py --dataset mnist --epochs 2",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    count, positive = number(int, 1), number(float, 0, above=True)
    add = parser.add_argument_group("data").add_argument
    add("--dataset", default="digits", metavar="NAME", help="a name that --list-datasets shows")
    add("--data-dir", metavar="DIR", help="where the files lie or are downloaded to; None: data/")
    add("--image-size", type=image_size, metavar="N|HxW", help="None: the images' own, or what the network needs")
    add("--augment", nargs="+", choices=(*AUGMENTATIONS, "none"), help="None: translate, and flip for colour")
    add("--list-datasets", action="store_true", help="show the datasets and exit")
    add = parser.add_argument_group("network").add_argument
    add("--model", default="airbench", metavar="NAME", help="a name that --list-models shows")
    add("--width", type=positive, metavar="X", help="multiplies the channels of airbench")
    add("--hidden", type=count, nargs="*", metavar="N", help="sizes of the hidden layers of mlp")
    add("--dropout", type=number(float, 0, 0.99), metavar="P", help="dropout of mlp and mynet")
    add("--list-models", action="store_true", help="show the networks and exit")
    add = parser.add_argument_group("training (None: a recipe for the network and the dataset)").add_argument
    add("--epochs", type=count, metavar="N", help="passes over the training split")
    add("--batch-size", type=count, metavar="N", help="images a step")
    add("--optimizer", choices=tuple(OPTIMIZERS), help="torch.optim's")
    add("--lr", type=positive, metavar="X", help="the highest learning rate")
    add("--momentum", type=number(float, 0, 0.9999), metavar="X", help="of sgd; Nesterov's where above 0")
    add("--weight-decay", type=number(float, 0), metavar="X", help="on weights, not on biases and norms")
    add("--schedule", choices=SCHEDULES, help="of the learning rate, over all steps")
    add("--label-smoothing", type=number(float, 0, 0.99), metavar="X", help="in the training loss")
    add = parser.add_argument_group("machine and run").add_argument
    add("--precision", choices=("auto", "fp32", "bf16"), default="auto", help="the exported network is always fp32")
    add("--device", default="auto", help="cpu, cuda, cuda:1, ...; auto: a GPU where there is one")
    add("--seed", type=number(int, 0, 2**31), default=0, metavar="N", help="on the CPU a seed repeats bit for bit")
    add("--name", help="of the run; None: <dataset>-<model>, with -2, -3, ... where taken")
    return parser


def derive(args, dataset):
    """Fill in, in place, whatever the command line left open. Raises Problem on what cannot work."""
    for key in ((args.model, args.dataset), (args.model,), ()):
        for name, value in RECIPES.get(key, {}).items():
            if getattr(args, name) is None:
                setattr(args, name, value)
    if args.model not in model.MODELS:
        return  # build says so, with the nearest name
    height, width, channels = dataset.train_images.shape[1:]
    if args.image_size is None:
        # Small images grow by a whole factor: every engine then resizes to the very same pixels.
        factor = -(-model.MODELS[args.model].min_size // min(height, width))
        args.image_size = (height * factor, width * factor)
    if args.augment is None:
        args.augment = ["flip", "translate"] if channels == 3 else ["translate"]
    if "none" in args.augment:
        if len(args.augment) > 1:
            raise Problem("--augment none goes with nothing else", 2)
        args.augment = []
    args.batch_size = min(args.batch_size, len(dataset.train_images))


def choose_device(args):
    """-> (torch.device, the precision's dtype or None for fp32). Raises Problem on a device that is not there."""
    name = args.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).split("\n")[0].rstrip(".")
        raise Problem(f"--device {args.device} cannot be used here ({reason}); --device cpu always works", 2) from None
    bf16 = args.precision == "bf16"
    if args.precision == "auto" and args.model == "airbench":  # the tutorials' networks are too small to gain
        if device.type == "cuda":
            bf16 = torch.cuda.is_bf16_supported()
        elif device.type == "cpu":
            capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
            bf16 = bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))
    return device, torch.bfloat16 if bf16 else None


# ------------------------------------------------------------------------------------------------------- training


def to_tensors(images, labels, size, device):
    """A split on the device: uint8 [N, *size, C], resized exactly as the exported graph does it, and int64 [N]."""
    images = torch.from_numpy(images)
    if tuple(images.shape[1:3]) != tuple(size):
        images = torch.cat([model.resize(part, size) for part in images.split(1024)])
    return images.contiguous().to(device), torch.from_numpy(labels).to(device)


def gather(images, index, augment, flips, generator):
    """One training batch, augmented: uint8 [batch, H, W, C] gathered from `images` by `index` [batch].

    translate shifts by up to 1/16 of the size, mirroring at the edge; flip mirrors left to right where `flips`
    [batch] is true.
    """
    if not augment:
        return images[index]
    _, height, width, _ = images.shape
    device, n = images.device, len(index)
    rows = torch.arange(height, device=device).expand(n, -1)
    columns = torch.arange(width, device=device).expand(n, -1)
    if "translate" in augment:
        shift = [max(1, size // 16) for size in (height, width)]
        dy, dx = (torch.randint(-s, s + 1, (n, 1), generator=generator).to(device) for s in shift)
        rows, columns = mirror(rows + dy, height), mirror(columns + dx, width)
    if "flip" in augment:
        columns = torch.where(flips[:, None], width - 1 - columns, columns)
    return images[index[:, None, None], rows[:, :, None], columns[:, None, :]]


def mirror(position, size):
    """Positions outside 0..size-1 reflected back inside, the edge itself not repeated."""
    return (size - 1 - (size - 1 - position.abs()).abs()).clamp(0, size - 1)


def make_optimizer(network, args):
    """torch's optimizer; weight decay acts on the weights proper, not on biases and norms (as is usual)."""
    parameters = [p for p in network.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "lr": args.lr, "weight_decay": args.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "lr": args.lr, "weight_decay": 0.0},
    ]
    return OPTIMIZERS[args.optimizer]([group for group in groups if group["params"]], args)


def make_schedule(optimizer, args, steps):
    """torch's learning rate schedule over `steps` optimizer steps, from args.lr (onecycle: up to it, then down)."""
    schedulers = torch.optim.lr_scheduler
    if args.schedule == "constant":
        return schedulers.ConstantLR(optimizer, factor=1.0)
    if args.schedule == "linear":
        return schedulers.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    if args.schedule == "cosine":
        return schedulers.CosineAnnealingLR(optimizer, steps)
    return schedulers.OneCycleLR(optimizer, args.lr, total_steps=steps + 1, cycle_momentum=False)


def train_epoch(deployable, split, optimizer, schedule, args, epoch, generator, autocast):
    """One pass over the training split. -> (mean loss, accuracy), measured on the batches as they are trained on."""
    images, labels = split
    network, device = deployable.network.train(), images.device
    order = torch.randperm(len(images), generator=generator)
    # Alternating flip (Jordan 2024): an image is mirrored every other epoch, half of them starting mirrored.
    first_flip = torch.rand(len(images), generator=torch.Generator().manual_seed(args.seed)) < 0.5
    flipped = (first_flip ^ (epoch % 2 == 1)).to(device)
    loss_sum, correct = torch.zeros((), device=device), torch.zeros((), device=device)
    bar = tqdm(order.split(args.batch_size), f"epoch {epoch}/{args.epochs}", leave=False, disable=None, unit="batch")
    for index in bar:
        index = index.to(device)
        batch, target = gather(images, index, args.augment, flipped[index], generator), labels[index]
        with autocast():
            logits = network(deployable.normalise(batch))
            loss = F.cross_entropy(logits.float(), target, label_smoothing=args.label_smoothing)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        loss_sum += loss.detach() * len(index)
        correct += (logits.detach().argmax(1) == target).sum()
    return loss_sum.item() / len(images), correct.item() / len(images)


@torch.inference_mode()
def evaluate(deployable, split, batch_size=500):
    """(mean loss without smoothing, accuracy) of the network in eval mode and fp32 over a whole split."""
    network = deployable.network.eval()
    loss_sum = correct = 0.0
    for images, labels in zip(split[0].split(batch_size), split[1].split(batch_size), strict=True):
        logits = network(deployable.normalise(images))
        loss_sum += F.cross_entropy(logits, labels, reduction="sum").item()
        correct += (logits.argmax(1) == labels).sum().item()
    return loss_sum / len(split[0]), correct / len(split[0])


# -------------------------------------------------------------------------------------------------------- results


def claim_run(args):
    """Make and return a run directory that nobody else has. Raises Problem."""
    if args.name and not re.fullmatch(r"[\w.-]*\w", args.name):
        raise Problem(f"--name {args.name!r} is not a plain name of letters, digits, '.', '_' and '-'", 2)
    base = args.name or f"{args.dataset}-{args.model}"
    for k in itertools.count(1):
        run = os.path.join(RUNS, base if k == 1 else f"{base}-{k}")
        try:
            os.makedirs(run)
            return run
        except FileExistsError:
            if args.name:
                raise Problem(f"{run} exists and a run never overwrites another; choose another --name", 2) from None
        except OSError as error:
            raise Problem(f"cannot make {run}: {error.strerror}") from None


def write_whole(path, write):
    """Let `write` fill a binary file beside `path`, then swap it in: the file appears whole or not at all."""
    temporary = path + ".tmp"
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise Problem(f"cannot write {path}: {error.strerror or error}") from None


def write_json(path, values):
    write_whole(path, lambda file: file.write((json.dumps(values, indent=2) + "\n").encode()))


def make_spec(args, dataset, deployable, test_accuracy):
    """What the exported file will know of itself; see the README for the keys."""
    import torchvision

    return {
        "schema": SCHEMA,
        "task": "classification",
        "classes": list(dataset.classes),
        "channels": dataset.train_images.shape[3],
        "image_size": list(args.image_size),
        "resize": "bilinear antialias uint8",
        "mean": deployable.mean.flatten().tolist(),
        "std": deployable.std.flatten().tolist(),
        "dataset": args.dataset,
        "model": args.model,
        "parameters": sum(p.numel() for p in deployable.network.parameters()),
        "test_accuracy": test_accuracy,
        "arguments": vars(args),
        "versions": {
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "torchvision": torchvision.__version__,
        },
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def save_checkpoint(run, spec, deployable, epoch):
    checkpoint = {
        "schema": SCHEMA,
        "spec": spec,
        "state_dict": deployable.network.state_dict(),
        "arguments": spec["arguments"],
        "epoch": epoch,
    }
    write_whole(os.path.join(run, "checkpoint.pt"), lambda file: torch.save(checkpoint, file))


def describe(args, dataset, deployable, run, device, dtype):
    """Print the derived configuration, before work starts."""
    n, height, width, channels = dataset.train_images.shape
    parameters = sum(p.numel() for p in deployable.network.parameters())
    options = {name: getattr(args, name) for name in model.MODELS[args.model].options}
    options = "".join(f", {name} {value}" for name, value in options.items() if value is not None)
    colour = "grey" if channels == 1 else "colour"
    print(
        f"dataset   {args.dataset}: {n:,} training and {len(dataset.test_images):,} test images, "
        f"{len(dataset.classes)} classes, {height}x{width} {colour}\n"
        f"network   {args.model}{options}: {parameters:,} parameters, input {args.image_size[0]}x{args.image_size[1]}\n"
        f"training  {args.epochs} epochs of batch {args.batch_size}, {args.optimizer} lr {args.lr:g} "
        f"{args.schedule}, weight decay {args.weight_decay:g},\n"
        f"          label smoothing {args.label_smoothing:g}, augment {' '.join(args.augment) or 'none'}\n"
        f"machine   {device}, {torch.get_num_threads()} threads, {'bf16' if dtype else 'fp32'}, seed {args.seed}\n"
        f"run       {run}",
        flush=True,
    )


COLUMNS = "epoch train_loss train_accuracy test_loss test_accuracy lr seconds".split()


def train(args, dataset):
    """The whole of step 1. Returns the run directory; raises Problem."""
    derive(args, dataset)
    torch.manual_seed(args.seed)
    device, dtype = choose_device(args)
    options = {name: getattr(args, name) for name in ("width", "hidden", "dropout") if getattr(args, name) is not None}
    mean, std = data.mean_and_std(dataset.train_images)
    shape = {"channels": len(mean), "classes": len(dataset.classes), "image_size": args.image_size}
    try:
        network = model.build(args.model, **shape, **options)
    except ValueError as error:
        raise Problem(error, 2) from None
    deployable = model.Deployable(network, args.image_size, mean, std)
    deployable.to(device, memory_format=torch.channels_last)
    train_split = to_tensors(dataset.train_images, dataset.train_labels, args.image_size, device)
    test_split = to_tensors(dataset.test_images, dataset.test_labels, args.image_size, device)
    if hasattr(network, "whiten"):
        network.whiten(deployable.normalise(train_split[0][:2000]))
    optimizer = make_optimizer(network, args)
    schedule = make_schedule(optimizer, args, args.epochs * -(-len(train_split[0]) // args.batch_size))
    generator = torch.Generator().manual_seed(args.seed)

    def autocast():
        return torch.autocast(device.type, dtype) if dtype else contextlib.nullcontext()

    run = claim_run(args)
    describe(args, dataset, deployable, run, device, dtype)
    write_json(
        os.path.join(run, "config.json"),
        {**vars(args), "run": run, "device_used": str(device), "precision_used": "bf16" if dtype else "fp32"},
    )
    rows, started = [], time.perf_counter()
    print("epoch   train loss  accuracy    test loss  accuracy   seconds", flush=True)
    for epoch in range(1, args.epochs + 1):
        epoch_started, lr = time.perf_counter(), optimizer.param_groups[0]["lr"]
        measured = train_epoch(deployable, train_split, optimizer, schedule, args, epoch, generator, autocast)
        measured += evaluate(deployable, test_split)
        seconds = time.perf_counter() - epoch_started
        rows.append(dict(zip(COLUMNS, (epoch, *measured, lr, round(seconds, 3)), strict=True)))
        print("{:5d}   {:10.4f}  {:8.2%}   {:10.4f}  {:8.2%}  {:8.1f}".format(epoch, *measured, seconds), flush=True)
        write_metrics(run, rows)
        save_checkpoint(run, make_spec(args, dataset, deployable, measured[3]), deployable, epoch)
    summary = {
        "dataset": args.dataset,
        "model": args.model,
        "epochs": args.epochs,
        "test_accuracy": rows[-1]["test_accuracy"],
        "test_loss": rows[-1]["test_loss"],
        "train_seconds": round(time.perf_counter() - started, 3),
        "parameters": sum(p.numel() for p in network.parameters()),
        "seed": args.seed,
    }
    write_json(os.path.join(run, "summary.json"), summary)
    print(f"{run}: test accuracy {summary['test_accuracy']:.2%} in {summary['train_seconds']:.0f} s")
    return run


def write_metrics(run, rows):
    text = [",".join(COLUMNS), *(",".join(str(row[name]) for name in COLUMNS) for row in rows)]
    write_whole(os.path.join(run, "metrics.csv"), lambda file: file.write(("\n".join(text) + "\n").encode()))


def main(argv=None):
    args = build_parser().parse_args(argv)
    if args.list_models or args.list_datasets:
        about = {name: cls.about for name, cls in model.MODELS.items()} if args.list_models else data.DATASETS
        for name, text in about.items():
            print(f"{name:14} {text}")
        return 0
    try:
        train(args, data.load(args.dataset, args.data_dir))
        return 0
    except Problem as problem:
        data.say(f"error: {problem}")
        return problem.code
    except KeyboardInterrupt:
        data.say("interrupted")
        return 130


if __name__ == "__main__":
    sys.exit(main())
