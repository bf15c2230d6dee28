"""Reads and writes safetensors files, without trust in what it reads.

The library checks the header against the file: no gap, no overlap, nothing beyond the end.  Tensors are read
with plain reads instead of the library's memory map, so that a file that is cut meanwhile is an error and not
a crash.  Plain reads need offsets, which the library does not return: the header is parsed here as well.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hyperrt.errors import LoraError, NotFound
from hyperrt.text import advice, shortened

MAX_HEADER = 2**24  # bytes; kohya's trainer writes its statistics there
TYPES = ("F32", "F16", "BF16")  # types of a LoRA's factors
# Safetensors type -> NumPy's; alpha may have any of them, as diffusers writes an integer.
NUMBERS: Mapping[str, str] = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1", "U8": "u1"
}  # fmt: skip
PICKLES = (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")  # torch.save, old and new
# Remedies for a fault in a file of another program, in a subject of ours, and in a file of either.
FETCH = "get a correct file from where this one came from"
REMAKE = "make the subject again from its photos"
REDO = f"{FETCH}; if it is a subject of HyperRT, {REMAKE}"
_PICTURES = (b"\x89png", b"\xff\xd8\xff", b"gif8", b"riff")  # PNG, JPEG, GIF, WebP
_INSTEAD = {  # first bytes in lower case -> kind of file, and what to do
    b"\x1f\x8b": ("an archive", "unpack it"),
    b"7z\xbc\xaf": ("an archive", "unpack it"),
    b"rar!": ("an archive", "unpack it"),
    b"version https://git-lfs": ("a Git LFS pointer", "fetch the file that it stands for with Git LFS"),
    b"<!doctype": ("a web page", "download the file itself, not the page that shows it"),
    b"<html": ("a web page", "download the file itself, not the page that shows it"),
    **dict.fromkeys(_PICTURES, ("a picture", "name photos with --images")),
    b"<?xml": ("a server's answer", "download the file again; the answer may say why it was not sent"),
}


class Stored(NamedTuple):
    """A tensor as stored in a file."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes

    @classmethod
    def of(cls, array: NDArray[Any]) -> Stored:
        """The array, converted to float32."""
        return cls("F32", array.shape, array.astype("<f4").tobytes())

    def array(self) -> NDArray[np.float32]:
        """The numbers as float32, which represents all of `TYPES` exactly."""
        if self.dtype == "BF16":
            wide = np.frombuffer(self.data, "<u2").astype("<u4") << 16
            return wide.view("<f4").astype(np.float32, copy=False).reshape(self.shape)
        numbers = np.frombuffer(self.data, NUMBERS[self.dtype])
        with np.errstate(over="ignore"):
            return numbers.astype(np.float32, copy=False).reshape(self.shape)


class Entry(NamedTuple):
    """The header's entry of a tensor, which lies in bytes `start` to `end` of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def read_header(path: Path) -> tuple[dict[str, str], dict[str, Entry]]:
    """The metadata, and the entry of every tensor in the order of the file.

    Raises:
        NotFound: the file does not exist.
        LoraError: it is not a regular file, a pickle, not safetensors, truncated, or its header is too large.
    """
    from safetensors import safe_open

    if not os.path.exists(path):  # Path.exists raises if the name is too long or holds NUL
        how = ("hyperrt", "personalize", "--help")
        do = advice("check the name; to see how photos become a subject, run", *how)
        raise NotFound(f"there is no subject file {str(path)[:200]!r}", "", do)
    if not path.is_file():  # a pipe would block, a device never end
        why = "it is a folder, a pipe, a socket or a device"
        raise LoraError(f"{path.name} is not a plain file", why, "name a file")
    text = _header_of(path)
    try:
        with safe_open(path, framework="np") as file:
            metadata, names = file.metadata() or {}, file.offset_keys()
        header = json.loads(text)  # the library has checked it
        entries = {name: _entry(header[name], 8 + len(text)) for name in names}
    except Exception as error:  # SafetensorError, and anything that hostile bytes provoke in the parser
        raise _damaged(path, _missing_bytes(path, text) or str(error)) from error
    return dict(sorted(metadata.items())), entries


def read_tensor(path: Path, name: str, entry: Entry, types: Collection[str] = TYPES) -> Stored:
    """One tensor.

    Raises:
        LoraError: its type is not one of `types`, or the file changed after its header was read.
    """
    check_type(path, name, entry, types)
    try:
        with path.open("rb") as file:
            file.seek(entry.start)
            data = file.read(entry.end - entry.start)
    except OSError as error:
        raise LoraError(f"cannot read {path}", f"{error.strerror}") from error
    if len(data) != entry.end - entry.start:
        raise _damaged(path, "it was cut while it was read")
    return Stored(entry.dtype, entry.shape, data)


def check_type(path: Path, name: str, entry: Entry, types: Collection[str] = TYPES) -> None:
    """Refuse a tensor of another type.

    Raises:
        LoraError: its type is not one of `types`.
    """
    if entry.dtype not in types:
        why = f"it must be one of {', '.join(types)}"
        do = "use a version of the file in one of these types, or convert it where it came from"
        raise LoraError(f"{path.name}: {shortened(name)} is {entry.dtype}", why, do)


def encode(tensors: Mapping[str, Stored], metadata: Mapping[str, str]) -> bytes:
    """The bytes of a file, the same for the same contents: the library's writer shuffles the metadata."""
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + len(tensor.data)
        header[name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # data starts at a multiple of 8
    return b"".join([len(text).to_bytes(8, "little"), text, *(tensor.data for tensor in tensors.values())])


def _header_of(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            start, size = file.read(32), os.fstat(file.fileno()).st_size
            _check_start(path, start)
            length = int.from_bytes(start[:8], "little")
            if len(start) < 9 or length > size - 8:
                raise _damaged(path, f"it has {size} bytes, fewer than its header says")
            if length > MAX_HEADER:
                why = f"it has {length} bytes; at most {MAX_HEADER} are read"
                raise LoraError(f"the header of {path.name} is too large", why, REDO)
            file.seek(8)
            return file.read(length)
    except OSError as error:
        raise LoraError(f"cannot read {path}", f"{error.strerror}") from error


def _check_start(path: Path, start: bytes) -> None:
    """Refuse other kinds of files by their first bytes."""
    if start[8:9] == b"{":  # a safetensors header; the length before it may look like anything
        return
    if start.startswith(PICKLES):
        do = "unpack an archive; convert a pickle to safetensors where it came from"
        raise LoraError(f"{path.name} is a pickle or an archive", "those can run code when they are read", do)
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    for signature, (what, do) in _INSTEAD.items():
        if text.startswith(signature):
            why = f"it begins with {shortened(repr(start))}"
            raise LoraError(f"{path.name} is {what}, not a LoRA", why, do)


def _missing_bytes(path: Path, header: bytes) -> str:
    """How many bytes of a truncated file there are, in words; "" if it is not truncated."""
    with contextlib.suppress(Exception):  # the header may be anything
        tensors = [entry for name, entry in json.loads(header).items() if name != "__metadata__"]
        end = 8 + len(header) + max(entry["data_offsets"][1] for entry in tensors)
        if (size := path.stat().st_size) < end:
            return f"it has {size:,} of {end:,} bytes: a download or a copy was not finished"
    return ""


def _entry(tensor: Any, data: int) -> Entry:
    start, end = tensor["data_offsets"]
    return Entry(tensor["dtype"], tuple(tensor["shape"]), data + start, data + end)


def _damaged(path: Path, why: str) -> LoraError:
    return LoraError(f"{path.name} is damaged or not a safetensors file", shortened(why), REDO)
