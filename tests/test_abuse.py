"""What hostile and unlucky users did to it: each was a traceback, a hang or silence once."""

import json
import os
import threading

import pytest
import torch
from conftest import ROOT
from test_own_images import folder  # noqa: F401  the fixture

import step1_train
import step2_export
import step3_infer

QUICK = ["--model", "linear", "--epochs", "1"]


def test_training_into_a_closed_pipe_fails(execute, here, closed_pipe):
    execute(ROOT / "step1_train.py", *QUICK, cwd=here, stdout=closed_pipe).error(
        1, "standard output"
    )
    assert not list((here / "runs").glob("*"))  # no dead run takes the name


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--batch-size 1 --model resblock", ["batch norm", "--batch-size 2"]),
        ("--dataset linear --model resblock", ["--model linear"]),
        ("--device meta --model linear", ["--device cpu"]),
    ],
)
def test_what_cannot_work_is_said_before_a_run_is_claimed(call, here, arguments, words):
    call(step1_train.main, *arguments.split()).error(2, *words)
    assert not (here / "runs").exists()


def test_more_memory_than_there_is(call, here):
    call(step1_train.main, *["--model", "mlp", "--hidden", "9", "99999999999999"]).error(
        1, "memory"
    )


def test_a_named_pipe_among_the_images(call, here, folder):  # noqa: F811
    os.mkfifo(folder / "train" / "a" / "pipe.png")
    result = call(step1_train.main, "--dataset", "folder", "--data-dir", folder, *QUICK).done()
    assert "pipe.png is not a regular file" in result.err


@pytest.mark.parametrize("text", ["5", "[]", "{", '{"shape": 3, "unreadable": 1}'])
def test_foreign_text_in_the_cache(call, here, folder, text):  # noqa: F811
    arguments = ["--dataset", "folder", "--data-dir", folder, *QUICK]
    call(step1_train.main, *arguments).done()
    for file in (folder / ".threestep").glob("*.json"):
        file.write_text(text)
    assert "decoded 48 files" in call(step1_train.main, *arguments).done().err


def test_own_images_leave_the_threads_alone(call, here, folder):  # noqa: F811
    before = torch.get_num_threads()
    call(
        step1_train.main, "--dataset", "folder", "--data-dir", folder, "--image-size", 24, *QUICK
    ).done()
    assert torch.get_num_threads() == before


def test_a_validation_split_that_would_be_empty(call, here, folder):  # noqa: F811
    for path in folder.glob("train/*/*.png"):
        if path.stem != "0":
            path.unlink()
    arguments = ["--dataset", "folder", "--data-dir", folder, "--val-fraction", 0.5, *QUICK]
    call(step1_train.main, *arguments).error(2, "--val-fraction", "too few")


@pytest.mark.parametrize(
    "state", [{0: torch.zeros(1)}, {"state_dict": [1]}, {"state_dict": {}, "spec": 3}]
)
def test_odd_pretrained_files(call, here, state):
    torch.save(state, here / "odd.pt")
    call(step1_train.main, "--model", "mynet", "--pretrained", "odd.pt").error(
        2, "odd.pt", "not a state_dict"
    )


@pytest.mark.parametrize(
    "change",
    [{"task": None}, {"arguments": None}, {"mean": [0.1, 0.2]}, {"versions": None}],
    ids=lambda c: next(iter(c)),
)
def test_checkpoints_whose_spec_lacks_something(call, small_run, change):
    checkpoint = torch.load(small_run / "checkpoint.pt", weights_only=True)
    ((key, value),) = change.items()
    checkpoint["spec"].pop(key)
    if value is not None:
        checkpoint["spec"][key] = value
    torch.save(checkpoint, small_run / "checkpoint.pt")
    call(step2_export.main).error(1, "not a Threestep checkpoint")


def test_foreign_parity_json(call, small_run, here, in_process):
    (here / "out").mkdir()
    (here / "out" / "parity.json").write_text('{"onnx": 5}')
    call(step2_export.main, "--format", "torchscript", "--out", "out").done()


@pytest.mark.parametrize(
    ("epoch", "calibration", "said"),
    [
        (1, "none", "stopped after epoch 1 of 3"),
        (3, "twin", "stopped before its calibration"),
        (3, "none", None),
    ],
)
def test_an_interrupted_run_is_exported_with_a_note(
    call, small_run, in_process, epoch, calibration, said
):
    checkpoint = torch.load(small_run / "checkpoint.pt", weights_only=True)
    checkpoint["spec"] |= {"temperature": None, "calibration": None, "known": None}
    checkpoint["spec"]["arguments"]["calibration"] = calibration
    checkpoint |= {"epoch": epoch, "familiarity": None}
    torch.save(checkpoint, small_run / "checkpoint.pt")
    (small_run / "summary.json").unlink()
    result = call(step2_export.main, "--format", "torchscript").done()
    assert said in result.err if said else "stopped" not in result.err


def test_output_through_a_link_and_into_a_pipe(call, here, trained, samples):
    arguments = ["--model", trained.export / "model.onnx", "--format", "json", samples[0]]
    os.symlink("real.jsonl", here / "link.jsonl")
    call(step3_infer.main, *arguments, "--output", "link.jsonl").done()
    assert (here / "link.jsonl").is_symlink() and json.loads((here / "real.jsonl").read_text())[
        "label"
    ]
    os.mkfifo(here / "pipe")
    read = []
    reader = threading.Thread(target=lambda: read.append((here / "pipe").read_text()))
    reader.start()
    call(step3_infer.main, *arguments, "--output", "pipe").done()
    reader.join(10)
    assert json.loads(read[0])["label"] and not (here / "pipe").is_file()


def test_more_threads_than_make_sense(call, trained, samples):
    model = ["--model", trained.export / "model.onnx"]
    call(step3_infer.main, *model, "--threads", "99999999999999", samples[0]).error(2, "--threads")
