"""DreamBooth with LoRA: fine-tunes a subject, for comparison with the hypernetwork.

    python -m training.finetune --base BASE --images PHOTOS --class-noun robot -o robot.safetensors

PEFT adds a LoRA to every projection of the layout, the ones that the hypernetwork predicts; nothing else is
trained. A step denoises photos in turn, with a prompt that has the subject's token. With prior preservation
the same LoRA also keeps the base model's pictures of the class, with the prompt without the token.

Shapes: n photos, latents [n, C, h, w], text [n, L, D].
Source: arXiv 2208.12242 (DreamBooth, eq. 2), arXiv 2106.09685 (LoRA).
"""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import torch
from peft import LoraConfig
from torch import Tensor, nn

from hyperrt import files
from hyperrt.bundle.bundle import Preprocess
from hyperrt.cli.options import RenamedOption
from hyperrt.errors import Incompatible, UsageError
from hyperrt.lora.layout import LoraLayout
from hyperrt.lora.subject import Subject
from hyperrt.photos.load import preprocess
from hyperrt.photos.read import Photos, read_photos
from hyperrt.sampling.prompts import split_prompt
from hyperrt.training.data import scenes
from hyperrt.training.messages import reported
from hyperrt.training.model import base_model as bases
from hyperrt.training.model.base_model import Base
from hyperrt.training.model.encode import HALVES, encode_latents, encode_text, latents_of_pixels
from hyperrt.training.model.lora_layers import layout_of
from hyperrt.training.model.losses import NoiseScheduler, row_loss
from hyperrt.training.model.weight_hash import base_hash
from hyperrt.training.run import device
from hyperrt.training.run.batches import spread_timesteps
from hyperrt.training.run.optimizer import Optimizer, Schedule
from hyperrt.training.run.sample import sample

log = logging.getLogger("hyperrt.training")

VAE_FACTOR = 8  # pixels of a picture's side per latent
ADAPTER = "default"  # PEFT's name for a single adapter


@dataclass(frozen=True, kw_only=True)
class DreamBoothConfig:
    """Settings of a fine-tuning.

    Raises:
        UsageError: a number is out of range.
    """

    steps: int = 400
    batch_size: int = 4  # rows per step: photos in turn, each with its own noise
    lr: float = 1e-3  # constant after the warm-up
    warmup: int = 10  # steps
    weight_decay: float = 1e-4
    clip: float = 1.0  # norm of the gradient
    noise_shift: float = 2.0  # as in training/run/config.py, so that both methods see the same noise
    prior_weight: float = 0.0  # weight of the loss on pictures of the class; above 0 it doubles the rows
    prior_pictures: int = 16
    token: str = scenes.TOKEN  # stands for [V]
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "prior_pictures"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}", "it must be at least 1", f"set {name}")
        for name in ("lr", "clip", "noise_shift"):
            if not getattr(self, name) > 0:
                raise UsageError(f"{name} is {getattr(self, name)}", "it must be above 0", f"set {name}")
        for name in ("warmup", "weight_decay", "prior_weight", "seed"):
            if not getattr(self, name) >= 0:
                raise UsageError(f"{name} is {getattr(self, name)}", "it must not be negative", f"set {name}")


@dataclass(frozen=True, eq=False)
class Finetuned:
    """A fine-tuned subject."""

    subject: Subject
    steps: int
    seconds: float  # from photos in memory to the LoRA
    loss: float  # of the last step


def finetune(
    base: Base,
    photos: Photos,
    noun: str,
    layout: LoraLayout,
    config: DreamBoothConfig,
    prompts: Sequence[str] | None = None,
    stops: Sequence[int] = (),
) -> list[Finetuned]:
    """Fine-tunes one subject; `base` is not changed.

    Args:
        photos: as `Runtime.personalize` takes them; they are cropped and resized to the model's pictures.
        noun: the class of the subject, "robot".
        layout: the sites and the rank of the LoRA.
        prompts: a caption for each photo, "a [V] robot in a forest"; None: "a [V] robot" for each.
        stops: numbers of steps after which to keep the subject, too. The learning rate is constant, so each
            equals the result of a shorter run.

    Returns:
        A subject for each stop in rising order, then the one after all steps.

    Raises:
        BadInput: no photo can be used.
        BadPrompt: a prompt is empty, or does not name the subject.
        UsageError: prompts and photos differ in number, a stop is outside the run, or the model is SDXL.
        Incompatible: the model lacks a site of the layout.
        NumericError: the loss is not a finite number.
    """
    if base.is_sdxl:
        why = "its UNet also reads pooled text and sizes, which the fine-tuning does not pass"
        raise UsageError("SDXL cannot be fine-tuned", why, "use a base model with one text encoder")
    stops = sorted({*stops, config.steps})
    if stops[0] < 1 or stops[-1] > config.steps:
        why = f"stops are {stops}, the run has {config.steps} steps"
        raise UsageError("a stop is outside the run", why, "set more steps, or leave the stop out")
    pictures = read_photos(photos)
    prompts = [f"a [V] {noun}"] * len(pictures) if prompts is None else prompts
    if len(prompts) != len(pictures):
        why = f"there are {len(prompts)} prompts and {len(pictures)} usable photos"
        raise UsageError("prompts and photos differ in number", why, "give one prompt for each photo")
    texts = [split_prompt(prompt, noun, config.token) for prompt in prompts]
    origin = {"base_model": base_hash(base.unet), "hypernet": "", "class_noun": noun}
    origin |= {"photos": str(len(pictures)), "trigger": config.token}
    began = time.perf_counter()
    own = latents_of(base, pictures), encode_text(base, [text.subject for text in texts])
    prior = _prior(base, [text.generic for text in texts], config) if config.prior_weight else None
    tuning = _Tuning(base, layout, config, own, prior)
    results = []
    for step in range(config.steps):
        loss = tuning.step(step)
        if step + 1 in stops:
            factors = layout.pack(tuning.factors())
            subject = Subject(factors, noun, len(pictures), origin, layout=layout)
            results.append(Finetuned(subject, step + 1, time.perf_counter() - began, loss))
    return results


@torch.no_grad()
def latents_of(base: Base, pictures: Sequence[np.ndarray]) -> Tensor:
    """Pictures [H, W, 3] uint8 of any size => latents as the UNet takes them, [n, C, h, w]."""
    size = VAE_FACTOR * base.unet.config.sample_size
    square = preprocess(pictures, Preprocess(size, HALVES, HALVES, "bicubic", "center"))
    return latents_of_pixels(base, torch.from_numpy(square))


@torch.no_grad()
def _prior(base: Base, generic: Sequence[str], config: DreamBoothConfig) -> tuple[Tensor, Tensor]:
    """Latents and text of pictures of the class that the base model draws, one prompt after the other."""
    prompts = [generic[k % len(generic)] for k in range(config.prior_pictures)]
    pictures = sample(base, prompts, seed=config.seed)
    return encode_latents(base, pictures), encode_text(base, prompts)


class _Tuning:
    """A copy of the UNet with PEFT's LoRA, and the LoRA's optimizer.

    Args:
        own, prior: latents and text of the photos, and of pictures of the class.
    """

    def __init__(
        self,
        base: Base,
        layout: LoraLayout,
        config: DreamBoothConfig,
        own: tuple[Tensor, Tensor],
        prior: tuple[Tensor, Tensor] | None,
    ) -> None:
        self.layout, self.config = layout, config
        self.own, self.prior = own, prior
        self.device = next(base.unet.parameters()).device
        self.scheduler = NoiseScheduler(base.scheduler, self.device)
        self.unet = adapted(base.unet, layout, config.seed)
        self.unet.to(memory_format=torch.channels_last)
        trained = [p for p in self.unet.parameters() if p.requires_grad]
        schedule = Schedule(
            steps=config.steps, lr=config.lr, warmup=config.warmup, final_lr=1.0, ema=0.0,
            weight_decay=config.weight_decay, clip=config.clip,
        )  # fmt: skip
        self.optimizer = Optimizer(nn.ParameterList(trained), schedule)

    def step(self, step: int) -> float:
        """One update; returns the loss."""
        loss = self._loss(step, *self.own, stream=0)
        if self.prior is not None:
            loss = loss + self.config.prior_weight * self._loss(step, *self.prior, stream=1)
        return float(self.optimizer.step(step, {"loss": loss})[0])

    def _loss(self, step: int, latents: Tensor, text: Tensor, stream: int) -> Tensor:
        rows = self.config.batch_size
        photos = torch.arange(step * rows, (step + 1) * rows) % len(latents)
        rng = np.random.default_rng([self.config.seed, stream, step])
        noise = torch.from_numpy(rng.standard_normal((rows, *latents.shape[1:]), np.float32)).to(self.device)
        spread = spread_timesteps(rng, rows, self.config.noise_shift, self.scheduler.train_timesteps)
        timesteps = torch.from_numpy(spread).to(self.device)
        clean = latents[photos]
        noisy = self.scheduler.add_noise(clean, noise, timesteps)
        noisy = noisy.contiguous(memory_format=torch.channels_last)
        with device.autocast(self.device):
            predicted = self.unet(noisy, timesteps, text[photos]).sample
        return row_loss(predicted, self.scheduler.target(clean, noise, timesteps)).mean()

    def factors(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """The LoRA's factors by path, as `LoraLayout.pack` takes them: A [d_in, r], B [r, d_out]."""
        factors = {}
        for site in self.layout.sites:
            layer = self.unet.get_submodule(site.path)
            a, b = (part[ADAPTER].weight.detach().cpu().numpy() for part in (layer.lora_A, layer.lora_B))
            factors[site.path] = (a.T, layer.scaling[ADAPTER] * b.T)
        return factors


def adapted(unet: nn.Module, layout: LoraLayout, seed: int = 0) -> nn.Module:
    """A frozen copy of a UNet with PEFT's LoRA on the sites of a layout; A is random, B zero, the scale 1.

    Raises:
        Incompatible: the UNet lacks a site, or has it in another size.
    """
    unet = copy.deepcopy(unet).eval().requires_grad_(False)
    linear = {path: module for path, module in unet.named_modules() if isinstance(module, nn.Linear)}
    for site in layout.sites:
        module = linear.get(site.path)
        if module is None or (module.in_features, module.out_features) != (site.d_in, site.d_out):
            why = f"the layout has {site.path}: {site.d_in} to {site.d_out}; the model has {module}"
            do = "use the layout of this base model"
            raise Incompatible("the LoRA layout does not fit the base model", why, do)
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        paths = [site.path for site in layout.sites]
        unet.add_adapter(LoraConfig(r=layout.rank, lora_alpha=layout.rank, target_modules=paths))
    return unet


@click.command(context_settings={"show_default": True})
@click.option("--base", "folder", required=True, help="Folder of the base model.")
@click.option("--images", required=True, help="Folder of photos, or one photo.")
@click.option("--class-noun", required=True, help='The class of the subject, such as "robot".')
@click.option(
    "--output", "-o", cls=RenamedOption, former=["--out"], required=True, type=click.Path(path_type=Path),
    help="The subject file.",
)
@click.option("--steps", type=int, default=DreamBoothConfig.steps, help="Optimizer steps.")
@click.option("--rank", type=click.IntRange(1), default=4, help="Rank of the LoRA; that of the bundle.")
@click.option("--lr", type=float, default=DreamBoothConfig.lr, help="Learning rate.")
@click.option(
    "--prior-weight", type=float, default=DreamBoothConfig.prior_weight,
    help="Weight of the loss on the base model's pictures of the class.",
)
@click.option("--seed", type=int, default=DreamBoothConfig.seed, help="Seed of all random numbers.")
@click.option("--threads", type=click.IntRange(1), help="Threads of PyTorch [default: PyTorch's choice].")
@click.option("--force", is_flag=True, help="Replace the file if it exists.")
def main(
    folder: str, images: str, class_noun: str, output: Path, steps: int, rank: int, lr: float,
    prior_weight: float, seed: int, threads: int | None, force: bool,
) -> None:  # fmt: skip
    """Fine-tune a LoRA on the photos of one subject."""
    with reported():
        config = DreamBoothConfig(steps=steps, lr=lr, prior_weight=prior_weight, seed=seed)
        files.check_file(output, force)  # before the work, not after it
        device.prepare(threads)
        base = bases.opened(folder)
        for module in (base.unet, base.vae, base.text_encoder):
            module.to(device.pick())
        layout = layout_of(base.unet, rank)
        result = finetune(base, images, class_noun, layout, config)[-1]
        result.subject.save(output, force=force)
        log.info("%s: %d steps in %.0f s, loss %.4g", output, result.steps, result.seconds, result.loss)


if __name__ == "__main__":
    main()
