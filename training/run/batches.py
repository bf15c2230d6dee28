"""Batches that are a function of seed and step alone, so that a resumed run continues as if never stopped.

S subjects, N photos of each that the decoder sees, R target rows of each that are denoised; rows = S R.
What is random is drawn for all rows of the step, whoever computes them: a process that takes a part of the
subjects gets what one process would have had there.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from hyperrt.errors import UsageError
from hyperrt.training.data.cache import PictureCache
from hyperrt.training.data.features import CaptionTable
from hyperrt.training.messages import warn
from hyperrt.training.run.config import TrainConfig

T = TypeVar("T")


@dataclass(frozen=True)
class Batch:
    """One step's worth; everything in row order subject by subject."""

    identities: np.ndarray  # [S]
    photos: int  # N
    features: Tensor  # [S N, T, F]
    latents: Tensor  # [rows, C, h, w]
    text: Tensor  # [rows, L, D]
    generic: Tensor  # [rows, L, D] of the same pictures, without the token
    noise: Tensor  # [rows, C, h, w]
    timesteps: Tensor  # [rows]
    weight: Tensor  # [rows] of each row's loss; 0 in a prior where there is no other subject of the noun


class Batches:
    """Draws batches from the identities of a cache before its held-out ones.

    Args:
        part: of a step's subjects those that this process takes; None: all.
    """

    def __init__(
        self,
        cache: PictureCache,
        features: np.ndarray,
        captions: CaptionTable,
        config: TrainConfig,
        train_steps: int,
        part: slice | None = None,
    ) -> None:
        found = {"latents": cache.latents.shape[:2], "features": features.shape[:2]}
        if wrong := {name: shape for name, shape in found.items() if shape != cache.shape}:
            raise ValueError(f"of (identities, views) it has {wrong}, elsewhere {cache.shape}")
        self.latents, self.mirrored = cache.latents, cache.mirrored
        self.counts = cache.counts
        self.nouns = cache.nouns
        self.features = features
        self.captions = captions
        self.config = config
        self.train_steps = train_steps
        self.views = cache.images.shape[1]
        self.count = len(cache.nouns) - config.holdout
        self.subjects = config.batch // config.targets
        self.part = part or slice(0, self.subjects)
        self.rows = slice(self.part.start * config.targets, self.part.stop * config.targets)
        if self.count < 1:
            why = f"the data has {len(cache.nouns)} identities, and holdout takes {config.holdout}"
            raise UsageError("no identity is left to train on", why, "lower --holdout, or take more data")
        if config.photos > self.views:
            why = f"the data has {self.views} views of a subject"
            raise UsageError(f"photos is {config.photos}", why, f"set --photos to at most {self.views}")
        self._permutation = lru_cache(2)(self._shuffled)
        if config.gamma and config.prior == "preservation":
            self._warn_of_single_subjects()

    def _warn_of_single_subjects(self) -> None:
        subjects = np.bincount(self.nouns[: self.count])  # of each noun
        if single := int((subjects == 1).sum()):
            what = f"{single} of {self.count} subjects are the only one of their noun and get no prior"
            why = "prior preservation is the loss on other subjects of the noun; theirs counts as 0"
            warn(what, why, "set --prior matching, which needs no other subjects, or add pictures")

    @property
    def fingerprint(self) -> str:
        """Twelve hex digits that stand for the pictures and captions that are trained on."""
        digest = hashlib.sha256(repr((self.latents.shape, self.features.shape)).encode())
        for values in (self.latents, self.features, self.nouns, self.captions.subject):
            some = values[:: max(1, len(values) // 64)]
            digest.update(np.ascontiguousarray(some).tobytes())
        return digest.hexdigest()[:12]

    def at(self, step: int) -> Batch:
        """The batch of a step, numbered from 0."""
        config = self.config
        rng = np.random.default_rng([config.seed, 2, step])
        who = self.identities(step)
        photos = int(rng.integers(1, config.photos + 1))
        # Views that an identity has again come last.
        again = np.arange(self.views) >= self.counts[who, None]
        views = np.argsort(rng.random((len(who), self.views)) + again, axis=1)
        rows = np.repeat(who, config.targets)
        shown = self._target_views(rng, views, photos, self.counts[who])
        row = np.where(rng.random(len(rows)) < config.text_dropout, 0, self.captions.subject[rows, shown])
        return self._batch(rng, who, views[:, :photos], rows, shown, row)

    def prior_at(self, step: int) -> Batch:
        """For L_reg: other subjects of the same nouns, captioned without the token; rows as in `at(step)`."""
        rng = np.random.default_rng([self.config.seed, 3, step])
        who = self.identities(step)
        rows = np.repeat(who, self.config.targets)
        others = np.array([self._other(rng, row) for row in rows])
        shown = rng.integers(0, self.views, len(rows))
        batch = self._batch(
            rng, who, np.empty((len(who), 0), np.int64), others, shown, self.captions.generic[others, shown]
        )
        return dataclasses.replace(batch, weight=torch.from_numpy(others != rows)[self.rows].float())

    def _batch(
        self,
        rng: np.random.Generator,
        who: np.ndarray,
        views: np.ndarray,
        rows: np.ndarray,
        shown: np.ndarray,
        text: np.ndarray,
    ) -> Batch:
        part, own = self.part, self.rows
        latents = self._latents(rng, rows, shown)
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        noise = torch.randn((len(rows), *self.latents.shape[2:]), generator=generator)
        timesteps = spread_timesteps(rng, len(rows), self.config.noise_shift, self.train_steps)
        features = self.features[who[part, None], views[part]].reshape(-1, *self.features.shape[2:])
        generic = self.captions.generic[rows, shown]
        return Batch(
            identities=who[part],
            photos=views.shape[1],
            features=torch.from_numpy(features.astype(np.float32)),
            latents=torch.from_numpy(latents),
            text=self.captions.vectors(text[own]),
            generic=self.captions.vectors(generic[own]),
            noise=noise[own],
            timesteps=torch.from_numpy(timesteps)[own],
            weight=torch.ones(len(noise[own])),
        )

    def identities(self, step: int) -> np.ndarray:
        """The subjects of a step [S], all processes': every one once per epoch, in an order of its own."""
        epochs, places = np.divmod(np.arange(step * self.subjects, (step + 1) * self.subjects), self.count)
        return np.array(
            [self._permutation(int(epoch))[place] for epoch, place in zip(epochs, places, strict=True)]
        )

    def _shuffled(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.config.seed, 1, epoch]).permutation(self.count)

    def _latents(self, rng: np.random.Generator, rows: np.ndarray, shown: np.ndarray) -> np.ndarray:
        """This process's [rows, C, h, w]; half of them mirrored where the cache has that."""
        who, views = rows[self.rows], shown[self.rows]
        latents = self.latents[who, views].astype(np.float32)
        if self.mirrored is not None:
            turned = (rng.random(len(rows)) < 0.5)[self.rows]
            latents[turned] = self.mirrored[who[turned], views[turned]]
        return latents

    def _target_views(
        self, rng: np.random.Generator, views: np.ndarray, photos: int, counts: np.ndarray
    ) -> np.ndarray:
        """The view to denoise, [rows]: with probability `cross_view` one that the decoder does not see.

        One of the photos where a subject has no others; with a single view it is the photo itself.
        """
        shape = (len(views), self.config.targets)
        seen = rng.integers(0, photos, shape)
        if photos < self.views:
            others = np.maximum(counts - photos, 0)[:, None]
            other = photos + rng.integers(0, np.maximum(others, 1), shape)
            seen = np.where((rng.random(shape) < self.config.cross_view) & (others > 0), other, seen)
        return np.take_along_axis(views, seen, axis=1).ravel()

    def _other(self, rng: np.random.Generator, row: int) -> int:
        """Another training identity of the same noun; the same one if there is no other."""
        same = np.flatnonzero(self.nouns[: self.count] == self.nouns[row])
        others = same[same != row]
        return int(rng.choice(others)) if len(others) else int(row)


class Ahead(Generic[T]):
    """What a step needs, drawn in a thread while a GPU computes the step before.

    Args:
        draw: a function of the step alone.
    """

    def __init__(self, draw: Callable[[int], T]) -> None:
        self._draw = draw
        self._thread = ThreadPoolExecutor(1)
        self._next: tuple[int, Future[T]] | None = None

    def __call__(self, step: int) -> T:
        known = self._next
        drawn = known[1].result() if known and known[0] == step else self._draw(step)
        self._next = step + 1, self._thread.submit(self._draw, step + 1)
        return drawn

    def close(self) -> None:
        """Ends the thread; what it has drawn is dropped."""
        self._next = None
        self._thread.shutdown(wait=False, cancel_futures=True)


def spread_timesteps(rng: np.random.Generator, rows: int, shift: float, train_steps: int) -> np.ndarray:
    """Timesteps [rows], one from each of `rows` equal parts of the schedule, shuffled.

    That has less variance than free draws. A shift above 1 makes more of them noisy ones.
    """
    u = (rng.permutation(rows) + rng.random(rows)) / rows
    u = shift * u / (1 + (shift - 1) * u)
    return np.minimum((u * train_steps).astype(np.int64), train_steps - 1)
