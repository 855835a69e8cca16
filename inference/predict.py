"""What the answers are: Model runs an exported file, predict() answers for one image."""

import io
import itertools
import os
import sys
import threading
from collections.abc import Iterator

import numpy as np

from inference.cpus import usable_cpus
from inference.engines import LOADERS
from inference.errors import Problem, one_line, problems
from inference.images import Seen, decode_image, fit_to_input
from inference.limits import LARGE_PIXELS, MAX_PIXELS, TooLarge
from inference.spec import DECIMALS
from inference.task import task_of

MAX_THREADS = 1024
WINDOW_BYTES = 32 << 20  # decoded pixels that a thread holds, unless one image is larger
ONE_LARGE = threading.Lock()  # held while an image of more than LARGE_PIXELS is in memory
TOLERATED = 1e-3  # beyond 0..1, of a probability in float16 or int8


def model_in(directory: str) -> str:
    """What to do with a directory that was given as a model, in words."""
    for name in sorted(os.listdir(directory)):
        if os.path.splitext(name)[1].lower() in LOADERS:
            return f"give the file {os.path.join(directory, name)}"
    return "python step2_export.py writes a file"


class Model:
    """An exported file, ready to be run by several threads at once.

    spec: what the file says about itself, see inference.spec. reject: keep this share of familiar
    images (0.99), others are "unknown". min_probability: answers with less are "unsure". Both are
    the file's own at first and may be set; None for no threshold. promises: the file's own, with
    thresholds that count as well, see answer(). max_pixels: of an image file, and
    may be set, too. seen: counts what the decoded images held besides their pixels. batch: the only
    batch size that the file takes, None for any.
    """

    def __init__(self, path, threads: int | None = None, provider: str = "cpu", once: bool = False):
        """Load a file that step2_export.py wrote. Raises Problem.

        threads: of the runtime (default: as many as this process may use). provider: where the
        runtime computes. once: prefer a fast load over fast runs.
        """
        path = os.fspath(path)
        if os.path.isdir(path):
            raise Problem(f"no model file {path}: it is a directory; {model_in(path)}")
        if not os.path.isfile(path):
            raise Problem(f"no model file {path}; python step2_export.py writes one")

        load = LOADERS.get(os.path.splitext(path)[1].lower())
        if load is None:
            suffixes = ", ".join(LOADERS)
            raise Problem(f"{path} is not a model file: step2_export.py writes {suffixes}")

        threads = min(threads or usable_cpus(), MAX_THREADS)
        self.spec, self._run = load(path, threads, provider, once)
        self.reject = self.spec["reject"]
        self.min_probability = self.spec["min_probability"]
        self.promises = self.spec["promises"] or []
        self.max_pixels = MAX_PIXELS
        self.seen = Seen()
        self.batch = self.spec["fixed"]["batch"] if self.spec["fixed"] else None

    def predict(self, inputs: np.ndarray) -> np.ndarray:
        """Probabilities, float32 [batch, classes], of uint8 images [batch, H, W, channels].

        A regression takes float32 features [batch, n] and gives float32 [batch, 1]. Raises Problem.
        """
        return self.run(inputs)[0]

    def run(self, inputs: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """What predict() returns, and `known`, float32 [batch], or None if the file lacks it.

        `known` is the share of held-out images that look less familiar. Raises Problem.
        """
        size = len(inputs)
        if self.batch and size > self.batch:
            raise Problem(f"the model takes batches of {self.batch}, not of {size}")

        try:
            inputs = fit_to_input(inputs, self.spec)
            if self.batch:  # the runtime takes no smaller batch: fill it up with repeated images
                inputs = np.resize(inputs, (self.batch, *inputs.shape[1:]))
            outputs = [output[:size] for output in self._run(inputs)]
        except Exception as error:  # the runtimes' exceptions have no other base in common
            shape = "x".join(map(str, inputs.shape))
            raise Problem(
                f"the model cannot run on {shape} input, is its spec wrong? {one_line(error)}"
            ) from None

        return self._checked(outputs, size)

    def _checked(self, outputs: list, size: int) -> tuple[np.ndarray, np.ndarray | None]:
        """The outputs in the shapes that the spec promises. Raises Problem for others."""
        main = outputs[0]
        wanted = (size, len(self.spec["classes"]))
        if main.shape != wanted:
            raise Problem(
                f"the model's spec is wrong: it promises outputs {wanted}, not {main.shape}"
            )
        if not self.spec["known"]:
            return main, None

        if len(outputs) != 2 or outputs[1].shape != (size,):
            raise Problem("the model's spec is wrong: it promises an output `known`")
        return main, outputs[1]


# ---------------------------------------------------------------------------------------- one image
def predict(path_or_array, model: Model, top_k: int = 3) -> dict:
    """Predict one image: {"label", "probability", "known", "top"}. Raises Problem.

    path_or_array: a path, a binary file object, or uint8 [height, width, channels], grey also as
    [height, width]. label: the most probable class, or "unknown" or "unsure" below the model's
    thresholds, or another class where a promise says so. known: see Model.run. top: the `top_k`
    most probable labels, with probabilities.
    """
    if not task_of(model.spec).has_images:
        raise Problem("this model predicts from numbers: pass float32 [batch, n] to Model.predict")

    if isinstance(path_or_array, np.ndarray):
        image = check_array(path_or_array, model.spec["channels"])
    else:
        with problems(str(path_or_array), Problem, form="{} {}"):
            image = decode_for(model, path_or_array, model.max_pixels)

    result = predict_decoded(model, {0: np.ascontiguousarray(image)}, top_k)[0]
    if "error" in result:
        raise Problem(result["error"])
    return result


def decode_for(model: Model, source, max_pixels: int) -> np.ndarray:
    """Decode an image as the model takes it. Raises Problem, and TooLarge beyond max_pixels."""
    spec = model.spec
    return decode_image(
        source, spec["channels"], spec["white"], max_pixels, spec["ground"], model.seen
    )


def check_array(array: np.ndarray, channels: int) -> np.ndarray:
    """The array as an image [height, width, channels]. Raises Problem if it is none."""
    image = array[..., None] if array.ndim == 2 else array
    is_image = image.ndim == 3 and image.shape[2] == channels and image.size > 0
    if image.dtype != np.uint8 or not is_image:
        wanted = f"the model takes uint8 [height, width, {channels}]"
        raise Problem(f"the array is {image.dtype} {list(array.shape)}, but {wanted}")
    return image


def predict_decoded(model: Model, images: dict[int, np.ndarray], top_k: int) -> dict[int, dict]:
    """Predict uint8 images [height, width, channels] of any sizes; images of one size run together.

    Returns for each key what predict() returns, or {"error": why}.
    """
    if model.batch:  # images of mixed sizes fill the only batch size together
        images = {key: fit_to_input(image[None], model.spec)[0] for key, image in images.items()}

    keys_by_shape: dict[tuple, list[int]] = {}
    for key, image in images.items():
        keys_by_shape.setdefault(image.shape, []).append(key)

    results = {}
    for keys in keys_by_shape.values():
        results |= predict_same_size(model, {key: images[key] for key in keys}, top_k)
    return results


def predict_same_size(model: Model, images: dict[int, np.ndarray], top_k: int) -> dict[int, dict]:
    """predict_decoded() for images of one size."""
    pixels = list(images.values())
    batch = np.stack(pixels) if len(pixels) > 1 else pixels[0][None]  # [batch, H, W, channels]
    try:
        probabilities, known = model.run(batch)
    except Problem as problem:
        return {key: {"error": str(problem)} for key in images}

    order = np.argsort(-probabilities, axis=1, kind="stable")[:, :top_k]  # [batch, top_k]
    best = np.take_along_axis(probabilities, order, axis=1)
    best = best.astype(np.float64).round(DECIMALS)
    if known is not None:
        known = known.astype(np.float64).round(DECIMALS).tolist()

    results = {}
    for row, key in enumerate(images):
        share = None if known is None else known[row]
        fault = find_fault(probabilities[row], share)
        if fault:
            results[key] = {"error": f"the model computes {fault} for this image"}
            continue

        top = []
        for index, probability in zip(order[row].tolist(), best[row].tolist(), strict=True):
            top.append({"label": model.spec["classes"][index], "probability": probability})
        results[key] = answer(model, probabilities[row], top, share)
    return results


def find_fault(probabilities: np.ndarray, known: float | None) -> str | None:
    """What is wrong with the probabilities [classes] of an image, or its `known`, if anything."""
    if not np.isfinite(probabilities).all() or (known is not None and not np.isfinite(known)):
        return "NaN or infinity"
    if probabilities.min() < -TOLERATED or probabilities.max() > 1 + TOLERATED:
        return "probabilities outside 0..1"
    return None


def answer(model: Model, probabilities: np.ndarray, top: list[dict], known: float | None) -> dict:
    """One image's result, with its label by the model's thresholds.

    What is unfamiliar is "unknown". Else the first class with a promise of recall whose own
    probability reaches its threshold is the answer, and its probability is the result's. Else the
    most probable class is, or "unsure" below the largest threshold for that.
    """
    best = top[0]["probability"]
    result = {"label": top[0]["label"], "probability": best, "known": known, "top": top}
    if model.reject is not None and known < round(1 - model.reject, DECIMALS):
        return {**result, "label": "unknown"}

    least = model.min_probability or 0.0
    for promise in model.promises:
        if promise["kind"] == "accuracy":
            least = max(least, promise["threshold"])
            continue
        number = model.spec["classes"].index(promise["name"])
        probability = float(np.float64(probabilities[number]).round(DECIMALS))
        if probability >= promise["threshold"]:
            return {**result, "label": promise["name"], "probability": probability}

    if best < least:
        return {**result, "label": "unsure"}
    return result


# --------------------------------------------------------------------------------------- many files
def predict_files(
    model: Model, found: Iterator, workers: int, batch_size: int, top_k: int
) -> Iterator[list[dict]]:
    """Predict what find_images() yields, in its order, in several threads.

    Yields lists of rows: {"path": ..., and what predict() returns} or {"path": ..., "error": ...}.
    """
    from concurrent.futures import ThreadPoolExecutor  # imports logging, queue and more

    stop = threading.Event()
    running = []  # in order; no more than the workers need, so that memory holds few lists
    with ThreadPoolExecutor(workers) as pool:
        try:
            while chunk := list(itertools.islice(found, batch_size)):
                running.append(pool.submit(predict_chunk, model, chunk, top_k, stop))
                if len(running) > 2 * workers:
                    yield running.pop(0).result()
            while running:
                yield running.pop(0).result()
        finally:  # also after Ctrl-C, or if the caller wants no more
            stop.set()


def predict_chunk(model: Model, chunk: list, top_k: int, stop: threading.Event) -> list[dict]:
    """The work of one thread: rows for a list of (path, problem), or none once `stop` is set."""
    results: dict[int, dict] = {}
    waiting: dict[int, np.ndarray] = {}  # decoded images that have not run yet

    for number, (path, problem) in enumerate(chunk):
        if stop.is_set():
            return []

        try:
            if problem:
                raise problem
            if path == "-":
                waiting[number] = decode_for(model, standard_input(), model.max_pixels)
            else:
                waiting[number] = decode_for(model, path, min(LARGE_PIXELS, model.max_pixels))
        except TooLarge:
            results |= predict_large(model, number, path, top_k)
        except Problem as error:
            results[number] = {"error": str(error)}

        if sum(image.nbytes for image in waiting.values()) > WINDOW_BYTES:
            results |= predict_decoded(model, waiting, top_k)
            waiting = {}

    results |= predict_decoded(model, waiting, top_k)
    return [{"path": path, **results[number]} for number, (path, _) in enumerate(chunk)]


def predict_large(model: Model, number: int, path: str, top_k: int) -> dict[int, dict]:
    """Predict a large image by itself, while no other thread does, so that memory is bounded."""
    with ONE_LARGE:
        try:
            image = decode_for(model, path, model.max_pixels)
        except Problem as error:
            return {number: {"error": str(error)}}
        return predict_decoded(model, {number: image}, top_k)


def standard_input():
    """Standard input as a binary stream; an empty one if it is closed."""
    return getattr(sys.stdin, "buffer", io.BytesIO())
