"""Solvers as tables: one row of seven coefficients per step, whichever the solver.

Every solver here is linear in the latents, the model output and the clean sample estimated one step before,
so the step graph only ever applies a row `c` (see `apply`):

    model input  = c0 latents
    next_latents = c1 latents + c2 output + c3 previous + c4 noise
    denoised     = c5 latents + c6 output

One update covers all four. Write latents as `x = a x0 + s eps`; going to (a', s') with an estimate D of x0,

    x' = (s'/s) x + (a' - a s'/s) D

is DDIM (arXiv 2010.02502 eq. 12, eta 0) for D = x0. DPM-Solver++(2M) (arXiv 2211.01095 alg. 2) extrapolates D
from this and the previous x0. Euler (arXiv 2206.00364 alg. 1) is the same in coordinates scaled to a = 1,
s = sigma; Euler ancestral (k-diffusion) goes down to sigma_down and adds noise of sigma_up.

Numbers follow diffusers' schedulers with Stable Diffusion 1.5's configuration: timestep_spacing "leading" (or
"trailing", as models of few steps have it), steps_offset 1, clip_sample False, set_alpha_to_one False, and
otherwise diffusers' defaults; for DPM-Solver++(2M) those are final_sigmas_type "zero" (so the last step is
first order), lower_order_final True (no further effect at order 2) and euler_at_final False.

Shapes: T training steps (1000); tables are float32, the arithmetic that makes them is float64.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hyperrt.errors import UsageError
from hyperrt.sampling.options import MAX_STEPS, SOLVER_NAMES

Array64 = NDArray[np.float64]

PREDICTION_TYPES = frozenset({"epsilon", "v_prediction", "sample"})
SPACINGS = frozenset({"leading", "trailing"})
BETA_SCHEDULES = frozenset({"scaled_linear", "linear", "squaredcos_cap_v2"})
LEAST_SIGNAL = 1e-30  # of alphas_cumprod: below, coefficients leave float32


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """The noise a model was trained with.

    Attributes:
        betas: [T] variance added at each training step, each in (0, 1).
    """

    betas: Array64

    def __post_init__(self) -> None:
        betas = np.array(self.betas, dtype=np.float64)
        usable = betas.ndim == 1 and betas.size > 0 and bool(np.all((betas > 0) & (betas < 1)))
        if not usable or np.prod(1 - betas) < LEAST_SIGNAL:
            raise UsageError(
                "the betas are no noise schedule",
                "they must be a list of numbers between 0 and 1, both excluded, that leaves some signal",
                "check `betas` in the bundle's bundle.json",
            )
        betas.flags.writeable = False
        object.__setattr__(self, "betas", betas)

    @classmethod
    def named(cls, schedule: str, start: float, end: float, steps: int = 1000) -> NoiseSchedule:
        """The schedule that a manifest names: `NoiseSchedule.named(**manifest["betas"])`.

        Args:
            schedule: one of `BETA_SCHEDULES`, with diffusers' meaning.
            start: first beta; "squaredcos_cap_v2" does not use it.
            end: last beta; "squaredcos_cap_v2" does not use it.
            steps: T, how many training steps.

        Raises:
            UsageError: the name is unknown, or the betas are outside (0, 1).
        """
        _check_name("beta schedule", schedule, BETA_SCHEDULES)
        if schedule == "linear":
            return cls(np.linspace(start, end, steps))
        if schedule == "scaled_linear":
            return cls(np.linspace(math.sqrt(start), math.sqrt(end), steps) ** 2)
        # arXiv 2102.09672 eq. 17, with its cap on beta
        alpha_bar = np.cos((np.arange(steps + 1) / steps + 0.008) / 1.008 * math.pi / 2) ** 2
        return cls(np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], 0.999))

    @property
    def alphas_cumprod(self) -> Array64:
        """[T] share of the clean sample's variance that is left: `x_t = sqrt(ac) x0 + sqrt(1 - ac) noise`."""
        return np.cumprod(1 - self.betas, dtype=np.float64)


@dataclass(frozen=True, eq=False)
class SolverTable:
    """What the loop and the step graph need of a solver.

    Attributes:
        timesteps: [steps] float32, what the model is told, falling.
        coefficients: [steps, 7] float32, one row per step; the module docstring gives their meaning.
        initial_scale: factor on unit Gaussian noise to get the first latents.
        stochastic: whether a step takes fresh noise; where not, c4 is zero everywhere.
    """

    timesteps: NDArray[np.float32]
    coefficients: NDArray[np.float32]
    initial_scale: float
    stochastic: bool


def apply(coefficients: Any, latents: Any, output: Any, previous: Any, noise: Any) -> tuple[Any, Any]:
    """One solver step, as the step graph does it. NumPy or torch.

    Args:
        coefficients: [7], a row of `SolverTable.coefficients`.
        latents: [images, C, h, w].
        output: what the model said of `latents * coefficients[0]`, guidance already summed; shape of latents.
        previous: `denoised` of the step before, zeros at the first step; shape of latents.
        noise: unit Gaussian noise, zeros for a solver that is not stochastic; shape of latents.

    Returns:
        `(next_latents, denoised)`, both shaped like latents.
    """
    _, on_latents, on_output, on_previous, on_noise, clean_latents, clean_output = coefficients
    # Arrays stand on the left, so that torch, not NumPy, multiplies a tensor with a NumPy coefficient.
    following = latents * on_latents + output * on_output + previous * on_previous + noise * on_noise
    return following, latents * clean_latents + output * clean_output


def table(
    solver: str, schedule: NoiseSchedule, steps: int, prediction_type: str, spacing: str = "leading"
) -> SolverTable:
    """The coefficients of a solver for a number of steps.

    Args:
        solver: one of `options.SOLVER_NAMES`.
        schedule: the model's training noise.
        steps: model evaluations, 1 to 1000 (and at most the schedule's length).
        prediction_type: what the model predicts, one of `PREDICTION_TYPES`: the noise, v = a noise - s x0
            (arXiv 2202.00512), or the clean sample.
        spacing: which timesteps the steps take, one of `SPACINGS`.

    Raises:
        UsageError: an unknown name, or steps out of range.
    """
    _check_name("solver", solver, SOLVER_NAMES)
    _check_name("timestep spacing", spacing, SPACINGS)
    _check_name("prediction type", prediction_type, PREDICTION_TYPES)
    alphas_cumprod = schedule.alphas_cumprod
    _check_steps(steps, min(MAX_STEPS, alphas_cumprod.size))
    timesteps = _timesteps(solver, steps, alphas_cumprod.size, spacing)
    kept = alphas_cumprod[timesteps]
    a, s = np.sqrt(kept), np.sqrt(1 - kept)
    on_latents, on_output = _denoise_terms(prediction_type, a, s)

    input_scale, noise, initial_scale = np.ones(steps), np.zeros(steps), 1.0
    if solver.startswith("euler"):
        input_scale, on_latents = a, on_latents * a
        a, s = np.ones(steps), s / a
        a_next, s_next = a, np.append(s[1:], 0)
        # Trailing timesteps begin at the last one, where diffusers takes all latents for noise.
        initial_scale = float(s[0]) if spacing == "trailing" else math.sqrt(s[0] ** 2 + 1)
        if solver == "euler_ancestral":
            s_next, noise = _ancestral(s, s_next)
    else:
        kept_next = np.append(kept[1:], 1.0)
        if solver == "ddim":  # diffusers goes to a timestep that, trailing, may not be the next
            kept_next = alphas_cumprod[np.maximum(timesteps - alphas_cumprod.size // steps, 0)]
        a_next, s_next = np.sqrt(kept_next), np.sqrt(1 - kept_next)

    carry = s_next / s
    pull = a_next - a * carry
    extrapolate = _second_order(a, s) if solver == "dpmpp_2m" else np.zeros(steps)
    now = pull * (1 + extrapolate)
    columns = [
        input_scale,
        carry + now * on_latents,
        now * on_output,
        -pull * extrapolate,
        noise,
        on_latents,
        on_output,
    ]
    return SolverTable(
        timesteps.astype(np.float32),
        np.stack(columns, axis=1).astype(np.float32),
        initial_scale,
        solver == "euler_ancestral",
    )


def _check_name(kind: str, name: str, known: Collection[str]) -> None:
    if name not in known:
        known_names = ", ".join(sorted(known))
        raise UsageError(f"unknown {kind} {name!r}", f"known are {known_names}", "choose one of these")


def _check_steps(steps: int, most: int) -> None:
    if isinstance(steps, bool) or not isinstance(steps, (int, np.integer)) or not 1 <= steps <= most:
        raise UsageError(
            f"steps is {steps!r}",
            f"a solver takes a whole number of steps from 1 to {most}",
            "20 to 30 steps suit most pictures",
        )


def _timesteps(solver: str, steps: int, train_steps: int, spacing: str) -> NDArray[np.int64]:
    if spacing == "trailing":
        return _trailing_timesteps(steps, train_steps)
    return _leading_timesteps(steps, train_steps, spare=solver == "dpmpp_2m")


def _leading_timesteps(steps: int, train_steps: int, spare: bool) -> NDArray[np.int64]:
    """diffusers' "leading" spacing with steps_offset 1, falling: [steps].

    Args:
        spare: divide the range into one interval more and leave the lowest timestep out, as diffusers'
            DPMSolverMultistepScheduler does.
    """
    first = int(spare)
    stride = max(1, train_steps // (steps + first))
    timesteps = np.arange(first, first + steps)[::-1] * stride
    # With nearly as many steps as the schedule has, diffusers' offset would leave it: shift less.
    return timesteps + min(1, train_steps - 1 - int(timesteps[0]))


def _trailing_timesteps(steps: int, train_steps: int) -> NDArray[np.int64]:
    """diffusers' "trailing" spacing (arXiv 2305.08891, table 2), falling from the last timestep: [steps]."""
    # np.arange, so that halves round as in diffusers; it may give one too many.
    timesteps: NDArray[np.int64] = np.round(np.arange(train_steps, 0, -train_steps / steps)).astype(np.int64)
    return timesteps[:steps] - 1


def _denoise_terms(prediction_type: str, a: Array64, s: Array64) -> tuple[Array64, Array64]:
    """x0 = first * latents + second * output, for latents = a x0 + s noise; both [steps]."""
    if prediction_type == "epsilon":
        return 1 / a, -s / a
    if prediction_type == "v_prediction":
        return a, -s
    return np.zeros_like(a), np.ones_like(a)


def _ancestral(sigma: Array64, sigma_next: Array64) -> tuple[Array64, Array64]:
    """sigma_down, sigma_up with sigma_down^2 + sigma_up^2 = sigma_next^2; both [steps]."""
    up = sigma_next / sigma * np.sqrt(sigma**2 - sigma_next**2)
    return np.sqrt(sigma_next**2 - up**2), up


def _second_order(a: Array64, s: Array64) -> Array64:
    """1 / (2 r) of DPM-Solver++(2M) per step, r = h_before / h in log-SNR; zero at the first and the last.

    The first step has no predecessor; the last goes to zero noise, where h is infinite, so it is first order.
    """
    h = np.diff(np.log(a / s))
    extrapolate = np.zeros_like(a)
    extrapolate[1:-1] = h[1:] / (2 * h[:-1])
    return extrapolate
