"""Trains an image encoder by InfoNCE (arXiv 1807.03748) on two views of each subject of a picture cache."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from hyperrt.training.data import cache as data
from hyperrt.training.model import base_model as bases
from hyperrt.training.run import device
from hyperrt.training.run.loop import Schedule, fit

TEMPERATURE = 0.07
VALIDATION = 128  # subjects at the end of a cache that pretraining never trains on


def pictures(cache: data.PictureCache, identities: Tensor, views: Tensor) -> Tensor:
    """Cached pictures as floats in [-1, 1], [n, 3, S, S], on the device that computes."""
    images = torch.from_numpy(cache.images[identities.numpy(), views.numpy()]).to(device.pick())
    return images.permute(0, 3, 1, 2).float().div(127.5).sub(1).contiguous(memory_format=torch.channels_last)


def held_out(cache: data.PictureCache, count: int, view: int) -> tuple[Tensor, Tensor]:
    """The last identities of the cache, all in one view number."""
    last = len(cache.nouns)
    return torch.arange(last - count, last), torch.full((count,), view)


def train_image_encoder(
    out: Path,
    cache: data.PictureCache,
    schedule: Schedule,
    batch: int,
    seed: int,
    encoder: nn.Module | None = None,
) -> nn.Module:
    """InfoNCE between two views of each subject; every other batch is of one noun: only identity differs.

    encoder: pixels to an output with `last_hidden_state`, whose first token counts; None: `tiny`'s.
    """
    torch.manual_seed(seed)
    encoder = (bases.tiny_image_encoder() if encoder is None else encoder).to(device.pick())
    by_noun = [np.flatnonzero(cache.nouns[:-VALIDATION] == k) for k in range(len(cache.names))]
    by_noun = [identities for identities in by_noun if len(identities) > 1]

    def loss(step: int, generator: Generator) -> Mapping[str, Tensor]:
        noun = by_noun[step // 2 % len(by_noun)] if step % 2 else np.arange(len(cache.nouns) - VALIDATION)
        who = torch.from_numpy(noun)[torch.randperm(len(noun), generator=generator)[:batch]]
        views = torch.rand(len(who), cache.shape[1], generator=generator).argsort(1)
        logits = _similarity(encoder, cache, who, views[:, 0], views[:, 1]) / TEMPERATURE
        target = torch.arange(len(who), device=logits.device)
        value = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        return {"loss": value, "top1": (logits.argmax(1) == target).float().mean()}

    @torch.no_grad()
    def report(step: int, ema: nn.Module) -> Mapping[str, float]:
        who, view = held_out(cache, VALIDATION, 0)
        found = _similarity(ema, cache, who, view, view + 1).argmax(1).cpu()
        return {"held_out_top1": (found == torch.arange(VALIDATION)).float().mean().item()}

    return fit(out, encoder, loss, schedule, seed, report)


def _similarity(
    encoder: nn.Module, cache: data.PictureCache, who: Tensor, first: Tensor, second: Tensor
) -> Tensor:
    """Cosines [n, n] between the CLS features of two views."""
    features = (
        encoder(torch.cat([pictures(cache, who, first), pictures(cache, who, second)]))
        .last_hidden_state[:, 0]
        .float()
    )
    one, other = F.normalize(features, dim=-1).chunk(2)
    return one @ other.T
