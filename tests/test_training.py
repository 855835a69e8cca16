"""The small functions of step 1: augmentation, optimizers, schedules."""

import csv
import itertools
from types import SimpleNamespace

import pytest
import torch

import model
import step1_train
from data import split


def gather(images, augment, flips=None, seed=0):
    n = len(images)
    flips = torch.zeros(n, dtype=torch.bool) if flips is None else flips
    return split.gather(images, torch.arange(n), augment, flips, torch.Generator().manual_seed(seed))


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
    assert split.mirror(torch.tensor(position), 8) == inside


def test_mirror_stays_inside_the_smallest_images():
    for size in (1, 2):
        positions = split.mirror(torch.arange(-1, size + 1), size)
        assert positions.min() >= 0 and positions.max() < size


def test_no_augmentation_is_the_images_in_the_order_asked_for(images):
    index = torch.tensor([3, 0, 3])
    got = split.gather(images, index, [], torch.zeros(len(images), dtype=torch.bool), torch.Generator())
    assert torch.equal(got, images[index])


def test_flip_mirrors_left_to_right_where_told(images):
    flips = torch.arange(len(images)) % 2 == 0
    got = gather(images, ["flip"], flips)
    assert torch.equal(got[0], images[0].flip(1)) and torch.equal(got[1], images[1])


def test_translate_shifts_by_a_sixteenth_and_mirrors_at_the_edge(images):
    got = gather(images, ["translate"])
    padded = torch.nn.functional.pad(images.permute(0, 3, 1, 2).float(), (2, 2, 1, 1), mode="reflect").byte()
    padded, seen = padded.permute(0, 2, 3, 1), set()
    for before, after in zip(padded, got, strict=True):
        shifts = itertools.product(range(3), range(5))
        fitting = [(dy, dx) for dy, dx in shifts if torch.equal(before[dy : dy + 20, dx : dx + 36], after)]
        assert len(fitting) == 1
        seen.update(fitting)
    assert {dy for dy, _ in seen} == {0, 1, 2} and {dx for _, dx in seen} == {0, 1, 2, 3, 4}


def test_alternating_flip_shows_each_image_both_ways(call, here, monkeypatch):
    indices, flipped = [], []

    def spy(images, index, augment, flips, generator, share):
        indices.append(index)
        flipped.append(flips[index])
        return images[index]

    monkeypatch.setattr(split, "gather", spy)
    call(step1_train.main, *"--model mlp --augment flip --epochs 2 --device cpu".split()).done()
    two = 2 * 1437  # what follows is for samples.png
    indices, flipped = torch.cat(indices)[:two].view(2, 1437), torch.cat(flipped)[:two].view(2, 1437)
    first, second = (flips[index.argsort()] for flips, index in zip(flipped, indices, strict=True))
    assert torch.equal(first, ~second) and 600 < first.sum() < 840


def test_without_easy_keeps_the_hardest_and_stands_for_all_the_others(images):
    members = torch.arange(5, 35)
    whole = split.Split(images, torch.zeros(40, dtype=torch.int64), members, images.numpy())
    losses = torch.rand(40, generator=torch.Generator().manual_seed(1))
    hardest = set(members[losses[members].argsort(descending=True)[:6]].tolist())
    drawn, draws = torch.zeros(40), 400
    for k in range(draws):
        part, weights = whole.without_easy(losses, 0.6, k, 0)
        kept = set(part.members.tolist())
        assert len(part) == 12 and hardest < kept < set(members.tolist())
        assert weights[part.members].sum() == len(whole) and all(weights[list(hardest)] == 1)
        assert part.count_batches(5) == whole.count_batches(5, skip=0.6) == 3
        drawn[part.members] += weights[part.members]
    assert (drawn[members] / draws - 1).abs().max() < 0.5  # each counts as one image on the average


@pytest.mark.parametrize(("count", "skip"), [(1, 0.9), (2, 0.5), (3, 0.1), (7, 0.9)])
def test_without_easy_leaves_something_of_tiny_splits(images, count, skip):
    whole = split.Split(images, torch.zeros(40, dtype=torch.int64), torch.arange(count), images.numpy())
    part, weights = whole.without_easy(torch.rand(40), skip, 2, 0)
    assert 1 <= len(part) <= count and weights[part.members].sum() == pytest.approx(count, rel=0.5)
    assert part.count_batches(2) == whole.count_batches(2, skip=skip)


def test_training_figures_are_of_all_images_although_the_easy_ones_are_skipped(call, here):
    still = "--model mlp --epochs 3 --schedule constant --lr 1e-9 --augment none --device cpu".split()
    shown = call(step1_train.main, *still, "--skip-easy", 0.6, "--name", "some").done().out
    assert "leaving out 60% of the images, easy ones" in shown
    call(step1_train.main, *still, "--name", "all").done()
    with (
        open(here / "runs" / "some" / "metrics.csv") as some,
        open(here / "runs" / "all" / "metrics.csv") as every,
    ):
        losses, of_all = (
            [float(row["train_loss"]) for row in csv.DictReader(file)] for file in (some, every)
        )
    assert losses[::2] == pytest.approx(of_all[::2], abs=1e-5)  # the network stands still
    assert 1e-5 < abs(losses[1] - of_all[1]) < 0.02  # unweighted, the harder half would make it 0.1


def arguments(optimizer, schedule, **more):
    lr = (
        0.1 if optimizer in ("sgd", "muon") else 0.01
    )  # of muon, which gives the two layers here to sgd, as well
    return SimpleNamespace(
        optimizer=optimizer, schedule=schedule, lr=lr, momentum=0.9, weight_decay=0.1, **more
    )


def learn(optimizer, schedule, steps):
    """Losses and learning rates of a few steps of a tiny network on one batch."""
    torch.manual_seed(0)
    network = model.build("mlp", channels=1, classes=3, image_size=(4, 4), hidden=(8,))
    args = arguments(optimizer, schedule)
    optimizer = step1_train.make_optimizer(network, args)
    schedule = step1_train.make_schedule(optimizer, args, steps)
    x, target, losses, rates = torch.randn(12, 1, 4, 4), torch.arange(12) % 3, [], []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        loss = torch.nn.functional.cross_entropy(network(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses, [*rates, optimizer.param_groups[0]["lr"]], args.lr


@pytest.mark.parametrize("schedule", step1_train.SCHEDULES)
@pytest.mark.parametrize("optimizer", step1_train.OPTIMIZERS)
def test_every_optimizer_and_schedule_learns(optimizer, schedule):
    losses, _, _ = learn(optimizer, schedule, 12)
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize(
    ("schedule", "first", "highest", "last"),
    [("constant", 1, 1, 1), ("linear", 1, 1, 0), ("cosine", 1, 1, 0), ("onecycle", 1 / 25, 1, 0)],
)
def test_schedules_at_their_ends(schedule, first, highest, last):
    _, rates, lr = learn("sgd", schedule, 50)
    assert rates[0] == pytest.approx(first * lr)
    assert max(rates) == pytest.approx(highest * lr, rel=0.02)
    assert rates[-1] == pytest.approx(last * lr, abs=1e-4 * lr)
    assert rates[-1] >= 0


def test_weight_decay_spares_biases_and_norms():
    network = model.build("mynet", channels=1, classes=3, image_size=(8, 8))
    optimizer = step1_train.make_optimizer(network, arguments("sgd", "constant"))
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert all(decays[id(p)] == (0.1 if p.ndim > 1 else 0) for p in network.parameters())


def test_frozen_whitening_is_not_optimized():
    network = model.build("airbench", channels=1, classes=3, image_size=(28, 28), width=0.1)
    optimizer = step1_train.make_optimizer(network, arguments("sgd", "constant"))
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert id(network.whitening.weight) not in held and id(network.head.weight) in held


@pytest.mark.parametrize(
    ("epoch", "epochs", "size"),
    [
        (1, 10, (20, 20)),
        (4, 10, (20, 20)),
        (8, 10, (28, 28)),
        (10, 10, (32, 32)),
        (1, 1, (32, 32)),
        (2, 2, (32, 32)),
    ],
)
def test_image_size_grows_to_the_full_one_in_the_last_epoch(epoch, epochs, size):
    assert step1_train.size_at(epoch, epochs, (32, 32), 0.625) == size


def test_image_size_never_shrinks_and_never_passes_the_full_one():
    sizes = [step1_train.size_at(epoch, 7, (30, 50), 0.5) for epoch in range(1, 8)]
    assert sizes == sorted(sizes) and sizes[0] == (12, 24) and sizes[-1] == (30, 50)


def test_muon_holds_filters_and_brings_singular_values_near_one():
    torch.manual_seed(0)
    network = model.build("airbench", channels=1, classes=3, image_size=(28, 28), width=0.1)
    args = arguments("muon", "constant")
    optimizer = step1_train.make_optimizer(network, args)
    filters = network.groups[0][4].weight
    network(torch.randn(4, 1, 28, 28)).sum().backward()
    before = filters.detach() * (len(filters) ** 0.5 / filters.detach().norm())
    optimizer.step()
    step = (filters.detach() - before).flatten(1) / args.lr
    values = torch.linalg.svdvals(step.float())
    assert 0.3 < values.median() < 1.3 and values.max() < 1.5
