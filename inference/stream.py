"""Pictures on standard input: one, or a stream of JPEGs and PNGs until it ends."""

import contextlib
import io
import os
import select
import sys
import threading
from collections.abc import Iterator

from inference.command_line import say
from inference.errors import Problem, one_line
from inference.formats import SIGNATURES
from inference.frames import LONGEST_START, START, Frame, Splitter
from inference.images import MAX_STREAM_BYTES, images_of
from inference.predict import Model, decode_for, predict_decoded

BLOCK = 1 << 16  # bytes that are read at a time
KEPT = 4 << 20  # bytes of the beginning, in case that it is one picture of another format
LONG_SEARCH = 64 << 20  # bytes without a picture, after which that is said
AT_ONCE = 0.1  # seconds in which the end of the input must follow a picture that is all of it


# ------------------------------------------------------------------------------------- predictions
def predict_stream(
    model: Model, frames: Iterator[tuple[str, Frame]], top_k: int, with_content: bool
) -> Iterator[list[dict]]:
    """Predict frames one by one; yields lists of one row, as predict_files() does.

    with_content: whether the rows bring the picture itself as `content`.
    """
    for path, frame in frames:
        try:
            if frame.reason:
                raise Problem(frame.reason)
            image = decode_for(model, io.BytesIO(frame.content), model.max_pixels)
            row = {"path": path, **predict_decoded(model, {0: image}, top_k)[0]}
        except Problem as error:
            row = {"path": path, "error": str(error)}
        if with_content:
            row["content"] = frame.content
        yield [row]


def frames_of_input(every: int, live: bool) -> Iterator[tuple[str, Frame]]:
    """The pictures on standard input with their paths: -#1, -#2, ...; "-" if it is only one.

    every: take one in so many. live: always the newest, and count those that are left out.
    """
    source = Source()
    try:
        frames = split(source, every)
        if live:
            frames = Newest(frames)
        for frame in frames:
            yield ("-" if frame.is_alone else f"-#{frame.number}"), frame
    except OSError as error:
        yield "-", Frame(number=1, reason=f"cannot be read: {one_line(error)}")


class Newest:
    """Always the newest frame; those that came in the meantime are left out, and counted.

    A thread of its own reads, and holds one frame at most.
    """

    def __init__(self, frames: Iterator[Frame]):
        self.frames = frames
        self.newest: Frame | None = None
        self.has_ended = False
        self.error: OSError | None = None
        self.left_out = 0
        self.changed = threading.Condition()

    def __iter__(self) -> Iterator[Frame]:
        # A thread that waits for input must not keep the program from ending.
        threading.Thread(target=self.read, daemon=True).start()
        taken = 0
        try:
            while True:
                frame = self.take()
                if frame is None:
                    return
                taken += 1
                yield frame
        finally:
            if self.left_out:
                say(
                    f"note: predicted {images_of(taken)}; {self.left_out:,} came meanwhile and "
                    "were left out"
                )

    def take(self) -> Frame | None:
        """The newest frame, as soon as there is one; None at the end. Raises OSError."""
        with self.changed:
            while self.newest is None and not self.has_ended:
                self.changed.wait()
            frame = self.newest
            self.newest = None
        if frame is None and self.error:
            raise self.error
        return frame

    def read(self) -> None:
        """The thread's work."""
        try:
            for frame in self.frames:
                with self.changed:
                    self.left_out += self.newest is not None
                    self.newest = frame
                    self.changed.notify()
        except OSError as error:
            self.error = error
        with self.changed:
            self.has_ended = True
            self.changed.notify()


# ------------------------------------------------------------------------------------------- input
class Source:
    """Standard input in blocks, as they come."""

    def __init__(self):
        self.stream = getattr(sys.stdin, "buffer", io.BytesIO())  # it may be closed
        self.ahead = b""  # what ends_at_once() has read
        self.has_ended = False

    def read(self) -> bytes:
        """What there is, at most BLOCK bytes; empty at the end. Raises OSError."""
        if self.ahead:
            block, self.ahead = self.ahead, b""
            return block
        if self.has_ended:
            return b""

        try:
            block = os.read(self.stream.fileno(), BLOCK)
        except io.UnsupportedOperation:  # it is no file of the system's
            block = self.stream.read(BLOCK)
        self.has_ended = not block
        return block

    def ends_at_once(self) -> bool:
        """Does the input end here, or within AT_ONCE? Raises OSError."""
        if self.ahead or self.has_ended:
            return not self.ahead
        if not self.stream.seekable():  # a file never waits, and a camera may
            with contextlib.suppress(ValueError, OSError):  # Windows: no pipe can be asked
                if not select.select([self.stream], [], [], AT_ONCE)[0]:
                    return False
        self.ahead = self.read()
        return not self.ahead


# --------------------------------------------------------------------------------------- splitting
def split(source: Source, every: int) -> Iterator[Frame]:
    """The pictures of an input, one in `every`. Raises OSError."""
    first = source.read()
    while 0 < len(first) < LONGEST_START and not source.has_ended:
        first += source.read()
    if is_other_format(first):
        yield Frame(number=1, content=read_all(source, first), is_alone=True)
        return

    for frame in all_frames(source, first):
        if (frame.number - 1) % every == 0:
            yield frame


def all_frames(source: Source, first: bytes) -> Iterator[Frame]:
    """The JPEGs and PNGs of an input that begins with `first`. Raises OSError."""
    splitter = Splitter()
    kept = b""  # of an input in which no picture was found yet
    searched = 0
    block = first
    while block:
        searched += len(block)
        if splitter.number == 0 and searched - len(block) < LONG_SEARCH <= searched:
            say(f"note: no JPEG and no PNG in the first {LONG_SEARCH >> 20} MiB of standard input")
        for frame in splitter.feed(block):
            if frame.number == 1:
                frame.is_alone = not splitter.buffer and source.ends_at_once()
            yield frame
        kept = b"" if splitter.number else (kept + block)[:KEPT]
        block = source.read()

    for frame in splitter.finish():
        frame.is_alone = frame.number == 1 and not splitter.buffer
        yield frame
    if splitter.number == 0:  # perhaps a TGA, which has no signature: decoding says what it is
        yield Frame(number=1, content=kept, is_alone=True)
    elif splitter.between:
        bytes_between = "1 byte" if splitter.between == 1 else f"{splitter.between:,} bytes"
        say(f"note: passed over {bytes_between} of standard input that are of no JPEG or PNG")


def is_other_format(start: bytes) -> bool:
    """Does a picture begin like this that is neither a JPEG nor a PNG?"""
    if START.match(start):
        return False
    if start[:1] == b"P" and start[2:3] not in (b" ", b"\t", b"\r", b"\n", b"#"):
        return False
    is_webp = start[:4] == b"RIFF"
    is_heif = start[4:8] == b"ftyp"
    return start.startswith(SIGNATURES) or is_webp or is_heif


def read_all(source: Source, first: bytes) -> bytes:
    """The whole input, MAX_STREAM_BYTES at most. Raises OSError."""
    content = io.BytesIO()
    block = first
    while block and content.tell() < MAX_STREAM_BYTES:
        content.write(block)
        block = source.read()
    return content.getvalue()
