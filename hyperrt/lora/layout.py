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
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from hyperrt.arguments import checked
from hyperrt.engines.dlpack import DeviceArray
from hyperrt.engines.tensors import TensorSpec
from hyperrt.errors import LoraError, LoraMismatch, NumericError, UsageError
from hyperrt.lora import metadata as lora_metadata
from hyperrt.lora import names, reader, writer
from hyperrt.lora.reader import IMAGE_TOKENS, NOT_USABLE, Factors, LoraFile, difference, usable
from hyperrt.lora.safetensors_file import REMAKE, Stored
from hyperrt.lora.subject import Subject, Vector
from hyperrt.text import short_repr

log = logging.getLogger("hyperrt")

A = TypeVar("A", Vector, DeviceArray)
PathFactors = Mapping[str, tuple[Vector, Vector]]  # path -> (A [d_in, r], B [r, d_out])

SUBJECT_VERSION = "1"
# What a subject file says of its origin; `save_subject` adds version, layout and rank.
METADATA = lora_metadata.REQUIRED
MAX_WEIGHTS = 2**28  # numbers in a layout; SDXL at rank 64 has 40 million
MAX_NOUN = lora_metadata.MAX_NOUN  # characters
OTHER_BUNDLE = "use a bundle of the model that it was made for"

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

    def pack(self, factors: PathFactors) -> dict[str, Vector]:
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


@checked
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
        metadata: the names in METADATA, and those in lora_metadata.OPTIONAL that are known.
        format: whose tensor names to use: "diffusers", "peft" or "kohya".
        force: replace a file that exists.
        image_tokens: [photos, tokens, width], of which the mean is saved, but not as kohya; None: none.

    Raises:
        UsageError: unknown format, or metadata is missing or not usable.
        LoraMismatch: the vectors do not fit the layout.
        NumericError: a weight is NaN, infinite, or beyond MAX_WEIGHT.
        NotFound, ResourceError: it cannot be written there (`files.publish`).
    """
    if format not in names.FORMATS:
        known = ", ".join(names.FORMATS)
        raise UsageError(f"there is no subject format {short_repr(format)}", f"it must be one of {known}")
    if fault := lora_metadata.fault(metadata):
        raise UsageError("the subject's metadata cannot be saved", fault)
    if wrong := difference(set(packed), set(VECTORS)):
        raise LoraMismatch("the packed LoRA is not complete", wrong)
    for name, vector in packed.items():
        if not isinstance(vector, np.ndarray) or vector.dtype.kind != "f":
            raise UsageError(f"{name} is {short_repr(vector)}", "it must be an array of floats")
        if not usable(vector):
            raise NumericError(f"{name} cannot be saved", NOT_USABLE)
    tokens = None
    if image_tokens is not None:
        check_tokens("the subject", image_tokens, image_tokens.shape[1:])
        tokens = Stored.of(np.asarray(image_tokens).mean(0, dtype=np.float32, keepdims=True))
    sites = {  # scale is folded in: alpha is the rank
        path: Factors(Stored.of(a.T), Stored.of(b.T), float(layout.rank))
        for path, (a, b) in layout.unpack(packed).items()
    }
    origin = {**metadata, "version": SUBJECT_VERSION, "layout": layout.hash, "rank": str(layout.rank)}
    writer.write_ours(path, format, sites, origin, tokens, force)


@checked
def load_subject(
    path: str | os.PathLike[str],
    layout: LoraLayout,
    base_model_hash: str,
    token_shape: tuple[int, ...] | None = None,
    *,
    partial: bool = False,
    bundle: str = "",
) -> Subject:
    """Read a LoRA file of any of the three formats (or a folder with one), trusting nothing in it.

    A file of ours must fit the bundle in everything.  One of another program may have other ranks, up to the
    bundle's, a scale, and fewer sites: what is not there is zero.

    Args:
        layout, base_model_hash: of the bundle.
        token_shape: the bundle's (tokens, width) of image tokens, if it takes any; the file may have none.
        partial: of another program's file, leave out what adapts other modules than the bundle's sites.
        bundle: what `--bundle` takes for it, for the command in a message.

    Raises:
        NotFound: there is no such file.
        LoraMismatch: it was made for another base model or LoRA layout, its rank is too large, it adapts
            other modules, or its image tokens do not fit.
        LoraError: it is no safetensors file, truncated, or a tensor is missing, unknown, of another type or
            shape, or holds NaN or infinity.  Nothing else is ever loaded in part.
    """
    file = reader.open_lora(path, [site.path for site in layout.sites])
    return load_file(file, layout, base_model_hash, token_shape, partial=partial, bundle=bundle)


def load_file(
    file: LoraFile,
    layout: LoraLayout,
    base_model_hash: str,
    token_shape: tuple[int, ...] | None = None,
    *,
    partial: bool = False,
    bundle: str = "",
) -> Subject:
    """`load_subject` of a file that was opened with the paths of the layout; the same errors."""
    if file.origin:
        reader.check_plain(file)
        _check_origin(file.name, file.origin, layout, base_model_hash)
        _check_whole(file, layout)
        origin = file.origin
    else:
        _check_foreign(file, layout, partial, bundle)
        trigger = lora_metadata.trigger_of(file.metadata)
        origin = {"class_noun": "", "photos": "0", **({"trigger": trigger} if trigger else {})}
    stored = file.tokens()
    tokens = None if stored is None else stored.array()
    check_tokens(file.name, tokens, token_shape)
    lora = layout.pack({site.path: _factors(file, site, layout.rank) for site in layout.sites})
    return Subject(lora, origin["class_noun"], int(origin["photos"]), origin, tokens)


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
        raise LoraMismatch(f"the image tokens of {name} do not fit the bundle", why, REMAKE)
    if isinstance(tokens, np.ndarray) and not usable(tokens):
        raise LoraError(f"the image tokens of {name} cannot be used", NOT_USABLE, REMAKE)


def _factors(file: LoraFile, site: Site, rank: int) -> tuple[Vector, Vector]:
    """A [d_in, rank] and B [rank, d_out] with the scale folded in; zeros where the file has less."""
    a, b = np.zeros((site.d_in, rank), np.float32), np.zeros((rank, site.d_out), np.float32)
    if site.path in file.pairs:
        found = file.factors(site.path)
        found_a, found_b = found.numbers()
        a[:, : found.rank], b[: found.rank] = found_a.T, found_b.T
    return a, b


def _check_origin(name: str, metadata: Mapping[str, str], layout: LoraLayout, base_model_hash: str) -> None:
    version = metadata.get("version", "")
    if version not in ("", SUBJECT_VERSION):
        why = f"it is of format {version[:12]!r}; this version reads {SUBJECT_VERSION!r}"
        raise LoraMismatch(f"{name} is of another format", why, REMAKE)
    if fault := lora_metadata.fault(metadata):
        raise LoraError(f"{name} does not say what it is", fault, REMAKE)
    for word, found, here in (
        ("base model", metadata["base_model"], base_model_hash),
        ("LoRA layout", metadata.get("layout", ""), layout.hash),
    ):
        if found != here:
            why = f"the file's {word} is {found[:12]!r}, the bundle's is {here[:12]!r}"
            do = f"use the bundle that made it, or {REMAKE}"
            raise LoraMismatch(f"{name} was made for another {word}", why, do)


def _check_whole(file: LoraFile, layout: LoraLayout) -> None:
    """A file of ours has every tensor of the layout and no other, unscaled."""
    expected = names.names_of(file.format, [site.path for site in layout.sites], file.layers)
    if wrong := difference(set(file.entries) - {IMAGE_TOKENS}, set(expected)):
        raise LoraError(f"{file.name} does not hold the tensors of a subject", wrong, REMAKE)
    for site in layout.sites:
        _check_shape(file, site, LoraError)
        pair = file.pairs[site.path]
        if (pair.rank, pair.alpha) != (layout.rank, layout.rank):
            what = f"{file.name}: alpha is {pair.alpha:g}, and the rank {pair.rank}, at {site.path}"
            raise LoraError(what, f"both must be the rank of the layout, {layout.rank}", REMAKE)


def _check_foreign(file: LoraFile, layout: LoraLayout, partial: bool, bundle: str) -> None:
    """Another program's file adapts sites of the bundle and, unless `partial`, nothing else."""
    reader.check_used(file, partial)
    here = {site.path for site in layout.sites}
    if strange := [path for path in file.pairs if path not in here]:
        why = f"{len(strange)} of its {len(file.pairs)} sites are not in the bundle, first: {strange[0]}"
        raise LoraMismatch(f"{file.name} was made for another model", why, OTHER_BUNDLE)
    for site in layout.sites:
        if site.path in file.pairs:
            _check_shape(file, site, LoraMismatch)
    if file.rank > layout.rank:
        do = reader.how_to_reduce(file, layout.rank, partial, bundle)
        raise LoraMismatch(f"the rank of {file.name} is {file.rank}", f"the bundle's is {layout.rank}", do)
    for note in file.notes:
        log.warning("%s", note)
    base = lora_metadata.base_of(file.metadata)
    log.warning(
        "%s was made by another program%s; whether it is for this base model is not known",
        file.name, f" for {base}" if base else "",
    )  # fmt: skip


def _check_shape(file: LoraFile, site: Site, kind: type[LoraError]) -> None:
    pair = file.pairs[site.path]
    for key, shape in ((pair.a, (pair.rank, site.d_in)), (pair.b, (site.d_out, pair.rank))):
        if (found := file.entries[key].shape) != shape:
            do = REMAKE if file.origin else OTHER_BUNDLE
            raise kind(f"{file.name}: {key} is {found}", f"the bundle's layout says {shape}", do)
