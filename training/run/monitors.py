"""Is the hypernetwork alive? Measured on held-out subjects, with noise and timesteps that never change.

Collapse is the known failure of hypernetworks that predict LoRA: the prediction goes to zero, or becomes the
same for every subject. It shows here long before it shows in pictures:

    own, shuffled, base   loss with the subject's LoRA, with that of another subject of its noun, with none
    gap = shuffled - own  must grow; 0 means that the LoRA is not the subject's
    gap_error             one standard error of the gap, over the rows
    gain = base - own     must grow; gain without gap is a LoRA that only learned the data
    delta_rms, b_rms      of the predicted LoRA without the static A0, and of its B factors
    ba_norm               |A B| of all sites together, mean over subjects
    change                |A B| / |W|, mean over the sites
    cos_subjects          between different subjects of a noun; near 1 is a collapse
    cos_photos            between two photos of a subject; high
    mean_share            of the LoRA's square, the share that its mean over subjects explains
    effective_rank        of the LoRAs of all subjects around their mean: how many directions they use

`collapse` says when there is no gap. The shipped run (docs/log.md, "Collapse monitors") had a gap of 0.07 of
the base's loss and a change of 0.15 after 100 steps, half of its warm-up, 0.21 and 0.53 at its end. There
cos_subjects was 0.78, cos_photos 0.97 and mean_share 0.73: healthy LoRAs have much in common. So the loss
decides, and these are told with it.
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
from hyperrt.training.model.hypernet import Decoder, Packed
from hyperrt.training.model.lora_layers import unpack
from hyperrt.training.model.losses import Noising, product_squares, row_loss
from hyperrt.training.run.config import TrainConfig

Predict = Callable[
    [Tensor, Tensor, Tensor, Packed | None], Tensor
]  # x_t, timesteps, text, LoRA -> prediction

PASSES = 2  # noise draws for each held-out subject

# A gap is one from two standard errors and this share of the base's loss on; the shipped run had 35 times as
# much after 100 steps.
LEAST_GAP = 0.002
LEAST_CHANGE = 0.01  # without a gap, what is below is no LoRA; 1/15 of the shipped run's after 100 steps
SOONEST = 100  # steps before anything is said
COLLAPSED = {  # kind: what, do
    "zero": (
        "the predicted LoRAs are next to nothing",
        "lower --lambda or raise --lr; log.jsonl has the shares of the loss (reg is R(h) without lambda)",
    ),
    "one": (
        "a subject's own LoRA serves it no better than another's",
        "if the gap grows, go on; else lower --lambda, and see if the image features tell subjects apart",
    ),
}


@dataclass(frozen=True)
class Probe:
    """The held-out subjects H and their fixed denoising problems, rows = PASSES x H."""

    features: Tensor  # [H, T, F] of the photo that the LoRA is made from
    second: Tensor  # [H, T, F] of another photo
    another: Tensor  # [H] a subject of the same noun, by position
    latents: Tensor  # [rows, C, h, w] of a third picture
    text: Tensor  # [rows, L, D]
    noise: Tensor  # [rows, C, h, w]
    timesteps: Tensor  # [rows]

    def to(self, device: torch.device) -> Probe:
        """The same on a device."""
        return Probe(**{name: value.to(device) for name, value in vars(self).items()})


def probe(
    cache: PictureCache, features: np.ndarray, captions: CaptionTable, config: TrainConfig, train_steps: int
) -> Probe:
    """The probe of a run; a function of the cache and the seed."""
    rng = np.random.default_rng([config.seed, 4])
    who = np.arange(len(cache.nouns) - config.holdout, len(cache.nouns))
    views = cache.images.shape[1]
    rows = np.tile(who, PASSES)
    shown = min(2, views - 1)
    latents = torch.from_numpy(cache.latents[rows, shown].astype(np.float32))
    spread = (rng.permutation(len(rows)) + 0.5) / len(rows) * train_steps
    return Probe(
        features=torch.from_numpy(features[who, 0].astype(np.float32)),
        second=torch.from_numpy(features[who, min(1, views - 1)].astype(np.float32)),
        another=torch.from_numpy(same_noun(cache.nouns[who])),
        latents=latents,
        text=captions.vectors(captions.subject[rows, shown]),
        noise=torch.from_numpy(rng.standard_normal(latents.shape, dtype=np.float32)),
        timesteps=torch.from_numpy(spread.astype(np.int64)),
    )


def same_noun(nouns: np.ndarray) -> np.ndarray:
    """For each subject the position of the next one of its noun; of any noun where there is none."""
    following = np.roll(np.arange(len(nouns)), -1)
    for noun in np.unique(nouns):
        places = np.flatnonzero(nouns == noun)
        if len(places) > 1:
            following[places] = np.roll(places, -1)
    return following


class Monitor:
    """Measures a decoder on a probe; the base's loss does not change during a run and is computed once.

    Args:
        image: features to the image prompt that `predict` takes beside a LoRA, or nothing. It is the
            subject's own beside another's LoRA, too: the gap is the LoRA's.
    """

    def __init__(
        self,
        probe: Probe,
        unet: nn.Module,
        predict: Predict,
        noising: Noising,
        chunk: int,
        image: Callable[[Tensor], Packed] = lambda features: {},
    ) -> None:
        self.image = image
        self.probe = probe
        self.unet = unet
        self.predict = predict
        self.noising = noising
        self.chunk = chunk
        self.base = self.losses(None)
        self.warned = False

    @torch.no_grad()
    def losses(self, lora: Packed | None) -> Tensor:
        """Loss of each row of the probe [rows], given a LoRA for each subject or None."""
        probe, losses = self.probe, []
        for start in range(0, len(probe.latents), self.chunk):
            part = slice(start, start + self.chunk)
            latents, noise, timesteps = probe.latents[part], probe.noise[part], probe.timesteps[part]
            who = torch.arange(start, start + len(latents), device=latents.device) % len(probe.features)
            rows = None if lora is None else {name: vector[who] for name, vector in lora.items()}
            noised = self.noising.noised(latents, noise, timesteps)
            prediction = self.predict(noised, timesteps, probe.text[part], rows)
            losses.append(row_loss(prediction, self.noising.target(latents, noise, timesteps)))
        return torch.cat(losses)

    @torch.no_grad()
    def measure(self, decoder: Decoder) -> dict[str, float]:
        """All the figures of the module's docstring, and the gap by thirds of the timesteps."""
        probe = self.probe
        lora = decoder(probe.features)
        image = self.image(probe.features)
        own = self.losses({**lora, **image})
        others = {name: vector[probe.another] for name, vector in lora.items()}
        shuffled = self.losses({**others, **image})
        figures = {"own": own.mean(), "shuffled": shuffled.mean(), "base": self.base.mean()}
        figures["gap"] = figures["shuffled"] - figures["own"]
        figures["gap_error"] = (shuffled - own).std() / len(own) ** 0.5
        figures["gain"] = figures["base"] - figures["own"]
        third = probe.timesteps * 3 // self.noising.steps
        for number, name in enumerate(("low", "middle", "high")):
            figures[f"gap_{name}_noise"] = (shuffled - own)[third == number].mean()
        figures.update(statistics(decoder, lora, decoder(probe.second), probe.another))
        figures["change"] = relative_change(decoder, self.unet, lora)
        return {name: float(value) for name, value in figures.items()}

    def warn(self, step: int, warmup: int, figures: Mapping[str, float]) -> None:
        """Log a warning if the LoRAs have collapsed, once, from twice the warm-up on."""
        alone = len(self.probe.features) < 2  # no other subject's LoRA to compare with
        if self.warned or alone or step < max(SOONEST, 2 * warmup):
            return
        if kind := collapse(figures):
            self.warned = True
            what, do = COLLAPSED[kind]
            warn(f"step {step}: {what}", _told(figures), do)


def collapse(figures: Mapping[str, float]) -> str:
    """How the LoRAs of a decoder have collapsed: "zero", "one" for all subjects, or "" if they have not.

    Args:
        figures: of `Monitor.measure`.
    """
    if figures["gap"] > max(2 * figures["gap_error"], LEAST_GAP * figures["base"]):
        return ""
    return "zero" if figures["change"] < LEAST_CHANGE else "one"


def _told(figures: Mapping[str, float]) -> str:
    return (
        "held-out loss {own:.5g} with a subject's own, {shuffled:.5g} with another's, {base:.5g} with none; "
        "gap {gap:.2g} ± {gap_error:.2g}; change of W {change:.2g}, rms {delta_rms:.2g}, |A B| {ba_norm:.2g}"
        "; cosine of subjects {cos_subjects:.3f}, of photos {cos_photos:.3f}; share of the mean "
        "{mean_share:.3f}, effective rank {effective_rank:.1f}"
    ).format_map(figures)


def statistics(decoder: Decoder, own: Packed, second: Packed, another: Tensor) -> dict[str, Tensor]:
    """What the predicted LoRAs [H, N] look like as vectors, without the static A0."""
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
