"""Does the monitor tell a decoder that lives from two that collapsed? All three are trained here, on a toy.

A subject is a vector that its photos show with noise, and the latents of its pictures are that vector. The
"UNet" is W_q x + W_k text with a LoRA on both, so that a LoRA can name the subject, or what all have in
common.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from torch import nn

from hyperrt.lora.layout import LoraLayout, Site
from hyperrt.training.model.decoder_config import DecoderConfig
from hyperrt.training.model.hypernet import WeightDecoder
from hyperrt.training.model.lora_layers import layout_of, unpack
from hyperrt.training.model.losses import NoiseScheduler, Regulariser, row_loss
from hyperrt.training.run import monitors
from hyperrt.training.run.optimizer import Optimizer, Schedule

LAYOUT = LoraLayout((Site("attn.to_q", 8, 8), Site("attn.to_k", 4, 8)), rank=2)
CONFIG = DecoderConfig(dim=16, layers=1, iterations=1, head_dim=0)
SUBJECTS, HELD_OUT, ROWS, STEPS, WARMUP = 256, 16, 32, monitors.SOONEST, 10
# docs/log.md, "Collapse monitors", after 100 steps; its standard error was not kept
EARLY = {"base": 0.1552, "gap": 0.011, "gap_error": 0.001, "change": 0.15}


class Toy(nn.Module):
    """W_q x + W_k text; frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.Module()
        self.attn.to_q = nn.Linear(8, 8, bias=False)
        self.attn.to_k = nn.Linear(4, 8, bias=False)
        self.requires_grad_(False)

    def predict(self, latents, timesteps, text, lora, image_tokens=None):
        x = latents.flatten(1)[:, None]
        y = self.attn.to_q(x) + self.attn.to_k(text)
        if lora is not None:
            factors = unpack(LAYOUT, lora)
            y = y + sum(h @ A @ B for h, (A, B) in zip((x, text), factors.values(), strict=True))
        return y.reshape(latents.shape)


class Blind(WeightDecoder):
    """Its LoRA is the same for all photos."""

    def encode(self, features):
        return super().encode(torch.zeros_like(features))


class World:
    """Subjects, their photos, and the denoising problems that a step draws."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.subjects = torch.randn(SUBJECTS, 8) + 1.0
        self.scheduler = NoiseScheduler(DDIMScheduler(prediction_type="sample"))
        self.unet = Toy()

    def photos(self, who):
        return (self.subjects[who] + 0.1 * torch.randn(len(who), 8))[:, None]

    def problem(self, who):
        """latents, text, noise, timesteps of pictures of these subjects."""
        latents = self.subjects[who].reshape(-1, 8, 1, 1)
        return (
            latents,
            torch.ones(len(who), 1, 4),
            torch.randn_like(latents),
            torch.randint(1000, (len(who),)),
        )

    def loss(self, decoder, regulariser, lambda_):
        who = torch.randint(SUBJECTS - HELD_OUT, (ROWS,))
        latents, text, noise, timesteps = self.problem(who)
        lora = decoder(self.photos(who))
        noised = self.scheduler.add_noise(latents, noise, timesteps)
        ft = row_loss(self.unet.predict(noised, timesteps, text, lora), latents).mean()
        return {"loss": ft + lambda_ * regulariser(lora, decoder.deltas(lora))}

    def monitor(self, held_out=HELD_OUT):
        who = torch.arange(SUBJECTS - held_out, SUBJECTS)
        latents, text, noise, timesteps = self.problem(who.repeat(monitors.PASSES))
        another = torch.roll(torch.arange(held_out), 1)
        probe = monitors.Probe(self.photos(who), self.photos(who), another, latents, text, noise, timesteps)
        return monitors.Monitor(probe, self.unet, self.unet.predict, self.scheduler, chunk=8)


def trained(kind, lambda_):
    """The monitor, and what it measures of a decoder after STEPS steps."""
    world = World()
    decoder = kind(LAYOUT, 8, CONFIG)
    optimizer = Optimizer(decoder, Schedule(steps=STEPS, lr=0.01, warmup=WARMUP))
    regulariser = Regulariser(LAYOUT, "mean")
    for step in range(STEPS):
        optimizer.step(step, world.loss(decoder, regulariser, lambda_))
    watch = world.monitor()
    return watch, watch.measure(optimizer.ema)


@pytest.mark.parametrize(
    ("kind", "lambda_", "collapsed"),
    [(WeightDecoder, 1e-3, ""), (Blind, 1e-3, "same"), (WeightDecoder, 1e6, "zero")],
    ids=["healthy", "ignores its photos", "pulled to zero"],
)
def test_a_collapsed_decoder_is_warned_about_once_and_a_healthy_one_not(kind, lambda_, collapsed, caplog):
    watch, figures = trained(kind, lambda_)
    assert monitors.collapse(figures) == collapsed
    watch.warn(STEPS, WARMUP, figures)
    watch.warn(STEPS + 1, WARMUP, figures)
    assert len(caplog.messages) == bool(collapsed)
    for message in caplog.messages:
        what, why, do = message.split("\n")
        assert what == f"step {STEPS}: {monitors.COLLAPSED[collapsed][0]}"
        assert f"{figures['own']:.5g} with a subject's LoRA" in why and "cosine of subjects" in why
        assert "lower --lambda" in do


@pytest.mark.parametrize(
    ("changed", "collapsed"),
    [
        ({}, ""),
        ({"gap": 0.0003}, "same"),
        ({"gap_error": 0.006}, "same"),
        ({"gap": -0.01}, "same"),
        ({"gap": 0.0, "gap_error": 0.0}, "same"),
        ({"gap": 0.0, "gap_error": 0.0, "change": 1e-4}, "zero"),
        ({"change": 1e-4}, ""),
    ],
    ids=["early", "small", "within its error", "negative", "none", "nothing at all", "small but telling"],
)
def test_the_gap_decides_and_the_change_says_which_collapse_it_is(changed, collapsed):
    assert monitors.collapse({**EARLY, **changed}) == collapsed


@pytest.mark.parametrize(
    ("step", "warmup", "warned"), [(99, 0, 0), (100, 0, 1), (399, 200, 0), (400, 200, 1)]
)
def test_nothing_is_said_before_a_run_has_begun_to_learn(step, warmup, warned, caplog):
    watch = World().monitor()
    figures = watch.measure(WeightDecoder(LAYOUT, 8, CONFIG))
    assert monitors.collapse(figures) == "zero"
    watch.warn(step, warmup, figures)
    assert len(caplog.messages) == warned


def test_the_norm_of_the_products_is_that_of_the_products_written_out():
    torch.manual_seed(0)
    decoder = WeightDecoder(LAYOUT, 8, CONFIG)
    lora = {name: torch.randn(5, LAYOUT.size(name)) for name in ("lora_q", "lora_kv")}
    norms = torch.cat([(A @ B).flatten(1) for A, B in unpack(LAYOUT, lora).values()], 1).norm(dim=1)
    found = monitors.statistics(decoder, lora, lora, torch.roll(torch.arange(5), 1))
    torch.testing.assert_close(found["ba_norm"], norms.mean())


def test_of_one_held_out_subject_nothing_can_be_said(caplog):
    watch = World().monitor(held_out=1)
    watch.warn(1000, 0, watch.measure(WeightDecoder(LAYOUT, 8, CONFIG)))
    assert not caplog.messages


def test_another_subject_has_the_same_noun_where_there_is_one():
    nouns = np.array([0, 1, 0, 2, 1, 0])
    following = monitors.same_noun(nouns)
    assert following.tolist()[:3] == [2, 4, 5]
    assert (nouns[following[:3]] == nouns[:3]).all()
    assert (following != np.arange(6)).all()


def test_the_relative_change_is_that_of_the_products(parts):
    from hyperrt.training.model.hypernet import WeightDecoder
    from hyperrt.training.model.lora_layers import unpack

    decoder = WeightDecoder(layout_of(parts.unet, 2), 4, DecoderConfig(dim=16, layers=1))
    lora = {name: torch.randn(3, decoder.layout.size(name)) for name in ("lora_q", "lora_kv")}
    ratios = [
        (A @ B).flatten(1).norm(dim=1).mean() / parts.unet.get_submodule(path).weight.norm()
        for path, (A, B) in unpack(decoder.layout, lora).items()
    ]
    torch.testing.assert_close(
        monitors.relative_change(decoder, parts.unet, lora), torch.stack(ratios).mean()
    )
