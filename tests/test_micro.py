"""Files for microcontrollers: the gate on a small stored file, and faults planted in it.

micro.int8.tflite is `--dataset digits --model resblock --epochs 12 --calibration none` by
`--format tflite-micro`. What converts a network runs where litert-torch is installed.
"""

import dataclasses
import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import data
import model
import step2_export
import step3_infer
from deploy import exporters, micro, micro_file, micro_gate, micro_runtime, promises
from deploy.comparing import Outputs
from deploy.formats import FORMATS
from deploy.micro_file import OPERATORS
from inference.engines import read_spec_at_end
from inference.errors import Problem
from inference.images import fit_to_input
from inference.spec import read_spec

STORED = Path(__file__).parent / "micro.int8.tflite"
needs_runtime = pytest.mark.skipif(
    importlib.util.find_spec("tflite_micro") is None, reason="tflite-micro is not installed"
)
needs_converter = pytest.mark.skipif(
    importlib.util.find_spec("litert_torch") is None, reason="litert-torch is not installed"
)
needs_litert = pytest.mark.skipif(
    importlib.util.find_spec("ai_edge_litert") is None, reason="ai-edge-litert is not installed"
)


# ---------------------------------------------------------------------------------- the stored file
def write(folder, content, spec, array=None):
    """Write a file with its C array, perhaps of other bytes, as the exporter does."""
    file = folder / "model.int8.tflite"
    exporters.write_with_spec(str(file), content, spec, compressed=True)
    found = micro_file.read_model(content)
    for name, text in micro_file.c_sources(array or content, found, spec).items():
        (folder / name).write_bytes(text)
    return file


@pytest.fixture(scope="module")
def stored():
    """Its content, its spec, 40 test images, and what the micro runtime answers."""
    if importlib.util.find_spec("tflite_micro") is None:
        pytest.skip("tflite-micro is not installed")
    content = exporters.without_archive(STORED.read_bytes())
    spec = read_spec(read_spec_at_end(str(STORED)), str(STORED))
    digits = data.load("digits")
    dataset = SimpleNamespace(
        test_images=digits.test_images[:40],
        test_labels=digits.test_labels[:40],
        classes=digits.classes,
    )
    run, arena = micro_runtime.load_micro(content)
    answers = run(fit_to_input(dataset.test_images, spec))
    return SimpleNamespace(
        content=content, spec=spec, dataset=dataset, answers=answers, arena=arena()
    )


@pytest.fixture
def prove(stored, monkeypatch, tmp_path):
    """Prove a file that differs from the stored one, against the answers of that."""
    expected = Outputs(stored.answers, None)
    monkeypatch.setattr(micro_gate, "reference", lambda trained, images: expected)
    trained = SimpleNamespace(spec=stored.spec, fit="stretch")

    def prove(content=None, array=None, **changes):
        file = write(tmp_path, content or stored.content, {**stored.spec, **changes}, array)
        return micro_gate.prove_file(trained, str(file), stored.dataset, expected, 0.5)

    return prove


def test_the_stored_file_passes(stored, prove):
    figures, failures = prove()
    assert failures == []
    assert figures["samples"] == 40 and figures["accuracy"] > 0.9
    assert figures["arena"] == stored.arena == stored.spec["micro"]["arena"]
    assert figures["operators"] == stored.spec["micro"]["operators"]
    assert "TensorFlow Lite Micro" in figures["runtime"]


def test_a_wrong_weight_is_found(stored, prove):
    broken = bytearray(stored.content)
    start = len(broken) // 3
    broken[start : start + 4000] = bytes(4000)
    try:
        _, failures = prove(bytes(broken))
    except Problem as problem:
        failures = [str(problem)]
    assert failures


def test_another_arena_is_found(stored, prove):
    _, failures = prove(micro={**stored.spec["micro"], "arena": 1000})
    assert any("an arena of 1,000 bytes, and takes" in failure for failure in failures)


def test_other_classes_are_found(stored, prove):
    names = stored.spec["classes"]
    _, failures = prove(classes=[*names[1:], names[0]])
    assert any("points of accuracy" in failure for failure in failures)
    assert any("classes are not the network's" in failure for failure in failures)


def test_another_c_array_is_found(stored, prove):
    other = stored.content[:-1] + bytes([stored.content[-1] ^ 1])
    _, failures = prove(array=other)
    assert "model_data.cc holds other bytes than the file" in failures


def test_another_input_is_found(prove):
    with pytest.raises(
        Problem, match=r"its input is uint8 \[1, 8, 8, 1\] .*, not uint8 \[1, 8, 8, 3\]"
    ):
        prove(channels=3)


@needs_runtime
def test_an_operator_that_the_runtime_lacks_is_found(monkeypatch):
    monkeypatch.delitem(micro_file.OPERATORS, "ADD")
    found = micro_file.read_model(exporters.without_archive(STORED.read_bytes()))
    spec = read_spec(read_spec_at_end(str(STORED)), str(STORED))
    wanted = ["the runtime of microcontrollers has no ADD in int8"]
    assert micro_file.check_model(found, spec) == wanted


@needs_runtime
def test_weights_behind_the_flatbuffer_are_found():
    found = micro_file.read_model(exporters.without_archive(STORED.read_bytes()))
    assert found.outside == 0
    spec = read_spec(read_spec_at_end(str(STORED)), str(STORED))
    (failure,) = micro_file.check_model(dataclasses.replace(found, outside=3), spec)
    assert "3 arrays of its weights lie behind the FlatBuffer" in failure


@needs_runtime
def test_a_file_that_is_cut_off(tmp_path):
    file = tmp_path / "model.int8.tflite"
    file.write_bytes(STORED.read_bytes()[:-30])
    trained = SimpleNamespace(spec={}, fit="stretch")
    with pytest.raises(Problem, match="cut off, or not a file of step2"):
        micro_gate.prove_file(trained, str(file), None, None, 0.5)
    with pytest.raises(Problem, match="not a TensorFlow Lite file"):
        micro_file.read_model(b"no model")


@needs_runtime
def test_what_the_runtime_says_is_the_reason(stored):
    broken = bytearray(stored.content)
    for start in range(len(broken) // 2, len(broken) // 2 + 200):
        broken[start] ^= 0xFF
    try:
        run, _ = micro_runtime.load_micro(bytes(broken))
        run(fit_to_input(stored.dataset.test_images[:1], stored.spec))
    except Problem as problem:
        assert "\n" not in str(problem)


# ------------------------------------------------------------------------------------------ C array
def test_names_in_c():
    assert micro_file.c_string('a"b\\c?\n') == "a\\042b\\134c\\077\\012"
    assert micro_file.c_string("é1") == "\\303\\2511"
    assert micro_file.c_comment("timm/x.y*/ int\n") == "timm/x.y_/_int_"


def test_promises_reach_the_file_and_its_header(stored, tmp_path):
    file = write(tmp_path, stored.content, stored.spec)
    promised = {"kind": "accuracy", "name": None, "share": 0.9, "threshold": 0.75}
    promised |= {"confidence": 0.95, "images": 100, "source": "held out"}
    promised |= {"chosen": {}, "test": {}}
    promises.rewrite(FORMATS["tflite-micro"], None, str(file), [promised])

    spec = read_spec(read_spec_at_end(str(file)), str(file))
    assert spec["promises"] == [promised]
    assert exporters.without_archive(file.read_bytes()) == stored.content
    assert "probabilities[best] >= 0.7499995" in (tmp_path / "model_data.h").read_text()


@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")
def test_the_c_array_compiles(stored, tmp_path):
    spec = {**stored.spec, "classes": ['"', "\\", "ü", *stored.spec["classes"][3:]]}
    spec["min_probability"] = 0.5
    spec["promises"] = [
        {"kind": "accuracy", "name": None, "share": 0.9, "threshold": 0.6},
        {"kind": "recall", "name": "ü", "share": 0.99, "threshold": 0.25},
        {"kind": "recall", "name": "\\", "share": 0.99, "threshold": 0.2},
    ]
    write(tmp_path, stored.content, spec)
    (tmp_path / "main.cc").write_text(
        '#include "model_data.h"\n#include <cstdio>\n'
        "struct Resolver { int n = 0;\n"
        + "".join(f"  void {method}() {{ ++n; }}\n" for method, _ in OPERATORS.values())
        + "};\nint main() {\n  Resolver resolver;\n  MODEL_REGISTER_OPERATORS(resolver);\n"
        '  std::printf("%zu %d %d %s%s%s ", model_data_size, resolver.n, model_operator_count,\n'
        "              model_labels[0], model_labels[1], model_labels[2]);\n"
        "  unsigned sum = 0;\n"
        "  for (std::size_t i = 0; i < model_data_size; ++i) sum += model_data[i];\n"
        '  std::printf("%u", sum);\n'
        "  const float answers[][10] = {{0.6f, 0.1f}, {0.59f, 0.1f}, {0.5f, 0.24f, 0.26f},\n"
        "                               {0.7f, 0.3f}, {0.1f, 0.1f, 0.1f, 0.7f}};\n"
        '  for (const float* answer : answers) std::printf(" %d", model_answer(answer));\n}\n',
        encoding="utf-8",
    )
    command = ["g++", "-std=c++17", "-Wall", "-Werror", "main.cc", "model_data.cc", "-o", "main"]
    subprocess.run(command, cwd=tmp_path, check=True)
    said = subprocess.run([tmp_path / "main"], capture_output=True, check=True).stdout.decode()
    count = len(stored.spec["micro"]["operators"])
    bytes_and_names = f'{len(stored.content)} {count} {count} "\\ü {sum(stored.content)}'
    assert said == f"{bytes_and_names} 0 -1 2 1 3"


# As little of the runtime's interface as the documented program uses: this proves no more than that
# the program fits model_data.h.
RUNTIME = """
#include <cstddef>
#include <cstdint>
enum TfLiteStatus { kTfLiteOk, kTfLiteError };
struct TfLiteTensor { union { uint8_t* uint8; float* f; } data; size_t bytes; };
namespace tflite {
struct Model {};
inline const Model* GetModel(const void*) { return nullptr; }
template <unsigned count> struct MicroMutableOpResolver { METHODS };
struct MicroInterpreter {
  template <class Resolver> MicroInterpreter(const Model*, Resolver&, uint8_t*, size_t) {}
  TfLiteStatus AllocateTensors() { return kTfLiteOk; }
  TfLiteStatus Invoke() { return kTfLiteOk; }
  TfLiteTensor* input(int) { return nullptr; }
  TfLiteTensor* output(int) { return nullptr; }
};
}
"""


@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")
def test_the_documented_program_fits_the_header(stored, tmp_path):
    write(tmp_path, stored.content, stored.spec)
    page = (Path(step2_export.__file__).parent / "deploy" / "ENGINES.md").read_text("utf-8")
    program = page.split("```cpp\n")[1].split("```")[0]
    (tmp_path / "main.cc").write_text(program, encoding="utf-8")

    folder = tmp_path / "tensorflow" / "lite" / "micro"
    folder.mkdir(parents=True)
    methods = "".join(f"int {method}() {{ return 0; }} " for method, _ in OPERATORS.values())
    runtime = "#pragma once\n" + RUNTIME.replace("METHODS", methods)
    (folder / "micro_interpreter.h").write_text(runtime)
    (folder / "micro_mutable_op_resolver.h").write_text('#include "micro_interpreter.h"\n')
    command = ["g++", "-std=c++17", "-Wall", "-Werror", "-I.", "-c", "main.cc"]
    subprocess.run(command, cwd=tmp_path, check=True)


# --------------------------------------------------------------------------------------- conversion
class Gelus(model.Network):
    """Padded and unpadded layers, GELU between them, batch norm behind a pooling, a global max."""

    def __init__(self, padding=0):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=padding),
            nn.GELU(),
            nn.Conv2d(8, 8, 3),
            nn.MaxPool2d(2),
            nn.BatchNorm2d(8),
            nn.GELU(),
        )
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.body(x).amax((2, 3)) / 5)


@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("small_arena", [False, True])
def test_the_rewritten_network_is_the_network(padding, small_arena):
    from deploy.micro_network import MicroClassifier

    torch.manual_seed(0)
    network = Gelus(padding).eval()
    norm = network.body[4]
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    norm.weight.data.uniform_(0.5, 2)
    deployable = model.Deployable(
        network, (12, 10), [0.5, 0.4, 0.3], [0.2, 0.3, 0.25], temperature=1.4
    ).eval()
    deployable.any_size = False
    images = torch.randint(0, 256, (1, 12, 10, 3)).float()
    with torch.no_grad():
        got = MicroClassifier(deployable, small_arena).eval()(images)
        wanted = deployable(images)
        for layer in (1, 5):  # with the same GELU, nothing else may differ
            network.body[layer] = Approximation(small_arena)
        same = deployable(images)
    assert (got - wanted).abs().max() < 0.03
    assert (got - same).abs().max() < 1e-5


class Approximation(nn.Module):
    def __init__(self, small_arena):
        super().__init__()
        self.small_arena = small_arena

    def forward(self, x):
        if self.small_arena:
            return nn.functional.hardswish(1.9 * x) / 1.9
        return x * torch.sigmoid(1.702 * x)


def test_a_negative_scale_stays_behind_its_pooling():
    from deploy.micro_network import fold_batch_norm, traced

    torch.manual_seed(0)
    network = Gelus().eval()
    network.body[4].weight.data[0] = -1
    images = torch.randn(1, 3, 12, 12)
    graph = traced(network, images)
    fold_batch_norm(graph)
    assert any(isinstance(layer, nn.BatchNorm2d) for layer in graph.modules())
    assert torch.allclose(graph(images), network(images), atol=1e-6)


def test_missing_packages(call, small_run, here, plant, monkeypatch):
    plant()
    real = importlib.util.find_spec

    def find_spec(name, *rest):
        return None if name in micro.PACKAGES else real(name, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    result = call(step2_export.main, "--format", "tflite-micro")
    assert result.code == 1
    assert "pip install litert-torch ai-edge-quantizer" in result.err
    assert not list(here.glob("exports/*/model*"))


def test_a_torch_that_is_too_new(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    broken = SimpleNamespace()  # no attribute `quantizer`, as after a change of torch's
    monkeypatch.setitem(sys.modules, "ai_edge_quantizer", broken)
    monkeypatch.setitem(sys.modules, "litert_torch", None)
    with pytest.raises(Problem, match=r"takes torch below 2\.15, and this is torch"):
        micro.import_packages()


def test_small_arena_belongs_to_it(call):
    result = call(step2_export.main, "--format", "onnx", "--small-arena")
    assert result.code == 2 and "only applies to --format tflite-micro" in result.err


@needs_converter
@needs_runtime
def test_export(call, small_run, here, plant, samples, in_process):
    plant()
    result = call(step2_export.main, "--format", "tflite-micro", "onnx", "--bundle").done()
    assert "an arena of" in result.out and "leaves out the output known" in result.err
    out = next(here.glob("exports/*"))
    parity = json.loads((out / "parity.json").read_text())["tflite-micro"]
    assert parity["passed"] and parity["both_interpreters"]["max_abs_diff"] <= parity["step"]
    assert {"model.int8.tflite", "model_data.h", "model_data.cc"} <= {
        path.name for path in (out / "bundle").iterdir()
    }
    assert "MODEL_REGISTER_OPERATORS" in (out / "bundle" / "README.md").read_text()
    assert "(resolver).AddSoftmax();" in (out / "bundle" / "model_data.h").read_text()
    file = out / "model.int8.tflite"
    call(step3_infer.main, "--model", file, "--self-test").done()
    assert call(step3_infer.main, "--model", file, samples[0]).done().out


@needs_converter
@needs_runtime
def test_the_runtime_finds_the_weights_of_a_larger_network(tmp_path):
    convolutions = [nn.Conv2d(3, 256, 3, stride=4), nn.ReLU(), nn.Conv2d(256, 256, 3)]
    network = nn.Sequential(*convolutions, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    deployable = model.Deployable(network, (16, 16), [0.5] * 3, [0.2] * 3).eval()
    source = SimpleNamespace(
        deployable=deployable, small_arena=False, spec={"image_size": [16, 16], "channels": 3}
    )
    images = np.random.default_rng(0).integers(0, 256, (8, 16, 16, 3), dtype=np.uint8)
    content = micro.convert(source, images, str(tmp_path / "float.tflite"))
    assert len(content) > 500_000 and micro_file.read_model(content).outside == 0
    run, _ = micro_runtime.load_micro(content)
    np.testing.assert_allclose(
        run(images), micro_runtime.load_reference(content)(images), atol=1e-3
    )


@needs_converter
def test_a_network_that_cannot_be_converted(tmp_path):
    class Sorts(nn.Module):
        def forward(self, x):
            return x.flatten(1).sort(1)[0][:, :4]

    deployable = model.Deployable(Sorts(), (8, 8), [0.5], [0.2]).eval()
    deployable.any_size = False
    images = np.zeros((4, 8, 8, 1), np.uint8)
    dataset = SimpleNamespace(train_images=images, test_images=images, test_labels=np.arange(4))
    spec = {"known": None, "image_size": [8, 8], "channels": 1, "classes": list("abcd")}
    spec["fixed"] = {"batch": 1, "input": "uint8"}
    source = exporters.Source(deployable, spec, dataset=dataset)
    with pytest.raises(Problem, match=r"cannot be converted|cannot run this network") as caught:
        micro.export_micro(source, str(tmp_path / "model.int8.tflite"))
    assert "\n" not in str(caught.value)


@needs_litert
@pytest.mark.parametrize("lost", [1, 5, 30, 3000])
def test_step3_on_a_file_that_is_cut_off(call, here, samples, lost):
    (here / "cut.tflite").write_bytes(STORED.read_bytes()[:-lost])
    result = call(step3_infer.main, "--model", "cut.tflite", samples[0])
    result.error(1, "cut.tflite is cut off, or not a file of step2_export.py")
