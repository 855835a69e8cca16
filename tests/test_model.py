"""Networks, their registry, and Deployable."""

import numpy as np
import pytest
import torch
from PIL import Image

import model
from training import cpu

SIZES = {
    "airbench": [(28, 28), (32, 32), (29, 45)],
    "mlp": [(1, 1), (8, 8), (7, 13)],
    "mynet": [(8, 8), (32, 32), (9, 31)],
    "resblock": [(1, 1), (28, 28), (17, 40)],
}


def count(network):
    return sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("name", "size"), [(name, size) for name, sizes in SIZES.items() for size in sizes]
)
def test_network_gives_logits_at_any_size_that_makes_sense(name, size, channels):
    network = model.build(name, channels=channels, classes=7, image_size=size)
    logits = network(torch.randn(3, channels, *size))
    assert logits.shape == (3, 7) and logits.isfinite().all()
    logits.sum().backward()
    trainable = [parameter for parameter in network.parameters() if parameter.requires_grad]
    assert trainable and all(parameter.grad is not None for parameter in trainable)


@pytest.mark.parametrize(("name", "size"), [("airbench", (27, 40)), ("mynet", (32, 7))])
def test_too_small_an_image_is_refused_with_the_way_out(name, size):
    with pytest.raises(
        ValueError, match=rf"{name} needs .* not {size[0]}x{size[1]}.*--image-size.*--model"
    ):
        model.build(name, channels=1, classes=10, image_size=size)


@pytest.mark.parametrize(
    ("typed", "meant"), [("arbench", "airbench"), ("resblok", "resblock"), ("0000", "known: ")]
)
def test_unknown_network_suggests_the_nearest(typed, meant):
    with pytest.raises(ValueError, match=f"unknown model '{typed}'.*{meant}.*--list-models"):
        model.build(typed, channels=1, classes=10, image_size=(28, 28))


@pytest.mark.parametrize(
    ("name", "option"), [("mlp", "width"), ("resblock", "dropout"), ("airbench", "hidden")]
)
def test_an_option_the_network_does_not_have_is_refused(name, option):
    with pytest.raises(ValueError, match=f"{name} has no option --{option}"):
        model.build(name, channels=1, classes=10, image_size=(28, 28), **{option: 1})


@pytest.mark.parametrize(
    ("hidden", "parameters"), [((128,), 101770), ((512, 512), 669706), ((), 7850)]
)
def test_mlp_is_the_tutorials(hidden, parameters):
    assert (
        count(model.build("mlp", channels=1, classes=10, image_size=(28, 28), hidden=hidden))
        == parameters
    )


def test_mlp_drops_out_in_training_only():
    network = model.build("mlp", channels=1, classes=10, image_size=(8, 8), dropout=0.5)
    x = torch.randn(4, 1, 8, 8)
    assert not torch.equal(network.train()(x), network(x))
    assert torch.equal(network.eval()(x), network(x))


def test_mynet_has_the_tutorials_shapes():
    network = model.build("mynet", channels=3, classes=10, image_size=(32, 32))
    shapes = [tuple(layer.weight.shape) for layer in network.modules() if hasattr(layer, "weight")]
    convs, linears = [s for s in shapes if len(s) == 4], [s for s in shapes if len(s) == 2]
    assert convs == [(6, 3, 3, 3), (12, 6, 3, 3), (24, 12, 3, 3)]
    assert linears == [(192, 384), (96, 192), (10, 96)]
    assert [layer.p for layer in network.modules() if isinstance(layer, torch.nn.Dropout)] == [0.1]


def test_resblock_has_the_tutorials_shapes():
    network = model.build("resblock", channels=1, classes=10, image_size=(28, 28))
    convs = [layer for layer in network.modules() if isinstance(layer, torch.nn.Conv2d)]
    assert [conv.out_channels for conv in convs if conv.stride == (2, 2)] == [8, 16, 32, 16, 10]
    assert [conv.out_channels for conv in convs if conv.stride == (1, 1)] == [8, 8, 16, 16, 32, 32]
    assert network.body(torch.zeros(2, 1, 28, 28)).shape == (2, 10, 1, 1)


def test_width_multiplies_airbenchs_channels():
    channels = {}
    for width in (0.5, 1.0, 2.0):
        network = model.build("airbench", channels=3, classes=10, image_size=(32, 32), width=width)
        channels[width] = [group[0].out_channels for group in network.groups]
    assert channels == {0.5: [32, 128, 128], 1.0: [64, 256, 256], 2.0: [128, 512, 512]}


@pytest.mark.parametrize("channels", [1, 3])
def test_whitening_whitens(channels):
    # Blurred noise: neighbouring pixels correlate strongly, as in photos.
    x = torch.nn.functional.avg_pool2d(torch.randn(300, channels, 34, 34), 3, stride=1)
    network = model.build("airbench", channels=channels, classes=10, image_size=(32, 32))
    network.prepare(x, eps=0)
    n = 4 * channels
    outputs = network.whitening(x).detach()
    assert torch.equal(outputs[:, n:], -outputs[:, :n])
    covariance = outputs[:, :n].transpose(0, 1).flatten(1).double().cov()
    assert (covariance - torch.eye(n)).abs().max() < 0.05
    network.prepare(x)  # by default, a direction that hardly varies is not amplified without limit
    assert network.whitening.weight.flatten(1).norm(dim=1).max() < 5
    before = (
        x.unfold(2, 2, 1).unfold(3, 2, 1).permute(1, 4, 5, 0, 2, 3).flatten(0, 2).flatten(1).cov()
    )
    assert (
        before / before.diagonal().mean() - torch.eye(n)
    ).abs().max() > 0.5  # there was something to whiten
    assert not network.whitening.weight.requires_grad


def deployable(channels=3, size=(8, 8)):
    torch.manual_seed(0)
    network = model.build("mynet", channels=channels, classes=5, image_size=size).eval()
    mean, std = [0.4, 0.5, 0.6][:channels], [0.2, 0.3, 0.25][:channels]
    return network, model.Deployable(network, size, mean, std).eval()


def test_deployable_is_preprocessing_network_and_softmax():
    network, whole = deployable()
    images = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)
    scaled = (images.astype(np.float32) / 255 - [0.4, 0.5, 0.6]) / [0.2, 0.3, 0.25]
    with torch.inference_mode():
        logits = network(torch.from_numpy(scaled).permute(0, 3, 1, 2).float()).numpy()
        got = whole(torch.from_numpy(images)).numpy()
    expected = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    assert got.dtype == np.float32 and np.abs(got - expected).max() < 1e-6
    assert np.abs(got.sum(1) - 1).max() < 1e-6


@pytest.mark.parametrize("size", [(8, 8), (1, 1), (3, 50), (100, 31), (480, 641)])
def test_deployable_takes_any_input_size(size):
    probabilities = deployable(channels=1)[1](
        torch.randint(0, 256, (2, *size, 1), dtype=torch.uint8)
    )
    assert probabilities.shape == (2, 5) and (probabilities.sum(1) - 1).abs().max() < 1e-6


SIZES = [(8, 8), (64, 96), (50, 41), (9, 100), (1, 1), (1, 300), (700, 2), (480, 640), (3000, 4000)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("target", [(32, 32), (32, 28), (1, 7)])
def test_resize_is_pillows(size, target):
    """Pillow's own filter, on float pixels, which it does not round."""
    image = np.random.default_rng(0).integers(0, 256, (2, *size, 3), dtype=np.uint8)
    got = model.resize(torch.from_numpy(image), target).numpy()
    assert got.shape == (2, *target, 3) and got.dtype == np.float32
    channel = Image.fromarray(image[1, :, :, 2].astype(np.float32))
    pillow = np.asarray(channel.resize(target[::-1], Image.Resampling.BILINEAR))
    assert np.abs(got[1, :, :, 2] - pillow).max() < 1e-3


def test_resize_to_the_same_size_changes_nothing():
    image = torch.arange(3 * 5 * 7 * 3).remainder(256).byte().reshape(3, 5, 7, 3)
    assert torch.equal(model.resize(image, (5, 7)), image.float())


def test_the_bands_of_resize_leave_out_no_pixel():
    """The sum over what a band sees of its filter's weights is 1, for all sizes."""
    for height in (*range(1, 40), 64, 95, 96, 224, 299, 384):
        sizes = (*range(1, 70), height, 2 * height, 3 * height + 1, 480, 1000, 3000)
        for size in sizes:
            ones = torch.ones(1, size, 1, 1, dtype=torch.uint8)
            assert (model.resize(ones, (height, 1)) - 1).abs().max() < 1e-5, (height, size)


@pytest.mark.parametrize(("batch", "size"), [(8, 4), (6, 9), (7, 3), (1, 2), (4, 12)])
def test_gradients_beside_each_other_are_those_of_torch(batch, size):
    torch.manual_seed(0)
    ours = cpu.Conv3x3(16, 24, 3, padding=1, bias=False)
    plain = torch.nn.Conv2d(16, 24, 3, padding=1, bias=False)
    plain.load_state_dict(ours.state_dict())
    x = torch.randn(batch, 16, size, size, requires_grad=True)
    results = []
    for conv in (ours, plain):
        with torch.autocast("cpu", torch.bfloat16):
            y = conv(x)
        x.grad = None
        (y.float() * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum().backward()
        results.append([y, x.grad, conv.weight.grad])
    for mine, torchs in zip(*results, strict=True):
        assert (mine - torchs).norm() < 0.01 * torchs.norm()
