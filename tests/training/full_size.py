"""UNets of the true sizes without weights: names, sizes and counts of everything, in no time or memory."""

from __future__ import annotations

import functools

import torch
from diffusers import UNet2DConditionModel


@functools.cache
def sdxl() -> UNet2DConditionModel:
    """stable-diffusion-xl-base-1.0."""
    with torch.device("meta"):
        return UNet2DConditionModel(
            sample_size=128, block_out_channels=(320, 640, 1280), transformer_layers_per_block=[1, 2, 10],
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=[5, 10, 20], cross_attention_dim=2048, use_linear_projection=True,
            addition_embed_type="text_time", addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        )  # fmt: skip


@functools.cache
def sd15() -> UNet2DConditionModel:
    """stable-diffusion-v1-5."""
    with torch.device("meta"):
        return UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
