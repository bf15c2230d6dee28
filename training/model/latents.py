"""Scales latents between the VAE and the UNet as diffusers' pipelines do.

    decode   z = x std / scaling_factor + mean        encode   x = (z - mean) scaling_factor / std

Only SDXL's pipelines read `latents_mean` and `latents_std`, a number for each channel; without them mean is 0
and std 1. No pipeline of Stable Diffusion reads `shift_factor`. A VAE with a setting that the pipeline of its
model does not read is refused by name: it was trained for another kind of model.

Source: diffusers' StableDiffusionXLPipeline and StableDiffusionXLImg2ImgPipeline.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

STATISTICS = ("latents_mean", "latents_std")


@dataclass(frozen=True)
class LatentScale:
    """The scale settings in a VAE's configuration.

    Attributes:
        factor: scaling_factor.
        mean, std: of each channel [C]; both empty if the configuration has none.
    """

    factor: float
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    @classmethod
    def of(cls, config: Any, is_sdxl: bool) -> LatentScale:
        """Reads the configuration of an AutoencoderKL or AutoencoderTiny.

        Raises:
            ValueError: a setting is not a number, or diffusers' pipelines for such a model do not read it.
        """
        factor = config.get("scaling_factor")
        if not _is_number(factor) or factor == 0:
            raise ValueError(f"its scaling_factor is {factor!r}; it must be a number other than 0")
        if config.get("shift_factor"):
            shift = config["shift_factor"]
            raise ValueError(f"its shift_factor is {shift!r}, which no pipeline of Stable Diffusion reads")
        given = {name: config.get(name) for name in STATISTICS if config.get(name) is not None}
        if not given:
            return cls(float(factor))
        if not is_sdxl or len(given) == 1:
            name = next(iter(given))
            why = "alone does nothing in SDXL's pipeline" if is_sdxl else "only SDXL's pipeline reads"
            raise ValueError(f"its {name} is {given[name]!r}, which {why}")
        for name, values in given.items():
            _check(name, values, config["latent_channels"])
        if not all(given["latents_std"]):
            raise ValueError(f"its latents_std is {given['latents_std']!r}; 0 leaves nothing of a channel")
        return cls(
            float(factor), tuple(map(float, given["latents_mean"])), tuple(map(float, given["latents_std"]))
        )

    def for_vae(self, latents: Tensor) -> Tensor:
        """Latents as the UNet takes them [n, C, h, w] => as the VAE decodes them."""
        if not self.mean:
            return latents / self.factor
        mean, std = self._columns(latents)
        return latents * std / self.factor + mean

    def for_unet(self, latents: Tensor) -> Tensor:
        """Latents as the VAE encodes them [n, C, h, w] => as the UNet takes them."""
        if not self.mean:
            return latents * self.factor
        mean, std = self._columns(latents)
        return (latents - mean) * self.factor / std

    def _columns(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and std, [1, C, 1, 1]."""
        mean, std = (torch.tensor(values).view(1, -1, 1, 1).to(latents) for values in (self.mean, self.std))
        return mean, std


def _check(name: str, values: Any, channels: int) -> None:
    expected = f"it must be {channels} numbers, one for each channel"
    if not isinstance(values, Sequence) or len(values) != channels or not all(map(_is_number, values)):
        raise ValueError(f"its {name} is {values!r}; {expected}")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
