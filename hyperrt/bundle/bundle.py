"""A bundle: a folder with the graphs that make a picture, and the manifest `bundle.json` that describes them.

docs/bundle-format.md is the specification, hyperrt/bundle/manifest.py the manifest, field for field.  Reading
is strict: an unknown or missing key, a wrong type, a name that leaves the folder, or a wrong bit in a graph
is refused and named.  A file is hashed once, when it is first asked for, and no other file is ever read.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, field, fields
from pathlib import Path

from hyperrt import strict_json
from hyperrt.arguments import checked
from hyperrt.bundle.manifest import (
    GRAPHS,
    Betas,
    Defaults,
    Graph,
    Hashes,
    ImagePrompt,
    Latent,
    LoraSection,
    Manifest,
    Preprocess,
    Prompts,
)
from hyperrt.engines.onnx_file import external_files
from hyperrt.errors import SCARCE, BundleError, BundleMismatch, NotFound, UsageError
from hyperrt.strict_json import StrictError

__all__ = [
    "FORMAT",
    "GRAPHS",
    "MANIFEST",
    "TOKENIZER",
    "Betas",
    "Bundle",
    "Defaults",
    "Graph",
    "Hashes",
    "ImagePrompt",
    "Latent",
    "LoraSection",
    "Manifest",
    "Preprocess",
    "Prompts",
    "find",
    "packaged",
    "read_manifest",
    "sha256_of",
    "write_manifest",
]

FORMAT = 1
MANIFEST = "bundle.json"
TOKENIZER = "tokenizer.json"
PACKAGED = Path(__file__).parents[1] / "bundles"  # the bundles in the wheel

MAX_MANIFEST = 8 * 2**20  # bytes
CHUNK = 2**20  # bytes hashed at a time
EXPORT_AGAIN = "export the bundle again; if it came with hyperrt, install hyperrt again"


@dataclass(frozen=True, kw_only=True)
class Bundle(Manifest):
    """An opened bundle: its manifest, and its files by way of `graph` and `tokenizer`.

    `name` is the folder's name, by which the bundle is opened; the manifest's is the one of its export.
    """

    path: Path
    _verified: set[str] = field(default_factory=set, repr=False, compare=False)

    @classmethod
    @checked
    def open(cls, bundle: str | os.PathLike[str] = "tiny") -> Bundle:
        """Read the manifest of a packaged bundle (by name) or of a folder.

        Raises:
            NotFound: there is neither.
            BundleMismatch: it has another format than this version reads.
            BundleError: the manifest is malformed, or a file is missing.
        """
        folder = find(bundle)
        manifest = read_manifest(folder)
        told = {f.name: getattr(manifest, f.name) for f in fields(manifest)}
        opened = cls(**{**told, "name": _name_of(folder) or manifest.name}, path=folder)
        for name in [TOKENIZER, *(name for graph in opened.graphs.values() for name, _ in graph.files())]:
            if not (folder / name).is_file():
                what = f"the bundle {opened.name} is not complete"
                raise BundleError(what, f"{name} is missing", EXPORT_AGAIN)
            _refuse_link_out(folder / name)
        return opened

    @property
    def reference(self) -> str:
        """What `--bundle` takes for it: the name of one that came with hyperrt, else its folder."""
        return self.path.name if self.path.parent == PACKAGED else str(self.path)

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
            raise UsageError(f"a bundle has no graph {name!r}", f"it has {', '.join(self.graph_names)}")
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
        for name in self.graph_names:
            self.graph(name)
        _ = self.tokenizer

    def _check(self, file: str, expected: str) -> None:
        path = self.path / file
        if not path.is_file():  # missing; or a pipe, which would block
            raise BundleError(f"the bundle {self.name} is not complete", f"{file} is missing", EXPORT_AGAIN)
        _refuse_link_out(path)
        try:
            found = sha256_of(path)
        except OSError as error:
            _pass_if_scarce(error)
            what = f"{file} of the bundle {self.name} cannot be read"
            raise BundleError(what, f"{error.strerror}", EXPORT_AGAIN) from error
        if found != expected:
            why = f"its sha256 is {found[:12]}..., {MANIFEST} says {expected[:12]}..."
            raise BundleError(f"{file} of the bundle {self.name} is damaged", why, EXPORT_AGAIN)

    def _check_external(self, graph: Graph) -> None:
        """Refuse weights in a file that the manifest does not name for this graph, and so nobody hashed."""
        try:
            others = external_files(self.path / graph.file) - {(graph.data_file or "").encode()}
        except (OSError, ValueError) as error:
            _pass_if_scarce(error)
            what = f"{graph.file} of the bundle {self.name} is no graph"
            raise BundleError(what, str(error), EXPORT_AGAIN) from error
        if others:
            why = f"it has weights in {min(others)[:60]!r}, which {MANIFEST} does not name"
            raise BundleError(f"{graph.file} of the bundle {self.name} cannot be used", why, EXPORT_AGAIN)


def _pass_if_scarce(error: Exception) -> None:
    """What the system lacks, memory for example, is no fault of the bundle."""
    if isinstance(error, OSError) and error.errno in SCARCE:
        raise error


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
        raise NotFound(f"{folder} is not a bundle", f"it holds no {MANIFEST}", "name the folder of a bundle")
    return folder


def _name_of(folder: Path) -> str:
    """The last part of the folder's path, as text that every file can hold; empty for a root."""
    name = os.path.basename(os.path.abspath(folder))
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in name)


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
    _refuse_link_out(path)
    try:
        with path.open("rb") as file:
            text = file.read(MAX_MANIFEST + 1)
    except OSError as error:
        raise BundleError(f"{path} cannot be read", f"{error.strerror}", EXPORT_AGAIN) from error
    if len(text) > MAX_MANIFEST:
        raise BundleError(f"{path} is not usable", f"it is over {MAX_MANIFEST} bytes", EXPORT_AGAIN)
    try:
        return _parse(text)
    except StrictError as error:
        raise BundleError(f"{path} is not usable", f"{error}", EXPORT_AGAIN) from error


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


def _refuse_link_out(path: Path) -> None:
    """Refuse a link to another folder, except in a packaged bundle: package managers may install links."""
    folder, target = path.parent.resolve(), path.resolve()
    if folder.parent != PACKAGED.resolve() and not target.is_relative_to(folder):
        why = f"{target} is not in the bundle's folder"
        raise BundleError(f"{path} is a link", why, "replace the link with a copy of the file")


def _parse(text: bytes) -> Manifest:
    data = strict_json.loads(text)
    found = data.get("format") if isinstance(data, dict) else None
    if type(found) is int and found != FORMAT:  # before the keys, which another format may rename
        why = f"it is format {found}; this version reads {FORMAT}"
        raise BundleMismatch("the bundle has another format", why, "export it again, or update hyperrt")
    return strict_json.read(Manifest, data)
