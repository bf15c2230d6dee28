"""Builds the networks of Stable Diffusion 1.5 and SDXL from their published configurations, without weights.

Source: config.json of each part as diffusers publishes them for these models; ViT-B/16 as
google/vit-base-patch16-224-in21k, ViT-H/14 as IP-Adapter's `models/image_encoder`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    ViTConfig,
    ViTModel,
)

Builders = Mapping[str, Callable[[], nn.Module]]

MAX_TOKENS = 77
SCHEDULER: Mapping[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "steps_offset": 1,
    "timestep_spacing": "leading",
}

SD15_UNET: Mapping[str, Any] = {
    "sample_size": 64,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
    "block_out_channels": (320, 640, 1280, 1280),
}
SDXL_UNET: Mapping[str, Any] = {
    "sample_size": 128,
    "cross_attention_dim": 2048,
    "attention_head_dim": (5, 10, 20),
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
VAE: Mapping[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}
CLIP_L: Mapping[str, Any] = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": MAX_TOKENS,
    "eos_token_id": 2,  # as first published; the pooled token is then the one with the highest id
}
CLIP_BIG_G: Mapping[str, Any] = {
    **CLIP_L,
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "hidden_act": "gelu",
    "projection_dim": 1280,
}
VIT_B: Mapping[str, Any] = {"image_size": 224, "patch_size": 16}
VIT_H: Mapping[str, Any] = {
    "image_size": 224,
    "patch_size": 14,
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 16,
    "hidden_act": "gelu",
    "projection_dim": 1024,
}

SD15: Builders = {
    "unet": lambda: UNet2DConditionModel(**SD15_UNET),
    "vae": lambda: AutoencoderKL(**VAE, sample_size=512, scaling_factor=0.18215),
    "text_encoder": lambda: CLIPTextModel(CLIPTextConfig(**CLIP_L)),
    "image_encoder": lambda: ViTModel(ViTConfig(**VIT_B), add_pooling_layer=False),
}
SDXL: Builders = {
    "unet": lambda: UNet2DConditionModel(**SDXL_UNET),
    "vae": lambda: AutoencoderKL(**VAE, sample_size=1024, scaling_factor=0.13025, force_upcast=True),
    "text_encoder": lambda: CLIPTextModel(CLIPTextConfig(**CLIP_L)),
    "text_encoder_2": lambda: CLIPTextModelWithProjection(CLIPTextConfig(**CLIP_BIG_G)),
    "image_encoder": lambda: CLIPVisionModelWithProjection(CLIPVisionConfig(**VIT_H)),
}
