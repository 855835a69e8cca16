"""training/batch_norm.py: running statistics that lag behind are estimated anew."""

import argparse

import pytest
import torch
from torch import nn

import step1_train
from data.split import Split
from training import batch_norm
from training.processes import Machine, Processes
from training.progress import Progress

MACHINE = Machine(device=torch.device("cpu"), dtype=None, processes=Processes())
SETTINGS = argparse.Namespace(batch_norm="trained", batch_size=8, augment=[], seed=0)


class Student:
    """The parts of a trainee that batch norm needs, without preprocessing."""

    def __init__(self, network, images):
        self.network = network
        self.deployable = self
        rows = torch.arange(len(images))
        split = Split(images=images, labels=rows, members=rows, source=images.numpy())
        self.splits = {"train": split}

    def normalise(self, batch):
        return batch


def features():
    return torch.randn(20, 3, generator=torch.Generator().manual_seed(0)) * 5 + 2


def test_statistics_become_those_of_the_training_images_and_nothing_else_changes():
    network = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3, momentum=0.01))
    weights = [parameter.clone() for parameter in network.parameters()]
    student = Student(network, features())
    progress = Progress()
    batch_norm.estimate_anew(student, SETTINGS, MACHINE, progress)

    norm = network[1]
    with torch.no_grad():
        outputs = network[0](features())
    assert torch.allclose(norm.running_mean, outputs.mean(0), atol=1e-5)
    # The variances within batches of 8, 8 and 4 images, by the number of their images.
    assert norm.running_var == pytest.approx(outputs.var(0).numpy(), rel=0.3)
    assert norm.momentum == 0.01 and progress.seconds > 0
    for before, after in zip(weights, network.parameters(), strict=True):
        assert torch.equal(before, after)

    again = norm.running_var.clone()
    batch_norm.estimate_anew(student, SETTINGS, MACHINE, Progress())
    assert torch.equal(again, norm.running_var)


def test_a_frozen_layer_keeps_what_came_with_its_weights():
    network = nn.Sequential(nn.BatchNorm1d(3, momentum=0.01), nn.Linear(3, 3), nn.BatchNorm1d(3))
    for parameter in network[0].parameters():
        parameter.requires_grad = False
    batch_norm.estimate_anew(Student(network, features()), SETTINGS, MACHINE, Progress())
    assert torch.equal(network[0].running_mean, torch.zeros(3))
    assert not torch.equal(network[2].running_mean, torch.zeros(3))


@pytest.mark.parametrize(
    ("momentum", "steps", "lagging"),
    [(0.2, 440, None), (0.2, 99, 0.2), (0.01, 400, 0.01), (0.0003, 50_000, 0.0003), (None, 9, 0)],
)
def test_steps_may_be_too_few_for_a_momentum(momentum, steps, lagging):
    network = nn.Sequential(nn.BatchNorm1d(3, momentum=0.5), nn.BatchNorm1d(3, momentum=momentum))
    assert batch_norm.lagging_momentum(network, "trained", steps) == lagging

    for parameter in network.parameters():
        parameter.requires_grad = False
    assert batch_norm.lagging_momentum(network, "trained", steps) is None
    assert batch_norm.lagging_momentum(nn.Linear(3, 3), "trained", steps) is None


@pytest.fixture
def lagging_digits(call, here):
    """step1 on the digits with a network that has time for 30 steps only."""
    options = ["--model", "resblock", "--epochs", "10", "--batch-size", "512"]
    options += ["--calibration", "none"]
    return lambda *more: call(step1_train.main, *options, *more).done()


def test_a_short_run_is_evaluated_as_it_was_trained(lagging_digits, monkeypatch):
    result = lagging_digits()
    assert "note: batch norm's momentum of 0.1 wants more than 30 steps" in result.err
    anew = accuracy(result)

    monkeypatch.setattr(batch_norm, "ENOUGH", 0)
    lagging = lagging_digits()
    assert "batch norm" not in lagging.err
    assert anew > accuracy(lagging) + 0.1


def accuracy(result):
    (line,) = [line for line in result.out.splitlines() if "test accuracy" in line]
    return float(line.split("test accuracy ")[1].split("%")[0]) / 100
