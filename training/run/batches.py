"""Batches that depend on seed and step alone, so that a resumed run continues as if never stopped.

S subjects; N photos of each, which the decoder sees; R target rows of each, which are denoised; rows = S R.
Random numbers are drawn for all rows of the step in every process: a process that computes some of the
subjects gets the rows that a single process would have there.
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
from hyperrt.training.model.encode import Text
from hyperrt.training.run.config import TrainConfig

T = TypeVar("T")


@dataclass(frozen=True)
class Batch:
    """The data of one step, subject by subject."""

    subjects: np.ndarray  # [S], numbers in the cache
    photos: int  # N
    features: Tensor  # [S N, T, F]
    latents: Tensor  # [rows, C, h, w]
    text: Text  # of the rows
    generic: Text  # of the same pictures, without the token
    noise: Tensor  # [rows, C, h, w]
    timesteps: Tensor  # [rows]
    weight: Tensor  # [rows], factor of each row's loss; 0 in a prior if the noun has no other subject


class Batches:
    """Draws batches from the subjects of a cache, without the held-out ones at its end.

    Args:
        features: of every picture, (N, V, T, F).
        train_timesteps: of the noise schedule.
        part: this process's part of a step's subjects; None: all.

    Raises:
        UsageError: the cache has too few subjects or views.
        ValueError: latents or features are not one per picture.
    """

    def __init__(
        self,
        cache: PictureCache,
        features: np.ndarray,
        captions: CaptionTable,
        config: TrainConfig,
        train_timesteps: int,
        part: slice | None = None,
    ) -> None:
        shapes = {"latents": cache.latents.shape[:2], "features": features.shape[:2]}
        if wrong := {name: shape for name, shape in shapes.items() if shape != cache.shape}:
            raise ValueError(f"the cache has (subjects, views) {cache.shape}, but its {wrong}")
        self.latents, self.mirrored = cache.latents, cache.mirrored
        self.counts = cache.counts
        self.nouns = cache.nouns
        self.features = features
        self.captions = captions
        self.config = config
        self.train_timesteps = train_timesteps
        self.views = cache.images.shape[1]
        self.count = len(cache.nouns) - config.holdout
        self.per_step = config.batch_size // config.targets
        self.part = part or slice(0, self.per_step)
        self.rows = slice(self.part.start * config.targets, self.part.stop * config.targets)
        if self.count < 1:
            why = f"the data has {len(cache.nouns)} subjects, and holdout takes {config.holdout}"
            raise UsageError("no subject is left to train on", why, "lower --holdout, or add data")
        if config.photos > self.views:
            why = f"the data has {self.views} views of a subject"
            raise UsageError(f"photos is {config.photos}", why, f"set --photos to at most {self.views}")
        self._permutation = lru_cache(2)(self._shuffled)
        if config.gamma and config.prior == "preservation":
            self._warn_of_single_subjects()

    def _warn_of_single_subjects(self) -> None:
        per_noun = np.bincount(self.nouns[: self.count])
        if single := int((per_noun == 1).sum()):
            what = f"{single} of {self.count} subjects are the only one of their noun and get no prior"
            why = "prior preservation is the loss on other subjects of the noun; without any it counts as 0"
            warn(what, why, "set --prior matching, which needs no other subjects, or add pictures")

    @property
    def fingerprint(self) -> str:
        """Twelve hex digits that identify the pictures and captions."""
        digest = hashlib.sha256(repr((self.latents.shape, self.features.shape)).encode())
        for values in (self.latents, self.features, self.nouns, self.captions.subject):
            some = values[:: max(1, len(values) // 64)]
            digest.update(np.ascontiguousarray(some).tobytes())
        return digest.hexdigest()[:12]

    def with_prior(self, step: int) -> tuple[Batch, Batch | None]:
        """The rows of L_FT, and those of L_reg (None for γ = 0).

        For prior matching the rows of L_reg are the same ones, without the token.
        """
        batch = self.at(step)
        if not self.config.gamma:
            return batch, None
        if self.config.prior == "matching":
            return batch, dataclasses.replace(batch, text=batch.generic)
        return batch, self.prior_at(step)

    def at(self, step: int) -> Batch:
        """The batch of a step, numbered from 0."""
        config = self.config
        rng = np.random.default_rng([config.seed, 2, step])
        subjects = self.subjects(step)
        photos = int(rng.integers(1, config.photos + 1))
        # Repeated views of a subject with fewer pictures come last.
        repeated = np.arange(self.views) >= self.counts[subjects, None]
        views = np.argsort(rng.random((len(subjects), self.views)) + repeated, axis=1)
        rows = np.repeat(subjects, config.targets)
        target_views = self._target_views(rng, views, photos, self.counts[subjects])
        dropped = rng.random(len(rows)) < config.text_dropout
        captions = np.where(dropped, 0, self.captions.subject[rows, target_views])
        return self._batch(rng, subjects, views[:, :photos], rows, target_views, captions)

    def prior_at(self, step: int) -> Batch:
        """For L_reg: other subjects of the same nouns, captions without the token; rows as in `at(step)`."""
        rng = np.random.default_rng([self.config.seed, 3, step])
        subjects = self.subjects(step)
        rows = np.repeat(subjects, self.config.targets)
        others = np.array([self._other(rng, row) for row in rows])
        views = rng.integers(0, self.views, len(rows))
        no_photos = np.empty((len(subjects), 0), np.int64)
        captions = self.captions.generic[others, views]
        batch = self._batch(rng, subjects, no_photos, others, views, captions)
        return dataclasses.replace(batch, weight=torch.from_numpy(others != rows)[self.rows].float())

    def _batch(
        self,
        rng: np.random.Generator,
        subjects: np.ndarray,
        photos: np.ndarray,
        rows: np.ndarray,
        views: np.ndarray,
        captions: np.ndarray,
    ) -> Batch:
        """This process's part of a batch.

        Args:
            photos: views that the decoder sees [S, N].
            rows, views, captions: subject, view and caption of each row [rows].
        """
        part, own = self.part, self.rows
        latents = self._latents(rng, rows, views)
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        noise = torch.randn((len(rows), *self.latents.shape[2:]), generator=generator)
        timesteps = spread_timesteps(rng, len(rows), self.config.noise_shift, self.train_timesteps)
        features = self.features[subjects[part, None], photos[part]].reshape(-1, *self.features.shape[2:])
        return Batch(
            subjects=subjects[part],
            photos=photos.shape[1],
            features=torch.from_numpy(features.astype(np.float32)),
            latents=torch.from_numpy(latents),
            text=self.captions.text(captions[own]),
            generic=self.captions.text(self.captions.generic[rows, views][own]),
            noise=noise[own],
            timesteps=torch.from_numpy(timesteps)[own],
            weight=torch.ones(len(noise[own])),
        )

    def subjects(self, step: int) -> np.ndarray:
        """The subjects of a step [S] in all processes: each once per epoch, in an order of that epoch."""
        places = np.arange(step * self.per_step, (step + 1) * self.per_step)
        epochs, places = np.divmod(places, self.count)
        return np.array(
            [self._permutation(int(epoch))[place] for epoch, place in zip(epochs, places, strict=True)]
        )

    def _shuffled(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.config.seed, 1, epoch]).permutation(self.count)

    def _latents(self, rng: np.random.Generator, rows: np.ndarray, views: np.ndarray) -> np.ndarray:
        """This process's latents [rows, C, h, w]; half of them mirrored if the cache has mirrored ones."""
        subjects, views = rows[self.rows], views[self.rows]
        latents = self.latents[subjects, views].astype(np.float32)
        if self.mirrored is not None:
            flipped = (rng.random(len(rows)) < 0.5)[self.rows]
            latents[flipped] = self.mirrored[subjects[flipped], views[flipped]]
        return latents

    def _target_views(
        self, rng: np.random.Generator, views: np.ndarray, photos: int, counts: np.ndarray
    ) -> np.ndarray:
        """The view to denoise, [rows]: with probability `cross_view` one that the decoder does not see.

        A subject without other views gets one of the photos.
        """
        shape = (len(views), self.config.targets)
        place = rng.integers(0, photos, shape)
        if photos < self.views:
            others = np.maximum(counts - photos, 0)[:, None]
            other = photos + rng.integers(0, np.maximum(others, 1), shape)
            place = np.where((rng.random(shape) < self.config.cross_view) & (others > 0), other, place)
        return np.take_along_axis(views, place, axis=1).ravel()

    def _other(self, rng: np.random.Generator, subject: int) -> int:
        """Another training subject of the same noun; the subject itself if there is no other."""
        same = np.flatnonzero(self.nouns[: self.count] == self.nouns[subject])
        others = same[same != subject]
        return int(rng.choice(others)) if len(others) else int(subject)


class Ahead(Generic[T]):
    """Draws the next step's data in a thread while a GPU computes the present step.

    Args:
        draw: a function of the step alone.
    """

    def __init__(self, draw: Callable[[int], T]) -> None:
        self._draw = draw
        self._thread = ThreadPoolExecutor(1)
        self._next: tuple[int, Future[T]] | None = None

    def __call__(self, step: int) -> T:
        """The data of a step."""
        if self._next is not None and self._next[0] == step:
            drawn = self._next[1].result()
        else:
            drawn = self._draw(step)
        self._next = step + 1, self._thread.submit(self._draw, step + 1)
        return drawn

    def close(self) -> None:
        """Ends the thread and drops its data."""
        self._next = None
        self._thread.shutdown(wait=False, cancel_futures=True)


def spread_timesteps(rng: np.random.Generator, rows: int, shift: float, train_timesteps: int) -> np.ndarray:
    """Timesteps [rows], one from each of `rows` equal parts of the schedule, shuffled.

    They vary less than independent draws. A shift above 1 makes more of them noisy ones.
    """
    u = (rng.permutation(rows) + rng.random(rows)) / rows
    u = shift * u / (1 + (shift - 1) * u)
    return np.minimum((u * train_timesteps).astype(np.int64), train_timesteps - 1)
