"""SD1.5 and SDXL with every part that the real ones have, each as small as it can be."""

from __future__ import annotations

from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

TEXT = {
    "vocab_size": 1000, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 2, "max_position_embeddings": 77, "eos_token_id": 2,
}  # fmt: skip
UNET = {
    "sample_size": 16, "norm_num_groups": 8, "attention_head_dim": 2, "block_out_channels": (16, 32),
    "layers_per_block": 1,
}  # fmt: skip
SD15 = {
    "unet": lambda: UNet2DConditionModel(
        **UNET, cross_attention_dim=16,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ),
    "vae": lambda: vae(),
    "text_encoder": lambda: CLIPTextModel(CLIPTextConfig(**TEXT)),
    "image_encoder": lambda: vision(),
}  # fmt: skip
SDXL = {
    "unet": lambda: UNet2DConditionModel(
        **UNET, cross_attention_dim=40, use_linear_projection=True,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=24 + 48,
    ),
    "vae": lambda: vae(force_upcast=True),
    "text_encoder": lambda: CLIPTextModel(CLIPTextConfig(**TEXT)),
    "text_encoder_2": lambda: CLIPTextModelWithProjection(
        CLIPTextConfig(**TEXT | {"hidden_size": 24, "projection_dim": 24})
    ),
    "image_encoder": lambda: vision(),
}  # fmt: skip


def vae(**options: object) -> AutoencoderKL:
    """Two pixels a latent."""
    return AutoencoderKL(
        block_out_channels=(8, 16), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, layers_per_block=1, latent_channels=4, norm_num_groups=4,
        **options,
    )  # fmt: skip


def vision() -> CLIPVisionModelWithProjection:
    """Five tokens of 16."""
    return CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2, image_size=28,
            patch_size=14, projection_dim=8,
        )
    )  # fmt: skip
