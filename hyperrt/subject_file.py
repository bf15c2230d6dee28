"""The bytes of a subject file: how three programs name its tensors, and safetensors read without trust.

`lora.save_subject` and `lora.load_subject` are built on it; what the tensors mean is known there.
Per site: A as [r, d_in] and B as [d_out, r] (transposed against `lora.py`), float32; for kohya also alpha [].
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hyperrt.errors import LoraError, NotFound

Tensors = dict[str, NDArray[np.float32]]

# What the tensor names of each format begin with.
FORMATS: Mapping[str, str] = {"diffusers": "unet.", "peft": "base_model.model.", "kohya": "lora_unet_"}
PEFT_FILE, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"  # what PEFT looks for in a folder
# The open category's tensor, [1, tokens, width].  diffusers loads a file only if "lora" is in every name.
IMAGE_TOKENS = "hyperrt.lora_image_tokens"
REDO = "make the file again: hyperrt personalize"

PICKLES = (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")  # torch.save, old and new
ORIGIN = "hyperrt."  # prefix of our metadata


def keys(format: str, path: str) -> tuple[str, str]:
    """Names of A and B of the site `path`."""
    if format == "kohya":
        stem = _kohya_stem(path)
        return f"{stem}.lora_down.weight", f"{stem}.lora_up.weight"
    stem = FORMATS[format] + path
    return f"{stem}.lora_A.weight", f"{stem}.lora_B.weight"


def alpha_key(path: str) -> str:
    """Name of kohya's alpha of the site `path`; the scale that it applies is alpha / rank."""
    return f"{_kohya_stem(path)}.alpha"


def format_of(tensors: Mapping[str, object]) -> str:
    """Whose names these are; "diffusers" if nobody's, so that the names are then reported as unknown."""
    first = next(iter(tensors), "")
    return next((format for format, prefix in FORMATS.items() if first.startswith(prefix)), "diffusers")


def encode(tensors: Tensors, origin: Mapping[str, str], others: Mapping[str, str]) -> bytes:
    """A safetensors file.  Same contents, same bytes: the library's own writer shuffles the metadata.

    Args:
        origin: our metadata, stored as `hyperrt.<name>`.
        others: metadata that other programs read.
    """
    metadata = {"format": "pt", **others, **{ORIGIN + name: str(value) for name, value in origin.items()}}
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": "F32", "shape": tensor.shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data begin on a multiple of 8
    data = b"".join(tensor.astype("<f4").tobytes() for tensor in tensors.values())
    return len(text).to_bytes(8, "little") + text + data


def read(path: Path, limit: int) -> tuple[Tensors, dict[str, str]]:
    """The tensors, and our metadata without its prefix.

    Args:
        limit: the file may not have more bytes.

    Raises:
        NotFound: there is no such file.
        LoraError: it is no plain file, too big, a pickle, not whole, or a tensor is not float32.
    """
    import safetensors

    name = path.name
    data = _read_bytes(path, limit)
    # A safetensors file begins with the length of its header, which may look like that; then comes "{".
    if data.startswith(PICKLES) and data[8:9] != b"{":
        do = "convert it to safetensors where it came from"
        raise LoraError(f"{name} is a pickle or an archive", "those can run code when they are read", do)
    deserialize: Callable[[bytes], list[tuple[str, dict[str, Any]]]] = safetensors.deserialize
    try:
        found = deserialize(data)
    except Exception as error:  # SafetensorError, and whatever else hostile bytes provoke in the parser
        raise LoraError(f"{name} is damaged, or no safetensors file", shown(str(error)), REDO) from error
    tensors = {}
    for key, tensor in found:
        if tensor["dtype"] != "F32":
            raise LoraError(f"{name}: {shown(key)} is {tensor['dtype']}", "a subject is stored as F32", REDO)
        tensors[key] = np.frombuffer(tensor["data"], "<f4").reshape(tensor["shape"])
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])  # deserialize has checked it
    metadata = header.get("__metadata__") or {}
    origin = {key[len(ORIGIN) :]: value for key, value in metadata.items() if key.startswith(ORIGIN)}
    return tensors, origin


def difference(found: set[str], expected: set[str]) -> str:
    """What is missing from `found` and what is too much: counts and the first three names; "" if nothing."""
    parts = []
    for word, names in (("missing", expected - found), ("unknown", found - expected)):
        if names:
            first = ", ".join(shown(name) for name in sorted(names)[:3])
            more = ", ..." if len(names) > 3 else ""
            parts.append(f"{len(names)} {word} ({len(expected)} expected): {first}{more}")
    return "; ".join(parts)


def shown(text: str) -> str:
    """Text out of a file, short and with nothing that a terminal would obey."""
    return text[:120] if text.isprintable() else repr(text)[:120]


def _kohya_stem(path: str) -> str:
    return FORMATS["kohya"] + path.replace(".", "_")


def _read_bytes(path: Path, limit: int) -> bytes:
    if not os.path.exists(path):  # unlike Path.exists it says False of a name that is too long or holds NUL
        raise NotFound(f"there is no subject file {str(path)[:200]!r}", "", "make one: hyperrt personalize")
    if not path.is_file():  # a pipe would block, a device never end
        raise LoraError(f"{path.name} is not a plain file", "", REDO)
    try:
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise LoraError(f"cannot read {path}", f"{error.strerror}") from error
    if len(data) > limit:
        raise LoraError(f"{path.name} is too big", f"a subject here has at most {limit} bytes", REDO)
    return data
