"""What a run of training/train.py tells of itself: log.jsonl, held-out figures, sample sheets."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from hyperrt.training.run import device, monitors, preview
from hyperrt.training.run.config import to_json
from hyperrt.training.run.loop import RunLog

if TYPE_CHECKING:
    from hyperrt.training.train import Trainer

log = logging.getLogger("hyperrt.training")

LOSSES = ("loss", "ft", "reg", "prior", "grad_norm")  # what `Trainer.step` returns
SAID_COST = 0.01  # of the regulariser, a tenth of a usual loss: what lambda means is said by it


class Journal:
    """What the main process alone writes while a run goes on: the log, held-out figures, sample sheets."""

    def __init__(self, trainer: Trainer, out: Path, start: int) -> None:
        config = trainer.config
        self.trainer, self.config, self.out = trainer, config, out
        own = trainer.batches.rows
        self.rows = own.stop - own.start  # of a step, that are this process's
        (out / "samples").mkdir(parents=True, exist_ok=True)
        self.log = RunLog(out, start, config.steps)
        self.watch = None
        if config.holdout:
            probe = monitors.probe(
                trainer.cache, trainer.features, trainer.captions, config, trainer.noising.steps
            )
            self.watch = monitors.Monitor(
                probe.to(trainer.device), trainer.base.unet, trainer.predict, trainer.noising, self.rows,
                trainer.image,
            )  # fmt: skip
        if start == 0:
            parameters = sum(p.numel() for p in trainer.decoder.parameters())
            count = trainer.accelerator.num_processes
            self.log.write(0, config=to_json(config), parameters=parameters, processes=count)
            self._held_out(0)
            if config.lambda_:
                rms = trainer.regulariser.rms_at(SAID_COST / config.lambda_)
                log.info("lambda R(h) is %g where the LoRA has an rms of %.2g", SAID_COST, rms)
        self.memory = device.Memory(trainer.device)
        self.clock = time.perf_counter()

    def after(self, done: int, window: Tensor) -> None:
        """When `done` steps are done and `window` holds the losses of those that are not logged."""
        config = self.config
        end = done == config.steps
        if end or done % config.log_every == 0:
            self._losses(done, window)
        if end or done % config.monitor_every == 0:
            self._held_out(done)
        of_sdxl = self.trainer.base.text_encoder_2 is not None  # what it draws is seen in its bundle
        if not of_sdxl and (end or done % config.sample_every == 0):
            preview.write(self.out / "samples" / f"step-{done:06d}.png", self.trainer)

    def _losses(self, done: int, window: Tensor) -> None:
        means = dict(zip(LOSSES, window.double().mean(0).tolist(), strict=True))
        self.log.write(
            done,
            **means,
            lr=self.trainer.schedule.rate(done - 1),
            rows_per_s=len(window) * self.config.batch / (time.perf_counter() - self.clock),
            peak_mb=self.memory.peak / 1e6,
            mb_per_sample=self.memory.growth / 1e6 / self.rows,
        )

    def _held_out(self, done: int) -> None:
        if self.watch is not None:
            figures = self.watch.measure(self.trainer.ema)
            self.log.write(done, monitor=figures)
            log.info("held out: gap %.4g, gain %.4g", figures["gap"], figures["gain"])
            if done:
                self.watch.warn(done, self.config.warmup, figures)
