"""A request with every default filled in: the branches with prompts and weights, the solver, the recipe.

Nothing here computes or opens anything: what is wrong with a request is found before a graph is loaded.
Source: arXiv 2511.03156, HM-CFG (eq. 20); without a subject it is classifier-free guidance (kappa 0).
On request it is classifier-free guidance of the personalised model.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hyperrt.arguments import taken
from hyperrt.bundle.bundle import Bundle
from hyperrt.errors import BadPrompt, LoraMismatch, UsageError
from hyperrt.lora.layout import VECTORS
from hyperrt.lora.reader import check_tokens
from hyperrt.lora.subject import Subject, only_subject, packed
from hyperrt.sampling import guidance, prompt_syntax, prompts, solvers
from hyperrt.sampling.options import SamplingConfig, check_needs_subject

log = logging.getLogger("hyperrt")


@dataclass(frozen=True, eq=False, kw_only=True)
class Job:
    """What the loop needs to know; compared by identity.

    A job draws one or more pairs of a prompt and a subject; branch b of pair p is row b * pairs + p.

    Attributes:
        branches: those whose weight is not zero; all pairs share them.
        texts: [branches x pairs] the prompt of each row.
        subjects: [pairs]; None draws with the base model alone.
        strength: the LoRA's, on the subjects' rows.
        image_scale: of the image tokens, on the subjects' rows.
        table: the solver.
        seed: of the first picture of every pair.
        n: pictures of each pair.
        batch_size: pictures of each pair per engine call.
        settings: [pairs] what reproduces the pictures, as JSON values, less the subjects' hashes.
    """

    branches: tuple[guidance.Branch, ...]
    texts: tuple[str, ...]
    subjects: tuple[Subject | None, ...]
    strength: float
    image_scale: float
    table: solvers.SolverTable
    seed: int
    n: int
    batch_size: int
    settings: tuple[Mapping[str, Any], ...]

    @property
    def gate(self) -> NDArray[np.float32]:
        """[branches x pairs] strength of the LoRA on each row."""
        rows = product(self.branches, self.subjects)
        gate = [self.strength * (branch.personalised and subject is not None) for branch, subject in rows]
        return np.array(gate, np.float32)

    @property
    def image_scales(self) -> NDArray[np.float32]:
        """[branches x pairs] scale of the image tokens on each row."""
        known = [subject is not None and subject.image_tokens is not None for subject in self.subjects]
        rows = product(self.branches, known)
        scales = [self.image_scale * (branch.personalised and there) for branch, there in rows]
        return np.array(scales, np.float32)

    @property
    def weights(self) -> NDArray[np.float32]:
        """[branches] weight of each branch in the guidance."""
        return np.array([branch.weight for branch in self.branches], np.float32)

    @property
    def recipes(self) -> tuple[dict[str, Any], ...]:
        """[pairs] what reproduces the pictures, as JSON values; read when weights may come to the host."""
        pairs = zip(self.settings, self.subjects, strict=True)
        return tuple({**settings, **hash_of(subject)} for settings, subject in pairs)

    @property
    def told(self) -> tuple[Any, ...]:
        """What the rows are told; jobs in which it is equal share keys, values and LoRA."""
        return self.texts, self.subjects, self.gate.tobytes(), self.image_scales.tobytes()

    def lora_rows(self, images: int) -> tuple[Subject | None, ...]:
        """Whose LoRA each row holds, with `images` pictures of each pair; one entry if all hold the same."""
        different = [*dict.fromkeys(subject for subject in self.subjects if subject is not None)]
        if len(different) < 2:  # the base model's rows have a gate of 0, whatever they hold
            return (different[0] if different else None,)
        return tuple(subject for subject in self.subjects for _ in range(images)) * len(self.branches)


def pairs_of(prompt: Any, subject: Any) -> tuple[list[str], list[Subject | None], bool]:
    """The prompts [pairs] and subjects [pairs] of a call, and whether they came as sequences.

    Raises:
        UsageError: one of them is a sequence and the other is not, or a value has another type.
    """
    one_prompt, one_subject = _is_one(prompt), _is_one(subject)
    if one_prompt and one_subject:
        asked, subjects = [prompt], [subject]
    elif one_prompt or one_subject:
        raise UsageError(
            "the prompt and the subject do not go together",
            "one is a sequence and the other is not",
            "pass one prompt and one subject or None, or a list of each, of one length",
        )
    else:
        asked, subjects = list(prompt), list(subject)
    if files := [one for one in subjects if isinstance(one, (str, os.PathLike))]:
        why = "a subject is what personalize or load_subject returns, and this is the name of a file"
        do = "read it with runtime.load_subject first"
        raise UsageError(f"subject is {str(files[0])[:200]!r}", why, do)
    texts = [taken("prompt", one, str) for one in asked]
    return texts, [taken("subject", one, Subject | None) for one in subjects], not one_prompt


def _is_one(value: Any) -> bool:
    if isinstance(value, (str, bytes)) or not isinstance(value, Iterable):
        return True
    return getattr(value, "ndim", 1) == 0  # an array without axes


def plan(
    bundle: Bundle,
    backend: str,
    asked: Sequence[str],
    subjects: Sequence[Subject | None],
    options: SamplingConfig,
) -> Job:
    """The job of one request; `Runtime.steps` describes the arguments.

    Args:
        asked: prompts, [pairs].
        subjects: [pairs].

    Raises:
        UsageError: there is no such solver, not as many subjects as prompts, several subjects for a bundle
            that takes one at a time, or an option changes nothing.
        BadPrompt: a prompt cannot be used, or does not name the subject that was given.
        LoraMismatch: a subject was made for another bundle.
    """
    if len(asked) != len(subjects) or not asked:
        raise UsageError(
            f"there are {len(asked)} prompts and {len(subjects)} subjects",
            "each prompt is drawn with the subject in its place, or None for the base model",
            "give as many of one as of the other, at least one",
        )
    for subject in subjects:
        if subject is not None:
            _check_subject(subject, bundle)
    if bundle.adapt == "refit":
        only_subject(subjects)
    known = [subject is not None for subject in subjects]
    settings = settings_of(bundle, any(known), options)
    branches = _branches(settings)
    texts = [_texts(bundle, *pair, options) for pair in zip(asked, subjects, known, strict=True)]
    _warn_of_syntax(bundle, asked, options)
    return Job(
        branches=branches,
        texts=tuple(one[branch.name] for branch in branches for one in texts),
        subjects=tuple(subjects),
        strength=options.strength,
        image_scale=settings.get("image_scale", 0.0),
        table=_table(bundle, settings),
        seed=options.seed,
        n=options.n,
        batch_size=options.batch_size,
        settings=tuple(
            _recipe(bundle, backend, settings, *one) for one in zip(asked, subjects, texts, strict=True)
        ),
    )


def check(bundle: Bundle, prompt: str, has_subject: bool, options: SamplingConfig) -> None:
    """Refuse what `plan` would, before there is a subject: photos take time.

    Raises:
        UsageError, BadPrompt: as `plan`.
    """
    _table(bundle, settings_of(bundle, has_subject, options))
    _texts(bundle, prompt, None, has_subject, options)
    _warn_of_syntax(bundle, [prompt], options)


def _warn_of_syntax(bundle: Bundle, asked: Sequence[str], options: SamplingConfig) -> None:
    texts = (*asked, options.negative_prompt, options.generic_prompt or "")
    for line in prompt_syntax.advice(texts, bundle.prompts.placeholder):
        log.warning("%s", line)


def noun_in(prompt: str, bundle: Bundle) -> str | None:
    """The noun after the placeholder, if the bundle knows it: "a [V] mug on a table" is about a mug."""
    rules = bundle.prompts
    words = prompt.lower().partition(rules.placeholder.lower())[2].split()
    for length in (2, 1):
        noun = " ".join(words[:length]).rstrip(".,;:!?)")
        if noun in rules.nouns:
            return noun
    return None


def settings_of(bundle: Bundle, has_subject: bool, options: SamplingConfig) -> dict[str, Any]:
    """The numbers of the recipe, the bundle's defaults filled in; `cfg` is there only if it is on.

    Raises:
        UsageError: an option changes nothing.
    """
    defaults, image = bundle.defaults, bundle.image_prompt
    check_needs_subject(has_subject, options)
    scale, kappa = options.guidance_scale, options.kappa
    settings: dict[str, Any] = {
        "seed": options.seed,
        "steps": options.steps or defaults.steps,
        "solver": options.solver or defaults.solver,
        "guidance_scale": defaults.guidance_scale if scale is None else scale,
        "kappa": 0.0 if not has_subject else defaults.kappa if kappa is None else kappa,
        "strength": options.strength,
    }
    if options.cfg:
        usual = guidance.CFG_PULL * defaults.guidance_scale
        settings |= {"cfg": True, "kappa": None, "guidance_scale": usual if scale is None else scale}
    if image and has_subject:
        settings["image_scale"] = image.scale if options.image_scale is None else options.image_scale
    elif options.image_scale:
        raise UsageError(
            f"image scale is {options.image_scale:g}, but {bundle.name} has no image prompt",
            "only bundles of the open category draw with image tokens",
            "leave it out, or use another bundle",
        )
    return settings


def _table(bundle: Bundle, settings: Mapping[str, Any]) -> solvers.SolverTable:
    schedule = solvers.NoiseSchedule.named(**dataclasses.asdict(bundle.betas))
    kinds = (bundle.prediction_type, bundle.timestep_spacing)
    return solvers.table(settings["solver"], schedule, settings["steps"], *kinds)


def _branches(settings: Mapping[str, Any]) -> tuple[guidance.Branch, ...]:
    scale = settings["guidance_scale"]
    if settings.get("cfg"):
        weighted = zip(guidance.CFG_BRANCHES, guidance.cfg_weights(scale), strict=True)
    else:
        weights = guidance.hm_cfg_weights(scale, settings["kappa"])
        weighted = zip(guidance.BRANCHES, weights, strict=True)
    return guidance.active(guidance.Branch(name, weight) for name, weight in weighted)


def _recipe(
    bundle: Bundle,
    backend: str,
    settings: Mapping[str, Any],
    prompt: str,
    subject: Subject | None,
    texts: Mapping[str, str],
) -> dict[str, Any]:
    """What reproduces the pictures of one pair, as if it had been drawn alone."""
    if subject is None:
        scale = settings["guidance_scale"]
        settings = {
            **{name: value for name, value in settings.items() if name not in ("image_scale", "cfg")},
            "kappa": 0.0,
            "guidance_scale": scale / guidance.CFG_PULL if settings.get("cfg") else scale,
        }
    return {
        "prompt": prompt,
        **settings,
        "generic_prompt": texts["generic"],
        "negative_prompt": texts["uncond"],
        "branches": {branch.name: branch.weight for branch in _branches(settings)},
        "bundle": bundle.name,
        "base_model": bundle.hashes.base_model,
        "backend": backend,
        **_subject_recipe(subject, texts),
    }


def _subject_recipe(subject: Subject | None, texts: Mapping[str, str]) -> dict[str, Any]:
    """What a recipe says of the subject: no paths and no photos (see hyperrt/sampling/recipe.py)."""
    if subject is None:
        return {}
    return {
        "subject_prompt": texts["subject"],
        "class_noun": subject.class_noun,
        "photos": subject.photos,
        "combine": subject.metadata.get("combine", "mean"),
        "hypernet": subject.metadata.get("hypernet", ""),
    }


def hash_of(subject: Subject | None) -> dict[str, str]:
    """What tells a recipe's subject from others, as a part of the recipe; of a GPU's LoRA it makes a copy."""
    if subject is None:
        return {}
    digest = hashlib.sha256(b"".join(subject.lora[name].tobytes() for name in VECTORS))
    if subject.image_tokens is not None:
        digest.update(np.asarray(subject.image_tokens).tobytes())
    return {"subject_sha256": digest.hexdigest()}


def _check_subject(subject: Subject, bundle: Bundle) -> None:
    for name in VECTORS:
        packed(subject, name, bundle.layout.size(name), there=True)
    check_tokens("the subject", subject.image_tokens, bundle.token_shape)
    prompts.check_text(subject.metadata.get("trigger", ""), "subject's trigger")
    found, wanted = subject.metadata.get("base_model"), bundle.hashes.base_model
    if found not in (None, wanted):
        why = f"its base model is {found[:12]!r}, the bundle's {wanted[:12]!r}"
        raise LoraMismatch(
            "the subject was made for another base model", why, "make it again with this bundle"
        )


def _texts(
    bundle: Bundle, prompt: str, subject: Subject | None, known: bool, options: SamplingConfig
) -> dict[str, str]:
    """The prompt of every branch, by the branch's name; `known`: there is a subject, or will be."""
    rules, generic = bundle.prompts, options.generic_prompt
    if not known and rules.placeholder.lower() in prompt.lower():
        log.warning("the prompt has %s but there is no subject: the base model draws it", rules.placeholder)
    noun = subject.class_noun if subject else rules.default_class
    trigger = subject.metadata.get("trigger", "") if subject else ""
    if subject and subject.is_foreign:
        split = prompts.split_for_trigger(prompt, trigger, noun, rules.token, rules.placeholder)
        for text in prompts.warnings_of_trigger(prompt, split.subject, trigger, rules.placeholder):
            log.warning("%s", text)
    else:
        split = prompts.split_prompt(prompt, noun, trigger or rules.token, rules.placeholder, known)
    of_base = split.generic if generic is None else _plain(generic, "generic prompt", rules.placeholder)
    empty = _plain(options.negative_prompt, "negative prompt", rules.placeholder) or split.empty
    return {
        "uncond": empty,
        "subject_uncond": empty,
        # Among pairs that have one, a pair without a subject draws its prompt on both rows.
        "subject": split.subject if known else of_base,
        "generic": of_base,
    }


def _plain(text: str, name: str, placeholder: str) -> str:
    if placeholder.lower() in text.lower():
        why = "it goes to the base model, which knows no subject"
        raise BadPrompt(f"the {name} has {placeholder}", why, "leave it out")
    return prompts.check_text(text, name)
