"""SD1.5 and SDXL with all parts of the real models, each as small as possible."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import save_file
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from hyperrt.export.parts import random_part
from hyperrt.export.random_sources import with_decoder
from hyperrt.export.source import Source
from hyperrt.training.data import clip_tokenizer
from hyperrt.training.model import image_prompt, lora_layers, weight_hash
from hyperrt.training.model.decoder_config import DecoderConfig
from hyperrt.training.model.hypernet import decoder_of
from hyperrt.training.run import checkpoint
from hyperrt.training.run.config import TrainConfig

SCHEDULER = {
    "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "prediction_type": "epsilon",
}  # fmt: skip
TEXT = {
    "vocab_size": 1000, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 2, "max_position_embeddings": 77, "eos_token_id": 2,
}  # fmt: skip
UNET = {
    "sample_size": 16, "norm_num_groups": 8, "attention_head_dim": 2, "block_out_channels": (16, 32),
    "layers_per_block": 1,
}  # fmt: skip
SD15_BLOCKS = {
    "cross_attention_dim": 16, "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}  # fmt: skip
SD15 = {
    "unet": lambda: UNet2DConditionModel(**UNET, **SD15_BLOCKS),
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
    """A VAE with two pixels per latent."""
    return AutoencoderKL(
        block_out_channels=(8, 16), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, layers_per_block=1, latent_channels=4, norm_num_groups=4,
        **options,
    )  # fmt: skip


def vision() -> CLIPVisionModelWithProjection:
    """A vision model with five tokens of width 16."""
    return CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2, image_size=28,
            patch_size=14, projection_dim=8,
        )
    )  # fmt: skip


def source(family: str, folder: Path, scheduler: Mapping[str, Any] = SCHEDULER) -> Source:
    """Random weights like those of the families sd15 and sdxl; the tokenizer goes to `folder`."""
    xl = family == "sdxl"
    parts = {name: random_part(name, build, 0) for name, build in (SDXL if xl else SD15).items()}
    unet = parts["unet"].skeleton
    if xl:
        build = lambda: image_prompt.ImagePrompt(unet, feature_dim=16, tokens=3, dim=16, heads=2, depth=4)  # noqa: E731
        parts["image_prompt"] = random_part("image_prompt", build, 0)
    config = DecoderConfig(kind="resampler" if xl else "hyperdreambooth", dim=16, layers=1, head_dim=0)
    plain = with_decoder(parts, clip_tokenizer.build(folder, 77), scheduler, 0, 2, config, 32, "none")
    if not xl:
        return plain
    tokenizer_2 = clip_tokenizer.padded(plain.tokenizer, "!")
    return dataclasses.replace(plain, tokenizer_2=tokenizer_2, zero_empty=True)


def save(
    folder: Path, builders: Mapping[str, Callable[[], nn.Module]], scheduler: Mapping[str, Any] = SCHEDULER
) -> dict[str, Any]:
    """Random weights of `SD15` or `SDXL` as diffusers saves a model; returns the networks."""
    modules = {name: random_part(name, build, 0).read().float() for name, build in builders.items()}
    for name, module in modules.items():
        for tensor in module.state_dict().values():
            tensor.mul_(1 + 2**-13)  # which fp16 cannot hold
        module.save_pretrained(folder / name)
    tokenizer = clip_tokenizer.build(folder / "tokenizer", 77)
    if "text_encoder_2" in modules:
        tokenizer.pad_token = "!"
        tokenizer.save_pretrained(folder / "tokenizer_2")
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    (folder / "model_index.json").write_text(json.dumps({"force_zeros_for_empty_prompt": True}))
    return modules


def save_prompt(path: Path, unet: nn.Module, seed: int = 0) -> Path:
    """Random weights of an IP-Adapter-Plus for that UNet, three tokens of the features of `vision`."""
    build = lambda: image_prompt.ImagePrompt(unet, feature_dim=16, tokens=3, dim=16, heads=1, depth=4)  # noqa: E731
    save_file(random_part("image_prompt", build, seed).read().state_dict(), path)
    return path


def save_hypernet(folder: Path, base: Path, unet: nn.Module, prompt_hash: str = "", **training: Any) -> Path:
    """Saves a fresh hypernetwork of that base model; `training`: settings of its run."""
    config = TrainConfig(
        base=str(base), data="c", output="h", rank=2, dim=16, layers=1, head_dim=8, **training
    )
    decoder = decoder_of(lora_layers.layout_of(unet, 2), 16, config.decoder)
    folder.mkdir()
    checkpoint.save_hypernet(folder, decoder, config, 1, weight_hash.hash_of(unet, half=True), prompt_hash)
    return folder
