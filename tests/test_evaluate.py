"""Step 3's --evaluate: its figures, where labels come from, and what it refuses."""

import csv
import json
import os
import shutil

import numpy as np
import pytest
from conftest import ROOT, train_and_export
from PIL import Image

import data
import step3_infer
from inference import metrics
from inference.errors import Problem
from inference.evaluate import class_lines
from inference.labels import FolderLabels, ListLabels


@pytest.fixture(scope="module")
def files(once):
    """A network that was trained on digits in files, and the folder of its test split."""
    return once("digit-files", train_on_files)


def train_on_files(place):
    dataset = data.load("digits")
    for split, count in (("train", 500), ("test", 150)):
        images = getattr(dataset, f"{split}_images")[:count, :, :, 0]
        labels = getattr(dataset, f"{split}_labels")[:count]
        for number, (image, label) in enumerate(zip(images, labels, strict=True)):
            folder = place / "set" / split / str(label)
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.asarray(image)).save(folder / f"{number}.png")
    arguments = ["--data-dir", str(place / "set"), "--model", "mlp", "--epochs", "3"]
    return train_and_export(place, "files", *arguments)


@pytest.fixture
def evaluate(call, files):
    """evaluate(*arguments) -> Result, of the network that was trained on files."""
    return lambda *arguments: call(
        step3_infer.main, "--model", files.export / "model.onnx", "--evaluate", *arguments
    )


@pytest.fixture
def figures(evaluate):
    return lambda *arguments: json.loads(evaluate("--format", "json", *arguments).out)


def test_the_figures_are_those_of_step1(evaluate, figures, files):
    found = figures(files.place / "set" / "test")
    summary = json.loads((files.run / "summary.json").read_text())
    assert 0.3 < found["accuracy"] < 1 and found["images"] == 150
    names = ["balanced_accuracy", "macro_f1", "calibration_error", "calibration_error_floor"]
    for name in names:
        assert found[name] == pytest.approx(summary[name], abs=2e-6)
    assert found["accuracy"] == round(summary["test_accuracy"], 6)
    for name, row in summary["per_class"].items():
        mine = found["per_class"][name]
        for key in ("recall", "precision", "f1"):
            assert mine[key] == round(row[key], 6)
        assert mine["images"] == row["support"]

    text = evaluate(files.place / "set" / "test").done().out
    for value in (summary["test_accuracy"], *(summary[name] for name in names)):
        assert f" {value:.2%}" in text


def test_every_figure_agrees_with_the_rows(figures, files, here):
    place = files.place / "set" / "test"
    found = figures("--min-probability", 0.5, "--output", "rows.jsonl", place)
    rows = [json.loads(line) for line in (here / "rows.jsonl").read_text().splitlines()]
    assert len(rows) == 150
    answered = [row for row in rows if row["label"] == row["answer"]]
    assert 0 < len(answered) < 150
    assert {row["label"] for row in rows if row["probability"] < 0.5} == {"unsure"}
    assert found["answered"] == round(len(answered) / 150, 6)
    assert found["unsure"] == round(1 - len(answered) / 150, 6) and found["unknown"] == 0
    right = sum(row["answer"] == row["truth"] for row in answered)
    assert found["accuracy_answered"] == round(right / len(answered), 6)

    mistakes = [row for row in rows if row["answer"] != row["truth"]]
    mistakes.sort(key=lambda row: -row["probability"])
    assert [row["path"] for row in found["worst"]] == [row["path"] for row in mistakes[:20]]
    assert found["confusions"][0]["count"] == max(
        sum(row["truth"] == a and row["answer"] == b for row in mistakes)
        for a in "0123456789"
        for b in "0123456789"
    )

    figures("--output", "rows.csv", place)
    with open("rows.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["truth"] for row in table] == [row["truth"] for row in rows]


def test_the_interval_is_wilsons():
    low, high = metrics.wilson_interval(81, 263)  # Newcombe 1998, table I: 0.2553 to 0.3662
    assert (round(low, 4), round(high, 4)) == (0.2553, 0.3662)
    low, high = metrics.wilson_interval(0, 20)
    assert low == 0 and high == pytest.approx(0.1611, abs=1e-4)
    assert metrics.wilson_interval(29, 29)[1] == pytest.approx(1)


def test_labels_that_cannot_be_used_are_counted_and_named(evaluate, files, here):
    shutil.copytree(files.place / "set" / "test" / "3", here / "set" / "3")
    shutil.copytree(files.place / "set" / "test" / "4", here / "set" / "four")
    shutil.copy(next((files.place / "set" / "test" / "5").iterdir()), here / "set")
    (here / "set" / "3" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    result = evaluate("--format", "json", "set")
    found = json.loads(result.out)
    many = len(list((here / "set" / "four").iterdir()))
    assert found["unknown_labels"] == {"four": many} and found["unlabelled"] == 1
    assert found["errors"] == 1 and result.code == 1
    assert "without a label" in result.err and f"four {many}" in result.err
    evaluate("set/four").error(1, "no image has a label", "--labels")


def test_a_file_that_is_given_twice_counts_once(evaluate, files):
    place = files.place / "set" / "test"
    image = next((place / "3").iterdir())
    once = evaluate("--format", "json", place)
    twice = evaluate("--format", "json", place, image, f"{place}/4/../3/{image.name}")
    assert json.loads(twice.out) == json.loads(once.out)
    assert "2 images given more than once, counted once" in twice.err


def test_what_a_list_leaves_open_is_counted(evaluate, files, here):
    place = files.place / "set" / "test"
    image = next((place / "3").iterdir())
    (place / "unlisted.png").write_bytes(b"broken")
    rows = ["path,label,split", f"3/{image.name},3,train", "3/gone.png,3,train", ",3,train"]
    (here / "list.csv").write_text("\n".join(rows))
    result = evaluate("--labels", "list.csv", "--format", "json", place)
    (place / "unlisted.png").unlink()
    found = json.loads(result.out)
    assert result.code == 0 and found["images"] == found["not_found"] == 1
    assert "no row of the test split" in result.err and "3/gone.png" in result.err
    assert "1 row is left out" in result.err


def test_nothing_that_can_be_read_is_said_once(evaluate):
    evaluate("nowhere").error(1, "nowhere: no such file")


@pytest.mark.skipif(not os.path.exists("/dev/zero"), reason="Windows has no such devices")
def test_a_list_without_an_end_is_refused(monkeypatch):
    monkeypatch.setattr("inference.lists.MAX_PIPED_BYTES", 1 << 20)
    with pytest.raises(Problem, match="more than 1 MiB and is no regular file"):
        ListLabels(["cat"], ["."], "/dev/zero")


def test_a_release_check(evaluate, files):
    place = files.place / "set" / "test"
    evaluate("--min-accuracy", 0.01, place).done()
    evaluate("--min-accuracy", 1, place).error(1, "below --min-accuracy 1")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--evaluate"], ["PATH"]),
        (["--evaluate", "--format", "csv", "x.png"], ["text or json"]),
        (["--evaluate", "-"], ["not - for standard input"]),
        (["--evaluate", "--top-k", "2", "x.png"], ["--top-k has no effect"]),
        (["--min-accuracy", "0.5", "x.png"], ["no effect on PATH", "goes with --evaluate"]),
        (["--evaluate", "--output", "", "x.png"], ["--output is empty"]),
        (["--monitor", "", "x.png"], ["--monitor is empty"]),
        ([""], ["PATH is empty"]),
    ],
)
def test_usage(call, arguments, words):
    call(step3_infer.main, *arguments).error(2, *words)


def test_a_regression_is_refused(call, linear):
    model = linear.export / "model.onnx"
    call(step3_infer.main, "--model", model, "--evaluate", ROOT).error(2, "--values")


# ---------------------------------------------------------------------------------------- labels
def test_labels_by_folders(here):
    (here / "set" / "test" / "cat" / "indoor").mkdir(parents=True)
    labels = FolderLabels(["cat", "dog"], ["set", "other/*/x.png", "cat/1.png"])
    assert labels.of("set/test/cat/1.png") == "cat"
    assert labels.of("set/test/cat/indoor/dog/1.png") == "cat"
    assert labels.of("set/test/zebra/1.png") == "zebra"
    assert labels.of("set/test/1.png") is None and labels.of("set/1.png") is None
    assert labels.of("other/dog/x.png") == "dog"
    assert labels.of("cat/1.png") == "cat"
    assert FolderLabels(["cat"], ["set/test/cat"]).of("set/test/cat/1.png") == "cat"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("list.csv", "image,label\na/1.png,cat\nb/2.png,dog\n"),
        ("list.csv", "Class;File Path\ncat;a/1.png\ndog;.\\b\\2.png\n"),
        ("list.csv", "a/1.png,cat\nb/2.png,dog\n"),
        ("list.csv", "id,label,class\na/1,0,cat\nb/2,1,dog\n"),
        ("list.csv", "path,cat,dog\na/1.png,1,0\nb/2.png,0,1\n"),
        ("list.txt", "a/1.png cat\nb/2.png dog\n"),
        (
            "list.jsonl",
            '{"file_name": "a/1.png", "label": "cat"}\n{"file_name": "b/2.png", "label": "dog"}',
        ),
        ("list.csv", "path,label,split\na/1.png,cat,test\nb/2.png,dog,test\nc/3.png,dog,train\n"),
    ],
)
def test_labels_by_a_list(here, name, text):
    (here / name).write_text(text)
    labels = ListLabels(["cat", "dog"], ["a", "b", "c"], name)
    assert labels.of("a/1.png") == "cat" and labels.of(str(here / "b" / "2.png")) == "dog"
    assert labels.of("c/3.png") is None


def test_a_list_may_be_relative_to_the_images(here):
    (here / "photos" / "deep").mkdir(parents=True)
    (here / "list.csv").write_text("filename,target\n1.png,2.0\ndeep/2.png,7\n")
    labels = ListLabels(["2", "3"], ["photos"], "list.csv")
    assert labels.of("photos/1.png") == "2" and labels.of("photos/deep/2.png") == "7"


def test_a_file_of_two_labels_has_none(here, capsys):
    (here / "list.csv").write_text("path,label\n1.png,cat\n1.png,dog\n2.png,dog\n2.png,dog\n")
    labels = ListLabels(["cat", "dog"], ["."], "list.csv")
    assert labels.of("1.png") is None and labels.of("2.png") == "dog"
    assert "more than one label" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, ["cannot read"]),
        ("", ["is empty"]),
        ("name,label\nx,cat\n", ["no column"]),
        ("path,label\n", ["lists no image"]),
        ("path,label\nx.png\n", ["row 2"]),
    ],
)
def test_a_list_that_cannot_be_used(evaluate, here, files, text, words):
    if text is not None:
        (here / "list.csv").write_text(text)
    place = files.place / "set" / "test"
    result = evaluate("--labels", "list.csv", place)
    result.error(result.code, *words)
    assert result.code in (1, 2)


def test_compare_takes_a_list_as_well(call, files, here):
    place = files.place / "set" / "test"
    lines = [f"{path.parent.name}/{path.name},{path.parent.name}" for path in place.rglob("*.png")]
    (here / "list.csv").write_text("\n".join(["path,label", *lines[:40]]))
    model = files.export / "model.onnx"
    arguments = ["--compare", model, model, "--labels", "list.csv", "--format", "json", place]
    assert json.loads(call(step3_infer.main, *arguments).done().out)["labelled"] == 40


# ------------------------------------------------------------------------------------------ text
@pytest.mark.parametrize("count", [2, 30, 31, 1000])
def test_the_table_fits_whatever_the_classes(count):
    row = {"recall": 0.5, "precision": 1.0, "f1": 2 / 3, "images": 4000, "answers": 2000}
    lines = class_lines({f"class {k} " + "x" * 90: row for k in range(count)})
    assert max(map(len, lines)) <= 80 and len(lines) <= 32
    assert (count > 30) == ("of 1,000 classes" in lines[-1] or "of 31 classes" in lines[-1])
