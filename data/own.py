"""Your own images: listed, decoded, and checked to be enough to train on and to test on."""

import numpy as np

from data.cache import load_images
from data.dataset import Dataset
from data.files import TEST_FRACTION, Options, hold_out_test, name_some
from data.folders import list_folder
from data.notes import note
from data.tables import list_csv
from inference.errors import Problem

FEW = 5  # training images of a class, below which step1 says so


def load_own(name: str, data_dir: str, options: Options) -> Dataset:
    """Load `folder` or `csv`. Raises Problem."""
    classes, listed = list_folder(data_dir) if name == "folder" else list_csv(data_dir, options)
    held_out = "test" not in listed
    if held_out:
        listed = hold_out_test(listed, data_dir)
    paths = [path for files in listed.values() for path in files.paths]
    kept, pixels, sizes, white = load_images(paths, len(listed["train"]), data_dir, options)
    arrays, splits, fingerprint = {}, {}, {"classes": classes}
    for split, files in listed.items():
        part = splits[split] = files.part(kept[: len(files)])
        fingerprint[split] = part.fingerprint(sizes[: len(part)])
        arrays |= {f"{split}_images": pixels[: len(part)], f"{split}_labels": part.labels}
        kept, pixels, sizes = kept[len(files) :], pixels[len(part) :], sizes[len(part) :]
    check_splits(data_dir, classes, listed, splits, held_out)
    paths = {split: files.paths for split, files in splits.items()}
    return Dataset(name, classes, **arrays, white=white, fingerprint=fingerprint, paths=paths)


def check_splits(data_dir: str, names: list[str], listed: dict, splits: dict, held_out: bool) -> None:
    """Say how the readable images, `splits`, were split. Raises Problem if some are missing altogether."""
    train, test = (np.bincount(splits[k].labels, minlength=len(names)) for k in ("train", "test"))
    if train.min() == 0:
        label = train.argmin()
        were = (listed["train"].labels == label).sum()
        name = f"class {names[label]!r} of {data_dir}"
        raise Problem(f"{name} has no readable image left to train on, of {were} listed")
    for split, files in splits.items():
        if not len(files):
            were = len(listed[split])
            raise Problem(f"the {split} split of {data_dir} has no readable image left, of {were} listed")
    if held_out:
        reason = "no test split given"
        if "val" in splits:
            reason = f"{data_dir} has a validation split, which chooses the epoch, but no test split"
        share = f"{test.sum():,} of {test.sum() + train.sum():,} training images held out for it"
        note(f"{reason}: {share}, {TEST_FRACTION:.0%} of each class (at least one)")
    few = [f"{name!r} {n} (and {m})" for name, n, m in zip(names, train, test, strict=True) if n < FEW]
    if few:
        note(f"few images to train on (and to test on): {name_some(few)}")
