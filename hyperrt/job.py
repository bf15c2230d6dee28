"""A request with every default filled in: the branches with prompts and weights, the solver, the recipe.

Nothing here computes or opens anything: what is wrong with a request is found before a graph is loaded.
Source: arXiv 2511.03156, HM-CFG (eq. 20); without a subject it is classifier-free guidance (kappa 0).
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hyperrt import guidance, prompts, solvers
from hyperrt.adapt import packed
from hyperrt.bundle import Bundle
from hyperrt.config import SamplingConfig
from hyperrt.errors import BadPrompt, LoraMismatch
from hyperrt.lora import VECTORS, Subject

log = logging.getLogger("hyperrt")


@dataclass(frozen=True, eq=False, kw_only=True)
class Job:
    """What the loop needs to know; compared by identity.

    Attributes:
        branches: those whose weight is not zero.
        texts: the prompt of each branch.
        subject: None draws with the base model alone.
        strength: the LoRA's, on the subject's rows.
        table: the solver.
        seed: of the first picture.
        n: pictures.
        batch_size: pictures per engine call.
        recipe: what reproduces the pictures, as JSON values.
    """

    branches: tuple[guidance.Branch, ...]
    texts: tuple[str, ...]
    subject: Subject | None
    strength: float
    table: solvers.SolverTable
    seed: int
    n: int
    batch_size: int
    recipe: Mapping[str, Any]

    @property
    def gate(self) -> NDArray[np.float32]:
        """[branches] strength of the LoRA on each branch."""
        return np.array([self.strength * (branch.name == "subject") for branch in self.branches], np.float32)

    @property
    def weights(self) -> NDArray[np.float32]:
        """[branches] weight of each branch in the guidance."""
        return np.array([branch.weight for branch in self.branches], np.float32)


def plan(bundle: Bundle, backend: str, prompt: str, subject: Subject | None, options: SamplingConfig) -> Job:
    """The job of one request; `Runtime.steps` describes the arguments.

    Raises:
        UsageError: there is no such solver.
        BadPrompt: a prompt cannot be used, or does not name the subject that was given.
        LoraMismatch: the subject was made for another bundle.
    """
    if subject is not None:
        _check_subject(subject, bundle)
    texts = _texts(bundle, prompt, subject, options)
    settings = _settings(bundle, subject, options)
    schedule = solvers.NoiseSchedule.named(**dataclasses.asdict(bundle.betas))
    weights = guidance.hm_cfg_weights(settings["guidance_scale"], settings["kappa"])
    branches = guidance.active(map(guidance.Branch, guidance.BRANCHES, weights))
    origin = {
        "generic_prompt": texts["generic"],
        "negative_prompt": texts["uncond"],
        "branches": {branch.name: branch.weight for branch in branches},
        "bundle": bundle.name,
        "base_model": bundle.hashes.base_model,
        "backend": backend,
    }
    return Job(
        branches=branches,
        texts=tuple(texts[branch.name] for branch in branches),
        subject=subject,
        strength=options.strength,
        table=solvers.table(settings["solver"], schedule, settings["steps"], bundle.prediction_type),
        seed=options.seed,
        n=options.n,
        batch_size=options.batch_size,
        recipe={"prompt": prompt, **settings, **origin, **_subject_recipe(subject, texts)},
    )


def noun_in(prompt: str, bundle: Bundle) -> str | None:
    """The noun after the placeholder, if the bundle knows it: "a [V] mug on a table" is about a mug."""
    rules = bundle.prompts
    words = prompt.lower().partition(rules.placeholder.lower())[2].split()
    for length in (2, 1):
        noun = " ".join(words[:length]).rstrip(".,;:!?)")
        if noun in rules.nouns:
            return noun
    return None


def _settings(bundle: Bundle, subject: Subject | None, options: SamplingConfig) -> dict[str, Any]:
    """The numbers of the recipe, the bundle's defaults filled in."""
    defaults = bundle.defaults
    scale, kappa = options.guidance_scale, options.kappa
    return {
        "seed": options.seed,
        "steps": options.steps or defaults.steps,
        "solver": options.solver or defaults.solver,
        "guidance_scale": defaults.guidance_scale if scale is None else scale,
        "kappa": 0.0 if subject is None else defaults.kappa if kappa is None else kappa,
        "strength": options.strength,
    }


def _subject_recipe(subject: Subject | None, texts: Mapping[str, str]) -> dict[str, Any]:
    """What a recipe says of the subject: no paths and no photos (see hyperrt/recipe.py)."""
    if subject is None:
        return {}
    digest = hashlib.sha256(b"".join(subject.lora[name].tobytes() for name in VECTORS))
    return {
        "subject_prompt": texts["subject"],
        "class_noun": subject.class_noun,
        "photos": subject.photos,
        "subject_sha256": digest.hexdigest(),
        "hypernet": subject.metadata.get("hypernet", ""),
    }


def _check_subject(subject: Subject, bundle: Bundle) -> None:
    for name in VECTORS:
        packed(subject, name, bundle.layout.size(name))
    found, wanted = subject.metadata.get("base_model"), bundle.hashes.base_model
    if found not in (None, wanted):
        why = f"its base model is {found[:12]!r}, the bundle's {wanted[:12]!r}"
        raise LoraMismatch(
            "the subject was made for another base model", why, "make it again with this bundle"
        )


def _texts(bundle: Bundle, prompt: str, subject: Subject | None, options: SamplingConfig) -> dict[str, str]:
    """The prompt of every branch, by the branch's name."""
    rules, generic = bundle.prompts, options.generic_prompt
    known = subject is not None
    if not known and rules.placeholder.lower() in prompt.lower():
        log.warning("the prompt has %s but there is no subject: the base model draws it", rules.placeholder)
    noun = subject.class_noun if subject else rules.default_class
    split = prompts.split_prompt(prompt, noun, rules.token, rules.placeholder, has_subject=known)
    return {
        "uncond": _plain(options.negative_prompt, "negative prompt", rules.placeholder) or split.empty,
        "subject": split.subject,
        "generic": split.generic if generic is None else _plain(generic, "generic prompt", rules.placeholder),
    }


def _plain(text: str, name: str, placeholder: str) -> str:
    if placeholder.lower() in text.lower():
        why = "it goes to the base model, which knows no subject"
        raise BadPrompt(f"the {name} has {placeholder}", why, "leave it out")
    return prompts.check_text(text, name)
