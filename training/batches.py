"""Batches that are a function of seed and step alone, so that a resumed run continues as if never stopped.

S subjects, N photos of each that the decoder sees, R target rows of each that are denoised; rows = S R.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from hyperrt.errors import UsageError
from training.config import TrainConfig
from training.data import SceneCache
from training.features import CaptionTable


@dataclass(frozen=True)
class Batch:
    """One step's worth; everything in row order subject by subject."""

    identities: np.ndarray  # [S]
    photos: int  # N
    features: Tensor  # [S N, T, F]
    latents: Tensor  # [rows, C, h, w]
    text: Tensor  # [rows, L, D]
    noise: Tensor  # [rows, C, h, w]
    timesteps: Tensor  # [rows]


class Batches:
    """Draws batches from the identities of a cache before its held-out ones."""

    def __init__(
        self,
        cache: SceneCache,
        features: np.ndarray,
        captions: CaptionTable,
        config: TrainConfig,
        train_steps: int,
    ) -> None:
        self.latents = cache.latents
        self.nouns = cache.nouns
        self.features = features
        self.captions = captions
        self.config = config
        self.train_steps = train_steps
        self.views = cache.images.shape[1]
        self.count = len(cache.nouns) - config.holdout
        self.subjects = config.batch // config.targets
        if self.count < 1:
            why = f"the cache has {len(cache.nouns)} identities, and holdout takes {config.holdout}"
            raise UsageError(
                "no identity is left to train on", why, "lower --holdout, or draw a larger cache"
            )
        if config.photos > self.views:
            why = f"the cache has {self.views} views of a subject"
            raise UsageError(f"photos is {config.photos}", why, f"set --photos to at most {self.views}")
        self._permutation = lru_cache(2)(self._shuffled)

    def at(self, step: int) -> Batch:
        """The batch of a step, numbered from 0."""
        config = self.config
        rng = np.random.default_rng([config.seed, 2, step])
        who = self._identities(step)
        photos = int(rng.integers(1, config.photos + 1))
        views = np.argsort(rng.random((len(who), self.views)), axis=1)
        rows = np.repeat(who, config.targets)
        shown = self._target_views(rng, views, photos)
        row = np.where(rng.random(len(rows)) < config.text_dropout, 0, self.captions.subject[rows, shown])
        return self._batch(rng, who, views[:, :photos], rows, shown, row)

    def prior_at(self, step: int) -> Batch:
        """For L_reg: other subjects of the same nouns, captioned without the token; rows as in `at(step)`."""
        rng = np.random.default_rng([self.config.seed, 3, step])
        who = self._identities(step)
        rows = np.repeat(who, self.config.targets)
        others = np.array([self._other(rng, row) for row in rows])
        shown = rng.integers(0, self.views, len(rows))
        return self._batch(
            rng, who, np.empty((len(who), 0), np.int64), others, shown, self.captions.generic[others, shown]
        )

    def _batch(
        self,
        rng: np.random.Generator,
        who: np.ndarray,
        views: np.ndarray,
        rows: np.ndarray,
        shown: np.ndarray,
        text: np.ndarray,
    ) -> Batch:
        latents = torch.from_numpy(self.latents[rows, shown].astype(np.float32))
        features = self.features[who[:, None], views].reshape(-1, *self.features.shape[2:])
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        return Batch(
            identities=who,
            photos=views.shape[1],
            features=torch.from_numpy(features.astype(np.float32)),
            latents=latents,
            text=self.captions.hidden[torch.from_numpy(text).to(self.captions.hidden.device)],
            noise=torch.randn(latents.shape, generator=generator),
            timesteps=torch.from_numpy(self._timesteps(rng, len(rows))),
        )

    def _identities(self, step: int) -> np.ndarray:
        """Every identity once per epoch, in an order of the epoch's own."""
        epochs, places = np.divmod(np.arange(step * self.subjects, (step + 1) * self.subjects), self.count)
        return np.array(
            [self._permutation(int(epoch))[place] for epoch, place in zip(epochs, places, strict=True)]
        )

    def _shuffled(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.config.seed, 1, epoch]).permutation(self.count)

    def _target_views(self, rng: np.random.Generator, views: np.ndarray, photos: int) -> np.ndarray:
        """The view to denoise, [rows]: with probability `cross_view` one that the decoder does not see."""
        shape = (len(views), self.config.targets)
        seen = rng.integers(0, photos, shape)
        if photos < self.views:
            other = rng.integers(photos, self.views, shape)
            seen = np.where(rng.random(shape) < self.config.cross_view, other, seen)
        return np.take_along_axis(views, seen, axis=1).ravel()

    def _other(self, rng: np.random.Generator, row: int) -> int:
        """Another training identity of the same noun; the same one if there is no other."""
        same = np.flatnonzero(self.nouns[: self.count] == self.nouns[row])
        others = same[same != row]
        return int(rng.choice(others)) if len(others) else int(row)

    def _timesteps(self, rng: np.random.Generator, rows: int) -> np.ndarray:
        return spread_timesteps(rng, rows, self.config.noise_shift, self.train_steps)


def spread_timesteps(rng: np.random.Generator, rows: int, shift: float, train_steps: int) -> np.ndarray:
    """Timesteps [rows], one from each of `rows` equal parts of the schedule, shuffled.

    That has less variance than free draws. A shift above 1 makes more of them noisy ones.
    """
    u = (rng.permutation(rows) + rng.random(rows)) / rows
    u = shift * u / (1 + (shift - 1) * u)
    return np.minimum((u * train_steps).astype(np.int64), train_steps - 1)
