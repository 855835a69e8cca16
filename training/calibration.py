"""After training: a temperature that makes probabilities mean what they say, and the reference for
`known`.

Both come from images that the network was not trained on, and that are not in the test split: a
validation split if there is one; else a small part held out of a large training split; else, as
small sets lose most by that, the part that a twin, another network trained on the rest, has not
seen. Where training takes little time, of a frozen network or of a hundred photos, it is done anew
without each fifth of the images in turn, so that all of them tell something (cross-fitting).
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

import model
from data.augment import change_colours
from data.files import count_of
from data.holdout import stratified_groups
from data.notes import note
from data.split import Split, hold_out, note_groups_of, seeded
from inference.errors import Problem
from training.features import LastLayer, Trainee

GAUSSIAN_IMAGES = 5000  # of the training split, at most, that describe what is familiar
MOST_LIGHT = 0.6  # by how much brightness, contrast and saturation of these change for other light
SHRINKAGE = 0.2  # of the correlations of their statistics, towards none
# A fifth of the images is kept from a twin, which trains for half as many epochs. On 2,000 images
# of CIFAR-10 this was closer to the best temperature than a tenth and all epochs, in less than half
# of the time.
TWIN_PART = 0.2
TWIN_EPOCHS = 0.5
FEWEST_EPOCHS = 10
FEW_HELD_OUT = 100  # images
FEWEST_WITH_WEIGHTS = 3  # for a network that starts from weights of another
HALVES_SEED = 0
FOLDS = 5  # of cross-fitting
# How far the average of six fine-tuned networks is from their start, as a part of how far each of
# the five is: what is random in the course of their training cancels out. Measured: 0.63.
DISTANCE_OF_AVERAGE = 0.6
TABLE = 1000  # scores in a file: the steps of `known`
HALVINGS = 49  # of the interval in which the temperature is searched


@dataclass
class Calibration:
    """What was learned after training. source: where the images came from, in words; images: their
    number.

    familiarity: the tensors of `model.Familiarity`, layers: what it looks at, compared: the images
    in its table. judged: the rows of the images, and probabilities [n, classes]: what the network
    that was not trained on them says.
    """

    temperature: float
    source: str
    images: int
    familiarity: dict[str, torch.Tensor]
    layers: tuple[str, ...]
    compared: int
    judged: torch.Tensor
    probabilities: np.ndarray


class CrossFitted(NamedTuple):
    """What networks trained like the run's say of the images that each was not trained on.

    logits: [n, classes], of all images of the training split, in their order. Of a pretrained
    network that is trained whole, heads: the same with nothing trained but the fitted head;
    average: the network whose weights are the mean of the run's and of theirs; like_average: the
    same as logits, of networks that are as far from their start as the average. seconds: spent on
    training them all.
    """

    logits: torch.Tensor
    seconds: float
    heads: torch.Tensor | None = None
    average: Trainee | None = None
    like_average: torch.Tensor | None = None


# -------------------------------------------------------------------------------------- calibrating
def calibrate_on_held_out(
    trainee: Trainee, held_out: Split, source: str, images: Split
) -> Calibration:
    """Calibrate a network on images that it was not trained on. source: what they are, in words.

    images: of the training split, whatever is trained.
    """
    layers = layers_to_look_at(trainee)
    new = trainee.describe(held_out, layers)
    own = trainee.describe(evenly_spread(trainee.splits["train"]), layers)
    relit = relit_statistics(trainee.deployable, evenly_spread(images), layers)

    gaussian = fit_gaussian(torch.cat([own.statistics, relit]))
    distance = log_distance(gaussian, new.statistics)
    familiarity = fit_familiarity(gaussian, distance, largest=new.logits.amax(1))
    temperature = fit_temperature(new.logits, new.labels)
    return Calibration(
        temperature=temperature,
        source=source,
        images=len(new.labels),
        familiarity=familiarity,
        layers=layers,
        compared=len(distance),
        judged=held_out.members,
        probabilities=(new.logits / temperature).softmax(1).numpy(),
    )


def calibrate_by_twin(trainee: Trainee, twin: Trainee, images: Split) -> Calibration:
    """Calibrate a network by a twin that was trained on a part of the images, and tested on the
    others.

    The twin gives the temperature. What is familiar is learned from one half of the network's own
    images, and how far from it such images are from the other half: training hardly changes these
    distances. It changes the logits, so that they say nothing of new images, and are left out.
    images: of the training split, whatever is trained.
    """
    held_out = twin.splits["test"]
    layers = layers_to_look_at(trainee)
    new = twin.describe(held_out, layers)
    own = trainee.describe(evenly_spread(trainee.splits["train"]), layers)

    reference = evenly_spread(images)
    first = first_half(reference)
    relit = relit_statistics(trainee.deployable, reference.part(first), layers)

    gaussian = fit_gaussian(torch.cat([own.statistics[first], relit]))
    distance = log_distance(gaussian, own.statistics[~first])
    temperature = fit_temperature(new.logits, new.labels)
    return Calibration(
        temperature=temperature,
        source=f"a twin trained on {len(twin.splits['train']):,} of the images",
        images=len(new.labels),
        familiarity=fit_familiarity(gaussian, distance, largest=None),
        layers=layers,
        compared=len(distance),
        judged=held_out.members,
        probabilities=(new.logits / temperature).softmax(1).numpy(),
    )


def calibrate_by_cross_fitting(
    trainee: Trainee, logits: torch.Tensor, images: Split
) -> Calibration:
    """Calibrate a network by what others like it say, each of images it was not trained on.

    logits: [n, classes], of all images that the network was trained on, in their order. What is
    familiar is learned from one half of the images, and compared with the other half; where all
    layers were trained, the others' logits say as little of that as a twin's. images: of the
    training split, whatever is trained.
    """
    train = trainee.splits["train"]
    layers = layers_to_look_at(trainee)
    own = trainee.describe(evenly_spread(train), layers)

    reference = evenly_spread(images)
    first = first_half(reference)
    relit = relit_statistics(trainee.deployable, reference.part(first), layers)

    gaussian = fit_gaussian(torch.cat([own.statistics[first], relit]))
    distance = log_distance(gaussian, own.statistics[~first])
    largest = None
    what = "networks"
    if isinstance(trainee, LastLayer):
        largest = logits[is_spread(train)].amax(1)[~first]
        what = "last layers"

    temperature = fit_temperature(logits, train.labels[train.members].cpu())
    return Calibration(
        temperature=temperature,
        source=f"{FOLDS} {what}, each trained without the images it was asked about",
        images=len(logits),
        familiarity=fit_familiarity(gaussian, distance, largest=largest),
        layers=layers,
        compared=len(distance),
        judged=train.members,
        probabilities=(logits / temperature).softmax(1).numpy(),
    )


def folds(train: Split, seed: int) -> list[np.ndarray]:
    """Which members each fold of a training split has: bool [n], true of each member in one fold.

    Every fold has about the same part of each class; copies and groups stay together.
    """
    rest = train
    found = []
    for parts in range(FOLDS, 0, -1):
        fold = rest
        if parts > 1:
            rest, fold = hold_out(rest, 1 / parts, seed)
        found.append(np.isin(train.members, fold.members))
    return found


def splits_of_folds(train: Split, seed: int) -> Iterator[tuple[torch.Tensor, dict[str, Split]]]:
    """The members of each fold, bool [n], and what its network is trained on, "train", and asked
    about, "test". Of very few images, a fold may be empty, and is left out."""
    for fold in folds(train, seed):
        if fold.any():
            splits = {"train": train.part(~fold), "test": train.part(fold)}
            yield torch.from_numpy(fold), splits


def refuse_too_few(splits: dict[str, Split], settings: argparse.Namespace) -> None:
    """Raise Problem if so few images leave a part without any that the calibration needs; note
    that few are held out.
    """
    train = splits["train"]
    parts = [train]
    if settings.calibration == "held-out":
        parts.append(splits["held-out"])
    elif settings.calibration == "twin":
        parts = hold_out(train, TWIN_PART, settings.seed)
    elif settings.calibration == "cross-fit":
        parts = [train.part(~fold) for fold in folds(train, settings.seed) if fold.any()]
    if not all(map(len, parts)):
        reason = f"needs more than {len(train):,} training images: take more, or leave it out"
        raise Problem(f"--calibration {settings.calibration} {reason}", 2)

    if settings.calibration == "held-out" and len(splits["held-out"]) < FEW_HELD_OUT:
        note(
            f"only {count_of(len(splits['held-out']), 'image')} held out to calibrate on: "
            "--val-fraction 0.2 holds out more, and without --calibration all images are used"
        )


def splits_of_twin(train: Split, seed: int, classes: list[str]) -> dict[str, Split]:
    """The parts of a training split that a twin is trained on, "train", and tested on, "test".

    Notes the groups of both.
    """
    part, held_out = hold_out(train, TWIN_PART, seed)
    note_groups_of({"twin": part, "calibration": held_out}, classes, TWIN_PART)
    return {"train": part, "test": held_out}


def epochs_of_twin(settings: argparse.Namespace) -> int:
    """How long to train the twin of a network that was trained for as long as the settings say."""
    fewest = FEWEST_WITH_WEIGHTS if settings.pretrained else FEWEST_EPOCHS
    return min(settings.epochs, max(fewest, round(settings.epochs * TWIN_EPOCHS)))


def layers_to_look_at(trainee: Trainee) -> tuple[str, ...]:
    """The layers whose channels tell what is familiar."""
    deployable = trainee.deployable
    channels = deployable.mean.numel()
    return model.middle_layers(deployable.network, channels, deployable.image_size)


def evenly_spread(split: Split) -> Split:
    """At most GAUSSIAN_IMAGES of the images, evenly spread."""
    return split.part(is_spread(split))


def is_spread(split: Split) -> np.ndarray:
    """Which members `evenly_spread` takes: bool [n]."""
    stride = -(-len(split) // GAUSSIAN_IMAGES)
    return np.arange(len(split)) % stride == 0


def first_half(split: Split) -> np.ndarray:
    """Which members are in the first of two halves, neither of which tells of the other: bool [n].

    Images that belong together are in one half.
    """
    if split.groups is None:
        return np.arange(len(split)) % 2 == 0
    groups = split.groups[split.members]
    return stratified_groups(split.labels_of_members(), 0.5, HALVES_SEED, groups)


@torch.inference_mode()
def relit_statistics(
    deployable: model.Deployable, images: Split, layers: tuple[str, ...]
) -> torch.Tensor:
    """The statistics [n, d] of images in other light, about which networks are mostly right.

    Without these, digits of half the contrast were all right and all unknown. With all that
    training changes instead, fewer images of other kinds were unknown.
    """
    network = deployable.network.eval()
    generator = seeded(0)
    found = []
    for batch, labels in images.in_order():
        random = torch.rand(len(batch), 3, generator=generator).to(labels.device)
        relit = deployable.normalise(change_colours(batch, random, MOST_LIGHT))
        _, statistics = model.run_with_statistics(network, relit, layers)
        found.append(statistics.float().cpu())
    return torch.cat(found)


# ------------------------------------------------------------------------------------------ fitting
def fit_temperature(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """The temperature with the smallest cross entropy (Guo et al. 2017), logits [n, classes],
    labels [n].

    Half an image more, with all labels alike, keeps it above 0 where the network makes no mistake.
    The cross entropy is convex in 1 / temperature: its slope is bisected.
    """
    logits = logits.double()
    wanted = logits.gather(1, labels[:, None]).sum() + 0.5 * logits.mean()

    low = -5.0  # of log(1 / temperature)
    high = 5.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        probabilities = (np.exp(middle) * logits).softmax(1)
        expected = (logits * probabilities).sum(1)  # the mean logit of each image, [n]
        slope = expected.sum() + 0.5 * expected.mean() - wanted
        if slope > 0:
            high = middle
        else:
            low = middle
    return float(np.exp(-(low + high) / 2))


def fit_gaussian(statistics: torch.Tensor) -> dict[str, torch.Tensor]:
    """The weight and bias that whiten statistics [n, d].

    The squared sum of a whitened row is its Mahalanobis distance, squared.
    """
    statistics = statistics.double()
    mean = statistics.mean(0)
    deviation = statistics.std(0)
    # For what is constant: a border, a dead channel.
    least = 1e-3 * deviation.max().clamp(min=1e-6)
    deviation = deviation.clamp(min=least)

    scaled = (statistics - mean) / deviation
    correlation = scaled.T @ scaled / len(scaled)
    correlation = (1 - SHRINKAGE) * correlation + SHRINKAGE * torch.eye(len(mean))
    weight = torch.linalg.cholesky(correlation.inverse()) / deviation[:, None]
    return {"weight": weight, "bias": -mean @ weight}


def log_distance(gaussian: dict[str, torch.Tensor], statistics: torch.Tensor) -> torch.Tensor:
    """The logarithm [n] of the squared Mahalanobis distance of statistics [n, d]."""
    whitened = statistics.double() @ gaussian["weight"] + gaussian["bias"]
    return whitened.square().sum(1).log()


def fit_familiarity(
    gaussian: dict[str, torch.Tensor],
    distance: torch.Tensor,
    largest: torch.Tensor | None,
) -> dict[str, torch.Tensor]:
    """The tensors of model.Familiarity, from a Gaussian and new images' log_distance and largest
    logits [n].

    Distance and logit count alike, each in its own deviations; a logit counts for one at most.
    Without logits, the distance alone counts.
    """
    zero = torch.tensor(0.0).double()
    if largest is None:
        scale = torch.stack([zero, zero, zero])
        logit = torch.zeros_like(distance)
        limit = zero
    else:
        limit = distance.std()
        factor = limit / largest.double().std().clamp(min=1e-6)
        offset = -factor * largest.double().mean()
        scale = torch.stack([factor, offset, limit])
        logit = largest.double() * factor + offset

    scores = torch.minimum(logit, limit) - distance
    steps = (torch.arange(TABLE) + 0.5).double() / TABLE
    table = torch.quantile(scores, steps)

    state = {**gaussian, "logit": scale, "table": table}
    return {name: tensor.float() for name, tensor in state.items()}
