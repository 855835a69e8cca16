"""Hostile data, checkpoints and run directories, as step 1 and step 2 meet them."""

import argparse
import errno
import os
import shutil
import time

import numpy as np
import pytest
from PIL import Image

import data
import step1_train
from data import cache
from inference.errors import Problem
from training import recipes, runs

OLD = time.time() - 3 * cache.STALE_SECONDS


@pytest.fixture
def folder(tmp_path):
    """Six small grey images in two classes."""
    rng = np.random.default_rng(0)
    for label in "ab":
        place = tmp_path / "photos" / label
        place.mkdir(parents=True)
        for number in range(3):
            pixels = rng.integers(0, 256, (8, 8), dtype=np.uint8)
            Image.fromarray(pixels).save(place / f"{number}.png")
    return tmp_path / "photos"


def make_old(*paths):
    for path in paths:
        path.write_bytes(b"x")
        os.utime(path, (OLD, OLD))


# -------------------------------------------------------------------------------- the cache's place
def test_files_of_others_in_a_cache_dir_stay(folder, tmp_path):
    place = tmp_path / "cache"
    ours = place / cache.IN_CACHE_DIR
    ours.mkdir(parents=True)
    strangers = [place / "thesis.tmp", ours / "thesis.tmp", ours / ".draft-0123456789abcdef.tmp"]
    left = [
        ours / "0123456789abcdef-0123456789abcdef.1234.tmp",
        ours / ".0123456789abcdef-0123456789abcdef.json-01234567.tmp",
        ours / ".features-mobilenet_v3_small-0123456789ab-01234567.tmp",
    ]
    make_old(*strangers, *left)
    data.load("folder", str(folder), cache_dir=str(place))
    assert [path.exists() for path in strangers] == [True] * 3
    assert [path.exists() for path in left] == [False] * 3
    assert {path.name for path in place.iterdir()} == {"thesis.tmp", cache.IN_CACHE_DIR}
    assert list(ours.glob("*.u8")) and not (folder / cache.BESIDE).exists()


def spec_of(folder, **arguments):
    """The part of a run's spec that says where its data is."""
    options = dict.fromkeys(data.OPTIONS) | {"seed": 0, "strict": False}
    arguments = {**options, "data_dir": str(folder), **arguments}
    size = {"image_size": [8, 8], "channels": 1}
    return {"dataset": "folder", "task": "classification", "arguments": arguments, **size}


def test_a_cache_dir_out_of_a_checkpoint_is_used_if_it_is_the_users(folder, tmp_path, capsys):
    place = tmp_path / "documents"
    place.mkdir()
    make_old(place / "thesis.tmp")

    data.load_for(spec_of(folder, cache_dir=str(place)), None)
    assert [path.name for path in place.iterdir()] == ["thesis.tmp"]
    assert list((folder / cache.BESIDE).glob("*.u8"))
    assert f"--cache-dir {place} is not used" in capsys.readouterr().err

    os.symlink(tmp_path, place / cache.IN_CACHE_DIR)
    assert not cache.is_own_cache(str(place))
    (place / cache.IN_CACHE_DIR).unlink()
    shutil.rmtree(folder / cache.BESIDE)
    (place / cache.IN_CACHE_DIR).mkdir()
    data.load_for(spec_of(folder, cache_dir=str(place)), None)
    assert list((place / cache.IN_CACHE_DIR).glob("*.u8"))
    assert "is not used" not in capsys.readouterr().err


def test_paths_out_of_a_checkpoint_are_said(folder, capsys):
    data.load_for(spec_of(folder), None)
    assert f"note: reading {folder}, as the run did" in capsys.readouterr().err
    data.load_for(spec_of("/nowhere"), str(folder))
    assert "reading" not in capsys.readouterr().err


def test_nothing_is_downloaded_to_a_place_out_of_a_checkpoint(tmp_path, monkeypatch):
    import torchvision

    def download(self):
        raise AssertionError("a download was tried")

    monkeypatch.setattr(torchvision.datasets.MNIST, "download", download)
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    (raw / "train-images-idx3-ubyte").write_bytes(b"not an IDX file")
    spec = {**spec_of(tmp_path), "dataset": "mnist", "image_size": [28, 28]}
    with pytest.raises(Problem, match="give --data-dir"):
        data.load_for(spec, None)
    assert [path.name for path in raw.iterdir()] == ["train-images-idx3-ubyte"]


# ----------------------------------------------------------------------------------- names of runs
def settings_of(**values):
    settings = {"name": None, "dataset": "digits", "model": "mlp", "data_dir": None}
    return argparse.Namespace(**{**settings, **values})


def test_a_name_that_no_file_system_takes(call, here):
    call(step1_train.main, "--name", "n" * 300).error(2, "--name has 300 bytes")
    assert not list(here.iterdir())


@pytest.mark.parametrize("letter", ["n", "ü"])
def test_a_long_default_name_is_cut(here, capsys, letter):
    data_dir = letter * (255 // len(letter.encode()))
    for number in ("", "-2"):
        with runs.claimed(settings_of(dataset="folder", data_dir=data_dir)) as run_dir:
            assert len(os.path.basename(run_dir).encode()) <= recipes.LONGEST_NAME
            assert run_dir.endswith(f"{letter * 3}-mlp{number}")
    assert "note: the name of the run is cut" in capsys.readouterr().err


def test_a_run_that_cannot_be_named_is_one_error(here, monkeypatch):
    def fail(*_):
        raise OSError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(Problem, match="digits-mlp: Permission denied"), runs.claimed(settings_of()):
        pass
    assert not list((here / "runs").iterdir())


def test_names_are_tried_again_only_while_others_take_them(here, monkeypatch):
    taken = OSError(errno.ENOTEMPTY, "Directory not empty")
    monkeypatch.setattr(runs, "MOST_NAMES", 3)
    monkeypatch.setattr(os, "rename", lambda *_: (_ for _ in ()).throw(taken))
    with pytest.raises(Problem, match="choose another with --name"), runs.claimed(settings_of()):
        pass


def test_what_killed_processes_left_is_removed_by_the_next(here):
    (here / "runs").mkdir()
    paths = {}
    for name in (".new-00000000", ".new-11111111", ".new-22222222", ".new-thesis", "new-run"):
        paths[name] = here / "runs" / name
        paths[name].mkdir()
        (paths[name] / "config.json").write_text("{}")
        os.utime(paths[name], (OLD, OLD))
    os.utime(paths[".new-22222222"])  # it has just been made

    with runs.locked(str(paths[".new-11111111"])), runs.claimed(settings_of()):
        pass
    left = {path.name for path in (here / "runs").iterdir()}
    assert left == {*paths, "digits-mlp"} - {".new-00000000"}


def test_a_run_of_the_future_is_not_the_newest(here, capsys):
    for name, changed in (("old", OLD), ("new", OLD + 9), ("hostile", 4e9)):
        run = here / "runs" / name
        run.mkdir(parents=True)
        (run / "config.json").touch()
        (run / "checkpoint.pt").touch()
        for path in (run / "checkpoint.pt", run):
            os.utime(path, (changed, changed))
    assert runs.find() == runs.find(unfinished=True) == os.path.join("runs", "new")
    assert "runs/hostile is not taken for the newest" in capsys.readouterr().err

    shutil.rmtree(here / "runs" / "old")
    shutil.rmtree(here / "runs" / "new")
    assert runs.find() == os.path.join("runs", "hostile")


# -------------------------------------------------------------------------------------------- CSV
def test_no_cell_of_a_table_is_a_formula(here):
    rows = [["image", "label"], ["=cmd|' /C calc'!A0", "a;@SUM(1)"], ["\udcff.png", None]]
    runs.write_table(str(here), "suspects.csv", rows, end="\r\n")
    lines = ["image,label", "'=cmd|' /C calc'!A0,a;'@SUM(1)", "\\udcff.png,", ""]
    assert (here / "suspects.csv").read_bytes() == "\r\n".join(lines).encode()

    rows = [{"epoch": 1, "loss": -0.5, "accuracy": None}, {"epoch": 2, "loss": 1e-9, "accuracy": 1}]
    runs.write_metrics(str(here), rows)
    text = (here / "metrics.csv").read_bytes()
    assert text == b"epoch,loss,accuracy\n1,-0.5,\n2,1e-09,1\n"
