"""Export for TensorFlow Lite Micro: int8 by litert-torch and ai-edge-quantizer.

The file takes one image, uint8 [1, height, width, channels] of the network's own size, and gives
float32 probabilities [1, classes]. All between is int8, but for the softmax: in 8 bits its steps
would be 1/256. The output `known` is left out, as the runtime cannot compute it in int8, and in
float32 it would take much of the working memory.
"""

import importlib.util
import os
from pathlib import Path

import numpy as np

from deploy import describe, micro_file, micro_runtime
from deploy.comparing import Outputs
from deploy.exporters import Source, write_file, write_with_spec
from deploy.quiet import quiet
from deploy.samples import golden_samples, one_of_each_class, to_png
from inference.command_line import say
from inference.errors import Problem, one_line
from inference.images import fit_to_input

CALIBRATION = 256  # training images
CANDIDATES = 10  # for the golden image
HEADER, SOURCE = "model_data.h", "model_data.cc"
PACKAGES = ("litert_torch", "ai_edge_quantizer")
NEWEST_TORCH = "litert-torch 0.10 takes torch below 2.15"


def export_micro(source: Source, path: str) -> dict:
    """Write the int8 file followed by its spec, and beside it its C array. Raises Problem.

    Returns how it was quantized, and the bytes of working memory that it takes.
    """
    import_packages()
    if source.spec["known"]:
        say("note: tflite-micro leaves out the output known, and with it --reject")

    if source.small_arena and not has_gelu(source):
        say("note: --small-arena changes nothing: this network has no GELU")

    images = calibration_images(source.dataset, source.spec)
    content = convert(source, images, f"{path}.float.tflite")
    found = micro_file.read_model(content)
    failures = micro_file.check_model(found, source.spec)
    if failures:
        raise Problem(f"a microcontroller cannot run this network: {failures[0]}")

    golden_input = golden_pixels(source)
    outputs, arena = run_once(content, golden_input)
    gelu = "GELU as hard-swish" if source.small_arena else "GELU as x * sigmoid(1.702 x)"
    how = f"weights per channel, {gelu}" if has_gelu(source) else "weights per channel"
    spec = describe.describe_micro(
        source.spec,
        quantization=how,
        golden=golden_samples(
            golden_input, Outputs(outputs, None), source.spec, with_tensors=False
        ),
        micro={
            "runtime": micro_runtime.runtime_name(),
            "arena": arena,
            "operators": list(found.operators),
        },
    )
    write_with_spec(path, content, spec, compressed=True)
    write_c_sources(path, content, found, spec)
    return {"quantization": how}


def write_c_sources(path: str, content: bytes, found: micro_file.MicroFile, spec: dict) -> None:
    """Write a file's C array beside it."""
    for name, text in micro_file.c_sources(content, found, spec).items():
        write_file(os.path.join(os.path.dirname(path), name), text)


def has_gelu(source: Source) -> bool:
    from torch import nn

    modules = source.deployable.network.modules()
    return any(isinstance(module, nn.GELU) for module in modules)


def golden_pixels(source: Source) -> np.ndarray:
    """The one golden image, as the network takes it: uint8 [1, *image_size, channels].

    Of ten candidates, the one that takes least space: it counts in a small file.
    """
    images = fit_to_input(
        source.dataset.test_images[one_of_each_class(source.dataset, CANDIDATES)], source.spec
    )
    sizes = [len(to_png(image)) for image in images]
    smallest = sizes.index(min(sizes))
    return images[smallest : smallest + 1]


def run_once(content: bytes, images: np.ndarray) -> tuple[np.ndarray, int | None]:
    """Probabilities [n, classes] of images, and the bytes of the arena; None if not measured."""
    if not micro_runtime.has_micro():
        return micro_runtime.load_reference(content)(images), None
    run, arena = micro_runtime.load_micro(content)
    probabilities = run(images)
    return probabilities, arena()


def calibration_images(dataset, spec: dict) -> np.ndarray:
    """Training images to find the ranges with, uint8 [n, *image_size, channels]."""
    order = np.random.default_rng(0).permutation(len(dataset.train_images))
    return fit_to_input(dataset.train_images[np.sort(order[:CALIBRATION])], spec)


# ------------------------------------------------------------------------------------- the packages
def import_packages() -> None:
    """Import what converts. Raises Problem that names what is missing, or too new."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        names = " ".join(name.replace("_", "-") for name in missing)
        raise Problem(f"--format tflite-micro needs {names}: pip install {names}")
    try:
        with quiet():
            import ai_edge_quantizer.quantizer  # noqa: F401
            import litert_torch  # noqa: F401
    except Exception as error:  # a torch that it does not know makes it fail in any way
        raise Problem(
            f"litert-torch cannot be imported ({one_line(error)}){torch_hint()}"
        ) from None


def torch_hint() -> str:
    import torch

    return f"; {NEWEST_TORCH}, and this is torch {torch.__version__}"


def is_torch_too_new() -> bool:
    import torch

    major, minor = torch.__version__.split(".")[:2]
    return (int(major), int(minor)) >= (2, 15)


# --------------------------------------------------------------------------------------- converting
def convert(source: Source, images: np.ndarray, path: str) -> bytes:
    """The network in int8 as a TensorFlow Lite file; path: of a file to use meanwhile.

    images: uint8 [n, *image_size, channels] to calibrate with. Raises Problem.
    """
    import litert_torch
    import torch

    from deploy.micro_network import MicroClassifier

    height, width = source.spec["image_size"]
    example = torch.zeros(1, height, width, source.spec["channels"])
    try:
        network = MicroClassifier(source.deployable, source.small_arena).eval()
        with quiet():
            litert_torch.convert(network, (example,)).export(path)
            shorten_names(path)
            return quantize(path, images)
    except Exception as error:  # the converter and the quantizer raise anything at all
        hint = torch_hint() if is_torch_too_new() else ""
        raise Problem(
            f"this network cannot be converted for microcontrollers: {one_line(error)}{hint}"
        ) from None
    finally:
        Path(path).unlink(missing_ok=True)


def shorten_names(path: str) -> None:
    """Give the values inside a file short names: the converter's take 3 KB of a small network's."""
    from ai_edge_litert.tools import flatbuffer_utils

    model = flatbuffer_utils.read_model(path)
    for graph in model.subgraphs:
        ends = {*graph.inputs, *graph.outputs}
        for number, tensor in enumerate(graph.tensors):
            if number not in ends:
                tensor.name = f"t{number}".encode()
    flatbuffer_utils.write_model(model, path)


def quantize(path: str, images: np.ndarray) -> bytes:
    """Quantize a float file [1, height, width, channels] -> probabilities; see the module.

    The ranges are the least and the largest values that calibration meets, found in one thread, so
    that they are the same each time; that of the pixels is 0..255 whatever the images show.
    """
    from ai_edge_quantizer import calibrator, qtyping, quantizer
    from ai_edge_quantizer.algorithm_manager import AlgorithmName
    from ai_edge_quantizer.utils import qsv_utils

    names = qtyping.TFLOperationName
    quantizing = quantizer.Quantizer(path)
    quantizing.add_static_config(
        ".*", names.ALL_SUPPORTED, activation_num_bits=8, weight_num_bits=8
    )
    for left_in_float in (names.SOFTMAX, names.OUTPUT):
        quantizing.update_quantization_recipe(
            ".*", left_in_float, algorithm_key=AlgorithmName.NO_QUANTIZE
        )
    quantizing.update_quantization_recipe(
        ".*",
        names.INPUT,
        qtyping.OpQuantizationConfig(
            activation_tensor_config=qtyping.TensorQuantizationConfig(
                num_bits=8, symmetric=False, dtype=qtyping.TensorDataType.UINT
            ),
            weight_tensor_config=qtyping.TensorQuantizationConfig(
                num_bits=8, granularity=qtyping.QuantGranularity.CHANNELWISE
            ),
            compute_precision=qtyping.ComputePrecision.INTEGER,
            explicit_dequantize=False,
        ),
    )

    recipe = quantizing._recipe_manager  # Quantizer.calibrate has no min-max updates
    calibrating = calibrator.Calibrator(
        path, num_threads=1, qsv_update_func=qsv_utils.min_max_update
    )
    ((signature, ends),) = calibrating._tfl_interpreter.get_signature_list().items()
    (given,) = ends["inputs"]
    samples = [{given: image[None].astype(np.float32)} for image in images]
    calibrating.calibrate({signature: samples}, recipe)

    ranges = calibrating.get_model_qsvs()
    pixels = ranges[f"{signature}_{given}"]
    pixels["min"] = np.full_like(pixels["min"], 0)
    pixels["max"] = np.full_like(pixels["max"], 255)
    quantized = quantizing.quantize(ranges, enable_progress_report=False).quantized_model
    return with_weights_inside(bytes(quantized))


def with_weights_inside(content: bytes) -> bytes:
    """A file whose weights are all inside its FlatBuffer.

    Those of a larger network are written behind it, and it only says where. The runtime of
    microcontrollers does not know that: it takes such weights for working memory, without a word.
    """
    from ai_edge_litert.tools import flatbuffer_utils

    if not micro_file.read_model(content).outside:
        return content
    model = flatbuffer_utils.read_model_from_bytearray(bytearray(content))
    return bytes(flatbuffer_utils.convert_object_to_bytearray(model))
