"""A bundle: a folder with the graphs that make a picture, and the manifest `bundle.json` that describes them.

docs/bundle-format.md is the specification; the dataclasses below are the manifest, field for field.  Reading
is strict: an unknown or missing key, a wrong type, a name that leaves the folder, or a wrong bit in a graph
is refused and named.  A file is hashed once, when it is first asked for, and no other file is ever read.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal

from engines.base import TensorSpec
from hyperrt import strict_json
from hyperrt.errors import BundleError, BundleMismatch, NotFound, UsageError
from hyperrt.lora import LoraLayout, Site
from hyperrt.onnx_file import external_files
from hyperrt.strict_json import StrictError

FORMAT = 1
MANIFEST = "bundle.json"
TOKENIZER = "tokenizer.json"
GRAPHS = ("image_encoder", "weight_decoder", "text_encoder", "context", "denoiser", "vae_decoder")
PACKAGED = Path(__file__).with_name("bundles")  # the bundles in the wheel

MAX_MANIFEST = 8 * 2**20  # bytes
MAX_SIZE = 2**16  # of anything that the manifest counts: what is beyond is damaged or hostile
CHUNK = 2**20  # bytes hashed at a time
REDO = "export it again (hyperrt export); if it came with hyperrt, install hyperrt again"


@dataclass(frozen=True)
class Latent:
    """What the UNet denoises: [channels, size, size]."""

    channels: int
    size: int

    def __post_init__(self) -> None:
        _positive(channels=self.channels, size=self.size)


@dataclass(frozen=True)
class Betas:
    """The noise schedule that the base model was trained with."""

    schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"]
    start: float
    end: float
    steps: int

    def __post_init__(self) -> None:
        _positive(steps=self.steps)
        if not 0 < self.start < self.end < 1:
            raise ValueError(f"start is {self.start}, end {self.end}; it must be 0 < start < end < 1")


@dataclass(frozen=True)
class Defaults:
    """What `generate` uses where it is told nothing."""

    solver: str
    steps: int
    guidance_scale: float  # s = w + 1
    kappa: float  # 0 to 2

    def __post_init__(self) -> None:
        _positive(steps=self.steps)
        if not 0 <= self.kappa <= 2:
            raise ValueError(f"kappa is {self.kappa}; it must be from 0 to 2")


@dataclass(frozen=True)
class Graph:
    """One ONNX file, its external data if it has any, and its tensors."""

    file: str
    sha256: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    data_file: str | None = None
    data_sha256: str | None = None

    def __post_init__(self) -> None:
        if (self.data_file is None) != (self.data_sha256 is None):
            raise ValueError("data_file and data_sha256 come together or not at all")
        for name, _ in self.files():
            # A plain name: it cannot leave the folder, on any system.
            if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}", name):
                why = "it must be letters, digits, '_', '-' and '.', with no folder"
                raise ValueError(f"the file name {name[:60]!r} is refused; {why}")
        for _, sha256 in self.files():
            _hex64(sha256=sha256)

    def files(self) -> list[tuple[str, str]]:
        """(file name, sha256) of each file."""
        found = [(self.file, self.sha256)]
        if self.data_file is not None and self.data_sha256 is not None:
            found.append((self.data_file, self.data_sha256))
        return found


@dataclass(frozen=True)
class LoraSection:
    """The LoRA layout as JSON holds it."""

    rank: int
    sites: tuple[Site, ...]
    hash: str

    def __post_init__(self) -> None:
        if self.layout.hash != self.hash:
            raise ValueError(f"hash is {self.hash[:12]}, but rank and sites give {self.layout.hash[:12]}")

    @functools.cached_property
    def layout(self) -> LoraLayout:
        """The same, ready to pack and unpack."""
        return LoraLayout(self.sites, self.rank)

    @classmethod
    def of(cls, layout: LoraLayout) -> LoraSection:
        """What the manifest says of `layout`."""
        return cls(layout.rank, layout.sites, layout.hash)


@dataclass(frozen=True)
class Preprocess:
    """How a photo becomes the image encoder's pixels [3, size, size]: (value in [0, 1] - mean) / std."""

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    resample: Literal["bicubic"]
    crop: Literal["pad", "center"]

    def __post_init__(self) -> None:
        _positive(size=self.size)
        if min(self.std) <= 0:
            raise ValueError(f"std is {self.std}; each must be above 0")


@dataclass(frozen=True)
class Prompts:
    """Rules of prompts: `placeholder` is what people write, `token` what the text encoder reads instead."""

    placeholder: str
    token: str
    max_tokens: int
    default_class: str
    nouns: tuple[str, ...]

    def __post_init__(self) -> None:
        _positive(max_tokens=self.max_tokens)
        if not (self.placeholder and self.token and self.default_class):
            raise ValueError("placeholder, token and default_class must not be empty")


@dataclass(frozen=True)
class Hashes:
    """sha256 (hex) of the weights that the bundle was exported from."""

    base_model: str
    hypernet: str

    def __post_init__(self) -> None:
        _hex64(base_model=self.base_model, hypernet=self.hypernet)


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The contents of `bundle.json`."""

    format: int
    family: str
    name: str
    created_by: str
    image_size: int  # pixels
    latent: Latent
    prediction_type: Literal["epsilon", "v_prediction", "sample"]
    betas: Betas
    defaults: Defaults
    graphs: Mapping[str, Graph]
    lora: LoraSection
    adapt: Literal["inputs", "refit"]
    preprocess: Preprocess
    prompts: Prompts
    tokenizer_sha256: str
    hashes: Hashes
    precision: Literal["fp32", "fp16", "bf16"]  # of the arithmetic
    storage: Literal["fp32", "fp16", "bf16"]  # of the weights in the files
    parity: Mapping[str, float]  # rung of the ladder -> error measured at export

    def __post_init__(self) -> None:
        _positive(image_size=self.image_size)
        _hex64(tokenizer_sha256=self.tokenizer_sha256)
        if set(self.graphs) != set(GRAPHS):
            raise ValueError(f"graphs has {', '.join(sorted(self.graphs))}; it must have {', '.join(GRAPHS)}")
        if self.adapt == "inputs":
            for name, graph in (("lora_q", "denoiser"), ("lora_kv", "context")):
                shapes = [spec.shape for spec in self.graphs[graph].inputs if spec.name == name]
                if [shape[1:] for shape in shapes] != [(self.layout.size(name),)]:
                    size = self.layout.size(name)
                    raise ValueError(f"graphs.{graph} must take {name} of {size}, the size that lora gives")

    @property
    def layout(self) -> LoraLayout:
        """The LoRA layout: order and shapes of all factors."""
        return self.lora.layout


@dataclass(frozen=True, kw_only=True)
class Bundle(Manifest):
    """An opened bundle: its manifest, and its files by way of `graph` and `tokenizer`."""

    path: Path
    _verified: set[str] = field(default_factory=set, repr=False, compare=False)

    @classmethod
    def open(cls, bundle: str | os.PathLike[str] = "tiny") -> Bundle:
        """Read the manifest of a packaged bundle (by name) or of a folder.

        Raises:
            NotFound: there is neither.
            BundleMismatch: it has another format than this version reads.
            BundleError: the manifest is malformed, or a file is missing.
        """
        folder = find(bundle)
        manifest = read_manifest(folder)
        opened = cls(**{f.name: getattr(manifest, f.name) for f in fields(manifest)}, path=folder)
        for name in [TOKENIZER, *(name for graph in opened.graphs.values() for name, _ in graph.files())]:
            if not (folder / name).is_file():
                raise BundleError(f"the bundle {opened.name} is not complete", f"{name} is missing", REDO)
        return opened

    @property
    def tokenizer(self) -> Path:
        """The tokenizer's file; its bytes have the hash of the manifest.

        Raises:
            BundleError: it is missing, unreadable, or damaged.
        """
        if TOKENIZER not in self._verified:
            self._check(TOKENIZER, self.tokenizer_sha256)
            self._verified.add(TOKENIZER)
        return self.path / TOKENIZER

    def graph(self, name: str) -> Path:
        """The ONNX file of a graph; its bytes, and those of its data file, have the hashes of the manifest.

        Raises:
            UsageError: there is no such graph.
            BundleError: a file is missing, unreadable, or damaged, or the graph has weights in another file.
        """
        if name not in self.graphs:
            raise UsageError(f"a bundle has no graph {name!r}", f"it has {', '.join(GRAPHS)}")
        graph = self.graphs[name]
        if name not in self._verified:
            for file, expected in graph.files():
                self._check(file, expected)
            self._check_external(graph)
            self._verified.add(name)
        return self.path / graph.file

    def verify(self) -> None:
        """Hash every file now (1 to 2 seconds per gigabyte), those too that have been hashed before.

        Raises:
            BundleError: naming the first file that is missing, unreadable, or damaged.
        """
        self._verified.clear()
        for name in GRAPHS:
            self.graph(name)
        _ = self.tokenizer

    def _check(self, file: str, expected: str) -> None:
        path = self.path / file
        if not path.is_file():  # missing; or a pipe, which would block
            raise BundleError(f"the bundle {self.name} is not complete", f"{file} is missing", REDO)
        try:
            found = sha256_of(path)
        except OSError as error:
            what = f"{file} of the bundle {self.name} cannot be read"
            raise BundleError(what, f"{error.strerror}", REDO) from error
        if found != expected:
            why = f"its sha256 is {found[:12]}..., {MANIFEST} says {expected[:12]}..."
            raise BundleError(f"{file} of the bundle {self.name} is damaged", why, REDO)

    def _check_external(self, graph: Graph) -> None:
        """Refuse weights in a file that the manifest does not name for this graph, and so nobody hashed."""
        try:
            others = external_files(self.path / graph.file) - {(graph.data_file or "").encode()}
        except (OSError, ValueError) as error:
            what = f"{graph.file} of the bundle {self.name} is no graph"
            raise BundleError(what, str(error), REDO) from error
        if others:
            why = f"it has weights in {min(others)[:60]!r}, which {MANIFEST} does not name"
            raise BundleError(f"{graph.file} of the bundle {self.name} cannot be used", why, REDO)


def find(bundle: str | os.PathLike[str]) -> Path:
    """The folder of a packaged bundle (by name; it wins over a folder of that name) or of a path.

    Raises:
        NotFound: there is neither, or the folder holds no manifest.
    """
    if str(bundle) in packaged():
        return PACKAGED / bundle
    folder = Path(bundle)
    if not os.path.isdir(folder):  # unlike Path.is_dir it says False of a name that is too long or holds NUL
        names = ", ".join(packaged()) or "none"
        why = f"there is no such folder, and the bundles that came with hyperrt are: {names}"
        raise NotFound(f"there is no bundle {str(bundle)[:200]!r}", why)
    if not (folder / MANIFEST).is_file():
        raise NotFound(f"{folder} is not a bundle", f"it holds no {MANIFEST}", "make one: hyperrt export")
    return folder


def packaged() -> list[str]:
    """Names of the bundles in this installation."""
    return sorted(path.parent.name for path in PACKAGED.glob(f"*/{MANIFEST}"))


def read_manifest(folder: Path) -> Manifest:
    """Read and check `bundle.json`.

    Raises:
        BundleMismatch: it has another format than this version reads.
        BundleError: it is unreadable or malformed; the error names the key.
    """
    path = folder / MANIFEST
    try:
        with path.open("rb") as file:
            text = file.read(MAX_MANIFEST + 1)
    except OSError as error:
        raise BundleError(f"{path} cannot be read", f"{error.strerror}", REDO) from error
    if len(text) > MAX_MANIFEST:
        raise BundleError(f"{path} is not usable", f"it is over {MAX_MANIFEST} bytes", REDO)
    try:
        return _parse(text)
    except StrictError as error:
        raise BundleError(f"{path} is not usable", f"{error}", REDO) from error


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `bundle.json` into a folder that is not yet published (`files.publish_folder`).

    Raises:
        ValueError: it would be refused when read.
    """
    text = json.dumps(strict_json.dump(manifest), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    _parse(text.encode())
    (folder / MANIFEST).write_bytes(text.encode())


def sha256_of(path: Path) -> str:
    """sha256 (hex) of a file, read piece by piece."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(CHUNK))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()


def _parse(text: bytes) -> Manifest:
    data = strict_json.loads(text)
    found = data.get("format") if isinstance(data, dict) else None
    if type(found) is int and found != FORMAT:  # before the keys, which another format may rename
        why = f"it is format {found}; this version reads {FORMAT}"
        raise BundleMismatch("the bundle has another format", why, "export it again, or update hyperrt")
    return strict_json.read(Manifest, data)


def _positive(**values: int) -> None:
    for name, value in values.items():
        if not 1 <= value <= MAX_SIZE:
            raise ValueError(f"{name} is {str(value)[:20]}; it must be at least 1 and at most {MAX_SIZE}")


def _hex64(**values: str) -> None:
    for name, value in values.items():
        if not re.fullmatch(r"[0-9a-f]{64}", value):
            raise ValueError(f"{name} is {value[:20]!r}; it must be 64 hexadecimal digits")
