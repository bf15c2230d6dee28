"""ONNX files (protobuf, onnx.proto3) as bytes, made without the onnx package."""

from __future__ import annotations


def field(number: int, content: bytes) -> bytes:
    """A field; its number is below 2048 and its length below 128."""
    tag = number << 3 | 2
    start = [tag] if tag < 128 else [tag & 0x7F | 0x80, tag >> 7]
    return bytes([*start, len(content)]) + content


def external_tensor(location: bytes) -> bytes:
    """A tensor named w whose data lies in another file."""
    return field(8, b"w") + field(13, field(1, b"location") + field(2, location))


def external_graph(location: bytes) -> bytes:
    """A model whose one initializer lies in another file."""
    ir_version = b"\x08\x08"
    return ir_version + field(7, field(2, b"main") + field(5, external_tensor(location)))
