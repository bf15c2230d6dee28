"""Parts: the networks that a bundle is made from, each in memory only while it is needed.

A part has a skeleton, whose weights have a shape and no data: graphs are traced through it, and sizes are
read from it, so that exporting a network of 5 GB takes no 5 GB. The weights are loaded, in half precision
and one part at a time, when they are written.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from hyperrt.export.errors import ExportError
from hyperrt.training.model import weight_hash

# What a graph is traced with must be fake in one and the same mode; buffers that are computed stay real.
FAKE = FakeTensorMode(allow_non_fake_inputs=True)
HALF_MOST = 65504


@dataclass(frozen=True, eq=False)
class ModelPart:
    """One network.

    Attributes:
        name: of the part, as in `Source.parts`.
        build: makes the module; it is called where parameters take no memory.
        read: makes it with its weights, of any floating-point type.
        drawn_from: what stands for the weights in their hash where they are random; "" where they are read.
    """

    name: str
    build: Callable[[], nn.Module]
    read: Callable[[], nn.Module]
    drawn_from: str = ""

    @functools.cached_property
    def skeleton(self) -> nn.Module:
        """The module with fake weights, in eval mode."""
        with init_empty_weights(include_buffers=False):
            module = (
                self.build().float()
            )  # a configuration may say fp16; what a graph computes in is said later
        return hollow(module)

    def load(self) -> nn.Module:
        """The module with its weights as they will be stored: fp16, frozen, in eval mode.

        Raises:
            ExportError: a weight is beyond fp16, NaN or infinite.
        """
        module = self.read().eval().requires_grad_(False)
        for owner, key, tensor in stored(module):
            if tensor.is_floating_point():
                owner[key] = _like(tensor, _half(tensor, f"{self.name}: {key}"))
        return module

    def hash(self, half: bool) -> str:
        """sha256 (hex) that tells these weights from others; `half` as in `weight_hash.hash_of`."""
        if self.drawn_from:
            return hashlib.sha256(self.drawn_from.encode()).hexdigest()
        return weight_hash.hash_of(self.read(), half)

    @classmethod
    def of(cls, name: str, module: nn.Module) -> ModelPart:
        """The part of a module that is in memory; it is not changed."""
        return cls(name, lambda: copy.deepcopy(module), lambda: copy.deepcopy(module))


def random_part(name: str, build: Callable[[], nn.Module], seed: int) -> ModelPart:
    """A part whose weights are drawn, each from (seed, name of the part, name of the weight) alone.

    Weights of products have the variance 1 / fan-in, so that activations keep their size; norms are near one.
    """

    def read() -> nn.Module:
        with init_empty_weights(include_buffers=False):
            module = build()
        names = {id(tensor): key for key, tensor in module.state_dict(keep_vars=True).items()}
        for owner, key, tensor in stored(module):
            if tensor.is_meta:
                path = names[id(tensor)]
                owner[key] = _like(tensor, _drawn(tensor.shape, f"{seed}/{name}/{path}", path))
        return module

    return ModelPart(name, build, read, drawn_from=f"{seed}/{name}")


def hollow(module: nn.Module) -> nn.Module:
    """`module` with fake tensors for all that a checkpoint holds; frozen and in eval mode."""
    fakes: dict[int, Tensor] = {}
    for owner, key, tensor in stored(module):
        if id(tensor) not in fakes:
            with FAKE:
                fakes[id(tensor)] = _like(tensor, torch.empty(tensor.shape, dtype=tensor.dtype))
        owner[key] = fakes[id(tensor)]
    return module.eval().requires_grad_(False)


def stored(module: nn.Module) -> Iterator[tuple[dict[str, Tensor | None], str, Tensor]]:
    """(dictionary, key, tensor) of each parameter and each buffer that is part of a checkpoint."""
    for child in module.modules():
        for key, parameter in list(child._parameters.items()):
            if parameter is not None:
                yield child._parameters, key, parameter
        for key, buffer in list(child._buffers.items()):
            if buffer is not None and key not in child._non_persistent_buffers_set:
                yield child._buffers, key, buffer


def numbers_of(module: nn.Module) -> int:
    """How many numbers a checkpoint of the module holds, tied ones once."""
    return sum({id(tensor): tensor.numel() for _, _, tensor in stored(module)}.values())


def _like(old: Tensor, new: Tensor) -> Tensor:
    return nn.Parameter(new, requires_grad=False) if isinstance(old, nn.Parameter) else new


def _half(tensor: Tensor, name: str) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        half = tensor.detach().half()
    if not torch.isfinite(half).all():
        why = f"it holds values up to {tensor.abs().max().item():.3g}; fp16 ends at {HALF_MOST}"
        raise ExportError(f"the weights of {name} cannot be stored", why, "check the training")
    return half


def _drawn(shape: torch.Size, source: str, path: str) -> Tensor:
    digest = hashlib.sha256(source.encode()).digest()
    rng = np.random.Generator(np.random.SFC64(int.from_bytes(digest[:16], "little")))
    values = rng.standard_normal(tuple(shape), dtype=np.float32)
    if len(shape) >= 2:
        # An embedding's rows are read one by one; what is read as a product has its fan-in behind the first.
        embedding = "embedding" in path or "latents" in path
        values *= 0.02 if embedding else float(np.prod(shape[1:])) ** -0.5
    else:
        values = values * 0.02 + float(path.endswith("weight"))
    return torch.from_numpy(values.astype(np.float16))
