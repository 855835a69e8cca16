"""Every engine that the README names gives the trained network's answers from the exported file
alone."""

import base64
import io
import json

import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from runtimes import RUNTIMES, version

import data
import step2_export
from deploy.reference import reference

STRICT = 1e-4  # of a probability


@pytest.fixture(
    params=["onnxruntime", "TorchScript", "pt2", "OpenVINO", "OpenCV", "tract", "ONNX reference"]
)
def engine(request, trained, all_formats):
    """(the engine's name, the run, its function)."""
    name = request.param
    if version(name) is None:
        pytest.skip(f"{name} is not installed: pip install {RUNTIMES[name][0]}")
    if name == "ONNX reference" and tuple(map(int, version(name).split(".")[:2])) < (1, 22):
        pytest.skip("the reference evaluator of onnx 1.18 to 1.21 takes minutes for these images")
    run = step2_export.read_run(str(trained.run))
    _, suffix, load = RUNTIMES[name]
    return name, run, load(all_formats / f"model{suffix}", torch.get_num_threads())


def test_own_size_is_exact(engine):
    _, run, predict = engine
    images = data.load("digits").test_images[:32]
    images = np.stack(
        [np.asarray(Image.fromarray(i.squeeze(-1)).resize((32, 32)))[..., None] for i in images]
    )
    expected = reference(run, images).main
    for batch in (images, images[:1], images[:7]):
        got = predict(batch)
        assert got.dtype == np.float32 and np.abs(got - expected[: len(batch)]).max() <= STRICT
        assert (got.argmax(1) == expected[: len(batch)].argmax(1)).all()


@pytest.mark.parametrize("size", [(43, 57), (131, 97), (20, 20), (240, 321)])
def test_other_sizes(engine, size):
    _, run, predict = engine
    images = np.random.default_rng(0).integers(0, 256, (3, *size, 1), dtype=np.uint8)
    assert np.abs(predict(images) - reference(run, images).main).max() <= STRICT


def test_classes_are_read_without_the_project(all_formats):
    properties = {
        entry.key: entry.value for entry in onnx.load(all_formats / "model.onnx").metadata_props
    }
    assert json.loads(properties["classes"]) == list("0123456789")


def test_golden_samples_in_every_engine(engine, trained):
    _, _, predict = engine
    properties = {
        entry.key: entry.value for entry in onnx.load(trained.export / "model.onnx").metadata_props
    }
    for sample in json.loads(properties["spec"])["golden"]:
        image = np.array(Image.open(io.BytesIO(base64.b64decode(sample["image"]))))[None, ..., None]
        assert np.abs(predict(image)[0] - sample["probabilities"]).max() <= STRICT
