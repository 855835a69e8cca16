"""Figures of how far probabilities can be trusted, on cases whose values are known."""

import numpy as np
import pytest

from deploy import unknown
from inference import metrics


def two_classes(confidence):
    """Probabilities [n, 2] whose first answer is class 0."""
    confidence = np.asarray(confidence, np.float64)
    return np.stack([confidence, 1 - confidence], 1)


def test_bins_hold_equally_many_sorted_by_confidence():
    confidence, right = np.array([0.9, 0.6, 0.8, 0.7]), np.array([True, False, False, True])
    mean, accuracy, count = metrics.reliability_bins(confidence, right, 2)
    assert (
        mean == pytest.approx([0.65, 0.85])
        and accuracy.tolist() == [0.5, 0.5]
        and count.tolist() == [2, 2]
    )
    _, _, count = metrics.reliability_bins(confidence, right, 15)
    assert count.tolist() == [1] * 4  # no empty bins
    _, _, count = metrics.reliability_bins(np.full(31, 0.5), np.zeros(31, bool))
    assert count.sum() == 31 and set(count.tolist()) <= {2, 3}


def test_calibration_error_of_known_cases():
    probabilities = two_classes([0.75] * 8)
    assert metrics.calibration_error(
        probabilities, np.array([0] * 6 + [1] * 2), 1
    ) == pytest.approx(0)
    assert metrics.calibration_error(probabilities, np.zeros(8, int), 1) == pytest.approx(0.25)
    assert metrics.calibration_error(probabilities, np.ones(8, int), 1) == pytest.approx(0.75)


def test_the_noise_floor_is_what_perfect_probabilities_show():
    rng = np.random.default_rng(1)
    probabilities = two_classes(rng.uniform(0.5, 1, 2000))
    floor = metrics.calibration_error_floor(probabilities)
    assert floor == metrics.calibration_error_floor(probabilities)  # seeded
    perfect = [
        metrics.calibration_error(
            probabilities, (rng.random(2000) > probabilities[:, 0]).astype(int)
        )
        for _ in range(100)
    ]
    assert floor == pytest.approx(np.mean(perfect), rel=0.1)
    # fewer images, more noise
    assert metrics.calibration_error_floor(probabilities[:200]) > 2 * floor
    assert metrics.calibration_error_floor(two_classes([1.0] * 20)) == 0


def test_accuracy_at_coverage():
    probabilities = two_classes(np.linspace(0.51, 0.99, 20))  # the later, the surer
    labels = (np.arange(20) < 2).astype(int)  # the two least probable answers are wrong
    found = metrics.accuracy_at_coverage(probabilities, labels)
    assert list(found) == ["0.95", "0.9", "0.8"]
    assert [row["accuracy"] for row in found.values()] == pytest.approx([18 / 19, 1, 1])
    sorted_down = probabilities[::-1, 0]
    assert [row["probability"] for row in found.values()] == pytest.approx(
        sorted_down[[18, 17, 15]].tolist()
    )
    accuracy, lowest = metrics.coverage_curve(probabilities, labels)
    assert accuracy[0] == 1 and accuracy[-1] == 0.9 and lowest.tolist() == sorted_down.tolist()
    one = metrics.accuracy_at_coverage(probabilities[:1], labels[:1])
    assert {row["accuracy"] for row in one.values()} == {0.0}


def test_a_temperature_can_be_undone():
    logits = np.random.default_rng(0).normal(0, 3, (50, 7))
    once, cold = (np.exp(logits / t) / np.exp(logits / t).sum(1, keepdims=True) for t in (1, 0.4))
    assert metrics.with_temperature(once, 0.4) == pytest.approx(cold)
    assert metrics.with_temperature(cold.astype(np.float32), 1 / 0.4) == pytest.approx(
        once, abs=1e-5
    )
    certain = np.array([[1, 0]], np.float32)  # 0 has no logarithm
    assert np.isfinite(metrics.with_temperature(certain, 2.0)).all()


@pytest.mark.parametrize("channels", [1, 3])
def test_unknown_kinds(channels):
    first, second = (dict(unknown.unknown_kinds(9, 17, channels, count=5)) for _ in range(2))
    wanted = ["uniform noise", "Gaussian noise", "smooth blobs", "solid colours", "black", "white"]
    assert list(first) == wanted
    for name, images in first.items():
        count = 1 if name in ("black", "white") else 5
        assert images.dtype == np.uint8 and images.shape == (count, 9, 17, channels)
        assert (images == second[name]).all()  # seeded: bundles of a run are equal bytes
        assert len(np.unique(images.reshape(count, -1), axis=0)) == count
    assert not first["black"].any() and (first["white"] == 255).all()
    solid = first["solid colours"]
    assert (solid == solid[:, :1, :1]).all()
    steps = {
        name: np.abs(np.diff(images.astype(int), axis=2)).mean() for name, images in first.items()
    }
    assert steps["smooth blobs"] < 0.5 * min(steps["uniform noise"], steps["Gaussian noise"])
