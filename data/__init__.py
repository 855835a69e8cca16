"""Datasets of one common form: `load(name, data_dir)` returns a `Dataset`.

`digits` is bundled with this package. The named image sets are torchvision's, downloaded on first
use to --data-dir (by default this folder, where git ignores them). `folder` and `csv` read your own
images, and `linear` is generated.

Importing this package must not import torch: `step1_train.py --help` imports it.
"""

import difflib
import os

import numpy as np

from data.dataset import (  # noqa: F401
    Dataset,
    differences,
    mean_and_std,
    refuse_changes,
    with_fingerprint,
)
from inference.command_line import say
from inference.errors import Problem
from inference.task import REGRESSION, task_of

HERE = os.path.dirname(os.path.abspath(__file__))

NO_GROUPS = "none"  # what --group-by takes to leave every image alone

# What augment.gather applies, and what also changes the labels: see training/cutmix.py.
AUGMENTATIONS = (
    "flip",
    "translate",
    "crop",
    "rotate",
    "blur",
    "color",
    "noise",
    "cutout",
    "cutmix",
)

# The options of `load` that step1's command line has, besides --dataset, --data-dir, --image-size.
OPTIONS = (
    "strict",
    "max_pixels",
    "cache_dir",
    "image_root",
    "test_csv",
    "image_column",
    "label_column",
    "group_column",
    "group_by",
    "seed",
)

# The names that --dataset takes, and what --list-datasets says of them.
DATASETS = {
    "digits": "UCI handwritten digits, 8x8 grey, 1,437 + 360, bundled",
    "mnist": "MNIST handwritten digits, 28x28 grey, 60,000 + 10,000",
    "fashion-mnist": "Fashion-MNIST clothes, 28x28 grey, 60,000 + 10,000",
    "kmnist": "Kuzushiji-MNIST cursive Japanese, 28x28 grey, 60,000 + 10,000",
    "cifar10": "CIFAR-10 photos, 32x32 colour, 10 classes, 50,000 + 10,000",
    "cifar100": "CIFAR-100 photos, 32x32 colour, 100 classes, 50,000 + 10,000",
    "folder": "your images: --data-dir DIR with DIR/[train|val|test/]<class>/*",
    "csv": "your images: --data-dir FILE.csv (or .tsv, .txt, .jsonl), a path and a label a row",
    "linear": "the tensor tutorial's regression, 5 features, 20 + 20 rows",
}

LINEAR_WEIGHTS = (0.3, 4.0, 0.2, 2.5, 18.0)
LINEAR_BIAS = 17.0
LINEAR_ROWS = 20  # in each split


def load(
    name: str,
    data_dir: str | None = None,
    *,
    seed: int = 0,
    download: bool = True,
    **options,
) -> Dataset:
    """Load a dataset by its name. Raises Problem.

    data_dir: where torchvision's files are or will go, the directory of `folder`, or the file of
    `csv`. seed: of the random rows of `linear`. download: whether torchvision's files may be
    fetched, and damaged ones replaced. options: fields of `files.Options`, used by folder and csv
    only.
    """
    if name not in DATASETS:
        raise unknown_dataset(name)

    if name == "digits":
        return with_fingerprint(load_digits())
    if name == "linear":
        return with_fingerprint(generate_linear(seed))

    # What the other datasets need is imported only now, so that --help need not wait for it.
    if name not in ("folder", "csv"):
        from data.downloads import load_torchvision

        return with_fingerprint(load_torchvision(name, data_dir or HERE, download))

    if data_dir is None:
        raise needs_data_dir(name)

    from data.files import Options
    from data.own import load_own

    return load_own(name, data_dir, Options(**options))


def survey(name: str, data_dir: str | None, **options) -> tuple[int, tuple[int, int]]:
    """How many training images `folder` or `csv` has, and the size (height, width) that `load`
    would give them with the same options; no image is decoded. Raises Problem.
    """
    if data_dir is None:
        raise needs_data_dir(name)

    from data.files import Options
    from data.own import survey_own

    return survey_own(name, data_dir, Options(**options))


def needs_data_dir(name: str) -> Problem:
    return Problem(f"--dataset {name} needs --data-dir: {DATASETS[name]}", 2)


def unknown_dataset(name: str) -> Problem:
    """The error for a dataset that does not exist, with the nearest name if there is one."""
    hint = f"known: {', '.join(DATASETS)}."
    nearest = difflib.get_close_matches(name, DATASETS, n=1)
    if nearest:
        hint = f"did you mean {nearest[0]!r}?"
    return Problem(f"unknown dataset {name!r}; {hint} (--list-datasets shows all)", 2)


def guess(data_dir: str) -> str:
    """The dataset that --data-dir alone implies: "csv" for a file, "folder" for a directory.

    Raises Problem if there is neither.
    """
    from data.files import refuse_missing

    refuse_missing(data_dir)
    return "csv" if os.path.isfile(data_dir) else "folder"


def load_for(spec: dict, data_dir: str | None) -> Dataset:
    """Load the dataset of a run's spec as step1 loaded it, or from another `data_dir`.

    The paths in a spec may be a stranger's. What they let be read is said, and nothing is written
    to them: see `usable_cache_dir`. Nothing is downloaded to them either. Raises Problem.
    """
    arguments = spec["arguments"]
    # Specs of earlier versions lack the options that came later.
    options = {name: arguments.get(name) for name in OPTIONS}
    options["cache_dir"] = usable_cache_dir(arguments.get("cache_dir"))
    if data_dir:
        for name in ("image_root", "test_csv"):
            options[name] = moved(options[name], arguments["data_dir"], data_dir)
    # Runs of earlier versions have split their images without regard to groups.
    options["group_by"] = arguments.get("group_by", NO_GROUPS)

    if task_of(spec).has_images:
        options["image_size"] = tuple(spec["image_size"])
    options["channels"] = spec["channels"]

    from data.files import NO_GROUND

    # Specs of earlier versions lack these three, and were trained with these values.
    options["white"] = spec.get("white", 65535)
    options["ground"] = spec.get("ground") or NO_GROUND
    options["fit"] = spec.get("fit") or "stretch"
    # They were once sorted in another way, which the order of the network's outputs keeps.
    options["classes"] = spec.get("classes")

    recorded = None if data_dir else arguments["data_dir"]
    say_what_is_read(recorded, options)
    download = recorded is None
    return load(spec["dataset"], data_dir or recorded, download=download, **options)


def moved(path: str | None, old_data: str, new_data: str) -> str | None:
    """A recorded path of the data; where it is beside the moved data, if it is gone."""
    if path is None or os.path.exists(path):
        return path
    relative = os.path.relpath(path, os.path.dirname(old_data))
    beside = os.path.join(os.path.dirname(new_data), relative)
    return beside if os.path.exists(beside) else path


def usable_cache_dir(cache_dir: str | None) -> str | None:
    """The --cache-dir that a run has recorded, if this user has kept a cache there before.

    Otherwise None, for the place beside the data, after saying so.
    """
    if cache_dir is None:
        return None

    from data.cache import IN_CACHE_DIR, is_own_cache

    if is_own_cache(cache_dir):
        return cache_dir
    reason = f"it holds no folder {IN_CACHE_DIR} of yours"
    say(f"note: the run's --cache-dir {cache_dir} is not used, as {reason}")
    return None


def say_what_is_read(data_dir: str | None, options: dict) -> None:
    """Say which paths that the run has recorded are read."""
    recorded = [data_dir, options["image_root"], options["test_csv"]]
    paths = [path for path in recorded if path is not None]
    if paths:
        say(f"note: reading {', '.join(paths)}, as the run did; --data-dir takes other data")


def load_digits() -> Dataset:
    """The bundled digits; digits.md says where they come from and how they were split."""
    with np.load(os.path.join(HERE, "digits.npz")) as arrays:
        return Dataset(name="digits", classes=list("0123456789"), **arrays)


def generate_linear(seed: int) -> Dataset:
    """The tensor tutorial's 20 + 20 rows: features uniform in 0..1, and a linear function."""
    rng = np.random.default_rng(seed)
    weights = np.array(LINEAR_WEIGHTS, np.float32)

    features = rng.random((2 * LINEAR_ROWS, len(weights)), dtype=np.float32)  # [rows, features]
    targets = features @ weights[:, None] + np.float32(LINEAR_BIAS)  # [rows, 1]

    return Dataset(
        name="linear",
        classes=["y"],
        train_images=features[:LINEAR_ROWS],
        train_labels=targets[:LINEAR_ROWS],
        test_images=features[LINEAR_ROWS:],
        test_labels=targets[LINEAR_ROWS:],
        task=REGRESSION.name,
    )
