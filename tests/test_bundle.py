"""The bundle: everything an edge machine needs, equal bytes from equal runs, written whole or not
at all."""

import errno
import json
import os
import re
import shutil
import stat
import subprocess
import sys
import threading
import time
import zipfile

import pytest
import torch
from conftest import ROOT

import step1_train
import step2_export
import step3_infer
from deploy import bundle, gate, publish
from deploy.archive import program_bytes

FORMATS = "--format", "onnx", "torchscript"
# The directory of an export as ONNX with a bundle.
LISTING = ["bundle", "model.onnx", "parity.json", "small-bundle.zip", "step3_infer.pyz"]


@pytest.fixture(scope="session")
def bundled(once, small):
    """The directory of an export with a bundle, and what step 2 printed. Read only."""
    return once("bundled", make_bundle, small)


def make_bundle(place, small):
    return place / "small", export(small, place / "small", *FORMATS)


def export(small, out, *options):
    """Run step 2 with --bundle in a process of its own; -> its standard output."""
    command = [
        sys.executable,
        ROOT / "step2_export.py",
        "--run",
        small.run,
        "--bundle",
        "--out",
        out,
    ]
    command = [str(part) for part in (*command, *options)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def edge(bundled, tmp_path):
    """The archive of the bundle, unpacked into an empty directory."""
    with zipfile.ZipFile(bundled[0] / "small-bundle.zip") as archive:
        archive.extractall(tmp_path)
    return tmp_path / "small-bundle"


def contents(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_folder_and_archive_hold_the_same(bundled, edge):
    out, printed = bundled
    assert contents(out / "bundle") == contents(edge)
    assert f"{out}/small-bundle.zip" in printed
    assert not [name for name in os.listdir(out) if name.startswith(".")]


def test_contents(edge):
    names = contents(edge).keys()
    wanted = "model.onnx model.pt step3_infer.pyz requirements.txt MODEL_CARD.md parity.json"
    wanted += " SHA256SUMS README.md index.html"
    assert {*wanted.split(), "samples/expected.jsonl"} <= names
    assert (edge / "step3_infer.pyz").read_bytes() == program_bytes()
    packages = [
        line.split(">=")[0] for line in (edge / "requirements.txt").read_text().splitlines()
    ]
    assert packages == ["onnxruntime", "onnxruntime", "numpy", "Pillow"]
    assert {name.split("/")[0] for name in names} >= {"cpp", "web"}
    parity = json.loads((edge / "parity.json").read_text())
    assert parity.keys() == {"onnx", "torchscript"} and all(
        figures["passed"] for figures in parity.values()
    )
    assert "precision" in (edge / "MODEL_CARD.md").read_text()


def test_readme_names_every_file_in_one_screen(edge):
    text = (edge / "README.md").read_text()
    assert len(text.splitlines()) < 60 and "$" not in text
    named = set(re.findall(r"^\| `([^`]+)` \|", text, re.MULTILINE)) | {"README.md", "index.html"}
    assert {name.split("/")[0] for name in contents(edge)} == {name.rstrip("/") for name in named}
    assert "cmake -S cpp" in text and "get-ort.sh" in text and "-m venv ~/" in text
    commands = re.findall(r"bin/python (step3_infer.pyz [^#\n]*)", text)
    assert len(commands) == 3
    for command in commands:
        subprocess.run(
            [sys.executable, *command.split()], cwd=edge, check=True, capture_output=True
        )


def test_verify_accepts_the_runtime_that_the_page_needs(edge, execute):
    npm = edge.parent / "npm"  # stands in for the real one, which needs a network
    npm.write_text("""#!/bin/sh
mkdir -p package/dist
touch package/dist/ort-wasm-simd-threaded.wasm package/dist/ort.wasm.bundle.min.mjs
tar czf "$4/$5.tgz" package && mv "$4/$5.tgz" "$4/$(echo "$5" | tr @ -).tgz"
""")
    npm.chmod(0o755)
    environment = {**os.environ, "PATH": f"{edge.parent}:{os.environ['PATH']}"}
    subprocess.run(
        ["sh", "web/get-ort.sh"], cwd=edge, env=environment, check=True, capture_output=True
    )
    assert {path.name for path in (edge / "web" / "ort").iterdir()} == {
        "model.onnx",
        "ort-wasm-simd-threaded.wasm",
        "ort.wasm.bundle.min.js",
    }
    # A server that is started in web/ reaches the model, too.
    assert (edge / "web" / "ort" / "model.onnx").read_bytes() == (edge / "model.onnx").read_bytes()
    shutil.rmtree(edge / "package")
    assert "did not compare 3 files" in execute("step3_infer.pyz", "--verify", cwd=edge).done().err


def test_sha256sum_accepts_it(edge):
    if shutil.which("sha256sum") is None:
        pytest.skip("no sha256sum here")
    done = subprocess.run(
        ["sha256sum", "-c", "--strict", "SHA256SUMS"], cwd=edge, capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stdout.count(": OK") == len(contents(edge)) - 1


def test_unpacked_it_verifies_tests_itself_and_predicts(edge, execute):
    assert "verified" in execute("step3_infer.pyz", "--verify", cwd=edge).done().out
    assert "passed" in execute("step3_infer.pyz", "--self-test", cwd=edge).done().out
    result = execute("step3_infer.pyz", "--format", "json", "samples", cwd=edge).done()
    rows = [json.loads(line) for line in result.out.splitlines()]
    expected = [
        json.loads(line) for line in (edge / "samples" / "expected.jsonl").read_text().splitlines()
    ]
    assert [row["path"] for row in rows] == [row["path"] for row in expected] and len(rows) == 10
    for row, wanted in zip(rows, expected, strict=True):
        assert row.keys() == wanted.keys() and row["label"] == wanted["label"]
        got, want = (
            {entry["label"]: entry["probability"] for entry in r["top"]} for r in (row, wanted)
        )
        assert got == pytest.approx(want, abs=1e-4)


def test_a_flipped_byte_in_any_file_is_found(edge, call):
    script = edge / "step3_infer.pyz"
    for name, content in contents(edge).items():
        changed = bytearray(content)
        changed[len(changed) // 2] ^= 1
        (edge / name).write_bytes(changed)
        result = call(step3_infer.main, "--verify", "--model", script)
        assert result.code == 1 and "error: " in result.err, name
        (edge / name).write_bytes(content)
    call(step3_infer.main, "--verify", "--model", script).done()


@pytest.mark.slow
def test_same_run_same_bytes(bundled, small, tmp_path):
    umask = os.umask(0o077)  # not the usual one
    try:
        export(small, tmp_path / "small", *FORMATS)
    finally:
        os.umask(umask)
    first = bundled[0] / "small-bundle.zip"
    second = tmp_path / "small" / "small-bundle.zip"
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.slow
def test_same_run_same_bytes_as_pt2(small, tmp_path):
    for name in ("first", "second"):
        export(small, tmp_path / name / "small", "--format", "onnx", "pt2")
    first = contents(tmp_path / "first" / "small" / "bundle")
    assert "model.pt2" in first and first == contents(tmp_path / "second" / "small" / "bundle")


def test_dates_and_modes_are_fixed(bundled):
    with zipfile.ZipFile(bundled[0] / "small-bundle.zip") as archive:
        entries = archive.infolist()
    assert {entry.date_time for entry in entries} == {(1980, 1, 1, 0, 0, 0)}
    assert {stat.filemode(entry.external_attr >> 16) for entry in entries} <= {
        "-rw-r--r--",
        "-rwxr-xr-x",
    }
    assert [entry.filename for entry in entries] == sorted(entry.filename for entry in entries)


def test_no_file_names_a_path_of_this_machine(small, edge):
    for path in (ROOT, small.place, os.path.dirname(torch.__file__)):
        assert not [
            name for name, content in contents(edge).items() if os.fsencode(path) in content
        ]


def test_a_second_export_replaces_it(call, small_run, here, in_process, plant):
    plant()
    arguments = ["--format", "onnx", "--bundle"]
    call(step2_export.main, *arguments).done()
    (here / "exports" / "small" / "bundle" / "old").write_text("old")
    call(step2_export.main, *arguments).done()
    out = here / "exports" / "small"
    assert sorted(os.listdir(out)) == LISTING
    assert not (out / "bundle" / "old").exists() and not (out / "bundle" / "model.pt").exists()


def test_no_bundle_where_a_format_fails(call, small_run, here, in_process, plant, monkeypatch):
    plant()
    call(step2_export.main, "--format", "onnx", "--bundle").done()
    monkeypatch.setattr(gate, "prove", lambda *_: ({**gate.NO_FIGURES}, ["planted"]))
    result = call(step2_export.main, "--format", "onnx", "--bundle")
    result.error(1, "onnx", "planted")
    assert "stays as it was" in result.err
    names = os.listdir(here / "exports" / "small")
    assert {"bundle", "model.onnx", "small-bundle.zip"} <= set(names)


def test_without_onnx_there_is_no_bundle(call, here):
    call(step2_export.main, "--format", "torchscript", "--bundle").error(2, "--bundle", "onnx")


@pytest.mark.slow
def test_a_regression_is_bundled_too(call, here, execute):
    call(step1_train.main, "--dataset", "linear", "--epochs", 5).done()
    call(step2_export.main, "--bundle").done()
    (folder,) = here.glob("exports/*/bundle")
    line = json.loads((folder / "samples" / "expected.jsonl").read_text().splitlines()[0])
    values = ",".join(map(str, line["values"]))
    result = call(
        step3_infer.main, "--model", folder / "model.onnx", "--format", "json", f"--values={values}"
    ).done()
    assert json.loads(result.out)["prediction"] == pytest.approx(line["prediction"], rel=1e-4)
    execute("step3_infer.pyz", "--verify", cwd=folder).done()


@pytest.mark.slow
def test_two_at_once_leave_one_whole(bundled, small, tmp_path):
    out = tmp_path / "small"
    threads = [
        threading.Thread(target=export, args=(small, out, "--format", "onnx")) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(os.listdir(out)) == LISTING
    assert step3_infer.main(["--verify", "--model", str(out / "bundle" / "model.onnx")]) == 0


def test_swapping_in_while_others_swap_in(tmp_path):
    def swap(k):
        for n in range(30):
            new = tmp_path / f"new-{k}-{n}"
            new.mkdir()
            (new / "file").write_text("whole")
            publish.swap_in(str(new), str(tmp_path / "final"), str(tmp_path / f"aside-{k}-{n}"))

    threads = [threading.Thread(target=swap, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (tmp_path / "final" / "file").read_text() == "whole" and not list(tmp_path.glob("new-*"))


def test_there_is_a_whole_bundle_at_any_moment_of_a_swap(tmp_path):
    if not publish.exchange(*map(str, both(tmp_path / "probe"))):
        pytest.skip("this system cannot exchange two directories in one step")
    final = tmp_path / "final"
    final.mkdir()
    (final / "file").write_text("whole")
    missing, done = [], threading.Event()

    def watch():
        while not done.is_set():
            if not (final / "file").exists():
                missing.append(time.monotonic())

    watcher = threading.Thread(target=watch)
    watcher.start()
    for number in range(200):
        new = tmp_path / f"new-{number}"
        new.mkdir()
        (new / "file").write_text("whole")
        publish.swap_in(str(new), str(final), str(tmp_path / f"aside-{number}"))
    done.set()
    watcher.join()
    assert not missing


def both(place):
    """Two directories."""
    for name in ("one", "other"):
        (place / name).mkdir(parents=True)
    return place / "one", place / "other"


@pytest.mark.parametrize("has_bundle", [True, False])
def test_what_a_killed_process_left_is_cleared_and_its_bundle_put_back(tmp_path, has_bundle):
    """Where two renames are needed, a kill between them leaves the earlier bundle aside."""
    left = tmp_path / ".export-0123abcd"
    (left / "earlier-0").mkdir(parents=True)
    (left / "earlier-0" / "file").write_text("earlier")
    (left / "model.onnx").write_text("unproven")
    os.utime(left, (1e9, 1e9))
    (tmp_path / ".export-of-mine").mkdir()  # no name of ours
    if has_bundle:
        (tmp_path / "bundle").mkdir()
        (tmp_path / "bundle" / "file").write_text("newer")
    with publish.workspace(str(tmp_path)) as workspace:
        assert os.path.isdir(workspace) and not left.exists()
    assert (tmp_path / "bundle" / "file").read_text() == ("newer" if has_bundle else "earlier")
    assert sorted(os.listdir(tmp_path)) == [".export-of-mine", "bundle"]


def test_a_workspace_in_use_is_left_alone(tmp_path):
    with publish.workspace(str(tmp_path)) as first:
        os.utime(first, (1e9, 1e9))
        with publish.workspace(str(tmp_path)):
            assert os.path.isdir(first)


@pytest.mark.slow
def test_disk_full(small, small_run, here, execute):
    limit = "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))\n"
    limit += f"sys.path.insert(0, {str(ROOT)!r})\n"
    limit += "import step2_export\nsys.exit(step2_export.main(sys.argv[1:]))\n"
    execute("-c", limit, "--format", "torchscript", cwd=here).error(1, "cannot write exports/small")
    assert not list(here.glob("exports/small/*"))


def test_disk_full_at_the_bundle(call, small_run, here, in_process, plant, monkeypatch):
    plant()

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(bundle, "write_archive", full)
    call(step2_export.main, "--format", "onnx", "--bundle").error(
        1, "bundle in exports/small", "No space left"
    )
    assert sorted(os.listdir(here / "exports" / "small")) == [
        "model.onnx",
        "parity.json",
        "step3_infer.pyz",
    ]
