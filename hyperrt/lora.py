"""LoRA of a subject: which projections it adapts, how its factors are packed, and the file that holds it.

A *site* is one adapted projection; its factors are A [d_in, r] and B [r, d_out] (scale folded in):
    y = x W^T + ((x A) m) B        m: strength of the row, 0 on rows of the base model
The factors travel as two float32 vectors, one per graph that takes them:
    lora_q  [Nq]   all to_q sites            -> denoiser
    lora_kv [Nkv]  all to_k and to_v sites   -> context
Within a vector, per site in UNet module order: A row-major, then B row-major.

A subject file is a safetensors file that other programs load, too (docs/bundle-format.md, "Subject files").
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import logging
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from engines.base import TensorSpec
from engines.dlpack import DeviceArray
from hyperrt import files, subject_file
from hyperrt.errors import LoraError, LoraMismatch, NumericError, UsageError
from hyperrt.subject import Subject, Vector
from hyperrt.subject_file import IMAGE_TOKENS, PEFT_CONFIG, PEFT_FILE, REDO, difference, shown

log = logging.getLogger("hyperrt")

A = TypeVar("A", Vector, DeviceArray)
Factors = Mapping[str, tuple[NDArray[np.float32], NDArray[np.float32]]]  # path -> (A [d_in, r], B [r, d_out])

SUBJECT_VERSION = "1"
# What a subject file says of its origin; `save_subject` adds version, layout and rank.
METADATA = ("base_model", "hypernet", "class_noun", "photos", "trigger")
MAX_WEIGHT = 1e4  # trained factors stay below 10; a file beyond this is damaged or hostile
NOT_USABLE = f"it holds NaN, infinity or values beyond {MAX_WEIGHT:g}"
MAX_WEIGHTS = 2**28  # numbers in a layout; SDXL at rank 64 has 40 million
MAX_NOUN = 64  # characters

# Which projections each packed vector holds.
VECTORS: Mapping[str, tuple[str, ...]] = {"lora_q": ("to_q",), "lora_kv": ("to_k", "to_v")}


@dataclass(frozen=True)
class Site:
    """One adapted projection: its module path in the UNet and its sizes."""

    path: str  # down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_q
    d_in: int
    d_out: int

    def numel(self, rank: int) -> int:
        """How many numbers A and B hold together."""
        return rank * (self.d_in + self.d_out)

    @property
    def projection(self) -> str:
        """The last word of the path: to_q, to_k or to_v."""
        return self.path.rpartition(".")[2]


@dataclass(frozen=True)
class LoraLayout:
    """The adapted sites in UNet module order, and the rank: all that is needed to pack and unpack.

    Raises:
        UsageError: a size is below 1, a path occurs twice or ends in something else than to_q, to_k, to_v,
            or there are more than MAX_WEIGHTS weights.
    """

    sites: tuple[Site, ...]
    rank: int

    def __post_init__(self) -> None:
        known = [projection for projections in VECTORS.values() for projection in projections]
        seen: set[str] = set()
        for site in self.sites:
            if site.path in seen or site.projection not in known:
                why = "it occurs twice" if site.path in seen else f"a path ends in {', '.join(known)}"
                raise UsageError(f"the LoRA layout cannot hold the site {site.path!r}", why)
            if min(site.d_in, site.d_out, self.rank) < 1:
                why = f"d_in {site.d_in}, d_out {site.d_out}, rank {self.rank}; each must be at least 1"
                raise UsageError(f"the LoRA layout has an empty site {site.path!r}", why)
            seen.add(site.path)
        weights = sum(site.numel(self.rank) for site in self.sites)
        if weights > MAX_WEIGHTS:
            why = f"it has more than {MAX_WEIGHTS} weights"
            raise UsageError("the LoRA layout is too large", why, "use a smaller rank")

    @functools.cached_property
    def hash(self) -> str:
        """sha256 (hex) of rank and sites as JSON with sorted keys and no spaces."""
        content = {"rank": self.rank, "sites": [dataclasses.asdict(site) for site in self.sites]}
        return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    def sites_of(self, name: str) -> tuple[Site, ...]:
        """The sites of one packed vector, "lora_q" or "lora_kv", in order.

        Raises:
            UsageError: there is no such vector.
        """
        if name not in VECTORS:
            raise UsageError(f"there is no packed vector {name!r}", f"there are {', '.join(VECTORS)}")
        return tuple(site for site in self.sites if site.projection in VECTORS[name])

    def size(self, name: str) -> int:
        """Length of the packed vector "lora_q" or "lora_kv"."""
        return sum(site.numel(self.rank) for site in self.sites_of(name))

    def slices(self, name: str) -> list[tuple[Site, slice, slice]]:
        """Where A and B of each site lie in the packed vector "lora_q" or "lora_kv"."""
        found = []
        start = 0
        for site in self.sites_of(name):
            middle = start + site.d_in * self.rank
            end = middle + self.rank * site.d_out
            found.append((site, slice(start, middle), slice(middle, end)))
            start = end
        return found

    def pack(self, factors: Factors) -> dict[str, Vector]:
        """Factors of every site to {"lora_q": [Nq], "lora_kv": [Nkv]}, float32.

        Raises:
            LoraMismatch: a site is missing or unknown, or a factor has the wrong shape.
        """
        if wrong := difference(set(factors), {site.path for site in self.sites}):
            raise LoraMismatch("the factors do not fit the LoRA layout", wrong)
        packed = {}
        for name in VECTORS:
            vector = np.empty(self.size(name), np.float32)
            for site, part_a, part_b in self.slices(name):
                a, b = factors[site.path]
                if (found := (np.shape(a), np.shape(b))) != (shapes := self._shapes(site)):
                    raise LoraMismatch(f"the factors of {site.path} are {found}", f"the layout says {shapes}")
                vector[part_a], vector[part_b] = np.ravel(a), np.ravel(b)
            packed[name] = vector
        return packed

    def unpack(self, packed: Mapping[str, A]) -> dict[str, tuple[A, A]]:
        """Packed vectors (both or one) to {path: (A [d_in, r], B [r, d_out])}; views, no copies.

        Raises:
            LoraMismatch: a vector has the wrong length.
        """
        factors = {}
        for name, vector in packed.items():
            if np.shape(vector) != (self.size(name),):
                raise LoraMismatch(f"{name} is {np.shape(vector)}", f"the layout says {(self.size(name),)}")
            for site, part_a, part_b in self.slices(name):
                shape_a, shape_b = self._shapes(site)
                factors[site.path] = (vector[part_a].reshape(shape_a), vector[part_b].reshape(shape_b))
        return {site.path: factors[site.path] for site in self.sites if site.path in factors}

    def named(self, packed: Mapping[str, A]) -> dict[str, A]:
        """`unpack`, as a graph names its constants: PATH.lora_A [1, d_in, r], PATH.lora_B [1, r, d_out]."""
        named: dict[str, A] = {}
        for path, (a, b) in self.unpack(packed).items():
            named[f"{path}.lora_A"] = a.reshape((1, a.shape[0], a.shape[1]))
            named[f"{path}.lora_B"] = b.reshape((1, b.shape[0], b.shape[1]))
        return named

    def constants(self, name: str) -> tuple[TensorSpec, ...]:
        """The specs of these constants, for the packed vector "lora_q" or "lora_kv"."""
        factors = self.named({name: np.zeros(self.size(name), np.float32)})
        return tuple(TensorSpec(key, factor.shape, "float32") for key, factor in factors.items())

    def _shapes(self, site: Site) -> tuple[tuple[int, int], tuple[int, int]]:
        return (site.d_in, self.rank), (self.rank, site.d_out)

    def to_json(self) -> dict[str, Any]:
        """`rank`, `sites` and `hash`, as the manifest of a bundle holds them."""
        sites = [dataclasses.asdict(site) for site in self.sites]
        return {"rank": self.rank, "sites": sites, "hash": self.hash}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> LoraLayout:
        """The inverse of `to_json`.  Types and `hash` are for the reader of the manifest to check."""
        return cls(tuple(Site(**site) for site in data["sites"]), data["rank"])


def save_subject(
    path: str | os.PathLike[str],
    packed: Mapping[str, Vector],
    layout: LoraLayout,
    metadata: Mapping[str, str],
    format: str = "diffusers",
    force: bool = False,
    image_tokens: Vector | DeviceArray | None = None,
) -> None:
    """Write a subject file, whole or not at all.

    Args:
        path: a file; with format "peft" and no suffix a folder, which also gets `adapter_config.json`.
        packed: "lora_q" [Nq] and "lora_kv" [Nkv].
        metadata: the names in METADATA.
        format: whose tensor names to use: "diffusers", "peft" or "kohya".
        force: replace a file that exists.
        image_tokens: [photos, tokens, width], of which the mean is saved, but not as kohya; None: none.

    Raises:
        UsageError: unknown format, or metadata is missing or not usable.
        LoraMismatch: the vectors do not fit the layout.
        NumericError: a weight is NaN, infinite, or beyond MAX_WEIGHT.
        NotFound, ResourceError: it cannot be written there (`files.publish`).
    """
    if format not in subject_file.FORMATS:
        known = ", ".join(subject_file.FORMATS)
        raise UsageError(f"there is no subject format {format!r}", f"it must be one of {known}")
    if fault := _origin_fault(metadata):
        raise UsageError("the subject's metadata cannot be saved", fault)
    if wrong := difference(set(packed), set(VECTORS)):
        raise LoraMismatch("the packed LoRA is not complete", wrong)
    for name, vector in packed.items():
        if not _usable(vector):
            raise NumericError(f"{name} cannot be saved", NOT_USABLE)
    tensors = _to_file(layout, packed, format)
    if image_tokens is not None and format == "kohya":
        # With one tensor of another name diffusers takes the file for its own format, and applies nothing.
        log.warning("a kohya file holds no image tokens: the subject will be drawn by its LoRA alone")
    elif image_tokens is not None:
        check_tokens("the subject", image_tokens, image_tokens.shape[1:])
        tensors[IMAGE_TOKENS] = np.asarray(image_tokens).mean(0, dtype=np.float32, keepdims=True)
    origin = {**metadata, "version": SUBJECT_VERSION, "layout": layout.hash, "rank": str(layout.rank)}
    data = subject_file.encode(tensors, origin, _metadata_for_others(layout, format))
    if format == "peft" and not Path(path).suffix:
        write = functools.partial(_write_peft, data=data, layout=layout)
        files.publish_folder(path, write, marker=PEFT_CONFIG, force=force)
    else:
        files.publish(path, lambda file: file.write(data), force=force)


def load_subject(
    path: str | os.PathLike[str],
    layout: LoraLayout,
    base_model_hash: str,
    token_shape: tuple[int, ...] | None = None,
) -> Subject:
    """Read a subject file of any of the three formats (or a PEFT folder), trusting nothing in it.

    Args:
        layout, base_model_hash: of the bundle.
        token_shape: the bundle's (tokens, width) of image tokens, if it takes any; the file may have none.

    Raises:
        NotFound: there is no such file.
        LoraMismatch: it was made for another base model or LoRA layout, or its image tokens do not fit.
        LoraError: it is no safetensors file, truncated, too big, or a tensor is missing, unknown, of another
            type or shape, or holds NaN or infinity.  Nothing is ever loaded in part.
    """
    source = Path(path)
    if os.path.isdir(source):
        source = source / PEFT_FILE
    weights = sum(layout.size(name) for name in VECTORS)
    names = 3 * len(layout.sites)
    numbers = weights + math.prod(token_shape or (0,))
    tensors, metadata = subject_file.read(source, limit=4 * numbers + 1024 * names + 2**20)
    _check_origin(source.name, metadata, layout, base_model_hash)
    tokens = tensors.pop(IMAGE_TOKENS, None)
    check_tokens(source.name, tokens, token_shape)
    factors = _from_file(source.name, tensors, layout)
    photos = int(metadata["photos"])
    return Subject(layout.pack(factors), metadata["class_noun"], photos, metadata, tokens)


def check_tokens(name: str, tokens: Vector | DeviceArray | None, shape: tuple[int, ...] | None) -> None:
    """Refuse image tokens [1 or photos, tokens, width] that a bundle does not take; None fits every bundle.

    Of those on a device only the shape is looked at.

    Args:
        name: of the file or subject, for the message.
        shape: (tokens, width) of the bundle; None if it takes none.

    Raises:
        LoraMismatch: another shape, or the bundle takes none.
        LoraError: a number is NaN, infinite or beyond MAX_WEIGHT.
    """
    if tokens is None:
        return
    if shape is None or len(tokens.shape) != 3 or not tokens.shape[0] or tokens.shape[1:] != shape:
        takes = f"takes {list(shape)} of each photo" if shape else "takes none"
        why = f"they are {list(tokens.shape)}, the bundle {takes}"
        raise LoraMismatch(f"the image tokens of {name} do not fit the bundle", why, REDO)
    if isinstance(tokens, np.ndarray) and not _usable(tokens):
        raise LoraError(f"the image tokens of {name} cannot be used", NOT_USABLE, REDO)


def _to_file(layout: LoraLayout, packed: Mapping[str, Vector], format: str) -> dict[str, Vector]:
    tensors = {}
    for path, (a, b) in layout.unpack(packed).items():
        key_a, key_b = subject_file.keys(format, path)
        tensors[key_a] = np.ascontiguousarray(a.T, np.float32)
        tensors[key_b] = np.ascontiguousarray(b.T, np.float32)
        if format == "kohya":  # kohya scales by alpha / rank; ours is folded in, so they are equal
            tensors[subject_file.alpha_key(path)] = np.array(layout.rank, np.float32)
    return tensors


def _from_file(
    name: str, tensors: Mapping[str, Vector], layout: LoraLayout
) -> dict[str, tuple[Vector, Vector]]:
    format = subject_file.format_of(tensors)
    shapes: dict[str, tuple[int, ...]] = {}
    for site in layout.sites:
        key_a, key_b = subject_file.keys(format, site.path)
        shapes |= {key_a: (layout.rank, site.d_in), key_b: (site.d_out, layout.rank)}
        if format == "kohya":
            shapes[subject_file.alpha_key(site.path)] = ()
    if wrong := difference(set(tensors), set(shapes)):
        raise LoraError(f"{name} does not hold the tensors of a subject", wrong, REDO)
    for key, shape in shapes.items():
        if tensors[key].shape != shape:
            raise LoraError(f"{name}: {key} is {tensors[key].shape}", f"the layout says {shape}", REDO)
        if not _usable(tensors[key]):
            raise LoraError(f"{name}: {key} cannot be used", NOT_USABLE, REDO)
        if shape == () and float(tensors[key]) != layout.rank:
            why = f"it must be the rank, {layout.rank}"
            raise LoraError(f"{name}: {key} is {float(tensors[key]):g}", why, REDO)
    pairs = {site.path: subject_file.keys(format, site.path) for site in layout.sites}
    return {path: (tensors[key_a].T, tensors[key_b].T) for path, (key_a, key_b) in pairs.items()}


def _usable(array: Vector) -> bool:
    return bool(np.all(np.abs(array) <= MAX_WEIGHT))  # False for NaN too


def _metadata_for_others(layout: LoraLayout, format: str) -> dict[str, str]:
    if format == "kohya":
        rank = str(layout.rank)
        return {"ss_network_module": "networks.lora", "ss_network_dim": rank, "ss_network_alpha": rank}
    if format == "diffusers":  # without it diffusers would guess the same from the shapes
        config = _peft_config(layout)
        said = {f"unet.{key}": config[key] for key in ("r", "lora_alpha", "target_modules")}
        return {"lora_adapter_metadata": json.dumps(said, sort_keys=True)}
    return {}


def _peft_config(layout: LoraLayout) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "r": layout.rank,
        "lora_alpha": layout.rank,
        "target_modules": [site.path for site in layout.sites],
        "bias": "none",
        "inference_mode": True,
    }


def _write_peft(folder: Path, data: bytes, layout: LoraLayout) -> None:
    (folder / PEFT_FILE).write_bytes(data)
    (folder / PEFT_CONFIG).write_text(json.dumps(_peft_config(layout), indent=2) + "\n")


def _check_origin(name: str, metadata: Mapping[str, str], layout: LoraLayout, base_model_hash: str) -> None:
    version = metadata.get("version", "")
    if version not in ("", SUBJECT_VERSION):
        why = f"it is of format {version[:12]!r}; this version reads {SUBJECT_VERSION!r}"
        raise LoraMismatch(f"{name} is of another format", why, REDO)
    if fault := _origin_fault(metadata):
        raise LoraError(f"{name} does not say what it is", fault, REDO)
    for word, found, here in (
        ("base model", metadata["base_model"], base_model_hash),
        ("LoRA layout", metadata.get("layout", ""), layout.hash),
    ):
        if found != here:
            why = f"the file's {word} is {found[:12]!r}, the bundle's is {here[:12]!r}"
            raise LoraMismatch(f"{name} was made for another {word}", why, f"use its own bundle, or {REDO}")


def _origin_fault(metadata: Mapping[str, str]) -> str:
    """Why this metadata cannot be used, or ""."""
    if missing := [name for name in METADATA if name not in metadata]:
        return f"the metadata lacks {', '.join(missing)}"
    noun, photos = metadata["class_noun"], metadata["photos"]
    if not (0 < len(noun) <= MAX_NOUN and noun.isprintable()):
        return f"the class noun is {shown(noun)!r}; it must be 1 to {MAX_NOUN} printable characters"
    if not (photos.isascii() and photos.isdigit() and len(photos) < 7):
        return f"the number of photos is {shown(photos)!r}"
    return ""
