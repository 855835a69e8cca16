"""timm's networks: built by name, started from weights of theirs, and refused in one line."""

import builtins
import json
import os

import pytest
import torch

import model
import step1_train
import step2_export
from training import timm_weights
from training import weights as starting_weights

timm = pytest.importorskip("timm")

SHAPE = {"channels": 3, "classes": 2, "image_size": (32, 32)}


def command(photos, name, *more):
    fixed = ("--data-dir", photos, "--image-size", 32, "--epochs", 1, "--threads", 1)
    return [*fixed, "--model", name, *more]


@pytest.fixture
def no_timm(monkeypatch):
    """timm is not installed."""
    real = builtins.__import__

    def without_timm(name, *arguments, **options):
        if name.partition(".")[0] == "timm":
            raise ModuleNotFoundError("No module named 'timm'")
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without_timm)


def weights_file(path, name, classes=5, channels=3, image_size=(32, 32)):
    """A state_dict of random weights, as timm's own training script would have saved it."""
    torch.manual_seed(1)
    network = model.build(f"timm/{name}", channels=channels, classes=classes, image_size=image_size)
    torch.save({"arch": name, "state_dict": network.state_dict()}, path)
    return network.eval()


# ---------------------------------------------------------------------------------- the whole way
@pytest.mark.parametrize(
    ("name", "formats"),
    [
        ("test_resnet", ["torchscript"]),
        pytest.param("test_efficientnet", ["onnx"], marks=pytest.mark.slow),
        pytest.param("test_vit", ["onnx", "torchscript"], marks=pytest.mark.slow),
    ],
)
def test_network_is_trained_exported_and_proven(call, here, photos, in_process, name, formats):
    call(step1_train.main, *command(photos, f"timm/{name}", "--calibration", "held-out")).done()
    run = f"{photos.name}-{name}"  # a directory needs a name without a slash
    checkpoint = torch.load(here / "runs" / run / "checkpoint.pt", weights_only=True)
    assert checkpoint["spec"]["model"] == f"timm/{name}"
    assert checkpoint["spec"]["versions"]["timm"] == timm.__version__

    exported = call(step2_export.main, "--format", *formats).done()
    assert "Warning" not in exported.err
    report = json.loads((here / "exports" / run / "parity.json").read_text())
    assert {form: proof["passed"] for form, proof in report.items()} == dict.fromkeys(formats, True)


def test_own_weights_give_mean_std_and_backbone(call, here, photos):
    weights_file(here / "five.pth", "test_efficientnet")
    asked = command(photos, "timm/test_efficientnet", "--pretrained", "five.pth")
    call(step1_train.main, *asked, "--freeze-backbone").done()
    (file,) = (here / "runs").glob("*/checkpoint.pt")
    checkpoint = torch.load(file, weights_only=True)

    config = timm.get_pretrained_cfg("test_efficientnet")
    assert checkpoint["spec"]["mean"] == pytest.approx(config.mean)
    assert checkpoint["spec"]["std"] == pytest.approx(config.std)
    given = torch.load("five.pth", weights_only=True)["state_dict"]
    ours = checkpoint["state_dict"]
    differ = {key for key in given if not torch.equal(given[key], ours[key])}
    assert differ == {"classifier.weight", "classifier.bias"}
    assert len(list((photos / ".threestep").glob("features-test_efficientnet-*.npy"))) == 2


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_weights_for_colour_start_a_grey_network(tmp_path, name):
    colour = weights_file(tmp_path / "colour.pth", name, classes=2)
    grey = model.build(f"timm/{name}", **{**SHAPE, "channels": 1}).eval()
    settings = step1_train.build_parser().parse_args(
        ["--model", f"timm/{name}", "--pretrained", str(tmp_path / "colour.pth")]
    )
    settings.image_size = (32, 32)
    mean, _ = starting_weights.load_into(grey, settings, 1, None)
    assert len(mean) == 1

    images = torch.rand(2, 1, 32, 32)
    with torch.inference_mode():
        assert torch.allclose(grey(images), colour(images.expand(-1, 3, -1, -1)), atol=1e-4)


def test_position_embeddings_are_resized_to_the_images(tmp_path):
    large = weights_file(tmp_path / "large.pth", "test_vit", image_size=(64, 64)).state_dict()
    state = timm_weights.converted("timm/test_vit", large, 3, (32, 48))
    network = model.build("timm/test_vit", channels=3, classes=2, image_size=(32, 48))
    starting_weights.load_pretrained(network, state)
    assert state["pos_embed"].shape[1] < large["pos_embed"].shape[1]
    assert torch.equal(
        network.state_dict()["blocks.0.attn.qkv.weight"], large["blocks.0.attn.qkv.weight"]
    )


def test_head_is_the_classifier_that_timm_names():
    network = model.build("timm/test_convnext", **SHAPE)
    assert starting_weights.head_keys(network) == ["head.fc.weight", "head.fc.bias"]
    network = model.build("timm/test_efficientnet", **SHAPE)
    assert starting_weights.head_keys(network) == ["classifier.weight", "classifier.bias"]


# -------------------------------------------------------------------------------------- downloads
@pytest.fixture
def cache(here, monkeypatch):
    """An empty cache of the hub, and no network."""
    import huggingface_hub as hub
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(here / "hub"))

    def no_network(*_, **__):
        raise OSError("Name or service not known")

    monkeypatch.setattr(hub, "get_hf_file_metadata", no_network)
    monkeypatch.setattr(hub, "hf_hub_download", lambda *_: pytest.fail("tries for a minute"))


def test_without_a_network_the_error_names_the_file_to_fetch(call, here, photos, cache):
    asked = command(photos, "timm/test_efficientnet", "--pretrained")
    url = "https://huggingface.co/timm/test_efficientnet.r160_in1k/resolve/main/model.safetensors"
    call(step1_train.main, *asked).error(1, "Name or service", url, "--pretrained FILE")
    assert not (here / "runs").exists() or not os.listdir(here / "runs")


def test_weights_in_the_cache_are_taken_without_asking(here, cache):
    from safetensors.torch import save_file

    folder = here / "hub/models--timm--test_efficientnet.r160_in1k"
    snapshot = folder / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs/main").write_text("0" * 40)
    network = model.build("timm/test_efficientnet", **SHAPE)
    save_file(network.state_dict(), snapshot / "model.safetensors")
    path = timm_weights.download("timm/test_efficientnet")
    assert path == str(snapshot / "model.safetensors")


# -------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("timm/tf_efficientnet_lite", ["'timm/tf_efficientnet_lite4'", "--list-models"]),
        ("timm/resnet18.a9_in1k", ["timm/resnet18.a1_in1k"]),
        ("timm/hf-hub:someone/network", ["no network"]),
        ("timm/", ["no network"]),
        ("test_efficientnet", ["'timm/test_efficientnet'"]),
        ("timm/test_vit", ["30x32", "patches of 16x16"]),
        ("timm/test_maxvit", ["30x32", "160x160"]),
    ],
)
def test_networks_that_cannot_be_had(call, here, photos, name, words):
    asked = command(photos, name, "--image-size", "30x32")
    call(step1_train.main, *asked).error(2, *words)


def test_weights_of_another_network(call, here, photos):
    weights_file(here / "vit.pth", "test_vit")
    asked = command(photos, "timm/test_efficientnet", "--pretrained", "vit.pth")
    call(step1_train.main, *asked).error(2, "vit.pth", "architecture")


def test_weights_of_another_size_are_named_with_both_sizes():
    network = model.build("timm/test_vit", **SHAPE)
    state = network.state_dict()
    own = "x".join(map(str, state["pos_embed"].shape))
    state["pos_embed"] = torch.zeros(1, 99, 64)
    with pytest.raises(ValueError, match=f"1 entry differs .*'pos_embed' is 1x99x64.* {own}"):
        starting_weights.load_pretrained(network, state)


def test_network_that_cannot_be_exported_is_refused_before_training(
    call, here, photos, monkeypatch
):
    def branching(network, images):
        return torch.zeros(len(images), 2) + (1 if images.sum() > 0 else 0)

    monkeypatch.setattr(type(model.build("timm/test_resnet", **SHAPE)), "forward", branching)
    call(step1_train.main, *command(photos, "timm/test_resnet")).error(2, "cannot be exported")
    assert not (here / "runs").exists() or not os.listdir(here / "runs")


def test_timm_is_optional(call, here, photos, no_timm):
    for asked in (command(photos, "timm/test_resnet"), ["--list-models", "timm/*"]):
        call(step1_train.main, *asked).error(2, "pip install timm")


def test_export_without_timm_says_what_is_missing(call, here, photos, request):
    call(step1_train.main, *command(photos, "timm/test_resnet", "--calibration", "none")).done()
    request.getfixturevalue("no_timm")
    call(step2_export.main).error(1, "pip install timm")


# --------------------------------------------------------------------------------------- the list
def test_networks_are_listed_by_pattern(call):
    lines = call(step1_train.main, "--list-models", "timm/*net_lite0").done().out.splitlines()
    (row,) = [line for line in lines if line.startswith("timm/tf_efficientnet_lite0")]
    assert "4.65 M" in row and "224^2" in row and row.endswith("in1k")

    lines = call(step1_train.main, "--list-models", "resnet1*").done().out.splitlines()
    assert [line.split()[0] for line in lines[1 : lines.index("")]] == [
        "resnet18",
        "resnet101",
        "resnet152",
    ]
    call(step1_train.main, "--list-models", "*lite*").error(2, "'timm/*lite*'")
    call(step1_train.main, "--list-models", "timm/nosuch").error(2, "'timm/*lite*'")


def test_list_of_many_is_not_counted(call, monkeypatch):
    monkeypatch.setattr("training.listing.MOST_COUNTED", 1)
    listed = call(step1_train.main, "--list-models", "timm/test_*net").done()
    rows = [line for line in listed.out.splitlines() if line.startswith("timm/")]
    assert len(rows) > 3 and len([row for row in rows if " M " in row]) == 1
    assert f"first 1 of {len(rows)}" in listed.err
