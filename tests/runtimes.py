"""Engines that run an exported file, for tests/test_portability.py and
tests/benchmarks/bench_engines.py.

Each function takes the path of a file and a number of threads, and returns a function from images
[N, H, W, C] to probabilities [N, classes]. None of the project's code runs in it, only the file.
"""

import importlib.metadata
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path


def onnxruntime(path, threads):
    import onnxruntime as engine

    options = engine.SessionOptions()
    options.intra_op_num_threads = threads
    session = engine.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda images: session.run(None, {"image": images})[0]


def torchscript(path, threads):
    import torch

    torch.set_num_threads(threads)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"`torch\.jit\.", FutureWarning)
        module = torch.jit.load(str(path))
    return torch.inference_mode()(lambda images: module(torch.from_numpy(images))[0].numpy())


def pt2(path, threads):
    import torch

    torch.set_num_threads(threads)
    module = torch.export.load(str(path)).module()
    return torch.inference_mode()(lambda images: module(torch.from_numpy(images))[0].numpy())


def openvino(path, threads):
    import openvino as engine

    settings = {
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": threads,
    }  # bf16 where the CPU has it, else
    model = engine.Core().compile_model(str(path), "CPU", settings)
    return lambda images: model([images])[0].copy()


def opencv(path, threads):
    import cv2

    cv2.setNumThreads(threads)
    network = cv2.dnn.readNetFromONNX(str(path))

    def run(images):
        network.setInput(images)
        return network.forward("probabilities").copy()

    return run


def tract(path, threads):
    import tract as engine

    model = engine.onnx().load(str(path)).into_model().into_runnable()  # of one thread
    return lambda images: model.run([images])[0].to_numpy().copy()


def mnn(path, threads):
    import MNN

    with tempfile.TemporaryDirectory() as folder:
        converted = str(Path(folder, "model.mnn"))
        command = [Path(sys.executable).with_name("mnnconvert"), "-f", "ONNX", "--bizCode", "mnn"]
        command += ["--modelFile", str(path), "--MNNModel", converted]
        subprocess.run(command, check=True, capture_output=True)
        network = MNN.nn.load_module_from_file(
            converted, ["image"], ["probabilities"], thread_num=threads
        )

    def run(images):
        kind = MNN.expr.uint8 if images.dtype == "uint8" else MNN.expr.float
        placed = MNN.expr.const(images, list(images.shape), MNN.expr.NCHW, kind)
        return network.forward([placed])[0].read().copy()

    return run


def executorch(path, threads):
    import torch
    from executorch.runtime import Runtime

    method = Runtime.get().load_program(str(path)).load_method("forward")
    return lambda images: method.execute([torch.from_numpy(images)])[0].numpy().copy()


def litert(path, threads):
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(str(path), num_threads=threads)
    interpreter.allocate_tensors()
    (given,), taken = interpreter.get_input_details(), interpreter.get_output_details()[0]

    def run(images):
        interpreter.set_tensor(given["index"], images)
        interpreter.invoke()
        return interpreter.get_tensor(taken["index"]).copy()

    return run


def onnx_reference(path, threads):
    from onnx.reference import ReferenceEvaluator

    evaluator = ReferenceEvaluator(str(path))
    return lambda images: evaluator.run(None, {"image": images})[0]


# name: (the package, the suffix of the files that it runs, loader)
RUNTIMES = {
    "onnxruntime": ("onnxruntime", ".onnx", onnxruntime),
    "TorchScript": ("torch", ".pt", torchscript),
    "pt2": ("torch", ".pt2", pt2),
    "OpenVINO": ("openvino", ".onnx", openvino),
    "OpenCV": ("opencv-python-headless", ".onnx", opencv),
    "tract": ("tract", ".onnx", tract),
    "MNN": ("MNN", ".onnx", mnn),
    "ExecuTorch": ("executorch", ".pte", executorch),
    "LiteRT": ("ai-edge-litert", ".tflite", litert),
    "ONNX reference": ("onnx", ".onnx", onnx_reference),
}


def version(name):
    """The installed version of what a runtime needs, or None."""
    try:
        return importlib.metadata.version(RUNTIMES[name][0])
    except importlib.metadata.PackageNotFoundError:
        return None
