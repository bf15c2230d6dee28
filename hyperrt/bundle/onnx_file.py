"""Where an ONNX file keeps weights outside itself; read without the `onnx` package, and without trust.

ONNX is protobuf (onnx.proto3): a message is a row of fields, each with a number and a type.  Of interest is
TensorProto.external_data, whose entry with the key "location" is a file name.  ONNX Runtime opens whatever
stands there, so the bundle looks first: a name that the manifest does not have is a file that nobody hashed.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path

LOCATION = b"location"
# message -> number of a field -> the message in it; all the ways that lead to external data.
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
    """The files that hold weights of the ONNX file `path`, as they are named there.

    Raises:
        ValueError: it is empty, or not made of protobuf fields where a name could be.
        OSError: it cannot be read.
    """
    found: set[bytes] = set()
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        waiting = [(0, len(content), "model")]
        while waiting:
            start, end, message = waiting.pop()
            if content.find(LOCATION, start, end) < 0:  # the case of nearly all: not looked into
                continue
            fields = list(_fields(content, start, end))
            if message == "entry":
                texts = [(number, content[low:high]) for number, low, high in fields]
                if (KEY, LOCATION) in texts:
                    found |= {text for number, text in texts if number == VALUE}
                continue
            inside = MESSAGES[message]
            waiting += [(low, high, inside[number]) for number, low, high in fields if number in inside]
    return found


def _fields(content: mmap.mmap, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Number, start and end of each field that has a length: messages, texts and bytes."""
    while start < end:
        tag, start = _varint(content, start, end)
        kind = tag & 7
        if kind == VARINT:
            _, start = _varint(content, start, end)
        elif kind == LENGTH:
            size, start = _varint(content, start, end)
            if size > end - start:
                raise ValueError(f"a field at byte {start} ends outside of what holds it")
            yield (tag & 0xFFFFFFFF) >> 3, start, start + size
            start += size
        elif kind in (EIGHT_BYTES, FOUR_BYTES):
            start += 8 if kind == EIGHT_BYTES else 4
        else:
            raise ValueError(f"a field at byte {start} is of the unknown type {kind}")


def _varint(content: mmap.mmap, start: int, end: int) -> tuple[int, int]:
    """A number, seven bits a byte, lowest first; and where it ends."""
    value = 0
    for place in range(start, min(end, start + 10)):
        value |= (content[place] & 0x7F) << 7 * (place - start)
        if content[place] < 0x80:
            return value, place + 1
    raise ValueError(f"a number at byte {start} does not end")
