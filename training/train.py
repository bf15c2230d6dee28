"""Trains the hypernetwork end to end through the frozen UNet, a different LoRA for every row (paper eq. 5).

    hyperrt train --preset celeba --model DIR --data CACHE --output OUT [--lambda 1 ...]
    python -m training.train ...                          the same, in the repository
    accelerate launch -m hyperrt.training.train ...       several GPUs, several machines: the same run, sooner

OUT gets log.jsonl, samples/*.png, and the checkpoints of training/run/checkpoint.py. A run that was killed
goes on with --resume, with the loss curve that it would have had; what it may be told otherwise then is
`hyperrt.training.run.config.FREE`.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import logging
import time
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as checkpoint_block

from hyperrt.errors import Incompatible, UsageError
from hyperrt.training.data import features
from hyperrt.training.data.cache import PictureCache
from hyperrt.training.messages import reported, warn
from hyperrt.training.model import base_model as bases
from hyperrt.training.model import image_prompt, weight_hash
from hyperrt.training.model.hypernet import Packed, decoder_of
from hyperrt.training.model.lora_layers import Rows, install, layout_of, unpack
from hyperrt.training.model.losses import Noising, Regulariser, row_loss
from hyperrt.training.run import checkpoint, device, distributed, dry_run
from hyperrt.training.run.batches import Ahead, Batch, Batches
from hyperrt.training.run.config import TrainConfig, resolve
from hyperrt.training.run.loop import LOG, Descent, Schedule, stopping
from hyperrt.training.run.presets import PRESETS
from hyperrt.training.run.reporter import LOSSES, Journal

log = logging.getLogger("hyperrt.training")

NO_IMAGE_PROMPT = (
    "the decoder of the open category is trained without an image prompt",
    "the paper's model has IP-Adapter-Plus beside the LoRA, which is trained for what that leaves open; "
    "this one's LoRA has to do all of it",
    f"add --image-prompt ({image_prompt.PUBLISHED}), or go on if that is what you want to see",
)

IMAGE = "image_tokens"  # [rows, I, D], beside the packed vectors of a LoRA


class Trainer:
    """All that a run holds: the frozen base, the batches, the decoder, its EMA and its descent."""

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.accelerator = distributed.start(config.device == "cpu", config.compress_gradients)
        if not self.accelerator.is_main_process:
            log.setLevel(logging.ERROR)  # the main process speaks for all
        alone = self.accelerator.num_processes == 1
        self.device = device.pick(config.device) if alone else self.accelerator.device
        self.autocast = partial(device.autocast, self.device, config.precision)
        device.seed_everything(config.seed)
        self.base = bases.opened(config.model)
        for module in vars(self.base).values():
            if isinstance(module, nn.Module):
                module.to(self.device)
        self.noising = Noising(self.base.scheduler, self.device)
        part = distributed.share(config.batch // config.targets, self.accelerator)
        # What one process of a machine computes and keeps, the others find.
        with self.accelerator.local_main_process_first(), bases.readable(config.data, "build it anew"):
            self.cache = PictureCache.open(config.data)
            features.check_latents(self.base, self.cache)
            self.features = features.image_features(self.base, self.cache)
            self.captions = features.caption_table(self.base, self.cache, config.token)
            self.batches = Batches(self.cache, self.features, self.captions, config, self.noising.steps, part)
        self.image_prompt, prompt_hash = self._loaded_image_prompt()
        base_hash = weight_hash.base_hash(self.base.unet)
        self.origin = checkpoint.Origin(base_hash, self.batches.fingerprint, prompt_hash)
        self.unet = self._prepared_unet()
        self.layout = layout_of(self.base.unet, config.rank)
        decoder = decoder_of(self.layout, self.features.shape[-1], config.decoder)
        decoder.set_feature_statistics(*features.feature_statistics(self.features))
        self.decoder = decoder.to(self.device)
        # A processor has no time of its own to draw in.
        self.draw = Ahead(self._drawn) if self.device.type == "cuda" else self._drawn
        self.regulariser = Regulariser(self.layout, config.reduction, config.regularised, self.device)
        self.schedule = Schedule(
            steps=config.steps,
            lr=config.lr,
            warmup=config.warmup,
            final_lr=config.final_lr,
            ema=config.ema,
            weight_decay=config.weight_decay,
            clip=config.clip,
        )
        self.descent = Descent(
            self.decoder, self.schedule, ("position",), self.accelerator, config.shard_optimizer
        )
        self.decode = self.descent.model
        self.ema = self.descent.ema

    def _prepared_unet(self) -> nn.Module:
        """The frozen UNet as the steps call it; the encoders that are done leave a GPU."""
        unet = self.base.unet
        install(unet)
        unet.to(memory_format=torch.channels_last)
        if (dtype := device.frozen_dtype(self.device, self.config.precision)) != unet.dtype:
            unet.to(dtype)
        self.base.image_encoder.to("cpu")
        if self.base.text_encoder_2 is not None:  # of an SDXL no sheets are drawn
            for encoder in (self.base.text_encoder, self.base.text_encoder_2, self.base.vae):
                encoder.to("cpu")
        if self.config.gradient_checkpointing:
            # Not re-entrant: LoRA comes to a block as part of an argument, which that kind would detach.
            unet.enable_gradient_checkpointing(partial(checkpoint_block, use_reentrant=False))
        return torch.compile(unet) if self.config.compile else unet

    def _loaded_image_prompt(self) -> tuple[image_prompt.ImagePrompt | None, str]:
        """The image prompt and its hash, if there is one."""
        path, width = self.config.image_prompt, self.features.shape[-1]
        if path is None:
            if self.config.kind == "resampler":
                warn(*NO_IMAGE_PROMPT)
            return None, ""
        found = image_prompt.load(path, self.base.unet)
        if (takes := found.image_proj.proj_in.in_features) != width:
            why = f"it reads features of {takes} numbers, the image encoder of --model makes {width}"
            raise Incompatible(f"{path} does not fit the base model", why, image_prompt.PUBLISHED)
        known = weight_hash.prompt_hash(found)  # of the file's weights, not of what a GPU makes of them
        return found.to(self.device, device.frozen_dtype(self.device, self.config.precision)), known

    @torch.no_grad()
    def image(self, features: Tensor, photos: int = 1) -> Packed:
        """Features [S N, T, F] to what `predict` takes beside a LoRA: the mean of N photos' image tokens."""
        if self.image_prompt is None:
            return {}
        with self.autocast():
            tokens = self.image_prompt.tokens(features.to(self.device)).float()
        return {IMAGE: tokens.unflatten(0, (-1, photos)).mean(1)}

    def predict(self, latents: Tensor, timesteps: Tensor, text: Tensor, lora: Packed | None) -> Tensor:
        """The UNet on rows, each with its own LoRA [rows, N] and image tokens; None: the base model.

        text: `CaptionTable.vectors`.
        """
        latents = latents.to(self.device, memory_format=torch.channels_last)
        pooled = self.captions.pooled
        text, pooled = features.split_vectors(text, 0 if pooled is None else pooled.shape[1])
        added = {}
        if pooled is not None:  # sizes of picture and crop, as the runtime says them
            side = self.cache.images.shape[2]
            sizes = torch.tensor([[side, side, 0, 0, side, side]], device=self.device)
            added = {"text_embeds": pooled, "time_ids": sizes.expand(len(latents), -1).to(pooled)}
        with self.autocast():
            output = self.unet(
                latents,
                timesteps.to(self.device),
                encoder_hidden_states=text,
                cross_attention_kwargs=None if lora is None else {"rows": self._rows(dict(lora))},
                added_cond_kwargs=added,
                return_dict=False,
            )
        return output[0].float()

    def _rows(self, lora: Packed) -> Rows:
        tokens = lora.pop(IMAGE, None)
        gate = torch.ones(len(next(iter(lora.values()))), 1, 1, device=self.device)
        if tokens is None:
            return Rows(unpack(self.layout, lora), gate)
        scale = torch.full((len(tokens),), self.config.image_scale, device=self.device)
        with torch.no_grad():
            image = self.image_prompt.key_values(tokens, scale)
        return Rows(unpack(self.layout, lora), gate, image=image)

    def losses(self, batch: Batch, prior: Batch | None) -> dict[str, Tensor]:
        """The terms of eq. 5 for one batch."""
        with self.autocast():
            lora = self.decode(batch.features.to(self.device))
        lora = {
            name: vector.float().unflatten(0, (-1, batch.photos)).mean(1) for name, vector in lora.items()
        }
        reg = self.regulariser(lora, self.decoder.deltas(lora))
        image = self.image(batch.features, batch.photos)
        lora, image = (
            {name: vector.repeat_interleave(self.config.targets, 0) for name, vector in found.items()}
            for found in (lora, image)
        )
        parts = [batch] if prior is None else [batch, prior]
        latents, noise, timesteps, text, weight = (
            torch.cat([getattr(part, name) for part in parts]).to(self.device)
            for name in ("latents", "noise", "timesteps", "text", "weight")
        )
        if prior is not None:
            lora = {name: vector.repeat(2, 1) for name, vector in lora.items()}
            # Zeros are no image prompt: the prior's pictures are of others.
            image = {name: torch.cat([tokens, torch.zeros_like(tokens)]) for name, tokens in image.items()}
        noised = self.noising.noised(latents, noise, timesteps)
        target = self.noising.target(latents, noise, timesteps)
        if prior is not None and self.config.prior == "matching":
            with torch.no_grad():
                of_prior = [x.chunk(2)[1] for x in (noised, timesteps, text)]
                target = torch.cat([target.chunk(2)[0], self.predict(*of_prior, None)])
        rows = row_loss(self.predict(noised, timesteps, text, {**lora, **image}), target)
        rows = rows * self.noising.weights(timesteps, self.config.min_snr) * weight
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
        batch, prior = self.draw(step)
        terms = self.losses(batch, prior)
        return self.descent.step(step, terms, f"identities {self.batches.identities(step).tolist()}")

    def _drawn(self, step: int) -> tuple[Batch, Batch | None]:
        """The rows of L_ft, and if asked for those of L_reg: for matching the same, without the token."""
        batch = self.batches.at(step)
        if not self.config.gamma:
            return batch, None
        if self.config.prior == "matching":
            return batch, dataclasses.replace(batch, text=batch.generic)
        return batch, self.batches.prior_at(step)

    def save(self, folder: Path, step: int, window: Tensor) -> None:
        """The EMA for export, and everything that resuming needs; all processes come and wait for it.

        The state last: a run that is killed in between goes on from the one before, and writes both again.
        """
        moments = self.descent.moments()
        if self.accelerator.is_main_process:
            known = self.origin.base_model, self.origin.image_prompt
            checkpoint.save_hypernet(folder, self.ema, self.config, step, *known)
            checkpoint.save_state(
                folder, self.decoder, self.ema, moments, window, self.config, step, self.origin
            )
        self.accelerator.wait_for_everyone()

    def close(self) -> None:
        """Leaves the other processes; nothing is trained afterwards.

        What shares the gradients goes before the group of processes: if it were the last to hold the group,
        that would end its threads under Python's lock, for which one of them may wait (gloo, torch 2.13.0).
        """
        if isinstance(self.draw, Ahead):
            self.draw.close()
        self.decode = self.descent.model = self.decoder
        self.accelerator.free_memory()
        gc.collect()
        self.accelerator.end_training()


def run(config: TrainConfig, resume: bool = False, allow_changes: bool = False) -> Path:
    """Trains to the end, or to SIGTERM or SIGINT, at which the state is saved; returns the run's folder.

    Raises:
        UsageError: the folder holds a run and `resume` is off, or the run was told otherwise in what it may
            not change unasked (`config.FREE` it may) and `allow_changes` is off; or processes do not find the
            same state in the folder.
        NotFound: a folder is missing.
        Incompatible, IntegrityError: the state in the folder is of another decoder or base model; it, the
            base model or the data is damaged.
        NumericError: the loss is not a finite number; the last checkpoint is kept.
        ResourceError: the disk is full; the last checkpoint is kept.
        SystemExit: 128 + the number of the signal.
    """
    out = Path(config.output)
    if not resume and (out / LOG).exists():
        raise UsageError(
            f"{out} holds a run", "nothing is overwritten unasked", "add --resume, or another --output"
        )
    device.prepare(config.threads)
    trainer = Trainer(config)
    start, window = 0, torch.zeros(0, len(LOSSES))
    if resume and (out / checkpoint.STATE).exists():
        start, window, changed = checkpoint.load_state(
            out, trainer.decoder, trainer.descent, config, trainer.origin, allow_changes
        )
        for name, (then, now) in changed.items():
            log.warning("%s was %s and is %s now", name, then, now)
    distributed.check_start(trainer.accelerator, start, out)
    with stopping(launched=trainer.accelerator.num_processes > 1) as stopped:
        _loop(trainer, out, start, window, stopped)
        trainer.close()
    return out


def _loop(trainer: Trainer, out: Path, start: int, window: Tensor, stopped: list[int]) -> None:
    config, accelerator = trainer.config, trainer.accelerator
    journal = Journal(trainer, out, start) if accelerator.is_main_process else None
    for step in range(start, config.steps):
        window = torch.cat([window, trainer.step(step)[None]])
        done = step + 1
        end = done == config.steps
        if journal is not None:
            journal.after(done, window)
        if end or done % config.log_every == 0:
            window = window[:0]
        # Asked once: a signal that comes later is for the next step. One process's is for all.
        leaving = max(distributed.said(accelerator, stopped[0] if stopped else 0))
        if leaving and not stopped:
            stopped.append(leaving)
        if end or done % config.save_every == 0 or leaving:
            trainer.save(out, done, window)
        if leaving:
            return
        if journal is not None and not len(window):
            # Its rate is of the steps alone: figures, sheets and the state, written since, do not count.
            journal.clock = time.perf_counter()


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


@click.command(epilog="The fields and their meaning: training/run/config.py")
@click.option("--preset", type=click.Choice(list(PRESETS)), default="tiny", show_default=True)
@click.option(
    "--config",
    "file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="JSON file of settings.",
)
@click.option("--resume", is_flag=True, help="Go on with the run in --output, if there is one.")
@click.option(
    "--allow-changes", is_flag=True, help="Resume with other settings than the run had; they are named."
)
@click.option(
    "--dry-run", "dry", is_flag=True, help="Two steps: print memory and shapes, write nothing to --output."
)
def main(preset: str, file: Path | None, resume: bool, allow_changes: bool, dry: bool, **flags: Any) -> None:
    """Train a hypernetwork on a frozen base model.

    \b
    Examples:
      hyperrt train --model runs/world/base --data runs/world/cache --output runs/hypernet
      hyperrt train --model runs/world/base --data runs/world/cache --output runs/hypernet --resume
      accelerate launch -m hyperrt.training.train --model base --data cache --output runs/faces
    """
    with reported():
        try:
            settings = resolve(flags, preset, file)
        except ValueError as error:
            raise click.UsageError(str(error)) from error
        if not dry:
            run(settings, resume, allow_changes)
            return
        device.prepare(settings.threads)
        trainer = Trainer(settings)
        found = dry_run.measure(trainer, LOSSES)
        if trainer.accelerator.is_main_process:
            click.echo(json.dumps(found, indent=1))
        trainer.close()


_options(main)

if __name__ == "__main__":
    main()
