"""LoRA files as other programs write them, and changes to them: by the safetensors library alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from hyperrt.lora.layout import LoraLayout
from hyperrt.lora.subject import Subject

Tensors = Mapping[str, np.ndarray]


def save_subject(
    path: Path,
    packed: Tensors,
    layout: LoraLayout,
    metadata: Mapping[str, str],
    format: str = "diffusers",
    force: bool = False,
    image_tokens: np.ndarray | None = None,
) -> None:
    """A subject file of a packed LoRA."""
    Subject(packed, "mug", 1, metadata, image_tokens, layout).save(path, format, force)


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


def sites(width: int = 5) -> dict[str, tuple[int, int]]:
    """Paths of a small UNet's sites -> (d_in, d_out)."""
    blocks = ("down_blocks.1.attentions.0", "mid_block.attentions.0", "up_blocks.0.attentions.2")
    sizes = {"to_q": (4, 6), "to_k": (width, 6), "to_v": (width, 6)}
    return {
        f"{block}.transformer_blocks.0.attn2.{name}": size for block in blocks for name, size in sizes.items()
    }


def random_pairs(ranks: Mapping[str, int], seed: int = 0, dtype: Any = np.float32) -> dict[str, Any]:
    """Path -> (A [r, d_in], B [d_out, r]) for every path that has a rank."""
    rng = np.random.default_rng(seed)
    return {
        path: (
            rng.standard_normal((ranks[path], d_in)).astype(dtype),
            rng.standard_normal((d_out, ranks[path])).astype(dtype),
        )
        for path, (d_in, d_out) in sites().items()
        if path in ranks
    }


STYLES = {  # how programs name A and B of a site; {} is its path
    "diffusers": ("unet.{}.lora_A.weight", "unet.{}.lora_B.weight"),
    "diffusers' UNet alone": ("{}.lora_A.weight", "{}.lora_B.weight"),
    "diffusers' scripts": ("unet.{}.lora.down.weight", "unet.{}.lora.up.weight"),
    "peft": ("base_model.model.{}.lora_A.weight", "base_model.model.{}.lora_B.weight"),
}


def write(path: Path, pairs: Mapping[str, Any], style: str = "diffusers", **metadata: str) -> Path:
    """A file as another program writes it, without alpha."""
    tensors = {}
    for site, pair in pairs.items():
        for name, tensor in zip(STYLES[style], pair, strict=True):
            tensors[name.format(site)] = tensor
    save_file(tensors, path, {"format": "pt", **metadata})
    return path


def write_kohya(path: Path, pairs: Mapping[str, Any], alphas: Mapping[str, float], **metadata: str) -> Path:
    """A file of kohya's trainer; a site without alpha has none."""
    tensors = {}
    for site, (a, b) in pairs.items():
        stem = "lora_unet_" + site.replace(".", "_")
        tensors |= {f"{stem}.lora_down.weight": a, f"{stem}.lora_up.weight": b}
        if site in alphas:
            tensors[f"{stem}.alpha"] = np.array(alphas[site], a.dtype)
    save_file(tensors, path, metadata)
    return path
