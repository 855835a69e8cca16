"""Promises: thresholds that keep them, from the choice on held-out images to the answers."""

import json
import os

import numpy as np
import pytest
from conftest import onnx_with

import step2_export
import step3_infer
from deploy.promises import read_promise, warnings_of
from inference import promise as statistics
from inference.predict import Model, predict
from inference.promise import Labelled, NotKept, Promise, Thresholds


def draw(count, seed=0, classes=4):
    """Calibrated probabilities [count, classes] and labels drawn from them."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 4, (count, classes))
    powers = np.exp(logits)
    probabilities = (powers / powers.sum(1, keepdims=True)).astype(np.float32)
    labels = (rng.random((count, 1)) > probabilities.cumsum(1)).sum(1).clip(max=classes - 1)
    return statistics.labelled(probabilities, None, labels, None)


POPULATION = draw(40_000, seed=1)
CLASSES = ["a", "b", "c", "d"]


# --------------------------------------------------------------------------------------- the tests
def test_the_tail_is_that_of_the_binomial():
    assert statistics.tail(0, 59, 0.05) == pytest.approx(0.95**59)
    assert statistics.tail(2, 4, 0.5) == pytest.approx(11 / 16)
    assert statistics.tail(-1, 4, 0.5) == 0 and statistics.tail(4, 4, 0.5) == pytest.approx(1)
    assert [statistics.fewest_images(share) for share in (0.9, 0.95, 0.99)] == [29, 59, 299]


@pytest.mark.parametrize("share", [0.8, 0.95, 0.99])
def test_as_many_mistakes_are_allowed_as_the_tail_allows(share):
    for count in (1, 58, 59, 300, 2000):
        allowed = statistics.mistakes_allowed(count, share, statistics.log_factorials(count))
        assert statistics.tail(allowed, count, 1 - share) <= statistics.ALPHA
        assert statistics.tail(allowed + 1, count, 1 - share) > statistics.ALPHA


def test_the_bound_is_what_so_few_mistakes_promise():
    bound = statistics.lower_bound(3, 200)
    assert statistics.tail(3, 200, 1 - bound) == pytest.approx(statistics.ALPHA, abs=1e-6)


@pytest.mark.parametrize(
    "promises",
    [
        [Promise("accuracy", 0.9)],
        [Promise("recall", 0.9, "b")],
        [Promise("recall", 0.8, "b"), Promise("accuracy", 0.8), Promise("recall", 0.7, "c")],
    ],
    ids=str,
)
def test_promises_are_broken_in_at_most_one_case_of_twenty(promises):
    broken = dict.fromkeys(map(str, promises), 0)
    found = 0
    for seed in range(100):
        rows = np.random.default_rng(seed).integers(0, len(POPULATION), 800)
        try:
            thresholds = statistics.choose_thresholds(POPULATION.take(rows), promises, CLASSES)
        except NotKept:
            continue
        found += 1
        answers = statistics.final_answers(POPULATION, thresholds)
        for promise in promises:
            number = None if promise.name is None else CLASSES.index(promise.name)
            figures = statistics.check(promise, answers, POPULATION.labels, number)
            broken[str(promise)] += figures["share"] < promise.share
    assert found >= 90
    # 5 of 100 are expected at most; 11 or more would be seen once in a hundred times.
    assert max(broken.values()) <= 10


def test_the_threshold_is_near_the_best_that_hindsight_finds():
    outputs = draw(5000, seed=2)
    threshold = statistics.promise_accuracy(outputs, Promise("accuracy", 0.9))
    order = np.argsort(-POPULATION.probabilities.max(1))
    right = (POPULATION.best == POPULATION.labels)[order].cumsum()
    best = np.flatnonzero(right >= 0.9 * np.arange(1, len(order) + 1))[-1] / len(order)
    answered = (POPULATION.probabilities.max(1) >= threshold).mean()
    assert 0.9 * best <= answered <= 1.01 * best


def test_what_is_better_than_promised_is_answered_in_any_case():
    assert statistics.promise_accuracy(draw(2000), Promise("accuracy", 0.5)) == 0


def test_answers_of_equal_probability_stand_together():
    probabilities = np.full((100, 2), 0.1, np.float32)
    probabilities[:, 0] = 0.9
    probabilities[60:, 0] = 0.6
    labels = np.zeros(100, int)
    labels[59] = 1  # the last of those at 0.9
    labels[60:] = 1
    outputs = statistics.labelled(probabilities, None, labels, None)
    assert statistics.promise_accuracy(outputs, Promise("accuracy", 0.9)) == 0.9
    with pytest.raises(NotKept, match="no threshold keeps it"):
        statistics.promise_accuracy(outputs, Promise("accuracy", 0.95))


def test_the_error_says_what_is_missing_and_what_is_possible():
    few = draw(40)
    with pytest.raises(NotKept, match=r"takes 299 answers.* 40 of 40 .* accuracy=0\.\d+ could be"):
        statistics.promise_accuracy(few, Promise("accuracy", 0.99))
    with pytest.raises(NotKept, match=r"takes 299 images of b, .* could be promised"):
        statistics.promise_recall(few, Promise("recall", 0.99, "b"), 1)

    some = draw(300)
    with pytest.raises(
        NotKept, match=r"may take [\d,]+ images; accuracy=(0\.\d+) could"
    ) as failure:
        statistics.promise_accuracy(some, Promise("accuracy", 0.98))
    possible = float(str(failure.value).rpartition("accuracy=")[2].split()[0])
    statistics.promise_accuracy(some, Promise("accuracy", possible))


def test_a_class_that_is_never_likely_is_not_promised():
    probabilities = np.tile(np.float32([[1, 0]]), (100, 1))
    outputs = statistics.labelled(probabilities, None, np.ones(100, int), None)
    with pytest.raises(NotKept, match="no share could be promised"):
        statistics.promise_recall(outputs, Promise("recall", 0.9, "b"), 1)


def test_unknown_images_are_missed():
    known = np.where(np.arange(100) < 20, 0.0, 0.5)
    probabilities = np.tile(np.float32([[0.1, 0.9]]), (100, 1))
    outputs = statistics.labelled(probabilities, known, np.ones(100, int), 0.99)
    assert statistics.promise_recall(outputs, Promise("recall", 0.7, "b"), 1) == 0.9
    with pytest.raises(NotKept, match="20 of its 100 images are unknown"):
        statistics.promise_recall(outputs, Promise("recall", 0.9, "b"), 1)


# ---------------------------------------------------------------------------------- command line
@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("accuracy", "no promise"),
        ("recall=0.9", "no promise"),
        ("precision:b=0.9", "no promise"),
        ("accuracy=1", "below 1"),
        ("accuracy=0", "above 0"),
        ("accuracy=95", "95 % is 0.95"),
        ("recall:b=nan", "above 0"),
        ("accuracy=high", "above 0"),
    ],
)
def test_what_is_no_promise_is_refused(text, words, call):
    call(step2_export.main, "--promise", text).error(2, "--promise", words)


def test_names_of_classes_may_hold_any_sign():
    assert read_promise("recall:a=b:c=0.5") == Promise("recall", 0.5, "a=b:c")


def test_a_promise_is_given_once(call):
    call(step2_export.main, "--promise", "accuracy=0.9", "accuracy=0.8").error(2, "given twice")


@pytest.mark.usefixtures("small_run")
def test_promises_that_do_not_fit_the_run(call):
    arguments = ["--run", "small", "--format", "onnx", "--promise"]
    call(step2_export.main, *arguments, "recall:10=0.9").error(2, "no class", "did you mean '1'")
    call(step2_export.main, *arguments, "accuracy=0.9", "--out", "refused").error(
        2, "--val-fraction", "held-out"
    )
    assert not os.path.exists("refused")


def test_a_regression_promises_nothing(linear, call):
    result = call(step2_export.main, "--run", linear.run, "--promise", "accuracy=0.9")
    result.error(2, "--promise", "classification")


def test_a_promise_that_the_test_split_does_not_bear_out_is_a_warning():
    promise = {"kind": "recall", "name": "b", "share": 0.95}
    test = {"images": 100, "kept": 93, "share": 0.93, "false_alarms": 0.1}
    (warning,) = warnings_of([{**promise, "test": test}])
    assert "93.00%" in warning and "93 of 100" in warning and "chance explains" in warning
    (warning,) = warnings_of([{**promise, "test": {**test, "images": 1000, "kept": 930}}])
    assert "chance" not in warning
    assert warnings_of([{**promise, "test": {**test, "share": 0.95, "kept": 95}}]) == []


# -------------------------------------------------------------------------------------- in a file
def test_a_file_answers_as_the_statistics_assume(small, tmp_path, samples):
    file = small.export / "model.onnx"
    model = Model(file)
    rows = [predict(path, model, top_k=10) for path in samples]
    probabilities = np.zeros((len(rows), 10))
    for number, row in enumerate(rows):
        for entry in row["top"]:
            probabilities[number, int(entry["label"])] = entry["probability"]
    own = float(np.sort(probabilities[:, 3])[4])
    least = float(np.sort(probabilities.max(1))[5])

    promises = [
        {"kind": "accuracy", "name": None, "share": 0.9, "threshold": least},
        {"kind": "recall", "name": "3", "share": 0.9, "threshold": own},
    ]
    promised = Model(onnx_with(file, tmp_path / "promised.onnx", promises=promises))
    results = [predict(path, promised) for path in samples]

    outputs = Labelled(
        probabilities=probabilities,
        best=probabilities.argmax(1),
        is_unknown=np.zeros(len(rows), bool),
        labels=np.arange(10),
    )
    expected = statistics.final_answers(outputs, Thresholds(((3, own),), least))
    names = [*map(str, range(10)), "unsure"]  # NOT_ANSWERED is the last
    labels = [result["label"] for result in results]
    assert labels == [names[number] for number in expected]
    assert labels.count("3") == 6 and "unsure" in labels
    for number, result in enumerate(results):
        if result["label"] == "3":
            assert result["probability"] == probabilities[number, 3]


def test_evaluate_says_whether_promises_held(small, tmp_path, samples, call):
    promises = [
        {"kind": "accuracy", "name": None, "share": 0.5, "threshold": 0.0},
        {"kind": "recall", "name": "3", "share": 0.9, "threshold": 1.0},
    ]
    file = onnx_with(small.export / "model.onnx", tmp_path / "promised.onnx", promises=promises)
    listed = "path,label\n" + "".join(f"{path},{path.stem[-1]}\n" for path in samples)
    (tmp_path / "labels.csv").write_text(listed)
    arguments = ["--model", file, "--evaluate", *samples, "--labels", tmp_path / "labels.csv"]
    result = call(step3_infer.main, *arguments, "--format", "json").done()
    accuracy, recall = json.loads(result.out)["promises"]
    assert accuracy["promise"] == "accuracy=0.5" and accuracy["images"] == 10
    assert accuracy["held"] == (accuracy["kept"] >= 5)
    assert recall["promise"] == "recall:3=0.9" and recall["images"] == 1
    text = call(step3_infer.main, *arguments).done().out
    assert "promise accuracy=0.5: " in text and "promise recall:3=0.9: " in text


def test_the_accuracy_is_that_of_the_answers(small, tmp_path, samples, call):
    every_digit_is_a_3 = [{"kind": "recall", "name": "3", "share": 0.9, "threshold": 0.0}]
    file = onnx_with(
        small.export / "model.onnx", tmp_path / "promised.onnx", promises=every_digit_is_a_3
    )
    listed = "path,label\n" + "".join(f"{path},{path.stem[-1]}\n" for path in samples)
    (tmp_path / "labels.csv").write_text(listed)
    arguments = ["--evaluate", *samples, "--labels", tmp_path / "labels.csv", "--format", "json"]
    plain = ["--model", small.export / "model.onnx"]
    before = json.loads(call(step3_infer.main, *plain, *arguments).done().out)
    after = json.loads(call(step3_infer.main, "--model", file, *arguments).done().out)
    assert before["accuracy_without_recalls"] is None and before["accuracy"] > 0.1
    assert after["accuracy"] == 0.1 and after["per_class"]["3"]["answers"] == 10
    assert after["accuracy_without_recalls"] == before["accuracy"]
    assert after["calibration_error"] == before["calibration_error"]
    assert {row["answer"] for row in after["confusions"]} == {"3"}
    too_low = call(step3_infer.main, "--model", file, *arguments, "--min-accuracy", 0.5)
    assert too_low.code == 1 and "10.00%" in too_low.err

    monitored = ["--model", file, "--monitor", tmp_path / "m.json", *samples]
    call(step3_infer.main, *monitored).done()
    shown = call(step3_infer.main, "--monitor", tmp_path / "m.json").done().out
    assert "of the most probable class, promises of recall aside" in shown
