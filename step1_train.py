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
import ctypes
import importlib.metadata
import io
import itertools
import json
import math
import os
import platform
import re
import shutil
import sys
import textwrap
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
OPTIMIZERS = ("sgd", "adam", "adamw", "muon")
BF16_MATMUL = any((getattr(torch.cpu, "get_capabilities", dict)()).get(name) for name in ("amx_bf16", "avx512_bf16"))
SCHEDULES = ("constant", "linear", "cosine", "onecycle")

# What the command line leaves open: by the network and dataset, then by the network, then by the optimizer, then for
# all. Where another optimizer than the recipe's is asked for, its own defaults take the place of what belongs to it.
RECIPES = {
    ("airbench", "digits"): {
        "epochs": 20,
        "batch_size": 64,
        "width": 0.25,
        "lr": 0.08,
        "label_smoothing": 0.0,
        "grow": 1.0,
    },
    ("airbench", "mnist"): {"width": 0.25, "lr": 0.12, "label_smoothing": 0.1},
    ("airbench", "fashion-mnist"): {"width": 0.5},
    ("airbench", "kmnist"): {"width": 0.5},
    ("mlp", "digits"): {"epochs": 50},
    ("mynet", "digits"): {"epochs": 50, "batch_size": 32},
    ("resblock", "digits"): {"epochs": 50, "batch_size": 64, "lr": 0.1},
    ("airbench",): {"optimizer": "muon", "batch_size": 500, "label_smoothing": 0.2, "grow": 0.625},
    ("mlp",): {"optimizer": "adam", "batch_size": 32},
    ("resblock",): {"lr": 0.5, "batch_size": 512},
    ("linear",): {"epochs": 300, "batch_size": 100_000, "lr": 0.1, "weight_decay": 0.0, "schedule": "constant"},
    ("torchvision",): {"batch_size": 64},
    ("pretrained",): {"batch_size": 64, "lr": 0.01},
    "sgd": {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-4, "schedule": "onecycle"},
    "adam": {"lr": 1e-3, "weight_decay": 0.0, "schedule": "cosine"},
    "adamw": {"lr": 1e-3, "weight_decay": 0.01, "schedule": "cosine"},
    "muon": {"lr": 0.24, "momentum": 0.6, "weight_decay": 0.004, "schedule": "linear"},  # after airbench94_muon
    (): {"epochs": 10, "batch_size": 128, "optimizer": "sgd", "label_smoothing": 0.0, "grow": 1.0},
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
    names = ", ".join(data.AUGMENTATIONS)
    add(
        "--augment",
        nargs="+",
        choices=(*data.AUGMENTATIONS, "none"),
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
    add("--optimizer", choices=OPTIMIZERS, metavar="NAME", help=", ".join(OPTIMIZERS))
    add("--lr", type=positive, metavar="X", help="the highest learning rate")
    add("--momentum", type=number(float, 0, 0.9999), metavar="X", help="of sgd and muon; Nesterov's where above 0")
    add("--weight-decay", type=number(float, 0), metavar="X", help="on weights, not on biases and norms")
    add("--schedule", choices=SCHEDULES, metavar="NAME", help=f"of the learning rate: {', '.join(SCHEDULES)}")
    add(
        "--grow", type=number(float, 0.1, 1), metavar="X", help="start at this part of the image size, end at all of it"
    )
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
    recipe = {**RECIPES[()], **RECIPES.get((kind,), {}), **RECIPES.get((args.model, args.dataset), {})}
    usual, wanted = recipe["optimizer"], args.optimizer or recipe["optimizer"]
    settings = RECIPES[wanted]
    recipe = {**settings, **recipe} if wanted == usual else {**recipe, **settings}
    for name, value in recipe.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if dataset.task == "regression":
        if args.model not in ("linear", "mlp"):
            raise Problem(f"--dataset {args.dataset} has features, not images: --model linear or mlp", 2)
        if given["augment"] not in (None, ["none"]) or args.class_weights or given["label_smoothing"]:
            raise Problem("--augment, --class-weights and --label-smoothing are for images with classes", 2)
        args.augment, args.image_size, args.grow = [], (1, 1), 1.0
    else:
        derive_from_images(args, dataset, given)
    if "none" in args.augment:
        if len(args.augment) > 1:
            raise Problem("--augment none goes with nothing else", 2)
        args.augment = []
    args.batch_size = min(args.batch_size, count)
    if args.freeze_backbone and not args.pretrained:
        raise Problem("--freeze-backbone trains the last layer only: it needs --pretrained", 2)


def derive_from_images(args, dataset, given):
    """The part of `derive` that looks at the images; given: the arguments as they came."""
    count, height, width, channels = dataset.train_images.shape
    if args.image_size is None:
        # Small images grow by a whole factor: every engine then resizes to the very same pixels.
        factor = -(-model.min_size(args.model) // min(height, width))
        args.image_size = (height * factor, width * factor)
    if args.augment is None:
        args.augment = ["flip", "translate"] if channels == 3 else ["translate"]
    if args.grow < 1 and not model.takes_any_size(args.model):
        raise Problem(f"--grow changes the image size while training, which {args.model} cannot take", 2)
    own = args.dataset in ("folder", "csv")
    if own and not given["epochs"]:
        args.epochs = min(max(200_000 // count, 10), 50)  # few images want more passes
    pixels = args.image_size[0] * args.image_size[1]
    while not given["batch_size"] and args.batch_size > 16:
        few_steps = own and count < 16 * args.batch_size
        much_memory = args.model == "airbench" and args.batch_size * pixels > 640_000
        if not few_steps and not much_memory:
            break
        args.batch_size //= 2
        args.lr = args.lr if given["lr"] else args.lr / 2**0.5


def choose_device(args):
    """-> (torch.device, the precision's dtype or None for fp32). Raises Problem on a device that is not there."""
    name = args.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
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


class Muon(torch.optim.SGD):
    """Muon (Jordan et al. 2024) for convolution filters as well as matrices, which torch.optim.Muon does not take.

    In the groups marked `orthogonal` the step is the momentum, seen as a matrix [out, rest], with all its singular
    values brought near 1; filters are also held at norm sqrt(out), which the batch norm behind them makes free.
    The other groups are torch's SGD with Nesterov momentum, of Jordan's 0.85.
    """

    SGD_MOMENTUM = 0.85

    def __init__(self, groups, momentum):
        plain = {"orthogonal": False, "momentum": self.SGD_MOMENTUM, "nesterov": True}
        special = {"momentum": 0, "nesterov": False, "memory": momentum}  # its own momentum comes before
        super().__init__([{**group, **special} if group.get("orthogonal") else {**plain, **group} for group in groups])

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"] if group["orthogonal"] else ():
                if p.grad is None:
                    continue
                past = self.state[p].setdefault("past", torch.zeros_like(p))
                past.mul_(group["memory"]).add_(p.grad)
                update = p.grad.add(past, alpha=group["memory"])  # Nesterov's
                p.grad = orthogonalise(update.flatten(1)).view_as(p).to(p.dtype)
                if p.ndim == 4:
                    p.mul_(len(p) ** 0.5 / p.norm())
        return super().step(closure)


def orthogonalise(matrix, steps=3):
    """A matrix [m, n] with its singular values brought near 1, by Newton-Schulz steps of Jordan's quintic."""
    x = matrix.bfloat16() if BF16_MATMUL else matrix.float()
    x = x / (x.norm() + 1e-7)
    wide = x if len(x) <= x.shape[1] else x.T
    for _ in range(steps):
        gram = wide @ wide.T
        wide = 3.4445 * wide + (-4.7750 * gram + 2.0315 * gram @ gram) @ wide
    return wide if len(x) <= x.shape[1] else wide.T


def make_optimizer(network, args):
    """The optimizer of args; weight decay acts on the weights proper, not on biases and norms (as is usual).

    muon: orthogonal steps for all weights but those of the first and the last layer.
    """
    parameters = [p for p in network.parameters() if p.requires_grad]
    weights, vectors = [p for p in parameters if p.ndim > 1], [p for p in parameters if p.ndim <= 1]
    if args.optimizer == "muon":
        named = dict(network.named_parameters())
        head = [named[key] for key in model.head_keys(network) if key in named]
        ends = [next(p for p in named.values() if p.ndim > 1), *head]
        inner = [p for p in weights if not any(p is end for end in ends)]
        outer = [p for p in weights if not any(p is p_in for p_in in inner)]
        # Jordan's rates for CIFAR-10, relative to the filters': 0.67 for the head, 0.053 for biases.
        groups = [{"params": inner, "lr": args.lr, "orthogonal": True}]
        groups += [{"params": outer, "lr": 2.8 * args.lr}, {"params": vectors, "lr": 0.22 * args.lr}]
        groups = [{"weight_decay": args.weight_decay * args.lr / group["lr"], **group} for group in groups]
        groups[0]["weight_decay"] = 0.0  # their norm is held
        return Muon([group for group in groups if group["params"]], args.momentum)
    groups = [
        {"params": weights, "lr": args.lr, "weight_decay": args.weight_decay},
        {"params": vectors, "lr": args.lr, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if args.optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=args.momentum, nesterov=args.momentum > 0)
    return {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[args.optimizer](groups, fused=True)


def make_schedule(optimizer, args, steps):
    """torch's learning rate schedule over `steps` optimizer steps, from args.lr (onecycle: up to it, then down)."""
    schedulers = torch.optim.lr_scheduler
    if args.schedule == "constant":
        return schedulers.ConstantLR(optimizer, factor=1.0)
    if args.schedule == "linear":
        return schedulers.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    if args.schedule == "cosine":
        return schedulers.CosineAnnealingLR(optimizer, steps)
    peaks = [group["lr"] for group in optimizer.param_groups]
    return schedulers.OneCycleLR(optimizer, peaks, total_steps=steps + 1, cycle_momentum=False)


def criterion(outputs, targets, label_smoothing=0.0, class_weights=None):
    """Cross entropy of logits [batch, classes] and int64 labels; mean squared error where targets are floats."""
    if targets.is_floating_point():
        return F.mse_loss(outputs.float(), targets)
    return F.cross_entropy(outputs.float(), targets, weight=class_weights, label_smoothing=label_smoothing)


def size_at(epoch, epochs, image_size, grow):
    """The image size to train this epoch (from 1) at: `grow` times the full one for the first third, then upward.

    In multiples of 4 pixels, the last epoch always in full (progressive resizing: Howard 2018, Tan and Le 2021).
    """
    if epoch == epochs:
        return tuple(image_size)
    done = max(0.0, ((epoch - 1) / (epochs - 1) - 1 / 3) * 3 / 2)
    return tuple(min(n, max(4, int((grow + (1 - grow) * done) * n) // 4 * 4)) for n in image_size)


def train_epoch(deployable, batches, optimizer, schedule, args, size, autocast, class_weights):
    """One pass over `batches` of images and labels. -> (mean loss, accuracy or None), as measured while training."""
    network, loss_sum, correct, seen = model.train_mode(deployable.network), 0.0, 0, 0
    for images, targets in batches:
        if args.grow < 1:
            images = model.resize(images, size)
        with autocast():
            outputs = network(deployable.normalise(images))
        loss = criterion(outputs, targets, args.label_smoothing, class_weights)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        loss_sum += loss.detach() * len(targets)
        seen += len(targets)
        if not targets.is_floating_point():
            correct += (outputs.detach().argmax(1) == targets).sum()
    loss = loss_sum.item() / seen
    if not math.isfinite(loss):
        raise Problem(f"the loss became {loss}: try a smaller --lr than {args.lr:g}")
    return loss, None if targets.is_floating_point() else correct.item() / seen


@torch.inference_mode()
def evaluate(deployable, split, most=500):
    """The network in eval mode over a whole split. -> (mean loss without smoothing, accuracy, outputs).

    accuracy is None for regression; outputs are on the CPU: predicted labels [N], or predictions [N, 1].
    """
    network, loss_sum, outputs, right = deployable.network.eval(), 0.0, [], 0
    pixels = split.images[0, ..., 0].numel()
    for images, targets in split.in_order(min(max(1_000_000 // pixels, 1), most)):
        output = network(deployable.normalise(images))
        loss_sum += criterion(output, targets).item() * len(targets)
        if not targets.is_floating_point():
            output = output.argmax(1)
            right += (output == targets).sum().item()
        outputs.append(output.cpu())
    accuracy = None if split.labels.is_floating_point() else right / len(split)
    return loss_sum / len(split), accuracy, torch.cat(outputs)


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


def write_whole(path, content):
    """Write bytes to a file beside `path`, then swap it in: the file appears whole or not at all."""
    temporary = path + ".tmp"
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise Problem(f"cannot write {path}: {error.strerror or error}") from None


def write_json(path, values):
    write_whole(path, (json.dumps(values, indent=2) + "\n").encode())


def make_spec(args, dataset, deployable, test_accuracy):
    """What the exported file will know of itself; see the README for the keys."""
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
            "torchvision": importlib.metadata.version("torchvision"),  # importing it takes a second
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
    content = io.BytesIO()
    torch.save(checkpoint, content)  # not to the file: torch turns a full disk into an error of its own
    write_whole(os.path.join(run, "checkpoint.pt"), content.getbuffer())


def write_metrics(run, rows):
    names = list(rows[0])
    lines = [names, *([("" if row[name] is None else row[name]) for name in names] for row in rows)]
    text = "".join(",".join(map(str, line)) + "\n" for line in lines)
    write_whole(os.path.join(run, "metrics.csv"), text.encode())


def describe(args, dataset, deployable, splits, run, dtype):
    """Print the derived configuration, before work starts."""
    parameters = sum(p.numel() for p in deployable.network.parameters())
    trained = sum(p.numel() for p in deployable.network.parameters() if p.requires_grad)
    options = {name: getattr(args, name) for name in model.options_of(args.model)}
    options = "".join(f", {name} {value}" for name, value in options.items() if value is not None)
    sizes = ", ".join(f"{len(split):,} {name}" for name, split in splits.items())
    *size, channels = dataset.train_images.shape[1:]
    kind = f"{size[0]}x{size[1]} {'grey' if channels == 1 else 'colour'}" if size else f"{channels} features"
    kind = f"{len(dataset.classes)} classes, {kind}" if size else kind
    grow = f", growing from {args.grow:.0%} of the size" if args.grow < 1 else ""
    given = f", input {args.image_size[0]}x{args.image_size[1]}" if size else ""
    print(
        f"dataset   {args.dataset}: {sizes}; {kind}\n"
        f"network   {args.model}{options}: {parameters:,} parameters, {trained:,} trained{given}\n"
        f"training  {args.epochs} epochs of batch {args.batch_size}, {args.optimizer} lr {args.lr:g} "
        f"{args.schedule}, weight decay {args.weight_decay:g},\n"
        f"          label smoothing {args.label_smoothing:g}, augment {' '.join(args.augment) or 'none'}{grow}\n"
        f"machine   {splits['train'].labels.device}, {torch.get_num_threads()} threads, {'bf16' if dtype else 'fp32'}, "
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
            state, their_mean, their_std = model.pretrained(args.model, args.pretrained, channels)
            mean, std = their_mean or mean, their_std or std
            model.load_pretrained(network, state)
    except ValueError as error:
        code = 1 if isinstance(error, model.DownloadError) else 2
        file = args.pretrained not in (None, "default")
        raise Problem(f"--pretrained {args.pretrained}: {error}" if file else error, code) from None
    if args.batch_size == 1 and any(isinstance(m, torch.nn.modules.batchnorm._BatchNorm) for m in network.modules()):
        raise Problem(f"{args.model} has batch norm, which needs --batch-size 2 or more", 2)
    if args.freeze_backbone:
        model.freeze_backbone(network)
    if hasattr(network, "whiten") and not args.pretrained:
        some = torch.from_numpy(dataset.train_images[:: max(1, len(dataset.train_images) // 2000)])
        plain = model.Deployable(network, args.image_size, mean, std)
        network.whiten(plain.normalise(model.resize(some, args.image_size)))
    deployable = (model.Regressor if regression else model.Deployable)(network, args.image_size, mean, std)
    return deployable.to(device, memory_format=torch.channels_last)


def make_splits(args, dataset, device):
    """{"train", "val" with --val-fraction, "test"} of data.split.Split."""
    how = (args.image_size, device, model.resize)
    train = data.make_split(dataset.train_images, dataset.train_labels, *how)
    splits = {"train": train}
    if args.val_fraction:
        labels = dataset.train_labels if dataset.task == "classification" else 0 * dataset.train_labels[:, 0]
        held = data.stratified(labels, args.val_fraction, args.seed)
        splits = {"train": train.part(~held), "val": train.part(held)}
        if not len(splits["val"]) or not len(splits["train"]):
            raise Problem(f"--val-fraction {args.val_fraction:g} leaves a split empty: there are too few images", 2)
    return {**splits, "test": data.make_split(dataset.test_images, dataset.test_labels, *how)}


def balanced_weights(split, classes):
    """Weights [classes] of the loss under which every class counts the same: n / (classes * its share of n)."""
    counts = torch.bincount(split.labels.cpu()[split.members], minlength=classes).float()
    return len(split) / (classes * counts)


def print_row(epoch, measured, seconds):
    cells = ["-" if x is None else f"{x:{form}}" for x, form in zip(measured, (".4f", ".2%") * 2, strict=True)]
    print("{:5d}   {:>10}  {:>8}  {:>13}  {:>8}  {:8.1f}".format(epoch, *cells, seconds), flush=True)


def fit(args, dataset, deployable, splits, run, dtype):
    """The training loop. -> (the epoch whose network is the result, left in `deployable`; its `evaluate` on test).

    With a validation split the test split was not looked at yet, and the second is None.
    """
    split, device = splits["train"], splits["train"].labels.device
    optimizer = make_optimizer(deployable.network, args)
    schedule = make_schedule(optimizer, args, args.epochs * -(-len(split) // args.batch_size))
    generator = torch.Generator().manual_seed(args.seed)
    first_flips = torch.rand(len(split.images), generator=generator) < 0.5
    watched = "val" if "val" in splits else "test"  # the split that each epoch is measured on; test never selects
    columns = ["epoch", "train_loss", "train_accuracy", f"{watched}_loss", f"{watched}_accuracy", "lr", "seconds"]
    class_weights = balanced_weights(split, len(dataset.classes)).to(device) if args.class_weights else None

    def autocast():
        return torch.autocast(device.type, dtype) if dtype else contextlib.nullcontext()

    rows, best, written = [], None, 0.0
    print(f"epoch   train loss  accuracy  {watched:>8} loss  accuracy   seconds", flush=True)
    for epoch in range(1, args.epochs + 1):
        started, lr = time.perf_counter(), optimizer.param_groups[0]["lr"]
        batches = split.shuffled(args.batch_size, args.augment, epoch, generator, first_flips)
        steps = -(-len(split) // args.batch_size)
        bar = tqdm(batches, f"epoch {epoch}/{args.epochs}", steps, leave=False, disable=None)
        size = size_at(epoch, args.epochs, args.image_size, args.grow)
        measured = train_epoch(deployable, bar, optimizer, schedule, args, size, autocast, class_weights)
        with autocast() if epoch < args.epochs else contextlib.nullcontext():  # the result is measured in fp32
            result = evaluate(deployable, splits[watched])
        measured += result[:2]
        if not math.isfinite(measured[2]):
            raise Problem(f"the loss on the {watched} split became {measured[2]}: try a smaller --lr, or --grow 1")
        rows.append(dict(zip(columns, (epoch, *measured, lr, round(time.perf_counter() - started, 3)), strict=True)))
        if args.epochs <= 50 or epoch % (args.epochs // 20) == 0 or epoch == args.epochs:
            print_row(epoch, measured, rows[-1]["seconds"])
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
        result = None
    return best[1], result


def train(args):
    """The whole of step 1. Returns the exit code; raises Problem."""
    del args.list_models, args.list_datasets
    keep_freed_memory()
    dataset = load_dataset(args)
    derive(args, dataset)
    torch.manual_seed(args.seed)
    device, dtype = choose_device(args)
    deployable = make_deployable(args, dataset, device)
    splits = make_splits(args, dataset, device)
    run = claim_run(args)
    started = time.perf_counter()
    try:
        describe(args, dataset, deployable, splits, run, dtype)
        config = {**vars(args), "run": run, "device_used": str(device), "precision_used": "bf16" if dtype else "fp32"}
        write_json(os.path.join(run, "config.json"), config)
        epoch, result = fit(args, dataset, deployable, splits, run, dtype)
    except BaseException:
        if not os.path.exists(os.path.join(run, "checkpoint.pt")):
            shutil.rmtree(run, ignore_errors=True)  # it holds nothing, and its name is free again
        raise
    test_loss, test_accuracy, outputs = result or evaluate(deployable, splits["test"])
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
        print(textwrap.fill("and torchvision's: " + " ".join(model.torchvision_names()), 79))
    return 0


def keep_freed_memory():
    """Let glibc keep freed buffers instead of giving them back to the kernel, which then zeroes every page again.

    Activations and gradients are tens of megabytes each and come anew every step: half of a step went into page
    faults. Elsewhere than on Linux with glibc this does nothing.
    """
    m_trim_threshold, m_mmap_max = -1, -4  # malloc.h
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(m_mmap_max, 0)
        libc.mallopt(m_trim_threshold, 2**31 - 1)


def main(argv=None):
    args = build_parser().parse_args(argv)
    if args.list_models or args.list_datasets:
        return guarded(list_names, args, closed_pipe=0)
    return guarded(train, args)


if __name__ == "__main__":
    sys.exit(main())
