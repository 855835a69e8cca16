"""Run a file as a microcontroller would: TensorFlow Lite Micro's own kernels, or the nearest.

The package tflite-micro holds the C++ runtime with its reference kernels for x86-64. Where there is
no wheel of it, LiteRT's reference kernels (BUILTIN_REF) stand in, which cannot say how much memory
the runtime needs.
"""

import contextlib
import importlib.metadata
import os
import re
import tempfile
from collections.abc import Callable, Iterator

import numpy as np

from inference.errors import Problem, problems

MOST_ARENA = 256 << 20  # bytes offered; what is used of them is measured
MISSING = (
    "a file for microcontrollers is proven with tflite-micro, or with ai-edge-litert where that "
    "has no wheel: pip install tflite-micro"
)
Runner = Callable[[np.ndarray], np.ndarray]


def runtime_name() -> str:
    """The runtime that proves files here, with its version. Raises Problem if there is none."""
    for package, name in (
        ("tflite-micro", "TensorFlow Lite Micro"),
        ("ai-edge-litert", "LiteRT's reference kernels"),
    ):
        try:
            return f"{name} {importlib.metadata.version(package)}"
        except importlib.metadata.PackageNotFoundError:
            continue
    raise Problem(MISSING)


def has_micro() -> bool:
    return runtime_name().startswith("TensorFlow Lite Micro")


def load_micro(content: bytes) -> tuple[Runner, Callable[[], int]]:
    """A function from uint8 [n, H, W, C] to probabilities [n, classes], and one for the arena.

    The second returns the bytes of the arena that are in use, once an image has been run. Raises
    Problem if the runtime cannot allocate the model; running it may raise Problem, too.
    """
    from tflite_micro.python.tflite_micro import runtime

    with silent_runtime() as said, problems("TensorFlow Lite Micro cannot load the file"):
        try:
            interpreter = runtime.Interpreter.from_bytes(content, arena_size=MOST_ARENA)
        except RuntimeError as error:
            raise Problem(reason_of(said(), error)) from None

    def run(images: np.ndarray) -> np.ndarray:
        answers = []
        with silent_runtime() as said:
            for image in images:
                interpreter.set_input(image[None], 0)
                try:
                    interpreter.invoke()
                except RuntimeError as error:
                    raise Problem(
                        f"TensorFlow Lite Micro cannot run it: {reason_of(said(), error)}"
                    ) from None
                answers.append(interpreter.get_output(0)[0].copy())
        return np.stack(answers)

    def arena() -> int:
        with silent_runtime() as said:
            interpreter.print_allocations()
            total = re.search(r"Arena allocation total (\d+) bytes", said())
        return int(total[1])

    return run, arena


def load_reference(content: bytes) -> Runner:
    """The same function by LiteRT's reference kernels. Raises Problem if it cannot be loaded."""
    with problems(MISSING, ImportError, form="{} ({})"):
        from ai_edge_litert.interpreter import Interpreter, OpResolverType

    with problems("LiteRT cannot load the file"):
        interpreter = Interpreter(
            model_content=content, experimental_op_resolver_type=OpResolverType.BUILTIN_REF
        )
        interpreter.allocate_tensors()
    given = interpreter.get_input_details()[0]["index"]
    answer = interpreter.get_output_details()[0]["index"]

    def run(images: np.ndarray) -> np.ndarray:
        answers = []
        for image in images:
            interpreter.set_tensor(given, image[None])
            interpreter.invoke()
            answers.append(interpreter.get_tensor(answer)[0].copy())
        return np.stack(answers)

    return run


@contextlib.contextmanager
def silent_runtime() -> Iterator[Callable[[], str]]:
    """Keep what C++ writes to standard error in this block; yields a function that returns it."""
    with tempfile.TemporaryFile() as file:

        def text() -> str:
            file.seek(0)
            return file.read().decode(errors="replace")

        saved = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            yield text
        finally:
            os.dup2(saved, 2)
            os.close(saved)


def reason_of(said: str, error: Exception) -> str:
    """The first line that the runtime wrote before it failed, or its exception."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    return lines[0] if lines else str(error)
