"""Keep what a bundle's ONNX files answer on one processor, and compare two such answers; for prove_arm64.sh.

    python answers.py keep BUNDLE here.npz photos/             # of the bundle's samples and photos/
    python answers.py compare here.npz there.npz model.onnx    # cells of a table
    python answers.py versions here.npz

`keep` runs the bundle's own step3_infer.py as a library, because the command rounds probabilities. Exit
codes: 0 equal within the limits, 1 different or nothing to compare, 2 wrong usage.
"""

import argparse
import hashlib
import importlib.metadata
import json
import platform
import sys
from pathlib import Path

import numpy as np

FP32_LIMIT = 1e-6  # of a difference between two processors; an int8 file has its self-test's tolerance
SELF_TEST = 1e-4  # what a float32 file's self-test allows: how many int8 answers would fail that?
PACKAGES = ("onnxruntime", "numpy", "pillow")


def keep(bundle: Path, out: str, folders: list[str]) -> None:
    """Run every .onnx file of a bundle over all images and write what it answers to an .npz file."""
    sys.dont_write_bytecode = True  # --verify reports what is not the bundle's
    sys.path.insert(0, str(bundle))
    from inference.errors import Problem
    from inference.images import decode_image, is_image
    from inference.predict import Model

    paths = [path for folder in (bundle / "samples", *folders) for path in sorted(Path(folder).rglob("*"))]
    paths = [path for path in paths if path.is_file() and is_image(str(path))]
    versions = [f"Python {platform.python_version()}"]
    versions += [f"{name} {importlib.metadata.version(name)}" for name in PACKAGES]
    about, arrays = {"versions": ", ".join(versions), "files": {}}, {}
    for file in sorted(bundle.glob("*.onnx")):
        model = Model(file)
        if model.spec["task"] == "regression":
            sys.exit(f"error: {file.name} predicts from numbers, and only images are compared")
        images = []
        for path in paths:
            try:
                images.append(decode_image(path, model.spec["channels"], model.spec["white"]))
            except Problem as problem:
                sys.exit(f"error: {path} {problem}")
        outputs = [model.run(image[None]) for image in images]
        about["files"][file.name] = {
            "limit": model.spec["self_test_tolerance"] if "quantization" in model.spec else FP32_LIMIT,
            "known_limit": (model.spec["known"] or {}).get("tolerance"),
        }
        arrays[f"{file.name}/pixels"] = [hashlib.sha256(image.tobytes()).hexdigest() for image in images]
        arrays[f"{file.name}/probabilities"] = np.concatenate([probabilities for probabilities, _ in outputs])
        if model.spec["known"]:
            arrays[f"{file.name}/known"] = np.concatenate([known for _, known in outputs])
    np.savez(out, about=json.dumps(about), **arrays)


def compare(here: str, there: str, name: str) -> int:
    """Print the cells of a Markdown table for one model file; return 1 if the answers differ, else 0."""
    here, there = np.load(here), np.load(there)
    limits = json.loads(str(here["about"]))["files"][name]
    mine, theirs = here[f"{name}/probabilities"], there[f"{name}/probabilities"]  # [images, classes]
    decoded = int((here[f"{name}/pixels"] != there[f"{name}/pixels"]).sum())
    changed = int((mine.argmax(axis=1) != theirs.argmax(axis=1)).sum())
    apart, known = np.abs(mine - theirs).max(axis=1), "-"  # [images]
    passed = not decoded and not changed and apart.max() <= limits["limit"]
    if limits["known_limit"] is not None:
        moved = np.abs(here[f"{name}/known"] - there[f"{name}/known"]).max()
        passed, known = passed and moved <= limits["known_limit"], f"{moved:.1e}"
    cells = len(mine), decoded, changed, f"{apart.max():.1e}", (apart > SELF_TEST).sum(), known
    print(" | ".join(map(str, (*cells, "passed" if passed else "FAILED"))))
    return 0 if passed else 1


def main() -> int:
    parser = argparse.ArgumentParser(description="Keep and compare what a bundle answers.")
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser("keep", help="write what a bundle's ONNX files answer").add_argument
    add("bundle", type=Path, help="unpacked bundle")
    add("out", help=".npz file to write")
    add("folders", nargs="*", help="more images, besides the bundle's samples")
    add = commands.add_parser("compare", help="compare one model file's answers").add_argument
    add("here", help="of this machine")
    add("there", help="of the other one")
    add("model", help="name of the model file")
    add = commands.add_parser("versions", help="print what computed the answers").add_argument
    add("answers", help=".npz file")
    args = parser.parse_args()
    if args.command == "compare":
        return compare(args.here, args.there, args.model)
    if args.command == "versions":
        print(json.loads(str(np.load(args.answers)["about"]))["versions"])
    else:
        keep(args.bundle, args.out, args.folders)
    return 0


if __name__ == "__main__":
    sys.exit(main())
