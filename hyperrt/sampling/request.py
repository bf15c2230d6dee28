"""A request: one order for pictures, with everything filled in that it left open.

    prompts, subjects, SamplingOptions, bundle  =>  resolve()  =>  Request

`resolve` depends on its arguments alone.  A request has one or more pairs of a prompt and a subject, which
are drawn together, n pictures each.  HM-CFG draws a subject; without a subject it is classifier-free guidance
(kappa 0).  The option `cfg` asks for classifier-free guidance of the personalised model.
Source: arXiv 2511.03156, eq. 20.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from hyperrt.arguments import taken
from hyperrt.bundle.bundle import Bundle
from hyperrt.errors import BadPrompt, LoraMismatch, UsageError
from hyperrt.lora.layout import VECTORS
from hyperrt.lora.reader import check_tokens
from hyperrt.lora.subject import Subject, only_subject, packed
from hyperrt.sampling import guidance, prompt_syntax, prompts, solvers
from hyperrt.sampling.guidance import BranchName
from hyperrt.sampling.options import SamplingOptions
from hyperrt.sampling.settings import Settings, branches_of, settle, table_of


class Row(NamedTuple):
    """Conditioning of one row of the UNet batch; equal rows have the same K, V and LoRA.

    Attributes:
        text: the prompt.
        subject: holds the LoRA and the image tokens of the row; None: the base model.
        gate: strength of the LoRA on the row.
        image_scale: scale of the image tokens on the row.
        has_photo: False: the image tokens are those of zero pixels, as beside the empty prompt of CFG.
    """

    text: str
    subject: Subject | None
    gate: float
    image_scale: float
    has_photo: bool = True


@dataclass(frozen=True, eq=False)
class Pair:
    """A prompt and its subject.

    Attributes:
        subject: None draws with the base model alone.
        texts: the prompt of every branch.
        settings: the recipe, without the hash of the subject.
    """

    subject: Subject | None
    texts: Mapping[BranchName, str]
    settings: Mapping[str, Any]

    @property
    def recipe(self) -> dict[str, Any]:
        """What reproduces the pictures, as JSON values; copies a LoRA on a GPU to the host for its hash."""
        return {**self.settings, **hash_of(self.subject)}


@dataclass(frozen=True, eq=False, kw_only=True)
class Request:
    """One order for pictures, resolved.

    Attributes:
        pairs: a prompt with its subject each; all have the same options.
        branches: those whose weight is not zero; all pairs share them.
        table: the solver.
        seed: of the first picture of every pair; picture k has `seed + k`.
        n: pictures of each pair.
        batch_size: pictures of each pair in one engine call.
        strength: of the LoRA, on the subjects' rows.
        image_scale: of the image tokens, on the subjects' rows.
        warnings: what the user should know, one sentence each.
    """

    pairs: tuple[Pair, ...]
    branches: tuple[guidance.Branch, ...]
    table: solvers.SolverTable
    seed: int
    n: int
    batch_size: int
    strength: float
    image_scale: float
    warnings: tuple[str, ...] = ()

    @property
    def rows(self) -> tuple[Row, ...]:
        """[branches x pairs] conditioning, branch-major; requests with equal rows share K, V and LoRA."""
        return tuple(self._row(branch, pair) for branch in self.branches for pair in self.pairs)

    @property
    def weights(self) -> tuple[float, ...]:
        """[branches] weight of each branch in the guidance."""
        return tuple(branch.weight for branch in self.branches)

    @property
    def seeds(self) -> tuple[int, ...]:
        """[n] the seed of each picture."""
        return tuple(range(self.seed, self.seed + self.n))

    @property
    def recipes(self) -> list[dict[str, Any]]:
        """[pairs] what reproduces the pictures, as JSON values."""
        return [pair.recipe for pair in self.pairs]

    def parts(self) -> Iterator[Request]:
        """Requests that draw the same pictures in order, each of one batch."""
        for start in range(0, self.n, self.batch_size):
            n = min(self.batch_size, self.n - start)
            yield dataclasses.replace(self, seed=self.seed + start, n=n)

    def _row(self, branch: guidance.Branch, pair: Pair) -> Row:
        subject = pair.subject
        adapted = branch.personalised and subject is not None
        has_tokens = adapted and subject is not None and subject.image_tokens is not None
        gate, image_scale = self.strength * adapted, self.image_scale * has_tokens
        return Row(pair.texts[branch.name], subject, gate, image_scale, branch.name != "subject_uncond")


def resolve(
    bundle: Bundle,
    backend: str,
    asked: Sequence[str],
    subjects: Sequence[Subject | None],
    options: SamplingOptions,
) -> Request:
    """Turn what was asked into a request; `Runtime.request` describes the arguments.

    Args:
        backend: its name, for the recipe.
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
    settings = settle(bundle, any(subject is not None for subject in subjects), options)
    warnings: list[str] = []
    pairs = []
    for prompt, subject in zip(asked, subjects, strict=True):
        texts, advice = _texts(bundle, prompt, subject, options)
        warnings += advice
        pairs.append(Pair(subject, texts, _recipe(bundle, backend, settings, prompt, subject, texts)))
    all_texts = (*asked, options.negative_prompt, options.generic_prompt or "")
    warnings += prompt_syntax.advice(all_texts, bundle.prompts.placeholder)
    return Request(
        pairs=tuple(pairs),
        branches=branches_of(settings),
        table=table_of(bundle, settings),
        seed=options.seed,
        n=options.n,
        batch_size=options.batch_size,
        strength=options.strength,
        image_scale=settings.image_scale or 0.0,
        warnings=tuple(dict.fromkeys(warnings)),
    )


def is_single(value: Any) -> bool:
    """Whether a prompt or a subject is one, not a sequence of them."""
    if isinstance(value, (str, bytes)) or not isinstance(value, Iterable):
        return True
    return getattr(value, "ndim", 1) == 0  # an array without axes


def as_pairs(prompt: Any, subject: Any) -> tuple[list[str], list[Subject | None]]:
    """The prompts [pairs] and subjects [pairs] of a call that has one of each, or sequences.

    Raises:
        UsageError: one of them is a sequence and the other is not, or a value has another type.
    """
    if is_single(prompt) != is_single(subject):
        raise UsageError(
            "the prompt and the subject do not go together",
            "one is a sequence and the other is not",
            "pass one prompt and one subject or None, or a list of each, of one length",
        )
    asked, subjects = ([prompt], [subject]) if is_single(prompt) else (list(prompt), list(subject))
    if paths := [item for item in subjects if isinstance(item, (str, os.PathLike))]:
        why = "a subject is what personalize or load_subject returns, and this is the name of a file"
        do = "read it with runtime.load_subject first"
        raise UsageError(f"subject is {str(paths[0])[:200]!r}", why, do)
    texts = [taken("prompt", item, str) for item in asked]
    return texts, [taken("subject", item, Subject | None) for item in subjects]


def blank_subject(bundle: Bundle) -> Subject:
    """A subject with a LoRA of zeros, to resolve a request with before the photos are read."""
    lora = {name: np.zeros(bundle.layout.size(name), np.float32) for name in VECTORS}
    return Subject(lora, bundle.prompts.default_class, 1, {"base_model": bundle.hashes.base_model})


def noun_in(prompt: str, bundle: Bundle) -> str | None:
    """The noun after the placeholder, if the bundle knows it: "a [V] mug on a table" is about a mug."""
    rules = bundle.prompts
    words = prompt.lower().partition(rules.placeholder.lower())[2].split()
    for length in (2, 1):
        noun = " ".join(words[:length]).rstrip(".,;:!?)")
        if noun in rules.nouns:
            return noun
    return None


def _recipe(
    bundle: Bundle,
    backend: str,
    settings: Settings,
    prompt: str,
    subject: Subject | None,
    texts: Mapping[BranchName, str],
) -> dict[str, Any]:
    """What reproduces the pictures of one pair, as if it had been drawn alone."""
    if subject is None:
        scale = settings.guidance_scale / (guidance.CFG_PULL if settings.cfg else 1)
        settings = dataclasses.replace(
            settings, kappa=0.0, guidance_scale=scale, cfg=False, image_scale=None
        )
    return {
        "prompt": prompt,
        **settings.for_recipe(),
        "generic_prompt": texts["generic"],
        "negative_prompt": texts["uncond"],
        "branches": {branch.name: branch.weight for branch in branches_of(settings)},
        "bundle": bundle.name,
        "base_model": bundle.hashes.base_model,
        "backend": backend,
        **_subject_recipe(subject, texts),
    }


def _subject_recipe(subject: Subject | None, texts: Mapping[BranchName, str]) -> dict[str, Any]:
    """The part of a recipe about the subject: no paths and no photos (see sampling/recipe.py)."""
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
    """The sha256 of a subject's weights, as a part of a recipe; copies a LoRA on a GPU to the host."""
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
    theirs, ours = subject.metadata.get("base_model"), bundle.hashes.base_model
    if theirs not in (None, ours):
        why = f"its base model is {theirs[:12]!r}, the bundle's {ours[:12]!r}"
        do = "make it again with this bundle"
        raise LoraMismatch("the subject was made for another base model", why, do)


def _texts(
    bundle: Bundle, prompt: str, subject: Subject | None, options: SamplingOptions
) -> tuple[dict[BranchName, str], list[str]]:
    """The prompt of every branch, and warnings."""
    rules, generic, warnings = bundle.prompts, options.generic_prompt, []
    if subject is None and rules.placeholder.lower() in prompt.lower():
        what = f"the prompt has {rules.placeholder} but there is no subject"
        warnings = [f"{what}: the base model draws it"]
    noun = subject.class_noun if subject else rules.default_class
    trigger = subject.metadata.get("trigger", "") if subject else ""
    if subject and subject.is_foreign:
        split = prompts.split_for_trigger(prompt, trigger, noun, rules.token, rules.placeholder)
        warnings += prompts.warnings_of_trigger(prompt, split.subject, trigger, rules.placeholder)
    else:
        token = trigger or rules.token
        split = prompts.split_prompt(prompt, noun, token, rules.placeholder, subject is not None)
    of_base = split.generic if generic is None else _plain(generic, "generic prompt", rules.placeholder)
    empty = _plain(options.negative_prompt, "negative prompt", rules.placeholder) or split.empty
    texts: dict[BranchName, str] = {
        "uncond": empty,
        "subject_uncond": empty,
        # Beside pairs with a subject, a pair without one has its plain prompt in both rows.
        "subject": of_base if subject is None else split.subject,
        "generic": of_base,
    }
    return texts, warnings


def _plain(text: str, name: str, placeholder: str) -> str:
    if placeholder.lower() in text.lower():
        why = "it goes to the base model, which knows no subject"
        raise BadPrompt(f"the {name} has {placeholder}", why, "leave it out")
    return prompts.check_text(text, name)
