"""Paper eq. 5: L = L_FT + γ L_reg + λ R(h).

L_FT   denoising loss of the personalised UNet on the subject's pictures
L_reg  the same with the same LoRA on other subjects of the class, captioned without [V] (DreamBooth)
R(h)   L2 penalty on the predicted LoRA; what λ means depends on its reduction, so that is an explicit option

Shapes: latents, noise, predictions [rows, C, h, w]; timesteps [rows] int64; packed LoRA [B, N].
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hyperrt.solvers import PREDICTION_TYPES


class Noising:
    """The forward process of a scheduler, and what its model is to predict.

    Raises:
        ValueError: a prediction type that is not one of epsilon, v_prediction, sample.
    """

    def __init__(self, scheduler: Any, device: torch.device | str = "cpu") -> None:
        kept = scheduler.alphas_cumprod.double()
        self.prediction_type = scheduler.config.prediction_type
        if self.prediction_type not in PREDICTION_TYPES:
            raise ValueError(f"prediction type {self.prediction_type!r} is not supported")
        self.steps = len(kept)
        self.signal = kept.sqrt().float().to(device)
        self.spread = (1 - kept).sqrt().float().to(device)
        self.snr = (kept / (1 - kept)).float().to(device)

    def noised(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_t = a x0 + s noise."""
        return (
            self.signal[timesteps].view(-1, 1, 1, 1) * latents
            + self.spread[timesteps].view(-1, 1, 1, 1) * noise
        )

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The noise, v = a noise - s x0, or x0."""
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type == "sample":
            return latents
        a, s = self.signal[timesteps].view(-1, 1, 1, 1), self.spread[timesteps].view(-1, 1, 1, 1)
        return a * noise - s * latents

    def weights(self, timesteps: Tensor, min_snr: float) -> Tensor:
        """Weight [rows] of each row's loss, min-SNR-γ (arXiv 2303.09556); ones for γ = 0."""
        if not min_snr:
            return torch.ones_like(timesteps, dtype=torch.float32)
        snr = self.snr[timesteps]
        capped = snr.clamp(max=min_snr)
        if self.prediction_type == "epsilon":
            return capped / snr
        return capped / (snr + 1) if self.prediction_type == "v_prediction" else capped


def row_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of each row, [rows]."""
    return (prediction.float() - target).square().flatten(1).mean(1)


def regulariser(deltas: Mapping[str, Tensor], reduction: str, factors: int) -> Tensor:
    """R(h) of predicted LoRAs [B, N], averaged over B.

    mean: mean of the squared entries; sum: their sum; per_factor: mean over factors of their squared norm.

    Raises:
        ValueError: an unknown reduction.
    """
    photos = next(iter(deltas.values())).shape[0]
    total = sum(vector.float().square().sum() for vector in deltas.values()) / photos
    if reduction == "mean":
        return total / sum(vector.shape[1] for vector in deltas.values())
    if reduction == "per_factor":
        return total / factors
    if reduction != "sum":
        raise ValueError(f"reduction {reduction!r} is not one of mean, sum, per_factor")
    return torch.as_tensor(total)
