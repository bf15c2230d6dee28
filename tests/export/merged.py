"""diffusers' UNet with a LoRA merged into its weights, which PEFT's adapters are compared with."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import numpy as np
import torch
from diffusers import UNet2DConditionModel

from hyperrt.lora.layout import LoraLayout


def personalised(
    unet: UNet2DConditionModel, layout: LoraLayout, lora: Mapping[str, np.ndarray]
) -> UNet2DConditionModel:
    """A copy whose weights are W + (A B)^T; `lora` holds packed vectors [N]."""
    unet = copy.deepcopy(unet)
    for path, (a, b) in layout.unpack({name: np.asarray(vector) for name, vector in lora.items()}).items():
        weight = unet.get_submodule(path).weight
        with torch.no_grad():
            weight += torch.from_numpy(np.ascontiguousarray((a @ b).T))
    return unet
