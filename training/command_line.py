"""What step1's command line needs besides its parser: types of its options, and lists of names; no torch."""

import argparse
import math
import re

import data

NETWORKS = {  # model.MODELS, described for --list-models
    "airbench": "the default, after airbench94 (2024); --width scales its channels",
    "linear": "one linear layer, the default for --dataset linear",
    "mlp": "fully connected: --hidden sizes (default 128), --dropout",
    "mynet": "the CIFAR tutorial's small convolutional network; --dropout (0.1)",
    "tiny": "93 KB in int8, for microcontrollers: airbench with few channels",
    "resblock": "the MNIST tutorial's residual network of stride-2 convolutions",
}
# What --list-models calls the time of one image on one core, by multiply-adds.
LATENCIES = ((20e6, "tiny"), (400e6, "small"), (3e9, "medium"), (math.inf, "large"))


def image_size(text: str) -> tuple[int, int]:
    """An argparse type: '32' or '48x64' as (height, width)."""
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", text)
    size = match and (int(match[1]), int(match[2] or match[1]))
    if not size or not 1 <= min(size) <= max(size) <= 4096:
        wanted = "a size such as 32 or 48x64 (height x width, 1 to 4096)"
        raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")
    return size


def checkpoint_interval(text: str) -> int | str:
    """An argparse type: '500' as a number of steps, or '10m', minutes, as it is."""
    match = re.fullmatch(r"([1-9]\d{0,8})|(\d{1,6}(?:\.\d+)?)m", text)
    if not match or (match[2] and float(match[2]) == 0):
        message = f"{text!r} is neither a number of steps such as 500 nor of minutes such as 10m"
        raise argparse.ArgumentTypeError(message)
    return int(text) if match[1] else text


def list_names(args: argparse.Namespace) -> int:
    """Print what --list-datasets and --list-models ask for, and return the exit code."""
    if args.list_datasets:
        for name, about in data.DATASETS.items():
            print(f"{name:14} {about}")
    if args.list_models:
        list_models()
    return 0


def list_models() -> None:
    """Print what a network is chosen by: ours are built, and torchvision describes its own."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    from torchvision import models

    import model

    rows = []
    for name in NETWORKS:
        network = model.build(name, channels=3, classes=10, image_size=(32, 32)).eval()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            network(torch.zeros(1, 3, 32, 32))
        parameters = sum(p.numel() for p in network.parameters())
        rows.append((name, parameters, counter.get_total_flops() / 2, 32, ""))
    for name in models.list_models(module=models):
        weights = models.get_model_weights(name).DEFAULT
        accuracy = f"{weights.meta['_metrics']['ImageNet-1K']['acc@1']:.1f} %"
        size = weights.transforms().crop_size[0]
        rows.append((name, weights.meta["num_params"], weights.meta["_ops"] * 1e9, size, accuracy))
    print("network            parameters  multiply-adds   pixels  time    --pretrained")
    for name, parameters, operations, size, accuracy in sorted(rows, key=lambda row: row[2]):
        latency = next(word for most, word in LATENCIES if operations < most)
        sizes = f"{parameters / 1e6:8.2f} M  {operations / 1e6:11,.1f} M  {size:4}^2"
        print(f"{name:19}{sizes}  {latency:6}  {accuracy}".rstrip())
    print("\n--pretrained: top-1 on ImageNet of torchvision's weights. Threestep's own:")
    for name, about in NETWORKS.items():
        print(f"{name:10} {about}")
