"""The deployment bundle: one folder, and a zip archive of it, with all that an edge machine needs.

Two bundles of the same run are equal to the last byte, dates and modes included.
"""

import contextlib
import json
import os
import re
import shutil
import string
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from deploy import archive
from deploy.comparing import Outputs
from deploy.publish import BUNDLE, EARLIER, swap_in
from deploy.samples import calibration_images, write_samples
from inference.command_line import printable
from inference.files import replacing, sha256
from inference.spec import data_name
from inference.task import task_of
from inference.verify import SUMS

HERE = os.path.dirname(os.path.abspath(__file__))
# What belongs to one machine only.
EXCLUDED = shutil.ignore_patterns("__pycache__", "build*", ".*", "ort", "*.onnx")
ONNXRUNTIME = "1.24"  # it refuses weights outside a file; there is none for Python 3.10
NUMPY, PILLOW = "1.26", "10.3"  # the oldest, as in the project's own requirements
# Figures that differ between exports of the same run.
TIMINGS = ("speedup", "warning", "tried", "latency_ms", "latency_spread")
INDEX = (
    "<!doctype html><title>The page is in web/</title>"
    '<meta http-equiv="refresh" content="0; url=web/">\n'
)


@dataclass(frozen=True)
class Contents:
    """What goes into a bundle.

    models: paths of the exported files. parity: their entries of parity.json by format. spec: what
    they contain. onnxruntime: the oldest version that runs them. expected: the network's outputs on
    the test split of `dataset`. has_fixed: some are for compilers, which get images to calibrate
    with. card: the text of MODEL_CARD.md.
    """

    models: list[str]
    parity: dict[str, dict]
    spec: dict
    onnxruntime: str
    dataset: object
    expected: Outputs
    has_fixed: bool
    card: str


def write_bundle(out: str, workspace: str, contents: Contents) -> str:
    """Write out/<name>-bundle.zip and out/bundle/, each whole or not at all.

    workspace: an empty place in the same file system. Returns the archive's path. Raises OSError.
    """
    folder = os.path.join(workspace, BUNDLE)
    os.makedirs(os.path.join(folder, "samples"))
    copy_files(folder, contents.models)
    archive.write_program(folder)
    write_samples(folder, contents.spec["classes"], contents.dataset, contents.expected)
    if contents.has_fixed:
        images = calibration_images(contents.spec, contents.dataset)
        np.save(os.path.join(folder, "calibration.npy"), images)
    write_texts(folder, contents)
    write_sums(folder)  # after all other files: it lists them

    for name in files_below(folder):  # whatever the umask and the clone say
        os.chmod(os.path.join(folder, name), mode_of(name))
    path = archive_path(out)
    write_archive(folder, path)
    swap_in(folder, os.path.join(out, BUNDLE), os.path.join(workspace, EARLIER))
    return path


def copy_files(folder: str, models: list[str]) -> None:
    """Copy the models, the C++ program, the web page, and the notes on other engines."""
    for file in (*models, os.path.join(HERE, "ENGINES.md")):
        shutil.copyfile(file, os.path.join(folder, os.path.basename(file)))
    for name in ("cpp", "web"):
        shutil.copytree(os.path.join(HERE, name), os.path.join(folder, name), ignore=EXCLUDED)


def write_texts(folder: str, contents: Contents) -> None:
    """Write the texts of a bundle that holds all other files already."""
    # Without what a clock measured, so that two bundles of a run are equal.
    timeless = {}
    for name, figures in contents.parity.items():
        timeless[name] = {key: figure for key, figure in figures.items() if key not in TIMINGS}

    packages = (
        f"onnxruntime>={ONNXRUNTIME}; python_version >= '3.11'\n",
        f"onnxruntime>={contents.onnxruntime}; python_version < '3.11'\n",
        f"numpy>={NUMPY}\n",
        f"Pillow>={PILLOW}\n",
    )
    texts = {
        "requirements.txt": "".join(packages),
        "MODEL_CARD.md": contents.card,
        "README.md": readme(contents.spec, os.listdir(folder)),
        "index.html": INDEX,
        "parity.json": json.dumps(timeless, indent=2, allow_nan=False) + "\n",
    }
    for name, text in texts.items():
        Path(folder, name).write_bytes(text.encode())


def readme(spec: dict, names: list[str]) -> str:
    """The README.md of a bundle: how to run it, and what each file is.

    names: of the bundle's files, so far.
    """
    if task_of(spec).has_images:
        inputs = "--top-k 3 samples/"
        cpp = filled("bundle.cpp.md.template").rstrip()
    else:
        inputs = "--values " + ",".join(["0.5"] * spec["channels"])
        cpp = "The C++ program is for image classifiers only."
    title = f"{markdown(spec['model'])}, trained on {markdown(data_name(spec))}"
    micro = filled("bundle.micro.md.template") if "model_data.h" in names else ""
    text = filled("bundle.md.template", title=title, inputs=inputs, cpp=cpp, micro=micro)

    # Rows of files that not every bundle has.
    lines = []
    for line in text.splitlines(keepends=True):
        optional = re.match(r"\| `((?:model|model_data|calibration)\.[^`]+)` \|", line)
        if optional is None or optional[1] in names:
            lines.append(line)
    return "".join(lines)


def filled(template: str, **values: object) -> str:
    """The text of a template in this directory."""
    text = Path(HERE, template).read_text(encoding="utf-8")
    return string.Template(text).substitute(values)


def markdown(text: object) -> str:
    """Untrusted text with the characters escaped that mean something to Markdown."""
    return re.sub(r"([\\`*_{}\[\]<>()#|~!&$])", r"\\\1", printable(str(text)))


def write_sums(folder: str) -> None:
    """Write SHA256SUMS over all files that are there."""
    lines = [f"{sha256(os.path.join(folder, name))}  {name}\n" for name in files_below(folder)]
    Path(folder, SUMS).write_bytes("".join(lines).encode())


def archive_path(out: str) -> str:
    name = os.path.basename(os.path.abspath(out))
    return os.path.join(out, f"{name}-bundle.zip")


def remove_bundle(out: str) -> None:
    """Remove the folder and the archive of an earlier export."""
    shutil.rmtree(os.path.join(out, BUNDLE), ignore_errors=True)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(archive_path(out))


def mode_of(name: str) -> int:
    return archive.EXECUTABLE_MODE if name.endswith(".sh") else archive.FILE_MODE


def files_below(folder: str) -> list[str]:
    """The paths of all files below `folder`, relative to it, with slashes, sorted."""
    paths = [path for path in Path(folder).rglob("*") if path.is_file()]
    return sorted(path.relative_to(folder).as_posix() for path in paths)


def write_archive(folder: str, path: str) -> None:
    """Write the zip archive of a folder, its files below a directory named like the archive."""
    top = os.path.basename(path).removesuffix(".zip")
    with replacing(path) as file, zipfile.ZipFile(file, "w") as zipped:
        for name in files_below(folder):
            content = Path(folder, name).read_bytes()
            entry = f"{top}/{name}"
            archive.add_file(zipped, entry, content, zipfile.ZIP_DEFLATED, mode_of(name))
