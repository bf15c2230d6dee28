"""Paper eq. 5: L = L_FT + γ L_reg + λ R(h).

L_FT   denoising loss of the personalised UNet on the subject's pictures
L_reg  with the same LoRA and a caption without [V], c, the model should be what it was; one of
         preservation   the loss on pictures of other subjects of the class (DreamBooth)
         matching       |eps_θ(x_t, c) - eps_0(x_t, c)|² on the subject's own x_t, the base's prediction
                        being a constant; it needs no pictures of the class, and one more prediction
R(h)   L2 penalty on the predicted LoRA; what λ means depends on its reduction, so that is an explicit option

Shapes: latents, noise, predictions [rows, C, h, w]; timesteps [rows] int64; packed LoRA [B, N].
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from hyperrt.lora.layout import VECTORS, LoraLayout
from hyperrt.sampling.solvers import PREDICTION_TYPES
from hyperrt.training.model.hypernet import Packed
from hyperrt.training.model.lora_layers import unpack

REDUCTIONS = ("mean", "sum", "matrix_fro_mean", "matrix_mean_sum")  # see `Regulariser`
REGULARISED = ("factors", "product")
PRIORS = ("preservation", "matching")


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


class Regulariser:
    """R(h) of predicted LoRAs: a weighted sum of the squared norms of their matrices X, the mean over them.

    What λ means depends on the weights. With M matrices, of n_m numbers each and N together:

        sum               Σ_m |X_m|²               = N x²      where every number is x
        mean              Σ_m |X_m|² / N           = x²
        matrix_fro_mean   Σ_m |X_m|² / M           = x² N / M
        matrix_mean_sum   Σ_m (|X_m|² / n_m)       = x² M

    on "factors": the matrices are A - A0 and B of every site. The static A0 would cost most, and is the
        subject of no photo. |A|² + |B|² is least, for a given A B, at twice its nuclear norm: low rank is
        cheap.
    on "product": the matrices are A B, the change of the weights itself, so it is all one how scale is shared
        by A and B. |A B|² = tr(AᵀA BBᵀ) takes r x r matrices alone.

    Raises:
        ValueError: an unknown word.
    """

    def __init__(
        self, layout: LoraLayout, reduction: str, on: str = "factors", device: torch.device | str = "cpu"
    ) -> None:
        if reduction not in REDUCTIONS or on not in REGULARISED:
            known = f"reduction is one of {', '.join(REDUCTIONS)}, and it is on {' or '.join(REGULARISED)}"
            raise ValueError(f"there is no {reduction!r} on {on!r}; {known}")
        self.layout = layout
        self.on = on
        if on == "product":
            self.sizes = torch.tensor([site.d_in * site.d_out for site in layout.sites])
        else:  # in packed order: lora_q, then lora_kv
            self.sizes = torch.tensor(
                [part.stop - part.start for name in VECTORS for _, *ab in layout.slices(name) for part in ab]
            )
        self.weights = _weights(self.sizes, reduction)
        per_number = self.weights if on == "product" else self.weights.repeat_interleave(self.sizes)
        self.spread = per_number.float().to(device)

    def __call__(self, lora: Packed, deltas: Packed) -> Tensor:
        """R(h) of LoRAs [B, N], which are `deltas` without the static A0."""
        if self.on == "product":
            return (product_squares(self.layout, lora) @ self.spread).mean()
        numbers = torch.cat([deltas[name] for name in VECTORS], 1)
        return (numbers.float().square() @ self.spread).mean()

    def rms_at(self, cost: float) -> float:
        """The rms of the numbers, if it is the same in all matrices, at which R(h) is `cost`."""
        return math.sqrt(cost / float(self.weights @ self.sizes.double()))


def _weights(sizes: Tensor, reduction: str) -> Tensor:
    """The weight [M] of each matrix."""
    each = torch.ones(len(sizes), dtype=torch.float64)
    return {
        "sum": each,
        "mean": each / sizes.sum(),
        "matrix_fro_mean": each / len(sizes),
        "matrix_mean_sum": each / sizes,
    }[reduction]


def product_squares(layout: LoraLayout, packed: Packed) -> Tensor:
    """|A B|² of every LoRA and site [B, sites], as tr(AᵀA BBᵀ): the product is never made."""
    factors = unpack(layout, packed)
    pairs = [factors[site.path] for site in layout.sites]
    return torch.stack([((A.mT @ A) * (B @ B.mT)).sum((1, 2)) for A, B in pairs], 1).clamp_min(0)
