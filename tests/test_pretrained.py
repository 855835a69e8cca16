"""torchvision's networks by name, and weights trained elsewhere."""

import json
import pickle
import urllib.error
import urllib.request

import pytest
import torch

import model
import step1_train
import step2_export
from training import weights as starting_weights


def arguments(photos, name, *more):
    return [
        "--dataset",
        "folder",
        "--data-dir",
        photos,
        "--model",
        name,
        "--epochs",
        1,
        "--image-size",
        96,
        *more,
    ]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mobilenet_v3_small", "resnet18"])
def test_torchvision_networks_pass_the_gate_in_both_formats(call, here, photos, in_process, name):
    out = call(step1_train.main, *arguments(photos, name)).done().out
    assert f"{name}: " in out and "input 96x96" in out
    call(step2_export.main).done()
    (parity,) = (here / "exports").glob("*/parity.json")
    report = json.loads(parity.read_text())
    assert {form: figures["passed"] for form, figures in report.items()} == {
        "torchscript": True,
        "onnx": True,
    }


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_torchvision_network_takes_any_number_of_channels(channels):
    network = model.build(
        "mobilenet_v3_small", channels=channels, classes=7, image_size=(64, 48)
    ).eval()
    assert network(torch.zeros(2, channels, 64, 48)).shape == (2, 7)


def test_unknown_and_unsuitable_names():
    shape = {"channels": 3, "classes": 2, "image_size": (32, 32)}
    with pytest.raises(ValueError, match="'resnet18'"):
        model.build("resnet_18", **shape)
    with pytest.raises(ValueError, match=r"inception_v3 cannot take 32x32 images .*--image-size"):
        model.build("inception_v3", **shape)
    with pytest.raises(ValueError, match="has no option --width"):
        model.build("resnet18", **shape, width=2.0)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A state_dict of mobilenet_v3_small for five classes, as someone else would have saved it."""
    torch.manual_seed(1)
    network = model.build("mobilenet_v3_small", channels=3, classes=5, image_size=(96, 96))
    path = tmp_path_factory.mktemp("weights") / "mobilenet.pth"
    torch.save(network.state_dict(), path)
    return path


def test_local_weights_keep_the_backbone_and_replace_the_head(
    call, here, photos, weights, in_process
):
    command = arguments(photos, "mobilenet_v3_small", "--pretrained", weights, "--freeze-backbone")
    assert "2,050 trained" in call(step1_train.main, *command).done().out
    (file,) = (here / "runs").glob("*/checkpoint.pt")
    checkpoint, given = torch.load(file, weights_only=True), torch.load(weights, weights_only=True)
    ours = checkpoint["state_dict"]
    head = [key for key in ours if key.startswith("classifier.3")]
    assert ours["classifier.3.weight"].shape[0] == 2
    assert all(
        torch.equal(ours[key], given[key]) for key in given if key not in head
    )  # batch norm's averages too
    assert checkpoint["spec"]["mean"] == pytest.approx(
        [0.485, 0.456, 0.406]
    )  # ImageNet's, as the weights want
    call(step2_export.main, "--format", "torchscript").done()


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"model": state, "epoch": 3},
        lambda state: {"state_dict": state},
        lambda state: {f"module.{key}": value for key, value in state.items()},
        lambda state: {"model": {f"module.{key}": value for key, value in state.items()}},
    ],
    ids=["torchvision", "timm", "DataParallel", "both"],
)
def test_weights_as_other_programs_write_them(call, here, photos, weights, wrap):
    state = torch.load(weights, weights_only=True)
    torch.save(wrap(state), here / "theirs.pth")
    call(
        step1_train.main, *arguments(photos, "mobilenet_v3_small", "--pretrained", "theirs.pth")
    ).done()
    loaded, spec = starting_weights.read_weights(str(here / "theirs.pth"))
    assert spec == {} and loaded.keys() == state.keys()
    assert all(torch.equal(loaded[key], value) for key, value in state.items())


def test_weights_for_colour_start_a_grey_network(weights):
    network = model.build("mobilenet_v3_small", channels=1, classes=5, image_size=(96, 96)).eval()
    colour = model.build("mobilenet_v3_small", channels=3, classes=5, image_size=(96, 96)).eval()
    state = torch.load(weights, weights_only=True)
    starting_weights.load_pretrained(network, dict(state))
    starting_weights.load_pretrained(colour, dict(state))
    grey = torch.rand(2, 1, 96, 96)
    with torch.inference_mode():
        assert torch.allclose(network(grey), colour(grey.expand(-1, 3, -1, -1)), atol=1e-5)


class Code:
    """Unpickled, it would make a directory."""

    def __reduce__(self):
        import os

        return os.mkdir, ("executed",)


def test_wrong_weights_are_refused_by_name(call, here, photos, weights):
    torch.save(
        model.build("resnet18", channels=3, classes=2, image_size=(96, 96)).state_dict(),
        here / "other.pth",
    )
    torch.save({"weights": [1, 2, 3]}, here / "list.pth")
    (here / "code.pth").write_bytes(pickle.dumps(Code()))
    (here / "text.pth").write_text("not weights")
    for name, word in [
        ("other.pth", "architecture"),
        ("list.pth", "not a state_dict"),
        ("code.pth", "cannot be loaded"),
        ("text.pth", "cannot be loaded"),
        ("absent.pth", "no such file"),
    ]:
        refused = call(
            step1_train.main, *arguments(photos, "mobilenet_v3_small", "--pretrained", name)
        )
        line = refused.error(2, name, word)
        assert (
            "weights_only" not in line and "\x1b" not in refused.err and "\\x1b" not in refused.err
        )
    assert not (here / "executed").exists() and not (here / "runs").exists()


def test_default_weights_without_a_network(call, here, photos, monkeypatch):
    def no_network(*_, **__):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(urllib.request, "urlopen", no_network)
    monkeypatch.setenv("TORCH_HOME", str(here / "hub"))
    refused = call(step1_train.main, *arguments(photos, "mobilenet_v3_small", "--pretrained"))
    refused.error(1, "https://", "--pretrained FILE", here / "hub")
    call(step1_train.main, *arguments(photos, "airbench", "--pretrained")).error(
        2, "no default weights"
    )
    call(step1_train.main, *arguments(photos, "resnet18", "--freeze-backbone")).error(
        2, "--pretrained"
    )


def test_our_own_checkpoint_starts_another_run(call, here, photos):
    command = [
        "--dataset",
        "folder",
        "--data-dir",
        photos,
        "--model",
        "mynet",
        "--epochs",
        1,
        "--image-size",
        32,
    ]
    call(step1_train.main, *command, "--name", "first").done()
    call(
        step1_train.main, *command, "--pretrained", "runs/first/checkpoint.pt", "--freeze-backbone"
    ).done()
    files = (here / "runs" / name / "checkpoint.pt" for name in ("first", f"{photos.name}-mynet"))
    first, second = (torch.load(file, weights_only=True)["state_dict"] for file in files)
    assert torch.equal(first["blocks.0.weight"], second["blocks.0.weight"])
    assert not torch.equal(first["head.6.weight"], second["head.6.weight"])
