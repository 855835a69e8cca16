"""The deployment bundle: one folder, and one archive of it, that an edge machine needs nothing beside.

The run alone decides every byte of both, dates and modes included: made again from the same run, they are the same.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import zipfile

from deploy.report import model_card

HERE = os.path.dirname(os.path.abspath(__file__))
DIRECTORIES = ("cpp", "web")  # of this folder, copied as they are
NOT_COPIED = ("__pycache__", "build*", ".*", "ort", "*.onnx")  # what lies there on one machine only
NUMPY, PILLOW = "1.26", "10.3"  # the oldest, as in the project's own requirements
TIMINGS = ("speedup", "tried", "latency_ms")  # figures that differ from time to time
SUMS = "SHA256SUMS"


def publish(out, place, models, parity, **facts):
    """Make out/bundle/ and out/<name>-bundle.zip in the directory `place`, and swap them in whole. -> the zip's path.

    models, parity and facts: see write_bundle. Raises OSError.
    """
    new, final, packed = os.path.join(place, "bundle"), os.path.join(out, "bundle"), archive_of(out)
    write_bundle(new, models=models, parity=parity, **facts)
    archive(new, f"{new}.zip", os.path.basename(packed).removesuffix(".zip"))
    os.replace(f"{new}.zip", packed)
    swap_in(new, final, os.path.join(place, "aside"))
    return packed


def archive_of(out):
    return os.path.join(out, f"{os.path.basename(os.path.abspath(out))}-bundle.zip")


def remove(out):
    """Take away what an earlier export put there."""
    shutil.rmtree(os.path.join(out, "bundle"), ignore_errors=True)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(archive_of(out))


def write_bundle(folder, *, models, script, onnxruntime, spec, parity, samples):
    """Fill `folder`, which does not exist yet. Raises OSError.

    models: paths of exported files; script: path of step3_infer.py; onnxruntime: the oldest version that runs them.
    spec: what the files carry, with `per_class` beside. parity: the contents of parity.json for these files. samples:
    (bytes of a PNG, or None for a regression; the answer as a line of step3's --format json, without its path).
    """
    os.makedirs(os.path.join(folder, "samples"))
    for path in (*models, script):
        shutil.copyfile(path, os.path.join(folder, os.path.basename(path)))
    for name in DIRECTORIES:
        if os.path.isdir(os.path.join(HERE, name)):
            ignored = shutil.ignore_patterns(*NOT_COPIED)
            shutil.copytree(os.path.join(HERE, name), os.path.join(folder, name), ignore=ignored)
    parity = {
        form: {key: figures[key] for key in figures if key not in TIMINGS} for form, figures in parity.items()
    }
    lines = []
    for index, (png, answer) in enumerate(samples):
        if png is not None:
            name = f"samples/{index:02}.png"
            write(folder, name, png)
            answer = {"path": name, **answer}
        lines.append(json.dumps(answer) + "\n")
    write(folder, "samples/expected.jsonl", "".join(lines))
    write(folder, "requirements.txt", f"onnxruntime>={onnxruntime}\nnumpy>={NUMPY}\nPillow>={PILLOW}\n")
    write(folder, "parity.json", json.dumps(parity, indent=2, allow_nan=False) + "\n")
    write(folder, "MODEL_CARD.md", model_card(spec, parity))
    sums = [f"{sha256(os.path.join(folder, name))}  {name}\n" for name in contents(folder)]
    write(folder, SUMS, "".join(sums))
    for name in contents(folder):  # whatever the umask and the clone say
        os.chmod(os.path.join(folder, name), mode(name))


def write(folder, name, content):
    """Write text or bytes to a file of the bundle."""
    with open(os.path.join(folder, name), "wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)


def mode(name):
    return 0o755 if name.endswith(".sh") else 0o644


def contents(folder):
    """The paths of all files below `folder`, relative to it, with slashes, in one order everywhere."""
    paths = [os.path.join(place, name) for place, _, names in os.walk(folder) for name in names]
    return sorted(os.path.relpath(path, folder).replace(os.sep, "/") for path in paths)


def sha256(path):
    """The SHA-256 of a file, in hexadecimal."""
    total = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(1 << 20):
            total.update(part)
    return total.hexdigest()


def archive(folder, path, top):
    """Write the zip archive `path` of a bundle, its files below the directory `top`. Raises OSError."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as target:
        for name in contents(folder):
            entry = zipfile.ZipInfo(f"{top}/{name}", date_time=(1980, 1, 1, 0, 0, 0))  # zip's oldest
            entry.create_system = 3  # Unix: the modes count
            entry.external_attr = (0o100000 | mode(name)) << 16
            entry.compress_type = zipfile.ZIP_DEFLATED
            with open(os.path.join(folder, name), "rb") as source:
                target.writestr(entry, source.read())


def swap_in(new, final, aside):
    """Put the directory `new` in the place of `final`, whole; what was there goes to `aside`. Raises OSError.

    Of two processes that do so at once, the later one's stays.
    """
    for attempt in range(100):
        with contextlib.suppress(FileNotFoundError):
            os.replace(final, f"{aside}-{attempt}")
        try:
            return os.replace(new, final)
        except OSError as error:  # where another process has put its own there since: once more
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST) or attempt == 99:
                raise
