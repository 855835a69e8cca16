#!/usr/bin/env python3
"""Run a bundle on many machines with Ray: over files in bulk, or as an HTTP service.

    pip install 'ray[data,serve]' onnxruntime numpy pillow
    python ray_bundle.py files bundle/ s3://bucket/photos results/     # one JSON line per image
    python ray_bundle.py serve bundle/ --replicas 4       # curl --data-binary @photo.jpg :8000

RAY_ADDRESS names the cluster; without it, Ray uses this machine. Each worker process receives the
bundle, imports inference from its step3_infer.pyz, and runs model.onnx on one core. An answer is a
line of step3's JSON: label, probability, known and top. The label is "unknown" or "unsure" below
the file's own thresholds, which step2_export.py sets with --reject and --min-probability. Exit
codes are those of step3: 0 success, 1 some input could not be used (its line in the results says
why), 2 wrong usage. The service answers 400 to a bad image.
"""

import argparse
import contextlib
import io
import math
import os
import sys
import threading

import ray

PROGRAM, MODEL = "step3_infer.pyz", "model.onnx"  # in the bundle
BATCH_SIZE = 32
NOT_NEEDED = ["web", "cpp"]  # parts of the bundle that workers do without


class Worker:
    """The model of the bundle, which is the working directory of every worker process."""

    def __init__(self):
        sys.path.insert(0, os.path.abspath(PROGRAM))
        import inference  # from the archive: only a worker has it

        self.inference = inference
        self.model = inference.Model(MODEL, threads=1)

    def predict(self, content: bytes) -> dict:
        """The bytes of an image file -> label, probability, known and top, or the error."""
        spec = self.model.spec
        file = io.BytesIO(content)
        try:
            image = self.inference.decode_image(file, spec["channels"], spec["white"])
            return self.inference.predict(image, self.model)
        except self.inference.Problem as problem:
            return {"error": str(problem)}

    def __call__(self, batch: dict) -> dict:
        """A batch of Ray Data: columns path and bytes -> columns prediction and failed (0 or 1)."""
        predictions = []
        for path, content in zip(batch["path"], batch["bytes"], strict=True):
            predictions.append({"path": str(path), **self.predict(content)})
        failed = [int("error" in row) for row in predictions]
        return {"prediction": predictions, "failed": failed}


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


def serve(replicas: int | None, port: int) -> None:
    """Predict images that are sent to a port by POST until interrupted.

    replicas: how many processes predict.
    """
    from ray import serve
    from starlette.responses import JSONResponse

    replicas, share = share_out(replicas)

    @serve.deployment(num_replicas=replicas, ray_actor_options={"num_cpus": share})
    class Service(Worker):
        async def __call__(self, request):
            answer = self.predict(await request.body())
            status_code = 400 if "error" in answer else 200
            return JSONResponse(answer, status_code=status_code)

    serve.start(http_options={"port": port})
    serve.run(Service.bind())
    print(f"serving on port {port}", flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        threading.Event().wait()


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
    add("--port", type=int, default=8000, help="for serve (default: 8000)")
    return parser


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
    environment = {"working_dir": bundle, "excludes": NOT_NEEDED}
    ray.init(runtime_env=environment, log_to_driver=False, **options)


def main() -> int:
    parser = build_parser()
    args = parser.parse_args()
    check_usage(parser, args)
    start_ray(args.bundle)
    if args.what == "serve":
        serve(args.replicas, args.port)
        return 0

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
    return 0


if __name__ == "__main__":
    sys.exit(main())
