"""What the command line leaves open: the defaults of networks, datasets and optimizers, and what
the images decide.

`resolve` needs the command line only, `adapt_to_images` the dataset as well, `resolve_resumed` the
arguments of the run to resume; each returns new settings. This module needs no torch, so that step1
can answer a wrong command line at once.
"""

import argparse
import math
import re

import data
from data.notes import note
from inference.command_line import say
from inference.errors import Problem

SCHEDULES = ("constant", "linear", "cosine", "onecycle")  # see optimizers.rate
BATCH_NORMS = ("trained", "frozen")  # see optimizers.train_mode
ACTIVATIONS = ("gelu", "hardswish", "relu")  # of tiny
OPTIMIZERS = {
    "sgd": {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-4, "schedule": "onecycle"},
    "adam": {"lr": 1e-3, "weight_decay": 0.0, "schedule": "cosine"},
    "adamw": {"lr": 1e-3, "weight_decay": 0.01, "schedule": "cosine"},
    # After airbench94_muon.
    "muon": {"lr": 0.12, "momentum": 0.6, "weight_decay": 0.004, "schedule": "linear"},
}
# By network, or by network and dataset; see `recipe`.
RECIPES = {
    "*": {
        "epochs": 10,
        "batch_size": 128,
        "optimizer": "sgd",
        "label_smoothing": 0.0,
        "batch_norm": "trained",
        "layer_decay": 1.0,
        "keep_start": 0.0,
    },
    "torchvision": {"batch_size": 64},
    "mlp": {"optimizer": "adam", "batch_size": 32},
    "mynet": {"optimizer": "muon", "batch_size": 256, "lr": 0.14},
    "resblock": {"lr": 0.5, "batch_size": 512},
    "linear": {
        "epochs": 300,
        "batch_size": 100_000,
        "lr": 0.1,
        "weight_decay": 0.0,
        "schedule": "constant",
    },
    "airbench": {"optimizer": "muon", "batch_size": 250, "label_smoothing": 0.2},
    "tiny": {"epochs": 60, "optimizer": "muon", "batch_size": 250, "activation": "hardswish"},
    "tiny digits": {"epochs": 20, "batch_size": 64, "lr": 0.08},
    "airbench digits": {
        "width": 0.25,
        "epochs": 20,
        "batch_size": 64,
        "lr": 0.08,
        "label_smoothing": 0.0,
    },
    "airbench mnist": {"width": 0.25, "batch_size": 500, "label_smoothing": 0.1},
    "airbench fashion-mnist": {"width": 0.5},
    "airbench kmnist": {"width": 0.5},
    "mlp digits": {"epochs": 50},
    "mynet digits": {"epochs": 50, "batch_size": 32, "lr": 0.04},
    "resblock digits": {"epochs": 50, "batch_size": 64, "lr": 0.1},
    # The last layer alone, on features; L-BFGS has fitted it before, and ten times the rate would
    # fit it to the images.
    "frozen": {"batch_size": 64, "lr": 0.001, "weight_decay": 1e-4, "schedule": "onecycle"},
    # All of a network with weights from elsewhere; tests/benchmarks/NOTES.md has what was tried.
    "pretrained": {
        "optimizer": "adamw",
        "batch_size": 32,
        "lr": 1e-3,
        "weight_decay": 0.05,
        "schedule": "onecycle",
        "batch_norm": "frozen",
        "layer_decay": 0.1,
    },
    "pretrained sgd": {"lr": 0.002},
}

# Which images calibrate the probabilities, see training/calibration.py.
CALIBRATIONS = ("validation", "held-out", "twin", "cross-fit", "none")
MANY = 20_000  # training images; fewer lose most by holding some out, and get a twin instead
FEW_TO_CALIBRATE = 200  # training images; fewer are not calibrated by default
FEW_TO_CROSS_FIT = 50  # the same of a pretrained network, which they may all calibrate

# Photos fewer than MANY, with a side of PHOTO pixels or more, had better start from the weights of
# START.
PHOTO = 64
START = "mobilenet_v3_small"
START_OF_TIMM = "timm/mobilenetv3_small_100.lamb_in1k"  # the same with other weights
# Options that say what the network is, or what it starts from.
SAY_NETWORK = ("model", "width", "hidden", "dropout", "pretrained")

# What training changes by default besides flips and shifts, for networks that hold for a camera's
# pictures. The tutorials' networks have none of it, as in the tutorials, and because a step would
# take longer.
CAMERA = ("blur", "color", "noise")
TUTORIALS = ("linear", "mlp", "mynet", "resblock")

SMALLEST_BATCH = 16  # that a large batch is halved down to
STEPS_PER_EPOCH = 16  # at least, where few images allow it
IMAGES_SEEN = 200_000  # by default of your own images, over all epochs: few images want more passes
IMAGES_SEEN_AGAIN = 24_000  # the same by a network that has learned on others before

# The part of the weights from elsewhere in the result: best for 100 images, and how it falls.
MOST_KEPT = 0.6
FEW_TO_KEEP = 100
KEPT_FALLS = 0.316  # the power of the number of images
KEPT_OF_SIX = 0.4  # of the average with the networks of cross-fitting, which is nearer to it

NOT_SETTINGS = ("list_models", "list_datasets", "resume")  # arguments that do not describe a run
# What may be given with --resume, and differ from what the run began with.
MAY_CHANGE = (
    "epochs",
    "device",
    "threads",
    "checkpoint_every",
    "quiet",
    "data_dir",
    "max_pixels",
    "cache_dir",
    "image_root",
)
OWN_IMAGES = ("folder", "csv")
MOST_WIDTH = 1024  # of airbench, where the usual is 1
LONGEST_NAME = 200  # bytes of a run's name; file systems take 255, and files add to it
# The names of Windows' devices.
RESERVED = re.compile(r"(con|prn|aux|nul|(com|lpt)[\d¹²³])(\.|$)", re.IGNORECASE)


# --------------------------------------------------------------------------- options without effect
def reads_data(settings: argparse.Namespace) -> bool:
    return settings.dataset not in ("digits", "linear")


def has_images(settings: argparse.Namespace) -> bool:
    return settings.dataset != "linear"


def has_own_images(settings: argparse.Namespace) -> bool:
    return settings.dataset in OWN_IMAGES


def reads_csv(settings: argparse.Namespace) -> bool:
    return settings.dataset == "csv"


def reads_group_column(settings: argparse.Namespace) -> bool:
    return reads_csv(settings) and settings.group_by is None


def writes_cache(settings: argparse.Namespace) -> bool:
    return bool(settings.pretrained) or has_own_images(settings)


def may_validate(settings: argparse.Namespace) -> bool:
    return bool(settings.val_fraction) or has_own_images(settings)


def augments(settings: argparse.Namespace) -> bool:
    return has_images(settings) and not settings.freeze_backbone


def has_momentum(settings: argparse.Namespace) -> bool:
    return settings.optimizer in ("sgd", "muon")


def is_pretrained(settings: argparse.Namespace) -> bool:
    return bool(settings.pretrained)


def trains_whole(settings: argparse.Namespace) -> bool:
    return not settings.freeze_backbone


def tunes_whole(settings: argparse.Namespace) -> bool:
    return bool(settings.pretrained) and not settings.freeze_backbone


# Options that have an effect under a condition only: what they apply to in words, and the
# condition.
APPLIES_TO = {
    "data_dir": ("datasets other than digits and linear", reads_data),
    "strict": ("--dataset folder or csv", has_own_images),
    "max_pixels": ("--dataset folder or csv", has_own_images),
    "cache_dir": ("your own images and --pretrained", writes_cache),
    "test_csv": ("--dataset csv: a directory has its test images in a folder test/", reads_csv),
    "image_root": ("--dataset csv", reads_csv),
    "image_column": ("--dataset folder or csv", has_own_images),
    "label_column": ("--dataset folder or csv", has_own_images),
    "group_column": ("--dataset csv without --group-by", reads_group_column),
    "group_by": ("--dataset folder or csv", has_own_images),
    "image_size": ("images, and linear has features", has_images),
    "fit": ("images, and linear has features", has_images),
    "class_weights": ("classes, and linear is a regression", has_images),
    "label_smoothing": ("classes, and linear is a regression", has_images),
    "calibration": ("classes, and linear is a regression", has_images),
    "patience": ("runs with a validation split: add --val-fraction", may_validate),
    "augment": (
        "images, and to networks trained whole, without --freeze-backbone",
        augments,
    ),
    "momentum": ("--optimizer sgd or muon", has_momentum),
    "freeze_backbone": ("--pretrained: it trains the last layer only", is_pretrained),
    "minutes": ("images, and to networks trained whole, without --freeze-backbone", augments),
    "layer_decay": ("networks trained whole, without --freeze-backbone", trains_whole),
    "batch_norm": ("networks with --pretrained, trained whole", tunes_whole),
    "keep_start": ("networks with --pretrained, trained whole", tunes_whole),
}


def refuse_without_effect(settings: argparse.Namespace, given: dict) -> None:
    """Raise Problem for an option that was given and would do nothing."""
    for name, (what, has_effect) in APPLIES_TO.items():
        value = given.get(name)
        is_given = value is not None and value is not False and value != ["none"]
        if is_given and not has_effect(settings):
            raise Problem(f"{option_of(name)} only applies to {what}", 2)


def option_of(name: str) -> str:
    """An option as it is typed, by the name of its value."""
    return f"--{name.replace('_', '-')}"


# ---------------------------------------------------------------------------- from the command line
def resolve(args: argparse.Namespace, given: dict) -> argparse.Namespace:
    """The settings of a run from its command line, all that the images do not decide filled in.

    given: the options given explicitly, by name. Raises Problem for an option that would have no
    effect.
    """
    dataset = args.dataset
    if args.data_dir and "dataset" not in given:
        dataset = data.guess(args.data_dir)

    network = args.model or default_network(dataset, args.pretrained)
    if dataset == "linear" and network not in ("linear", "mlp"):
        raise Problem(f"--dataset {dataset} has features, not images: --model linear or mlp", 2)

    settings = {name: value for name, value in vars(args).items() if name not in NOT_SETTINGS}
    settings |= {"dataset": dataset, "model": network}
    start = start_of(args)
    for name, value in recipe(network, dataset, start, args.optimizer).items():
        if settings[name] is None:
            settings[name] = value

    settings = argparse.Namespace(**settings)
    if settings.minutes and "width" not in given:
        settings.width = None
    refuse_without_effect(settings, given)
    if settings.minutes and "epochs" in given:
        raise Problem("--minutes chooses the epochs: leave out --epochs, or --minutes", 2)
    if settings.name is not None:
        check_name(settings.name)
    return settings


def default_network(dataset: str, pretrained: str | None) -> str:
    """The network without --model. pretrained: "default" for the weights that come with one."""
    if dataset == "linear":
        return "linear"
    return START if pretrained == "default" else "airbench"


def leaves_network_open(settings: argparse.Namespace, given: dict) -> bool:
    """Does the network follow from the user's own images? given: see `resolve`."""
    is_own = settings.dataset in OWN_IMAGES
    return is_own and not any(name in given for name in SAY_NETWORK)


def are_few_photos(count: int, size: tuple[int, int]) -> bool:
    """Are so many training images of this size (height, width) better started from weights?"""
    return count < MANY and max(size) >= PHOTO


def chooses_width(settings: argparse.Namespace) -> bool:
    """Does the width of the network follow from --minutes?"""
    is_open = settings.model == "airbench" and settings.width is None
    return bool(settings.minutes) and is_open and not settings.pretrained


def check_name(name: str) -> None:
    """Raise Problem for a name of a run that some file system refuses."""
    length = len(name.encode(errors="replace"))
    if length > LONGEST_NAME:
        raise Problem(f"--name has {length:,} bytes, more than {LONGEST_NAME}: choose another", 2)
    if not re.fullmatch(r"\w([\w.-]*\w)?", name):
        reason = "is not a plain name of letters, digits, '.', '_' and '-'"
        raise Problem(f"--name {name!r} {reason}", 2)
    if RESERVED.match(name):
        raise Problem(f"--name {name!r} is reserved by Windows for a device: choose another", 2)


def start_of(settings: argparse.Namespace) -> str | None:
    """What a run begins with, a key of RECIPES: None for nothing but random weights."""
    if not settings.pretrained:
        return None
    return "frozen" if settings.freeze_backbone else "pretrained"


def recipe(network: str, dataset: str, start: str | None, optimizer: str | None = None) -> dict:
    """The defaults for a network on a dataset, by the name of the option.

    Each of RECIPES that applies overrides those before it. start: see `start_of`. optimizer: the
    one asked for, if any; another than the recipe's brings its own rate, momentum, decay and
    schedule.
    """
    kind = network if network in RECIPES else "torchvision"
    chosen = {**RECIPES["*"], **RECIPES[kind], **RECIPES.get(f"{kind} {dataset}", {})}
    if start:
        chosen |= {**RECIPES["*"], **RECIPES[start]}

    if optimizer in (None, chosen["optimizer"]):
        return {**OPTIMIZERS[chosen["optimizer"]], **chosen}
    own = {**OPTIMIZERS[optimizer], **RECIPES.get(f"{start} {optimizer}", {})}
    return {**chosen, "momentum": None, **own, "optimizer": optimizer}


# ---------------------------------------------------------------------------------- from the images
def adapt_to_images(
    settings: argparse.Namespace, given: dict, dataset: data.Dataset, traits
) -> argparse.Namespace:
    """The settings with what the images decide: their size and fit, augmentation, epochs, batch and
    calibration.

    given: the options given explicitly, by name. traits: of the network, see `model.Network`.
    Raises Problem.
    """
    settings = argparse.Namespace(**vars(settings))
    settings.fit = settings.fit or dataset.fit
    count = len(dataset.train_images)
    if not dataset.has_images:
        settings.augment = []
        settings.image_size = (1, 1)
        settings.calibration = "none"
        settings.batch_size = min(settings.batch_size, count)
        return settings

    height, width, channels = dataset.train_images.shape[1:]
    if settings.image_size is None:
        # By a whole factor, small images keep their pixels apart.
        factor = -(-traits.min_size // min(height, width))
        settings.image_size = (height * factor, width * factor)
    settings.augment = augmentations(settings, channels)
    settings.calibration = choose_calibration(settings, dataset)

    is_own = settings.dataset in OWN_IMAGES
    if is_own and are_few_photos(count, (height, width)):
        suggest_pretrained(settings, count)
    if is_own and "epochs" not in given:
        settings.epochs = usual_epochs(settings, count)
    if tunes_whole(settings) and "keep_start" not in given:
        settings.keep_start = usual_keep_start(count)
        if settings.calibration == "cross-fit":
            settings.keep_start = KEPT_OF_SIX
    if "batch_size" not in given:
        # The recipes of the named datasets were made for the number of their images.
        images = count if is_own else None
        halvings = batch_halvings(settings, images, traits.max_batch_pixels)
        settings.batch_size //= 2**halvings
        if "lr" not in given:
            settings.lr /= 2 ** (halvings / 2)
    settings.batch_size = min(settings.batch_size, count)
    return settings


def usual_epochs(settings: argparse.Namespace, count: int) -> int:
    """How often to see so many images of one's own."""
    if start_of(settings) == "frozen":
        return RECIPES["*"]["epochs"]  # its last layer has been fitted before
    if start_of(settings) == "pretrained":
        return min(max(IMAGES_SEEN_AGAIN // count, 4), 30)
    fewest = recipe(settings.model, settings.dataset, start=None)["epochs"]
    return max(min(IMAGES_SEEN // count, 50), fewest)


def usual_keep_start(count: int) -> float:
    """The part of the weights from elsewhere in the result: three fifths for few images, as these
    say less than the millions that the weights come from; a quarter for 1,600.
    """
    return min(MOST_KEPT, round(MOST_KEPT * (FEW_TO_KEEP / count) ** KEPT_FALLS, 2))


def augmentations(settings: argparse.Namespace, channels: int) -> list[str]:
    """The names of what training does to images: those asked for, or the defaults.

    Raises Problem.
    """
    if settings.freeze_backbone:  # see training/features.py
        return []

    if settings.augment is None:
        names = ["translate"]
        if channels == 3:
            names = ["flip", "translate"]
        if settings.model not in TUTORIALS:
            names += CAMERA
        return names

    if "none" in settings.augment:
        if len(settings.augment) > 1:
            raise Problem("--augment none goes with nothing else", 2)
        return []
    return settings.augment


def heed_mirror(
    settings: argparse.Namespace, given: dict, dataset: data.Dataset
) -> argparse.Namespace:
    """The settings without flip if mirrored images look like those of other classes.

    What the command line asks for stays, with a warning.
    """
    found = dataset.findings.mirrored if dataset.findings else None
    if found is None:
        return settings

    looks = (
        f"mirrored, {found.mirrored:.0%} of the training images look most like an image of another "
        f"class, unmirrored {found.plain:.0%}"
    )
    if "augment" in given:
        say(f"warning: --augment flip teaches wrong labels: {looks}")
        return settings

    note(f"training without flip: {looks} (--augment names what to use instead)")
    augment = [name for name in settings.augment if name != "flip"]
    return argparse.Namespace(**{**vars(settings), "augment": augment})


def suggest_pretrained(settings: argparse.Namespace, count: int) -> None:
    """Tell who trains on few photos from nothing that there is a better start."""
    if settings.pretrained:
        return
    network = START if settings.model in RECIPES else settings.model
    note(
        f"{count:,} photos are few to start from nothing: --model {network} --pretrained starts "
        "from weights trained on ImageNet, at their size, and is usually far more accurate"
    )


def choose_calibration(settings: argparse.Namespace, dataset: data.Dataset) -> str:
    """Which images calibrate the probabilities: one of CALIBRATIONS.

    Few images suffer most if some are held out; a twin costs the time of another run instead.
    Raises Problem, also for other options that do not fit data with or without a validation split
    of its own.
    """
    asked = settings.calibration
    has_val = dataset.val_images is not None
    if has_val and settings.val_fraction:
        reason = "--val-fraction does not go with data that has a validation split of its own"
        raise Problem(reason, 2)

    if has_val or settings.val_fraction:
        if asked in ("held-out", "twin", "cross-fit"):
            reason = "does not go with a validation split: that calibrates the probabilities"
            raise Problem(f"--calibration {asked} {reason}", 2)
        return asked or "validation"

    if settings.patience:
        raise Problem("--patience needs a validation split: add --val-fraction", 2)
    if asked == "cross-fit" and not settings.pretrained:
        reason = "needs --pretrained: from nothing, a network would be trained five times as long"
        raise Problem(f"--calibration cross-fit {reason}", 2)
    if asked:
        return asked

    count = len(dataset.train_images)
    few = MANY if settings.freeze_backbone else FEW_TO_CALIBRATE
    if settings.pretrained and FEW_TO_CROSS_FIT <= count < few:
        return "cross-fit"
    return calibration_of_whole(count)


def calibration_of_whole(count: int) -> str:
    """What calibrates a network that was trained whole, on so many images, by default."""
    if count < FEW_TO_CALIBRATE:
        return "none"
    return "twin" if count < MANY else "held-out"


def batch_halvings(settings: argparse.Namespace, count: int | None, most_pixels: int | None) -> int:
    """How often to halve the batch, so that few images make 16 steps an epoch and large ones fit
    into memory.

    count: of images, None if the recipe was made for them. most_pixels: in a batch, None for any.
    """
    limit = math.inf
    if count:
        limit = count / STEPS_PER_EPOCH
    if most_pixels:
        limit = min(limit, most_pixels / math.prod(settings.image_size))

    halvings = 0
    batch_size = settings.batch_size
    while batch_size > max(SMALLEST_BATCH, limit):
        batch_size //= 2
        halvings += 1
    return halvings


# --------------------------------------------------------------------------------- of a resumed run
def resolve_resumed(
    args: argparse.Namespace, given: dict, arguments: dict, run_dir: str, is_finished: bool
) -> argparse.Namespace:
    """The settings to resume a run with: its own `arguments`, and of the options given, those that
    may change.

    args: the whole command line; its defaults stand for options that the run did not know. Raises
    Problem.
    """
    asked = {name: value for name, value in given.items() if name != "resume"}
    if asked.get("augment") == ["none"]:
        asked["augment"] = []
    refuse_changes(asked, arguments, run_dir)

    epochs = arguments["epochs"]
    if asked.get("epochs", epochs) < epochs:
        reason = f"{run_dir} was begun for {epochs} epochs, and --epochs can only be raised"
        raise Problem(reason, 2)
    if is_finished and asked.get("epochs", 0) <= epochs:
        raise Problem(f"{run_dir} is finished; --epochs above {epochs} trains it further", 2)

    defaults = {name: value for name, value in vars(args).items() if name not in NOT_SETTINGS}
    # Before there was a choice.
    defaults |= {
        "fit": "stretch",
        "calibration": "none",
        "group_by": data.NO_GROUPS,
        "batch_norm": "trained",
        "layer_decay": 1.0,
        "keep_start": 0.0,
    }
    recorded = {name: arguments.get(name, default) for name, default in defaults.items()}
    if "cache_dir" not in asked:
        recorded["cache_dir"] = data.usable_cache_dir(recorded["cache_dir"])
    return argparse.Namespace(**{**recorded, **asked})


def check_resumed(settings: argparse.Namespace, dataset: data.Dataset, run_dir: str) -> None:
    """Raise Problem if a run has recorded settings that its data does not allow.

    No run of step1 does; a damaged or a stranger's may.
    """
    calibrations = ["none"]
    if dataset.val_images is not None or settings.val_fraction:
        calibrations.append("validation")
    elif dataset.has_images:
        calibrations += ["held-out", "twin"]
        if settings.pretrained:
            calibrations.append("cross-fit")

    wrong = None
    if settings.calibration not in calibrations:
        wrong = "calibration"
    elif settings.augment and (settings.freeze_backbone or not dataset.has_images):
        wrong = "augment"
    elif settings.class_weights and not dataset.has_images:
        wrong = "class_weights"

    if wrong:
        value = getattr(settings, wrong)
        reason = f"{wrong} {value} does not go with its data: start a new run"
        raise Problem(f"{run_dir} cannot go on, as {reason}")


def in_words(value) -> str:
    """The value of an option as the command line has it."""
    if value is None:
        return "not given"
    if isinstance(value, list):
        return " ".join(map(str, value)) or "none"
    return str(value)


def refuse_changes(asked: dict, arguments: dict, run_dir: str) -> None:
    """Raise Problem if an option differs from the run's arguments and may not."""
    changes = []
    for name, value in asked.items():
        before = arguments.get(name)
        if name not in MAY_CHANGE and value != before:
            changes.append(f"{option_of(name)} {in_words(value)} (was {in_words(before)})")

    if changes:
        reason = "that would alter its course; leave it out, or start a new run"
        raise Problem(f"{run_dir} cannot go on with {', '.join(changes)}: {reason}", 2)
