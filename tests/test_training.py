"""The small functions of training: augmentation, optimizers, schedules, recipes."""

import argparse
import copy
import itertools
import os
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import data
import model
import step1_train
from data import augment, split
from training import cpu, cutmix, optimizers, processes, recipes
from training import network as networks


def gather(images, names, flips=None, seed=0):
    n = len(images)
    flips = torch.zeros(n, dtype=torch.bool) if flips is None else flips
    return augment.gather(
        images, torch.arange(n), names, flips, torch.Generator().manual_seed(seed)
    )


@pytest.fixture
def images():
    return torch.randint(
        0, 256, (40, 20, 36, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )


@pytest.mark.parametrize(
    ("position", "inside"),
    [(-2, 2), (-1, 1), (0, 0), (3, 3), (7, 7), (8, 6), (9, 5)],
    ids=lambda value: str(value),
)
def test_mirror_reflects_at_the_ends_without_repeating_the_edge(position, inside):
    assert augment.mirror(torch.tensor(position), 8) == inside


def test_mirror_stays_inside_the_smallest_images():
    for size in (1, 2):
        positions = augment.mirror(torch.arange(-1, size + 1), size)
        assert positions.min() >= 0 and positions.max() < size


def test_cutmix_takes_a_rectangle_of_another_image_and_counts_its_pixels():
    flat = torch.arange(12, dtype=torch.uint8)[:, None, None, None].expand(12, 16, 24, 3)
    torch.manual_seed(0)
    batches = [cutmix.mix(flat) for _ in range(40)]
    mixed = [batch for batch in batches if batch]
    assert 10 < len(mixed) < 30  # in half of the batches

    for batch in mixed:
        assert sorted(batch.others.tolist()) == list(range(12))
        for number, (image, other) in enumerate(zip(batch.images, batch.others, strict=True)):
            replaced = image[..., 0] != number
            if other == number:
                assert not replaced.any()
                continue
            assert (image[replaced] == other).all()
            assert replaced.double().mean() == pytest.approx(batch.share)
            rows = replaced.any(1)
            columns = replaced.any(0)
            assert replaced.sum() == rows.sum() * columns.sum()  # one rectangle

    shares = [batch.share for batch in mixed]
    assert min(shares) < 0.2 and max(shares) > 0.7


def test_no_augmentation_is_the_images_in_the_order_asked_for(images):
    index = torch.tensor([3, 0, 3])
    got = augment.gather(
        images, index, [], torch.zeros(len(images), dtype=torch.bool), torch.Generator()
    )
    assert torch.equal(got, images[index])


def test_flip_mirrors_left_to_right_where_told(images):
    flips = torch.arange(len(images)) % 2 == 0
    got = gather(images, ["flip"], flips)
    assert torch.equal(got[0], images[0].flip(1)) and torch.equal(got[1], images[1])


def test_translate_shifts_by_a_sixteenth_and_mirrors_at_the_edge(images):
    got = gather(images, ["translate"])
    padded = torch.nn.functional.pad(
        images.permute(0, 3, 1, 2).float(), (2, 2, 1, 1), mode="reflect"
    ).byte()
    padded, seen = padded.permute(0, 2, 3, 1), set()
    for before, after in zip(padded, got, strict=True):
        shifts = itertools.product(range(3), range(5))
        fitting = [
            (dy, dx) for dy, dx in shifts if torch.equal(before[dy : dy + 20, dx : dx + 36], after)
        ]
        assert len(fitting) == 1
        seen.update(fitting)
    assert {dy for dy, _ in seen} == {0, 1, 2} and {dx for _, dx in seen} == {0, 1, 2, 3, 4}


@pytest.mark.parametrize("name", ["crop", "rotate", "blur", "color", "noise"])
@pytest.mark.parametrize("channels", [1, 3])
def test_photo_augmentations_change_images_repeatably_and_within_bounds(name, channels):
    rows, columns = torch.linspace(30, 90, 20)[:, None], torch.linspace(30, 90, 36)
    smooth = (rows + columns).round().byte()[None, :, :, None].expand(40, -1, -1, channels).clone()
    before = smooth.clone()
    got = gather(smooth, [name])
    assert got.shape == smooth.shape and got.dtype == torch.uint8 and torch.equal(smooth, before)
    assert torch.equal(got, gather(smooth, [name])) and not torch.equal(
        got, gather(smooth, [name], seed=1)
    )
    changed = (got != smooth).flatten(1).any(1).float().mean().item()
    part = augment.CAMERA[name].part if name in augment.CAMERA else 1
    assert changed == pytest.approx(part, abs=0.25)
    constant = torch.full((8, 20, 36, channels), 77, dtype=torch.uint8)
    if name not in ("color", "noise"):  # resampling makes no new values
        assert got.min() >= 60 and got.max() <= 180
        assert torch.equal(gather(constant, [name]), constant)


def test_rotation_turns_by_the_angle_in_pixels_also_of_wide_images():
    image = torch.zeros(1, 41, 81, 1, dtype=torch.uint8)
    image[:, 20, :] = 255  # a horizontal line through the centre
    random = torch.tensor([[0.5, 0.5, 0.5, 0.5, 1.0]])  # the largest angle
    turned = augment.warp(image, random, crop=False, rotate=True)[0, :, :, 0].float()
    rows = (turned * torch.arange(41)[:, None]).sum(0) / turned.sum(0)
    slope = (rows[60] - rows[20]) / 40
    assert abs(abs(slope.item()) - 0.268) < 0.02  # tan 15 degrees


def test_blur_is_a_gaussian_in_each_direction():
    image = torch.zeros(3, 21, 31, 1, dtype=torch.uint8)
    image[:, 10, 15] = 255
    random = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.5, 1.0]])  # not at all, down only, both
    blurred = augment.blur(image, random)[..., 0].double()
    assert torch.equal(blurred[0], image[0, ..., 0].double())
    down = blurred[1, :, 15].sum()
    assert down == pytest.approx(255, abs=4) and blurred[1].sum() == down
    share = blurred[2] / blurred[2].sum()
    rows, columns = ((torch.arange(n) - n // 2).double() ** 2 for n in (21, 31))
    assert (share.sum(1) @ rows).sqrt() == pytest.approx(augment.MOST_BLUR / 2, rel=0.1)
    assert (share.sum(0) @ columns).sqrt() == pytest.approx(augment.MOST_BLUR, rel=0.1)


def test_noise_is_as_strong_as_drawn_and_grows_with_the_light_in_half_of_the_images():
    grey = torch.tensor([32, 128]).byte()[:, None, None].expand(2, 32, 3).repeat(200, 16, 1, 1)
    random = torch.rand(200, 3, generator=torch.Generator().manual_seed(0))
    random[:, 0] = torch.linspace(0, 1, 200)
    deviation = (augment.add_noise(grey, random).double() - grey).view(200, 16, 2, 32, 3)
    dark, light = (deviation[:, :, k].flatten(1) for k in (0, 1))
    assert light.mean().abs() < 0.1 and not deviation[0].any()
    assert light[100:].std(1) == pytest.approx(augment.MOST_NOISE * random[100:, 0], rel=0.2)
    ratio, shot = dark[100:].std(1) / light[100:].std(1), random[100:, 1] >= 0.5
    assert ratio[shot].mean() == pytest.approx(0.5, abs=0.05)
    assert ratio[~shot].mean() == pytest.approx(1, abs=0.05)
    assert 30 < shot.sum() < 70


def test_noise_repeats_its_table_under_an_image_larger_than_it():
    image = torch.full((1, 700, 800, 3), 100, dtype=torch.uint8)
    noisy = augment.add_noise(image, torch.tensor([[1.0, 0.0, 0.9999]])).float()
    assert noisy.std() == pytest.approx(augment.MOST_NOISE, rel=0.05)


def test_alternating_flip_shows_each_image_both_ways(call, here, monkeypatch):
    indices, flipped = [], []

    def spy(images, index, augment, flips, generator, share):
        indices.append(index)
        flipped.append(flips[index])
        return images[index]

    monkeypatch.setattr(split, "gather", spy)
    call(
        step1_train.main,
        *["--model", "mlp", "--augment", "flip", "--epochs", "2", "--device", "cpu"],
    ).done()
    two = 2 * 1437  # what follows is for samples.png
    indices, flipped = (
        torch.cat(indices)[:two].view(2, 1437),
        torch.cat(flipped)[:two].view(2, 1437),
    )
    first, second = (flips[index.argsort()] for flips, index in zip(flipped, indices, strict=True))
    assert torch.equal(first, ~second) and 600 < first.sum() < 840


def settings(optimizer, **more):
    """Settings of one optimizer, at a rate at which it learns in a few steps."""
    lr = 0.1 if optimizer in ("sgd", "muon") else 0.01
    defaults = {
        "optimizer": optimizer,
        "lr": lr,
        "momentum": 0.9,
        "weight_decay": 0.1,
        "layer_decay": 1.0,
    }
    return SimpleNamespace(**{**defaults, **more})


@pytest.mark.parametrize("schedule", recipes.SCHEDULES)
@pytest.mark.parametrize("optimizer", recipes.OPTIMIZERS)
def test_every_optimizer_and_schedule_learns(optimizer, schedule):
    torch.manual_seed(0)
    network = model.build("mlp", channels=1, classes=3, image_size=(4, 4), hidden=(8,))
    optimizer, losses = optimizers.make_optimizer(network, settings(optimizer)), []
    x, target = torch.randn(12, 1, 4, 4), torch.arange(12) % 3
    for step in range(12):
        optimizers.set_rate(optimizer, optimizers.rate(schedule, step, 12))
        loss = torch.nn.functional.cross_entropy(network(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize(
    ("schedule", "first", "middle", "last"),
    [
        ("constant", 1, 1, 1),
        ("linear", 1, 0.5, 0),
        ("cosine", 1, 0.5, 0),
        ("onecycle", 1 / 25, 0.81, 0),
    ],
)
def test_schedules_at_their_ends(schedule, first, middle, last):
    rates = [optimizers.rate(schedule, step, 50) for step in range(51)]
    assert rates[0] == pytest.approx(first) and rates[25] == pytest.approx(middle, abs=0.01)
    assert rates[-1] == pytest.approx(last, abs=1e-9)
    assert max(rates) == pytest.approx(1) and min(rates) >= 0
    highest = rates.index(max(rates))
    assert rates[: highest + 1] == sorted(rates[: highest + 1])
    assert rates[highest:] == sorted(rates[highest:], reverse=True)
    assert optimizers.rate(schedule, 0, 1) == pytest.approx(first)  # a run of one step


def test_an_unknown_schedule_is_an_error():
    with pytest.raises(ValueError, match="'polynomial'"):
        optimizers.rate("polynomial", 0, 10)


@pytest.mark.parametrize("name", recipes.OPTIMIZERS)
def test_weight_decay_spares_biases_and_norms_whatever_the_optimizer(name):
    network = model.build("mynet", channels=1, classes=3, image_size=(8, 8))
    optimizer = optimizers.make_optimizer(network, settings(name))
    decays = {
        id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]
    }
    assert len(decays) == len(list(network.parameters()))
    assert all(decays[id(p)] == (0.1 if p.ndim > 1 else 0) for p in network.parameters())


def test_frozen_whitening_is_not_optimized():
    network = model.build("airbench", channels=1, classes=3, image_size=(28, 28), width=0.1)
    optimizer = optimizers.make_optimizer(network, settings("sgd"))
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert id(network.whitening.weight) not in held and id(network.head.weight) in held


def test_muon_holds_filters_and_brings_singular_values_near_one():
    torch.manual_seed(0)
    network = model.build("airbench", channels=1, classes=3, image_size=(28, 28), width=0.1)
    optimizer = optimizers.make_optimizer(network, settings("muon", weight_decay=0.0))
    filters = network.groups[0][4].weight
    network(torch.randn(4, 1, 28, 28)).sum().backward()
    before = filters.detach() * (len(filters) ** 0.5 / filters.detach().norm())
    optimizer.step()
    step = (filters.detach() - before).flatten(1) / 0.1
    values = torch.linalg.svdvals(step.float())
    assert 0.3 < values.median() < 1.3 and values.max() < 1.5


def test_narrow_convolutions_side_by_side_change_no_parameter_and_no_result():
    torch.manual_seed(0)
    network = model.build("airbench", channels=1, classes=3, image_size=(28, 28), width=0.1)
    x, before = (
        torch.randn(4, 1, 28, 28),
        {key: value.clone() for key, value in network.state_dict().items()},
    )
    expected = network.eval()(x)
    cpu.lay_side_by_side(network)
    assert sum(isinstance(module, cpu.Conv3x3) for module in network.modules()) == 6
    assert torch.equal(network(x), expected)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


@pytest.mark.parametrize(
    ("asked", "variable", "cpus", "taken", "threads"),
    [
        (None, None, 4, 0.2, 4),
        (None, None, 4, 1.3, 2),
        (None, None, 2, 1.9, 1),
        (3, None, 4, 3.9, 3),  # what is asked for
        (None, "1", 4, 3.9, "left alone"),
    ],
)
def test_threads_leave_the_cpus_that_other_programs_use(
    monkeypatch, asked, variable, cpus, taken, threads
):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if variable:
        monkeypatch.setenv("OMP_NUM_THREADS", variable)
    monkeypatch.setattr(cpu, "usable_cpus", lambda: cpus)
    monkeypatch.setattr(cpu, "cpus_taken", lambda: taken)
    chosen = []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    number, reason = cpu.set_threads(asked)
    assert chosen == ([] if threads == "left alone" else [threads])
    assert number == (None if threads == "left alone" else threads)
    fewer = not asked and not variable and threads < cpus
    assert reason == (
        f"other programs use {taken} of {cpus} CPUs; --threads overrides" if fewer else ""
    )


@pytest.mark.skipif(
    not os.path.exists("/proc/stat"), reason="this system does not say what its CPUs do"
)
def test_a_busy_process_is_seen():
    code = "import time; until = time.time() + 30\nwhile time.time() < until: pass"
    busy = subprocess.Popen([sys.executable, "-c", code])
    try:
        started = cpu.snapshot()
        while cpu.snapshot()[0] < started[0] + 1:
            time.sleep(0.1)
        (_, busy_before, own_before), (_, busy_now, own) = started, cpu.snapshot()
        assert busy_now - busy_before > own - own_before + 0.2
    finally:
        busy.kill()
        busy.wait()


@pytest.mark.parametrize(("name", "gains"), [("mobilenet_v3_small", False), ("resnet18", True)])
def test_depthwise_convolutions_are_trained_in_fp32_on_a_cpu(name, gains):
    dataset = SimpleNamespace(train_images=np.zeros((1, 64, 64, 3), np.uint8), classes=["a", "b"])
    chosen = processes.Machine(torch.device("cpu"), torch.bfloat16, processes.Processes())
    settings = argparse.Namespace(
        model=name,
        precision="auto",
        image_size=(64, 64),
        width=None,
        hidden=None,
        activation=None,
        dropout=None,
    )
    machine = networks.with_fitting_precision(chosen, settings, dataset)
    assert machine.dtype == (torch.bfloat16 if gains else None)

    settings.precision = "bf16"
    assert networks.with_fitting_precision(chosen, settings, dataset) is chosen


# ------------------------------------------------------------------------------------------ recipes

COMMON = {
    "epochs": 10,
    "label_smoothing": 0.0,
    "batch_norm": "trained",
    "layer_decay": 1.0,
    "keep_start": 0.0,
}
SGD = {
    "optimizer": "sgd",
    "lr": 0.05,
    "momentum": 0.9,
    "weight_decay": 1e-4,
    "schedule": "onecycle",
}
ADAM = {"optimizer": "adam", "lr": 1e-3, "weight_decay": 0.0, "schedule": "cosine"}
MUON = {
    "optimizer": "muon",
    "lr": 0.12,
    "momentum": 0.6,
    "weight_decay": 0.004,
    "schedule": "linear",
}
# What each network gets on any dataset, and what differs on some.
EXPECTED = {
    "airbench": {**COMMON, **MUON, "batch_size": 250, "label_smoothing": 0.2},
    "linear": {
        **COMMON,
        **SGD,
        "epochs": 300,
        "batch_size": 100_000,
        "lr": 0.1,
        "weight_decay": 0.0,
    },
    "mlp": {**COMMON, **ADAM, "batch_size": 32},
    "mynet": {**COMMON, **MUON, "batch_size": 256, "lr": 0.14},
    "resblock": {**COMMON, **SGD, "batch_size": 512, "lr": 0.5},
    "tiny": {
        **COMMON,
        **MUON,
        "batch_size": 250,
        "epochs": 60,
        "activation": "hardswish",
    },
    "resnet18": {**COMMON, **SGD, "batch_size": 64},
}
EXPECTED["linear"]["schedule"] = "constant"
DIFFERENT = {
    ("airbench", "digits"): {
        "epochs": 20,
        "batch_size": 64,
        "lr": 0.08,
        "label_smoothing": 0.0,
        "width": 0.25,
    },
    ("airbench", "mnist"): {"batch_size": 500, "label_smoothing": 0.1, "width": 0.25},
    ("airbench", "fashion-mnist"): {"width": 0.5},
    ("airbench", "kmnist"): {"width": 0.5},
    ("tiny", "digits"): {"epochs": 20, "batch_size": 64, "lr": 0.08},
    ("mlp", "digits"): {"epochs": 50},
    ("mynet", "digits"): {"epochs": 50, "batch_size": 32, "lr": 0.04},
    ("resblock", "digits"): {"epochs": 50, "batch_size": 64, "lr": 0.1},
}
FROZEN = {**COMMON, **SGD, "batch_size": 64, "lr": 0.001}
PRETRAINED = {
    **COMMON,
    "optimizer": "adamw",
    "batch_size": 32,
    "lr": 1e-3,
    "weight_decay": 0.05,
    "schedule": "onecycle",
    "batch_norm": "frozen",
    "layer_decay": 0.1,
}


@pytest.mark.parametrize("dataset", data.DATASETS)
@pytest.mark.parametrize("network", EXPECTED)
def test_recipe_of_every_network_and_dataset(network, dataset):
    expected = {**EXPECTED[network], **DIFFERENT.get((network, dataset), {})}
    assert recipes.recipe(network, dataset, start=None) == expected
    # Weights from elsewhere change how a network is trained, not what it is.
    shape = {key: value for key, value in expected.items() if key in ("width", "activation")}
    assert recipes.recipe(network, dataset, start="pretrained") == {**PRETRAINED, **shape}
    assert recipes.recipe(network, dataset, start="frozen") == {**FROZEN, **shape}


def test_every_network_has_a_recipe_pinned_here():
    assert set(model.MODELS) <= set(EXPECTED)
    assert {name.split()[0] for name in recipes.RECIPES} <= {
        *EXPECTED,
        "*",
        "torchvision",
        "pretrained",
        "frozen",
    }


def test_another_optimizer_brings_its_own_rate_and_schedule():
    adam = recipes.recipe("airbench", "digits", start=None, optimizer="adam")
    assert adam["width"] == 0.25 and adam["momentum"] is None
    assert {key: adam[key] for key in ADAM} == ADAM
    sgd = recipes.recipe("mlp", "cifar10", start="frozen", optimizer="sgd")
    assert sgd["lr"] == 0.001  # the recipe's own optimizer keeps the recipe's rate
    gentle = recipes.recipe("resnet18", "folder", start="pretrained", optimizer="sgd")
    assert (gentle["lr"], gentle["momentum"], gentle["batch_norm"]) == (0.002, 0.9, "frozen")


def test_weights_from_elsewhere_choose_a_network_and_fewer_epochs():
    assert recipes.default_network("folder", None) == "airbench"
    assert recipes.default_network("folder", "default") == recipes.START
    assert (
        recipes.default_network("folder", "weights.pth") == "airbench"
    )  # as it was without --model

    fresh = SimpleNamespace(
        model="airbench", dataset="folder", pretrained=None, freeze_backbone=False
    )
    tuned = SimpleNamespace(pretrained="default", freeze_backbone=False)
    counts = (100, 2000, 10_000, 60_000)
    assert [recipes.usual_epochs(fresh, count) for count in counts] == [50, 50, 20, 10]
    fresh.model = "tiny"  # learns slowly, and fast
    assert [recipes.usual_epochs(fresh, count) for count in counts] == [60, 60, 60, 60]
    fresh.model = "airbench"
    assert [recipes.usual_epochs(tuned, count) for count in counts] == [30, 12, 4, 4]
    assert [recipes.usual_keep_start(count) for count in (20, 100, 1600)] == [0.6, 0.6, 0.25]


def test_layers_nearer_to_the_input_learn_more_slowly():
    network = model.build("resnet18", channels=3, classes=2, image_size=(32, 32))
    settings_of_run = settings("adamw", layer_decay=0.1)
    groups = optimizers.make_optimizer(network, settings_of_run).param_groups

    rates = {}
    for group in groups:
        for parameter in group["params"]:
            rates[id(parameter)] = group["lr"] / settings_of_run.lr
    in_order = [rates[id(parameter)] for parameter in network.parameters()]
    assert in_order == sorted(in_order)
    assert in_order[0] == pytest.approx(0.1) and in_order[-1] == 1


def test_a_part_of_the_start_is_kept():
    network = nn.BatchNorm1d(2)
    start = copy.deepcopy(network.state_dict())
    network(torch.randn(8, 2))
    network.weight.data.fill_(2.0)
    optimizers.move_weights(network, start, 0.25)
    assert network.weight.tolist() == [1.75, 1.75]  # the start was 1
    assert network.num_batches_tracked == 1


def test_frozen_batch_norm_keeps_its_statistics_and_learns_its_scale():
    network = model.build("resnet18", channels=3, classes=2, image_size=(32, 32))
    optimizer = optimizers.make_optimizer(network, settings("adamw"))
    optimizers.train_mode(network, "frozen")
    before = copy.deepcopy(network.bn1.state_dict())

    network(torch.randn(4, 3, 32, 32)).sum().backward()
    optimizer.step()
    after = network.bn1.state_dict()
    assert torch.equal(before["running_mean"], after["running_mean"])
    assert not torch.equal(before["weight"], after["weight"])
    assert network.fc.training and not network.bn1.training
