"""The training loop: steps, reports, saved states, and an early end after a signal.

All random numbers of a step come from a generator seeded by (seed, step). So a killed run resumes with the
losses that it would have had, and no generator's state has to be saved.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path

from accelerate import Accelerator
from torch import Generator, Tensor, nn

from hyperrt.errors import Incompatible
from hyperrt.training.run import checkpoint, device, distributed
from hyperrt.training.run.optimizer import Optimizer, Schedule
from hyperrt.training.run.run_log import RunLog
from hyperrt.training.run.signals import stopping

Loss = Callable[[int, Generator], Mapping[str, Tensor]]
Report = Callable[[int, nn.Module], Mapping[str, float]]

FORMER_STATE = "state.pt"


def take_steps(
    start: int,
    steps: int,
    step: Callable[[int], None],
    report: Callable[[int], None],
    save: Callable[[int], None],
    save_every: int,
    signals: list[int],
    accelerator: Accelerator | None = None,
) -> None:
    """Takes the steps from `start` to `steps`; saves and returns early once a signal has arrived.

    Args:
        step: takes one step, numbered from 0.
        report, save: called after a step with the number of steps done; `save` when it is due.
        signals: of `stopping`. A signal to one of several processes stops all.
    """
    for done in range(start + 1, steps + 1):
        step(done - 1)
        report(done)
        # Read once: a signal that arrives later is for the next step.
        signal = max(distributed.gather(accelerator, signals[0] if signals else 0))
        if signal and not signals:
            signals.append(signal)
        if signal or done == steps or done % save_every == 0:
            save(done)
        if signal:
            return


def fit(
    out: Path, model: nn.Module, loss: Loss, schedule: Schedule, seed: int = 0, report: Report | None = None
) -> nn.Module:
    """Trains `model` in place and returns its EMA.

    Args:
        out: folder for log.jsonl and the state; resumes from a state in it.
        loss: (step, generator) -> named losses; "loss" is minimised.
        report: (step, EMA) -> figures for the log, every `report_every` steps; may write into `out`.

    Raises:
        NumericError: a loss is not a finite number.
        IntegrityError: the state is damaged, or another model's.
        Incompatible: the state is in the format of an earlier version.
        SystemExit: SIGTERM or SIGINT arrived; the state is saved.
    """
    out.mkdir(parents=True, exist_ok=True)
    optimizer = Optimizer(model, schedule)
    start = _resume(out, optimizer)
    if start >= schedule.steps:
        return optimizer.ema
    run_log = RunLog(out, start, schedule.steps)
    model_device = next(model.parameters()).device
    began = time.perf_counter()
    figures: dict[str, float] = {}

    def step(number: int) -> None:
        with device.autocast(model_device):
            losses = loss(number, Generator().manual_seed(seed * 1_000_003 + number))
        values = optimizer.step(number, losses).tolist()
        figures.update(zip((*losses, "grad_norm"), values, strict=True))

    def after_step(done: int) -> None:
        end = done == schedule.steps
        if end or done % schedule.log_every == 0:
            seconds = time.perf_counter() - began
            run_log.write(done, seconds=seconds, lr=schedule.rate(done - 1), **figures)
        if report is not None and (end or done % schedule.report_every == 0):
            run_log.write(done, **report(done, optimizer.ema))

    def save(done: int) -> None:
        checkpoint.save_state(out, optimizer.tensors(), {"step": str(done)})

    with stopping() as signals:
        take_steps(start, schedule.steps, step, after_step, save, schedule.report_every, signals)
    return optimizer.ema


def _resume(out: Path, optimizer: Optimizer) -> int:
    """Loads the state in a folder; returns the number of steps done, 0 without a state."""
    if not (out / checkpoint.STATE).exists():
        if (out / FORMER_STATE).exists():
            why = f"an earlier version wrote it; this version reads {checkpoint.STATE}"
            do = f"remove {out} to train it anew"
            raise Incompatible(f"{out / FORMER_STATE} cannot be resumed", why, do)
        return 0
    tensors, metadata = checkpoint.read_state(out)
    checkpoint.restore(out, optimizer, tensors)
    return int(metadata["step"])
