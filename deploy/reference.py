"""The trained network, read back from its checkpoint: what every exported file is compared with.

Its outputs are spelled out from the spec instead of calling model.Deployable, so that an error in
that class shows as a difference.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch

import model
from deploy.comparing import Outputs
from inference.errors import Problem, problems
from inference.images import fit_to_input, resize
from inference.task import Task, task_of

BATCH_SIZE = 64
RESIZE_TOLERANCE = 1e-3  # grey levels
# Keys of a run's spec that step2 relies on, beside those that building the network needs.
NEEDED_KEYS = {"dataset", "test_accuracy", "parameters", "versions"}
CALIBRATION_KEYS = ("temperature", "calibration", "known")


@dataclass
class TrainedRun:
    """A trained run: its spec, and its network in eval mode on the CPU.

    familiarity: the tensors of model.Familiarity. fingerprint: of the data that it was trained
    with, see data.dataset.differences. threads: that exported files are run with. is_unfinished:
    the run stopped before its last epoch.
    """

    path: str
    spec: dict
    network: torch.nn.Module
    familiarity: dict | None = None
    fingerprint: dict | None = None
    threads: int | None = None
    is_unfinished: bool = False

    @property
    def task(self) -> Task:
        return task_of(self.spec)

    @property
    def fit(self) -> str:
        """How an image gets the network's size: stretch, crop or letterbox."""
        return self.spec.get("fit") or "stretch"

    @property
    def temperature(self) -> float:
        return self.spec.get("temperature") or 1.0

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The shape of one input of the network itself: [channels, H, W], or [features]."""
        if self.task.has_images:
            return (self.spec["channels"], *self.spec["image_size"])
        return (self.spec["channels"],)

    def deployable(self, any_size: bool = True) -> model.Deployable:
        """What is exported.

        any_size: it takes images of any size and resizes them; otherwise of the network's size.
        """
        familiarity = None
        if self.familiarity:
            familiarity = model.Familiarity(self.familiarity, self.spec["known"]["layers"])

        build = model.Deployable if self.task.has_images else model.Regressor
        deployable = build(
            self.network,
            self.spec["image_size"],
            self.spec["mean"],
            self.spec["std"],
            fit=self.fit,
            temperature=self.temperature,
            familiarity=familiarity,
        )
        deployable.any_size = any_size
        return deployable.eval()

    def without_calibration(self) -> "TrainedRun":
        """The same run as if --calibration none had been given."""
        spec = {**self.spec, **dict.fromkeys(CALIBRATION_KEYS)}
        return replace(self, spec=spec, familiarity=None)


def rebuild(path: str, spec: dict, state_dict: dict, familiarity: dict | None = None) -> TrainedRun:
    """The network of a checkpoint. Raises Problem if it needs a package that is missing.

    Any other exception means that the checkpoint is damaged or not one of ours.
    """
    channels = spec["channels"]
    with problems(path, model.PackageMissing):
        names = model.options_of(spec["model"])
    # Runs of earlier versions lack options that came later.
    options = {name: spec["arguments"].get(name) for name in names}
    network = model.build(
        spec["model"],
        channels=channels,
        classes=len(spec["classes"]),
        image_size=spec["image_size"],
        **options,
    )
    network.load_state_dict(state_dict)

    if not spec.keys() >= NEEDED_KEYS:
        raise ValueError("its spec lacks keys")
    if len(spec["mean"]) != channels or len(spec["std"]) != channels:
        raise ValueError("its mean or std do not fit its channels")

    trained = TrainedRun(path, spec, network.eval(), familiarity)
    trained.deployable()  # raises if mean, std or familiarity cannot be used
    return trained


@torch.inference_mode()
def reference(trained: TrainedRun, inputs: np.ndarray) -> Outputs:
    """What training computed: the network in eager float32, calibrated.

    inputs: uint8 images [N, H, W, channels], or float32 features [N, n] of a regression.
    """
    mean = torch.tensor(trained.spec["mean"])  # [channels], or [n]
    std = torch.tensor(trained.spec["std"])
    if not trained.task.has_images:
        features = (torch.from_numpy(inputs) - mean) / std
        return Outputs(trained.network(features).numpy(), None)

    all_logits = []
    all_statistics = []
    for part in torch.from_numpy(inputs).split(BATCH_SIZE):
        images = model.resize(part, trained.spec["image_size"], trained.fit)
        images = images.permute(0, 3, 1, 2) / 255.0  # [batch, channels, H, W]
        images = (images - mean[:, None, None]) / std[:, None, None]
        if trained.familiarity is None:
            logits = trained.network(images)
        else:
            layers = tuple(trained.spec["known"]["layers"])
            logits, statistics = model.run_with_statistics(trained.network, images, layers)
            all_statistics.append(statistics)  # [batch, d]
        all_logits.append(logits)  # [batch, classes]

    logits = torch.cat(all_logits)  # [N, classes]
    probabilities = (logits / trained.temperature).softmax(1).numpy()
    if trained.familiarity is None:
        return Outputs(probabilities, None)
    known = share_below(trained.familiarity, torch.cat(all_statistics), logits)
    return Outputs(probabilities, known)


def share_below(familiarity: dict, statistics: torch.Tensor, logits: torch.Tensor) -> np.ndarray:
    """`known` [N]: the place of each image's score in the sorted table; see model.Familiarity.

    statistics: [N, d]; logits: [N, classes].
    """
    # In float64, so that what is compared is the error of the file and not of the reference.
    state = {name: tensor.double().numpy() for name, tensor in familiarity.items()}
    whitened = statistics.double().numpy() @ state["weight"] + state["bias"]  # [N, d]
    squared = (whitened**2).sum(1)

    factor, offset, limit = state["logit"]
    best = logits.amax(1).double().numpy()
    score = np.minimum(best * factor + offset, limit) - np.log(squared)
    return (np.searchsorted(state["table"], score) / len(state["table"])).astype(np.float32)


def seen_by_file(trained: TrainedRun, spec: dict, inputs: np.ndarray) -> np.ndarray:
    """What the engine of a file with this spec is given for inputs [N, ...].

    A file of fixed size is given images that step3 has resized. Raises Problem if step3 resizes
    them otherwise than the network does.
    """
    own_size = tuple(trained.spec["image_size"] or ())
    if not spec.get("fixed") or inputs.shape[1:3] == own_size:
        return inputs

    for start in range(0, len(inputs), BATCH_SIZE):
        part = inputs[start : start + BATCH_SIZE]
        wanted = model.resize(torch.from_numpy(part), own_size, trained.fit).numpy()
        resized = np.stack([resize(image, own_size, trained.fit) for image in part])
        difference = np.abs(resized - wanted).max()
        if not difference <= RESIZE_TOLERANCE:
            raise Problem(f"step3_infer.py resizes differently, by {difference:.1e} grey levels")
    return fit_to_input(inputs, spec)
