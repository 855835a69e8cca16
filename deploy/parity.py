"""parity.json beside the exported files: how each was proven, and with what figures."""

import json
from dataclasses import dataclass
from pathlib import Path

from deploy.bundle import remove_bundle
from deploy.formats import FORMATS
from inference.command_line import say

NAME = "parity.json"


@dataclass
class Earlier:
    """What parity.json says of an earlier export, by format.

    current: of this checkpoint. stale: the formats of another checkpoint.
    """

    current: dict[str, dict]
    stale: list[str]

    def has_files(self) -> bool:
        """Did the earlier export leave a file that was proven?"""
        passed = [figures.get("passed") for figures in self.current.values()]
        return any(passed) or bool(self.stale)


def read_earlier(out: str, checkpoint_sha256: str) -> Earlier:
    """What parity.json in `out` says; nothing if there is none, or none of ours."""
    earlier = Earlier(current={}, stale=[])
    try:
        written = json.loads(Path(out, NAME).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError, RecursionError):
        return earlier
    if not isinstance(written, dict):
        return earlier

    # An entry of an unknown format is from a newer version, or not ours: it is left out.
    for name, figures in written.items():
        if name not in FORMATS or not isinstance(figures, dict):
            continue
        if figures.get("checkpoint_sha256") == checkpoint_sha256:
            earlier.current[name] = figures
        else:
            earlier.stale.append(name)
    return earlier


def remove_stale(out: str, stale: list[str], published: set[str]) -> None:
    """Remove the files of another checkpoint that no new ones have replaced, and its bundle."""
    if not stale:
        return
    for name in stale:
        if name not in published:
            for file in FORMATS[name].files:
                Path(out, file).unlink(missing_ok=True)
    remove_bundle(out)
    names = ", ".join(stale)
    say(f"note: {out} held an export of another checkpoint, which is removed: {names}")


def to_bytes(parity: dict[str, dict]) -> bytes:
    """The content of the file. Raises ValueError for NaN, which is not JSON."""
    return json.dumps(parity, indent=2, allow_nan=False).encode()
