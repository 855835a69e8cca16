"""What --list-datasets and --list-models print.

Nothing here loads torch before it is needed.
"""

import argparse
import fnmatch
import math
from typing import NamedTuple

import data
from data.notes import note
from inference.errors import Problem

NETWORKS = {  # model.MODELS, described for --list-models
    "airbench": "the default, after airbench94 (2024); --width scales its channels",
    "linear": "one linear layer, the default for --dataset linear",
    "mlp": "fully connected: --hidden sizes (default 128), --dropout",
    "mynet": "the CIFAR tutorial's small convolutional network; --dropout (0.1)",
    "tiny": "93 KB in int8, for microcontrollers: a small airbench; --activation",
    "resblock": "the MNIST tutorial's residual network of stride-2 convolutions",
}
# What --list-models calls the time of one image on one core: below so many multiply-adds, this
# word.
LATENCIES = ((20e6, "tiny"), (400e6, "small"), (3e9, "medium"), (math.inf, "large"))
MOST_COUNTED = 40  # networks of timm; building and counting one takes a third of a second


def list_names(args: argparse.Namespace) -> int:
    """Print what --list-datasets and --list-models ask for, and return the exit code.

    Raises Problem.
    """
    if args.list_datasets:
        for name, about in data.DATASETS.items():
            print(f"{name:14} {about}")
    if args.list_models is not None:
        list_models(args.list_models)
    return 0


class Row(NamedTuple):
    """What --list-models says of a network.

    parameters, multiply_adds, image_side in pixels: None if they were not counted. weights: what is
    known of the weights for --pretrained; empty if there are none.
    """

    name: str
    parameters: int | None
    multiply_adds: float | None
    image_side: int | None
    weights: str


def list_models(pattern: str) -> None:
    """Print what a network is chosen by, the fastest ones first. Raises Problem.

    pattern: of the names to list, as a shell has them; all but timm's if it is empty.
    """
    if pattern.startswith("timm/"):
        print_rows(rows_of_timm(pattern))
        print("\n--pretrained: the name of timm's weights")
        return

    ours = rows_of_our_networks(pattern or "*")
    rows = ours + rows_of_torchvision(pattern or "*")
    if not rows:
        reason = f"no network of Threestep or torchvision matches {pattern!r}"
        raise Problem(f"{reason}; those of timm begin with timm/, as in 'timm/*lite*'", 2)
    print_rows(rows)

    print("\n--pretrained: top-1 on ImageNet of torchvision's weights.", end="")
    print(" Threestep's own:" if ours else "")
    for row in ours:
        print(f"{row.name:10} {NETWORKS[row.name]}")
    if not pattern:
        print("\ntimm has some 1,300 networks more: --list-models 'timm/*lite*' lists by pattern")


def print_rows(rows: list[Row]) -> None:
    """Print a table, the fastest networks first and those that were not counted last."""
    width = max(18, *(len(row.name) for row in rows))
    print(f"{'network':{width}} parameters  multiply-adds   pixels  time    --pretrained")
    for row in sorted(rows, key=lambda row: row.multiply_adds or math.inf):
        if row.multiply_adds is None:
            figures = " " * 42
        else:
            parameters = f"{row.parameters / 1e6:8.2f} M"
            multiply_adds = f"{row.multiply_adds / 1e6:11,.1f} M"
            size = f"{row.image_side:4}^2"
            figures = f"{parameters}  {multiply_adds}  {size}  {latency_of(row.multiply_adds):6}"
        print(f"{row.name:{width}} {figures}  {row.weights}".rstrip())


def rows_of_our_networks(pattern: str) -> list[Row]:
    """Our networks for ten classes of 32x32 colour images: they are built and counted."""
    import model

    rows = []
    for name in fnmatch.filter(NETWORKS, pattern):
        network = model.build(name, channels=3, classes=10, image_size=(32, 32))
        rows.append(counted_row(name, network, (32, 32), weights=""))
    return rows


def rows_of_torchvision(pattern: str) -> list[Row]:
    """torchvision's networks, as torchvision describes its default weights."""
    from torchvision import models

    rows = []
    for name in fnmatch.filter(models.list_models(module=models), pattern):
        weights = models.get_model_weights(name).DEFAULT
        accuracy = weights.meta["_metrics"]["ImageNet-1K"]["acc@1"]
        row = Row(
            name=name,
            parameters=weights.meta["num_params"],
            multiply_adds=weights.meta["_ops"] * 1e9,
            image_side=weights.transforms().crop_size[0],
            weights=f"{accuracy:.1f} %",
        )
        rows.append(row)
    return rows


def rows_of_timm(pattern: str) -> list[Row]:
    """timm's networks of ImageNet's classes, of which the first MOST_COUNTED are built and counted.

    Raises Problem.
    """
    import model

    try:
        timm = model.import_timm()
    except model.PackageMissing as error:
        raise Problem(error, 2) from None
    names = fnmatch.filter(timm.list_models(), pattern.removeprefix(model.TIMM))
    if not names:
        hint = "" if "*" in pattern else ": without '*', it is a whole name"
        raise Problem(f"no network of timm matches {pattern!r}{hint}; try 'timm/*lite*'", 2)

    rows = [row_of_timm(timm, name) for name in names[:MOST_COUNTED]]
    for name in names[MOST_COUNTED:]:
        rows.append(Row(model.TIMM + name, None, None, None, weights_in_timm(timm, name)))
    if len(names) > MOST_COUNTED:
        counted = f"counted the first {MOST_COUNTED} of {len(names):,} networks"
        note(f"{counted}; a narrower pattern counts all of its own")
    return rows


def row_of_timm(timm, name: str) -> Row:
    """A network of timm at the size of its weights; not counted if timm cannot build it so."""
    import torch

    weights = weights_in_timm(timm, name)
    config = timm.get_pretrained_cfg(name)
    image_size = config.input_size[1:]
    try:
        # On the meta device, neither weights nor maps take memory or time.
        with torch.device("meta"):
            return counted_row(f"timm/{name}", timm.create_model(name), image_size, weights)
    except Exception:  # each architecture fails in its own way
        return Row(f"timm/{name}", None, None, None, weights)


def weights_in_timm(timm, name: str) -> str:
    """The tag of a network's default weights; empty if there are none."""
    config = timm.get_pretrained_cfg(name)
    if config is None or not (config.hf_hub_id or config.url):
        return ""
    return config.tag or "yes"


def counted_row(name: str, network, image_size: tuple[int, int], weights: str) -> Row:
    """A network, its parameters, and its multiply-adds for one colour image [height, width]."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    network.eval()
    # A multiply-add counts as two operations.
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.zeros(1, 3, *image_size))
    return Row(
        name=name,
        parameters=sum(parameter.numel() for parameter in network.parameters()),
        multiply_adds=counter.get_total_flops() / 2,
        image_side=image_size[0],
        weights=weights,
    )


def latency_of(multiply_adds: float) -> str:
    """The word for the time that so many multiply-adds take."""
    for limit, word in LATENCIES:
        if multiply_adds < limit:
            return word
    raise ValueError(f"{multiply_adds} is no number of multiply-adds")
