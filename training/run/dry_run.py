"""What a training would take, from its first two steps: memory, seconds, the shapes of all that it handles.

Two, because AdamW makes its moments at the end of the first; the second is what all the others are like.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from hyperrt.training.run import device
from hyperrt.training.run.config import to_json

if TYPE_CHECKING:
    from hyperrt.training.train import Trainer

MB = 1e6


def measure(trainer: Trainer, losses: Sequence[str]) -> dict[str, Any]:
    """Takes the steps and tells of them; the trainer's weights have moved then.

    Args:
        losses: names of what `Trainer.step` returns.

    Returns:
        A JSON object: "base" and "decoder" with parameter counts, "lora", "batch" with shapes as one process
        sees them, "memory_mb" of one process, "step".
    """
    memory = device.Memory(trainer.device)
    for step in range(2):
        began = time.perf_counter()
        figures = trainer.step(step)
        seconds = time.perf_counter() - began
    batch, layout = trainer.batches.at(1), trainer.layout
    rows = len(batch.latents)
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
        "batch": {name: _shape(value) for name, value in vars(batch).items() if isinstance(value, Tensor)},
        "processes": trainer.accelerator.num_processes,
        "device": str(trainer.device),
        "memory_mb": {"before": peak - growth, "peak": peak, "per_sample": growth / rows},
        "step": {
            "seconds": seconds,
            "rows_per_s": trainer.config.batch / seconds,
            **dict(zip(losses, figures.tolist(), strict=True)),
        },
    }


def _networks(trainer: Trainer) -> list[tuple[str, nn.Module]]:
    return [(name, part) for name, part in vars(trainer.base).items() if isinstance(part, nn.Module)]


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _shape(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
