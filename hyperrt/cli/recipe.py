"""`hyperrt generate --recipe`: the options that a recipe sets, and warnings if model or subject differ."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Collection, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hyperrt.bundle.bundle import Bundle, packaged
from hyperrt.engines.backends import BACKENDS
from hyperrt.errors import Incompatible, UsageError
from hyperrt.lora.names import COMBINED
from hyperrt.lora.subject import Subject
from hyperrt.runtime import Runtime
from hyperrt.sampling import recipe as recipes
from hyperrt.sampling.guidance import CFG_PULL
from hyperrt.sampling.options import MAX_GUIDANCE
from hyperrt.sampling.request import hash_of
from hyperrt.text import short_repr

log = logging.getLogger("hyperrt")


def options_from(options: Mapping[str, Any], given: Collection[str]) -> dict[str, Any]:
    """The options that a recipe sets, except those on the command line.

    Args:
        options: of the command, from all sources; `recipe` is the file.
        given: names of the options on the command line.

    Returns:
        Options of the command; `recipe` is the content of the file.

    Raises:
        NotFound, BadInput: as `recipe.read_any`.
        UsageError: the recipe has no prompt, or had a subject and none is given.
        Incompatible: the recipe has another base model than the bundle, and --bundle is not given.
    """
    name = Path(options["recipe"]).name
    recipe = recipes.read_any(options["recipe"])
    if "prompt" in given:  # the recipe's generic prompt goes with its own prompt
        recipe = {**recipe, "prompt": options["prompt"], "generic_prompt": None}
    has_subject = bool(options["images"] or options["subject"])
    if recipes.had_subject(recipe) and not has_subject and "prompt" not in given:
        why = "a recipe holds neither photos nor a LoRA"
        do = "give the subject again, with --images or --subject"
        raise UsageError(f"{name} was drawn with a subject, and none is given", why, do)
    chosen = recipes.options_of(recipe) | _guidance(recipe, given, has_subject)
    chosen |= _other_options(recipe, options, given)
    chosen = {key: value for key, value in chosen.items() if key not in given}
    bundle = Bundle.open(chosen.get("bundle", options["bundle"]))
    _check_bundle(name, recipe, bundle, is_given="bundle" in given)
    return {**chosen, "recipe": recipe}


def check_subject(recipe: Mapping[str, Any], runtime: Runtime, subject: Subject | None) -> None:
    """Warn if the subject or the backend differs from the recipe's."""
    before, now = recipe.get("subject_sha256"), hash_of(subject).get("subject_sha256")
    if now is not None and before not in (None, now):
        both = _short(now), _short(before)
        log.warning("the subject is %s, the recipe's is %s: the picture will differ", *both)
    backend = recipe.get("backend")
    if backend is not None and backend != runtime.backend:
        both = runtime.backend, short_repr(backend)
        log.warning("the backend is %r, the recipe's is %s: pixels may differ a little", *both)


def _other_options(
    recipe: Mapping[str, Any], options: Mapping[str, Any], given: Collection[str]
) -> dict[str, Any]:
    """The options of a recipe that are not sampling options, if they can be used here."""
    names = ("class_noun", "combine", "bundle", "backend")
    noun, combine, bundle, backend = (recipe.get(name) for name in names)
    chosen = {
        # A new prompt is about the subject that is given, which has its own class noun.
        "class_noun": noun if (options["images"] or options["subject"]) and "prompt" not in given else None,
        "combine": combine if options["images"] and combine in COMBINED else None,
        "bundle": bundle if bundle in packaged() else None,
        "backend": backend if _runs_here(backend) else None,
    }
    return {name: value for name, value in chosen.items() if value is not None}


def _runs_here(backend: object) -> bool:
    """Whether it is an installed backend for processors; one for GPUs may be installed and not work."""
    entry = BACKENDS.get(backend) if isinstance(backend, str) else None
    return bool(entry and entry.vendor and not entry.nvidia and find_spec(entry.vendor))


def _guidance(recipe: Mapping[str, Any], given: Collection[str], has_subject: bool) -> dict[str, Any]:
    """The kind of guidance and its scale, converted if the command line asks for the other kind."""
    before = recipe.get("cfg") is True
    cfg = "cfg" in given or (before and has_subject and "kappa" not in given)
    scale = recipe.get("guidance_scale")
    if before != cfg and isinstance(scale, (int, float)) and 0 <= scale <= MAX_GUIDANCE:
        scale = scale * CFG_PULL if cfg else scale / CFG_PULL
    chosen = {"cfg": cfg} | ({} if scale is None else {"guidance_scale": scale})
    if cfg or not has_subject:
        chosen |= {"kappa": None}
    return chosen if has_subject else {**chosen, "image_scale": None}


def _check_bundle(name: str, recipe: Mapping[str, Any], bundle: Bundle, is_given: bool) -> None:
    before, now = recipe.get("base_model"), bundle.hashes.base_model
    if isinstance(before, str) and not now.startswith(before):
        drawn_with = short_repr(recipe.get("bundle"))
        what = f"{name} was drawn with {drawn_with}, whose base model is {_short(before)}"
        why = f"the base model of {bundle.name!r} is {_short(now)}"
        if recipe.get("schema") and not is_given:
            this = shlex.join(["--bundle", str(bundle.path)])
            do = f"name the other bundle's folder with --bundle, or draw it with this one: {this}"
            raise Incompatible(what, why, do)
        log.warning("%s; %s: the picture will differ", what, why)
    size, own_size = recipe.get("size"), [bundle.image_size] * 2
    if size is not None and size != own_size:
        both = short_repr(size), bundle.name, own_size
        log.warning("%s is %s pixels large, pictures of %r are %s", name, *both)


def _short(sha256: object) -> str:
    return short_repr(sha256[:12] if isinstance(sha256, str) else sha256)
