"""Finds the external data files of an ONNX file; does without the `onnx` package, and trusts nothing.

ONNX is protobuf (onnx.proto3): a message is a sequence of fields, each with a number and a type.  An entry of
TensorProto.external_data with the key "location" holds a file name.  ONNX Runtime opens any file named there,
so the bundle looks first: nobody has hashed a file that the manifest does not name.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path

LOCATION = b"location"
# message -> field number -> the message in it; every way to external data.
MESSAGES = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {13: "entry"},
}
KEY, VALUE = 1, 2  # fields of an entry
VARINT, EIGHT_BYTES, LENGTH, FOUR_BYTES = 0, 1, 2, 5  # types of a field


def external_files(path: Path) -> set[bytes]:
    """Names of the files that hold weights of the ONNX file `path`.

    Raises:
        ValueError: it is empty, or not protobuf where a name could be.
        OSError: it cannot be read.
    """
    files: set[bytes] = set()
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        waiting = [(0, len(content), "model")]
        while waiting:
            start, end, message = waiting.pop()
            if content.find(LOCATION, start, end) < 0:  # nearly always
                continue
            fields = list(_fields(content, start, end))
            if message == "entry":
                texts = [(number, content[low:high]) for number, low, high in fields]
                if (KEY, LOCATION) in texts:
                    files |= {text for number, text in texts if number == VALUE}
                continue
            inside = MESSAGES[message]
            waiting += [(low, high, inside[number]) for number, low, high in fields if number in inside]
    return files


def _fields(content: mmap.mmap, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Number, start and end of each field that has a length: a message, text or bytes."""
    while start < end:
        tag, start = _varint(content, start, end)
        kind = tag & 7
        if kind == VARINT:
            _, start = _varint(content, start, end)
        elif kind == LENGTH:
            size, start = _varint(content, start, end)
            if size > end - start:
                raise ValueError(f"a field at byte {start} ends outside its message")
            yield (tag & 0xFFFFFFFF) >> 3, start, start + size
            start += size
        elif kind in (EIGHT_BYTES, FOUR_BYTES):
            start += 8 if kind == EIGHT_BYTES else 4
        else:
            raise ValueError(f"a field at byte {start} has the unknown type {kind}")


def _varint(content: mmap.mmap, start: int, end: int) -> tuple[int, int]:
    """A number of seven bits per byte, lowest first, and where it ends."""
    value = 0
    for place in range(start, min(end, start + 10)):
        value |= (content[place] & 0x7F) << 7 * (place - start)
        if content[place] < 0x80:
            return value, place + 1
    raise ValueError(f"a number at byte {start} does not end")
