"""Which runtime opens an exported file, and which file is taken if none is named.

A loader is a function(path, threads, provider, once) that returns the spec in the file and a
function from one input array to the list of output arrays. provider: where the runtime computes
(cpu, cuda, ...). once: prefer a fast load over fast runs. Loaders raise Problem.
"""

import glob
import logging
import os
import threading
import warnings
from collections.abc import Callable

import numpy as np

from inference.command_line import say
from inference.errors import Problem, problems
from inference.external import has_external_data
from inference.spec import MAX_BYTES, Spec, read_spec

Runner = Callable[[np.ndarray], list[np.ndarray]]

# What the automatic choice takes, in this order. Files of torch can carry code: they are named.
MODEL_NAMES = (
    "model.onnx",
    "model.int8.onnx",
    "model.fixed.onnx",
    "model.fixed.int8.onnx",
)
SILENT = 4  # onnxruntime's log level for fatal errors only
CPU_TORCH = "pip install torch --index-url https://download.pytorch.org/whl/cpu"


def find_model(beside: str, exports: str = "exports") -> str:
    """The ONNX model in the folder `beside`, or else in the newest export. Raises Problem."""
    for place in (glob.escape(beside), os.path.join(exports, "*")):
        paths = []
        for name in MODEL_NAMES:
            paths += glob.glob(os.path.join(place, name))
        if not paths:
            continue

        newest = max(paths, key=os.path.getmtime)
        folder = os.path.dirname(newest)
        in_newest = [path for path in paths if os.path.dirname(path) == folder]
        say(f"model: {in_newest[0]}")
        return in_newest[0]

    raise Problem(
        "no model found: no .onnx beside this program or in exports/; give --model FILE, or run"
        " step2_export.py",
        2,
    )


# --------------------------------------------------------------------------------------------- ONNX
def load_onnx(path: str, threads: int, provider: str, once: bool) -> tuple[Spec, Runner]:
    """Load a file into onnxruntime, which runs in the calling thread if `threads` is 1."""
    # onnxruntime 1.31 would keep an ID of the device on disk for its events.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    missing = f"{path} needs onnxruntime: pip install onnxruntime"
    with problems(missing, ImportError, form="{} ({})"):
        import onnxruntime

    class Session(onnxruntime.InferenceSession):
        """A session that fails if its provider does.

        The fallback would print to standard output and continue on the CPU, and no argument
        disables it before onnxruntime 1.23.
        """

        @property
        def _enable_fallback(self):
            return False

        @_enable_fallback.setter
        def _enable_fallback(self, value):
            """Ignore what the constructor sets."""

    providers = {}
    for name in onnxruntime.get_available_providers():
        providers[name.removesuffix("ExecutionProvider").lower()] = name
    if provider.lower() not in providers:
        available = ", ".join(providers)
        raise Problem(f"this onnxruntime has no provider {provider!r}; it has {available}", 2)

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = SILENT  # failures arrive as exceptions
    if once:
        # New layouts for all weights, and busy waiting, cost more than they save on one image.
        extended = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        options.graph_optimization_level = extended
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")

    with problems(f"cannot read {path}", OSError):
        if has_external_data(path):
            raise Problem(f"{path} keeps weights outside the file, which is refused")

    version = onnxruntime.__version__
    with problems(f"{path} is not an ONNX file that onnxruntime {version} can run"):
        session = Session(source_for_onnxruntime(path), options, [providers[provider.lower()]])
        input_name = session.get_inputs()[0].name
        text = session.get_modelmeta().custom_metadata_map.get("spec")

    def run(array: np.ndarray) -> list[np.ndarray]:
        return session.run(None, {input_name: array})

    return read_spec(text, path), run


def source_for_onnxruntime(path: str):
    """The path; or the content, because onnxruntime opens no file whose name is not UTF-8."""
    is_utf8 = path == path.encode(errors="ignore").decode()
    return path if is_utf8 else np.fromfile(path, np.uint8).tobytes()


# -------------------------------------------------------------------------------------------- torch
def load_torch(path: str, threads: int, provider: str, once: bool) -> tuple[Spec, Runner]:
    """Load a TorchScript (.pt) or torch.export (.pt2) file into torch."""
    advice = f"use the .onnx file of this export instead, or {CPU_TORCH}"
    with problems(f"{path} needs torch: {advice}", ImportError, form="{}"):
        import torch

    unusable = (RuntimeError, AssertionError)
    with problems(f"torch cannot use --device {provider}, try cpu", unusable, 2):
        torch.zeros(1, device=provider)
    torch.set_num_threads(threads)
    # It logs a traceback of each exception that it raises.
    logging.getLogger("torch.export").disabled = True

    is_export = path.lower().endswith(".pt2")
    kind = "torch.export" if is_export else "TorchScript"
    fault = (
        f"{path} is not a {kind} file that torch {torch.__version__} can run"
        " (step2_export.py exports a checkpoint)"
    )
    extra_files = {"spec.json": ""}  # filled in while loading
    with problems(fault):
        check_unpacked_size(path)
    with problems(fault), warnings.catch_warnings(), open(path, "rb") as file:
        # TorchScript is deprecated, but LibTorch reads nothing newer.
        warnings.filterwarnings("ignore", r"`torch\.jit\.", FutureWarning)
        if is_export:
            module = torch.export.load(file, extra_files=extra_files).module().to(provider)
        else:
            module = torch.jit.load(file, map_location=provider, _extra_files=extra_files).eval()

    def run(array: np.ndarray) -> list[np.ndarray]:
        with torch.inference_mode():
            # A copy, because the array may be read-only.
            outputs = module(torch.tensor(array, device=provider))
            if not isinstance(outputs, tuple):
                outputs = (outputs,)
            return [output.cpu().numpy() for output in outputs]

    return read_spec(extra_files["spec.json"], path), run


# ------------------------------------------------------------------------------------------- phones
def load_executorch(path: str, threads: int, provider: str, once: bool) -> tuple[Spec, Runner]:
    """Load an ExecuTorch (.pte) file."""
    missing = f"{path} needs executorch: pip install executorch"
    with problems(missing, ImportError, form="{} ({})"):
        import torch
        from executorch.runtime import Runtime

    with problems(f"{path} is not a file of step2_export.py for executorch"):
        text = read_spec_at_end(path)
        method = Runtime.get().load_program(path).load_method("forward")

    lock = threading.Lock()  # a method runs once at a time

    def run(array: np.ndarray) -> list[np.ndarray]:
        with lock:
            outputs = method.execute([torch.tensor(array)])
            return [output.numpy().copy() for output in outputs]

    return read_spec(text, path), run


def load_litert(path: str, threads: int, provider: str, once: bool) -> tuple[Spec, Runner]:
    """Load a LiteRT (.tflite) file.

    One for microcontrollers runs on LiteRT's reference kernels, which compute what a
    microcontroller computes; the fast ones round otherwise.
    """
    missing = f"{path} needs ai-edge-litert: pip install ai-edge-litert"
    with problems(missing, ImportError, form="{} ({})"):
        from ai_edge_litert.interpreter import Interpreter, OpResolverType

    with problems(f"{path} is cut off, or not a file of step2_export.py"):
        text = read_spec_at_end(path)
    spec = read_spec(text, path)
    kernels = OpResolverType.BUILTIN_REF if spec["micro"] else OpResolverType.AUTO
    with problems(f"{path} is not a file of step2_export.py for ai-edge-litert"):
        interpreter = Interpreter(path, num_threads=threads, experimental_op_resolver_type=kernels)
        method = interpreter.get_signature_runner()

    lock = threading.Lock()  # a method runs once at a time

    def run(array: np.ndarray) -> list[np.ndarray]:
        with lock:
            inputs = dict.fromkeys(method.get_input_details(), array)
            return list(method(**inputs).values())

    return spec, run


def read_spec_at_end(path: str) -> str:
    """The text of spec.json in the zip archive at the end of a file."""
    import zipfile

    check_unpacked_size(path)
    with zipfile.ZipFile(path) as archive:
        return archive.read("spec.json").decode()


def check_unpacked_size(path: str) -> None:
    """Raise ValueError for a zip archive that would unpack to far more than the file has.

    step2_export.py and torch store tensors as they are; only small parts are compressed.
    """
    import zipfile

    with zipfile.ZipFile(path) as archive:
        declared = sum(entry.file_size for entry in archive.infolist())
    if declared > os.path.getsize(path) + MAX_BYTES:
        raise ValueError(f"it would unpack to {declared:,} bytes")


LOADERS = {
    ".onnx": load_onnx,
    ".pt": load_torch,
    ".pt2": load_torch,
    ".pte": load_executorch,
    ".tflite": load_litert,
}
