"""The networks of Threestep, one registry of them, and `Deployable`: the module that is exported.

    build("mynet", channels=3, classes=10, image_size=(32, 32))     a network: logits [batch, classes]
    Deployable(network, image_size=(32, 32), mean=[...], std=[...])  uint8 images in, probabilities out

A network takes normalised float32 images [batch, channels, height, width] of one size. Deployable adds what
every program that runs the file would otherwise have to repeat: resizing, scaling, normalising, softmax.
Names outside the registry are those of torchvision's classification networks.
"""

import contextlib
import difflib
import functools
import itertools
import math

import torch
import torch.nn.functional as F
from torch import nn


class Network(nn.Module):
    """What training asks of a network; torchvision's networks have the values given here.

    options: the command-line options it takes. min_size: the smallest image side in pixels. bf16: whether it
    gains from bf16. memory_format: of its weights while it is trained. max_batch_pixels: in a batch that fits
    into a laptop's memory; None for any. middle: the layers that `Familiarity` looks at; None for a choice by
    their order, empty for the input itself.
    """

    options = ()
    min_size = 1
    middle = None
    bf16 = True
    memory_format = torch.channels_last
    max_batch_pixels = None

    def prepare(self, images: torch.Tensor) -> None:
        """Initialise from normalised training images [n, channels, H, W]; nothing by default."""


class MLP(Network):
    """Fully connected network over the flattened pixels, ReLU between the layers.

    `hidden=(128,)` on 28x28 grey images is the 784-128-10 of the MNIST tutorials, `hidden=(512, 512)` the
    784-512-512-10 of PyTorch's own quickstart on Fashion-MNIST.
    """

    options = ("hidden", "dropout")
    middle = ()
    bf16 = False

    def __init__(self, channels, classes, image_size, hidden=(128,), dropout=0.0):
        super().__init__()
        sizes = [channels * math.prod(image_size), *hidden]
        layers = [nn.Flatten()]
        for n_in, n_out in itertools.pairwise(sizes):
            layers += [nn.Linear(n_in, n_out), nn.ReLU(), nn.Dropout(dropout)]
        self.layers = nn.Sequential(*layers, nn.Linear(sizes[-1], classes))

    def forward(self, x):
        return self.layers(x)


class MyNet(Network):
    """The CIFAR-10 tutorial's network: conv-bn-pool-relu of 6, 12 and 24 channels, then 192-96-classes."""

    options = ("dropout",)
    middle = ("blocks.3", "blocks.7", "blocks.11")
    min_size = 8  # three poolings by two
    memory_format = torch.contiguous_format  # channels-last is 4 times slower with 6 and 12 channels

    def __init__(self, channels, classes, image_size, dropout=0.1):
        super().__init__()
        blocks = []
        for n_in, n_out in ((channels, 6), (6, 12), (12, 24)):
            # The tutorial has ReLU before the pooling: the same numbers from four times the work.
            conv = nn.Conv2d(n_in, n_out, 3, padding=1)
            blocks += [conv, nn.BatchNorm2d(n_out), nn.MaxPool2d(2), nn.ReLU()]
        self.blocks = nn.Sequential(*blocks)
        features = 24 * math.prod(side // 8 for side in image_size)
        layers = [nn.Flatten(), nn.Dropout(dropout), nn.Linear(features, 192), nn.ReLU()]
        self.head = nn.Sequential(*layers, nn.Linear(192, 96), nn.ReLU(), nn.Linear(96, classes))

    def forward(self, x):
        return self.head(self.blocks(x.contiguous()))


class Linear(MLP):
    """One linear layer: the tensor tutorial's regression, or softmax regression on the pixels."""

    options = ()

    def __init__(self, channels, classes, image_size):
        super().__init__(channels, classes, image_size, hidden=())


def conv_bn_relu(n_in, n_out, stride):
    """3x3 convolution without bias, batch norm, ReLU."""
    conv = nn.Conv2d(n_in, n_out, 3, stride, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(n_out), nn.ReLU())


class Residual(nn.Module):
    """Two conv-bn-relu of unchanged shape, added to their input (He et al. 2015)."""

    def __init__(self, channels):
        super().__init__()
        self.body = nn.Sequential(conv_bn_relu(channels, channels, 1), conv_bn_relu(channels, channels, 1))

    def forward(self, x):
        return x + self.body(x)


class ResBlock(Network):
    """The MNIST tutorial's network: stride-2 conv-bn-relu of 8, 16, 32, 16 and `classes` channels.

    A residual block follows each of the first three. 28x28 shrinks to 1x1; larger images are averaged there.
    """

    middle = ("body.1", "body.3", "body.5")
    bf16 = False

    def __init__(self, channels, classes, image_size):
        super().__init__()
        self.body = nn.Sequential(
            *(conv_bn_relu(channels, 8, 2), Residual(8)),
            *(conv_bn_relu(8, 16, 2), Residual(16)),
            *(conv_bn_relu(16, 32, 2), Residual(32)),
            conv_bn_relu(32, 16, 2),
            conv_bn_relu(16, classes, 2),
        )

    def forward(self, x):
        return self.body(x).mean((2, 3))


class Airbench(Network):
    """Keller Jordan's airbench94 ("94% on CIFAR-10 in 3.29 Seconds on a Single GPU", 2024), for 28x28 and up.

    A frozen 2x2 whitening convolution, three groups of conv-pool-bn-gelu-conv-bn-gelu with 64, 256, 256
    channels (times `width`), a global max and one linear layer.
    """

    options = ("width",)
    channels = (64, 256, 256)
    middle = ("groups.0",)
    min_size = 28
    max_batch_pixels = 640_000

    def __init__(self, channels, classes, image_size, width=1.0):
        super().__init__()
        widths = [max(8, round(n * width / 8) * 8) for n in self.channels]
        n_in = 8 * channels  # 2x2 patches have 4 * channels directions; each is taken with both signs
        self.whitening = nn.Conv2d(channels, n_in, 2)
        groups = [self._group(*ends) for ends in itertools.pairwise([n_in, *widths])]
        self.groups = nn.Sequential(*groups)
        self.head = nn.Linear(widths[-1], classes, bias=False)
        self.whitening.weight.requires_grad = False

    @staticmethod
    def _group(n_in, n_out):
        convs = [nn.Conv2d(n, n_out, 3, padding=1, bias=False) for n in (n_in, n_out)]
        norms = [nn.BatchNorm2d(n_out, momentum=0.2) for _ in convs]  # few steps: forget quickly
        for conv, norm in zip(convs, norms, strict=True):
            nn.init.dirac_(conv.weight[: conv.in_channels])  # the identity on as many channels as there are
            norm.weight.requires_grad = False  # the scale is free: another convolution follows
        return nn.Sequential(convs[0], nn.MaxPool2d(2), norms[0], nn.GELU(), convs[1], norms[1], nn.GELU())

    @torch.no_grad()
    def prepare(self, images: torch.Tensor, eps: float = 0.1) -> None:
        """Set the whitening layer from the 2x2 patches of normalised training images [n, channels, H, W].

        Its filters are the eigenvectors of the patches' covariance at unit variance, each with both signs.
        eps: what a camera's noise adds to each variance; with less, directions that hardly vary in the
        training images would be amplified until noise is all that the network sees.
        """
        total = count = products = 0
        for part in images.split(100):  # all at once took more memory than training does
            patches = F.unfold(part, 2).transpose(1, 2).flatten(0, 1)  # [n * positions, 4 * channels]
            patches = patches.double()
            count += len(patches)
            total = total + patches.sum(0)
            products = products + patches.T @ patches
        mean = total / count
        covariance = products / count - mean.outer(mean)
        values, vectors = torch.linalg.eigh(covariance)
        filters = (vectors / (values + eps).sqrt()).T.reshape(-1, *self.whitening.weight.shape[1:])
        self.whitening.weight.copy_(torch.cat([filters, -filters]))
        self.whitening.bias.zero_()

    def forward(self, x):
        x = self.groups(F.gelu(self.whitening(x)))
        return self.head(x.amax((2, 3)) / 5.4)  # small at first, so that the filters learn before the head


class Tiny(Airbench):
    """Airbench of 32, 48 and 48 channels, whose 93,000 weights take 93 KB in int8, for microcontrollers."""

    options = ()
    channels = (32, 48, 48)


MODELS = {network.__name__.lower(): network for network in (Airbench, Linear, MLP, MyNet, ResBlock, Tiny)}


def traits(name: str) -> type[Network]:
    """What training asks of the network of this name: its class, or Network itself for torchvision's."""
    return MODELS.get(name, Network)


def options_of(name: str) -> tuple[str, ...]:
    """The build options that the network of this name takes. Raises ValueError for an unknown name."""
    if name in MODELS:
        return MODELS[name].options
    from torchvision import models

    names = models.list_models(module=models)
    if name not in names:
        near = difflib.get_close_matches(name, [*MODELS, *names], 1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(MODELS)}, and torchvision's."
        raise ValueError(f"unknown model {name!r}; {hint} (--list-models shows all)")
    return ()


def build(name: str, *, channels: int, classes: int, image_size: tuple[int, int], **options) -> nn.Module:
    """A freshly initialised network by its registry or torchvision name.

    channels: 1 or more; classes: 2 or more, or 1 for regression; image_size: (height, width) in pixels.
    `options` holds only what `options_of` lists, None being the default. Raises ValueError, with a sentence
    for the user, on anything it cannot build.
    """
    known, options = options_of(name), {k: v for k, v in options.items() if v is not None}
    unknown = [f"--{option}" for option in options if option not in known]
    if unknown:
        raise ValueError(f"{name} has no option {', '.join(unknown)} (--list-models names those it has)")
    (height, width), need = image_size, traits(name).min_size
    way_out = "give a larger --image-size (images are resized to it) or another --model"
    if min(image_size) < need:
        raise ValueError(f"{name} needs images of at least {need}x{need}, not {height}x{width}; {way_out}")
    if name in MODELS:
        return MODELS[name](channels, classes, tuple(image_size), **options)
    try:
        return build_torchvision(name, channels, classes, height, width)
    except (RuntimeError, AssertionError, ValueError) as error:
        reason = str(error).split("\n")[0]
        raise ValueError(f"{name} cannot take {height}x{width} images ({reason}); {way_out}") from None


def build_torchvision(name: str, channels: int, classes: int, height: int, width: int) -> nn.Module:
    """torchvision's network with the right head and first convolution, tried on one blank batch."""
    from torchvision import models

    extra = {"aux_logits": False, "init_weights": True} if name in ("googlenet", "inception_v3") else {}
    if name.startswith("vit_"):
        extra["image_size"] = height
    network = models.get_model(name, weights=None, num_classes=classes, **extra)
    if channels != 3:
        path, conv = next((p, m) for p, m in network.named_modules() if isinstance(m, nn.Conv2d))
        names = ("out_channels", "kernel_size", "stride", "padding", "dilation", "groups")
        settings = {name: getattr(conv, name) for name in names}
        network.set_submodule(path, nn.Conv2d(channels, bias=conv.bias is not None, **settings))
    with torch.no_grad():
        network.eval()(torch.zeros(1, channels, height, width))
    return network.train()


MOST_STATISTICS = 320  # of more channels, every second, third, ... is taken


class Familiarity(nn.Module):
    """How familiar the kind of an image is: the share of held-out images that look less familiar, 0 to 1.

    The score of an image is -log of the squared Mahalanobis distance of its `statistics` from one Gaussian of
    the training images (Lee et al. 2018, without classes), and more the larger its largest logit is, up to a
    limit. weight [d, d], bias [d]: to whitened statistics. logit: the factor, offset and limit of the logit's
    part. table [n]: the scores of held-out images, sorted. layers: see `middle_layers`.
    """

    def __init__(self, state: dict[str, torch.Tensor], layers=()):
        super().__init__()
        self.layers = tuple(layers)
        for name in ("weight", "bias", "logit", "table"):
            self.register_buffer(name, state[name].float().contiguous())

    def forward(self, statistics, logits):
        """`known`, float32 [batch], from statistics [batch, d] and logits [batch, classes]."""
        whitened = torch.addmm(self.bias, statistics, self.weight)
        factor, offset, limit = self.logit.unbind()
        best = logits.amax(1, keepdim=True) * factor + offset  # of two dimensions, as OpenCV 4 cannot add one
        score = torch.minimum(best, limit) - (whitened * whitened).sum(1, keepdim=True).log()
        return (self.table < score).float().mean(1)


@contextlib.contextmanager
def watched(network: nn.Module, layers):
    """Within this block, collect in a list (name, output) of each of these layers that runs."""
    seen = []
    with contextlib.ExitStack() as hooks:
        for name in layers:
            see = functools.partial(lambda name, layer, inputs, output: seen.append((name, output)), name)
            hooks.enter_context(network.get_submodule(name).register_forward_hook(see))
        yield seen


def middle_layers(network: nn.Module, channels: int, image_size: tuple[int, int]) -> tuple[str, ...]:
    """The layers whose channels give a network's `statistics`; none for its input.

    A network of ours names them. Torchvision's consist of blocks in sequence: of those that give maps, the
    one after a third of the blocks is taken.
    """
    if getattr(network, "middle", None) is not None:
        return network.middle
    sequences = [(p, m) for p, m in network.named_modules() if isinstance(m, nn.Sequential) or not p]
    blocks = [f"{path}.{name}".lstrip(".") for path, m in sequences for name, _ in m.named_children()]
    with watched(network, blocks) as reached, torch.inference_mode():
        network.eval()(torch.zeros(1, channels, *image_size, device=next(network.parameters()).device))
    maps = [name for name, out in reached if isinstance(out, torch.Tensor) and out.dim() > 2]
    return (maps[len(maps) // 3],) if maps else ()


def run_with_statistics(network: nn.Module, images: torch.Tensor, layers: tuple[str, ...]):
    """Logits [batch, classes] of normalised images [batch, C, H, W], and their statistics [batch, d].

    Those are each channel's mean and deviation after `layers`; without layers, the brightness and the
    roughness of the image in 4x4 parts.
    """
    parts = []
    with watched(network, layers) as found:
        logits = network(images)
    for _, maps in found:  # [batch, channels, h, w]; a transformer's tokens [batch, n, channels]
        places = (2, 3) if maps.dim() == 4 else (1,)
        means = maps.mean(places, keepdim=True)
        parts += [means.flatten(1), (maps - means).square().mean(places).sqrt()]
    if not layers:
        rough = (images - F.avg_pool2d(images, 3, 1, 1)).abs()
        parts = [F.adaptive_avg_pool2d(maps, 4).flatten(1) for maps in (images, rough)]
    statistics = torch.cat(parts, 1)
    return logits, statistics[:, :: -(-statistics.shape[1] // MOST_STATISTICS)]


class Deployable(nn.Module):
    """What is exported: resize, scale, normalise, network, softmax, and how familiar the image looks.

    uint8 images [batch, height, width, channels] of any size, or uint8 or float32 ones of image_size only
    without `any_size`, -> float32 probabilities [batch, classes] and, with a `familiarity`, `known` [batch].
    image_size: (height, width) the network wants; mean, std: one number a channel, of pixels scaled to 0..1.
    temperature: what the logits are divided by (Guo et al. 2017).
    """

    def __init__(self, network, image_size, mean, std, fit="stretch", temperature=1.0, familiarity=None):
        super().__init__()
        self.network, self.image_size, self.fit, self.any_size = network, tuple(image_size), fit, True
        self.temperature, self.familiarity = temperature, familiarity
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(1, -1, 1, 1))

    def normalise(self, image):
        """Pixels 0..255 [batch, H, W, C] of the network's size -> normalised float32 [batch, C, H, W]."""
        return (image.float().permute(0, 3, 1, 2) / 255 - self.mean) / self.std

    def calibrated(self, logits):
        """Probabilities [batch, classes]. A temperature of 1 leaves no trace in the graph."""
        return (logits if self.temperature == 1 else logits * (1 / self.temperature)).softmax(1)

    def forward(self, image):
        image = self.normalise(resize(image, self.image_size, self.fit) if self.any_size else image)
        if self.familiarity is None:
            return self.calibrated(self.network(image))
        logits, statistics = run_with_statistics(self.network, image, self.familiarity.layers)
        return self.calibrated(logits), self.familiarity(statistics, logits)


class Regressor(Deployable):
    """What is exported for regression: float32 features [batch, n] -> float32 predictions [batch, 1]."""

    def normalise(self, features):
        return (features - self.mean.flatten()) / self.std.flatten()

    def forward(self, features):
        return self.network(self.normalise(features))


BANDS = 6  # of output rows, so that a photo to stretch is never whole in memory as floats


def resize(image: torch.Tensor, image_size: tuple[int, int], fit: str = "stretch") -> torch.Tensor:
    """uint8 [batch, H, W, C] -> float32 [batch, *image_size, C], bilinear with antialias, not rounded.

    As Pillow resizes, by two matrix products, which all engines compute alike. fit: "stretch"; "crop" keeps
    the shape and the middle, "letterbox" the shape and all of the image, between black bars. To stretch,
    a band needs only the input rows from `start` to `end`, linear in H because exporters take no more.
    """
    (n, H, W, C), (h, w) = image.shape, image_size
    rows, columns = (torch.arange(side, dtype=torch.int32, device=image.device)[-1:] + 1 for side in (H, W))
    factors = (rows, h), (columns, w)  # input pixels to output pixels, as fractions
    if fit != "stretch":
        common, choose = math.gcd(h, w), torch.minimum if fit == "crop" else torch.maximum
        factors = ((choose(rows * (w // common), columns * (h // common)), h * w // common),) * 2
    down, image, parts = triangle_filter(h, H, *factors[0]), image.reshape(n, H, W * C), []
    bands = min(BANDS, h) if fit == "stretch" else 1
    margin = -(-h // (3 * bands))
    for top, bottom in itertools.pairwise(h * band // bands for band in range(bands + 1)):
        start = (H - 1) * max(top - margin, 0) // h
        end = H - (H - 1) * max(h - bottom - margin, 0) // h
        parts.append(down[top:bottom, start:end] @ image[:, start:end].float())
    resized = torch.cat(parts, 1).reshape(n * h, W, C)
    return (triangle_filter(w, W, *factors[1]) @ resized).reshape(n, h, w, C)


def triangle_filter(n_out: int, n_in: int, above: torch.Tensor, below: int) -> torch.Tensor:
    """float32 [n_out, n_in]: the weights of `above` / `below` times fewer pixels around the same centre.

    Each row adds up to 1, or to 0 beyond the input. Coordinates are doubled, and so are whole numbers.
    """
    source = 2 * torch.arange(n_in, dtype=torch.int32, device=above.device) + (1 - n_in)
    target = 2 * torch.arange(n_out, dtype=torch.int32, device=above.device)[:, None] + (1 - n_out)
    distances = (target * above - source * below).float().abs()
    weights = (1 - distances / (2 * above).float().clamp(min=2 * below)).clamp(min=0)
    return weights / weights.sum(1, keepdim=True).clamp(min=1e-6)
