"""Is every file of a bundle as it was written? Its files against SHA256SUMS."""

import os
import re

from inference.command_line import say
from inference.errors import Problem, problems
from inference.files import sha256
from inference.finding import note_files, walk
from inference.formats import IMAGE_SUFFIXES

SUMS = "SHA256SUMS"
LINE = re.compile("([0-9a-f]{64}) [ *](.+)\n?")
HARMLESS = (*IMAGE_SUFFIXES, ".csv", ".json", ".jsonl")  # a user's pictures and results
# What web/get-ort.sh fetches, and the link that it makes to the bundle's own model.
FETCHED = re.compile(r"web/ort/ort[\w.-]*\.(js|mjs|wasm)")
LINKED = os.path.join("web", "ort", "model.onnx")
TARGET = "../../model.onnx"


def verify(folder: str, sums_sha256: str | None = None) -> int:
    """Compare all files in a folder with its SHA256SUMS; return the exit code. Raises Problem.

    Pictures and tables that were added, and what the page fetches, are counted and not compared.
    sums_sha256: what the SHA-256 of SHA256SUMS itself must be, known from elsewhere. Without it,
    accidents are found, and not attackers, who would change SHA256SUMS as well.
    """
    path = os.path.join(folder, SUMS)
    sums = read_sums(path)
    # Whoever changed a file could have changed its sum as well.
    if sums_sha256 is not None and sha256(path) != sums_sha256.lower():
        say(f"error: {path} is not the one with the SHA-256 {sums_sha256}")
        return 1

    found = {os.path.relpath(path, folder): problem for path, problem in walk(folder)}
    found.pop(SUMS, None)

    additions = []
    code = 0
    for name in sorted(sums.keys() | found.keys()):
        path = os.path.join(folder, name)
        # A user's own pictures and results beside those of the bundle are no fault.
        if name in found and found[name] is None and name not in sums and may_be_added(path, name):
            additions.append(name)
            continue

        fault = find_fault(path, name, sums, found)
        if fault:
            code = 1
            say(f"error: {path} {fault}")

    note_files("did not compare", additions, "beside those of the bundle")
    if code == 0:
        print(f"verified: {len(sums)} files match {SUMS}")
    return code


def read_sums(path: str) -> dict[str, str]:
    """{file name: SHA-256 in hexadecimal} of a SHA256SUMS file. Raises Problem."""
    sums = {}
    if os.path.lexists(path) and (os.path.islink(path) or not os.path.isfile(path)):
        raise Problem(f"{path} is not a regular file")

    form = "{} ({}): step2_export.py --bundle writes one"
    with (
        problems(f"cannot read {path}", OSError, form=form),
        open(path, encoding="utf-8", errors="surrogateescape") as file,
    ):
        for number, line in enumerate(file, 1):
            match = LINE.fullmatch(line)
            if not match:
                raise Problem(f"{path}, line {number} is not a SHA-256, two spaces and a file name")
            digest, name = match.groups()
            sums[os.path.normpath(name)] = digest
    return sums


def may_be_added(path: str, name: str) -> bool:
    """May a file that SHA256SUMS does not list lie in the folder?"""
    if os.path.islink(path):
        return name == LINKED and os.readlink(path) == TARGET

    slashed = name.replace(os.sep, "/")
    return name.lower().endswith(HARMLESS) or FETCHED.fullmatch(slashed) is not None


def find_fault(path: str, name: str, sums: dict, found: dict) -> str | None:
    """What is wrong with a file, in words; None if nothing is. Raises Problem."""
    if name not in found:
        return "is missing, or outside this folder"
    if found[name]:
        return str(found[name])
    if name not in sums:
        return "is not listed"
    if os.path.islink(path):  # which could lead anywhere, and change after this
        return "is a link"
    if not os.path.isfile(path):  # reading a named pipe would wait for ever
        return "is not a regular file"

    with problems(path, OSError, form="{} cannot be read: {}"):
        digest = sha256(path)
    return None if digest == sums[name] else f"has changed: its SHA-256 is not the one in {SUMS}"
