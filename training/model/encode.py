"""Encodes pictures and prompts with the frozen networks of a base model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hyperrt.bundle.bundle import Preprocess
from hyperrt.photos import load
from hyperrt.training.model.base_model import Encoders, tokens

CLIP_VISION = "clip_vision_model"  # model_type of transformers' CLIPVisionModel, with or without projection
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
HALVES = (0.5, 0.5, 0.5)  # mean and standard deviation that map pixels to [-1, 1]


@dataclass(frozen=True, eq=False)
class Text:
    """Encoded prompts, one per row: what the UNet reads of the text.

    Attributes:
        hidden_states: [rows, L, D].
        pooled: [rows, P] of SDXL's second text encoder, diffusers' `text_embeds`; None for other families.
    """

    hidden_states: Tensor
    pooled: Tensor | None = None

    def __len__(self) -> int:
        return len(self.hidden_states)

    def __getitem__(self, rows: slice) -> Text:
        return Text(self.hidden_states[rows], None if self.pooled is None else self.pooled[rows])

    def to(self, device: torch.device | str) -> Text:
        """The same text on a device."""
        pooled = None if self.pooled is None else self.pooled.to(device)
        return Text(self.hidden_states.to(device), pooled)

    @staticmethod
    def cat(texts: Sequence[Text]) -> Text:
        """The rows of several texts, one after the other."""
        pooled = [text.pooled for text in texts if text.pooled is not None]
        hidden_states = torch.cat([text.hidden_states for text in texts])
        return Text(hidden_states, torch.cat(pooled) if pooled else None)


def preprocess_of(config: Any) -> Preprocess:
    """How an image encoder's input is made from a picture, in training and at run time.

    config: the encoder's, from transformers.
    """
    clip = config.model_type == CLIP_VISION
    mean, std = (CLIP_MEAN, CLIP_STD) if clip else (HALVES, HALVES)
    return Preprocess(config.image_size, mean, std, "bicubic", "center")


def encode_pixels(encoder: nn.Module, pixels: Tensor) -> Tensor:
    """Preprocessed pixels => the features that hypernetwork and image prompt read [n, T, F].

    For CLIP vision models the penultimate hidden states, as IP-Adapter uses: the last layer is trained to put
    into its first token what a text can say, and drops the rest. For a ViT the output.
    """
    if encoder.config.model_type == CLIP_VISION:
        return encoder(pixels, output_hidden_states=True).hidden_states[-2]
    return encoder(pixels).last_hidden_state


@torch.no_grad()
def encode_images(base: Encoders, pictures: np.ndarray) -> Tensor:
    """uint8 [n, H, W, 3] => features [n, T, F]."""
    device = next(base.image_encoder.parameters()).device
    pixels = load.preprocess(list(pictures), preprocess_of(base.image_encoder.config))
    return encode_pixels(base.image_encoder, torch.from_numpy(pixels).to(device))


def encode_latents(base: Encoders, pictures: np.ndarray, mirrored: bool = False) -> Tensor:
    """uint8 [n, S, S, 3] => latents [n, C, h, w] as the UNet takes them: the VAE's mean, scaled."""
    pixels = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1
    return latents_of_pixels(base, pixels.flip(-1) if mirrored else pixels)


@torch.no_grad()
def latents_of_pixels(base: Encoders, pixels: Tensor) -> Tensor:
    """Pixels [n, 3, S, S] in [-1, 1] => latents; the inverse of `hyperrt.training.run.sample.decode`."""
    encoded = base.vae.encode(pixels.to(next(base.vae.parameters()).device))
    mean = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latents
    return base.latent_scale.for_unet(mean)


def encode_ids(
    encoder: nn.Module, encoder_2: nn.Module | None, ids: Tensor, ids_2: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Token ids [n, L] => hidden states [n, L, D], and SDXL's pooled text [n, P].

    SDXL's hidden states are those before the last block of each encoder, without the last norm; the pooled
    text comes from the second.
    """
    if encoder_2 is None:
        return encoder(ids).last_hidden_state, None
    first = encoder(ids, output_hidden_states=True).hidden_states[-2]
    second = encoder_2(ids_2, output_hidden_states=True)
    return torch.cat([first, second.hidden_states[-2]], dim=-1), second.text_embeds


@torch.no_grad()
def encode_prompts(base: Encoders, prompts: Sequence[str]) -> Text:
    """Prompts, padded to the tokenizer's length => text with one row per prompt."""
    device = next(base.text_encoder.parameters()).device
    ids = tokens(base.tokenizer, prompts).to(device)
    ids_2 = None if base.tokenizer_2 is None else tokens(base.tokenizer_2, prompts).to(device)
    hidden, pooled = encode_ids(base.text_encoder, base.text_encoder_2, ids, ids_2)
    if base.zero_empty:
        not_empty = torch.tensor([bool(prompt) for prompt in prompts], device=device)
        hidden = hidden * not_empty[:, None, None]
        pooled = None if pooled is None else pooled * not_empty[:, None]
    return Text(hidden, pooled)


def encode_text(base: Encoders, prompts: Sequence[str]) -> Tensor:
    """The hidden states of `encode_prompts`, [prompts, L, D]."""
    return encode_prompts(base, prompts).hidden_states
