"""How each format is written: functions from a source to one file with the spec inside.

deploy/formats.py lists them. Each takes a Source and a path, and may return what parity.json should
say of how the file was made. torch and onnx are imported inside, so that step2's parser, which
needs the table, does not wait for them.
"""

import io
import json
import warnings
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path

from deploy import describe, onnx_file
from deploy.quiet import quiet
from deploy.samples import golden_images, golden_samples
from deploy.watching import monitor_reference
from inference.errors import problems
from inference.files import replacing
from inference.predict import Model
from inference.task import task_of

# An example to trace with has a size that the network knows nothing of.
EXAMPLE_BATCH, EXAMPLE_HEIGHT, EXAMPLE_WIDTH = 2, 24, 40


@dataclass(frozen=True)
class Source:
    """What a file is written from.

    deployable: a model.Deployable in eval mode. spec: of the file, which an exporter may complete.
    opset: of ONNX. dataset: int8 is calibrated on its training images. max_drop: points of accuracy
    that int8 may lose. small_arena: microcontrollers have little working memory. threads: that
    files are run with. unseen: data.unseen.Unseen, the images that --monitor compares with; None
    for a regression.
    """

    deployable: object
    spec: dict
    opset: int = 18
    dataset: object = None
    max_drop: float = 0.5
    small_arena: bool = False
    threads: int | None = None
    unseen: object = None


# -------------------------------------------------------------------------------------- torch, ONNX
def export_torchscript(source: Source, path: str) -> None:
    """Write a traced TorchScript file with the spec as its extra file spec.json."""
    import torch

    content = io.BytesIO()  # not the file: torch.jit.save aborts the process on a full disk
    with warnings.catch_warnings():
        # Deprecated in favour of torch.export, which LibTorch cannot read yet.
        warnings.filterwarnings("ignore", r"`torch\.jit\.", FutureWarning)
        # Transformers ask for sizes, which are the same whatever the image; the gate checks.
        warnings.filterwarnings("ignore", category=torch.jit.TracerWarning)
        example = (example_of(source.spec),)
        traced = torch.jit.trace(source.deployable, example, check_trace=False)  # the gate checks
        torch.jit.save(traced, content, _extra_files={"spec.json": json.dumps(source.spec)})
    # A view that an error's traceback keeps would crash Python's garbage collector.
    with content.getbuffer() as view:
        write_file(path, view)


def export_onnx(source: Source, path: str) -> None:
    """Write an ONNX file by torch.export; batch, height and width are free.

    uint8 `image` [batch, height, width, channels] to float32 `probabilities` [batch, classes], and
    `known` [batch] if the run has it; of a regression, float32 `features` [batch, n] to float32
    `prediction` [batch, 1].
    """
    import torch

    task = task_of(source.spec)
    output_names = list(task.output_names)
    if task.has_images and not source.spec["known"]:
        output_names.remove("known")

    program = torch.onnx.export(
        source.deployable,
        (example_of(source.spec),),
        dynamo=True,
        opset_version=source.opset,
        input_names=[task.input_name],
        output_names=output_names,
        dynamic_shapes=(dict(enumerate(free_axes(source.spec))),),
        verbose=False,
    )
    write_file(path, onnx_file.finish_onnx(program.model_proto, source.spec, source.opset))


def export_pt2(source: Source, path: str) -> None:
    """Write a torch.export file with the spec as its extra file spec.json.

    Batch, height and width are free.
    """
    import torch

    free = dict.fromkeys(range(len(free_axes(source.spec))), torch.export.Dim.DYNAMIC)
    program = torch.export.export(
        source.deployable, (example_of(source.spec),), dynamic_shapes=(free,)
    )
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # paths of this machine

    content = io.BytesIO()
    torch.export.save(program, content, extra_files={"spec.json": json.dumps(source.spec)})
    # A view that an error's traceback keeps would crash Python's garbage collector.
    with content.getbuffer() as view:
        write_file(path, view)


def example_of(spec: dict):
    """An input to trace with: a tensor of zeros in the shape and type that the file takes."""
    import torch

    channels = spec["channels"]
    if not task_of(spec).has_images:
        return torch.zeros(EXAMPLE_BATCH, channels)

    fixed = spec.get("fixed")
    if not fixed:
        shape = (EXAMPLE_BATCH, EXAMPLE_HEIGHT, EXAMPLE_WIDTH, channels)
        return torch.zeros(shape, dtype=torch.uint8)

    batch = fixed["batch"] or EXAMPLE_BATCH
    input_type = torch.float32 if fixed["input"] == "float32" else torch.uint8
    return torch.zeros(batch, *spec["image_size"], channels, dtype=input_type)


def free_axes(spec: dict) -> tuple[str, ...]:
    """The names of the input's axes whose size is free; they are its first."""
    fixed = spec.get("fixed")
    if not fixed:
        return task_of(spec).free_axes
    return () if fixed["batch"] else ("batch",)


# --------------------------------------------------------------------------------------------- int8
def export_int8(source: Source, path: str) -> dict:
    """Write an int8 ONNX file, calibrated on training images, with golden samples of its own.

    Returns how it was quantized, and its speed. Raises Problem if the network cannot be quantized.
    """
    from deploy import int8
    from deploy.comparing import predictions
    from deploy.speed import measure_int8

    source = replace(source, opset=max(source.opset, int8.OPSET))
    dataset = source.dataset
    unquantized = f"{path}.float.onnx"
    export_onnx(source, unquantized)
    with problems("this network cannot be quantized", ValueError):
        quantized, figures = int8.choose(
            unquantized,
            dataset.train_images,
            dataset.train_labels,
            source.max_drop,
            source.threads,
        )

    images = golden_images(dataset)
    outputs = predictions(Model(quantized, source.threads), images)
    golden = golden_samples(images, outputs, source.spec)
    unseen = source.unseen
    monitor = None
    if unseen:
        answered = predictions(Model(quantized, source.threads), unseen.images)
        monitor = monitor_reference(answered, unseen.labels, unseen.source)
    spec = describe.describe_int8(source.spec, figures["quantization"], golden, monitor)
    write_file(path, int8.finish_int8(quantized, spec, source.opset))
    return figures | measure_int8(unquantized, path, dataset.test_images, source.threads)


# ------------------------------------------------------------------------------------ small devices
def export_executorch(source: Source, path: str) -> None:
    """Write an ExecuTorch program for XNNPACK, followed by the spec. Raises Problem."""
    missing = "--format executorch needs executorch: pip install executorch"
    with problems(missing, ImportError, form="{} ({})"):
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import to_edge_transform_and_lower
    import torch

    with problems("ExecuTorch cannot hold this network"):
        program = torch.export.export(source.deployable, (example_of(source.spec),))
        edge = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
        content = edge.to_executorch().buffer
    write_with_spec(path, content, source.spec)


def export_litert(source: Source, path: str) -> None:
    """Write a LiteRT (TensorFlow Lite) file, followed by the spec. Raises Problem."""
    missing = "--format litert needs litert-torch: pip install litert-torch"
    with problems(missing, ImportError, form="{} ({})"), quiet():
        import litert_torch

    with problems("LiteRT cannot hold this network"), quiet():
        litert_torch.convert(source.deployable, (example_of(source.spec),)).export(path)
    write_with_spec(path, Path(path).read_bytes(), source.spec)


def export_micro(source: Source, path: str) -> dict:
    """Write an int8 file for TensorFlow Lite Micro, and its C array. Raises Problem."""
    from deploy import micro

    return micro.export_micro(source, path)


def write_with_spec(path: str, content: bytes, spec: dict, compressed: bool = False) -> None:
    """Write a model, and after it a zip archive with the spec and the class names.

    That is where LiteRT's own tools put such files.
    """
    method = zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED
    with replacing(path) as file:
        file.write(content)
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr(zipfile.ZipInfo("spec.json"), json.dumps(spec), method)
            archive.writestr(zipfile.ZipInfo("labels.txt"), "\n".join(spec["classes"]), method)


def without_archive(content: bytes) -> bytes:
    """A file's bytes without the zip archive at its end. Raises Problem if there is none."""
    fault = "the archive at the end of the file is cut off or missing"
    with problems(fault), zipfile.ZipFile(io.BytesIO(content)) as archive:
        start = min(entry.header_offset for entry in archive.infolist())
    return content[:start]


def write_file(path: str, content) -> None:
    """Write bytes to a file, whole or not at all. Raises OSError that names the file."""
    try:
        with replacing(path) as file:
            file.write(content)
    except OSError as error:
        raise OSError(error.errno, error.strerror, path) from None
