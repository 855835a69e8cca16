"""The C++ program, built here for each engine: it prints what step 3 prints for the same files, and
fails as it does."""

import base64
import hashlib
import io
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import warnings
import zlib
from importlib import metadata
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from conftest import ROOT, Result, onnx_with
from onnx import TensorProto, helper
from PIL import Image
from specs import HONEST, REFUSED, TAKEN, changed_text

import model
import step3_infer
from deploy.exporters import Source, export_onnx, export_torchscript
from inference.command_line import printable
from inference.predict import Model, predict

CLASSES = ["cat", "dög", 'a "quoted" \\ one', "two\nlines", "\u202eemoji \U0001f600"]


SUFFIXES = {"torch": ".pt", "onnxruntime": ".onnx"}  # of the files that each engine runs
NOT_HERE = (
    r"No CMAKE_CXX_COMPILER could be found"
    r"|[\w./]+ not found: install .*? conan"
    r"|(onnxruntime_c_api\.h|libonnxruntime) not found: .*? environment"
)


@pytest.fixture(
    scope="module", params=["onnxruntime", pytest.param("torch", marks=pytest.mark.slow)]
)
def backend(request):
    """The engine that the program is built with: one, and with the slow tests the other."""
    return request.param


@pytest.fixture(scope="module")
def suffix(backend):
    """The suffix of the files that the program runs."""
    return SUFFIXES[backend]


@pytest.fixture(scope="module")
def program(backend, once):
    """Path of the program, built against this Python's torch or onnxruntime; the headers of
    onnxruntime come from the system or from the directory that ONNXRUNTIME_DIR names."""
    if shutil.which("cmake") is None:
        pytest.skip("needs cmake (apt install cmake)")
    file, missing = once(f"cpp-{backend}", build, backend)
    if missing:
        pytest.skip(missing)
    return file


def build(_, backend):
    """-> path of the program, which is kept outside the clone by the hash of all it is made from;
    or None, and what is missing to build it."""
    made_from = [
        backend,
        sys.prefix,
        metadata.version(backend),
        os.environ.get("ONNXRUNTIME_DIR", ""),
    ]
    made_from += [
        path.read_text(encoding="utf-8") for path in sorted((ROOT / "deploy/cpp").iterdir())
    ]
    key = hashlib.sha256("\0".join(made_from).encode()).hexdigest()[:16]
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = caches / "threestep" / f"cpp-{key}"
    if not (folder / "complete").exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        flags = [f"-DBACKEND={backend}", f"-DPYTHON={sys.executable}"]
        flags += ["-DCMAKE_CXX_FLAGS_RELEASE=-O0"]  # compiles faster than with -O3
        done = run("cmake", "-S", ROOT / "deploy" / "cpp", "-B", folder, *flags)
        if missing := re.search(NOT_HERE, " ".join(done.err.split())):
            return None, missing[0]
        assert done.code == 0, done.err
        built = run("cmake", "--build", folder)
        assert built.code == 0, built.out + built.err
        (folder / "complete").touch()
    return folder / "threestep", None


def run(*command, **options):
    """-> Result of a process."""
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "timeout": 300, **options}
    done = subprocess.run(
        [str(part) for part in command], encoding="utf-8", errors="surrogateescape", **options
    )
    return Result(done.returncode, done.stdout or "", done.stderr or "")


@pytest.fixture
def compare(program, call):
    """compare(model, *arguments) -> both Results, after asserting that their predictions are
    equal."""

    def compare(file, *arguments):
        ours = run(program, "--model", file, "--format", "json", "--top-k", 9, *arguments)
        theirs = call(
            step3_infer.main, "--model", file, "--format", "json", "--top-k", 9, *arguments
        )
        assert ours.code == theirs.code, ours.err
        lines = [
            [json.loads(line) for line in result.out.splitlines()] for result in (ours, theirs)
        ]
        for got, expected in zip(*lines, strict=True):
            assert list(got) == list(expected) and got["path"] == expected["path"]
            if "error" in expected:
                continue
            assert got["label"] == expected["label"], got["path"]
            known = expected["known"]
            known = None if known is None else pytest.approx(known, rel=0, abs=1e-3)
            assert got["known"] == known, got["path"]
            assert got["probability"] == pytest.approx(expected["probability"], rel=0, abs=1e-4)
            tops = [
                {entry["label"]: entry["probability"] for entry in one["top"]}
                for one in (got, expected)
            ]
            assert tops[0] == pytest.approx(tops[1], rel=0, abs=1e-4), got["path"]
        return ours, theirs

    return compare


@pytest.fixture(scope="module")
def tiny(program, suffix, tmp_path_factory):
    """channels -> path of a model file, a linear layer whose large weights react to every pixel."""
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    for channels in (1, 3):
        network = model.build("linear", channels=channels, classes=len(CLASSES), image_size=(8, 8))
        torch.nn.init.normal_(network.layers[-1].weight, std=0.2)
        deployable = model.Deployable(network, (8, 8), [0.5] * channels, [0.2] * channels).eval()
        spec = {"schema": 1, "task": "classification", "classes": CLASSES}
        spec |= {"channels": channels, "image_size": [8, 8]}
        export(deployable, spec, folder / f"{channels}{suffix}")
    return {channels: folder / f"{channels}{suffix}" for channels in (1, 3)}


@pytest.fixture(scope="module")
def shipped(trained, suffix):
    """Path of the trained network's file."""
    return trained.export / f"model{suffix}"


def export(module, spec, path):
    """Write a file of step2_export.py in the format that the suffix says; -> its path."""
    exporter = export_onnx if path.suffix == ".onnx" else export_torchscript
    exporter(Source(module, {"known": None, **spec}), path)
    return path


def with_spec(source, name, text=None, **changes):
    """Copy a model file to `name` with its suffix, its spec changed by key, or replaced by `text`
    (None with no changes: removed); -> its path."""
    target = Path(f"{name}{Path(source).suffix}")
    if target.suffix == ".onnx":
        return onnx_with(source, target, text, **changes)
    extra = {"spec.json": ""}
    with warnings.catch_warnings():  # torch calls TorchScript deprecated
        warnings.simplefilter("ignore")
        module = torch.jit.load(source, _extra_files=extra)
        text = json.dumps({**json.loads(extra["spec.json"]), **changes}) if changes else text
        torch.jit.save(module, target, _extra_files={} if text is None else {"spec.json": text})
    return target


def chunk(name, content):
    return (
        struct.pack(">I", len(content))
        + name
        + content
        + struct.pack(">I", zlib.crc32(name + content))
    )


def png(depth, colour, width, height, *chunks, pixels=None):
    """A PNG of any depth and colour type, of random pixels."""
    row = -(-width * depth * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour] // 8)
    rng = np.random.default_rng(depth + colour)
    content = (
        pixels if pixels is not None else b"".join(b"\0" + rng.bytes(row) for _ in range(height))
    )
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(content)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + body


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A directory of images that decode exactly: PNGs of every kind, BMP, GIF, flat JPEGs, rotated
    ones."""
    folder = tmp_path_factory.mktemp("pictures")
    kinds = [(depth, 0) for depth in (1, 2, 4, 8, 16)]
    kinds += [(depth, colour) for colour in (2, 4, 6) for depth in (8, 16)]
    for depth, colour in kinds:
        for width, height in [(8, 8), (13, 29)]:
            content = png(depth, colour, width, height)
            (folder / f"depth{depth}-colour{colour}-{width}.png").write_bytes(content)
    palette = chunk(b"PLTE", np.random.default_rng(1).bytes(3 * 16))
    alpha = chunk(b"tRNS", bytes([0, 128, 7]))
    (folder / "palette.png").write_bytes(png(4, 3, 20, 10, palette))
    (folder / "palette-alpha.png").write_bytes(png(4, 3, 20, 10, palette, alpha))
    photo = Image.fromarray(np.random.default_rng(2).integers(0, 256, (24, 40, 3), dtype=np.uint8))
    photo.save(folder / "colour.bmp")
    photo.quantize(64).save(folder / "palette.gif")
    blocks = (
        np.random.default_rng(3).integers(0, 256, (3, 5), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    )
    for turn in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = turn
        photo.save(folder / f"turned{turn}.png", exif=exif)
        flat = Image.fromarray(blocks)  # every decoder gives the same pixels
        flat.save(folder / f"turned{turn}.jpg", exif=exif, quality=100)
    return folder


@pytest.mark.parametrize("channels", [1, 3])
def test_it_decodes_the_pixels_that_step3_decodes(compare, tiny, pictures, channels):
    ours, _ = compare(tiny[channels], pictures)
    lines = [json.loads(line) for line in ours.done().out.splitlines()]
    assert len(lines) == 2 * 11 + 4 + 16
    by_name = {os.path.basename(line["path"]): line["top"] for line in lines}
    assert by_name["turned1.png"] != by_name["turned6.png"]  # a lost orientation would be noticed


@pytest.mark.parametrize("fit", ["stretch", "crop", "letterbox"])
def test_a_network_of_any_shape_gets_images_of_any_shape(compare, suffix, tmp_path, fit):
    network = model.build("linear", channels=3, classes=len(CLASSES), image_size=(6, 13))
    torch.nn.init.normal_(network.layers[-1].weight, std=0.2)
    deployable = model.Deployable(network, (6, 13), [0.5] * 3, [0.2] * 3, fit=fit).eval()
    spec = {"schema": 1, "task": "classification", "classes": CLASSES}
    spec |= {"channels": 3, "image_size": [6, 13], "fit": fit}
    file = export(deployable, spec, tmp_path / f"wide{suffix}")

    (tmp_path / "photos").mkdir()
    rng = np.random.default_rng(0)
    for height, width in ((6, 13), (40, 9), (9, 40), (25, 25)):
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{height}x{width}.png")
    ours, _ = compare(file, tmp_path / "photos")
    assert len(ours.done().out.splitlines()) == 4


@pytest.mark.parametrize("ground", ["white", "black", None])
def test_transparent_pixels_lie_on_the_ground_of_the_spec(compare, tiny, tmp_path, ground):
    (tmp_path / "photos").mkdir()
    rgba = np.random.default_rng(0).integers(0, 256, (9, 8, 4), dtype=np.uint8)
    Image.fromarray(rgba).save(tmp_path / "photos" / "rgba.png")
    Image.fromarray(rgba).convert("LA").save(tmp_path / "photos" / "la.png")

    for channels in (1, 3):
        file = with_spec(tiny[channels], tmp_path / f"{channels}", ground=ground)
        ours, theirs = compare(file, tmp_path / "photos")
        plain, _ = compare(tiny[channels], tmp_path / "photos")
        assert (ours.done().out == plain.done().out) == (ground is None)
        notes = [line for line in theirs.err.splitlines() if "can carry code" not in line]
        assert ours.err.splitlines() == notes
        assert "note: 2 images with transparency" in ours.err


@pytest.mark.parametrize("white", [1023, 4095, 40000])
def test_sixteen_bit_greys_are_scaled_by_the_white_of_the_spec(
    program, compare, tiny, tmp_path, white
):
    (tmp_path / "photos").mkdir()
    values = np.random.default_rng(white).integers(0, white * 9 // 8, (8, 8), dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "photos" / "grey.png")
    for channels in (1, 3):
        scaled = with_spec(tiny[channels], tmp_path / f"{channels}", white=white)
        ours, _ = compare(scaled, tmp_path / "photos")
        plain, _ = compare(tiny[channels], tmp_path / "photos")
        assert ours.done().out != plain.done().out
    none = with_spec(tiny[1], tmp_path / "none", white=0)
    run(program, "--model", none, tmp_path / "photos").error(1, "malformed spec", "white")


def test_a_trained_network_gives_the_same_lines(program, compare, call, shipped, samples):
    compare(shipped, *samples)
    ours = run(program, "--model", shipped, *samples).done().out
    theirs = call(step3_infer.main, "--model", shipped, *samples).done().out
    assert re.sub(r"[\d.]+%", "%", ours) == re.sub(r"[\d.]+%", "%", theirs)
    percents = [
        [float(number) for number in re.findall(r"([\d.]+)%", text)] for text in (ours, theirs)
    ]
    assert percents[0] == pytest.approx(percents[1], abs=0.011)


@pytest.fixture
def strange(samples, here):
    """Paths of the samples and of images that look like none of them: noise, black, and a larger
    ramp."""
    images = {
        "noise": np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8),
        "black": np.zeros((8, 8), np.uint8),
        "ramp": np.arange(60 * 80, dtype=np.uint32).reshape(60, 80).astype(np.uint8),
    }
    for name, pixels in images.items():
        Image.fromarray(pixels).save(f"{name}.png")
    return [*samples, *(here / f"{name}.png" for name in images)]


def labels(result):
    """Path's stem -> label, of lines of JSON; and the rows themselves."""
    rows = [json.loads(line) for line in result.done().out.splitlines()]
    return {os.path.basename(row["path"]).removesuffix(".png"): row["label"] for row in rows}, rows


def test_unfamiliar_images_are_unknown_and_improbable_answers_unsure(
    program, compare, call, shipped, strange, here
):
    found, rows = labels(compare(shipped, *strange)[0])
    assert set(found.values()) <= set("0123456789") and all(0 <= row["known"] <= 1 for row in rows)
    rejected, rows = labels(compare(shipped, "--reject", "0.99", *strange)[0])
    assert (
        rejected["noise"] == rejected["black"] == "unknown"
        and rows[-2]["top"][0]["label"] == found["black"]
    )
    assert list(rejected.values()).count("unknown") <= 5
    unsure, _ = labels(compare(shipped, "--min-probability=1", *strange)[0])
    assert unsure["noise"] == "unsure"
    both = ["--reject=.5", "--min-probability", "1"]
    answers, _ = labels(compare(shipped, *both, *strange)[0])
    assert {"unknown", "unsure"} <= set(answers.values())
    ours = run(program, "--model", shipped, *both, *strange).done().out
    theirs = call(step3_infer.main, "--model", shipped, *both, *strange).done().out
    assert re.sub(r"[\d.]+%", "%", ours) == re.sub(r"[\d.]+%", "%", theirs)
    percents = [
        [float(number) for number in re.findall(r"([\d.]+)%", text)] for text in (ours, theirs)
    ]
    assert percents[0] == pytest.approx(percents[1], abs=0.11)
    assert re.search(r"noise\.png  unknown  \d \d+\.\d\d%  .*  known 0\.0%\n", ours)


def test_the_files_own_thresholds_count_unless_others_are_given(compare, shipped, strange, here):
    file = with_spec(shipped, here / "own", reject=0.99, min_probability=0.9999)
    answers, _ = labels(compare(file, *strange)[0])
    assert answers["noise"] == "unknown"
    assert labels(compare(file, "--reject", "1", *strange)[0])[0]["noise"] == "unsure"
    answers, _ = labels(compare(file, "--reject", "1", "--min-probability", "0", *strange)[0])
    assert not {"unknown", "unsure"} & set(answers.values())


def middle(rows, name):
    """A threshold that half of the rows reach with their probability of a class, none of them only
    just."""
    own = []
    for row in rows:
        own += [entry["probability"] for entry in row["top"] if entry["label"] == name]
    own.sort()
    low, high = own[len(own) // 2 - 1 : len(own) // 2 + 1]
    return (low + high) / 2


def test_promises_are_kept_as_step3_keeps_them(compare, shipped, strange, here):
    _, rows = labels(compare(shipped, *strange)[0])
    recalls = [
        {"kind": "recall", "name": name, "share": 0.9, "threshold": middle(rows, name)}
        for name in ("8", "9")
    ]
    accuracy = {"kind": "accuracy", "share": 0.95, "threshold": 0.9999}
    file = with_spec(shipped, here / "own", promises=[recalls[0], accuracy, recalls[1]])
    answers, _ = labels(compare(file, *strange)[0])
    called = list(answers.values())
    assert {"8", "9", "unsure"} < set(called)
    stricter, _ = labels(compare(file, "--min-probability", "1", *strange)[0])
    assert list(stricter.values()).count("8") == called.count("8")
    assert list(stricter.values()).count("unsure") >= called.count("unsure")
    laxer, _ = labels(compare(file, "--min-probability", "0", "--reject", "0.99", *strange)[0])
    assert {"unknown", "unsure"} < set(laxer.values())


def test_files_without_known_go_on_working(program, compare, tiny, shipped, strange, here):
    found, rows = labels(compare(tiny[1], *strange)[0])
    assert {row["known"] for row in rows} == {None} and set(found.values()) <= set(CLASSES)
    assert " known " not in run(program, "--model", tiny[1], *strange).done().out
    assert "unsure" in labels(compare(tiny[1], "--min-probability", "1", *strange)[0])[0].values()
    ignored = with_spec(shipped, here / "ignored", known=None)
    assert {row["known"] for row in labels(compare(ignored, *strange)[0])[1]} == {None}
    for file in (tiny[1], ignored):
        result = run(program, "--model", file, "--reject", "0.99", *strange)
        result.error(2, "familiar", "--reject")
        assert not result.out


def test_jpegs_are_predicted_like_step3_does(program, shipped, samples, tmp_path):
    """libjpeg and stb_image differ by a few grey levels."""
    for path in samples:
        photo = Image.open(path).resize((64, 48), Image.BICUBIC).convert("RGB")
        photo.save(tmp_path / f"{path.stem}.jpg", quality=95)
    lines = run(program, "--model", shipped, "--format", "json", tmp_path).done().out.splitlines()
    for line, path in zip(map(json.loads, lines), sorted(tmp_path.glob("*.jpg")), strict=True):
        expected = predict(path, Model(shipped))
        assert line["label"] == expected["label"]
        assert line["probability"] == pytest.approx(expected["probability"], abs=0.02)


def test_names_are_escaped(program, compare, call, tiny, pictures, here):
    names = [
        b"line\nbreak.png",
        b"\x1b[31mred.png",
        b"\xff\xc3(\xed\xa0\x80.png",
        b'"quoted\\".png',
        "ü\u202e😀.png".encode(),
    ]
    for name in names:
        shutil.copy(pictures / "colour.bmp", name)
    compare(tiny[3], *sorted(map(os.fsdecode, names)))
    lines = run(program, "--model", tiny[3], "--top-k", 5, ".").done().out
    assert len(lines.splitlines()) == len(names)
    for name in [*(os.fsdecode(name) for name in names), *CLASSES]:
        assert printable(name) in lines
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e\ud800-\udfff]", lines)


def test_directories_and_globs(compare, tiny, pictures, here):
    for name in ("b/x.png", "b/Y.PNG", "b/a/z.bmp", "b/note.txt", "c/d/e.png"):
        os.makedirs(os.path.dirname(name), exist_ok=True)
        shutil.copy(pictures / "colour.bmp", name)
    Path("b/read.me").write_text("BMP files are images")
    shutil.copy(pictures / "colour.bmp", "c/.hidden.bmp")
    shutil.copy(pictures / "turned1.png", "c/scan.001")
    os.symlink("..", "b/a/up")
    os.symlink("../c", "b/link")
    ours, theirs = compare(tiny[3], "c", "b/", "b/*.png", "*")
    assert len(ours.done().out.splitlines()) == 2 + 6 + 1 + 8
    assert "note: skipped 2 files that are no images: b/read.me, b/read.me" in ours.err
    assert "note: skipped 2 files" in theirs.err


@pytest.fixture
def bad(here, pictures):
    """Inputs that cannot be used: name -> words of its error."""
    for name in ("turned1.jpg", "turned1.png", "colour.bmp", "palette.gif"):
        whole = (pictures / name).read_bytes()
        (here / f"cut-{name}").write_bytes(whole[: len(whole) * 2 // 3])
    (here / "empty.png").touch()
    (here / "text.png").write_text("no image")
    (here / "bomb.png").write_bytes(png(8, 0, 14_000, 14_000, pixels=b""))
    (here / "colour.webp").write_bytes(b"RIFF")
    os.mkfifo(here / "pipe.png")
    (here / "folder").mkdir()
    return {
        "cut-turned1.jpg": "truncated",
        "cut-turned1.png": "truncated",
        "cut-colour.bmp": "truncated",
        "cut-palette.gif": "truncated",
        "empty.png": "is empty",
        "text.png": "not a PNG",
        "bomb.png": "has 14,000 x 14,000 pixels, more than --max-pixels 178,956,970",
        "colour.webp": "not a PNG",
        "missing.png": "no such file",
        "pipe.png": "not a regular file",
        "folder": "no images in this directory",
        "no*.png": "matches no file",
        "x" * 300: "cannot be read",
    }


def test_bad_inputs_are_one_error_line_each_and_the_others_are_predicted(
    compare, tiny, pictures, bad
):
    good = pictures / "palette.png"
    ours, theirs = compare(tiny[3], good, *bad, good)
    assert ours.code == 1 and len(ours.err.splitlines()) == len(bad)
    assert theirs.err.count("error: ") == len(bad)
    lines = [json.loads(line) for line in ours.out.splitlines()]
    assert lines[0] == lines[-1] and lines[0]["label"] in CLASSES
    for line, error, (name, reason) in zip(
        lines[1:-1], ours.err.splitlines(), bad.items(), strict=True
    ):
        assert error == f"error: {name}: {line['error']}" and reason in line["error"]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ("", 2, ["PATH", "--help"]),
        ("--top-k 0 x.png", 2, ["--top-k", "'0'", "1 to 999999"]),
        ("--threads 1e3 x.png", 2, ["--threads", "'1e3'"]),
        ("--format csv x.png", 2, ["--format", "'csv'", "text nor json"]),
        ("--max-pixels 0 x.png", 2, ["--max-pixels", "'0'", "1 to 4294836225"]),
        ("--max-pixels 1e6 x.png", 2, ["--max-pixels", "'1e6'"]),
        ("--reject 2 x.png", 2, ["--reject", "'2'", "number from 0 to 1"]),
        ("--reject nan x.png", 2, ["--reject", "'nan'"]),
        ("--min-probability=-0.1 x.png", 2, ["--min-probability", "'-0.1'"]),
        ("--min-probability 0.5% x.png", 2, ["--min-probability", "'0.5%'"]),
        ("--reject= x.png", 2, ["--reject", "''"]),
        ("x.png --reject", 2, ["--reject", "expected one argument"]),
        ("x.png --model", 2, ["--model", "expected one argument"]),
        ("--topk=3 x.png", 2, ["--topk=3"]),
        ("--model nowhere.pt2 x.png", 1, ["nowhere.pt2", "step2_export.py"]),
        ("--model text.PT2 x.png", 1, ["text.PT2 needs step3_infer.py"]),
    ],
)
def test_usage_errors(program, here, arguments, code, words):
    (here / "text.PT2").write_text("no model")
    result = run(program, *arguments.split())
    result.error(code, *words)
    assert len(result.err.splitlines()) == 1 and not result.out


def test_files_that_are_not_models(program, backend, suffix, shipped, here):
    run(program, "x.png").error(2, f"no model{suffix}", "--model")
    content = shipped.read_bytes()
    kind = {"torch": "a TorchScript", "onnxruntime": "an ONNX"}[backend]
    for name, damaged in (
        ("text", b"no model"),
        ("cut", content[: len(content) // 2]),
        ("empty", b""),
    ):
        (here / f"{name}{suffix}").write_bytes(damaged)
        result = run(program, "--model", f"{name}{suffix}", "x.png")
        result.error(1, f"{name}{suffix} is not {kind} file that", "can run: ")
        assert len(result.err.splitlines()) == 1 and not result.out


def test_a_file_for_the_other_engine_names_the_ways_out(program, backend, suffix, trained):
    (other,) = SUFFIXES.keys() - {backend}
    result = run(program, "--model", trained.export / f"model{SUFFIXES[other]}", "x.png")
    result.error(
        1, f"needs the program built with -DBACKEND={other}; this program runs the {suffix} file"
    )
    assert len(result.err.splitlines()) == 1 and not result.out


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        ({}, 1, ["carries no spec"]),
        ({"text": "{"}, 1, ["malformed spec"]),
        ({"text": "[1]"}, 1, ["malformed spec"]),
        ({"schema": 2}, 1, ["schema 2", "up to 1", "Threestep version that exported it"]),
        ({"classes": [1, 2]}, 1, ["malformed spec"]),
        ({"classes": ["a", "b"]}, 1, ["2 classes", "5 outputs"]),
        ({"channels": 3}, 1, ["cannot run", "spec"]),
        ({"channels": 2}, 1, ["malformed spec", "channels"]),
        ({"reject": 0.99}, 1, ["malformed spec", "known"]),
        ({"known": {"tolerance": 0.1}}, 1, ["does not fit the output known"]),
        ({"known": {"layers": []}}, 1, ["does not fit the output known"]),
        ({"known": {"tolerance": -1}}, 1, ["malformed spec", "known"]),
        ({"known": "yes"}, 1, ["malformed spec"]),
        ({"known": {"tolerance": 0.1}, "reject": 99}, 1, ["malformed spec", "reject"]),
        ({"known": {"tolerance": 0.1}, "reject": "0.99"}, 1, ["malformed spec"]),
        ({"min_probability": -0.5}, 1, ["malformed spec", "min_probability"]),
        ({"min_probability": []}, 1, ["malformed spec"]),
        ({"task": "regression"}, 2, ["step3_infer.py --values"]),
        ({"fixed": {"batch": 1, "input": "uint8"}}, 2, ["takes resized images only", "model."]),
    ],
)
def test_invalid_specs(program, here, tiny, pictures, change, code, words):
    file = with_spec(tiny[1], here / "model", **change)
    run(program, "--model", file, pictures / "palette.png").error(code, *words)


MALFORMED = "m.onnx has a malformed spec: "

# Reads specs from its input, each after a line that says how many bytes it has, and prints a line
# for each: what is wrong with it, or "taken".
SPEC_READER = r"""
#include <iostream>

#include "spec.h"

int main() {
  for (std::string line; std::getline(std::cin, line);) {
    std::string text(std::stoul(line), '\0');
    std::cin.read(text.data(), text.size());
    try {
      read_spec(text, "m.onnx", "model.onnx");
      std::cout << "taken" << std::endl;
    } catch (const Problem& problem) {
      std::cout << problem.what() << std::endl;
    }
  }
}
"""


@pytest.fixture(scope="module")
def read_specs(tmp_path_factory):
    """read_specs(texts) -> what the C++ program says of each: a problem, or "taken"."""
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("needs a C++ compiler (apt install g++)")
    place = tmp_path_factory.mktemp("specs")
    (place / "reader.cpp").write_text(SPEC_READER)
    command = [compiler, "-std=c++17", "-O0", "-I", ROOT / "deploy" / "cpp"]
    built = run(*command, place / "reader.cpp", "-o", place / "reader")
    if "nlohmann/json.hpp: No such file" in built.err:
        pytest.skip("needs nlohmann/json.hpp (apt install nlohmann-json3-dev)")
    assert built.code == 0, built.err

    def read_specs(texts):
        contents = [text.encode() for text in texts]
        given = b"".join(b"%d\n%s" % (len(content), content) for content in contents)
        done = subprocess.run([place / "reader"], input=given, capture_output=True, timeout=100)
        assert done.returncode == 0, done.stderr
        return done.stdout.decode().splitlines()

    return read_specs


def test_specs_that_every_reader_refuses(read_specs):
    honest = json.dumps(HONEST)
    said = read_specs([changed_text(honest, change) for change in REFUSED.values()])
    about = dict(zip(REFUSED, said, strict=True))
    wrong = {name: line for name, line in about.items() if MALFORMED not in line}
    assert not wrong
    assert "channels must be 1 or 3" in about["channels two"]
    assert "tolerance" in about["known tolerance"] and "MiB" in about["large"]


def test_specs_that_every_reader_takes(read_specs):
    honest = json.dumps(HONEST)
    said = read_specs([honest, *(changed_text(honest, change) for change in TAKEN.values())])
    assert set(said) == {"taken"}


def external(tensor, location="../secret"):
    """The tensor, its weights in another file."""
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    return tensor


def in_a_subgraph(model):
    branch = helper.make_graph([], "branch", [], [], [external(weights())])
    node = helper.make_node("If", ["x"], ["y"], then_branch=branch)
    model.graph.node.append(node)


def in_a_function(model):
    node = helper.make_node("Constant", [], ["y"], value=external(weights()))
    opsets = [helper.make_opsetid("", 18)]
    model.functions.append(helper.make_function("d", "f", [], ["y"], [node], opsets))


def in_a_sparse_tensor(model):
    sparse = onnx.SparseTensorProto(values=weights(), indices=external(weights()), dims=[3])
    model.graph.sparse_initializer.append(sparse)


def without_a_location(model):
    model.graph.initializer.append(weights())
    model.graph.initializer[-1].data_location = TensorProto.EXTERNAL


def weights():
    content = np.ones(3, np.float32).tobytes()
    return helper.make_tensor("weights", TensorProto.FLOAT, [3], content, raw=True)


def save_graph(graph, path):
    """Write a graph as an ONNX file with the honest spec."""
    opsets = [helper.make_opsetid("", 18)]
    planted = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    helper.set_model_props(planted, {"spec": json.dumps(HONEST)})
    path.write_bytes(planted.SerializeToString())


EXTERNAL = {
    "initializer": lambda model: model.graph.initializer.append(external(weights())),
    "in memory": lambda model: model.graph.initializer.append(
        external(weights(), "*/_ORT_MEM_ADDR_/*")
    ),
    "no location": without_a_location,
    "subgraph": in_a_subgraph,
    "function": in_a_function,
    "sparse tensor": in_a_sparse_tensor,
    "default of a function": lambda model: model.functions.add(name="f").attribute_proto.add(
        name="a", type=onnx.AttributeProto.TENSORS, tensors=[external(weights())]
    ),
    "training": lambda model: model.training_info.add().algorithm.initializer.append(
        external(weights())
    ),
}


@pytest.mark.parametrize("backend", ["onnxruntime"], indirect=True)
def test_weights_outside_the_file_are_refused(program, tiny, pictures, here):
    honest = onnx.load(tiny[1])
    for place, change in EXTERNAL.items():
        planted = onnx.ModelProto()
        planted.CopyFrom(honest)
        change(planted)
        (here / "planted.onnx").write_bytes(planted.SerializeToString())
        result = run(program, "--model", "planted.onnx", pictures / "palette.png")
        result.error(1, "planted.onnx keeps weights outside the file, which is refused")
        assert not result.out, place


@pytest.mark.parametrize("backend", ["onnxruntime"], indirect=True)
def test_the_content_of_another_file_is_not_shown(program, here):
    """A whole graph that answers with the bytes of another file, as old onnxruntimes read it."""
    (here / "secret").write_bytes(np.array([[0.25, 0.75]], np.float32).tobytes())
    image = helper.make_tensor_value_info("image", TensorProto.UINT8, ["n", "h", "w", 1])
    answer = helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, [1, 2])
    stolen = helper.make_tensor("stolen", TensorProto.FLOAT, [1, 2], bytes(8), raw=True)
    for tensor in (external(stolen, "secret"), weights()):
        node = helper.make_node("Identity", [tensor.name], ["probabilities"])
        graph = helper.make_graph([node], "graph", [image], [answer], [tensor])
        save_graph(graph, here / "planted.onnx")
        Image.new("L", (8, 8)).save("image.png")
        result = run(program, "--model", "planted.onnx", "image.png")
        is_stolen = tensor.name == "stolen"
        result.error(1, "outside the file" if is_stolen else "the spec does not match")
        assert not result.out


@pytest.mark.parametrize("backend", ["onnxruntime"], indirect=True)
def test_what_protobuf_readers_read_in_other_ways_is_refused(program, tiny, here):
    """A group around the graph's tensors, which this program would not look into."""
    content = tiny[1].read_bytes()
    for damage in (b"\xfb\x01\xfc\x01", b"\x3a\xff\xff\xff\xff\xff\xff\xff\xff\x7f", b"\x80" * 11):
        (here / "damaged.onnx").write_bytes(content + damage)
        result = run(program, "--model", "damaged.onnx", "image.png")
        result.error(1, "damaged.onnx is not an ONNX file that", "protobuf is damaged")


def test_self_test(program, here, shipped):
    source = Path(shutil.copy(shipped, here)).name
    passed = run(program, "--self-test").done()
    assert re.fullmatch(
        r"self-test passed: 4 golden samples, max difference \d\.\de-\d\d\n", passed.out
    )
    assert passed.err == f"model: {source}\n"
    golden = Model(source).spec["golden"]
    golden[2]["probabilities"][0] += 0.001
    changed = run(program, "--self-test", "--model", with_spec(source, "changed", golden=golden))
    assert (
        changed.code == 1
        and changed.out == "self-test FAILED: 4 golden samples, max difference 1.0e-03\n"
    )
    one = with_spec(source, "one", golden=golden[:1])
    assert ": 1 golden sample, max" in run(program, "--self-test", "--model", one).done().out
    golden[0]["image"] = "no base64!"
    file = with_spec(source, "broken", golden=golden)
    run(program, "--self-test", "--model", file).error(1, "golden samples are malformed")
    file = with_spec(source, "none", golden=[])
    run(program, "--self-test", "--model", file).error(1, "no golden samples")


@pytest.mark.parametrize(
    ("changes", "passes"),
    [
        ({}, {1e-5: True, 1e-3: False}),
        ({"quantization": "int8, per channel"}, {5e-3: True, 1.5e-2: True, 3e-2: False}),
        ({"self_test_tolerance": 2e-3}, {1e-3: True, 5e-3: False}),
        ({"self_test_tolerance": 1e-4, "quantization": "int8"}, {5e-3: False}),
    ],
)
def test_self_test_tolerance_is_that_of_step3(program, call, here, shipped, changes, passes):
    spec = Model(shipped).spec
    spec.pop("self_test_tolerance", None)
    for difference, passed in passes.items():
        golden = json.loads(json.dumps(spec["golden"]))
        golden[1]["probabilities"][3] += difference
        text = json.dumps({**spec, "golden": golden, **changes})
        file = with_spec(shipped, "changed", text)
        ours = run(program, "--self-test", "--model", file)
        theirs = call(step3_infer.main, "--self-test", "--model", file)
        assert ours.code == theirs.code == (0 if passed else 1), (ours, theirs)
        assert ("passed" in ours.out) == passed and ("FAILED" in ours.out) != passed


def test_self_test_covers_known(program, call, here, shipped):
    spec = Model(shipped).spec
    known = spec["golden"][1]["known"]
    tolerance = spec["known"]["tolerance"]
    for moved, passed in (
        (known + tolerance / 2, True),
        (known + 2 * tolerance, False),
        (known - 0.5, False),
    ):
        golden = json.loads(json.dumps(spec["golden"]))
        golden[1]["known"] = moved
        file = with_spec(shipped, "changed", golden=golden)
        ours = run(program, "--self-test", "--model", file)
        assert (
            ours.code == call(step3_infer.main, "--self-test", "--model", file).code == (not passed)
        )
        assert ("passed" in ours.out) == passed and ("FAILED" in ours.out) != passed
    del golden[1]["known"]
    file = with_spec(shipped, "broken", golden=golden)
    run(program, "--self-test", "--model", file).error(1, "golden samples are malformed", "known")


def test_self_test_tolerance_that_is_no_number(program, here, shipped):
    file = with_spec(shipped, "changed", self_test_tolerance="much")
    run(program, "--self-test", "--model", file).error(1, "malformed spec", "self_test_tolerance")


def test_a_self_test_that_would_pass_anything_is_capped(program, here, shipped):
    spec = Model(shipped).spec
    golden = json.loads(json.dumps(spec["golden"]))
    golden[1]["probabilities"][3] += 0.06
    changes = {"golden": golden, "self_test_tolerance": 1e6}
    file = with_spec(shipped, "changed", **changes)
    result = run(program, "--self-test", "--model", file)
    assert result.code == 1 and "FAILED" in result.out

    golden = json.loads(json.dumps(spec["golden"]))
    golden[1]["known"] = abs(golden[1]["known"] - 0.06)
    known = {**spec["known"], "tolerance": 1e6}
    file = with_spec(shipped, "changed", golden=golden, known=known)
    result = run(program, "--self-test", "--model", file)
    assert result.code == 1 and "FAILED" in result.out


class NanForBlack(torch.nn.Module):
    """Equal probabilities for two classes, NaN for a black image."""

    def forward(self, images):
        mean = images.float().mean((1, 2, 3))[:, None]
        return torch.full((1, 2), 0.5) * mean / mean


def test_self_test_fails_if_any_output_is_nan(program, suffix, here):
    golden = []
    for level in (0, 255):  # NaN first: a later number must not replace it
        content = io.BytesIO()
        Image.new("L", (8, 8), level).save(content, "PNG")
        image = base64.b64encode(content.getvalue()).decode()
        golden.append({"image": image, "probabilities": [0.5, 0.5]})
    spec = {"schema": 1, "task": "classification", "classes": ["a", "b"], "channels": 1}
    spec |= {"image_size": [8, 8], "golden": golden}
    file = export(NanForBlack().eval(), spec, here / f"nan{suffix}")
    result = run(program, "--self-test", "--model", file)
    assert (
        result.code == 1
        and "FAILED: 2 golden samples, max difference nan" in result.out.replace("-nan", "nan")
    )
    Image.new("L", (8, 8)).save("black.png")
    run(program, "--model", file, "black.png").error(1, "black.png", "NaN or infinity")


class NanIsKnown(torch.nn.Module):
    """Equal probabilities for two classes, and NaN as known for a black image."""

    def forward(self, images):
        mean = images.float().mean((1, 2, 3))
        return torch.full((1, 2), 0.5), mean / mean


def test_self_test_fails_if_known_is_nan(program, suffix, here):
    golden = []
    for level in (0, 255):
        content = io.BytesIO()
        Image.new("L", (8, 8), level).save(content, "PNG")
        image = base64.b64encode(content.getvalue()).decode()
        golden.append({"image": image, "probabilities": [0.5, 0.5], "known": 1})
    spec = {"schema": 1, "task": "classification", "classes": ["a", "b"], "channels": 1}
    spec |= {"image_size": [8, 8], "golden": golden, "known": {"tolerance": 0.1}}
    file = export(NanIsKnown().eval(), spec, here / f"nan{suffix}")
    assert "FAILED" in run(program, "--self-test", "--model", file).out


class OutsideForBlack(torch.nn.Module):
    """No probabilities for a black image, and for others one that rounding made more than 1."""

    def forward(self, images):
        is_black = (images.float().mean((1, 2, 3)) == 0).float()[:, None]
        return torch.tensor([[1.0005, -0.0005]]) + 120 * is_black


def test_outputs_that_are_no_probabilities_are_an_error_line(program, suffix, here):
    file = export(OutsideForBlack().eval(), HONEST, here / f"outside{suffix}")
    Image.new("L", (8, 8)).save("black.png")
    Image.new("L", (8, 8), 255).save("white.png")
    result = run(program, "--model", file, "black.png", "white.png")
    result.error(1, "black.png: the model computes probabilities outside 0..1 for this image")
    assert result.out == "white.png  a 100.05%  b -0.05%\n"


def test_images_that_would_take_all_memory_or_time(program, tiny, pictures, here):
    (here / "long.png").write_bytes(png(1, 0, 70_000, 1, pixels=b""))
    (here / "inflating.png").write_bytes(png(8, 0, 8, 8, pixels=bytes(200 << 20)))
    jpeg = (pictures / "turned1.jpg").read_bytes()
    (here / "scans.jpg").write_bytes(jpeg + b"\xff\xda" * 499)
    reasons = {
        "long.png": "has a side of 70,000 pixels, more than 65,535",
        "inflating.png": "is corrupt: it takes more memory than an image of its size",
        "scans.jpg": "is a JPEG of 500 scans, more than 200: save it anew",
    }
    result = run(program, "--model", tiny[1], *reasons, pictures / "palette.png")
    assert result.code == 1 and len(result.out.splitlines()) == 1
    errors = [f"error: {name}: {reason}" for name, reason in reasons.items()]
    assert result.err.splitlines() == errors


def test_an_image_that_is_too_large_for_the_memory_does_not_end_the_run(
    program, tiny, pictures, here
):
    good = pictures / "palette.png"
    Image.new("RGB", (13_000, 13_000)).save("large.png")  # 507 MB of pixels
    plain = run(program, "--model", tiny[3], good).done().out

    for megabytes in range(400, 6000, 200):  # the engines take different amounts of addresses
        command = ["prlimit", f"--as={megabytes << 20}", program, "--model", tiny[3]]
        command += ["--threads", 1]
        if run(*command, good).code == 0:
            break
    result = run(*command, "large.png", good)
    result.error(1, "large.png: is too large for this machine's memory")
    assert result.out == plain


@pytest.mark.parametrize("backend", ["onnxruntime"], indirect=True)
def test_an_image_that_the_network_cannot_take_does_not_end_the_run(program, here):
    """A network whose two probabilities are the two pixels of an image."""
    image = helper.make_tensor_value_info("image", TensorProto.UINT8, ["n", "h", "w", 1])
    answer = helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["n", 2])
    shape = helper.make_tensor("shape", TensorProto.INT64, [2], [1, 2])
    nodes = [
        helper.make_node("Cast", ["image"], ["pixels"], to=TensorProto.FLOAT),
        helper.make_node("Reshape", ["pixels", "shape"], ["probabilities"]),
    ]
    save_graph(helper.make_graph(nodes, "graph", [image], [answer], [shape]), here / "two.onnx")
    Image.fromarray(np.array([[0, 1]], np.uint8)).save("two.png")
    Image.fromarray(np.array([[0, 1, 0]], np.uint8)).save("three.png")
    result = run(program, "--model", "two.onnx", "three.png", "two.png")
    result.error(1, "three.png: the model cannot run on this input")
    assert result.out == "two.png  b 100.00%  a 0.00%\n"


def test_max_pixels(program, tiny, pictures):
    image = pictures / "depth8-colour0-13.png"  # 13 x 29
    run(program, "--model", tiny[1], "--max-pixels", 377, image).done()
    words = ["has 13 x 29 pixels, more than --max-pixels 376"]
    run(program, "--model", tiny[1], "--max-pixels=376", image).error(1, *words)


def test_output_that_cannot_be_written(program, shipped, samples):
    with open("/dev/full", "w") as full:
        result = run(program, "--model", shipped, *samples, stdout=full)
    result.error(1, "standard output")


@pytest.mark.parametrize("backend", ["onnxruntime"], indirect=True)
def test_an_int8_file_gives_the_same_lines(program, compare, all_formats, samples, here):
    shutil.copy(all_formats / "model.int8.onnx", here)
    compare("model.int8.onnx", *samples)
    passed = run(program, "--self-test").done()
    assert "passed" in passed.out and passed.err == "model: model.int8.onnx\n"
