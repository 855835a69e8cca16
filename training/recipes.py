"""What the command line leaves open: the defaults of networks, datasets and optimizers, and what the images
decide.

`resolve` needs the command line only, `fit_to_images` the dataset as well; both return new settings. This
module needs no torch, so that step1 can answer a wrong command line at once.
"""

import argparse
import math
import re

import data
from data.notes import note
from inference.errors import Problem

SCHEDULES = ("constant", "linear", "cosine", "onecycle")  # see optimizers.rate
OPTIMIZERS = {
    "sgd": {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-4, "schedule": "onecycle"},
    "adam": {"lr": 1e-3, "weight_decay": 0.0, "schedule": "cosine"},
    "adamw": {"lr": 1e-3, "weight_decay": 0.01, "schedule": "cosine"},
    # After airbench94_muon.
    "muon": {"lr": 0.12, "momentum": 0.6, "weight_decay": 0.004, "schedule": "linear"},
}
# By network, or by network and dataset; see `recipe`.
RECIPES = {
    "*": {"epochs": 10, "batch_size": 128, "optimizer": "sgd", "label_smoothing": 0.0},
    "torchvision": {"batch_size": 64},
    "mlp": {"optimizer": "adam", "batch_size": 32},
    "mynet": {"optimizer": "muon", "batch_size": 256, "lr": 0.14},
    "resblock": {"lr": 0.5, "batch_size": 512},
    "linear": {"epochs": 300, "batch_size": 100_000, "lr": 0.1, "weight_decay": 0.0, "schedule": "constant"},
    "airbench": {"optimizer": "muon", "batch_size": 250, "label_smoothing": 0.2},
    "tiny": {"epochs": 40, "optimizer": "muon", "batch_size": 250},
    "tiny digits": {"epochs": 20, "batch_size": 64, "lr": 0.08},
    "airbench digits": {"width": 0.25, "epochs": 20, "batch_size": 64, "lr": 0.08, "label_smoothing": 0.0},
    "airbench mnist": {"width": 0.25, "batch_size": 500, "label_smoothing": 0.1},
    "airbench fashion-mnist": {"width": 0.5},
    "airbench kmnist": {"width": 0.5},
    "mlp digits": {"epochs": 50},
    "mynet digits": {"epochs": 50, "batch_size": 32, "lr": 0.04},
    "resblock digits": {"epochs": 50, "batch_size": 64, "lr": 0.1},
    "pretrained": {"batch_size": 64, "lr": 0.01, "weight_decay": 1e-4, "schedule": "onecycle"},
}
# What the calibration looks at, see training/calibration.py. A twin serves training splits of fewer than MANY
# images, and none those of fewer than FEW_TO_CALIBRATE.
CALIBRATIONS = ("validation", "held-out", "twin", "none")
MANY, FEW_TO_CALIBRATE = 20_000, 200
# Photos fewer than MANY, with a side of PHOTO pixels or more, had better start from the weights of START.
PHOTO, START = 64, "mobilenet_v3_small"
# What training changes by default besides flips and shifts, for networks that hold for a camera's pictures.
# The tutorials' networks have none of it, as in the tutorials, and because a step would take longer.
CAMERA = ("blur", "color", "noise")
TUTORIALS = ("linear", "mlp", "mynet", "resblock")
NOT_SETTINGS = ("list_models", "list_datasets", "resume")  # arguments that do not describe a run
# What may be given with --resume, and differ from what the run began with.
MAY_CHANGE = "epochs device threads checkpoint_every quiet data_dir cache_dir image_root".split()
OWN_IMAGES = ("folder", "csv")
RESERVED = re.compile(r"(con|prn|aux|nul|(com|lpt)[\d¹²³])(\.|$)", re.IGNORECASE)  # Windows' devices
NEEDS_VALIDATION = "a validation split: give --val-fraction as well"
OF_CSV = ("test_csv", "image_root", "image_column", "label_column")
OF_IMAGES, OF_CLASSES = ("image_size", "fit"), ("class_weights", "label_smoothing", "calibration")
# Options that have an effect under a condition only: what they belong to in words, and the condition.
BELONGS_TO = {
    "data_dir": ("datasets other than digits and linear", lambda s: s.dataset not in ("digits", "linear")),
    "strict": ("--dataset folder or csv", lambda s: s.dataset in OWN_IMAGES),
    "cache_dir": ("your own images and --pretrained", lambda s: s.pretrained or s.dataset in OWN_IMAGES),
    **dict.fromkeys(OF_CSV, ("--dataset csv", lambda s: s.dataset == "csv")),
    **dict.fromkeys(OF_IMAGES, ("images, and linear has features", lambda s: s.dataset != "linear")),
    **dict.fromkeys(OF_CLASSES, ("classes, and linear is a regression", lambda s: s.dataset != "linear")),
    "patience": (NEEDS_VALIDATION, lambda s: s.val_fraction or s.dataset in OWN_IMAGES),
    "augment": (
        "images, not linear's features, and to networks trained whole",
        lambda s: s.dataset != "linear" and not s.freeze_backbone,
    ),
    "momentum": ("--optimizer sgd or muon", lambda s: s.optimizer in ("sgd", "muon")),
    "freeze_backbone": ("--pretrained: it trains the last layer only", lambda s: bool(s.pretrained)),
}


def resolve(args: argparse.Namespace, given: dict) -> argparse.Namespace:
    """The settings of a run from its command line, all that the images do not decide filled in.

    given: the arguments that the user typed. Raises Problem for an option that would have no effect.
    """
    settings = {name: value for name, value in vars(args).items() if name not in NOT_SETTINGS}
    dataset = args.dataset
    if args.data_dir and "dataset" not in given:
        dataset = data.guess(args.data_dir) or dataset
    network = args.model or ("linear" if dataset == "linear" else "airbench")
    if dataset == "linear" and network not in ("linear", "mlp"):
        raise Problem(f"--dataset {dataset} has features, not images: --model linear or mlp", 2)
    settings |= {"dataset": dataset, "model": network}
    settings["fit"] = args.fit or ("crop" if dataset in OWN_IMAGES else "stretch")
    for name, value in recipe(network, dataset, bool(args.pretrained), args.optimizer).items():
        if settings[name] is None:
            settings[name] = value
    settings = argparse.Namespace(**settings)
    refuse_without_effect(settings, given)
    if settings.name is not None:
        check_name(settings.name)
    return settings


def check_name(name: str) -> None:
    """Raise Problem for a name of a run that some file system refuses."""
    if not re.fullmatch(r"\w([\w.-]*\w)?", name):
        raise Problem(f"--name {name!r} is not a plain name of letters, digits, '.', '_' and '-'", 2)
    if RESERVED.match(name):
        raise Problem(f"--name {name!r} is reserved by Windows for a device: choose another", 2)


def recipe(network: str, dataset: str, pretrained: bool, optimizer: str | None = None) -> dict:
    """The defaults for a network on a dataset, by the name of the option.

    Each of RECIPES that applies overrides those before it. optimizer: the one asked for; another than the
    recipe's brings its own rate, momentum, decay and schedule.
    """
    kind, chosen = network if network in RECIPES else "torchvision", {}
    for layer in ("*", kind, f"{kind} {dataset}", *(("*", "pretrained") if pretrained else ())):
        chosen |= RECIPES.get(layer, {})
    if optimizer in (None, chosen["optimizer"]):
        return {**OPTIMIZERS[chosen["optimizer"]], **chosen}
    return {**chosen, "momentum": None, **OPTIMIZERS[optimizer], "optimizer": optimizer}


def refuse_without_effect(settings: argparse.Namespace, given: dict) -> None:
    """Raise Problem for an option that was typed and would do nothing."""
    for name, (what, has_effect) in BELONGS_TO.items():
        if given.get(name) not in (None, False, ["none"]) and not has_effect(settings):
            raise Problem(f"--{name.replace('_', '-')} belongs to {what}; leave it out", 2)


def fit_to_images(settings: argparse.Namespace, given: dict, dataset, traits) -> argparse.Namespace:
    """The settings with what the images decide: their size, augmentation, and how many make a batch.

    traits: of the network, see `model.Network`. Raises Problem.
    """
    settings = argparse.Namespace(**vars(settings))
    count = len(dataset.train_images)
    if dataset.task == "regression":
        settings.augment, settings.image_size, settings.calibration = [], (1, 1), "none"
        settings.batch_size = min(settings.batch_size, count)
        return settings
    height, width, channels = dataset.train_images.shape[1:]
    if settings.image_size is None:
        # By a whole factor, small images keep their pixels apart.
        factor = -(-traits.min_size // min(height, width))
        settings.image_size = (height * factor, width * factor)
    if settings.freeze_backbone:  # see training/features.py
        settings.augment = []
    if settings.augment is None:
        flip = ["flip"] if channels == 3 else []
        settings.augment = [*flip, "translate", *(() if settings.model in TUTORIALS else CAMERA)]
    if "none" in settings.augment:
        if len(settings.augment) > 1:
            raise Problem("--augment none goes with nothing else", 2)
        settings.augment = []
    settings.calibration = calibration(settings, dataset)
    own = settings.dataset in OWN_IMAGES
    if own and not settings.pretrained and count < MANY and max(height, width) >= PHOTO:
        network = START if settings.model in RECIPES else settings.model
        why = "starts from weights trained on ImageNet, at their size, and is usually far more accurate"
        note(f"{count:,} photos are few to start from nothing: --model {network} --pretrained {why}")
    if own and "epochs" not in given:
        settings.epochs = min(max(200_000 // count, 10), 50)  # few images want more passes
    if "batch_size" not in given:
        halvings = batch_halvings(settings, count if own else None, traits.max_batch_pixels)
        settings.batch_size //= 2**halvings
        if "lr" not in given:
            settings.lr /= 2 ** (halvings / 2)
    settings.batch_size = min(settings.batch_size, count)
    return settings


def calibration(settings: argparse.Namespace, dataset) -> str:
    """Which images show how sure the network may be: one of CALIBRATIONS.

    Few images suffer most if some are held out; a twin costs the time of another run instead. Raises Problem,
    also for other options that do not fit data with or without a validation split of its own.
    """
    has_val, asked, count = dataset.val_images is not None, settings.calibration, len(dataset.train_images)
    if has_val and settings.val_fraction:
        raise Problem("--val-fraction does not go with data that has a validation split of its own", 2)
    if has_val or settings.val_fraction:
        if asked in ("held-out", "twin"):
            raise Problem(f"--calibration {asked} does not go with a validation split, which serves too", 2)
        return asked or "validation"
    if settings.patience:
        raise Problem(f"--patience needs {NEEDS_VALIDATION}", 2)
    if asked or count < FEW_TO_CALIBRATE:
        return asked or "none"
    return "twin" if count < MANY else "held-out"


def batch_halvings(settings: argparse.Namespace, count: int | None, most_pixels: int | None) -> int:
    """How often to halve the batch, so that few images make 16 steps an epoch and large ones fit into memory.

    count: of images, None if the recipe was made for them. most_pixels: in a batch, None for any.
    """
    limit = min((count or math.inf) / 16, (most_pixels or math.inf) / math.prod(settings.image_size))
    batch_size, halvings = settings.batch_size, 0
    while batch_size > max(16, limit):
        batch_size, halvings = batch_size // 2, halvings + 1
    return halvings


def resumed(args, given: dict, arguments: dict, run: str, finished: bool) -> argparse.Namespace:
    """The settings to resume a run with: its own `arguments`, and of those typed, `given`, what may change.

    args: the whole command line; its defaults stand for options that the run did not know. Raises Problem.
    """
    defaults = {name: value for name, value in vars(args).items() if name not in NOT_SETTINGS}
    given = {name: [] if value == ["none"] else value for name, value in given.items() if name != "resume"}
    changed = [k for k, value in given.items() if k not in MAY_CHANGE and value != arguments.get(k)]
    if changed:
        options = [f"--{k.replace('_', '-')} {given[k]} (was {arguments.get(k)})" for k in changed]
        reason = "that would alter its course; leave it out, or start a new run"
        raise Problem(f"{run} cannot go on with {', '.join(options)}: {reason}", 2)
    epochs = arguments["epochs"]
    if given.get("epochs", epochs) < epochs:
        raise Problem(f"{run} was begun for {epochs} epochs, and --epochs can only be raised", 2)
    if finished and given.get("epochs", 0) <= epochs:
        raise Problem(f"{run} is finished; --epochs above {epochs} trains it further", 2)
    defaults["fit"] = "stretch"  # before there was a choice
    settings = {name: arguments.get(name, default) for name, default in defaults.items()}
    return argparse.Namespace(**{**settings, **given})
