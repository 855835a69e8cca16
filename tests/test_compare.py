"""Step 3's --compare: two files over the same images, what their answers differ in, and what it
refuses."""

import json
import os
import shutil

import numpy as np
import onnx
import pytest
from conftest import onnx_with
from PIL import Image

import step3_infer


@pytest.fixture
def compare(call, trained, here):
    """compare(*arguments) -> Result, of the small network, old.onnx, with the trained one,
    new.onnx."""
    return lambda *arguments: call(
        step3_infer.main, "--compare", "old.onnx", "new.onnx", *arguments
    )


@pytest.fixture
def files(small, trained, here):
    shutil.copy(small.export / "model.onnx", here / "old.onnx")
    shutil.copy(trained.export / "model.onnx", here / "new.onnx")
    return here


@pytest.fixture
def folders(files, samples):
    """The samples in folders that are named as their classes."""
    for digit, path in enumerate(samples):
        (files / "set" / str(digit)).mkdir(parents=True)
        shutil.copy(path, files / "set" / str(digit) / "x.png")
    return files / "set"


def answers(call, model, *paths):
    """What a plain prediction says: {path: {class: probability}}, best first."""
    out = (
        call(step3_infer.main, "--model", model, "--format", "json", "--top-k", 10, *paths)
        .done()
        .out
    )
    rows = map(json.loads, out.splitlines())
    return {
        row["path"]: {entry["label"]: entry["probability"] for entry in row["top"]} for row in rows
    }


def test_the_figures_are_those_of_two_predictions(call, compare, folders):
    figures = json.loads(compare("--format", "json", "set").done().out)
    old, new = (answers(call, model, "set") for model in ("old.onnx", "new.onnx"))
    best = {path: (next(iter(old[path])), next(iter(new[path]))) for path in old}
    flipped = [pair for pair in best.values() if pair[0] != pair[1]]
    assert flipped and figures["images"] == figures["labelled"] == 10
    assert figures["agreement"] == pytest.approx(1 - len(flipped) / 10)
    assert {(flip["old"], flip["new"]): flip["count"] for flip in figures["flips"]} == {
        pair: flipped.count(pair) for pair in flipped
    }
    counts = [flip["count"] for flip in figures["flips"]]
    assert counts == sorted(counts, reverse=True)
    changes = {
        path: max(abs(old[path][name] - new[path][name]) for name in old[path]) for path in old
    }
    found = {row["path"]: row["change"] for row in figures["changed"]}
    assert found == pytest.approx(changes, abs=1e-5)
    assert list(found.values()) == sorted(found.values(), reverse=True)
    for row in figures["changed"]:
        path = row["path"]
        assert (row["old"], row["new"]) == best[path]
        assert row["p_old"] == pytest.approx(old[path][row["old"]], abs=1e-5)
        assert row["p_new"] == pytest.approx(new[path][row["new"]], abs=1e-5)
    for k, name in enumerate(("old", "new")):
        side = figures[name]
        assert side["model"] == f"{name}.onnx" and side["bytes"] == os.path.getsize(f"{name}.onnx")
        right = sum(
            os.path.basename(os.path.dirname(path)) == pair[k] for path, pair in best.items()
        )
        assert side["accuracy"] == pytest.approx(right / 10) and 0 < side["ms_per_image"] < 1000


def test_text_and_output(compare, folders):
    lines = compare("set").done().out.splitlines()
    names = [line.split()[0] for line in lines]
    assert names[:5] == ["images", "agreement", "labelled", "old", "new"]
    assert names.count("changed") == 10 and "set/" in lines[-1]
    assert compare("--output", "out.txt", "set").done().out == ""
    written = [line.split()[0] for line in (folders.parent / "out.txt").read_text().splitlines()]
    assert written == names


def test_folders_that_name_no_class(compare, files, samples):
    figures = json.loads(compare("--format", "json", *samples).done().out)
    assert figures["labelled"] == 0 and figures["old"]["accuracy"] is None


def test_max_flips(compare, folders, files):
    figures = json.loads(compare("--format", "json", "set").done().out)
    share = 1 - figures["agreement"]
    compare("--max-flips", share + 0.05, "set").done()
    result = compare("--max-flips", share - 0.05, "--output", "out.txt", "set")
    result.error(1, "answers changed", "--max-flips")
    assert "agreement" in (files / "out.txt").read_text()  # whoever is refused wants to know why
    shutil.copy("old.onnx", "new.onnx")
    out = compare("--max-flips", 0, "set").done().out
    assert "agreement           1.0" in out and "changed" not in out and "flips" not in out


def test_unreadable_images_are_named_and_the_others_compared(compare, folders):
    (folders / "0" / "broken.png").write_text("no image")
    result = compare("--format", "json", "set", "missing.png")
    assert result.code == 1 and json.loads(result.out)["images"] == 10
    assert [line.split(": ")[:2] for line in result.err.splitlines()] == [
        ["error", "set/0/broken.png"],
        ["error", "missing.png"],
    ]


def test_no_images(compare, files):
    (files / "empty").mkdir()
    compare("empty").error(1, "empty", "no images")


def test_an_image_that_a_model_cannot_answer(compare, files, samples):
    graph = onnx.load("new.onnx")
    for tensor in graph.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT:
            values = onnx.numpy_helper.to_array(tensor) * np.float32("nan")
            tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    onnx.save(graph, "new.onnx")
    compare(samples[0]).error(1, str(samples[0]), "NaN")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"classes": [*"01234567", "eight", "nine"]},
            ["only old.onnx has 8, 9; only new.onnx has eight, nine"],
        ),
        ({"task": "regression"}, ["new.onnx", "numbers", "--values"]),
        ({"classes": None}, None),
    ],
)
def test_files_that_cannot_be_compared(compare, files, samples, changes, words):
    onnx_with("new.onnx", "new.onnx", **changes)
    if words is None:
        compare(samples[0]).error(1, "new.onnx has a malformed spec")
    else:
        compare(samples[0]).error(2, *words)


def test_classes_in_another_order(compare, files, folders):
    before = json.loads(compare("--format", "json", "set").done().out)
    graph = onnx.load("new.onnx")  # the last operator's output, turned round
    last = next(node for node in graph.graph.node if "probabilities" in node.output)
    last.output[list(last.output).index("probabilities")] = "straight"
    steps = {"starts": [-1], "ends": [-99], "axes": [1], "steps": [-1]}
    for name, values in steps.items():
        graph.graph.initializer.append(onnx.helper.make_tensor(f"turn_{name}", 7, [1], values))
    node = onnx.helper.make_node(
        "Slice", ["straight", *(f"turn_{n}" for n in steps)], ["probabilities"]
    )
    graph.graph.node.append(node)
    onnx.save(graph, "new.onnx")
    onnx_with("new.onnx", "new.onnx", classes=list("9876543210"))
    after = json.loads(compare("--format", "json", "set").done().out)
    for figures in (before, after):
        for side in ("old", "new"):
            figures[side] = figures[side]["accuracy"]
    assert after == before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--max-flips", "0.1", "x.png"], ["--max-flips has no effect on PATH"]),
        (["--compare", "a.onnx", "x.png"], ["PATH"]),
        (["--compare", "a.onnx", "b.onnx"], ["PATH"]),
        (["--compare", "a.onnx", "b.onnx", "-"], ["standard input"]),
        (["--compare", "a.onnx", "b.onnx", "x.png", "--format", "csv"], ["csv"]),
        (
            ["--compare", "a.onnx", "b.onnx", "x.png", "--model", "c.onnx"],
            ["--model has no effect"],
        ),
        (["--compare", "a.onnx", "b.onnx", "x.png", "--top-k", "2"], ["--top-k has no effect"]),
        (
            ["--compare", "a.onnx", "b.onnx", "x.png", "--max-flips", "5%"],
            ["--max-flips", "from 0 to 1"],
        ),
    ],
)
def test_wrong_usage(call, here, arguments, words):
    call(step3_infer.main, *arguments).error(2, *words)


def test_models_that_cannot_be_read(compare, files, samples):
    (files / "new.onnx").write_bytes(b"broken")
    compare(samples[0]).error(1, "new.onnx is not an ONNX file")
    os.unlink("new.onnx")
    compare(samples[0]).error(1, "no model file new.onnx")


@pytest.mark.slow
def test_other_engines_and_files_of_fixed_size(call, trained, all_formats, fixed_files, folders):
    Image.open("set/3/x.png").resize((20, 12)).save("set/3/other.png")
    exact = [all_formats / "model.pt", all_formats / "model.pt2"]
    others = [all_formats / "model.int8.onnx", *sorted(fixed_files.glob("model.fixed*.onnx"))]
    assert len(others) == 3
    for file in exact + others:
        arguments = ["--compare", trained.export / "model.onnx", file, "--format", "json", "set"]
        figures = json.loads(call(step3_infer.main, *arguments).done().out)
        assert figures["images"] == 11 and figures["agreement"] >= 0.9
        assert max(row["change"] for row in figures["changed"]) < (1e-4 if file in exact else 0.3)
