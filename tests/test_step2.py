"""Step 2: what an export holds, and what happens when it cannot be made."""

import dataclasses
import hashlib
import json
import os
import pickle
import shutil
import signal
import zipfile
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import ROOT
from PIL import Image

import data
import step1_train
import step2_export
from data.dataset import with_fingerprint
from deploy import exporters, gate
from deploy.formats import FORMATS, NAMES
from inference.engines import MODEL_NAMES
from inference.predict import Model
from training import cpu


def parity_of(export):
    def refuse(word):
        raise ValueError(f"{word} is not JSON")

    return json.loads((export / "parity.json").read_text(), parse_constant=refuse)


def test_both_formats_pass_the_gate(trained):
    report = parity_of(trained.export)
    accuracy = json.loads((trained.run / "summary.json").read_text())["test_accuracy"]
    assert report.keys() == {"torchscript", "onnx"}
    for figures in report.values():
        assert figures["passed"] is True and figures["samples"] == 360
        assert 0 <= figures["max_abs_diff"] <= 1e-4 and figures["top1_agreement"] == 1
        assert figures["accuracy"] == pytest.approx(accuracy, abs=0.005)
        sizes = {name.split()[-1] for name in figures["probes"]}
        kinds = {name.split()[0] for name in figures["probes"]}
        assert "32x32" in sizes and len(sizes) > 3 and kinds == {"random", "black", "white"}
        assert figures["isolated"]["samples"] > 0 and figures["isolated"]["max_abs_diff"] <= 1e-4
    assert [(figures["file"], figures["runs_with"]) for figures in report.values()] == [
        ("model.pt", "torch"),
        ("model.onnx", "onnxruntime"),
    ]


def test_export_writes_two_files_and_the_figures(trained, small):
    for export in (trained.export, small.export):
        assert sorted(os.listdir(export)) == [
            "model.onnx",
            "model.pt",
            "parity.json",
            "step3_infer.pyz",
        ]
    printed = trained.printed[1]
    # Older versions of torch warn of themselves there, too.
    kinds = "run: ", "note: ", "warning: "
    said = [line for line in printed.err.splitlines() if line.startswith(kinds)]
    assert said == ["run: runs/digits-airbench"]
    assert (
        "exports/digits-airbench/model.onnx" in printed.out
        and "exports/digits-airbench/model.pt" in printed.out
    )


def test_pt2_passes_the_gate_and_tells_no_paths(all_formats):
    figures = parity_of(all_formats)["pt2"]
    assert (
        figures["passed"]
        and figures["max_abs_diff"] <= 1e-4
        and figures["isolated"]["samples"] == 16
    )
    program = torch.export.load(all_formats / "model.pt2", extra_files=(extra := {"spec.json": ""}))
    assert json.loads(extra["spec.json"])["classes"] == list("0123456789")
    assert [str(size) for size in program.graph_signature.user_inputs] == ["image"]
    with torch.inference_mode():  # batch, height and width are free
        for shape in ((1, 8, 8, 1), (3, 50, 7, 1)):
            probabilities, known = program.module()(torch.zeros(shape, dtype=torch.uint8))
            assert probabilities.shape == (shape[0], 10) and known.shape == (shape[0],)
    with zipfile.ZipFile(all_formats / "model.pt2") as archive:
        contents = b"".join(archive.read(name) for name in archive.namelist())
    assert not [
        path for path in (ROOT, os.path.dirname(torch.__file__)) if os.fsencode(path) in contents
    ]


def test_onnx_gelu_is_one_operator_for_onnxruntime(trained, tmp_path):
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath, options.log_severity_level = (
        str(tmp_path / "optimized.onnx"),
        4,
    )
    onnxruntime.InferenceSession(
        trained.export / "model.onnx", options, providers=["CPUExecutionProvider"]
    )
    kinds = [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node]
    assert kinds.count("Gelu") == 7 and "Erf" not in kinds


def test_onnx_graph_is_as_promised(trained):
    graph = onnx.load(trained.export / "model.onnx")
    onnx.checker.check_model(graph, full_check=True)
    assert [entry.version for entry in graph.opset_import if entry.domain in ("", "ai.onnx")] == [
        18
    ]
    (image,), (probabilities, known) = graph.graph.input, graph.graph.output
    assert (known.name, known.type.tensor_type.elem_type) == ("known", onnx.TensorProto.FLOAT)
    assert (image.name, image.type.tensor_type.elem_type) == ("image", onnx.TensorProto.UINT8)
    dims = image.type.tensor_type.shape.dim
    assert all(dim.dim_param for dim in dims[:3]) and dims[3].dim_value == 1
    assert len({dim.dim_param for dim in dims[:3]}) == 3
    assert (probabilities.name, probabilities.type.tensor_type.elem_type) == (
        "probabilities",
        onnx.TensorProto.FLOAT,
    )
    assert probabilities.type.tensor_type.shape.dim[1].dim_value == 10
    assert not [
        tensor
        for tensor in graph.graph.initializer
        if tensor.data_location == onnx.TensorProto.EXTERNAL
    ]


@pytest.mark.parametrize("name", ["model.onnx", "model.pt"])
def test_spec_inside_the_file_says_where_it_comes_from(trained, name):
    spec = Model(str(trained.export / name)).spec
    checkpoint = (trained.run / "checkpoint.pt").read_bytes()
    assert spec["checkpoint_sha256"] == hashlib.sha256(checkpoint).hexdigest()
    keys = "schema task classes channels image_size resize mean std dataset model parameters"
    keys += " test_accuracy"
    keys += " arguments"
    assert not [key for key in [*keys.split(), "versions", "created", "golden"] if key not in spec]
    trained_spec = torch.load(trained.run / "checkpoint.pt", weights_only=True)["spec"]
    assert not [
        key for key in keys.split() if spec[key] != json.loads(json.dumps(trained_spec[key]))
    ]
    assert len(spec["golden"]) >= 2 and spec["self_test_tolerance"] == 1e-4
    assert all(
        sum(sample["probabilities"]) == pytest.approx(1, abs=1e-5) for sample in spec["golden"]
    )


def test_onnx_names_its_classes_for_foreign_readers(trained):
    properties = {
        entry.key: entry.value for entry in onnx.load(trained.export / "model.onnx").metadata_props
    }
    assert json.loads(properties["classes"]) == list("0123456789")
    minimum = json.loads(properties["spec"])["onnxruntime_min"].split(".")
    assert [int(part) for part in minimum] >= [1, 14]


@pytest.mark.parametrize("name", ["model.onnx", "model.pt"])
def test_file_does_not_tell_the_training_machines_paths(trained, name):
    content = (trained.export / name).read_bytes()
    for path in (ROOT, trained.place, os.path.dirname(torch.__file__)):
        assert os.fsencode(path) not in content


def test_colour_images_go_all_the_way(call, here, cifar10, in_process):
    arguments = [
        "--dataset",
        "cifar10",
        "--model",
        "mynet",
        "--epochs",
        "1",
        "--batch-size",
        "32",
        "--data-dir",
    ]
    call(step1_train.main, *arguments, cifar10).done()
    call(step2_export.main, "--format", "onnx").done()
    model = Model(str(here / "exports" / "cifar10-mynet" / "model.onnx"))
    assert (model.spec["channels"], model.spec["image_size"], len(model.spec["mean"])) == (
        3,
        [32, 32],
        3,
    )
    assert (
        model.spec["classes"][9] == "truck"
        and parity_of(here / "exports" / "cifar10-mynet")["onnx"]["passed"]
    )


def test_one_format_later_keeps_the_others_entry(call, small, small_run, here, in_process):
    shutil.copytree(small.export, here / "exports" / "small")
    before = parity_of(small.export)
    call(step2_export.main, "--format", "torchscript", "--run", "small").done()
    after = parity_of(here / "exports" / "small")
    assert after["onnx"] == before["onnx"] and after["torchscript"]["passed"]
    assert sorted(os.listdir(here / "exports" / "small")) == [
        "model.onnx",
        "model.pt",
        "parity.json",
        "step3_infer.pyz",
    ]


def test_files_of_another_checkpoint_do_not_stay_beside_new_ones(
    call, small, small_run, here, in_process
):
    shutil.copytree(small.export, here / "exports" / "small")
    report = parity_of(small.export)
    report["onnx"]["checkpoint_sha256"] = "0" * 64
    (here / "exports" / "small" / "parity.json").write_text(json.dumps(report))
    (here / "exports" / "small" / "bundle").mkdir()
    (here / "exports" / "small" / "small-bundle.zip").write_bytes(b"of the other checkpoint")
    result = call(step2_export.main, "--format", "torchscript").done()
    assert "held an export of another checkpoint, which is removed: onnx" in result.err
    assert sorted(os.listdir(here / "exports" / "small")) == [
        "model.pt",
        "parity.json",
        "step3_infer.pyz",
    ]
    assert parity_of(here / "exports" / "small").keys() == {"torchscript"}


def test_a_test_split_that_has_changed_is_refused(call, small_run, here, monkeypatch):
    digits = data.load("digits")
    swapped = dataclasses.replace(
        digits, test_images=digits.test_images[::-1].copy(), fingerprint={}
    )
    monkeypatch.setattr(data, "load", lambda *_, **__: with_fingerprint(swapped))
    refused = call(step2_export.main, "--format", "onnx")
    refused.error(1, "not what runs/small was trained with", "the test split has other images")
    assert not list(here.glob("exports/*/model.*"))


def test_threads_are_those_asked_for(call, small_run, here, in_process, plant, monkeypatch):
    plant()
    threads, model_class = [], gate.Model
    watch = lambda file, count: threads.append(count) or model_class(file, count)  # noqa: E731
    monkeypatch.setattr(gate, "Model", watch)
    call(step2_export.main, "--format", "onnx", "--threads", 1).done()
    assert threads == [1] and torch.get_num_threads() == 1


def test_newest_run_is_taken(call, small, small_run, here, monkeypatch):
    shutil.copytree(small_run, here / "runs" / "older")
    os.utime(here / "runs" / "older" / "checkpoint.pt", (1e9, 1e9))
    # no format failed
    monkeypatch.setattr(step2_export, "export", lambda run, *_: print(run.path) or [])
    result = call(step2_export.main).done()
    assert result.out.strip() == "runs/small" and "runs/small" in result.err
    assert call(step2_export.main, "--run", "older").done().out.strip() == "runs/older"
    assert (
        call(step2_export.main, "--run", here / "runs" / "older")
        .done()
        .out.strip()
        .endswith("runs/older")
    )


def test_no_run_at_all(call, here):
    call(step2_export.main).error(2, "no trained run", "step1_train.py")
    assert not list(here.iterdir())


def test_unknown_run_lists_those_there_are(call, small_run):
    call(step2_export.main, "--run", "smal").error(2, "'smal'", "small")


@pytest.mark.parametrize(
    "option", ["--opset 17", "--format coreml", "--tolerance 0", "--tolerance big"]
)
def test_wrong_option(call, here, option):
    call(step2_export.main, *option.split()).error(2, *option.split())


@pytest.mark.parametrize(
    "options, needed",
    [
        ("--max-drop 0.5", "--format onnx-int8"),  # its default, but said aloud
        ("--max-drop 0 --format pt2 onnx", "--format onnx-int8"),
        ("--tolerance 1e-3 --format onnx-int8", "--format torchscript or onnx or pt2"),
        ("--opset 20 --format torchscript pt2", "--format onnx or onnx-int8"),
        ("--bundle --format torchscript", "--format onnx"),
    ],
)
def test_option_without_effect_on_the_formats(call, here, options, needed):
    call(step2_export.main, *options.split()).error(2, options.split()[0], needed)


def test_options_have_their_defaults():
    arguments = step2_export.parse([])
    assert (arguments.opset, arguments.tolerance, arguments.max_drop) == (18, 1e-4, None)
    arguments = step2_export.parse(
        ["--format", "onnx", "onnx-int8", "--max-drop", "0", "--opset", "20"]
    )
    assert (arguments.opset, arguments.tolerance, arguments.max_drop) == (20, 1e-4, 0)


def test_data_dir_without_effect(call, small_run, here):
    call(step2_export.main, "--data-dir", here).error(2, "--data-dir", "read from files", "digits")
    assert not (here / "exports").exists()


def test_the_parser_names_the_formats_that_there_are():
    named = {name for name, chosen in FORMATS.items() if not chosen.fixed_version_of}
    assert named == set(NAMES) == {name for name in FORMATS if not name.endswith("-fixed")}
    files = [chosen.file for chosen in FORMATS.values()]
    assert {name for name in files if name.endswith(".onnx")} == set(MODEL_NAMES)


@pytest.fixture
def poisoned(here):
    """poisoned(line) -> an environment in which `import torch` does what the line of Python
    says."""

    def poison(line):
        (here / "poison").mkdir()
        (here / "poison" / "torch.py").write_text(f"{line}\n")
        return {**os.environ, "PYTHONPATH": str(here / "poison"), "PYTHONDONTWRITEBYTECODE": "1"}

    return poison


@pytest.mark.parametrize(
    "options, code",
    [("--help", 0), ("--opset 17", 2), ("--fromat onnx", 2), ("--max-drop 1", 2), ("", 1)],
)
def test_usage_does_not_wait_for_torch(execute, here, poisoned, options, code):
    environment = poisoned("raise ImportError('torch is poisoned')")
    result = execute(ROOT / "step2_export.py", *options.split(), cwd=here, env=environment)
    assert result.code == code and ("torch is poisoned" in result.err) == (options == "")


def test_interrupted_while_torch_is_imported(execute, here, poisoned):
    environment = poisoned(
        "import os, signal, time; os.kill(os.getpid(), signal.SIGINT); time.sleep(20)"
    )
    result = execute(ROOT / "step2_export.py", cwd=here, env=environment)
    assert result.code == -signal.SIGINT and result.err == ""


def edit(run, change):
    """Load a run's checkpoint, let `change` alter it, save it."""
    checkpoint = torch.load(run / "checkpoint.pt", weights_only=True)
    change(checkpoint)
    torch.save(checkpoint, run / "checkpoint.pt")


class Code:
    """Unpickling an object of this class makes the file `executed`."""

    def __reduce__(self):
        return open, ("executed", "w")


@pytest.mark.parametrize("kind", ["truncated", "empty", "text", "pickle with code", "other dict"])
def test_checkpoint_that_is_none(call, small_run, here, kind):
    path = small_run / "checkpoint.pt"
    whole = path.read_bytes()
    contents = {"truncated": whole[: len(whole) // 2], "empty": b"", "text": b"hello\n" * 100}
    code = pickle.dumps({"schema": 1, "spec": Code(), "state_dict": {}}, protocol=2)
    path.write_bytes(contents.get(kind, code))
    if kind == "other dict":
        torch.save({"weights": torch.zeros(3)}, path)
    call(step2_export.main).error(1, "runs/small/checkpoint.pt", "not a Threestep checkpoint")
    assert not (here / "executed").exists() and not (here / "exports").exists()


def test_such_code_would_have_been_executed(here):
    pickle.loads(pickle.dumps(Code()))
    assert (here / "executed").exists()


def test_code_in_a_torch_checkpoint_is_not_executed(call, small_run, here):
    edit(small_run, lambda checkpoint: checkpoint.update(extra=Code()))
    call(step2_export.main).error(1, "runs/small/checkpoint.pt")
    assert not (here / "executed").exists()


def test_checkpoint_of_a_newer_threestep(call, small_run):
    edit(small_run, lambda checkpoint: checkpoint.update(schema=99))
    call(step2_export.main).error(1, "schema 99", "update")


def test_checkpoint_of_an_older_threestep(call, small_run, here, in_process):
    edit(
        small_run,
        lambda checkpoint: checkpoint.update(schema=1) or checkpoint.pop("training", None),
    )
    call(step2_export.main, "--format", "torchscript").done()
    assert parity_of(here / "exports" / "small")["torchscript"]["passed"]


def test_checkpoint_of_another_shape(call, small_run):
    edit(small_run, lambda checkpoint: checkpoint["spec"]["arguments"].update(hidden=[99]))
    call(step2_export.main).error(1, "runs/small/checkpoint.pt")


def test_checkpoint_whose_weights_changed_since_training(call, small_run, here):
    edit(
        small_run,
        lambda checkpoint: [value.mul_(-1) for value in checkpoint["state_dict"].values()],
    )
    call(step2_export.main).error(1, "training reported", "changed checkpoint")
    assert not list(here.glob("exports/*/model.*"))


@pytest.mark.parametrize("out", ["file", "file/below"])
def test_output_directory_that_cannot_be_made(call, small_run, here, out):
    (here / "file").write_text("not a directory")
    call(step2_export.main, "--out", out).error(1, f"cannot write {out}")


def test_as_a_process(execute, here):
    execute(ROOT / "step2_export.py", "--run", "nothing", cwd=here).error(2, "'nothing'")


def test_threads_are_those_that_are_free_or_that_are_asked_for(
    call, small, small_run, plant, in_process, monkeypatch
):
    plant()
    unquantized = small.export / "model.onnx"
    monkeypatch.setattr(exporters, "export_onnx", lambda _, path: shutil.copy(unquantized, path))
    used, load = [], Model.__init__

    def record(self, path, threads=None, *more, **options):
        used.append(threads)
        return load(self, path, threads, *more, **options)

    monkeypatch.setattr(Model, "__init__", record)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(cpu, "usable_cpus", lambda: 4)
    monkeypatch.setattr(cpu, "cpus_taken", lambda: 1.2)
    arguments = ["--format", "onnx", "onnx-int8", "--max-drop", 100]
    result = call(step2_export.main, *arguments).done()
    assert "note: running on 2 CPU threads: other programs use 1.2 of 4 CPUs" in result.err
    assert len(used) >= 6 and set(used) == {2}
    used.clear()
    assert "CPU threads" not in call(step2_export.main, *arguments, "--threads", 3).done().err
    assert len(used) >= 6 and set(used) == {3}


def test_what_step_1_said_of_the_data_is_not_said_again(call, here, in_process):
    rng = np.random.default_rng(0)
    for label, name in enumerate("ab"):
        (here / "photos" / name).mkdir(parents=True)
        for k in range(10):
            pixels = rng.integers(0, 100, (8, 8), dtype=np.uint8) + 100 * label
            Image.fromarray(pixels.astype(np.uint8)).save(here / "photos" / name / f"{k}.png")
    (here / "photos" / "a" / "labels.txt").touch()
    (here / "photos" / "b" / "broken.png").write_text("no image")
    step1 = call(
        step1_train.main, *["--data-dir", "photos", "--model", "linear", "--epochs", "1"]
    ).done()
    assert "labels.txt" in step1.err and "broken.png" in step1.err
    step2 = call(step2_export.main, "--format", "torchscript").done()
    assert "labels.txt" not in step2.err and "broken.png" not in step2.err


def test_a_failed_export_leaves_the_set_of_another_checkpoint_as_it_was(
    call, small, small_run, here, in_process, plant
):
    out = here / "exports" / "small"
    shutil.copytree(small.export, out)
    report = parity_of(small.export)
    for figures in report.values():
        figures["checkpoint_sha256"] = "0" * 64
    (out / "parity.json").write_text(json.dumps(report))
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    plant(lambda good, path: Path(path).write_bytes(b"no model"))
    result = call(step2_export.main, "--format", "onnx")
    result.error(1, "model.onnx is not written")
    assert "stays as it was" in result.err
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_the_column_of_paths_is_as_wide_as_the_longest():
    chosen = [FORMATS["onnx"], FORMATS["onnx-int8"]]
    assert step2_export.width_of_paths("exports/a", chosen, has_bundle=False) == 36
    out = "exports/a-run-of-rather-a-long-name"
    longest = f"{out}/model.int8.onnx"
    assert step2_export.width_of_paths(out, chosen, has_bundle=False) == len(longest)
    assert step2_export.width_of_paths(out, chosen, has_bundle=True) > 2 * len(out)
