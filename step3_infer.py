#!/usr/bin/env python3
"""Step 3 of 3: predict from an exported file. This script and that file are all a machine needs.

    python step3_infer.py image.png                        # the newest export, or a model beside this script
    python step3_infer.py --model model.onnx photos/ 'more/*.jpg'
    python step3_infer.py --format json --top-k 5 photos/ > predictions.jsonl
    python step3_infer.py --values 0.1,0.2,0.3,0.4,0.5     # a regression; once for each row
    python step3_infer.py --self-test                      # does this machine compute what the training machine did?

Needs numpy and Pillow, and onnxruntime for .onnx or torch for .pt. Resizing, normalising and softmax are inside the
file; so are the class names, in the `spec`. Exit codes: 0 done, 1 some input could not be used, 2 usage.
"""

import argparse
import base64
import contextlib
import csv
import glob
import io
import json
import os
import stat
import sys
import tempfile
import warnings

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

SCHEMA = 1  # the newest spec this script understands
IMAGE_SUFFIXES = tuple(".png .jpg .jpeg .webp .bmp .gif .tif .tiff .pgm .ppm .pbm .avif .jp2".split(" "))
MODEL_NAMES = ("model.onnx", "model.pt")  # in this order where several lie together
WINDOW_BYTES = 64 << 20  # decoded pixels held at once, unless a single image is larger
SELF_TEST_TOLERANCE = 1e-4  # float32 engines differ by about 1e-6


class Problem(Exception):
    """A failure its user can mend: shown as one `error:` line, without a traceback."""

    def __init__(self, message, code=1):
        super().__init__(message)
        self.code = code


# --------------------------------------------------------------------------------------------------------- images


def decode_image(source, channels):
    """Decode one image file to uint8 [height, width, channels]; channels is 1 (grey) or 3 (RGB).

    source: a path or a binary file object. EXIF orientation is applied, of an animation the first frame is taken,
    16-bit greys are scaled to 8 bits, and palette, CMYK and alpha go through Pillow's convert("RGB" or "L").
    Raises Problem with the reason (the caller knows the name).
    """
    try:
        if not hasattr(source, "read") and not stat.S_ISREG(os.stat(source).st_mode):
            raise Problem("is not a regular file")
        with Image.open(source) as image:
            if image.mode == "F":
                raise Problem("has 32-bit float pixels, which have no fixed white: save it with 8 or 16 bits")
            ImageOps.exif_transpose(image, in_place=True)
            if image.mode.startswith("I"):  # I;16 and its byte orders, or I where Pillow widened them
                image = scale_to_8_bits(image)
            mode = "L" if channels == 1 else "RGB"
            pixels = np.asarray(image if image.mode == mode else image.convert(mode))
    except UnidentifiedImageError:
        empty = not hasattr(source, "read") and os.path.getsize(source) == 0
        raise Problem("is empty" if empty else "is not an image that Pillow knows") from None
    except FileNotFoundError:
        raise Problem("no such file") from None
    except Image.DecompressionBombError as error:
        raise Problem(f"refused as a decompression bomb: {error}") from None
    except MemoryError:
        raise Problem("is too large for this machine's memory") from None
    except OSError as error:
        raise Problem(f"cannot be read: {error.strerror or error}") from None
    except Problem:
        raise
    except Exception as error:  # Pillow's plugins raise anything at all on broken files
        raise Problem(f"is corrupt: {error}") from None
    return pixels.reshape(*pixels.shape[:2], channels)


def scale_to_8_bits(image):
    """A 16-bit (or 32-bit, if its values fit 16) grey image -> mode L, 65535 becoming 255."""
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise Problem("has integer pixels of more than 16 bits: save it with 8 or 16 bits")
    return Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))


def find_images(paths):
    """Yield (path, Problem or None): files as given, directories walked recursively in name order, globs expanded."""
    for path in paths:
        if not os.path.lexists(path) and glob.has_magic(path):
            # "**" matches directories beside the files in them; a glob of directories alone walks these.
            matches = sorted(glob.glob(path, recursive=True))
            files = [match for match in matches if not os.path.isdir(match)]
            if not matches:
                yield path, Problem("matches no file")
            yield from find_images(files or matches)
        elif os.path.isdir(path):
            found = False
            for directory, subdirectories, files in os.walk(path):
                subdirectories.sort()
                for name in sorted(files):
                    if name.lower().endswith(IMAGE_SUFFIXES):
                        found = True
                        yield os.path.join(directory, name), None
            if not found:
                yield path, Problem(f"no images in this directory (looked for {' '.join(IMAGE_SUFFIXES)})")
        else:
            yield path, None


# ---------------------------------------------------------------------------------------------------------- model


class Model:
    """An exported file, ready to run.

    spec: what the file says of itself (classes, channels, image_size, provenance). Raises Problem when the file
    cannot be loaded or was not made by step2_export.py.
    """

    def __init__(self, path, threads=None, provider="cpu"):
        load = {".onnx": load_onnx, ".pt": load_torchscript}.get(os.path.splitext(path)[1].lower())
        if not os.path.isfile(path):
            raise Problem(f"no model file {path}; python step2_export.py makes one")
        if load is None:
            raise Problem(f"{path} is not a model this script knows: it takes .onnx and .pt files of step2_export.py")
        threads = (
            min(threads, 1024)
            if threads
            else len(os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count()))
        )
        text, self._run = load(path, threads, provider)
        self.spec = read_spec(text, path)

    def predict(self, inputs):
        """uint8 images [batch, height, width, channels] of any one size -> float32 probabilities [batch, classes].

        For regression: float32 features [batch, n] -> float32 predictions [batch, 1]. Raises Problem.
        """
        try:
            outputs = self._run(inputs)
        except Exception as error:  # the engines' exceptions have no common base but this
            reason = " ".join(str(error).split())
            shape = "x".join(map(str, inputs.shape))
            raise Problem(f"the model cannot run on {shape} input, its spec is wrong perhaps: {reason}") from None
        if outputs.shape != (len(inputs), len(self.spec["classes"])):
            raise Problem(f"the file's spec is wrong: {len(self.spec['classes'])} classes, outputs {outputs.shape}")
        return outputs


def load_onnx(path, threads, provider):
    """-> (spec text or None, function from input array to float32 array), run by onnxruntime."""
    try:
        import onnxruntime
    except ImportError as error:
        raise Problem(f"{path} needs onnxruntime: pip install onnxruntime ({error})") from None
    available = {name.removesuffix("ExecutionProvider").lower(): name for name in onnxruntime.get_available_providers()}
    if provider.lower() not in available:
        raise Problem(f"this onnxruntime has no provider {provider!r}; it has {', '.join(available)}", 2)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4  # failures come as exceptions
    try:
        session = onnxruntime.InferenceSession(path, options, providers=[available[provider.lower()]])
    except Exception as error:  # onnxruntime's exceptions have no common base but this
        reason = " ".join(str(error).split())
        raise Problem(
            f"{path} is not an ONNX file that onnxruntime {onnxruntime.__version__} can run: {reason}"
        ) from None
    text = session.get_modelmeta().custom_metadata_map.get("spec")
    name = session.get_inputs()[0].name if session.get_inputs() else None
    return text, lambda inputs: session.run(None, {name: inputs})[0]


def load_torchscript(path, threads, provider):
    """-> (spec text or None, function from input array to float32 array), run by torch."""
    try:
        import torch
    except ImportError:
        raise Problem(f"{path} needs torch: pip install torch (or use the .onnx file, which does not)") from None
    try:
        torch.zeros(1, device=provider)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise Problem(
            f"torch cannot use --provider {provider} here ({str(error).splitlines()[0]}); cpu it can", 2
        ) from None
    torch.set_num_threads(threads)
    extra = {"spec.json": ""}
    try:
        with warnings.catch_warnings():  # torch calls TorchScript deprecated; LibTorch has nothing better yet
            warnings.filterwarnings("ignore", r"`torch\.jit\.", FutureWarning)
            module = torch.jit.load(path, map_location=provider, _extra_files=extra).eval()
    except RuntimeError as error:
        reason = str(error).split("\n")[0]
        hint = "a training checkpoint is exported by step2_export.py first"
        raise Problem(
            f"{path} is not a TorchScript file that torch {torch.__version__} can run ({hint}): {reason}"
        ) from None

    def run(inputs):
        with torch.inference_mode():
            return module(torch.from_numpy(inputs).to(provider)).cpu().numpy()

    return extra["spec.json"], run


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
    except (ValueError, KeyError, TypeError) as error:
        raise Problem(f"{path} has a malformed spec: {error!r}") from None
    return spec


def find_model():
    """The model beside this script, else the newest export under exports/. Raises Problem where there is none."""
    here = os.path.dirname(os.path.abspath(__file__))
    beside = [os.path.join(here, name) for name in MODEL_NAMES if os.path.isfile(os.path.join(here, name))]
    if beside:
        return beside[0]
    exports = glob.glob(os.path.join("exports", "*", "model.*"))
    exports = [path for path in exports if os.path.basename(path) in MODEL_NAMES]
    if not exports:
        raise Problem("no model found beside this script or under exports/; give --model, or run step2_export.py", 2)
    newest = os.path.dirname(max(exports, key=os.path.getmtime))
    return next(path for name in MODEL_NAMES if (path := os.path.join(newest, name)) in exports)


def self_test(model):
    """Run the golden samples inside the file. -> (count, max absolute difference from what the network said)."""
    golden, difference = model.spec.get("golden"), 0.0
    if not golden:
        raise Problem("this file carries no golden samples to test with")
    try:
        for sample in golden:
            if model.spec["task"] == "regression":
                inputs, expected = np.array([sample["features"]], np.float32), np.array(sample["prediction"], float)
            else:
                image = decode_image(io.BytesIO(base64.b64decode(sample["image"])), model.spec["channels"])
                inputs, expected = np.stack([image]), np.array(sample["probabilities"], float)
            outputs = model.predict(inputs)[0]
            if outputs.shape != expected.shape:
                raise ValueError(f"{expected.shape} outputs expected, {outputs.shape} came")
            worst = (np.abs(outputs - expected) / np.maximum(1, np.abs(expected))).max()
            difference = float(np.maximum(difference, worst))  # which keeps NaN, as max() does not
    except (ValueError, KeyError, TypeError, Problem) as error:
        raise Problem(f"this file's golden samples are malformed: {error!r}") from None
    return len(golden), difference


# ---------------------------------------------------------------------------------------------------- predictions


def predict_files(model, paths, batch_size):
    """Yield (path, probabilities [classes] or Problem) for every image in `paths`, in order.

    Images are decoded into a window of at most `batch_size` images and about 64 MB; those of one size in it run as
    one batch.
    """
    window, held = [], 0
    for path, problem in find_images(paths):
        try:
            item = problem or decode_image(path, model.spec["channels"])
        except Problem as error:
            item = error
        window.append((path, item))
        held += getattr(item, "nbytes", 0)
        if len(window) == batch_size or held > WINDOW_BYTES:
            yield from predict_window(model, window)
            window, held = [], 0
    yield from predict_window(model, window)


def parse_values(text, count):
    """'0.1,0.2,...' -> float32 [count]. Raises Problem."""
    try:
        values = np.array([float(value) for value in text.split(",")], np.float32)
    except ValueError:
        raise Problem("is not a list of numbers such as 0.1,0.2", 2) from None
    if len(values) != count:
        raise Problem(f"has {len(values)} values, this model takes {count}", 2)
    return values


def predict_window(model, window):
    """Run the images of one window, a batch for each size among them; yield (path, result) in the window's order."""
    results = [item for _, item in window]
    shapes = {}
    for index, item in enumerate(results):
        if isinstance(item, np.ndarray):
            shapes.setdefault(item.shape, []).append(index)
    for indices in shapes.values():
        batch = np.stack([results[index] for index in indices])
        for index, probabilities in zip(indices, model.predict(batch), strict=True):
            results[index] = probabilities
    for (path, _), result in zip(window, results, strict=True):
        yield path, result


def printable(text):
    """Text from strangers (paths, class names) with control characters and line breaks escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in text)


def writer(out, form, top_k):
    """-> function(path, top, error) that writes one result to `out`; top: [(label, probability)], best first."""
    if form == "json":

        def write(path, top, error):
            record = {"path": path, "error": error}
            if error is None:
                top = [{"label": label, "probability": probability} for label, probability in top]
                record = {"path": path, **top[0], "top": top}
            out.write(json.dumps(record) + "\n")

    elif form == "csv":
        rows = csv.writer(out, lineterminator="\n")
        more = [f"{name}_{k}" for k in range(2, top_k + 1) for name in ("label", "probability")]
        rows.writerow(["path", "error", "label", "probability", *more])

        def write(path, top, error):
            rows.writerow([path, error or "", *(value for pair in top or () for value in pair)])

    else:

        def write(path, top, error):
            if error is None:
                ranked = "  ".join(f"{printable(label)} {probability:.2%}" for label, probability in top)
                out.write(f"{printable(path)}  {ranked}\n")

    return write


@contextlib.contextmanager
def opened(path):
    """Standard output, or a file that appears whole under its name when all is written."""
    if path is None:
        if sys.stdout is None:
            raise Problem("standard output is closed; give --output FILE")
        yield sys.stdout
        sys.stdout.flush()
        return
    path = os.path.realpath(path)
    if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):  # a device or a named pipe
        with open(path, "w", encoding="utf-8", errors="backslashreplace", newline="") as out:
            yield out
        return
    try:
        handle, temporary = tempfile.mkstemp(dir=os.path.dirname(path) or ".", prefix=".step3-")
    except OSError as error:
        raise Problem(f"cannot write {path}: {error.strerror}") from None
    try:
        with open(handle, "w", encoding="utf-8", errors="backslashreplace", newline="") as out:
            yield out
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except OSError as error:
        os.unlink(temporary)
        raise Problem(f"cannot write {path}: {error.strerror}") from None
    except BaseException:
        os.unlink(temporary)
        raise


# ------------------------------------------------------------------------------------------------------------ CLI


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line and whose help shows the defaults that say something."""

    class Help(argparse.ArgumentDefaultsHelpFormatter):
        def _get_help_string(self, action):
            return (
                action.help if action.default is None or action.default is False else super()._get_help_string(action)
            )

    def __init__(self, **settings):
        super().__init__(formatter_class=Parser.Help, **settings)

    def error(self, message):
        self.exit(2, f"error: {message} (--help shows all options)\n")


def positive(text):
    """An argument that counts something."""
    if not text.isdecimal() or len(text) > 6 or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 to 999999")
    return int(text)


def build_parser():
    parser = Parser(
        description="Predict from a file that step2_export.py made.",
        epilog="example: python step3_infer.py --model model.onnx --top-k 3 photos/",
    )
    parser.add_argument("paths", nargs="*", metavar="PATH", help="image files, directories (recursively), globs")
    parser.add_argument("--values", action="append", metavar="X,X,...", help="a row of features, for a regression")
    add = parser.add_argument_group("model").add_argument
    add("--model", metavar="FILE", help=".onnx or .pt (default: beside this script, else the newest export)")
    add("--threads", type=positive, metavar="N", help="CPU threads (default: as many as this process may use)")
    add("--provider", default="cpu", metavar="NAME", help="onnxruntime's provider or torch's device: cpu, cuda, ...")
    add("--batch-size", type=positive, default=32, metavar="N", help="images run at once, where sizes agree")
    add = parser.add_argument_group("results").add_argument
    add("--format", choices=("text", "json", "csv"), default="text", help="json is one object a line")
    add("--top-k", type=positive, default=3, metavar="K", help="classes to name, best first")
    add("--output", metavar="FILE", help="write there, whole or not at all (default: standard output)")
    add("--self-test", action="store_true", help="run the golden samples inside the file and compare")
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
    path = args.model or find_model()
    if args.model is None:
        say(f"model: {path}")
    model = Model(path, args.threads, args.provider)
    if args.self_test:
        count, difference = self_test(model)
        passed = difference <= SELF_TEST_TOLERANCE
        print(f"self-test {'passed' if passed else 'FAILED'}: {count} golden samples, max difference {difference:.1e}")
        return 0 if passed else 1
    if (model.spec["task"] == "regression") != bool(args.values):
        wanted = "numbers: give --values" if model.spec["task"] == "regression" else "images: give at least one PATH"
        raise Problem(f"{path} predicts from {wanted}", 2)
    with opened(args.output) as out:
        failures = (write_values if args.values else write_images)(model, args, out)
    return 1 if failures else 0


def write_images(model, args, out):
    """Predict all images and write the results to `out`; returns how many could not be used."""
    classes, failures = model.spec["classes"], 0
    top_k = min(args.top_k, len(classes))
    write = writer(out, args.format, top_k)
    for source, result in predict_files(model, args.paths, args.batch_size):
        if isinstance(result, Problem):
            failures += 1
            say(f"error: {source}: {result}")
            write(source, None, str(result))
        else:
            best = np.argsort(-result, kind="stable")[:top_k]
            write(source, [(classes[i], round(float(result[i]), 6)) for i in best], None)
    return failures


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
            csv.writer(out, lineterminator="\n").writerow([text, prediction])
        else:
            out.write(f"{text}  {prediction:.6g}\n")
    return 0


def main(argv=None):
    parser = build_parser()
    args = parser.parse_args(argv)
    if not (args.paths or args.values or args.self_test):
        parser.error("give at least one PATH: an image, a directory or a glob; or --values for a regression")
    if args.paths and args.values:
        parser.error("give either PATHs or --values")
    return guarded(run, args, closed_pipe=0)


if __name__ == "__main__":
    sys.exit(main())
