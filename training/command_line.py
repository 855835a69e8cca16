"""What step1's command line needs besides its parser: types of its options, and lists of names; no torch."""

import argparse
import glob
import importlib.util
import os
import re
import textwrap

import data
from step3_infer import Problem

NETWORKS = {  # model.MODELS, described for --list-models
    "airbench": "the default, after airbench94 (2024); --width scales its channels",
    "linear": "one linear layer, the default for --dataset linear",
    "mlp": "fully connected: --hidden sizes (default 128), --dropout",
    "mynet": "the CIFAR tutorial's small convolutional network; --dropout (0.1)",
    "resblock": "the MNIST tutorial's residual network of stride-2 convolutions",
}


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
    minutes = re.fullmatch(r"(\d{1,6}(\.\d+)?)m", text)
    if minutes and float(minutes[1]) > 0:
        return text
    if re.fullmatch(r"[1-9]\d{0,8}", text):
        return int(text)
    message = f"{text!r} is neither a number of steps such as 500 nor of minutes such as 10m"
    raise argparse.ArgumentTypeError(message)


def list_names(args: argparse.Namespace) -> int:
    """Print what --list-datasets and --list-models ask for, and return the exit code."""
    if args.list_datasets:
        for name, about in data.DATASETS.items():
            print(f"{name:14} {about}")
    if args.list_models:
        for name, about in NETWORKS.items():
            print(f"{name:14} {about}")
        print(textwrap.fill("and torchvision's: " + " ".join(torchvision_names()), 79))
    return 0


def torchvision_names() -> list[str]:
    """The names of torchvision's classification networks, read from its source without importing it."""
    spec = importlib.util.find_spec("torchvision")
    if spec is None:
        raise Problem("torchvision is not installed: pip install -r requirements.txt")
    names = []
    for path in glob.glob(os.path.join(os.path.dirname(spec.origin), "models", "*.py")):
        with open(path, encoding="utf-8") as file:
            names += re.findall(r"^@register_model\(\)\n(?:@.*\n)*def (\w+)\(", file.read(), re.MULTILINE)
    return sorted(names)
