"""The Ray script on a single machine: over files, and over HTTP. RAY_PYTHON names a Python that has
ray."""

import asyncio
import contextlib
import http.client
import importlib.util
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from unittest.mock import ANY

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image
from test_bundle import export

PYTHON = os.environ.get("RAY_PYTHON") or (
    sys.executable if importlib.util.find_spec("ray") else None
)
SCRIPT = ROOT / "deploy" / "serving" / "ray_bundle.py"
needs_ray = pytest.mark.skipif(
    PYTHON is None, reason="ray is not installed: pip install 'ray[data]' uvicorn, or RAY_PYTHON"
)


@pytest.fixture(scope="module")
def edge(small, tmp_path_factory):
    """An unpacked bundle, whose file keeps 99 % of familiar images."""
    folder = tmp_path_factory.mktemp("serving")
    export(small, folder / "small", "--format", "onnx", "--reject", "0.99")
    with zipfile.ZipFile(folder / "small" / "small-bundle.zip") as archive:
        archive.extractall(folder)
    return folder / "small-bundle"


def is_as(expected):
    """What an answer must equal: a line of step 3's JSON for the same image."""
    numbers = {key: pytest.approx(expected[key], abs=1e-4) for key in ("probability", "known")}
    return {**numbers, "label": expected["label"]}


@pytest.fixture
def noise(tmp_path):
    """Path of an image like none of the digits."""
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8)).save(
        tmp_path / "noise.png"
    )
    return tmp_path / "noise.png"


@needs_ray
def test_files(edge, samples, noise, tmp_path):
    samples = [*samples, noise]
    (tmp_path / "photos").mkdir()
    for path in samples:
        shutil.copy(path, tmp_path / "photos")
    command = [PYTHON, SCRIPT, "files", edge, "photos"]
    subprocess.run([*command, "first"], cwd=tmp_path, check=True, capture_output=True, timeout=200)
    (tmp_path / "photos" / "broken.png").write_text("not an image")
    # As many workers as CPUs, and more: the tasks that read must not wait for them.
    command += ["answers", "--replicas", str(os.cpu_count() + 1)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.returncode == 1, done.stderr
    assert (
        f"error: photos: 1 of {len(samples) + 1} files could not be used, see answers"
        in done.stderr
    )
    lines = [
        line for file in (tmp_path / "answers").iterdir() for line in file.read_text().splitlines()
    ]
    answers = {os.path.basename(row["path"]): row for row in map(json.loads, lines)}
    assert answers.keys() == {"broken.png", *(path.name for path in samples)}
    assert "not an image" in answers["broken.png"]["error"]
    command = [sys.executable, "step3_infer.pyz", "--format", "json", *samples]
    done = subprocess.run(command, cwd=edge, check=True, capture_output=True, text=True)
    for row in map(json.loads, done.stdout.splitlines()):
        answer = answers[os.path.basename(row["path"])]
        assert "error" not in answer or answer["error"] is None  # Ray's columns may be null
        assert {key: answer[key] for key in ("probability", "known", "label")} == is_as(row)
        assert [entry["label"] for entry in answer["top"]] == [
            entry["label"] for entry in row["top"]
        ]
    assert answers["noise.png"]["label"] == "unknown"


@contextlib.contextmanager
def serving(bundle, *options):
    """Start the service with one worker process; yield its process and port."""
    command = [PYTHON, SCRIPT, "serve", bundle, "--port", "0", "--replicas", "1", *options]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as service:
        try:
            line = ""
            while "serving on" not in line:
                line = service.stdout.readline()
                assert line, "the service ended"
            yield service, int(re.search("port ([0-9]+)", line)[1])
        finally:
            service.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                service.wait(30)
            service.kill()


def send(port, body, method="POST", headers=None):
    """Status, headers and JSON of an answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    with contextlib.closing(connection):
        connection.request(method, "/", body, headers or {})
        reply = connection.getresponse()
        return reply.status, reply.headers, json.load(reply)


@needs_ray
def test_http(edge, noise):
    expected = json.loads((edge / "samples" / "expected.jsonl").read_text().splitlines()[0])
    content = (edge / expected["path"]).read_bytes()
    with serving(edge) as (_, port):
        status, _, answer = send(port, content)
        assert status == 200
        assert {key: answer[key] for key in ("probability", "known", "label")} == is_as(expected)

        _, _, strange = send(port, noise.read_bytes())
        assert strange["label"] == "unknown" and strange["top"][0]["label"] in "0123456789"

        status, _, answer = send(port, b"not an image")
        assert status == 400 and "not an image" in answer["error"]


def png_of(width, height):
    file = io.BytesIO()
    Image.new("RGB", (width, height)).save(file, "PNG")
    return file.getvalue()


def pid_of_worker(service):
    """The process that predicts, below a service's process."""
    listing = subprocess.run(["ps", "-eo", "pid=,ppid=,args="], capture_output=True, text=True)
    parents, workers = {}, []
    for line in listing.stdout.splitlines():
        pid, parent, name = line.split(None, 2)
        parents[int(pid)] = int(parent)
        if name.startswith("ray::Worker"):
            workers.append(int(pid))

    for worker in workers:
        ancestor = worker
        while ancestor in parents:
            ancestor = parents[ancestor]
            if ancestor == service.pid:
                return worker
    raise AssertionError("no worker process")


@needs_ray
@pytest.mark.skipif(sys.platform != "linux", reason="memory is limited on Linux only")
def test_hostile_requests(edge):
    """Slow, large, many and deadly requests are refused, and the next good one is answered."""
    content = sorted((edge / "samples").glob("*.png"))[0].read_bytes()
    limits = ("--max-body", "1", "--body-timeout", "3", "--timeout", "4", "--memory", "128")
    with serving(edge, *limits, "--queue", "4") as (service, port):
        slow = []
        for _ in range(20):
            connection = socket.create_connection(("127.0.0.1", port), timeout=60)
            connection.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 9999\r\n\r\nabc")
            slow.append(connection)
        assert send(port, content)[0] == 200  # while twenty bodies are on their way
        for connection in slow:
            assert connection.recv(99).startswith(b"HTTP/1.1 408 ")
            connection.close()

        for method in ("GET", "PUT", "DELETE"):
            status, headers, _ = send(port, content, method)
            assert status == 405 and headers["allow"] == "POST"
        assert send(port, content, headers={"Origin": "http://example.com"})[0] == 403
        assert send(port, content, headers={"Origin": f"http://localhost:{port}"})[0] == 200
        assert send(port, bytes(30 << 20))[0] == 413
        assert send(port, iter([bytes(1 << 20)] * 30))[0] == 413  # chunked, of undeclared length

        status, _, answer = send(port, png_of(9000, 9000))
        assert status == 400 and "more than --max-pixels 50,000,000" in answer["error"]
        status, _, answer = send(port, png_of(7000, 7000))
        assert status == 400 and "memory" in answer["error"]
        resident = int(subprocess.check_output(["ps", "-o", "rss=", str(pid_of_worker(service))]))
        assert resident < 400 << 10  # KiB: what it needs for itself, and the limit

        os.kill(pid_of_worker(service), signal.SIGKILL)
        statuses = [send(port, content)[0] for _ in range(2)]
        assert statuses == [500, 200]

        os.kill(pid_of_worker(service), signal.SIGSTOP)
        with ThreadPoolExecutor(20) as threads:
            replies = list(threads.map(lambda _: send(port, content), range(20)))
        statuses = [status for status, _, _ in replies]
        assert statuses.count(504) == 1 and statuses.count(200) == 4 and statuses.count(503) == 15
        assert all(headers["retry-after"] for status, headers, _ in replies if status == 503)
        assert all(list(answer) == ["error"] for status, _, answer in replies if status != 200)


# ------------------------------------------------------------------------------- without Ray
@pytest.fixture(scope="module")
def script():
    """The script as a module; nothing in these tests needs ray."""
    description = importlib.util.spec_from_file_location("ray_bundle", SCRIPT)
    module = importlib.util.module_from_spec(description)
    sys.modules["ray_bundle"] = module  # where dataclasses looks up annotations
    description.loader.exec_module(module)
    return module


class FakeProcess:
    """A worker process that does with an image what its content says."""

    started = 0

    def __init__(self):
        type(self).started += 1
        self.killed = False

    async def ready(self):
        if type(self).started == 2:  # the first replacement: its machine is restarting
            raise RuntimeError("no machine")

    async def predict(self, content):
        if content == b"slow":
            await asyncio.sleep(60)
        if content == b"brief":
            await asyncio.sleep(0.2)
        if content == b"deadly":
            raise RuntimeError("the process died")
        return {"label": content.decode()}, content == b"large"

    def kill(self):
        self.killed = True


@pytest.fixture
def service(script, monkeypatch):
    """A service with one fake process, started in a running event loop."""
    monkeypatch.setattr(FakeProcess, "started", 0)
    monkeypatch.setattr(script, "RETRY_SECONDS", 0.01)

    async def start(**options):
        limits = script.Limits(**{"max_body": 1, "timeout": 0.5, "body_timeout": 0.2, **options})
        pool = script.Pool(FakeProcess, limits)
        await pool.start(1)
        own = script.origins_of("127.0.0.1", 8000)
        return script.Service(pool, limits, own, {"https://shop.example"})

    return start


async def ask(service, *parts, method="POST", pause=0, gone=False, **headers):
    """Send a body in parts; return status, headers and JSON of the answer, or None without one."""
    messages = [{"type": "http.request", "body": part, "more_body": True} for part in parts]
    messages.append({"type": "http.disconnect"} if gone else {"type": "http.request"})
    sent = []

    async def receive():
        await asyncio.sleep(pause)
        return messages.pop(0)

    async def note(message):
        sent.append(message)

    named = [(key.replace("_", "-").encode(), value.encode()) for key, value in headers.items()]
    await service({"type": "http", "method": method, "headers": named}, receive, note)
    if not sent:
        return None
    answer = json.loads(sent[1]["body"] or "{}")
    return sent[0]["status"], {k.decode(): v.decode() for k, v in sent[0]["headers"]}, answer


def test_requests_are_checked(service):
    async def check():
        server = await service()
        assert await ask(server, b"ca", b"t") == (200, ANY, {"label": "cat"})
        for method in ("GET", "HEAD", "PUT", "DELETE", "OPTIONS"):
            status, headers, answer = await ask(server, b"cat", method=method)
            assert status == 405 and headers["allow"] == "POST" and list(answer) == ["error"]

        # Refused by the declared length alone, and by what arrives.
        assert (await ask(server, content_length="1048577"))[0] == 413
        assert (await ask(server, content_length="-1"))[0] == 413
        assert (await ask(server, bytes(1 << 20), b"x"))[0] == 413
        assert (await ask(server, b"c", b"a", b"t", pause=0.1))[0] == 408
        assert await ask(server, b"cat", gone=True) is None
        assert server.held == 0

        server.held = 8 << 20  # the bodies of other requests
        status, headers, _ = await ask(server, b"cat")
        assert status == 503 and headers["retry-after"] and server.held == 8 << 20

    asyncio.run(check())


def test_requests_of_other_origins(service):
    async def check():
        server = await service()
        for origin in ("http://localhost:8000", "http://127.0.0.1:8000", "http://[::1]:8000"):
            assert (await ask(server, b"cat", origin=origin))[0] == 200
        for origin in ("http://localhost", "https://localhost:8000", "http://evil.example", "null"):
            # A page may have pointed its own name at this machine.
            assert (await ask(server, b"cat", origin=origin, host=origin[7:]))[0] == 403
            assert (await ask(server, method="OPTIONS", origin=origin))[0] == 403

        shop = "https://shop.example"
        status, headers, _ = await ask(server, b"cat", origin=shop)
        assert status == 200 and headers["access-control-allow-origin"] == shop
        status, headers, _ = await ask(server, method="OPTIONS", origin=shop)
        assert status == 204 and headers["access-control-allow-methods"] == "POST"

    asyncio.run(check())


@pytest.mark.parametrize(("content", "status"), [(b"slow", 504), (b"deadly", 500), (b"large", 200)])
def test_processes_are_replaced(content, status, service, capsys):
    async def check():
        server = await service()
        first = await server.pool.idle.get()
        server.pool.idle.put_nowait(first)
        assert (await ask(server, content))[0] == status
        assert first.killed and server.pool.idle.empty()
        assert (await ask(server, b"cat"))[0] == 200
        assert FakeProcess.started == 3  # the second could not start

    asyncio.run(check())
    assert "note: replacing a worker process that" in capsys.readouterr().err


def test_queue_is_bounded(service):
    async def check():
        server = await service(queue=2)
        replies = await asyncio.gather(*(ask(server, b"brief") for _ in range(5)))
        assert sorted(status for status, _, _ in replies) == [200, 200, 200, 503, 503]

    asyncio.run(check())


@pytest.mark.skipif(sys.platform != "linux", reason="macOS and Windows have no such limit")
def test_memory_is_limited():
    program = (
        "import ray_bundle; ray_bundle.limit_memory(64 << 20); bytes(32 << 20); bytes(96 << 20)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=SCRIPT.parent, capture_output=True, text=True
    )
    assert done.returncode == 1 and done.stderr.splitlines()[-1] == "MemoryError"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["serve", "nowhere"], "no model.onnx in nowhere"),
        (["files", "here", "source"], "files needs a source and a target"),
        (["serve", "here", "source"], "serve takes neither"),
        (["serve", "here", "--replicas", "0"], "--replicas needs at least one"),
        (["files", "here", "nowhere", "target"], "no file or directory nowhere"),
        (["files", "here", "here", "target", "--port", "80"], "--port requires serve"),
        (["serve", "here", "--body-timeout", "nan"], "--body-timeout must be positive"),
        (["serve", "here", "--allow-origin", "shop.example"], "--allow-origin needs an origin"),
    ],
)
def test_wrong_use(arguments, words, tmp_path):
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "model.onnx").touch()
    command = [sys.executable, SCRIPT, *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (
        done.returncode == 2 and f"error: {words}" in done.stderr and "Traceback" not in done.stderr
    )
