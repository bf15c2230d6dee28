"""Reads the weights of a UNet from a bundle's graphs, for comparisons with PyTorch without the base model.

Export keeps the order of computation, but not all names, so the n-th convolution, projection and
normalisation of the graph is the n-th that the UNet calls. K and V of the cross-attentions are in the
`context` graph, in the order of the LoRA layout. A wrong shape is an error; a weight in the wrong place shows
in the measurement.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from hyperrt.bundle.bundle import Bundle

KINDS = {
    "Conv": nn.Conv2d,
    "Gemm": nn.Linear,
    "MatMul": nn.Linear,
    "LayerNormalization": nn.LayerNorm,
    "InstanceNormalization": nn.GroupNorm,
}
Weights = tuple[np.ndarray, np.ndarray | None]  # weight as PyTorch has it, bias


def read_into(unet: UNet2DConditionModel, bundle: Bundle) -> UNet2DConditionModel:
    """Sets the weights of `unet` to the bundle's; returns it.

    Raises:
        ValueError: the graphs were not made from a UNet with these modules.
    """
    layout = bundle.layout
    context = [matrix for kind, (matrix, _) in weighted_nodes(bundle.graph("context")) if kind is nn.Linear]
    of_context = {unet.get_submodule(site.path) for site in layout.sites_of("lora_kv")}
    modules = [module for module in calls(unet) if module not in of_context]
    with torch.no_grad():
        for module, (kind, weights) in zip(modules, weighted_nodes(bundle.graph("denoiser")), strict=True):
            if not isinstance(module, kind):
                raise ValueError(f"the graph has {kind.__name__} where the UNet calls {module}")
            fill(module, weights)
        for site, matrix in zip(layout.sites_of("lora_kv"), context, strict=True):
            fill(unet.get_submodule(site.path), (matrix, None))
    return unet


def calls(unet: UNet2DConditionModel) -> list[nn.Module]:
    """The modules with weights, in the order in which the UNet calls them."""
    order: list[nn.Module] = []
    kinds = tuple(set(KINDS.values()))
    leaves = [module for module in unet.modules() if isinstance(module, kinds)]
    hooks = [leaf.register_forward_hook(lambda module, *_: order.append(module)) for leaf in leaves]
    config = unet.config
    latents = torch.zeros(1, config.in_channels, config.sample_size, config.sample_size)
    with torch.no_grad():
        unet(latents, 0, torch.zeros(1, 1, config.cross_attention_dim))
    for hook in hooks:
        hook.remove()
    return order


def weighted_nodes(path: Path) -> Iterator[tuple[type[nn.Module], Weights]]:
    """Kind and weights of every node that has weights, in the graph's order."""
    for node in ir.load(path).graph:
        kind = KINDS.get(node.op_type)
        if kind is None or (kind is nn.Linear and constant(node.inputs[1]) is None):
            continue  # a product of two computed matrices
        yield kind, weights_of(node)


def weights_of(node: ir.Node) -> Weights:
    """Weight and bias of a node, as PyTorch's module of that kind has them."""
    if node.op_type == "InstanceNormalization":  # a group norm, scaled and shifted by later nodes
        scaled = consumer(node.outputs[0], "Mul")
        return other(scaled).ravel(), other(consumer(scaled.outputs[0], "Add")).ravel()
    weight = constant(node.inputs[1])
    if node.op_type == "MatMul":
        added = consumer(node.outputs[0], "Add")
        return weight.T, None if added is None else other(added)
    bias = constant(node.inputs[2]) if len(node.inputs) > 2 else None
    transposed = node.op_type == "Gemm" and not node.attributes.get_int("transB", 0)
    return weight.T if transposed else weight, bias


def consumer(value: ir.Value, kind: str) -> ir.Node | None:
    """The node of that kind which adds or multiplies a constant to a value, perhaps after reshaping it."""
    for node, _ in value.uses():
        if node.op_type == "Reshape":
            return consumer(node.outputs[0], kind)
        if node.op_type == kind and other(node) is not None:
            return node
    return None


def other(node: ir.Node) -> np.ndarray | None:
    """The constant input of a node."""
    return next((array for value in node.inputs if (array := constant(value)) is not None), None)


def constant(value: ir.Value) -> np.ndarray | None:
    """The constant behind a value, which is stored as fp16 and a Cast; None if the value is computed."""
    while (node := value.producer()) is not None and node.op_type in ("Cast", "Unsqueeze"):
        value = node.inputs[0]
    return None if value.const_value is None else value.const_value.numpy().astype(np.float32)


def fill(module: nn.Module, weights: Weights) -> None:
    """Sets weight and bias of a module, which must have the same shapes."""
    for name, array in zip(("weight", "bias"), weights, strict=True):
        parameter: Tensor | None = getattr(module, name)
        shapes = [None if x is None else tuple(x.shape) for x in (parameter, array)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"{name} of {module} is {shapes[0]}, the graph's is {shapes[1]}")
        if parameter is not None:
            parameter.copy_(torch.from_numpy(np.array(array)))
