"""After training: a temperature that makes probabilities mean what they say, and the reference for `known`.

Both come from images that the network was not trained on, and that are not in the test split: a validation
split if there is one; else a small part held out of a large training split; else, as small sets lose most by
that, the part that a twin, another network trained on the rest, has not seen.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

import model
from data.split import Split, hold_out
from training import features

GAUSSIAN_IMAGES = 5000  # of the training split, at most, that describe what is familiar
SHRINKAGE = 0.2  # of the correlations of their statistics, towards none
# A fifth of the images is kept from a twin, which trains for half as many epochs. On 2,000 images of CIFAR-10
# this was closer to the best temperature than a tenth and all epochs, in less than half of the time.
TWIN_PART, TWIN_EPOCHS, FEWEST_EPOCHS = 0.2, 0.5, 10
TABLE = 1000  # scores in a file: the steps of `known`


@dataclass
class Calibration:
    """What was learned after training. source: where the images came from, in words; images: their number.

    familiarity: the tensors of `model.Familiarity`, layers: what it looks at, compared: the images in its
    table. judged: the rows of the images, and probabilities [n, classes]: what the network that was not
    trained on them says.
    """

    temperature: float
    source: str
    images: int
    familiarity: dict[str, torch.Tensor]
    layers: tuple[str, ...]
    compared: int
    judged: torch.Tensor
    probabilities: np.ndarray


def fit_temperature(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """The temperature with the smallest cross entropy (Guo et al. 2017), logits [n, classes], labels [n].

    Half an image more, with all labels alike, keeps it above 0 where the network makes no mistake. The cross
    entropy is convex in 1 / temperature: its slope is bisected.
    """
    logits = logits.double()
    wanted = logits.gather(1, labels[:, None]).sum() + 0.5 * logits.mean()
    low, high = -5.0, 5.0  # of log(1 / temperature)
    for _ in range(50):
        middle = (low + high) / 2
        expected = (logits * (np.exp(middle) * logits).softmax(1)).sum(1)  # the mean logit of each image
        slope = expected.sum() + 0.5 * expected.mean() - wanted
        low, high = (low, middle) if slope > 0 else (middle, high)
    return float(np.exp(-middle))


def fit_gaussian(statistics: torch.Tensor) -> dict[str, torch.Tensor]:
    """weight and bias that whiten `statistics` [n, d]: their squared sum is a Mahalanobis distance."""
    statistics = statistics.double()
    mean, deviation = statistics.mean(0), statistics.std(0)
    least = 1e-3 * deviation.max().clamp(min=1e-6)  # for what is constant: a border, a dead channel
    deviation = deviation.clamp(min=least)
    scaled = (statistics - mean) / deviation
    correlation = scaled.T @ scaled / len(scaled)
    correlation = (1 - SHRINKAGE) * correlation + SHRINKAGE * torch.eye(len(mean))
    weight = torch.linalg.cholesky(correlation.inverse()) / deviation[:, None]
    return {"weight": weight, "bias": -mean @ weight}


def log_distance(gaussian: dict, statistics: torch.Tensor) -> torch.Tensor:
    """The logarithm [n] of the squared Mahalanobis distance of statistics [n, d]."""
    return (statistics.double() @ gaussian["weight"] + gaussian["bias"]).square().sum(1).log()


def fit_familiarity(gaussian: dict, distance: torch.Tensor, largest: torch.Tensor | None = None) -> dict:
    """The tensors of model.Familiarity, from a Gaussian, and new images' log_distance and largest logits [n].

    Distance and logit count alike, each in its own deviations; a logit counts for one at most. Without
    logits, the distance alone counts.
    """
    factor, offset, limit = (torch.tensor(0.0).double(),) * 3
    if largest is not None:
        limit = distance.std()
        factor = limit / largest.double().std().clamp(min=1e-6)
        offset = -factor * largest.double().mean()
    logit = torch.zeros_like(distance) if largest is None else largest.double() * factor + offset
    scores = torch.minimum(logit, limit) - distance
    table = torch.quantile(scores, (torch.arange(TABLE) + 0.5).double() / TABLE)
    state = {**gaussian, "logit": torch.stack([factor, offset, limit]), "table": table}
    return {name: tensor.float() for name, tensor in state.items()}


@torch.inference_mode()
def describe(deployable, layers: tuple[str, ...], split: Split) -> tuple[torch.Tensor, ...]:
    """Logits [n, classes], statistics [n, d] and labels [n] of a split's images, on the CPU."""
    network, parts = deployable.network.eval(), []
    if isinstance(split, features.FeatureSplit):
        rows, head = split.members.to(split.images.device), network.get_submodule(split.head)
        found = head(split.images[rows]), split.statistics[rows], split.labels[rows]
        return tuple(tensor.cpu() for tensor in found)
    for images, labels in split.in_order():
        logits, statistics = model.run_with_statistics(network, deployable.normalise(images), layers)
        parts.append((logits.float().cpu(), statistics.float().cpu(), labels.cpu()))
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))


def some(split: Split) -> Split:
    """At most GAUSSIAN_IMAGES of the images, evenly spread."""
    return split.part(np.arange(len(split)) % -(-len(split) // GAUSSIAN_IMAGES) == 0)


def calibrate(deployable, train: Split, held_out: Split, source: str, twin=None) -> Calibration:
    """Calibrate a network on images that it was not trained on, or else by a twin that was not.

    deployable: the network with its preprocessing. train: what it was trained on. source: what `held_out` is,
    in words. A twin gives its temperature. What is familiar is then learned from one half of the network's
    own images, and how far from it such images are from the other half: training hardly changes these
    distances. It changes the logits, so that they say nothing of new images, and are left out.
    """
    layers = model.middle_layers(deployable.network, deployable.mean.numel(), deployable.image_size)
    logits, statistics, labels = describe(twin or deployable, layers, held_out)
    own = describe(deployable, layers, some(train))[1]
    if twin:
        own, statistics = own[::2], own[1::2]
    gaussian = fit_gaussian(own)
    distance = log_distance(gaussian, statistics)
    familiarity = fit_familiarity(gaussian, distance, None if twin else logits.amax(1))
    temperature = fit_temperature(logits, labels)
    result = temperature, source, len(labels), familiarity, layers, len(statistics)
    return Calibration(*result, held_out.members, (logits / temperature).softmax(1).numpy())


def of_run(trainer, deployable, train_twin: Callable) -> Calibration | None:
    """The calibration of a run's result, as its settings want it. Raises Problem, and Stopped after a signal.

    train_twin: from the trainer, {"train": part, "test": the rest} of its training split and a number of
    epochs to another deployable, trained on the part; every process calls it, the first one does the rest.
    """
    settings, splits, train, twin = trainer.settings, trainer.splits, trainer.splits["train"], None
    if settings.calibration == "none":
        return None
    if settings.calibration == "twin":
        part, held_out = hold_out(train, TWIN_PART, settings.seed)
        epochs = min(settings.epochs, max(FEWEST_EPOCHS, round(settings.epochs * TWIN_EPOCHS)))
        twin = train_twin(trainer, {"train": part, "test": held_out}, epochs)
        source = f"a twin trained on {len(part):,} of the images"
    elif settings.calibration == "validation":
        held_out, source = splits["val"], "the validation split"
    else:
        held_out, source = splits["held-out"], "a part of the training split, held out"
    return None if trainer.processes.rank > 0 else calibrate(deployable, train, held_out, source, twin)
