"""step3_infer.pyz: step3_infer.py and inference/ in one file, as they go to a device.

The format is that of the standard library's zipapp (PEP 441). Python runs such an archive with the
archive itself as the first place to import from, so nothing planted beside it is imported. It holds
sources only, in a fixed order with fixed dates and modes and uncompressed, so that its bytes depend
on these sources alone.
"""

import io
import os
import zipfile
from pathlib import Path

import inference
from inference.files import replacing

NAME = "step3_infer.pyz"
PACKAGE = Path(inference.__file__).parent
SCRIPT = PACKAGE.parent / "step3_infer.py"
MAIN = Path(__file__).with_name("archive_main.py")
SHEBANG = b"#!/usr/bin/env python3\n"
FIRST_DATE = (1980, 1, 1, 0, 0, 0)  # the first that a zip archive can hold
UNIX = 3  # the system of whose modes an archive speaks
FILE_MODE, EXECUTABLE_MODE = 0o644, 0o755
REGULAR_FILE = 0o100000


def write_program(folder: str) -> str:
    """Write step3_infer.pyz into a folder, whole or not at all; return its path. Raises OSError."""
    path = os.path.join(folder, NAME)
    with replacing(path) as file:
        file.write(program_bytes())
    return path


def program_bytes() -> bytes:
    """The bytes of the archive. Raises OSError if the sources cannot be read."""
    sources = {"__main__.py": MAIN, SCRIPT.name: SCRIPT}
    for path in PACKAGE.glob("*.py"):
        sources[f"{PACKAGE.name}/{path.name}"] = path

    content = io.BytesIO()
    content.write(SHEBANG)
    with zipfile.ZipFile(content, "w") as archive:
        for name in sorted(sources):
            source = sources[name].read_bytes().replace(b"\r\n", b"\n")  # a clone on Windows
            add_file(archive, name, source, zipfile.ZIP_STORED)
    return content.getvalue()


def add_file(
    archive: zipfile.ZipFile, name: str, content: bytes, compression: int, mode: int = FILE_MODE
) -> None:
    """Add a file whose entry depends on nothing but these arguments."""
    entry = zipfile.ZipInfo(name, date_time=FIRST_DATE)
    entry.create_system = UNIX
    entry.external_attr = (REGULAR_FILE | mode) << 16
    archive.writestr(entry, content, compression)
