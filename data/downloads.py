"""torchvision's datasets: downloaded on first use, and downloaded again if their files are damaged."""

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


def load_torchvision(name: str, data_dir: str) -> Dataset:
    """One of torchvision's datasets, downloaded to `data_dir` unless it is there. Raises Problem."""
    import torchvision  # here, because the import takes a second that the bundled digits need not pay

    cls = getattr(torchvision.datasets, {"fashion-mnist": "FashionMNIST"}.get(name, name.upper()))
    archives, directory = set_damaged_aside(cls, data_dir)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            splits = [cls(data_dir, train=train, download=True) for train in (True, False)]
    except (OSError, RuntimeError, EOFError, http.client.HTTPException, tarfile.TarError) as error:
        reason = getattr(error, "reason", None) or getattr(error, "strerror", None)
        failure = f"cannot get {name} ({reason or str(error).splitlines()[-1]})"
        others = "or run again with a network, or use --dataset digits, which needs none"
        raise Problem(f"{failure}: put {', '.join(archives)} into {directory}, {others}") from None
    arrays = {}
    for split, part in zip(("train", "test"), splits, strict=True):
        images = np.asarray(part.data)
        arrays[f"{split}_images"] = images.reshape(*images.shape[:3], -1)  # grey images get a channel axis
        arrays[f"{split}_labels"] = np.asarray(part.targets, dtype=np.int64)
    classes = [text.split(" - ")[0] for text in splits[0].classes]  # MNIST's are "0 - zero", "1 - one", ...
    return Dataset(name=name, classes=classes, **arrays)


def set_damaged_aside(cls: type, data_dir: str) -> tuple[list[str], str]:
    """Report the damaged files of an earlier download, so that torchvision fetches them again.

    torchvision checks archives by their MD5, but accepts any unpacked MNIST file that exists, so a damaged
    one is renamed here. Returns the names of the archives and the directory where they belong.
    """
    from torchvision.datasets.utils import check_integrity

    if hasattr(cls, "resources"):  # the MNIST family: four gzip files beside what was unpacked from them
        directory, archives = os.path.join(data_dir, cls.__name__, "raw"), dict(cls.resources)
    else:
        directory, archives = data_dir, {cls.filename: cls.tgz_md5}
    for archive, md5 in archives.items():
        path = os.path.join(directory, archive)
        if os.path.isfile(path) and not check_integrity(path, md5):
            note(f"{path} is incomplete or corrupt: downloading it again")
        unpacked = path.removesuffix(".gz")
        if unpacked != path and os.path.isfile(unpacked) and not is_whole_idx(unpacked):
            os.replace(unpacked, unpacked + ".damaged")
            note(f"{unpacked} is incomplete or corrupt: renamed to {unpacked}.damaged and unpacked again")
    return list(archives), directory


def is_whole_idx(path: str) -> bool:
    """Is it as long as its IDX header says: two zeros, the type (8: uint8), the rank, big-endian sizes?"""
    magic, *shape = np.fromfile(path, ">u4", 256).tolist() or [0]
    rank = magic - 0x800
    return 0 < rank <= len(shape) and os.path.getsize(path) == 4 + 4 * rank + math.prod(shape[:rank])
