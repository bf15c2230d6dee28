"""Sets the precision of a graph's arithmetic, fp32, fp16 or bf16, in the graph itself.

In half precision these stay fp32: the norms (statistics and weights), the guidance sum, the solver's update,
all inputs and all outputs. Softmax is inside the attention operator, which all backends accumulate in fp32.
"""

from __future__ import annotations

import functools
from typing import Literal

import torch
from torch import Tensor, nn

from hyperrt.export.modules import GraphModule
from hyperrt.export.parts import stored

Precision = Literal["fp32", "fp16", "bf16"]
DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
NORMS = (nn.LayerNorm, nn.GroupNorm)


def of_graph(precision: Precision, module: GraphModule) -> Precision:
    """The precision of one graph in a bundle of that precision.

    A VAE with `force_upcast` (SDXL's) overflows in fp16 and shows bands in bf16, so it stays fp32.
    """
    vae = getattr(module, "vae", None)
    return "fp32" if vae is not None and vae.config.get("force_upcast", False) else precision


def apply(module: GraphModule, precision: Precision) -> GraphModule:
    """Makes the module compute in `precision`; changes weights and norms in place."""
    module.dtype = DTYPES[precision]
    norms = {id(owner._parameters) for owner in module.modules() if isinstance(owner, NORMS)}
    for child in module.modules():
        if isinstance(child, NORMS):
            child.forward = functools.partial(_norm_in_fp32, type(child).forward, child)
    converted: dict[int, Tensor] = {}
    for owner, key, tensor in stored(module):
        if tensor.is_floating_point() and id(owner) not in norms:
            if id(tensor) not in converted:
                new = tensor.detach().to(module.dtype)
                is_parameter = isinstance(tensor, nn.Parameter)
                converted[id(tensor)] = nn.Parameter(new, requires_grad=False) if is_parameter else new
            owner[key] = converted[id(tensor)]
    return module


def _norm_in_fp32(forward: object, norm: nn.Module, x: Tensor) -> Tensor:
    return forward(norm, x.float()).to(x.dtype)  # type: ignore[operator]
