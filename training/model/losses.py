"""Paper eq. 5: L = L_FT + γ L_reg + λ R(h).

L_FT   denoising loss of the personalised UNet on the subject's pictures
L_reg  keeps the model with the same LoRA and a caption c without [V] as it was; one of
         preservation   the loss on pictures of other subjects of the class (DreamBooth)
         matching       |eps_θ(x_t, c) - eps_0(x_t, c)|² on the subject's own x_t, with the base model's
                        prediction as a constant; needs no pictures of the class, and one more prediction
R(h)   L2 penalty on the predicted LoRA; the meaning of λ depends on the reduction, so that is a setting

Shapes: latents, noise, predictions [rows, C, h, w]; timesteps [rows] int64; packed LoRA [B, N].
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from hyperrt.lora.layout import VECTORS, LoraLayout
from hyperrt.sampling.solvers import PREDICTION_TYPES
from hyperrt.training.model.encode import Text
from hyperrt.training.model.hypernet import Packed
from hyperrt.training.model.lora_layers import unpack

REDUCTIONS = ("mean", "sum", "matrix_fro_mean", "matrix_mean_sum")  # of R(h), see `Regulariser`
REGULARISED = ("factors", "product")  # what R(h) is computed on
PRIORS = ("preservation", "matching")  # kinds of L_reg

# x_t, timesteps, text, LoRA, image tokens -> prediction; `model.predictor.Predictor` is one
Predict = Callable[[Tensor, Tensor, Text, Packed | None, Tensor | None], Tensor]


class NoiseScheduler:
    """Adds noise as a diffusers scheduler does, and gives the target of the prediction.

    Raises:
        ValueError: a prediction type other than epsilon, v_prediction and sample.
    """

    def __init__(self, scheduler: Any, device: torch.device | str = "cpu") -> None:
        alphas_cumprod = scheduler.alphas_cumprod.double()
        self.prediction_type = scheduler.config.prediction_type
        if self.prediction_type not in PREDICTION_TYPES:
            raise ValueError(f"prediction type {self.prediction_type!r} is not supported")
        self.train_timesteps = len(alphas_cumprod)
        self.signal = alphas_cumprod.sqrt().float().to(device)
        self.sigma = (1 - alphas_cumprod).sqrt().float().to(device)
        self.snr = (alphas_cumprod / (1 - alphas_cumprod)).float().to(device)

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_t = a x0 + s noise."""
        a, s = self._scales(timesteps)
        return a * latents + s * noise

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The noise, v = a noise - s x0, or x0, by prediction type."""
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type == "sample":
            return latents
        a, s = self._scales(timesteps)
        return a * noise - s * latents

    def min_snr_weights(self, timesteps: Tensor, min_snr: float) -> Tensor:
        """Weight [rows] of each row's loss, min-SNR-γ (arXiv 2303.09556); ones for γ = 0."""
        if not min_snr:
            return torch.ones_like(timesteps, dtype=torch.float32)
        snr = self.snr[timesteps]
        capped = snr.clamp(max=min_snr)
        if self.prediction_type == "epsilon":
            return capped / snr
        return capped / (snr + 1) if self.prediction_type == "v_prediction" else capped

    def _scales(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """a and s of each row, [rows, 1, 1, 1]."""
        return self.signal[timesteps].view(-1, 1, 1, 1), self.sigma[timesteps].view(-1, 1, 1, 1)


def row_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of each row, [rows]."""
    return (prediction.float() - target).square().flatten(1).mean(1)


class DenoisingRows(Protocol):
    """Rows to denoise, on any device; `run.batches.Batch` is one."""

    latents: Tensor
    noise: Tensor
    timesteps: Tensor
    text: Text
    weight: Tensor  # [rows], factor of each row's loss


class Equation5:
    """The loss of a batch: L_FT + γ L_reg + λ R(h).

    Args:
        gamma, lambda_: the weights of L_reg and R(h).
        prior: what L_reg is, one of `PRIORS`.
        min_snr: γ of min-SNR weighting; 0: off.
        device: of the tensors.
    """

    def __init__(
        self,
        scheduler: NoiseScheduler,
        regulariser: Regulariser,
        *,
        gamma: float = 0.0,
        lambda_: float = 0.0,
        prior: str = "preservation",
        min_snr: float = 0.0,
        device: torch.device | str = "cpu",
    ) -> None:
        self.scheduler = scheduler
        self.regulariser = regulariser
        self.gamma, self.lambda_ = gamma, lambda_
        self.prior, self.min_snr = prior, min_snr
        self.device = device

    def __call__(
        self,
        predict: Predict,
        lora: Packed,
        deltas: Packed,
        batch: DenoisingRows,
        prior: DenoisingRows | None = None,
        image_tokens: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The loss and its terms: "loss", "ft", "reg", "prior".

        Args:
            lora: predicted LoRAs of S subjects [S, N], fp32.
            deltas: the same without the static A0.
            batch: the rows of L_FT, the same number for each subject, subject by subject.
            prior: the rows of L_reg, as many; None: L_reg is 0.
            image_tokens: of the subjects, [S, I, D]; the rows of L_reg get none.
        """
        reg = self.regulariser(lora, deltas)
        targets = len(batch.latents) // len(next(iter(lora.values())))
        lora = {name: vector.repeat_interleave(targets, 0) for name, vector in lora.items()}
        image_tokens = None if image_tokens is None else image_tokens.repeat_interleave(targets, 0)
        if prior is None:
            [ft] = self._denoising([batch], predict, lora, image_tokens)
            l_reg = torch.zeros_like(reg)
        else:
            lora = {name: vector.repeat(2, 1) for name, vector in lora.items()}
            if image_tokens is not None:  # zeros switch it off: the prior's pictures show other subjects
                image_tokens = torch.cat([image_tokens, torch.zeros_like(image_tokens)])
            ft, l_reg = self._denoising([batch, prior], predict, lora, image_tokens)
        loss = ft + self.gamma * l_reg + self.lambda_ * reg
        return {"loss": loss, "ft": ft, "reg": reg, "prior": l_reg}

    def _denoising(
        self, parts: list[DenoisingRows], predict: Predict, lora: Packed, image_tokens: Tensor | None
    ) -> Tensor:
        """The mean loss of each part, [parts]; all parts go through the UNet in one call."""
        latents, noise, timesteps, weight = (
            torch.cat([getattr(part, name) for part in parts]).to(self.device)
            for name in ("latents", "noise", "timesteps", "weight")
        )
        text = Text.cat([part.text for part in parts]).to(self.device)
        noisy = self.scheduler.add_noise(latents, noise, timesteps)
        target = self.scheduler.target(latents, noise, timesteps)
        if len(parts) > 1 and self.prior == "matching":
            rows = slice(len(latents) // 2, None)  # of L_reg
            with torch.no_grad():
                constant = predict(noisy[rows], timesteps[rows], text[rows], None, None)
            target = torch.cat([target[: len(latents) // 2], constant])
        losses = row_loss(predict(noisy, timesteps, text, lora, image_tokens), target)
        losses = losses * self.scheduler.min_snr_weights(timesteps, self.min_snr) * weight
        return losses.view(len(parts), -1).mean(1)


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
