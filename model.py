"""The networks of Threestep, one registry of them, and `Deployable`: the module that is exported.

    build("mynet", channels=3, classes=10, image_size=(32, 32))      gives logits [batch, classes]
    Deployable(network, image_size=(32, 32), mean=[...], std=[...])  uint8 images in, probabilities

A network takes normalised float32 images [batch, channels, height, width] of one size. Deployable
adds what every program that runs the file would otherwise have to repeat: resizing, scaling,
normalising, softmax. Names outside the registry are those of torchvision's classification networks,
and `timm/NAME` those of timm, which is optional.
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
    """What training asks of a network; torchvision's and timm's have the values given here.

    A network of the registry overrides those in which it differs.
    """

    options = ()  # the command-line options that it takes
    min_size = 1  # the smallest image side in pixels
    side_multiple = 32  # of the sides of a rectangle: poolings and strides then leave no edge out
    middle = None  # layers that Familiarity looks at; None: by their order, empty: the input itself
    bf16 = True  # whether it gains from bf16
    memory_format = torch.channels_last  # of its weights while it is trained
    max_batch_pixels = None  # in a batch that fits into a laptop's memory; None: any number

    def prepare(self, images: torch.Tensor) -> None:
        """Initialise from normalised training images [n, channels, H, W]; nothing by default."""


class MLP(Network):
    """Fully connected network over the flattened pixels, ReLU between the layers.

    `hidden=(128,)` on 28x28 grey images is the 784-128-10 of the MNIST tutorials,
    `hidden=(512, 512)` the 784-512-512-10 of PyTorch's own quickstart on Fashion-MNIST.
    """

    options = ("hidden", "dropout")
    middle = ()
    side_multiple = 8
    bf16 = False

    def __init__(self, channels, classes, image_size, hidden=(128,), dropout=0.0):
        super().__init__()
        sizes = [channels * math.prod(image_size), *hidden]

        layers = [nn.Flatten()]
        for n_in, n_out in itertools.pairwise(sizes):
            layers.append(nn.Linear(n_in, n_out))
            layers.append(nn.ReLU())
            layers.append(nn.Dropout(dropout))
        layers.append(nn.Linear(sizes[-1], classes))
        self.layers = nn.Sequential(*layers)

    def forward(self, x):
        return self.layers(x)


class MyNet(Network):
    """The CIFAR-10 tutorial's network.

    conv-bn-pool-relu of 6, 12 and 24 channels, then linear layers of 192, 96 and `classes`.
    """

    options = ("dropout",)
    middle = ("blocks.3", "blocks.7", "blocks.11")
    min_size = 8  # three poolings by two
    side_multiple = 8
    memory_format = (
        torch.contiguous_format
    )  # channels-last is 4 times slower with 6 and 12 channels

    def __init__(self, channels, classes, image_size, dropout=0.1):
        super().__init__()
        blocks = []
        for n_in, n_out in ((channels, 6), (6, 12), (12, 24)):
            # The tutorial has ReLU before the pooling: the same numbers from four times the work.
            blocks.append(nn.Conv2d(n_in, n_out, 3, padding=1))
            blocks.append(nn.BatchNorm2d(n_out))
            blocks.append(nn.MaxPool2d(2))
            blocks.append(nn.ReLU())
        self.blocks = nn.Sequential(*blocks)

        height, width = image_size
        self.head = nn.Sequential(
            nn.Flatten(),
            nn.Dropout(dropout),
            nn.Linear(24 * (height // 8) * (width // 8), 192),
            nn.ReLU(),
            nn.Linear(192, 96),
            nn.ReLU(),
            nn.Linear(96, classes),
        )

    def forward(self, x):
        return self.head(self.blocks(x.contiguous()))


class Linear(MLP):
    """One linear layer: the tensor tutorial's regression, or softmax regression on the pixels."""

    options = ()

    def __init__(self, channels, classes, image_size):
        super().__init__(channels, classes, image_size, hidden=())


def conv_bn_relu(n_in, n_out, stride):
    """3x3 convolution without bias, batch norm, ReLU."""
    return nn.Sequential(
        nn.Conv2d(n_in, n_out, 3, stride, padding=1, bias=False),
        nn.BatchNorm2d(n_out),
        nn.ReLU(),
    )


class Residual(nn.Module):
    """Two conv-bn-relu of unchanged shape, added to their input (He et al. 2015)."""

    def __init__(self, channels):
        super().__init__()
        self.body = nn.Sequential(
            conv_bn_relu(channels, channels, 1),
            conv_bn_relu(channels, channels, 1),
        )

    def forward(self, x):
        return x + self.body(x)


class ResBlock(Network):
    """The MNIST tutorial's network: stride-2 conv-bn-relu of 8, 16, 32, 16 and `classes` channels.

    A residual block follows each of the first three. 28x28 shrinks to 1x1; what is left of larger
    images is averaged.
    """

    middle = ("body.1", "body.3", "body.5")
    side_multiple = 8
    bf16 = False

    def __init__(self, channels, classes, image_size):
        super().__init__()
        self.body = nn.Sequential(
            conv_bn_relu(channels, 8, 2),
            Residual(8),
            conv_bn_relu(8, 16, 2),
            Residual(16),
            conv_bn_relu(16, 32, 2),
            Residual(32),
            conv_bn_relu(32, 16, 2),
            conv_bn_relu(16, classes, 2),
        )

    def forward(self, x):
        x = self.body(x)  # [batch, classes, h, w]
        return x.mean((2, 3))


def identity_conv(n_in, n_out):
    """3x3 convolution that starts as the identity on as many channels as there are."""
    conv = nn.Conv2d(n_in, n_out, 3, padding=1, bias=False)
    nn.init.dirac_(conv.weight[:n_in])
    return conv


def shifting_norm(channels):
    """Batch norm of constant scale: the next convolution can learn one."""
    norm = nn.BatchNorm2d(channels, momentum=0.2)  # training is short: forget quickly
    norm.weight.requires_grad = False
    return norm


ACTIVATIONS = {"gelu": nn.GELU, "hardswish": nn.Hardswish, "relu": nn.ReLU}


class Airbench(Network):
    """Keller Jordan's airbench94, for 28x28 and up.

    "94% on CIFAR-10 in 3.29 Seconds on a Single GPU", 2024: a frozen 2x2 whitening convolution,
    three groups of conv-pool-bn-gelu-conv-bn-gelu with 64, 256 and 256 channels (times `width`), a
    global max and one linear layer.
    """

    options = ("width",)
    channels = (64, 256, 256)
    middle = ("groups.0",)
    min_size = 28
    side_multiple = 8
    max_batch_pixels = 640_000

    def __init__(self, channels, classes, image_size, width=1.0, activation="gelu"):
        super().__init__()
        # The nearest multiples of 8, at least 8.
        widths = [max(8, round(n * width / 8) * 8) for n in self.channels]

        # 2x2 patches have 4 * channels directions; each is taken with both signs.
        n_directions = 8 * channels
        self.whitening = nn.Conv2d(channels, n_directions, 2)

        groups = []
        for n_in, n_out in itertools.pairwise([n_directions, *widths]):
            groups.append(self._group(n_in, n_out, activation))
        self.groups = nn.Sequential(*groups)
        self.activation = ACTIVATIONS[activation]()
        self.head = nn.Linear(widths[-1], classes, bias=False)

        self.whitening.weight.requires_grad = False

    @staticmethod
    def _group(n_in, n_out, activation):
        return nn.Sequential(
            identity_conv(n_in, n_out),
            nn.MaxPool2d(2),
            shifting_norm(n_out),
            ACTIVATIONS[activation](),
            identity_conv(n_out, n_out),
            shifting_norm(n_out),
            ACTIVATIONS[activation](),
        )

    @torch.no_grad()
    def prepare(self, images: torch.Tensor, eps: float = 0.1) -> None:
        """Set the whitening layer from normalised training images [n, channels, H, W].

        Its filters are the eigenvectors of the covariance of their 2x2 patches, at unit variance,
        each with both signs. eps: what a camera's noise adds to each variance; with less,
        directions that hardly vary in the training images would be amplified until noise is all
        that the network sees.
        """
        count = 0
        total = 0
        products = 0
        for part in images.split(100):  # all at once took more memory than training does
            patches = F.unfold(part, 2)  # [part, 4 * channels, positions]
            patches = patches.transpose(1, 2).flatten(0, 1).double()  # [patches, 4 * channels]
            count += len(patches)
            total = total + patches.sum(0)
            products = products + patches.T @ patches

        mean = total / count
        covariance = products / count - mean.outer(mean)
        values, vectors = torch.linalg.eigh(covariance)

        filters = (
            vectors / (values + eps).sqrt()
        ).T  # [4 * channels, 4 * channels], one in each row
        filters = filters.reshape(-1, *self.whitening.weight.shape[1:])
        self.whitening.weight.copy_(torch.cat([filters, -filters]))
        self.whitening.bias.zero_()

    def forward(self, x):
        x = self.activation(self.whitening(x))
        x = self.groups(x)  # [batch, channels, h, w]
        x = x.amax((2, 3))
        return self.head(x / 5.4)  # small at first, so that the filters learn before the head


class Tiny(Airbench):
    """Airbench of 32, 48 and 48 channels, for microcontrollers: 93,000 weights, 93 KB in int8.

    GELU is what it had before there was a choice; new runs take hard-swish, which runtimes of
    microcontrollers have as one operator.
    """

    options = ("activation",)
    channels = (32, 48, 48)

    def __init__(self, channels, classes, image_size, activation="gelu"):
        super().__init__(channels, classes, image_size, activation=activation)


# ------------------------------------------------------------------------------------- the registry
SQUARES_ONLY = (
    "vit_",
    "maxvit_",
)  # how the names of torchvision's networks begin that take only one

MODELS = {
    "airbench": Airbench,
    "linear": Linear,
    "mlp": MLP,
    "mynet": MyNet,
    "resblock": ResBlock,
    "tiny": Tiny,
}


def traits(name: str) -> type[Network]:
    """What training asks of the network of this name: its class, or Network if it is not ours."""
    return MODELS.get(name, Network)


def takes_rectangles(name: str) -> bool:
    """Does the network of this name take images that are no squares?"""
    return not name.startswith(SQUARES_ONLY)


def options_of(name: str) -> tuple[str, ...]:
    """The build options that the network of this name takes.

    Raises ValueError if there is none, PackageMissing if it is one of timm and timm is missing.
    """
    if name in MODELS:
        return MODELS[name].options
    if is_timm(name):
        check_timm(name)
        return ()

    from torchvision import models  # only now: importing it takes a second

    names = models.list_models(module=models)
    if name in names:
        return ()

    hint = f"known: {', '.join(MODELS)}, torchvision's, and timm's as {TIMM}NAME"
    near = difflib.get_close_matches(name, [*MODELS, *names], 1)
    if is_in_timm(name):
        near = [TIMM + name]
    if near:
        hint = f"did you mean {near[0]!r}?"
    raise ValueError(f"unknown model {name!r}; {hint} (--list-models shows all)")


def build(
    name: str, *, channels: int, classes: int, image_size: tuple[int, int], **options
) -> nn.Module:
    """A freshly initialised network by its registry, torchvision or timm name.

    channels: 1 or more; classes: 2 or more, or 1 for regression; image_size: (height, width) in
    pixels. `options` holds only what `options_of` lists, None being the default. Raises ValueError,
    with a sentence for the user, on anything it cannot build.
    """
    known_options = options_of(name)
    options = {option: value for option, value in options.items() if value is not None}
    unknown = [f"--{option}" for option in options if option not in known_options]
    if unknown:
        raise ValueError(
            f"{name} has no option {', '.join(unknown)} (--list-models names those it has)"
        )

    height, width = image_size
    min_size = traits(name).min_size
    if min(image_size) < min_size:
        needed = f"images of at least {min_size}x{min_size}, not {height}x{width}"
        way_out = "give a larger --image-size (images are resized to it) or another --model"
        raise ValueError(f"{name} needs {needed}; {way_out}")

    if name in MODELS:
        return MODELS[name](channels, classes, tuple(image_size), **options)
    if is_timm(name):
        return build_timm(name, channels, classes, height, width)
    return build_torchvision(name, channels, classes, height, width)


def build_torchvision(name: str, channels: int, classes: int, height: int, width: int) -> nn.Module:
    """torchvision's network with the right head and first convolution, tried on one blank image.

    Raises ValueError.
    """
    from torchvision import models

    extra = {}
    if name in ("googlenet", "inception_v3"):
        extra = {"aux_logits": False, "init_weights": True}
    if name.startswith("vit_"):
        extra["image_size"] = height
    way_out = "give a larger --image-size (images are resized to it) or another --model"
    with fitting(name, height, width, way_out):
        network = models.get_model(name, weights=None, num_classes=classes, **extra)
        if channels != 3:
            replace_first_convolution(network, channels)
        try_on_blank(network, channels, classes, height, width)
    return network


@contextlib.contextmanager
def fitting(name: str, height: int, width: int, way_out: str):
    """Turn what a network fails with in this block into a ValueError that names the image size."""
    try:
        yield
    except Exception as error:  # each architecture fails in its own way
        lines = str(error).strip().splitlines() or [type(error).__name__]
        reason = f"{name} cannot take {height}x{width} images ({lines[0].rstrip(':')})"
        raise ValueError(f"{reason}; {way_out}") from None


def try_on_blank(network: nn.Module, channels: int, classes: int, height: int, width: int) -> None:
    """Run a network on one blank image: a size that it cannot take fails here, before training."""
    with torch.no_grad():
        logits = network.eval()(torch.zeros(1, channels, height, width))
    network.train()

    if not isinstance(logits, torch.Tensor) or logits.shape != (1, classes):
        raise ValueError("it gives no logits of classes")


def replace_first_convolution(network: nn.Module, channels: int) -> None:
    """Replace the first convolution by a like one, freshly initialised, that takes `channels`."""
    for path, layer in network.named_modules():
        if isinstance(layer, nn.Conv2d):
            network.set_submodule(
                path,
                nn.Conv2d(
                    channels,
                    layer.out_channels,
                    kernel_size=layer.kernel_size,
                    stride=layer.stride,
                    padding=layer.padding,
                    dilation=layer.dilation,
                    groups=layer.groups,
                    bias=layer.bias is not None,
                ),
            )
            return


# --------------------------------------------------------------------------------------------- timm
TIMM = "timm/"  # how the names of timm's networks begin here


class PackageMissing(ValueError):
    """A network needs a package that is not installed."""


def is_timm(name: str) -> bool:
    """Does this name ask for a network of timm?"""
    return name.startswith(TIMM)


def import_timm():
    """timm. Raises PackageMissing."""
    try:
        import timm  # only now: it is optional, and importing it takes two seconds
    except ImportError as error:
        reason = f"networks named {TIMM}... need timm ({error}): pip install timm"
        raise PackageMissing(reason) from None
    return timm


def check_timm(name: str) -> None:
    """Raise ValueError unless timm has this network, and the tag of weights in `timm/NAME.TAG`."""
    timm = import_timm()
    architecture, _, tag = name.removeprefix(TIMM).partition(".")
    if timm.is_model(architecture):
        tags = [known.partition(".")[2] for known in timm.list_pretrained(architecture)]
        if not tag or tag in tags:
            return
        near = [f"{architecture}.{known}" for known in tags]
    else:
        near = difflib.get_close_matches(architecture.lower(), timm.list_models(), 3)

    hint = ""
    if near:
        hint = f"; did you mean {' or '.join(repr(TIMM + known) for known in near)}?"
    raise ValueError(f"timm has no network {name!r}{hint} (--list-models '{TIMM}*' lists them)")


def is_in_timm(name: str) -> bool:
    """Has timm a network of this name, given without its prefix? False if timm is missing."""
    try:
        return import_timm().is_model(name)
    except PackageMissing:
        return False


def timm_config(name: str):
    """timm's PretrainedCfg of a network: what its weights were trained with. Raises ValueError."""
    check_timm(name)
    config = import_timm().get_pretrained_cfg(name.removeprefix(TIMM))
    return config or import_timm().models.PretrainedCfg()


def build_timm(
    name: str, channels: int, classes: int, height: int, width: int, **more
) -> nn.Module:
    """timm's network, tried on one blank image. more: for timm's create_model. Raises ValueError.

    Where the input's size is part of the network, as in most transformers, it is built for it.
    """
    config = timm_config(name)
    if config.fixed_input_size:
        more["img_size"] = (height, width)
    usual_height, usual_width = config.input_size[1:]
    way_out = f"its usual size is --image-size {usual_height}x{usual_width}"

    with fitting(name, height, width, way_out):
        network = import_timm().create_model(
            name.removeprefix(TIMM),
            num_classes=classes,
            in_chans=channels,
            exportable=True,  # no layer with a gradient of its own, which exporters do not take
            **more,
        )
        refuse_cut_patches(network, height, width)
        try_on_blank(network, channels, classes, height, width)
    return network


def refuse_cut_patches(network: nn.Module, height: int, width: int) -> None:
    """Raise ValueError if a transformer would leave out the last rows or columns in silence."""
    patches = getattr(getattr(network, "patch_embed", None), "patch_size", None)
    if not isinstance(patches, tuple):
        return
    if height % patches[0] or width % patches[1]:
        raise ValueError(f"its patches of {patches[0]}x{patches[1]} pixels do not fill them")


# -------------------------------------------------------------------------------------- familiarity
MOST_STATISTICS = 320  # of more channels, every second, third, ... is taken
CHANNELS_LAST = ":channels-last"  # after the name of a layer; see middle_layers


class Familiarity(nn.Module):
    """How familiar an image looks, 0 to 1: the share of held-out images that look less familiar.

    The score of an image is -log of the squared Mahalanobis distance of its `statistics` from one
    Gaussian of the training images (Lee et al. 2018, without classes), plus a term that grows with
    its largest logit, up to a limit.

    state: weight [d, d] and bias [d], to whitened statistics; logit [3], the factor, offset and
    limit of the logit's term; table [n], the scores of held-out images, sorted. layers: see
    `middle_layers`.
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

        # All are of two dimensions, [batch, 1]: OpenCV 4 cannot add one.
        of_logit = logits.amax(1, keepdim=True) * factor + offset
        of_logit = torch.minimum(of_logit, limit)
        squared_distance = (whitened * whitened).sum(1, keepdim=True)
        score = of_logit - squared_distance.log()
        return (self.table < score).float().mean(1)  # [batch, n] -> [batch]


@contextlib.contextmanager
def watched(network: nn.Module, layers):
    """Within this block, collect in a list (name, output) of each of these layers that runs."""
    seen = []

    def see(name, layer, inputs, output):
        seen.append((name, output))

    with contextlib.ExitStack() as hooks:
        for name in layers:
            layer = network.get_submodule(name)
            hooks.enter_context(layer.register_forward_hook(functools.partial(see, name)))
        yield seen


def middle_layers(
    network: nn.Module, channels: int, image_size: tuple[int, int]
) -> tuple[str, ...]:
    """The layers whose channels give a network's `statistics`; none for its input.

    A network of ours names them. Those of others consist of blocks in sequence: of those that give
    maps, the one after a third of the blocks is taken. CHANNELS_LAST follows its name if its maps
    are [batch, h, w, channels], as in Swin.
    """
    if getattr(network, "middle", None) is not None:
        return network.middle

    blocks = []
    for path, module in network.named_modules():
        if isinstance(module, nn.Sequential | nn.ModuleList) or module is network:
            for name, _ in module.named_children():
                blocks.append(f"{path}.{name}" if path else name)

    device = next(network.parameters()).device
    with watched(network, blocks) as reached, torch.inference_mode():
        network.eval()(torch.zeros(2, channels, *image_size, device=device))

    maps = []  # names of blocks, in the order in which they are computed
    for name, output in reached:
        if not isinstance(output, torch.Tensor) or output.dim() not in (3, 4):
            continue
        if len(output) != 2:  # its windows or patches, not images, are its batch
            continue
        if is_channels_last(output, image_size):
            name += CHANNELS_LAST
        maps.append(name)
    if not maps:
        return ()
    return (maps[len(maps) // 3],)


def is_channels_last(maps: torch.Tensor, image_size: tuple[int, int]) -> bool:
    """Are maps [batch, h, w, channels], by the shape of the image, not [batch, channels, h, w]?"""
    if maps.dim() != 4:
        return False
    height, width = image_size
    first, second, third = (math.log(side) for side in maps.shape[1:])
    shape = math.log(height / width)
    return abs(first - second - shape) < abs(second - third - shape)


def run_with_statistics(network: nn.Module, images: torch.Tensor, layers: tuple[str, ...]):
    """Logits [batch, classes] of normalised images [batch, C, H, W], and statistics [batch, d].

    Those are each channel's mean and deviation after `layers`; without layers, the brightness and
    the roughness of the image in 4x4 parts.
    """
    with watched(network, [layer.removesuffix(CHANNELS_LAST) for layer in layers]) as found:
        logits = network(images)

    parts = []  # each [batch, numbers]
    for name, maps in found:  # [batch, channels, h, w]; a transformer's tokens [batch, n, channels]
        if name + CHANNELS_LAST in layers:
            maps = maps.permute(0, 3, 1, 2)
        places = (2, 3) if maps.dim() == 4 else (1,)
        means = maps.mean(places, keepdim=True)
        parts.append(means.flatten(1))
        parts.append((maps - means).square().mean(places).sqrt())
    if not layers:
        roughness = (images - F.avg_pool2d(images, 3, 1, 1)).abs()
        parts.append(F.adaptive_avg_pool2d(images, 4).flatten(1))
        parts.append(F.adaptive_avg_pool2d(roughness, 4).flatten(1))

    statistics = torch.cat(parts, 1)
    step = -(-statistics.shape[1] // MOST_STATISTICS)  # rounded up, in whole numbers for tracing
    return logits, statistics[:, ::step]


# --------------------------------------------------------------------------------- what is exported
class Deployable(nn.Module):
    """What is exported: resize, scale, normalise, network, softmax, and how familiar images look.

    Takes uint8 images [batch, height, width, channels] of any size; without `any_size`, uint8 or
    float32 ones of image_size only. Gives float32 probabilities [batch, classes] and, with a
    `familiarity`, `known` [batch].

    image_size: (height, width) that the network wants; mean, std: one number a channel, of pixels
    scaled to 0..1; fit: see `resize`; temperature: what logits are divided by (Guo et al. 2017).
    """

    def __init__(
        self, network, image_size, mean, std, fit="stretch", temperature=1.0, familiarity=None
    ):
        super().__init__()
        self.network = network
        self.image_size = tuple(image_size)
        self.fit = fit
        self.temperature = temperature
        self.familiarity = familiarity
        self.any_size = True

        # [1, channels, 1, 1], for images [batch, channels, H, W]
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(1, -1, 1, 1))

    def normalise(self, image):
        """Pixels 0..255 [batch, H, W, C] of the network's size -> normalised [batch, C, H, W]."""
        pixels = image.float().permute(0, 3, 1, 2) / 255
        return (pixels - self.mean) / self.std

    def calibrated(self, logits):
        """Probabilities [batch, classes]. A temperature of 1 leaves no trace in the graph."""
        if self.temperature != 1:
            logits = logits * (1 / self.temperature)
        return logits.softmax(1)

    def forward(self, image):
        if self.any_size:
            image = resize(image, self.image_size, self.fit)
        image = self.normalise(image)  # [batch, channels, H, W]

        if self.familiarity is None:
            return self.calibrated(self.network(image))
        logits, statistics = run_with_statistics(self.network, image, self.familiarity.layers)
        return self.calibrated(logits), self.familiarity(statistics, logits)


class Regressor(Deployable):
    """What is exported for regression: features [batch, n] -> predictions [batch, 1], float32."""

    def normalise(self, features):
        return (features - self.mean.flatten()) / self.std.flatten()

    def forward(self, features):
        return self.network(self.normalise(features))


# ------------------------------------------------------------------------------------------- resize
# All is computed from the sizes of the tensors, which tracing and export keep free.
BANDS = 6  # of output rows, so that a photo to stretch is never whole in memory as floats


def resize(image: torch.Tensor, image_size: tuple[int, int], fit: str = "stretch") -> torch.Tensor:
    """uint8 [batch, H, W, C] -> float32 [batch, *image_size, C], bilinear with antialiasing.

    As Pillow resizes, but not rounded: two matrix products, which all engines compute alike. fit:
    "stretch"; "crop" keeps the aspect ratio and the middle, "letterbox" the aspect ratio and all of
    the image, between black bars.
    """
    n, H, W, C = image.shape
    h, w = image_size
    (rows, from_rows), (columns, from_columns) = reductions((H, W), (h, w), fit, image.device)

    down = triangle_filter(h, H, rows, from_rows)  # [h, H]
    image = image.reshape(n, H, W * C)
    bands = min(BANDS, h) if fit == "stretch" else 1
    margin = -(-h // (3 * bands))  # output rows around a band, rounded up
    parts = []
    for band in range(bands):
        top = h * band // bands
        bottom = h * (band + 1) // bands

        # Stretching needs only these input rows. They are linear in H: exporters take no more.
        start = (H - 1) * max(top - margin, 0) // h
        end = H - (H - 1) * max(h - bottom - margin, 0) // h
        parts.append(down[top:bottom, start:end] @ image[:, start:end].float())
    resized = torch.cat(parts, 1).reshape(n * h, W, C)

    across = triangle_filter(w, W, columns, from_columns)  # [w, W]
    return (across @ resized).reshape(n, h, w, C)


def reductions(from_size, to_size, fit, device):
    """How many times fewer pixels there are down and across.

    Each is a fraction: a numerator, int32 [1], and a denominator, int.
    """
    H, W = from_size
    h, w = to_size
    rows = as_tensor(H, device)
    columns = as_tensor(W, device)
    if fit == "stretch":
        return (rows, h), (columns, w)

    # One for both: the smaller of H / h and W / w fills the output, the larger loses nothing.
    common = math.gcd(h, w)
    choose = torch.minimum if fit == "crop" else torch.maximum
    above = choose(rows * (w // common), columns * (h // common))
    below = h * w // common
    return (above, below), (above, below)


def as_tensor(side, device):
    """The side of an image as int32 [1]; torch.tensor(side) would be a constant in the graph."""
    numbers = torch.arange(side, dtype=torch.int32, device=device)
    last = numbers[-1:]
    return last + 1


def triangle_filter(n_out: int, n_in: int, above: torch.Tensor, below: int) -> torch.Tensor:
    """float32 [n_out, n_in]: the weights of `above` / `below` times fewer pixels, centred alike.

    Each row adds up to 1, or to 0 beyond the input.
    """
    # Places of pixels relative to the centre, doubled to be whole numbers.
    source = 2 * torch.arange(n_in, dtype=torch.int32, device=above.device) + (1 - n_in)
    target = 2 * torch.arange(n_out, dtype=torch.int32, device=above.device)[:, None] + (1 - n_out)
    distances = (target * above - source * below).float().abs()  # times 2 * below

    # A triangle reaches to the next output pixel, or to the next input pixel if that is farther.
    reach = (2 * above).float().clamp(min=2 * below)
    weights = (1 - distances / reach).clamp(min=0)
    return weights / weights.sum(1, keepdim=True).clamp(min=1e-6)
