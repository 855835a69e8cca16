"""Does an ONNX file keep weights outside itself?

step2_export.py never writes such a file. Older onnxruntimes follow any path in it, so that a
stranger's file could show the bytes of /etc/passwd as weights. The fields are those of onnx.proto3.
"""

from collections.abc import Iterator

import numpy as np

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5  # wire types of protobuf

# message -> {number of a field: the message in it}, on all ways that lead to a tensor
FIELDS = {
    "Model": {7: "Graph", 20: "Training", 25: "Function"},
    "Graph": {1: "Node", 5: "Tensor", 15: "Sparse"},
    "Node": {5: "Attribute"},
    "Attribute": {
        5: "Tensor",
        6: "Graph",
        10: "Tensor",
        11: "Graph",
        22: "Sparse",
        23: "Sparse",
    },
    "Sparse": {1: "Tensor", 2: "Tensor"},
    "Function": {7: "Node", 11: "Attribute"},
    "Training": {1: "Graph", 2: "Graph"},
    "Tensor": {},
}
EXTERNAL_DATA, DATA_LOCATION = 13, 14  # fields of a tensor; a location of 0 is the file itself
# A tensor outside needs this key. Searching for it first spares nearly all files the rest.
KEY = b"location"


def has_external_data(path: str) -> bool:
    """Is any tensor of an ONNX file outside of it? Raises OSError.

    False for a file that is no whole protobuf, which no runtime loads.
    """
    content = np.fromfile(path, np.uint8).tobytes()
    if KEY not in content:
        return False

    waiting = [("Model", memoryview(content))]
    try:
        while waiting:
            message, data = waiting.pop()
            for number, value in read_fields(data):
                if message == "Tensor" and number == DATA_LOCATION and value != 0:
                    return True
                if message == "Tensor" and number == EXTERNAL_DATA:
                    return True
                inner = FIELDS[message].get(number)
                if inner and isinstance(value, memoryview):
                    waiting.append((inner, value))
    except (IndexError, ValueError):
        return False
    return False


def read_fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Yield (number, value) of each field of a message: an int of a varint, bytes of the others.

    Raises IndexError or ValueError if the message is cut off or no protobuf.
    """
    position = 0
    while position < len(data):
        key, position = read_varint(data, position)
        number, wire_type = key >> 3, key & 7
        if wire_type == VARINT:
            value, position = read_varint(data, position)
            yield number, value
            continue

        if wire_type == BYTES:
            length, position = read_varint(data, position)
        elif wire_type in (FIXED32, FIXED64):
            length = 4 if wire_type == FIXED32 else 8
        else:
            raise ValueError(f"unknown wire type {wire_type}")
        if position + length > len(data):
            raise IndexError("a field is cut off")
        yield number, data[position : position + length]
        position += length


def read_varint(data: memoryview, position: int) -> tuple[int, int]:
    """A variable-length integer and the position after it."""
    value = shift = 0
    while True:
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position

        shift += 7
        if shift > 63:
            raise ValueError("a varint of more than 10 bytes")
