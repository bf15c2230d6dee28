"""What every training shares: rate and descent, a log of JSON lines, whole states, stopping and going on.

What a step draws at random comes from a generator seeded by (seed, step), so a run that was killed
goes on with the losses it would have had, and no generator state needs to be kept.
"""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Generator, Tensor, nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.optim import Optimizer

from hyperrt import files
from hyperrt.errors import IntegrityError, NumericError, explained
from hyperrt.training.messages import first_line
from hyperrt.training.run import device, distributed

log = logging.getLogger("hyperrt.training")

Loss = Callable[[int, Generator], Mapping[str, Tensor]]
Report = Callable[[int, nn.Module], Mapping[str, float]]

LOG, STATE = "log.jsonl", "state.pt"


@dataclass(frozen=True)
class Schedule:
    """How long and how fast: linear warm-up, then a cosine to a share of `lr`; EMA of the weights."""

    steps: int
    lr: float
    warmup: int = 100  # steps
    final_lr: float = 0.05  # share of lr that the cosine ends at
    ema: float = 0.999
    weight_decay: float = 1e-4
    clip: float = 1.0  # norm of the gradient
    log_every: int = 20
    report_every: int = 500

    def rate(self, step: int) -> float:
        """The learning rate at a step."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        done = min(1.0, (step - self.warmup) / max(1, self.steps - self.warmup))
        return self.lr * (self.final_lr + (1 - self.final_lr) * 0.5 * (1 + math.cos(math.pi * done)))


class Descent:
    """AdamW at a schedule's rate with clipped gradients, and the EMA of the weights.

    Norms, biases and other vectors do not decay, nor do the parameters named in `undecayed`.

    Args:
        accelerator: of a training that may be one of several processes; `model` of the descent is the one to
            call then, for the gradients' sake.
        sharded: whether each process keeps a part of the moments only.
    """

    def __init__(
        self,
        model: nn.Module,
        schedule: Schedule,
        undecayed: Sequence[str] = (),
        accelerator: Accelerator | None = None,
        sharded: bool = False,
    ) -> None:
        self.schedule = schedule
        self.ema = copy.deepcopy(model).requires_grad_(False).eval()
        self.named = dict(model.named_parameters())
        self.parameters = list(self.named.values())
        self.averages = list(self.ema.parameters())
        matrices, others = [], []
        for name, parameter in self.named.items():
            (matrices if parameter.ndim > 1 and name not in undecayed else others).append(parameter)
        groups = [
            {"params": matrices, "weight_decay": schedule.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        self.optimizer = distributed.adamw(groups, schedule.lr, sharded)
        self.model, self.accelerator = model, accelerator
        if accelerator is not None:
            self.model, self.optimizer = accelerator.prepare(model, self.optimizer)

    def step(self, step: int, losses: Mapping[str, Tensor], batch: str = "") -> Tensor:
        """One update down losses["loss"]; returns all the losses and the gradient's norm, on the CPU.

        With several processes the losses are their means.

        Args:
            batch: what the batch holds, for the message of an error.

        Raises:
            NumericError: one of them is not a finite number; the weights are left as they were.
        """
        self.optimizer.zero_grad(set_to_none=True)
        losses["loss"].backward()
        norm = nn.utils.clip_grad_norm_(self.parameters, self.schedule.clip)
        figures = torch.stack([*(value.detach().float() for value in losses.values()), norm.detach()])
        if self.accelerator is not None:
            figures = self.accelerator.reduce(figures, "mean")
        figures = figures.cpu()
        if not figures.isfinite().all():
            found = ", ".join(
                f"{k} {v:g}" for k, v in zip((*losses, "gradient"), figures.tolist(), strict=True)
            )
            why = f"{found}; {batch}" if batch else found
            raise NumericError(
                f"step {step}: the loss is not a finite number", why, "lower the learning rate"
            )
        for group in self.optimizer.param_groups:
            group["lr"] = self.schedule.rate(step)
        self.optimizer.step()
        decay = min(self.schedule.ema, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(self.averages, self.parameters, 1 - decay)
        return figures

    def moments(self) -> dict[str, dict[str, Tensor]]:
        """AdamW's state of each parameter by name; whole in the main process. All processes must ask."""
        inner = self._inner()
        if isinstance(inner, ZeroRedundancyOptimizer):
            inner.consolidate_state_dict(to=0)
            if not self.accelerator.is_main_process:
                return {}
        state = inner.state_dict()["state"]
        return {name: state[index] for index, name in enumerate(self._order())}

    def restore(self, moments: Mapping[str, dict[str, Tensor]]) -> None:
        """Puts back what `moments` gave."""
        numbers = iter(range(len(self.named)))
        groups = [
            {**group, "params": [next(numbers) for _ in group["params"]]}
            for group in self.optimizer.param_groups
        ]
        state = {index: moments[name] for index, name in enumerate(self._order())}
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        inner = self._inner()
        if isinstance(inner, ZeroRedundancyOptimizer):
            for parameter, values in inner.optim.state.items():
                # Loading leaves it on the host, where the fused AdamW of a GPU does not read it.
                values["step"] = values["step"].to(parameter.device)
            inner.state.clear()  # the same once more, which nothing reads

    def _inner(self) -> Optimizer:
        """The optimizer without accelerate's wrapper."""
        return getattr(self.optimizer, "optimizer", self.optimizer)

    def _order(self) -> list[str]:
        """Names of the parameters as the optimizer numbers them."""
        names = {parameter: name for name, parameter in self.named.items()}
        return [names[p] for group in self.optimizer.param_groups for p in group["params"]]


class RunLog:
    """log.jsonl of a run's folder, one JSON object a line; on a terminal, its plain numbers.

    Args:
        step: steps done. What was logged after them is dropped: a resumed run will log it again.
    """

    def __init__(self, folder: Path, step: int, steps: int) -> None:
        self.path, self.steps = folder / LOG, steps
        kept = self.path.read_text().splitlines(keepends=True) if step and self.path.exists() else []
        kept = [line for line in kept if line.endswith("\n") and json.loads(line)["step"] <= step]
        files.publish(self.path, lambda file: file.write("".join(kept).encode()), force=True)

    def write(self, step: int, **values: Any) -> None:
        """Raises ResourceError: the disk is full or broken."""
        with explained(self.path), self.path.open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        if numbers := [f"{k} {v:.4g}" for k, v in values.items() if isinstance(v, float)]:
            log.info("%s: step %d of %d, %s", self.path.parent.name, step, self.steps, ", ".join(numbers))


@contextlib.contextmanager
def stopping(launched: bool = False) -> Iterator[list[int]]:
    """The signals (SIGTERM, SIGINT) that arrived: the first asks the loop to stop, a second one ends it.

    launched: by a launcher, which repeats a signal that the process may have had itself; then only SIGKILL
    ends it.

    Raises SystemExit(128 + number) at the end, if one did.
    """
    stopped: list[int] = []
    before: dict[int, Any] = {}

    def stop(number: int, _: object) -> None:
        stopped.append(number)
        if not launched:
            signal.signal(number, before[number])

    for number in (signal.SIGTERM, signal.SIGINT):
        before[number] = signal.signal(number, stop)
    try:
        yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if stopped:
        log.warning("stopped by signal %d; the state is saved", stopped[0])
        raise SystemExit(128 + stopped[0])


def fit(
    out: Path, model: nn.Module, loss: Loss, schedule: Schedule, seed: int = 0, report: Report | None = None
) -> nn.Module:
    """Trains `model` in place and returns its EMA copy.

    Args:
        out: folder of log.jsonl and state.pt; a state that is there is resumed.
        loss: (step, generator) -> named losses; "loss" is the one that is followed downhill.
        report: (step, EMA model) -> figures for the log, every `report_every` steps; may write into `out`.

    Raises:
        NumericError: a loss is not a finite number.
        IntegrityError: state.pt is damaged, or of another model.
        SystemExit: SIGTERM or SIGINT arrived; the state is saved.
    """
    out.mkdir(parents=True, exist_ok=True)
    where = next(model.parameters()).device
    descent = Descent(model, schedule)
    step = _resume(out / STATE, model, descent)
    if step >= schedule.steps:
        return descent.ema
    journal = RunLog(out, step, schedule.steps)
    began = time.perf_counter()
    with stopping() as stopped:
        while step < schedule.steps:
            with device.autocast(where):
                losses = loss(step, Generator().manual_seed(seed * 1_000_003 + step))
            figures = dict(zip((*losses, "grad_norm"), descent.step(step, losses).tolist(), strict=True))
            step += 1
            end = step == schedule.steps
            if end or step % schedule.log_every == 0:
                seconds = time.perf_counter() - began
                journal.write(step, seconds=seconds, lr=schedule.rate(step - 1), **figures)
            due = end or step % schedule.report_every == 0
            if due and report is not None:
                journal.write(step, **report(step, descent.ema))
            leaving = bool(stopped)  # asked once: a signal that comes later is for the next step
            if due or leaving:
                _save(out / STATE, step, model, descent)
            if leaving:
                break
    return descent.ema


def _save(path: Path, step: int, model: nn.Module, descent: Descent) -> None:
    state = {
        "step": step,
        "model": model.state_dict(),
        "ema": descent.ema.state_dict(),
        "optimizer": descent.optimizer.state_dict(),
    }
    files.publish(path, lambda file: torch.save(state, file), force=True)


def _resume(path: Path, model: nn.Module, descent: Descent) -> int:
    """Puts a saved state back; returns the steps done, 0 where there is no state."""
    if not path.exists():
        return 0
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")
        model.load_state_dict(state["model"])
        descent.ema.load_state_dict(state["ema"])
        descent.optimizer.load_state_dict(state["optimizer"])
        return int(state["step"])
    except Exception as error:  # a damaged file makes torch.load raise nearly anything
        do = f"remove {path.parent} to train it anew"
        raise IntegrityError(f"{path} cannot be resumed", first_line(error), do) from error
