"""Measures on held-out subjects whether the hypernetwork has collapsed; noise and timesteps never change.

Collapse is the known failure of hypernetworks that predict LoRA: the prediction goes to zero, or becomes the
same for every subject. These figures show it long before the pictures do:

    own, shuffled, base   loss with the subject's LoRA, with another subject's of its noun, without a LoRA
    gap = shuffled - own  must grow; 0 means that the LoRA does not depend on the subject
    gap_error             one standard error of the gap, over the rows
    gain = base - own     must grow; gain without gap is a LoRA that only learned the data
    delta_rms, b_rms      of the predicted LoRA without the static A0, and of its B factors
    ba_norm               |A B| of all sites together, mean over subjects
    change                |A B| / |W|, mean over the sites
    cos_subjects          between different subjects of a noun; near 1 is a collapse
    cos_photos            between two photos of a subject; high
    mean_share            the share of the LoRA's squared norm that its mean over subjects explains
    effective_rank        of the LoRAs of all subjects around their mean: how many directions they use

`collapse` decides by the gap. After 100 steps, half of its warm-up, the shipped run (docs/log.md, "Collapse
monitors") had a gap of 0.07 of the base model's loss and a change of 0.15; at its end 0.21 and 0.53. There
cos_subjects was 0.78, cos_photos 0.97 and mean_share 0.73: healthy LoRAs have much in common. So the loss
decides, and the other figures are only logged.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hyperrt.training.data.cache import PictureCache
from hyperrt.training.data.features import CaptionTable
from hyperrt.training.messages import warn
from hyperrt.training.model.encode import Text
from hyperrt.training.model.hypernet import Decoder, Packed
from hyperrt.training.model.lora_layers import unpack
from hyperrt.training.model.losses import NoiseScheduler, Predict, product_squares, row_loss
from hyperrt.training.run.config import TrainConfig

PASSES = 2  # noise draws for each held-out subject

# A gap counts as real if it exceeds two standard errors and this fraction of the base model's loss; the
# shipped run had 35 times as much after 100 steps.
LEAST_GAP = 0.002
LEAST_CHANGE = 0.01  # without a gap, a smaller change is no LoRA; the shipped run had 15 times it at step 100
SOONEST = 100  # steps before the first warning
COLLAPSED = {  # kind: what, do
    "zero": (
        "the predicted LoRAs are next to nothing",
        "lower --lambda or raise --lr; log.jsonl has the terms of the loss (reg is R(h) without lambda)",
    ),
    "same": (
        "a subject's own LoRA serves it no better than another subject's",
        "if the gap grows, continue; else lower --lambda, and check that image features tell subjects apart",
    ),
}


@dataclass(frozen=True)
class Probe:
    """The H held-out subjects and their fixed rows to denoise, rows = PASSES x H."""

    features: Tensor  # [H, T, F] of the photo that the LoRA is made from
    second: Tensor  # [H, T, F] of another photo
    another: Tensor  # [H] number of a subject of the same noun
    latents: Tensor  # [rows, C, h, w] of a third picture
    text: Text  # of the rows
    noise: Tensor  # [rows, C, h, w]
    timesteps: Tensor  # [rows]

    def to(self, device: torch.device) -> Probe:
        """The same probe on a device."""
        return Probe(**{name: value.to(device) for name, value in vars(self).items()})


def probe(
    cache: PictureCache,
    features: np.ndarray,
    captions: CaptionTable,
    config: TrainConfig,
    train_timesteps: int,
) -> Probe:
    """The probe of a run; depends on the cache and the seed alone."""
    rng = np.random.default_rng([config.seed, 4])
    subjects = np.arange(len(cache.nouns) - config.holdout, len(cache.nouns))
    views = cache.images.shape[1]
    rows = np.tile(subjects, PASSES)
    target = min(2, views - 1)
    latents = torch.from_numpy(cache.latents[rows, target].astype(np.float32))
    spread = (rng.permutation(len(rows)) + 0.5) / len(rows) * train_timesteps
    return Probe(
        features=torch.from_numpy(features[subjects, 0].astype(np.float32)),
        second=torch.from_numpy(features[subjects, min(1, views - 1)].astype(np.float32)),
        another=torch.from_numpy(same_noun(cache.nouns[subjects])),
        latents=latents,
        text=captions.text(captions.subject[rows, target]),
        noise=torch.from_numpy(rng.standard_normal(latents.shape, dtype=np.float32)),
        timesteps=torch.from_numpy(spread.astype(np.int64)),
    )


def same_noun(nouns: np.ndarray) -> np.ndarray:
    """For each subject the number of the next one of its noun, or of any noun if its noun has no other."""
    following = np.roll(np.arange(len(nouns)), -1)
    for noun in np.unique(nouns):
        places = np.flatnonzero(nouns == noun)
        if len(places) > 1:
            following[places] = np.roll(places, -1)
    return following


class Monitor:
    """Measures a decoder on a probe; the base model's loss is constant and computed once.

    Args:
        image_tokens: photos' features -> tokens of the image prompt, or None without one. With another
            subject's LoRA the tokens are still the subject's own: the gap is the LoRA's alone.
    """

    def __init__(
        self,
        probe: Probe,
        unet: nn.Module,
        predict: Predict,
        scheduler: NoiseScheduler,
        chunk: int,
        image_tokens: Callable[[Tensor], Tensor | None] = lambda features: None,
    ) -> None:
        self.image_tokens = image_tokens
        self.probe = probe
        self.unet = unet
        self.predict = predict
        self.scheduler = scheduler
        self.chunk = chunk
        self.base = self.losses(None)
        self.warned = False

    @torch.no_grad()
    def losses(self, lora: Packed | None, image_tokens: Tensor | None = None) -> Tensor:
        """Loss of each row of the probe [rows].

        Args:
            lora, image_tokens: one row per subject, [H, ...].
        """
        probe, losses = self.probe, []
        for start in range(0, len(probe.latents), self.chunk):
            part = slice(start, start + self.chunk)
            latents, noise, timesteps = probe.latents[part], probe.noise[part], probe.timesteps[part]
            who = torch.arange(start, start + len(latents), device=latents.device) % len(probe.features)
            rows = None if lora is None else {name: vector[who] for name, vector in lora.items()}
            tokens = None if image_tokens is None else image_tokens[who]
            noisy = self.scheduler.add_noise(latents, noise, timesteps)
            prediction = self.predict(noisy, timesteps, probe.text[part], rows, tokens)
            losses.append(row_loss(prediction, self.scheduler.target(latents, noise, timesteps)))
        return torch.cat(losses)

    @torch.no_grad()
    def measure(self, decoder: Decoder) -> dict[str, float]:
        """The figures in the module's docstring, and the gap by thirds of the timesteps."""
        probe = self.probe
        lora = decoder(probe.features)
        tokens = self.image_tokens(probe.features)
        own = self.losses(lora, tokens)
        shuffled = self.losses({name: vector[probe.another] for name, vector in lora.items()}, tokens)
        figures = {"own": own.mean(), "shuffled": shuffled.mean(), "base": self.base.mean()}
        figures["gap"] = figures["shuffled"] - figures["own"]
        figures["gap_error"] = (shuffled - own).std() / len(own) ** 0.5
        figures["gain"] = figures["base"] - figures["own"]
        third = probe.timesteps * 3 // self.scheduler.train_timesteps
        for number, name in enumerate(("low", "middle", "high")):
            figures[f"gap_{name}_noise"] = (shuffled - own)[third == number].mean()
        figures.update(statistics(decoder, lora, decoder(probe.second), probe.another))
        figures["change"] = relative_change(decoder, self.unet, lora)
        return {name: float(value) for name, value in figures.items()}

    def warn(self, step: int, warmup: int, figures: Mapping[str, float]) -> None:
        """Logs a warning if the LoRAs have collapsed; once per run, and not before twice the warm-up."""
        alone = len(self.probe.features) < 2  # no other subject's LoRA to compare with
        if self.warned or alone or step < max(SOONEST, 2 * warmup):
            return
        if kind := collapse(figures):
            self.warned = True
            what, do = COLLAPSED[kind]
            warn(f"step {step}: {what}", _summary(figures), do)


def collapse(figures: Mapping[str, float]) -> str:
    """The kind of collapse: "zero" (no LoRA), "same" (one LoRA for all subjects), or "" without a collapse.

    Args:
        figures: of `Monitor.measure`.
    """
    if figures["gap"] > max(2 * figures["gap_error"], LEAST_GAP * figures["base"]):
        return ""
    return "zero" if figures["change"] < LEAST_CHANGE else "same"


def _summary(figures: Mapping[str, float]) -> str:
    return (
        "held-out loss {own:.5g} with a subject's LoRA, {shuffled:.5g} with another's, {base:.5g} without; "
        "gap {gap:.2g} ± {gap_error:.2g}; change of W {change:.2g}, rms {delta_rms:.2g}, |A B| {ba_norm:.2g}"
        "; cosine of subjects {cos_subjects:.3f}, of photos {cos_photos:.3f}; share of the mean "
        "{mean_share:.3f}, effective rank {effective_rank:.1f}"
    ).format_map(figures)


def statistics(decoder: Decoder, own: Packed, second: Packed, another: Tensor) -> dict[str, Tensor]:
    """Statistics of the predicted LoRAs [H, N] as vectors, without the static A0."""
    deltas = decoder.deltas(own)
    vectors = torch.cat(list(deltas.values()), 1)
    seconds = torch.cat(list(decoder.deltas(second).values()), 1)
    b_parts = [B.square().flatten(1) for _, B in unpack(decoder.layout, deltas).values()]
    mean = vectors.mean(0)
    spectrum = torch.linalg.eigvalsh((vectors - mean) @ (vectors - mean).T).clamp_min(0)
    share = spectrum / spectrum.sum().clamp_min(1e-20)
    return {
        "delta_rms": vectors.square().mean().sqrt(),
        "b_rms": torch.cat(b_parts, 1).mean().sqrt(),
        "ba_norm": product_squares(decoder.layout, own).sum(1).sqrt().mean(),
        "cos_subjects": F.cosine_similarity(vectors, vectors[another]).mean(),
        "cos_photos": F.cosine_similarity(vectors, seconds).mean(),
        "mean_share": mean.square().sum() / vectors.square().sum(1).mean().clamp_min(1e-20),
        "effective_rank": torch.exp(-(share * share.clamp_min(1e-20).log()).sum()),
    }


def relative_change(decoder: Decoder, unet: nn.Module, lora: Packed) -> Tensor:
    """Mean over sites and subjects of |A B| / |W|."""
    weights = [unet.get_submodule(site.path).weight.norm() for site in decoder.layout.sites]
    return (product_squares(decoder.layout, lora).sqrt() / torch.stack(weights)).mean()
