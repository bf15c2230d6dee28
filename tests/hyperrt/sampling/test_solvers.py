"""Solver tables: against diffusers' schedulers where it is installed, and by what must hold without it."""

from __future__ import annotations

import numpy as np
import pytest

from hyperrt.errors import UsageError
from hyperrt.sampling import solvers
from hyperrt.sampling.loop import initial_noise
from hyperrt.sampling.options import SOLVER_NAMES
from hyperrt.sampling.solvers import NoiseSchedule

SHAPE = (4, 8, 8)
BETAS = {"schedule": "scaled_linear", "start": 0.00085, "end": 0.012, "steps": 1000}
SCHEDULE = NoiseSchedule.named(**BETAS)
SOLVERS = sorted(SOLVER_NAMES)
PREDICTION_TYPES = sorted(solvers.PREDICTION_TYPES)
CLASSES = {
    "ddim": "DDIMScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler_ancestral": "EulerAncestralDiscreteScheduler",
    "dpmpp_2m": "DPMSolverMultistepScheduler",
}
STABLE_DIFFUSION = {
    "ddim": {"clip_sample": False, "set_alpha_to_one": False},
    "dpmpp_2m": {
        "algorithm_type": "dpmsolver++",
        "solver_order": 2,
        "solver_type": "midpoint",
        "lower_order_final": True,
    },
}


def model(latents, timestep):
    """Stands for a model: smooth, not linear, and of another answer at every timestep."""
    return np.tanh(latents * (1 + float(timestep) / 1000)) + 0.1 * np.roll(latents, 1, axis=-1)


def run(table, predict=model, seed=0):
    """Latents and denoised of every step, in float64; the noise of step k has seed 100 + k."""
    latents = initial_noise(seed, SHAPE, 1).astype(np.float64) * table.initial_scale
    denoised, history = np.zeros_like(latents), []
    for index, (timestep, row) in enumerate(zip(table.timesteps, table.coefficients, strict=True)):
        noise = initial_noise(100 + index, SHAPE, 1) * table.stochastic
        output = predict(latents * row[0], timestep)
        latents, denoised = solvers.apply(row, latents, output, denoised, noise)
        history.append((latents, denoised))
    return history


def scheduler_of(solver, prediction_type, schedule="scaled_linear", spacing="leading"):
    diffusers = pytest.importorskip("diffusers")
    return getattr(diffusers, CLASSES[solver])(
        beta_schedule=schedule,
        beta_start=BETAS["start"],
        beta_end=BETAS["end"],
        prediction_type=prediction_type,
        timestep_spacing=spacing,
        steps_offset=1,
        **STABLE_DIFFUSION.get(solver, {}),
    )


def run_diffusers(scheduler, steps, monkeypatch):
    """Timesteps, and latents after every step, of a diffusers scheduler."""
    import torch

    scheduler.set_timesteps(steps)
    latents = torch.from_numpy(initial_noise(0, SHAPE, 1).astype(np.float64)) * scheduler.init_noise_sigma
    history = []
    for index, timestep in enumerate(scheduler.timesteps):
        name = f"{type(scheduler).__module__}.randn_tensor"
        noise = torch.from_numpy(initial_noise(100 + index, SHAPE, 1).astype(np.float64))
        monkeypatch.setattr(name, lambda *_, noise=noise, **__: noise)
        scaled = scheduler.scale_model_input(latents, timestep)
        output = torch.from_numpy(model(scaled.numpy(), timestep))
        latents = scheduler.step(output, timestep, latents).prev_sample
        history.append(latents.numpy())
    return scheduler.timesteps.numpy(), history


def relative_difference(ours, theirs):
    return np.abs(ours - theirs).max() / np.abs(theirs).max()


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("steps", [1, 2, 7, 30])
def test_every_step_agrees_with_diffusers(solver, prediction_type, steps, monkeypatch):
    if (solver, prediction_type) == ("euler_ancestral", "sample"):
        pytest.skip("diffusers' EulerAncestralDiscreteScheduler does not know this prediction type")
    table = solvers.table(solver, SCHEDULE, steps, prediction_type)
    timesteps, theirs = run_diffusers(scheduler_of(solver, prediction_type), steps, monkeypatch)
    np.testing.assert_array_equal(table.timesteps, timesteps)
    for (latents, _), expected in zip(run(table), theirs, strict=True):
        assert relative_difference(latents, expected) < 1e-5


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("steps", [1, 2, 4, 7, 16, 30, 48])
def test_every_step_of_trailing_timesteps_agrees_with_diffusers(solver, prediction_type, steps, monkeypatch):
    table = solvers.table(solver, SCHEDULE, steps, prediction_type, "trailing")
    scheduler = scheduler_of(solver, prediction_type, spacing="trailing")
    timesteps, theirs = run_diffusers(scheduler, steps, monkeypatch)
    np.testing.assert_array_equal(table.timesteps, timesteps)
    np.testing.assert_allclose(table.initial_scale, float(scheduler.init_noise_sigma), rtol=1e-6)
    for (latents, _), expected in zip(run(table), theirs, strict=True):
        assert relative_difference(latents, expected) < 1e-5


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("schedule", ["linear", "squaredcos_cap_v2"])
def test_the_other_beta_schedules_agree_with_diffusers(solver, schedule, monkeypatch):
    table = solvers.table(
        solver, NoiseSchedule.named(schedule, BETAS["start"], BETAS["end"]), 10, "v_prediction"
    )
    _, theirs = run_diffusers(scheduler_of(solver, "v_prediction", schedule), 10, monkeypatch)
    for (latents, _), expected in zip(run(table), theirs, strict=True):
        assert relative_difference(latents, expected) < 1e-5


@pytest.mark.parametrize("schedule", sorted(solvers.BETA_SCHEDULES))
def test_alphas_cumprod_agree_with_diffusers(schedule):
    ours = NoiseSchedule.named(**{**BETAS, "schedule": schedule}).alphas_cumprod
    np.testing.assert_allclose(ours, scheduler_of("ddim", "epsilon", schedule).alphas_cumprod, rtol=1e-4)


def oracle(table, prediction_type, clean):
    """A model that knows the clean sample, and so predicts exactly; latents are a clean + s noise."""
    kept = dict(zip(table.timesteps, SCHEDULE.alphas_cumprod[table.timesteps.astype(int)], strict=True))

    def predict(model_input, timestep):
        a, s = np.sqrt(kept[timestep]), np.sqrt(1 - kept[timestep])
        noise = (model_input - a * clean) / s
        return {"epsilon": noise, "sample": clean, "v_prediction": a * noise - s * clean}[prediction_type]

    return predict


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("steps", [1, 2, 30])
def test_an_oracle_is_followed_to_the_clean_sample(solver, prediction_type, steps):
    clean = initial_noise(9, SHAPE, 1).astype(np.float64)
    table = solvers.table(solver, SCHEDULE, steps, prediction_type)
    history = run(table, oracle(table, prediction_type, clean))
    for _, denoised in history:
        np.testing.assert_allclose(denoised, clean, atol=1e-4)
    if solver != "ddim":  # which ends on the noise of the first training step: the next test
        np.testing.assert_allclose(history[-1][0], clean, atol=1e-5)


@pytest.mark.parametrize("steps", [1, 2, 30])
def test_ddim_ends_on_the_noise_of_the_first_training_step(steps):
    clean = initial_noise(9, SHAPE, 1).astype(np.float64)
    table = solvers.table("ddim", SCHEDULE, steps, "sample")
    *_, (latents, _) = run(table, lambda latents, timestep: clean)
    kept = SCHEDULE.alphas_cumprod[0]
    start = initial_noise(0, SHAPE, 1) - np.sqrt(SCHEDULE.alphas_cumprod[int(table.timesteps[0])]) * clean
    noise = start / np.sqrt(1 - SCHEDULE.alphas_cumprod[int(table.timesteps[0])])
    np.testing.assert_allclose(latents, np.sqrt(kept) * clean + np.sqrt(1 - kept) * noise, atol=1e-4)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("solver", ["euler", "euler_ancestral", "dpmpp_2m"])
@pytest.mark.parametrize("steps", [1, 2, 30])
def test_the_last_step_returns_the_denoised_sample_and_adds_no_noise(solver, prediction_type, steps):
    last = solvers.table(solver, SCHEDULE, steps, prediction_type).coefficients[-1]
    np.testing.assert_allclose(last[1:3], last[5:7], rtol=1e-5, atol=1e-7)
    assert not last[3:5].any()


@pytest.mark.parametrize("solver", SOLVERS)
def test_only_the_ancestral_solver_takes_noise(solver):
    table = solvers.table(solver, SCHEDULE, 10, "epsilon")
    assert table.stochastic == (solver == "euler_ancestral") == bool(table.coefficients[:, 4].any())


@pytest.mark.parametrize("solver", SOLVERS)
def test_only_the_multistep_solver_remembers_and_not_at_first(solver):
    remembered = solvers.table(solver, SCHEDULE, 10, "epsilon").coefficients[:, 3]
    assert (solver == "dpmpp_2m") == bool(remembered.any())
    assert remembered[0] == 0


def test_ancestral_noise_restores_the_variance_of_the_schedule():
    table = solvers.table("euler_ancestral", SCHEDULE, 10, "sample")
    kept = SCHEDULE.alphas_cumprod[table.timesteps.astype(int)]
    sigma = np.sqrt(1 / kept - 1)
    carried = (
        table.coefficients[:-1, 1] * sigma[:-1]
    )  # with a perfect model, what is left of the noise there was
    np.testing.assert_allclose(carried**2 + table.coefficients[:-1, 4] ** 2, sigma[1:] ** 2, rtol=1e-5)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("spacing", sorted(solvers.SPACINGS))
@pytest.mark.parametrize("steps", [1, 3, 499, 500, 501, 999, 1000])
def test_any_number_of_steps_gives_a_finite_table_of_falling_timesteps(
    solver, prediction_type, steps, spacing
):
    table = solvers.table(solver, SCHEDULE, steps, prediction_type, spacing)
    assert table.coefficients.shape == (steps, 7)
    assert table.coefficients.dtype == table.timesteps.dtype == np.float32
    assert np.isfinite(table.coefficients).all() and np.isfinite(table.initial_scale)
    assert (np.diff(table.timesteps) < 0).all()
    assert table.timesteps[-1] >= 0 and table.timesteps[0] <= 999


@pytest.mark.parametrize("steps", [0, -1, 1001, 2.5, "30", True, None])
def test_a_number_of_steps_out_of_range_is_refused(steps):
    with pytest.raises(UsageError, match="steps is"):
        solvers.table("ddim", SCHEDULE, steps, "epsilon")


def test_unknown_names_are_refused_with_those_known():
    with pytest.raises(UsageError, match="dpmpp_2m"):
        solvers.table("plms", SCHEDULE, 10, "epsilon")
    with pytest.raises(UsageError, match="v_prediction"):
        solvers.table("ddim", SCHEDULE, 10, "flow")
    with pytest.raises(UsageError, match="leading, trailing"):
        solvers.table("ddim", SCHEDULE, 10, "epsilon", "linspace")
    with pytest.raises(UsageError, match="scaled_linear"):
        NoiseSchedule.named("cosine", 0.1, 0.2)


@pytest.mark.parametrize("betas", [[], [0.1, 0.0], [0.1, 1.0], [0.1, np.nan], [[0.1]], [0.9] * 99])
def test_betas_that_are_no_schedule_are_refused(betas):
    with pytest.raises(UsageError, match="betas"):
        NoiseSchedule(np.array(betas))


def test_a_short_schedule_bounds_the_steps():
    short = NoiseSchedule.named("linear", 0.01, 0.2, steps=8)
    assert len(solvers.table("dpmpp_2m", short, 8, "epsilon").timesteps) == 8
    with pytest.raises(UsageError, match="from 1 to 8"):
        solvers.table("dpmpp_2m", short, 9, "epsilon")


def test_a_schedule_cannot_be_edited_from_outside():
    betas = np.full(10, 0.1)
    schedule = NoiseSchedule(betas)
    betas[:] = 0.5
    assert schedule.betas[0] == 0.1
    with pytest.raises(ValueError, match="read-only"):
        schedule.betas[0] = 0.5


def test_torch_and_numpy_agree():
    torch = pytest.importorskip("torch")
    row = solvers.table("dpmpp_2m", SCHEDULE, 10, "epsilon").coefficients[5]
    arrays = [initial_noise(k, SHAPE, 1) for k in range(4)]
    ours = solvers.apply(row, *arrays)
    theirs = solvers.apply(row, *map(torch.from_numpy, arrays))
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(one, other.numpy(), rtol=1e-6, atol=1e-6)
