"""Step 3 and the model files that are put in front of it: sums, pt2, foreign graphs, benchmark,
threads."""

import hashlib
import io
import itertools
import json
import os
import shutil
import subprocess
import time
import zipfile

import numpy as np
import onnx
import pytest
from conftest import ROOT, onnx_with
from onnx import TensorProto, helper
from specs import HONEST, REFUSED, TAKEN, changed_text

import step2_export
import step3_infer
from deploy import archive
from deploy.exporters import Source, export_pt2
from inference import benchmark
from inference.cpus import usable_cpus
from inference.engines import MODEL_NAMES
from inference.errors import Problem
from inference.predict import Model
from inference.results import write_figures
from inference.self_test import self_test
from inference.spec import read_spec

SCRIPT = ROOT / "step3_infer.py"


@pytest.fixture
def bundle(small, here):
    """A directory with the program, two model files, one file below, and SHA256SUMS as sha256sum
    writes it."""
    place = here / "bundle"
    (place / "samples").mkdir(parents=True)
    archive.write_program(place)
    for name in ("model.onnx", "model.pt"):
        shutil.copy(small.export / name, place)
    (place / "samples" / "a b.txt").write_text("content")
    names = [archive.NAME, "model.onnx", "model.pt", "samples/a b.txt"]
    sums = [
        f"{hashlib.sha256((place / name).read_bytes()).hexdigest()}  {name}\n" for name in names
    ]
    (place / "SHA256SUMS").write_text("".join(sums))
    return place


def test_verify_agrees_with_sha256sum(execute, bundle):
    assert "4 files" in execute(archive.NAME, "--verify", cwd=bundle).done().out
    done = subprocess.run(
        ["sha256sum", "-c", "--quiet", "SHA256SUMS"], cwd=bundle, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_verify_names_every_finding(call, bundle):
    content = bytearray((bundle / "model.onnx").read_bytes())
    content[len(content) // 2] ^= 1
    (bundle / "model.onnx").write_bytes(content)
    (bundle / "model.pt").unlink()
    (bundle / "samples" / "new\n.txt").touch()
    os.mkfifo(bundle / "pipe")
    os.symlink("samples", bundle / "linked")
    result = call(step3_infer.main, "--verify", "--model", bundle / "model.onnx")
    assert result.code == 1 and result.out == ""
    lines = result.err.splitlines()
    wanted = (
        ("linked", "not listed"),
        ("model.onnx", "changed"),
        ("model.pt", "missing"),
        ("pipe", "not listed"),
        ("new\\n.txt", "not listed"),
    )
    assert len(lines) == 5 and all(line.startswith("error: ") for line in lines)
    assert all(
        name in line and word in line for line, (name, word) in zip(lines, wanted, strict=True)
    ), lines


def test_verify_passes_over_the_runtime_that_the_user_fetched(call, bundle):
    (bundle / "web" / "ort").mkdir(parents=True)
    (bundle / "web" / "ort" / "ort.wasm.bundle.min.js").write_text("fetched")
    result = call(step3_infer.main, "--verify", "--model", bundle / "model.onnx").done()
    assert "4 files" in result.out and "did not compare 1 file beside" in result.err
    assert "web/ort/ort.wasm.bundle.min.js" in result.err
    (bundle / "web" / "extra.js").touch()
    result = call(step3_infer.main, "--verify", "--model", bundle / "model.onnx")
    assert result.code == 1 and "extra.js is not listed" in result.err


def test_verify_after_the_bundle_was_used(execute, bundle, samples):
    code = f"import sys; sys.path.insert(0, {archive.NAME!r})\n"
    code += "from inference import Model; Model('model.onnx')"
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    execute("-c", code, cwd=bundle, env=environment).done()
    shutil.copy(samples[0], bundle / "digit.png")
    arguments = ["--format", "csv", "--output", "answers.csv", "digit.png"]
    execute(archive.NAME, *arguments, cwd=bundle, env=environment).done()
    result = execute(archive.NAME, "--verify", cwd=bundle, env=environment).done()
    assert "4 files match" in result.out and "did not compare 2 files" in result.err
    assert "answers.csv" in result.err and "digit.png" in result.err


def test_planted_code_is_found_and_does_not_run(execute, bundle):
    import py_compile

    for name in ("step3_infer", "inference", "json", "numpy", "csv", "signal"):
        (bundle / f"{name}.py").write_text("print('evil')")
    cache = py_compile.compile(bundle / "json.py")
    result = execute(archive.NAME, "--verify", cwd=bundle)
    assert result.code == 1 and "evil" not in result.out + result.err
    for name in ("step3_infer.py", "inference.py", "json.py", os.path.basename(cache)):
        assert f"{name} is not listed" in result.err


@pytest.mark.parametrize(
    "line", ["hello", "0" * 64 + " model.onnx", "0" * 64 + "  ", "x" * 64 + "  model.onnx"]
)
def test_verify_with_malformed_sums(call, bundle, line):
    (bundle / "SHA256SUMS").write_text(line)
    call(step3_infer.main, "--verify", "--model", bundle / "model.onnx").error(
        1, "SHA256SUMS, line 1"
    )


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname"])
def test_verify_looks_at_nothing_outside(call, bundle, name):
    with open(bundle / "SHA256SUMS", "a") as file:
        file.write("0" * 64 + f"  {name}\n")
    call(step3_infer.main, "--verify", "--model", bundle / "model.onnx").error(1, name, "outside")


def test_verify_without_sums(call, small):
    call(step3_infer.main, "--verify", "--model", small.export / "model.onnx").error(
        1, "SHA256SUMS", "--bundle"
    )


def test_files_with_code_are_announced(call, bundle, samples):
    notes = (
        call(step3_infer.main, "--model", bundle / "model.pt", samples[0]).done().err.splitlines()
    )
    assert len(notes) == 1 and "can carry code" in notes[0] and "use .onnx" in notes[0]
    assert call(step3_infer.main, "--model", bundle / "model.onnx", samples[0]).done().err == ""


@pytest.fixture(scope="module")
def pt2(small, tmp_path_factory):
    """The small network as model.pt2, its spec as an extra file."""
    run = step2_export.read_run(str(small.run))
    golden = Model(small.export / "model.onnx").spec["golden"]
    path = tmp_path_factory.mktemp("pt2") / "model.pt2"
    export_pt2(Source(run.deployable(), {**run.spec, "golden": golden}), str(path))
    return path


def test_pt2_predicts_as_onnx_does(call, small, pt2, samples):
    arguments = ["--format", "json", "--top-k", 10, *samples]
    rows = [
        [
            json.loads(line)
            for line in call(step3_infer.main, "--model", file, *arguments).done().out.splitlines()
        ]
        for file in (pt2, small.export / "model.onnx")
    ]
    for a, b in zip(*rows, strict=True):
        p, q = ({entry["label"]: entry["probability"] for entry in row["top"]} for row in (a, b))
        assert max(abs(p[label] - q[label]) for label in q) < 1e-4
    result = call(step3_infer.main, "--model", pt2, "--self-test").done()
    assert "passed" in result.out and "can carry code" in result.err


def test_a_broken_file_prints_nothing_to_standard_output(execute, small, here):
    """onnxruntime prints on errors of its Python part, here a name that is not UTF-8, and tries
    again."""
    content = (small.export / "model.onnx").read_bytes()
    (here / "name.onnx").write_bytes(content.replace(b"probabilities", b"probabilitie\xff"))
    result = execute(SCRIPT, "--model", "name.onnx", "--self-test", cwd=here)
    result.error(1, "name.onnx", "utf-8")
    assert result.out == ""


def test_device_is_understood_as_in_step_1(call, small, samples):
    arguments = ["--model", small.export / "model.onnx", samples[0]]
    same = [
        call(step3_infer.main, option, "cpu", *arguments).done()
        for option in ("--device", "--provider")
    ]
    assert same[0] == same[1]
    call(step3_infer.main, "--device", "toaster", *arguments).error(2, "toaster", "cpu")


def test_broken_torch_files(call, pt2, samples, here):
    (here / "cut.pt2").write_bytes(pt2.read_bytes()[:5000])
    call(step3_infer.main, "--model", "cut.pt2", samples[0]).error(
        1, "cut.pt2 is not a torch.export file"
    )
    for name, kind in (("zip.pt", "TorchScript"), ("zip.pt2", "torch.export")):
        with zipfile.ZipFile(name, "w") as file:
            file.writestr("hello.txt", "hello")
        call(step3_infer.main, "--model", name, samples[0]).error(1, f"{name} is not a {kind} file")


def test_order_of_model_names(call, small, samples, here):
    place = here / "exports" / "all"
    place.mkdir(parents=True)
    for name in MODEL_NAMES:
        shutil.copy(small.export / "model.onnx", place / name)
    shutil.copy(small.export / "model.pt", place)
    for name in MODEL_NAMES:
        assert f"model: exports/all/{name}\n" in call(step3_infer.main, samples[0]).done().err
        (place / name).unlink()
    call(step3_infer.main, samples[0]).error(2, "no model found", "--model")


def foreign(path, spec, kind=TensorProto.UINT8, shape=("n", "h", "w", 1), classes=10):
    """An ONNX file that somebody else made: any input, and `classes` constant outputs."""
    nodes = [
        helper.make_node(
            "Constant", [], ["p"], value=helper.make_tensor("p", 1, [1, classes], [0.1] * classes)
        )
    ]
    inputs = [helper.make_tensor_value_info("x", kind, shape)]
    outputs = [helper.make_tensor_value_info("p", TensorProto.FLOAT, [1, classes])]
    graph = helper.make_model(
        helper.make_graph(nodes, "g", inputs, outputs),
        opset_imports=[helper.make_opsetid("", 18)],
        ir_version=8,
    )
    helper.set_model_props(graph, {"spec": json.dumps(spec)})
    onnx.save(graph, path)
    return path


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"kind": TensorProto.FLOAT}, ["spec", "tensor(float)"]),
        ({"shape": ("n", 1)}, ["spec", "rank"]),
        ({"classes": 7}, ["spec is wrong", "(1, 10)", "(1, 7)"]),
    ],
)
def test_graphs_that_are_not_what_their_spec_says(call, small, samples, here, changes, words):
    spec = {**Model(small.export / "model.onnx").spec, "known": None}
    call(step3_infer.main, "--model", foreign(here / "m.onnx", spec), samples[0]).done()
    call(step3_infer.main, "--model", foreign(here / "m.onnx", spec, **changes), samples[0]).error(
        1, *words
    )


def test_weights_outside_the_file_are_refused(call, small, samples, here):
    graph = onnx.load(small.export / "model.onnx")
    onnx.save(
        graph, "m.onnx", save_as_external_data=True, location="weights.bin", size_threshold=1024
    )
    refused = ("m.onnx", "keeps weights outside the file")
    call(step3_infer.main, "--model", "m.onnx", samples[0]).error(1, *refused)


@pytest.mark.parametrize(
    "text", [b"probabilities", b'{"schema"', b"Gemm"]
)  # Gemm: in onnxruntime's own message
def test_texts_in_a_model_that_are_no_utf8(call, small, samples, here, text):
    content = (small.export / "model.onnx").read_bytes()
    assert text in content
    (here / "m.onnx").write_bytes(content.replace(text, b"\x80" + text[1:]))
    result = call(step3_infer.main, "--model", "m.onnx", samples[0])
    result.error(1, "m.onnx is not an ONNX file")
    assert result.out == ""


def test_a_model_that_answers_nan(call, small, samples, here):
    graph = onnx.load(small.export / "model.onnx")
    for tensor in graph.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            values = onnx.numpy_helper.to_array(tensor) * np.float32("nan")
            tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    onnx.save(graph, "nan.onnx")
    call(step3_infer.main, "--model", "nan.onnx", samples[0]).error(1, str(samples[0]), "NaN")


@pytest.mark.parametrize("size", [[0, 8], [8], "ab", [1e9, 8], None])
def test_image_sizes_that_make_no_sense(call, small, samples, here, size):
    model = onnx_with(small.export / "model.onnx", here / "m.onnx", image_size=size)
    call(step3_infer.main, "--model", model, samples[0]).error(1, "malformed spec")


def test_deeply_nested_spec(call, small, samples, here):
    model = onnx_with(small.export / "model.onnx", here / "m.onnx", "[" * 100_000)
    call(step3_infer.main, "--model", model, samples[0]).error(1, "malformed spec")


def with_golden_off_by(small, path, difference, **changes):
    """The small network's file, its golden samples changed by `difference` and its spec by
    `changes`."""
    spec = Model(small.export / "model.onnx").spec
    spec.pop("self_test_tolerance", None)
    spec["golden"][-1]["probabilities"][3] += difference  # of the last sample only
    return onnx_with(small.export / "model.onnx", path, json.dumps({**spec, **changes}))


@pytest.mark.parametrize(
    ("changes", "difference", "passes"),
    [
        ({}, 5e-5, True),
        ({}, -2e-4, False),
        ({"quantization": "int8, per channel"}, 1.2e-2, True),
        ({"quantization": "int8, per channel"}, -3e-2, False),
        ({"self_test_tolerance": 1e-3}, 5e-4, True),
        ({"self_test_tolerance": 1e-3}, 2e-3, False),
        ({"self_test_tolerance": 1e-3, "quantization": "int8"}, 1.2e-2, False),
    ],
)
def test_tolerance_of_the_self_test(call, small, here, changes, difference, passes):
    model = with_golden_off_by(small, here / "m.onnx", difference, **changes)
    loaded = Model(model)
    found = self_test(loaded)
    assert found.passed == passes and found.samples == len(loaded.spec["golden"])
    assert abs(found.difference - abs(difference)) < 1e-5
    result = call(step3_infer.main, "--model", model, "--self-test")
    assert result.code == (0 if passes else 1) and ("passed" if passes else "FAILED") in result.out


@pytest.mark.parametrize("tolerance", ["much", [1e-4], True, -1, 10**400], ids=str)
def test_tolerance_that_is_no_number(call, small, here, tolerance):
    model = with_golden_off_by(small, here / "m.onnx", 0, self_test_tolerance=tolerance)
    call(step3_infer.main, "--model", model, "--self-test").error(1, "malformed")


@pytest.mark.parametrize(
    "change", [{"classes": {"a": 1, "b": 2}}, {"white": 0}, {"white": "bright"}]
)
def test_more_specs_that_make_no_sense(call, small, samples, here, change):
    model = onnx_with(small.export / "model.onnx", here / "m.onnx", **change)
    call(step3_infer.main, "--model", model, samples[0]).error(1, "malformed spec")


def test_benchmark_as_text_and_as_json(execute, small, here):
    arguments = [SCRIPT, "--model", small.export / "model.onnx", "--benchmark", "--threads", 1]
    arguments += ["--batch-size", 8]
    figures = json.loads(execute(*arguments, "--format", "json", cwd=here).done().out)
    times = [figures[f"latency_p{q}_ms"] for q in (50, 95, 99)]
    assert 0 < times[0] <= times[1] <= times[2]
    assert figures["threads"] == 1 and figures["batch_size"] == 8
    assert (
        figures["images_per_second"] > 500 / times[0]
    )  # not below half of what one image at a time gives
    assert (
        0 < figures["load_seconds"] < 10
        and 0 < figures["import_seconds"] < 60
        and figures["first_run_ms"] > 0
    )
    low, high = figures["latency_spread"]
    assert 0 < low <= times[0] <= high and (figures["busy"] is None) == (high <= 2 * low)
    assert figures["peak_memory_mb"] is None or 20 < figures["peak_memory_mb"] < 500


def test_benchmark_says_that_the_machine_was_busy(call, small, monkeypatch):
    predict, count = Model.predict, itertools.count()

    def slow_at_times(self, inputs):
        if next(count) % 4 == 0:
            time.sleep(0.005)
        return predict(self, inputs)

    monkeypatch.setattr(Model, "predict", slow_at_times)
    monkeypatch.setattr(benchmark, "LATENCY_SECONDS", 0.5)
    monkeypatch.setattr(benchmark, "THROUGHPUT_SECONDS", 0.5)
    arguments = ["--model", small.export / "model.onnx", "--benchmark", "--threads", 1]
    assert "busy machine: " in call(step3_infer.main, *arguments).done().out
    figures = json.loads(call(step3_infer.main, *arguments, "--format", "json").done().out)
    assert figures["busy"].startswith("busy machine: ") and figures["busy"].endswith(
        "x spread of the latency"
    )


def test_benchmark_is_no_table(call, small):
    call(
        step3_infer.main, "--model", small.export / "model.onnx", "--benchmark", "--format", "csv"
    ).error(2, "csv")


def write(place, **files):
    place.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (place / name.replace("__", ".")).write_text(text)


@pytest.mark.parametrize(
    ("quota", "cpus"),
    [("max 100000", 4), ("150000 100000", 2), ("50000 100000", 1), ("900000 100000", 4), ("", 4)],
)
def test_cpus_of_a_container(tmp_path, monkeypatch, quota, cpus):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(4)), raising=False)
    own = tmp_path / "cgroup"
    own.write_text("0::/a/b\n")
    write(tmp_path / "v2" / "a", cpu__max=quota)  # of the group above
    write(tmp_path / "v2" / "a" / "b", cpu__max="max 100000")
    assert usable_cpus(str(tmp_path / "v2"), str(own)) == cpus
    assert usable_cpus(str(tmp_path / "v2"), str(tmp_path / "missing")) == 4


@pytest.mark.parametrize("name", REFUSED)
def test_specs_that_every_reader_refuses(name):
    honest = json.dumps(HONEST)
    with pytest.raises(Problem, match="malformed spec"):
        read_spec(changed_text(honest, REFUSED[name]), "m.onnx")


def test_specs_that_every_reader_takes():
    assert read_spec(json.dumps(HONEST), "m.onnx")["classes"] == ["a", "b"]
    for change in TAKEN.values():
        read_spec(changed_text(json.dumps(HONEST), change), "m.onnx")


def test_a_spec_of_many_megabytes_is_refused():
    with pytest.raises(Problem, match="more than 32 MiB"):
        read_spec(json.dumps({**HONEST, "extra": "x" * (33 << 20)}), "m.onnx")


@pytest.mark.parametrize(
    "fixed", [{"batch": 1024, "input": "uint8"}, {"batch": 0, "input": "uint8"}]
)
def test_fixed_sizes_that_would_fill_the_memory(fixed):
    with pytest.raises(Problem, match="malformed spec"):
        read_spec(json.dumps({**HONEST, "image_size": [4096, 4096], "fixed": fixed}), "m.onnx")


def test_a_self_test_that_would_pass_anything_is_capped(small, here):
    huge = {"self_test_tolerance": 1e6}
    model = Model(with_golden_off_by(small, here / "m.onnx", 0.06, **huge))
    assert not self_test(model).passed


def test_figures_as_text_have_ranges_with_units_and_nothing_unknown():
    figures = {"latency_spread": (0.0566, 0.0623), "busy": None, "threads": 1}
    out = io.StringIO()
    write_figures(figures, "text", out)
    assert out.getvalue().splitlines() == [
        "latency_spread      0.0566 to 0.0623 ms",
        "threads             1",
    ]
