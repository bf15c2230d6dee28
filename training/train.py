"""Trains the hypernetwork end to end through the frozen UNet, a different LoRA for every row (paper eq. 5).

    python -m training.train --base BASE --cache CACHE --out OUT [--config FILE.json] [--lambda 1 ...]

OUT gets log.jsonl, samples/*.png, and the checkpoints of training/checkpoint.py. A run that was killed goes
on with --resume, with the loss curve that it would have had.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

from hyperrt.errors import IntegrityError, UsageError
from training import base as bases
from training import checkpoint, device, features, monitors, preview
from training.batches import Batch, Batches
from training.config import PRESETS, TrainConfig, resolve, to_json
from training.data import SceneCache
from training.hypernet import Packed, WeightDecoder
from training.loop import LOG, Descent, RunLog, Schedule, reported, stopping
from training.lora_layers import Rows, install, layout_of, unpack
from training.losses import Noising, regulariser, row_loss

log = logging.getLogger("training")

LOSSES = ("loss", "ft", "reg", "prior", "grad_norm")


class Trainer:
    """All that a run holds: the frozen base, the batches, the decoder, its EMA and its descent."""

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.device = device.pick(config.device)
        device.seed_everything(config.seed)
        self.base = _load_base(config.base)
        for module in (self.base.unet, self.base.vae, self.base.text_encoder, self.base.image_encoder):
            module.to(self.device)
        self.cache = SceneCache.open(config.cache)
        self.features = features.image_features(self.base, self.cache)
        self.captions = features.caption_table(self.base, self.cache, config.token)
        self.noising = Noising(self.base.scheduler, self.device)
        self.batches = Batches(self.cache, self.features, self.captions, config, self.noising.steps)
        self.base_hash = checkpoint.hash_of(self.base.unet)
        install(self.base.unet)
        self.base.unet.to(memory_format=torch.channels_last)
        self.unet = torch.compile(self.base.unet) if config.compile else self.base.unet
        self.layout = layout_of(self.base.unet, config.rank)
        decoder = WeightDecoder(self.layout, self.features.shape[-1], config.decoder)
        decoder.set_feature_statistics(*features.feature_statistics(self.features))
        self.decoder = decoder.to(self.device)
        self.schedule = Schedule(
            steps=config.steps,
            lr=config.lr,
            warmup=config.warmup,
            final_lr=config.final_lr,
            ema=config.ema,
            weight_decay=config.weight_decay,
            clip=config.clip,
        )
        self.descent = Descent(self.decoder, self.schedule, undecayed=("position",))
        self.ema = self.descent.ema

    def predict(self, latents: Tensor, timesteps: Tensor, text: Tensor, lora: Packed | None) -> Tensor:
        """The UNet on rows, each with its own LoRA [rows, N]; None: the base model."""
        latents = latents.to(self.device, memory_format=torch.channels_last)
        options = None
        if lora is not None:
            gate = torch.ones(len(latents), 1, 1, device=self.device)
            options = {"rows": Rows(unpack(self.layout, lora), gate)}
        with device.autocast(self.device):
            output = self.unet(
                latents,
                timesteps.to(self.device),
                encoder_hidden_states=text,
                cross_attention_kwargs=options,
                return_dict=False,
            )
        return output[0].float()

    def losses(self, batch: Batch, prior: Batch | None) -> dict[str, Tensor]:
        """The terms of eq. 5 for one batch."""
        with device.autocast(self.device):
            lora = self.decoder(batch.features.to(self.device))
        lora = {
            name: vector.float().unflatten(0, (-1, batch.photos)).mean(1) for name, vector in lora.items()
        }
        reg = regulariser(self.decoder.deltas(lora), self.config.reduction, 2 * len(self.layout.sites))
        if self.config.targets > 1:
            lora = {name: _repeated(vector, self.config.targets) for name, vector in lora.items()}
        parts = [batch] if prior is None else [batch, prior]
        latents, noise = (
            torch.cat([getattr(p, k) for p in parts]).to(self.device) for k in ("latents", "noise")
        )
        timesteps, text = (
            torch.cat([getattr(p, k) for p in parts]).to(self.device) for k in ("timesteps", "text")
        )
        if prior is not None:
            lora = {name: vector.repeat(2, 1) for name, vector in lora.items()}
        prediction = self.predict(self.noising.noised(latents, noise, timesteps), timesteps, text, lora)
        rows = row_loss(prediction, self.noising.target(latents, noise, timesteps))
        rows = rows * self.noising.weights(timesteps, self.config.min_snr)
        means = rows.view(len(parts), -1).mean(1)
        terms = {
            "ft": means[0],
            "reg": reg,
            "prior": means[1] if prior is not None else torch.zeros_like(reg),
        }
        return {"loss": terms["ft"] + self.config.gamma * terms["prior"] + self.config.lambda_ * reg, **terms}

    def step(self, step: int) -> Tensor:
        """One update; returns `LOSSES` as one tensor.

        Raises:
            NumericError: the loss is not a finite number.
        """
        batch = self.batches.at(step)
        terms = self.losses(batch, self.batches.prior_at(step) if self.config.gamma else None)
        return self.descent.step(step, terms, f"identities {batch.identities.tolist()}")

    def save(self, folder: Path, step: int, window: Tensor) -> None:
        """Everything that resuming needs, and the EMA for export."""
        checkpoint.save_state(folder, self.decoder, self.descent, window, self.config, step, self.base_hash)
        checkpoint.save_hypernet(folder, self.ema, self.config, step, self.base_hash)


def _load_base(folder: str) -> bases.Base:
    try:
        return bases.load(folder)
    except ValueError as error:
        do = "make it anew: python -m training.pretrain"
        raise IntegrityError(f"{folder} is no base model", str(error), do) from error


def _repeated(vector: Tensor, times: int) -> Tensor:
    """Each row `times` times in a row."""
    return vector.unsqueeze(1).expand(-1, times, -1).reshape(-1, vector.shape[1])


def run(config: TrainConfig, resume: bool = False) -> Path:
    """Trains to the end, or to SIGTERM or SIGINT, at which the state is saved; returns the run's folder.

    Raises:
        UsageError: the folder holds a run and `resume` is off.
        Incompatible, IntegrityError: the state in the folder is of another decoder, or damaged.
        NumericError: the loss is not a finite number; the last checkpoint is kept.
        SystemExit: 128 + the number of the signal.
    """
    out = Path(config.out)
    if not resume and (out / LOG).exists():
        raise UsageError(
            f"{out} holds a run", "nothing is overwritten unasked", "add --resume, or another --out"
        )
    (out / "samples").mkdir(parents=True, exist_ok=True)
    device.prepare(config.threads)
    trainer = Trainer(config)
    start, window = 0, torch.zeros(0, len(LOSSES))
    if resume and (out / checkpoint.STATE).exists():
        start, window, changed = checkpoint.load_state(
            out, trainer.decoder, trainer.descent, config, trainer.base_hash
        )
        for name, (then, now) in changed.items():
            log.warning("%s was %s and is %s now", name, then, now)
    with stopping() as stopped:
        _loop(trainer, out, start, window, stopped)
    return out


def _loop(trainer: Trainer, out: Path, start: int, window: Tensor, stopped: list[int]) -> None:
    config = trainer.config
    journal = RunLog(out, start, config.steps)
    probe = monitors.probe(trainer.cache, trainer.features, trainer.captions, config, trainer.noising.steps)
    watch = monitors.Monitor(
        probe.to(trainer.device), trainer.base.unet, trainer.predict, trainer.noising, config.batch
    )
    if start == 0:
        parameters = sum(p.numel() for p in trainer.decoder.parameters())
        journal.write(0, config=to_json(config), parameters=parameters)
        journal.write(0, monitor=watch.measure(trainer.ema))
    clock = time.perf_counter()
    for step in range(start, config.steps):
        window = torch.cat([window, trainer.step(step)[None]])
        done = step + 1
        end = done == config.steps
        if end or done % config.log_every == 0:
            means = dict(zip(LOSSES, window.double().mean(0).tolist(), strict=True))
            speed = len(window) * config.batch / (time.perf_counter() - clock)
            journal.write(done, **means, lr=trainer.schedule.rate(step), rows_per_s=speed)
            window = window[:0]
        if end or done % config.monitor_every == 0:
            figures = watch.measure(trainer.ema)
            journal.write(done, monitor=figures)
            log.info("held out: gap %.4g, gain %.4g", figures["gap"], figures["gain"])
        if end or done % config.sample_every == 0:
            preview.write(out / "samples" / f"step-{done:06d}.png", trainer)
        leaving = bool(stopped)  # asked once: a signal that comes later is for the next step
        if end or done % config.save_every == 0 or leaving:
            trainer.save(out, done, window)
        if leaving:
            return
        if not len(window):
            clock = time.perf_counter()


OPTION_NAMES = {"lambda_": "--lambda"}  # a Python keyword cannot be a field


def _options(command: click.Command) -> click.Command:
    """An option for every field of TrainConfig; unset is None, so that the preset and the file can speak."""
    for field in dataclasses.fields(TrainConfig):
        kind = {"int": int, "float": float, "bool": bool}.get(str(field.type).partition(" ")[0], str)
        name = OPTION_NAMES.get(field.name, "--" + field.name.replace("_", "-"))
        switch = {"is_flag": True} if kind is bool else {"type": kind}
        default = "" if field.default in (dataclasses.MISSING, None) else f"[default: {field.default}]"
        command.params.append(click.Option([name, field.name], default=None, help=default, **switch))
    return command


@click.command(epilog="The fields and their meaning: training/config.py")
@click.option("--preset", type=click.Choice(list(PRESETS)), default="tiny", show_default=True)
@click.option(
    "--config",
    "file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="JSON file of settings.",
)
@click.option("--resume", is_flag=True, help="Go on with the run in --out, if there is one.")
def main(preset: str, file: Path | None, resume: bool, **flags: Any) -> None:
    """Train the hypernetwork on a frozen base model."""
    with reported():
        try:
            settings = resolve(flags, preset, file)
        except ValueError as error:
            raise click.UsageError(str(error)) from error
        run(settings, resume)


_options(main)

if __name__ == "__main__":
    main()
