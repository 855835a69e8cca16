#!/usr/bin/env python3
"""Step 1 of 3: train a network on a dataset.

    python step1_train.py                                  # the bundled digits, a minute on a laptop
    python step1_train.py --dataset cifar10 --epochs 10
    python step1_train.py --dataset folder --data-dir photos --model mobilenet_v3_small --pretrained
    python step1_train.py --dataset linear                 # a regression, no images at all

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
import copy
import itertools
import json
import math
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
from data import Parser, Problem, guarded

SCHEMA = 1
RUNS = "runs"
AUGMENTATIONS = ("flip", "translate", "cutout")
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
    ("linear",): {"epochs": 300, "batch_size": 100_000, "lr": 0.1, "schedule": "constant"},
    ("torchvision",): {"lr": 0.05, "batch_size": 64, "weight_decay": 1e-4},
    ("pretrained",): {"lr": 0.01, "batch_size": 64, "weight_decay": 1e-4},
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
    )
    count, positive = number(int, 1), number(float, 0, above=True)
    add = parser.add_argument_group("data").add_argument
    add("--dataset", default="digits", metavar="NAME", help="a name that --list-datasets shows")
    add("--data-dir", metavar="PATH", help="where the files lie or are downloaded to (default: data/); csv: the file")
    add("--image-size", type=image_size, metavar="N|HxW", help="what the network sees (default: see the README)")
    names = ", ".join(AUGMENTATIONS)
    add(
        "--augment",
        nargs="+",
        choices=(*AUGMENTATIONS, "none"),
        metavar="A",
        help=f"{names}, or none (default: translate, and flip for colour)",
    )
    add(
        "--val-fraction",
        type=number(float, 0, 0.9, above=True),
        metavar="X",
        help="hold out this part of the "
        "training split, keep the epoch that does best on it, and look at the test split once, at the end",
    )
    add("--class-weights", choices=("balanced",), help="weigh the loss against the classes' shares")
    add("--list-datasets", action="store_true", help="show the datasets and exit")
    add = parser.add_argument_group("your own images (folder, csv)").add_argument
    add("--cache-dir", metavar="DIR", help="for the decoded images (default: .threestep beside the data)")
    add("--strict", action="store_true", help="refuse unreadable files instead of leaving them out")
    add("--test-csv", metavar="FILE", help="the test split (default: a part of each class, held out)")
    add("--image-root", metavar="DIR", help="what paths are relative to (default: the CSV file's directory)")
    add("--image-column", metavar="NAME", help="default: filepath, filename, path or image")
    add("--label-column", metavar="NAME", help="default: label, class or target")
    add = parser.add_argument_group("network").add_argument
    add("--model", metavar="NAME", help="a name that --list-models shows (default: airbench; linear for linear)")
    add("--width", type=positive, metavar="X", help="multiplies the channels of airbench")
    add("--hidden", type=count, nargs="*", metavar="N", help="sizes of mlp's hidden layers (default: 128)")
    add("--dropout", type=number(float, 0, 0.99), metavar="P", help="dropout of mlp (default: 0) and mynet (0.1)")
    add(
        "--pretrained",
        nargs="?",
        const="default",
        metavar="FILE",
        help="start from torchvision's default weights, or from a local state_dict or checkpoint",
    )
    add("--freeze-backbone", action="store_true", help="train the last layer only, for small data")
    add("--list-models", action="store_true", help="show the networks and exit")
    add = parser.add_argument_group("training (defaults: a recipe for the network and the dataset)").add_argument
    add("--epochs", type=count, metavar="N", help="passes over the training split")
    add("--batch-size", type=count, metavar="N", help="images a step")
    add("--optimizer", choices=tuple(OPTIMIZERS), metavar="NAME", help=f"torch.optim's {', '.join(OPTIMIZERS)}")
    add("--lr", type=positive, metavar="X", help="the highest learning rate")
    add("--momentum", type=number(float, 0, 0.9999), metavar="X", help="of sgd; Nesterov's where above 0")
    add("--weight-decay", type=number(float, 0), metavar="X", help="on weights, not on biases and norms")
    add("--schedule", choices=SCHEDULES, metavar="NAME", help=f"of the learning rate: {', '.join(SCHEDULES)}")
    add("--label-smoothing", type=number(float, 0, 0.99), metavar="X", help="in the training loss")
    add = parser.add_argument_group("machine and run").add_argument
    add("--precision", choices=("auto", "fp32", "bf16"), default="auto", help="the exported network is always fp32")
    add("--device", default="auto", metavar="NAME", help="cpu, cuda, cuda:1, ...; auto: a GPU where there is one")
    add("--seed", type=number(int, 0, 2**31), default=0, metavar="N", help="on the CPU a seed repeats bit for bit")
    add("--name", help="of the run (default: <dataset>-<model>, with -2, -3, ... where taken)")
    return parser


def derive(args, dataset):
    """Fill in, in place, whatever the command line left open. Raises Problem on what cannot work."""
    count, given = len(dataset.train_images), vars(args).copy()
    kind = "pretrained" if args.pretrained else args.model if args.model in model.MODELS else "torchvision"
    for key in ((args.model, args.dataset), (kind,), ()):
        for name, value in RECIPES.get(key, {}).items():
            if getattr(args, name) is None:
                setattr(args, name, value)
    if args.dataset in ("folder", "csv"):  # a few hundred photos want more passes and smaller steps
        args.epochs = given["epochs"] or min(max(200_000 // count, 10), 50)
        while not given["batch_size"] and args.batch_size > 16 and count < 16 * args.batch_size:
            args.batch_size //= 2
    if dataset.task == "regression":
        if args.augment not in (None, ["none"]) or args.class_weights or args.label_smoothing:
            raise Problem("--augment, --class-weights and --label-smoothing are for images with classes", 2)
        args.augment, args.image_size = [], (1, 1)
    else:
        height, width, channels = dataset.train_images.shape[1:]
        if args.image_size is None:
            # Small images grow by a whole factor: every engine then resizes to the very same pixels.
            factor = -(-model.min_size(args.model) // min(height, width))
            args.image_size = (height * factor, width * factor)
        if args.augment is None:
            args.augment = ["flip", "translate"] if channels == 3 else ["translate"]
    if "none" in args.augment:
        if len(args.augment) > 1:
            raise Problem("--augment none goes with nothing else", 2)
        args.augment = []
    args.batch_size = min(args.batch_size, count)
    if args.freeze_backbone and not args.pretrained:
        raise Problem("--freeze-backbone trains the last layer only: it needs --pretrained", 2)


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
    if args.precision == "auto" and args.model not in ("linear", "mlp", "mynet", "resblock"):  # too small to gain
        if device.type == "cuda":
            bf16 = torch.cuda.is_bf16_supported()
        elif device.type == "cpu":
            capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
            bf16 = bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))
    return device, torch.bfloat16 if bf16 else None


# ------------------------------------------------------------------------------------------------------- training


def to_tensors(images, labels, size, device):
    """A split on the device: uint8 [N, *size, C], resized exactly as the exported graph does it, and int64 [N].

    A memory map of the right size stays one; on a GPU, a set too large for it stays in the machine's memory.
    """
    images = torch.from_numpy(images)
    if images.dtype == torch.uint8 and tuple(images.shape[1:3]) != tuple(size):
        images = torch.cat([model.resize(part, size) for part in images.split(1024)]).contiguous()
    if device.type != "cuda" or images.nbytes < torch.cuda.mem_get_info(device)[0] / 2:
        images = images.to(device)
    return images, torch.from_numpy(labels).to(device)


def gather(images, index, augment, flips, generator):
    """One training batch, augmented: uint8 [batch, H, W, C] gathered from `images` by `index` [batch].

    translate shifts by up to 1/16 of the size, mirroring at the edge; flip mirrors left to right where `flips`
    [batch] is true; cutout (DeVries and Taylor 2017) blanks a square of 3/8 of the size.
    """
    if not augment:
        return images[index]
    _, height, width, _ = images.shape
    device, n = images.device, len(index)
    rows = torch.arange(height, device=device).expand(n, -1)
    columns = torch.arange(width, device=device).expand(n, -1)
    keep = None
    if "cutout" in augment:
        middles = (
            torch.rand(n, 2, generator=generator).to(device) * torch.tensor([height, width], device=device)
        ).int()
        away = [(rows - middles[:, :1]).abs() < height * 3 // 16, (columns - middles[:, 1:]).abs() < width * 3 // 16]
        keep = ~(away[0][:, :, None] & away[1][:, None, :])[..., None]
    if "translate" in augment:
        shift = [max(1, size // 16) for size in (height, width)]
        dy, dx = (torch.randint(-s, s + 1, (n, 1), generator=generator).to(device) for s in shift)
        rows, columns = mirror(rows + dy, height), mirror(columns + dx, width)
    if "flip" in augment:
        columns = torch.where(flips[:, None], width - 1 - columns, columns)
    batch = images[index[:, None, None], rows[:, :, None], columns[:, None, :]]
    return batch if keep is None else torch.where(keep, batch, 128)


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


def criterion(outputs, targets, label_smoothing=0.0, class_weights=None):
    """Cross entropy of logits [batch, classes] and int64 labels; mean squared error where targets are floats."""
    if targets.is_floating_point():
        return F.mse_loss(outputs.float(), targets)
    return F.cross_entropy(outputs.float(), targets, weight=class_weights, label_smoothing=label_smoothing)


def train_epoch(deployable, split, optimizer, schedule, args, epoch, generator, autocast, class_weights):
    """One pass over the training split. -> (mean loss, accuracy or None), as measured on the batches trained on."""
    images, labels, members = split
    network, device = model.train_mode(deployable.network), labels.device
    order = members[torch.randperm(len(members), generator=generator)]
    # Alternating flip (Jordan 2024): an image is mirrored every other epoch, half of them starting mirrored.
    flipped = torch.rand(len(images), generator=torch.Generator().manual_seed(args.seed)) < 0.5
    flipped = flipped ^ (epoch % 2 == 1)
    loss_sum, correct, seen = torch.zeros((), device=device), torch.zeros((), device=device), 0
    batches = order.split(args.batch_size)
    if len(batches) > 1 and len(batches[-1]) == 1:
        batches = batches[:-1]  # batch norm cannot train on a single image
    bar = tqdm(batches, f"epoch {epoch}/{args.epochs}", leave=False, disable=None, unit="batch", delay=0.5)
    for index in bar:
        flips, index = flipped[index].to(images.device), index.to(images.device)
        batch = gather(images, index, args.augment, flips, generator).to(device)
        targets = labels[index.to(device)]
        with autocast():
            outputs = network(deployable.normalise(batch))
        loss = criterion(outputs, targets, args.label_smoothing, class_weights)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        loss_sum += loss.detach() * len(index)
        seen += len(index)
        if not targets.is_floating_point():
            correct += (outputs.detach().argmax(1) == targets).sum()
    if not math.isfinite(loss_sum.item()):
        raise Problem(f"the loss became {loss_sum.item()} in epoch {epoch}: try a smaller --lr than {args.lr:g}")
    return loss_sum.item() / seen, None if labels.is_floating_point() else correct.item() / seen


@torch.inference_mode()
def evaluate(deployable, split, batch_size=500):
    """The network in eval mode and fp32 over a whole split. -> (mean loss without smoothing, accuracy, outputs).

    accuracy is None for regression; outputs are on the CPU: predicted labels [N], or predictions [N, 1].
    """
    images, labels, members = split
    network, device = deployable.network.eval(), labels.device
    loss_sum, outputs = 0.0, []
    for index in members.split(batch_size):
        output = network(deployable.normalise(images[index.to(images.device)].to(device)))
        targets = labels[index.to(device)]
        loss_sum += criterion(output, targets).item() * len(index)
        outputs.append((output if targets.is_floating_point() else output.argmax(1)).cpu())
    outputs = torch.cat(outputs)
    regression = labels.is_floating_point()
    accuracy = None if regression else (outputs == labels.cpu()[members]).double().mean().item()
    return loss_sum / len(members), accuracy, outputs


def per_class(labels, predicted, classes):
    """Precision, recall, F1 and support of each class, from int64 [N] labels and predictions (0 where undefined)."""
    n = len(classes)
    counts = torch.bincount(labels * n + predicted, minlength=n * n).view(n, n).double()  # [true, predicted]
    hits = counts.diagonal()
    precision, recall = hits / counts.sum(0).clamp(min=1), hits / counts.sum(1).clamp(min=1)
    f1 = 2 * hits / (counts.sum(0) + counts.sum(1)).clamp(min=1)
    columns = {"precision": precision, "recall": recall, "f1": f1, "support": counts.sum(1).long()}
    return {name: {key: column[i].item() for key, column in columns.items()} for i, name in enumerate(classes)}


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

    regression = dataset.task == "regression"
    return {
        "schema": SCHEMA,
        "task": dataset.task,
        "classes": list(dataset.classes),
        "channels": dataset.train_images.shape[-1],  # for regression: the number of features
        "image_size": list(args.image_size),
        "resize": None if regression else "bilinear antialias uint8",
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


def write_metrics(run, rows):
    names = list(rows[0])
    lines = [names, *([("" if row[name] is None else row[name]) for name in names] for row in rows)]
    text = "".join(",".join(map(str, line)) + "\n" for line in lines)
    write_whole(os.path.join(run, "metrics.csv"), lambda file: file.write(text.encode()))


def describe(args, dataset, deployable, splits, run, dtype):
    """Print the derived configuration, before work starts."""
    parameters = sum(p.numel() for p in deployable.network.parameters())
    trained = sum(p.numel() for p in deployable.network.parameters() if p.requires_grad)
    options = {name: getattr(args, name) for name in model.options_of(args.model)}
    options = "".join(f", {name} {value}" for name, value in options.items() if value is not None)
    sizes = ", ".join(f"{len(members):,} {name}" for name, (_, _, members) in splits.items())
    *size, channels = dataset.train_images.shape[1:]
    kind = f"{size[0]}x{size[1]} {'grey' if channels == 1 else 'colour'}" if size else f"{channels} features"
    kind = f"{len(dataset.classes)} classes, {kind}" if size else kind
    given = f", input {args.image_size[0]}x{args.image_size[1]}" if size else ""
    print(
        f"dataset   {args.dataset}: {sizes}; {kind}\n"
        f"network   {args.model}{options}: {parameters:,} parameters, {trained:,} trained{given}\n"
        f"training  {args.epochs} epochs of batch {args.batch_size}, {args.optimizer} lr {args.lr:g} "
        f"{args.schedule}, weight decay {args.weight_decay:g},\n"
        f"          label smoothing {args.label_smoothing:g}, augment {' '.join(args.augment) or 'none'}\n"
        f"machine   {splits['train'][1].device}, {torch.get_num_threads()} threads, {'bf16' if dtype else 'fp32'}, "
        f"seed {args.seed}\n"
        f"run       {run}",
        flush=True,
    )


# ------------------------------------------------------------------------------------------------------------ run


def load_dataset(args):
    """Settle the network's name, then load the dataset. Raises Problem."""
    args.model = args.model or ("linear" if args.dataset == "linear" else "airbench")
    try:
        usual_size = model.usual_size(args.model)
    except ValueError as error:
        raise Problem(error, 2) from None
    names = ("image_size", "strict", "cache_dir", "image_root", "test_csv", "image_column", "label_column", "seed")
    options = {name: getattr(args, name) for name in names}
    return data.load(args.dataset, args.data_dir, usual_size=usual_size, resize=model.resize, **options)


def make_deployable(args, dataset, device):
    """The network to train, with its preprocessing, on the device. Raises Problem."""
    regression = dataset.task == "regression"
    channels = dataset.train_images.shape[-1]
    options = {name: getattr(args, name) for name in ("width", "hidden", "dropout") if getattr(args, name) is not None}
    shape = {"channels": channels, "classes": len(dataset.classes), "image_size": args.image_size}
    mean, std = ([0.0] * channels, [1.0] * channels) if regression else data.mean_and_std(dataset.train_images)
    try:
        network = model.build(args.model, **shape, **options)
        if args.pretrained:
            state, mean, std = pretrained_state(args, channels, mean, std)
            model.load_pretrained(network, state)
    except ValueError as error:
        raise Problem(f"{args.pretrained}: {error}" if args.pretrained else error, 2) from None
    if args.freeze_backbone:
        model.freeze_backbone(network)
    if hasattr(network, "whiten") and not args.pretrained:
        first = to_tensors(
            dataset.train_images[:2000], dataset.train_labels[:2000], args.image_size, torch.device("cpu")
        )
        network.whiten(model.Deployable(network, args.image_size, mean, std).normalise(first[0]))
    deployable = (model.Regressor if regression else model.Deployable)(network, args.image_size, mean, std)
    return deployable.to(device, memory_format=torch.channels_last)


def pretrained_state(args, channels, mean, std):
    """-> (state_dict, mean, std) of --pretrained: torchvision's default weights or a local file. Raises Problem."""
    weights = model.torchvision_weights(args.model)
    if weights is not None:  # what torchvision's networks were trained with; grey takes the middle of the three
        mean, std = (
            [sum(x) / 3] if channels == 1 else list(x) for x in (weights.transforms().mean, weights.transforms().std)
        )
    if args.pretrained != "default":
        state = model.read_state(args.pretrained)
        return state.get("state_dict", state), *(
            state.get("spec", {}).get(k, v) for k, v in (("mean", mean), ("std", std))
        )
    if weights is None:
        raise Problem(f"there are no default weights for {args.model}; --pretrained FILE takes a local state_dict", 2)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            return weights.get_state_dict(progress=True, check_hash=True), mean, std
    except (OSError, RuntimeError) as error:
        place = os.path.join(torch.hub.get_dir(), "checkpoints", os.path.basename(weights.url))
        raise Problem(
            f"cannot download the weights of {args.model} ({error}): put {weights.url} at {place}, "
            f"or give --pretrained FILE, or train from scratch without --pretrained"
        ) from None


def make_splits(args, dataset, device):
    """{"train": (images, labels, members int64 [n]), "val" with --val-fraction, "test"}."""
    train = to_tensors(dataset.train_images, dataset.train_labels, args.image_size, device)
    test = to_tensors(dataset.test_images, dataset.test_labels, args.image_size, device)
    splits = {"train": (*train, torch.arange(len(train[0])))}
    if args.val_fraction:
        labels = dataset.train_labels if dataset.task == "classification" else 0 * dataset.train_labels[:, 0]
        held = torch.from_numpy(data.stratified(labels, args.val_fraction, args.seed))
        splits = {"train": (*train, torch.nonzero(~held)[:, 0]), "val": (*train, torch.nonzero(held)[:, 0])}
    return {**splits, "test": (*test, torch.arange(len(test[0])))}


def fit(args, dataset, deployable, splits, run, dtype):
    """The training loop. -> (the rows of metrics.csv, the epoch whose network is the result, left in `deployable`)."""
    labels, members = splits["train"][1], splits["train"][2]
    optimizer = make_optimizer(deployable.network, args)
    schedule = make_schedule(optimizer, args, args.epochs * -(-len(members) // args.batch_size))
    generator = torch.Generator().manual_seed(args.seed)
    watched = "val" if "val" in splits else "test"  # the split that each epoch is measured on; test never selects
    columns = ["epoch", "train_loss", "train_accuracy", f"{watched}_loss", f"{watched}_accuracy", "lr", "seconds"]
    class_weights = None
    if args.class_weights:
        counts = torch.bincount(labels.cpu()[members], minlength=len(dataset.classes)).float()
        class_weights = (len(members) / (len(counts) * counts)).to(labels.device)

    def autocast():
        return torch.autocast(labels.device.type, dtype) if dtype else contextlib.nullcontext()

    rows, best, written = [], None, 0.0
    print(f"epoch   train loss  accuracy  {watched:>8} loss  accuracy   seconds", flush=True)
    for epoch in range(1, args.epochs + 1):
        started, lr = time.perf_counter(), optimizer.param_groups[0]["lr"]
        measured = train_epoch(
            deployable, splits["train"], optimizer, schedule, args, epoch, generator, autocast, class_weights
        )
        measured += evaluate(deployable, splits[watched])[:2]
        rows.append(dict(zip(columns, (epoch, *measured, lr, round(time.perf_counter() - started, 3)), strict=True)))
        if args.epochs <= 50 or epoch % (args.epochs // 20) == 0 or epoch == args.epochs:
            cells = ["-" if x is None else f"{x:{form}}" for x, form in zip(measured, (".4f", ".2%") * 2, strict=True)]
            print(
                "{:5d}   {:>10}  {:>8}  {:>13}  {:>8}  {:8.1f}".format(epoch, *cells, rows[-1]["seconds"]), flush=True
            )
        score = (measured[3] or 0.0, -measured[2])
        if watched == "test" or best is None or score > best[0]:
            best = score, epoch, copy.deepcopy(deployable.network.state_dict()) if watched == "val" else None
        if epoch == args.epochs or time.perf_counter() - written > 1:  # an epoch may take milliseconds
            write_metrics(run, rows)
            if best[1] == epoch and epoch < args.epochs:
                test_accuracy = measured[3] if watched == "test" else None
                save_checkpoint(run, make_spec(args, dataset, deployable, test_accuracy), deployable, epoch)
            written = time.perf_counter()
    if watched == "val":
        deployable.network.load_state_dict(best[2])
        print(f"epoch {best[1]} did best on the validation split and is kept")
    return rows, best[1]


def train(args):
    """The whole of step 1. Returns the exit code; raises Problem."""
    del args.list_models, args.list_datasets
    dataset = load_dataset(args)
    derive(args, dataset)
    torch.manual_seed(args.seed)
    device, dtype = choose_device(args)
    deployable = make_deployable(args, dataset, device)
    splits = make_splits(args, dataset, device)
    run = claim_run(args)
    describe(args, dataset, deployable, splits, run, dtype)
    config = {**vars(args), "run": run, "device_used": str(device), "precision_used": "bf16" if dtype else "fp32"}
    write_json(os.path.join(run, "config.json"), config)
    started = time.perf_counter()
    _, epoch = fit(args, dataset, deployable, splits, run, dtype)
    test_loss, test_accuracy, outputs = evaluate(deployable, splits["test"])
    spec = make_spec(args, dataset, deployable, test_accuracy)
    save_checkpoint(run, spec, deployable, epoch)
    summary = {
        "dataset": args.dataset,
        "model": args.model,
        "epochs": args.epochs,
        "test_accuracy": test_accuracy,
        "test_loss": test_loss,
        "train_seconds": round(time.perf_counter() - started, 3),
        "parameters": spec["parameters"],
        "seed": args.seed,
        "epoch_kept": epoch,
    }
    if dataset.task == "classification":
        summary["per_class"] = per_class(torch.from_numpy(dataset.test_labels), outputs, dataset.classes)
    write_json(os.path.join(run, "summary.json"), summary)
    if args.dataset == "linear" and args.model == "linear":
        print_coefficients(deployable.network)
    result = f"test loss {test_loss:.4g}" if test_accuracy is None else f"test accuracy {test_accuracy:.2%}"
    print(f"{run}: {result} in {summary['train_seconds']:.0f} s")
    return 0


def print_coefficients(network):
    """What the tensor tutorial ends with: learned beside true."""
    learned = [*network.layer.weight.flatten().tolist(), network.layer.bias.item()]
    names = [f"x{i}" for i in range(1, len(learned))] + ["bias"]
    print("          learned     true")
    for name, ours, true in zip(names, learned, (*data.LINEAR_WEIGHTS, data.LINEAR_BIAS), strict=True):
        print(f"{name:>6} {ours:10.4f} {true:8.4f}")


def list_names(args):
    if args.list_datasets:
        for name, about in data.DATASETS.items():
            print(f"{name:14} {about}")
    if args.list_models:
        for name, cls in model.MODELS.items():
            print(f"{name:14} {cls.about}")
        print("and torchvision's: " + " ".join(model.torchvision_names()))
    return 0


def main(argv=None):
    args = build_parser().parse_args(argv)
    return guarded(list_names if args.list_models or args.list_datasets else train, args)


if __name__ == "__main__":
    sys.exit(main())
