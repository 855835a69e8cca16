"""Step 1: what a run writes, that it repeats, and what happens on wrong command lines."""

import csv
import errno
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from torchvision import models

import data
import model
import step1_train
import step2_export
from inference import metrics
from report import page
from training import evaluation, listing, recipes, runs

TINY = ["--model", "mlp", "--hidden", "16", "--epochs", "2"]


def rows_of(run):
    return list(csv.DictReader((run / "metrics.csv").read_text().splitlines()))


def load(run):
    return torch.load(run / "checkpoint.pt", weights_only=True)


def test_default_network_learns_the_digits(trained):
    summary = json.loads((trained.run / "summary.json").read_text())
    assert summary["test_accuracy"] >= 0.98 and 0 < summary["test_loss"] < 1
    assert (summary["dataset"], summary["model"], summary["epochs"]) == ("digits", "airbench", 20)
    assert summary["train_seconds"] > 0 and summary["parameters"] > 10_000


def test_run_directory_holds_only_whole_files(trained):
    names = {path.name for path in trained.run.iterdir()}
    assert names >= {"checkpoint.pt", "config.json", "metrics.csv", "summary.json", "report.html"}
    assert names >= {"curves.png", "confusion.png", "samples.png", "mistakes.png"}
    assert not [name for name in names if "tmp" in name or name.startswith(".")]


def test_checkpoint_is_plain_and_complete(trained):
    checkpoint, summary = load(trained.run), json.loads((trained.run / "summary.json").read_text())
    assert checkpoint.keys() >= {"schema", "spec", "state_dict", "arguments", "epoch"}
    assert checkpoint["schema"] == 2 and checkpoint["epoch"] == 20
    assert (
        checkpoint["arguments"]["epochs"] == 20 and checkpoint["arguments"]["dataset"] == "digits"
    )
    spec = checkpoint["spec"]
    keys = "schema task classes channels image_size resize mean std dataset model parameters"
    keys += " test_accuracy"
    assert not [
        key for key in [*keys.split(), "arguments", "versions", "created"] if key not in spec
    ]
    assert json.loads(json.dumps(spec)).keys() == spec.keys()  # it travels as JSON
    assert (spec["task"], spec["classes"], spec["channels"]) == (
        "classification",
        list("0123456789"),
        1,
    )
    assert (
        list(spec["image_size"]) == [32, 32] and 0 < spec["mean"][0] < 1 and 0 < spec["std"][0] < 1
    )
    assert (
        spec["test_accuracy"] == summary["test_accuracy"]
        and spec["parameters"] == summary["parameters"]
    )
    assert {value.dtype for value in checkpoint["state_dict"].values()} <= {
        torch.float32,
        torch.int64,
    }


def test_metrics_have_a_row_for_each_epoch(trained):
    rows = rows_of(trained.run)
    assert list(rows[0]) == [
        "epoch",
        "train_loss",
        "train_accuracy",
        "test_loss",
        "test_accuracy",
        "lr",
        "seconds",
    ]
    assert [row["epoch"] for row in rows] == [str(epoch) for epoch in range(1, 21)]
    assert float(rows[-1]["train_loss"]) < float(rows[0]["train_loss"])
    summary = json.loads((trained.run / "summary.json").read_text())
    assert float(rows[-1]["test_accuracy"]) == summary["test_accuracy"]


def test_derived_configuration_is_printed_before_the_table(trained):
    assert trained.printed[0].err == ""
    before, table = trained.printed[0].out.split("epoch   train loss", 1)
    for word in (
        "digits",
        "airbench",
        "1,437",
        "360",
        "32x32",
        "20 epochs",
        "batch 64",
        "lr 0.08",
        "muon",
        "translate",
    ):
        assert word in before
    assert f"{load(trained.run)['spec']['parameters']:,} parameters" in before
    assert len(re.findall(r"^ +\d+  ", table, re.MULTILINE)) == 20
    config = json.loads((trained.run / "config.json").read_text())
    assert (config["batch_size"], config["lr"], config["optimizer"]) == (64, 0.08, "muon")


def test_the_device_and_precision_used_are_recorded(call, here):
    out = (
        call(step1_train.main, *TINY, "--epochs", 1, "--device", "cpu", "--precision", "bf16")
        .done()
        .out
    )
    config = json.loads((here / "runs" / "digits-mlp" / "config.json").read_text())
    assert (config["device_used"], config["precision_used"]) == ("cpu", "bf16")
    assert "machine   cpu, " in out and "bf16" in out and "1 epoch of batch" in out


@pytest.mark.parametrize(
    "arguments", ["--model mlp --epochs 2", "--width 0.06 --epochs 2 --batch-size 256"]
)
def test_a_seed_repeats_bit_for_bit_on_the_cpu(call, here, arguments):
    arguments = arguments.split()
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        call(step1_train.main, *arguments, "--device", "cpu", "--seed", seed, "--name", name).done()
    states = [load(here / "runs" / name)["state_dict"] for name in "abc"]
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())
    assert not all(torch.equal(value, states[2][key]) for key, value in states[0].items())
    rows = [rows_of(here / "runs" / name) for name in "abc"]
    for row in (*rows[0], *rows[1]):
        del row["seconds"]
    assert rows[0] == rows[1]


def test_a_second_run_does_not_touch_the_first(call, here):
    call(step1_train.main, *TINY, "--epochs", 1).done()
    first = {path.name: path.read_bytes() for path in (here / "runs" / "digits-mlp").iterdir()}
    result = call(step1_train.main, *TINY, "--epochs", 1, "--seed", 1).done()
    assert "digits-mlp-2" in result.out
    assert {path.name for path in (here / "runs").iterdir()} == {"digits-mlp", "digits-mlp-2"}
    assert {
        path.name: path.read_bytes() for path in (here / "runs" / "digits-mlp").iterdir()
    } == first


def test_a_name_that_is_taken_is_refused(call, here):
    (here / "runs" / "mine").mkdir(parents=True)
    call(step1_train.main, *TINY, "--name", "mine").error(2, "runs/mine exists", "--name")
    assert not list((here / "runs" / "mine").iterdir())


def test_runs_that_cannot_be_written(call, here):
    (here / "runs").write_text("not a directory")
    call(step1_train.main, *TINY).error(1, "cannot make a run in runs/")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--model airbnch", ["airbench", "--list-models"]),
        ("--dataset digit", ["digits", "--list-datasets"]),
        ("--model mlp --width 2", ["mlp", "--width"]),
        ("--hidden 64", ["airbench", "--hidden"]),
        ("--model resblock --dropout 0.1", ["resblock", "--dropout"]),
        ("--image-size 8", ["airbench", "28x28", "--image-size"]),
        ("--model mynet --image-size 7x64", ["mynet", "8x8", "7x64"]),
        ("--image-size big", ["--image-size", "big"]),
        ("--device toaster", ["--device toaster", "--device cpu"]),
        ("--device cuda:99", ["--device cuda:99", "--device cpu"]),
        ("--epochs 0", ["--epochs", "'0'"]),
        ("--epochs 1.5", ["--epochs", "whole number"]),
        ("--lr 0", ["--lr", "above 0"]),
        ("--lr inf", ["--lr"]),
        ("--lr nan", ["--lr"]),
        ("--momentum 1", ["--momentum"]),
        ("--label-smoothing 1.5", ["--label-smoothing"]),
        ("--augment none flip", ["--augment none"]),
        ("--augment shear", ["--augment", "shear"]),
        ("--optimizer sdg", ["--optimizer", "sgd"]),
        ("--name ../elsewhere", ["--name", "elsewhere"]),
        ("--no-such-option", ["--no-such-option", "--help"]),
    ],
)
def test_wrong_command_line_is_one_line_and_leaves_nothing(call, here, arguments, words):
    call(step1_train.main, *arguments.split()).error(2, *words)
    assert not list(here.iterdir())


def test_wrong_network_is_said_before_a_data_set_is_downloaded(call, here, monkeypatch):
    monkeypatch.setattr(data, "load", lambda *_, **__: pytest.fail("loaded the data first"))
    call(step1_train.main, "--dataset", "cifar10", "--model", "airbnch").error(2, "airbench")


def test_lists(call, here):
    models = call(step1_train.main, "--list-models").done().out
    assert [
        name
        for name in ("airbench", "mlp", "mynet", "resblock")
        if not re.search(f"^{name} ", models, re.M)
    ] == []
    datasets, known = (
        call(step1_train.main, "--list-datasets").done().out,
        "digits mnist fashion-mnist kmnist cifar10",
    )
    assert [
        name for name in [*known.split(), "cifar100"] if not re.search(f"^{name} ", datasets, re.M)
    ] == []


@pytest.mark.parametrize("name", ["mynet", "resblock"])
def test_other_networks_train(call, here, name):
    call(step1_train.main, "--model", name, "--epochs", 2).done()
    assert (
        float(rows_of(here / "runs" / f"digits-{name}")[-1]["test_accuracy"]) > 0.3
    )  # ten classes: chance is 0.1


@pytest.mark.parametrize("name", ["mynet", "resblock"])
def test_a_last_batch_of_one_image_does_not_end_the_run(call, here, name):
    # 1,437 training images: one is left over, and batch norm has no variance over a single value.
    call(step1_train.main, "--model", name, "--epochs", 1, "--batch-size", 1436).done()


def test_other_image_size_is_what_the_network_sees(call, here):
    call(step1_train.main, *TINY, "--epochs", 1, "--image-size", "12x20").done()
    spec = load(here / "runs" / "digits-mlp")["spec"]
    assert (
        list(spec["image_size"]) == [12, 20]
        and spec["parameters"] == 12 * 20 * 16 + 16 + 16 * 10 + 10
    )


def test_the_last_epoch_is_the_result(call, here):
    # The test split only reports: the summary is the last epoch's, be it the best or not.
    call(
        step1_train.main,
        *TINY,
        "--optimizer",
        "sgd",
        "--lr",
        2,
        "--schedule",
        "constant",
        "--epochs",
        6,
    ).done()
    rows = rows_of(here / "runs" / "digits-mlp")
    summary = json.loads((here / "runs" / "digits-mlp" / "summary.json").read_text())
    assert summary["test_accuracy"] == float(rows[-1]["test_accuracy"])
    assert load(here / "runs" / "digits-mlp")["spec"]["test_accuracy"] == summary["test_accuracy"]


def test_checkpoint_gives_the_reported_accuracy(small):
    checkpoint, digits = load(small.run), data.load("digits")
    spec = checkpoint["spec"]
    network = model.build(
        "mlp", channels=1, classes=10, image_size=(8, 8), hidden=[32], dropout=0.5
    )
    network.load_state_dict(checkpoint["state_dict"])
    deployable = model.Deployable(network, spec["image_size"], spec["mean"], spec["std"]).eval()
    labels = deployable(torch.from_numpy(digits.test_images)).argmax(1).numpy()
    assert (labels == digits.test_labels).mean() == spec["test_accuracy"]


@pytest.mark.usefixtures("undrawn")
def test_closed_standard_error_does_not_end_the_run(execute, here):
    execute(ROOT / "step1_train.py", *TINY, "--epochs", 1, cwd=here, close="2>&-").done()
    assert (here / "runs" / "digits-mlp" / "summary.json").is_file()


def test_closed_pipe_has_no_traceback(execute, here, closed_pipe):
    result = execute(ROOT / "step1_train.py", "--list-models", cwd=here, stdout=closed_pipe)
    assert (result.code, result.err) == (0, "")


@pytest.mark.pictures
def test_without_matplotlib_the_run_is_complete_and_says_so(call, here, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = call(step1_train.main, *TINY).done()
    assert "no pictures without matplotlib" in result.err and "pip install matplotlib" in result.err
    assert (here / "runs" / "digits-mlp" / "report.html").exists()


def test_quiet_prints_the_result_alone(call, here):
    assert re.fullmatch(
        r"runs/digits-mlp: test accuracy .*\n", call(step1_train.main, *TINY, "--quiet").done().out
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--dataset digits --data-dir photos", ["--data-dir", "digits"]),
        ("--test-csv list.csv", ["--test-csv", "--dataset csv"]),
        ("--label-column kind", ["--label-column", "--dataset folder or csv"]),
        ("--dataset folder --data-dir photos --image-root x", ["--image-root", "--dataset csv"]),
        ("--dataset mnist --strict", ["--strict", "folder or csv"]),
        ("--cache-dir x", ["--cache-dir", "your own images", "--pretrained"]),
        ("--model mlp --momentum 0.9", ["--momentum", "sgd or muon"]),
        ("--optimizer adamw --momentum 0.9", ["--momentum", "sgd or muon"]),
        ("--freeze-backbone", ["--freeze-backbone", "--pretrained"]),
        ("--dataset linear --augment flip", ["--augment", "images"]),
        ("--dataset linear --class-weights balanced", ["--class-weights", "regression"]),
        ("--dataset linear --label-smoothing 0.1", ["--label-smoothing", "regression"]),
        ("--dataset linear --image-size 8", ["--image-size", "linear"]),
        ("--keep-start 0", ["--keep-start", "--pretrained"]),
    ],
)
def test_an_option_without_effect_is_refused_before_any_work(
    call, here, monkeypatch, arguments, words
):
    monkeypatch.setattr(data, "load", lambda *_, **__: pytest.fail("loaded the data first"))
    call(step1_train.main, *arguments.split()).error(2, *words, "only applies to")
    assert not list(here.iterdir())


def test_the_command_line_is_not_changed_by_what_is_derived():
    args, given = step1_train.parse(["--model", "mlp", "--lr", "0.5"])
    before = dict(vars(args))
    settings = recipes.resolve(args, given)
    fitted = recipes.adapt_to_images(settings, given, data.load("digits"), model.traits("mlp"))
    assert vars(args) == before and settings.image_size is None and settings.augment is None
    assert (fitted.image_size, fitted.augment, fitted.lr, fitted.epochs) == (
        (8, 8),
        ["translate"],
        0.5,
        50,
    )
    assert given == {"model": "mlp", "lr": 0.5}


@pytest.mark.parametrize("name", ["airbench", "mobilenet_v3_small", "mlp", "mynet", "resblock"])
@pytest.mark.parametrize("channels", [1, 3])
def test_networks_see_what_cameras_do_by_default_but_the_tutorials_do_not(name, channels):
    args, given = step1_train.parse(["--model", name])
    images = np.zeros((50, 32, 32, channels), np.uint8)
    dataset = SimpleNamespace(
        has_images=True, fit=None, train_images=images, train_labels=np.zeros(50), val_images=None
    )
    fitted = recipes.adapt_to_images(
        recipes.resolve(args, given), given, dataset, model.traits(name)
    )
    usual = ["flip", "translate"][channels == 1 :]
    camera = [] if name in ("mlp", "mynet", "resblock") else ["blur", "color", "noise"]
    assert fitted.augment == [*usual, *camera] and set(fitted.augment) < set(data.AUGMENTATIONS)


@pytest.fixture
def slow_torch(tmp_path):
    """An environment in which `import torch` says so and takes a minute."""
    (tmp_path / "slow").mkdir()
    (tmp_path / "slow" / "torch.py").write_text(
        "import time\nprint('importing', flush=True)\ntime.sleep(60)\n"
    )
    return {**os.environ, "PYTHONPATH": str(tmp_path / "slow")}


@pytest.mark.parametrize("script", ["step1_train.py", "step2_export.py"])
def test_help_and_wrong_options_do_not_wait_for_torch(execute, here, slow_torch, script):
    assert "usage: " in execute(ROOT / script, "--help", cwd=here, env=slow_torch).done().out
    if script == "step1_train.py":
        useless = execute(
            ROOT / script, "--model", "mlp", "--momentum", 0.9, cwd=here, env=slow_torch
        )
        useless.error(2, "--momentum")
    execute(ROOT / script, "--no-such-option", cwd=here, env=slow_torch).error(
        2, "--no-such-option"
    )


@pytest.mark.parametrize("script", ["step1_train.py", "step2_export.py"])
def test_an_interrupt_while_torch_is_imported_has_no_traceback(here, slow_torch, script):
    process = subprocess.Popen(
        [sys.executable, ROOT / script],
        cwd=here,
        env=slow_torch,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == -signal.SIGINT and err == ""


def test_the_networks_are_listed_with_what_one_chooses_by(call):
    assert listing.NETWORKS.keys() == model.MODELS.keys()
    lines = call(step1_train.main, "--list-models").done().out.splitlines()
    table = {line.split()[0]: line for line in lines[1 : lines.index("")]}
    assert table.keys() == {*model.MODELS, *models.list_models(module=models)}
    assert "2.54 M" in table["mobilenet_v3_small"] and table["mobilenet_v3_small"].endswith(
        "67.7 %"
    )
    assert "0.09 M" in table["tiny"] and table["tiny"].endswith("tiny")
    assert max(map(len, lines)) <= 80


@pytest.fixture
def photos(here):
    """Class folders in the working directory, with four times as many dark images as bright
    ones."""
    rng = np.random.default_rng(0)
    for split, name, low, count in [
        ("train", "dark", 0, 40),
        ("train", "bright", 100, 10),
        ("test", "dark", 0, 8),
        ("test", "bright", 100, 2),
    ]:
        (here / "my photos" / split / name).mkdir(parents=True, exist_ok=True)
        for index in range(count):
            pixels = rng.integers(low, low + 150, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(here / "my photos" / split / name / f"{index}.png")
    return here / "my photos"


def test_a_directory_of_classes_needs_no_dataset_and_names_the_run(call, here, photos):
    result = call(step1_train.main, "--data-dir", "my photos", *TINY).done()
    assert "note: taking my photos as --dataset folder" in result.err
    assert (
        "50 train, 10 test; 2 classes" in result.out and (here / "runs" / "my-photos-mlp").is_dir()
    )
    summary = json.loads((here / "runs" / "my-photos-mlp" / "summary.json").read_text())
    recalls = [row["recall"] for row in summary["per_class"].values()]
    assert summary["balanced_accuracy"] == pytest.approx(sum(recalls) / 2)
    f1 = [row["f1"] for row in summary["per_class"].values()]
    assert summary["macro_f1"] == pytest.approx(sum(f1) / 2)
    assert "balanced" in result.out.splitlines()[-1] and "10 images" in result.out.splitlines()[-1]


def test_unequal_classes_are_adjusted_for_while_training_only(call, here, photos, monkeypatch):
    seen, criterion = [], step1_train.criterion

    def watch(outputs, targets, smoothing=0.0, log_priors=None):
        seen.append((outputs.requires_grad, log_priors))
        return criterion(outputs, targets, smoothing, log_priors)

    monkeypatch.setattr(step1_train, "criterion", watch)
    monkeypatch.setattr(evaluation, "criterion", watch)
    call(step1_train.main, "--data-dir", "my photos", "--class-weights", "balanced", *TINY).done()
    assert {training for training, _ in seen} == {True, False}
    assert all(adjust is None for training, adjust in seen if not training)
    expected = pytest.approx([0.85 * math.log(0.2), 0.85 * math.log(0.8)])
    assert all(adjust.tolist() == expected for training, adjust in seen if training)
    logits, labels = torch.tensor([[0.0, 0.0]]), torch.tensor([0])
    priors = torch.tensor([0.2, 0.8])
    assert criterion(logits, labels, 0.0, priors.log()).item() == pytest.approx(-math.log(0.2))
    smoothed = -(0.9 + 0.1 * 0.2) * math.log(0.2) - 0.1 * 0.8 * math.log(0.8)
    assert criterion(logits, labels, 0.1, priors.log()).item() == pytest.approx(smoothed)


def test_the_epoch_is_chosen_by_balanced_accuracy_where_classes_are_unequal():
    labels, predicted = np.array([0, 0, 0, 0, 1, 3]), np.array([0, 0, 0, 0, 0, 3])
    assert metrics.balanced_accuracy(labels, predicted) == pytest.approx((1 + 0 + 1) / 3)


def test_the_epoch_is_chosen_by_it_where_there_is_a_validation_split(
    call, here, photos, monkeypatch
):
    values = [0.9, 0.5]  # of the two epochs
    monkeypatch.setattr(metrics, "balanced_accuracy", lambda *_: values.pop(0) if values else 0.5)
    call(step1_train.main, "--data-dir", photos, "--val-fraction", 0.2, *TINY, "--name", "a").done()
    summary = json.loads((here / "runs" / "a" / "summary.json").read_text())
    assert summary["epoch_kept"] == 1 and not values


def test_a_loss_that_is_not_finite_on_the_test_split_is_said(call, here, monkeypatch):
    criterion = evaluation.criterion

    def diverging(*args):
        return criterion(*args) * float("inf")

    monkeypatch.setattr(evaluation, "criterion", diverging)
    call(step1_train.main, *TINY).error(1, "the loss on the test split became inf", "smaller --lr")


def test_a_report_that_cannot_be_written_does_not_end_the_run(call, here, in_process, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(page, "write_report", full)
    result = call(step1_train.main, *TINY, "--name", "a").done()
    assert "the run is complete, but its report cannot be written: No space left" in result.err
    result = call(step2_export.main, "--format", "torchscript").done()
    assert "runs/a/report.html is as it was before the export: No space left" in result.err


def test_patience_stops_a_run_that_no_longer_improves(call, here):
    still = ["--model", "linear", "--lr", "1e-12", "--epochs", "20", "--augment", "none"]
    result = call(
        step1_train.main, *still, "--val-fraction", 0.2, "--patience", 3, "--name", "a"
    ).done()
    rows = rows_of(here / "runs" / "a")
    best = json.loads((here / "runs" / "a" / "summary.json").read_text())["epoch_kept"]
    assert len(rows) == best + 3 < 20 and f"epoch {best} did best" in result.out
    call(step1_train.main, *still, "--patience", 3).error(2, "--patience", "--val-fraction")


def test_a_run_killed_before_its_first_step_can_be_resumed(call, here):
    args, given = step1_train.parse([*TINY, "--name", "a"])
    settings = recipes.resolve(args, given)
    settings = recipes.adapt_to_images(settings, given, data.load("digits"), model.traits("mlp"))
    with runs.claimed(settings) as run:
        assert run == os.path.join("runs", "a") and os.listdir(run) == ["config.json"]
    call(step1_train.main, "--resume").done()
    call(step1_train.main, *TINY, "--name", "b").done()
    states = [load(here / "runs" / name)["state_dict"] for name in "ab"]
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())
    assert sorted(os.listdir("runs")) == ["a", "b"]


def test_a_run_in_progress_is_not_the_newest(call, here):
    for name in ("older", "newer"):
        call(step1_train.main, *TINY, "--epochs", 1, "--name", name).done()
    assert runs.find() == os.path.join("runs", "newer")
    with runs.locked("runs/newer"):
        assert runs.find() == os.path.join("runs", "older")
        with runs.locked("runs/older"):
            call(step2_export.main).error(1, "runs/newer is being trained by another process")


def test_a_class_that_is_gone_is_said_on_resuming(call, here, photos):
    for split in ("train", "test"):
        shutil.copytree(photos / split / "dark", photos / split / "grey")
    call(step1_train.main, "--data-dir", photos, *TINY, "--name", "a").done()
    for split in ("train", "test"):
        shutil.rmtree(photos / split / "grey")
    call(step1_train.main, "--resume", "a", "--epochs", 3).error(1, "class 'grey' is gone")


def test_a_name_that_is_taken_is_refused_before_the_data_is_read(call, here, monkeypatch):
    (here / "runs" / "taken").mkdir(parents=True)
    monkeypatch.setattr(step1_train, "load_dataset", lambda *_: pytest.fail("the data was read"))
    call(step1_train.main, "--name", "taken").error(2, "taken exists", "--name")
