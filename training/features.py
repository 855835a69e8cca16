"""The features of a frozen network, what its last layer is given: computed once and kept in a file.

--freeze-backbone trains the last layer on them, so that an epoch costs no more than that layer; --pretrained
alone fits the new head to them before it trains the whole network.
"""

import contextlib
import hashlib
import os
import time
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import data
import model
from data import notes
from data.cache import directory_for
from data.split import MOST_PIXELS, Split
from inference.errors import problems
from inference.files import replacing
from training.weights import head_keys

HEAD_STEPS, HEAD_DECAY = 100, 1e-2  # of fitting a head: steps of L-BFGS, and the L2 penalty


@dataclass(kw_only=True)
class FeatureSplit(Split):
    """A Split of features, float32 [N, d], that `images_split` has at the layer `head` of a network.

    statistics: float32 [N, s], see model.py.
    """

    images_split: Split
    head: str
    statistics: torch.Tensor


def parts(deployable: model.Deployable, split: Split) -> tuple:
    """The network, and the preprocessing before it, that give the logits of what a split holds."""
    if isinstance(split, FeatureSplit):
        return deployable.network.get_submodule(split.head), nn.Identity()
    return deployable.network, deployable.normalise


def prepare(splits: dict[str, Split], deployable, settings, fresh: bool) -> dict[str, Split]:
    """What to train on: the features of the splits for --freeze-backbone, else the splits.

    fresh: the weights are those of --pretrained; the head is fitted to their features, unless it came with
    them. Raises Problem if the features cannot be kept.
    """
    if not settings.pretrained or splits["train"].labels.is_floating_point():
        return splits
    if settings.freeze_backbone:
        return featured(splits, deployable, settings)
    if fresh:
        fit_head(deployable, featured({"train": splits["train"]}, deployable, settings)["train"])
    return splits


def featured(splits: dict[str, Split], deployable, settings) -> dict[str, Split]:
    """The splits with features in the place of images; unchanged if they have them, or if the network does
    not end in its head."""
    if isinstance(splits["train"], FeatureSplit):
        return splits
    some, tables, found = splits["train"].images[:2], {}, {}
    head = head_keys(deployable.network)[0].rpartition(".")[0]
    layers = model.middle_layers(deployable.network, deployable.mean.numel(), deployable.image_size)
    given, logits, _ = run(deployable, head, layers, some)
    layer = deployable.network.get_submodule(head)
    with torch.inference_mode():
        if not isinstance(layer, nn.Linear) or not torch.equal(layer(given), logits):
            return splits
    for name, split in splits.items():
        if id(split.images) not in tables:  # parts of one split share their images
            tables[id(split.images)] = load(deployable, head, layers, split.images, settings)
        table = tables[id(split.images)]
        plain, statistics = torch.from_numpy(table).to(some.device).tensor_split([layer.in_features], 1)
        fields = {**vars(split), "images": plain, "source": table}
        found[name] = FeatureSplit(**fields, images_split=split, head=head, statistics=statistics)
    return found


@torch.inference_mode()
def run(deployable, head: str, layers: tuple, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """What `head` is given [batch, d], logits and statistics of uint8 images of the network's own size."""
    given, network = [], deployable.network.eval()
    layer = network.get_submodule(head)
    with layer.register_forward_pre_hook(lambda layer, inputs: given.extend(inputs)):
        images = deployable.normalise(images.to(deployable.mean.device))
        logits, statistics = model.run_with_statistics(network, images, layers)
    return given[-1], logits, statistics


def load(deployable, head, layers, images: torch.Tensor, settings) -> np.ndarray:
    """A map [N, d + s]: the features and the statistics of images [N, H, W, C]."""
    directory = directory_for(settings.data_dir or data.HERE, settings.cache_dir)
    what = tuple(settings.image_size), head, layers
    hasher = hashlib.sha256(repr((*what, deployable.mean.tolist(), deployable.std.tolist())).encode())
    for name, tensor in deployable.network.state_dict().items():
        if not name.startswith(f"{head}."):
            hasher.update(tensor.cpu().contiguous().numpy())
    hasher.update(images.cpu().numpy())
    path = os.path.join(directory, f"features-{settings.model}-{hasher.hexdigest()[:16]}.npy")
    with problems(f"cannot keep features in {directory} (--cache-dir takes another)", OSError):
        os.makedirs(directory, exist_ok=True)
        with contextlib.suppress(FileNotFoundError, ValueError):  # ValueError: not whole, and made again
            return np.load(path, mmap_mode="c")
        compute(path, deployable, head, layers, images)
        return np.load(path, mmap_mode="c")


def compute(path: str, deployable, head, layers, images) -> None:
    """Write what `load` returns. Raises OSError."""
    started, size = time.perf_counter(), max(1, min(125, MOST_PIXELS // images[0, ..., 0].numel()))
    bar = tqdm(images.split(size), "features", leave=False, disable=notes.silent or None)
    with replacing(path) as file:
        for number, part in enumerate(bar):
            features, _, statistics = run(deployable, head, layers, part)
            content = torch.cat([features, statistics], 1).cpu().numpy()
            if number == 0:
                header = {"descr": "<f4", "fortran_order": False, "shape": (len(images), content.shape[1])}
                np.lib.format.write_array_header_1_0(file, header)
            file.write(content)
    seconds = time.perf_counter() - started
    notes.note(f"computed the features of {len(images):,} images in {seconds:.1f} s, kept for later runs")


def fit_head(deployable: model.Deployable, split: Split) -> None:
    """Fit the head to a split's features: logistic regression on standardised ones, by L-BFGS.

    A head that came with the weights, and fits better, stays.
    """
    if not isinstance(split, FeatureSplit):
        return
    features, labels = split.images[split.members.to(split.images.device)], split.labels[split.members]
    layer = deployable.network.get_submodule(split.head)
    deviation, mean = torch.std_mean(features, 0)
    if deviation.max() < 1e-4:  # such features say nothing, and weights for them would be huge
        return
    deviation = deviation.clamp(min=1e-3 * deviation.max())
    mean = mean if layer.bias is not None else torch.zeros_like(mean)
    fitted = nn.Linear(*layer.weight.T.shape, layer.bias is not None, device=features.device)
    for parameter in fitted.parameters():
        nn.init.zeros_(parameter)
    scaled = (features - mean) / deviation
    optimizer = torch.optim.LBFGS(fitted.parameters(), max_iter=HEAD_STEPS, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        error = F.cross_entropy(fitted(scaled), labels) + HEAD_DECAY * fitted.weight.square().sum()
        error.backward()
        return error

    optimizer.step(loss)
    with torch.no_grad():
        fitted.weight.div_(deviation)
        if fitted.bias is not None:
            fitted.bias.sub_(fitted.weight @ mean)
        if F.cross_entropy(fitted(features), labels) < F.cross_entropy(layer(features), labels):
            layer.load_state_dict(fitted.state_dict())
