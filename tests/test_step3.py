"""Step 3: predictions in every format, in order, and whole; and inputs that cannot be used."""

import ast
import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import ROOT, right
from PIL import Image

import step3_infer
from deploy import bundle
from inference.predict import Model


@pytest.fixture
def predict(call, trained):
    """predict(*arguments) -> Result, with the trained network's ONNX file."""
    return lambda *arguments: call(
        step3_infer.main, "--model", trained.export / "model.onnx", *arguments
    )


@pytest.fixture
def bad(here):
    """Files that are no images, each of another kind: path -> what is said of it."""
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40), dtype=np.uint8)).save(
        "whole.jpg"
    )
    whole = (here / "whole.jpg").read_bytes()
    (here / "whole.jpg").unlink()
    (here / "truncated.jpg").write_bytes(whole[: len(whole) // 2])
    (here / "empty.png").touch()
    (here / "text.png").write_text("no image")
    os.mkfifo(here / "pipe.png")
    (here / "folder").mkdir()
    return {
        "truncated.jpg": "truncated",
        "empty.png": "is empty",
        "text.png": "not an image",
        "missing.png": "no such file",
        "pipe.png": "not a regular file",
        "folder": "no images in this directory",
        "no*match.png": "matches no file",
    }


def test_text_names_the_classes_best_first(predict, samples):
    lines = predict(*samples).done().out.splitlines()
    assert len(lines) == 10
    answers = [
        re.fullmatch(r"(.*)  (\d) ([\d.]+)%  (\d) ([\d.]+)%  (\d) ([\d.]+)%  known ([\d.]+)%", line)
        for line in lines
    ]
    assert [answer[1] for answer in answers] == [str(path) for path in samples]
    assert right([(answer[1], answer[2]) for answer in answers]) >= 9
    assert all(float(answer[3]) >= float(answer[5]) >= float(answer[7]) for answer in answers)


def test_json_is_an_object_a_line(predict, samples):
    rows = [
        json.loads(line)
        for line in predict("--format", "json", "--top-k", 10, *samples).done().out.splitlines()
    ]
    assert [row["path"] for row in rows] == [str(path) for path in samples]
    for row in rows:
        assert row.keys() == {"path", "label", "probability", "known", "top"}
        assert row["top"][0] == {"label": row["label"], "probability": row["probability"]}
        probabilities = [entry["probability"] for entry in row["top"]]
        assert (
            probabilities == sorted(probabilities, reverse=True)
            and abs(sum(probabilities) - 1) < 1e-4
        )
        assert sorted(entry["label"] for entry in row["top"]) == list("0123456789")


@pytest.mark.parametrize(("name", "first"), [("a.CSV", "path,"), ("a.jsonl", '{"path"'), ("a", "")])
def test_the_name_of_the_output_says_the_format(predict, samples, here, name, first):
    result = predict(samples[0], "--output", name).done()
    assert result.out == "" and (here / name).read_text().startswith(first or str(samples[0]))


def test_csv_has_a_header_and_a_row_each(predict, samples, bad):
    result = predict("--format", "csv", "--top-k", 2, samples[4], "text.png", samples[7])
    rows = list(csv.DictReader(result.out.splitlines()))
    assert [row["path"] for row in rows] == [str(samples[4]), "text.png", str(samples[7])]
    assert rows[0].keys() >= {"path", "label", "probability", "label_2", "probability_2"}
    assert "not an image" in rows[1]["error"] and rows[1]["label"] == ""
    assert {len(cells) for cells in csv.reader(result.out.splitlines())} == {9}
    assert float(rows[0]["probability"]) >= float(rows[0]["probability_2"])


@pytest.mark.parametrize("top_k", [1, 3, 99])
def test_top_k_is_at_most_all_classes(predict, samples, top_k):
    row = json.loads(predict("--format", "json", "--top-k", top_k, samples[0]).done().out)
    assert len(row["top"]) == min(top_k, 10)


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_order_and_answers_do_not_depend_on_sizes_and_batches(predict, samples, here, batch_size):
    paths = []
    for k, path in enumerate([*samples, *samples]):  # three sizes, mixed
        side = 8 * (1 + k % 3)
        Image.open(path).resize((side, side), Image.Resampling.NEAREST).save(f"{k:02}.png")
        paths.append(f"{k:02}.png")
    rows = [
        [
            json.loads(line)
            for line in predict("--format", "json", *arguments).done().out.splitlines()
        ]
        for arguments in (["--batch-size", batch_size, *paths], ["."])
    ]
    assert [row["path"] for row in rows[0]] == paths and [row["path"] for row in rows[1]] == [
        f"./{p}" for p in paths
    ]
    assert [row["label"] for row in rows[0]] == [row["label"] for row in rows[1]]
    difference = [abs(a["probability"] - b["probability"]) for a, b in zip(*rows, strict=True)]
    assert max(difference) < 1e-5


def test_globs_are_expanded_also_below(predict, samples, here):
    (here / "a" / "b").mkdir(parents=True)
    for path, target in zip(samples, ["a/b/x.png", "a/y.png", "z.png", "z[1].png"], strict=False):
        shutil.copy(path, target)
    found = [
        json.loads(line)["path"]
        for line in predict("--format", "json", "**/*.png").done().out.splitlines()
    ]
    assert found == ["a/b/x.png", "a/y.png", "z.png", "z[1].png"]
    # A name that exists is a file, whatever characters it has.
    assert json.loads(predict("--format", "json", "z[1].png").done().out)["path"] == "z[1].png"


def test_a_glob_that_matches_only_a_directory_is_not_silent(predict, samples, here):
    (here / "photos").mkdir()
    shutil.copy(samples[0], here / "photos")
    result = predict("phot*")
    assert "photos/digit_0.png" in result.out or (result.code == 1 and "error: phot*" in result.err)


@pytest.mark.parametrize("output_format", ["text", "json", "csv"])
def test_every_unusable_file_is_named_and_the_others_are_predicted(
    predict, samples, bad, output_format
):
    result = predict("--format", output_format, samples[3], *bad, samples[5])
    assert result.code == 1 and "Traceback" not in result.err
    lines = result.err.splitlines()
    assert len(lines) == len(bad)
    for line, (path, reason) in zip(lines, bad.items(), strict=True):
        assert line.startswith(f"error: {path}: ") and reason in line
    assert str(samples[3]) in result.out and str(samples[5]) in result.out
    if output_format == "json":
        rows = [json.loads(line) for line in result.out.splitlines()]
        assert [row["path"] for row in rows] == [str(samples[3]), *bad, str(samples[5])]
        assert [row.keys() for row in rows[1:-1]] == [{"path", "error"}] * len(bad)


def test_strange_names_stay_on_one_line(predict, samples, here):
    shutil.copy(samples[0], "two\nlines\x1b[31m.png")
    result = predict(".").done()
    assert len(result.out.splitlines()) == 1 and "\x1b" not in result.out
    row = json.loads(predict("--format", "json", ".").done().out)
    assert row["path"] == "./two\nlines\x1b[31m.png"


def test_output_is_a_whole_file(predict, samples, here):
    result = predict("--format", "json", "--output", "answers.jsonl", *samples).done()
    assert result.out == "" and os.listdir() == ["answers.jsonl"]
    assert len((here / "answers.jsonl").read_text().splitlines()) == 10


def test_output_is_not_there_when_the_work_breaks_off(predict, samples, here, monkeypatch):
    (here / "answers.txt").write_text("of yesterday")

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Model, "run", interrupt)
    assert predict("--output", "answers.txt", *samples).code == 130
    assert os.listdir() == ["answers.txt"] and (here / "answers.txt").read_text() == "of yesterday"


@pytest.mark.parametrize("path", ["photos/a.png", "photos", "photos/*.png", "phot*"])
def test_output_never_replaces_what_is_read(predict, samples, here, path):
    (here / "photos").mkdir()
    shutil.copy(samples[0], "photos/a.png")
    before = (here / "photos/a.png").read_bytes()
    predict("--output", "photos/a.png", path).error(2, "--output photos/a.png is read")
    assert (here / "photos/a.png").read_bytes() == before

    (here / "photos/answers.txt").write_text("of yesterday")
    predict("--output", "photos/answers.txt", "photos").done()


def test_output_is_no_other_file_of_the_same_call(predict, samples, here):
    asked = ("--output", "x.json", "--monitor", "./x.json", samples[0])
    predict(*asked).error(2, "--output x.json is read, as ./x.json")
    asked = ("--output", "kept/.collected.jsonl", "--collect", "kept", samples[0])
    predict(*asked).error(2, "lies in --collect kept")
    assert not os.listdir(here)


def test_output_never_replaces_the_model(call, small, samples, here):
    shutil.copy(small.export / "model.onnx", "model.onnx")
    before = (here / "model.onnx").read_bytes()
    asked = ("--model", "model.onnx", "--output", "model.onnx")
    for more in ([samples[0]], ["--benchmark"], ["--evaluate", samples[0]]):
        call(step3_infer.main, *asked, *more).error(2, "--output model.onnx is read")
    assert (here / "model.onnx").read_bytes() == before


@pytest.mark.parametrize("output", ["folder", "missing/answers.txt", "file/answers.txt"])
def test_output_that_cannot_be_written(predict, samples, here, output):
    (here / "folder").mkdir()
    (here / "file").touch()
    predict("--output", output, samples[0]).error(1, "cannot write", output)
    assert sorted(os.listdir()) == ["file", "folder"]


def test_closed_pipe_has_no_traceback(execute, trained, samples, here, closed_pipe):
    arguments = ["--model", trained.export / "model.onnx", *samples]
    result = execute(ROOT / "step3_infer.py", *arguments, cwd=here, stdout=closed_pipe)
    assert (result.code, result.err) == (0, "")


@pytest.mark.parametrize("close", ["2>&-", "2>/dev/full"])
def test_closed_standard_error_keeps_predictions_and_exit_code(
    execute, trained, samples, bad, here, close
):
    arguments = ["--model", trained.export / "model.onnx", "text.png", *samples]
    result = execute(ROOT / "step3_infer.py", *arguments, cwd=here, close=close)
    assert result.code == 1 and len(result.out.splitlines()) == 10


def test_output_may_be_standard_output(execute, trained, samples, here):
    arguments = ["--model", trained.export / "model.onnx", samples[0], "--output", "/dev/stdout"]
    result = execute(ROOT / "step3_infer.py", *arguments, cwd=here).done()
    assert result.out.startswith(str(samples[0]))


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGHUP", 129)])
def test_a_signal_leaves_nothing_half_written(trained, samples, here, name, code):
    command = [sys.executable, ROOT / "step3_infer.py", "--model", trained.export / "model.onnx"]
    command += ["--monitor", "monitor.json", "--output", "rows.txt", "-"]
    pipes = {"stdin": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, cwd=here, **pipes) as process:
        process.stdin.write(samples[0].read_bytes())
        process.stdin.flush()
        while not list(here.glob(".rows.txt*")) and process.poll() is None:
            time.sleep(0.05)
        process.send_signal(getattr(signal, name))
        said = process.stderr.read().decode()
    assert process.returncode == code and "rows.txt was not written" in said
    assert os.listdir(here) == ["monitor.json"]
    assert json.loads((here / "monitor.json").read_text())["errors"] == 0


@pytest.mark.parametrize(("close", "words"), [(">&-", "--output"), (">/dev/full", "No space left")])
def test_standard_output_that_takes_nothing(execute, trained, samples, here, close, words):
    arguments = ["--model", trained.export / "model.onnx", *samples]
    execute(ROOT / "step3_infer.py", *arguments, cwd=here, close=close).error(1, words)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ([], "PATH"),
        (["--top-k", "0", "x.png"], "--top-k"),
        (["--batch-size", "-1", "x.png"], "--batch-size"),
        (["--format", "xml", "x.png"], "--format"),
        (["--nonsense", "x.png"], "--nonsense"),
        (["--self-test", "x.png"], "--self-test"),
        (["--verify", "x.png"], "--verify"),
        (["--benchmark", "x.png"], "--benchmark"),
        (["--benchmark", "--output", "b.csv"], "text or json, not csv"),
        (["--output", "-", "x.png"], "is the default"),
        (["--self-test", "--values", "1,2"], "--values"),
        (["--verify", "--output", "out"], "--output"),
        (["--values", "1,2", "--reject", "0.9"], "--reject"),
        (["--self-test", "--output", "out.txt"], "--output has no effect on --self-test"),
        (["--self-test", "--format", "json"], "--format has no effect on --self-test"),
        (["--verify", "--output", "out.txt"], "--output has no effect on --verify"),
        (["--verify", "--threads", "2"], "--threads has no effect on --verify"),
        (["--values", "1,2", "--top-k", "3"], "--top-k has no effect on --values"),
        (["--values", "1,2", "--batch-size", "16"], "--batch-size has no effect on --values"),
        (["--benchmark", "--top-k", "3"], "--top-k has no effect on --benchmark"),
    ],
)
def test_wrong_command_line(call, here, arguments, word):
    call(step3_infer.main, *arguments).error(2, word)


@pytest.mark.parametrize("arguments", [["image.png"], ["--verify"], ["--self-test"], ["--help"]])
def test_an_older_python_is_told_in_one_line(execute, here, arguments):
    older = "import runpy, sys; sys.version_info = (3, 9, 18, 'final', 0); "
    older += "sys.version = '3.9.18 (main)'; "
    older += (
        "script = sys.argv[1]; sys.argv = sys.argv[1:]; runpy.run_path(script, run_name='__main__')"
    )
    result = execute("-c", older, ROOT / "step3_infer.py", *arguments, cwd=here)
    assert (result.code, result.out) == (1, "")
    assert result.err == "error: Python 3.10 or newer is needed, this is Python 3.9.18\n"


def test_lowest_versions_are_those_of_the_requirements():
    required = (ROOT / "requirements.txt").read_text().splitlines()
    lines = [line for line in required if not line.startswith("#")]
    lowest = (ROOT / "tests" / "benchmarks" / "lowest.txt").read_text().splitlines()
    assert lowest == [line.replace(">=", "==") for line in lines]
    assert {f"numpy=={bundle.NUMPY}", f"Pillow=={bundle.PILLOW}"} <= set(lowest)


def test_an_older_python_can_parse_the_script():
    ast.parse((ROOT / "step3_infer.py").read_text(), feature_version=(3, 7))
