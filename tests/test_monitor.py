"""--monitor: what it counts, when it raises the alarm, and what happens to its file."""

import json
import os
import signal
import stat
from pathlib import Path

import numpy as np
import pytest
from benchmarks import bench_field
from conftest import ROOT, onnx_with

import step3_infer
from deploy.comparing import Outputs
from deploy.watching import monitor_reference
from inference import monitor as monitor_module
from inference.drift import LIMIT, Drift, unplaced
from inference.errors import Problem
from inference.monitor import Monitor
from inference.monitor_file import read_monitor
from inference.spacing import Spacing
from inference.spec import DEFAULTS, read_spec

CLASSES = ["cat", "dog", "owl"]
HELD_OUT = 2000


def draw(count, seed=0, shift=0.0):
    """Outputs of `count` images, and labels that agree with them as often as they say.

    shift: makes the answers less certain, and the images less familiar.
    """
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 3, (count, len(CLASSES))) * (1 - shift)
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    known = rng.random(count) ** (1 + 3 * shift)
    labels = (rng.random((count, 1)) > probabilities.cumsum(1)).sum(1)
    return Outputs(probabilities, known), labels.clip(max=2)


def rows(outputs):
    for probabilities, known in zip(outputs.main, outputs.known, strict=True):
        best = {
            "label": CLASSES[probabilities.argmax()],
            "probability": round(float(probabilities.max()), 6),
        }
        yield {**best, "known": round(float(known), 6), "top": [best]}


class File:
    """What a Monitor needs of a Model."""

    def __init__(self, seed=1):
        held_out, labels = draw(HELD_OUT, seed)
        compared = monitor_reference(held_out, labels, "the validation split")
        self.spec = {**DEFAULTS, "classes": CLASSES, "monitor": compared}


@pytest.fixture
def model():
    return File()


def alarms(monitor, outputs):
    """The numbers of the images that raised an alarm, counted from 1."""
    raised = []
    for number, row in enumerate(rows(outputs), 1):
        if monitor.update(row):
            raised.append(number)
    return raised


# ------------------------------------------------------------------------------------- the alarm
def test_images_like_those_held_out_raise_no_alarm(model):
    for seed in range(2, 12):
        monitor = Monitor(model)
        assert alarms(monitor, draw(2000, seed)[0]) == []
        assert monitor.spacing.every == 1


def test_changed_images_raise_one_alarm_soon(model):
    monitor = Monitor(model)
    (number,) = alarms(monitor, draw(2000, 2, shift=0.5)[0])
    assert number < 100
    assert "less familiar" in monitor.alarm["message"] and monitor.alarm["images"] == number
    assert monitor.images == 2000  # it goes on counting
    assert monitor.estimate() is None


def test_a_change_after_many_images_is_found_as_well(model):
    monitor = Monitor(model)
    assert alarms(monitor, draw(20_000, 2)[0]) == []
    (number,) = alarms(monitor, draw(2000, 3, shift=0.5)[0])
    assert number < 200


def test_a_class_that_takes_over_is_named(model):
    monitor = Monitor(model)
    outputs, _ = draw(1000, 2)
    owls = outputs.main.argmax(1) == 2
    (number,) = alarms(monitor, Outputs(outputs.main[owls], outputs.known[owls]))
    assert number < 100 and "more answers are owl" in monitor.alarm["message"]


def test_a_bet_pays_no_more_than_its_stake_on_average(model):
    """On the reference itself: that is what bounds the rate of false alarms."""
    drift = Drift(model.spec["monitor"])
    counts = np.array(model.spec["monitor"]["counts"])
    assert counts.sum() == HELD_OUT
    assert ((counts.ravel() / HELD_OUT) @ drift.payoffs <= 1).all()

    answers = np.array(model.spec["monitor"]["answers"]) / HELD_OUT
    on_classes = answers[:, None] * drift.hit + (1 - answers[:, None]) * drift.miss
    assert (on_classes <= 1).all()
    assert drift.weights.sum() == pytest.approx(1)


def test_the_stake_is_placed_once():
    placed = [unplaced(image) - unplaced(image + 1) for image in range(1, 1000)]
    assert min(placed) > 0 and sum(placed) + unplaced(1000) == pytest.approx(1)


def test_the_benchmark_bets_as_the_product_does(model):
    outputs, _ = draw(400, 2, shift=0.3)
    streams = np.stack([np.random.default_rng(seed).permutation(400) for seed in range(4)])
    expected = []
    for stream in streams:
        monitor = Monitor(model, bet_every=1)
        (number,) = alarms(monitor, Outputs(outputs.main[stream], outputs.known[stream]))
        expected.append(number)
    compared = model.spec["monitor"]
    assert bench_field.first_alarms(compared, outputs, streams).tolist() == expected


def test_without_known_the_probabilities_are_bet_on():
    held_out, labels = draw(HELD_OUT, 1)
    model = File()
    compared = monitor_reference(Outputs(held_out.main, None), labels, "the test split")
    model.spec["monitor"] = compared
    assert compared["known"] == [] and len(compared["counts"]) == 1

    monitor = Monitor(model, bet_every=1)
    raised = []
    for row in rows(draw(500, 2, shift=0.7)[0]):
        raised.append(monitor.update({**row, "known": None}))
    assert any(raised)


# ----------------------------------------------------------------------------- dependent frames
def test_frames_that_repeat_raise_no_alarm(model):
    """Each image stays for ten frames; looked at one by one, nearly every stream would alarm."""
    outputs, _ = draw(300, 2)
    repeated = Outputs(np.repeat(outputs.main, 10, 0), np.repeat(outputs.known, 10))
    monitor = Monitor(model)
    assert alarms(monitor, repeated) == []
    assert 5 <= monitor.spacing.every <= 40
    assert alarms(Monitor(model, bet_every=1), repeated)


def test_a_given_spacing_is_kept():
    spacing = Spacing(7)
    chosen = [number for number in range(1, 50) if spacing.choose((1, 2))]
    assert chosen == [7, 14, 21, 28, 35, 42, 49]


def test_spacing_does_not_foresee():
    """Whether a frame is chosen depends on the frames before it alone."""
    rng = np.random.default_rng(0)
    frames = [tuple(frame) for frame in rng.integers(0, 16, (100, 2)).repeat(3, 0).tolist()]
    for last in (40, 80, 81):
        first, second = Spacing(None), Spacing(None)
        for frame in frames[: last - 1]:
            assert first.choose(frame) == second.choose(frame)
        assert first.choose((0, 0)) == second.choose((15, 15))


# ------------------------------------------------------------------------------------ the estimate
def test_the_accuracy_is_estimated_without_labels(model):
    monitor = Monitor(model)
    outputs, labels = draw(2000, 2)
    assert alarms(monitor, outputs) == []
    estimate = monitor.estimate()
    accuracy = (outputs.main.argmax(1) == labels).mean()
    assert estimate["value"] == pytest.approx(accuracy, abs=0.03)
    assert estimate["low"] < accuracy < estimate["high"] < estimate["low"] + 0.1


def test_few_images_have_a_wide_interval(model):
    monitor = Monitor(model)
    assert monitor.estimate() is None
    alarms(monitor, draw(3)[0])
    estimate = monitor.estimate()
    assert 0 <= estimate["low"] < estimate["high"] - 0.3 and estimate["high"] <= 1


# ---------------------------------------------------------------------------------------- the file
def test_it_goes_on_where_it_ended(model, tmp_path):
    """Ten processes come to the very stakes that one comes to."""
    path = str(tmp_path / "m.json")
    outputs, _ = draw(300, 2)
    for start in range(0, 300, 30):
        part = slice(start, start + 30)
        with Monitor(model, path) as monitor:
            alarms(monitor, Outputs(outputs.main[part], outputs.known[part]))
            monitor.update({"error": "no image"})

    at_once = Monitor(model)
    alarms(at_once, outputs)
    kept = read_monitor(path)
    assert kept["images"] == 300 and kept["errors"] == 10
    assert kept["state"]["stakes"] == at_once.drift.stakes.tolist()
    assert kept["answers"] == dict(zip(CLASSES, at_once.answers, strict=True))
    assert sum(kept["answers"].values()) == 300


def test_it_stays_small_and_is_not_written_at_each_image(model, tmp_path, monkeypatch):
    writes = []
    write = monitor_module.MonitorFile.write
    monkeypatch.setattr(
        monitor_module.MonitorFile, "write", lambda *args: (writes.append(1), write(*args))
    )
    path = tmp_path / "m.json"
    for seed in range(2):
        with Monitor(model, str(path)) as monitor:
            alarms(monitor, draw(5000, 2 + seed)[0])
    # A new file at once, and each at its end.
    assert len(writes) == 3 and path.stat().st_size < 20_000


def test_another_process_is_refused(model, tmp_path):
    path = str(tmp_path / "m.json")
    with Monitor(model, path) as first:
        for _ in range(2):
            with pytest.raises(Problem, match="in use by another process"):
                Monitor(model, path)
            first.save()  # puts another file in its place
    Monitor(model, path).close()


def damage(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content.pop("images"),
        lambda content: content.update(images=-1),
        lambda content: content.update(answers={"cat": 1}),
        lambda content: content["state"].update(stakes=[1.0]),
        lambda content: content["state"].update(stakes=["a"]),
        lambda content: content["state"].update(values=[[1], [1, 2]]),
        lambda content: content.update(alarm={"message": "x"}),
        lambda content: content.update(schema=[]),
    ],
)
def test_a_damaged_file_is_refused(model, tmp_path, change):
    path = tmp_path / "m.json"
    with Monitor(model, str(path)) as monitor:
        alarms(monitor, draw(50)[0])
    damage(path, change)
    before = path.read_bytes()
    with pytest.raises(Problem, match=r"is damaged.*another --monitor FILE, or delete"):
        Monitor(model, str(path))
    assert path.read_bytes() == before


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff", b"[" * 100_000, b"{}"])
def test_what_is_no_monitor_file_is_refused(model, tmp_path, content):
    path = tmp_path / "m.json"
    path.write_bytes(content)
    with pytest.raises(Problem, match="is damaged"):
        Monitor(model, str(path))


def test_files_that_cannot_be_used(model, tmp_path):
    path = tmp_path / "m.json"
    Monitor(model, str(path)).close()
    with pytest.raises(Problem, match="another model") as problem:
        Monitor(File(seed=5), str(path))
    assert problem.value.code == 2

    path.chmod(stat.S_IRUSR)
    with pytest.raises(Problem, match="read-only"):
        Monitor(model, str(path))
    with pytest.raises(Problem, match="no directory"):
        Monitor(model, str(tmp_path / "none" / "m.json"))
    with pytest.raises(Problem, match="not a regular file"):
        Monitor(model, os.devnull)


# -------------------------------------------------------------------------------- the command line
@pytest.fixture
def monitored(trained, tmp_path):
    """An exported file, and where its monitor file will be."""
    return str(trained.export / "model.onnx"), str(tmp_path / "m.json")


def predict(call, model, path, *more):
    return call(step3_infer.main, "--model", model, "--monitor", path, *more)


SAMPLES = str(ROOT / "data/samples")


def test_it_counts_and_shows(call, monitored):
    model, path = monitored
    predict(call, model, path, SAMPLES).done()
    predict(call, model, path, SAMPLES, "none.png").error(1, "none.png")

    shown = call(step3_infer.main, "--monitor", path).done().out
    assert "images              20\n" in shown and "errors              1\n" in shown
    assert "estimated accuracy" in shown and "none (evidence" in shown
    as_json = json.loads(call(step3_infer.main, "--monitor", path, "--format", "json").done().out)
    assert as_json["images"] == 20 and as_json["alarm"] is None and "state" not in as_json


def test_the_alarm_is_in_the_rows_once(call, monitored):
    model, path = monitored
    strange = [str(ROOT / "data/samples/digit_7.png")] * 60
    result = predict(call, model, path, "--bet-every", "1", "--format", "json", *strange).done()
    marked = [row for row in map(json.loads, result.out.splitlines()) if "alarm" in row]
    assert len(marked) == 1 and result.err.count("alarm: ") == 1
    assert marked[0]["alarm"] in result.err and "more answers are 7" in result.err

    again = predict(call, model, path, *strange).done()
    assert "alarm" not in again.err
    shown = call(step3_infer.main, "--monitor", path).done().out
    assert "withheld since the alarm" in shown and "more answers are 7" in shown


def test_a_full_disk_stops_no_prediction(call, monitored, monkeypatch):
    model, path = monitored

    def write(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(monitor_module, "SAVE_SECONDS", 0)
    monkeypatch.setattr(monitor_module.MonitorFile, "write", write)
    result = predict(call, model, path, SAMPLES)
    assert result.code == 1 and len(result.out.splitlines()) == 10
    assert result.err.count("error: cannot write") == 1 and "No space left" in result.err


def test_a_file_that_cannot_be_used_stops_no_prediction(call, monitored, tmp_path):
    model, path = monitored
    Path(path).write_text("damaged")
    result = predict(call, model, path, SAMPLES)
    result.error(1, "is damaged", "the predictions go on")
    assert len(result.out.splitlines()) == 10 and Path(path).read_text() == "damaged"


def test_a_full_disk_leaves_no_empty_file(tmp_path, model, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("inference.monitor_file.replacing", full)
    with Monitor(model, str(tmp_path / "m.json")) as monitor:
        alarms(monitor, draw(30)[0])
    assert monitor.failed and not list(tmp_path.iterdir())


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no such pipes")
def test_a_pipe_is_not_waited_for(call, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    call(step3_infer.main, "--monitor", tmp_path / "pipe").error(1, "not a regular file")


def test_sigterm_writes_the_file(model, tmp_path):
    path = str(tmp_path / "m.json")
    lists = Monitor(model, path).watch([list(rows(draw(30)[0]))] * 3)
    with pytest.raises(SystemExit) as stopped:
        try:
            for _ in lists:
                os.kill(os.getpid(), signal.SIGTERM)
        finally:
            lists.close()
    assert stopped.value.code == 143 and read_monitor(path)["images"] == 30
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_file_without_reference_counts(call, monitored, tmp_path):
    model, path = monitored
    older = str(tmp_path / "older.onnx")
    onnx_with(model, older, monitor=None)
    result = predict(call, older, path, SAMPLES).done()
    assert result.err.count("note: ") == 1 and "when it exports again" in result.err
    shown = call(step3_infer.main, "--monitor", path).done().out
    assert "images              10\n" in shown and "no reference" in shown


def test_options(call, monitored):
    _, path = monitored
    call(step3_infer.main, "--bet-every", 2, SAMPLES).error(2, "--bet-every", "--monitor")
    call(step3_infer.main, "--monitor", path).error(1, "cannot read")
    call(step3_infer.main, "--monitor", path, "--format", "csv").error(2, "text or json")


# ---------------------------------------------------------------------------------------- the spec
def spec_text(**changes):
    compared = File().spec["monitor"]
    spec = {
        "schema": 1,
        "task": "classification",
        "classes": CLASSES,
        "channels": 1,
        "image_size": [8, 8],
        "monitor": {**compared, **changes},
    }
    return json.dumps(spec)


def test_the_spec_holds_it():
    assert read_spec(spec_text(), "a.onnx")["monitor"] == File().spec["monitor"]


@pytest.mark.parametrize(
    "changes",
    [
        {"images": 3},
        {"known": [0.5]},
        {"probability": [0.5, 0.2]},
        {"counts": [[-1]]},
        {"threshold": None},
        {"accuracy": 1.5},
        {"answers": [HELD_OUT]},
    ],
)
def test_a_malformed_spec_is_refused(changes):
    with pytest.raises(Problem, match="malformed spec: monitor must"):
        read_spec(spec_text(**changes), "a.onnx")


def test_ties_in_the_reference():
    """A network may be sure of everything: then all probabilities are 1."""
    sure = np.tile([1.0, 0.0, 0.0], (50, 1))
    compared = monitor_reference(Outputs(sure, None), np.zeros(50, int), "the test split")
    assert compared["accuracy"] == 1 and compared["threshold"] == 0
    drift = Drift(compared)
    for _ in range(100):
        evidence = drift.bet(drift.place(None, 1.0), 0)
    assert evidence < LIMIT
