"""Shows the facts of a bundle, a picture or a subject file, for `hyperrt info`. The files are untrusted."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hyperrt.cli import lora_report
from hyperrt.errors import BadInput
from hyperrt.lora.layout import VECTORS
from hyperrt.lora.reader import FOLDER_FILES
from hyperrt.sampling import recipe
from hyperrt.text import shortened

PNG = b"\x89PNG\r\n\x1a\n"
LONGEST = 400  # characters of one name or value, as text


def describe(path: str) -> dict[str, Any]:
    """The facts of a file or folder, as JSON values; `kind` is bundle, picture or subject.

    Raises:
        NotFound: the file, folder or bundle does not exist.
        BadInput: HyperRT does not read such files, or it is damaged.
        BundleError: the bundle is damaged.
    """
    target = Path(path)
    if os.path.isfile(target):  # Path.is_file raises if the name is too long
        head = _head(target)
        if head.startswith(PNG):
            return {"kind": "picture", "recipe": recipe.read(target)}
        if target.suffix == ".safetensors" or head[8:9] == b"{":
            return lora_report.facts(target)
        raise BadInput(
            f"HyperRT cannot read {path}",
            "it is neither a PNG nor a safetensors file",
            "name a bundle, a picture that hyperrt generate wrote, or a subject file",
        )
    if os.path.exists(target) and not os.path.isdir(target):
        raise BadInput(
            f"{path} is not a plain file", "it is a pipe, socket or device", "name a file or a folder"
        )
    if any(os.path.isfile(target / name) for name in FOLDER_FILES):
        return lora_report.facts(target)
    return _bundle(path)


def _head(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(16)
    except OSError as error:
        raise BadInput(f"{path} cannot be read", error.strerror or str(error)) from error


def text(facts: Mapping[str, Any]) -> str:
    """The facts as lines `name: value`, nested ones indented."""
    return "\n".join(_lines(facts, ""))


def _lines(facts: Mapping[str, Any], indent: str) -> list[str]:
    lines = []
    for name, value in facts.items():
        if isinstance(value, Mapping):
            lines += [f"{indent}{shortened(name, LONGEST)}:", *_lines(value, indent + "  ")]
            continue
        shown = value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)
        lines.append(f"{indent}{shortened(name, LONGEST)}: {shortened(shown, LONGEST)}")
    return lines


def _bundle(path: str) -> dict[str, Any]:
    from hyperrt.bundle import memory
    from hyperrt.bundle.bundle import Bundle
    from hyperrt.sampling import guidance

    bundle = Bundle.open(path)
    layout = bundle.layout
    rows = len(guidance.BRANCHES)  # of one picture
    needs = {"drawing": memory.to_draw(bundle, rows), "with --low-memory": memory.to_draw(bundle, rows, True)}
    return {
        "kind": "bundle",
        "name": bundle.name,
        "family": bundle.family,
        "path": str(bundle.path),
        "created_by": bundle.created_by,
        "image_size": bundle.image_size,
        "defaults": dataclasses.asdict(bundle.defaults),
        "nouns": list(bundle.prompts.nouns),
        "lora": {"rank": layout.rank, "sites": len(layout.sites), "weights": sum(map(layout.size, VECTORS))},
        "adapt": bundle.adapt,
        "graphs": {name: graph.file for name, graph in bundle.graphs.items()},
        "size_mb": round(
            sum(file.stat().st_size for file in bundle.path.iterdir() if file.is_file()) / 1e6, 1
        ),
        "memory_gb": {name: None if size is None else round(size / 1e9, 2) for name, size in needs.items()},
        "precision": bundle.precision,
        "storage": bundle.storage,
        "hashes": {**dataclasses.asdict(bundle.hashes), "lora": layout.hash},
        "parity": dict(bundle.parity),
        "sites": {site.path: f"{site.d_in} to {site.d_out}" for site in layout.sites},
    }


