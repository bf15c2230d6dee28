"""Opens a bundle: a folder with the graphs that make a picture, and `bundle.json`, which describes them.

docs/bundle-format.md is the specification; hyperrt/bundle/manifest.py is the manifest, field by field.
Reading is strict: an unknown or missing key, a wrong type, a file name that leaves the folder, or a wrong bit
in a graph is an error that names it.  A file is hashed once, when it is first used.  No other file is read.
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
PACKAGED = Path(__file__).parents[1] / "bundles"  # bundles in the wheel

MAX_MANIFEST = 8 * 2**20  # bytes
CHUNK = 2**20  # bytes hashed at a time
EXPORT_AGAIN = "export the bundle again; if it came with hyperrt, install hyperrt again"


@dataclass(frozen=True, kw_only=True)
class Bundle(Manifest):
    """An open bundle: its manifest, and its files through `graph` and `tokenizer`.

    `name` is the folder's name, with which the bundle is opened, and not the manifest's, which dates from the
    export.
    """

    path: Path
    _verified: set[str] = field(default_factory=set, repr=False, compare=False)

    @classmethod
    @checked
    def open(cls, bundle: str | os.PathLike[str] = "tiny") -> Bundle:
        """Read the manifest of a bundle that came with hyperrt (by name) or of a folder.

        Raises:
            NotFound: neither exists.
            BundleMismatch: this version does not read its format.
            BundleError: the manifest is malformed, or a file is missing.
        """
        folder = find(bundle)
        manifest = read_manifest(folder)
        values = {f.name: getattr(manifest, f.name) for f in fields(manifest)}
        opened = cls(**{**values, "name": _name_of(folder) or manifest.name}, path=folder)
        for name in [TOKENIZER, *(name for graph in opened.graphs.values() for name, _ in graph.files())]:
            opened._check_exists(name)
        return opened

    @property
    def reference(self) -> str:
        """Its value for `--bundle`: the name if it came with hyperrt, else the folder."""
        return self.path.name if self.path.parent == PACKAGED else str(self.path)

    @property
    def tokenizer(self) -> Path:
        """The tokenizer's file, which has the hash in the manifest.

        Raises:
            BundleError: it is missing, unreadable, or damaged.
        """
        if TOKENIZER not in self._verified:
            self._check(TOKENIZER, self.tokenizer_sha256)
            self._verified.add(TOKENIZER)
        return self.path / TOKENIZER

    def graph(self, name: str) -> Path:
        """The ONNX file of a graph; it and its data file have the hashes in the manifest.

        Raises:
            UsageError: the bundle has no such graph.
            BundleError: a file is missing, unreadable or damaged, or the graph has weights in another file.
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
        """Hash every file now, even if it was hashed before; takes 1 to 2 seconds per gigabyte.

        Raises:
            BundleError: naming the first file that is missing, unreadable or damaged.
        """
        self._verified.clear()
        for name in self.graph_names:
            self.graph(name)
        _ = self.tokenizer

    def _check_exists(self, file: str) -> None:
        if not (self.path / file).is_file():  # missing; or a pipe, which would block
            raise BundleError(f"the bundle {self.name} is not complete", f"{file} is missing", EXPORT_AGAIN)
        _refuse_link_out(self.path / file)

    def _check(self, file: str, expected: str) -> None:
        path = self.path / file
        self._check_exists(file)
        try:
            sha256 = sha256_of(path)
        except OSError as error:
            _pass_if_scarce(error)
            what = f"{file} of the bundle {self.name} cannot be read"
            raise BundleError(what, f"{error.strerror}", EXPORT_AGAIN) from error
        if sha256 != expected:
            why = f"its sha256 is {sha256[:12]}..., {MANIFEST} says {expected[:12]}..."
            raise BundleError(f"{file} of the bundle {self.name} is damaged", why, EXPORT_AGAIN)

    def _check_external(self, graph: Graph) -> None:
        """Refuse weights in a file that the manifest does not name: nobody has hashed it."""
        try:
            others = external_files(self.path / graph.file) - {(graph.data_file or "").encode()}
        except (OSError, ValueError) as error:
            _pass_if_scarce(error)
            what = f"{graph.file} of the bundle {self.name} is not an ONNX graph"
            raise BundleError(what, str(error), EXPORT_AGAIN) from error
        if others:
            why = f"it has weights in {min(others)[:60]!r}, which {MANIFEST} does not name"
            raise BundleError(f"{graph.file} of the bundle {self.name} cannot be used", why, EXPORT_AGAIN)


def _pass_if_scarce(error: Exception) -> None:
    """Raise the error again if the system lacks something, such as memory: the bundle is not at fault."""
    if isinstance(error, OSError) and error.errno in SCARCE:
        raise error


def find(bundle: str | os.PathLike[str]) -> Path:
    """The folder of a bundle that came with hyperrt (by name), else the folder of that path.

    Raises:
        NotFound: neither exists, or the folder has no manifest.
    """
    if str(bundle) in packaged():
        return PACKAGED / bundle
    folder = Path(bundle)
    if not os.path.isdir(folder):  # Path.is_dir raises if the name is too long or holds NUL
        names = ", ".join(packaged()) or "none"
        why = f"there is no such folder, and the bundles that came with hyperrt are: {names}"
        raise NotFound(f"there is no bundle {str(bundle)[:200]!r}", why)
    if not (folder / MANIFEST).is_file():
        raise NotFound(f"{folder} is not a bundle", f"it holds no {MANIFEST}", "name the folder of a bundle")
    return folder


def _name_of(folder: Path) -> str:
    """The last part of the folder's path, with U+FFFD for what cannot be printed; "" for a root."""
    name = os.path.basename(os.path.abspath(folder))
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in name)


def packaged() -> list[str]:
    """Names of the bundles in this installation."""
    return sorted(path.parent.name for path in PACKAGED.glob(f"*/{MANIFEST}"))


def read_manifest(folder: Path) -> Manifest:
    """Read and check `bundle.json`.

    Raises:
        BundleMismatch: this version does not read its format.
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
        why = f"it has more than {MAX_MANIFEST} bytes"
        raise BundleError(f"{path} cannot be used", why, EXPORT_AGAIN)
    try:
        return _parse(text)
    except StrictError as error:
        raise BundleError(f"{path} cannot be used", f"{error}", EXPORT_AGAIN) from error


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `bundle.json` into a folder before it is published (`files.publish_folder`).

    Raises:
        ValueError: `read_manifest` would refuse it.
    """
    text = json.dumps(strict_json.dump(manifest), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    _parse(text.encode())
    (folder / MANIFEST).write_bytes(text.encode())


def sha256_of(path: Path) -> str:
    """The sha256 of a file, in hex, read in chunks."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(CHUNK))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()


def _refuse_link_out(path: Path) -> None:
    """Refuse a link out of the folder, except if the bundle came with hyperrt: packages may install links."""
    folder, target = path.parent.resolve(), path.resolve()
    if folder.parent != PACKAGED.resolve() and not target.is_relative_to(folder):
        why = f"{target} is not in the bundle's folder"
        raise BundleError(f"{path} is a link", why, "replace the link with a copy of the file")


def _parse(text: bytes) -> Manifest:
    data = strict_json.loads(text)
    format = data.get("format") if isinstance(data, dict) else None
    if type(format) is int and format != FORMAT:  # checked first: other formats may have other keys
        why = f"it is format {format}; this version reads {FORMAT}"
        raise BundleMismatch("the bundle has another format", why, "export it again, or update hyperrt")
    return strict_json.read(Manifest, data)
