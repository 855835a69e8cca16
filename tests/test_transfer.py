"""A few photos and a small target: features of frozen networks, and other shapes than squares."""

import csv
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import model
import step1_train
import step2_export
from data.split import Split
from deploy import device
from inference.images import decode_image, resize
from inference.predict import Model, predict
from training import fine_tuning, recipes, saliency
from training.calibration import CrossFitted
from training.features import LastLayer, start_head
from training.progress import Evaluation, Progress
from training.weights import place_of_download


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Random weights of the default network for five classes."""
    torch.manual_seed(1)
    network = model.build("airbench", channels=3, classes=5, image_size=(32, 32), width=0.25)
    path = tmp_path_factory.mktemp("weights") / "airbench.pth"
    torch.save(network.state_dict(), path)
    return path


def command(photos, *more):
    fixed = ("--data-dir", photos, "--image-size", 32, "--epochs", 2, "--threads", 1)
    return [*fixed, *more]


def features(photos):
    return sorted((photos / ".threestep").glob("features-*.npy"))


def test_frozen_networks_are_run_once_for_each_image(call, here, photos, weights, monkeypatch):
    asked = command(photos, "--width", 0.25, "--pretrained", weights, "--freeze-backbone")
    first = call(step1_train.main, *asked, "--name", "first").done()
    assert "features of 48 images" in first.err and "features of 16 images" in first.err
    assert len(features(photos)) == 2 and "augment none" in first.out
    monkeypatch.setattr(model.Airbench, "forward", lambda *_: pytest.fail("the network has run"))
    monkeypatch.setattr(step1_train, "write_pictures", lambda *_: None)
    with pytest.raises(pytest.fail.Exception):  # the check that the head is the network's end
        call(step1_train.main, *asked, "--name", "second")


def test_frozen_result_is_that_of_the_whole_network(call, here, photos, weights, in_process):
    asked = command(photos, "--width", 0.25, "--pretrained", weights, "--freeze-backbone")
    call(step1_train.main, *asked, "--name", "run").done()
    summary = json.loads((here / "runs/run/summary.json").read_text())
    again = call(step1_train.main, *asked, "--name", "again").done()
    assert "computed the features" not in again.err
    states = [
        torch.load(here / f"runs/{name}/checkpoint.pt", weights_only=True)["state_dict"]
        for name in ("run", "again")
    ]
    given = torch.load(weights, weights_only=True)
    assert all(torch.equal(states[0][key], states[1][key]) for key in given)
    assert all(
        torch.equal(states[0][key], given[key]) for key in given if not key.startswith("head")
    )
    command_line = "--run", "run", "--format", "torchscript"
    call(step2_export.main, *command_line).done()  # compares with the whole network
    parity = json.loads((here / "exports/run/parity.json").read_text())
    assert parity["torchscript"]["accuracy"] == summary["test_accuracy"]


def test_a_broken_cache_of_features_is_made_again(call, here, photos, weights):
    asked = command(photos, "--width", 0.25, "--pretrained", weights, "--freeze-backbone")
    call(step1_train.main, *asked).done()
    for path in features(photos):
        path.write_bytes(path.read_bytes()[:1000])
    assert "features of 48 images" in call(step1_train.main, *asked).done().err
    call(step1_train.main, *asked, "--cache-dir", "/dev/null/x").error(1, "--cache-dir")


def test_frozen_networks_are_not_augmented(call, here, photos, weights):
    asked = command(photos, "--width", 0.25, "--pretrained", weights, "--freeze-backbone")
    call(step1_train.main, *asked, "--augment", "flip").error(2, "--augment", "trained whole")


@pytest.mark.parametrize("frozen", [["--freeze-backbone"], []])
def test_few_images_all_calibrate_a_pretrained_network(call, here, photos, weights, frozen):
    crossed = ("--width", 0.25, "--calibration", "cross-fit")
    call(step1_train.main, *command(photos, *crossed)).error(2, "--pretrained")

    asked = command(photos, "--pretrained", weights, *frozen, "--name", "run")
    said = call(step1_train.main, *asked, *crossed).done().out
    assert "five more networks" in said and said.count("train loss") == 1
    checkpoint = torch.load(here / "runs/run/checkpoint.pt", weights_only=True)
    calibration = checkpoint["spec"]["calibration"]
    assert calibration["images"] == 48
    assert calibration["source"].startswith("5 last layers" if frozen else "5 networks")
    assert checkpoint["spec"]["known"]["images"] == 24
    assert checkpoint["epoch"] == 2 or not frozen  # training may have done harm
    assert not (here / "runs/run/twin").exists()


def last_layer(weight):
    """A last layer of this weight [classes, 2] with four features of two classes."""
    layer = torch.nn.Linear(2, 2)
    torch.nn.init.constant_(layer.bias, 0.5)
    layer.weight.data = torch.tensor(weight)
    features = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0], [0.0, 2.0]])
    split = Split(
        images=features,
        labels=torch.tensor([0, 0, 1, 1]),
        members=torch.arange(4),
        source=features.numpy(),
    )
    network = torch.nn.ModuleDict({"head": layer})
    deployable = SimpleNamespace(network=network)
    return LastLayer(deployable=deployable, splits={"train": split}, classes=2, head="head")


def test_the_head_of_a_frozen_network_is_fitted_unless_it_is_better():
    settings = SimpleNamespace(pretrained="weights.pth", freeze_backbone=True)
    random = last_layer([[-9.0, 5.0], [3.0, -4.0]])
    start_head(random, settings)
    split = random.splits["train"]
    assert random.network(split.images).argmax(1).tolist() == split.labels.tolist()

    trained = last_layer([[50.0, -50.0], [-50.0, 50.0]])
    start_head(trained, settings)
    assert trained.network.weight[0, 0] == 50


def test_fine_tuning_starts_with_a_fitted_head(call, here, photos, weights):
    start = ("--width", 0.25, "--pretrained", weights, "--fit", "crop")
    asked = command(photos, *start, "--lr", 1e-9, "--augment", "none")
    # nearly all is learned before the first step
    call(step1_train.main, *asked, "--name", "fitted").done()
    trained, given = (
        torch.load(path, weights_only=True)
        for path in (here / "runs/fitted/checkpoint.pt", weights)
    )
    assert torch.allclose(
        trained["state_dict"]["groups.0.0.weight"], given["groups.0.0.weight"], atol=1e-4
    )
    row = (here / "runs/fitted/metrics.csv").read_text().splitlines()[1].split(",")
    assert float(row[2]) > 0.8  # training accuracy of the first epoch


@pytest.mark.parametrize("calibration", ["twin", pytest.param("cross-fit", marks=pytest.mark.slow)])
def test_training_that_does_harm_is_not_kept(call, here, photos, weights, calibration):
    start = ("--width", 0.25, "--pretrained", weights, "--fit", "crop")
    start += ("--calibration", calibration)
    asked = command(photos, *start, "--lr", 10, "--optimizer", "adam")
    trained = call(step1_train.main, *asked, "--name", "harmed").done()
    assert "training did harm" in trained.err and "which is kept" in trained.err

    summary = json.loads((here / "runs/harmed/summary.json").read_text())
    checkpoint = torch.load(here / "runs/harmed/checkpoint.pt", weights_only=True)
    given = torch.load(weights, weights_only=True)
    assert summary["epoch_kept"] == checkpoint["epoch"] == 0
    assert torch.equal(checkpoint["state_dict"]["groups.0.0.weight"], given["groups.0.0.weight"])
    assert summary["test_accuracy"] > 0.8


@pytest.mark.parametrize(
    ("calibration", "others"), [("twin", "its twin"), ("cross-fit", "those that calibrate it")]
)
def test_the_result_is_an_average(call, here, photos, weights, calibration, others):
    start = ("--width", 0.25, "--pretrained", weights, "--fit", "crop")
    start += ("--calibration", calibration)
    asked = command(photos, *start, "--name", "run", "--lr", 1e-4)
    trained = call(step1_train.main, *asked).done()
    assert f"the average of the network and {others}" in trained.out

    def differs():
        checkpoint = torch.load(here / "runs/run/checkpoint.pt", weights_only=True)
        own = checkpoint["training"]["network"]["groups.0.0.weight"]
        return not torch.equal(own, checkpoint["state_dict"]["groups.0.0.weight"])

    summary = json.loads((here / "runs/run/summary.json").read_text())
    assert summary["averaged_with_twin"] and differs()
    assert "the average of several networks" in (here / "runs/run/report.html").read_text("utf-8")
    rows = csv.DictReader((here / "runs/run/metrics.csv").open())
    assert summary["train_seconds"] > 1.01 * sum(float(row["seconds"]) for row in rows)

    # Training goes on from the network's own weights, and ends with a new average.
    epochs = summary["epochs"] + 1
    resumed = call(step1_train.main, "--resume", "run", "--epochs", epochs).done()
    assert f"the average of the network and {others}" in resumed.out and differs()


def test_a_network_too_far_from_its_twin_is_not_averaged(monkeypatch):
    rights = iter([0.4, 0.6])  # of the average, and of the twin
    monkeypatch.setattr(fine_tuning, "evaluate", lambda *_: Evaluation(1.0, next(rights), None))
    final = last_layer([[1.0, 0.0], [0.0, 1.0]])
    progress = Progress()
    twin = last_layer([[9.0, 0.0], [0.0, 9.0]])
    twin.splits["test"] = twin.splits["train"]
    assert fine_tuning.average_with_twin(final, twin, progress, machine=None) is final
    assert progress.best is None and final.network.weight[0, 0] == 1


def test_harm_is_more_than_chance():
    def right(first, last):
        return (np.arange(100) >= first) & (np.arange(100) < last)

    assert fine_tuning.did_harm(trained=right(0, 50), with_head=right(0, 60))
    assert not fine_tuning.did_harm(trained=right(0, 60), with_head=right(0, 61))
    assert not fine_tuning.did_harm(trained=right(0, 50), with_head=right(30, 84))  # 34, 30
    assert not fine_tuning.did_harm(trained=right(0, 50), with_head=right(0, 50))


def test_what_calibrates_an_average_is_as_far_from_the_start(monkeypatch):
    """If the average is no better on its own images than networks on new ones, it is not kept."""
    settings = SimpleNamespace(
        calibration="cross-fit",
        augment=[],
        pretrained="default",
        freeze_backbone=False,
        batch_norm="frozen",
    )
    final = last_layer([[1.0, 0.0], [0.0, 1.0]])
    right = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    crossed = CrossFitted(right, 0.0, right, last_layer([[9.0, 0.0], [0.0, 9.0]]), right / 2)
    for accuracy, result in ((1.0, crossed.average), (0.9, final)):
        evaluated = Evaluation(1.0, accuracy, None)
        monkeypatch.setattr(fine_tuning, "evaluate", lambda *_, found=evaluated: found)
        progress = Progress()
        kept, logits = fine_tuning.choose_result_by_folds(
            final, crossed, progress, None, settings, None
        )
        assert kept is result
        assert torch.equal(logits, right / 2 if kept is crossed.average else right)
        assert (progress.best is None) == (kept is final)


def test_photos_are_told_the_better_start_once(call, here, photos, weights):
    asked = ("--data-dir", photos, "--epochs", 1, "--image-size", 64, "--model", "mynet")
    said = call(step1_train.main, *asked).done().err
    assert said.count("--model mobilenet_v3_small --pretrained") == 1
    small = call(step1_train.main, *asked[:4], "--image-size", 32, "--model", "mynet").done().err
    assert "--pretrained" not in small


@pytest.fixture
def cached_weights(here, monkeypatch):
    """A cache of torch with random weights of the default start."""
    monkeypatch.setenv("TORCH_HOME", str(here / "hub"))
    path = Path(place_of_download(recipes.START))
    path.parent.mkdir(parents=True)
    network = model.build(recipes.START, channels=3, classes=1000, image_size=(96, 96))
    torch.save(network.state_dict(), path)
    return path


def test_weights_in_a_cache_start_photos_by_default(call, here, photos, cached_weights):
    asked = ("--data-dir", photos, "--epochs", 1, "--calibration", "none", "--name", "run")
    said = call(step1_train.main, *asked, "--image-size", 64).done()
    assert str(cached_weights) in said.err and "--model airbench" in said.err
    assert "few to start from nothing: --model" not in said.err

    config = json.loads((here / "runs/run/config.json").read_text())
    assert config["model"] == recipes.START and config["pretrained"] == "default"
    cached_weights.unlink()
    resumed = call(step1_train.main, "--resume", "run", "--epochs", 2).done()
    assert recipes.START in resumed.out


@pytest.mark.parametrize(
    "asked",
    [
        ["--model", "airbench"],
        ["--width", "0.25"],
        ["--image-size", "32"],  # no photos
        [],  # without weights
    ],
)
def test_others_start_from_nothing(here, photos, cached_weights, asked):
    args, given = step1_train.parse(["--data-dir", str(photos), *asked])
    settings = recipes.resolve(args, given)
    if not asked:
        cached_weights.unlink()
    assert step1_train.better_start(settings, args, given).model == "airbench"


def test_weights_in_the_hub_serve_too(here, photos, monkeypatch):
    pytest.importorskip("timm")
    monkeypatch.setenv("TORCH_HOME", str(here / "hub"))
    weights = here / "model.safetensors"
    weights.touch()
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: str(weights))
    args, given = step1_train.parse(["--data-dir", str(photos)])
    settings = step1_train.better_start(recipes.resolve(args, given), args, given)
    assert settings.model == recipes.START_OF_TIMM and settings.pretrained == "default"


@pytest.mark.parametrize("fit", ["crop", pytest.param("letterbox", marks=pytest.mark.slow)])
def test_the_shape_of_images_is_kept_by_every_reader(call, here, photos, fit, in_process):
    asked = command(
        photos, "--model", "mynet", "--fit", fit, "--calibration", "none", "--name", fit
    )
    call(step1_train.main, *asked).done()
    call(step2_export.main, "--run", fit, "--format", "onnx").done()
    call(step2_export.main, "--run", fit, "--format", "torchscript", "--fixed").done()
    (photo, *_) = sorted(photos.glob("test/left/*.png"))
    answers = []
    for name in ("model.onnx", "model.fixed.pt", "model.pt"):
        file = Model(here / "exports" / fit / name)
        assert file.spec["fit"] == fit
        answers.append(predict(photo, file)["top"][0]["probability"])
    assert max(answers) - min(answers) < 5e-3  # the fixed file is given rounded pixels
    stretched = resize(decode_image(photo, 3), (32, 32))
    kept = resize(decode_image(photo, 3), (32, 32), fit)
    bars = (kept.sum((1, 2)) == 0).sum()
    assert bars in ((0,) if fit == "crop" else (14, 15, 16)) and not np.allclose(stretched, kept)


def test_crop_is_that_of_pillow():
    pixels = np.random.default_rng(0).integers(0, 256, (300, 201, 1), dtype=np.uint8)
    ours = resize(pixels, (32, 48), "crop")[..., 0]
    image = Image.fromarray(pixels[..., 0]).convert("F")
    wanted = np.asarray(image.resize((48, 32), Image.Resampling.BILINEAR, box=(0, 83, 201, 217)))
    assert np.abs(ours - wanted).max() < 1e-2
    graph = model.resize(torch.from_numpy(pixels)[None], (32, 48), "crop")[0, ..., 0].numpy()
    assert np.abs(graph - ours).max() < 1e-3


def test_tiny_networks_fit_into_96_kilobytes():
    for classes in (2, 10):
        network = model.build("tiny", channels=3, classes=classes, image_size=(32, 32))
        assert sum(p.numel() for p in network.parameters()) <= 96 * 1024


def test_tiny_networks_of_earlier_runs_keep_gelu():
    shape = {"channels": 1, "classes": 2, "image_size": (28, 28)}
    old = model.build("tiny", **shape, activation=None)  # as a run without the option records it
    new = model.build("tiny", **shape, activation="hardswish")
    new.load_state_dict(old.state_dict())
    kinds = [{type(layer) for layer in network.modules()} for network in (old, new)]
    assert torch.nn.GELU in kinds[0] and torch.nn.Hardswish not in kinds[0]
    assert torch.nn.Hardswish in kinds[1] and torch.nn.GELU not in kinds[1]

    images = torch.rand(2, 1, 28, 28)
    assert not torch.equal(old.eval()(images), new.eval()(images))


def test_what_a_device_must_hold():
    first, second = torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.Conv2d(8, 4, 1)
    network = torch.nn.Sequential(first, torch.nn.BatchNorm2d(8), torch.nn.ReLU(), second).eval()
    needed = device.needs(network, 3, 10, 10)
    # the first's result with the second's; ReLU overwrites
    assert needed["activations"] == (8 + 4) * 100
    assert needed["multiply_adds"] == (27 * 8 + 8 * 4) * 100
    # with batch norm's, and its counter
    assert needed["weights"] == 27 * 8 + 8 + 8 * 4 + 4 + 4 * 8 + 1
    residual = device.needs(model.Residual(8).eval(), 8, 10, 10)
    # the input waits for the sum while a convolution runs
    assert residual["activations"] == 3 * 8 * 100


def test_attention_is_counted():
    network = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    multiply_adds = device.needs(network, 5, 8)["multiply_adds"]
    assert multiply_adds == 5 * 8 * (3 * 8 + 8 + 2 * 16) + 2 * 5 * 5 * 8


def test_step2_says_what_an_image_needs(trained):
    lines = trained.printed[1].out.splitlines()
    (line,) = [line for line in lines if line.startswith("one input needs")]
    spec = Model(trained.export / "model.onnx").spec
    assert (
        f"{4e-6 * spec['device']['weights']:.2f} MB of weights" in line
        and "M multiply-adds" in line
    )
    assert spec["device"]["weights"] >= spec["parameters"] > 0


def test_the_place_that_counts_is_found():
    """A network whose answer rests on the brightness of one corner has looked at that corner."""
    torch.manual_seed(0)
    network = model.build("airbench", channels=1, classes=2, image_size=(32, 32), width=0.25)
    network.forward = lambda x: torch.stack(
        [x[:, 0, :8, 24:].mean((1, 2)), 0 * x.sum((1, 2, 3)) - 9], 1
    )
    deployable = model.Deployable(network, (32, 32), [0.0], [1.0])
    looked = saliency.where_looked(deployable, torch.full((32, 32, 1), 200, dtype=torch.uint8))
    assert looked[:8, 24:].min() == 1 and looked.sum() == 64


@pytest.mark.pictures
@pytest.mark.parametrize("frozen", [True, False])
def test_the_report_shows_where_the_network_looked(call, here, photos, weights, frozen):
    asked = command(photos, "--width", 0.25, "--calibration", "none", "--name", "run")
    call(
        step1_train.main,
        *asked,
        *(["--pretrained", weights, "--freeze-backbone"] if frozen else []),
    ).done()
    assert (
        "a hint at what the network looks at, not a proof"
        in (here / "runs/run/report.html").read_text()
    )
    assert (here / "runs/run/looked.png").stat().st_size > 1000
