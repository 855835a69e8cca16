"""Datasets of one common form: `load(name, data_dir)` returns a `Dataset`.

`digits` is bundled with this package. The named image sets are torchvision's, downloaded on first use to
--data-dir (by default this folder, where git ignores them). `folder` and `csv` read your own images, and
`linear` is generated.
"""

import difflib
import os

import numpy as np

from data.dataset import Dataset, differences, mean_and_std, refuse_changes, with_fingerprint  # noqa: F401
from inference.errors import Problem

HERE = os.path.dirname(os.path.abspath(__file__))
# What augment.gather applies.
AUGMENTATIONS = ("flip", "translate", "crop", "rotate", "blur", "color", "noise", "cutout")
# The options of `load` that the command line of step1 has, besides the dataset, --data-dir and --image-size.
OPTIONS = ("strict", "cache_dir", "image_root", "test_csv", "image_column", "label_column", "seed")
DATASETS = {
    "digits": "UCI handwritten digits, 8x8 grey, 1,437 + 360, bundled",
    "mnist": "MNIST handwritten digits, 28x28 grey, 60,000 + 10,000",
    "fashion-mnist": "Fashion-MNIST clothes, 28x28 grey, 60,000 + 10,000",
    "kmnist": "Kuzushiji-MNIST cursive Japanese, 28x28 grey, 60,000 + 10,000",
    "cifar10": "CIFAR-10 photos, 32x32 colour, 10 classes, 50,000 + 10,000",
    "cifar100": "CIFAR-100 photos, 32x32 colour, 100 classes, 50,000 + 10,000",
    "folder": "your images: --data-dir DIR with DIR/[train|val|test/]<class>/*",
    "csv": "your images: --data-dir FILE.csv, a path and a label a row",
    "linear": "the tensor tutorial's regression, 5 features, 20 + 20 rows",
}
LINEAR_WEIGHTS, LINEAR_BIAS = (0.3, 4.0, 0.2, 2.5, 18.0), 17.0


def load(name: str, data_dir: str | None = None, *, seed: int = 0, **options) -> Dataset:
    """Load a dataset by its name. Raises Problem.

    data_dir: where torchvision's files are or will go, the directory of `folder`, or the file of `csv`.
    seed: of the random rows of `linear`. options: fields of `files.Options`, used by folder and csv only.
    """
    if name not in DATASETS:
        near = difflib.get_close_matches(name, DATASETS, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(DATASETS)}."
        raise Problem(f"unknown dataset {name!r}; {hint} (--list-datasets shows all)", 2)
    if name == "digits":
        with np.load(os.path.join(HERE, "digits.npz")) as arrays:  # digits.md says how they were split
            return with_fingerprint(Dataset(name, list("0123456789"), **arrays))
    if name == "linear":
        return with_fingerprint(generate_linear(seed))
    # What the other datasets need is imported here: `--help` imports this package, too.
    if name not in ("folder", "csv"):
        from data.downloads import load_torchvision

        return with_fingerprint(load_torchvision(name, data_dir or HERE))
    if data_dir is None:
        raise Problem(f"--dataset {name} needs --data-dir: {DATASETS[name]}", 2)
    from data.files import Options
    from data.own import load_own

    return load_own(name, data_dir, Options(**options))


def guess(data_dir: str) -> str | None:
    """The dataset that --data-dir alone names: "csv" for a CSV file, "folder" for class folders, or None."""
    if os.path.isfile(data_dir):
        return "csv" if data_dir.lower().endswith((".csv", ".tsv")) else None
    from data.folders import has_classes

    return "folder" if os.path.isdir(data_dir) and has_classes(data_dir) else None


def load_for(spec: dict, data_dir: str | None, resize) -> Dataset:
    """Load the dataset of a run's spec as step1 loaded it, or from another `data_dir`. Raises Problem."""
    arguments, images = spec["arguments"], spec["task"] == "classification"
    options = {name: arguments[name] for name in OPTIONS}
    options["image_size"] = tuple(spec["image_size"]) if images else None
    options |= {"channels": spec["channels"], "white": spec.get("white", 65535)}
    options |= {"resize": resize, "fit": spec.get("fit") or "stretch"}
    return load(spec["dataset"], data_dir or arguments["data_dir"], **options)


def generate_linear(seed: int) -> Dataset:
    """The tensor tutorial's 20 + 20 rows: features uniform in 0..1, and an exact linear function of them."""
    rng = np.random.default_rng(seed)
    features = rng.random((40, 5), dtype=np.float32)
    targets = features @ np.array(LINEAR_WEIGHTS, np.float32)[:, None] + np.float32(LINEAR_BIAS)
    return Dataset("linear", ["y"], features[:20], targets[:20], features[20:], targets[20:], "regression")
