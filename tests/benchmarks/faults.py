"""Faults of an export, which the gate must catch: each is planted into a copy of an honest one."""

import copy
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
import torch

import data
import model
from deploy import gate
from deploy.comparing import Outputs
from deploy.exporters import Source, export_torchscript
from deploy.reference import TrainedRun
from inference.errors import Problem
from inference.predict import Model

TOLERANCE = 1e-4
MAX_DROP = 0.5


# ------------------------------------------------------------------------------ in what is exported
def mean_and_std_swapped(deployable: model.Deployable) -> None:
    mean = deployable.mean.clone()
    deployable.mean.copy_(deployable.std)
    deployable.std.copy_(mean)


def mean_of_another_set(deployable: model.Deployable) -> None:
    deployable.mean.add_(0.05)


def other_temperature(deployable: model.Deployable) -> None:
    deployable.temperature *= 1.1


def two_classes_swapped(deployable: model.Deployable) -> None:
    forward = deployable.network.forward

    def swapped(images):
        logits = forward(images)
        return torch.cat([logits[:, 1:2], logits[:, :1], logits[:, 2:]], 1)

    deployable.network.forward = swapped


def weights_changed(deployable: model.Deployable) -> None:
    weights = [value for value in deployable.network.parameters() if value.ndim > 1]
    with torch.no_grad():
        weights[-1].mul_(1.01)


def nearest_pixels(deployable: model.Deployable) -> None:
    normalise = deployable.normalise

    def resized(image):
        planes = image.permute(0, 3, 1, 2).float()  # [batch, channels, H, W]
        planes = torch.nn.functional.interpolate(planes, size=deployable.image_size)
        return normalise(planes.permute(0, 2, 3, 1))

    deployable.any_size = False  # does not resize by itself then
    deployable.normalise = resized


def table_of_known_moved(deployable: model.Deployable) -> None:
    table = deployable.familiarity.table
    table.add_(0.1 * table.std())


def whitening_of_known_scaled(deployable: model.Deployable) -> None:
    deployable.familiarity.weight.mul_(1.05)


# ------------------------------------------------------------------------------------- in the file
def classes_in_another_order(proto: onnx.ModelProto) -> None:
    change_spec(proto, "classes", lambda classes: classes[::-1])


def another_checkpoint(proto: onnx.ModelProto) -> None:
    change_spec(proto, "checkpoint_sha256", lambda _: "0" * 64)


def another_mean_in_the_spec(proto: onnx.ModelProto) -> None:
    change_spec(proto, "mean", lambda mean: [value + 0.1 for value in mean])


def weights_of_the_file_changed(proto: onnx.ModelProto) -> None:
    change_weights(proto, lambda weights: weights * np.float32(1.01))


def a_weight_not_a_number(proto: onnx.ModelProto) -> None:
    change_weights(proto, lambda weights: np.where(weights == weights.flat[0], np.nan, weights))


def change_spec(proto: onnx.ModelProto, key: str, change: Callable) -> None:
    for entry in proto.metadata_props:
        if entry.key == "spec":
            spec = json.loads(entry.value)
            spec[key] = change(spec[key])
            entry.value = json.dumps(spec)


def change_weights(proto: onnx.ModelProto, change: Callable) -> None:
    """Change the largest tensor of weights; that of an int8 file is of integers."""
    kinds = (onnx.TensorProto.FLOAT, onnx.TensorProto.INT8)
    tensors = [tensor for tensor in proto.graph.initializer if tensor.data_type in kinds]
    integers = [tensor for tensor in tensors if tensor.data_type == onnx.TensorProto.INT8]
    main = integers or [tensor for tensor in tensors if tensor.name.startswith("network")]
    tensor = max(main or tensors, key=lambda tensor: np.prod(tensor.dims))
    before = onnx.numpy_helper.to_array(tensor)
    after = change(before).astype(before.dtype)
    tensor.CopyFrom(onnx.numpy_helper.from_array(after, tensor.name))


def integers_negated(proto: onnx.ModelProto) -> None:
    change_weights(proto, lambda weights: -weights)


def nothing_known(proto: onnx.ModelProto) -> None:
    """The table of `known` lies above all scores."""
    names = [node.input[0] for node in proto.graph.node if node.op_type == "Less"]
    tensor = next(tensor for tensor in proto.graph.initializer if tensor.name == names[-1])
    moved = onnx.numpy_helper.to_array(tensor) + np.float32(100)
    tensor.CopyFrom(onnx.numpy_helper.from_array(moved, tensor.name))


IN_EXPORTED = (
    mean_and_std_swapped,
    mean_of_another_set,
    other_temperature,
    two_classes_swapped,
    weights_changed,
    nearest_pixels,
    table_of_known_moved,
    whitening_of_known_scaled,
)
IN_FILE = (
    classes_in_another_order,
    another_checkpoint,
    another_mean_in_the_spec,
    weights_of_the_file_changed,
    a_weight_not_a_number,
)
IN_INT8 = (integers_negated, nothing_known, classes_in_another_order)
OF_KNOWN = (table_of_known_moved, whitening_of_known_scaled, nothing_known)


# ---------------------------------------------------------------------------------------- planting
def plant_all(
    trained: TrainedRun, dataset: data.Dataset, expected: Outputs, exports: Path, place: Path
) -> Iterator[tuple[str, list[str]]]:
    """Plant each fault into an export of its own; yield its name and what the gate says of it.

    exports: holds model.onnx, and perhaps model.int8.onnx. place: for the faulty files.
    """
    known = trained.familiarity is not None
    with without_second_process():
        for fault in IN_EXPORTED:
            if known or fault not in OF_KNOWN:
                file = export_with(fault, trained, exports, place)
                yield fault.__name__, verdict(gate.prove, trained, file, dataset, expected)

        for fault in IN_FILE:
            file = file_with(fault, exports / "model.onnx", place)
            yield fault.__name__, verdict(gate.prove, trained, file, dataset, expected)

        int8_file = exports / "model.int8.onnx"
        for fault in IN_INT8 if int8_file.exists() else ():
            if known or fault not in OF_KNOWN:
                file = file_with(fault, int8_file, place)
                found = verdict(gate.prove_int8, trained, file, dataset, expected)
                yield f"int8 {fault.__name__}", found


def export_with(fault: Callable, trained: TrainedRun, exports: Path, place: Path) -> Path:
    deployable = copy.deepcopy(trained).deployable()
    fault(deployable)
    spec = Model(str(exports / "model.onnx")).spec
    export_torchscript(Source(deployable, spec), str(place / "model.pt"))
    return place / "model.pt"


def file_with(fault: Callable, good: Path, place: Path) -> Path:
    proto = onnx.load(good)
    fault(proto)
    onnx.save(proto, place / good.name)
    return place / good.name


def verdict(prove: Callable, trained: TrainedRun, file: Path, dataset, expected) -> list[str]:
    """The failures that the gate finds, in words."""
    limit = MAX_DROP if prove is gate.prove_int8 else TOLERANCE
    try:
        return prove(trained, str(file), dataset, expected, limit)[1]
    except Problem as problem:
        return [str(problem)]


@contextmanager
def without_second_process() -> Iterator[None]:
    """The first proof must catch each fault by itself, and is faster."""
    before = gate.prove_isolated
    gate.prove_isolated = lambda *_: ({"samples": 0}, [])
    try:
        yield
    finally:
        gate.prove_isolated = before
