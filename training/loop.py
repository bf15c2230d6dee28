"""The loop that every training here runs: steps, a log of JSON lines, checkpoints, exact resume.

What a step draws at random comes from a generator seeded by (seed, step), so a run that was killed
goes on with the losses it would have had, and no generator state needs to be kept.
"""

from __future__ import annotations

import copy
import json
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Generator, Tensor, nn

from training import device

Loss = Callable[[int, Generator], Mapping[str, Tensor]]
Report = Callable[[int, nn.Module], Mapping[str, float]]


@dataclass(frozen=True)
class Schedule:
    """How long and how fast: linear warm-up, then cosine to a twentieth of `lr`; EMA of the weights."""

    steps: int
    lr: float
    warmup: int = 100
    ema: float = 0.999
    weight_decay: float = 1e-4
    clip: float = 1.0
    log_every: int = 20
    report_every: int = 500

    def rate(self, step: int) -> float:
        """The learning rate at a step."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.lr * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))


def fit(out: Path, model: nn.Module, loss: Loss, schedule: Schedule, seed: int = 0, report: Report | None = None) -> nn.Module:
    """Trains `model` in place and returns its EMA copy.

    out:    folder of log.jsonl and state.pt; a state that is there is resumed.
    loss:   (step, generator) -> named losses; "loss" is the one that is followed downhill.
    report: (step, EMA model) -> figures for the log, every `report_every` steps; may write sample sheets into `out`.
    """
    out.mkdir(parents=True, exist_ok=True)
    where = next(model.parameters()).device
    ema = copy.deepcopy(model).requires_grad_(False).eval()
    optimizer = torch.optim.AdamW(_groups(model, schedule.weight_decay), lr=schedule.lr, betas=(0.9, 0.99))
    step = _resume(out / "state.pt", model, ema, optimizer)
    began = time.perf_counter()
    while step < schedule.steps:
        for group in optimizer.param_groups:
            group["lr"] = schedule.rate(step)
        with device.autocast(where):
            losses = loss(step, Generator().manual_seed(seed * 1_000_003 + step))
        optimizer.zero_grad(set_to_none=True)
        losses["loss"].backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), schedule.clip)
        optimizer.step()
        _follow(ema, model, min(schedule.ema, (1 + step) / (10 + step)))
        step += 1
        if step % schedule.log_every == 0 or step == schedule.steps:
            figures = {name: value.item() for name, value in losses.items()}
            log(out, step, seconds=time.perf_counter() - began, lr=schedule.rate(step), grad_norm=norm.item(), **figures)
        if step % schedule.report_every == 0 or step == schedule.steps:
            if report is not None:
                log(out, step, **report(step, ema))
            save(out / "state.pt", {"step": step, "model": model.state_dict(), "ema": ema.state_dict(), "optimizer": optimizer.state_dict()})
    return ema


def log(out: Path, step: int, **figures: float) -> None:
    """One JSON line in `out`/log.jsonl."""
    with (out / "log.jsonl").open("a") as file:
        file.write(json.dumps({"step": step, **{k: float(f"{v:.6g}") for k, v in figures.items()}}) + "\n")


def save(path: Path, state: Mapping[str, object]) -> None:
    """Writes aside and renames, so that a kill leaves the old state or the new one."""
    aside = path.with_name(path.name + ".part")
    torch.save(dict(state), aside)
    os.replace(aside, path)


def _resume(path: Path, model: nn.Module, ema: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    if not path.exists():
        return 0
    state = torch.load(path, weights_only=True, map_location="cpu")
    model.load_state_dict(state["model"])
    ema.load_state_dict(state["ema"])
    optimizer.load_state_dict(state["optimizer"])
    return int(state["step"])


def _groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Matrices decay; norms, biases and other vectors do not."""
    wanted = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in wanted if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in wanted if p.ndim <= 1], "weight_decay": 0.0},
    ]


@torch.no_grad()
def _follow(ema: nn.Module, model: nn.Module, decay: float) -> None:
    torch._foreach_lerp_(list(ema.parameters()), [p.detach() for p in model.parameters()], 1 - decay)
