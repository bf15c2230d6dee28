"""Sampling: seeded noise and the one denoising loop.

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

from hyperrt.errors import UsageError
from hyperrt.sampling.solvers import SolverTable

Latents = NDArray[np.float32]
Feeds = Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Step:
    """State after a step of the loop.

    On a device the arrays are still there, and perhaps not computed yet: `numpy.asarray` waits, and copies.

    Attributes:
        index: the step that was just done, from 0.
        total: how many steps there are.
        timestep: what the model was told, in training steps.
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
    return _draw([Generator(Philox(_checked(seed) + k)) for k in range(images)], shape)


def noise_generators(seed: int, images: int) -> list[Generator]:
    """The generators of the noise that a stochastic solver adds, one per image.

    Image k's is `seed + k`'s stream jumped ahead, so that no step repeats the initial noise.

    Raises:
        UsageError: the seed is not a whole number from 0 up.
    """
    return [Generator(Philox(_checked(seed) + k).jumped()) for k in range(images)]


def denoise(
    step: Callable[[Feeds], Feeds], table: SolverTable, latents: Latents, noise_rng: Sequence[Generator]
) -> Iterator[Step]:
    """The denoising loop: yields after every step; to cancel, stop asking for the next.

    Args:
        step: runs the step graph. It gets `latents`, `previous`, `noise`, `timestep` [] and `coefficients`
            [7] (all float32) and returns `next_latents` and `denoised`; what else the graph takes is bound.
        table: the solver.
        latents: [images, C, h, w] to start from: `initial_noise(...) * table.initial_scale`.
        noise_rng: `noise_generators(...)`, one per image; used where `table.stochastic`.

    Raises:
        ValueError: a stochastic solver, and not one generator per image.
    """
    if table.stochastic and len(noise_rng) != len(latents):
        raise ValueError(f"{len(noise_rng)} noise generators for {len(latents)} images: it must be one each")
    latents = np.asarray(latents, dtype=np.float32)
    denoised = noise = np.zeros_like(latents)
    total = len(table.timesteps)
    for index, (timestep, coefficients) in enumerate(zip(table.timesteps, table.coefficients, strict=True)):
        if table.stochastic:
            noise = _draw(noise_rng, latents.shape[1:])
        outputs = step(
            {
                "latents": latents,
                "previous": denoised,
                "noise": noise,
                "timestep": np.asarray(timestep),
                "coefficients": coefficients,
            }
        )
        latents, denoised = outputs["next_latents"], outputs["denoised"]
        yield Step(index, total, float(timestep), latents, denoised)


def _draw(generators: Sequence[Generator], shape: Sequence[int]) -> Latents:
    noise = np.empty((len(generators), *shape), dtype=np.float32)
    for generator, image in zip(generators, noise, strict=True):
        generator.standard_normal(dtype=np.float32, out=image)
    return noise


def _checked(seed: int) -> int:
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or seed < 0:
        raise UsageError(
            f"seed is {seed!r}",
            "a seed is a whole number from 0 up",
            "use for example 0, or the seed of a recipe",
        )
    return int(seed)
