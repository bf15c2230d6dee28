"""The options of a sampling, checked before anything slow starts.

What depends on the bundle is None here; `hyperrt.sampling.request` fills it in.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from hyperrt.arguments import Checked, in_range, one_of
from hyperrt.errors import UsageError
from hyperrt.lora.metadata import MAX_IMAGE_SCALE
from hyperrt.text import short_repr

MAX_GUIDANCE = 100
MAX_STEPS = 1000  # the training schedule has no more
MAX_IMAGES = 1000
MAX_THREADS = 1024
MAX_DEVICE = 1023
MAX_SEED = 2**63 - 1
RANDOM = -1  # as a seed
RANDOM_SEEDS = 2**32  # what other programs take, too
SOLVER_NAMES = (
    "ddim",
    "dpmpp_2m",
    "euler",
    "euler_ancestral",
)  # the tables are in hyperrt/sampling/solvers.py, which needs NumPy


@dataclass(frozen=True, kw_only=True)
class SamplingOptions(Checked):
    """What `Runtime.steps` takes beside the prompt and the subject; None means the bundle's default.

    Raises:
        UsageError: a value has the wrong type or is out of range, naming it and what is taken.
    """

    generic_prompt: str | None = None  # None: the prompt without the placeholder
    negative_prompt: str = ""  # replaces the empty prompt on the base row
    kappa: float | None = None  # 0 to 2; share of guidance that comes from the subject
    cfg: bool = False  # plain CFG of the personalised model, instead of HM-CFG
    guidance_scale: float | None = None  # s = w + 1; None of CFG: twice the bundle's
    steps: int | None = None  # denoising steps
    solver: str | None = None
    seed: int = RANDOM  # picture k uses seed + k; RANDOM: one that is chosen here
    n: int = 1  # pictures
    strength: float = 1.0  # of the LoRA
    batch_size: int = 1  # pictures per engine call
    image_scale: float | None = None  # of the image tokens, open category

    def __post_init__(self) -> None:
        super().__post_init__()
        in_range("kappa", self.kappa, 0, 2)
        in_range("image scale", self.image_scale, 0, MAX_IMAGE_SCALE)
        in_range("guidance scale", self.guidance_scale, 0, MAX_GUIDANCE)
        in_range("steps", self.steps, 1, MAX_STEPS)
        in_range("n", self.n, 1, MAX_IMAGES)
        in_range("batch size", self.batch_size, 1, MAX_IMAGES)
        if self.seed == RANDOM:
            object.__setattr__(self, "seed", random_seed(self.n))
        if not 0 <= self.seed <= MAX_SEED - self.n:
            why = f"it must be from 0 to {MAX_SEED - self.n}, or {RANDOM} for a random one"
            raise UsageError(f"seed is {short_repr(self.seed)}", why)
        in_range("strength", self.strength, -10, 10)
        if self.solver is not None:
            one_of("solver", self.solver, SOLVER_NAMES)
        if self.cfg and self.kappa is not None:
            why = "plain CFG draws with the personalised model alone, and has no share to set"
            raise UsageError(f"cfg is on, but kappa is {self.kappa:g}", why, "leave one of them out")

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> SamplingOptions:
        """The config of these options.

        Raises:
            UsageError: there is no such option, or as for the config itself.
        """
        known = [field.name for field in fields(cls)]
        if unknown := [name for name in options if name not in known]:
            raise UsageError(f"there is no option {unknown[0]!r}", f"the options are {', '.join(known)}")
        return cls(**options)


def random_seed(pictures: int) -> int:
    """A seed for so many pictures that nobody can foresee; their own are below RANDOM_SEEDS, too."""
    import secrets

    return secrets.randbelow(RANDOM_SEEDS - pictures + 1)


def check_needs_subject(has_subject: bool, options: SamplingOptions) -> None:
    """Refuse options that change nothing without a subject.

    Raises:
        UsageError: one was given, and is not 0.
    """
    if options.cfg and not has_subject:
        why = "it is guidance by the subject's model alone, and without a subject there is none"
        raise UsageError("cfg is on, but there is no subject", why, "leave it out, or name a subject")
    for name, value, what in (
        ("kappa", options.kappa, "it is the share of the subject in the guidance"),
        ("image scale", options.image_scale, "it is the weight of the subject's photos beside the text"),
    ):
        if value and not has_subject:
            why = f"{what}, and would change nothing"
            do = "leave it out, or name a subject"
            raise UsageError(f"{name} is {value:g}, but there is no subject", why, do)
