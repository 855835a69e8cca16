"""What step1 warns of after training: results that are worth nothing."""

from types import SimpleNamespace

import numpy as np
import pytest

from report import page
from training.console import print_result
from training.result import find_warnings


def warned(train_accuracy, labels, predicted, classes=("cat", "dog", "eel")):
    dataset = SimpleNamespace(test_labels=np.array(labels), classes=list(classes))
    outputs = np.eye(len(classes))[predicted]
    outcome = SimpleNamespace(evaluated=SimpleNamespace(outputs=outputs))
    return find_warnings(dataset, outcome, train_accuracy)


LABELS = np.arange(120) % 3


def test_a_test_accuracy_at_chance_is_said_with_both_figures():
    guesses = np.arange(120) // 40  # a third is right
    (warning,) = warned(0.99, LABELS, guesses)
    assert "99.0% of the training images" in warning and "35.0% of the 120 test images" in warning
    assert warned(0.4, LABELS, guesses) == []  # nor has it learned the training images


@pytest.mark.parametrize(("right", "is_warned"), [(44, True), (60, False), (118, False)])
def test_chance_is_told_from_little(right, is_warned):
    guesses = np.where(np.arange(120) < right, LABELS, (LABELS + 1) % 3)
    assert bool(warned(1.0, LABELS, guesses)) == is_warned


def test_chance_is_the_share_of_the_most_frequent_class():
    labels = np.array([0] * 90 + [1] * 10)
    blind = np.array([0] * 85 + [1] * 5 + [0] * 9 + [1])  # 86 % right
    (warning,) = warned(0.99, labels, blind)
    assert "always answering 'cat' gets 90.0%" in warning
    balanced = np.array([0] * 77 + [1] * 13 + [1] * 10)  # 87 % right, all of the rare class
    assert warned(0.99, labels, balanced) == []
    assert warned(1.0, [0, 0, 0], [0, 0, 0]) == []  # one class: nothing to tell apart


def test_one_answer_for_all_images_is_said():
    (warning,) = warned(0.35, LABELS, np.full(120, 1))
    assert warning.startswith("all 120 test images are answered 'dog'")
    assert warned(0.98, [0, 0, 1, 2], [0, 0, 1, 2]) == []


def test_warnings_are_printed_even_if_quiet_and_stand_in_the_report(capsys):
    summary = {
        "test_loss": 1.0,
        "test_accuracy": 0.3,
        "train_seconds": 2,
        "warnings": ["all 3 test images are answered '<b>'"],
    }
    dataset = SimpleNamespace(has_images=True, test_labels=np.zeros(200))
    print_result("runs/one", dataset, summary, unequal=False)
    said = capsys.readouterr()
    assert said.out.startswith("runs/one: test accuracy 30.00%")
    assert said.err == "warning: all 3 test images are answered '<b>'\n"
    assert "<b>Warning:</b> all 3 test images are answered &#x27;&lt;b&gt;" in page.warnings_list(
        summary
    )
