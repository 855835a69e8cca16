"""parity.json beside the exported files: how each was proven, and with what figures."""

import json
from pathlib import Path

from deploy.bundle import remove_bundle
from deploy.formats import FORMATS
from inference.command_line import say

NAME = "parity.json"


def read_earlier(out: str, checkpoint_sha256: str) -> dict[str, dict]:
    """What parity.json says of files of this checkpoint, by format.

    Files of another checkpoint are removed, since they would be taken for new ones.
    """
    try:
        written = json.loads(Path(out, NAME).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    if not isinstance(written, dict):
        return {}

    # An entry of an unknown format is from a newer version, or not ours: it is left out.
    parity = {}
    stale = []
    for name, figures in written.items():
        if name not in FORMATS or not isinstance(figures, dict):
            continue
        if figures.get("checkpoint_sha256") == checkpoint_sha256:
            parity[name] = figures
        else:
            stale.append(name)

    if stale:
        for name in stale:
            Path(out, FORMATS[name].file).unlink(missing_ok=True)
        remove_bundle(out)
        names = ", ".join(stale)
        say(f"note: {out} held an export of another checkpoint, which is removed: {names}")
    return parity


def to_bytes(parity: dict[str, dict]) -> bytes:
    """The content of the file. Raises ValueError for NaN, which is not JSON."""
    return json.dumps(parity, indent=2, allow_nan=False).encode()
