"""Files of one fixed size, for compilers of small targets: they are given images that are resized already."""

import json
import zipfile
from pathlib import Path

import torch

from deploy import gate
from deploy.samples import GOLDEN_SAMPLES, golden_samples, one_of_each_class
from inference.errors import problems
from inference.files import replacing
from inference.images import fit_to_input


def of_fixed_size(run: gate.Run, spec: dict, dataset, batch: int | None, kind: str) -> dict:
    """The spec of a file that takes `batch` images, None for any number, of the network's own size only.

    kind: of what an engine is given, uint8 or float, which its golden samples hold, too.
    """
    spec = {**spec, "fixed": {"batch": batch, "input": {"float": "float32"}.get(kind, kind)}}
    images = dataset.test_images[one_of_each_class(dataset, GOLDEN_SAMPLES)]
    outputs = gate.reference(run, fit_to_input(images, spec))
    return {**spec, "golden": golden_samples(images, outputs, spec)}


def example_of(spec: dict) -> torch.Tensor:
    """An input to trace with, of no size that the network knows unless it is fixed."""
    if spec["task"] == "regression":
        return torch.zeros(2, spec["channels"])
    if not spec.get("fixed"):
        return torch.zeros(2, 24, 40, spec["channels"], dtype=torch.uint8)
    count, kind = spec["fixed"]["batch"] or 2, getattr(torch, spec["fixed"]["input"])
    return torch.zeros(count, *spec["image_size"], spec["channels"], dtype=kind)


def free_sizes(spec: dict) -> tuple[str, ...]:
    """The names of those sizes of an input that are free."""
    if spec.get("fixed"):
        return () if spec["fixed"]["batch"] else ("batch",)
    return ("batch",) if spec["task"] == "regression" else ("batch", "height", "width")


def export_executorch(deployable, spec: dict, path: str, opset: int, **unused) -> None:
    """Write an ExecuTorch program for XNNPACK, followed by a zip archive with the spec. Raises Problem."""
    with problems("--format executorch needs executorch: pip install executorch", ImportError, 1, "{} ({})"):
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import to_edge_transform_and_lower
    with problems("ExecuTorch cannot hold this network"):
        program = torch.export.export(deployable, (example_of(spec),))
        lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()]).to_executorch()
    write_with_spec(path, lowered.buffer, spec)


def export_litert(deployable, spec: dict, path: str, opset: int, **unused) -> None:
    """Write a LiteRT (TensorFlow Lite) file, followed by a zip archive with the spec. Raises Problem."""
    with problems("--format litert needs litert-torch: pip install litert-torch", ImportError, 1, "{} ({})"):
        import litert_torch
    with problems("LiteRT cannot hold this network"):
        litert_torch.convert(deployable, (example_of(spec),)).export(path)
    write_with_spec(path, Path(path).read_bytes(), spec)


def write_with_spec(path: str, content: bytes, spec: dict) -> None:
    """Write a model, and after it a zip archive with the spec and the class names, as LiteRT's tools do."""
    with replacing(path) as file:
        file.write(content)
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr(zipfile.ZipInfo("spec.json"), json.dumps(spec))
            archive.writestr(zipfile.ZipInfo("labels.txt"), "\n".join(spec["classes"]))
