#!/usr/bin/env python3
"""Run a bundle on many machines with Ray: over files in bulk, or as an HTTP service.

    pip install 'ray[data,serve]' onnxruntime numpy pillow
    python ray_bundle.py files bundle/ s3://bucket/photos results/     # a JSON line for each image
    python ray_bundle.py serve bundle/ --replicas 4                    # then: curl --data-binary @photo.jpg :8000

RAY_ADDRESS names the cluster, else it is this machine. Each worker process gets the bundle and runs its step3_infer.py
and model.onnx on one core.
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

    def answer(self, content, **where):
        """The bytes of an image file -> label, probability and top, or the error."""
        try:
            image = self.step3.decode_image(io.BytesIO(content), self.model.spec["channels"])
            return {**where, **self.step3.predict(image, self.model)}
        except self.step3.Problem as problem:
            return {**where, "error": str(problem)}

    def __call__(self, batch):
        """A batch of Ray Data: columns path and bytes -> a column of answers."""
        rows = zip(batch["path"], batch["bytes"], strict=True)
        return {"answer": [self.answer(content, path=str(path)) for path, content in rows]}


def predict_files(source, target, workers):
    """Predict every file in `source`, a directory or URL, as JSON lines in files below `target`."""
    source, target = (path if "://" in path else os.path.abspath(path) for path in (source, target))
    images = ray.data.read_binary_files(source, include_paths=True)
    answers = images.map_batches(
        Worker, batch_size=32, num_cpus=1, compute=ray.data.ActorPoolStrategy(size=workers)
    )
    answers.map(lambda row: row["answer"]).write_json(target)


def serve(replicas, port):
    """Answer images that are POSTed to port `port`, from `replicas` processes, until interrupted."""
    from ray import serve

    @serve.deployment(num_replicas=replicas, ray_actor_options={"num_cpus": 1})
    class Service(Worker):
        async def __call__(self, request):
            return self.answer(await request.body())

    serve.start(http_options={"port": port})
    serve.run(Service.bind())
    print(f"serving on port {port}", flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        threading.Event().wait()


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("what", choices=("files", "serve"))
    add("bundle", help="the unpacked bundle")
    add("source", nargs="?", help="of files: a directory or URL to read")
    add("target", nargs="?", help="of files: a directory or URL to write to")
    add("--replicas", type=int, default=2, help="worker processes")
    add("--port", type=int, default=8000)
    args = parser.parse_args()
    if not os.path.isfile(os.path.join(args.bundle, "model.onnx")):
        parser.error(f"no model.onnx in {args.bundle}: it is not an unpacked bundle")
    if (args.what == "files") != bool(args.target):
        parser.error("files needs a source and a target directory, serve takes neither")
    ray.init(runtime_env={"working_dir": args.bundle, "excludes": ["web", "cpp"]}, log_to_driver=False)
    predict_files(args.source, args.target, args.replicas) if args.what == "files" else serve(
        args.replicas, args.port
    )


if __name__ == "__main__":
    main()
