"""Trains the `tiny` base model from scratch: `hyperrt pretrain --output RUN`.

Stages, each resumable, in RUN/<stage>/ with log.jsonl, state.safetensors and sample sheets:

    cache          draws the scenes, of drawn subjects and cut-outs       training/data/cache.py, cutouts.py
    vae            autoencoder: pixels <-> latents [C, 8, 8]
    image_encoder  ViT, contrastive on two views of a subject (InfoNCE)
    latents        encodes the cache, so that the UNet trains on latents alone
    decoder        trains the autoencoder's decoder further, on whole pictures
    unet           UNet and text encoder together, denoising captioned latents

The result is RUN/base, a folder in diffusers' format (training/model/base_model.py).
"""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path

import click
import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from hyperrt import files
from hyperrt.cli.options import RenamedOption
from hyperrt.session.decode import pictures_from_pixels
from hyperrt.training.data import cache as data
from hyperrt.training.data import clip_tokenizer, cutouts, scenes
from hyperrt.training.messages import reported
from hyperrt.training.model import base_model as bases
from hyperrt.training.model.lora_layers import install
from hyperrt.training.run import contrastive, device
from hyperrt.training.run.contrastive import held_out, pictures, train_image_encoder
from hyperrt.training.run.loop import fit
from hyperrt.training.run.optimizer import Schedule
from hyperrt.training.run.sample import sample, write_sheet

log = logging.getLogger("hyperrt.training")

VAE = Schedule(
    steps=26000, lr=2e-3, warmup=100, ema=0.995, weight_decay=0.0, log_every=100, report_every=1000
)
DECODER = Schedule(
    steps=6000, lr=1e-3, warmup=100, ema=0.999, weight_decay=0.0, log_every=100, report_every=1000
)
IMAGE_ENCODER = Schedule(steps=650, lr=1e-3, warmup=100, ema=0.99, report_every=150)
UNET = Schedule(steps=3000, lr=6e-4, warmup=100, ema=0.999, report_every=500)
LATENT_NOISE = 0.1  # in standard deviations of the latents
TEXT_DROPOUT = 0.1
DESCRIBED = 0.5  # share of captions with a description; the others have the noun alone

STAGES = ("vae", "image_encoder", "decoder", "unet")
PATH = click.Path(path_type=Path)
SHARE, FACTOR = click.FloatRange(0, 1), click.FloatRange(0, min_open=True)
SUBJECTS = click.IntRange(2 * contrastive.VALIDATION)
VIEWS = click.IntRange(2, len(scenes.BACKGROUNDS))


def draw(cache: data.PictureCache, count: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """Random training (subjects, views), each [count]."""
    subjects, views = cache.shape
    return (
        torch.randint(subjects - contrastive.VALIDATION, (count,), generator=generator),
        torch.randint(views, (count,), generator=generator),
    )


def train_vae(out: Path, cache: data.PictureCache, schedule: Schedule, batch: int, seed: int) -> nn.Module:
    """Minimises L1 and L2 on pixels, at first on crops of a quarter of the area: early on, the number of
    steps counts more than that of pixels.

    Noise on the latents makes the decoder robust to the UNet's small errors.
    """
    torch.manual_seed(seed)
    vae = bases.tiny_vae().to(device.pick(), memory_format=torch.channels_last)
    half, cropped = bases.IMAGE_SIZE // 2, round(0.85 * schedule.steps)

    def loss(step: int, generator: Generator) -> Mapping[str, Tensor]:
        real = pictures(cache, *draw(cache, batch, generator))
        if step < cropped:
            top, left = torch.randint(half // 8 + 1, (2,), generator=generator) * 8
            real = real[:, :, top : top + half, left : left + half]
        latents = vae.encoder(real)
        noise = torch.randn(latents.shape, generator=generator).to(latents)
        fake = vae.decoder(latents + LATENT_NOISE * latents.detach().std() * noise)
        return _pixel_losses(fake.float(), real)

    def report(step: int, ema: nn.Module) -> Mapping[str, float]:
        return _reconstruct(out, step, cache, ema.encoder, ema.decoder)

    return fit(out, vae, loss, schedule, seed, report)


def refine_decoder(
    out: Path, cache: data.PictureCache, vae: nn.Module, schedule: Schedule, batch: int, seed: int
) -> None:
    """Trains the decoder of `vae` further on the cached latents, so that the UNet's latents stay the same."""
    latents, scale = cache.latents, vae.config.scaling_factor
    decoder = copy.deepcopy(vae.decoder).requires_grad_(True)

    def loss(step: int, generator: Generator) -> Mapping[str, Tensor]:
        subjects, views = draw(cache, batch, generator)
        clean = torch.from_numpy(latents[subjects.numpy(), views.numpy()].astype(np.float32))
        noisy = clean + LATENT_NOISE * torch.randn(clean.shape, generator=generator)
        real = pictures(cache, subjects, views)
        fake = decoder((noisy / scale).to(real)).float()
        losses = _pixel_losses(fake, real)
        # Differences of neighbouring pixels: they penalise blur.
        edges = F.l1_loss(fake.diff(dim=2), real.diff(dim=2)) + F.l1_loss(fake.diff(dim=3), real.diff(dim=3))
        return {**losses, "loss": losses["loss"] + edges, "edges": edges}

    def report(step: int, ema: nn.Module) -> Mapping[str, float]:
        return _reconstruct(out, step, cache, vae.encoder, ema)

    vae.decoder = fit(out, decoder, loss, schedule, seed, report)


def _pixel_losses(fake: Tensor, real: Tensor) -> Mapping[str, Tensor]:
    """L1 and L2."""
    pixels = F.l1_loss(fake, real)
    return {"loss": pixels + F.mse_loss(fake, real), "pixels": pixels}


@torch.no_grad()
def _reconstruct(
    out: Path, step: int, cache: data.PictureCache, encoder: nn.Module, decoder: nn.Module
) -> Mapping[str, float]:
    """Encodes and decodes held-out pictures; returns their PSNR in dB and writes a sheet."""
    real = pictures(cache, *held_out(cache, 32, 0))
    fake = decoder(encoder(real)).clamp(-1, 1)
    strips = [pictures_from_pixels(x.cpu().numpy()) for x in (real, fake)]
    rows = [list(strip[k : k + 8]) for k in range(0, len(strips[0]), 8) for strip in strips]
    write_sheet(out / f"{step:06d}.png", rows)
    return {"psnr": (10 * torch.log10(4 / (fake - real).square().mean((1, 2, 3)))).mean().item()}


@torch.no_grad()
def encode_latents(vae: nn.Module, cache: data.PictureCache) -> None:
    """Writes latents.npy to the cache, scaled to a standard deviation of 1; sets the VAE's scaling_factor."""
    subjects, views = cache.shape
    side = bases.IMAGE_SIZE // 8
    aside = cache.path / f"{data.LATENTS}.part"
    latents = np.lib.format.open_memmap(
        aside, "w+", np.float16, (subjects, views, bases.LATENT_CHANNELS, side, side)
    )
    for part in torch.arange(subjects).split(128):
        pixels = torch.cat([pictures(cache, part, torch.full_like(part, view)) for view in range(views)])
        mean = vae.encode(pixels).latents
        latents[part.numpy()] = mean.unflatten(0, (views, len(part))).transpose(0, 1).cpu().numpy()
    scale = 1 / float(latents[:1024].astype(np.float32).std())
    for part in np.array_split(np.arange(subjects), 64):
        latents[part] = latents[part].astype(np.float32) * scale
    latents.flush()
    aside.replace(cache.path / data.LATENTS)
    vae.register_to_config(scaling_factor=scale)


class Denoiser(nn.Module):
    """UNet and text encoder as one module, for the last stage."""

    def __init__(self, unet: nn.Module, text_encoder: nn.Module) -> None:
        super().__init__()
        self.unet = unet
        self.text_encoder = text_encoder

    def forward(self, latents: Tensor, timesteps: Tensor, ids: Tensor) -> Tensor:
        return self.unet(latents, timesteps, self.text_encoder(ids).last_hidden_state).sample


def train_unet(
    out: Path, cache: data.PictureCache, parts: bases.Base, schedule: Schedule, batch: int, seed: int
) -> bases.Base:
    """Denoises cached latents with their captions: half of them described, a quarter with the token.

    The token has no meaning yet. The descriptions do: the cross-attention learns to draw only what a text
    can say, and a LoRA on the cross-attention can say no more.
    """
    target = device.pick()
    install(parts.unet)  # its attention is faster on a CPU
    model = Denoiser(parts.unet.to(memory_format=torch.channels_last), parts.text_encoder).to(target)
    latents, (plain, token, described) = cache.latents, _caption_ids(cache, parts)
    empty = bases.tokens(parts.tokenizer, [""])[0]

    def loss(step: int, generator: Generator) -> Mapping[str, Tensor]:
        subjects, views = draw(cache, batch, generator)
        clean = torch.from_numpy(latents[subjects.numpy(), views.numpy()].astype(np.float32))
        clean = clean.contiguous(memory_format=torch.channels_last)
        noise = torch.randn(clean.shape, generator=generator)
        time = torch.randint(parts.scheduler.config.num_train_timesteps, (batch,), generator=generator)
        text = torch.where(_chance(0.5, batch, generator), plain[subjects, views], token[subjects, views])
        text = torch.where(_chance(DESCRIBED, batch, generator), described[subjects, views], text)
        text = torch.where(_chance(TEXT_DROPOUT, batch, generator), empty, text)
        noisy = parts.scheduler.add_noise(clean, noise, time)
        predicted = model(noisy.to(target), time.to(target), text.to(target)).float()
        velocity = parts.scheduler.get_velocity(clean, noise, time)
        return {"loss": F.mse_loss(predicted, velocity.to(target))}

    def report(step: int, ema: nn.Module) -> Mapping[str, float]:
        base = _with(parts, ema)
        rows = []
        for noun in scenes.NOUNS:
            prompts = [scenes.caption(noun, place) for place in scenes.BACKGROUNDS]
            rows.append(list(sample(base, prompts, guidance_scale=1.5, steps=20, seed=step)))
        write_sheet(out / f"{step:06d}.png", rows)
        return {}

    return _with(parts, fit(out, model.train(), loss, schedule, seed, report))


def _with(parts: bases.Base, model: nn.Module) -> bases.Base:
    return dataclasses.replace(parts, unet=model.unet, text_encoder=model.text_encoder)


def _caption_ids(cache: data.PictureCache, parts: bases.Base) -> Tensor:
    """Token ids [3, N, V, L] of every picture's captions: without and with the token, and described."""
    every = [index.ravel() for index in np.indices(cache.shape)]
    captions = [cache.captions(*every), cache.captions(*every, scenes.TOKEN), cache.described(*every)]
    return torch.stack([bases.tokens(parts.tokenizer, texts) for texts in captions]).unflatten(1, cache.shape)


def _chance(share: float, count: int, generator: Generator) -> Tensor:
    """True in a share of the rows: [count, 1]."""
    return torch.rand(count, 1, generator=generator) < share


def _scaled(schedule: Schedule, scale: float) -> Schedule:
    return dataclasses.replace(schedule, steps=max(1, round(schedule.steps * scale)))


@click.command(context_settings={"show_default": True})
@click.option(
    "--output", "-o", cls=RenamedOption, former=["--out"], type=PATH, required=True,
    help="Folder of the run; an unfinished run in it is continued.",
)
@click.option("--cache", "cache_path", type=PATH, help="Folder of the scenes [default: OUTPUT/cache].")
@click.option("--identities", type=SUBJECTS, default=12000, help="Subjects to draw.")
@click.option("--views", type=VIEWS, default=4, help="Scenes per subject.")
@click.option("--cutouts", "cutouts_path", type=PATH, help="Folder of RGBA cut-outs to mix in.")
@click.option("--cutout-share", type=SHARE, default=data.CUTOUT_SHARE, help="Subjects from cut-outs.")
@click.option("--scale", type=FACTOR, default=1.0, help="Factor for the steps of every stage.")
@click.option(
    "--batch-size", cls=RenamedOption, former=["--batch"], type=click.IntRange(8), default=64,
    help="Rows per step; the autoencoder's are an eighth.",
)
@click.option("--seed", type=click.IntRange(0), default=0, help="Seed of all random numbers.")
@click.option("--threads", type=click.IntRange(1), help="Threads of PyTorch [default: PyTorch's choice].")
@click.option("--workers", type=click.IntRange(1), default=2, help="Processes that draw the scenes.")
@click.option("--until", type=click.Choice(STAGES), default=STAGES[-1], help="Last stage.")
@click.option("--force", is_flag=True, help="Replace a finished cache that has other settings.")
def main(
    output: Path, cache_path: Path | None, identities: int, views: int, cutouts_path: Path | None,
    cutout_share: float, scale: float, batch_size: int, seed: int, threads: int | None, workers: int,
    until: str, force: bool,
) -> None:  # fmt: skip
    """Train the tiny base model from scratch and write OUTPUT/base. To resume, run the same command again.

    \b
    Examples:
      hyperrt pretrain --output runs/world
      hyperrt pretrain --output runs/quick --scale 0.02 --identities 200
    """
    with reported():
        device.prepare(threads)
        subjects = cutouts.load(cutouts_path) if cutouts_path else None
        cache = data.build(
            cache_path or output / "cache", identities, views, bases.IMAGE_SIZE,
            workers=workers, cutouts=subjects, share=cutout_share, force=force,
        )  # fmt: skip
        train(output, cache, scale, batch_size, seed, until)


def train(out: Path, cache: data.PictureCache, scale: float, batch: int, seed: int, until: str) -> None:
    """Runs the stages up to `until`; a finished stage is read and not repeated.

    Only the latents are always encoded again, which takes a minute: that also sets the VAE's scale.
    """
    out.mkdir(parents=True, exist_ok=True)
    files.check_folder(out / "base", "model_index.json", force=True)  # before the work, not after it
    vae = train_vae(out / "vae", cache, _scaled(VAE, scale), max(1, batch // 8), seed)
    if until == "vae":
        return
    image_encoder = train_image_encoder(
        out / "image_encoder", cache, _scaled(IMAGE_ENCODER, scale), batch, seed
    )
    if until == "image_encoder":
        return
    encode_latents(vae, cache)
    refine_decoder(out / "decoder", cache, vae, _scaled(DECODER, scale), max(1, batch // 4), seed)
    if until == "decoder":
        return
    tokenizer = clip_tokenizer.build(out / "tokenizer", bases.MAX_TOKENS, cache.names)
    torch.manual_seed(seed)
    parts = bases.Base(
        unet=bases.tiny_unet(), vae=vae, text_encoder=bases.tiny_text_encoder(tokenizer), tokenizer=tokenizer,
        image_encoder=image_encoder, scheduler=bases.tiny_scheduler(),
    )  # fmt: skip
    trained = train_unet(out / "unet", cache, parts, _scaled(UNET, scale), batch, seed)
    files.publish_folder(
        out / "base", lambda folder: bases.save(trained, folder), marker="model_index.json", force=True
    )
    log.info("the base model is in %s", out / "base")


if __name__ == "__main__":
    main()
