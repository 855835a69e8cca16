"""The deployment bundle: one folder, and a zip archive of it, with everything that an edge machine needs.

Two bundles of the same run are equal to the last byte, dates and modes included.
"""

import contextlib
import errno
import json
import os
import re
import shutil
import string
import zipfile
from pathlib import Path

import numpy as np

from deploy import archive
from deploy.samples import calibration_images, write_samples
from inference.command_line import printable, say
from inference.files import replacing, sha256

HERE = os.path.dirname(os.path.abspath(__file__))
EXCLUDED = shutil.ignore_patterns("__pycache__", "build*", ".*", "ort", "*.onnx")  # of one machine only
NUMPY, PILLOW = "1.26", "10.3"  # the oldest, as in the project's own requirements
TIMINGS = ("speedup", "warning", "tried", "latency_ms", "latency_spread")  # differ between exports
TAKEN = (errno.ENOTEMPTY, errno.EEXIST, errno.EACCES)  # the last: Windows, of a directory that exists
INDEX = '<!doctype html><title>The page is in web/</title><meta http-equiv="refresh" content="0; url=web/">\n'


def publish(
    out: str, workspace: str, parity: dict, onnxruntime: str, spec: dict, dataset, expected, card: str
) -> str:
    """Write out/<name>-bundle.zip and out/bundle/, each whole or not at all, and return the archive's path.

    workspace: a directory in the same file system, with the exported files. parity: the contents of
    parity.json for them; onnxruntime: the oldest version that runs them; spec: what they contain; expected:
    the network's outputs on the test split; card: the text of MODEL_CARD.md. Raises OSError.
    """
    folder, path = os.path.join(workspace, "bundle"), archive_path(out)
    os.makedirs(os.path.join(folder, "samples"))
    models = [os.path.join(workspace, figures["file"]) for figures in parity.values()]
    for file in (*models, os.path.join(HERE, "ENGINES.md")):
        shutil.copyfile(file, os.path.join(folder, os.path.basename(file)))
    archive.write_program(folder)
    for name in ("cpp", "web"):
        shutil.copytree(os.path.join(HERE, name), os.path.join(folder, name), ignore=EXCLUDED)
    write_samples(folder, spec["classes"], dataset, expected)
    if any(name.endswith("-fixed") for name in parity):
        np.save(os.path.join(folder, "calibration.npy"), calibration_images(spec, dataset))
    timeless = {name: {k: v for k, v in row.items() if k not in TIMINGS} for name, row in parity.items()}
    texts = {
        "requirements.txt": f"onnxruntime>={onnxruntime}\nnumpy>={NUMPY}\nPillow>={PILLOW}\n",
        "MODEL_CARD.md": card,
        "README.md": readme(spec, os.listdir(folder)),
        "index.html": INDEX,
        "parity.json": json.dumps(timeless, indent=2, allow_nan=False) + "\n",
    }
    for name, text in texts.items():
        Path(folder, name).write_bytes(text.encode())
    sums = [f"{sha256(os.path.join(folder, name))}  {name}\n" for name in contents(folder)]
    Path(folder, "SHA256SUMS").write_bytes("".join(sums).encode())
    for name in contents(folder):  # whatever the umask and the clone say
        os.chmod(os.path.join(folder, name), mode(name))
    write_archive(folder, path)
    swap_in(folder, os.path.join(out, "bundle"), os.path.join(workspace, "earlier"))
    return path


def readme(spec: dict, names: list[str]) -> str:
    """The README.md of a bundle: how to run it, and what each file is. names: of its files, so far."""
    inputs, cpp = "--top-k 3 samples/", filled("bundle.cpp.md.template").rstrip()
    if spec["task"] == "regression":
        inputs = "--values " + ",".join(["0.5"] * spec["channels"])
        cpp = "The C++ program is for image classifiers only."
    title = f"{markdown(spec['model'])}, trained on {markdown(spec['dataset'])}"
    text = filled("bundle.md.template", title=title, inputs=inputs, cpp=cpp)
    row = r"\| `((?:model|calibration)\.[^`]+)` \|.*\n"  # of a file that not every bundle has
    return re.sub(row, lambda found: found[0] if found[1] in names else "", text)


def filled(template: str, **values: object) -> str:
    """The text of a template in this directory."""
    return string.Template(Path(HERE, template).read_text(encoding="utf-8")).substitute(values)


def markdown(text: object) -> str:
    """Untrusted text with the characters escaped that mean something to Markdown."""
    return re.sub(r"([\\`*_{}\[\]<>()#|~!&$])", r"\\\1", printable(str(text)))


def archive_path(out: str) -> str:
    return os.path.join(out, f"{os.path.basename(os.path.abspath(out))}-bundle.zip")


def remove(out: str) -> None:
    shutil.rmtree(os.path.join(out, "bundle"), ignore_errors=True)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(archive_path(out))


def earlier_parity(out: str, checkpoint_sha256: str, formats: dict) -> dict:
    """What parity.json says of files of this checkpoint, by format; those of another are removed."""
    try:
        parity = json.loads(Path(out, "parity.json").read_text(encoding="utf-8"))
        parity = {k: v for k, v in parity.items() if k in formats and isinstance(v, dict)}
    except (FileNotFoundError, ValueError, AttributeError):
        return {}
    stale = [name for name in parity if parity[name].get("checkpoint_sha256") != checkpoint_sha256]
    for name in stale:
        Path(out, formats[name].file).unlink(missing_ok=True)
        del parity[name]
    if stale:
        remove(out)
        say(f"note: {out} held an export of another checkpoint, which is removed: {', '.join(stale)}")
    return parity


def mode(name):
    return 0o755 if name.endswith(".sh") else 0o644


def contents(folder: str) -> list[str]:
    """The paths of all files below `folder`, relative to it, with slashes, in the same order everywhere."""
    return sorted(path.relative_to(folder).as_posix() for path in Path(folder).rglob("*") if path.is_file())


def write_archive(folder, path):
    """Write the zip archive of a folder, its files below a directory named like the archive."""
    top = os.path.basename(path).removesuffix(".zip")
    with replacing(path) as file, zipfile.ZipFile(file, "w") as archive:
        for name in contents(folder):
            entry = zipfile.ZipInfo(f"{top}/{name}", date_time=(1980, 1, 1, 0, 0, 0))  # zip's oldest
            entry.create_system = 3  # Unix: the modes count
            entry.external_attr = (0o100000 | mode(name)) << 16
            archive.writestr(entry, Path(folder, name).read_bytes(), zipfile.ZIP_DEFLATED)


def swap_in(new: str, final: str, aside: str) -> None:
    """Replace the directory `final` by `new` as a whole, after moving it to `aside`. Raises OSError.

    Of two processes that do so at once, the later one's stays.
    """
    for attempt in range(100):
        with contextlib.suppress(FileNotFoundError):
            os.replace(final, f"{aside}-{attempt}")
        try:
            return os.replace(new, final)
        except OSError as error:  # another process has put its own there since: try again
            if error.errno not in TAKEN or attempt == 99:
                raise
