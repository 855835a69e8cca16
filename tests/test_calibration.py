"""Calibrated probabilities, and the output `known`: from their fit to what users of a file see."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from conftest import onnx_with
from PIL import Image

import data
import model
import step1_train
import step2_export
import step3_infer
from data.split import Split, make_split
from data.unseen import unseen_images
from deploy import camera, comparing, trust, unknown
from deploy.reference import reference
from inference import metrics
from inference.errors import Problem
from inference.predict import Model, predict
from training import calibration, console, recipes

pytestmark = pytest.mark.calibrated


def noise(size, count=20):
    return np.random.default_rng(0).integers(0, 256, (count, size, size, 1), dtype=np.uint8)


@pytest.fixture
def noise_file(here):
    Image.fromarray(noise(40, 1)[0, ..., 0]).save(here / "noise.png")
    return here / "noise.png"


def rows(result):
    return [json.loads(line) for line in result.done().out.splitlines()]


# ------------------------------------------------------------------------------------------ fitting


def draw(temperature, n=4000):
    """Logits [n, 5] and labels [n] for which this temperature is right."""
    rng = np.random.default_rng(0)
    logits = torch.from_numpy(rng.normal(0, 2, (n, 5)))
    chances = (logits / temperature).softmax(1).numpy()
    labels = (rng.random((n, 1)) > chances.cumsum(1)).sum(1).clip(max=4)
    return logits, torch.from_numpy(labels)


@pytest.mark.parametrize("temperature", [0.4, 1.0, 3.0])
def test_the_temperature_is_found(temperature):
    assert calibration.fit_temperature(*draw(temperature)) == pytest.approx(temperature, rel=0.1)


def test_a_network_without_a_mistake_is_not_taken_for_infallible():
    logits = torch.eye(10).repeat(10, 1) * 8
    temperature = calibration.fit_temperature(logits, torch.arange(10).repeat(10))
    assert 0.3 < temperature < 3 and (logits / temperature).softmax(1).amax() < 1


def familiarity(statistics, logits):
    gaussian = calibration.fit_gaussian(statistics)
    distance = calibration.log_distance(gaussian, statistics)
    return model.Familiarity(calibration.fit_familiarity(gaussian, distance, logits.amax(1)))


def test_known_is_the_share_of_held_out_images_that_look_less_familiar():
    generator = torch.Generator().manual_seed(0)
    statistics, logits = (torch.randn(3000, k, generator=generator) for k in (12, 4))
    fitted = familiarity(statistics, logits)
    known = fitted(statistics, logits)
    for share in (0.01, 0.05, 0.5):
        assert (known >= share).float().mean() == pytest.approx(1 - share, abs=0.002)
    assert (fitted(statistics + 20, logits) == 0).all()


def test_a_channel_that_never_changes_does_no_harm():
    statistics = torch.cat([torch.randn(300, 5), torch.zeros(300, 2)], 1)
    assert (
        familiarity(statistics, torch.randn(300, 3))(statistics, torch.randn(300, 3))
        .isfinite()
        .all()
    )


def test_other_light_is_familiar_and_leaves_others_unknown():
    rng = np.random.default_rng(0)
    pixels = torch.from_numpy(rng.normal(128, 15, (400, 8, 8, 1)).clip(0, 255).astype(np.uint8))
    split = Split(
        images=pixels,
        labels=torch.zeros(400, dtype=torch.int64),
        members=torch.arange(400),
        source=pixels.numpy(),
    )
    deployable = model.Deployable(torch.nn.Flatten(), (8, 8), [0.5], [0.1])
    relit = calibration.relit_statistics(deployable, split, ())
    assert torch.equal(relit, calibration.relit_statistics(deployable, split, ()))

    def distances(images, gaussian):
        _, statistics = model.run_with_statistics(
            deployable.network, deployable.normalise(images), ()
        )
        return calibration.log_distance(gaussian, statistics).mean()

    _, own = model.run_with_statistics(deployable.network, deployable.normalise(pixels), ())
    before = calibration.fit_gaussian(own)
    after = calibration.fit_gaussian(torch.cat([own, relit]))
    darker = (pixels * 0.6).byte()
    speckled = torch.where(torch.rand(pixels.shape) < 0.5, 0, 255)
    assert distances(darker, before) > distances(pixels, before) + 3
    assert distances(darker, after) < distances(pixels, after) + 1
    assert distances(speckled, after) > distances(pixels, after) + 3


@pytest.mark.parametrize(
    ("name", "layers"), [("airbench", 1), ("mynet", 3), ("resnet18", 1), ("mlp", 0)]
)
def test_middle_layers_are_found_and_leave_the_network_as_it_was(name, layers):
    network = model.build(name, channels=3, classes=4, image_size=(32, 32)).eval()
    images = torch.randn(2, 3, 32, 32)
    found = model.middle_layers(network, 3, (32, 32))
    logits, statistics = model.run_with_statistics(network, images, found)
    assert len(found) == layers and statistics.shape[0] == 2 and 10 < statistics.shape[1] <= 320
    assert torch.equal(logits, network(images))
    assert not [module for module in network.modules() if module._forward_hooks]


class Layout(torch.nn.Module):
    """Gives what `change` makes of its input."""

    def __init__(self, change):
        super().__init__()
        self.change = change

    def forward(self, x):
        return self.change(x)


@pytest.mark.parametrize("size", [(32, 32), (32, 48)])
def test_statistics_are_of_images_and_channels_in_any_layout(size):
    blocks = [
        torch.nn.Conv2d(3, 12, 4, 4),
        Layout(lambda x: x.permute(0, 2, 3, 1)),  # as Swin has its maps
        torch.nn.LayerNorm(12),
        Layout(lambda x: x.reshape(len(x) * 2, -1, 12)),  # as attention has its windows
        Layout(lambda x: x.reshape(len(x) // 2, -1, 12).mean(1)),
    ]
    network = torch.nn.Sequential(*blocks).eval()
    found = model.middle_layers(network, 3, size)
    assert found == (f"1{model.CHANNELS_LAST}",)

    images = torch.randn(3, 3, *size)
    _, statistics = model.run_with_statistics(network, images, found)
    _, expected = model.run_with_statistics(network, images, ("0",))
    assert statistics.shape == (3, 24) and torch.equal(statistics, expected)


def test_calibration_error():
    probabilities = np.tile([[0.8, 0.2]], (1000, 1))
    labels = (np.arange(1000) % 10 >= 7).astype(int)  # 70 % right
    assert metrics.calibration_error(probabilities, labels, bins=1) == pytest.approx(0.1)


def test_folds_have_each_image_once_and_copies_together():
    labels = np.arange(60) % 3
    images = np.zeros((60, 2, 2, 1), np.uint8)
    split = make_split(images, labels, (2, 2), "stretch", torch.device("cpu"))
    split.same = np.arange(60)
    split.same[3] = split.same[0]  # a copy
    folds = np.stack(calibration.folds(split, seed=0))  # [folds, n]

    assert (folds.sum(0) == 1).all() and (folds.sum(1) >= 10).all()
    assert (folds[:, 3] == folds[:, 0]).all()
    for fold in folds:
        assert set(labels[fold]) == {0, 1, 2}


# ----------------------------------------------------------------------------------------- in a run

FAST = ["--model", "mlp", "--hidden", "32", "--epochs", "2"]


def checkpoint(here, name="digits-mlp"):
    return torch.load(here / "runs" / name / "checkpoint.pt", weights_only=True)


def test_few_images_are_calibrated_by_a_twin(call, here):
    result = call(step1_train.main, *FAST).done()
    assert (
        "a second network" in result.out
        and "--calibration none" in result.out
        and result.out.count("train loss") == 1
    )
    spec, summary = (
        checkpoint(here)["spec"],
        json.loads((here / "runs/digits-mlp/summary.json").read_text()),
    )
    assert "twin" in spec["calibration"]["source"] and 200 < spec["calibration"]["images"] < 300
    assert summary["temperature"] == spec["temperature"] != 1
    assert not (here / "runs" / "digits-mlp" / "twin").exists()


def test_many_images_are_held_out_for_it(call, here, monkeypatch):
    monkeypatch.setattr(recipes, "MANY", 1000)
    result = call(step1_train.main, *FAST).done()
    assert "1,367 train, 70 held-out, 360 test" in result.out
    assert checkpoint(here)["spec"]["calibration"]["images"] == 70

    # step2 finds the same images again: among themselves, their ranks are evenly spread.
    trained = step2_export.read_run(str(here / "runs/digits-mlp"))
    dataset = step2_export.load_data(trained)
    unseen = unseen_images(dataset, trained.spec["arguments"])
    known = reference(trained, unseen.images).known
    assert np.abs(np.sort(known) - (np.arange(70) + 0.5) / 70).max() < 0.01
    assert unseen_images(dataset, {"calibration": "twin"}) is None


def test_a_validation_split_serves_as_well(call, here):
    call(step1_train.main, *FAST, "--val-fraction", 0.2).done()
    assert checkpoint(here)["spec"]["calibration"]["source"] == "the validation split"
    call(step1_train.main, *FAST, "--val-fraction", 0.2, "--calibration", "twin").error(
        2, "validation split"
    )


def test_without_calibration_there_is_no_second_output(call, here, samples, in_process):
    call(step1_train.main, *FAST, "--calibration", "none").done()
    assert (
        checkpoint(here)["spec"]["temperature"] is None and checkpoint(here)["familiarity"] is None
    )
    call(step2_export.main, "--reject", 0.99).error(2, "--reject", "--calibration")
    call(step2_export.main).done()
    for file in ("model.onnx", "model.pt"):
        (row,) = rows(
            call(
                step3_infer.main,
                "--format",
                "json",
                "--model",
                f"exports/digits-mlp/{file}",
                samples[0],
            )
        )
        assert row["known"] is None
        call(
            step3_infer.main, "--model", f"exports/digits-mlp/{file}", samples[0], "--reject", 0.9
        ).error(2, "--reject")


def test_it_is_for_classes(call, here):
    call(step1_train.main, "--dataset", "linear", "--calibration", "twin").error(
        2, "--calibration", "classes"
    )
    call(step1_train.main, "--calibration", "platt").error(2, "held-out")


# ---------------------------------------------------------------------------------------- in a file


def test_reject_keeps_digits_in_other_light(trained):
    file = Model(trained.export / "model.onnx")
    digits = data.load("digits").test_images
    least = trust.known_threshold(0.99)

    def kept(images):
        return (file.run(images)[1] >= least).mean()

    rng = np.random.default_rng(0)
    assert kept(digits) == pytest.approx(0.99, abs=0.015)
    assert kept(camera.brightness(digits, 0.6, rng)) > 0.95
    assert kept(camera.contrast(digits, 0.5, rng)) > 0.95
    for kind, images in unknown.unknown_kinds(8, 8, 1):
        assert kept(images) < 0.1, kind


@pytest.mark.parametrize("file", ["model.onnx", "model.pt"])
def test_noise_is_not_known_and_digits_are(call, trained, samples, noise_file, file):
    arguments = ["--model", trained.export / file, "--format", "json", *samples, noise_file]
    *digits, unfamiliar = rows(call(step3_infer.main, *arguments))
    assert unfamiliar["known"] == 0 and min(row["known"] for row in digits) > 0
    assert {row["label"] for row in (*digits, unfamiliar)} <= set(
        "0123456789"
    )  # nothing is rejected by default


def test_reject_and_min_probability_change_the_label_and_keep_the_best_guess(
    call, trained, samples, noise_file
):
    arguments = ["--model", trained.export / "model.onnx", samples[3], noise_file]
    digit, unfamiliar = rows(
        call(step3_infer.main, "--format", "json", "--reject", 0.99, *arguments)
    )
    assert digit["label"] == "3" and unfamiliar["label"] == "unknown"
    assert unfamiliar["top"][0]["label"] in set("0123456789")
    (digit, _) = rows(
        call(step3_infer.main, "--format", "json", "--min-probability", 1, *arguments)
    )
    assert digit["label"] == "unsure" and digit["top"][0]["label"] == "3"
    text = call(step3_infer.main, "--reject", 0.99, *arguments).done().out.splitlines()
    assert "unknown" not in text[0] and "known " in text[0] and text[1].split("  ")[1] == "unknown"
    table = (
        call(step3_infer.main, "--format", "csv", "--reject", 0.99, *arguments)
        .done()
        .out.splitlines()
    )
    assert table[0].startswith("path,error,label,probability,known,label_1,probability_1,label_2")
    assert table[2].split(",")[2] == "unknown" and table[2].split(",")[5] in set("0123456789")


@pytest.mark.parametrize("option", ["--reject", "--min-probability"])
@pytest.mark.parametrize("value", ["1.5", "-0.1", "x", "nan"])
def test_thresholds_are_shares(call, trained, samples, option, value):
    model_file = ["--model", trained.export / "model.onnx", samples[0]]
    call(step3_infer.main, *model_file, f"{option}={value}").error(2, option, "from 0 to 1")
    call(step2_export.main, f"{option}={value}").error(2, option, "from 0 to 1")


def test_a_file_can_bring_its_own_thresholds(
    call, small_run, here, samples, noise_file, in_process
):
    limits = "--reject", 0.99, "--min-probability", 0.999
    call(step2_export.main, "--format", "torchscript", *limits).done()
    file = here / "exports" / "small" / "model.pt"
    labels = [
        row["label"]
        for row in rows(call(step3_infer.main, "--format", "json", "--model", file, noise_file))
    ]
    assert labels == ["unknown"]
    answer = predict(samples[0], Model(file))
    assert answer["label"] == "unsure" and answer["known"] > 0.01


@pytest.mark.parametrize(
    "lie",
    [
        {"known": None, "reject": 0.9},
        {"known": {"tolerance": "wide"}},
        {"reject": 7},
        {"min_probability": "half"},
        {"known": 3},
    ],
)
def test_a_spec_that_lies_is_one_error(call, trained, here, samples, lie):
    file = onnx_with(trained.export / "model.onnx", here / "model.onnx", **lie)
    result = call(step3_infer.main, "--model", file, samples[0])
    assert result.code == 1 and "spec" in result.err and "Traceback" not in result.err


def test_a_regression_has_neither(call, linear):
    model_file = ["--model", linear.export / "model.onnx", "--values", "1,2,3,4,5"]
    (row,) = rows(call(step3_infer.main, *model_file, "--format", "json"))
    assert set(row) == {"values", "prediction"}
    call(step3_infer.main, *model_file, "--reject", 0.9).error(2, "--reject")


# ---------------------------------------------------------------------------------------- the proof


def edit(file, change):
    """Change a tensor of an ONNX file: change(name, array) returns a new array or None."""
    graph = onnx.load(file)
    for tensor in graph.graph.initializer:
        changed = change(tensor.name, onnx.numpy_helper.to_array(tensor))
        if changed is not None:
            tensor.CopyFrom(onnx.numpy_helper.from_array(changed, tensor.name))
    onnx.save(graph, file)


def test_another_table_is_caught(call, small_run, plant, in_process):
    def move_table(good, path):
        shutil.copy(good, path)
        edit(path, lambda name, array: array + np.float32(1) if array.shape == (1000,) else None)

    plant(move_table)
    result = call(step2_export.main, "--format", "onnx")
    result.error(1, "known differs")


def test_what_the_test_split_does_not_bear_out_is_a_warning_with_the_way_out():
    rng = np.random.default_rng(0)
    spec, labels = {"known": {"images": 2500}, "temperature": 0.5}, rng.integers(0, 3, 2000)
    # right by chance only
    sure = np.full((2000, 3), 0.005) + 0.985 * np.eye(3)[rng.integers(0, 3, 2000)]
    figures, warnings = trust.check_promises(
        spec, comparing.Outputs(sure, rng.random(2000) ** 2), labels
    )
    assert [words for words in warnings if "keeps" in words] and [
        words for words in warnings if "entropy" in words
    ]
    assert "--uncalibrated" in warnings[-1] and figures["nll"] > figures["nll_uncalibrated"]
    fair = np.full((2000, 3), 1 / 3)
    assert trust.check_promises(spec, comparing.Outputs(fair, rng.random(2000)), labels)[1] == []


def test_a_run_can_be_exported_uncalibrated(call, small_run, here, in_process):
    call(step2_export.main, "--format", "torchscript", "--uncalibrated").done()
    exported = Model(here / "exports" / "small" / "model.pt")
    assert exported.run(noise(8))[1] is None and exported.spec["temperature"] is None


def test_int8_has_a_table_of_its_own(all_formats):
    parity = json.loads((all_formats / "parity.json").read_text())
    assert parity["onnx-int8"]["kept"]["0.95"] == pytest.approx(
        parity["onnx"]["kept"]["0.95"], abs=0.03
    )
    tables = []
    for file in ("model.onnx", "model.int8.onnx"):
        arrays = map(onnx.numpy_helper.to_array, onnx.load(all_formats / file).graph.initializer)
        tables += [array for array in arrays if array.shape == (1000,)]
    assert len(tables) == 2 and not np.array_equal(*tables) and (np.diff(tables[1]) >= 0).all()
    quantized = Model(all_formats / "model.int8.onnx")
    assert (quantized.run(noise(8))[1] < trust.known_threshold(0.99)).all()


def test_a_shifted_test_split_is_exported_with_a_warning(
    call, small_run, here, in_process, monkeypatch
):
    """Real training and test sets differ: that stops nobody."""
    monkeypatch.setattr(
        trust, "check_promises", lambda *_: ({}, ["--reject 0.99 keeps 89.2%", trust.HINT])
    )
    result = call(step2_export.main, "--format", "torchscript").done()
    assert "warning: exports/small/model.pt: --reject 0.99 keeps 89.2%" in result.err
    parity = json.loads((here / "exports" / "small" / "parity.json").read_text())["torchscript"]
    assert parity["passed"] and parity["warnings"] == ["--reject 0.99 keeps 89.2%", trust.HINT]
    assert "keeps 89.2%" in (small_run / "report.html").read_text()


def test_an_int8_table_of_another_kind_is_a_fault():
    known = np.random.default_rng(0).random(2000)
    assert trust.compare_thresholds(known, known) == []
    assert "the network's" in trust.compare_thresholds(known, known * 0.5)[0]


# --------------------------------------------------------------------------------------- few images


@pytest.mark.parametrize(
    "count, pretrained, asked, expected",
    [
        (199, None, "none", "--calibration twin"),
        (49, "default", "none", "--calibration cross-fit"),
        (200, None, "none", None),
        (199, None, "twin", "--calibration none"),
    ],
)
def test_the_settings_say_how_few_images_get_calibrated(count, pretrained, asked, expected):
    settings = SimpleNamespace(calibration=asked, pretrained=pretrained)
    trainee = SimpleNamespace(splits={"train": range(count)})

    said = " ".join(console.about_calibration(settings, SimpleNamespace(has_images=True), trainee))

    assert expected in said if expected else not said


@pytest.mark.calibrated
@pytest.mark.parametrize(
    "count, pretrained, frozen, expected",
    [
        (49, "default", False, "none"),
        (50, "default", False, "cross-fit"),
        (199, "default", False, "cross-fit"),
        (199, None, False, "none"),
        (200, "default", False, "twin"),
        (200, "default", True, "cross-fit"),
        (200, None, False, "twin"),
        (20_000, "default", True, "held-out"),
    ],
)
def test_how_many_images_are_calibrated_how_by_default(count, pretrained, frozen, expected):
    settings = SimpleNamespace(
        calibration=None,
        val_fraction=None,
        patience=None,
        pretrained=pretrained,
        freeze_backbone=frozen,
    )
    dataset = SimpleNamespace(val_images=None, train_images=range(count))
    assert recipes.choose_calibration(settings, dataset) == expected


@pytest.mark.parametrize("how", ["held-out", "twin", "cross-fit"])
def test_too_few_images_to_calibrate_with(how):
    def split(labels):
        return make_split(
            np.zeros((len(labels), 2, 2, 1), np.uint8),
            np.array(labels),
            (2, 2),
            "stretch",
            torch.device("cpu"),
        )

    settings = SimpleNamespace(calibration=how, seed=0)
    few = {"train": split([0, 1]), "held-out": split([])}
    with pytest.raises(Problem, match=f"--calibration {how} needs more than 2 training images"):
        calibration.refuse_too_few(few, settings)
    enough = {"train": split([0, 1] * 5), "held-out": split([0, 1])}
    calibration.refuse_too_few(enough, settings)
