"""ResNet-8, which `tiny` is measured beside, trained and exported by step1 and step2. Run by hand.

    python tests/benchmarks/resnet8.py step1_train.py --model resnet8 --dataset cifar10
    python tests/benchmarks/resnet8.py step2_export.py --format tflite-micro

It is the network of MLPerf Tiny's image classification (Banbury et al. 2021): a convolution of 16
channels, then one residual block each of 16, 32 and 64 channels. It is no network of step1's own:
this program adds it to the registry, with tiny's recipe, and runs the step with what follows.
"""

import runpy
import sys
from pathlib import Path

from torch import nn

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

import model  # noqa: E402
from training import recipes  # noqa: E402

NAME = "resnet8"


class Block(nn.Module):
    """Two 3x3 convolutions with batch norm, added to their input, or to a 1x1 convolution of it."""

    def __init__(self, n_in: int, n_out: int, stride: int):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(n_in, n_out, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(n_out),
            nn.ReLU(),
            nn.Conv2d(n_out, n_out, 3, padding=1, bias=False),
            nn.BatchNorm2d(n_out),
        )
        self.shortcut = nn.Identity()
        if n_in != n_out:
            self.shortcut = nn.Sequential(
                nn.Conv2d(n_in, n_out, 1, stride, bias=False),
                nn.BatchNorm2d(n_out),
            )
        self.activation = nn.ReLU()

    def forward(self, x):
        return self.activation(self.body(x) + self.shortcut(x))


class ResNet8(model.Network):
    """Images [n, channels, H, W] to logits [n, classes]."""

    middle = ("blocks.1",)
    min_size = 8

    def __init__(self, channels, classes, image_size):
        super().__init__()
        self.stem = model.conv_bn_relu(channels, 16, 1)
        self.blocks = nn.Sequential(Block(16, 16, 1), Block(16, 32, 2), Block(32, 64, 2))
        self.head = nn.Linear(64, classes)

    def forward(self, x):
        x = self.blocks(self.stem(x))  # [n, 64, h, w]
        return self.head(x.mean((2, 3)))


def register() -> None:
    """Make the network known to step1 and step2, with tiny's recipe as far as it has options."""
    model.MODELS[NAME] = ResNet8
    for key in [key for key in recipes.RECIPES if key.split()[0] == "tiny"]:
        recipe = dict(recipes.RECIPES[key])
        recipe.pop("activation", None)
        recipes.RECIPES[key.replace("tiny", NAME)] = recipe


def main() -> None:
    if len(sys.argv) < 2 or not (ROOT / sys.argv[1]).is_file():
        sys.exit("error: the first argument is step1_train.py or step2_export.py")
    register()
    program = str(ROOT / sys.argv[1])
    sys.argv = [program, *sys.argv[2:]]
    runpy.run_path(program, run_name="__main__")


if __name__ == "__main__":
    main()
