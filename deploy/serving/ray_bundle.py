#!/usr/bin/env python3
"""Run a bundle on many machines with Ray: over files in bulk, or as an HTTP service.

    pip install 'ray[data]' uvicorn onnxruntime numpy pillow
    python ray_bundle.py files bundle/ s3://bucket/photos results/     # one JSON line per image
    python ray_bundle.py serve bundle/ --replicas 4       # curl --data-binary @photo.jpg :8000

RAY_ADDRESS names the cluster; without it, Ray uses this machine. Each worker process receives the
bundle, imports inference from its step3_infer.pyz, and runs model.onnx on one core. An answer is a
line of step3's JSON: label, probability, known and top. The label is "unknown" or "unsure" below
the file's own thresholds, which step2_export.py sets with --reject and --min-probability. Exit
codes are those of step3: 0 success, 1 some input could not be used (its line in the results says
why), 2 wrong usage.

The service takes one image in the body of a POST. Every other answer is {"error": why}:
400 for a bad image, 403 for a request from a page of another origin, 405 for another method, 408
for a body that comes too slowly, 413 for one that is too large, 500 if the image ended the worker
process, 503 with Retry-After if too many requests wait, 504 if the image took too long. A process
that ended, took too long or kept much memory is replaced.
"""

import argparse
import asyncio
import contextlib
import dataclasses
import importlib.util
import io
import json
import math
import os
import re
import socket
import sys
from collections.abc import Callable

try:
    import ray
except ImportError:
    ray = None  # main() says so; the limits of the service are tested without it

PROGRAM, MODEL = "step3_infer.pyz", "model.onnx"  # in the bundle
BATCH_SIZE = 32
INSTALL = "pip install 'ray[data]' uvicorn onnxruntime numpy pillow"
NOT_NEEDED = ["web", "cpp"]  # parts of the bundle that workers do without
MIB = 1 << 20

HOST, PORT = "127.0.0.1", 8000
MAX_CONNECTIONS = 512  # open at a time, each with a file descriptor
HEADER_SECONDS = 10  # from the opening of a connection, or from an answer, to the next request
BODIES_HELD = 8  # bodies of the largest size that are in memory together
START_SECONDS = 10  # in which a process that took too long is replaced
RETRY_SECONDS = 1  # after which a client that was refused may try again
PREFLIGHT = {  # answers a browser that asks whether a page of another origin may send an image
    "access-control-allow-methods": "POST",
    "access-control-allow-headers": "content-type",
}
KEPT_SHARE = 0.25  # of its memory limit, that a worker process may keep after an answer


# ------------------------------------------------------------------------------------------ workers
class Worker:
    """The model of the bundle, which is the working directory of every worker process."""

    def __init__(self, max_pixels: int | None = None, memory: int | None = None):
        """Load the model.

        max_pixels: of an image, if other than step3's limit. memory: bytes that images may take.
        """
        sys.path.insert(0, os.path.abspath(PROGRAM))
        import inference  # from the archive: only a worker has it

        self.inference = inference
        self.model = inference.Model(MODEL, threads=1)
        if max_pixels is not None:
            self.model.max_pixels = max_pixels

        self.may_keep = math.inf
        if memory is not None:
            limit_memory(memory)
            self.may_keep = resident_bytes() + KEPT_SHARE * memory

    def ready(self) -> None:
        """Return as soon as the model is loaded."""

    def predict(self, content: bytes) -> dict:
        """The bytes of an image file -> label, probability, known and top, or the error."""
        spec = self.model.spec
        file = io.BytesIO(content)
        try:
            image = self.inference.decode_image(
                file, spec["channels"], spec["white"], self.model.max_pixels, spec["ground"]
            )
            return self.inference.predict(image, self.model)
        except self.inference.Problem as problem:
            return {"error": str(problem)}

    def predict_once(self, content: bytes) -> tuple[dict, bool]:
        """What predict() returns, and whether this process has kept too much memory to go on."""
        answer = self.predict(content)
        return answer, resident_bytes() > self.may_keep

    def __call__(self, batch: dict) -> dict:
        """A batch of Ray Data: columns path and bytes -> columns prediction and failed (0 or 1)."""
        predictions = []
        for path, content in zip(batch["path"], batch["bytes"], strict=True):
            predictions.append({"path": str(path), **self.predict(content)})
        failed = [int("error" in row) for row in predictions]
        return {"prediction": predictions, "failed": failed}


def memory_fields() -> list[int]:
    """The fields of /proc/self/statm in bytes; zeros where there is no such file."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return [int(pages) * os.sysconf("SC_PAGE_SIZE") for pages in file.read().split()]
    except OSError:
        return [0] * 7


def resident_bytes() -> int:
    """The memory that this process occupies."""
    return memory_fields()[1]


def limit_memory(extra: int) -> None:
    """Make allocations fail after so many more bytes, where the system can do it.

    RLIMIT_DATA counts private memory only. RLIMIT_AS would also count the shared memory through
    which Ray passes the images.
    """
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        used = memory_fields()[5]  # private memory, as the limit counts it
        if used:
            _, hard = resource.getrlimit(resource.RLIMIT_DATA)
            resource.setrlimit(resource.RLIMIT_DATA, (used + extra, hard))


def share_out(workers: int | None, left: int = 0) -> tuple[int, float]:
    """The number of workers, and the share of a CPU that each of them reserves.

    workers: as asked, by default one less than there are CPUs. left: CPUs for other tasks. All
    workers start, as they reserve no more than there is, in Ray's precision of four decimals.
    """
    cpus = ray.cluster_resources()["CPU"]
    if workers is None:
        workers = max(1, int(cpus) - 1)
    share = math.floor(1e4 * (cpus - left) / workers) / 1e4
    return workers, min(1.0, share)


# -------------------------------------------------------------------------------------------- files
def predict_files(source: str, target: str, workers: int | None) -> tuple[int, int]:
    """Predict every file in `source`, and write JSON lines to files below `target`.

    Both may be URLs. Returns the number of files and how many of them could not be used. One CPU is
    left to the tasks that read and write: without it, they would wait for ever.
    """
    workers, share = share_out(workers, left=1)
    images = ray.data.read_binary_files(source, include_paths=True)
    predictions = images.map_batches(
        Worker,
        batch_size=BATCH_SIZE,
        num_cpus=share,
        compute=ray.data.ActorPoolStrategy(size=workers),
    ).materialize()
    predictions.map(lambda row: row["prediction"]).write_json(target)
    return predictions.count(), predictions.sum("failed") or 0


# ------------------------------------------------------------------------------------------ service
@dataclasses.dataclass(frozen=True)
class Limits:
    """What the service takes; each field is an option of the command line."""

    max_body: int = 64  # MiB
    body_timeout: float = 30  # seconds from the headers to the end of the body
    queue: int = 64  # requests that wait for a process
    timeout: float = 30  # seconds that a process may take for a request
    max_pixels: int = 50_000_000
    memory: int = 2048  # MiB for the images of a process


class Refusal(Exception):
    """An answer other than a prediction: the status, the reason, and further headers."""

    def __init__(self, status: int, reason: str, headers: dict[str, str] | None = None):
        super().__init__(reason)
        self.status = status
        self.headers = headers or {}


def busy() -> Refusal:
    """The answer while too many requests wait, or too many bodies are in memory."""
    return Refusal(503, "too many requests: try again later", {"retry-after": str(RETRY_SECONDS)})


class Process:
    """A worker process somewhere in the cluster, which answers one request at a time."""

    def __init__(self, limits: Limits, share: float):
        actor_class = ray.remote(Worker).options(num_cpus=share)
        self.actor = actor_class.remote(limits.max_pixels, limits.memory * MIB)

    async def ready(self) -> None:
        await self.actor.ready.remote()

    async def predict(self, content: bytearray) -> tuple[dict, bool]:
        return await self.actor.predict_once.remote(bytes(content))

    def kill(self) -> None:
        ray.kill(self.actor)


class Pool:
    """The worker processes, and the bounded queue of requests that wait for one of them."""

    def __init__(self, start_process: Callable, limits: Limits):
        """start_process: returns an object with the methods of Process."""
        self.start_process = start_process
        self.limits = limits
        self.idle: asyncio.Queue = asyncio.Queue()  # of processes
        self.waiting = 0  # requests
        self.replacing: set[asyncio.Task] = set()

    async def start(self, size: int) -> None:
        """Start the processes. Raises what the first of them raises that cannot load the model."""
        processes = [self.start_process() for _ in range(size)]
        for process in processes:
            await process.ready()
            self.idle.put_nowait(process)

    def check_room(self) -> None:
        """Raise Refusal if another request could not even wait."""
        if self.waiting >= self.limits.queue + self.idle.qsize():
            raise busy()

    async def predict(self, content: bytearray) -> dict:
        """The answer of a process to the bytes of an image file. Raises Refusal."""
        process = await self.next_idle()
        try:
            answer, worn = await asyncio.wait_for(process.predict(content), self.limits.timeout)
        except asyncio.TimeoutError:
            self.replace(process, "took too long")
            reason = f"the image took longer than {self.limits.timeout:g} seconds"
            raise Refusal(504, reason) from None
        except Exception as error:  # Ray's errors for a process that ended, or a bug in it
            self.replace(process, f"failed: {first_line(error)}")
            raise Refusal(500, "the worker process failed on this image") from None

        if worn:
            self.replace(process, "kept much memory after a large image")
        else:
            self.idle.put_nowait(process)
        return answer

    async def next_idle(self):
        """Wait for a process. Raises Refusal if too many wait, or if none becomes idle in time."""
        self.check_room()
        self.waiting += 1
        try:
            return await asyncio.wait_for(self.idle.get(), self.limits.timeout + START_SECONDS)
        except asyncio.TimeoutError:
            raise busy() from None
        finally:
            self.waiting -= 1

    def replace(self, process, why: str) -> None:
        """Kill a process, and start another one in the background."""
        print(f"note: replacing a worker process that {why}", file=sys.stderr, flush=True)
        process.kill()
        task = asyncio.create_task(self.add_process())
        self.replacing.add(task)  # a task that nothing refers to may be collected
        task.add_done_callback(self.replacing.discard)

    async def add_process(self) -> None:
        """Start a process; try until it works, as a machine of the cluster may be restarting."""
        while True:
            process = self.start_process()
            try:
                await process.ready()
            except Exception as error:
                print(f"note: no new worker: {first_line(error)}", file=sys.stderr, flush=True)
                process.kill()
                await asyncio.sleep(RETRY_SECONDS)
            else:
                self.idle.put_nowait(process)
                return


def first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


class Service:
    """The ASGI application: it checks a request, reads its body, and passes it to the pool."""

    def __init__(self, pool: Pool, limits: Limits, own: set[str], allowed: set[str]):
        """own: the origins of the service itself. allowed: others whose pages may use it."""
        self.pool = pool
        self.limits = limits
        self.own = own
        self.allowed = allowed
        self.held = 0  # bytes of all bodies in memory

    async def __call__(self, scope, receive, send) -> None:
        # ASGI gives names in lower case.
        headers = {name.decode("latin-1"): value for name, value in scope["headers"]}
        origin = headers.get("origin", b"").decode("latin-1")
        extra = {}
        if origin in self.allowed:
            extra = {"access-control-allow-origin": origin, "vary": "origin"}

        try:
            self.check_origin(origin)
            if scope["method"] == "OPTIONS" and origin in self.allowed:
                await respond(send, 204, None, {**extra, **PREFLIGHT})
                return
            answer = await self.answer(scope["method"], headers, receive)
            status = 400 if "error" in answer else 200
        except Refusal as refusal:
            status = refusal.status
            answer = {"error": str(refusal)}
            extra.update(refusal.headers)
        except ConnectionError:  # the client is gone
            return
        await respond(send, status, answer, extra)

    def check_origin(self, origin: str) -> None:
        """Raise Refusal for a request that a page of another site made in somebody's browser.

        The header Host decides nothing: a page can point a name of its own at this machine.
        """
        if origin and origin not in self.own | self.allowed:
            raise Refusal(403, f"requests from pages of {origin} need --allow-origin")

    async def answer(self, method: str, headers: dict[str, bytes], receive) -> dict:
        """The prediction for the image in a request's body. Raises Refusal, ConnectionError."""
        if method != "POST":
            raise Refusal(405, "send an image by POST", {"allow": "POST"})

        # Before the body is read: a client that waits for "100 Continue" then need not send it.
        length = headers.get("content-length", b"0")
        if not length.isdigit() or int(length) > self.limits.max_body * MIB:
            raise self.too_large()
        self.pool.check_room()

        body = bytearray()
        try:
            await self.read_in_time(receive, body)
            return await self.pool.predict(body)
        finally:
            self.held -= len(body)
            body.clear()  # an exception in flight would keep it until the garbage is collected

    async def read_in_time(self, receive, body: bytearray) -> None:
        """read() with its time limit."""
        try:
            await asyncio.wait_for(self.read(receive, body), self.limits.body_timeout)
        except asyncio.TimeoutError:
            reason = f"the body took longer than {self.limits.body_timeout:g} seconds"
            raise Refusal(408, reason, {"connection": "close"}) from None

    async def read(self, receive, body: bytearray) -> None:
        """Append a request's body to `body`, and count it in `held`."""
        more = True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ConnectionError

            part = message.get("body", b"")
            if len(body) + len(part) > self.limits.max_body * MIB:
                raise self.too_large()
            if self.held + len(part) > BODIES_HELD * self.limits.max_body * MIB:
                raise busy()
            body += part
            self.held += len(part)
            more = message.get("more_body", False)

    def too_large(self) -> Refusal:
        return Refusal(413, f"the body is larger than {self.limits.max_body} MiB")


async def respond(send, status: int, answer: dict | None, headers: dict[str, str]) -> None:
    """Send an answer as JSON; None for no body."""
    body = b"" if answer is None else json.dumps(answer).encode()
    headers = dict(headers)
    if body:
        headers["content-type"] = "application/json"
        headers["content-length"] = str(len(body))
    encoded = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": status, "headers": encoded})
    await send({"type": "http.response.body", "body": body})


def origins_of(host: str, port: int) -> set[str]:
    """The origins that a browser gives to pages of this address, and of this machine's names."""
    suffix = "" if port == 80 else f":{port}"
    origins = set()
    for name in (host, "127.0.0.1", "localhost", "::1"):
        in_url = f"[{name}]" if ":" in name else name
        origins.add(f"http://{in_url}{suffix}")
    return origins


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens. Raises OSError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family)


def server_for(service: Service):
    """The uvicorn server that passes requests to the service.

    uvicorn waits for ever for the headers of a request; here a connection is closed if they do not
    come in time. After an early answer, the rest of a body is discarded for as long.
    """
    import uvicorn
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class Connection(H11Protocol):
        def connection_made(self, transport) -> None:
            super().connection_made(transport)
            if len(self.connections) > MAX_CONNECTIONS:
                transport.abort()
            self.expect_request()

        def on_response_complete(self) -> None:
            self.expect_request()
            super().on_response_complete()

        def expect_request(self) -> None:
            self.loop.call_later(HEADER_SECONDS, self.close_unless_requested, self.cycle)

        def close_unless_requested(self, last_cycle) -> None:
            """Close the connection if no request has come after the given one, None for any."""
            if self.cycle is last_cycle:
                self.transport.abort()

    # Not httptools, which uvicorn prefers: Connection knows the inner life of h11's protocol only.
    config = uvicorn.Config(
        service,
        http=Connection,
        ws="none",
        lifespan="off",
        log_level="error",  # no line for each malformed request
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_graceful_shutdown=1,
    )
    return uvicorn.Server(config)


async def serve(listener: socket.socket, workers: int, share: float, args) -> None:
    """Predict images that are sent to a socket by POST until interrupted.

    workers: how many processes predict. share: of a CPU, for each. args: the command line.
    """
    limits = limits_of(args)
    pool = Pool(lambda: Process(limits, share), limits)
    await pool.start(workers)

    host, port = listener.getsockname()[:2]
    own = origins_of(args.host or host, port)
    service = Service(pool, limits, own, set(args.allow_origin or ()))
    print(f"serving on port {port} of {host}", flush=True)
    await server_for(service).serve(sockets=[listener])


# ------------------------------------------------------------------------------------- command line
def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("what", choices=("files", "serve"), help="predict files in bulk, or serve HTTP requests")
    add("bundle", help="the unpacked bundle")
    add("source", nargs="?", help="for files: a directory or URL to read")
    add("target", nargs="?", help="for files: a directory or URL to write to")
    add("--replicas", type=int, help="worker processes (default: one less than there are CPUs)")
    add_service_options(parser.add_argument_group("options of serve"))
    return parser


def add_service_options(group) -> None:
    """The options of the service; each is None unless it is given."""
    default = Limits()

    def add(name: str, kind: Callable, metavar: str, text: str, **others) -> None:
        group.add_argument(name, type=kind, metavar=metavar, help=text, **others)

    add("--host", str, "ADDRESS", f"to listen on (default: {HOST}: requests of this machine only)")
    add("--port", int, "N", f"(default: {PORT})")
    add(
        "--allow-origin",
        str,
        "ORIGIN",
        "answer pages of this origin, like https://example.com; may be repeated",
        action="append",
    )
    add("--max-body", int, "MIB", f"size of a request's body (default: {default.max_body})")
    add(
        "--body-timeout",
        float,
        "SECONDS",
        f"until a body must have arrived (default: {default.body_timeout})",
    )
    add("--queue", int, "N", f"requests that may wait for a process (default: {default.queue})")
    add(
        "--timeout",
        float,
        "SECONDS",
        f"that a process may take for a request (default: {default.timeout})",
    )
    add("--max-pixels", int, "N", f"pixels of an image (default: {default.max_pixels:,})")
    add(
        "--memory",
        int,
        "MIB",
        f"that images may take in a process, on Linux (default: {default.memory})",
    )


def limits_of(args: argparse.Namespace) -> Limits:
    """The limits of the command line, and the default of each that it does not give."""
    given = {}
    for field in dataclasses.fields(Limits):
        value = getattr(args, field.name)
        if value is not None:
            given[field.name] = value
    return Limits(**given)


def check_usage(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Exit with an error if the arguments do not fit together."""
    if not os.path.isfile(os.path.join(args.bundle, MODEL)):
        parser.error(f"no {MODEL} in {args.bundle}: give the directory of an unpacked bundle")
    if args.what == "files" and not args.target:
        parser.error("files needs a source and a target directory")
    if args.what == "serve" and args.source:
        parser.error("serve takes neither a source nor a target directory")
    if args.replicas is not None and args.replicas < 1:
        parser.error("--replicas needs at least one worker process")
    if args.source and not is_url(args.source) and not os.path.exists(args.source):
        parser.error(f"no file or directory {args.source}")
    check_service_options(parser, args)


def check_service_options(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Exit with an error for options of serve that are not positive, or given to files."""
    limits = [field.name for field in dataclasses.fields(Limits)]
    for name in ("host", "port", "allow_origin", *limits):
        value = getattr(args, name)
        if value is None:
            continue

        option = "--" + name.replace("_", "-")
        if args.what == "files":
            parser.error(f"{option} requires serve")
        if name in limits and not value > 0:
            parser.error(f"{option} must be positive")

    for origin in args.allow_origin or ():
        if origin != "null" and not re.fullmatch("https?://[^/]+", origin):
            parser.error(f"--allow-origin needs an origin like https://example.com, not {origin}")


def is_url(path: str) -> bool:
    return "://" in path


def as_seen_by_workers(path: str) -> str:
    """A path that does not depend on the working directory."""
    return path if is_url(path) else os.path.abspath(path)


def start_ray(bundle: str) -> None:
    """Connect to the cluster, or use this machine; give the bundle to every worker."""
    options = {}
    if not os.environ.get("RAY_ADDRESS"):
        options["num_cpus"] = max(2, os.cpu_count() or 1)  # reading needs one beside a worker's
        options["include_dashboard"] = False  # a port that runs whatever it is sent

    environment = {"working_dir": bundle, "excludes": NOT_NEEDED}
    ray.init(runtime_env=environment, log_to_driver=False, **options)


def run_files(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Predict files; exit with an error if some could not be used."""
    source = as_seen_by_workers(args.source)
    target = as_seen_by_workers(args.target)
    try:
        count, failed = predict_files(source, target, args.replicas)
    except (OSError, ValueError, ray.exceptions.RayError) as error:
        reason = " ".join(str(error).split())
        parser.exit(1, f"error: cannot predict {args.source}: {reason}\n")

    if count == 0:
        parser.exit(1, f"error: {args.source}: no files\n")
    if failed:
        hint = f"{failed} of {count} files could not be used, see {args.target}"
        parser.exit(1, f"error: {args.source}: {hint}\n")


def run_service(
    parser: argparse.ArgumentParser, args: argparse.Namespace, listener: socket.socket
) -> None:
    """Serve until interrupted; exit with an error if the workers cannot start."""
    workers, share = share_out(args.replicas)
    try:
        with contextlib.suppress(KeyboardInterrupt):
            asyncio.run(serve(listener, workers, share, args))
    except ray.exceptions.RayError as error:
        reason = str(error).strip().splitlines()[-1]  # below the traceback of the worker
        parser.exit(1, f"error: cannot serve {args.bundle}: {reason}\n")


def main() -> int:
    parser = build_parser()
    args = parser.parse_args()
    check_usage(parser, args)

    # After the usage, which can be checked without them.
    needed = ["ray", "uvicorn"] if args.what == "serve" else ["ray"]
    for package in needed:
        if importlib.util.find_spec(package) is None:
            parser.exit(1, f"error: {args.what} needs {package}: {INSTALL}\n")

    if args.what == "files":
        start_ray(args.bundle)
        run_files(parser, args)
        return 0

    host = args.host or HOST
    port = PORT if args.port is None else args.port
    try:
        listener = listen(host, port)
    except (OSError, OverflowError) as error:
        parser.exit(1, f"error: cannot listen on port {port} of {host}: {error}\n")
    with listener:
        start_ray(args.bundle)
        run_service(parser, args, listener)
    return 0


if __name__ == "__main__":
    sys.exit(main())
