"""data/mirrored.py: flip is left out where a mirror turns images into those of other classes."""

import argparse
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

import step1_train
from data.mirrored import Mirrored, harm_of_flip
from data.summaries import shrink, thumbnail_shape
from training import recipes


def pictures(draw, count, noise=25, side=48):
    """Noisy pictures of two classes, uint8 [n, side, side, 3], each drawn by draw(ImageDraw, x, y,
    class, colour)."""
    rng = np.random.default_rng(0)
    images = []
    for number in range(count):
        image = Image.new("RGB", (side, side), tuple(rng.integers(40, 120, 3).tolist()))
        x, y = rng.integers(16, side - 15, 2).tolist()
        draw(ImageDraw.Draw(image), x, y, number % 2, tuple(rng.integers(170, 256, 3).tolist()))
        turned = image.rotate(rng.uniform(-8, 8))
        pixels = np.asarray(turned) + rng.normal(0, noise, (side, side, 3))
        images.append(np.clip(pixels, 0, 255).astype(np.uint8))
    return np.stack(images)


def arrow(drawing, x, y, label, colour):
    way = 1 if label else -1
    drawing.line((x - 13 * way, y, x + 13 * way, y), colour, 3)
    drawing.line((x + 6 * way, y - 8, x + 13 * way, y, x + 6 * way, y + 8), colour, 3)


def letter(drawing, x, y, label, colour):
    drawing.text((x, y), "bd"[label], colour, ImageFont.load_default(24), anchor="mm")


def disc_or_square(drawing, x, y, label, colour):
    place = (x - 9, y - 9, x + 9, y + 9)
    drawing.ellipse(place, colour) if label else drawing.rectangle(place, colour)


def found_in(images, labels=None, groups=None):
    count = len(images)
    labels = np.arange(count) % 2 if labels is None else labels
    groups = np.arange(count) if groups is None else groups
    thumbnails = shrink(images, 8).reshape(count, -1)
    return harm_of_flip(thumbnails, thumbnail_shape(images), labels, groups)


@pytest.mark.parametrize("draw", [arrow, letter])
def test_classes_that_a_mirror_exchanges_are_found(draw):
    found = found_in(pictures(draw, 120))
    assert found.plain < 0.3 and found.mirrored > 0.7


def test_classes_that_look_alike_in_a_mirror_are_not():
    assert found_in(pictures(disc_or_square, 120)) is None


def test_random_labels_are_not_found_nor_copies_that_share_them():
    rng = np.random.default_rng(0)
    scenes = pictures(disc_or_square, 60)
    labels = rng.integers(0, 2, 60)
    assert found_in(scenes, labels) is None

    # Five versions of each scene find each other unmirrored, unless they are known to be copies.
    again = np.repeat(scenes, 5, axis=0)
    again = np.clip(again + rng.normal(0, 9, again.shape), 0, 255).astype(np.uint8)
    assert found_in(again, np.repeat(labels, 5)) is not None
    assert found_in(again, np.repeat(labels, 5), np.repeat(np.arange(60), 5)) is None


def test_one_image_and_constant_ones_are_borne():
    assert found_in(np.zeros((1, 8, 8, 3), np.uint8)) is None
    assert found_in(np.full((40, 3, 9, 3), 7, np.uint8)) is None


def test_flip_is_left_out_and_said(call, here):
    for number, image in enumerate(pictures(arrow, 60)):
        folder = here / "arrows" / ("left", "right")[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{number}.png")

    quick = ["--model", "tiny", "--epochs", "1", "--calibration", "none", "--image-size", "28"]
    said = call(step1_train.main, "--data-dir", here / "arrows", *quick).done()
    assert "note: training without flip: mirrored, " in said.err
    assert "augment translate blur color noise" in said.out


def test_flip_that_was_asked_for_stays_with_a_warning(capsys):
    findings = SimpleNamespace(mirrored=Mirrored(plain=0.051, mirrored=0.949))
    dataset = SimpleNamespace(findings=findings)
    settings = argparse.Namespace(augment=["flip", "noise"])

    kept = recipes.heed_mirror(settings, {"augment": ["flip", "noise"]}, dataset)
    assert kept.augment == ["flip", "noise"]
    assert capsys.readouterr().err == (
        "warning: --augment flip teaches wrong labels: mirrored, 95% of the training images look "
        "most like an image of another class, unmirrored 5%\n"
    )
    assert recipes.heed_mirror(settings, {}, dataset).augment == ["noise"]
