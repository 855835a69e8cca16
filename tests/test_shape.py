"""The size and the fit that suit images of given shapes, and what of the images is not seen."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import data
import model
import step1_train
import step2_export
import step3_infer
from data import shape
from data.files import InputSizes
from data.target import probe
from deploy import camera, trust
from report import card
from training import weights

LANDSCAPE = 4 / 3
PORTRAIT = 3 / 4
OURS = InputSizes(usual=64, multiple=8, least=28)
TORCHVISIONS = InputSizes(usual=224, multiple=32, least=96)


def aspects(**parts):
    """Aspects by count: aspects(wide=90, high=10) -> float64 [100]."""
    kinds = {"wide": LANDSCAPE, "high": PORTRAIT, "square": 1.0, "film": 16 / 9, "near": 1.1}
    each = [np.full(count, kinds[kind]) for kind, count in parts.items()]
    return np.concatenate([np.empty(0), *each])


@pytest.mark.parametrize(
    ("images", "size", "fit"),
    [
        (aspects(square=10), (64, 64), "crop"),
        (aspects(near=10), (64, 64), "crop"),  # within 1.2:1, and 9 % is little
        (aspects(wide=10), (48, 64), "crop"),
        (aspects(high=10), (64, 48), "crop"),
        (aspects(wide=95, high=5), (48, 64), "crop"),
        (aspects(wide=50, high=50), (64, 64), "letterbox"),
        (aspects(square=80, wide=20), (64, 64), "crop"),
        (aspects(square=50, film=50), (64, 64), "letterbox"),
        (aspects(), (64, 64), "crop"),
    ],
)
def test_the_shape_is_that_of_nearly_all_images(images, size, fit):
    assert shape.choose_shape(images, OURS) == size
    assert shape.choose_fit(images, size) == fit


@pytest.mark.parametrize("sizes", [OURS, TORCHVISIONS])
@pytest.mark.parametrize("high", [False, True])
def test_rectangles_keep_the_shape_and_about_the_area(sizes, high):
    for aspect in np.geomspace(1.21, 8, 60):
        aspect = 1 / aspect if high else aspect
        size = shape.choose_shape(np.full(9, aspect), sizes)
        assert min(size) >= sizes.least
        assert not any(side % sizes.multiple for side in size)
        assert shape.unseen_shares(np.array([aspect]), size)[0] < 0.055
        assert 0.6 < np.prod(size) / sizes.usual**2 < 2.1


def test_very_long_images_get_bars_and_not_a_huge_input():
    size = shape.choose_shape(np.full(9, 40.0), OURS)
    assert size == (32, 512)
    assert shape.choose_fit(np.full(9, 40.0), size) == "letterbox"


def test_long_images_are_turned_without_black_corners():
    images = np.full((2, 32, 256, 3), 200, np.uint8)
    assert camera.rotation(images, 15, np.random.default_rng(0)).min() == 200


def test_networks_of_torchvision_that_take_only_squares_get_one():
    assert model.takes_rectangles("mynet") and not model.takes_rectangles("maxvit_t")
    sizes = weights.input_sizes("swin_t")
    assert not sizes.squares_only and sizes.usual == 224

    wide = np.full(9, 4.0)
    square = shape.choose_shape(wide, weights.input_sizes("vit_b_16"))
    assert square == (224, 224) and shape.choose_fit(wide, square) == "letterbox"


@pytest.mark.parametrize("name", ["mobilenet_v3_small", "squeezenet1_1", "shufflenet_v2_x0_5"])
def test_networks_of_torchvision_take_the_rectangles(name):
    for aspect in (1 / 16, 16):
        size = shape.choose_shape(np.full(9, float(aspect)), weights.input_sizes(name))
        model.build(name, channels=3, classes=2, image_size=size)  # tries a batch


@pytest.mark.parametrize("name", sorted(model.MODELS))
@pytest.mark.parametrize("aspect", [1.5, 1 / 1.5, 4, 1 / 16])
def test_our_networks_take_the_rectangles(name, aspect):
    size = shape.choose_shape(np.full(9, float(aspect)), weights.input_sizes(name))
    network = model.build(name, channels=3, classes=5, image_size=size).eval()
    with torch.inference_mode():
        assert network(torch.rand(2, 3, *size)).shape == (2, 5)


# --------------------------------------------------------------------------------- what files hold
def save_marked(path, size, rng):
    """A picture (width, height) of noise whose class, 0 or 1, is a mark's colour near its end."""
    label = int(path.parent.name)
    width, height = size
    pixels = rng.integers(60, 140, (height, width, 3), dtype=np.uint8)
    along = pixels if width > height else pixels.swapaxes(0, 1)
    along[:, 2:12, label] = 250
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def make_folder(tmp_path):
    """make_folder(size, ..., each=n): n images a class of each size (width, height)."""

    def make(*sizes, each=8):
        rng = np.random.default_rng(0)
        for number in range(each * len(sizes)):
            for label in "01":
                save_marked(
                    tmp_path / "marked" / label / f"{number}.png", sizes[number % len(sizes)], rng
                )
        return tmp_path / "marked"

    return make


def notes_of(capsys, folder, **options):
    """A dataset, and the notes about sizes and what is not seen."""
    capsys.readouterr()
    dataset = data.load("folder", str(folder), **options)
    lines = capsys.readouterr().err.splitlines()
    return dataset, [line for line in lines if "resized" in line or "not seen" in line]


def test_what_is_not_seen_is_said(capsys, make_folder):
    folder = make_folder((200, 50))
    dataset, notes = notes_of(capsys, folder)
    assert dataset.train_images.shape[1:3] == (32, 128) and dataset.fit == "crop"
    assert dataset.unseen == 0
    have = "note: the images have 200x50 pixels (width x height); they are resized to"
    option = "--image-size 32x128 (height x width)"
    assert notes == [f"{have} 128x32 by --fit crop and {option}"]

    dataset, notes = notes_of(capsys, folder, image_size=(48, 48), fit="crop")
    assert dataset.train_images.shape[1:3] == (48, 48) and dataset.unseen == 0.75
    ways = "--fit crop cuts it away, --fit letterbox keeps it"
    assert notes[0].startswith(f"{have} 48x48 by --fit crop")
    assert notes[1:] == [f"note: 75 % of the average picture is not seen: {ways}"]

    for fit in (None, "letterbox", "stretch"):
        dataset, notes = notes_of(capsys, folder, image_size=(48, 48), fit=fit)
        assert dataset.fit == (fit or "letterbox")
        assert len(notes) == 1 and dataset.unseen == 0


def test_an_input_of_mostly_bars_is_said_and_that_its_sides_are_mixed_up(capsys, make_folder):
    folder = str(make_folder((200, 40)))
    data.load("folder", folder, image_size=(96, 32))
    printed = capsys.readouterr().err
    assert "200x40 pixels (width x height); they are resized to 32x96" in printed
    assert "93 % of the network's input is black bars" in printed
    assert "with --image-size 32x96 (height x width) it is 40 %" in printed

    data.load("folder", folder, image_size=(32, 96))
    assert "black bars" not in capsys.readouterr().err


def test_images_that_lose_much_are_counted(capsys, make_folder):
    folder = make_folder(*[(80, 60)] * 19, (60, 80), each=1)
    dataset, notes = notes_of(capsys, folder)
    assert dataset.train_images.shape[1:3] == (48, 64) and dataset.fit == "crop"
    assert "2 % of the average picture is not seen, and more than a quarter of 2 images" in notes[1]


def test_networks_that_take_squares_see_all_of_small_images(capsys, make_folder):
    folder = make_folder((60, 20))
    dataset, _ = notes_of(capsys, folder, input_sizes=InputSizes(usual=64, squares_only=True))
    assert dataset.train_images.shape[1:3] == (64, 64) and dataset.fit == "letterbox"
    assert not dataset.train_images[:, :20].any() and dataset.train_images[:, 30:34].any()


def test_only_the_training_split_decides(capsys, make_folder, tmp_path):
    folder = make_folder((80, 60))
    (folder / "train").mkdir()
    for label in "01":
        (folder / label).rename(folder / "train" / label)
        for number in range(40):
            save_marked(
                folder / "test" / label / f"{number}.png", (66, 132), np.random.default_rng(0)
            )
    dataset, notes = notes_of(capsys, folder)
    assert dataset.train_images.shape[1:3] == (48, 64) and dataset.fit == "crop"
    assert "52 % of the average picture" in notes[1] and "of 80 images" in notes[1]


@pytest.mark.parametrize("suffix", ["jpg", "webp", "tif", "png"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_photos_are_probed_as_they_are_shown(tmp_path, suffix, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"photo.{suffix}"
    Image.new("RGB", (400, 100)).save(path, exif=exif)
    probed = probe([str(path)], 1)
    sideways = orientation >= 5
    assert probed.largest == ((400, 100) if sideways else (100, 400))
    assert probed.aspects == [(0.25 if sideways else 4.0, 1, 1)]


def test_a_probe_of_an_earlier_version_is_read_anew(capsys, make_folder):
    folder = make_folder((200, 50))
    notes_of(capsys, folder)
    (file,) = (folder / ".threestep").glob("probe-*.json")
    probed = json.loads(file.read_text())
    del probed["aspects"]
    file.write_text(json.dumps(probed))
    dataset, _ = notes_of(capsys, folder)
    assert dataset.train_images.shape[1:3] == (32, 128)


# ------------------------------------------------------------------------------------ all the steps
def test_marks_near_an_end_are_seen_by_default(call, here, make_folder, in_process):
    folder = make_folder((50, 200), each=24)
    asked = ["--data-dir", folder, "--model", "mynet", "--epochs", 6, "--augment", "none"]
    trained = call(step1_train.main, *asked, "--name", "high").done()
    assert "input 128x32, fit crop" in trained.out
    summary = json.loads((here / "runs/high/summary.json").read_text())
    assert summary["test_accuracy"] == 1
    spec = torch.load(here / "runs/high/checkpoint.pt", weights_only=True)["spec"]
    assert spec["image_size"] == [128, 32] and spec["fit"] == "crop" and spec["unseen"] == 0
    assert spec["arguments"]["fit"] == "crop"

    longer = call(step1_train.main, "--resume", "high", "--epochs", 7).done()
    assert "input 128x32, fit crop" in longer.out

    call(step2_export.main, "--run", "high", "--format", "torchscript").done()
    file = here / "exports/high/model.pt"
    predicted = call(step3_infer.main, "--model", file, "--format", "json", folder).done()
    rows = [json.loads(line) for line in predicted.out.splitlines()]
    assert len(rows) == 48
    assert all(row["label"] == row["path"].split("/")[-2] for row in rows)


def test_a_crop_of_a_named_dataset_is_said(call, here, few_digits):
    asked = ["--model", "mynet", "--epochs", 1, "--image-size", "16x32"]
    cropped = call(step1_train.main, *asked, "--fit", "crop").done()
    assert "note: 50 % of the average picture is not seen" in cropped.err
    summary = json.loads((here / "runs/digits-mynet/summary.json").read_text())
    assert summary["unseen"] == 0.5
    assert "not seen of an image" in (here / "runs/digits-mynet/report.html").read_text()
    spec = torch.load(here / "runs/digits-mynet/checkpoint.pt", weights_only=True)["spec"]
    (warning,) = trust.check_fit(spec)
    assert "50% of the average image is cut away by --fit crop" in warning
    assert not trust.check_fit({**spec, "unseen": 0.08})
    assert not trust.check_fit({"fit": "crop"})  # an older run
    spec["device"] = {"weights": 1, "activations": 1, "multiply_adds": 1}
    assert "50.0% of the average image" in card.describe_images(spec)

    stretched = call(step1_train.main, *asked).done()
    assert "not seen" not in stretched.err and "fit stretch" in stretched.out
