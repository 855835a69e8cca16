"""What the steps of a run train, and on what: a whole network and images, or its last layer and
features.

The features of a frozen network, what its last layer is given, are computed once and kept in a
file. --pretrained fits the new head to them first. --freeze-backbone trains no more than that layer
on them, so that an epoch costs hardly anything; without it, the whole network is trained.
"""

import argparse
import contextlib
import hashlib
import os
import time
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import data
import model
from data import notes
from data.cache import in_writable_place
from data.split import Split, evaluation_batch_size
from inference.files import replacing
from training.runs import file_name_of
from training.weights import head_keys

HEAD_STEPS = 100  # of L-BFGS, to fit a head
HEAD_DECAY = 3e-2  # its L2 penalty
LEAST_DEVIATION = 1e-4  # of features that say something


# ---------------------------------------------------------------------------------- what is trained
class Description(NamedTuple):
    """A network's logits [n, classes] and statistics [n, d] of images, and their labels [n], on the
    CPU.

    statistics: see `model.run_with_statistics`.
    """

    logits: torch.Tensor
    statistics: torch.Tensor
    labels: torch.Tensor


@dataclass(frozen=True)
class WholeNetwork:
    """All of a network, which is trained on images, or on the features of a regression.

    deployable: the network with its preprocessing, on the device that trains. splits: of images, by
    name. classes: how many, 1 for a regression.
    """

    deployable: model.Deployable
    splits: dict[str, Split]
    classes: int

    @property
    def network(self) -> nn.Module:
        """What gives the logits of a normalised batch."""
        return self.deployable.network

    def normalise(self, batch: torch.Tensor) -> torch.Tensor:
        """A batch of a split as the network takes it."""
        return self.deployable.normalise(batch)

    def with_network(
        self, deployable: model.Deployable, splits: dict[str, Split]
    ) -> "WholeNetwork":
        """The same for another network like this one, and for parts of these splits."""
        return replace(self, deployable=deployable, splits=splits)

    @torch.inference_mode()
    def describe(self, split: Split, layers: tuple[str, ...]) -> Description:
        """Run the network in eval mode over a split; the statistics are taken after `layers`."""
        network = self.deployable.network.eval()
        logits = []
        statistics = []
        labels = []
        for images, targets in split.in_order():
            normalised = self.deployable.normalise(images)
            outputs, found = model.run_with_statistics(network, normalised, layers)
            logits.append(outputs.float().cpu())
            statistics.append(found.float().cpu())
            labels.append(targets.cpu())
        return Description(torch.cat(logits), torch.cat(statistics), torch.cat(labels))


@dataclass(kw_only=True)
class FeatureSplit(Split):
    """A Split whose `images` are features, float32 [N, d].

    statistics: of the same images, float32 [N, s].
    """

    statistics: torch.Tensor


@dataclass(frozen=True)
class LastLayer:
    """The last layer of a frozen network, which is trained on features.

    deployable: the whole network. splits: of features, by name. head: the name of the layer.
    """

    deployable: model.Deployable
    splits: dict[str, FeatureSplit]
    classes: int
    head: str

    @property
    def network(self) -> nn.Module:
        """What gives the logits of a batch."""
        return self.deployable.network.get_submodule(self.head)

    def normalise(self, batch: torch.Tensor) -> torch.Tensor:
        """A batch of a split as the layer takes it: unchanged."""
        return batch

    def with_network(
        self, deployable: model.Deployable, splits: dict[str, FeatureSplit]
    ) -> "LastLayer":
        """The same for another network with these frozen layers, and for parts of these splits."""
        return replace(self, deployable=deployable, splits=splits)

    @torch.inference_mode()
    def describe(self, split: FeatureSplit, layers: tuple[str, ...]) -> Description:
        """Run the layer over a split; the statistics were computed with the features."""
        self.deployable.network.eval()
        rows = split.members.to(split.images.device)
        logits = self.network(split.images[rows])
        statistics = split.statistics[rows]
        return Description(logits.cpu(), statistics.cpu(), split.labels[rows].cpu())


Trainee = WholeNetwork | LastLayer


def choose_trainee(
    splits: dict[str, Split],
    deployable: model.Deployable,
    settings: argparse.Namespace,
    classes: int,
) -> Trainee:
    """What to train: for --freeze-backbone the last layer, if the network ends in one, else all of
    it.

    Raises Problem if the features cannot be kept.
    """
    whole = WholeNetwork(deployable=deployable, splits=splits, classes=classes)
    if not settings.freeze_backbone or is_regression(splits["train"]):
        return whole
    return last_layer_of(whole, list(splits), settings) or whole


def fits_head_first(settings: argparse.Namespace) -> bool:
    """Is this a pretrained network that will be trained whole?"""
    return bool(settings.pretrained) and not settings.freeze_backbone


def start_head(trainee: Trainee, settings: argparse.Namespace) -> None:
    """Fit the head of a pretrained network before its first step, whatever will be trained.

    Raises Problem if the features cannot be kept.
    """
    if not settings.pretrained or is_regression(trainee.splits["train"]):
        return
    last_layer = trainee
    if isinstance(trainee, WholeNetwork):
        last_layer = last_layer_of(trainee, ["train"], settings)
    if last_layer:
        fit_head(last_layer)


def is_regression(split: Split) -> bool:
    return split.labels.is_floating_point()


# ----------------------------------------------------------------------------------------- features
@dataclass(frozen=True)
class Extractor:
    """Computes the features of a network, and the statistics of the same images.

    head: the name of the layer that is given the features. layers: see `model.middle_layers`.
    """

    deployable: model.Deployable
    head: str
    layers: tuple[str, ...]

    @torch.inference_mode()
    def extract(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Features [batch, d], logits and statistics of uint8 images of the network's own size."""
        # The features are not what the network returns: a hook sees them on their way.
        network = self.deployable.network.eval()
        given = []
        layer = network.get_submodule(self.head)
        with layer.register_forward_pre_hook(lambda layer, inputs: given.extend(inputs)):
            normalised = self.deployable.normalise(images.to(self.deployable.mean.device))
            logits, statistics = model.run_with_statistics(network, normalised, self.layers)
        return given[-1], logits, statistics

    def fingerprint(self, images: torch.Tensor) -> str:
        """A short hash of all that the features of these images depend on."""
        size = tuple(self.deployable.image_size)
        mean = self.deployable.mean.tolist()
        std = self.deployable.std.tolist()
        hasher = hashlib.sha256(repr((size, self.head, self.layers, mean, std)).encode())

        # The head comes after the features, and is trained meanwhile.
        for name, tensor in self.deployable.network.state_dict().items():
            if not name.startswith(f"{self.head}."):
                hasher.update(tensor.cpu().contiguous().numpy())
        hasher.update(images.cpu().numpy())
        return hasher.hexdigest()[:16]


def last_layer_of(
    whole: WholeNetwork, names: list[str], settings: argparse.Namespace
) -> LastLayer | None:
    """The last layer of a network and the features of these splits; None if it does not end in its
    head.

    Raises Problem if the features cannot be kept.
    """
    deployable = whole.deployable
    head = head_keys(deployable.network)[0].rpartition(".")[0]
    channels = deployable.mean.numel()
    layers = model.middle_layers(deployable.network, channels, deployable.image_size)
    extractor = Extractor(deployable=deployable, head=head, layers=layers)

    layer = deployable.network.get_submodule(head)
    if not ends_in(layer, extractor, whole.splits["train"].images[:2]):
        return None

    splits = {}
    tables = {}  # by the id of the images
    for name in names:
        split = whole.splits[name]
        key = id(split.images)  # parts of one split share their images
        if key not in tables:
            tables[key] = cached_features(extractor, split.images, settings)
        splits[name] = feature_split(split, tables[key], layer.in_features)
    return LastLayer(deployable=deployable, splits=splits, classes=whole.classes, head=head)


def ends_in(layer: nn.Module, extractor: Extractor, images: torch.Tensor) -> bool:
    """Are the network's logits what this linear layer makes of its features?

    Tried on a few images.
    """
    features, logits, _ = extractor.extract(images)
    with torch.inference_mode():
        return isinstance(layer, nn.Linear) and torch.equal(layer(features), logits)


def feature_split(split: Split, table: np.ndarray, size: int) -> FeatureSplit:
    """A split with features in the place of its images.

    table: see `cached_features`; its first `size` columns are features.
    """
    on_device = torch.from_numpy(table).to(split.images.device)  # [N, d + s]
    return FeatureSplit(
        images=on_device[:, :size],
        labels=split.labels,
        members=split.members,
        source=table,
        same=split.same,
        groups=split.groups,
        statistics=on_device[:, size:],
    )


def cached_features(
    extractor: Extractor, images: torch.Tensor, settings: argparse.Namespace
) -> np.ndarray:
    """A map [N, d + s]: the features and the statistics of images [N, H, W, C]. Raises Problem."""
    name = f"features-{file_name_of(settings.model)}-{extractor.fingerprint(images)}.npy"

    def load(directory: str) -> np.ndarray:
        path = os.path.join(directory, name)
        # A ValueError is a file that is not whole, and made again.
        with contextlib.suppress(FileNotFoundError, ValueError):
            return np.load(path, mmap_mode="c")
        write_features(path, extractor, images)
        return np.load(path, mmap_mode="c")

    source = settings.data_dir or data.HERE
    return in_writable_place(load, source, settings.cache_dir, "the features")


def write_features(path: str, extractor: Extractor, images: torch.Tensor) -> None:
    """Write what `cached_features` returns. Raises OSError."""
    started = time.perf_counter()
    batches = images.split(evaluation_batch_size(images))

    with replacing(path) as file:
        bar = tqdm(batches, "features", leave=False, disable=notes.silent or None)
        for number, batch in enumerate(bar):
            features, _, statistics = extractor.extract(batch)
            rows = torch.cat([features, statistics], 1).cpu().numpy()  # [batch, d + s]
            if number == 0:
                # The width is only known now. Written by parts, the table is never whole in memory.
                shape = (len(images), rows.shape[1])
                header = {"descr": "<f4", "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(file, header)
            file.write(rows)

    seconds = time.perf_counter() - started
    computed = f"computed the features of {len(images):,} images in {seconds:.1f} s"
    notes.note(f"{computed}, kept for later runs")


# ----------------------------------------------------------------------------- a head to start with
@torch.no_grad()
def set_to_zero(layer: nn.Linear) -> None:
    for parameter in layer.parameters():
        parameter.zero_()


def fit_head(last_layer: LastLayer) -> None:
    """Fit the head to the features of the training split: logistic regression by L-BFGS.

    The features are standardised, so that one penalty suits them all. A head that came with the
    weights, and fits better, stays.
    """
    split = last_layer.splits["train"]
    features = split.images[split.members.to(split.images.device)]  # [n, d]
    labels = split.labels[split.members]
    layer = last_layer.network

    deviation, mean = torch.std_mean(features, 0)
    if deviation.max() < LEAST_DEVIATION:
        return  # such features say nothing, and weights for them would be huge
    deviation = deviation.clamp(min=1e-3 * deviation.max())
    if layer.bias is None:
        mean = torch.zeros_like(mean)  # without a bias, nothing could make up for a shift

    fitted = fit_linear((features - mean) / deviation, labels, layer)
    with torch.no_grad():
        # The layer is given features that are not standardised.
        fitted.weight.div_(deviation)
        if fitted.bias is not None:
            fitted.bias.sub_(fitted.weight @ mean)
        if F.cross_entropy(fitted(features), labels) < F.cross_entropy(layer(features), labels):
            layer.load_state_dict(fitted.state_dict())


def fit_linear(features: torch.Tensor, labels: torch.Tensor, like: nn.Linear) -> nn.Linear:
    """A linear layer of the shape of `like`, fitted to features [n, d] and labels [n] by L-BFGS."""
    has_bias = like.bias is not None
    fitted = nn.Linear(like.in_features, like.out_features, has_bias, device=features.device)
    set_to_zero(fitted)
    optimizer = torch.optim.LBFGS(
        fitted.parameters(), max_iter=HEAD_STEPS, line_search_fn="strong_wolfe"
    )

    def loss():
        optimizer.zero_grad()
        penalty = HEAD_DECAY * fitted.weight.square().sum()
        error = F.cross_entropy(fitted(features), labels) + penalty
        error.backward()
        return error

    optimizer.step(loss)
    return fitted
