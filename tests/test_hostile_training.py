"""Hostile data, checkpoints and run directories, as step 1 and step 2 meet them."""

import argparse
import contextlib
import copy
import errno
import json
import math
import os
import shutil
import time

import numpy as np
import pytest
import torch
from PIL import Image

import data
import step1_train
import step2_export
from data import cache, decoding, parallel
from inference.command_line import printable
from inference.errors import Problem
from report import card, page
from training import checkpoints, optimizers, recipes, runs

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


# ------------------------------------------------------------------------------------------ images
def test_max_pixels_leads_somewhere(folder, tmp_path, capsys, monkeypatch):
    place = folder / "a" / "large.png"
    Image.new("L", (40, 30)).save(place)
    for module in (cache, data.target):
        monkeypatch.setattr(module, "MAX_PIXELS", 1000)

    assert len(data.load("folder", str(folder)).train_images) == 4
    said = capsys.readouterr().err
    assert f"skipped: {place} has 40 x 30 pixels, more than --max-pixels 1,000" in said
    assert len(data.load("folder", str(folder), max_pixels=1200).train_images) == 5
    assert "skipped" not in capsys.readouterr().err

    # The run's own limit travels to step 2 in its arguments.
    size = {"image_size": [8, 8], "channels": 1}
    spec = {**spec_of(folder, max_pixels=1200), **size}
    assert len(data.load_for(spec, None).train_images) == 5
    del spec["arguments"]["max_pixels"]  # as of a version without the option
    assert len(data.load_for(spec, None).train_images) == 4


def test_max_pixels_is_read_and_may_change(call, here, folder):
    call(step1_train.main, "--max-pixels", 9).error(2, "--max-pixels only applies to")
    assert "max_pixels" in recipes.MAY_CHANGE
    arguments = ["--data-dir", folder, "--model", "linear", "--epochs", 1]
    result = call(step1_train.main, *arguments, "--max-pixels", 63)
    result.error(1, "8 x 8 pixels, more than --max-pixels 63")


def test_16_bit_images_that_would_fill_the_memory_are_not_decoded_for_their_white(tmp_path):
    pixels = np.full((40, 30), 4000, np.uint16)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    paths = [str(tmp_path / "a.png")]
    assert data.target.probe(paths, 1).white == 4095
    assert data.target.probe(paths, 1, max_pixels=1199).sizes == 0


def test_large_images_are_decoded_one_at_a_time(folder, monkeypatch):
    held = []

    class Lock(contextlib.nullcontext):
        def __enter__(self):
            held.append(True)

    def decode(path, target, max_pixels):
        seen.append((max_pixels, len(held)))
        return decode_and_resize(path, target, max_pixels)

    seen = []
    decode_and_resize = decoding.decode_and_resize
    monkeypatch.setattr(decoding, "decode_and_resize", decode)
    monkeypatch.setattr(decoding, "LARGE_PIXELS", 63)
    monkeypatch.setattr(parallel, "large_image", Lock())
    target = data.target.Target(
        image_size=(8, 8), channels=1, white=65535, ground=None, fit="stretch"
    )
    image = decoding.decode_to(str(folder / "a" / "0.png"), target, 64)
    assert image.shape == (8, 8, 1) and seen == [(63, 0), (64, 1)]
    with pytest.raises(Problem, match="more than --max-pixels 62"):
        decoding.decode_to(str(folder / "a" / "0.png"), target, 62)


def test_workers_share_one_lock(monkeypatch):
    with parallel.worker_pool(2) as pool:
        assert all(pool.map(holds_lock, range(4)))


def holds_lock(_):
    with parallel.one_at_a_time((10_000, 10_000)):
        return not parallel.large_image.acquire(block=False)


# -------------------------------------------------------------------------------------- CSV lists
def test_csv_paths_that_lead_outside_are_said(folder, tmp_path, capsys):
    rows = [f"{label}/{number}.png,{label}" for label in "ab" for number in range(3)]
    (folder / "inside.csv").write_text("\n".join(["path,label", *rows]))
    data.load("csv", str(folder / "inside.csv"))
    assert "outside" not in capsys.readouterr().err

    shutil.copy(folder / "a" / "0.png", tmp_path / "secret.png")
    rows += ["../secret.png,a", f"{tmp_path}/secret.png,a"]
    (folder / "outside.csv").write_text("\n".join(["path,label", *rows]))
    data.load("csv", str(folder / "outside.csv"))
    said = capsys.readouterr().err
    assert f"lists 2 images outside {folder}{os.sep}, the first: {folder}/../secret.png" in said
    data.load("csv", str(folder / "outside.csv"), image_root=str(folder))
    assert f"lists 2 images outside {folder}" in capsys.readouterr().err


def test_labels_that_no_exported_file_could_carry(folder):
    rows = ["path,label", "a/0.png,a", "a/1.png,a", f"b/0.png,{'b' * 257}"]
    (folder / "list.csv").write_text("\n".join(rows))
    with pytest.raises(Problem, match="label of more than 256 characters"):
        data.load("csv", str(folder / "list.csv"))


# ---------------------------------------------------------------------------------------- resuming
VALUES = [
    None,
    True,
    -1,
    0,
    2,
    10**400,
    1 << 70,
    0.5,
    1e308,
    math.nan,
    -math.inf,
    "",
    "x",
    "1",
    "\0",
    "n" * 9999,
    [],
    ["x"],
    [1, 2, 3],
    {},
    {"x": [1]},
    torch.zeros(2),
]


def mutated(value, rng):
    """A copy of plain data with one place changed: another value, a missing key, deep nesting."""
    value = copy.deepcopy(value)
    places = list(places_of(value))
    holder, key = places[rng.integers(len(places))]
    kind = rng.integers(10)
    if kind == 0:
        del holder[key]
    elif kind == 1:
        nested = []
        for _ in range(200):
            nested = [nested]
        holder[key] = nested
    else:
        holder[key] = VALUES[rng.integers(len(VALUES))]
    return value


def places_of(value):
    """Every (holder, key) of nested dicts and lists."""
    keys = ()
    if isinstance(value, dict):
        keys = list(value)
    elif isinstance(value, list):
        keys = range(len(value))
    for key in keys:
        yield value, key
        yield from places_of(value[key])


@pytest.fixture
def resumed(call, here, few_digits, monkeypatch):
    """resumed(name) -> Result of step1's --resume, whose run is read, built and restored only."""

    def complete(trainee, splits, dataset, settings, machine, run_dir, checkpoint):
        optimizer = optimizers.make_optimizer(trainee.deployable.network, settings)
        progress = checkpoints.restore(checkpoint, optimizer, 0)
        steps = step1_train.steps_per_epoch(trainee, settings, machine)
        optimizers.rate_at(settings, progress.epoch, progress.steps, steps)
        return 0

    monkeypatch.setattr(step1_train, "complete", complete)
    monkeypatch.setattr(step1_train.doctor, "examined", lambda dataset, flips: dataset)
    monkeypatch.setattr(step1_train.cpu, "set_threads", lambda *_: (1, ""))
    return lambda name: call(step1_train.main, "--resume", name, "--device", "cpu", "--quiet")


def ends_well(result):
    """Is the result a success, or a failure in one line with a way out?"""
    lines = [line for line in result.err.splitlines() if not line.startswith(("note: ", "warn"))]
    if result.code == 0:
        return not lines
    return result.code in (1, 2) and len(lines) == 1 and lines[0].startswith("error: ")


def begun(here, small):
    """A run that was stopped after its first epoch of three: its directory and checkpoint."""
    run = here / "runs" / "small"
    shutil.copytree(small.run, run)
    (run / "summary.json").unlink()
    checkpoint = torch.load(run / "checkpoint.pt", weights_only=True)
    progress = checkpoint["training"]["progress"]
    progress |= {"epoch": 2, "rows": progress["rows"][:1]}
    checkpoint["training"]["data"] = data.load("digits").fingerprint
    return run, checkpoint


def try_configs(here, small, resumed, count, seed):
    run, _ = begun(here, small)
    (run / "checkpoint.pt").unlink()
    config = json.loads((run / "config.json").read_text())
    assert ends_well(resumed("small"))
    rng = np.random.default_rng(seed)
    for _ in range(count):
        changed = mutated(config, rng)
        text = json.dumps(changed, default=lambda tensor: tensor.tolist())
        (run / "config.json").write_text(text)
        assert ends_well(resumed("small")), changed
    return run


def try_checkpoints(here, small, resumed, count, seed):
    run, checkpoint = begun(here, small)
    torch.save(checkpoint, run / "checkpoint.pt")
    assert resumed("small").code == 0
    rng = np.random.default_rng(seed)
    for _ in range(count):
        changed = mutated(checkpoint, rng)
        torch.save(changed, run / "checkpoint.pt")
        result = resumed("small")
        assert ends_well(result), (result, changed)


@pytest.mark.slow
def test_damaged_configs_are_one_error(here, small, resumed):
    run = try_configs(here, small, resumed, 150, seed=0)
    texts = ["", "[]", "null", "{" * 100_000, "[" * 100_000, "\xff", '{"epochs": 1e999}']
    for text in texts:
        (run / "config.json").write_text(text, encoding="latin-1")
        result = resumed("small")
        assert "start the run again" in result.error(1, "config.json")
    (run / "config.json").unlink()
    os.mkfifo(run / "config.json")
    resumed("small").error(1, "not a regular file")


def test_damaged_checkpoints_are_one_error(here, small, resumed):
    try_checkpoints(here, small, resumed, 150, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 5))
def test_many_damaged_runs(here, small, resumed, seed):
    try_configs(here, small, resumed, 1000, seed)
    shutil.rmtree(here / "runs")
    try_checkpoints(here, small, resumed, 1000, seed)


def test_damaged_checkpoints_are_one_error_of_step2(here, small):
    run = here / "small"
    run.mkdir()
    checkpoint = torch.load(small.run / "checkpoint.pt", weights_only=True)
    parity = json.loads((small.export / "parity.json").read_text())
    kept = ("schema", "spec", "epoch", "familiarity", "training")
    rng = np.random.default_rng(0)
    for _ in range(150):
        changed = mutated({name: checkpoint[name] for name in kept}, rng)
        torch.save({**changed, "state_dict": checkpoint["state_dict"]}, run / "checkpoint.pt")
        try:
            trained = step2_export.read_run(str(run))
            text = card.model_card({**trained.spec, "device": DEVICE}, parity)
        except Problem as problem:
            assert str(run) in str(problem)
        else:
            assert text.startswith("# Model card")


DEVICE = {"weights": 1, "activations": 1, "multiply_adds": 1}


# ---------------------------------------------------------------------------- the report, the card
HOSTILE_TEXTS = ["\u202eevil", "a\u2069b", "x" + "\u0301" * 500, "# head\n<script>", "n" * 5000]


@pytest.mark.parametrize("text", HOSTILE_TEXTS)
def test_texts_of_strangers_in_report_and_card(here, small, text):
    checkpoint = torch.load(small.run / "checkpoint.pt", weights_only=True)
    spec = {**checkpoint["spec"], "device": DEVICE, "created": text, "model": text}
    parity = json.loads((small.export / "parity.json").read_text())
    written = card.model_card(spec, parity)
    (trained,) = [line for line in written.splitlines() if line.startswith("- Trained: ")]

    run = here / "runs" / "small"
    shutil.copytree(small.run, run)
    summary = json.loads((run / "summary.json").read_text())
    per_class = dict(zip([text, "b"], summary["per_class"].values(), strict=False))
    changed = {**summary, "created": text, "per_class": per_class}
    (run / "summary.json").write_text(json.dumps(changed))
    page.write_report(str(run), "runs", "exports")
    html = (run / "report.html").read_text(encoding="utf-8")

    for shown in (trained, written, html):
        assert not set("\u202e\u2069") & set(shown)
        assert "\u0301" * 7 not in shown and "n" * 301 not in shown
        assert "<script>" not in shown and "\n# head" not in shown


def test_accents_of_honest_texts_stay():
    for text in ("Việt", "Việt", "שָּׁ֑", "ที่", "é"):
        assert printable(text) == text


def test_damaged_files_leave_gaps_in_a_report(here, small):
    run = here / "runs" / "small"
    shutil.copytree(small.run, run)
    shutil.copytree(small.export, here / "exports" / "small")
    rng = np.random.default_rng(0)
    places = {"config.json": run, "summary.json": run, "parity.json": here / "exports" / "small"}
    for name, place in places.items():
        content = json.loads((place / name).read_text())
        for _ in range(60):
            changed = mutated(content, rng)
            text = json.dumps(changed, default=lambda tensor: tensor.tolist())
            (place / name).write_text(text)
            page.write_report(str(run), "runs", "exports")
        (place / name).write_text(json.dumps(content))
    for text in ("", "epoch\n", "epoch,x\n1\n", "\x00,\n1,2\n", 'a,"b\n' + "9" * 10**6):
        (run / "metrics.csv").write_text(text)
        page.write_report(str(run), "runs", "exports")
