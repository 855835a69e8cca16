#!/usr/bin/env python3
"""Run a bundle on many machines with Ray: over files in bulk, or as an HTTP service.

    pip install 'ray[data,serve]' onnxruntime numpy pillow
    python ray_bundle.py files bundle/ s3://bucket/photos results/     # one JSON line per image
    python ray_bundle.py serve bundle/ --replicas 4                    # curl --data-binary @photo.jpg :8000

RAY_ADDRESS names the cluster; without it, Ray uses this machine. Each worker process receives the bundle and
runs its step3_infer.py and model.onnx on one core.
"""

import argparse
import contextlib
import importlib
import io
import os
import threading

import ray


class Worker:
    """The model of the bundle, which is the working directory of every worker process."""

    def __init__(self):
        self.step3 = importlib.import_module("step3_infer")
        self.model = self.step3.Model("model.onnx", threads=1)

    def predict(self, content: bytes) -> dict:
        """The bytes of an image file -> label, probability and top, or the error."""
        try:
            image = self.step3.decode_image(io.BytesIO(content), self.model.spec["channels"])
            return self.step3.predict(image, self.model)
        except self.step3.Problem as problem:
            return {"error": str(problem)}

    def __call__(self, batch: dict) -> dict:
        """A batch of Ray Data: columns path and bytes -> a column of predictions."""
        rows = zip(batch["path"], batch["bytes"], strict=True)
        return {"prediction": [{"path": str(path), **self.predict(content)} for path, content in rows]}


def predict_files(source: str, target: str, workers: int) -> None:
    """Predict every file in `source`, and write JSON lines to files below `target`; both may be URLs."""
    source, target = (path if "://" in path else os.path.abspath(path) for path in (source, target))
    images = ray.data.read_binary_files(source, include_paths=True)
    predictions = images.map_batches(
        Worker, batch_size=32, num_cpus=1, compute=ray.data.ActorPoolStrategy(size=workers)
    )
    predictions.map(lambda row: row["prediction"]).write_json(target)


def serve(replicas: int, port: int) -> None:
    """Predict images that are sent to a port by POST, in `replicas` processes, until interrupted."""
    from ray import serve

    @serve.deployment(num_replicas=replicas, ray_actor_options={"num_cpus": 1})
    class Service(Worker):
        async def __call__(self, request):
            return self.predict(await request.body())

    serve.start(http_options={"port": port})
    serve.run(Service.bind())
    print(f"serving on port {port}", flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        threading.Event().wait()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("what", choices=("files", "serve"), help="predict files in bulk, or serve HTTP requests")
    add("bundle", help="the unpacked bundle")
    add("source", nargs="?", help="for files: a directory or URL to read")
    add("target", nargs="?", help="for files: a directory or URL to write to")
    add("--replicas", type=int, default=2, help="worker processes")
    add("--port", type=int, default=8000, help="for serve")
    args = parser.parse_args()
    if not os.path.isfile(os.path.join(args.bundle, "model.onnx")):
        parser.error(f"no model.onnx in {args.bundle}: give the directory of an unpacked bundle")
    if args.what == "files" and not args.target:
        parser.error("files needs a source and a target directory")
    if args.what == "serve" and args.source:
        parser.error("serve takes neither a source nor a target directory")
    ray.init(runtime_env={"working_dir": args.bundle, "excludes": ["web", "cpp"]}, log_to_driver=False)
    if args.what == "files":
        predict_files(args.source, args.target, args.replicas)
    else:
        serve(args.replicas, args.port)


if __name__ == "__main__":
    main()
