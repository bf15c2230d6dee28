"""Opens a LoRA file of diffusers, PEFT or kohya, and checks it.

`subject_file.load_subject` compares it with a bundle.
A site has A [r, d_in] and B [d_out, r] (transposed against `LoraLayout`), and alpha: alpha / r times B A is
added to the projection's weight.
"""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hyperrt.engines.dlpack import DeviceArray
from hyperrt.errors import LoraError, LoraMismatch, NotFound
from hyperrt.lora import names as lora_names
from hyperrt.lora import peft_config, safetensors_file
from hyperrt.lora.peft_config import MAX_ALPHA, PEFT_CONFIG, PEFT_FILE
from hyperrt.lora.safetensors_file import FETCH, REMAKE, Entry, Stored
from hyperrt.text import advice, shortened

Array = NDArray[np.float32]

FOLDER_FILES = (PEFT_FILE, "pytorch_lora_weights.safetensors")  # PEFT's name, and diffusers'
# Image tokens [1, tokens, width] of the open category.  diffusers needs "lora" in every name of a file.
IMAGE_TOKENS = "hyperrt.lora_image_tokens"
ORIGIN = "hyperrt."  # prefix of our metadata
LAYERS = "hyperrt.layers_per_block"  # only with kohya's names of the first publication
MAX_WEIGHT = 1e4  # trained factors stay below 10; a file beyond this is damaged or hostile
NOT_USABLE = f"it holds NaN, infinity or values beyond {MAX_WEIGHT:g}"


class Factors(NamedTuple):
    """The LoRA of one site, as stored in a file."""

    a: Stored  # [r, d_in]
    b: Stored  # [d_out, r]
    alpha: float

    @property
    def rank(self) -> int:
        """The rank r of A and B."""
        return self.a.shape[0]

    def numbers(self) -> tuple[Array, Array]:
        """A [r, d_in] and B [d_out, r] with the scale, alpha / r, folded into B."""
        a, b = self.a.array(), self.b.array()
        if self.alpha != self.rank:
            with np.errstate(over="ignore"):  # infinity is for the caller to refuse
                b = (b * np.float64(self.alpha / self.rank)).astype(np.float32)
        return a, b


class Pair(NamedTuple):
    """Names of a site's tensors A and B, before they are read; alpha and the rank."""

    a: str
    b: str
    alpha: float
    rank: int


@dataclass(frozen=True, eq=False)
class LoraFile:
    """An open LoRA file; made by `open_lora`.

    Attributes:
        format: of the tensor names: "diffusers", "peft" or "kohya".
        layers: layers per block if kohya's names are those of the first publication; else None.
        metadata: of the header, all.
        entries: every tensor, in the order of the file.
        pairs: path of a site -> its tensors, in the order of the file.
        odd: other tensors at a site: DoRA, LoHa, LoKr, biases, halves of a pair.
        methods: methods in PEFT's configuration that are not a plain LoRA.
        unused: tensors of other modules.
        notes: assumptions that were made, as messages.
    """

    path: Path
    format: str
    layers: int | None
    metadata: Mapping[str, str]
    entries: Mapping[str, Entry]
    pairs: Mapping[str, Pair]
    odd: tuple[str, ...]
    methods: tuple[peft_config.Method, ...]
    unused: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def name(self) -> str:
        """File name, for messages."""
        return self.path.name

    @property
    def origin(self) -> dict[str, str]:
        """Our metadata, without its prefix; empty if another program made the file."""
        return _origin(self.metadata)

    @property
    def rank(self) -> int:
        """The largest rank of a site; 0 without sites."""
        return max((pair.rank for pair in self.pairs.values()), default=0)

    @property
    def redo(self) -> str:
        """The remedy for a fault in the file."""
        return _redo(self.metadata)

    def stored(self, name: str) -> Stored:
        """The tensor `name`; raises as `safetensors_file.read_tensor`."""
        return safetensors_file.read_tensor(self.path, name, self.entries[name])

    def factors(self, path: str) -> Factors:
        """The LoRA of the site `path`.

        Raises:
            LoraError: as `stored`, or a number is NaN, infinite or beyond MAX_WEIGHT.
        """
        pair = self.pairs[path]
        factors = Factors(self.stored(pair.a), self.stored(pair.b), pair.alpha)
        for key, numbers in zip((pair.a, pair.b), factors.numbers(), strict=True):
            if not usable(numbers):
                raise LoraError(f"{self.name}: {shortened(key)} cannot be used", NOT_USABLE, self.redo)
        return factors

    def tokens(self) -> Stored | None:
        """The image tokens of the open category, or None; raises as `stored`."""
        return self.stored(IMAGE_TOKENS) if IMAGE_TOKENS in self.entries else None


def open_lora(path: str | os.PathLike[str], paths: Collection[str] = ()) -> LoraFile:
    """Read and check the header of a LoRA file of any of the three formats, or of a folder that holds one.

    Every tensor name becomes a `Part` (format, site, role); the tensors of a site become its `Pair`.

    Args:
        paths: of a bundle's sites; kohya's names are matched with them.  Empty: with published models'.

    Raises:
        NotFound: the file does not exist, or the folder holds none.
        LoraError: it is not a regular file, a pickle, not safetensors, truncated, A and B do not match, or
            PEFT's configuration is damaged.
    """
    source = _file_of(Path(path))
    metadata, entries = safetensors_file.read_header(source)
    layers = metadata.get(LAYERS, "")
    names = lora_names.SiteNames(paths, int(layers) if re.fullmatch("[1-9]", layers) else lora_names.LAYERS)
    parts = {name: names.part_of(name) for name in entries if name != IMAGE_TOKENS}
    at_sites = {name: part for name, part in parts.items() if part.site}
    format = next((part.format for part in [*at_sites.values(), *parts.values()]), "diffusers")
    config = peft_config.read(source, format, metadata)
    header = _Header(source, metadata, entries, None if format == "kohya" else config)
    pairs, odd, methods = {}, [], peft_config.methods(config or {})
    for site, tensors in _tensors_by_site(at_sites).items():
        complete = tensors.keys() >= {"A", "B"}
        odd += [name for role, name in tensors.items() if not complete or role not in ("A", "B", "alpha")]
        try:
            if complete:
                pairs[site] = header.pair(site, tensors)
        except LoraError:
            if not methods:  # otherwise the method explains the shapes
                raise
            odd += tensors.values()
    return LoraFile(
        path=source,
        format=format,
        layers=names.layers if lora_names.is_first_published(at_sites) else None,
        metadata=metadata,
        entries=entries,
        pairs=pairs,
        odd=tuple(odd),
        methods=methods,
        unused=tuple(name for name in parts if name not in at_sites),
        notes=header.notes(format),
    )


def check_plain(file: LoraFile) -> None:
    """Refuse a file that its configuration says is not a plain LoRA.

    Raises:
        LoraError: it is PiSSA or DoRA, for example.
    """
    for method in file.methods:
        raise LoraError(f"{file.name} is {method.name}, not a plain LoRA", method.why, method.do)


def check_used(file: LoraFile, partial: bool = False) -> None:
    """Refuse a file that is not a plain LoRA of the cross-attention's q, k and v alone.

    Args:
        partial: leave out other modules, unless the file is ours.

    Raises:
        LoraError: as `check_plain`; a site has other tensors than A, B and alpha; or it has no sites.
        LoraMismatch: it adapts other modules, and `partial` is off.
    """
    check_plain(file)
    if file.odd:
        method = lora_names.method_of(file.odd[0])
        is_not = f"is {method} and not" if method else "is not"
        why = f"{len(file.odd)} tensors of its sites are not such a pair, first: {shortened(file.odd[0])}"
        convert = "convert it to a plain LoRA where it came from, or use another file"
        do = REMAKE if file.origin else convert
        raise LoraError(f"{file.name} {is_not} a LoRA of pairs A and B", why, do)
    if not file.pairs:
        first = f"; its first tensor is {shortened(next(iter(file.entries)))}" if file.entries else ""
        why = f"it does not adapt cross-attention q, k or v of a Stable Diffusion UNet{first}"
        inspect = ("hyperrt", "lora", "inspect", file.path)
        do = advice("use another file; to see what this one holds, run", *inspect)
        raise LoraError(f"{file.name} has no layer that HyperRT can use", why, do)
    if file.unused and (file.origin or not partial):
        what = f"{file.name} adapts more than q, k and v of the cross-attention"
        kinds = ", ".join(f"{count} tensors of {kind}" for kind, count in unused_kinds(file).items())
        leave_out = "add --partial (in Python partial=True) to leave these out, which changes the pictures"
        raise LoraMismatch(what, f"it also has {kinds}", REMAKE if file.origin else leave_out)


def how_to_reduce(file: LoraFile, rank: int, partial: bool, bundle: str) -> str:
    """The advice to reduce a file's rank, with the command.

    Args:
        partial: leave out other modules.
        bundle: value of `--bundle`; "": leave the option out.
    """
    stem = f"{file.path.stem[:60]}-rank{rank}"
    names = chain([stem], (f"{stem}-{number}" for number in count(2)))
    paths = (file.path.with_name(f"{name}.safetensors") for name in names)
    target = next(path for path in paths if not os.path.lexists(path))
    options = ["--rank", str(rank), *["--partial"] * partial, *(["--bundle", bundle] if bundle else [])]
    convert = ("hyperrt", "lora", "convert")
    return advice("reduce its rank, which loses part of the LoRA", *convert, file.path, target, *options)


def unused_kinds(file: LoraFile) -> dict[str, int]:
    """Tensors of other modules, by kind of module: {"self-attention": 128}."""
    return counted(map(lora_names.kind_of, file.unused))


def check_tokens(name: str, tokens: Array | DeviceArray | None, shape: tuple[int, ...] | None) -> None:
    """Refuse image tokens [1 or photos, tokens, width] that do not fit a bundle; None always fits.

    Only the shape is checked if they are on a device.

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


def usable(array: Array) -> bool:
    """Whether all numbers are finite and within MAX_WEIGHT."""
    return bool(np.all(np.abs(array) <= MAX_WEIGHT))  # False for NaN too


def counted(items: Iterable[Any]) -> dict[Any, int]:
    """How often each item occurs, the most frequent first."""
    return dict(Counter(items).most_common())


def _file_of(path: Path) -> Path:
    """The file itself, or the LoRA file in a folder of PEFT or diffusers."""
    if not os.path.isdir(path):
        return path
    for name in FOLDER_FILES:
        if os.path.exists(path / name):
            return path / name
    why = f"it holds neither {' nor '.join(FOLDER_FILES)}"
    raise NotFound(f"there is no subject file in the folder {path}", why, "name the file itself")


def _tensors_by_site(parts: Mapping[str, lora_names.Part]) -> dict[str, dict[str, str]]:
    """Site -> role -> tensor name; if a role occurs twice, the second tensor is filed under its own name."""
    sites: dict[str, dict[str, str]] = {}
    for name, part in parts.items():
        roles = sites.setdefault(part.site, {})
        roles[name if part.role in roles else part.role] = name
    return sites


class _Header:
    """A header, and PEFT's configuration if alpha comes from it."""

    def __init__(
        self,
        path: Path,
        metadata: Mapping[str, str],
        entries: Mapping[str, Entry],
        config: peft_config.Config | None,
    ) -> None:
        self.path, self.metadata, self.entries, self.config = path, metadata, entries, config
        self.name, self.redo = path.name, _redo(metadata)
        self.alpha_patterns = peft_config.alpha_patterns(config or {}, path.name)

    def pair(self, site: str, tensors: Mapping[str, str]) -> Pair:
        """The pair of a site, from the names of its tensors by role; LoraError: A, B or alpha is unusable."""
        a, b = tensors["A"], tensors["B"]
        rank = self._rank(a, b)
        return Pair(a, b, self._alpha(tensors.get("alpha"), site, rank), rank)

    def notes(self, format: str) -> tuple[str, ...]:
        """The assumptions that were made."""
        if self.config is None:
            is_known = format != "peft" or _origin(self.metadata)
            note = f"{self.name} has no {PEFT_CONFIG} beside it: alpha is taken to be the rank"
            return () if is_known else (note,)
        if unknown := peft_config.unknown(self.config):
            options = ", ".join(unknown[:3])
            return (f"the configuration of {self.name} sets {options}, which HyperRT does not know",)
        return ()

    def _rank(self, a: str, b: str) -> int:
        for key in (a, b):
            safetensors_file.check_type(self.path, key, self.entries[key])
        shape_a, shape_b = self.entries[a].shape, self.entries[b].shape
        if len(shape_a) != 2 or len(shape_b) != 2 or shape_a[0] != shape_b[1] or 0 in shape_a + shape_b:
            why = f"{shortened(b)} is {shape_b}; they must be (rank, inputs) and (outputs, rank)"
            raise LoraError(f"{self.name}: {shortened(a)} is {shape_a}", why, self.redo)
        return shape_a[0]

    def _alpha(self, key: str | None, site: str, rank: int) -> float:
        """From the tensor `key`, else from PEFT's configuration, else the rank."""
        if key is not None:
            entry = self.entries[key]
            if math.prod(entry.shape) != 1:
                what = f"{self.name}: {shortened(key)} is {entry.shape}"
                raise LoraError(what, "it must be one number", self.redo)
            types = (*safetensors_file.NUMBERS, "BF16")
            stored = safetensors_file.read_tensor(self.path, key, entry, types)
            alpha = float(stored.array().ravel()[0])
        elif self.config is not None:
            alpha = peft_config.alpha(self.config, self.alpha_patterns, self.name, site, rank)
        else:
            alpha = rank
        if not 0 < alpha <= MAX_ALPHA:  # to some programs 0 means the rank, to others nothing
            why = f"it must be above 0 and at most {MAX_ALPHA:g}"
            raise LoraError(f"{self.name}: alpha is {alpha:g} at {shortened(site)}", why, self.redo)
        return alpha


def _origin(metadata: Mapping[str, str]) -> dict[str, str]:
    ours = {key: text for key, text in metadata.items() if key.startswith(ORIGIN)}
    return {key.removeprefix(ORIGIN): text for key, text in ours.items() if key != LAYERS}


def _redo(metadata: Mapping[str, str]) -> str:
    return REMAKE if _origin(metadata) else FETCH
