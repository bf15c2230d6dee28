"""Reports of a hypernetwork's training: log.jsonl, figures of held-out subjects, sample sheets."""

from __future__ import annotations

import logging
import time
from pathlib import Path

import torch
from torch import Tensor

from hyperrt.training.run import device, monitors, preview
from hyperrt.training.run.config import to_json
from hyperrt.training.run.run_log import RunLog
from hyperrt.training.run.trainer import LOSSES, Trainer

log = logging.getLogger("hyperrt.training")

REFERENCE_COST = 0.01  # of the regulariser, a tenth of a usual loss; the log explains lambda by it


class Reporter:
    """Writes the log, held-out figures and sample sheets; only the main process has one.

    Args:
        out: the run's folder.
        start: steps done.
        window: losses of steps that are not logged yet [n, LOSSES].
    """

    def __init__(self, trainer: Trainer, out: Path, start: int, window: Tensor) -> None:
        config = trainer.config
        self.trainer, self.config, self.out = trainer, config, out
        self.window = window
        self.seconds = 0.0  # spent on steps since the last line of losses; reports and saves do not count
        own = trainer.batches.rows
        self.rows = own.stop - own.start  # of a step, in this process
        (out / "samples").mkdir(parents=True, exist_ok=True)
        self.log = RunLog(out, start, config.steps)
        self.monitor = self._monitor() if config.holdout else None
        if start == 0:
            parameters = sum(p.numel() for p in trainer.decoder.parameters())
            processes = trainer.accelerator.num_processes
            self.log.write(0, config=to_json(config), parameters=parameters, processes=processes)
            self._held_out(0)
            if config.lambda_:
                rms = trainer.loss.regulariser.rms_at(REFERENCE_COST / config.lambda_)
                log.info("lambda R(h) is %g at a LoRA rms of %.2g", REFERENCE_COST, rms)
        self.memory = device.Memory(trainer.device)

    def _monitor(self) -> monitors.Monitor:
        trainer, data, scheduler = self.trainer, self.trainer.data, self.trainer.loss.scheduler
        probe = monitors.probe(
            data.cache, data.features, data.captions, self.config, scheduler.train_timesteps
        )
        return monitors.Monitor(
            probe.to(trainer.device), trainer.base.unet, trainer.predict, scheduler, self.rows,
            trainer.predict.image_tokens,
        )  # fmt: skip

    def step(self, step: int) -> None:
        """Takes a step of the trainer and keeps its losses for the log."""
        began = time.perf_counter()
        self.window = torch.cat([self.window, self.trainer.step(step)[None]])
        self.seconds += time.perf_counter() - began

    def report(self, done: int) -> None:
        """Writes what is due after `done` steps."""
        config = self.config
        end = done == config.steps
        if end or done % config.log_every == 0:
            self._losses(done)
        if end or done % config.monitor_every == 0:
            self._held_out(done)
        # SDXL's sheets are drawn with its bundle.
        if not self.trainer.base.is_sdxl and (end or done % config.sample_every == 0):
            preview.write(self.out / "samples" / f"step-{done:06d}.png", self.trainer)

    def _losses(self, done: int) -> None:
        means = dict(zip(LOSSES, self.window.double().mean(0).tolist(), strict=True))
        rows = len(self.window) * self.config.batch_size
        self.log.write(
            done,
            **means,
            lr=self.trainer.optimizer.schedule.rate(done - 1),
            rows_per_s=rows / self.seconds if self.seconds else 0.0,
            peak_mb=self.memory.peak / 1e6,
            mb_per_sample=self.memory.growth / 1e6 / self.rows,
        )
        self.window, self.seconds = self.window[:0], 0.0

    def _held_out(self, done: int) -> None:
        if self.monitor is None:
            return
        figures = self.monitor.measure(self.trainer.optimizer.ema)
        self.log.write(done, monitor=figures)
        log.info("held out: gap %.4g, gain %.4g", figures["gap"], figures["gain"])
        if done:
            self.monitor.warn(done, self.config.warmup, figures)
