"""Distillation (Hinton et al. 2015): a small network also learns what a larger, trained one answers.

The teacher answers once for each training image as it is, not for each of its augmented forms, which would
take longer than training the small network.
"""

import torch
import torch.nn.functional as F

import data
import model
from data.split import Split
from step3_infer import Problem
from training import runs

SHARE, SOFTNESS = 0.5, 4.0  # of the loss that the teacher has; what both networks' logits are divided by


def load_teacher(run: str, dataset: data.Dataset) -> model.Deployable:
    """The network of a run, to teach the classes of a dataset. Raises Problem."""
    _, checkpoint = runs.read(runs.find(run))
    if checkpoint is None:
        raise Problem(f"--teacher {run} has no checkpoint yet: train it first", 2)
    spec, state = checkpoint["spec"], checkpoint["state_dict"]
    own = {"classes": list(dataset.classes), "channels": dataset.train_images.shape[-1]}
    for name, ours in own.items():
        if spec[name] != ours:
            raise Problem(f"--teacher {run} has other {name} than the dataset: {spec[name]}, not {ours}", 2)
    options = {name: spec["arguments"][name] for name in model.options_of(spec["model"])}
    options = {name: value for name, value in options.items() if value is not None}
    shape = {"channels": spec["channels"], "classes": len(spec["classes"])}
    network = model.build(spec["model"], image_size=spec["image_size"], **shape, **options)
    network.load_state_dict(state)
    fit = spec.get("fit") or "stretch"
    return model.Deployable(network.eval(), spec["image_size"], spec["mean"], spec["std"], fit)


@torch.inference_mode()
def answers(teacher: model.Deployable, split: Split) -> torch.Tensor:
    """The teacher's soft labels of a split's images, members or not: float32 [N, classes]."""
    teacher.to(split.labels.device)
    size = max(1, min(250, 1_000_000 // split.images[0, ..., 0].numel()))
    parts = []
    for images in split.images.split(size):
        images = images.to(split.labels.device)
        if tuple(images.shape[1:3]) != teacher.image_size:
            images = model.resize(images, teacher.image_size, teacher.fit)
        parts.append((teacher.network(teacher.normalise(images)).float() / SOFTNESS).softmax(1))
    return torch.cat(parts)


def distilled(losses: torch.Tensor, outputs: torch.Tensor, taught: torch.Tensor) -> torch.Tensor:
    """The losses [batch] with the teacher's part: outputs are logits, taught soft labels [batch, classes]."""
    ours = F.log_softmax(outputs.float() / SOFTNESS, 1)
    divergence = F.kl_div(ours, taught, reduction="none").sum(1)
    return (1 - SHARE) * losses + SHARE * SOFTNESS**2 * divergence
