"""Images that belong together stay on one side of every split, and step1 says which do."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance

import data
import step1_train
import step2_export
from data import groups, holdout, split, stems
from data.files import Files
from inference.errors import Problem
from training import calibration

QUICK = ["--model", "mlp", "--hidden", "64", "--epochs", "15", "--batch-size", "32"]
KINDS = ("plain", "turned", "cut", "bright")

pytestmark = pytest.mark.usefixtures("here")  # runs go to an empty directory


def scene(rng):
    """Four pictures of a scene unlike all others."""
    pixels = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
    plain = Image.fromarray(pixels).resize((16, 16), Image.Resampling.BICUBIC)
    return [
        plain,
        plain.rotate(8),
        plain.crop((1, 1, 15, 15)).resize((16, 16)),
        ImageEnhance.Brightness(plain).enhance(1.2),
    ]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """Eighty scenes, labelled at random: nothing can be learned but the scenes themselves."""
    root = tmp_path_factory.mktemp("scenes")
    rng = np.random.default_rng(0)
    lines = ["path,label,group"]
    for number in range(80):
        label = "ab"[number % 2]
        for kind, image in zip(KINDS, scene(rng), strict=True):
            for path in (
                f"flat/{label}/scene{number}_{kind}.png",
                f"deep/{label}/s{number}/{kind}.png",
            ):
                (root / path).parent.mkdir(parents=True, exist_ok=True)
                image.save(root / path)
            lines.append(f"flat/{label}/scene{number}_{kind}.png,{label},s{number}")
    (root / "list.csv").write_text("\n".join(lines))
    return root


def files_of(*classes, root="root", split="train", **more):
    """The files of a split, from the names in each class."""
    paths = [f"{root}/{label}/{name}" for label, names in enumerate(classes) for name in names]
    labels = [label for label, names in enumerate(classes) for _ in names]
    return {split: Files(root=root, paths=paths, labels=np.array(labels, np.int64), **more)}


# ------------------------------------------------------------------------------------------ drawing
def sides(labels, chosen):
    """The part of each class that is chosen."""
    return np.bincount(labels, weights=chosen) / np.bincount(labels)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("mixed", [False, True])
def test_whole_groups_of_any_size_make_up_about_the_fraction_of_each_class(seed, mixed):
    rng = np.random.default_rng(seed)
    group = np.repeat(np.arange(120), rng.integers(1, 9, 120))
    labels = rng.integers(0, 3, len(group)) if mixed else group % 3
    chosen = holdout.stratified_groups(labels, 0.2, seed, group)
    assert not np.intersect1d(group[chosen], group[~chosen]).size
    assert np.abs(sides(labels, chosen) - 0.2).max() < 0.06
    assert np.array_equal(chosen, holdout.stratified_groups(labels, 0.2, seed, group))
    assert not np.array_equal(chosen, holdout.stratified_groups(labels, 0.2, seed + 9, group))


@pytest.mark.parametrize("fraction", [0.05, 0.2, 0.9])
def test_two_large_groups_a_class_are_not_torn(fraction):
    group, labels = np.repeat(np.arange(4), 50), np.repeat([0, 0, 1, 1], 50)
    chosen = holdout.stratified_groups(labels, fraction, 0, group)
    assert not np.intersect1d(group[chosen], group[~chosen]).size
    assert sides(labels, chosen).tolist() == [0.5, 0.5]


def test_a_class_that_is_one_group_is_torn_apart_and_named(capsys):
    labels = np.repeat([0, 1], 40)
    group = np.where(labels == 0, np.arange(80) // 4, 99)
    chosen = holdout.stratified_groups(labels, 0.2, 0, group)
    assert sides(labels, chosen).tolist() == [0.2, 0.2]
    parts = {"train": (labels[~chosen], group[~chosen]), "test": (labels[chosen], group[chosen])}
    groups.note_parts(parts, ["cat", "dog"], 0.2)
    said = capsys.readouterr().err
    assert "note: groups: train 9 of 64 images, test 3 of 16 images" in said
    assert "warning: 1 class has too few groups" in said and "'dog'" in said and "'cat'" not in said


def test_the_only_image_of_a_class_is_not_held_out():
    labels, group = np.array([0] * 10 + [1]), np.arange(11) // 2
    chosen = holdout.stratified_groups(labels, 0.5, 0, group)
    assert not chosen[10] and chosen[:10].sum() in (4, 6)


def test_copies_make_one_group_of_two():
    joined = groups.join(np.array([5, 5, 7, 8, 9]), np.array([[1, 2], [3, 2]]))
    assert len(set(joined[:4])) == 1 and joined[4] != joined[0]


# ----------------------------------------------------------------------------------- where they are
@pytest.mark.parametrize(
    ("name", "path", "options"),
    [
        ("folder", "deep", {}),
        ("csv", "list.csv", {}),
        ("folder", "flat", {"group_by": r"/(scene\d+)_"}),
        ("csv", "list.csv", {"group_by": r"^flat/./(scene\d+)_"}),
    ],
)
def test_every_source_of_groups_keeps_a_scene_on_one_side(scenes, capsys, name, path, options):
    dataset = data.load(name, str(scenes / path), **options)
    numbers = dataset.groups
    assert not np.intersect1d(numbers["train"], numbers["test"]).size
    assert [len(np.unique(numbers[part])) for part in ("train", "test")] == [64, 16]
    said = capsys.readouterr().err
    assert "320 images in 80 groups" in said
    assert "groups: train 64 of 256 images, test 16 of 64 images" in said
    assert "share" not in said and "warning" not in said


def test_without_groups_nothing_changes(scenes, capsys):
    alone = data.load("folder", str(scenes / "deep"), group_by="none")
    assert alone.groups == {} and "share" not in capsys.readouterr().err
    files = {"train": Files("", alone.paths["train"] + alone.paths["test"], np.zeros(320, int))}
    assert groups.with_groups(files, None)["train"].groups is None
    # As every version has chosen it: by the files' order alone.
    listed = sorted(files["train"].paths)
    labels = np.array(["/b/" in path for path in listed], int)
    chosen = holdout.stratified(labels, 0.2, 0, holdout.first_copies(listed))
    assert sorted(alone.paths["test"]) == [listed[row] for row in np.flatnonzero(chosen)]


def test_paths_that_do_not_match_are_counted_and_alone(capsys):
    listed = files_of(["x1_a.png", "x1_b.png", "other.png"], ["x2_a.png"])
    listed = groups.with_groups(listed, r"(x\d)_")
    assert listed["train"].groups == ["x1", "x1", "", "x2"]
    assert "in 1 of 4 paths, each in no group: 0/other.png" in capsys.readouterr().err
    assert len(set(groups.numbered(listed)["train"])) == 3


def test_an_expression_that_matches_no_path_is_refused():
    with pytest.raises(Problem, match="is found in no path, such as") as error:
        groups.with_groups(files_of(["a.png"]), "(scene)")
    assert error.value.code == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--group-by", "scene"], "no bracket"),
        (["--group-by", "(scene"], "not a regular expression"),
        (["--group-by", "(a)", "--dataset", "digits"], "--dataset folder or csv"),
        (
            ["--group-column", "a", "--group-by", "(a)", "--data-dir", "list.csv"],
            "without --group-by",
        ),
    ],
)
def test_a_wrong_option_is_refused_at_once(call, here, arguments, words):
    (here / "list.csv").write_text("path,label\n")
    call(step1_train.main, *arguments).error(2, words)


def test_another_column_may_say_it_and_must_be_there(scenes, tmp_path, capsys):
    text = (scenes / "list.csv").read_text().replace("group", "Patient", 1)
    file = tmp_path / "list.csv"
    file.write_text(text)
    options = {"image_root": str(scenes)}
    assert data.load("csv", str(file), **options).groups == {}
    assert "column 'Patient': if its images belong together, add --group-column Patient" in (
        capsys.readouterr().err
    )
    assert data.load("csv", str(file), group_column="patient", **options).groups
    with pytest.raises(Problem, match="no column 'clip'"):
        data.load("csv", str(file), group_column="clip", **options)


def test_groups_on_both_sides_of_a_given_split_are_counted(capsys):
    listed = files_of(["s1_a", "s1_b", "s2_a"]) | files_of(["s1_c", "s3_a"], split="test")
    groups.warn_shared(groups.with_groups(listed, r"(s\d)_"))
    said = capsys.readouterr().err
    assert "warning: 1 group of the test split, 1 of 2 images" in said and ": s1;" in said


# --------------------------------------------------------------------------------- the other splits
class Settings:
    image_size = (16, 16)
    fit = "stretch"
    val_fraction = None
    calibration = "none"
    seed = 0


@pytest.mark.parametrize("change", [{"val_fraction": 0.25}, {"calibration": "held-out"}, {}])
def test_groups_stay_together_in_training_too(scenes, change):
    """For --val-fraction, for the calibration, in the twin, and where `known` compares halves."""
    settings = Settings()
    vars(settings).update(change)
    dataset = data.load("folder", str(scenes / "deep"))
    splits = split.make_splits(dataset, settings, torch.device("cpu"))
    if not change:
        splits = calibration.splits_of_twin(splits["train"], 0, dataset.classes)
        half = calibration.first_half(splits["train"])
        splits = {"first": splits["train"].part(half), "second": splits["train"].part(~half)}
    splits.pop("test", None)
    first, second = [part.groups[part.members] for part in splits.values()]
    assert len(second) >= 8 and not np.intersect1d(first, second).size


# --------------------------------------------------------------------------------------- suggesting
def suggested(capsys, *classes):
    stems.suggest_groups(files_of(*classes))
    return capsys.readouterr().err


@pytest.mark.parametrize(
    "form",
    [
        "scene{0}_{1}.jpg",
        "scene-{0}-{1}.jpg",
        "IMG_{0:04}_{1}.png",
        "clip{0}_{1:04}.jpg",
        "clip{0}frame{1:04}.jpg",
        "video_{0}_frame_{1}.jpg",
        "img{0}_jpg.rf.{1}f3ab{0}.jpg",
        "IMG_{0:04} ({1}).jpg",
        "{2}_scene{0}.png",
    ],
)
def test_names_that_share_stems_suggest_an_option_that_groups_by_scene(capsys, form):
    classes = [
        [form.format(n, k, "abcde"[k]) for n in r for k in range(5)]
        for r in (range(8), range(8, 16))
    ]
    said = suggested(capsys, *classes)
    assert "note: 80 images share 16 stems, as in " in said
    expression = said.split("--group-by ")[1].strip().strip("'\"")
    found = groups.numbered(groups.with_groups(files_of(*classes), expression))["train"]
    assert np.array_equal(np.unique(found, return_inverse=True)[1], np.arange(80) // 5)


def test_a_few_copies_that_a_system_named_are_enough(capsys):
    names = [f"IMG_{n:04}{copy}.jpg" for n in range(100) for copy in ("", " - Copy")[: 1 + (n < 6)]]
    assert "12 images share 6 stems" in suggested(capsys, names, ["a.jpg"])


@pytest.mark.parametrize(
    "form",
    [
        "IMG_{0:04}.jpg",
        "{0}.jpg",
        "{1}.{0}.jpg",
        "{1} ({0}).jpg",
        "n0144{1}_{0}.JPEG",
        "{2}_{0:04}.jpg",
        "IMG_202401{3:02}_{0:06}.jpg",
    ],
)
def test_names_that_a_camera_or_a_class_gave_suggest_nothing(capsys, form):
    cameras = "IMG", "DSC", "PXL"
    classes = [[form.format(n, c, cameras[n % 3], n % 28 + 1) for n in range(99)] for c in "ab"]
    assert suggested(capsys, *classes) == ""


# ----------------------------------------------------------------------------------- the whole way
def result(here, name):
    return json.loads((here / "runs" / name / "summary.json").read_text())


@pytest.mark.slow
def test_random_labels_cannot_be_learned_and_the_export_knows_it(call, here, scenes):
    flat = ["--data-dir", scenes / "flat", "--augment", "none", *QUICK]
    fooled = call(step1_train.main, *flat, "--calibration", "none", "--name", "fooled").done()
    assert "320 images share 80 stems" in fooled.err
    assert result(here, "fooled")["test_accuracy"] > 0.9

    more = ["--group-by", r"(scene\d+)_", "--calibration", "twin", "--name", "honest"]
    call(step1_train.main, *flat, *more).done()
    honest = result(here, "honest")
    assert 0.3 < honest["test_accuracy"] < 0.7
    # The twin knows as little of its own new scenes: both classes are as probable, and log(2) is
    # what that costs.
    assert honest["test_loss"] < 0.72 < honest["test_loss_uncalibrated"]
    call(step2_export.main, "--run", "runs/honest", "--format", "torchscript").done()


@pytest.mark.slow
def test_a_run_from_before_there_were_groups_is_exported(call, here, scenes):
    """Its spec does not know the option, and its test split was drawn image by image."""
    options = ["--data-dir", scenes / "deep", "--calibration", "none", *QUICK, "--epochs", "1"]
    call(step1_train.main, *options, "--group-by", "none", "--name", "old").done()
    call(step1_train.main, *options, "--name", "new").done()

    for name in ("old", "new"):
        path = here / "runs" / name / "checkpoint.pt"
        checkpoint = torch.load(path, weights_only=True)
        for arguments in (checkpoint["arguments"], checkpoint["spec"]["arguments"]):
            if name == "old":
                arguments.pop("group_by", None)
                arguments.pop("group_column", None)
        torch.save(checkpoint, path)
        call(step2_export.main, "--run", f"runs/{name}", "--format", "torchscript").done()

    shutil.rmtree(here / "exports")
    call(step1_train.main, "--resume", "runs/old", "--epochs", "2").done()
