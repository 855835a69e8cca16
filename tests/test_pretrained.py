"""torchvision's networks by name, and weights trained elsewhere."""

import argparse
import json
import pickle
import sys
import urllib.error
import urllib.request
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch

import model
import step1_train
import step2_export
from training import weights as starting_weights
from training.weight_files import read_weights


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


def with_prefix(prefix, state):
    return {prefix + key: value for key, value in state.items()}


def averaged(state):
    """What torch.optim.swa_utils.AveragedModel writes of these weights."""
    return {"n_averaged": torch.tensor(3), **with_prefix("module.", state)}


WRITTEN = {
    "torchvision": lambda state: {"model": state, "epoch": 3},
    "timm": lambda state: {"state_dict": state, "args": argparse.Namespace(lr=0.1, out=Path("x"))},
    "figures": lambda state: {"model": state, "best": np.float64(0.9), "mean": np.zeros(3)},
    "trainers": lambda state: {"model_state_dict": state, "history": defaultdict(list, loss=[1])},
    "DataParallel": lambda state: with_prefix("module.", state),
    "both": lambda state: {"net": with_prefix("module.", state), "acc": 93.1},
    "part in parallel": lambda state: {
        key.replace("features.", "features.module."): value for key, value in state.items()
    },
    "compiled": lambda state: with_prefix("_orig_mod.", state),
    "Lightning": lambda state: {
        "state_dict": with_prefix("model.", state) | {"loss.weight": torch.ones(5)},
        "hyper_parameters": {"lr": 0.1, "folder": Path("x")},
    },
    "compiled in Lightning": lambda state: {"state_dict": with_prefix("net._orig_mod.", state)},
    "old": lambda state: {
        key: value for key, value in state.items() if "num_batches_tracked" not in key
    },
}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("program", WRITTEN)
def test_weights_as_other_programs_write_them(tmp_path, weights, program, zipped):
    state = torch.load(weights, weights_only=True)
    file = tmp_path / "theirs.pth"
    torch.save(WRITTEN[program](state), file, _use_new_zipfile_serialization=zipped)
    assert_loads(file, state)


def assert_loads(file, state):
    """A file starts a network with exactly these weights."""
    network = model.build("mobilenet_v3_small", channels=3, classes=5, image_size=(96, 96))
    loaded, spec = read_weights(str(file), network.state_dict())
    starting_weights.load_pretrained(network, loaded)
    assert spec == {}
    for key, value in network.state_dict().items():
        assert torch.equal(value, state.get(key, value)) or "num_batches_tracked" in key


@pytest.mark.parametrize("prefix", ["", "model."])
def test_safetensors(tmp_path, weights, prefix):
    safetensors = pytest.importorskip("safetensors.torch")
    state = torch.load(weights, weights_only=True)
    safetensors.save_file(with_prefix(prefix, state), tmp_path / "model.safetensors")
    assert_loads(tmp_path / "model.safetensors", state)

    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes()[:99])
    with pytest.raises(ValueError, match="damaged"):
        read_weights(str(tmp_path / "cut.safetensors"), state)
    with pytest.raises(ValueError, match="no such file"):
        read_weights(str(tmp_path / "absent.safetensors"), state)


def test_safetensors_without_the_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ValueError, match="pip install safetensors"):
        read_weights(str(tmp_path / "model.safetensors"), [])


def test_a_checkpoint_of_timm(tmp_path):
    timm = pytest.importorskip("timm")
    from timm.utils import CheckpointSaver, ModelEmaV3

    theirs = timm.create_model("resnet18", num_classes=5)
    average = ModelEmaV3(theirs)
    with torch.no_grad():
        theirs.conv1.weight += 1
    optimizer = torch.optim.SGD(theirs.parameters(), 0.1)
    arguments = argparse.Namespace(model="resnet18", lr=0.1)
    CheckpointSaver(
        theirs, optimizer, arguments, model_ema=average, checkpoint_dir=str(tmp_path)
    ).save_checkpoint(0, metric=0.5)

    network = model.build("resnet18", channels=3, classes=5, image_size=(32, 32))
    loaded, _ = read_weights(str(tmp_path / "last.pth.tar"), network.state_dict())
    starting_weights.load_pretrained(network, loaded)
    assert torch.equal(network.conv1.weight, average.module.conv1.weight)


def test_of_two_sets_of_weights_the_averaged_one_is_taken(tmp_path, weights, capsys):
    state = torch.load(weights, weights_only=True)
    last = {key: value + 1 for key, value in state.items()}
    torch.save({"model": last, "model_ema": averaged(state)}, tmp_path / "two.pth")
    assert_loads(tmp_path / "two.pth", state)
    assert "'model_ema.module.' is used" in capsys.readouterr().err


def test_a_whole_network_is_refused_with_the_way_out(tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "whole.pth")
    with pytest.raises(ValueError, match=r"holds a torch.nn.modules.linear.Linear.*state_dict\(\)"):
        read_weights(str(tmp_path / "whole.pth"), [])


def test_a_torchscript_archive_is_refused_by_name_and_without_a_warning(tmp_path, recwarn):
    path = str(tmp_path / "model.pt")
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path)
    recwarn.clear()  # torch warns of torch.jit itself
    with pytest.raises(ValueError, match="is a TorchScript archive"):
        read_weights(path, [])
    assert not recwarn


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(tmp_path, value):
    layer = torch.nn.Linear(2, 2)
    torch.nn.init.constant_(layer.bias, value)
    torch.save(layer.state_dict(), tmp_path / "broken.pth")
    with pytest.raises(ValueError, match="not finite numbers in 1 of 2 entries, as 'bias'"):
        read_weights(str(tmp_path / "broken.pth"), ["weight", "bias"])


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
