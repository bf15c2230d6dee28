"""Reads an ONNX file without the `onnx` package: names and sizes of its tensors, and the files it refers to.

ONNX is protobuf (onnx.proto3): a message is a sequence of fields, each with a number and a type.  Weights are
skipped, not read.  The file is not trusted: every field must lie within the message that contains it.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

Dims = tuple[int | str, ...]
Span = tuple[int, int]  # first byte of a message or text, and the byte after its last

VARINT, EIGHT_BYTES, LENGTH, FOUR_BYTES = 0, 1, 2, 5  # types of a field
# Numbers of fields, by message.
GRAPH = 7  # ModelProto
NODE, INITIALIZER, INPUT, OUTPUT = 1, 5, 11, 12  # GraphProto
NODE_INPUT, OPERATOR = 1, 4  # NodeProto
DATA_TYPE, TENSOR_NAME = 2, 8  # TensorProto
NAME, TYPE = 1, 2  # ValueInfoProto
TENSOR, SHAPE, DIM = 1, 2, 1  # TypeProto, TypeProto.Tensor, TensorShapeProto
DIM_VALUE, DIM_NAME = 1, 2  # TensorShapeProto.Dimension
KEY, VALUE = 1, 2  # StringStringEntryProto

HALVES = (10, 16)  # float16 and bfloat16, of TensorProto.DataType
PRODUCTS = {b"Conv", b"Gemm", b"MatMul"}
# ONNX Runtime's name for weights that lie in memory: OpenVINO reads at the address that the file names.
IN_MEMORY = b"_ORT_MEM_ADDR_"
LOCATION = b"location"
# Message -> number of a field -> the message in that field: every path to TensorProto.external_data.
PATHS_TO_EXTERNAL_DATA = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {13: "entry"},
}


def tensor_dims(path: Path) -> tuple[dict[str, Dims], dict[str, Dims]]:
    """Inputs and outputs of an ONNX file: name -> dims, in order; a dim without a name gets one.

    Inputs with a default (initializers) are included.

    Raises:
        ValueError: it is empty, not an ONNX file, or refers to weights in memory.
        OSError: it cannot be read.
    """
    sides: dict[int, dict[str, Dims]] = {INPUT: {}, OUTPUT: {}}
    with _mapped(path) as content:
        graph = _graph(content)
        if content.find(IN_MEMORY) >= 0:
            raise ValueError("it names weights in memory, which no file may")
        for number, value in _fields(content, graph):
            if number in sides and not isinstance(value, int):
                name = b"".join(_texts(content, value, NAME)).decode()
                sides[number][name] = tuple(_dims(content, value, name))
    return sides[INPUT], sides[OUTPUT]


def multiplies_halves(path: Path) -> bool:
    """Whether a product (Conv, Gemm, MatMul) has a weight or a bias in half precision.

    Looking at stored weights alone would be wrong: a graph that computes in fp32 may store halves and cast
    them.  In a graph with int8 weights the biases of its convolutions show the precision.

    Raises:
        ValueError: it is empty, or not an ONNX file.
        OSError: it cannot be read.
    """
    with _mapped(path) as content:
        graph = _graph(content)
        halves = {
            name
            for tensor in _messages(content, graph, INITIALIZER)
            if any(number == DATA_TYPE and kind in HALVES for number, kind in _fields(content, tensor))
            for name in _texts(content, tensor, TENSOR_NAME)
        }
        return any(
            halves.intersection(_texts(content, node, NODE_INPUT))
            for node in _messages(content, graph, NODE)
            if halves and PRODUCTS.intersection(_texts(content, node, OPERATOR))
        )


def external_files(path: Path) -> set[bytes]:
    """Names of the files in which an ONNX file keeps weights, as it spells them.

    ONNX Runtime opens whatever is named there, so a bundle checks first: a file that its manifest does not
    list was never hashed.

    Raises:
        ValueError: it is empty, or not protobuf where a name could be.
        OSError: it cannot be read.
    """
    files: set[bytes] = set()
    with _mapped(path) as content:
        waiting = [(0, len(content), "model")]
        while waiting:
            start, end, message = waiting.pop()
            if content.find(LOCATION, start, end) < 0:  # nearly all messages: their fields are not read
                continue
            spans = [
                (number, value)
                for number, value in _fields(content, (start, end))
                if not isinstance(value, int)
            ]
            if message == "entry":
                texts = [(number, content[low:high]) for number, (low, high) in spans]
                if (KEY, LOCATION) in texts:
                    files |= {text for number, text in texts if number == VALUE}
                continue
            inside = PATHS_TO_EXTERNAL_DATA[message]
            waiting += [(*span, inside[number]) for number, span in spans if number in inside]
    return files


@contextmanager
def _mapped(path: Path) -> Iterator[mmap.mmap]:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        yield content


def _graph(content: mmap.mmap) -> Span:
    graphs = _messages(content, (0, len(content)), GRAPH)
    if len(graphs) != 1:
        raise ValueError("it is not an ONNX file: it has no graph")
    return graphs[0]


def _dims(content: mmap.mmap, value: Span, name: str) -> Iterator[int | str]:
    """Sizes of an input or output, a ValueInfoProto."""
    for axis, dim in enumerate(_messages(content, value, TYPE, TENSOR, SHAPE, DIM)):
        size: int | str = f"{name}_{axis}"
        for number, part in _fields(content, dim):
            if number == DIM_VALUE and isinstance(part, int):
                size = part
            elif number == DIM_NAME and not isinstance(part, int):
                size = content[part[0] : part[1]].decode() or size
        yield size


def _texts(content: mmap.mmap, span: Span, number: int) -> list[bytes]:
    return [content[low:high] for low, high in _messages(content, span, number)]


def _messages(content: mmap.mmap, span: Span, *path: int) -> list[Span]:
    """All messages or texts at the end of a path of field numbers, each inside the one before."""
    spans = [span]
    for step in path:
        spans = [
            value
            for outer in spans
            for number, value in _fields(content, outer)
            if number == step and not isinstance(value, int)
        ]
    return spans


def _fields(content: mmap.mmap, span: Span) -> Iterator[tuple[int, int | Span]]:
    """Number and value of each field of a message: an integer, or the span of a message or text."""
    start, end = span
    while start < end:
        tag, start = _varint(content, start, end)
        number, kind = (tag & 0xFFFFFFFF) >> 3, tag & 7
        if kind == VARINT:
            value, start = _varint(content, start, end)
            yield number, value
        elif kind == LENGTH:
            size, start = _varint(content, start, end)
            if size > end - start:
                raise ValueError(f"a field at byte {start} ends outside of its message")
            yield number, (start, start + size)
            start += size
        elif kind in (EIGHT_BYTES, FOUR_BYTES):
            start += 8 if kind == EIGHT_BYTES else 4
        else:
            raise ValueError(f"a field at byte {start} is of the unknown type {kind}")


def _varint(content: mmap.mmap, start: int, end: int) -> tuple[int, int]:
    """An integer, seven bits per byte, lowest first; and the byte after it."""
    value = 0
    for position in range(start, min(end, start + 10)):
        value |= (content[position] & 0x7F) << 7 * (position - start)
        if content[position] < 0x80:
            return value, position + 1
    raise ValueError(f"a number at byte {start} does not end")
