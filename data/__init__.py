"""Datasets, all of one shape: `load(name, data_dir)` -> Dataset.

`digits` lies in this folder; the named image sets are torchvision's own, downloaded on first use to --data-dir (this
folder by default, where git ignores them); `folder` and `csv` are one's own images; `linear` is made up here.
"""

import contextlib
import difflib
import http.client
import math
import os
import struct
import sys
import tarfile
from dataclasses import dataclass

import numpy as np

from data import cache, files
from data.files import stratified  # noqa: F401  step1 has these from here
from data.split import AUGMENTATIONS, make_split, seed_of  # noqa: F401
from step3_infer import Parser, Problem, guarded, say  # noqa: F401  step1, which must not need step3, has them from here

HERE = os.path.dirname(os.path.abspath(__file__))


@dataclass(frozen=True)
class Dataset:
    """Images as uint8 [N, height, width, channels], labels as int64 [N] indexing `classes`.

    For task "regression": features as float32 [N, n] in the images' place, targets as float32 [N, 1] in the labels',
    and `classes` names the target.
    """

    name: str
    classes: list
    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    task: str = "classification"


DATASETS = {
    "digits": "UCI handwritten digits, 8x8 grey, 1,437 + 360, bundled",
    "mnist": "MNIST handwritten digits, 28x28 grey, 60,000 + 10,000",
    "fashion-mnist": "Fashion-MNIST clothes, 28x28 grey, 60,000 + 10,000",
    "kmnist": "Kuzushiji-MNIST cursive Japanese, 28x28 grey, 60,000 + 10,000",
    "cifar10": "CIFAR-10 photos, 32x32 colour, 10 classes, 50,000 + 10,000",
    "cifar100": "CIFAR-100 photos, 32x32 colour, 100 classes, 50,000 + 10,000",
    "folder": "your images: --data-dir DIR with DIR/[train|test/]<class>/*",
    "csv": "your images: --data-dir FILE.csv, a path and a label a row",
    "linear": "the tensor tutorial's regression, 5 features, 20 + 20 rows",
}
LINEAR_WEIGHTS, LINEAR_BIAS = (0.3, 4.0, 0.2, 2.5, 18.0), 17.0
TORCHVISION = {
    "mnist": "MNIST",
    "fashion-mnist": "FashionMNIST",
    "kmnist": "KMNIST",
    "cifar10": "CIFAR10",
    "cifar100": "CIFAR100",
}


def load(
    name,
    data_dir=None,
    *,
    image_size=None,
    channels=None,
    usual_size=64,
    resize=None,
    strict=False,
    cache_dir=None,
    image_root=None,
    test_csv=None,
    image_column=None,
    label_column=None,
    seed=0,
):
    """Load a dataset by its name. Raises Problem.

    data_dir: where torchvision's files lie or go, the folder's directory, or the CSV file. The rest concerns folder
    and csv: image_size (height, width) and channels, derived from the images where None; usual_size where those
    disagree or are large; resize, the graph's own; what is left are the command line's options of these names.
    seed: of `linear`'s random draw.
    """
    if name not in DATASETS:
        near = difflib.get_close_matches(name, DATASETS, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(DATASETS)}."
        raise Problem(f"unknown dataset {name!r}; {hint} (--list-datasets shows all)", 2)
    if name in TORCHVISION:
        return load_torchvision(name, data_dir or HERE)
    if name in ("digits", "linear"):
        return load_digits() if name == "digits" else make_linear(seed)
    if data_dir is None:
        raise Problem(f"--dataset {name} needs --data-dir: {DATASETS[name]}", 2)
    if name == "folder":
        classes, *splits = files.list_folder(data_dir)
    else:
        classes, *splits = files.list_csv(data_dir, test_csv, image_root, image_column, label_column)
    (train_paths, train_labels), (test_paths, test_labels) = splits
    paths, labels = train_paths + test_paths, np.concatenate([train_labels, test_labels])
    images, kept = cache.load_images(
        paths, data_dir, cache_dir, image_size, channels, usual_size, resize, strict
    )
    labels, at = labels[kept], int(kept[: len(train_paths)].sum())
    counts = np.bincount(labels[:at], minlength=len(classes))
    if counts.min() == 0 or at == len(labels):
        which = f"class {classes[counts.argmin()]!r}" if counts.min() == 0 else "the test split"
        raise Problem(f"{which} of {data_dir} has no readable image left")
    return Dataset(name, classes, images[:at], labels[:at], images[at:], labels[at:])


def make_linear(seed):
    """The tensor tutorial's rows, 20 to train on and 20 to test on: x uniform in 0..1, y an exact linear function."""
    rng = np.random.default_rng(seed)
    features = rng.random((40, 5), dtype=np.float32)
    targets = features @ np.array(LINEAR_WEIGHTS, np.float32)[:, None] + np.float32(LINEAR_BIAS)
    return Dataset("linear", ["y"], features[:20], targets[:20], features[20:], targets[20:], "regression")


def load_digits():
    """The bundled digits; digits.md says where they come from and how they were split."""
    with np.load(os.path.join(HERE, "digits.npz")) as arrays:
        return Dataset(name="digits", classes=[str(digit) for digit in range(10)], **arrays)


def load_torchvision(name, data_dir):
    """One of torchvision's own datasets, downloaded to `data_dir` unless it is there. Raises Problem."""
    import torchvision  # here, because it takes a second that the bundled digits need not pay

    cls = getattr(torchvision.datasets, TORCHVISION[name])
    archives, place = report_damage(cls, data_dir)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            splits = [cls(data_dir, train=train, download=True) for train in (True, False)]
    except (OSError, RuntimeError, EOFError, http.client.HTTPException, tarfile.TarError) as error:
        reason = (
            getattr(error, "reason", None) or getattr(error, "strerror", None) or str(error).splitlines()[-1]
        )
        raise Problem(
            f"cannot get {name} ({reason}): put {', '.join(archives)} into {place}, "
            f"or run again with a network, or use --dataset digits, which needs none"
        ) from None
    arrays = {}
    for split, part in zip(("train", "test"), splits, strict=True):
        images = np.asarray(part.data)
        arrays[f"{split}_images"] = images.reshape(*images.shape[:3], -1)
        arrays[f"{split}_labels"] = np.asarray(part.targets, dtype=np.int64)
    classes = [text.split(" - ")[0] for text in splits[0].classes]  # MNIST's are "0 - zero", "1 - one", ...
    return Dataset(name=name, classes=classes, **arrays)


def report_damage(cls, data_dir):
    """Say which files of an earlier download are damaged, so that torchvision fetches them again.

    It checks archives by their md5, but takes any unpacked MNIST file that exists: a damaged one is put aside here.
    -> (names of the archives, the directory where they belong).
    """
    from torchvision.datasets.utils import check_integrity

    if hasattr(cls, "resources"):  # the MNIST family: four gzip files beside their unpacked selves
        place, archives = os.path.join(data_dir, cls.__name__, "raw"), dict(cls.resources)
    else:
        place, archives = data_dir, {cls.filename: cls.tgz_md5}
    for archive, md5 in archives.items():
        path = os.path.join(place, archive)
        if os.path.isfile(path) and not check_integrity(path, md5):
            say(f"{path} is incomplete or corrupt: downloading it again")
        unpacked = path.removesuffix(".gz")
        if unpacked != path and os.path.isfile(unpacked) and not is_whole_idx(unpacked):
            os.replace(unpacked, unpacked + ".damaged")
            say(f"{unpacked} is incomplete or corrupt: put aside as {unpacked}.damaged and unpacked again")
    return list(archives), place


def is_whole_idx(path):
    """Is the file as long as its IDX header says? (Two zero bytes, type, rank, big-endian sizes, then uint8 data.)"""
    with open(path, "rb") as file:
        magic = file.read(4)
        sizes = file.read(4 * magic[3]) if len(magic) == 4 and magic[:3] == b"\0\0\x08" else b""
    if not sizes or len(sizes) != 4 * magic[3]:
        return False
    shape = struct.unpack(f">{magic[3]}I", sizes)
    return os.path.getsize(path) == 4 + len(sizes) + math.prod(shape)


def mean_and_std(images):
    """Per channel mean and standard deviation of uint8 [N, H, W, C] scaled to 0..1, exact and in little memory."""
    levels = np.arange(256)
    means, stds = [], []
    for channel in range(images.shape[3]):
        counts = np.zeros(256, dtype=np.int64)
        for start in range(0, len(images), 1024):
            counts += np.bincount(images[start : start + 1024, ..., channel].ravel(), minlength=256)
        mean = (counts * levels).sum() / counts.sum()
        std = math.sqrt((counts * (levels - mean) ** 2).sum() / counts.sum())
        means.append(float(mean / 255))
        stds.append(std / 255 or 1.0)  # a constant channel has nothing to scale
    return means, stds
