"""Reads what scheduler_config.json says of a base model, and checks that the solvers support it.

HyperRT samples with solvers of its own (hyperrt/sampling/solvers.py). So a scheduler's configuration is read
for what the model was trained with: the betas, the prediction type, the spacing of few-step models. How to
sample (orders, Karras' sigmas, the last step) is the choice of `--solver`. What says that the model was
trained with other noise, or that diffusers changes its predictions, is refused by name. The whole table:
docs/base-model-settings.md.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import diffusers

from hyperrt.sampling.solvers import BETA_SCHEDULES, PREDICTION_TYPES

# diffusers' schedulers whose model is described by betas and a prediction type. EDM's and flow matching's
# have another process; CogVideoX', UnCLIP's and Würstchen's change the betas.
KNOWN = (
    "DDIMScheduler", "DDIMParallelScheduler", "DDPMScheduler", "DDPMParallelScheduler", "PNDMScheduler",
    "LMSDiscreteScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler", "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler",
    "DPMSolverSDEScheduler", "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler",
    "DEISMultistepScheduler", "UniPCMultistepScheduler", "SASolverScheduler", "LCMScheduler", "TCDScheduler",
)  # fmt: skip
# Settings of a process that betas do not describe, whichever scheduler reads them.
OTHER_PROCESS = {"use_flow_sigmas": True, "timestep_type": "continuous", "rescale_betas_zero_snr": True}
REASONS = {
    "use_flow_sigmas": "a flow-matching model has other noise",
    "timestep_type": "the model reads ln(sigma) / 4 in place of a timestep",
    "rescale_betas_zero_snr": "it leaves no signal at the last timestep, where solvers divide by it",
    "thresholding": "it changes the clean sample of every step, which no solver here does",
    "clip_sample": "it clips the clean sample of every step to [-1, 1], which no solver here does",
}


def with_defaults(config: Mapping[str, Any], named: str | None = None) -> dict[str, Any]:
    """The configuration, completed with the defaults of its class as diffusers does.

    Args:
        config: of scheduler_config.json.
        named: the class that model_index.json names, which diffusers prefers.
    """
    kind = getattr(diffusers, str(named or config.get("_class_name")), None)
    return {**_defaults(kind), **config}


def fault(config: Mapping[str, Any], named: str | None = None, *, is_sdxl: bool = False) -> str:
    """Why the solvers do not support a model with this configuration; "" if they do.

    Args:
        config, named: as `with_defaults`.
        is_sdxl: diffusers' pipeline of Stable Diffusion 1 and 2 turns clip_sample off; that of SDXL does not.
    """
    for kind in (named, config.get("_class_name")):
        if kind is not None and kind not in KNOWN:
            return f"its scheduler is {kind}, whose noise betas and a prediction type do not describe"
    settings = with_defaults(config, named)
    schedule, predicted = settings.get("beta_schedule", "linear"), settings.get("prediction_type", "epsilon")
    if schedule not in BETA_SCHEDULES:
        return f"its beta_schedule is {schedule!r}; known are {', '.join(sorted(BETA_SCHEDULES))}"
    if settings.get("trained_betas") is not None:
        return "it has trained_betas, a list in place of a named schedule"
    if predicted not in PREDICTION_TYPES:
        return f"its prediction_type is {predicted!r}; known are {', '.join(sorted(PREDICTION_TYPES))}"
    refused = {**OTHER_PROCESS, **_of_the_step(named or config.get("_class_name"), is_sdxl)}
    for name, value in refused.items():
        if settings.get(name) == value:
            return f"its {name} is {value!r}: {REASONS[name]}"
    return ""


def _of_the_step(kind: str | None, is_sdxl: bool) -> dict[str, Any]:
    """Settings of that class which would change every step."""
    names = ("thresholding", "clip_sample") if is_sdxl else ("thresholding",)
    read = _defaults(getattr(diffusers, kind, None)) if kind else dict.fromkeys(names)
    return {name: True for name in names if name in read}


def _defaults(kind: Any) -> dict[str, Any]:
    """The parameters of a scheduler's class that have a default."""
    if kind is None:
        return {}
    parameters = inspect.signature(kind).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}
