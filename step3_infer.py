#!/usr/bin/env python3
"""Step 3 of 3: predict with an exported model file. A machine needs only that file and this script.

    python step3_infer.py image.png                       # the model beside this script, or the newest export
    python step3_infer.py --self-test                     # does this machine reproduce the trained network?
    from step3_infer import Model, predict; predict("image.png", Model("model.onnx"))["label"]     # in Python

It needs numpy and Pillow, and onnxruntime for .onnx files or torch for .pt and .pt2 files, which contain
preprocessing and class names. Exit codes: 0 success, 1 some input could not be used, 2 wrong usage.
"""

import signal
import sys

if sys.version_info < (3, 10):  # noqa: UP036  an older Python would fail later, with a traceback
    sys.exit("error: Python 3.10 or newer is needed, this is Python " + sys.version.split()[0])
if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports prints no traceback

import contextlib
import functools
import io
import itertools
import json
import logging
import os
import re
import threading
import time
import warnings
from collections.abc import Callable, Iterator

IMPORT_STARTED = time.perf_counter()
import numpy as np  # noqa: E402
from PIL import Image, UnidentifiedImageError  # noqa: E402

IMPORT_SECONDS = time.perf_counter() - IMPORT_STARTED
SCHEMA = 1  # the newest spec that this script understands
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # onnxruntime 1.31 keeps an ID of the device for events


class Problem(Exception):
    """A failure that the user can fix: reported as one `error:` line, without a traceback."""

    def __init__(self, message: str, code: int = 1):
        super().__init__(message)
        self.code = code


def one_line(error: Exception) -> str:
    """The system's reason, or the first line of a message, which torch follows with its call stack."""
    lines = [getattr(error, "strerror", None), *str(error).strip().splitlines(), type(error).__name__]
    return next(filter(None, lines))


@contextlib.contextmanager
def problems(message: str, kinds=Exception, code: int = 1, form: str = "{}: {}") -> Iterator[None]:
    """Turn exceptions of these kinds into a Problem: the message and their reason, in this form."""
    try:
        yield
    except kinds as error:  # those of engines have no base in common but Exception
        raise Problem(form.format(message, one_line(error)), code) from None


def decode_image(source, channels: int, white: int = 65535) -> np.ndarray:
    """Decode one image file to uint8 [height, width, channels], where channels is 1 (grey) or 3 (RGB).

    source: a path or a binary file object. The EXIF orientation is applied, an animation gives its first
    frame, 16-bit greys from `white` on become 255. Raises Problem, to which the caller adds the file name.
    """
    try:
        if not hasattr(source, "read") and os.path.exists(source) and not os.path.isfile(source):
            raise Problem("is not a regular file")
        if hasattr(source, "read") and not source.seekable():
            source = io.BytesIO(source.read(256 << 20))  # nobody's image is larger
        return read_pixels(source, channels, white)
    except UnidentifiedImageError:
        size = source.seek(0, os.SEEK_END) if hasattr(source, "read") else os.path.getsize(source)
        reason = "is not an image that Pillow can read" if size else "is empty"
    except FileNotFoundError:
        reason = "no such file"
    except MemoryError:
        reason = "is too large for this machine's memory"
    except Exception as error:  # Pillow's plugins raise any exception on broken files
        reason = str(error) if isinstance(error, Problem) else f"cannot be read: {one_line(error)}"
    raise Problem(reason)


def open_image(source) -> Image.Image:
    """Image.open for every format that image_suffixes() knows, also while another thread is loading them."""
    with contextlib.suppress(UnidentifiedImageError):
        return Image.open(source)
    image_suffixes()
    return Image.open(source)


@functools.cache
def image_suffixes() -> set[str]:
    """Load all formats of Pillow, and HEIC with pillow-heif; return the suffixes of those that it opens."""
    suffixes = Image.registered_extensions()  # which loads the formats
    with contextlib.suppress(ImportError):
        __import__("pillow_heif").register_heif_opener()
    return {suffix for suffix, name in suffixes.items() if name in {*Image.OPEN, "MPO"}}  # MPO is a JPEG


def read_pixels(source, channels: int, white: int) -> np.ndarray:
    """The work of decode_image(), which puts into words what is raised here."""
    with open_image(source) as image:
        if image.mode == "F":
            raise Problem("has 32-bit float pixels, which have no fixed range: save it with 8 or 16 bits")
        if image.format == "EPS":  # Pillow would run Ghostscript
            raise Problem("is PostScript, which is a program and not an image")
        image.load()
        if image.getexif().get(0x0112, 1) != 1:  # the tag of the orientation
            from PIL import ImageOps  # rarely needed, and slow to import

            ImageOps.exif_transpose(image, in_place=True)
        if image.mode.startswith("I"):  # I;16 in either byte order, or I if Pillow widened the pixels
            values = np.asarray(image).astype(np.int64)
            if values.min() < 0 or values.max() > 65535:
                raise Problem("has integer pixels of more than 16 bits: save it with 8 or 16 bits")
            values = (np.minimum(values, white) * 255 + white // 2) // white
            image = Image.fromarray(values.astype(np.uint8))
        # In bands that fit the processor's cache: a whole photo at once takes twice the time and memory.
        mode, (width, height) = "L" if channels == 1 else "RGB", image.size
        pixels, rows = np.empty((height, width, channels), np.uint8), max(1, (1 << 18) // width)
        for top in range(0, height, rows):
            band = image.crop((0, top, width, min(top + rows, height))).convert(mode)
            pixels[top : top + rows] = np.asarray(band).reshape(-1, width, channels)
        return pixels


class Model:
    """An exported file, ready to run by several threads at once; `spec` is what it says about itself.

    reject (0.99 keeps the most familiar 99 % of images, others are unknown) and min_probability (answers of
    less are unsure) are the file's own and may be set; None for neither. threads: of the engine (default: all
    usable ones). once: load fast rather than run fast. Raises Problem for files but those of step2_export.py.
    """

    def __init__(self, path, threads: int | None = None, provider: str = "cpu", once: bool = False):
        path = os.fspath(path)
        if not os.path.isfile(path):
            raise Problem(f"no model file {path}; python step2_export.py writes one")
        load = LOADERS.get(os.path.splitext(path)[1].lower())
        if load is None:
            raise Problem(f"{path} is not a model file: step2_export.py writes {', '.join(LOADERS)}")
        self.spec, self._run = load(path, min(threads or usable_cpus(), 1024), provider, once)
        self.reject, self.min_probability = self.spec["reject"], self.spec["min_probability"]
        self.batch = self.spec["fixed"]["batch"] if self.spec["fixed"] else None  # None: any

    def predict(self, inputs: np.ndarray) -> np.ndarray:
        """Predict from uint8 [batch, height, width, channels]: probabilities, float32 [batch, classes].
        A regression model takes float32 features [batch, n] and gives float32 [batch, 1]. Raises Problem."""
        return self.run(inputs)[0]

    def run(self, inputs: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """What predict() returns, and `known`, float32 [batch], the share of familiar images that look less
        so, or None if the file has no such output. Raises Problem."""
        size, spec = len(inputs), self.spec
        if size > (self.batch or size):
            raise Problem(f"the model takes batches of {self.batch}, not of {size}")
        try:
            inputs = fit(inputs, spec)
            if self.batch:  # which the engine takes no less than
                inputs = np.resize(inputs, (self.batch, *inputs.shape[1:]))
            outputs, *more = (output[:size] for output in self._run(inputs))
        except Exception as error:  # the engines' exceptions have no other base in common
            shape, reason = "x".join(map(str, inputs.shape)), one_line(error)
            raise Problem(f"the model cannot run on {shape} input, is its spec wrong? {reason}") from None
        wanted = size, len(spec["classes"])
        if outputs.shape != wanted:
            raise Problem(f"the model's spec is wrong: it promises outputs {wanted}, not {outputs.shape}")
        if spec["known"] and [known.shape for known in more] != [wanted[:1]]:
            raise Problem("the model's spec is wrong: it promises an output `known`")
        return outputs, more[0] if spec["known"] else None


def fit(images: np.ndarray, spec: dict) -> np.ndarray:
    """What an engine is given of uint8 images [batch, H, W, channels]: a file of fixed size, resized ones."""
    if not spec["fixed"]:
        return images
    if images.shape[1:3] != tuple(spec["image_size"]):
        sizes = spec["image_size"], spec["fit"]
        images = np.stack([resize(image, *sizes) for image in images])  # alike in any batch
        images = images if spec["fixed"]["input"] == "float32" else np.rint(images)
    return images.astype(spec["fixed"]["input"], copy=False)


def resize(image: np.ndarray, image_size, fit: str | None = None) -> np.ndarray:
    """uint8 [H, W, channels] -> float32 [*image_size, channels], bilinear and antialiased, not rounded.

    fit: "crop" and "letterbox" keep the shape of the image: its middle, or all of it between black bars."""
    factors = np.divide(image.shape[:2], image_size)
    if fit in ("crop", "letterbox"):
        factors[:] = factors.min() if fit == "crop" else factors.max()
    for axis, (n_out, factor) in enumerate(zip(image_size, factors, strict=True)):
        n_in, lines = image.shape[axis], []
        source, target = np.arange(n_in) - (n_in - 1) / 2, np.arange(n_out)[:, None] - (n_out - 1) / 2
        weights = np.maximum(1 - np.abs(target * factor - source) / max(factor, 1), 0)
        for weight in weights / np.maximum(weights.sum(1, keepdims=True), 1e-6):
            reached = np.flatnonzero(weight)  # so that a photo is never whole in memory as floats
            part = np.take(image, reached, axis).astype(np.float32)
            lines.append(np.tensordot(weight[reached].astype(np.float32), part, (0, axis)))
        image = np.stack(lines, axis)
    return image


def predict(path_or_array, model: Model, top_k: int = 3) -> dict:
    """Predict one image: {"label", "probability", "known", "top"}; top lists labels and their probabilities.

    label is the best of them, "unknown" or "unsure", see Model; known: see Model.run. path_or_array: a path,
    a binary file object, or uint8 [height, width, channels], grey also as [height, width]. Raises Problem.
    """
    channels = model.spec["channels"]
    if model.spec["task"] == "regression":
        raise Problem("this model predicts from numbers: pass float32 [batch, n] to Model.predict")
    if isinstance(path_or_array, np.ndarray):
        image = path_or_array[..., None] if path_or_array.ndim == 2 else path_or_array
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != channels or image.size == 0:
            wanted = f"the model takes uint8 [height, width, {channels}]"
            raise Problem(f"the array is {image.dtype} {list(path_or_array.shape)}, but {wanted}")
    else:
        with problems(str(path_or_array), Problem, form="{} {}"):
            image = decode_image(path_or_array, channels, model.spec["white"])
    result = predict_decoded(model, {0: np.ascontiguousarray(image)}, top_k)[0]
    if "error" in result:
        raise Problem(result["error"])
    return result


def predict_decoded(model: Model, images: dict[int, np.ndarray], top_k: int) -> dict[int, dict]:
    """What predict() returns, or {"error"}, of uint8 images of any sizes; those of one size run together."""
    results, classes = {}, model.spec["classes"]
    if model.batch:  # which mixed sizes fill together
        images = {key: fit(pixels[None], model.spec)[0] for key, pixels in images.items()}
    for shape in dict.fromkeys(pixels.shape for pixels in images.values()):
        keys = [key for key, pixels in images.items() if pixels.shape == shape]
        try:
            batch = np.stack([images[key] for key in keys]) if len(keys) > 1 else images[keys[0]][None]
            probabilities, known = model.run(batch)
        except Problem as problem:
            results |= {key: {"error": str(problem)} for key in keys}
            continue
        order = np.argsort(-probabilities, axis=1, kind="stable")[:, :top_k]  # [batch, top_k]
        best = np.take_along_axis(probabilities, order, axis=1).astype(np.float64).round(6)
        known = [None] * len(keys) if known is None else known.astype(np.float64).round(6).tolist()
        for key, indices, values, share in zip(keys, order.tolist(), best.tolist(), known, strict=True):
            top = [{"label": classes[i], "probability": p} for i, p in zip(indices, values, strict=True)]
            results[key] = {**top[0], "known": share, "top": top}
            if model.reject is not None and share < round(1 - model.reject, 6):
                results[key]["label"] = "unknown"
            elif model.min_probability is not None and values[0] < model.min_probability:
                results[key]["label"] = "unsure"
        for index in np.flatnonzero(~np.isfinite(probabilities).all(axis=1)):
            results[keys[index]] = {"error": "the model computes NaN or infinity for this image"}
    return results


def usable_cpus(root: str = "/sys/fs/cgroup", own: str = "/proc/self/cgroup") -> int:
    """Count the CPUs that this process may use, by its affinity and, on Linux, its control groups' quotas."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    folder = root
    with contextlib.suppress(OSError), open(own, encoding="utf-8", errors="replace") as file:
        group = next((line[3:].strip() for line in file if line.startswith("0::")), "")  # of version 2
        folder = os.path.join(root, group.strip("/"))
    while len(folder) >= len(root):  # the groups above limit as well; a container does not see them
        with contextlib.suppress(OSError, ValueError), open(f"{folder}/cpu.max", encoding="ascii") as file:
            quota, period = map(int, file.read().split())  # a ValueError for "max", no limit
            count = min(count, max(1, -(-quota // period)))  # rounded up
        folder = os.path.dirname(folder)
    return count


def load_onnx(path: str, threads: int, provider: str, once: bool) -> tuple[dict, Callable]:
    """Load a file into onnxruntime, which runs in the calling thread if `threads` is 1. See LOADERS."""
    with problems(f"{path} needs onnxruntime: pip install onnxruntime", ImportError, form="{} ({})"):
        import onnxruntime
    providers = onnxruntime.get_available_providers()
    available = {name.removesuffix("ExecutionProvider").lower(): name for name in providers}
    if provider.lower() not in available:
        raise Problem(f"this onnxruntime has no provider {provider!r}; it has {', '.join(available)}", 2)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4  # failures arrive as exceptions
    if once:  # new layouts for all weights and busy waiting cost more than they save on one image
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # The fallback prints to standard output and takes the CPU instead; before 1.23 no argument disables it.
    no_fallback = {"_enable_fallback": property(lambda self: False, lambda self, value: None)}
    session_class = type("Session", (onnxruntime.InferenceSession,), no_fallback)
    with problems(f"{path} is not an ONNX file that onnxruntime {onnxruntime.__version__} can run"):
        is_utf8 = path == path.encode(errors="ignore").decode()  # onnxruntime opens no other names
        source = path if is_utf8 else np.fromfile(path, np.uint8).tobytes()
        session = session_class(source, options, [available[provider.lower()]])
        name = session.get_inputs()[0].name
        text = session.get_modelmeta().custom_metadata_map.get("spec")
    return read_spec(text, path), lambda array: session.run(None, {name: array})


def load_torch(path: str, threads: int, provider: str, once: bool) -> tuple[dict, Callable]:
    """Load a TorchScript (.pt) or torch.export (.pt2) file into torch. See LOADERS."""
    advice = "pip install torch --index-url https://download.pytorch.org/whl/cpu"
    advice = f"use the .onnx file of this export instead, or {advice}"
    with problems(f"{path} needs torch: {advice}", ImportError, form="{}"):
        import torch
    with problems(f"torch cannot use --device {provider}, try cpu", (RuntimeError, AssertionError), 2):
        torch.zeros(1, device=provider)
    torch.set_num_threads(threads)
    logging.getLogger("torch.export").disabled = True  # it logs a traceback of each exception it raises
    kind = "torch.export" if path.lower().endswith(".pt2") else "TorchScript"
    extra, engine = {"spec.json": ""}, f"torch {torch.__version__}"
    fault = f"{path} is not a {kind} file that {engine} can run (step2_export.py exports a checkpoint)"
    with problems(fault), warnings.catch_warnings(), open(path, "rb") as file:
        warnings.filterwarnings("ignore", r"`torch\.jit\.", FutureWarning)  # LibTorch has nothing newer
        if kind == "TorchScript":
            module = torch.jit.load(file, map_location=provider, _extra_files=extra).eval()
        else:
            module = torch.export.load(file, extra_files=extra).module().to(provider)

    def run(array: np.ndarray) -> list[np.ndarray]:
        with torch.inference_mode():
            given = module(torch.tensor(array, device=provider))  # copied, as it may be read-only
            return [output.cpu().numpy() for output in (given if isinstance(given, tuple) else (given,))]

    return read_spec(extra["spec.json"], path), run


def load_lite(path: str, threads: int, provider: str, once: bool) -> tuple[dict, Callable]:
    """Load an ExecuTorch (.pte) or LiteRT (.tflite) file, with its spec in a zip archive at its end."""
    package = "executorch" if path.lower().endswith(".pte") else "ai-edge-litert"
    with problems(f"{path} needs {package}: pip install {package}", ImportError, form="{} ({})"):
        import zipfile

        if package == "executorch":
            import torch
            from executorch.runtime import Runtime
        else:
            from ai_edge_litert.interpreter import Interpreter
    with problems(f"{path} is not a file of step2_export.py for {package}"), zipfile.ZipFile(path) as archive:
        text = archive.read("spec.json").decode()
        if package == "executorch":
            method = Runtime.get().load_program(path).load_method("forward")
        else:
            method = Interpreter(path, num_threads=threads).get_signature_runner()
    lock = threading.Lock()  # a method runs once at a time

    def run(array: np.ndarray) -> list[np.ndarray]:
        with lock:
            if package == "executorch":
                return [output.numpy().copy() for output in method.execute([torch.tensor(array)])]
            return [*method(**dict.fromkeys(method.get_input_details(), array)).values()]

    return read_spec(text, path), run


# Suffix -> function(path, threads, provider, once) that gives the spec and a function from input to outputs
LOADERS = {".onnx": load_onnx, ".pt": load_torch, ".pt2": load_torch, ".pte": load_lite, ".tflite": load_lite}


def read_spec(text: str | None, path: str) -> dict:
    """Parse and check the spec of a file. Raises Problem if it is missing, malformed or too new."""
    if not text:
        raise Problem(f"{path} carries no spec: it was not written by step2_export.py")
    try:
        spec = json.loads(text)
        if int(spec["schema"]) > SCHEMA:
            raise Problem(f"{path} has a spec of schema {spec['schema']}: it needs a newer step3_infer.py")
        classes, channels = spec["classes"], spec["channels"]
        valid = isinstance(classes, list) and all(isinstance(name, str) for name in classes)
        valid = valid and isinstance(channels, int) and spec.setdefault("white", 65535) in range(1, 65536)
        if {"classification": True, "regression": False}[spec["task"]]:  # a KeyError for any other
            valid = valid and len(classes) > 1 and channels in (1, 3) and len(spec["image_size"]) == 2
            valid = valid and {*spec["image_size"]} <= {*range(1, 1 << 15)}
        valid = valid and spec.setdefault("fit", None) in (None, "stretch", "crop", "letterbox")
        known, *thresholds = (spec.setdefault(key, None) for key in ("known", "reject", "min_probability"))
        valid = valid and all(share is None or 0 <= share <= 1 for share in thresholds)
        fixed = spec.setdefault("fixed", None) or {"batch": None, "input": "uint8"}
        valid = valid and fixed["batch"] in {None, *range(1, 1025)} and fixed["input"] in ("uint8", "float32")
        valid = valid and (known.setdefault("tolerance", 5e-3) >= 0 if known else thresholds[0] is None)
        if not valid or not classes:
            raise ValueError("classes, channels, sizes, white, known or thresholds cannot be used")
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise Problem(f"{path} has a malformed spec: {type(error).__name__} {one_line(error)}") from None
    return spec


# =============================================================================================== the program
import argparse  # noqa: E402
import base64  # noqa: E402
import collections  # noqa: E402
import csv  # noqa: E402
import glob  # noqa: E402
import hashlib  # noqa: E402
import timeit  # noqa: E402
from concurrent.futures import ThreadPoolExecutor  # noqa: E402

IMAGE_SUFFIXES = set(".png .jpg .jpeg .webp .bmp .gif .tif .tiff .pgm .ppm .pbm .avif .jp2".split())
MODEL_NAMES = [f"model.{kind}" for kind in "onnx int8.onnx pt pt2 fixed.onnx fixed.int8.onnx".split()]
MODEL_NAMES += ["model.fixed.pt", "model.pte", "model.tflite"]
WINDOW_BYTES = 32 << 20  # pixels that a thread holds, unless one image is larger
MOST_CHANGED = 20  # images that --compare names


def self_test(model: Model) -> tuple[int, float, bool]:
    """Run the golden samples: their count, largest difference (relative above 1), verdict. Raises Problem."""
    spec, worst = model.spec, np.zeros(2)  # differences of probabilities and of `known`
    if not spec.get("golden"):
        raise Problem("this file carries no golden samples to test with")
    try:
        tolerance = float(spec.get("self_test_tolerance", 2e-2 if "quantization" in spec else 1e-4))
        for sample in spec["golden"]:
            if spec["task"] == "regression":
                inputs, expected = np.array([sample["features"]], np.float32), sample["prediction"]
            else:
                file = io.BytesIO(base64.b64decode(sample["image"]))
                inputs, expected = decode_image(file, spec["channels"])[None], sample["probabilities"]
            expected, (outputs, known) = np.reshape(expected, (1, len(spec["classes"]))), model.run(inputs)
            difference = np.max(np.abs(outputs - expected) / np.maximum(1, np.abs(expected)))
            moved = 0.0 if known is None else abs(float(known[0]) - sample["known"])
            worst = np.maximum(worst, (difference, moved))  # or NaN
    except (ValueError, KeyError, TypeError, OverflowError, Problem) as error:
        raise Problem(f"this file's golden samples are malformed: {error!r}") from None
    passed = (worst <= (tolerance, (spec["known"] or {}).get("tolerance", 0))).all()
    return len(spec["golden"]), float(worst[0]), bool(passed)


def predict_files(model: Model, found: Iterator, workers: int, batch_size: int, top_k: int) -> Iterator:
    """Predict what find_images() yields, in its order: lists of rows, with a path and a result each."""
    stop, running = threading.Event(), []
    with ThreadPoolExecutor(workers) as pool:
        try:
            for chunk in iter(lambda: list(itertools.islice(found, batch_size)), []):  # until one is empty
                running.append(pool.submit(predict_chunk, model, chunk, top_k, stop))
                if len(running) > 2 * workers:  # memory holds only a few lists
                    yield running.pop(0).result()
            while running:
                yield running.pop(0).result()
        finally:  # also after Ctrl-C, or if the caller wants no more
            stop.set()


def predict_chunk(model: Model, chunk: list, top_k: int, stop: threading.Event) -> list[dict]:
    """The work of one thread of predict_files(): one of its lists, or nothing once `stop` is set."""
    results, waiting = {}, {}  # by index; waiting: decoded and not yet run
    expected = model.spec["channels"], model.spec["white"]
    standard_input = getattr(sys.stdin, "buffer", io.BytesIO())  # which may be closed
    for index, (path, problem) in enumerate(chunk):
        if stop.is_set():
            return []
        try:
            if problem:
                raise problem
            waiting[index] = decode_image(standard_input if path == "-" else path, *expected)
        except Problem as error:
            results[index] = {"error": str(error)}
        if sum(image.nbytes for image in waiting.values()) > WINDOW_BYTES:
            results |= predict_decoded(model, waiting, top_k)
            waiting = {}
    results |= predict_decoded(model, waiting, top_k)
    return [{"path": path, **results[k]} for k, (path, _) in enumerate(chunk)]


def is_image(path: str) -> bool:
    """Whether a file is an image by its suffix or, if it has none, by its content."""
    suffix = os.path.splitext(path)[1].lower()
    if suffix:
        return suffix in IMAGE_SUFFIXES or suffix in image_suffixes()  # which takes a while to load
    with contextlib.suppress(Exception):  # Pillow's plugins raise any exception on broken files
        if os.path.isfile(path):  # opening a named pipe would wait forever
            open_image(path).close()
            return True
    return False


def find_images(paths: list[str], others: list) -> Iterator[tuple[str, Problem | None]]:
    """Yield each file, globs expanded and directories walked, or a path and why not; the rest to `others`."""
    for path in paths:
        if any(c in path for c in "*?[") and not os.path.lexists(path):
            matches = sorted(glob.glob(path, recursive=True))
            if not matches:
                yield path, Problem("matches no file")
            files = [match for match in matches if not os.path.isdir(match)]
            yield from find_images(files or matches, others)  # "**" matches its files' directories as well
        elif os.path.isdir(path):
            empty = True
            for file, problem in walk(path, is_visible):
                if problem or is_image(file):
                    empty = False
                    yield file, problem
                else:
                    others.append(file)
            if empty:
                yield path, Problem("no images in this directory")
        else:
            yield path, None


def walk(folder: str, accept: Callable | None = None) -> Iterator[tuple[str, Problem | None]]:
    """Yield the files below a folder in name order; with accept(name), only such files and folders."""
    unreadable = []
    for place, folders, files in os.walk(folder, onerror=unreadable.append):
        files += [name for name in folders if os.path.islink(os.path.join(place, name))]  # not followed
        folders[:] = sorted(filter(accept or str, folders))
        yield from ((os.path.join(place, name), None) for name in sorted(filter(accept or str, files)))
    yield from ((error.filename, Problem(f"cannot be read: {error.strerror}")) for error in unreadable)


def is_visible(name: str) -> bool:
    """Neither hidden, as .DS_Store and macOS' ._photo.jpg are, nor left by the system."""
    return name[0] != "." and name.lower() not in ("thumbs.db", "ehthumbs.db", "desktop.ini", "__macosx")


def note_files(did: str, paths: list[str], why: str) -> None:
    """Say how many files something was done to, if any, of which kinds, the first names, and why."""
    if paths:
        kinds = sorted({os.path.splitext(path)[1].lower() or "no suffix" for path in paths})
        hint = "; pip install pillow-heif to read .heic" if {".heic", ".heif"} & set(kinds) else ""
        names = ", ".join(paths[:3]) + (", ..." if paths[3:] else "")
        many = f"{len(paths):,} file{'s' * (len(paths) > 1)} {why} ({', '.join(kinds)})"
        say(f"note: {did} {many}: {names}{hint}")


def find_model() -> str:
    """The model beside this script, or in the newest export, the first of MODEL_NAMES. Raises Problem."""
    for place in (glob.escape(os.path.dirname(os.path.abspath(__file__))), "exports/*"):
        paths = [path for name in MODEL_NAMES for path in glob.glob(os.path.join(place, name))]
        if paths:
            newest = os.path.dirname(max(paths, key=os.path.getmtime))
            path = next(path for path in paths if os.path.dirname(path) == newest)
            say(f"model: {path}")
            return path
    raise Problem("no model found beside this script or in exports/: give --model, or run step2_export.py", 2)


@contextlib.contextmanager
def replacing(path, mode: str = "wb", **open_options) -> Iterator:
    """Open a file that replaces `path`, whole, if the block succeeds; links are followed. Raises OSError."""
    path = os.path.realpath(path)
    if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):
        with open(path, mode, **open_options) as file:  # a device or a named pipe cannot be replaced
            yield file
        return
    folder, name = os.path.split(path)
    temporary = os.path.join(folder, f".{name[:40]}-{os.urandom(4).hex()}.tmp")
    try:
        with open(temporary, mode.replace("w", "x"), **open_options) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            os.unlink(temporary)


def sha256(path) -> str:
    """The SHA-256 of a file, in hexadecimal. Raises OSError."""
    return hashlib.sha256(np.fromfile(path, np.uint8)).hexdigest()


def verify(folder: str) -> int:
    """Compare a folder with its SHA256SUMS, additions aside; return the exit code. Raises Problem."""
    path, additions, code = os.path.join(folder, "SHA256SUMS"), [], 0
    form, how = "{} ({}): step2_export.py --bundle writes one", {"errors": "surrogateescape"}
    with problems(f"cannot read {path}", OSError, form=form), open(path, encoding="utf-8", **how) as file:
        lines = [re.fullmatch("([0-9a-f]{64}) [ *](.+)\n?", line) for line in file]
    if None in lines:
        raise Problem(f"{path}, line {lines.index(None) + 1} is not a SHA-256, two spaces and a file name")
    sums = {os.path.normpath(name): digest for digest, name in (line.groups() for line in lines)}
    found = {os.path.relpath(path, folder): problem for path, problem in walk(folder)}
    fetched, harmless = os.path.join("web", "ort", ""), (*IMAGE_SUFFIXES, ".csv", ".jsonl")
    for name in sorted({*sums, *found} - {"SHA256SUMS"}):
        path, fault = os.path.join(folder, name), found.get(name, "is missing, or outside this folder")
        if not fault and name not in sums:
            if name.lower().endswith(harmless) or name.startswith(fetched):
                additions.append(name)
                continue
            fault = "is not listed"
        elif not fault and not os.path.isfile(path):  # reading a named pipe would wait forever
            fault = "is not a regular file"
        with problems(path, OSError, form="{} cannot be read: {}"):
            if not fault and sha256(path) != sums[name]:
                fault = "has changed: its SHA-256 is not the one in SHA256SUMS"
        if fault:
            code = 1
            say(f"error: {path} {fault}")
    note_files("did not compare", additions, "beside those of the bundle")
    if code == 0:
        print(f"verified: {len(sums)} files match SHA256SUMS")
    return code


def printable(text: str) -> str:
    """Escape control characters and line breaks in text from outside, such as paths and class names."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def csv_line(*cells) -> str:
    """A line of CSV, in which text that a spreadsheet would run as a formula starts with an apostrophe."""
    line, texts = io.StringIO(), ["" if cell is None else str(cell) for cell in cells]
    texts = [f"'{text}" if text.startswith(("=", "+", "-", "@")) else text for text in texts]
    csv.writer(line, lineterminator="\n").writerow(map(printable, texts))
    return line.getvalue()


def result_line(output_format: str, row: dict) -> str:
    """One image's row of JSON as it is, as a row of CSV, or as text, which has none for an error."""
    if output_format == "json":
        return json.dumps(row) + "\n"
    pairs = [(entry["label"], entry["probability"]) for entry in row.get("top", [])]
    if output_format == "csv":
        first = [row.get(key) for key in ("path", "error", "label", "probability", "known")]
        return csv_line(*first, *itertools.chain.from_iterable(pairs))
    cells = [row["path"], *(f"{label} {probability:.2%}" for label, probability in pairs)]
    if pairs and row["label"] != pairs[0][0]:
        cells.insert(1, row["label"])
    if row.get("known") is not None:
        cells.append(f"known {row['known']:.1%}")
    return "  ".join(map(printable, cells)) + "\n" if pairs else ""


@contextlib.contextmanager
def output_stream(path: str | None) -> Iterator:
    """Standard output, or a file that replaces `path` as a whole. Raises Problem."""
    if path is None:
        if sys.stdout is None:
            raise Problem("standard output is closed; give --output FILE")
        yield sys.stdout
        return
    how = {"encoding": "utf-8", "errors": "backslashreplace", "newline": ""}
    with problems(f"cannot write {path}", OSError), replacing(path, "w", **how) as out:
        yield out


def write_images(results: Iterator, args: argparse.Namespace, top_k: int, out) -> int:
    """Write what predict_files() yields to `out`; return the exit code."""
    if args.format == "csv":
        more = [f"{key}_{k + 1}" for k in range(top_k) for key in ("label", "probability")]
        out.write(csv_line("path", "error", "label", "probability", "known", *more))
    code = 0
    for rows in results:
        for row in rows:
            if "error" in row:
                code = 1
                say(f"error: {row['path']}: {row['error']}")
            out.write(result_line(args.format, row))
        out.flush()
    return code


def write_values(model: Model, rows: list[str], output_format: str, out) -> int:
    """Predict from the rows of --values and write the results to `out`; return 0. Raises Problem."""
    features, count = [], model.spec["channels"]
    for row in rows:
        fault = f"--values {row} is not a list of {count} numbers such as 0.1,0.2"
        with problems(fault, ValueError, 2, "{}"):
            features.append(np.array(row.split(","), np.float32).reshape(count))
    if output_format == "csv":
        out.write("values,prediction\n")
    predictions = model.predict(np.stack(features))[:, 0].tolist()
    for row, values, prediction in zip(rows, features, predictions, strict=True):
        record = json.dumps({"values": values.tolist(), "prediction": prediction})
        lines = {"text": f"{row}  {prediction:.6g}", "csv": f'"{row}",{prediction}', "json": record}
        out.write(lines[output_format] + "\n")
    return 0


def benchmark(path: str, threads: int, provider: str, batch_size: int) -> dict:
    """Time a model's import, load, first run, latency on all threads and, in batches on each, throughput."""
    started = time.perf_counter()
    model = Model(path, threads, provider)
    loaded = time.perf_counter()
    spec, rng, batch_size = model.spec, np.random.default_rng(0), model.batch or batch_size
    inputs = rng.standard_normal((batch_size, spec["channels"]), dtype=np.float32)
    if spec["task"] != "regression":
        inputs = rng.integers(0, 256, (batch_size, *spec["image_size"], spec["channels"]), dtype=np.uint8)
    ticks = [time.perf_counter()]
    while len(ticks) < 52 or (ticks[-1] - ticks[0] < 3 and len(ticks) < 5000):
        model.predict(inputs[:1])
        ticks.append(time.perf_counter())
    first, *later = (np.diff(ticks) * 1000).tolist()
    low, high = np.percentile(later, (10, 90)).round(4).tolist()
    figures = {"model": path, "threads": threads, "batch_size": batch_size}
    figures |= {"import_seconds": round(IMPORT_SECONDS, 4), "load_seconds": round(loaded - started, 4)}
    figures |= {"first_run_ms": round(first, 3), "latency_spread": (low, high)}  # 10th and 90th percentile
    figures |= {f"latency_p{q}_ms": round(float(np.percentile(later, q)), 3) for q in (50, 95, 99)}
    figures["busy"] = f"busy machine: {high / low:.3g}x spread of the latency" if high > 2 * low else None
    figures["peak_memory_mb"] = None  # in MB of 2**20 bytes, if the system tells
    with contextlib.suppress(OSError, IndexError), open("/proc/self/status", encoding="latin-1") as file:
        figures["peak_memory_mb"] = round(int(file.read().split("VmHWM:")[1].split()[0]) / 1024, 1)
    model, done, started = Model(path, 1, provider), 0, time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        while time.perf_counter() - started < 2:
            done += sum(len(outputs) for outputs in pool.map(model.predict, [inputs] * 4 * threads))
        figures["images_per_second"] = round(done / (time.perf_counter() - started), 1)
    return figures


def compare(models: list[Model], results: list[Iterator], args: argparse.Namespace, out) -> int:
    """Write how the answers of two models, of predict_files() each, differ; return the exit code."""
    changed, code = [], 0
    for rows in zip(*map(itertools.chain.from_iterable, results), strict=True):
        path, error = rows[0]["path"], rows[0].get("error") or rows[1].get("error")
        if error:
            code = 1
            say(f"error: {path}: {error}")
            continue
        old, new = ({entry["label"]: entry["probability"] for entry in row["top"]} for row in rows)
        was, now = next(iter(old)), next(iter(new))  # the first is the best
        row = {"path": path, "change": round(max(abs(old[label] - new[label]) for label in old), 6)}
        changed.append({**row, "old": was, "p_old": old[was], "new": now, "p_new": new[now]})
    if not changed:
        return 1
    changed.sort(key=lambda row: -row["change"])
    pairs = collections.Counter((row["old"], row["new"]) for row in changed if row["old"] != row["new"])
    folders = [os.path.basename(os.path.dirname(os.path.abspath(row["path"]))) for row in changed]
    images, flipped, labelled = len(changed), pairs.total(), sum(folder in old for folder in folders)
    figures = {"images": images, "agreement": round(1 - flipped / images, 6), "labelled": labelled}
    for name, path, model in zip(("old", "new"), args.compare, models, strict=True):
        image = decode_image(changed[0]["path"], model.spec["channels"], model.spec["white"])[None]
        times = timeit.repeat(functools.partial(model.predict, image), number=1, repeat=20)
        speed = round(1000 * float(np.median(times)), 4)
        figures[name] = {"model": path, "bytes": os.path.getsize(path), "ms_per_image": speed}
        hits = sum(row[name] == folder for row, folder in zip(changed, folders, strict=True))
        figures[name]["accuracy"] = round(hits / labelled, 6) if labelled else None
    figures["flips"] = [{"old": old, "new": new, "count": n} for (old, new), n in pairs.most_common()]
    figures["changed"] = [row for row in changed[:MOST_CHANGED] if row["change"]]
    write_figures(figures, args.format, out)
    if args.max_flips is not None and flipped / images > args.max_flips:
        say(f"error: {flipped} of {images} answers changed, more than --max-flips {args.max_flips}")
        return 1
    return code


def write_figures(figures: dict, output_format: str, out) -> None:
    """Write figures as one line of JSON, or as text: a line for each value, or each row of a list."""
    if output_format == "json":
        out.write(json.dumps(figures) + "\n")
        return
    for name, value in figures.items():
        for row in value if isinstance(value, list) else [value]:
            cells = [f"{key} {cell}" for key, cell in row.items()] if isinstance(row, dict) else [str(row)]
            out.write(f"{name:18}  {printable('  '.join(cells))}\n")


class Parser(argparse.ArgumentParser):
    """argparse with errors of one line, and with a width, as asking the terminal imports shutil and more."""

    def __init__(self, **settings):
        super().__init__(formatter_class=lambda prog: argparse.HelpFormatter(prog, width=78), **settings)

    def error(self, message):
        self.exit(2, f"error: {printable(message)} (--help shows all options)\n")


def number(kind: type, low, high=float("inf"), above: bool = False) -> Callable:
    """An argparse type: a finite number (kind: int or float) from `low`, or above it, to `high`."""

    def parse(text):
        with contextlib.suppress(ValueError):
            value = kind(text)
            if (low < value <= high or (value == low and not above)) and value != float("inf"):
                return value
        limit = f"{'above' if above else 'from'} {low}" + (f" to {high}" if high != float("inf") else "")
        raise argparse.ArgumentTypeError(f"{text!r} is not a {'whole ' * (kind is int)}number {limit}")

    return parse


TAKES = {  # what is done, by the first of these that is given, and the options that have an effect on it
    "--verify": "--model",
    "--self-test": "--model --threads --device",
    "--benchmark": "--model --threads --device --batch-size --format --output",
    "--values": "--model --threads --device --format --output",
    "--compare": "PATH --threads --device --batch-size --format --output --max-flips",
    "PATH": "--model --threads --device --batch-size --format --top-k --output --reject --min-probability",
}


def build_parser() -> Parser:
    example = "example: python step3_infer.py --model model.onnx --top-k 3 photos/"
    parser = Parser(description="Predict with a file that step2_export.py wrote.", epilog=example)
    count, share = number(int, 1, 999_999), number(float, 0, 1)
    add = parser.add_argument
    add("paths", nargs="*", metavar="PATH", help="images, directories (recursive), globs, or - for stdin")
    add("--values", action="append", metavar="X,X,...", help="features for a regression; may be repeated")
    add = parser.add_argument_group("model").add_argument
    add("--model", metavar="FILE", help="of step2_export.py (default: beside this script, or newest export)")
    add("--threads", type=count, metavar="N", help="CPU threads (default: all that this process may use)")
    add("--device", "--provider", metavar="NAME", help="of the engine: cpu, cuda, ... (default: cpu)")
    add("--batch-size", type=count, metavar="N", help="images of one size that run at once (default: 16)")
    add = parser.add_argument_group("results").add_argument
    add("--format", choices=("text", "json", "csv"), help="json: one object per line (default: text)")
    add("--top-k", type=count, metavar="K", help="classes to name, best first (default: 3)")
    add("--reject", type=share, metavar="X", help="keep this most familiar share (0.99); others are unknown")
    add("--min-probability", type=share, metavar="P", help="call answers with less probability unsure")
    add("--output", metavar="FILE", help="write to FILE, whole or not at all (default: standard output)")
    add("--max-flips", type=share, metavar="X", help="fail if --compare finds more answers changed")
    add = parser.add_argument_group("instead of predicting").add_mutually_exclusive_group().add_argument
    add("--self-test", action="store_true", help="run the golden samples inside the file and compare")
    add("--compare", nargs=2, metavar=("OLD", "NEW"), help="how the answers of two files to PATH differ")
    add("--benchmark", action="store_true", help="time the file on this machine (--format text or json)")
    add("--verify", action="store_true", help="compare all files with SHA256SUMS beside the model or script")
    return parser


def say(message: str) -> None:
    """Print one line to standard error."""
    print(printable(message), file=sys.stderr)


def guarded(work: Callable, *args, closed_pipe: int = 1) -> int:
    """Return the exit code of work(*args) or, after `| head`, `closed_pipe`; report a Problem as one line."""
    warnings.filterwarnings("ignore", module=r"PIL\.")  # decode_image reports what matters
    logging.getLogger("PIL").addHandler(logging.NullHandler())  # or Python prints what Pillow logs
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding=None if stream.isatty() else "utf-8", errors="backslashreplace")
    if sys.stderr is None:  # progress bars and engines write to it all the same
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    try:
        code = work(*args)
        print(end="", flush=True)
        return code
    except Problem as problem:
        message, code = f"error: {problem}", problem.code
    except KeyboardInterrupt:
        message, code = "interrupted", 130
    except BrokenPipeError:  # `| head`
        message, code = "error: standard output is no longer read: stopped", closed_pipe
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "memory" not in str(error).lower():
            raise
        message, code = f"error: not enough memory: {one_line(error)}; use smaller inputs", 1
    except OSError as error:
        if error.filename is not None:  # not standard output: a bug
            raise
        message, code = f"error: cannot write to standard output: {error.strerror}", 1
    if code:
        say(message)
    try:
        print(end="", flush=True)
    except OSError:  # Python flushes again at exit: what cannot be written goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return code


def run(args: argparse.Namespace) -> int:
    """Do what the command line asks for and return the exit code. Raises Problem."""
    if args.verify:
        return verify(os.path.dirname(os.path.abspath(args.model or __file__)))
    paths = args.compare or [args.model or find_model()]
    for path in paths:
        if path.lower().endswith((".pt", ".pt2")):
            say(f"note: {path} can carry code; unless you trust its source, use .onnx")
    threads, batch_size = args.threads or usable_cpus(), args.batch_size or 16
    if args.benchmark:
        with output_stream(args.output) as out:
            write_figures(benchmark(path, threads, args.device, batch_size), args.format, out)
        return 0
    others = []
    found = find_images(args.paths, others)
    first = list(itertools.islice(found, threads * batch_size))
    workers = max(1, min(threads, len(first)))
    models = [Model(path, max(1, threads // workers), args.device, len(first) == 1) for path in paths]
    if args.self_test:
        count, most, ok = self_test(models[0])
        print(f"self-test {'passed' if ok else 'FAILED'}: {count} golden samples, max difference {most:.1e}")
        return 0 if ok else 1
    check(models, paths, args)
    with output_stream(args.output) as out:
        if args.values:
            return write_values(models[0], args.values, args.format, out)
        results, classes = [], len(models[0].spec["classes"])
        top_k = classes if args.compare else min(classes, args.top_k)
        for model, files in zip(
            models, itertools.tee(itertools.chain(first, found), len(models)), strict=True
        ):
            size = model.batch or max(1, min(batch_size, len(first) // workers))
            results.append(predict_files(model, files, workers, size, top_k))
        with contextlib.ExitStack() as stack:
            for rows in results:
                stack.enter_context(contextlib.closing(rows))
            if args.compare:
                code = compare(models, results, args, out)
            else:
                code = write_images(results[0], args, top_k, out)
        note_files("passed over", others, "that Pillow does not know as images")
        return code


def check(models: list[Model], paths: list[str], args: argparse.Namespace) -> None:
    """Give the models the thresholds of the command line; raise a Problem if they do not fit it."""
    for model, path in zip(models, paths, strict=True):
        if model.batch and (args.batch_size or 0) > model.batch:
            raise Problem(f"{path} takes batches of {model.batch}: leave out --batch-size", 2)
        if (model.spec["task"] == "regression") != bool(args.values):
            wanted = "images: give at least one PATH" if args.values else "numbers: it takes --values only"
            raise Problem(f"{path} predicts from {wanted}", 2)
        if args.reject is not None and not model.spec["known"]:
            raise Problem(f"{path} does not say how familiar an image looks: --reject cannot be used", 2)
        for name in ("reject", "min_probability"):
            setattr(model, name, getattr(model if getattr(args, name) is None else args, name))
    old, new = (set(models[k].spec["classes"]) for k in (0, -1))
    if old != new:
        only = f"only {paths[0]} has {sorted(old - new)[:9]}, only {paths[1]} has {sorted(new - old)[:9]}"
        raise Problem(f"--compare takes files of the same classes, but {only}", 2)


def main(argv: list[str] | None = None) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    given = [name.replace("_", "-") for name, value in vars(args).items() if value not in (None, False, [])]
    given = ["PATH" if name == "paths" else f"--{name}" for name in given]
    asked = next((kind for kind in TAKES if kind in given), None)
    if not asked or (args.compare and not args.paths):
        parser.error("give at least one PATH: an image, a directory or a glob; or --values for a regression")
    for name in given:
        if name not in f"{asked} {TAKES[asked]}".split():
            parser.error(f"{name} has no effect on {asked}, which takes only {TAKES[asked]}")
    if (args.benchmark or args.compare) and args.format == "csv":
        parser.error(f"{asked} writes --format text or json, not csv")
    if args.compare and "-" in args.paths:
        parser.error("--compare takes files, not - for standard input")
    parser.set_defaults(device="cpu", format="text", top_k=3)
    return guarded(run, parser.parse_args(argv), closed_pipe=0)


if __name__ == "__main__":
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # it is ignored in the background of a shell
        signal.signal(signal.SIGINT, signal.default_int_handler)
    code = main()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # pressed again while the threads end
    sys.exit(code)
