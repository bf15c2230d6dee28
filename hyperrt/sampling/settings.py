"""The numbers of a request: options, with the defaults of the bundle in place of None, and their results."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from hyperrt.bundle.bundle import Bundle
from hyperrt.errors import UsageError
from hyperrt.sampling import guidance, solvers
from hyperrt.sampling.options import SamplingOptions, check_needs_subject


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The numbers of a recipe: the options, with the bundle's defaults in place of None.

    Attributes:
        kappa: 0 without a subject; None with CFG, which has none.
        image_scale: None where no image tokens are used.
    """

    seed: int
    steps: int
    solver: str
    guidance_scale: float
    kappa: float | None
    strength: float
    cfg: bool = False
    image_scale: float | None = None

    def for_recipe(self) -> dict[str, Any]:
        """The settings as they stand in a recipe."""
        unused = {"cfg"} if not self.cfg else set()
        unused |= {"image_scale"} if self.image_scale is None else set()
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in unused}


def settle(bundle: Bundle, has_subject: bool, options: SamplingOptions) -> Settings:
    """The options, with the bundle's defaults in place of None.

    Raises:
        UsageError: an option changes nothing.
    """
    defaults, image = bundle.defaults, bundle.image_prompt
    check_needs_subject(has_subject, options)
    image_scale = None
    if image and has_subject:
        image_scale = image.scale if options.image_scale is None else options.image_scale
    elif options.image_scale:
        raise UsageError(
            f"image scale is {options.image_scale:g}, but {bundle.name} has no image prompt",
            "only bundles of the open category draw with image tokens",
            "leave it out, or use another bundle",
        )
    scale, kappa = options.guidance_scale, options.kappa
    if scale is None:
        scale = defaults.guidance_scale * (guidance.CFG_PULL if options.cfg else 1)
    if options.cfg:
        kappa = None
    elif not has_subject:
        kappa = 0.0
    elif kappa is None:
        kappa = defaults.kappa
    return Settings(
        seed=options.seed,
        steps=options.steps or defaults.steps,
        solver=options.solver or defaults.solver,
        guidance_scale=scale,
        kappa=kappa,
        strength=options.strength,
        cfg=options.cfg,
        image_scale=image_scale,
    )


def table_of(bundle: Bundle, settings: Settings) -> solvers.SolverTable:
    """The solver as a table of coefficients."""
    schedule = solvers.NoiseSchedule.named(**dataclasses.asdict(bundle.betas))
    kinds = (bundle.prediction_type, bundle.timestep_spacing)
    return solvers.table(settings.solver, schedule, settings.steps, *kinds)


def branches_of(settings: Settings) -> tuple[guidance.Branch, ...]:
    """The branches of the guidance sum whose weight is not zero."""
    if settings.kappa is None:
        weighted = zip(guidance.CFG_BRANCHES, guidance.cfg_weights(settings.guidance_scale), strict=True)
    else:
        weights = guidance.hm_cfg_weights(settings.guidance_scale, settings.kappa)
        weighted = zip(guidance.BRANCHES, weights, strict=True)
    return guidance.active(guidance.Branch(name, weight) for name, weight in weighted)
