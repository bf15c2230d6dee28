"""Guidance: combines the predictions of the branches into the one that the solver follows.

The arithmetic works on NumPy arrays (at run time) and on torch tensors (training previews).

Every rule is an affine sum: its weights add up to 1. So it holds for noise, clean-sample and velocity
predictions alike, which are affine in each other at one latent and one timestep. A multistep solver takes the
combined prediction, never those of the branches.

Shapes: predictions are [images, C, h, w], one per branch, float32 (weights reach -13: half precision loses).
Source: arXiv 2511.03156, equations 19 and 20 (hybrid-model classifier-free guidance, HM-CFG); CFG is of
arXiv 2207.12598, eq. 6.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from hyperrt.errors import UsageError

BranchName = Literal["uncond", "subject", "generic", "subject_uncond"]
BRANCHES: tuple[BranchName, ...] = ("uncond", "subject", "generic")  # as hm_cfg_weights returns their weights
CFG_BRANCHES: tuple[BranchName, ...] = ("subject_uncond", "subject")  # as cfg_weights returns theirs
CFG_PULL = 2  # HM-CFG at scale s equals CFG at scale 2s if the subject and the generic prompt agree


@dataclass(frozen=True)
class Branch:
    """One model evaluation of a step and its share of the sum.

    Attributes:
        name: "uncond" is the base model with the empty or negative prompt, "subject" the personalised model
            with the subject prompt, "generic" the base model with the prompt that does not name the subject,
            "subject_uncond" the personalised model with the empty or negative prompt.
        weight: coefficient in the affine sum, dimensionless; negative for guidance away from the branch.
    """

    name: BranchName
    weight: float

    @property
    def personalised(self) -> bool:
        """Whether the branch uses the personalised model."""
        return self.name in CFG_BRANCHES


def hm_cfg_weights(guidance_scale: float, kappa: float) -> tuple[float, float, float]:
    """Weights of HM-CFG, paper eq. 20: `(1 - 2s) uncond + kappa s subject + (2 - kappa) s generic`.

    Args:
        guidance_scale: s = w + 1, as in diffusers. Both conditions together guide as strongly as 2s in plain
            classifier-free guidance; s = 0.5 turns the unconditional branch off.
        kappa: share of the personalised model, 0 (base model alone) to 2 (no generic prompt); 1 is the paper.

    Returns:
        `(w_uncond, w_subject, w_generic)`; they add up to 1.

    Raises:
        UsageError: an argument is not finite.
    """
    _check_finite(guidance_scale=guidance_scale, kappa=kappa)
    return 1 - 2 * guidance_scale, kappa * guidance_scale, (2 - kappa) * guidance_scale


def cfg_weights(guidance_scale: float) -> tuple[float, float]:
    """Weights of CFG of the personalised model: `(1 - s) subject_uncond + s subject`.

    Args:
        guidance_scale: s = w + 1, as in diffusers; as strong as HM-CFG at s / 2 if both prompts agree.

    Returns:
        `(w_subject_uncond, w_subject)`; they add up to 1.

    Raises:
        UsageError: the scale is not finite.
    """
    _check_finite(guidance_scale=guidance_scale)
    return 1 - guidance_scale, guidance_scale


def active(branches: Iterable[Branch]) -> tuple[Branch, ...]:
    """The branches with a weight other than zero, in their order; the others need no model evaluation.

    kappa = 0 and kappa = 2 leave two branches; guidance_scale = 0.5 drops the unconditional branch.
    """
    return tuple(branch for branch in branches if branch.weight != 0)


def combine(weights: Sequence[float] | Any, predictions: Sequence[Any] | Any) -> Any:
    """The affine sum `sum_b weights[b] * predictions[b]`.

    Args:
        weights: one number per branch, [branches]; they add up to 1.
        predictions: the branches' predictions, a sequence or an array [branches, images, C, h, w], NumPy or
            torch.

    Returns:
        [images, C, h, w], of the predictions' type.

    Raises:
        ValueError: there are not as many weights as predictions.
    """
    return sum(prediction * weight for weight, prediction in zip(weights, predictions, strict=True))


def _check_finite(**values: float) -> None:
    for name, value in values.items():
        if not math.isfinite(value):
            raise UsageError(
                f"{name} is {value}",
                "the weights of the branches must be finite numbers",
                "use a guidance_scale of about 3.5 and a kappa between 0 and 2",
            )
