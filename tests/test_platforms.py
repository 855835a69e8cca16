"""What Windows and macOS do differently, as far as another system can show it.

They have no `fcntl`, start processes by spawning them, read text in the locale's encoding unless
told otherwise, refuse some file names, and (Windows) refuse to replace a file that is mapped or
open.
"""

import ast
import errno
import os
import re
import types
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, onnx_with
from PIL import Image
from test_own_images import QUICK, folder, run_of  # noqa: F401

import data
import step1_train
from data import cache
from deploy import publish
from inference.errors import Problem
from training import runs

FOLDERS = ("data", "deploy", "training")  # not the virtual environment, which may be in the clone
SOURCES = [*ROOT.glob("*.py"), *(path for name in FOLDERS for path in (ROOT / name).rglob("*.py"))]
TINY = ["--model", "mlp", "--hidden", "8", "--epochs", "1"]

# Runs a script as `python script ...` would, on a system without what POSIX and Linux alone have.
# asyncio comes first, as it asks for os.sysconf on import where sockets have sendmsg; what
# subprocess, which it imports, has found by then is taken back.
POORER = """
import asyncio, mmap, os, runpy, subprocess, sys
subprocess._USE_POSIX_SPAWN = False
for name in ("fcntl", "resource", "pwd", "grp", "termios"):
    sys.modules[name] = None
LACKING = (os, ("sched_", "getloadavg", "posix_", "mkfifo", "sysconf")), (mmap, ("MADV_",))
for module, prefixes in LACKING:
    for name in [name for name in vars(module) if name.startswith(prefixes)]:
        delattr(module, name)
sys.argv = sys.argv[1:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
def test_all_steps_work_without_what_posix_alone_has(execute, here, samples, folder):  # noqa: F811
    """On a system that also warns wherever text is read or written in the encoding of its
    locale."""
    options = ["-X", "warn_default_encoding", "-X", "utf8=0"]
    environment = {**os.environ, "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"}
    environment["USERNAME"] = "someone"  # as Windows sets it: Python needs no pwd then

    def run(script, *arguments):
        result = execute(
            *options, "-c", POORER, ROOT / script, *arguments, cwd=here, env=environment
        )
        warnings = [line for line in result.done().err.splitlines() if "EncodingWarning" in line]
        assert not [
            line for line in warnings if line.startswith(str(ROOT)) and "site-packages" not in line
        ]
        return result

    assert (
        "ok"
        not in execute(
            "-c", "import sys; sys.modules['fcntl'] = None; import fcntl; print('ok')"
        ).out
    )
    first = run("step1_train.py", "--data-dir", folder, *TINY, "--name", "a")
    assert "decoded 48 files" in first.err
    assert "runs/a: test accuracy" in first.out.replace("\\", "/")
    again = run("step1_train.py", "--resume", "a", "--epochs", 2)
    assert "decoded" not in again.err and "resumed   after 1 epoch" in again.out
    assert len((here / "runs/a/metrics.csv").read_bytes().split()) == 3
    run("step2_export.py", "--format", "onnx", "--bundle")
    run("step3_infer.py", "--output", "out.csv", "--format", "csv", *samples)
    assert len((here / "out.csv").read_text(encoding="utf-8").splitlines()) == 11


# ---------------------------------------------------------------------------------------- encodings


def test_every_text_file_is_opened_with_its_encoding_named():
    """Calls of open(), read_text(), write_text() and of subprocess with text, in all that ships."""
    faults = []
    for path in SOURCES:
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            named = isinstance(call, ast.Call) and "encoding" in {
                keyword.arg for keyword in call.keywords
            }
            if isinstance(call, ast.Call) and reads_text(call) and not named:
                faults.append(f"{path.relative_to(ROOT)}:{call.lineno}")
    assert not faults


def reads_text(call):
    name = ast.unparse(call.func)
    keywords = {keyword.arg: keyword.value for keyword in call.keywords}
    if name == "open":
        mode = keywords.get("mode") or (call.args[1] if len(call.args) > 1 else ast.Constant("r"))
        return None not in keywords and not (isinstance(mode, ast.Constant) and "b" in mode.value)
    if name.startswith("subprocess."):
        return bool({"text", "universal_newlines"} & set(keywords))
    return name.endswith((".read_text", ".write_text"))


def test_detection_of_text_files():
    texts = ["open(p)", "open(p, 'w')", "Path(p).read_text()", "subprocess.run(c, text=True)"]
    others = [
        "open(p, 'rb')",
        "os.open(p, 0)",
        "Path(p).read_bytes()",
        "subprocess.run(c)",
        "open(p, m, **o)",
    ]
    found = [reads_text(ast.parse(code, mode="eval").body) for code in texts + others]
    assert list(map(bool, found)) == [True] * len(texts) + [False] * len(others)


@pytest.mark.parametrize("output_format", ["text", "csv"])
def test_standard_output_is_utf_8_in_a_file_or_a_pipe(execute, here, small, samples, output_format):
    model = onnx_with(
        small.export / "model.onnx",
        here / "model.onnx",
        classes=[f"Äpfel 日本 {k}" for k in range(10)],
    )
    environment = {**os.environ, "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"}
    command = ["-X", "utf8=0", ROOT / "step3_infer.py", "--model", model, "--format", output_format]
    assert "Äpfel 日本" in execute(*command, samples[0], cwd=here, env=environment).done().out


# -------------------------------------------------------------------------------------------- names


def is_allowed(name):
    """Does Windows allow this file name?"""
    device = re.fullmatch(r"(?i)(con|prn|aux|nul|(com|lpt)[0-9¹²³])", name.split(".")[0].rstrip())
    return not (
        device
        or set(name) & set('<>:"/\\|?*')
        or name.endswith((".", " "))
        or not name.isprintable()
    )


@pytest.mark.parametrize(
    "name", ["aux", "NUL", "con.fast", "Com1", "lpt9.x", "com²", "aux.", "a:b", "a ", "x?"]
)
def test_run_names_that_windows_refuses_are_refused(call, here, monkeypatch, name):
    monkeypatch.setattr(data, "load", None)  # it is refused before any work
    call(step1_train.main, *TINY, "--name", name).error(2, "--name")
    assert not (here / "runs").exists()


@pytest.mark.parametrize("name", ["auxiliary", "console", "com", "com10", "a.aux", "null", "aux-2"])
def test_run_names_that_only_resemble_them_are_taken(here, name):
    os.makedirs(runs.RUNS)
    with runs.claimed(types.SimpleNamespace(name=name)) as run:
        assert os.path.basename(run) == name and is_allowed(name)


@pytest.mark.parametrize(
    ("stem", "name"),
    [
        ("aux", "aux-mlp"),
        ("aux.photos", "data-aux.photos-mlp"),
        ("nul.csv", "data-nul.csv-mlp"),
        ("aux.", "aux-mlp"),
        ("a:b", "a-b-mlp"),
        ("my photos ", "my-photos-mlp"),
        ("...", "folder-mlp"),
        ("Möbel 📷", "Möbel-mlp"),
    ],
)
def test_default_names_of_runs_are_allowed_by_windows(stem, name):
    settings = types.SimpleNamespace(dataset="folder", data_dir=f"/data/{stem}", model="mlp")
    assert runs.name_of(settings) == name and is_allowed(name)


def test_all_files_of_a_run_and_a_bundle_have_names_that_windows_allows(call, here, tmp_path):
    import step2_export

    photos = tmp_path / "nul.a:b."
    rng = np.random.default_rng(0)
    for label in ("aux", "con.1", "ok"):
        (photos / label).mkdir(parents=True)
        for index in range(8):
            image = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
            image.save(photos / label / f"{index}.png")
    call(step1_train.main, "--data-dir", photos, "--cache-dir", here / "cache", *TINY).done()
    call(step2_export.main, "--format", "onnx", "--bundle", "--tolerance", 1e-3).done()
    written = list(here.rglob("*"))
    assert len(written) > 10 and all(is_allowed(path.name) for path in written)


# ------------------------------------------------------------------------------ files that are open


def test_cache_that_another_process_has_mapped_is_not_replaced(folder, monkeypatch):  # noqa: F811
    """Two runs build the same cache at once: the one that ends later leaves the other's in
    place."""
    build, mapped = cache.build_cache, []

    def second(paths, base, *more):
        build(paths, base, *more)
        mapped.append(np.memmap(f"{base}.u8", np.uint8, "c"))
        before = os.stat(f"{base}.u8")
        build(paths, base, *more)
        after = os.stat(f"{base}.u8")
        assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)

    monkeypatch.setattr(cache, "build_cache", second)
    assert len(data.load("folder", str(folder)).train_images) == 36 and mapped
    assert not list((folder / ".threestep").glob("*.tmp"))


def as_windows(replace, when):
    """os.replace that refuses, as Windows does for a file in use, after calling when()."""

    def refuse(source, target):
        if not target.endswith(".u8"):
            return replace(source, target)
        when(source, target)
        raise PermissionError(13, "Access is denied", target)

    return refuse


def test_cache_that_is_published_at_the_same_moment_is_used(folder, monkeypatch):  # noqa: F811
    replace = os.replace

    def other_run(source, target):
        replace(source, target)
        about = {"shape": [48, 16, 16, 3], "unreadable": []}
        cache.write_json(target.removesuffix(".u8") + ".json", about)

    monkeypatch.setattr(os, "replace", as_windows(replace, other_run))
    assert len(data.load("folder", str(folder)).train_images) == 36


def test_cache_that_cannot_be_replaced_is_one_error(folder, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(os, "replace", as_windows(os.replace, lambda *_: None))
    with pytest.raises(Problem, match="--cache-dir"):
        data.load("folder", str(folder))


def test_files_are_closed_before_they_are_moved_or_removed(folder, here, call, monkeypatch):  # noqa: F811
    """Whatever step1 replaces, renames or removes is neither open nor mapped here: Windows would
    refuse."""
    opened = "/proc/self/fd"
    if not os.path.isdir(opened):
        pytest.skip("this system does not list open files")
    maps = Path("/proc/self/maps")
    faults = []

    def checked(function):
        def check(path, *more, **options):
            mapped = maps.read_text(encoding="utf-8", errors="surrogateescape")
            for place in (path, *more):
                if os.path.isfile(place) and f"{os.path.realpath(place)}\n" in mapped:
                    faults.append((function.__name__, place))
            for number in os.listdir(opened):
                try:
                    target = os.readlink(f"{opened}/{number}")
                except OSError:
                    continue
                if os.path.abspath(os.fspath(path)) == target and not os.path.isdir(target):
                    faults.append((function.__name__, target))
            return function(path, *more, **options)

        return check

    for name in ("replace", "rename", "unlink", "remove"):
        monkeypatch.setattr(os, name, checked(getattr(os, name)))
    call(step1_train.main, "--data-dir", folder, *QUICK).done()
    call(step1_train.main, "--resume", run_of(here).name, "--epochs", 3).done()
    assert not faults


def test_the_command_that_resumes_is_quoted_for_the_shell_of_the_system(monkeypatch):
    run = os.path.join("runs", "my photos")
    assert runs.resume_command(run).endswith("--resume 'my photos'")
    monkeypatch.setattr(runs.os, "name", "nt")
    assert runs.resume_command(run).endswith('--resume "my photos"')


def test_a_bundle_replaces_one_that_another_process_has_put_there(tmp_path, monkeypatch):
    """Windows says PermissionError where Linux says that a directory is not empty."""
    replace, refused = os.replace, []

    def refuse_once(source, target):
        if os.path.basename(source) == "new" and not refused:
            refused.append(target)
            raise PermissionError(errno.EACCES, "Access is denied", source)
        return replace(source, target)

    monkeypatch.setattr(os, "replace", refuse_once)
    for name in ("new", "final"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt").write_text(name)
    monkeypatch.setattr(publish, "exchange", lambda *_: False)
    publish.swap_in(str(tmp_path / "new"), str(tmp_path / "final"), str(tmp_path / "aside"))
    assert refused and (tmp_path / "final" / "a.txt").read_text() == "new"
