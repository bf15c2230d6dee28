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
from hyperrt.training.run.loop import fit
from hyperrt.training.run.optimizer import Schedule

TEMPERATURE = 0.07
VALIDATION = 128  # subjects at the end of a cache that pretraining never trains on


def pictures(cache: data.PictureCache, subjects: Tensor, views: Tensor) -> Tensor:
    """Cached pictures as floats in [-1, 1], [n, 3, S, S], on the device that computes."""
    images = torch.from_numpy(cache.images[subjects.numpy(), views.numpy()]).to(device.pick())
    return images.permute(0, 3, 1, 2).float().div(127.5).sub(1).contiguous(memory_format=torch.channels_last)


def held_out(cache: data.PictureCache, count: int, view: int) -> tuple[Tensor, Tensor]:
    """The last subjects of the cache, all in the same view."""
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
    """Minimises InfoNCE between two views of each subject; every other batch has subjects of a single noun.

    encoder: pixels to an output with `last_hidden_state`, trained on its first token; None: `tiny`'s.
    """
    torch.manual_seed(seed)
    encoder = (bases.tiny_image_encoder() if encoder is None else encoder).to(device.pick())
    by_noun = [np.flatnonzero(cache.nouns[:-VALIDATION] == k) for k in range(len(cache.names))]
    by_noun = [subjects for subjects in by_noun if len(subjects) > 1]

    def loss(step: int, generator: Generator) -> Mapping[str, Tensor]:
        among = by_noun[step // 2 % len(by_noun)] if step % 2 else np.arange(len(cache.nouns) - VALIDATION)
        subjects = torch.from_numpy(among)[torch.randperm(len(among), generator=generator)[:batch]]
        views = torch.rand(len(subjects), cache.shape[1], generator=generator).argsort(1)
        logits = _similarity(encoder, cache, subjects, views[:, 0], views[:, 1]) / TEMPERATURE
        target = torch.arange(len(subjects), device=logits.device)
        value = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        return {"loss": value, "top1": (logits.argmax(1) == target).float().mean()}

    @torch.no_grad()
    def report(step: int, ema: nn.Module) -> Mapping[str, float]:
        subjects, views = held_out(cache, VALIDATION, 0)
        nearest = _similarity(ema, cache, subjects, views, views + 1).argmax(1).cpu()
        return {"held_out_top1": (nearest == torch.arange(VALIDATION)).float().mean().item()}

    return fit(out, encoder, loss, schedule, seed, report)


def _similarity(
    encoder: nn.Module, cache: data.PictureCache, subjects: Tensor, first: Tensor, second: Tensor
) -> Tensor:
    """Cosines [n, n] between the CLS features of two views."""
    pixels = torch.cat([pictures(cache, subjects, views) for views in (first, second)])
    features = encoder(pixels).last_hidden_state[:, 0].float()
    left, right = F.normalize(features, dim=-1).chunk(2)
    return left @ right.T


