"""LoRA files as other programs write and read them, and changes to them: with the safetensors library alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

Tensors = Mapping[str, np.ndarray]


def read(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Tensors and metadata, by the library."""
    with safe_open(path, framework="np") as file:
        names = file.offset_keys()
        return {name: file.get_tensor(name) for name in names}, file.metadata() or {}


def change(
    path: Path, tensors: Mapping[str, Any] | None = None, metadata: Mapping[str, str | None] | None = None
) -> None:
    """Write the file again with other tensors or metadata; None takes one away."""
    old, said = read(path)
    kept = {name: tensor for name, tensor in {**old, **(tensors or {})}.items() if tensor is not None}
    said = {name: text for name, text in {**said, **(metadata or {})}.items() if text is not None}
    save_file(kept, path, said)
