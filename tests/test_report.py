"""The pictures of a run, report.html and the model card."""

import base64
import errno
import hashlib
import io
import json
import os
import re
import shutil
import sys
import warnings
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

import report
from deploy import bundle
from inference.metrics import calibration_error, per_class
from inference.predict import Model
from report import card, drawing, page

pytest.importorskip("matplotlib", reason="pictures are drawn by matplotlib")
pytestmark = pytest.mark.pictures

HOSTILE = [
    "$\\no$ \\$5",
    "<script>alert('&')</script>",
    "猫 and 🐈",
    "long " * 12,
    "a|b*_`[c](d)",
    "tab\tline\n\x1b[31m",
]
ROWS = [
    {
        "epoch": epoch,
        "train_loss": 2 / epoch,
        "train_accuracy": 1 - 0.5 / epoch,
        "test_loss": 2.1 / epoch,
        "test_accuracy": 1 - 0.6 / epoch,
        "lr": 0.1 / epoch,
        "seconds": 0.5,
    }
    for epoch in (1, 2, 3)
]


class Recorder:
    """Images by index that remember which were read."""

    def __init__(self, shape):
        self.shape, self.read = shape, set()

    def __getitem__(self, index):
        self.read.add(index)
        return np.full(self.shape, index % 256, np.uint8)


def draw_arguments(n, classes=None, wrong=7, shape=(8, 8, 1)):
    """The fields of a Result of n classes; the first `wrong` predictions are wrong."""
    classes, count = classes or [f"class {i}" for i in range(n)], max(60, 2 * n)
    labels = np.arange(count) % n
    outputs = np.full((count, n), 0.1 / n)
    outputs[np.arange(count), (labels + (np.arange(count) < wrong)) % n] += 0.9
    spec = {"task": "classification", "classes": classes, "test_accuracy": 1 - wrong / count}
    spec["created"] = "2026-01-02T03:04:05+00:00"
    return [
        spec,
        ROWS,
        labels,
        outputs,
        Recorder(shape),
        (np.zeros((4, *shape), np.uint8), labels[:4]),
    ]


def draw_run(run, *arguments):
    return drawing.draw_run(run, drawing.Result(*arguments))


@pytest.fixture
def run(tmp_path):
    """The empty directory of a run."""
    (tmp_path / "runs" / "this").mkdir(parents=True)
    return tmp_path / "runs" / "this"


NAMES = "curves", "confusion", "reliability", "coverage", "samples", "mistakes"
OF_CLASSIFIER = [f"{name}.png" for name in NAMES]


def check_pictures(run, *names):
    for name in names:
        with Image.open(run / name) as image:
            image.load()
            assert 600 <= image.width <= 2400 and 300 <= image.height <= 2800, (name, image.size)
            assert np.asarray(image.convert("L")).std() > 3, f"{name} is blank"
            # the same run draws the same bytes
            assert not {"Software", "Creation Time"} & image.info.keys()
    assert {path.name for path in run.iterdir()} == set(names)


@pytest.mark.parametrize("n", [2, 100])
def test_pictures_of_a_run(run, n):
    arguments = draw_arguments(n)
    paths = draw_run(run, *arguments)
    check_pictures(run, *OF_CLASSIFIER)
    assert sorted(paths) == sorted(str(path) for path in run.iterdir())
    assert arguments[4].read == set(range(7))  # of the test images only the wrong predictions


def test_hostile_class_names_are_drawn_without_a_warning(run):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw_run(run, *draw_arguments(6, HOSTILE, shape=(30, 10, 3)))
    check_pictures(run, *OF_CLASSIFIER)


def test_pictures_repeat_and_leave_matplotlib_as_it_was(run):
    import matplotlib

    with matplotlib.rc_context({"text.usetex": True, "figure.dpi": 30, "font.size": 30}):
        draw_run(run, *draw_arguments(3))
        first = {path.name: path.read_bytes() for path in run.iterdir()}
        assert matplotlib.rcParams["text.usetex"] and matplotlib.rcParams["font.size"] == 30
    draw_run(run, *draw_arguments(3))
    assert {path.name: path.read_bytes() for path in run.iterdir()} == first


def test_a_run_without_wrong_predictions(run):
    arguments = draw_arguments(3, wrong=0)
    draw_run(run, *arguments)
    assert arguments[4].read == set()
    with Image.open(run / "mistakes.png") as image:
        assert image.height < 400  # a sentence, no grid


def drawn_texts(monkeypatch):
    """The list into which all text is put that pictures write into figures."""
    from matplotlib.figure import Figure

    texts, write = [], Figure.text
    monkeypatch.setattr(
        Figure,
        "text",
        lambda self, x, y, s, **more: texts.append(s) or write(self, x, y, s, **more),
    )
    return texts


def test_titles_use_the_singular_for_one(run, monkeypatch):
    texts, arguments = drawn_texts(monkeypatch), draw_arguments(3, wrong=1)
    arguments[1] = ROWS[:1]
    draw_run(run, *arguments)
    assert "Training curves, 1 epoch" in texts
    draw_run(run, *draw_arguments(3, wrong=40))
    assert {"Training curves, 3 epochs", "Most confident wrong predictions, 25 of 40"} <= set(texts)
    assert {"Confusion matrix, 3 classes", "Most confident wrong predictions"} <= set(texts)


def test_pictures_of_a_regression_and_of_a_single_epoch(run):
    row = {**ROWS[0], "train_accuracy": None, "test_accuracy": None}
    spec, truths = (
        {"task": "regression", "created": "2026-01-02", "classes": ["y"]},
        np.arange(5.0)[:, None],
    )
    draw_run(run, spec, [row], truths, truths + 1)
    check_pictures(run, "curves.png", "predicted.png")


def drawn_titles(monkeypatch):
    """The list into which the titles and legends of axes are put that pictures draw."""
    from matplotlib.axes import Axes
    from matplotlib.legend import Legend

    texts, set_title, make = [], Axes.set_title, Legend.__init__
    monkeypatch.setattr(
        Axes,
        "set_title",
        lambda self, text, **more: texts.append(text) or set_title(self, text, **more),
    )
    monkeypatch.setattr(
        Legend,
        "__init__",
        lambda self, parent, handles, labels, **more: (
            texts.extend(labels) or make(self, parent, handles, labels, **more)
        ),
    )
    return texts


def test_reliability_is_drawn_before_and_after(run, monkeypatch):
    texts, arguments = drawn_titles(monkeypatch), draw_arguments(3, wrong=6)
    draw_run(run, *arguments)  # 60 images, 90 % right, with probability 0.93
    assert any(text.startswith("Not calibrated\ncalibration error ") for text in texts)
    assert {"4 images each", "100% answered: 90.00% right"} <= set(texts)
    texts.clear()
    draw_run(run, {**arguments[0], "temperature": 0.5}, *arguments[1:])
    before, after = (
        text.split("\ncalibration error ") for text in texts if "calibration error" in text
    )
    assert before[0] == "Before calibration" and after[0] == "After, temperature 0.50"
    error = calibration_error(arguments[3], arguments[2])
    assert after[1] == f"{error:.2%}" and before[1] != after[1]


@pytest.mark.parametrize("right", [0, 5, 12])
def test_the_curve_of_coverage_stays_in_its_frame(monkeypatch, right):
    from report import trust_pictures

    axes = []
    original = trust_pictures.limit_shares
    monkeypatch.setattr(
        trust_pictures,
        "limit_shares",
        lambda axis, shares: axes.append(axis) or original(axis, shares),
    )
    labels = np.arange(12) >= right  # the most probable answers are wrong
    probabilities = np.stack([np.linspace(0.51, 0.99, 12), np.linspace(0.49, 0.01, 12)], axis=1)
    trust_pictures.coverage("", labels.astype(int), probabilities)

    (axis,) = axes
    low, high = axis.get_ylim()
    curve, *dots = axis.lines
    points = list(zip(*curve.get_data(), strict=True))
    assert all(low < y < high for _, y in points)
    assert all(0 <= tick <= 1 for tick in axis.get_yticks())
    for dot in dots:
        x, y = dot.get_data()
        assert (x[0], y[0]) in points


def test_pictures_say_one_image_and_near_copies():
    from report import trust_pictures

    assert trust_pictures.images_in_each(np.array([1.0])) == "1 image"
    assert trust_pictures.images_in_each(np.array([1.0, 2.0])) == "1 to 2 images"

    black = np.zeros((4, 4, 3), np.uint8)
    equal = (black, black, "a", "b")
    near = (black, black + 1, "a", "b")
    assert "near-copies" not in drawing.title_of_duplicates([equal])
    assert drawing.title_of_duplicates([near]).startswith("Near-copies")
    assert drawing.title_of_duplicates([equal, near]).endswith("and near-copies")


def test_a_picture_of_tall_images_is_not_endless():
    from report import pictures

    tall = np.zeros((200, 40, 3), np.uint8)
    content = pictures.pairs("", "", [(tall, tall, "a", "b")] * 12)
    assert Image.open(io.BytesIO(content)).height < 3000


FAMILIAR = {
    "test split": {"images": 4, "unknown": 0.25, "histogram": [1, 0, 1, 2]},
    "uniform noise": {"images": 3, "unknown": 1.0, "histogram": [3, 0, 0, 0]},
    "black": {"images": 1, "unknown": 0.0, "histogram": [0, 1, 0, 0]},
}


def test_familiar_shows_the_export_of_the_current_checkpoint(run, monkeypatch):
    texts = drawn_titles(monkeypatch)
    write_run(run)
    checkpoint = hashlib.sha256((run / "checkpoint.pt").read_bytes()).hexdigest()
    figures = {
        "file": "model.onnx",
        "passed": True,
        "checkpoint_sha256": checkpoint,
        "familiar": FAMILIAR,
    }
    export = run.parent.parent / "exports" / "this"
    export.mkdir(parents=True)

    def familiar_after(**changes):
        (export / "parity.json").write_text(json.dumps({"onnx": {**figures, **changes}}))
        return read_report(run).tags.count("img")

    assert familiar_after() == 1 and (run / "familiar.png").exists()
    assert "test split, 4 images: 25% unknown at --reject 0.99" in texts
    assert "black, 1 image: 0% unknown at --reject 0.99" in texts
    for other in (
        {"familiar": [3]},
        {"familiar": {"a": {}}},
        {"passed": False},
        {"familiar": None},
    ):
        assert familiar_after() == 1
        assert familiar_after(**other) == 0 and not (run / "familiar.png").exists(), other
    assert familiar_after() == 1
    (run / "checkpoint.pt").write_bytes(b"trained again")
    assert read_report(run).tags.count("img") == 0


def test_without_matplotlib_it_is_an_import_error(run, monkeypatch):
    monkeypatch.delattr(report, "pictures", raising=False)
    monkeypatch.delitem(sys.modules, "report.pictures", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match="matplotlib"):
        draw_run(run, *draw_arguments(3))
    assert not list(run.iterdir())


def test_figures_of_each_class():
    figures = per_class([0, 0, 0, 1], [0, 1, 1, 1], ["a", "b", "never"])
    assert figures["a"] == {"precision": 1.0, "recall": 1 / 3, "f1": 0.5, "support": 3}
    assert figures["b"] == {"precision": 1 / 3, "recall": 1.0, "f1": 0.5, "support": 1}
    assert figures["never"] == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 0}
    assert json.dumps(figures)  # plain numbers


# -------------------------------------------------------------------------------------- report.html


class Page(HTMLParser):
    """The tags of a page, each closed in order; its text and its addresses."""

    def __init__(self, page):
        super().__init__()
        self.open, self.tags, self.text, self.addresses = [], [], "", []
        self.feed(page)
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.addresses += [
            value
            for name, value in attributes
            if name in ("src", "href", "srcset", "action", "data")
        ]
        assert not [name for name, _ in attributes if name.startswith("on")]
        if tag not in ("meta", "img", "br", "link", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data if "style" not in self.open else ""


def write_run(run, accuracy=0.9, dataset="digits", finished=True, **more):
    """The files of a run, as far as the report reads them."""
    run.mkdir(parents=True, exist_ok=True)
    config = {
        "dataset": dataset,
        "model": "mlp",
        "data_dir": None,
        "lr": 0.1,
        "strict": False,
        "hidden": [3, 4],
        **more,
    }
    (run / "config.json").write_text(json.dumps(config))
    (run / "metrics.csv").write_text("epoch,train_loss\n1,1.25e-05\n")
    (run / "checkpoint.pt").write_bytes(run.name.encode())
    summary = {
        "test_accuracy": accuracy,
        "test_loss": 0.5,
        "train_seconds": 75.2,
        "epochs": 3,
        "parameters": 12345,
    }
    if finished:
        (run / "summary.json").write_text(json.dumps({**summary, "created": "2026-01-02T03:04:05"}))


def read_report(run, **more):
    path = page.write_report(str(run), str(run.parent), str(run.parent.parent / "exports"), **more)
    assert path == str(run / "report.html") and not list(run.glob("*.tmp"))
    return Page((run / "report.html").read_text(encoding="utf-8"))


def test_report_is_one_file_with_the_pictures_inside(run):
    write_run(run)
    draw_run(run, *draw_arguments(3))
    page = read_report(run)
    assert len(page.addresses) == page.tags.count("img") == len(OF_CLASSIFIER)
    for address in page.addresses:
        kind, content = address.split(",")
        assert kind == "data:image/png;base64"
        assert base64.b64decode(content) in [path.read_bytes() for path in run.glob("*.png")]
    text = (run / "report.html").read_text()
    assert "script" not in page.tags and not re.search(r"https?:|url\(|@import", text)
    for words in (
        "this",
        "90.00%",
        "1 min 15 s",
        "12,345",
        "2026-01-02",
        "1.25e-05",
        "3 4",
        "step2_export.py --run this",
    ):
        assert words in page.text
    first = text
    read_report(run)
    assert (run / "report.html").read_text() == first


def test_hostile_texts_are_text_in_the_report(run):
    write_run(run, data_dir="<img src=x onerror=alert(1)>", dataset="folder")
    summary = json.loads((run / "summary.json").read_text())
    figures = per_class(np.arange(6), np.zeros(6, int), [*HOSTILE[:5], "\ud800\u202e"])
    (run / "summary.json").write_text(json.dumps({**summary, "per_class": figures}))
    page = read_report(run)
    assert "script" not in page.tags and "img" not in page.tags
    for name in (*HOSTILE[:5], "\\ud800\\u202e", "<img src=x onerror=alert(1)>"):
        assert name in page.text


def test_best_epoch_and_zero_are_in_the_report(run):
    write_run(run, seed=0, momentum=0.0)
    text = read_report(run).text
    assert "seed0" in text and "momentum0" in text and "strict" not in text  # False says nothing
    assert "best epoch" not in text  # the last one
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps({**summary, "epoch_kept": 2}))
    assert "best epoch2" in read_report(run).text


def test_runs_of_the_same_data_are_listed_the_best_first(run):
    write_run(run)
    write_run(run.parent / "better", 0.95)
    write_run(run.parent / "other-data", 0.99, dataset="mnist")
    write_run(run.parent / "going-on", finished=False)
    rows = read_report(run).text.split("Runs on this dataset")[1]
    positions = [rows.index(name) for name in ("better", "this", "going-on (not finished)")]
    assert positions == sorted(positions) and "other-data" not in rows
    assert len(re.findall("class=mark", (run / "report.html").read_text())) == 1


def test_runs_on_own_images_are_compared_if_the_directory_is_the_same(run):
    write_run(run, dataset="folder", data_dir="cats")
    write_run(run.parent / "same", dataset="folder", data_dir="./cats")
    write_run(run.parent / "dogs", dataset="folder", data_dir="elsewhere\0")
    rows = read_report(run).text.split("Runs on this dataset")[1]
    assert "same" in rows and "dogs" not in rows


@pytest.mark.parametrize("file", ["config.json", "summary.json"])
@pytest.mark.parametrize(
    "content", [b"", b"[1, 2", b"[]", b'{"dataset": "digits"}', b"\xff\xfe", b'"' * 9, b"[" * 9999]
)
def test_broken_neighbours_do_not_break_the_table(run, file, content):
    write_run(run)
    write_run(run.parent / "broken")
    (run.parent / "broken" / file).write_bytes(content)
    (run.parent / "a-file").write_text("not a run")
    (run.parent / "empty").mkdir()
    wrong = {
        "test_accuracy": "high",
        "test_loss": 10**400,
        "train_seconds": [],
        "epochs": {},
        "parameters": 10**400,
    }
    write_run(run.parent / "wrong")
    (run.parent / "wrong" / "summary.json").write_text(json.dumps(wrong))
    rows = read_report(run).text.split("Runs on this dataset")[1]
    assert "90.00%" in rows and "wrong" in rows and "a-file" not in rows and "empty" not in rows


def test_a_full_disk_leaves_no_half_file(run, monkeypatch):
    write_run(run)
    before = read_report(run).text

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        read_report(run)
    monkeypatch.undo()
    assert not list(run.glob("*.tmp")) and Page((run / "report.html").read_text()).text == before


def test_report_of_a_directory_with_nothing_in_it(run):
    assert "not finished" in read_report(run).text


def test_the_calibration_error_has_its_noise_floor_beside_it(run):
    write_run(run)
    # a run of an earlier version, or a regression
    assert "calibration error" not in read_report(run).text
    summary = json.loads((run / "summary.json").read_text())

    def after(**more):
        (run / "summary.json").write_text(json.dumps({**summary, **more}))
        return read_report(run).text

    assert "calibration error1.20%not calibrated" in after(calibration_error=0.012)
    calibrated = {"calibration_error": 0.012, "temperature": 0.5}
    assert "calibration error1.20%noise floor 0.80%" in after(
        **calibrated, calibration_error_floor=0.008
    )
    text = after(**calibrated)  # as it was before there was a floor
    assert "calibration error1.20%" in text and "floor" not in text and "not calibrated" not in text


def test_report_shows_what_unequal_classes_hide(small, tmp_path):
    run = tmp_path / "runs" / "small"
    shutil.copytree(small.run, run)
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(
        json.dumps({**summary, "balanced_accuracy": 0.3125, "macro_f1": 0.25})
    )
    text = read_report(run).text
    assert "balanced accuracy 31.25%" in " ".join(text.split()) or "balanced accuracy31.25%" in text
    assert "macro F1" in text and "25.00%" in text
    for key in ("balanced_accuracy", "macro_f1"):  # a run of an earlier version, or a regression
        summary.pop(key, None)
    (run / "summary.json").write_text(json.dumps(summary))
    assert "balanced accuracy" not in read_report(run).text


@pytest.mark.parametrize(
    ("spread", "words"),
    [
        ([1.0, 3.0], "onnx: busy machine: 3x spread"),
        ([1.0, 1.9], None),
        ("wrong", None),
        (None, None),
    ],
)
def test_report_says_that_the_latency_was_taken_on_a_busy_machine(small, tmp_path, spread, words):
    run, export = tmp_path / "runs" / "small", tmp_path / "exports" / "small"
    shutil.copytree(small.run, run)
    shutil.copytree(small.export, export)
    parity = json.loads((export / "parity.json").read_text())
    low, high = parity["onnx"]["latency_spread"]
    assert 0 < low <= parity["onnx"]["latency_ms"] <= high
    for figures in parity.values():
        figures["latency_spread"] = spread
    (export / "parity.json").write_text(json.dumps(parity))
    text = read_report(run).text
    assert (words or "onnx") in text and ("busy machine" in text) == bool(words)


def test_report_has_the_export_of_the_current_checkpoint(small, tmp_path):
    run, export = tmp_path / "runs" / "small", tmp_path / "exports" / "small"
    shutil.copytree(small.run, run)
    assert "Not exported yet" in read_report(run).text
    shutil.copytree(small.export, export)
    page = read_report(run)
    size = f"{(export / 'model.onnx').stat().st_size:,} bytes"
    assert "Not exported yet" not in page.text and page.text.count("passed") == 2
    assert page.text.count(size) == page.text.count("model.onnx") + 1  # in the table of runs too
    # each file's latency
    assert page.text.split("Export")[1].split("Configuration")[0].count(" ms") == 2
    parity = json.loads((export / "parity.json").read_text())
    parity["onnx"].update(
        latency_ms=1.234, passed=False, failures=["<b>differs</b>"], max_abs_diff=None
    )
    (export / "parity.json").write_text(json.dumps(parity))
    page = read_report(run)
    assert (
        page.text.count("1.23 ms") == 2
        and "FAILED" in page.text
        and "onnx: <b>differs</b>" in page.text
    )
    for figures in parity.values():  # as parity.json was before it had file names
        del figures["file"]
    (export / "parity.json").write_text(json.dumps(parity))
    page = read_report(run)
    assert "onnx" in page.text and "model.onnx" not in page.text and size not in page.text
    shutil.move(export, tmp_path / "elsewhere")
    assert "Not exported yet" in read_report(run).text
    assert "FAILED" in read_report(run, export_dir=str(tmp_path / "elsewhere")).text
    (run / "checkpoint.pt").write_bytes(b"trained again")
    assert "Not exported yet" in read_report(run, export_dir=str(tmp_path / "elsewhere")).text


# --------------------------------------------------------------------------------------- model card


@pytest.fixture
def facts(small):
    """The spec and the parity figures of a real export."""
    spec = Model(str(small.export / "model.onnx")).spec
    return spec, json.loads((small.export / "parity.json").read_text())


@pytest.mark.parametrize(
    ("kind", "data_dir", "name"),
    [("folder", "/data/flowers/", "flowers"), ("csv", "/data/birds.v2.csv", "birds.v2")],
)
def test_model_card_and_readme_call_own_images_by_their_name(facts, kind, data_dir, name):
    spec, parity = facts
    spec = {**spec, "dataset": kind, "arguments": {**spec["arguments"], "data_dir": data_dir}}
    text = card.model_card(spec, parity)
    assert f"mlp, trained on {name}\n" in text and f"test split of {name} is" in text
    assert f"- Dataset: {name}, read as {kind}\n" in text
    assert f"mlp, trained on {name}\n" in bundle.readme(spec, [])


def test_model_card_averages_over_the_classes(facts):
    spec, parity = facts
    empty = {"precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 0}
    rows = {"a": {**empty, "recall": 1.0, "f1": 0.8, "support": 90}, "c": empty}
    rows["b"] = {**empty, "recall": 0.5, "f1": 0.6, "support": 10}
    text = card.model_card({**spec, "per_class": rows}, parity)
    assert "recall (balanced accuracy) is 75.00% and F1 is 70.00%." in text
    assert "balanced accuracy" not in card.model_card({**spec, "per_class": {}}, parity)


def test_model_card(facts, small):
    spec, parity = facts
    text = card.model_card(spec, parity)
    checkpoint = hashlib.sha256((small.run / "checkpoint.pt").read_bytes()).hexdigest()
    for words in (
        "mlp, trained on digits",
        "with 10 classes: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9\n",
        f"top-1 accuracy on the test split of digits is {spec['test_accuracy']:.2%}.",
        "uint8 `[batch, height, width, channels]`, 1 channel (grey)",
        "resizes images to 8x8",
        "float32 `[batch, 10]`",
        "knows these classes only",
        "## How far to trust the probabilities",
        f"{spec['parameters']:,} parameters",
        f"torch {spec['versions']['torch']}",
        checkpoint,
        f"| model.onnx | 360 | {parity['onnx']['max_abs_diff']:.1e} | 100.00% |",
        "--model model.onnx --self-test",
    ):
        assert words in text, words
    assert "precision" not in text and "pretrained (" not in text
    figures = json.loads((small.run / "summary.json").read_text())["per_class"]
    text = card.model_card({**spec, "per_class": figures}, parity)
    assert f"| 3 | {figures['3']['precision']:.1%} |" in text


def section(text, title):
    return text.split(f"## {title}\n")[1].split("\n## ")[0]


def test_model_card_says_how_far_to_trust_the_outputs(facts):
    spec, parity = facts
    text, found = card.model_card(spec, parity), parity["onnx"]
    trust = section(text, "How far to trust the probabilities")
    before, after = (
        " | ".join(
            f"{found[key + more]:.2%}" for key in ("calibration_error", "calibration_error_floor")
        )
        for more in ("_uncalibrated", "")
    )
    made = spec["calibration"]
    for words in (
        f"a temperature of {spec['temperature']:.3g}, which was fitted on\n",
        f"\n{made['images']} images outside",
        f"(source: {made['source']})",
        f"| before calibration | {before} | {found['nll_uncalibrated']:.4f} |",
        f"| model.onnx | {after} | {found['nll']:.4f} |",
        f"| 100% | {found['accuracy']:.2%} | - |",
        *(
            f"| {c} | {found['coverage'][k]['accuracy']:.2%} |"
            for c, k in (("95%", "0.95"), ("80%", "0.8"))
        ),
        f"| by `--reject 0.99` | {found['kept']['0.99']:.1%} |",
        f"| uniform noise | 100 | {found['familiar']['uniform noise']['unknown']:.0%} |",
        f"| white | 1 | {found['familiar']['white']['unknown']:.0%} |",
        "photographed like the training images is usually given a known name.",
        "Without a threshold, the programs name a class for every image.",
    ):
        assert words in trust, words
    assert "| test split |" not in trust and "not calibrated" not in text
    assert "- Output `known`: float32 `[batch]`" in text
    text = card.model_card({**spec, "reject": 0.99, "min_probability": 0.5}, parity)
    assert "the programs use `--reject 0.99` and `--min-probability 0.5`." in text


def test_model_card_of_an_uncalibrated_export(facts):
    spec, parity = facts
    spec = {**spec, "temperature": None, "calibration": None, "known": None}
    for figures in parity.values():
        for key in [
            "kept",
            "nll",
            "nll_uncalibrated",
            "familiar",
            "calibration_error_uncalibrated",
        ]:
            del figures[key]
    trust = section(card.model_card(spec, parity), "How far to trust the probabilities")
    assert (
        "not calibrated: 0.9 does not mean" in trust
        and "`known`" not in trust
        and "--reject" not in trust
    )
    assert f"| model.onnx | {parity['onnx']['calibration_error']:.2%} |" in trust
    assert "before calibration" not in trust and "cross entropy" not in trust
    for figures in parity.values():  # as they were before there were such figures
        del figures["coverage"]
    trust = section(card.model_card(spec, parity), "How far to trust the probabilities")
    assert "not calibrated" in trust and "|" not in trust


def test_model_card_lists_no_format_that_failed(facts):
    spec, parity = facts
    parity["onnx"]["passed"] = False
    text = card.model_card({**spec, "arguments": {"pretrained": "default"}}, parity)
    assert "| model.onnx |" not in text and "--model model.pt --self-test" in text
    assert "Initial weights: pretrained \\(default\\)" in text


def test_model_card_of_figures_without_file_names(facts):
    spec, parity = facts
    for figures in parity.values():
        del figures["file"]
    text = card.model_card(spec, parity)
    assert "| onnx | 360 |" in text and "--model model.onnx --self-test" in text


def test_quantization_is_in_card_and_report(facts, run):
    spec, parity = facts
    speedup = {"1": 2.61, "64": 2.1}
    figures = {**parity["onnx"], "file": "model.int8.onnx", "max_abs_diff": 0.04}
    figures |= {"quantization": "per channel", "speedup": speedup, "drop": -0.05}
    text = card.model_card(spec, {**parity, "onnx-int8": figures})
    assert "| model.int8.onnx | 360 | 4.0e-02 |" in text and "quantized (per channel)" in text
    assert "accuracy drop is -0.05 points" in text and "it was faster than float32" in text
    slow = card.model_card(spec, {"onnx-int8": {**figures, "warning": "slow"}})
    assert "it was not faster than float32" in slow
    assert "quantized" not in card.model_card(spec, parity)
    write_run(run)
    figures["checkpoint_sha256"] = hashlib.sha256((run / "checkpoint.pt").read_bytes()).hexdigest()
    export = run.parent.parent / "exports" / "this"
    export.mkdir(parents=True)
    (export / "parity.json").write_text(json.dumps({"onnx-int8": {**figures, "warning": "<slow>"}}))
    page = read_report(run)
    assert "2.61x, 2.10x" in page.text and "onnx-int8: <slow>" in page.text


def test_model_card_escapes_and_abbreviates_class_names(facts):
    spec, parity = facts
    text = card.model_card({**spec, "classes": HOSTILE + [f"c{i}" for i in range(200)]}, parity)
    for words in ("\\<script\\>", "a\\|b\\*\\_\\`\\[c\\]\\(d\\)", "tab\\\\tline\\\\n\\\\x1b"):
        assert words in text
    assert "<script>" not in text and "\t" not in text and "\x1b" not in text
    assert "206 classes" in text and "c93, and 106 more" in text and "c94" not in text


@pytest.mark.parametrize(("features", "words"), [(5, "from 5 features"), (1, "from 1 feature.")])
def test_model_card_of_a_regression(features, words):
    spec = {"task": "regression", "classes": ["y"], "channels": features, "dataset": "linear"}
    spec |= {"model": "linear", "parameters": 6, "versions": {"torch": "2"}, "test_accuracy": None}
    parity = {
        "onnx": {"passed": True, "samples": 20, "max_abs_diff": 1e-6, "mean_squared_error": 0.25}
    }
    text = card.model_card(spec, parity)
    assert words in text and "float32 `[batch, 1]`" in text and "| 0.25 |" in text
    assert "calibrated" not in text and "accuracy" not in text
