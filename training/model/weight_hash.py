"""Hashes of a network's weights: they tell whether two parts of a model belong together."""

from __future__ import annotations

import hashlib

import torch
from torch import nn

WIDE_TEXT = 768  # of Stable Diffusion 1.5; the tiny family's text is narrower


def hash_of(module: nn.Module, half: bool = False) -> str:
    """sha256 (hex) of the names and values of a module's weights.

    half: hash the values rounded to fp16, so that a model loaded as fp32 and as fp16 has one hash; for the
        large families. Otherwise fp32 values, as in checkpoints and bundles of the tiny family.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        values = tensor.detach().cpu().to(torch.float16 if half else torch.float32)
        digest.update(values.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def base_hash(unet: nn.Module) -> str:
    """`hash_of` a base model's UNet as in its bundles: in half precision for the large families."""
    config = unet.config
    is_sdxl = config.addition_embed_type is not None
    return hash_of(unet, half=is_sdxl or config.cross_attention_dim >= WIDE_TEXT)


def prompt_hash(image_prompt: nn.Module) -> str:
    """`hash_of` an image prompt, in half precision like the published files."""
    return hash_of(image_prompt, half=True)
