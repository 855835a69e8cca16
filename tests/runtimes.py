"""Engines that run an exported file, for tests/test_portability.py and tests/benchmarks/bench_export.py.

Each function returns, for the directory of an export, a function from uint8 images [N, H, W, C] to
probabilities [N, classes]. None of the project's code runs in it, only the file.
"""

import importlib.metadata
import warnings


def onnxruntime(export, threads):
    import onnxruntime as engine

    options = engine.SessionOptions()
    options.intra_op_num_threads = threads
    session = engine.InferenceSession(str(export / "model.onnx"), options, providers=["CPUExecutionProvider"])
    return lambda images: session.run(None, {"image": images})[0]


def torchscript(export, threads):
    import torch

    torch.set_num_threads(threads)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"`torch\.jit\.", FutureWarning)
        module = torch.jit.load(str(export / "model.pt"))
    return torch.inference_mode()(lambda images: module(torch.from_numpy(images))[0].numpy())


def pt2(export, threads):
    import torch

    torch.set_num_threads(threads)
    module = torch.export.load(str(export / "model.pt2")).module()
    return torch.inference_mode()(lambda images: module(torch.from_numpy(images))[0].numpy())


def openvino(export, threads):
    import openvino as engine

    settings = {
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": threads,
    }  # bf16 where the CPU has it, else
    model = engine.Core().compile_model(str(export / "model.onnx"), "CPU", settings)
    return lambda images: model([images])[0].copy()


def opencv(export, threads):
    import cv2

    cv2.setNumThreads(threads)
    network = cv2.dnn.readNetFromONNX(str(export / "model.onnx"))

    def run(images):
        network.setInput(images)
        return network.forward().copy()

    return run


def onnx_reference(export, threads):
    from onnx.reference import ReferenceEvaluator

    evaluator = ReferenceEvaluator(str(export / "model.onnx"))
    return lambda images: evaluator.run(None, {"image": images})[0]


# name: (package, loader)
RUNTIMES = {
    "onnxruntime": ("onnxruntime", onnxruntime),
    "TorchScript": ("torch", torchscript),
    "pt2": ("torch", pt2),
    "OpenVINO": ("openvino", openvino),
    "OpenCV": ("opencv-python-headless", opencv),
    "ONNX reference": ("onnx", onnx_reference),
}


def version(name):
    """The installed version of what a runtime needs, or None."""
    try:
        return importlib.metadata.version(RUNTIMES[name][0])
    except importlib.metadata.PackageNotFoundError:
        return None
