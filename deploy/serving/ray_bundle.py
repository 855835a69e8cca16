#!/usr/bin/env python3
"""Run a bundle on many machines with Ray: over files in bulk, or as an HTTP service.

    pip install 'ray[data,serve]' onnxruntime numpy pillow
    python ray_bundle.py files bundle/ s3://bucket/photos results/     # one JSON line per image
    python ray_bundle.py serve bundle/ --replicas 4                    # curl --data-binary @photo.jpg :8000

RAY_ADDRESS names the cluster; without it, Ray uses this machine. Each worker process receives the bundle and
runs its step3_infer.py and model.onnx on one core. An answer is a line of step3's JSON: label, probability,
known and top. The label is "unknown" or "unsure" below the file's own thresholds, which step2_export.py sets
with --reject and --min-probability. Exit codes are those of step3_infer.py: 0 success, 1 some input could not
be used (its line in the results says why), 2 wrong usage. The service answers 400 to a bad image.
"""

import argparse
import contextlib
import importlib
import io
import os
import sys
import threading

import ray


class Worker:
    """The model of the bundle, which is the working directory of every worker process."""

    def __init__(self):
        self.step3 = importlib.import_module("step3_infer")
        self.model = self.step3.Model("model.onnx", threads=1)

    def predict(self, content: bytes) -> dict:
        """The bytes of an image file -> label, probability, known and top, or the error."""
        try:
            spec = self.model.spec
            image = self.step3.decode_image(io.BytesIO(content), spec["channels"], spec["white"])
            return self.step3.predict(image, self.model)
        except self.step3.Problem as problem:
            return {"error": str(problem)}

    def __call__(self, batch: dict) -> dict:
        """A batch of Ray Data: columns path and bytes -> columns prediction and failed (0 or 1)."""
        rows = zip(batch["path"], batch["bytes"], strict=True)
        predictions = [{"path": str(path), **self.predict(content)} for path, content in rows]
        return {"prediction": predictions, "failed": [int("error" in row) for row in predictions]}


def share_out(workers: int | None, left: int = 0) -> tuple[int, float]:
    """How many workers (as asked, or one less than CPUs), and the CPUs that each reserves: at most one."""
    cpus = ray.cluster_resources()["CPU"]
    workers = workers or max(1, int(cpus) - 1)
    return workers, min(1.0, int(1e4 * (cpus - left) / workers) / 1e4)  # all start, in Ray's precision


def predict_files(source: str, target: str, workers: int | None) -> tuple[int, int]:
    """Predict every file in `source`, and write JSON lines to files below `target`; both may be URLs.

    Returns the number of files and how many of them could not be used. One CPU is left to the tasks that read
    and write: without it, they would wait for ever.
    """
    workers, share = share_out(workers, left=1)
    images = ray.data.read_binary_files(source, include_paths=True)
    pool = ray.data.ActorPoolStrategy(size=workers)
    predictions = images.map_batches(Worker, batch_size=32, num_cpus=share, compute=pool).materialize()
    predictions.map(lambda row: row["prediction"]).write_json(target)
    return predictions.count(), predictions.sum("failed") or 0


def serve(replicas: int | None, port: int) -> None:
    """Predict images that are sent to a port by POST, in `replicas` processes, until interrupted."""
    from ray import serve
    from starlette.responses import JSONResponse

    replicas, share = share_out(replicas)

    @serve.deployment(num_replicas=replicas, ray_actor_options={"num_cpus": share})
    class Service(Worker):
        async def __call__(self, request):
            answer = self.predict(await request.body())
            return JSONResponse(answer, status_code=400 if "error" in answer else 200)

    serve.start(http_options={"port": port})
    serve.run(Service.bind())
    print(f"serving on port {port}", flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        threading.Event().wait()


def build_parser() -> argparse.ArgumentParser:
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    add = parser.add_argument
    add("what", choices=("files", "serve"), help="predict files in bulk, or serve HTTP requests")
    add("bundle", help="the unpacked bundle")
    add("source", nargs="?", help="for files: a directory or URL to read")
    add("target", nargs="?", help="for files: a directory or URL to write to")
    add("--replicas", type=int, help="worker processes (default: one less than there are CPUs)")
    add("--port", type=int, default=8000, help="for serve")
    return parser


def main() -> int:
    parser = build_parser()
    args = parser.parse_args()
    if not os.path.isfile(os.path.join(args.bundle, "model.onnx")):
        parser.error(f"no model.onnx in {args.bundle}: give the directory of an unpacked bundle")
    if args.what == "files" and not args.target:
        parser.error("files needs a source and a target directory")
    if args.what == "serve" and args.source:
        parser.error("serve takes neither a source nor a target directory")
    if args.replicas is not None and args.replicas < 1:
        parser.error("--replicas needs at least one worker process")
    paths = args.source, args.target
    source, target = (path if not path or "://" in path else os.path.abspath(path) for path in paths)
    if source and "://" not in source and not os.path.exists(source):
        parser.error(f"no file or directory {args.source}")
    # Reading needs a CPU beside the one of a worker.
    options = {} if os.environ.get("RAY_ADDRESS") else {"num_cpus": max(2, os.cpu_count() or 1)}
    environment = {"working_dir": args.bundle, "excludes": ["web", "cpp"]}
    ray.init(runtime_env=environment, log_to_driver=False, **options)
    if args.what == "serve":
        serve(args.replicas, args.port)
        return 0
    try:
        count, failed = predict_files(source, target, args.replicas)
    except (OSError, ValueError, ray.exceptions.RayError) as error:
        parser.exit(1, f"error: cannot predict {args.source}: {' '.join(str(error).split())}\n")
    if failed or not count:
        reason = f"{failed} of {count} files could not be used, see {args.target}" if count else "no files"
        parser.exit(1, f"error: {args.source}: {reason}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
