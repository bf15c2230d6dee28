"""Measures what a training would take with its first two steps: memory, seconds, shapes.

Two, because AdamW allocates its moments at the end of the first; the second is like all the others.
"""

from __future__ import annotations

import time
from typing import Any

from torch import Tensor, nn

from hyperrt.training.model.encode import Text
from hyperrt.training.run import device
from hyperrt.training.run.batches import Batch
from hyperrt.training.run.config import to_json
from hyperrt.training.run.trainer import LOSSES, Trainer

MB = 1e6


def measure(trainer: Trainer) -> dict[str, Any]:
    """Takes two steps, which change the trainer's weights, and describes them.

    Returns:
        A JSON object: "base" and "decoder" with parameter counts, "lora", "batch" with the shapes of one
        process, "memory_mb" of one process, "step".
    """
    memory = device.Memory(trainer.device)
    for step in range(2):
        began = time.perf_counter()
        figures = trainer.step(step)
        seconds = time.perf_counter() - began
    batch, layout = trainer.batches.at(1), trainer.decoder.layout
    peak, growth = memory.peak / MB, memory.growth / MB
    return {
        "base": {name: _parameters(part) for name, part in _networks(trainer)},
        "decoder": {
            "parameters": _parameters(trainer.decoder),
            "of_the_heads": _parameters(trainer.decoder.heads),
            "feature_dim": trainer.decoder.feature_dim,
            **to_json(trainer.config.decoder),
        },
        "lora": {
            "rank": layout.rank,
            "sites": len(layout.sites),
            "numbers": {name: layout.size(name) for name in ("lora_q", "lora_kv")},
            "layout_hash": layout.hash,
        },
        "batch": _shapes(batch),
        "processes": trainer.accelerator.num_processes,
        "device": str(trainer.device),
        "memory_mb": {"before": peak - growth, "peak": peak, "per_sample": growth / len(batch.latents)},
        "step": {
            "seconds": seconds,
            "rows_per_s": trainer.config.batch_size / seconds,
            **dict(zip(LOSSES, figures.tolist(), strict=True)),
        },
    }


def _networks(trainer: Trainer) -> list[tuple[str, nn.Module]]:
    return [(name, part) for name, part in vars(trainer.base).items() if isinstance(part, nn.Module)]


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _shapes(batch: Batch) -> dict[str, str]:
    """Shape and type of every tensor of a batch."""
    shapes = {}
    for name, value in vars(batch).items():
        tensors = {name: value}
        if isinstance(value, Text):
            tensors = {name: value.hidden_states, f"{name}_pooled": value.pooled}
        shapes |= {key: _shape(tensor) for key, tensor in tensors.items() if isinstance(tensor, Tensor)}
    return shapes


def _shape(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
