"""What the graphs are compared with: the paper's formula in plain PyTorch, sharing little with them.

The UNet keeps diffusers' own attention, the LoRA is merged into copies of the projections, every branch is a
call of its own with its prompt's hidden states; guidance and solver are the NumPy functions of the runtime.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import Tensor

from hyperrt import guidance, solvers
from hyperrt.lora import LoraLayout

Arrays = Mapping[str, np.ndarray]


def plain(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """A copy with diffusers' own attention."""
    unet = copy.deepcopy(unet)
    unet.set_attn_processor(AttnProcessor2_0())
    return unet


def personalised(unet: UNet2DConditionModel, layout: LoraLayout, lora: Arrays) -> UNet2DConditionModel:
    """A copy of a plain UNet whose weights are W + (A B)^T; `lora` holds packed vectors [N]."""
    unet = copy.deepcopy(unet)
    for path, (a, b) in layout.unpack({name: np.asarray(vector) for name, vector in lora.items()}).items():
        weight = unet.get_submodule(path).weight
        with torch.no_grad():
            weight += torch.from_numpy(np.ascontiguousarray((a @ b).T))
    return unet


def stepper(
    base: UNet2DConditionModel,
    subject: UNet2DConditionModel,
    hidden: Sequence[Tensor],
    weights: Sequence[float],
) -> Callable[[Arrays], dict[str, np.ndarray]]:
    """The step of `sampling.denoise` in plain PyTorch.

    Args:
        base, subject: of `plain` and `personalised`.
        hidden: per branch of `guidance.BRANCHES` the hidden states of its prompt [1, L, D].
        weights: per branch its share of the sum.
    """

    @torch.no_grad()
    def step(feeds: Arrays) -> dict[str, np.ndarray]:
        latents, c = feeds["latents"], feeds["coefficients"]
        x = torch.from_numpy(latents * c[0])
        outputs = [
            (subject if name == "subject" else base)(
                x, float(feeds["timestep"]), text.expand(len(x), -1, -1), return_dict=False
            )[0].numpy()
            for name, text in zip(guidance.BRANCHES, hidden, strict=True)
        ]
        output = guidance.combine(list(weights), outputs)
        following = solvers.apply(c, latents, output, feeds["previous"], feeds["noise"])
        return dict(zip(("next_latents", "denoised"), following, strict=True))

    return step
