"""Pictures and prompts through the frozen encoders of a base model: features, latents, hidden states."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hyperrt.bundle.bundle import Preprocess
from hyperrt.photos import load
from hyperrt.training.model.base_model import Encoders, tokens

CLIP_VISION = "clip_vision_model"  # model_type of transformers' CLIPVisionModel, with projection or not
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
HALVES = (0.5, 0.5, 0.5)  # mean and deviation that take pixels to [-1, 1]


def preprocess_of(config: Any) -> Preprocess:
    """How pictures become the pixels of an image encoder, in training and in the runtime, which export tells.

    config: the encoder's, of transformers.
    """
    clip = config.model_type == CLIP_VISION
    mean, std = (CLIP_MEAN, CLIP_STD) if clip else (HALVES, HALVES)
    return Preprocess(config.image_size, mean, std, "bicubic", "center")


def encode_pixels(encoder: nn.Module, pixels: Tensor) -> Tensor:
    """Pixels as the encoder takes them => the features that hypernetwork and image prompt read [n, T, F].

    Of CLIP's vision model what goes into its last layer, as IP-Adapter does: the last layer is trained to
    leave in the first token what a text can say, and forgets the rest. Of a ViT its output.
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
    """uint8 [n, S, S, 3] => latents [n, C, h, w] as the UNet takes them: the mean of the VAE's, scaled."""
    pixels = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1
    return latents_of_pixels(base, pixels.flip(-1) if mirrored else pixels)


@torch.no_grad()
def latents_of_pixels(base: Encoders, pixels: Tensor) -> Tensor:
    """Pixels [n, 3, S, S] in [-1, 1] => latents; the inverse of hyperrt.training.run.sample.decode."""
    encoded = base.vae.encode(pixels.to(next(base.vae.parameters()).device))
    mean = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latents
    return base.latent_scale.for_unet(mean)


def encode_ids(
    encoder: nn.Module, encoder_2: nn.Module | None, ids: Tensor, ids_2: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Token ids [n, L] => hidden states [n, L, D] and, of an SDXL's two encoders, pooled text [n, P].

    An SDXL's hidden states are those before the last block of each, without the last norm; pooled is the
    second's.
    """
    if encoder_2 is None:
        return encoder(ids).last_hidden_state, None
    first = encoder(ids, output_hidden_states=True).hidden_states[-2]
    second = encoder_2(ids_2, output_hidden_states=True)
    return torch.cat([first, second.hidden_states[-2]], dim=-1), second.text_embeds


@torch.no_grad()
def encode_prompts(base: Encoders, prompts: Sequence[str]) -> tuple[Tensor, Tensor | None]:
    """Prompts, padded to the tokenizer's length => hidden states [n, L, D], and an SDXL's pooled [n, P]."""
    device = next(base.text_encoder.parameters()).device
    ids = tokens(base.tokenizer, prompts).to(device)
    ids_2 = None if base.tokenizer_2 is None else tokens(base.tokenizer_2, prompts).to(device)
    hidden, pooled = encode_ids(base.text_encoder, base.text_encoder_2, ids, ids_2)
    if base.zero_empty:
        said = torch.tensor([bool(prompt) for prompt in prompts], device=device)
        hidden = hidden * said[:, None, None]
        pooled = None if pooled is None else pooled * said[:, None]
    return hidden, pooled


def encode_text(base: Encoders, prompts: Sequence[str]) -> Tensor:
    """The hidden states of `encode_prompts`."""
    return encode_prompts(base, prompts)[0]
