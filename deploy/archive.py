"""step3_infer.pyz: step3_infer.py and inference/ in one file, as they go to a device.

Python runs such an archive (PEP 441) with the archive itself as the first place to import from, so
that nothing planted beside it is imported.
"""

import io
import os
import shutil
import tempfile
import time
import zipapp
from pathlib import Path

import inference
from inference.files import replacing

NAME = "step3_infer.pyz"
ROOM = Path(inference.__file__).parent
SCRIPT = ROOM.parent / "step3_infer.py"
# Python 2 and 3.6 can parse this much, and step3_infer.py says which Python it needs.
MAIN = """\
import runpy

runpy.run_module("step3_infer", run_name="__main__", alter_sys=True)
"""
OLDEST = (1980, 1, 1, 0, 0, 0, 0, 1, -1)  # the first date that a zip archive can hold, local time


def write_program(folder: str) -> str:
    """Write step3_infer.pyz into a folder, whole or not at all; return its path. Raises OSError."""
    path = os.path.join(folder, NAME)
    with replacing(path) as file:
        file.write(program_bytes())
    return path


def program_bytes() -> bytes:
    """The archive: sources only, with fixed dates and modes, so that it is the same each time."""
    content = io.BytesIO()
    with tempfile.TemporaryDirectory() as staging:
        (Path(staging) / "inference").mkdir()
        for source in ROOM.glob("*.py"):
            shutil.copyfile(source, Path(staging) / "inference" / source.name)
        shutil.copyfile(SCRIPT, Path(staging) / SCRIPT.name)
        Path(staging, "__main__.py").write_text(MAIN, encoding="utf-8", newline="\n")

        date = time.mktime(OLDEST)
        for path in Path(staging).rglob("*"):
            path.chmod(0o755 if path.is_dir() else 0o644)
            os.utime(path, (date, date))
        zipapp.create_archive(staging, content)
    return content.getvalue()
