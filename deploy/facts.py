"""Facts about a trained network that no file format changes: computed once for all of its files.

They are measured on the network itself. The gate proves that each float32 file answers alike; an
int8 file differs by less than these figures mean.
"""

from dataclasses import dataclass

from deploy import camera, device
from deploy.comparing import Outputs
from deploy.reference import TrainedRun, reference
from deploy.trust import familiarity_figures
from deploy.unknown import unknown_kinds

CAMERA_IMAGES = 500  # at most


@dataclass(frozen=True)
class Facts:
    """device: what one input needs, see device.needs. camera: accuracy under a camera's changes,
    see camera.survey. unknown: by kind of images that no dataset is about, the figures of `known`.
    """

    device: dict[str, int]
    camera: list[dict]
    unknown: dict[str, dict]


def find_facts(trained: TrainedRun, dataset) -> Facts:
    """All facts of a network. dataset: its test split says how much a camera's changes cost."""
    needed = device.needs(trained.network, *trained.input_shape)
    if not trained.task.has_images:
        return Facts(device=needed, camera=[], unknown={})

    def run(images) -> Outputs:
        return reference(trained, images)

    step = -(-len(dataset.test_labels) // CAMERA_IMAGES)  # spread over the whole split
    changes = camera.survey(run, dataset.test_images[::step], dataset.test_labels[::step])
    return Facts(device=needed, camera=list(changes), unknown=unknown_figures(trained))


def unknown_figures(trained: TrainedRun) -> dict[str, dict]:
    """How familiar images look that no dataset is about, by kind; empty without `known`."""
    if trained.familiarity is None:
        return {}

    figures = {}
    for kind, images in unknown_kinds(*trained.spec["image_size"], trained.spec["channels"]):
        figures[kind] = familiarity_figures(reference(trained, images).known)
    return figures


def add_facts(figures: dict, facts: Facts) -> dict:
    """The figures of a file with those of its network, for parity.json, which readers expect there.

    A file that cannot be run, or that computes NaN, has none; nor has a regression.
    """
    if "coverage" not in figures:
        return figures

    figures = {**figures, "camera": facts.camera}
    if "familiar" in figures:
        figures["familiar"] = {**figures["familiar"], **facts.unknown}
    return figures
