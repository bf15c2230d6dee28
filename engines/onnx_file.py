"""Names, sizes and types of an ONNX graph's tensors, read from the file; for what a backend does not tell.

ONNX is protobuf (onnx.proto3): a message is a row of fields, each with a number and a type.  The way is
ModelProto.graph, GraphProto.input and .output, ValueInfoProto.type, TypeProto.tensor_type, Tensor.shape,
the dims.
Weights are stepped over, not read.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

Dims = tuple[int | str, ...]

GRAPH, NODE, INITIALIZER, INPUT, OUTPUT = 7, 1, 5, 11, 12
TAKES, OPERATOR = 1, 4  # of a NodeProto
DATA_TYPE, TENSOR_NAME = 2, 8  # of a TensorProto
HALVES = (10, 16)  # float16 and bfloat16, of a TensorProto.DataType
PRODUCTS = {b"Conv", b"Gemm", b"MatMul"}
NAME, TYPE = 1, 2  # of a ValueInfoProto
TENSOR, SHAPE, DIM = 1, 2, 1
SIZE, SYMBOL = 1, 2  # of a dim
VARINT, EIGHT_BYTES, LENGTH, FOUR_BYTES = 0, 1, 2, 5
# ONNX Runtime's name for weights that lie in memory: OpenVINO reads at the address that the file names.
IN_MEMORY = b"_ORT_MEM_ADDR_"


def tensor_dims(path: Path) -> tuple[dict[str, Dims], dict[str, Dims]]:
    """Inputs and outputs of the ONNX file `path`: name -> dims, in order; a dim without a name gets one.

    Inputs that have a default (initialisers) are among them.

    Raises:
        ValueError: it is empty, not an ONNX file, or its weights are said to lie in memory.
        OSError: it cannot be read.
    """
    with _opened(path) as (content, graph):
        if content.find(IN_MEMORY) >= 0:
            raise ValueError("it names weights in memory, which no file may")
        sides: dict[int, dict[str, Dims]] = {INPUT: {}, OUTPUT: {}}
        for number, value in _fields(content, graph):
            if number in sides and not isinstance(value, int):
                name = b"".join(_texts(content, value, NAME)).decode()
                sides[number][name] = tuple(_dims(content, value, name))
    return sides[INPUT], sides[OUTPUT]


def multiplies_halves(path: Path) -> bool:
    """Whether a product of the ONNX file takes a weight or a bias in half precision.

    That weights are stored so says little: graphs that compute in fp32 keep theirs so behind a Cast.  Graphs
    with int8 weights tell by the biases, which convolutions have.

    Raises:
        ValueError: it is empty, or not an ONNX file.
        OSError: it cannot be read.
    """
    with _opened(path) as (content, graph):
        halves = {
            name
            for tensor in _inside(content, graph, INITIALIZER)
            if any(number == DATA_TYPE and kind in HALVES for number, kind in _fields(content, tensor))
            for name in _texts(content, tensor, TENSOR_NAME)
        }
        return any(
            halves.intersection(_texts(content, node, TAKES))
            for node in _inside(content, graph, NODE)
            if halves and PRODUCTS.intersection(_texts(content, node, OPERATOR))
        )


Span = tuple[int, int]


@contextmanager
def _opened(path: Path) -> Iterator[tuple[mmap.mmap, Span]]:
    """The mapped file, and where its graph lies."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        graphs = [span for number, span in _fields(content, (0, len(content))) if number == GRAPH]
        if len(graphs) != 1 or isinstance(graphs[0], int):
            raise ValueError("it is not an ONNX file: it has no graph")
        yield content, graphs[0]


def _texts(content: mmap.mmap, span: Span, number: int) -> list[bytes]:
    return [content[low:high] for low, high in _inside(content, span, number)]


def _dims(content: mmap.mmap, value: Span, name: str) -> Iterator[int | str]:
    dims = _inside(content, value, TYPE, TENSOR, SHAPE, DIM)
    for axis, dim in enumerate(dims):
        found: int | str = f"{name}_{axis}"
        for number, part in _fields(content, dim):
            if number == SIZE and isinstance(part, int):
                found = part
            elif number == SYMBOL and not isinstance(part, int):
                found = content[part[0] : part[1]].decode() or found
        yield found


def _inside(content: mmap.mmap, span: Span, *numbers: int) -> list[Span]:
    """All spans that lead through fields of these numbers, one message in the other."""
    spans = [span]
    for wanted in numbers:
        spans = [
            part
            for whole in spans
            for number, part in _fields(content, whole)
            if number == wanted and not isinstance(part, int)
        ]
    return spans


def _fields(content: mmap.mmap, span: Span) -> Iterator[tuple[int, int | Span]]:
    """Number and value of each field: an integer, or where a message or text starts and ends."""
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
                raise ValueError(f"a field at byte {start} ends outside of what holds it")
            yield number, (start, start + size)
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
