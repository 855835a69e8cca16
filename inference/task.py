"""What a network is asked for: the class of an image, or a number from features.

Whatever differs between the two asks this object, by a name that says what it needs to know.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Task:
    """One kind of network, and the names in the graph of its exported files.

    has_images: classes of images; otherwise a regression from features. input_name, output_names:
    of the graph; a classifier without `known` has the first output only. free_axes: the axes of the
    input whose size is free.
    """

    name: str
    has_images: bool
    input_name: str
    output_names: tuple[str, ...]
    free_axes: tuple[str, ...]


CLASSIFICATION = Task(
    name="classification",
    has_images=True,
    input_name="image",
    output_names=("probabilities", "known"),
    free_axes=("batch", "height", "width"),
)
REGRESSION = Task(
    name="regression",
    has_images=False,
    input_name="features",
    output_names=("prediction",),
    free_axes=("batch",),
)
TASKS = {task.name: task for task in (CLASSIFICATION, REGRESSION)}


def task_of(spec: dict) -> Task:
    """The task of a spec."""
    return TASKS[spec["task"]]
