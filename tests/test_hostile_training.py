"""Hostile data, checkpoints and run directories, as step 1 and step 2 meet them."""

import os
import shutil
import time

import numpy as np
import pytest
from PIL import Image

import data
from data import cache

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
    with pytest.raises(data.Problem, match="give --data-dir"):
        data.load_for(spec, None)
    assert [path.name for path in raw.iterdir()] == ["train-images-idx3-ubyte"]
