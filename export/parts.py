"""Parts: the networks that a bundle is made from, each in memory only while it is needed.

A part has a skeleton, whose weights have shapes but no data. Graphs are traced through skeletons, and sizes
are read from them. The weights are loaded, in half precision and one part at a time, when they are written.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from hyperrt.export.errors import ExportError
from hyperrt.training.model.weight_hash import hash_of

# All tensors of a trace must be fake in the same mode; computed buffers stay real.
FAKE = FakeTensorMode(allow_non_fake_inputs=True)
HALF_MAX = 65504


@dataclass(frozen=True, eq=False)
class ModelPart:
    """One network.

    Attributes:
        name: key in `Source.parts`.
        build: makes the module without weights; called where new parameters take no memory.
        read: makes the module with its weights, of any floating-point type.
        drawn_from: hashed in place of the weights if these are random; "" for weights that are read.
    """

    name: str
    build: Callable[[], nn.Module]
    read: Callable[[], nn.Module]
    drawn_from: str = ""
    _hashes: dict[bool, str] = field(default_factory=dict, init=False, repr=False)

    @functools.cached_property
    def skeleton(self) -> nn.Module:
        """The module with fake weights, in eval mode."""
        with init_empty_weights(include_buffers=False):
            # A configuration may say fp16; precision.py sets the type of the arithmetic later.
            return hollow(self.build().float())

    def load(self, half_hash: bool | None = None) -> nn.Module:
        """The module with its weights as they will be stored: fp16, frozen, in eval mode.

        half_hash: also computes `hash(half_hash)`, so that the weights are not read for it again.

        Raises:
            ExportError: a weight is NaN, infinite or too large for fp16.
        """
        module = self.read().eval().requires_grad_(False)
        if half_hash is not None:
            self.hash(half_hash, module)
        for owner, key, tensor in stored(module):
            if tensor.is_floating_point():
                owner[key] = _like(tensor, _half(tensor, f"{self.name}: {key}"))
        return module

    def hash(self, half: bool, module: nn.Module | None = None) -> str:
        """sha256 (hex) of the weights, or of what they are drawn from; computed once.

        half: as in `hash_of`.
        module: the module as it was read, if it is in memory; else it is read.
        """
        if self.drawn_from:
            return hashlib.sha256(self.drawn_from.encode()).hexdigest()
        if half not in self._hashes:
            self._hashes[half] = hash_of(self.read() if module is None else module, half)
        return self._hashes[half]

    @classmethod
    def of(cls, name: str, module: nn.Module) -> ModelPart:
        """The part of a module in memory, which is not changed."""
        return cls(name, lambda: copy.deepcopy(module), lambda: copy.deepcopy(module))


def random_part(name: str, build: Callable[[], nn.Module], seed: int) -> ModelPart:
    """A part with random weights; each depends only on the seed, the part's name and its own name.

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
    """Replaces all that a checkpoint holds by fake tensors, in place; freezes the module, in eval mode."""
    fakes: dict[int, Tensor] = {}
    for owner, key, tensor in stored(module):
        if id(tensor) not in fakes:
            with FAKE:
                fakes[id(tensor)] = _like(tensor, torch.empty(tensor.shape, dtype=tensor.dtype))
        owner[key] = fakes[id(tensor)]
    return module.eval().requires_grad_(False)


def stored(module: nn.Module) -> Iterator[tuple[dict[str, Tensor | None], str, Tensor]]:
    """Yields (dictionary, key, tensor) of each parameter and each buffer that a checkpoint holds."""
    for child in module.modules():
        for key, parameter in list(child._parameters.items()):
            if parameter is not None:
                yield child._parameters, key, parameter
        for key, buffer in list(child._buffers.items()):
            if buffer is not None and key not in child._non_persistent_buffers_set:
                yield child._buffers, key, buffer


def numbers_of(module: nn.Module) -> int:
    """How many numbers a checkpoint of the module holds; tied weights count once."""
    return sum({id(tensor): tensor.numel() for _, _, tensor in stored(module)}.values())


def _like(old: Tensor, new: Tensor) -> Tensor:
    return nn.Parameter(new, requires_grad=False) if isinstance(old, nn.Parameter) else new


def _half(tensor: Tensor, name: str) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        half = tensor.detach().half()
    if not torch.isfinite(half).all():
        why = f"it holds values up to {tensor.abs().max().item():.3g}; fp16 ends at {HALF_MAX}"
        raise ExportError(f"the weights of {name} cannot be stored", why, "check the training")
    return half


def _drawn(shape: torch.Size, source: str, path: str) -> Tensor:
    digest = hashlib.sha256(source.encode()).digest()
    rng = np.random.Generator(np.random.SFC64(int.from_bytes(digest[:16], "little")))
    values = rng.standard_normal(tuple(shape), dtype=np.float32)
    if len(shape) >= 2:
        # The rows of an embedding are looked up; other weights have their fan-in in the axes after the first.
        embedding = "embedding" in path or "latents" in path
        values *= 0.02 if embedding else float(np.prod(shape[1:])) ** -0.5
    else:
        values = values * 0.02 + float(path.endswith("weight"))
    return torch.from_numpy(values.astype(np.float16))
