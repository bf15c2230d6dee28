"""Safetensors files without trust: the header is checked whole, and numbers are read when asked for.

The library checks what a header says of the file: no gap, no overlap, nothing beyond the end.  What it maps
into memory is let go again, and numbers are read by plain reads: a file that is cut meanwhile is an error and
not a crash.
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
TYPES = ("F32", "F16", "BF16")  # that a LoRA is stored as
# As NumPy has them; of these alpha may be any: diffusers writes it as a whole number.
NUMBERS: Mapping[str, str] = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1", "U8": "u1"
}  # fmt: skip
PICKLES = (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")  # torch.save, old and new
# What to do about a fault in a file of another program, in one of ours, and in one that does not tell.
FETCH = "get a correct file from where this one came from"
REMAKE = "make the subject again from its photos"
REDO = f"{FETCH}; if it is a subject of HyperRT, {REMAKE}"
_INSTEAD = {  # how another kind of file begins -> what it is, and what to do
    b"\x1f\x8b": ("an archive", "unpack it"),
    b"7z\xbc\xaf": ("an archive", "unpack it"),
    b"rar!": ("an archive", "unpack it"),
    b"version https://git-lfs": ("a Git LFS pointer", "fetch the file that it stands for with Git LFS"),
    b"<!doctype": ("a web page", "download the file itself, not the page that shows it"),
    b"<html": ("a web page", "download the file itself, not the page that shows it"),
    b"<?xml": ("a server's answer", "download the file again; the answer may say why it was not sent"),
}


class Stored(NamedTuple):
    """A tensor as a file has it."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes

    @classmethod
    def of(cls, array: NDArray[Any]) -> Stored:
        """An array, as float32."""
        return cls("F32", array.shape, array.astype("<f4").tobytes())

    def array(self) -> NDArray[np.float32]:
        """The numbers, as float32, which holds all of a LoRA's types exactly."""
        if self.dtype == "BF16":
            wide = np.frombuffer(self.data, "<u2").astype("<u4") << 16
            return wide.view("<f4").astype(np.float32, copy=False).reshape(self.shape)
        found = np.frombuffer(self.data, NUMBERS[self.dtype])
        with np.errstate(over="ignore"):
            return found.astype(np.float32, copy=False).reshape(self.shape)


class Entry(NamedTuple):
    """What a header says of a tensor; it lies in bytes `start` to `end` of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def read_header(path: Path) -> tuple[dict[str, str], dict[str, Entry]]:
    """The metadata, and every tensor in the order of the file.

    Raises:
        NotFound: there is no such file.
        LoraError: it is no plain file, a pickle, no safetensors file, not whole, or its header is too large.
    """
    from safetensors import safe_open

    if not os.path.exists(path):  # unlike Path.exists it says False of a name that is too long or holds NUL
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
        said = json.loads(text)  # the library has checked it
        entries = {name: _entry(said[name], 8 + len(text)) for name in names}
    except Exception as error:  # SafetensorError, and whatever else hostile bytes provoke in the parser
        raise _damaged(path, _what_is_missing(path, text) or str(error)) from error
    return dict(sorted(metadata.items())), entries


def read_tensor(path: Path, name: str, entry: Entry, types: Collection[str] = TYPES) -> Stored:
    """One tensor.

    Raises:
        LoraError: it has another type than `types`, or the file is no longer what its header was.
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
        LoraError: it is one.
    """
    if entry.dtype not in types:
        why = f"it must be one of {', '.join(types)}"
        do = "use a version of the file in one of these types, or convert it where it came from"
        raise LoraError(f"{path.name}: {shortened(name)} is {entry.dtype}", why, do)


def encode(tensors: Mapping[str, Stored], metadata: Mapping[str, str]) -> bytes:
    """A file's bytes.  Same contents, same bytes: the library's own writer shuffles the metadata."""
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + len(tensor.data)
        header[name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data begin on a multiple of 8
    return b"".join([len(text).to_bytes(8, "little"), text, *(tensor.data for tensor in tensors.values())])


def _header_of(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            start, size = file.read(32), os.fstat(file.fileno()).st_size
            _check_start(path, start)
            length = int.from_bytes(start[:8], "little")
            if len(start) < 9 or length > size - 8:
                raise _damaged(path, f"it has {size} bytes, fewer than it says")
            if length > MAX_HEADER:
                why = f"it has {length} bytes; at most {MAX_HEADER} are read"
                raise LoraError(f"the header of {path.name} is too large", why, REDO)
            file.seek(8)
            return file.read(length)
    except OSError as error:
        raise LoraError(f"cannot read {path}", f"{error.strerror}") from error


def _check_start(path: Path, start: bytes) -> None:
    """Refuse what is not a safetensors file by how it begins."""
    if start[8:9] == b"{":  # the length of a header, which may look like anything, and the header
        return
    if start.startswith(PICKLES):
        do = "unpack an archive; convert a pickle to safetensors where it came from"
        raise LoraError(f"{path.name} is a pickle or an archive", "those can run code when they are read", do)
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    for known, (what, do) in _INSTEAD.items():
        if text.startswith(known):
            why = f"it begins with {shortened(repr(start))}"
            raise LoraError(f"{path.name} is {what}, not a LoRA", why, do)


def _what_is_missing(path: Path, header: bytes) -> str:
    """How much of a file is there, if it is cut; else ""."""
    with contextlib.suppress(Exception):  # the header may be anything
        tensors = [said for name, said in json.loads(header).items() if name != "__metadata__"]
        end = 8 + len(header) + max(said["data_offsets"][1] for said in tensors)
        if (size := path.stat().st_size) < end:
            return f"it has {size:,} of {end:,} bytes: a download or a copy was not finished"
    return ""


def _entry(said: Any, data: int) -> Entry:
    start, end = said["data_offsets"]
    return Entry(said["dtype"], tuple(said["shape"]), data + start, data + end)


def _damaged(path: Path, why: str) -> LoraError:
    return LoraError(f"{path.name} is damaged, or no safetensors file", shortened(why), REDO)
