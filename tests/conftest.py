"""Fixtures shared by all tests: one trained and exported run, small data sets, and ways to run the
scripts."""

import contextlib
import dataclasses
import hashlib
import io
import json
import os
import pickle
import re
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # plain `pytest` puts only tests/ there
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads slow a shared machine down
os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # of the processes that tests start: two workers share it
torch.set_num_threads(1)
# Weights in this user's caches would change what step1 takes by default.
os.environ["TORCH_HOME"] = os.devnull
os.environ["HF_HUB_CACHE"] = os.devnull
# A job in the background ignores Ctrl-C, and so would the processes that tests start and interrupt.
# A handler of this process's own is not inherited: children get the default one.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import data  # noqa: E402
import step1_train  # noqa: E402
import step2_export  # noqa: E402
from data.dataset import with_fingerprint  # noqa: E402
from deploy import facts, gate  # noqa: E402
from deploy.formats import FORMATS  # noqa: E402
from report import drawing, page  # noqa: E402
from training import recipes  # noqa: E402


@dataclass
class Result:
    """What a command line gave back."""

    code: int
    out: str
    err: str

    def error(self, code, *words):
        """Assert a failure as users must see it: this exit code, one `error:` line that holds all
        `words`."""
        assert self.code == code, (self.code, self.out, self.err)
        assert "Traceback" not in self.out + self.err
        lines = [line for line in self.err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, self.err
        assert not [word for word in words if str(word).lower() not in lines[0].lower()], lines[0]
        return lines[0]

    def done(self):
        """Assert success."""
        assert self.code == 0 and "error: " not in self.err, (self.code, self.err)
        return self


def pytest_collection_modifyitems(items):
    """Begin with the tests that need the trained run, so that one worker makes it while the other,
    which begins in the middle, goes on without it."""
    items.sort(key=lambda item: "trained" not in item.fixturenames)


@pytest.fixture
def call(capsys):
    """call(main, *arguments) -> Result, in this process."""

    def call(main, *arguments):
        capsys.readouterr()
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = stop.code
        return Result(code, *capsys.readouterr())

    return call


@pytest.fixture
def execute():
    """execute(*command, cwd) -> Result of a real process with this Python; close="2>&-" closes its
    standard error."""

    def execute(*command, close="", **options):
        command = [
            "sh",
            "-c",
            f'exec "$@" {close}',
            "sh",
            sys.executable,
            *(str(part) for part in command),
        ]
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
        done = subprocess.run(command, text=True, encoding="utf-8", timeout=100, **options)
        return Result(done.returncode, done.stdout or "", done.stderr or "")

    return execute


@pytest.fixture
def closed_pipe():
    """The writing end of a pipe that nobody reads: what `| head -1` leaves after its line."""
    reading, writing = os.pipe()
    os.close(reading)
    yield writing
    os.close(writing)


@contextlib.contextmanager
def same_threads():
    """Undo step 3's choice of torch threads, which is for the whole process."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def independent(request, monkeypatch):
    """No test depends on the random numbers or threads of those before it; pictures and twins only
    where a test is about them."""
    torch.manual_seed(0)
    if not request.node.get_closest_marker("pictures"):
        monkeypatch.setattr(drawing, "draw_run", lambda *args, **more: [])
        monkeypatch.setattr(page, "draw_familiar", lambda *args: None)
        monkeypatch.setattr(facts, "camera", SimpleNamespace(survey=lambda *args: []))
    if not request.node.get_closest_marker("calibrated"):
        monkeypatch.setattr(recipes, "FEW_TO_CALIBRATE", 10**9)
        monkeypatch.setattr(recipes, "FEW_TO_CROSS_FIT", 10**9)
    with same_threads():
        yield


@contextlib.contextmanager
def only_few_digits():
    """Shorten the bundled digits to 100 + 20, for tests whose result does not depend on the
    accuracy."""
    load = data.load

    def load_few(name, *args, **options):
        dataset = load(name, *args, **options)
        if name != "digits":
            return dataset
        few = dataclasses.replace(
            dataset,
            train_images=dataset.train_images[:100],
            train_labels=dataset.train_labels[:100],
            test_images=dataset.test_images[:20],
            test_labels=dataset.test_labels[:20],
        )
        return with_fingerprint(few)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "load", load_few)
        yield


@pytest.fixture
def few_digits():
    with only_few_digits():
        yield


@pytest.fixture
def undrawn(tmp_path, monkeypatch):
    """Processes that the test starts draw no pictures: they do not find matplotlib, which takes
    seconds."""
    place = tmp_path / "undrawn"
    place.mkdir()
    (place / "matplotlib.py").write_text("raise ImportError('left out, for time')\n")
    monkeypatch.setenv("PYTHONPATH", str(place))


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working directory."""
    place = tmp_path / "here"
    place.mkdir()
    monkeypatch.chdir(place)
    return place


@dataclass
class Trained:
    """A run and its export, below `place`, and what the scripts printed."""

    place: Path
    run: Path
    export: Path
    printed: list


def train_and_export(place, name, *arguments):
    """Run step 1 and step 2 as their users do, in the empty directory `place`."""
    printed = []
    with pytest.MonkeyPatch.context() as patch, same_threads():
        patch.chdir(place)
        commands = (step1_train.main, [*arguments, "--name", name]), (step2_export.main, [])
        for main, argv in commands:
            out, err = io.StringIO(), io.StringIO()
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                code = main(argv)
            assert code == 0, err.getvalue()
            printed.append(Result(code, out.getvalue(), err.getvalue()))
    return Trained(place, place / "runs" / name, place / "exports" / name, printed)


@pytest.fixture(scope="session")
def once(tmp_path_factory):
    """once(name, make, *arguments): what make(place, *arguments) returns, made in a new directory
    by one of pytest-xdist's workers for all of them."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def once(name, make, *arguments):
        place, result = base / name, base / f"{name}.pickle"
        try:
            place.mkdir()
        except FileExistsError:
            end = time.monotonic() + 300
            while not result.exists():
                assert time.monotonic() < end, (
                    f"the worker that makes {name} does not come to an end"
                )
                time.sleep(0.1)
        else:
            try:
                made = make(place, *arguments)
            except BaseException as error:
                made = AssertionError(f"{name} was not made: {error!r}")
                raise
            finally:
                (base / f"{name}.part").write_bytes(pickle.dumps(made))
                (base / f"{name}.part").replace(result)
        made = pickle.loads(result.read_bytes())
        if isinstance(made, AssertionError):
            raise made
        return made

    return once


def first_command():
    """The steps of the README's first command: [["python3", "-m", "venv", ".venv"], ...]."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    block = re.search(r"^```bash\n(.*?)```", text, re.DOTALL | re.MULTILINE)[1]
    return [shlex.split(step) for step in block.split("&&")]


def run_first_command(place):
    """Run the README's first command after its installation: step 1, step 2, and step 3 on the
    samples."""
    printed = []
    for python, script, *arguments in first_command():
        if script.endswith(".py"):
            assert python == ".venv/bin/python"
            command = [sys.executable, ROOT / script, *(ROOT / argument for argument in arguments)]
            done = subprocess.run(
                command, cwd=place, capture_output=True, text=True, encoding="utf-8"
            )
            assert done.returncode == 0, done.stderr
            printed.append(Result(done.returncode, done.stdout, done.stderr))
    return Trained(
        place, place / "runs/digits-airbench", place / "exports/digits-airbench", printed
    )


@pytest.fixture(scope="session")
def trained(once):
    """What the README's first command leaves: the default network on the digits, exported. Read
    only."""
    return once("trained", run_first_command)


@pytest.fixture(scope="session")
def small(once):
    """A network that trains and exports in no time, with dropout. Read only."""
    arguments = ["--model", "mlp", "--hidden", "32", "--dropout", "0.5", "--epochs", "3"]
    return once("small", train_and_export, "small", *arguments)


@pytest.fixture(scope="session")
def linear(once):
    """The regression of the tensor tutorial: a run and its export. Read only."""
    return once("linear", train_and_export, "linear-linear", "--dataset", "linear")


@pytest.fixture(scope="session")
def all_formats(once, trained):
    """The trained run's files in all formats: a directory. Read only."""
    return once("all-formats", export_all, trained)


def export_all(place, trained):
    out = shutil.copytree(trained.export, place / "digits")
    arguments = ["--run", trained.run, "--out", out, "--format", "onnx-int8", "pt2"]
    with same_threads():
        assert step2_export.main([str(argument) for argument in arguments]) == 0
    return out


@pytest.fixture(scope="session")
def fixed_files(once, trained, all_formats):
    """The trained run's files of fixed size, for four images at once: a directory. Read only."""
    return once("fixed", export_fixed, trained, all_formats)


def export_fixed(place, trained, all_formats):
    # Files of any size come with those of fixed size: they are the ones that there are. Whatever
    # the first quantization loses is allowed, as trying the others takes half a minute.
    arguments = ["--run", trained.run, "--out", place / "digits", "--fixed", "4"]
    arguments += ["--format", "onnx", "onnx-int8", "--max-drop", "100"]
    with pytest.MonkeyPatch.context() as patch, same_threads():
        for name in ("onnx", "onnx-int8"):
            replace_exporter(patch, name, partial(shutil.copy, all_formats / FORMATS[name].file))
        assert step2_export.main([str(argument) for argument in arguments]) == 0
    return place / "digits"


def replace_exporter(patch, name, write):
    """Let write(path) make the file of a format."""

    def export(source, path):
        write(path)

    patch.setitem(FORMATS, name, dataclasses.replace(FORMATS[name], export=export))


@pytest.fixture
def small_run(small, here):
    """The small run, alone and free to be damaged, in an empty working directory: runs/small."""
    shutil.copytree(small.run, here / "runs" / "small")
    return here / "runs" / "small"


@pytest.fixture
def in_process(monkeypatch):
    """Switch off the proof in a process of its own: the first proof must catch each fault without
    it."""
    monkeypatch.setattr(gate, "prove_isolated", lambda *_: ({"samples": 0}, []))


@pytest.fixture
def plant(monkeypatch, small):
    """plant(write): let write(good file, path) make the small run's model.onnx, in place of the
    exporter.

    Without an argument the good file is copied: exporting it again would take seconds.
    """

    def plant(write=shutil.copy):
        good = small.export / FORMATS["onnx"].file
        replace_exporter(monkeypatch, "onnx", partial(write, good))

    return plant


@pytest.fixture(scope="session")
def samples():
    """Paths of the ten sample images, digit_0.png to digit_9.png, in this order."""
    paths = sorted((ROOT / "data" / "samples").glob("*.png"))
    assert [path.stem for path in paths] == [f"digit_{digit}" for digit in range(10)]
    return paths


def right(answers):
    """How many (path, label) pairs name the digit of the sample's file name."""
    return sum(re.search(r"digit_(\d)", path)[1] == label for path, label in answers)


def onnx_with(source, target, spec=None, **changes):
    """Copy an ONNX file, its spec changed by key (or replaced as a whole: text, or None for no spec
    at all)."""
    graph = onnx.load(source)
    properties = {entry.key: entry.value for entry in graph.metadata_props}
    if changes:
        spec = json.dumps({**json.loads(properties["spec"]), **changes})
    del graph.metadata_props[:]
    onnx.helper.set_model_props(graph, {**properties, "spec": spec} if spec is not None else {})
    onnx.save(graph, target)
    return target


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder of wide photos in two classes, told apart by their bright half: 24 + 8 each."""
    rng, root = np.random.default_rng(0), tmp_path_factory.mktemp("photos")
    for split, count in (("train", 24), ("test", 8)):
        for name, bright in (("left", slice(40)), ("right", slice(40, None))):
            (root / split / name).mkdir(parents=True)
            for k in range(count):
                pixels = rng.integers(0, 120, (40, 80, 3), dtype=np.uint8)
                pixels[:, bright] += 120
                Image.fromarray(pixels).save(root / split / name / f"{k}.png")
    return root


def write_idx(path, array):
    """The MNIST format: two zero bytes, type 8 (uint8), rank, big-endian sizes, data."""
    header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    path.write_bytes(header + array.astype(np.uint8).tobytes())


@pytest.fixture
def mnist(tmp_path):
    """A data directory with a small MNIST of the genuine format."""
    raw, rng = tmp_path / "small-data" / "MNIST" / "raw", np.random.default_rng(0)
    raw.mkdir(parents=True)
    for split, n in (("train", 60), ("t10k", 20)):
        write_idx(raw / f"{split}-images-idx3-ubyte", rng.integers(0, 256, (n, 28, 28)))
        write_idx(raw / f"{split}-labels-idx1-ubyte", np.arange(n) % 10)
    return tmp_path / "small-data"


@pytest.fixture
def cifar10(tmp_path, monkeypatch):
    """A data directory with a small CIFAR-10 of the genuine format: class k is bright in colour
    channel k %
    3."""
    from torchvision.datasets import CIFAR10

    folder, rng, sums = (
        tmp_path / "small-data" / "cifar-10-batches-py",
        np.random.default_rng(0),
        {},
    )
    folder.mkdir(parents=True)
    classes = [
        "airplane",
        "automobile",
        "bird",
        "cat",
        "deer",
        "dog",
        "frog",
        "horse",
        "ship",
        "truck",
    ]
    contents = {"batches.meta": {"label_names": classes}}
    for name in (*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"):
        labels = np.arange(40) % 10
        images = rng.integers(0, 128, (40, 3, 32, 32), dtype=np.uint8)
        images[np.arange(40), labels % 3] += 100
        contents[name] = {"data": images.reshape(40, -1), "labels": labels.tolist()}
    for name, content in contents.items():
        (folder / name).write_bytes(pickle.dumps(content))
        sums[name] = hashlib.md5((folder / name).read_bytes()).hexdigest()
    for table in ("train_list", "test_list"):  # torchvision checks every file by its md5
        monkeypatch.setattr(
            CIFAR10, table, [[name, sums[name]] for name, _ in getattr(CIFAR10, table)]
        )
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": sums["batches.meta"]})
    return tmp_path / "small-data"
