"""A base model of the right classes with random weights, and a small scene cache for it: seconds to make.

make(folder)              a base model's folder, for hyperrt.training.model.base_model.load
make_cache(folder, base)  drawn scenes with its latents, as hyperrt.training.data.cache.PictureCache.open
reads it
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, ViTConfig, ViTModel

from hyperrt.training.data import cache, clip_tokenizer
from hyperrt.training.model import base_model as bases
from hyperrt.training.model import encode

IMAGE_SIZE = 64
LATENTS = (8, 8, 8)  # channels, height, width
TEXT_WIDTH, MAX_TOKENS = 32, 16


def make(folder: Path, seed: int = 0) -> Path:
    """Writes the base model and returns its folder."""
    torch.manual_seed(seed)
    tokenizer = clip_tokenizer.build(folder / "tokenizer", MAX_TOKENS)
    text = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=TEXT_WIDTH, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=MAX_TOKENS, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    vit = ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
        image_size=IMAGE_SIZE, patch_size=16,
    )  # fmt: skip
    parts = bases.Base(
        unet=_unet(), vae=_vae(), text_encoder=CLIPTextModel(text), tokenizer=tokenizer,
        image_encoder=ViTModel(vit, add_pooling_layer=False), scheduler=bases.tiny_scheduler(),
    )  # fmt: skip
    bases.save(parts, folder)
    return folder


def make_cache(folder: Path, base: Path, identities: int = 40, views: int = 3) -> Path:
    """Draws the scenes and encodes them, as hyperrt.training.pretrain does."""
    pictures = np.concatenate(cache.build(folder, identities, views, IMAGE_SIZE, workers=1).images)
    latents = encode.encode_latents(bases.load_encoders(base), pictures)
    np.save(folder / "latents.npy", latents.numpy().reshape(identities, views, *LATENTS).astype(np.float16))
    return folder


def _unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=LATENTS[1], in_channels=LATENTS[0], out_channels=LATENTS[0], block_out_channels=(16, 32),
        layers_per_block=1, norm_num_groups=8, attention_head_dim=2, cross_attention_dim=TEXT_WIDTH,
        down_block_types=("CrossAttnDownBlock2D",) * 2, up_block_types=("CrossAttnUpBlock2D",) * 2,
    )  # fmt: skip


def _vae() -> AutoencoderKL:
    return AutoencoderKL(
        sample_size=IMAGE_SIZE, latent_channels=LATENTS[0], block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1, norm_num_groups=4, scaling_factor=0.5,
    )  # fmt: skip
