"""torchvision's datasets: downloaded on first use, and again if their files are damaged."""

import contextlib
import http.client
import math
import os
import sys
import tarfile

import numpy as np

from data.dataset import Dataset
from data.notes import note
from inference.errors import Problem

# torchvision's classes have the names of the datasets in capitals, but for this one.
CLASS_NAMES = {"fashion-mnist": "FashionMNIST"}

# Every way that torchvision fails without a network, without a directory, or on damaged files.
FAILURES = (
    OSError,
    RuntimeError,
    EOFError,
    ValueError,
    AssertionError,
    http.client.HTTPException,
    tarfile.TarError,
)

# An IDX file begins with a big-endian number: 8, the code of uint8, and the number of dimensions.
IDX_MAGIC = 0x800
MOST_DIMENSIONS = 255


def load_torchvision(name: str, data_dir: str, download: bool = True) -> Dataset:
    """One of torchvision's datasets, downloaded to `data_dir` if needed and allowed.

    Raises Problem.
    """
    # Here, because the import takes a second that the bundled digits need not pay.
    import torchvision

    cls = getattr(torchvision.datasets, CLASS_NAMES.get(name, name.upper()))
    directory, archives = locate_archives(cls, data_dir)
    way_out = "or run again with a network, or use --dataset digits, which needs none"
    if download:
        set_damaged_aside(directory, archives)
    else:
        way_out = f"or give --data-dir {data_dir} to have them downloaded there"

    try:
        with contextlib.redirect_stdout(sys.stderr):
            train = cls(data_dir, train=True, download=download)
            test = cls(data_dir, train=False, download=download)
    except FAILURES as error:
        raise Problem(
            f"cannot get {name} ({reason_of(error)}): put {', '.join(archives)} into {directory}, "
            f"{way_out}"
        ) from None

    train_images, train_labels = to_arrays(train)
    test_images, test_labels = to_arrays(test)
    return Dataset(
        name=name,
        # MNIST's are "0 - zero", "1 - one" and so on.
        classes=[text.split(" - ")[0] for text in train.classes],
        train_images=train_images,
        train_labels=train_labels,
        test_images=test_images,
        test_labels=test_labels,
    )


def reason_of(error: Exception) -> str:
    """Why a download failed, in the system's words if there are any, else in a single line."""
    reason = getattr(error, "reason", None) or getattr(error, "strerror", None)
    lines = str(error).splitlines() or [type(error).__name__]
    return reason or lines[-1]


def to_arrays(split) -> tuple[np.ndarray, np.ndarray]:
    """The images, uint8 [N, H, W, C], and the labels, int64 [N], of a torchvision dataset."""
    images = np.asarray(split.data)
    images = images.reshape(*images.shape[:3], -1)  # grey images get a channel axis
    labels = np.asarray(split.targets, dtype=np.int64)
    return images, labels


def locate_archives(cls: type, data_dir: str) -> tuple[str, dict[str, str]]:
    """The directory where the archives of a dataset belong, and their MD5 sums by name."""
    if hasattr(cls, "resources"):  # the MNIST family: four gzip files beside what they unpack to
        return os.path.join(data_dir, cls.__name__, "raw"), dict(cls.resources)
    return data_dir, {cls.filename: cls.tgz_md5}


def set_damaged_aside(directory: str, archives: dict[str, str]) -> None:
    """Report the damaged files of an earlier download, so that torchvision fetches them again.

    torchvision checks archives by their MD5, but accepts any unpacked MNIST file that exists, so a
    damaged one is renamed here.
    """
    from torchvision.datasets.utils import check_integrity

    for archive, md5 in archives.items():
        path = os.path.join(directory, archive)
        if os.path.isfile(path) and not check_integrity(path, md5):
            note(f"{path} is incomplete or corrupt: downloading it again")

        is_compressed = path.endswith(".gz")
        unpacked = path.removesuffix(".gz")
        if is_compressed and os.path.isfile(unpacked) and not is_whole_idx(unpacked):
            aside = unpacked + ".damaged"
            os.replace(unpacked, aside)
            note(f"{unpacked} is incomplete or corrupt: renamed to {aside} and unpacked again")


def is_whole_idx(path: str) -> bool:
    """Is an IDX file of uint8 as long as its header says?

    The header is the magic number and the size of each dimension, 4 bytes each.
    """
    words = np.fromfile(path, ">u4", 1 + MOST_DIMENSIONS).tolist()
    if not words:
        return False

    dimensions = words[0] - IDX_MAGIC
    sizes = words[1 : 1 + dimensions]
    if dimensions <= 0 or len(sizes) < dimensions:
        return False

    header = 4 * (1 + dimensions)
    return os.path.getsize(path) == header + math.prod(sizes)
