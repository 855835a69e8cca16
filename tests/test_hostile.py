"""Hostile files end in one error line: nothing is run, nothing fills the memory, nothing leaks."""

import io
import os
import shutil
import struct
import sys
import zlib
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from conftest import ROOT, onnx_with
from onnx import TensorProto, helper
from PIL import Image

import step3_infer
from deploy import archive
from inference.engines import find_model
from inference.errors import Problem
from inference.external import has_external_data
from inference.images import Seen, decode_image
from inference.limits import MAX_SCANS
from inference.predict import Model, predict
from inference.tables import csv_line


# ------------------------------------------------------------------------------------------- images
def chunk(kind: bytes, data: bytes) -> bytes:
    checksum = struct.pack(">I", zlib.crc32(kind + data))
    return struct.pack(">I", len(data)) + kind + data + checksum


def png(width, height, rows: bytes, colour=0, depth=8, interlaced=0) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlaced)
    parts = [chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def reason(content: bytes, channels=3) -> str:
    with pytest.raises(Problem) as caught:
        decode_image(io.BytesIO(content), channels)
    return str(caught.value)


def iptc_with(content: bytes) -> bytes:
    """An IPTC record whose picture is another file, which Pillow's plugin opens by itself."""
    fields = [
        ((3, 60), b"\x01\x00"),
        ((3, 65), b"\x01"),
        ((3, 20), struct.pack(">H", 8)),
        ((3, 30), struct.pack(">H", 8)),
        ((3, 120), b"\x01"),
        ((8, 10), content),
    ]
    record = b""
    for (number, dataset), data in fields:
        record += b"\x1c" + bytes([number, dataset]) + struct.pack(">H", len(data)) + data
    return record


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n{} loop\n"


@pytest.mark.parametrize("content", [EPS, iptc_with(EPS)], ids=["eps", "eps in iptc"])
def test_no_image_runs_a_program(content, monkeypatch):
    import subprocess

    def run(*command, **options):
        raise AssertionError(f"a program was run: {command}")

    monkeypatch.setattr(subprocess, "Popen", run)
    monkeypatch.setattr(os, "system", run)
    Image.init()  # as any other library in the process may have done
    assert "is not an image" in reason(content)


@pytest.mark.parametrize(
    ("size", "words"),
    [
        ((20_000_000, 1), "has a side of 20,000,000 pixels"),
        ((1, 70_000), "has a side of 70,000 pixels"),
        ((13_000, 13_900), "pixels, more than --max-pixels 178,956,970"),
        ((20_000, 20_000), "pixels, more than --max-pixels 178,956,970"),
    ],
)
def test_images_that_would_fill_the_memory(size, words):
    assert words in reason(png(*size, b""))


def test_max_pixels_is_the_users(call, small, samples, here):
    arguments = ["--model", small.export / "model.onnx", samples[0]]
    call(step3_infer.main, *arguments, "--max-pixels", 64).done()
    result = call(step3_infer.main, *arguments, "--max-pixels", 63)
    result.error(1, str(samples[0]), "8 x 8 pixels, more than --max-pixels 63")


def test_large_images_are_predicted_one_at_a_time(small, monkeypatch):
    module = sys.modules["inference.predict"]
    monkeypatch.setattr(module, "LARGE_PIXELS", 32)
    model = Model(small.export / "model.onnx", 1)
    holders = []

    def decode(*arguments):
        if arguments[3] > 32:
            holders.append(module.ONE_LARGE.locked())
        return decode_image(*arguments)

    monkeypatch.setattr(module, "decode_image", decode)
    paths = [str(path) for path in sorted((ROOT / "data" / "samples").glob("*.png"))]
    (rows,) = module.predict_files(model, iter([(path, None) for path in paths]), 2, 16, 1)
    assert holders == [True] * 10
    assert [row["label"] for row in rows] == [predict(path, model)["label"] for path in paths]


def test_jpegs_of_many_scans():
    content = io.BytesIO()
    Image.new("RGB", (64, 64)).save(content, "JPEG", progressive=True)
    honest = content.getvalue()
    assert decode_image(io.BytesIO(honest), 3).shape == (64, 64, 3)

    last = honest[honest.rindex(b"\xff\xda") : -2]
    hostile = honest[:-2] + last * MAX_SCANS + b"\xff\xd9"
    assert "scans" in reason(hostile)


@pytest.mark.parametrize("interlaced", [0, 1])
@pytest.mark.parametrize(("colour", "channels"), [(0, 1), (2, 3), (6, 4)])
def test_pngs_without_their_last_rows(interlaced, colour, channels):
    rows = (b"\0" + bytes([200] * 8 * channels)) * 2
    found = reason(png(8, 8, rows, colour, interlaced=interlaced))
    assert "cut off" in found or (interlaced and "cannot be read" in found)


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "1", "I;16"])
def test_black_pngs_are_whole(mode):
    content = io.BytesIO()
    Image.new(mode, (13, 7)).save(content, "PNG")
    assert decode_image(content, 3).shape == (7, 13, 3)


@pytest.mark.parametrize("name", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "TGA"])
def test_files_that_are_cut_off(name):
    pixels = np.random.default_rng(0).integers(1, 256, (16, 16, 3), dtype=np.uint8)
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, name)
    whole = decode_image(content, 3)
    for end in np.linspace(1, len(content.getvalue()) - 1, 20).astype(int):
        try:
            found = decode_image(io.BytesIO(content.getvalue()[:end]), 3)
        except Problem:
            continue
        assert np.array_equal(found, whole), end


# ------------------------------------------------------------------------------------------- models
def external(tensor: TensorProto) -> TensorProto:
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    entry = tensor.external_data.add()
    entry.key = "location"
    entry.value = "/etc/passwd"
    return tensor


def plant_in(graph, place: str) -> None:
    """Add a tensor outside the file to a graph."""
    tensor = external(onnx.numpy_helper.from_array(np.zeros(16, np.float32), "outside"))
    if place == "initializer":
        graph.initializer.append(tensor)
    elif place == "attribute":
        graph.node.append(helper.make_node("Constant", [], ["outside"], value=tensor))
    elif place == "sparse":
        sparse = graph.sparse_initializer.add()
        sparse.values.CopyFrom(tensor)
    else:
        inner = helper.make_graph([], "inner", [], [])
        inner.initializer.append(tensor)
        node = helper.make_node("If", ["x"], ["y"], then_branch=inner, else_branch=inner)
        graph.node.append(node)


@pytest.mark.parametrize("place", ["initializer", "attribute", "sparse", "subgraph"])
def test_tensors_outside_the_file_are_found_wherever_they_are(call, small, samples, here, place):
    proto = onnx.load(small.export / "model.onnx")
    plant_in(proto.graph, place)
    (here / "m.onnx").write_bytes(proto.SerializeToString())
    result = call(step3_infer.main, "--model", "m.onnx", samples[0])
    result.error(1, "m.onnx", "keeps weights outside the file")
    assert "root:" not in result.out + result.err


def test_honest_files_may_contain_the_word(small, here):
    source = small.export / "model.onnx"
    assert not has_external_data(str(source))
    classes = ["location", *"bcdefghij"]
    assert not has_external_data(str(onnx_with(source, here / "m.onnx", classes=classes)))
    content = (here / "m.onnx").read_bytes()
    for end in np.linspace(1, len(content) - 1, 50).astype(int):
        (here / "cut.onnx").write_bytes(content[:end])
        has_external_data(str(here / "cut.onnx"))  # ends, without an exception


def test_probabilities_outside_their_range(call, small, samples, here):
    proto = onnx.load(small.export / "model.onnx")
    output = proto.graph.output[0].name
    for node in proto.graph.node:
        node.output[:] = ["as it was" if name == output else name for name in node.output]
    proto.graph.initializer.append(
        onnx.numpy_helper.from_array(np.array(120, np.float32), "factor")
    )
    proto.graph.node.append(helper.make_node("Mul", ["as it was", "factor"], [output]))
    onnx.save(proto, here / "m.onnx")
    result = call(step3_infer.main, "--model", "m.onnx", samples[0])
    result.error(1, str(samples[0]), "probabilities outside 0..1")
    assert result.out == ""


def test_known_that_is_no_number(samples):
    def run(images):
        return np.full((len(images), 2), 0.5, np.float32), np.full(len(images), np.nan)

    spec = {"task": "classification", "channels": 1, "white": 65535, "classes": ["a", "b"]}
    spec["ground"] = None
    model = SimpleNamespace(spec=spec, batch=None, max_pixels=1000, seen=Seen(), run=run)
    with pytest.raises(Problem, match="NaN"):
        predict(samples[0], model)


@pytest.mark.parametrize("name", ["model.pt", "model.pt2", "model.pte", "model.tflite"])
def test_files_that_can_carry_code_are_never_chosen(here, name):
    (here / "exports" / "x").mkdir(parents=True)
    (here / "exports" / "x" / name).write_bytes(b"code")
    with pytest.raises(Problem, match="--model"):
        find_model(str(here))


@pytest.mark.parametrize("suffix", [".pt", ".pt2"])
def test_zip_bombs(call, samples, here, suffix):
    import zipfile

    with zipfile.ZipFile(f"bomb{suffix}", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data.pkl", b"\0" * (100 << 20))
    result = call(step3_infer.main, "--model", f"bomb{suffix}", samples[0])
    result.error(1, f"bomb{suffix}", "would unpack to")


# ------------------------------------------------------------------------------- planted beside it
def modules_of_a_run(execute, bundle, image) -> list[str]:
    """The top-level modules that the archive imports on one image."""
    command = [archive.NAME, "--model", "model.onnx", image]
    code = f"import runpy, sys; sys.argv = {list(map(str, command))!r}\n"
    code += "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
    code += "except SystemExit: print(*sys.modules)"
    names = execute("-I", "-c", code, cwd=bundle).done().out.splitlines()[-1].split()
    return sorted({name.split(".")[0] for name in names} - {"__main__"})


def test_nothing_planted_beside_the_archive_is_imported(execute, small, samples, here):
    bundle = here / "bundle"
    bundle.mkdir()
    archive.write_program(str(bundle))
    shutil.copy(small.export / "model.onnx", bundle)
    names = modules_of_a_run(execute, bundle, samples[0])
    assert {"json", "numpy", "PIL", "onnxruntime", "inference"} <= set(names)

    optional = ["torch", "pillow_heif", "executorch", "ai_edge_litert", "sitecustomize"]
    for name in [*names, "step3_infer", *optional]:
        (bundle / f"{name}.py").write_text("print('evil')\nraise SystemExit(0)\n")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    run = [archive.NAME, "--model", "model.onnx", samples[0]]
    answered = execute(*run, cwd=bundle, env=environment).done()
    verified = execute(archive.NAME, "--verify", cwd=bundle, env=environment)
    assert "evil" not in answered.out + answered.err + verified.out + verified.err
    assert "cannot read SHA256SUMS" in verified.err.replace(str(bundle) + os.sep, "")


def test_a_strangers_bundle_is_verified_by_a_trusted_archive(execute, small, samples, here):
    bundle, trusted = here / "bundle", here / "trusted"
    bundle.mkdir()
    trusted.mkdir()
    archive.write_program(str(trusted))
    shutil.copy(small.export / "model.onnx", bundle)
    (bundle / archive.NAME).write_text("print('evil')")
    (bundle / "json.py").write_text("print('evil')")
    (bundle / "SHA256SUMS").write_text("")
    command = ["-I", trusted / archive.NAME, "--verify", "--model", bundle / "model.onnx"]
    result = execute(*command, cwd=bundle)
    assert result.code == 1 and "evil" not in result.out
    assert f"{archive.NAME} is not listed" in result.err


# ---------------------------------------------------------------------------------------------- CSV
@pytest.mark.parametrize(
    ("text", "cell"),
    [
        ("=cmd|' /C calc'!A0", "'=cmd|' /C calc'!A0"),
        ("a;=HYPERLINK(1)", "a;'=HYPERLINK(1)"),
        ("＝1＋1", "'＝1＋1"),  # noqa: RUF001
        ("@SUM(1)", "'@SUM(1)"),
        ("a=b", "a=b"),
        (-0.5, "-0.5"),
        (None, ""),
    ],
)
def test_no_cell_is_a_formula(text, cell):
    assert csv_line([text]) == cell + "\n" or csv_line(["x", text]) == f"x,{cell}\n"


def test_sums_from_elsewhere(call, small, here):
    import hashlib

    shutil.copy(small.export / "model.onnx", here)
    digest = hashlib.sha256((here / "model.onnx").read_bytes()).hexdigest()
    (here / "SHA256SUMS").write_text(f"{digest}  model.onnx\n")
    sums = hashlib.sha256((here / "SHA256SUMS").read_bytes()).hexdigest()
    arguments = ["--verify", "--model", "model.onnx", "--sums-sha256"]
    call(step3_infer.main, *arguments, sums.upper()).done()
    call(step3_infer.main, *arguments, "0" * 64).error(1, "SHA256SUMS")


@pytest.mark.parametrize("kind", ["pipe", "link"])
def test_verify_neither_hangs_nor_follows_links(call, small, here, kind):
    shutil.copy(small.export / "model.onnx", here)
    if kind == "pipe":
        os.mkfifo("SHA256SUMS")
    else:
        os.symlink("/etc/passwd", "SHA256SUMS")
    call(step3_infer.main, "--verify", "--model", "model.onnx").error(1, "is not a regular file")


def test_a_model_is_no_part_of_the_fetched_runtime(call, small, here):
    (here / "web" / "ort").mkdir(parents=True)
    shutil.copy(small.export / "model.onnx", here / "web" / "ort")
    (here / "SHA256SUMS").write_text("")
    (here / "model.onnx").touch()
    result = call(step3_infer.main, "--verify", "--model", "model.onnx")
    assert result.code == 1 and "web/ort/model.onnx is not listed" in result.err


def test_a_device_without_numpy_is_told_so(execute, small, samples, here):
    (here / "poison").mkdir()
    (here / "poison" / "numpy.py").write_text("raise ImportError('No module named numpy')")
    archive.write_program(str(here))
    environment = {**os.environ, "PYTHONPATH": str(here / "poison")}
    result = execute(archive.NAME, samples[0], cwd=here, env=environment)
    result.error(1, "numpy and Pillow are needed", "pip install numpy pillow")
