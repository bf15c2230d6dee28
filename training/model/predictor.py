"""The frozen UNet as a function of rows, each with its own LoRA, text and image prompt."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from hyperrt.lora.layout import LoraLayout
from hyperrt.training.model.encode import Text
from hyperrt.training.model.hypernet import Packed
from hyperrt.training.model.image_prompt import ImagePrompt
from hyperrt.training.model.lora_layers import Rows, unpack


class Predictor:
    """Calls the UNet with what its family reads.

    Args:
        unet: with `lora_layers.install` done; it may be compiled.
        layout: of the LoRAs.
        picture_size: pixels of a picture's side; SDXL reads it.
        device: of the UNet.
        autocast: makes the context in which the networks run.
        image_prompt, image_scale: the IP-Adapter and its strength; None: no image prompt.
    """

    def __init__(
        self,
        unet: nn.Module,
        layout: LoraLayout,
        picture_size: int,
        device: torch.device,
        autocast: Callable[[], AbstractContextManager[object]],
        image_prompt: ImagePrompt | None = None,
        image_scale: float = 1.0,
    ) -> None:
        self.unet = unet
        self.layout = layout
        self.picture_size = picture_size
        self.device = device
        self.autocast = autocast
        self.image_prompt = image_prompt
        self.image_scale = image_scale

    @torch.no_grad()
    def image_tokens(self, features: Tensor, photos: int = 1) -> Tensor | None:
        """Features [S N, T, F] to image tokens [S, I, D], the mean over each subject's N photos.

        Returns None if there is no image prompt.
        """
        if self.image_prompt is None:
            return None
        with self.autocast():
            tokens = self.image_prompt.tokens(features.to(self.device)).float()
        return tokens.unflatten(0, (-1, photos)).mean(1)

    def __call__(
        self,
        latents: Tensor,
        timesteps: Tensor,
        text: Text,
        lora: Packed | None = None,
        image_tokens: Tensor | None = None,
    ) -> Tensor:
        """The UNet's prediction for noisy latents, fp32 [rows, C, h, w].

        Args:
            lora: packed LoRAs with one row each; None: the base model.
            image_tokens: [rows, I, D]; needs a LoRA. None: no image prompt.
        """
        latents = latents.to(self.device, memory_format=torch.channels_last)
        with self.autocast():
            output = self.unet(
                latents,
                timesteps.to(self.device),
                encoder_hidden_states=text.hidden_states,
                cross_attention_kwargs=None if lora is None else {"rows": self.rows(lora, image_tokens)},
                added_cond_kwargs=self._added(text),
                return_dict=False,
            )
        return output[0].float()

    def rows(self, lora: Packed, image_tokens: Tensor | None = None) -> Rows:
        """The argument of `RowAttention` for LoRAs and image tokens, every gate 1."""
        gate = torch.ones(len(next(iter(lora.values()))), 1, 1, device=self.device)
        factors = unpack(self.layout, lora)
        if image_tokens is None:
            return Rows(factors, gate)
        scale = torch.full((len(image_tokens),), self.image_scale, device=self.device)
        with torch.no_grad():
            image = self.image_prompt.key_values(image_tokens, scale)
        return Rows(factors, gate, image=image)

    def _added(self, text: Text) -> dict[str, Tensor]:
        """SDXL's extra inputs: pooled text, and the sizes of picture and crop as the runtime gives them."""
        if text.pooled is None:
            return {}
        side = self.picture_size
        sizes = torch.tensor([[side, side, 0, 0, side, side]], device=self.device)
        return {"text_embeds": text.pooled, "time_ids": sizes.expand(len(text), -1).to(text.pooled)}
