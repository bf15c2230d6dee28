"""Seeded noise, the pictures on their way to latents, and the denoising loop.

Shapes: latents are [images, C, h, w] float32. Noise is drawn on the host, image by image, so that image k of
a call depends on `seed + k` alone: not on the batch size, the backend or the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.random import Generator, Philox
from numpy.typing import NDArray

from hyperrt.engines.dlpack import concatenate
from hyperrt.errors import UsageError
from hyperrt.sampling.solvers import SolverTable

Latents = NDArray[np.float32]
Feeds = Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Step:
    """State after a step of the loop.

    On a device the arrays are still there, and perhaps not computed yet: `numpy.asarray` waits, and copies.

    Attributes:
        index: the step that was done, from 0.
        total: number of steps.
        timestep: of the model, in training steps.
        latents: [images, C, h, w], input of the next step; those of the last step go to the decoder.
        denoised: [images, C, h, w], the clean latents as estimated at this step: what a preview shows.
    """

    index: int
    total: int
    timestep: float
    latents: Latents
    denoised: Latents


def initial_noise(seed: int, shape: Sequence[int], images: int) -> Latents:
    """Unit Gaussian noise [images, *shape]; image k is drawn from `seed + k`.

    Raises:
        UsageError: the seed is not a whole number from 0 up.
    """
    return _draw([Generator(Philox(_checked_seed(seed) + k)) for k in range(images)], shape)


def noise_generators(seed: int, images: int) -> list[Generator]:
    """The generators of the noise that a stochastic solver adds, one per image.

    Image k's is `seed + k`'s stream jumped ahead, so that no step repeats the initial noise.

    Raises:
        UsageError: the seed is not a whole number from 0 up.
    """
    return [Generator(Philox(_checked_seed(seed) + k).jumped()) for k in range(images)]


class Trajectory:
    """Pictures on their way from noise to latents, stacked along the first axis; all are at the same step.

    Args:
        table: the solver.
        latents: [images, C, h, w] to start from: `initial_noise(...) * table.initial_scale`.
        noise_rng: `noise_generators(...)`, one per image; used where `table.stochastic`.

    Attributes:
        index: the step that comes next, from 0.

    Raises:
        ValueError: the solver is stochastic, and there is not one generator per image.
    """

    def __init__(self, table: SolverTable, latents: Latents, noise_rng: Sequence[Generator] = ()) -> None:
        if table.stochastic and len(noise_rng) != len(latents):
            raise ValueError(
                f"{len(noise_rng)} noise generators for {len(latents)} images: it must be one each"
            )
        self.table = table
        self.index = 0
        self._latents: Any = np.asarray(latents, dtype=np.float32)
        self._noise_rng = list(noise_rng)
        self._previous: Any = np.zeros_like(self._latents)  # the last `denoised`
        self._noise: Latents | None = None  # of the next step, once it is drawn

    def __len__(self) -> int:
        """How many pictures there are."""
        return int(self._latents.shape[0])

    @property
    def is_done(self) -> bool:
        """Whether no step is left, or no picture."""
        return self.index == len(self.table.timesteps) or not len(self)

    def feeds(self) -> Feeds:
        """What the step graph takes for the next step; see `denoise`."""
        return {
            "latents": self._latents,
            "previous": self._previous,
            "noise": self._next_noise(),
            "timestep": np.asarray(self.table.timesteps[self.index]),
            "coefficients": self.table.coefficients[self.index],
        }

    def advance(self, outputs: Feeds) -> Step:
        """Take the outputs of the step graph; the next step starts from them."""
        self._latents, self._previous = outputs["next_latents"], outputs["denoised"]
        timestep = float(self.table.timesteps[self.index])
        step = Step(self.index, len(self.table.timesteps), timestep, self._latents, self._previous)
        self.index += 1
        if self.table.stochastic:
            self._noise = None
        return step

    def join(self, other: Trajectory) -> None:
        """Append the pictures of another trajectory, which has the same table and is at the same step."""
        self._latents = concatenate([self._latents, other._latents])
        self._previous = concatenate([self._previous, other._previous])
        if self._noise is not None:
            self._noise = np.concatenate([self._noise, other._next_noise()])
        self._noise_rng += other._noise_rng

    def drop(self, images: slice) -> None:
        """Take these pictures out."""
        kept = [slice(0, images.start), slice(images.stop, len(self))]
        kept = [part for part in kept if part.start < part.stop] or [slice(0, 0)]
        self._latents = concatenate([self._latents[part] for part in kept])
        self._previous = concatenate([self._previous[part] for part in kept])
        if self._noise is not None:
            self._noise = np.concatenate([self._noise[part] for part in kept])
        del self._noise_rng[images]

    def _next_noise(self) -> Latents:
        """The noise of the next step, drawn once: a step that failed and is tried again has the same."""
        if self._noise is None:
            shape = self._latents.shape
            stochastic = self.table.stochastic
            self._noise = _draw(self._noise_rng, shape[1:]) if stochastic else np.zeros(shape, np.float32)
        return self._noise


def denoise(step: Callable[[Feeds], Feeds], trajectory: Trajectory) -> Iterator[Step]:
    """The denoising loop: yields after every step; to cancel, stop asking for the next.

    Args:
        step: runs the step graph. It gets `latents`, `previous`, `noise`, `timestep` [] and `coefficients`
            [7] (all float32) and returns `next_latents` and `denoised`; the graph's other inputs are bound.
        trajectory: the pictures. Between two steps pictures may join it and leave it.
    """
    while not trajectory.is_done:
        yield trajectory.advance(step(trajectory.feeds()))


def _draw(generators: Sequence[Generator], shape: Sequence[int]) -> Latents:
    noise = np.empty((len(generators), *shape), dtype=np.float32)
    for generator, image in zip(generators, noise, strict=True):
        generator.standard_normal(dtype=np.float32, out=image)
    return noise


def _checked_seed(seed: int) -> int:
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or seed < 0:
        raise UsageError(
            f"seed is {seed!r}",
            "a seed is a whole number from 0 up",
            "use for example 0, or the seed of a recipe",
        )
    return int(seed)
