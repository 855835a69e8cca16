"""The sets of images that bench_honest.py trains on, made of MNIST, CIFAR-10 and the digits.

A set's number decides all of it, so that two runs make the same sets.
"""

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

import data

KINDS = ("random", "shifted", "long-tailed", "re-split")
SOURCES = ("mnist", "cifar10", "digits")
LAYOUTS = ("folder", "csv")
MODELS = ("mlp", "mynet", "tiny", "resblock", "airbench")
FEWEST, MOST = 100, 5000  # images of a set
RAREST = 20  # times fewer images than the most frequent class of a long-tailed split
DARKER, NOISE = 0.8, 8  # of the shifted test split: factor, and deviation in grey levels
IMAGES_SEEN = 6_000  # in training, over all epochs
QUALITY = 95  # of JPEG


@dataclass(frozen=True)
class Recipe:
    """What a set is made of, and the network that is trained on it."""

    number: int
    kind: str
    source: str
    layout: str
    classes: int
    images: int  # of both splits
    model: str
    epochs: int
    int8: bool


def recipe(number: int) -> Recipe:
    """The set of this number. Every kind meets every source and layout."""
    rng = np.random.default_rng(number)
    source = SOURCES[number // len(KINDS) % len(SOURCES)]
    most = 1700 if source == "digits" else MOST
    images = int(np.exp(rng.uniform(np.log(FEWEST), np.log(most))))
    return Recipe(
        number=number,
        kind=KINDS[number % len(KINDS)],
        source=source,
        layout=LAYOUTS[number // len(KINDS) // len(SOURCES) % len(LAYOUTS)],
        classes=int(rng.integers(2, 11)),
        images=images,
        model=MODELS[number % len(MODELS)],
        epochs=int(np.clip(IMAGES_SEEN // images, 2, 30)),
        int8=number % 3 == 0,
    )


class Pool:
    """All images of a source by class."""

    def __init__(self, source: str, datasets: Path):
        self.read = None
        if source == "cifar10":
            self.by_class = files_by_class(datasets / "cifar10" / "train")
            self.read = read_file
            return

        place = None if source == "digits" else str(datasets)
        dataset = data.load(source, place)
        images = np.concatenate([dataset.train_images, dataset.test_images])
        labels = np.concatenate([dataset.train_labels, dataset.test_labels])
        self.by_class = {name: images[labels == k] for k, name in enumerate(dataset.classes)}

    def image(self, name: str, number: int) -> np.ndarray:
        """uint8 [H, W] or [H, W, 3]."""
        found = self.by_class[name][number]
        return self.read(found) if self.read else found.squeeze()


def files_by_class(folder: Path) -> dict[str, list[Path]]:
    return {place.name: sorted(place.iterdir()) for place in sorted(folder.iterdir())}


def read_file(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


# ------------------------------------------------------------------------------------------- making
def write_set(chosen: Recipe, pool: Pool, place: Path) -> Path:
    """Write the images of a set below `place`; returns what --data-dir takes."""
    rng = np.random.default_rng(1000 + chosen.number)
    names = rng.choice(sorted(pool.by_class), chosen.classes, replace=False)

    rows = []
    for rank, name in enumerate(names):
        available = rng.permutation(len(pool.by_class[name]))
        train, test = counts(chosen, rank)
        for index, number in enumerate(available[: train + test]):
            split = "train" if index < train else "test"
            image = pool.image(name, number)
            if split == "test" and chosen.kind == "shifted":
                noise = rng.normal(0, NOISE, image.shape)
                image = np.clip(image * DARKER + noise, 0, 255).astype(np.uint8)
            rows.append((write_image(image, chosen, place, split, name, index), name, split))

    if chosen.layout == "folder":
        return place
    rng.shuffle(rows)
    return write_list(rows, chosen, place)


def counts(chosen: Recipe, rank: int) -> tuple[int, int]:
    """How many training and test images the class of this rank has."""
    each = max(chosen.images // chosen.classes, 8)
    test = max(each // 5, 2)
    train = each - test
    if chosen.kind == "long-tailed":
        share = RAREST ** (-rank / max(chosen.classes - 1, 1))
        train = max(round(train * share), 4)
    return train, test


def write_image(
    image: np.ndarray, chosen: Recipe, place: Path, split: str, name: str, index: int
) -> str:
    """Write an image where the layout has it; returns its path below `place`."""
    suffix = "jpg" if chosen.source == "cifar10" else "png"
    file = f"{name}-{split}-{index}.{suffix}"
    if chosen.layout == "csv":
        path = Path("images", file)
    elif chosen.kind == "re-split":  # step1 splits them
        path = Path(name, file)
    else:
        path = Path(split, name, file)

    (place / path).parent.mkdir(parents=True, exist_ok=True)
    options = {"quality": QUALITY} if suffix == "jpg" else {}
    Image.fromarray(image).save(place / path, **options)
    return path.as_posix()


def write_list(rows: list[tuple[str, str, str]], chosen: Recipe, place: Path) -> Path:
    """The CSV file of a set; step1 splits one without the column `split`."""
    columns = 2 if chosen.kind == "re-split" else 3
    with open(place / "list.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("image", "label", "split")[:columns])
        writer.writerows(row[:columns] for row in rows)
    return place / "list.csv"
