"""Sources with random weights for each family, to test and to measure exports without a trained model."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPTokenizer

from hyperrt.export import architectures
from hyperrt.export.parts import ModelPart, random_part
from hyperrt.export.source import Source
from hyperrt.training.data import clip_tokenizer
from hyperrt.training.model import base_model, image_prompt, lora_layers
from hyperrt.training.model.decoder_config import FULL_CLOSED, FULL_OPEN, DecoderConfig
from hyperrt.training.model.hypernet import decoder_of

TINY_RANK = 4
TOKEN = "sks"
LICENSE_OF_TINY = """\
Weights, tokenizer and graphs of this bundle were made by HyperRT (Apache License 2.0) from pictures that
HyperRT itself draws (training/data/scenes.py). No other model, text or picture went into them.
"""
LICENSE_OF_RANDOM = """\
The weights of this bundle are random numbers; it draws noise. Its graphs were made by HyperRT (Apache License
2.0) from the published configuration of the architecture.
"""


def tiny(seed: int) -> Source:
    """The tiny family, as before its training."""
    with torch.random.fork_rng(devices=[]), tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(seed)
        tokenizer = clip_tokenizer.build(Path(folder), base_model.MAX_TOKENS)
        modules = {
            "unet": base_model.tiny_unet(),
            "vae": base_model.tiny_vae(),
            "text_encoder": base_model.tiny_text_encoder(tokenizer),
            "image_encoder": base_model.tiny_image_encoder(),
        }
        scheduler = dict(base_model.tiny_scheduler().config)
    parts = {name: ModelPart.of(name, module) for name, module in modules.items()}
    size, decoder = base_model.IMAGE_SIZE, DecoderConfig()
    return with_decoder(parts, tokenizer, scheduler, seed, TINY_RANK, decoder, size, LICENSE_OF_TINY)


def sd15(seed: int) -> Source:
    """SD1.5 of the closed category: rank 3, HyperDreamBooth's decoder."""
    parts = {name: random_part(name, build, seed) for name, build in architectures.SD15.items()}
    scheduler = architectures.SCHEDULER
    return with_decoder(parts, _tokenizer(), scheduler, seed, 3, FULL_CLOSED, 512, LICENSE_OF_RANDOM)


def sdxl(seed: int) -> Source:
    """SDXL of the open category: rank 2, the resampler decoder, an image prompt."""
    parts = {name: random_part(name, build, seed) for name, build in architectures.SDXL.items()}
    unet = parts["unet"].skeleton
    parts["image_prompt"] = random_part("image_prompt", lambda: image_prompt.ImagePrompt(unet), seed)
    tokenizer, scheduler = _tokenizer(), architectures.SCHEDULER
    source = with_decoder(parts, tokenizer, scheduler, seed, 2, FULL_OPEN, 1024, LICENSE_OF_RANDOM)
    return dataclasses.replace(source, tokenizer_2=clip_tokenizer.padded(tokenizer, "!"), zero_empty=True)


def with_decoder(
    parts: dict[str, ModelPart],
    tokenizer: CLIPTokenizer,
    scheduler: Mapping[str, Any],
    seed: int,
    rank: int,
    config: DecoderConfig,
    image_size: int,
    license: str,
) -> Source:
    """These parts and a random weight decoder, whose LoRA is not zero as that of a fresh one is."""
    layout = lora_layers.layout_of(parts["unet"].skeleton, rank)
    width = parts["image_encoder"].skeleton.config.hidden_size

    def build() -> Any:
        return decoder_of(layout, width, config)

    def read() -> Any:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(seed)
            decoder = build()
            for vector in decoder.offsets.values():
                vector.add_(torch.randn_like(vector), alpha=0.05)
            return decoder

    parts["weight_decoder"] = ModelPart("weight_decoder", build, read, drawn_from=f"{seed}/weight_decoder")
    return Source(
        parts=parts, tokenizer=tokenizer, scheduler=scheduler, layout=layout, token=TOKEN,
        image_size=image_size, license=license,
    )  # fmt: skip


def _tokenizer() -> CLIPTokenizer:
    """CLIP's rules with a small vocabulary: for random weights no word has a meaning."""
    with tempfile.TemporaryDirectory() as folder:
        return clip_tokenizer.build(Path(folder), architectures.MAX_TOKENS)
