"""The base model as a folder in diffusers' format, and the sizes of the `tiny` one.

    BASE/{unet,vae,text_encoder,tokenizer,scheduler,image_encoder}/ and model_index.json

`image_encoder` is not part of Stable Diffusion: it is the frozen ViT that the hypernetwork reads.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DDIMScheduler, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, ViTConfig, ViTModel

if TYPE_CHECKING:
    from collections.abc import Sequence

IMAGE_SIZE = 64
MAX_TOKENS = 24
TEXT_WIDTH = 128
LATENT_CHANNELS = 12


@dataclass(frozen=True)
class Base:
    """The frozen parts, fp32 and in eval mode."""

    unet: UNet2DConditionModel
    vae: AutoencoderKL | AutoencoderTiny
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    image_encoder: ViTModel
    scheduler: DDIMScheduler

    def hidden_states(self, prompts: Sequence[str]) -> Tensor:
        """Prompts to text features [prompts, L, D]; each prompt is padded to the full length."""
        return self.text_encoder(tokens(self.tokenizer, prompts)).last_hidden_state


def tokens(tokenizer: CLIPTokenizer, prompts: Sequence[str]) -> Tensor:
    """Token ids [prompts, L]."""
    return tokenizer(list(prompts), padding="max_length", truncation=True, return_tensors="pt").input_ids


def tiny_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=IMAGE_SIZE // 8, in_channels=LATENT_CHANNELS, out_channels=LATENT_CHANNELS,
        block_out_channels=(96, 192), layers_per_block=1, norm_num_groups=16, attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D",) * 2, up_block_types=("CrossAttnUpBlock2D",) * 2,
        cross_attention_dim=TEXT_WIDTH,
    )  # fmt: skip


def tiny_vae() -> AutoencoderTiny:
    """No normalisation and nothing at full resolution but two convolutions: an AutoencoderKL of the same cost
    normalises each picture's colours away at first, and was 4 dB behind after ten times the training."""
    return AutoencoderTiny(
        latent_channels=LATENT_CHANNELS,
        encoder_block_out_channels=(32,) * 4, num_encoder_blocks=(0, 1, 2, 3),
        decoder_block_out_channels=(32,) * 4, num_decoder_blocks=(4, 3, 1, 0),
    )  # fmt: skip


def tiny_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=TEXT_WIDTH, intermediate_size=4 * TEXT_WIDTH,
            num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=MAX_TOKENS,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )  # fmt: skip


def tiny_image_encoder() -> ViTModel:
    config = ViTConfig(
        hidden_size=128, num_hidden_layers=4, num_attention_heads=4, intermediate_size=512,
        image_size=IMAGE_SIZE, patch_size=8,
    )  # fmt: skip
    return ViTModel(config, add_pooling_layer=False)


def tiny_scheduler() -> DDIMScheduler:
    """Stable Diffusion's noise schedule, with v-prediction: at high noise, where the colours of a subject
    are settled, the error of v is the error of the picture; that of epsilon is the same divided by the noise."""
    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="v_prediction",
        clip_sample=False, set_alpha_to_one=False, steps_offset=1,
    )  # fmt: skip


PARTS = {
    "unet": UNet2DConditionModel,
    "vae": AutoencoderTiny,
    "text_encoder": CLIPTextModel,
    "tokenizer": CLIPTokenizer,
    "image_encoder": ViTModel,
    "scheduler": DDIMScheduler,
}


def load(folder: Path | str) -> Base:
    """Reads a base folder; raises FileNotFoundError where a part is missing."""
    folder = Path(folder)
    missing = [name for name in PARTS if not (folder / name).is_dir()]
    if missing:
        raise FileNotFoundError(f"{folder} is not a base model: it has no {', '.join(missing)}")
    parts = {name: cls.from_pretrained(folder / name) for name, cls in PARTS.items()}
    for part in parts.values():
        if isinstance(part, torch.nn.Module):
            part.float().eval().requires_grad_(False)
    return Base(**parts)


def save(base: Base, folder: Path) -> None:
    """Writes every part and the index that makes the folder one of diffusers'."""
    for name in PARTS:
        getattr(base, name).save_pretrained(folder / name)
    library = {name: "diffusers" for name in ("unet", "vae", "scheduler")}
    index: dict[str, object] = {"_class_name": "StableDiffusionPipeline"}
    for name, cls in PARTS.items():
        index[name] = [library.get(name, "transformers"), cls.__name__]
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))
