"""Datasets: the bundled digits, torchvision's formats, and files that are missing or damaged."""

import gzip
import urllib.error
import urllib.request

import numpy as np
import pytest
from PIL import Image

import data
import step1_train


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*_, **__):
        raise urllib.error.URLError("Network is unreachable")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)


@pytest.fixture(scope="module")
def digits():
    return data.load("digits")


def test_digits_are_complete_and_of_the_common_shape(digits):
    assert digits.train_images.shape == (1437, 8, 8, 1) and digits.test_images.shape == (
        360,
        8,
        8,
        1,
    )
    assert digits.train_images.dtype == digits.test_images.dtype == np.uint8
    assert digits.train_labels.dtype == digits.test_labels.dtype == np.int64
    assert digits.train_labels.shape == (1437,) and digits.test_labels.shape == (360,)
    assert digits.classes == list("0123456789")
    assert (digits.train_images.min(), digits.train_images.max()) == (0, 255)


def test_digits_splits_are_stratified_and_share_no_place(digits):
    shares = [
        np.bincount(labels, minlength=10) / len(labels)
        for labels in (digits.train_labels, digits.test_labels)
    ]
    assert np.abs(shares[0] - shares[1]).max() < 0.01
    # The two splits together are the whole set: its known number of images of each class.
    together = np.bincount(np.concatenate([digits.train_labels, digits.test_labels]))
    assert together.tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    train = {image.tobytes() for image in digits.train_images}
    assert not [image for image in digits.test_images if image.tobytes() in train]


def test_sample_images_are_test_images_of_their_class(digits, samples):
    for digit, path in enumerate(samples):
        pixels = np.asarray(Image.open(path))
        assert pixels.shape == (8, 8) and pixels.dtype == np.uint8
        same = (digits.test_images[..., 0] == pixels).all((1, 2))
        assert digits.test_labels[same].tolist() == [digit]


@pytest.mark.parametrize("channels", [1, 3])
def test_mean_and_std_are_numpys(channels):
    images = np.random.default_rng(0).integers(0, 200, (1500, 5, 7, channels), dtype=np.uint8)
    mean, std = data.mean_and_std(images)
    scaled = images.astype(np.float64) / 255
    assert np.abs(scaled.mean((0, 1, 2)) - mean).max() < 1e-12
    assert np.abs(scaled.std((0, 1, 2)) - std).max() < 1e-12


def test_constant_channel_can_still_be_normalised():
    assert data.mean_and_std(np.full((3, 2, 2, 1), 51, np.uint8)) == ([0.2], [1.0])


@pytest.mark.parametrize(
    ("typed", "meant"), [("mnits", "mnist"), ("cifar-10", "cifar10"), ("fashionmnist", "fashion")]
)
def test_unknown_dataset_suggests_the_nearest(call, here, typed, meant):
    call(step1_train.main, "--dataset", typed).error(2, typed, meant, "--list-datasets")
    assert not list(here.iterdir())


@pytest.mark.parametrize(
    ("dataset", "archive", "place"),
    [
        ("mnist", "train-images-idx3-ubyte.gz", "MNIST/raw"),
        ("cifar10", "cifar-10-python.tar.gz", ""),
    ],
)
def test_no_network_names_the_files_and_the_way_out(
    call, here, no_network, dataset, archive, place
):
    result = call(step1_train.main, "--dataset", dataset, "--data-dir", here / "downloads")
    result.error(1, dataset, "unreachable", archive, here / "downloads" / place, "--dataset digits")
    assert not (here / "runs").exists()


def test_data_dir_that_cannot_be_made(call, here, no_network):
    (here / "file").write_text("not a directory")
    call(step1_train.main, "--dataset", "mnist", "--data-dir", here / "file" / "below").error(
        1, "--dataset digits"
    )


def test_mnist_format_loads_without_network(mnist, no_network):
    dataset = data.load("mnist", str(mnist))
    assert dataset.train_images.shape == (60, 28, 28, 1) and dataset.test_images.shape == (
        20,
        28,
        28,
        1,
    )
    assert dataset.train_images.dtype == np.uint8 and dataset.train_labels.dtype == np.int64
    assert dataset.classes == list("0123456789") and dataset.test_labels[:12].tolist() == [
        *range(10),
        0,
        1,
    ]


def test_cifar10_format_loads_without_network(cifar10, no_network):
    dataset = data.load("cifar10", str(cifar10))
    assert dataset.train_images.shape == (200, 32, 32, 3) and dataset.test_images.shape == (
        40,
        32,
        32,
        3,
    )
    assert dataset.classes[0] == "airplane" and dataset.test_labels.dtype == np.int64
    # Class 2 is bright in the last channel: planes became channels, not the other way round.
    assert dataset.test_images[dataset.test_labels == 2].mean((0, 1, 2)).argmax() == 2


@pytest.mark.parametrize("keep", [0, 3, 12, 5000])
def test_truncated_mnist_file_is_noticed_and_put_aside(call, mnist, no_network, here, keep):
    path = mnist / "MNIST" / "raw" / "train-images-idx3-ubyte"
    damaged = path.read_bytes()[:keep]
    path.write_bytes(damaged)
    result = call(step1_train.main, "--dataset", "mnist", "--data-dir", mnist)
    result.error(1, "cannot get mnist")
    assert f"{path} is incomplete or corrupt" in result.err
    assert not path.exists() and path.with_name(path.name + ".damaged").read_bytes() == damaged


def test_corrupt_archive_is_said(call, mnist, no_network, here):
    path = mnist / "MNIST" / "raw" / "t10k-labels-idx1-ubyte"
    path.unlink()
    archive = path.with_name(path.name + ".gz")
    archive.write_bytes(gzip.compress(b"something else")[:-4])
    result = call(step1_train.main, "--dataset", "mnist", "--data-dir", mnist)
    result.error(1, "cannot get mnist", archive.name)
    assert f"{archive} is incomplete or corrupt" in result.err
    # The damaged archive was not unpacked: the next run does not take it for data.
    assert not path.exists()
