"""Small JSON files that appear whole or not at all."""

import json
from pathlib import Path

from inference.files import replacing


def read_json(path: str):
    """The content of a JSON file. Raises OSError or ValueError."""
    return json.loads(Path(path).read_text(encoding="utf-8"))


def write_json(path: str, content) -> None:
    """Write a JSON file, or replace the one that is there. Raises OSError."""
    with replacing(path) as file:
        file.write(json.dumps(content).encode())
