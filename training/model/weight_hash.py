"""Hashes of a network's weights: they tell whether two parts of a model belong together."""

from __future__ import annotations

import hashlib

import torch
from torch import nn

WIDE_TEXT = 768  # of Stable Diffusion 1.5; the tiny family's text is narrower


def hash_of(module: nn.Module, half: bool = False) -> str:
    """sha256 (hex) of a module's weights, names and values; tells one base model from another.

    half: of the values rounded to fp16, which a model has whether it was loaded as fp32 or as fp16; for the
        large families. Without it, of fp32 values, as in the checkpoints and bundles of the tiny family.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        values = tensor.detach().cpu().to(torch.float16 if half else torch.float32)
        digest.update(values.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def base_hash(unet: nn.Module) -> str:
    """`hash_of` a base model as the bundles of its family hold it: of half precision for the large ones."""
    config = unet.config
    of_sdxl = config.addition_embed_type is not None
    return hash_of(unet, half=of_sdxl or config.cross_attention_dim >= WIDE_TEXT)


def prompt_hash(image_prompt: nn.Module) -> str:
    """`hash_of` an image prompt: the published files are of half precision."""
    return hash_of(image_prompt, half=True)
