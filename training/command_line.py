"""What step1's command line needs besides its parser: types of its options, and lists of names.

Nothing here loads torch before it is needed.
"""

import argparse
import math
import re
from typing import NamedTuple

import data

NETWORKS = {  # model.MODELS, described for --list-models
    "airbench": "the default, after airbench94 (2024); --width scales its channels",
    "linear": "one linear layer, the default for --dataset linear",
    "mlp": "fully connected: --hidden sizes (default 128), --dropout",
    "mynet": "the CIFAR tutorial's small convolutional network; --dropout (0.1)",
    "tiny": "93 KB in int8, for microcontrollers: airbench with few channels",
    "resblock": "the MNIST tutorial's residual network of stride-2 convolutions",
}
# What --list-models calls the time of one image on one core: below so many multiply-adds, this
# word.
LATENCIES = ((20e6, "tiny"), (400e6, "small"), (3e9, "medium"), (math.inf, "large"))
LARGEST_SIDE = 4096  # pixels


# --------------------------------------------------------------------------------- types of options
def image_size(text: str) -> tuple[int, int]:
    """An argparse type: '32' or '48x64' as (height, width)."""
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", text)
    if match:
        height = int(match[1])
        width = int(match[2] or height)
        if min(height, width) >= 1 and max(height, width) <= LARGEST_SIDE:
            return height, width

    wanted = f"a size such as 32 or 48x64 (height x width, 1 to {LARGEST_SIDE})"
    raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")


def checkpoint_interval(text: str) -> int | str:
    """An argparse type: '500' as a number of steps; '10m', minutes, stays text."""
    steps = re.fullmatch(r"[1-9]\d{0,8}", text)
    if steps:
        return int(text)

    minutes = re.fullmatch(r"(\d{1,6}(?:\.\d+)?)m", text)
    if minutes and float(minutes[1]) > 0:
        return text

    message = f"{text!r} is neither a number of steps such as 500 nor of minutes such as 10m"
    raise argparse.ArgumentTypeError(message)


# ----------------------------------------------------------------------------------- lists of names
def list_names(args: argparse.Namespace) -> int:
    """Print what --list-datasets and --list-models ask for, and return the exit code."""
    if args.list_datasets:
        for name, about in data.DATASETS.items():
            print(f"{name:14} {about}")
    if args.list_models:
        list_models()
    return 0


class Row(NamedTuple):
    """What --list-models says of a network.

    image_side: in pixels. accuracy: text, empty if it is not known.
    """

    name: str
    parameters: int
    multiply_adds: float
    image_side: int
    accuracy: str


def list_models() -> None:
    """Print what a network is chosen by, the fastest ones first."""
    rows = rows_of_our_networks() + rows_of_torchvision()
    rows.sort(key=lambda row: row.multiply_adds)

    print("network            parameters  multiply-adds   pixels  time    --pretrained")
    for row in rows:
        parameters = f"{row.parameters / 1e6:8.2f} M"
        multiply_adds = f"{row.multiply_adds / 1e6:11,.1f} M"
        size = f"{row.image_side:4}^2"
        latency = latency_of(row.multiply_adds)
        line = f"{row.name:19}{parameters}  {multiply_adds}  {size}  {latency:6}  {row.accuracy}"
        print(line.rstrip())

    print("\n--pretrained: top-1 on ImageNet of torchvision's weights. Threestep's own:")
    for name, about in NETWORKS.items():
        print(f"{name:10} {about}")


def rows_of_our_networks() -> list[Row]:
    """Our networks for ten classes of 32x32 colour images: they are built and counted."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    import model

    rows = []
    for name in NETWORKS:
        network = model.build(name, channels=3, classes=10, image_size=(32, 32)).eval()
        # A multiply-add counts as two operations.
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            network(torch.zeros(1, 3, 32, 32))
        row = Row(
            name=name,
            parameters=sum(parameter.numel() for parameter in network.parameters()),
            multiply_adds=counter.get_total_flops() / 2,
            image_side=32,
            accuracy="",
        )
        rows.append(row)
    return rows


def rows_of_torchvision() -> list[Row]:
    """torchvision's networks, as torchvision describes its default weights."""
    from torchvision import models

    rows = []
    for name in models.list_models(module=models):
        weights = models.get_model_weights(name).DEFAULT
        accuracy = weights.meta["_metrics"]["ImageNet-1K"]["acc@1"]
        row = Row(
            name=name,
            parameters=weights.meta["num_params"],
            multiply_adds=weights.meta["_ops"] * 1e9,
            image_side=weights.transforms().crop_size[0],
            accuracy=f"{accuracy:.1f} %",
        )
        rows.append(row)
    return rows


def latency_of(multiply_adds: float) -> str:
    """The word for the time that so many multiply-adds take."""
    for limit, word in LATENCIES:
        if multiply_adds < limit:
            return word
    raise ValueError(f"{multiply_adds} is no number of multiply-adds")
