"""Your own images: listed, decoded, and checked to be enough to train on and to test on."""

import numpy as np

from data.cache import load_images
from data.dataset import Dataset
from data.files import Options, hold_out_test
from data.folders import list_folder
from data.tables import list_csv
from step3_infer import Problem


def load_own(name: str, data_dir: str, options: Options) -> Dataset:
    """Load `folder` or `csv`. Raises Problem."""
    listing = list_folder(data_dir) if name == "folder" else list_csv(data_dir, options)
    if "test" not in listing.splits:
        listing = hold_out_test(listing, data_dir)
    paths = [path for files in listing.splits.values() for path in files.paths]
    images, readable = load_images(paths, data_dir, options)
    arrays, kept_before, listed_before = {}, 0, 0
    for split, files in listing.splits.items():
        kept = readable[listed_before : listed_before + len(files)]
        count = int(kept.sum())
        arrays[f"{split}_images"] = images[kept_before : kept_before + count]
        arrays[f"{split}_labels"] = files.labels[kept]
        kept_before, listed_before = kept_before + count, listed_before + len(files)
    counts = np.bincount(arrays["train_labels"], minlength=len(listing.classes))
    if counts.min() == 0:
        raise Problem(f"class {listing.classes[counts.argmin()]!r} of {data_dir} has no readable image left")
    if not len(arrays["test_labels"]):
        raise Problem(f"the test split of {data_dir} has no readable image left")
    return Dataset(name, listing.classes, **arrays)
