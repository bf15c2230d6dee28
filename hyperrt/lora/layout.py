"""Layout of a LoRA: which projections it adapts, and how their factors are packed.

A *site* is one adapted projection; its factors are A [d_in, r] and B [r, d_out] (scale folded in):
    y = x W^T + ((x A) m) B        m: strength of the row, 0 on rows of the base model
The factors travel as two float32 vectors, one per graph that takes them:
    lora_q  [Nq]   all to_q sites            -> denoiser
    lora_kv [Nkv]  all to_k and to_v sites   -> context
Within a vector, per site in UNet module order: A row-major, then B row-major.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from hyperrt.engines.dlpack import DeviceArray
from hyperrt.engines.tensors import TensorSpec
from hyperrt.errors import LoraMismatch, UsageError
from hyperrt.text import shortened

Vector = NDArray[np.float32]
A = TypeVar("A", Vector, DeviceArray)
PathFactors = Mapping[str, tuple[Vector, Vector]]  # path -> (A [d_in, r], B [r, d_out])

MAX_WEIGHTS = 2**28  # numbers in a layout; SDXL at rank 64 has 40 million

# Which projections each packed vector holds.
VECTORS: Mapping[str, tuple[str, ...]] = {"lora_q": ("to_q",), "lora_kv": ("to_k", "to_v")}


@dataclass(frozen=True)
class Site:
    """One adapted projection: its module path in the UNet and its sizes."""

    path: str  # down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_q
    d_in: int
    d_out: int

    def numel(self, rank: int) -> int:
        """Number of weights in A and B."""
        return rank * (self.d_in + self.d_out)

    @property
    def projection(self) -> str:
        """The last word of the path: to_q, to_k or to_v."""
        return self.path.rpartition(".")[2]


@dataclass(frozen=True)
class LoraLayout:
    """The adapted sites in UNet module order, and the rank: enough to pack and unpack.

    Raises:
        UsageError: a size is below 1, a path occurs twice or does not end in to_q, to_k or to_v, or there are
            more than MAX_WEIGHTS weights.
    """

    sites: tuple[Site, ...]
    rank: int

    def __post_init__(self) -> None:
        projections = [projection for names in VECTORS.values() for projection in names]
        seen: set[str] = set()
        for site in self.sites:
            if site.path in seen or site.projection not in projections:
                why = "it occurs twice" if site.path in seen else f"a path ends in {', '.join(projections)}"
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
            UsageError: the name is another.
        """
        if name not in VECTORS:
            raise UsageError(f"there is no packed vector {name!r}", f"there are {', '.join(VECTORS)}")
        return tuple(site for site in self.sites if site.projection in VECTORS[name])

    def size(self, name: str) -> int:
        """Length of the packed vector "lora_q" or "lora_kv"."""
        return sum(site.numel(self.rank) for site in self.sites_of(name))

    def slices(self, name: str) -> list[tuple[Site, slice, slice]]:
        """The slices of A and B of each site in the packed vector "lora_q" or "lora_kv"."""
        slices = []
        start = 0
        for site in self.sites_of(name):
            middle = start + site.d_in * self.rank
            end = middle + self.rank * site.d_out
            slices.append((site, slice(start, middle), slice(middle, end)))
            start = end
        return slices

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
                if (shapes := (np.shape(a), np.shape(b))) != (expected := self._shapes(site)):
                    what = f"the factors of {site.path} are {shapes}"
                    raise LoraMismatch(what, f"the layout says {expected}")
                vector[part_a], vector[part_b] = np.ravel(a), np.ravel(b)
            packed[name] = vector
        return packed

    def unpack(self, packed: Mapping[str, A]) -> dict[str, tuple[A, A]]:
        """One or both packed vectors to {path: (A [d_in, r], B [r, d_out])}; views, no copies.

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
        """`unpack` with a graph's names of constants: PATH.lora_A [1, d_in, r], PATH.lora_B [1, r, d_out]."""
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
        """`rank`, `sites` and `hash`, as in the manifest of a bundle."""
        sites = [dataclasses.asdict(site) for site in self.sites]
        return {"rank": self.rank, "sites": sites, "hash": self.hash}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> LoraLayout:
        """The inverse of `to_json`; the reader of the manifest checks types and `hash`."""
        return cls(tuple(Site(**site) for site in data["sites"]), data["rank"])


def difference(names: set[str], expected: set[str]) -> str:
    """Missing and unknown names: how many, and the first three; "" if the sets are equal."""
    parts = []
    for word, different in (("missing", expected - names), ("unknown", names - expected)):
        if different:
            first = ", ".join(shortened(name) for name in sorted(different)[:3])
            more = ", ..." if len(different) > 3 else ""
            parts.append(f"{len(different)} {word} ({len(expected)} expected): {first}{more}")
    return "; ".join(parts)
