"""Keep what a bundle's ONNX files answer on one processor, and compare two such answers; for
prove_arm64.sh.

    python answers.py keep BUNDLE here.npz photos/             # of the bundle's samples and photos/
    python answers.py compare here.npz there.npz model.onnx    # cells of a table
    python answers.py versions here.npz

`keep` imports the bundle's own step3_infer.pyz as a library, because the command rounds
probabilities. Exit codes: 0 equal within the limits, 1 different or nothing to compare, 2 wrong
usage.
"""

import argparse
import hashlib
import importlib.metadata
import json
import platform
import sys
from pathlib import Path

import numpy as np

FP32_LIMIT = (
    1e-6  # of a difference between two processors; an int8 file has its self-test's tolerance
)
SELF_TEST = 1e-4  # what a float32 file's self-test allows: how many int8 answers would fail that?
PACKAGES = ("onnxruntime", "numpy", "pillow")


def find_images(bundle: Path, folders: list[str]) -> list[Path]:
    """The images of the bundle's samples and of the folders."""
    from inference.finding import is_image

    found = []
    for folder in (bundle / "samples", *folders):
        for path in sorted(Path(folder).rglob("*")):
            if path.is_file() and is_image(str(path)):
                found.append(path)
    return found


def name_versions() -> str:
    """What computes the answers, in words."""
    named = [f"Python {platform.python_version()}"]
    for name in PACKAGES:
        named.append(f"{name} {importlib.metadata.version(name)}")
    return ", ".join(named)


def keep(bundle: Path, out: str, folders: list[str]) -> None:
    """Run every .onnx file of a bundle over all images and write its answers to an .npz file."""
    sys.path.insert(0, str(bundle / "step3_infer.pyz"))
    from inference.errors import Problem
    from inference.images import decode_image
    from inference.predict import Model

    paths = find_images(bundle, folders)
    files = {}
    arrays = {}
    for file in sorted(bundle.glob("*.onnx")):
        model = Model(file)
        spec = model.spec
        if spec["task"] == "regression":
            sys.exit(f"error: {file.name} predicts from numbers, and only images are compared")

        images = []
        for path in paths:
            try:
                images.append(decode_image(path, spec["channels"], spec["white"]))
            except Problem as problem:
                sys.exit(f"error: {path} {problem}")

        pixels = []
        probabilities = []
        known = []
        for image in images:
            pixels.append(hashlib.sha256(image.tobytes()).hexdigest())
            one_probabilities, one_known = model.run(image[None])  # [1, classes], [1]
            probabilities.append(one_probabilities)
            known.append(one_known)

        files[file.name] = {
            "limit": spec["self_test_tolerance"] if "quantization" in spec else FP32_LIMIT,
            "known_limit": (spec["known"] or {}).get("tolerance"),
        }
        arrays[f"{file.name}/pixels"] = pixels
        arrays[f"{file.name}/probabilities"] = np.concatenate(probabilities)
        if spec["known"]:
            arrays[f"{file.name}/known"] = np.concatenate(known)

    about = {"versions": name_versions(), "files": files}
    np.savez(out, about=json.dumps(about), **arrays)


def compare(here: str, there: str, name: str) -> int:
    """Print the cells of a Markdown table for one model file; return 1 if they differ, else 0."""
    ours = np.load(here)
    theirs = np.load(there)
    limits = json.loads(str(ours["about"]))["files"][name]

    our_probabilities = ours[f"{name}/probabilities"]  # [images, classes]
    their_probabilities = theirs[f"{name}/probabilities"]
    decoded = int((ours[f"{name}/pixels"] != theirs[f"{name}/pixels"]).sum())
    changed = int((our_probabilities.argmax(axis=1) != their_probabilities.argmax(axis=1)).sum())
    differences = np.abs(our_probabilities - their_probabilities).max(axis=1)  # [images]
    largest = differences.max()
    beyond = int((differences > SELF_TEST).sum())

    # Written so that a difference that is not a number fails.
    passed = decoded == 0 and changed == 0 and largest <= limits["limit"]
    known = "-"
    if limits["known_limit"] is not None:
        moved = np.abs(ours[f"{name}/known"] - theirs[f"{name}/known"]).max()
        passed = passed and moved <= limits["known_limit"]
        known = f"{moved:.1e}"

    cells = [
        f"{len(differences)}",
        f"{decoded}",
        f"{changed}",
        f"{largest:.1e}",
        f"{beyond}",
        known,
        "passed" if passed else "FAILED",
    ]
    print(" | ".join(cells))
    return 0 if passed else 1


def record(table: str, notes: list[str], directory: str | None) -> None:
    """Write the results file of prove_arm64.sh: the rows of its table, and what computed them."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from benchmarks.results import RESULTS, write_result

    rows = []
    for line in Path(table).read_text().splitlines():
        rows.append([cell.strip() for cell in line.strip().strip("|").split("|")])

    figures = {"rows": rows, "notes": notes}
    command = "bash tests/benchmarks/prove_arm64.sh BUNDLE DIR"
    write_result("arm64", figures, command, Path(directory) if directory else RESULTS)


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

    add = commands.add_parser(
        "record", help="write the results file of a finished table"
    ).add_argument
    add("table", help="the rows that were printed")
    add("notes", nargs="*", help="lines about the machines")
    add("--results", help="the directory of the results file")

    args = parser.parse_args()
    if args.command == "compare":
        return compare(args.here, args.there, args.model)
    if args.command == "versions":
        print(json.loads(str(np.load(args.answers)["about"]))["versions"])
    elif args.command == "record":
        record(args.table, args.notes, args.results)
    else:
        keep(args.bundle, args.out, args.folders)
    return 0


if __name__ == "__main__":
    sys.exit(main())
