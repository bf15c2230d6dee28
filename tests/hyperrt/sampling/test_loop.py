"""The loop, and noise that depends on the seed alone."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from hyperrt.errors import UsageError
from hyperrt.sampling import solvers
from hyperrt.sampling.loop import Trajectory, denoise, initial_noise, noise_generators
from hyperrt.sampling.options import SOLVER_NAMES

SCHEDULE = solvers.NoiseSchedule.named("scaled_linear", 0.00085, 0.012)
SHAPE = (4, 8, 8)


def table(solver="ddim", steps=5):
    return solvers.table(solver, SCHEDULE, steps, "epsilon")


def graph(feeds):
    """A step graph whose model sees every pixel alone: output = tanh(input)."""
    output = np.tanh(feeds["latents"] * feeds["coefficients"][0])
    return dict(
        zip(
            ("next_latents", "denoised"),
            solvers.apply(feeds["coefficients"], feeds["latents"], output, feeds["previous"], feeds["noise"]),
            strict=True,
        )
    )


def sample(seed, images, solver="ddim"):
    noise = initial_noise(seed, SHAPE, images)
    loop = denoise(graph, Trajectory(table(solver), noise, noise_generators(seed, images)))
    return list(loop)[-1].latents


def test_noise_is_unit_gaussian_and_float32():
    noise = initial_noise(0, (4, 64, 64), 8)
    assert noise.dtype == np.float32
    assert noise.shape == (8, 4, 64, 64)
    assert abs(noise.mean()) < 0.01 and abs(noise.std() - 1) < 0.01


def test_the_noise_of_a_seed_never_changes():
    """Old recipes hold as long as these numbers do."""
    drawn = initial_noise(42, (3,), 2)
    pinned = [[-1.4838411, -0.3366286, 0.2008333], [-1.6838605, 0.4220045, -1.3301657]]
    np.testing.assert_allclose(drawn, pinned, rtol=1e-6)


def test_image_k_uses_seed_plus_k():
    several = initial_noise(7, SHAPE, 4)
    alone = np.concatenate([initial_noise(7 + k, SHAPE, 1) for k in range(4)])
    np.testing.assert_array_equal(several, alone)


@pytest.mark.parametrize("solver", sorted(SOLVER_NAMES))
def test_a_picture_has_the_same_bits_alone_and_in_a_batch(solver):
    batch = sample(3, 4, solver)
    for k in range(4):
        np.testing.assert_array_equal(batch[k], sample(3 + k, 1, solver)[0])


def test_noise_of_the_steps_repeats_neither_the_initial_noise_nor_itself():
    (generator,) = noise_generators(0, 1)
    draws = [
        initial_noise(0, SHAPE, 1)[0],
        *(generator.standard_normal(SHAPE, np.float32) for _ in range(3)),
    ]
    for k, one in enumerate(draws):
        for other in draws[:k]:
            assert abs(np.corrcoef(one.ravel(), other.ravel())[0, 1]) < 0.3


@pytest.mark.parametrize("seed", [-1, 1.5, True, "3", None])
def test_a_seed_that_is_no_whole_number_is_refused(seed):
    with pytest.raises(UsageError, match="seed is"):
        initial_noise(seed, SHAPE, 1)
    with pytest.raises(UsageError, match="seed is"):
        noise_generators(seed, 1)


@pytest.mark.parametrize("seed", [0, np.int64(5), 2**63 - 1, 2**64])
def test_zero_and_large_seeds_are_seeds(seed):
    assert np.isfinite(initial_noise(seed, SHAPE, 1)).all()


def test_every_step_is_yielded_with_its_number():
    steps = list(denoise(graph, Trajectory(table(steps=5), initial_noise(0, SHAPE, 1), [])))
    assert [(step.index, step.total) for step in steps] == [(k, 5) for k in range(5)]
    assert [step.timestep for step in steps] == table(steps=5).timesteps.tolist()


def test_the_graph_gets_the_last_denoised_as_previous_and_zeros_first():
    seen = []

    def watched(feeds):
        outputs = graph(feeds)
        seen.append((feeds["previous"], outputs["denoised"]))
        return outputs

    list(denoise(watched, Trajectory(table("dpmpp_2m"), initial_noise(0, SHAPE, 1), [])))
    assert not seen[0][0].any()
    for (_, denoised), (previous, _) in pairwise(seen):
        np.testing.assert_array_equal(previous, denoised)


def test_feeds_are_what_the_denoiser_graph_takes():
    def checked(feeds):
        shapes = {name: array.shape for name, array in feeds.items()}
        assert shapes == {
            "latents": (2, *SHAPE),
            "previous": (2, *SHAPE),
            "noise": (2, *SHAPE),
            "timestep": (),
            "coefficients": (7,),
        }
        assert {array.dtype for array in feeds.values()} == {np.dtype(np.float32)}
        return graph(feeds)

    noise = initial_noise(0, SHAPE, 2).astype(np.float64)  # whatever comes in
    assert len(list(denoise(checked, Trajectory(table(steps=2), noise, [])))) == 2


def test_stopping_asks_for_no_further_step():
    calls = []

    def counted(feeds):
        calls.append(1)
        return graph(feeds)

    loop = denoise(counted, Trajectory(table(steps=5), initial_noise(0, SHAPE, 1), []))
    next(loop)
    next(loop)
    loop.close()
    assert len(calls) == 2


def test_noise_is_fed_only_to_a_stochastic_solver():
    fed = {}
    for solver in ("euler", "euler_ancestral"):

        def watched(feeds, solver=solver):
            fed.setdefault(solver, feeds["noise"])
            return graph(feeds)

        noise = initial_noise(0, SHAPE, 1)
        list(denoise(watched, Trajectory(table(solver), noise, noise_generators(0, 1))))
    assert not fed["euler"].any()
    assert fed["euler_ancestral"].any()


def test_a_stochastic_solver_wants_one_generator_per_image():
    noise = initial_noise(0, SHAPE, 2)
    with pytest.raises(ValueError, match="generator"):
        next(denoise(graph, Trajectory(table("euler_ancestral"), noise, noise_generators(0, 1))))


def started(seed, images, solver="ddim"):
    noise = initial_noise(seed, SHAPE, images)
    return Trajectory(table(solver), noise, noise_generators(seed, images))


@pytest.mark.parametrize("solver", ["dpmpp_2m", "euler_ancestral"])
def test_pictures_that_join_and_leave_have_the_latents_of_their_own_loop(solver):
    together = started(1, 2, solver)
    together.join(started(7, 3, solver))
    for step in denoise(graph, together):
        if step.index == 2:
            together.drop(slice(1, 3))
    *_, first = denoise(graph, started(1, 2, solver))
    *_, second = denoise(graph, started(7, 3, solver))
    expected = np.concatenate([first.latents[:1], second.latents[1:]])
    np.testing.assert_allclose(step.latents, expected, rtol=1e-6, atol=1e-7)


def test_a_trajectory_without_pictures_is_done():
    trajectory = started(0, 2)
    trajectory.drop(slice(0, 2))
    assert not len(trajectory) and trajectory.is_done and list(denoise(graph, trajectory)) == []


@pytest.mark.parametrize("solver", ["ddim", "euler_ancestral"])
def test_a_step_that_failed_and_is_tried_again_changes_nothing(solver):
    failures = iter([False, False, True, False, True])

    def unsteady(feeds):
        if next(failures, False):
            raise RuntimeError
        return graph(feeds)

    trajectory = started(3, 2, solver)
    while not trajectory.is_done:
        try:
            for step in denoise(unsteady, trajectory):
                latents = step.latents
        except RuntimeError:
            continue
    *_, expected = denoise(graph, started(3, 2, solver))
    np.testing.assert_array_equal(latents, expected.latents)
