#!/usr/bin/env python3
"""Step 3 of 3: predict from an exported file. This script and that file are all a machine needs.

    python step3_infer.py image.png                        # the newest export, or a model beside this script
    python step3_infer.py --model model.onnx photos/ 'more/*.jpg'
    python step3_infer.py --format json --top-k 5 photos/ > predictions.jsonl
    curl -s https://example.org/cat.jpg | python step3_infer.py -
    python step3_infer.py --values 0.1,0.2,0.3,0.4,0.5     # a regression; once for each row
    python step3_infer.py --self-test                      # does this machine compute what the training machine did?
    python step3_infer.py --benchmark                      # how fast is this file here?
    python step3_infer.py --verify                         # is every file as SHA256SUMS beside it says?

From Python: `predict("image.png", Model("model.onnx"))["label"]`.

Needs numpy and Pillow, and onnxruntime for .onnx or torch for .pt and .pt2. Resizing, normalising and softmax are
inside the file; so are the class names, in the `spec`. Exit codes: 0 done, 1 some input could not be used, 2 usage.
"""

import signal
import time

if (STARTED := time.perf_counter()) and __name__ == "__main__":
    INTERRUPTIBLE = (
        signal.getsignal(signal.SIGINT) is signal.default_int_handler
    )  # not so in the background of a shell
    if INTERRUPTIBLE:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during these imports: no traceback

import argparse
import contextlib
import functools
import io
import itertools
import json
import logging
import os
import stat
import sys
import threading
import warnings
from collections import deque

import numpy as np
from PIL import Image, UnidentifiedImageError

IMPORT_SECONDS = time.perf_counter() - STARTED
SCHEMA = 1  # the newest spec this script understands
IMAGE_SUFFIXES = tuple(".png .jpg .jpeg .webp .bmp .gif .tif .tiff .pgm .ppm .pbm .avif .jp2".split(" "))
MODEL_NAMES = (
    "model.onnx",
    "model.int8.onnx",
    "model.pt",
    "model.pt2",
)  # in this order where several lie together
WINDOW_BYTES = 32 << 20  # decoded pixels a thread holds, unless a single image is larger
LARGEST_STDIN = 256 << 20
ORIENTATION = 0x0112  # the EXIF tag
FLOAT_TOLERANCE = 1e-4  # of the self-test where the spec names none; float32 engines differ by about 1e-6
INT8_TOLERANCE = 2e-2  # processors round int8 sums differently: 5e-3 without VNNI, 1.2e-2 on 32-bit ARM


class Problem(Exception):
    """A failure its user can mend: shown as one `error:` line, without a traceback."""

    def __init__(self, message, code=1):
        super().__init__(message)
        self.code = code


# --------------------------------------------------------------------------------------------------------- images


def decode_image(source, channels, white=65535):
    """Decode one image file to uint8 [height, width, channels]; channels is 1 (grey) or 3 (RGB).

    source: a path or a binary file object. EXIF orientation is applied, of an animation the first frame is taken,
    16-bit greys are scaled to 8 bits, `white` becoming 255, and palette, CMYK and alpha go through Pillow's convert("RGB" or "L").
    Raises Problem with the reason (the caller knows the name).
    """
    try:
        if not hasattr(source, "read") and not stat.S_ISREG(os.stat(source).st_mode):
            raise Problem("is not a regular file")
        with open_image(source) as image:
            if image.mode == "F":
                raise Problem("has 32-bit float pixels, which have no fixed white: save it with 8 or 16 bits")
            if image.format == "EPS":  # which Pillow has run by Ghostscript
                raise Problem("is PostScript, a program and not an image")
            image.load()
            if image.getexif().get(ORIENTATION, 1) != 1:
                from PIL import ImageOps  # rarely needed, and slow to import

                ImageOps.exif_transpose(image, in_place=True)
            if image.mode.startswith("I"):  # I;16 and its byte orders, or I where Pillow widened them
                image = scale_to_8_bits(image, white)
            return to_array(image, channels)
    except UnidentifiedImageError:
        size = source.seek(0, os.SEEK_END) if hasattr(source, "read") else os.path.getsize(source)
        raise Problem("is not an image that Pillow knows" if size else "is empty") from None
    except FileNotFoundError:
        raise Problem("no such file") from None
    except Image.DecompressionBombError as error:
        raise Problem(f"refused as a decompression bomb: {error}") from None
    except MemoryError:
        raise Problem("is too large for this machine's memory") from None
    except OSError as error:
        raise Problem(f"cannot be read: {error.strerror or one_line(error)}") from None
    except Problem:
        raise
    except Exception as error:  # Pillow's plugins raise anything at all on broken files
        raise Problem(f"is corrupt: {one_line(error)}") from None


def open_image(source):
    """Image.open, also right when another thread is just loading Pillow's rarer formats."""
    try:
        return Image.open(source)
    except UnidentifiedImageError:
        image_suffixes()
        return Image.open(source)


@functools.cache
def image_suffixes():
    """The suffixes of all formats that Pillow opens, with pillow-heif those of HEIC too, after loading them all."""
    Image.init()
    with contextlib.suppress(ImportError):
        import pillow_heif

        pillow_heif.register_heif_opener()
    formats = {*Image.OPEN, "MPO"}  # the last is opened as a JPEG
    return {suffix for suffix, name in Image.registered_extensions().items() if name in formats}


def is_image(path):
    """Is a file an image by its suffix, or if it has none, by its content?"""
    suffix = os.path.splitext(path)[1].lower()
    if suffix:
        return suffix in IMAGE_SUFFIXES or suffix in image_suffixes()  # which takes a while to load
    try:
        if not os.path.isfile(path):  # a named pipe would be waited for
            return False
        with open_image(path):
            return True
    except Exception:  # Pillow's plugins raise anything at all on broken files
        return False


def to_array(image, channels):
    """A loaded image -> uint8 [height, width, channels], converted to grey or RGB."""
    mode, (width, height) = "L" if channels == 1 else "RGB", image.size
    if width * height < 1 << 20:
        return np.asarray(image if image.mode == mode else image.convert(mode)).reshape(
            height, width, channels
        )
    # In bands that stay in the processor's cache: a whole photo at once takes twice the time and memory.
    pixels, rows = np.empty((height, width, channels), np.uint8), max(1, (1 << 18) // width)
    for top in range(0, height, rows):
        band = image.crop((0, top, width, min(top + rows, height))).convert(mode)
        pixels[top : top + rows] = np.asarray(band).reshape(-1, width, channels)
    return pixels


def one_line(error):
    return " ".join(str(error).split())


def scale_to_8_bits(image, white):
    """A 16-bit (or 32-bit, if its values fit 16) grey image -> mode L; `white` and above become 255."""
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise Problem("has integer pixels of more than 16 bits: save it with 8 or 16 bits")
    return Image.fromarray(((np.minimum(values, white) * 255 + white // 2) // white).astype(np.uint8))


def find_images(paths):
    """Yield (path, Problem or None): files as given, directories walked recursively in name order, globs expanded."""
    for path in paths:
        if any(c in path for c in "*?[") and not os.path.lexists(path):
            import glob

            # "**" matches directories beside the files in them; a glob of directories alone walks these.
            matches = sorted(glob.glob(path, recursive=True))
            files = [match for match in matches if not os.path.isdir(match)]
            if not matches:
                yield path, Problem("matches no file")
            yield from find_images(files or matches)
        elif os.path.isdir(path):
            found = walk(path)
            nothing = path, Problem("no images in this directory")
            yield next(found, nothing)
            yield from found
        else:
            yield path, None


def walk(directory):
    """Yield (path, Problem or None) for the images below a directory, which is read as far as it is asked for."""
    pending = [directory]
    while pending:
        directory, files, below = pending.pop(), [], []
        try:
            with os.scandir(directory) as entries:
                for entry in entries:
                    if entry.name.startswith("."):  # hidden, such as macOS' ._photo.jpg
                        continue
                    if entry.is_dir(follow_symlinks=False):
                        below.append(entry.path)
                    elif is_image(entry.path):
                        files.append(entry.name)
        except OSError as error:
            yield directory, Problem(f"cannot be read: {error.strerror}")
        files.sort()
        for name in files:
            yield os.path.join(directory, name), None
        pending += sorted(below, reverse=True)


# ---------------------------------------------------------------------------------------------------------- model


class Model:
    """An exported file, ready to run; may be used from several threads at once.

    spec: what the file says of itself (classes, channels, image_size, provenance).
    threads: of the engine (default: as many as this process may use). once: load fast rather than run fast.
    Raises Problem when the file cannot be loaded or was not made by step2_export.py.
    """

    def __init__(self, path, threads=None, provider="cpu", once=False):
        path = os.fspath(path)
        load = {".onnx": load_onnx, ".pt": load_torch, ".pt2": load_torch}.get(
            os.path.splitext(path)[1].lower()
        )
        if not os.path.isfile(path):
            raise Problem(f"no model file {path}; python step2_export.py makes one")
        if load is None:
            raise Problem(
                f"{path} is not a model this script knows: .onnx, .pt and .pt2 files of step2_export.py"
            )
        text, self._run, takes, gives = load(path, min(threads or usable_cpus(), 1024), provider, once)
        self.spec = read_spec(text, path)
        wanted = "features of type float" if self.spec["task"] == "regression" else "images of type uint8"
        if takes not in (None, wanted):
            raise Problem(f"{path} has a graph that takes {takes}, its spec promises {wanted}")
        if isinstance(gives, int) and gives != len(self.spec["classes"]):
            raise Problem(f"{path} has {gives} outputs, its spec names {len(self.spec['classes'])} classes")

    def predict(self, inputs):
        """uint8 images [batch, height, width, channels] of any one size -> float32 probabilities [batch, classes].

        For regression: float32 features [batch, n] -> float32 predictions [batch, 1]. Raises Problem.
        """
        try:
            outputs = self._run(inputs)
        except Exception as error:  # the engines' exceptions have no common base but this
            shape = "x".join(map(str, inputs.shape))
            reason = f"the model cannot run on {shape} input, its spec is wrong perhaps: {one_line(error)}"
            raise Problem(reason) from None
        if outputs.shape != (len(inputs), len(self.spec["classes"])):
            raise Problem(
                f"the file's spec is wrong: {len(self.spec['classes'])} classes, outputs {outputs.shape}"
            )
        return outputs


def predict(path_or_array, model, top_k=3):
    """The answer for one image, as a dict: label, probability, and top, a list of {"label", "probability"}.

    path_or_array: a path, a binary file object, or uint8 [height, width, channels] with the model's channels (grey
    also as [height, width]); model: a Model. May be called from several threads at once. Raises Problem.
    """
    channels = model.spec["channels"]
    if model.spec["task"] == "regression":
        raise Problem("this model predicts from numbers: give float32 [batch, n] to Model.predict")
    if isinstance(path_or_array, np.ndarray):
        image = path_or_array[..., None] if path_or_array.ndim == 2 else path_or_array
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != channels or image.size == 0:
            shape = f"{image.dtype} {list(path_or_array.shape)}"
            raise Problem(f"the array is {shape}, the model takes uint8 [height, width, {channels}]")
    else:
        try:
            image = decode_image(path_or_array, channels, model.spec.get("white", 65535))
        except Problem as problem:
            raise Problem(f"{path_or_array} {problem}") from None
    (answer,) = rank(model.predict(np.ascontiguousarray(image[None])), model.spec["classes"], top_k)
    if isinstance(answer, Problem):
        raise answer
    return as_record(answer)


def usable_cpus(root="/sys/fs/cgroup", own="/proc/self/cgroup"):
    """How many CPUs this process may use: its affinity, and on Linux the quotas of its control groups (v1 and v2)."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    lines = []
    with contextlib.suppress(OSError), open(own, encoding="utf-8", errors="replace") as file:
        lines = file.read().splitlines()
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        names = ("cpu.cfs_quota_us", "cpu.cfs_period_us") if controllers else ("cpu.max",)
        parts = group.strip("/").split("/")
        for depth in range(
            len(parts) + 1
        ):  # the groups above limit as well; in a container they are not seen
            place = os.path.join(root, controllers, *parts[:depth])
            with contextlib.suppress(OSError, ValueError):  # ValueError: no limit, which cpu.max calls "max"
                texts = [open(os.path.join(place, name), encoding="ascii").read() for name in names]  # noqa: SIM115
                quota, period = map(int, " ".join(texts).split())
                if quota > 0:
                    count = min(count, max(1, -(-quota // period)))
    return count


def engine_source(path):
    """The path, or the file's content where the engines cannot take such a name (not UTF-8)."""
    try:
        path.encode()
    except UnicodeEncodeError:
        with open(path, "rb") as file:
            return file.read()
    return path


def load_onnx(path, threads, provider, once):
    """-> (spec text or None, function from input array to float32 array, what it takes in words, how many outputs).

    Run by onnxruntime; the function runs in the calling thread where `threads` is 1.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise Problem(f"{path} needs onnxruntime: pip install onnxruntime ({error})") from None
    available = {
        name.removesuffix("ExecutionProvider").lower(): name for name in onnxruntime.get_available_providers()
    }
    if provider.lower() not in available:
        raise Problem(f"this onnxruntime has no provider {provider!r}; it has {', '.join(available)}", 2)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4  # failures come as exceptions
    if (
        once
    ):  # changing the layout of all weights, and threads that wait busily, cost more than one image gains
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        # No fallback: it prints to standard output, and takes the CPU where another provider was asked for.
        session = onnxruntime.InferenceSession(
            engine_source(path), options, providers=[available[provider.lower()]], enable_fallback=False
        )
        takes, gives = session.get_inputs(), session.get_outputs()[0].shape
        name = takes[0].name if takes else None
        text = session.get_modelmeta().custom_metadata_map.get("spec")
    except Exception as error:  # onnxruntime's exceptions have no common base but this
        version = onnxruntime.__version__
        raise Problem(
            f"{path} is not an ONNX file that onnxruntime {version} can run: {one_line(error)}"
        ) from None
    kinds = {("tensor(uint8)", 4): "images of type uint8", ("tensor(float)", 2): "features of type float"}
    takes = ", ".join(kinds.get((one.type, len(one.shape)), f"{one.type} {one.shape}") for one in takes)
    return text, lambda inputs: session.run(None, {name: inputs})[0], takes, gives[-1] if gives else None


def load_torch(path, threads, provider, once):
    """The same for a TorchScript (.pt) or a torch.export file (.pt2), run by torch."""
    try:
        import torch
    except ImportError:
        raise Problem(
            f"{path} needs torch: pip install torch (or use the .onnx file, which does not)"
        ) from None
    try:
        torch.zeros(1, device=provider)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise Problem(f"torch cannot use --provider {provider} here ({reason}); cpu it can", 2) from None
    torch.set_num_threads(threads)
    logging.getLogger("torch.export").disabled = True  # it shows a traceback of what it raises
    extra, source = {"spec.json": ""}, engine_source(path)
    source = io.BytesIO(source) if isinstance(source, bytes) else source
    kind = "torch.export" if path.lower().endswith(".pt2") else "TorchScript"
    try:
        with warnings.catch_warnings():  # torch calls TorchScript deprecated; LibTorch has nothing better yet
            warnings.filterwarnings("ignore", r"`torch\.jit\.", FutureWarning)
            if kind == "TorchScript":
                module = torch.jit.load(source, map_location=provider, _extra_files=extra).eval()
            else:
                module = torch.export.load(source, extra_files=extra).module().to(provider)
    except Exception as error:  # broken files raise anything at all
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        hint = "a training checkpoint is exported by step2_export.py first"
        raise Problem(
            f"{path} is not a {kind} file that torch {torch.__version__} can run ({hint}): {reason}"
        ) from None

    def run(inputs):
        with torch.inference_mode():
            inputs = inputs if inputs.flags.writeable else inputs.copy()  # or torch warns
            return module(torch.from_numpy(inputs).to(provider)).cpu().numpy()

    return extra["spec.json"], run, None, None


def read_spec(text, path):
    """The spec (a dict) from its JSON text. Raises Problem where it is missing, malformed or too new."""
    if not text:
        raise Problem(f"{path} carries no spec: it was not made by step2_export.py")
    try:
        spec = json.loads(text)
        schema = int(spec["schema"])
        if schema > SCHEMA:
            raise Problem(
                f"{path} has a spec of schema {schema}, this script knows up to {SCHEMA}: "
                f"use the step3_infer.py of the Threestep that made it"
            )
        regression = {"classification": False, "regression": True}[spec["task"]]
        names = [name for name in spec["classes"] if isinstance(name, str)]
        if len(names) < (1 if regression else 2) or len(names) != len(spec["classes"]):
            raise ValueError("classes are not a list of names")
        if not isinstance(spec["channels"], int) or not (regression or spec["channels"] in (1, 3)):
            raise ValueError("channels make no sense")
        if not isinstance(spec.get("white", 65535), int) or not 0 < spec.get("white", 65535) <= 65535:
            raise ValueError("white makes no sense")
        if not regression and [
            isinstance(side, int) and 0 < side < 1 << 15 for side in spec["image_size"]
        ] != [True, True]:
            raise ValueError("image_size makes no sense")
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise Problem(f"{path} has a malformed spec: {type(error).__name__} {one_line(error)}") from None
    return spec


def find_model():
    """The model beside this script, else the newest export under exports/. Raises Problem where there is none."""
    here = os.path.dirname(os.path.abspath(__file__))
    exports = (
        [entry.path for entry in os.scandir("exports") if entry.is_dir()] if os.path.isdir("exports") else []
    )
    found = [[os.path.join(place, name) for name in MODEL_NAMES] for place in (here, *exports)]
    found = [[path for path in paths if os.path.isfile(path)] for paths in found]
    if found[0]:
        return found[0][0]
    if not any(found):
        raise Problem(
            "no model found beside this script or under exports/; give --model, or run step2_export.py", 2
        )
    return max(filter(None, found), key=lambda paths: max(map(os.path.getmtime, paths)))[0]


def self_test(model):
    """Run the golden samples inside the file. -> (their count, the largest difference, whether it is tolerable).

    The difference is from the probabilities that the training machine computed, relative where these exceed 1; the
    spec's `self_test_tolerance` says how much is tolerable. Raises Problem.
    """
    import base64

    golden, difference = model.spec.get("golden"), 0.0
    if not golden:
        raise Problem("this file carries no golden samples to test with")
    default = INT8_TOLERANCE if "quantization" in model.spec else FLOAT_TOLERANCE
    try:
        tolerance = float(model.spec.get("self_test_tolerance", default))
        for sample in golden:
            if model.spec["task"] == "regression":
                inputs, expected = (
                    np.array([sample["features"]], np.float32),
                    np.array(sample["prediction"], float),
                )
            else:
                image = decode_image(io.BytesIO(base64.b64decode(sample["image"])), model.spec["channels"])
                inputs, expected = image[None], np.array(sample["probabilities"], float)
            outputs = model.predict(inputs)[0]
            if outputs.shape != expected.shape:
                raise ValueError(f"{expected.shape} outputs expected, {outputs.shape} came")
            worst = (np.abs(outputs - expected) / np.maximum(1, np.abs(expected))).max()
            difference = float(np.maximum(difference, worst))  # which keeps NaN, as max() does not
    except (ValueError, KeyError, TypeError, OverflowError, Problem) as error:
        raise Problem(f"this file's golden samples are malformed: {error!r}") from None
    return len(golden), difference, difference <= tolerance


# ----------------------------------------------------------------------------------------------------------- sums


def read_sums(folder):
    """SHA256SUMS of a folder -> {relative path: sum}. Raises Problem."""
    file, sums = os.path.join(folder, "SHA256SUMS"), {}
    try:
        with open(file, encoding="utf-8", errors="surrogateescape") as lines:
            for number, line in enumerate(lines, 1):
                total, name = line[:64], line[66:].rstrip("\n")
                if set(total) - set("0123456789abcdef") or line[64:66] not in ("  ", " *") or not name:
                    raise Problem(f"{file}, line {number} is not a sum, two spaces and a file name")
                sums[os.path.normpath(name)] = total
    except OSError as error:
        raise Problem(f"cannot read {file} ({error.strerror}): step2_export.py --bundle writes one") from None
    return sums


def sha256(path):
    """The SHA-256 of a file, in hexadecimal. Raises OSError."""
    import hashlib

    total = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(1 << 20):
            total.update(part)
    return total.hexdigest()


def fault_of(path, total):
    """What is wrong with a file that should have this SHA-256 sum, in words; None where nothing is."""
    if not os.path.isfile(path):  # a named pipe would be waited for
        return "is not a regular file" if os.path.lexists(path) else "is missing"
    try:
        return None if sha256(path) == total else "is not the file of SHA256SUMS: it has changed"
    except OSError as error:
        return f"cannot be read: {error.strerror}"


def verify(folder):
    """Compare a folder with its SHA256SUMS: a line for each finding. Returns the exit code; raises Problem."""
    sums = read_sums(folder)
    unreadable, present = [], set()
    for place, below, names in os.walk(folder, onerror=unreadable.append):
        paths = [os.path.join(place, name) for name in (*names, *below)]
        present |= {
            os.path.relpath(path, folder) for path in paths if os.path.islink(path) or not os.path.isdir(path)
        }
    findings = dict.fromkeys(present - sums.keys() - {"SHA256SUMS"}, "is not listed in SHA256SUMS")
    findings |= {
        os.path.relpath(error.filename, folder): f"cannot be read: {error.strerror}" for error in unreadable
    }
    for name, total in sums.items():
        outside = name.startswith("..") or os.path.isabs(name)
        findings[name] = "is outside its folder" if outside else fault_of(os.path.join(folder, name), total)
    findings = {name: finding for name, finding in sorted(findings.items()) if finding}
    for name, finding in findings.items():
        say(f"error: {os.path.join(folder, name)} {finding}")
    if not findings:
        print(f"verified: {len(sums)} files are as SHA256SUMS says")
    return 1 if findings else 0


def warn_of_code(path):
    """TorchScript and torch.export files can carry code: say so where no SHA256SUMS beside the file knows it."""
    if not path.lower().endswith((".pt", ".pt2")) or not os.path.isfile(path):
        return
    with contextlib.suppress(Problem):
        total = read_sums(os.path.dirname(os.path.abspath(path))).get(os.path.basename(path))
        if total and not fault_of(path, total):
            return
    say(
        f"note: {path} can carry code and no SHA256SUMS covers it; .onnx is the format for files from strangers"
    )


# ---------------------------------------------------------------------------------------------------- predictions


def predict_files(model, found, workers, batch_size, top_k, keep=False):
    """Yield lists of (path, pixels or None, Problem or [(label, probability)]) for what find_images found, in order.

    Each of the workers, threads where there are several, decodes `batch_size` images and runs those of one size
    together, so that decoding and computing share all cores; few of these lists are held at any time.
    keep: give the pixels, uint8 [height, width, channels], too.
    """
    chunks = iter(lambda: list(itertools.islice(found, batch_size)), [])
    stop = threading.Event()
    if workers == 1:
        yield from (predict_chunk(model, chunk, top_k, keep, stop) for chunk in chunks)
        return
    from concurrent.futures import ThreadPoolExecutor

    pool, running = ThreadPoolExecutor(workers), deque()
    try:
        for chunk in chunks:
            running.append(pool.submit(predict_chunk, model, chunk, top_k, keep, stop))
            if len(running) > 2 * workers:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()
    finally:  # also where the reader is gone, or Ctrl-C was pressed
        stop.set()
        pool.shutdown(wait=False, cancel_futures=True)


def predict_chunk(model, chunk, top_k, keep, stop):
    """The work of one thread: [(path, Problem or None)] -> [(path, pixels or None, Problem or [(label, p)])]."""
    results, held, size = [], {}, 0
    channels, white = model.spec["channels"], model.spec.get("white", 65535)
    for path, problem in chunk:
        if stop.is_set():
            return []
        try:
            if problem:
                raise problem
            pixels = decode_image(standard_input() if path == "-" else path, channels, white)
        except Problem as error:
            results.append((path, None, error))
            continue
        held.setdefault(pixels.shape, []).append((len(results), pixels))
        results.append((path, pixels if keep else None, None))
        size += pixels.nbytes
        if size > WINDOW_BYTES:
            run_held(model, held, top_k, results)
            held, size = {}, 0
    run_held(model, held, top_k, results)
    return results


def run_held(model, held, top_k, results):
    """Run decoded images, {shape: [(index, pixels)]}, a batch for each shape, and put the answers into `results`."""
    for items in held.values():
        try:
            images = [pixels for _, pixels in items]
            batch = np.stack(images) if len(images) > 1 else images[0][None]  # which spares a photo its copy
            answers = rank(model.predict(batch), model.spec["classes"], top_k)
        except Problem as problem:
            answers = [problem] * len(items)
        except MemoryError:
            answers = [Problem("is too large for this machine's memory")] * len(items)
        for (index, _), answer in zip(items, answers, strict=True):
            results[index] = *results[index][:2], answer


def rank(probabilities, classes, top_k):
    """float32 [batch, classes] -> for each image its [(label, probability)], best first, or a Problem."""
    order = np.argsort(-probabilities, axis=1, kind="stable")[:, :top_k]
    best = np.take_along_axis(probabilities, order, axis=1).astype(np.float64).round(6).tolist()
    answers = [
        [(classes[i], p) for i, p in zip(*row, strict=True)] for row in zip(order.tolist(), best, strict=True)
    ]
    for index in np.flatnonzero(~np.isfinite(probabilities).all(axis=1)):
        answers[index] = Problem("gets no probabilities from this model, but NaN or infinity")
    return answers


def as_record(top):
    """[(label, probability)] -> what --format json says of an image."""
    top = [{"label": label, "probability": probability} for label, probability in top]
    return {**top[0], "top": top}


def standard_input():
    """The bytes of standard input as a file object. Raises Problem."""
    try:
        content = sys.stdin.buffer.read(LARGEST_STDIN + 1) if sys.stdin is not None else b""
    except OSError as error:
        raise Problem(f"cannot be read: {error.strerror}") from None
    if len(content) > LARGEST_STDIN:
        raise Problem(f"is more than {LARGEST_STDIN >> 20} MB of standard input")
    return io.BytesIO(content)


def parse_values(text, count):
    """'0.1,0.2,...' -> float32 [count]. Raises Problem."""
    try:
        values = np.array([float(value) for value in text.split(",")], np.float32)
    except ValueError:
        raise Problem("is not a list of numbers such as 0.1,0.2", 2) from None
    if len(values) != count:
        raise Problem(f"has {len(values)} values, this model takes {count}", 2)
    return values


# -------------------------------------------------------------------------------------------------------- results


def printable(text):
    """Text from strangers (paths, class names) with control characters and line breaks escaped."""
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in text
    )


def csv_cell(text):
    """Text as a cell of a CSV file: printable, and after an apostrophe where a spreadsheet would run it."""
    return ("'" if text.startswith(("=", "+", "-", "@")) else "") + printable(text)


def writer(out, form, top_k):
    """-> function(path, top, error) that writes one result to `out`; top: [(label, probability)], best first."""
    if form == "json":

        def write(path, top, error):
            record = {"path": path, "error": error} if top is None else {"path": path, **as_record(top)}
            out.write(json.dumps(record) + "\n")

    elif form == "csv":
        import csv

        rows = csv.writer(out, lineterminator="\n")
        more = [f"{name}_{k}" for k in range(2, top_k + 1) for name in ("label", "probability")]
        rows.writerow(["path", "error", "label", "probability", *more])

        def write(path, top, error):
            cells = [cell for label, probability in top or () for cell in (csv_cell(label), probability)]
            rows.writerow([csv_cell(path), csv_cell(error or ""), *cells])

    else:

        def write(path, top, error):
            if top is not None:
                ranked = "  ".join(f"{printable(label)} {probability:.2%}" for label, probability in top)
                out.write(f"{printable(path)}  {ranked}\n")

    return write


def annotate(pixels, top, path, folder):
    """Write an image, uint8 [height, width, channels], with its answer drawn below, as a new PNG in `folder`."""
    from PIL import ImageDraw, ImageFont

    image = Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels).convert("RGB")
    factor = max(1, 192 // max(image.size))  # or a thumbnail would be smaller than its label
    image = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    label, probability = top[0]
    label = printable(label if len(label) <= 40 else label[:39] + "…")
    text, font = (
        f"{label} {probability:.1%}",
        ImageFont.load_default(size=min(200, max(14, image.width // 24))),
    )
    _, _, width, height = (int(side) for side in font.getbbox(text))
    canvas = Image.new("RGB", (max(image.width, width + 8), image.height + height + 8), "white")
    canvas.paste(image, ((canvas.width - image.width) // 2, 0))
    ImageDraw.Draw(canvas).text(((canvas.width - width) // 2, image.height + 4), text, "black", font)
    content = io.BytesIO()
    canvas.save(content, "PNG")
    stem = os.path.splitext(os.path.basename(path))[0][:50] if path != "-" else "stdin"
    stem = "".join(c if c.isalnum() or c in "._-" else "_" for c in stem).lstrip(".") or "image"
    for number in itertools.count(1):
        name = os.path.join(folder, f"{stem}.png" if number == 1 else f"{stem}-{number}.png")
        with contextlib.suppress(FileExistsError), open(name, "xb") as file:  # nothing is ever overwritten
            try:
                file.write(content.getbuffer())
                return file.flush()
            except OSError:
                os.unlink(name)
                raise


class Progress:
    """How far long work is, as one line on standard error, where that is a terminal that shows no results."""

    def __init__(self, to_file):
        self.active = sys.stderr.isatty() and (to_file or sys.stdout is None or not sys.stdout.isatty())
        self.started, self.next, self.line = time.monotonic(), time.monotonic() + 2, ""

    def show(self, count):
        now = time.monotonic()
        if self.active and now > self.next:
            self.clear()
            self.line, self.next = (
                f"{count:,} images, {count / (now - self.started):,.0f} a second",
                now + 0.5,
            )
            print(self.line, end="", file=sys.stderr, flush=True)

    def clear(self):
        if self.line:
            print("\r" + " " * len(self.line), end="\r", file=sys.stderr, flush=True)
            self.line = ""


@contextlib.contextmanager
def replacing(path, mode="wb", **open_options):
    """Open a new file beside `path` that takes its place, whole, when the block ends well, and goes when it does not.

    A link is followed; a device or a named pipe is written to directly. Raises OSError.
    """
    path = os.path.realpath(path)
    if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):
        with open(path, mode, **open_options) as file:
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


@contextlib.contextmanager
def opened(path):
    """Standard output, or a file that appears whole under its name when all is written."""
    if path is None:
        if sys.stdout is None:
            raise Problem("standard output is closed; give --output FILE")
        yield sys.stdout
        sys.stdout.flush()
        return
    text = {"encoding": "utf-8", "errors": "backslashreplace", "newline": ""}
    try:
        with replacing(path, "w", **text) as out:
            yield out
    except OSError as error:
        raise Problem(f"cannot write {path}: {error.strerror or error}") from None


# ------------------------------------------------------------------------------------------------------ benchmark


def benchmark(path, threads, provider):
    """Time a model file on this machine. -> dict of figures. Raises Problem.

    import: numpy, Pillow and the engine, Python's own start left out; latency: of one image, on all threads;
    images_per_second: without decoding, each thread running batches of its own, as step 3 does.
    """
    from concurrent.futures import ThreadPoolExecutor

    clock, started = time.perf_counter, time.perf_counter()
    with contextlib.suppress(ImportError):
        __import__("onnxruntime" if path.lower().endswith(".onnx") else "torch")
    imported, model = clock(), Model(path, threads, provider)
    loaded, spec, rng = clock(), model.spec, np.random.default_rng(0)
    inputs = rng.standard_normal((64, spec["channels"]), dtype=np.float32)
    if spec["task"] != "regression":
        inputs = rng.integers(0, 256, (64, *spec["image_size"], spec["channels"]), dtype=np.uint8)
    ticks = [clock()]
    while len(ticks) < 52 or (ticks[-1] - ticks[0] < 3 and len(ticks) < 5000):
        model.predict(inputs[:1])
        ticks.append(clock())
    first, *milliseconds = (np.diff(ticks) * 1000).tolist()
    quantiles, memory, rates = np.percentile(milliseconds, (50, 95, 99)), peak_memory(), {}
    model = Model(path, 1, provider)
    with ThreadPoolExecutor(threads) as pool:
        for batch in (1, 2, 4, 8, 16, 32, 64):
            work, start, done = [inputs[:batch]] * threads * (64 // batch), clock(), 0
            while clock() - start < 0.5:
                done += sum(map(len, pool.map(model.predict, work)))
            rates[done / (clock() - start)] = batch
    return {
        "model": path,
        "threads": threads,
        "import_seconds": round(IMPORT_SECONDS + imported - started, 4),
        "load_seconds": round(loaded - imported, 4),
        "first_run_ms": round(first, 3),
        **{f"latency_p{q}_ms": round(value, 3) for q, value in zip((50, 95, 99), quantiles, strict=True)},
        "images_per_second": round(max(rates), 1),
        "batch_size": rates[max(rates)],
        "peak_memory_mb": memory,
    }


def peak_memory():
    """The most memory this process held so far, in MB (2**20 bytes), or None where the system does not say."""
    try:
        with open("/proc/self/status", encoding="utf-8", errors="replace") as file:
            return round(int(file.read().split("VmHWM:")[1].split()[0]) / 1024, 1)
    except (OSError, IndexError):
        return None


# ------------------------------------------------------------------------------------------------------------ CLI


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line and whose help shows the defaults that say something."""

    class Help(argparse.ArgumentDefaultsHelpFormatter):
        def __init__(self, prog, **settings):
            super().__init__(prog, width=78, **settings)  # asking the terminal imports shutil, lzma and more

        def _get_help_string(self, action):
            silent = action.default is None or action.default is False
            return action.help if silent else super()._get_help_string(action)

    def __init__(self, **settings):
        super().__init__(formatter_class=Parser.Help, **settings)

    def error(self, message):
        self.exit(2, f"error: {printable(message)} (--help shows all options)\n")


def number(kind, low, high=float("inf"), above=False):
    """An argparse type: a finite number (kind: int or float) from `low` (or above it) to `high`."""

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = None
        in_range = value is not None and (low < value <= high or (value == low and not above))
        if not in_range or value == float("inf"):
            wanted = "a whole number" if kind is int else "a number"
            limit = f"{'above' if above else 'from'} {low}" + (f" to {high}" if high != float("inf") else "")
            raise argparse.ArgumentTypeError(f"{text!r} is not {wanted} {limit}")
        return value

    return parse


def build_parser():
    count = number(int, 1, 999_999)
    parser = Parser(
        description="Predict from a file that step2_export.py made.",
        epilog="example: python step3_infer.py --model model.onnx --top-k 3 photos/",
    )
    parser.add_argument(
        "paths", nargs="*", metavar="PATH", help="images, directories (recursively), globs, - for stdin"
    )
    parser.add_argument(
        "--values", action="append", metavar="X,X,...", help="a row of features, for a regression"
    )
    add = parser.add_argument_group("model").add_argument
    add(
        "--model",
        metavar="FILE",
        help=".onnx, .pt or .pt2 (default: beside this script, else the newest export)",
    )
    add("--threads", type=count, metavar="N", help="CPU threads (default: as many as this process may use)")
    add(
        "--provider",
        default="cpu",
        metavar="NAME",
        help="onnxruntime's provider or torch's device: cpu, cuda, ...",
    )
    add("--batch-size", type=count, default=16, metavar="N", help="images run at once, where sizes agree")
    add = parser.add_argument_group("results").add_argument
    add("--format", choices=("text", "json", "csv"), default="text", help="json is one object a line")
    add("--top-k", type=count, default=3, metavar="K", help="classes to name, best first")
    add("--output", metavar="FILE", help="write there, whole or not at all (default: standard output)")
    add(
        "--annotate",
        metavar="DIR",
        help="also write each image there with its answer drawn below, as new PNG files",
    )
    add = parser.add_argument_group("instead of predicting").add_mutually_exclusive_group().add_argument
    add("--self-test", action="store_true", help="run the golden samples inside the file and compare")
    add("--benchmark", action="store_true", help="time the file on this machine, as text or --format json")
    add(
        "--verify",
        action="store_true",
        help="compare all files with SHA256SUMS beside the model or this script",
    )
    return parser


def say(message):
    """One line on standard error, if there is one."""
    if sys.stderr is not None:
        print(printable(message), file=sys.stderr)


def guarded(work, *args, closed_pipe=1):
    """Do work(*args), which returns an exit code; a failure that its user can mend is one line. -> the exit code.

    closed_pipe: the exit code where standard output is a pipe that nobody reads on from.
    """
    warnings.filterwarnings("ignore", module=r"PIL\.")  # decode_image says what matters
    logging.getLogger("PIL").addHandler(logging.NullHandler())  # or Python prints what Pillow logs
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    if sys.stderr is None:  # closed; progress bars and engines write to it all the same
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    try:
        code = work(*args)
        if sys.stdout is not None:
            sys.stdout.flush()
        return code
    except Problem as problem:
        say(f"error: {problem}")
        return problem.code
    except KeyboardInterrupt:
        say("interrupted")
        return 130
    except BrokenPipeError:  # `| head`
        if closed_pipe:
            say("error: nobody reads standard output any more: stopped")
        return closed_pipe
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "memory" not in str(error).lower():
            raise
        say(f"error: not enough memory: {str(error).splitlines()[0] if str(error) else 'give it less'}")
        return 1
    except OSError as error:
        if error.filename is not None:  # not standard output, and not foreseen: a bug
            raise
        say(f"error: cannot write to standard output: {error.strerror}")
        return 1
    finally:
        discard_output_if_broken()


def discard_output_if_broken():
    """Python flushes standard output once more at its end: what cannot be written by now goes nowhere."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def run(args):
    """The work of main; returns the exit code, raises Problem."""
    if args.verify:
        return verify(os.path.dirname(os.path.abspath(args.model or __file__)))
    path = args.model or find_model()
    if args.model is None:
        say(f"model: {path}")
    warn_of_code(path)
    threads = args.threads or usable_cpus()
    if args.benchmark:
        return write_benchmark(path, threads, args)
    found = find_images(args.paths)
    first = list(itertools.islice(found, threads * args.batch_size))
    workers = max(1, min(threads, len(first)))
    model = Model(path, max(1, threads // workers), args.provider, once=len(first) == 1)
    if args.self_test:
        count, difference, passed = self_test(model)
        print(
            f"self-test {'passed' if passed else 'FAILED'}: {count} golden samples, max difference {difference:.1e}"
        )
        return 0 if passed else 1
    if (model.spec["task"] == "regression") != bool(args.values):
        wanted = (
            "numbers: give --values"
            if model.spec["task"] == "regression"
            else "images: give at least one PATH"
        )
        raise Problem(f"{path} predicts from {wanted}", 2)
    with opened(args.output) as out:
        if args.values:
            return write_values(model, args, out)
        top_k = min(args.top_k, len(model.spec["classes"]))
        batch_size = max(1, min(args.batch_size, len(first) // workers))
        found = itertools.chain(first, found)
        results = predict_files(model, found, workers, batch_size, top_k, keep=args.annotate is not None)
        with contextlib.closing(results):
            return write_images(results, args, top_k, out)


def write_images(results, args, top_k, out):
    """Write what predict_files yields to `out`, and the images for --annotate; returns the exit code."""
    write, progress, count, failures = writer(out, args.format, top_k), Progress(args.output), 0, 0
    if args.annotate is not None:
        try:
            os.makedirs(args.annotate, exist_ok=True)
        except OSError as error:
            raise Problem(f"cannot make {args.annotate}: {error.strerror}") from None
    try:
        for chunk in results:
            for path, pixels, result in chunk:
                top, error = (None, str(result)) if isinstance(result, Problem) else (result, None)
                if error is not None:
                    failures += 1
                    progress.clear()
                    say(f"error: {path}: {error}")
                elif pixels is not None:
                    try:
                        annotate(pixels, top, path, args.annotate)
                    except OSError as error:
                        raise Problem(
                            f"cannot write into {args.annotate}: {error.strerror or error}"
                        ) from None
                write(path, top, error)
            out.flush()
            count += len(chunk)
            progress.show(count)
    finally:
        progress.clear()
    return 1 if failures else 0


def write_values(model, args, out):
    """Predict from the numbers of --values and write the results to `out`; returns 0, or raises Problem."""
    rows = []
    for text in args.values:
        try:
            rows.append(parse_values(text, model.spec["channels"]))
        except Problem as problem:
            raise Problem(f"--values {text} {problem}", 2) from None
    if args.format == "csv":
        out.write("values,prediction\n")
    for text, row, output in zip(args.values, rows, model.predict(np.stack(rows)), strict=True):
        prediction = float(output[0])
        if args.format == "json":
            out.write(json.dumps({"values": row.tolist(), "prediction": prediction}) + "\n")
        elif args.format == "csv":
            cell = csv_cell(text).replace('"', '""')
            out.write(f'"{cell}",{prediction!r}\n')
        else:
            out.write(f"{text}  {prediction:.6g}\n")
    return 0


def write_benchmark(path, threads, args):
    """Time the file and write the figures; returns 0, or raises Problem."""
    if args.format == "csv":
        raise Problem("--benchmark has no --format csv, only text and json", 2)
    figures = benchmark(path, threads, args.provider)
    with opened(args.output) as out:
        if args.format == "json":
            out.write(json.dumps(figures) + "\n")
        else:
            out.write("".join(f"{name:18}  {printable(str(value))}\n" for name, value in figures.items()))
    return 0


def main(argv=None):
    parser = build_parser()
    args = parser.parse_args(argv)
    if not (args.paths or args.values or args.self_test or args.benchmark or args.verify):
        parser.error("give at least one PATH: an image, a directory or a glob; or --values for a regression")
    if args.paths and args.values:
        parser.error("give either PATHs or --values")
    return guarded(run, args, closed_pipe=0)


if __name__ == "__main__":
    if INTERRUPTIBLE:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    code = main()
    if INTERRUPTIBLE:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # pressed again while the threads end
    sys.exit(code)
