"""Where pictures begin and end in a stream of JPEGs and PNGs.

The end of a picture is found by its own structure: the segments of a JPEG (ITU T.81, annex B) and
the chunks of a PNG have lengths. So thumbnails inside a picture are no pictures, and what lies
between two pictures, such as the headers of multipart/x-mixed-replace, is passed over. A picture
that breaks off ends where the next one begins.
"""

import contextlib
import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

from inference.limits import PNG_SIGNATURE

MAX_FRAME = 64 << 20  # bytes of a picture in a stream

JPEG_START = b"\xff\xd8\xff"
START = re.compile(re.escape(JPEG_START) + b"|" + re.escape(PNG_SIGNATURE))
LONGEST_START = len(PNG_SIGNATURE)
# In the data of a scan, 0xFF is followed by 0, a restart marker, or fill bytes and a marker.
MARKER_IN_SCAN = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]|" + re.escape(PNG_SIGNATURE))
SOI, EOI, SOS, DHT, SOF0, APP2 = 0xD8, 0xD9, 0xDA, 0xC4, 0xC0, 0xE2
MP_ENTRIES = 0xB002  # the tag of the list of the pictures in a file
WITHOUT_LENGTH = (0x01, *range(0xD0, 0xD8))
APPLICATION = (*range(0xE0, 0xF0), 0xFE)  # whose content may be anything, also a thumbnail
CHUNK = re.compile(rb"[A-Za-z]{4}")

# The Huffman tables of ITU T.81, annex K.3, which the frames of MJPEG may lack.
DEFAULT_TABLES = bytes.fromhex(
    "ffc4001f0000010501010101010100000000000000000102030405060708090a0bffc400b510000201030302"
    "0403050504040000017d01020300041105122131410613516107227114328191a1082342b1c11552d1f02433"
    "627282090a161718191a25262728292a3435363738393a434445464748494a535455565758595a6364656667"
    "68696a737475767778797a838485868788898a92939495969798999aa2a3a4a5a6a7a8a9aab2b3b4b5b6b7b8"
    "b9bac2c3c4c5c6c7c8c9cad2d3d4d5d6d7d8d9dae1e2e3e4e5e6e7e8e9eaf1f2f3f4f5f6f7f8f9faffc4001f"
    "0100030101010101010101010000000000000102030405060708090a0bffc400b51100020102040403040705"
    "040400010277000102031104052131061241510761711322328108144291a1b1c109233352f0156272d10a16"
    "2434e125f11718191a262728292a35363738393a434445464748494a535455565758595a636465666768696a"
    "737475767778797a82838485868788898a92939495969798999aa2a3a4a5a6a7a8a9aab2b3b4b5b6b7b8b9ba"
    "c2c3c4c5c6c7c8c9cad2d3d4d5d6d7d8d9dae2e3e4e5e6e7e8e9eaf2f3f4f5f6f7f8f9fa"
)


@dataclass
class Frame:
    """One picture of a stream.

    number: its place in it, from 1. reason: why it is none. is_alone: whether it is all there is.
    """

    number: int
    content: bytes = b""
    reason: str | None = None
    is_alone: bool = False


class Splitter:
    """Finds pictures in bytes that come bit by bit.

    number: of the pictures so far. at: how far the picture at the beginning of the buffer has been
    read; 0: no picture has begun there. between: bytes that are of no picture.
    """

    def __init__(self):
        self.buffer = bytearray()
        self.number = 0
        self.at = 0
        self.in_scan = False
        self.scan_at = 0  # where its first scan begins
        self.has_tables = False  # for Huffman's code
        self.is_baseline = False
        self.passed = 0  # bytes before the buffer
        self.between = 0
        self.parts: set[int] = set()  # where the further pictures of a file begin

    def feed(self, block: bytes) -> Iterator[Frame]:
        """Add bytes; yield the pictures that are whole now."""
        self.buffer += block
        while True:
            if self.at == 0 and not self.begin():
                return
            is_png = self.buffer.startswith(PNG_SIGNATURE[:4])
            size = self.read_chunks() if is_png else self.read_segments()
            if size is None:
                if len(self.buffer) <= MAX_FRAME:
                    return
                yield self.too_long()
                continue
            yield from self.cut(size)

    def finish(self) -> Iterator[Frame]:
        """The picture that the end of the input breaks off, and those that it had swallowed."""
        while self.at:
            next_one = START.search(self.buffer, self.at)
            yield from self.cut(next_one.start() if next_one else len(self.buffer))
            yield from self.feed(b"")
        self.between += len(self.buffer)

    def begin(self) -> bool:
        """Go to where the next picture begins, if that is known."""
        start = START.search(self.buffer)
        size = start.start() if start else max(len(self.buffer) - LONGEST_START + 1, 0)
        self.between += size
        self.drop(size)
        if start is None:
            return False
        self.at = 2 if self.buffer.startswith(JPEG_START) else LONGEST_START
        self.in_scan = False
        self.scan_at = 0
        self.has_tables = False
        self.is_baseline = False
        return True

    def cut(self, size: int) -> Iterator[Frame]:
        """Take the picture of this size from the buffer."""
        content = bytes(self.buffer[:size])
        is_part = self.passed in self.parts
        if self.is_baseline and self.scan_at and not self.has_tables:
            content = content[: self.scan_at] + DEFAULT_TABLES + content[self.scan_at :]
        self.drop(size)
        self.at = 0
        if is_part:  # a depth map or a preview, as in MPO files
            return
        self.number += 1
        yield Frame(number=self.number, content=content)

    def too_long(self) -> Frame:
        """The error for a picture that does not end; all of it is passed over."""
        self.drop(len(self.buffer))
        self.at = 0
        self.number += 1
        reason = f"has more than {MAX_FRAME >> 20} MiB, too many for a picture in a stream"
        return Frame(number=self.number, reason=reason)

    def drop(self, count: int) -> None:
        """Drop bytes from the beginning of the buffer."""
        del self.buffer[:count]
        self.passed += count

    # ------------------------------------------------------------------------------------- PNG
    def read_chunks(self) -> int | None:
        """The size of the PNG at the beginning; None if it is not whole yet."""
        while len(self.buffer) >= self.at + 8:
            length, kind = struct.unpack_from(">I4s", self.buffer, self.at)
            if not CHUNK.fullmatch(kind) or length > MAX_FRAME:
                return self.at
            end = self.at + 12 + length
            if len(self.buffer) < end:
                return None
            # A chunk whose length reaches into the next picture broke off.
            checksum = zlib.crc32(memoryview(self.buffer)[self.at + 4 : end - 4])
            if checksum != int.from_bytes(self.buffer[end - 4 : end], "big"):
                return self.at
            self.at = end
            if kind == b"IEND":
                return end
        return None

    # ------------------------------------------------------------------------------------ JPEG
    def read_segments(self) -> int | None:
        """The size of the JPEG at the beginning; None if it is not whole yet."""
        while self.find_marker():
            first, kind = self.buffer[self.at : self.at + 2]
            if kind == EOI and first == 0xFF:
                return self.at + 2
            # The next picture's beginning, or no marker: this one broke off.
            if first != 0xFF or kind in (0, SOI):
                return self.at
            if kind in WITHOUT_LENGTH:
                self.at += 2
                continue

            if len(self.buffer) < self.at + 4:
                return None
            (length,) = struct.unpack_from(">H", self.buffer, self.at + 2)
            end = self.at + 2 + length
            if length < 2:
                return self.at
            if len(self.buffer) < end + 2:  # with the next marker
                return None
            broken_off = self.check_segment(kind, end)
            if broken_off is not None:
                return broken_off
            self.take_segment(kind, end)
        return None

    def find_marker(self) -> bool:
        """Go to the next marker, if it has come."""
        if self.in_scan:
            marker = MARKER_IN_SCAN.search(self.buffer, self.at)
            if marker is None:
                self.at = max(self.at, len(self.buffer) - LONGEST_START + 1)
                return False
            self.at = marker.start()
            self.in_scan = False

        while self.buffer[self.at : self.at + 2] == b"\xff\xff":  # fill bytes
            self.at += 1
        return len(self.buffer) >= self.at + 2

    def check_segment(self, kind: int, end: int) -> int | None:
        """Where a JPEG breaks off, if not after this segment, which ends at `end`."""
        # A thumbnail may begin inside of an application's segment, but not end behind it.
        begin = end - 2 if kind in APPLICATION else self.at
        next_one = START.search(self.buffer, begin, end + 2)
        if next_one:
            return next_one.start()
        # A length that leads nowhere is of a segment that broke off.
        is_followed = kind == SOS or self.buffer[end] == 0xFF
        return None if is_followed else self.at

    def take_segment(self, kind: int, end: int) -> None:
        """Go on behind a segment."""
        if kind == DHT:
            self.has_tables = True
        if kind == SOF0:
            self.is_baseline = True
        if kind == APP2:
            self.parts |= mpf_parts(
                bytes(self.buffer[self.at + 4 : end]), self.passed + self.at + 4
            )
        if kind != SOS:
            self.at = end
            return
        self.scan_at = self.scan_at or self.at
        self.in_scan = True
        self.at += 4  # a picture that broke off in this header may have the next one in it


def mpf_parts(segment: bytes, place: int) -> set[int]:
    """Where the further pictures of a multi-picture file begin (CIPA DC-007), by its APP2 segment.

    place: of the segment's content in the input. Empty if the segment is another.
    """
    if not segment.startswith(b"MPF\0"):
        return set()
    table = segment[4:]
    order = "<" if table.startswith(b"II") else ">"
    parts = set()
    with contextlib.suppress(struct.error):  # cut off, or not what it says
        (directory,) = struct.unpack_from(f"{order}I", table, 4)
        (count,) = struct.unpack_from(f"{order}H", table, directory)
        for number in range(count):
            entry = struct.unpack_from(f"{order}HHII", table, directory + 2 + 12 * number)
            if entry[0] != MP_ENTRIES:
                continue
            for start in range(entry[3], entry[3] + entry[2], 16):
                _, _, offset = struct.unpack_from(f"{order}III", table, start)
                if offset:  # the first picture has none
                    parts.add(place + 4 + offset)
    return parts
