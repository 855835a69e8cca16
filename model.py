"""The networks of Threestep, one registry of them, and `Deployable`: the module that is exported.

    build("mynet", channels=3, classes=10, image_size=(32, 32))     -> nn.Module giving logits [batch, classes]
    Deployable(network, image_size=(32, 32), mean=[...], std=[...]) -> uint8 images in, probabilities out

A network takes normalised float32 images [batch, channels, height, width] of one size. Deployable adds what every
program that runs the file would otherwise have to repeat: resizing, scaling, normalising, softmax. Names outside the
registry are torchvision's classification networks.
"""

import contextlib
import difflib
import itertools
import os
import sys
import warnings

import torch
import torch.nn.functional as F
from torch import nn


class MLP(nn.Module):
    """Fully connected network over the flattened pixels, ReLU between the layers.

    `hidden=(128,)` on 28x28 grey images is the 784-128-10 of the MNIST tutorials, `hidden=(512, 512)` the
    784-512-512-10 of PyTorch's own quickstart on Fashion-MNIST.
    """

    about = "fully connected: --hidden sizes (default 128), --dropout"
    options = ("hidden", "dropout")
    min_size = 1
    any_size = False

    def __init__(self, channels, classes, image_size, hidden=(128,), dropout=0.0):
        super().__init__()
        height, width = image_size
        sizes = [channels * height * width, *hidden]
        layers = [nn.Flatten()]
        for n_in, n_out in itertools.pairwise(sizes):
            layers += [nn.Linear(n_in, n_out), nn.ReLU(), nn.Dropout(dropout)]
        self.layers = nn.Sequential(*layers, nn.Linear(sizes[-1], classes))

    def forward(self, x):
        return self.layers(x)


class MyNet(nn.Module):
    """The CIFAR-10 tutorial's network: three conv-bn-pool-relu blocks of 6, 12, 24 channels, then 192-96-classes."""

    about = "the CIFAR tutorial's small convolutional network; --dropout (0.1)"
    options = ("dropout",)
    min_size = 8  # three poolings by two
    any_size = False
    memory_format = torch.contiguous_format  # channels-last is 4 times slower with 6 and 12 channels

    def __init__(self, channels, classes, image_size, dropout=0.1):
        super().__init__()
        height, width = image_size
        blocks = []
        for n_in, n_out in ((channels, 6), (6, 12), (12, 24)):
            # The tutorial has ReLU before the pooling: the same numbers from four times the work.
            blocks += [
                nn.Conv2d(n_in, n_out, 3, padding=1),
                nn.BatchNorm2d(n_out),
                nn.MaxPool2d(2),
                nn.ReLU(),
            ]
        self.blocks = nn.Sequential(*blocks)
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


class Linear(nn.Module):
    """One linear layer: the tensor tutorial's regression, or softmax regression on the pixels."""

    about = "one linear layer, the default for --dataset linear"
    options = ()
    min_size = 1
    any_size = False

    def __init__(self, channels, classes, image_size):
        super().__init__()
        self.layer = nn.Linear(channels * image_size[0] * image_size[1], classes)

    def forward(self, x):
        return self.layer(x.flatten(1))


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


class ResBlock(nn.Module):
    """The MNIST tutorial's network: stride-2 conv-bn-relu of 8, 16, 32, 16 and `classes` channels.

    A residual block follows each of the first three. 28x28 shrinks to 1x1; larger images are averaged there.
    """

    about = "the MNIST tutorial's residual network of stride-2 convolutions"
    options = ()
    min_size = 1
    any_size = True

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


class SideBySide(torch.autograd.Function):
    """A 3x3 convolution of stride 1 and padding 1 whose weight gradient is taken over images laid side by side.

    x: [n, c, h, w]; weight: [out, c, 3, 3]. oneDNN's gradient fills the tiles of AMX along the width, which narrow maps
    leave nearly empty: at 4x4 pixels it takes four times as long.
    """

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return F.conv2d(x, weight, padding=1)

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        settings = (None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1)  # no bias, stride, padding, dilation, ...
        backward = torch.ops.aten.convolution_backward
        for_x = backward(gradient, x, weight, *settings, [ctx.needs_input_grad[0], False, False])[0]
        x, gradient = side_by_side(x), side_by_side(gradient)
        return for_x, backward(gradient, x, weight, *settings, [False, True, False])[1]


def side_by_side(images, width=48):
    """Images [n, c, h, w] in rows up to `width` pixels wide, a zero column after each: [n / k, c, h, k * (w + 1)]."""
    n, c, h, w = images.shape
    k = max(k for k in range(1, max(width // (w + 1), 1) + 1) if n % k == 0)
    rows = images.new_zeros(n // k, h, k, w + 1, c)
    rows[..., :w, :] = images.unflatten(0, (-1, k)).permute(0, 3, 1, 4, 2)
    return rows.flatten(2, 3).permute(0, 3, 1, 2)


class Conv3x3(nn.Conv2d):
    """3x3 convolution without bias that keeps the size; on a CPU in bf16 trained by SideBySide."""

    def __init__(self, channels_in, channels_out):
        super().__init__(channels_in, channels_out, 3, padding=1, bias=False)

    def forward(self, x):
        narrow = x.device.type == "cpu" and x.shape[3] < 10
        if not self.training or not narrow or not torch.is_autocast_enabled("cpu"):
            return super().forward(x)
        return SideBySide.apply(*(tensor.to(torch.get_autocast_dtype("cpu")) for tensor in (x, self.weight)))


class Airbench(nn.Module):
    """Keller Jordan's airbench94 ("94% on CIFAR-10 in 3.29 Seconds on a Single GPU", 2024), for 28x28 and up.

    A frozen 2x2 whitening convolution, three groups of conv-pool-bn-gelu-conv-bn-gelu with 64, 256, 256 channels
    (times `width`), a global max and one linear layer. Call `whiten` with training images before training.
    """

    about = "the default, after airbench94 (2024); --width scales its channels"
    options = ("width",)
    min_size = 28
    any_size = True

    def __init__(self, channels, classes, image_size, width=1.0):
        super().__init__()
        widths = [max(8, round(n * width / 8) * 8) for n in (64, 256, 256)]
        n_in = 8 * channels  # 2x2 patches have 4 * channels directions; each is taken with both signs
        self.whitening = nn.Conv2d(channels, n_in, 2)
        groups = []
        for n_out in widths:
            groups.append(self._group(n_in, n_out))
            n_in = n_out
        self.groups = nn.Sequential(*groups)
        self.head = nn.Linear(n_in, classes, bias=False)
        self.whitening.weight.requires_grad = False

    @staticmethod
    def _group(n_in, n_out):
        first, second = Conv3x3(n_in, n_out), Conv3x3(n_out, n_out)
        for conv in (first, second):  # start as the identity on as many channels as there are
            nn.init.dirac_(conv.weight[: conv.in_channels])
        norms = [nn.BatchNorm2d(n_out, momentum=0.2) for _ in range(2)]  # few steps: forget quickly
        for norm in norms:
            norm.weight.requires_grad = False  # the scale is free: another convolution follows
        return nn.Sequential(first, nn.MaxPool2d(2), norms[0], nn.GELU(), second, norms[1], nn.GELU())

    @torch.no_grad()
    def whiten(self, x, eps=5e-4):
        """Set the first layer from the 2x2 patches of `x`, normalised images [n, channels, H, W].

        Its filters are the eigenvectors of the patches' covariance, scaled to unit variance, then the same negated.
        """
        total = count = products = 0
        for part in x.split(100):  # all at once took more memory than training does
            patches = (
                F.unfold(part, 2).transpose(1, 2).flatten(0, 1).double()
            )  # [n * positions, 4 * channels]
            total, count, products = (
                total + patches.sum(0),
                count + len(patches),
                products + patches.T @ patches,
            )
        mean = total / count
        covariance = products / count - mean.outer(mean)
        values, vectors = torch.linalg.eigh(covariance)
        filters = (vectors / (values + eps).sqrt()).T.reshape(-1, *self.whitening.weight.shape[1:])
        self.whitening.weight.copy_(torch.cat([filters, -filters]))
        self.whitening.bias.zero_()

    def forward(self, x):
        x = self.groups(F.gelu(self.whitening(x)))
        return self.head(x.amax((2, 3))) / 5.4  # small at first, so that the filters learn before the head


MODELS = {"airbench": Airbench, "linear": Linear, "mlp": MLP, "mynet": MyNet, "resblock": ResBlock}


def torchvision_names():
    """The names of torchvision's classification networks."""
    from torchvision import models

    return models.list_models(module=models)


def min_size(name):
    """The smallest side in pixels that a network makes sense for; of torchvision's networks `build` finds out."""
    return MODELS[name].min_size if name in MODELS else 1


def takes_any_size(name):
    """Can one network of this name take images of several sizes?"""
    return MODELS[name].any_size if name in MODELS else not name.startswith("vit_")


def options_of(name):
    """The build options that the network of this name takes. Raises ValueError for an unknown name."""
    if name in MODELS:
        return MODELS[name].options
    names = torchvision_names()
    if name not in names:
        near = difflib.get_close_matches(name, [*MODELS, *names], 1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(MODELS)}, and torchvision's."
        raise ValueError(f"unknown model {name!r}; {hint} (--list-models shows all)")
    return ()


def build(name, *, channels, classes, image_size, **options):
    """A freshly initialised network by its registry or torchvision name.

    channels: 1 or more; classes: 2 or more, or 1 for regression; image_size: (height, width) in pixels. `options`
    holds only what `options_of` lists. Raises ValueError, with a sentence for the user, on anything it cannot build.
    """
    known = options_of(name)
    unknown = [f"--{option}" for option in options if option not in known]
    if unknown:
        raise ValueError(
            f"{name} has no option {', '.join(unknown)} (--list-models says what each network takes)"
        )
    height, width = image_size
    way_out = "give a larger --image-size (images are resized to it) or another --model"
    if name not in MODELS:
        try:
            return build_torchvision(name, channels, classes, height, width)
        except (RuntimeError, AssertionError, ValueError) as error:
            reason = str(error).split("\n")[0]
            raise ValueError(f"{name} cannot take {height}x{width} images ({reason}); {way_out}") from None
    need = MODELS[name].min_size
    if min(image_size) < need:
        raise ValueError(f"{name} needs images of at least {need}x{need}, not {height}x{width}; {way_out}")
    return MODELS[name](channels, classes, tuple(image_size), **options)


def build_torchvision(name, channels, classes, height, width):
    """torchvision's network with the right head and first convolution, tried on one blank batch."""
    from torchvision import models

    extra = {"aux_logits": False, "init_weights": True} if name in ("googlenet", "inception_v3") else {}
    if name.startswith("vit_"):
        extra["image_size"] = height
    network = models.get_model(name, weights=None, num_classes=classes, **extra)
    if channels != 3:
        path, conv = next((p, m) for p, m in network.named_modules() if isinstance(m, nn.Conv2d))
        settings = (
            conv.out_channels,
            conv.kernel_size,
            conv.stride,
            conv.padding,
            conv.dilation,
            conv.groups,
        )
        network.set_submodule(path, nn.Conv2d(channels, *settings, bias=conv.bias is not None))
    with torch.no_grad():
        network.eval()(torch.zeros(1, channels, height, width))
    return network.train()


def torchvision_weights(name):
    """torchvision's default weights entry of a network, or None for one of ours."""
    if name in MODELS:
        return None
    from torchvision import models

    return models.get_model_weights(name).DEFAULT


def usual_size(name):
    """The image size in pixels that a network is usually given: 64 for ours, torchvision's own crop otherwise."""
    options_of(name)
    weights = torchvision_weights(name)
    return weights.transforms().crop_size[0] if weights else 64


def load_plain(source):
    """torch.load of plain data from a path or binary stream, onto the CPU, without running code from it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Detected pickle protocol")  # the error that follows says enough
        return torch.load(source, map_location="cpu", weights_only=True)


def read_state(path):
    """A state_dict, or a checkpoint with one in it. Raises ValueError."""
    try:
        state = load_plain(path)
    except FileNotFoundError:
        raise ValueError("no such file") from None
    except (
        Exception
    ) as error:  # torch.load fails in many ways on a foreign file, a pickle with code among them
        reason = str(error).split("\n")[0]
        raise ValueError(f"cannot be loaded as plain weights ({reason})") from None
    inner = state.get("state_dict", state) if isinstance(state, dict) else None
    inner = inner if isinstance(inner, dict) else {}
    if not inner or not all(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in inner.items()):
        raise ValueError("is not a state_dict: it holds other things than tensors")
    return state


class DownloadError(ValueError):
    """Weights that could not be fetched."""


def pretrained(name, source, channels):
    """-> (state_dict, mean, std) to start a network from; mean and std are None where nobody says them.

    source: "default" for torchvision's default weights, else the path of a state_dict or checkpoint. mean, std: what
    the weights were trained with, [channels]; grey takes the middle of the three. Raises ValueError.
    """
    weights, mean, std = torchvision_weights(name), None, None
    if weights is not None:
        usual = weights.transforms().mean, weights.transforms().std
        mean, std = ([sum(x) / 3] * channels if channels != 3 else list(x) for x in usual)
    if source != "default":
        state = read_state(source)
        spec = state.get("spec")
        if isinstance(spec, dict) and len(spec.get("mean", ())) == channels:  # a checkpoint of ours
            mean, std = spec["mean"], spec["std"]
        return state.get("state_dict", state), mean, std
    if weights is None:
        raise ValueError(
            f"there are no default weights for {name}; --pretrained FILE takes a local state_dict"
        )
    try:
        with contextlib.redirect_stdout(sys.stderr):
            return weights.get_state_dict(progress=True, check_hash=True), mean, std
    except (OSError, RuntimeError) as error:
        place = os.path.join(torch.hub.get_dir(), "checkpoints", os.path.basename(weights.url))
        raise DownloadError(
            f"cannot download the weights of {name} ({error}): put {weights.url} at {place}, "
            f"or give --pretrained FILE, or train from scratch without --pretrained"
        ) from None


def head_keys(network):
    """The state_dict keys of the last linear or convolutional layer (and its norm): what depends on the classes."""
    last = [name for name, module in network.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)][-1]
    keys = list(network.state_dict())
    return keys[keys.index(f"{last}.weight") :]


def load_pretrained(network, state):
    """Load a state_dict trained on other classes or channels: a head of another size is left as initialised.

    A first convolution for another number of channels gets the mean over them, scaled to the same response to grey.
    Raises ValueError naming the first key that does not fit, the sign of another architecture.
    """
    own, head = network.state_dict(), set(head_keys(network))
    state = {
        key: value for key, value in state.items() if key in own or not key.startswith(("aux", "AuxLogits"))
    }
    first = next((key for key, value in own.items() if value.ndim == 4), None)
    if first in state and state[first].ndim == 4 and state[first].shape[1] != own[first].shape[1]:
        n_from, n_to = state[first].shape[1], own[first].shape[1]
        state[first] = state[first].mean(1, keepdim=True).repeat(1, n_to, 1, 1) * (n_from / n_to)
    wrong = [key for key in own.keys() ^ state.keys() if key not in head]
    wrong += [key for key in own.keys() & state.keys() - head if own[key].shape != state[key].shape]
    if wrong:
        raise ValueError(
            f"does not fit this architecture, {len(wrong)} entries differ, {min(wrong)!r} for one"
        )
    fitting = {key: value for key, value in state.items() if own[key].shape == value.shape}
    if head - fitting.keys():
        fitting = {key: value for key, value in fitting.items() if key not in head}  # all of the head or none
    network.load_state_dict(fitting, strict=False)


def freeze_backbone(network):
    """Leave only the head trainable."""
    head = head_keys(network)
    for key, parameter in network.named_parameters():
        parameter.requires_grad = key in head


def train_mode(network):
    """Training mode, except that a layer whose parameters are all frozen, a batch norm say, stays as it is in eval."""
    network.train()
    for module in network.modules():
        parameters = list(module.parameters(recurse=False))
        if parameters and not any(parameter.requires_grad for parameter in parameters):
            module.eval()
    return network


class Deployable(nn.Module):
    """What is exported: resize, scale, normalise, network, softmax.

    uint8 images [batch, height, width, channels] of any size -> float32 probabilities [batch, classes].
    image_size: (height, width) the network wants; mean, std: one number a channel, of pixels scaled to 0..1.
    """

    def __init__(self, network, image_size, mean, std):
        super().__init__()
        self.network = network
        self.image_size = tuple(image_size)
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(1, -1, 1, 1))

    def normalise(self, image):
        """uint8 [batch, H, W, C] of the network's own size -> float32 [batch, C, H, W] as the network wants it."""
        return (image.permute(0, 3, 1, 2).float() / 255 - self.mean) / self.std

    def forward(self, image):
        image = resize(image, self.image_size)
        return self.network(self.normalise(image)).softmax(1)


class Regressor(Deployable):
    """What is exported for regression: float32 features [batch, n] -> float32 predictions [batch, 1]."""

    def normalise(self, features):
        return (features - self.mean.flatten()) / self.std.flatten()

    def forward(self, features):
        return self.network(self.normalise(features))


def resize(image, image_size):
    """uint8 [batch, H, W, C] -> uint8 [batch, *image_size, C]: bilinear with antialias, as Pillow resizes.

    On uint8 before any cast, so that a photo never exists as floats.
    """
    image = image.permute(0, 3, 1, 2)
    image = F.interpolate(image, size=tuple(image_size), mode="bilinear", antialias=True)
    return image.permute(0, 2, 3, 1)
