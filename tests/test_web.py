"""The browser page (deploy/web) in headless Chromium: step 3's predictions, clear messages, nothing
uploaded.

Needs chromium, chromedriver, and the two files of onnxruntime-web: in $ORT_WEB, in deploy/web/ort,
or where .ci/run keeps them. `sh deploy/web/get-ort.sh` fetches them.
"""

import base64
import functools
import http.server
import io
import json
import os
import re
import shutil
import subprocess
import tempfile
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from conftest import ROOT, onnx_with, same_threads
from odd_files import odd_files
from PIL import Image
from specs import HONEST, REFUSED, TAKEN, changed_text
from turned_files import turned_files

import model
import step1_train
import step2_export
from deploy import bundle
from deploy.exporters import Source, export_onnx
from inference.predict import Model, decode_for, predict
from inference.self_test import self_test

WEB = ROOT / "deploy" / "web"
VERSION = re.search(r"^version=(\S+)$", (WEB / "get-ort.sh").read_text(), re.MULTILINE)[1]
CACHE = (
    Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    / "threestep"
    / f"ort-web-{VERSION}"
)
FOLDERS = [Path(folder) for folder in (os.environ.get("ORT_WEB"), WEB / "ort", CACHE) if folder]
RUNTIME = ("ort.wasm.bundle.min.js", "ort-wasm-simd-threaded.wasm")
ORT = next(
    (folder for folder in FOLDERS if all((folder / name).is_file() for name in RUNTIME)), None
)
CHROMIUM, DRIVER = (
    shutil.which("chromium") or shutil.which("google-chrome"),
    shutil.which("chromedriver"),
)
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--enable-unsafe-swiftshader",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1280,900",
]
# of a probability: decoders round JPEGs differently, and the page displays two decimals
TOLERANCE = 1e-3
HOSTILE = [
    "<img src=x onerror=\"document.title='run'\">",
    "\u202e<script>document.title='run'</script>",
    "w" * 90,
    "\u2069\u2069\u202eturned",
    "a" + "\u0301" * 255,
]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (CHROMIUM and DRIVER), reason="the page needs chromium and chromedriver"
    ),
    pytest.mark.skipif(not ORT, reason=f"no onnxruntime-web {VERSION}: sh deploy/web/get-ort.sh"),
]


class Browser:
    """Chromium through chromedriver's own HTTP interface (W3C WebDriver), which needs no
    package."""

    def __init__(self, folder):
        # The profile is in `folder`: chromedriver leaves one behind at every start.
        options = {"stdout": subprocess.PIPE, "text": True, "env": {**os.environ, "TMPDIR": folder}}
        self.process = subprocess.Popen([DRIVER, "--port=0"], **options)
        ready = (re.search(r"successfully on port (\d+)", line) for line in self.process.stdout)
        self.address = f"http://127.0.0.1:{next(match for match in ready if match)[1]}/session"
        chrome = {"binary": CHROMIUM, "args": FLAGS}
        options = {"goog:chromeOptions": chrome, "goog:loggingPrefs": {"performance": "ALL"}}
        self.address += "/" + self.ask("", capabilities={"alwaysMatch": options})["sessionId"]

    def ask(self, path, method="POST", **body):
        data = json.dumps(body).encode() if method == "POST" else None
        request = urllib.request.Request(
            self.address + path, data, {"content-type": "application/json"}, method=method
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return json.load(response)["value"]
        except urllib.error.HTTPError as error:
            raise AssertionError(error.read().decode()) from None

    def run(self, script, *arguments):
        """Run JavaScript in the page; a promise is waited for."""
        return self.ask("/execute/sync", script=script, args=arguments)

    def text(self, selector):
        return self.run(
            "return Array.from(document.querySelectorAll(arguments[0]), (e) => e.textContent)",
            selector,
        )

    def until(self, condition):
        """Wait for a JavaScript expression to become true."""
        end = time.monotonic() + 60
        while not self.run(f"return document.readyState === 'complete' && ({condition})"):
            assert time.monotonic() < end, f"never: {condition}\n{self.text('body')}"
            time.sleep(0.02)

    def open(self, address):
        """Open a page and wait until it has a model or displays a problem; -> the problem's
        text."""
        self.ask("/url", url=address)
        self.until("$('status').textContent === 'Ready.' || !$('problem').hidden")
        return self.text("#problem")[0]

    def choose(self, *paths):
        """Choose files as a user does, and wait for the results."""
        (element,) = self.ask("/element", using="css selector", value="#files").values()
        self.run("$('results').replaceChildren()")
        self.ask(f"/element/{element}/value", text="\n".join(map(str, paths)))
        self.until(
            f"$('results').children.length === {len(paths)}"
            " && !$('status').textContent.endsWith('…')"
        )

    def command(self, name, **parameters):
        """A command of the DevTools protocol."""
        return self.ask("/goog/cdp/execute", cmd=name, params=parameters)

    def quit(self):
        try:
            self.ask("", "DELETE")
        finally:
            self.process.terminate()
            self.process.wait()
            self.process.stdout.close()


@pytest.fixture(scope="module")
def browser():
    # A short path: chromium puts sockets there.
    with tempfile.TemporaryDirectory(prefix="web-", ignore_cleanup_errors=True) as folder:
        browser = Browser(folder)
        yield browser
        browser.quit()


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


def copy_page(folder):
    """Copy the page into a new folder, and link its runtime there."""
    (folder / "ort").mkdir(parents=True)
    for file in WEB.iterdir():
        if file.suffix in (".html", ".css", ".js"):
            shutil.copy(file, folder)
    for name in RUNTIME:
        (folder / "ort" / name).symlink_to((ORT / name).resolve())


def spec_of(path):
    return {entry.key: entry.value for entry in onnx.load(path).metadata_props}["spec"]


def export(folder, *arguments):
    """Train and export in a directory; -> the path of model.onnx."""
    with pytest.MonkeyPatch.context() as patch, same_threads():
        patch.chdir(folder)
        assert step1_train.main([*arguments, "--name", "run"]) == 0
        assert step2_export.main(["--format", "onnx"]) == 0
    return folder / "exports" / "run" / "model.onnx"


@pytest.fixture(scope="module")
def colour(tmp_path_factory):
    """A network that distinguishes red, green and blue noise: swapped channels change its
    predictions."""
    folder, rng = tmp_path_factory.mktemp("colour"), np.random.default_rng(0)
    for index, name in enumerate(("red", "green", "blue")):
        (folder / "photos" / name).mkdir(parents=True)
        for number in range(20):
            pixels = rng.integers(0, 160, (12, 16, 3), dtype=np.uint8)
            pixels[:, :, index] += 60
            Image.fromarray(pixels).save(folder / "photos" / name / f"{number}.png")
    return export(
        folder,
        *[
            "--dataset",
            "folder",
            "--data-dir",
            "photos",
            "--model",
            "mlp",
            "--hidden",
            "16",
            "--epochs",
            "8",
        ],
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory, trained, colour):
    """(directory, address) of a server: /web/ is the page with the digits' model above it, as in a
    bundle."""
    folder = tmp_path_factory.mktemp("site")
    for name in ("web", "none/web", "unscripted", "unbinary"):
        copy_page(folder / name)
    (folder / "unscripted" / "ort" / RUNTIME[0]).unlink()
    (folder / "unbinary" / "ort" / RUNTIME[1]).unlink()
    shutil.copy(trained.export / "model.onnx", folder)
    shutil.copy(colour, folder / "colour.onnx")
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Quiet, directory=folder)
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield folder, f"http://localhost:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Images of several sizes and of every mode that browsers know, some with transparent
    pixels."""
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for height, width in (8, 8), (12, 16), (43, 57), (120, 200), (1, 1), (1, 1500), (700, 600):
        # Smooth, so that wrong sizes and positions matter more than single pixels.
        small = Image.fromarray(rng.integers(0, 256, (4, 3, 3), dtype=np.uint8))
        small.resize((width, height), Image.Resampling.BICUBIC).save(
            folder / f"rgb-{width}x{height}.png"
        )
    base = Image.open(folder / "rgb-57x43.png")
    for mode in ("L", "P", "1", "LA", "RGBA"):
        base.convert(mode).save(folder / f"mode-{mode}.png")
    grey = np.asarray(base.convert("L")).astype(np.uint16)
    Image.fromarray(grey * 257).save(folder / "sixteen.png")
    alpha = rng.integers(0, 256, (43, 57, 1), dtype=np.uint8)
    alpha *= rng.integers(0, 2, (43, 57, 1), dtype=np.uint8)
    Image.fromarray(np.concatenate([np.asarray(base), alpha], 2)).save(folder / "alpha.png")
    turned = Image.Exif()
    turned[0x0112] = 6
    base.save(folder / "turned.jpg", exif=turned, quality=90)
    return sorted(folder.iterdir())


def cards(browser):
    """The predictions on the page: for each image a dict of class name -> probability, in order."""
    script = """const texts = (row) => Array.from(row.children, (part) => part.textContent);
        return Array.from(document.querySelectorAll("article"), (card) =>
            Array.from(card.querySelectorAll("li"), texts))"""
    rows = browser.run(script)
    return [{name: float(text.removesuffix("%")) / 100 for name, text, _ in card} for card in rows]


def known_shares(browser):
    """How familiar the images on the page look, by the page; None where it does not say it."""
    script = """return Array.from(document.querySelectorAll("article"),
        (card) => card.querySelector(".known .percent")?.textContent ?? null)"""
    return [text and float(text.removesuffix("%")) / 100 for text in browser.run(script)]


def verdicts(browser):
    """For each image "unknown" or "unsure", or else its best guess, as in step 3's `label`."""
    script = """return Array.from(document.querySelectorAll("article"), (card) =>
        card.querySelector(".verdict:not([hidden]) strong")?.textContent
            ?? card.querySelector("li bdi").textContent)"""
    return browser.run(script)


def set_limit(browser, name, text):
    """Type a threshold as a user does, and leave the input; -> what the page says then."""
    (element,) = browser.ask("/element", using="css selector", value=name).values()
    browser.run("$('status').textContent = ''")
    # Control and A, backspace, the text, Tab: WebDriver's own way to clear an input leaves it as
    # well.
    browser.ask(f"/element/{element}/value", text=f"\ue009a\ue000\ue003{text}\ue004")
    return browser.text("#status")[0]


def assert_as_step3(browser, file, paths):
    model = Model(str(file))
    for path, card, known in zip(paths, cards(browser), known_shares(browser), strict=True):
        image = decode_for(model, path, model.max_pixels)[None]
        (expected,), shares = model.run(image)
        share = (
            None if shares is None else pytest.approx(shares[0], rel=0, abs=known_tolerance(path))
        )
        assert known == share, path
        expected = dict(zip(model.spec["classes"], expected.tolist(), strict=True))
        best = sorted(expected.values(), reverse=True)[:5]
        assert len(card) == len(best) and max(expected, key=expected.get) == next(iter(card)), path
        assert card == pytest.approx(
            {name: expected[name] for name in card}, rel=0, abs=TOLERANCE
        ), path
        assert list(card.values()) == pytest.approx(best, rel=0, abs=TOLERANCE), path


def known_tolerance(path):
    """Of a JPEG the decoders round differently, which moves `known` by some of its steps."""
    return 0.1 if path.suffix == ".jpg" else TOLERANCE


@pytest.mark.parametrize("name", ["model.onnx", "colour.onnx"])
def test_predictions_are_those_of_step3(browser, site, pictures, samples, name):
    folder, address = site
    assert (
        browser.open(f"{address}/web/" + (f"?model=../{name}" if name == "colour.onnx" else ""))
        == ""
    )
    chosen = [*pictures, *samples[:3]]
    browser.choose(*chosen)
    assert_as_step3(browser, folder / name, chosen)
    assert browser.text("article h2") == [path.name for path in chosen]
    times = browser.text("article p:first-of-type")
    assert len(times) == len(chosen)
    assert not [text for text in times if not re.search(r"\d pixels · \d+(\.\d)? ms$", text)]
    assert "passed" in browser.text("#selftest")[0]


@pytest.mark.parametrize("fit", ["stretch", "crop", "letterbox"])
def test_a_network_of_any_shape_gets_images_of_any_shape(browser, site, pictures, fit):
    network = model.build("linear", channels=3, classes=3, image_size=(6, 13))
    torch.nn.init.normal_(network.layers[-1].weight, std=0.2)
    deployable = model.Deployable(network, (6, 13), [0.5] * 3, [0.2] * 3, fit=fit).eval()
    spec = {**HONEST, "channels": 3, "classes": ["a", "b", "c"], "image_size": [6, 13]}
    folder, address = site
    file = folder / f"wide-{fit}.onnx"
    export_onnx(Source(deployable, {**spec, "fit": fit, "known": None}), file)

    browser.open(f"{address}/web/?model=../{file.name}")
    browser.choose(*pictures)
    assert_as_step3(browser, file, pictures)
    assert "resized to 6 \u00d7 13" in " ".join(browser.text("#about dd"))


@pytest.mark.parametrize("ground", ["white", "black", None])
def test_transparent_pixels_lie_on_the_ground_of_the_spec(browser, site, pictures, ground):
    folder, address = site
    file = onnx_with(folder / "colour.onnx", folder / f"on-{ground}.onnx", ground=ground)
    browser.open(f"{address}/web/?model=../{file.name}")
    browser.choose(*pictures)
    assert_as_step3(browser, file, pictures)

    said = f"transparent pixels, laid on {ground}" if ground else "whose alpha the model drops"
    told = [
        path.name
        for path, text in zip(pictures, browser.text("article"), strict=True)
        if said in text
    ]
    assert told == ["alpha.png"]


@pytest.fixture(scope="module")
def strange(samples, tmp_path_factory):
    """Paths of the samples and of images that look like none of them."""
    folder = tmp_path_factory.mktemp("strange")
    noise = np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8)
    for name, pixels in ("noise", noise), ("black", noise * 0), ("photo", np.tile(noise, (6, 8))):
        Image.fromarray(pixels).save(folder / f"{name}.png")
    return [*samples, *sorted(folder.iterdir())]


def as_step3(file, paths, reject, min_probability):
    """The labels of step 3 with these thresholds."""
    model = Model(str(file))
    model.reject, model.min_probability = reject, min_probability
    return [predict(path, model)["label"] for path in paths]


def test_unfamiliar_images_are_unknown_and_improbable_answers_unsure(browser, site, strange):
    folder, address = site
    file = folder / "model.onnx"
    assert browser.open(f"{address}/web/") == ""
    assert browser.run("return [$('reject').value, $('least').value, $('familiar').hidden]") == [
        "",
        "",
        False,
    ]
    browser.choose(*strange)
    assert_as_step3(browser, file, strange)
    assert verdicts(browser) == as_step3(file, strange, None, None)
    shown = cards(browser)
    said = set_limit(browser, "#reject", "99")
    labels = verdicts(browser)
    assert labels == as_step3(file, strange, 0.99, None) and labels[-2] == "unknown"  # of the noise
    assert said == f"{len(strange)} images: {labels.count('unknown')} unknown, 0 unsure."
    assert cards(browser) == shown  # the best guess is still there
    assert "known is below 1%" in browser.text("article:nth-last-child(2) .verdict")[0]
    set_limit(browser, "#least", "99.999")
    labels = verdicts(browser)
    assert labels == as_step3(file, strange, 0.99, 0.99999) and "unsure" in labels
    set_limit(browser, "#reject", "")
    assert verdicts(browser) == as_step3(file, strange, None, 0.99999)
    browser.choose(strange[-2])
    assert verdicts(browser) == ["unsure"]
    assert re.search("noise.png.*: unsure; best guess", browser.text("#status")[0])


def test_promises_are_kept_as_step3_keeps_them(browser, site, strange):
    folder, address = site
    tops = [predict(path, Model(str(folder / "model.onnx")), top_k=10)["top"] for path in strange]
    own = sorted(entry["probability"] for top in tops for entry in top if entry["label"] == "8")
    threshold = (own[6] + own[7]) / 2  # reached by all but seven, none of them only just
    recall = {"kind": "recall", "name": "8", "share": 0.9, "threshold": threshold}
    accuracy = {"kind": "accuracy", "share": 0.95, "threshold": 0.9999}
    file = onnx_with(
        folder / "model.onnx", folder / "promised.onnx", promises=[accuracy, recall], reject=0.99
    )
    assert browser.open(f"{address}/web/?model=../promised.onnx") == ""
    browser.choose(*strange)
    labels = verdicts(browser)
    assert labels == as_step3(file, strange, 0.99, None)
    assert {"unsure", "unknown", "8"} < set(labels) and labels.count("8") > 1
    assert "at least 95%" in browser.text("#about dl")[0]
    set_limit(browser, "#least", "100")  # the stricter of both counts, and no class is taken back
    assert verdicts(browser) == as_step3(file, strange, 0.99, 1.0)


def test_the_files_own_thresholds_count_until_they_are_changed(browser, site, strange):
    folder, address = site
    own = onnx_with(
        folder / "model.onnx", folder / "own.onnx", reject=0.995, min_probability=0.9999
    )
    browser.open(f"{address}/web/?model=../own.onnx")
    assert browser.run("return [$('reject').value, $('least').value]") == ["99.5", "99.99"]
    browser.choose(*strange)
    assert verdicts(browser) == as_step3(own, strange, 0.995, 0.9999) and "unknown" in verdicts(
        browser
    )
    for wrong in ("101", "-1"):
        assert "number from 0 to 100" in set_limit(browser, "#reject", wrong)
        assert browser.run("return $('reject').getAttribute('aria-invalid')") == "true"
        assert verdicts(browser) == as_step3(own, strange, 0.995, 0.9999)
    set_limit(browser, "#reject", "50")
    assert browser.run("return $('reject').hasAttribute('aria-invalid')") is False
    assert verdicts(browser) == as_step3(own, strange, 0.5, 0.9999)


def test_files_without_known_go_on_working(browser, site, strange):
    folder, address = site
    older = onnx_with(folder / "model.onnx", folder / "older.onnx", known=None)
    assert browser.open(f"{address}/web/?model=../older.onnx") == ""
    browser.choose(*strange)
    assert_as_step3(browser, older, strange)
    assert set(known_shares(browser)) == {None} and browser.run("return $('familiar').hidden")
    set_limit(browser, "#least", "100")
    assert verdicts(browser) == as_step3(older, strange, None, 1)
    assert "of known" not in browser.text("#selftest")[0]


def test_thresholds_have_names_for_screen_readers(browser, site):
    browser.open(f"{site[1]}/web/")
    for name, words in ("#reject", "call others unknown"), ("#least", "unsure"):
        (element,) = browser.ask("/element", using="css selector", value=name).values()
        assert words in browser.ask(f"/element/{element}/computedlabel", "GET")


# Decodes files of the server -> [height, width, pixels] or the text of the problem of each.
PIXELS = """return (async () => {
    const found = [];
    for (const [address, channels, white, ground] of arguments[0]) {
        const file = new File([await (await fetch(address)).blob()], "file");
        try {
            const image = await decode(file, white);
            const { pixels } = readPixels(image, channels, ground);
            const { width, height } = image.bitmap;
            const place = placement(image.orientation, width, height);
            image.bitmap.close();
            found.push([place.height, place.width, Array.from(pixels)]);
        } catch (error) {
            found.push(error instanceof Problem ? error.message : error.stack);
        }
    }
    return found;
})()"""
# What Chromium decodes of the odd files, by suffix.
DECODED = (".png", ".jpg", ".webp", ".bmp", ".gif", ".avif", ".ico")


def pixels_in(browser, site, files, channels):
    """What the page decodes of files [(name, content, white, ground)]: for each the pixels, uint8
    [height, width, channels], or the text of the problem."""
    folder, address = site
    (folder / "files").mkdir(exist_ok=True)
    asked = []
    for name, content, white, ground in files:
        (folder / "files" / name).write_bytes(content)
        asked.append((f"../files/{name}", channels, white, ground))

    browser.open(f"{address}/web/")
    results = []
    for found in browser.run(PIXELS, asked):
        if isinstance(found, list):
            height, width, pixels = found
            found = np.array(pixels, np.uint8).reshape(height, width, channels)
        results.append(found)
    return results


def farthest(found, expected):
    """The largest difference of two images in levels; infinite for other sizes and problems."""
    if isinstance(found, str) or found.shape != expected.shape:
        return np.inf
    return np.abs(found.astype(int) - expected).max()


@pytest.mark.parametrize("channels", [1, 3])
def test_odd_files_have_the_pixels_that_they_hold(browser, site, channels):
    files = list(odd_files())
    asked = [(file.name, file.content, file.white, file.ground) for file in files]

    wrong = {}
    for file, found in zip(files, pixels_in(browser, site, asked, channels), strict=True):
        expected = file.rgb if channels == 3 else file.grey[..., None]
        if Path(file.name).suffix in DECODED:
            is_right = farthest(found, expected) <= 1
        else:
            is_right = isinstance(found, str) and "which this page cannot decode" in found
        if not is_right:
            wrong[file.name] = found if isinstance(found, str) else farthest(found, expected)
    assert not wrong


def test_exif_turns_images_by_its_orientation_alone(browser, site):
    """As in Python: see turned_files.py for what else the EXIF holds."""
    files = list(turned_files())
    asked = [(name, content, 65535, None) for name, content, _ in files]
    wrong = {}
    for (name, _, expected), found in zip(files, pixels_in(browser, site, asked, 3), strict=True):
        if farthest(found, expected) > 1:
            wrong[name] = found if isinstance(found, str) else farthest(found, expected)
    assert not wrong


def test_thumbnails_are_upright(browser, site, tmp_path):
    expected = {}
    for name, content, pixels in turned_files():
        if name.startswith("turned-") and name.endswith(".png"):
            (tmp_path / name).write_bytes(content)
            expected[name] = pixels

    browser.open(f"{site[1]}/web/")
    browser.choose(*(tmp_path / name for name in expected))
    script = """return Array.from(document.querySelectorAll("article canvas"), (canvas) => {
        const { width, height } = canvas;
        const { data } = canvas.getContext("2d").getImageData(0, 0, width, height);
        return [height, width, Array.from(data)];
    })"""
    for found, pixels in zip(browser.run(script), expected.values(), strict=True):
        height, width, data = found
        rgba = np.array(data, np.uint8).reshape(height, width, 4)
        assert farthest(rgba[..., :3], pixels) == 0


def test_every_alpha_of_every_level_is_composited(browser, site):
    levels = np.arange(256, dtype=np.uint8)
    rgba = np.stack([*np.meshgrid(levels, levels[::-1]), *np.meshgrid(levels, levels)[::-1]], 2)
    content = io.BytesIO()
    Image.fromarray(rgba).save(content, "PNG")
    alpha = rgba[..., 3:].astype(int)
    for ground, level in (("white", 255), ("black", 0)):
        expected = (rgba[..., :3] * alpha + level * (255 - alpha) + 127) // 255
        asked = [("alphas.png", content.getvalue(), 65535, ground)]
        (found,) = pixels_in(browser, site, asked, 3)
        assert farthest(found, expected) <= 1


def test_sixteen_bit_greys_are_scaled_by_the_white_of_the_spec(browser, site, samples, tmp_path):
    folder, address = site
    file = onnx_with(folder / "model.onnx", folder / "twelve.onnx", white=4095)
    paths = []
    for path in samples[:4]:
        grey = np.asarray(Image.open(path).convert("L"))
        paths.append(tmp_path / f"{path.stem}-16.png")
        Image.fromarray((grey.astype(np.uint16) * 4095 + 127) // 255).save(paths[-1])
    assert browser.open(f"{address}/web/?model=../twelve.onnx") == ""
    browser.choose(*paths, samples[0])
    assert_as_step3(browser, file, [*paths, samples[0]])


def test_photo_of_twelve_megapixels(browser, site, tmp_path):
    folder, address = site
    small = Image.fromarray(np.random.default_rng(1).integers(0, 256, (6, 8, 3), dtype=np.uint8))
    small.resize((4000, 3000), Image.Resampling.BILINEAR).save(tmp_path / "photo.jpg", quality=90)
    browser.open(f"{address}/web/?model=../colour.onnx")
    browser.choose(tmp_path / "photo.jpg")
    assert_as_step3(browser, folder / "colour.onnx", [tmp_path / "photo.jpg"])


def test_bad_images_are_named_and_the_others_predicted(browser, site, samples, tmp_path):
    _, address = site
    (tmp_path / "<b>text.png").write_text("no image")
    (tmp_path / "empty.png").touch()
    (tmp_path / "half.png").write_bytes(samples[0].read_bytes()[:60])
    browser.open(f"{address}/web/")
    browser.choose(
        tmp_path / "<b>text.png", tmp_path / "empty.png", samples[1], tmp_path / "half.png"
    )
    texts = browser.text("article")
    assert (
        "<b>text.png: not an image" in texts[0]
        and "empty.png: empty file" in texts[1]
        and "half.png: " in texts[3]
    )
    assert next(iter(cards(browser)[2])) == "1"
    assert browser.text("#status") == ["1 of 4 images predicted."]


def test_drop_paste_and_the_samples_inside_the_file(browser, site, samples):
    _, address = site
    browser.open(f"{address}/web/")
    script = """const bytes = Uint8Array.from(atob(arguments[1]), (c) => c.charCodeAt(0));
        const data = new DataTransfer();
        data.items.add(new File([bytes], arguments[0] + ".png"));
        const options = { bubbles: true, cancelable: true };
        Object.assign(options, { dataTransfer: data, clipboardData: data });
        const kind = arguments[0] === "drop" ? DragEvent : ClipboardEvent;
        const event = new kind(arguments[0], options);
        return document.body.dispatchEvent(event);"""
    png = base64.b64encode(samples[3].read_bytes()).decode()
    # An event that is not cancelled would make the browser show the image instead of the page.
    assert browser.run(script, "drop", png) is False
    browser.run(script, "paste", png)
    browser.run("$('samples').click()")
    count = len(json.loads(spec_of(site[0] / "model.onnx"))["golden"])
    browser.until(
        f"$('results').children.length === {2 + count}"
        " && $('status').textContent.endsWith('predicted.')"
    )
    assert [next(iter(card)) for card in cards(browser)][-2:] == ["3", "3"]  # the newest are on top


def test_keyboard_alone(browser, site):
    _, address = site
    browser.open(f"{address}/web/")
    browser.run(
        "window.clicks = 0;"
        "$('files').addEventListener('click', (e) => { e.preventDefault(); clicks += 1 })"
    )
    for key in "\ue004", "\ue007", " ":  # Tab, Enter, space
        actions = [{"type": kind, "value": key} for kind in ("keyDown", "keyUp")]
        browser.ask("/actions", actions=[{"type": "key", "id": "keys", "actions": actions}])
    focus = "const at = document.activeElement;"
    focus += "return [at.id, parseFloat(getComputedStyle(at).outlineWidth) > 1]"
    assert browser.run(focus) == ["drop", True] and browser.run("return window.clicks") == 2


@pytest.fixture
def phone(browser):
    """A screen of 390 x 844 points."""
    browser.command(
        "Emulation.setDeviceMetricsOverride",
        width=390,
        height=844,
        deviceScaleFactor=2,
        mobile=True,
    )
    yield
    browser.command("Emulation.clearDeviceMetricsOverride")
    browser.command("Emulation.setEmulatedMedia", features=[])


def write_hostile(source, target, **changes):
    """The model with a class for each hostile name: the outputs of its network are repeated."""
    graph = onnx.load(source)
    output = graph.graph.output[0]
    for node in graph.graph.node:
        node.output[:] = ["few" if name == output.name else name for name in node.output]
    repeated = ["few"] * -(-len(HOSTILE) // 3)
    concat = onnx.helper.make_node("Concat", repeated, ["many"], axis=1)
    ends = [[0], [len(HOSTILE)], [1]]
    names = ["starts", "ends", "axes"]
    for name, values in zip(names, ends, strict=True):
        graph.graph.initializer.append(
            onnx.helper.make_tensor(f"hostile_{name}", onnx.TensorProto.INT64, [1], values)
        )
    inputs = ["many", *(f"hostile_{name}" for name in names)]
    graph.graph.node.extend([concat, onnx.helper.make_node("Slice", inputs, [output.name])])
    output.type.tensor_type.shape.dim[1].dim_value = len(HOSTILE)
    onnx.save(graph, target)
    onnx_with(target, target, classes=HOSTILE, golden=[], **changes)


def test_accents_stay_inside_their_elements(browser, site, pictures):
    """Hundreds of them on one letter would draw over the rest of the page."""
    folder, address = site
    accents = "a" + "\u0301" * 500
    write_hostile(folder / "colour.onnx", folder / "accents.onnx", dataset=accents, created=accents)
    browser.open(f"{address}/web/?model=../accents.onnx")
    browser.choose(*pictures[:1])
    browser.run("$('about').open = true")
    script = """const clips = (e) => getComputedStyle(e).overflowY !== "visible";
        const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), found = [];
        while (walker.nextNode()) {
            if (!walker.currentNode.data.includes("\u0301\u0301\u0301")) continue;
            let at = walker.currentNode.parentElement;
            while (at && !clips(at)) at = at.parentElement;
            const height = at?.getBoundingClientRect().height ?? 1e9;
            found.push([walker.currentNode.parentElement.localName, height]);
        }
        return found"""
    found = browser.run(script)
    assert {"bdi", "dd", "p"} <= {name for name, _ in found}
    assert max(height for _, height in found) < 250
    assert max(map(len, browser.text("#about dd")[1:])) <= 257


def test_specs_that_every_reader_refuses_or_takes(browser, site):
    """All in one page, which reads them from a file: one has 32 MiB."""
    folder, address = site
    honest = json.dumps(HONEST)
    changes = {**REFUSED, "honest": {}, **TAKEN}
    texts = {name: changed_text(honest, change) for name, change in changes.items()}
    (folder / "specs.json").write_text(json.dumps(texts))
    browser.open(f"{address}/web/")
    script = """return fetch("../specs.json").then((answer) => answer.json()).then((texts) => {
        const said = {};
        for (const [name, text] of Object.entries(texts)) {
            const content = new TextEncoder().encode(text);
            try { said[name] = parseBytes(content, "m.onnx") && "taken" }
            catch (error) { said[name] = error instanceof Problem ? error.message : error.stack }
        }
        return said;
    })"""
    said = browser.run(script)
    malformed = "m.onnx has a malformed spec: "
    assert {name: said[name] for name in REFUSED if malformed not in said[name]} == {}
    assert {said[name] for name in ("honest", *TAKEN)} == {"taken"}
    assert "channels must be 1 or 3" in said["channels two"] and "32 MiB" in said["large"]


def test_large_images_are_refused_before_they_are_decoded(browser, site, samples, tmp_path):
    Image.new("1", (20_000, 20_000)).save(tmp_path / "large.png")
    Image.new("1", (20_000, 20_000)).save(tmp_path / "large.bmp")
    Image.new("1", (65_536, 1)).save(tmp_path / "long.png")
    browser.open(f"{site[1]}/web/")
    names = ("large.png", "large.bmp", "long.png")
    browser.choose(*(tmp_path / name for name in names), samples[1])
    texts = browser.text("article")
    for text, name in zip(texts, names[:2], strict=False):
        assert text == f"{name}: has 20,000 x 20,000 pixels, more than 178,956,970."
    assert texts[2] == "long.png: has a side of 65,536 pixels, more than 65,535."
    assert next(iter(cards(browser)[3])) == "1"
    counting = """let decoded = 0;
        const decode = createImageBitmap;
        self.createImageBitmap = (...given) => { decoded += 1; return decode(...given) };
        self.decodedImages = () => decoded"""
    browser.run(counting)
    browser.choose(tmp_path / "large.png")
    assert browser.run("return decodedImages()") == 0


def test_outputs_that_are_no_probabilities(browser, site, samples):
    folder, address = site
    graph = onnx.load(folder / "model.onnx")
    output = graph.graph.output[0]
    for node in graph.graph.node:
        node.output[:] = ["honest" if name == output.name else name for name in node.output]
    for name, factor in (("outside", 120.0), ("nan", float("nan"))):
        planted = onnx.ModelProto()
        planted.CopyFrom(graph)
        scale = onnx.helper.make_tensor("factor", onnx.TensorProto.FLOAT, [], [factor])
        planted.graph.initializer.append(scale)
        planted.graph.node.append(onnx.helper.make_node("Mul", ["honest", "factor"], [output.name]))
        onnx.save(planted, folder / f"{name}.onnx")
    browser.open(f"{address}/web/?model=../outside.onnx")
    browser.choose(samples[0])
    words = f"{samples[0].name}: the model computes probabilities outside 0..1 for this image."
    assert browser.text("article") == [words]
    browser.open(f"{address}/web/?model=../nan.onnx")
    browser.choose(samples[0])
    assert "the model computes NaN or infinity for this image" in browser.text("article")[0]


def test_class_names_are_text_and_fit_a_phone(browser, phone, site, pictures):
    folder, address = site
    changes = {"dataset": HOSTILE[0], "model": HOSTILE[1]}
    write_hostile(folder / "colour.onnx", folder / "hostile.onnx", **changes)
    backgrounds = []
    for scheme in ("light", "dark"):
        browser.command(
            "Emulation.setEmulatedMedia",
            features=[{"name": "prefers-color-scheme", "value": scheme}],
        )
        assert browser.open(f"{address}/web/?model=../hostile.onnx") == ""
        browser.choose(*pictures[:2])
        browser.run("$('about').open = true")
        wide, inner = browser.run("return [document.scrollingElement.scrollWidth, innerWidth]")
        assert wide <= inner == 390
        background = browser.run("return getComputedStyle(document.body).backgroundColor")
        backgrounds.append(int(re.search(r"\d+", background)[0]))
    assert backgrounds[0] > 200 and backgrounds[1] < 60
    turning = re.compile("[\u202a-\u202e\u2066-\u2069]")
    shown = [turning.sub("\ufffd", name) for name in HOSTILE]
    assert set(cards(browser)[0]) == set(shown)
    assert {shown[0], shown[1]} <= set(browser.text("#about dd"))
    # The page's own marks around a name are in pairs: none of a name ends them.
    marks = "".join(turning.findall(browser.text("body")[0]))
    assert marks and not marks.replace("\u2068\u2069", "")
    assert browser.run("return document.querySelectorAll('img, body script').length") == 0
    assert browser.run("return document.title") == "Image classifier"


@pytest.mark.parametrize(
    ("page", "words"),
    [
        ("none/web/", "no model at model.onnx or ../model.onnx"),
        (
            "unscripted/?model=../colour.onnx",
            "runtime is missing: ort/ort.wasm.bundle.min.js; sh get-ort.sh",
        ),
        (
            "unbinary/?model=../colour.onnx",
            "runtime is missing: ort/ort-wasm-simd-threaded.wasm; sh get-ort.sh",
        ),
        ("web/?model=../truncated.onnx", "../truncated.onnx is not an ONNX file; ends early"),
        ("web/?model=../bare.onnx", "../bare.onnx carries no spec; step2_export.py"),
        ("web/?model=../broken.onnx", "../broken.onnx has a malformed spec"),
        ("web/?model=../newer.onnx", "schema 2; schemas up to 1"),
        ("web/?model=../rejecting.onnx", "malformed spec; reject"),
        ("web/?model=../unlimited.onnx", "malformed spec; min_probability"),
        ("web/?model=../intolerant.onnx", "malformed spec; known must be null, or an object"),
        ("web/?model=../lying.onnx", "do not trust; 2 classes, 3 outputs"),
        ("web/?model=../changed.onnx", "do not trust; self-test FAILED; largest difference"),
        ("web/?model=//example.org/model.onnx", "no model at //example.org/model.onnx"),
        ("web/?model=../page.html", "no model at ../page.html"),
    ],
)
def test_problems_are_displayed(browser, site, bad_models, page, words):
    said = browser.open(f"{site[1]}/{page}").lower()
    assert not [word for word in words.lower().split("; ") if word not in said], said
    assert browser.text("#status")[0] == ("Ready." if "trust" in said else "")


@pytest.mark.parametrize(
    ("changes", "passes"),
    [
        ({}, {1e-5: True, 1e-3: False}),
        ({"quantization": "int8, per channel"}, {5e-3: True, 1.5e-2: True, 3e-2: False}),
        ({"self_test_tolerance": 2e-3}, {1e-3: True, 5e-3: False}),
        ({"self_test_tolerance": 1e-4, "quantization": "int8"}, {5e-3: False}),
    ],
)
def test_self_test_tolerance_is_that_of_step3(browser, site, changes, passes):
    folder, address = site
    spec = json.loads(spec_of(folder / "colour.onnx"))
    spec.pop("self_test_tolerance", None)
    for difference, passed in passes.items():
        golden = json.loads(json.dumps(spec["golden"]))
        golden[0]["probabilities"][1] += difference
        text = json.dumps({**spec, "golden": golden, **changes})
        # one each: a server's dates have whole seconds
        name = f"moved-{'-'.join(changes)}-{difference}.onnx"
        file = onnx_with(folder / "colour.onnx", folder / name, text)
        assert self_test(Model(str(file))).passed == passed
        problem = browser.open(f"{address}/web/?model=../{name}")
        assert ("Self-test FAILED" in problem) != passed
        assert ("Self-test passed" in browser.text("#selftest")[0]) == passed


def test_self_test_covers_known(browser, site):
    folder, address = site
    spec = json.loads(spec_of(folder / "model.onnx"))
    known, tolerance = spec["golden"][1]["known"], spec["known"]["tolerance"]
    for moved, passed in ((tolerance / 2, True), (2 * tolerance, False), (-2 * tolerance, False)):
        golden = json.loads(json.dumps(spec["golden"]))
        golden[1]["known"] = known + moved if known < 0.9 else known - moved
        name = f"known-{moved}.onnx"
        file = onnx_with(folder / "model.onnx", folder / name, golden=golden)
        assert self_test(Model(str(file))).passed == passed
        assert ("Self-test FAILED" in browser.open(f"{address}/web/?model=../{name}")) != passed
    golden[1]["known"] = None
    onnx_with(folder / "model.onnx", folder / "nothing.onnx", golden=golden)
    assert "golden samples do not match" in browser.open(f"{address}/web/?model=../nothing.onnx")


@pytest.fixture(scope="module")
def bad_models(site):
    folder, _ = site
    good = folder / "colour.onnx"
    golden = json.loads(spec_of(good))["golden"]
    onnx_with(good, folder / "bare.onnx")
    onnx_with(good, folder / "broken.onnx", "{no json")
    onnx_with(good, folder / "newer.onnx", schema=2)
    onnx_with(good, folder / "lying.onnx", classes=["a", "b"])
    onnx_with(good, folder / "rejecting.onnx", reject=99)
    onnx_with(good, folder / "unlimited.onnx", min_probability="0.5")
    onnx_with(good, folder / "intolerant.onnx", known={"tolerance": -1})
    changed = [{**sample, "probabilities": sample["probabilities"][::-1]} for sample in golden]
    onnx_with(good, folder / "changed.onnx", golden=changed)
    (folder / "truncated.onnx").write_bytes(good.read_bytes()[:-100])
    (folder / "page.html").write_text("what some servers send for a missing file")


def test_page_opened_as_a_file(browser):
    assert "http.server" in browser.open((WEB / "index.html").as_uri())


def test_browser_without_webassembly(browser, site):
    name = "Page.addScriptToEvaluateOnNewDocument"
    added = browser.command(name, source="delete window.WebAssembly")
    try:
        assert "no WebAssembly" in browser.open(f"{site[1]}/web/")
    finally:
        browser.command("Page.removeScriptToEvaluateOnNewDocument", identifier=added["identifier"])


def test_model_can_be_chosen_where_none_was_found(browser, site, samples):
    folder, address = site
    browser.open(f"{address}/none/web/")
    (element,) = browser.ask("/element", using="css selector", value="#files").values()
    browser.ask(f"/element/{element}/value", text=f"{folder / 'model.onnx'}\n{samples[7]}")
    browser.until("$('results').children.length === 1")
    assert next(iter(cards(browser)[0])) == "7" and browser.run("return $('problem').hidden")


def test_regression_takes_numbers(browser, site, tmp_path):
    folder, address = site
    shutil.copy(export(tmp_path, "--dataset", "linear", "--epochs", "2"), folder / "linear.onnx")
    assert browser.open(f"{address}/web/?model=../linear.onnx") == ""
    values = [0.1, 0.2, -0.3, 0.4, 5e-1]
    submit = "$('values').value = arguments[0]; $('numbers').requestSubmit()"
    browser.run(submit, ",".join(map(str, values)))
    browser.until("$('status').textContent.includes(': ')")
    name, value = re.fullmatch("\u2068(.+)\u2069: (.+)", browser.text("#status")[0]).groups()
    model = Model(str(folder / "linear.onnx"))
    expected = model.predict(np.array([values], np.float32))[0, 0]
    assert (
        float(value) == pytest.approx(expected, rel=1e-5, abs=1e-5)
        and name == model.spec["classes"][0]
    )
    assert "passed" in browser.text("#selftest")[0]
    browser.run(submit, "1,,3,4,5")
    browser.until("$('status').textContent.includes('takes 5 numbers')")


def test_nothing_leaves_this_server(browser, site, samples):
    """It examines the requests of all tests above."""
    _, address = site
    browser.open(f"{address}/web/")
    browser.choose(samples[0])
    refused = "return fetch(arguments[0], { mode: 'no-cors' }).then(() => 'sent', () => 'refused')"
    elsewhere = address.replace("localhost", "127.0.0.1")
    assert [browser.run(refused, f"{origin}/model.onnx") for origin in (address, elsewhere)] == [
        "sent",
        "refused",
    ]
    messages = [
        json.loads(entry["message"])["message"]
        for entry in browser.ask("/se/log", type="performance")
    ]
    asked = {
        m["params"]["request"]["url"]
        for m in messages
        if m["method"] == "Network.requestWillBeSent"
    }
    sent = {
        m["params"]["request"].get("hasPostData")
        for m in messages
        if m["method"] == "Network.requestWillBeSent"
    }
    assert f"{address}/web/ort/{RUNTIME[1]}" in asked and sent == {None}
    assert not [
        url for url in asked if not url.startswith((f"{address}/", "file://", "data:", "blob:"))
    ]


def test_a_bundle_works_from_its_root_and_from_its_web_folder(browser, site, samples, tmp_path):
    """With get-ort.sh's files, of which one is a link to the model above the folder."""
    folder, _ = site
    copy_page(tmp_path / "web")
    (tmp_path / "web" / "ort" / "model.onnx").symlink_to("../../model.onnx")
    shutil.copy(folder / "model.onnx", tmp_path)
    (tmp_path / "index.html").write_text(bundle.INDEX)
    for root in (tmp_path, tmp_path / "web"):
        handler = functools.partial(Quiet, directory=root)
        with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            try:
                browser.ask("/url", url=f"http://localhost:{server.server_port}/")
                browser.until("document.querySelector('#status')?.textContent === 'Ready.'")
                browser.choose(samples[3])
                assert next(iter(cards(browser)[0])) == "3"
            finally:
                server.shutdown()
