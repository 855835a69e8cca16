#!/usr/bin/env python3
"""Step 1 of 3: train a network on a dataset.

    python step1_train.py                                  # the bundled digits, a minute on a laptop
    python step1_train.py --dataset cifar10 --epochs 10
    python step1_train.py --dataset folder --data-dir photos --model mobilenet_v3_small --pretrained
    python step1_train.py --dataset linear                 # a regression, no images at all
    python step1_train.py --resume                         # go on where the last unfinished run was stopped
    torchrun --nproc-per-node=4 step1_train.py ...         # four processes, one GPU each where there are any

Writes runs/<name>/ and never over an earlier run:

    checkpoint.pt    the network and its spec, and all that --resume needs; torch.load(..., weights_only=True) reads it
    config.json      every argument, derived ones included, before the first step
    metrics.csv      a row for each epoch: loss and accuracy on both splits, learning rate, seconds
    summary.json     the result; report.html and the pictures in it show it

What is not said on the command line is derived from the dataset and the network, and printed before work starts.
Next: python step2_export.py
"""

import argparse
import contextlib
import copy
import ctypes
import glob
import importlib.metadata
import io
import itertools
import json
import math
import os
import platform
import re
import shlex
import shutil
import signal
import sys
import textwrap
import time
import warnings
import zlib
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone

import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

import data
import model
from data import Parser, Problem, guarded, say
from deploy import report

try:
    import fcntl
except ImportError:  # Windows, where two processes resuming one run are not kept apart
    fcntl = None

SCHEMA = 1
RUNS, EXPORTS, CHECKPOINT, PREVIOUS = "runs", "exports", "checkpoint.pt", "checkpoint.previous.pt"
MAY_CHANGE = (
    "epochs",
    "device",
    "data_dir",
    "cache_dir",
    "image_root",
    "checkpoint_every",
    "quiet",
)  # on --resume
OPTIMIZERS = ("sgd", "adam", "adamw", "muon")
BF16_MATMUL = any(
    (getattr(torch.cpu, "get_capabilities", dict)()).get(name) for name in ("amx_bf16", "avx512_bf16")
)
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
        "skip_easy": 0.0,
    },
    ("airbench", "mnist"): {
        "width": 0.25,
        "batch_size": 500,
        "label_smoothing": 0.1,
        "grow": 0.625,
        "skip_easy": 0.65,
    },
    ("airbench", "fashion-mnist"): {"width": 0.5},
    ("airbench", "kmnist"): {"width": 0.5},
    ("mlp", "digits"): {"epochs": 50},
    ("mynet", "digits"): {"epochs": 50, "batch_size": 32, "lr": 0.04},
    ("resblock", "digits"): {"epochs": 50, "batch_size": 64, "lr": 0.1},
    ("airbench",): {"optimizer": "muon", "batch_size": 250, "label_smoothing": 0.2, "skip_easy": 0.5},
    ("mlp",): {"optimizer": "adam", "batch_size": 32},
    ("mynet",): {"optimizer": "muon", "batch_size": 256, "lr": 0.14},
    ("resblock",): {"lr": 0.5, "batch_size": 512},
    ("linear",): {
        "epochs": 300,
        "batch_size": 100_000,
        "lr": 0.1,
        "weight_decay": 0.0,
        "schedule": "constant",
    },
    ("torchvision",): {"batch_size": 64},
    ("pretrained",): {"batch_size": 64, "lr": 0.01},
    "sgd": {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-4, "schedule": "onecycle"},
    "adam": {"lr": 1e-3, "weight_decay": 0.0, "schedule": "cosine"},
    "adamw": {"lr": 1e-3, "weight_decay": 0.01, "schedule": "cosine"},
    "muon": {
        "lr": 0.12,
        "momentum": 0.6,
        "weight_decay": 0.004,
        "schedule": "linear",
    },  # after airbench94_muon
    (): {
        "epochs": 10,
        "batch_size": 128,
        "optimizer": "sgd",
        "label_smoothing": 0.0,
        "grow": 1.0,
        "skip_easy": 0.0,
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
        if (
            value is None
            or not (low < value <= high or (value == low and not above))
            or value == float("inf")
        ):
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
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a size such as 32 or 48x64 (height x width, 1 to 4096)"
        )
    return size


def checkpoint_interval(text):
    """'500' -> 500 steps; '10m' -> '10m', minutes."""
    if not re.fullmatch(r"[1-9]\d{0,8}|\d{1,6}(\.\d+)?m", text):
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither a number of steps such as 500 nor of minutes such as 10m"
        )
    return text if text.endswith("m") else int(text)


def build_parser():
    parser = Parser(
        description="Train a network on a dataset; writes runs/<name>/.",
        epilog="example: python step1_train.py --dataset mnist --epochs 2",
    )
    count, positive = number(int, 1), number(float, 0, above=True)
    add = parser.add_argument_group("data").add_argument
    add("--dataset", default="digits", metavar="NAME", help="a name that --list-datasets shows")
    add(
        "--data-dir",
        metavar="PATH",
        help="where the files lie or are downloaded to (default: data/); csv: the file",
    )
    add(
        "--image-size",
        type=image_size,
        metavar="N|HxW",
        help="what the network sees (default: see the README)",
    )
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
    add(
        "--model",
        metavar="NAME",
        help="a name that --list-models shows (default: airbench; linear for linear)",
    )
    add("--width", type=positive, metavar="X", help="multiplies the channels of airbench")
    add("--hidden", type=count, nargs="*", metavar="N", help="sizes of mlp's hidden layers (default: 128)")
    add(
        "--dropout",
        type=number(float, 0, 0.99),
        metavar="P",
        help="dropout of mlp (default: 0) and mynet (0.1)",
    )
    add(
        "--pretrained",
        nargs="?",
        const="default",
        metavar="FILE",
        help="start from torchvision's default weights, or from a local state_dict or checkpoint",
    )
    add("--freeze-backbone", action="store_true", help="train the last layer only, for small data")
    add("--list-models", action="store_true", help="show the networks and exit")
    add = parser.add_argument_group(
        "training (defaults: a recipe for the network and the dataset)"
    ).add_argument
    add("--epochs", type=count, metavar="N", help="passes over the training split")
    add("--batch-size", type=count, metavar="N", help="images a step")
    add("--optimizer", choices=OPTIMIZERS, metavar="NAME", help=", ".join(OPTIMIZERS))
    add("--lr", type=positive, metavar="X", help="the highest learning rate")
    add(
        "--momentum",
        type=number(float, 0, 0.9999),
        metavar="X",
        help="of sgd and muon; Nesterov's where above 0",
    )
    add("--weight-decay", type=number(float, 0), metavar="X", help="on weights, not on biases and norms")
    add("--schedule", choices=SCHEDULES, metavar="NAME", help=f"of the learning rate: {', '.join(SCHEDULES)}")
    add(
        "--grow",
        type=number(float, 0.1, 1),
        metavar="X",
        help="start at this part of the image size, end at all of it",
    )
    add(
        "--skip-easy",
        type=number(float, 0, 0.9),
        metavar="X",
        help="leave out this part of the images, easy ones, in every epoch but the first and the last",
    )
    add("--label-smoothing", type=number(float, 0, 0.99), metavar="X", help="in the training loss")
    add = parser.add_argument_group("machine and run").add_argument
    add(
        "--precision",
        choices=("auto", "fp32", "bf16"),
        default="auto",
        help="the exported network is always fp32",
    )
    add(
        "--device",
        default="auto",
        metavar="NAME",
        help="cpu, cuda, cuda:1, ...; auto: a GPU where there is one",
    )
    add(
        "--seed",
        type=number(int, 0, 2**31),
        default=0,
        metavar="N",
        help="on the CPU a seed repeats bit for bit",
    )
    add(
        "--sync-batchnorm",
        action="store_true",
        help="torchrun on GPUs: batch norm over all processes' images",
    )
    add("--name", help="of the run (default: <dataset>-<model>, with -2, -3, ... where taken)")
    add(
        "--resume",
        nargs="?",
        const="",
        metavar="RUN",
        help="go on with a run (default: the newest unfinished one), to the very same end; --epochs may be raised",
    )
    add(
        "--checkpoint-every",
        type=checkpoint_interval,
        metavar="N|Nm",
        help="also within an epoch: every N steps, or every N minutes",
    )
    add("--quiet", action="store_true", help="print the result only")
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
    smallest = min(size_at(1, args.epochs, args.image_size, args.grow))
    if args.grow < 1 and args.model == "airbench" and smallest < 12:  # three poolings
        raise Problem(
            f"--grow {args.grow:g} starts at {smallest} pixels, and airbench needs 12: give a larger --grow",
            2,
        )
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
    if name == "cuda" and "LOCAL_RANK" in os.environ:  # torchrun: a GPU for each process of this machine
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).split("\n")[0].rstrip(".")
        raise Problem(
            f"--device {args.device} cannot be used here ({reason}); --device cpu always works", 2
        ) from None
    bf16 = args.precision == "bf16"
    if args.precision == "auto" and args.model not in ("linear", "mlp", "resblock"):  # too small to gain
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
        super().__init__(
            [{**group, **special} if group.get("orthogonal") else {**plain, **group} for group in groups]
        )

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"] if group["orthogonal"] else ():
                if p.grad is None:
                    continue
                state = self.state[p]
                if "past" not in state:
                    state["past"] = torch.zeros_like(p.grad)
                past = state["past"].mul_(group["memory"]).add_(p.grad)
                update = p.grad.add_(past, alpha=group["memory"])  # Nesterov's
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
        polynomial = torch.addmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        wide = torch.addmm(wide, polynomial, wide, beta=3.4445)
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
        # Biases may go faster: from 0.2 to 5 times the filters' rate was worth half a point on CIFAR-10.
        groups = [{"params": inner, "lr": args.lr, "orthogonal": True}]
        groups += [{"params": outer, "lr": args.lr}, {"params": vectors, "lr": 4 * args.lr}]
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
    """The cross entropy [batch] of logits [batch, classes] and int64 labels [batch].

    Where targets are floats [batch, n]: the squared error, averaged over n.
    """
    if targets.is_floating_point():
        return F.mse_loss(outputs.float(), targets, reduction="none").mean(1)
    options = {"weight": class_weights, "label_smoothing": label_smoothing, "reduction": "none"}
    return F.cross_entropy(outputs.float(), targets, **options)


def size_at(epoch, epochs, image_size, grow):
    """The image size to train this epoch (from 1) at: `grow` times the full one for the first third, then upward.

    In multiples of 4 pixels, the last epoch always in full (progressive resizing: Howard 2018, Tan and Le 2021).
    """
    if epoch == epochs:
        return tuple(image_size)
    done = max(0.0, ((epoch - 1) / (epochs - 1) - 1 / 3) * 3 / 2)
    return tuple(min(n, max(4, int((grow + (1 - grow) * done) * n) // 4 * 4)) for n in image_size)


@dataclass
class Training:
    """A run under way: what works on it, and how far it has come.

    progress: the `epoch` under way (from 1), its `batches` done, the `sums` over them (loss, right answers, images),
    the `lr` it began with, `seconds` spent in it, `elapsed` before it, the metrics' `rows`, for --skip-easy the images'
    `losses` before it and `new_losses` in it, and with a validation split the `best` epoch, its score and state. Random
    numbers need no saving: each step seeds its own.
    """

    args: argparse.Namespace
    run: str
    dataset: data.Dataset
    deployable: torch.nn.Module
    splits: dict
    dtype: torch.dtype | None
    process: int = 0
    processes: int = 1
    progress: dict = field(
        default_factory=lambda: {
            **{"epoch": 1, "batches": 0, "sums": [0.0, 0.0, 0.0], "lr": None, "seconds": 0.0, "elapsed": 0.0},
            **{"rows": [], "best": None, "losses": None, "new_losses": None},
        }
    )

    def __post_init__(self):
        self.device = self.splits["train"].labels.device
        self.network = self.deployable.network
        if self.args.sync_batchnorm:
            self.network = torch.nn.SyncBatchNorm.convert_sync_batchnorm(self.network)
        self.optimizer = make_optimizer(self.network, self.args)
        self.schedule = make_schedule(self.optimizer, self.args, self.steps_before(self.args.epochs + 1))
        if self.processes > 1 and any(p.requires_grad for p in self.network.parameters()):
            devices = [self.device] if self.device.type == "cuda" else None
            self.network = torch.nn.parallel.DistributedDataParallel(self.network, device_ids=devices)
        weights = (
            balanced_weights(self.splits["train"], len(self.dataset.classes))
            if self.args.class_weights
            else None
        )
        self.class_weights = weights if weights is None else weights.to(self.device)
        self.saved = time.monotonic()

    def skip_in(self, epoch):
        """The part of the images left out: none in the first epoch, which finds the easy ones, nor in the last."""
        return self.args.skip_easy if 1 < epoch < self.args.epochs else 0.0

    def steps_in(self, epoch):
        return self.splits["train"].count_batches(self.args.batch_size, self.processes, self.skip_in(epoch))

    def steps_before(self, epoch):
        return sum(map(self.steps_in, range(1, epoch)))

    def steps_done(self):
        """The optimizer's steps so far, as many as a course of args.epochs has at this point."""
        epoch, batches = self.progress["epoch"], self.progress["batches"]
        return self.steps_before(epoch) + min(batches, self.steps_in(epoch))

    def images_of(self, epoch):
        """-> (the split to train on in this epoch, float32 [N]: how many images each row stands for)."""
        split, skip = self.splits["train"], self.skip_in(epoch)
        if not skip:
            return split, torch.ones(len(split.labels))
        return split.without_easy(self.progress["losses"], skip, epoch, self.args.seed)

    def autocast(self):
        return torch.autocast(self.device.type, self.dtype) if self.dtype else contextlib.nullcontext()

    def over_all(self, tensor, how=dist.ReduceOp.SUM):
        """The sum, or what `how` says, of a tensor over all processes."""
        if self.processes > 1:
            dist.all_reduce(tensor, how)
        return tensor

    def state(self):
        """What a checkpoint holds so that `restore` can go on from it."""
        labels = self.dataset.train_labels
        return {
            **self.progress,
            "network": self.deployable.network.state_dict()
            if self.progress["best"]
            else None,  # else: state_dict
            "optimizer": self.optimizer.state_dict(),
            "data": [len(labels), zlib.crc32(labels.tobytes())],
        }

    def restore(self, state):
        """Go on from a checkpoint's `training`. Raises Problem where the dataset is another one."""
        labels = self.dataset.train_labels
        if state["data"] != [len(labels), zlib.crc32(labels.tobytes())]:
            raise Problem(
                f"the training split is not the one that {self.run} began with "
                f"({state['data'][0]:,} images then, {len(labels):,} now): start a new run"
            )
        self.progress = {key: state.get(key, value) for key, value in self.progress.items()}
        if self.process:
            self.progress["sums"] = [0.0, 0.0, 0.0]  # process 0 holds everybody's
            self.progress["new_losses"] = None
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
            for _ in range(self.steps_done()):
                self.schedule.step()  # the same additions and products as when it was trained
        rates = [group["lr"] for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state["optimizer"])
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate

    def save(self, test_accuracy=None):
        """Write the checkpoint, once for all processes. Raises Problem."""
        if self.process == 0:
            best, state = self.progress["best"], self.deployable.network.state_dict()
            if not all(value.isfinite().all() for value in state.values()):
                raise Problem(f"the weights are no longer finite: try a smaller --lr than {self.args.lr:g}")
            spec = make_spec(self.args, self.dataset, self.deployable, test_accuracy)
            epoch = best["epoch"] if best else self.progress["epoch"] - 1
            save_checkpoint(self.run, spec, best["state_dict"] if best else state, epoch, self.state())
            if self.progress["rows"]:
                write_metrics(self.run, self.progress["rows"])
        self.saved = time.monotonic()

    def agree(self, *numbers):
        """Each number's greatest over all processes, so that all of them stop or save at the same step."""
        if self.processes == 1:
            return numbers
        return self.over_all(torch.tensor(numbers, device=self.device), dist.ReduceOp.MAX).tolist()

    def is_due(self):
        """Is it time for a checkpoint within the epoch?"""
        every = self.args.checkpoint_every
        if isinstance(every, int):
            return self.steps_done() % every == 0
        return bool(every) and time.monotonic() - self.saved >= 60 * float(every[:-1])


class Stopped(Exception):
    """A signal came, and all was saved."""

    def __init__(self, number):
        self.number = number


class Signals:
    """SIGINT and SIGTERM, noted in `caught`, so that the step under way is finished. A second SIGINT stops at once."""

    def __enter__(self):
        self.caught = 0
        self.before = {number: signal.signal(number, self.note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def note(self, number, frame):
        self.caught = number
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def __exit__(self, *error):
        for number, handler in self.before.items():
            signal.signal(number, handler)


def train_epoch(training, bar, signals, counts):
    """The rest of one epoch. -> (mean loss, accuracy or None), as measured while training.

    counts: float32 [N], how many images each row of the training split stands for in these figures. In the gradient it
    weighs the root of that: all of it makes much noise, and none lets a few wrong labels rule.

    Raises Stopped after a signal, the checkpoint written, and Problem when the loss is no longer finite.
    """
    args, deployable, progress, optimizer = (
        training.args,
        training.deployable,
        training.progress,
        training.optimizer,
    )
    network, device, class_weights = training.network, training.device, training.class_weights
    size = size_at(progress["epoch"], args.epochs, args.image_size, args.grow)
    sums = torch.tensor(
        progress["sums"], dtype=torch.float32 if device.type == "mps" else torch.float64, device=device
    )
    look_every = 1 if device.type == "cpu" else 50  # looking at a number on a GPU makes it wait
    labels, share = training.splits["train"].labels, slice(training.process, None, training.processes)
    regression, counts = labels.is_floating_point(), counts.to(device)
    weights = counts.sqrt()
    masses = weights if class_weights is None else weights * class_weights[labels]
    if progress["new_losses"] is None:
        progress["new_losses"] = torch.zeros(len(labels))
    new_losses = progress["new_losses"].to(device)
    # For dropout. torch.manual_seed asks for every device there might be, a hundred times the time.
    generator = torch.default_generator if device.type == "cpu" else torch.get_device_module(device)
    model.train_mode(deployable.network)
    started = time.perf_counter() - progress["seconds"]
    for images, targets, batch in bar:
        generator.manual_seed(
            data.seed_of(args.seed, progress["epoch"], progress["batches"], training.process)
        )
        if args.grow < 1:
            images = model.resize(images, size)
        with training.autocast():
            outputs = network(deployable.normalise(images))
        losses, mine = criterion(outputs, targets, args.label_smoothing, class_weights), batch[share]
        optimizer.zero_grad(set_to_none=True)
        # The mean is over the whole batch; DistributedDataParallel averages the gradients of the processes' shares.
        ((losses * weights[mine]).sum() * (training.processes / masses[batch].sum())).backward()
        optimizer.step()
        new_losses[mine] = losses = losses.detach()
        right = torch.zeros_like(losses) if regression else outputs.detach().argmax(1) == targets
        sums += torch.stack([(counts[mine] * x).sum() for x in (losses, right, torch.ones_like(losses))])
        progress["batches"] += 1
        if progress["batches"] % look_every == 0 or progress["batches"] == bar.total:
            look(training, signals, sums, new_losses, started)
        training.schedule.step()
    progress["new_losses"] = training.over_all(new_losses).cpu()
    loss, right, seen = training.over_all(sums).tolist()
    progress["seconds"] = time.perf_counter() - started
    return loss / seen, None if regression else right / seen


def look(training, signals, sums, new_losses, started):
    """Between two steps: is the loss finite, did a signal come, is a checkpoint due?"""
    progress, rate = training.progress, training.optimizer.param_groups[0]["lr"]
    if not sums[0].isfinite():
        raise Problem(
            f"the loss became {sums[0].item()} in epoch {progress['epoch']}, step {progress['batches']}, "
            f"at learning rate {rate:.3g}: try a smaller --lr than {training.args.lr:g}, or another --optimizer"
        )
    caught, due = training.agree(signals.caught, training.is_due())
    if caught or due:
        progress["sums"] = training.over_all(sums.clone()).tolist()
        progress["new_losses"] = training.over_all(new_losses.clone()).cpu()
        progress["seconds"] = time.perf_counter() - started
        training.save()
    if caught:
        raise Stopped(caught)


@torch.inference_mode()
def evaluate(training, split, deployable=None, most=125):
    """The network in eval mode over a whole split. -> (mean loss without smoothing, accuracy, outputs).

    accuracy is None for regression; outputs are numpy's: probabilities [N, classes], or predictions [N, 1]. Each
    process takes its share of the images, and all get the whole result.
    """
    deployable = deployable or training.deployable
    network, share = deployable.network.eval(), slice(training.process, None, training.processes)
    labels, loss, parts = split.labels[split.members], 0.0, []
    outputs = torch.zeros(len(labels), len(training.dataset.classes), device=labels.device)
    pixels = split.images[0, ..., 0].numel()
    for images, targets in split.in_order(min(max(1_000_000 // pixels, 1), most), share):
        output = network(deployable.normalise(images)).float()
        loss += criterion(output, targets).sum().item()
        parts.append(output if targets.is_floating_point() else output.softmax(1))
    if parts:
        outputs[share] = torch.cat(parts)
    outputs = training.over_all(outputs)  # zeros where others answer
    loss = training.over_all(torch.tensor(loss, device=training.device)).item()
    right = None if labels.is_floating_point() else outputs.argmax(1) == labels
    return (
        loss / len(split),
        None if right is None else right.sum().item() / len(split),
        outputs.cpu().numpy(),
    )


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
                raise Problem(
                    f"{run} exists and a run never overwrites another; choose another --name", 2
                ) from None
        except OSError as error:
            raise Problem(f"cannot make {run}: {error.strerror}") from None


def resume_command(run):
    script = sys.argv[0] if os.path.basename(sys.argv[0]).startswith("step1") else "step1_train.py"
    return f"python {shlex.quote(script)} --resume {shlex.quote(os.path.relpath(run, RUNS))}"


@contextlib.contextmanager
def locked(run):
    """The run directory, for this process alone. Raises Problem when another one trains there."""
    if not fcntl:
        yield
        return
    handle = os.open(run, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Problem(f"{run} is being trained by another process") from None
        yield
    finally:
        os.close(handle)


def find_run(name):
    """The directory of a run to resume; name: its name or path, or "" for the newest unfinished one. Raises Problem."""
    if name:
        run = next((path for path in (os.path.join(RUNS, name), name) if os.path.isdir(path)), None)
    else:
        begun = [os.path.dirname(path) for path in glob.glob(os.path.join(RUNS, "*", "config.json"))]
        unfinished = [path for path in begun if not os.path.exists(os.path.join(path, "summary.json"))]
        run = max(unfinished, key=os.path.getmtime, default=None)
    if run is None:
        raise Problem(f"no {f'run {name!r}' if name else 'unfinished run'} under {RUNS}/ to resume", 2)
    return os.path.normpath(run)


def read_checkpoint(run):
    """-> (the run's arguments, its newest whole checkpoint, or None where it was stopped before the first)."""
    reasons = []
    for path in (os.path.join(run, CHECKPOINT), os.path.join(run, PREVIOUS)):
        try:
            checkpoint = model.load_plain(path)
            if checkpoint["schema"] > SCHEMA:
                raise Problem(f"{path} has schema {checkpoint['schema']}, this script knows up to {SCHEMA}")
            arguments, progress = checkpoint["arguments"], checkpoint["training"]
            progress["epoch"], progress["batches"], progress["optimizer"]
        except FileNotFoundError:
            continue
        except Problem:
            raise
        except Exception as error:  # torch.load fails in a dozen ways on a truncated file
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            reasons.append(f"{path} is truncated or cannot be resumed from ({reason})")
            continue
        if reasons:
            say(f"note: {reasons[0]}: going on from the one before")
        return arguments, checkpoint
    if reasons:
        raise Problem(reasons[0])
    try:
        with open(os.path.join(run, "config.json")) as file:
            arguments = json.load(file)
        return {**arguments, "image_size": tuple(arguments["image_size"])}, None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Problem(
            f"{run} holds neither a checkpoint nor a config.json ({error}): start it again"
        ) from None


def resumed_arguments(args, given, arguments, run):
    """The run's own arguments, with those of `given` that may change. Raises Problem on those that may not."""
    theirs = argparse.Namespace(**{name: arguments.get(name, value) for name, value in vars(args).items()})
    given = {name: [] if value == ["none"] else value for name, value in given.items() if name != "resume"}
    changed = [
        name for name, value in given.items() if value != getattr(theirs, name) and name not in MAY_CHANGE
    ]
    if changed:
        names = ", ".join(
            f"--{name.replace('_', '-')} {given[name]} (was {getattr(theirs, name)})" for name in changed
        )
        raise Problem(
            f"{run} cannot go on with {names}: that would alter its course; leave it out, or start anew", 2
        )
    if given.get("epochs", theirs.epochs) < theirs.epochs:
        raise Problem(f"{run} was begun for {theirs.epochs} epochs, and --epochs can only be raised", 2)
    if os.path.exists(os.path.join(run, "summary.json")) and given.get("epochs", 0) <= theirs.epochs:
        raise Problem(f"{run} is finished; --epochs above {theirs.epochs} trains it further", 2)
    for name, value in given.items():
        setattr(theirs, name, value)
    return theirs


class CannotWrite(Problem):
    """A full disk, or a directory that is gone or read-only: once mended, the run can go on."""


def write_whole(path, content, previous=None):
    """Write bytes to a file beside `path`, then swap it in: the file appears whole or not at all. Raises Problem.

    previous: where to keep the file that was there before; it is let go only once the new one is safely on the disk.
    """
    temporary = path + ".tmp"
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if previous and os.path.exists(path):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(previous)
            try:
                os.link(path, previous)  # so that at no moment there is no file at `path`
            except OSError:  # a file system without links
                os.replace(path, previous)
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise CannotWrite(f"cannot write {path}: {error.strerror or error}") from None


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


def save_checkpoint(run, spec, state_dict, epoch, training):
    checkpoint = {
        "schema": SCHEMA,
        "spec": spec,
        "state_dict": state_dict,
        "arguments": spec["arguments"],
        "epoch": epoch,
        "training": training,
    }
    content = io.BytesIO()
    torch.save(checkpoint, content)  # not to the file: torch turns a full disk into an error of its own
    write_whole(os.path.join(run, CHECKPOINT), content.getbuffer(), previous=os.path.join(run, PREVIOUS))


def write_metrics(run, rows):
    names = list(rows[0])
    lines = [names, *([("" if row[name] is None else row[name]) for name in names] for row in rows)]
    text = "".join(",".join(map(str, line)) + "\n" for line in lines)
    write_whole(os.path.join(run, "metrics.csv"), text.encode())


def describe(args, dataset, deployable, splits, run, dtype, processes):
    """Print the derived configuration, before work starts."""
    parameters = sum(p.numel() for p in deployable.network.parameters())
    trained = sum(p.numel() for p in deployable.network.parameters() if p.requires_grad)
    options = {name: getattr(args, name) for name in model.options_of(args.model)}
    options = "".join(f", {name} {value}" for name, value in options.items() if value is not None)
    sizes = ", ".join(f"{len(split):,} {name}" for name, split in splits.items())
    *size, channels = dataset.train_images.shape[1:]
    kind = f"{size[0]}x{size[1]} {'grey' if channels == 1 else 'colour'}" if size else f"{channels} features"
    kind = f"{len(dataset.classes)} classes, {kind}" if size else kind
    savings = [f"growing from {args.grow:.0%} of the size"] if args.grow < 1 else []
    savings += [f"leaving out {args.skip_easy:.0%} of the images, easy ones"] if args.skip_easy else []
    savings = ",\n          " + ", ".join(savings) if savings else ""
    given = f", input {args.image_size[0]}x{args.image_size[1]}" if size else ""
    each = f"{processes} processes of " if processes > 1 else ""
    print(
        f"dataset   {args.dataset}: {sizes}; {kind}\n"
        f"network   {args.model}{options}: {parameters:,} parameters, {trained:,} trained{given}\n"
        f"training  {args.epochs} epochs of batch {args.batch_size}, {args.optimizer} lr {args.lr:g} "
        f"{args.schedule}, weight decay {args.weight_decay:g},\n"
        f"          label smoothing {args.label_smoothing:g}, augment {' '.join(args.augment) or 'none'}{savings}\n"
        f"machine   {splits['train'].labels.device.type}, {each}{torch.get_num_threads()} threads, "
        f"{'bf16' if dtype else 'fp32'}, "
        f"seed {args.seed}\n"
        f"run       {run}",
        flush=True,
    )


# ------------------------------------------------------------------------------------------------------------ run


def load_dataset(args):
    """Load the dataset. Raises Problem."""
    try:
        usual_size = model.usual_size(args.model)
    except ValueError as error:
        raise Problem(error, 2) from None
    names = (
        "image_size",
        "strict",
        "cache_dir",
        "image_root",
        "test_csv",
        "image_column",
        "label_column",
        "seed",
    )
    options = {name: getattr(args, name) for name in names}
    return data.load(args.dataset, args.data_dir, usual_size=usual_size, resize=model.resize, **options)


def make_deployable(args, dataset, device, checkpoint=None):
    """The network to train, with its preprocessing, on the device; on resuming, the checkpoint's. Raises Problem."""
    regression = dataset.task == "regression"
    channels = dataset.train_images.shape[-1]
    options = {
        name: getattr(args, name)
        for name in ("width", "hidden", "dropout")
        if getattr(args, name) is not None
    }
    shape = {"channels": channels, "classes": len(dataset.classes), "image_size": args.image_size}
    mean, std = (
        ([0.0] * channels, [1.0] * channels) if regression else data.mean_and_std(dataset.train_images)
    )
    try:
        network = model.build(args.model, **shape, **options)
        if checkpoint:
            network.load_state_dict(checkpoint["training"]["network"] or checkpoint["state_dict"])
            mean, std = checkpoint["spec"]["mean"], checkpoint["spec"]["std"]
        elif args.pretrained:
            state, their_mean, their_std = model.pretrained(args.model, args.pretrained, channels)
            mean, std = their_mean or mean, their_std or std
            model.load_pretrained(network, state)
    except ValueError as error:
        code = 1 if isinstance(error, model.DownloadError) else 2
        file = args.pretrained not in (None, "default")
        raise Problem(f"--pretrained {args.pretrained}: {error}" if file else error, code) from None
    if args.batch_size == 1 and any(
        isinstance(m, torch.nn.modules.batchnorm._BatchNorm) for m in network.modules()
    ):
        raise Problem(f"{args.model} has batch norm, which needs --batch-size 2 or more", 2)
    if args.freeze_backbone:
        model.freeze_backbone(network)
    if hasattr(network, "whiten") and not args.pretrained and not checkpoint:
        some = torch.from_numpy(dataset.train_images[:: max(1, len(dataset.train_images) // 2000)])
        plain = model.Deployable(network, args.image_size, mean, std)
        network.whiten(plain.normalise(model.resize(some, args.image_size)))
    deployable = (model.Regressor if regression else model.Deployable)(network, args.image_size, mean, std)
    return deployable.to(device, memory_format=getattr(network, "memory_format", torch.channels_last))


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
            raise Problem(
                f"--val-fraction {args.val_fraction:g} leaves a split empty: there are too few images", 2
            )
    return {**splits, "test": data.make_split(dataset.test_images, dataset.test_labels, *how)}


def balanced_weights(split, classes):
    """Weights [classes] of the loss under which every class counts the same: n / (classes * its share of n)."""
    counts = torch.bincount(split.labels.cpu()[split.members], minlength=classes).float()
    return len(split) / (classes * counts)


def print_row(epoch, measured, seconds):
    cells = [
        "-" if x is None else f"{x:{form}}" for x, form in zip(measured, (".4f", ".2%") * 2, strict=True)
    ]
    print("{:5d}   {:>10}  {:>8}  {:>13}  {:>8}  {:8.1f}".format(epoch, *cells, seconds), flush=True)


def fit(training):
    """The training loop, from wherever `training` is. -> the last epoch's `evaluate` on the test split.

    None with a validation split, as the test split was not looked at yet. Raises Problem and Stopped.
    """
    args, progress = training.args, training.progress
    hidden = args.quiet or training.process > 0
    watched = (
        "val" if "val" in training.splits else "test"
    )  # what each epoch is measured on; test never selects
    columns = [
        "epoch",
        "train_loss",
        "train_accuracy",
        f"{watched}_loss",
        f"{watched}_accuracy",
        "lr",
        "seconds",
    ]
    result = None
    if not hidden:
        print(f"epoch   train loss  accuracy  {watched:>8} loss  accuracy   seconds", flush=True)
    with Signals() as signals:
        for epoch in range(progress["epoch"], args.epochs + 1):
            done, started = progress["batches"], time.perf_counter() - progress["seconds"]
            progress["lr"] = progress["lr"] if done else training.optimizer.param_groups[0]["lr"]
            who = training.process, training.processes
            split, counts = training.images_of(epoch)
            give_back_memory()
            batches = split.shuffled(args.batch_size, args.augment, epoch, args.seed, done, *who)
            title, disable = f"epoch {epoch}/{args.epochs}", True if hidden else None
            bar = tqdm(batches, title, training.steps_in(epoch), initial=done, leave=False, disable=disable)
            measured = train_epoch(training, bar, signals, counts)
            last = epoch == args.epochs  # the result is measured in fp32
            with contextlib.nullcontext() if last else training.autocast():
                result = evaluate(training, training.splits[watched])
            measured += result[:2]
            if not math.isfinite(measured[2]):
                raise Problem(
                    f"the loss on the {watched} split became {measured[2]}: try a smaller --lr, or --grow 1"
                )
            seconds = time.perf_counter() - started
            row = dict(zip(columns, (epoch, *measured, progress["lr"], round(seconds, 3)), strict=True))
            finish_epoch(training, row, watched)
            if not hidden and (args.epochs <= 50 or epoch % (args.epochs // 20) == 0 or last):
                print_row(epoch, measured, seconds)
            (caught,) = training.agree(signals.caught)
            if caught and not last:
                raise Stopped(caught)
    return result if watched == "test" else None


def finish_epoch(training, row, watched):
    """Note an epoch's row, keep the network if it did best on the validation split, and write the checkpoint."""
    progress, best = training.progress, training.progress["best"]
    score = [row[f"{watched}_accuracy"] or 0.0, -row[f"{watched}_loss"]]
    if watched == "val" and (best is None or score > best["score"]):
        state = copy.deepcopy(training.deployable.network.state_dict())
        progress["best"] = {"score": score, "epoch": row["epoch"], "state_dict": state}
    progress["rows"].append(row)
    if training.args.skip_easy:
        new, old = progress["new_losses"], progress["losses"]
        progress["losses"] = torch.where(new > 0, new, torch.full_like(new, math.inf) if old is None else old)
    elapsed = progress["elapsed"] + row["seconds"]
    progress.update(epoch=row["epoch"] + 1, batches=0, sums=[0.0, 0.0, 0.0], seconds=0.0, elapsed=elapsed)
    progress["new_losses"] = None
    training.save(row.get("test_accuracy"))


def finish(training, result):
    """Measure the network that is the result, and write the final checkpoint and summary.json."""
    args, dataset, best = training.args, training.dataset, training.progress["best"]
    deployable = training.deployable
    if best:
        deployable = copy.deepcopy(deployable)
        deployable.network.load_state_dict(best["state_dict"])
    loss, accuracy, outputs = result or evaluate(training, training.splits["test"], deployable)
    if training.process:
        return
    if best:
        print(f"epoch {best['epoch']} did best on the validation split and is kept")
        training.save(accuracy)
    summary = {
        "dataset": args.dataset,
        "model": args.model,
        "epochs": args.epochs,
        "test_accuracy": accuracy,
        "test_loss": loss,
        "train_seconds": round(training.progress["elapsed"], 3),
        "parameters": sum(p.numel() for p in deployable.network.parameters()),
        "seed": args.seed,
        "epoch_kept": best["epoch"] if best else args.epochs,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    if dataset.task == "classification":
        summary["per_class"] = report.per_class(dataset.test_labels, outputs.argmax(1), dataset.classes)
    write_json(os.path.join(training.run, "summary.json"), summary)
    show(training, deployable, accuracy, outputs)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(os.path.join(training.run, PREVIOUS))
    if args.dataset == "linear" and args.model == "linear":
        print_coefficients(deployable.network)
    result = f"test loss {loss:.4g}" if accuracy is None else f"test accuracy {accuracy:.2%}"
    print(f"{training.run}: {result} in {summary['train_seconds']:.0f} s")


def show(training, deployable, accuracy, outputs):
    """Draw the finished run's pictures and write its report.html; outputs: `evaluate`'s, of the test split."""
    args, dataset, more = training.args, training.dataset, {}
    spec = make_spec(args, dataset, deployable, accuracy)
    give_back_memory()
    if dataset.task == "classification":
        images, labels, _ = next(training.splits["train"].shuffled(25, args.augment, 1, args.seed))
        more = {"images": dataset.test_images, "augmented": images.cpu().numpy()}
        more["augmented_labels"] = labels.cpu().numpy()
    try:
        try:
            report.draw_run(
                training.run, spec, training.progress["rows"], dataset.test_labels, outputs, **more
            )
        except ImportError as error:
            say(f"note: no pictures without matplotlib ({error}); pip install matplotlib")
        report.write_report(training.run, RUNS, EXPORTS)
    except OSError as error:
        say(f"note: the run is complete, but its report cannot be written: {error.strerror or error}")


def train(args, given):
    """The whole of step 1, in this process or in all of torchrun's. Returns the exit code; raises Problem.

    given: the arguments that were on the command line.
    """
    process, processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    keep_freed_memory()
    with contextlib.ExitStack() as stack:
        if process:
            stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
        try:
            if processes > 1:
                stack.enter_context(joined_processes())
            return train_together(args, given, process, processes, stack)
        except Problem as problem:
            if process and problem.code == 2:
                return 2  # process 0 says the same
            raise Problem(f"process {process}: {problem}", problem.code) if process else problem from None
        except RuntimeError as error:
            if processes == 1 or "memory" in str(error):
                raise
            raise Problem(f"process {process} lost the others: {str(error).splitlines()[0]}") from None


@contextlib.contextmanager
def joined_processes():
    """This process as one of torchrun's: nccl between GPUs, gloo between CPUs."""
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(
        backend, timeout=timedelta(hours=6)
    )  # the others wait while one decodes the images
    try:
        yield
    finally:
        dist.destroy_process_group()


def from_first(work, process, processes):
    """What work() returns in process 0, in all processes: only the first machine needs runs/."""
    results = [work() if process == 0 else None]
    if processes > 1:
        dist.broadcast_object_list(results, 0)
    return results[0]


def train_together(args, given, process, processes, stack):
    """`train` once all processes have found each other; stack: what is undone at the end."""
    run = checkpoint = None
    if args.resume is not None:
        run = from_first(lambda: find_run(args.resume), process, processes)
        if process == 0:
            stack.enter_context(locked(run))
        arguments, checkpoint = from_first(lambda: read_checkpoint(run), process, processes)
        args = resumed_arguments(args, given, arguments, run)
    for name in ("list_models", "list_datasets", "resume"):
        delattr(args, name)
    args.model = args.model or ("linear" if args.dataset == "linear" else "airbench")
    waits = processes > 1 and int(os.environ.get("LOCAL_RANK", 0)) > 0
    if waits:
        dist.barrier()  # until the first process of this machine has decoded or downloaded
    dataset = load_dataset(args)
    if processes > 1 and not waits:
        dist.barrier()
    if not run:
        derive(args, dataset)
    if processes > 1 and args.batch_size < 2 * processes:
        raise Problem(f"--batch-size {args.batch_size} is too small to be shared by {processes} processes", 2)
    torch.manual_seed(args.seed)
    device, dtype = choose_device(args)
    if args.sync_batchnorm and device.type != "cuda":
        raise Problem("--sync-batchnorm needs GPUs: torch has none for the CPU", 2)
    deployable = make_deployable(args, dataset, device, checkpoint)
    splits = make_splits(args, dataset, device)
    if not run:
        run = from_first(lambda: claim_run(args), process, processes)
        if process == 0:
            stack.enter_context(locked(run))
    try:
        training = Training(args, run, dataset, deployable, splits, dtype, process, processes)
        if checkpoint:
            training.restore(checkpoint["training"])
        begin(training, checkpoint)
        finish(training, fit(training))
        return 0
    except Stopped as stop:
        done = training.progress["epoch"] - 1, training.progress["batches"]
        if process == 0:
            say("stopped and saved after {} epochs and {} steps; to go on:".format(*done))
            say(f"  {resume_command(run)}")
        if processes > 1:
            dist.barrier()  # torchrun ends all as soon as one has ended
        return 128 + stop.number
    except BaseException as error:
        if process == 0 and not any(
            os.path.exists(os.path.join(run, name)) for name in (CHECKPOINT, PREVIOUS)
        ):
            shutil.rmtree(run, ignore_errors=True)  # it holds nothing, and its name is free again
        elif isinstance(error, CannotWrite):
            raise Problem(
                f"{error}; the last checkpoint is whole: {resume_command(run)}", error.code
            ) from None
        raise


def begin(training, checkpoint):
    """Say what is about to be done, and write it to config.json."""
    args, run, dtype, done = training.args, training.run, training.dtype, training.progress
    if training.process == 0:
        used = {"device_used": str(training.device), "precision_used": "bf16" if dtype else "fp32"}
        write_json(os.path.join(run, "config.json"), {**vars(args), "run": run, **used})
    if not args.quiet:
        describe(args, training.dataset, training.deployable, training.splits, run, dtype, training.processes)
        if checkpoint:
            print(
                f"resumed   after {done['epoch'] - 1} epochs and {done['batches']} steps of the next",
                flush=True,
            )
    before = checkpoint["arguments"]["epochs"] if checkpoint else args.epochs
    if before != args.epochs:
        rate = training.optimizer.param_groups[0]["lr"]
        course = f"a course of {args.epochs} epochs from here on, not of {before}"
        say(f"note: learning rate and image size follow {course}; the next learning rate is {rate:.3g}")


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


def give_back_memory():
    """Give the kernel what `keep_freed_memory` kept, holes that fit nothing among it."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def main(argv=None):
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.list_models or args.list_datasets:
        return guarded(list_names, args, closed_pipe=0)
    unsaid = object()
    parser.set_defaults(**dict.fromkeys(vars(args), unsaid))
    given = {name: value for name, value in vars(parser.parse_args(argv)).items() if value is not unsaid}
    return guarded(train, args, given)


if __name__ == "__main__":
    sys.exit(main())
