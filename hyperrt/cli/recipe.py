"""`hyperrt generate --recipe`: what a recipe says below the command line, and what does not fit it."""

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


def chosen(options: Mapping[str, Any], given: Collection[str]) -> dict[str, Any]:
    """What the recipe of `generate --recipe` sets: its own options, but those that the command line gives.

    Args:
        options: of the command, from wherever they come; `recipe` is the file.
        given: names of those that are on the command line.

    Returns:
        Options of the command; `recipe` is the recipe itself.

    Raises:
        NotFound, BadInput: as `recipe.read_any`.
        UsageError: the recipe has no prompt, or had a subject and none is given.
        Incompatible: it is of another base model than the bundle, which the command line does not name.
    """
    name = Path(options["recipe"]).name
    recipe = recipes.read_any(options["recipe"])
    if "prompt" in given:  # the generic prompt belongs to the recipe's own prompt
        recipe = {**recipe, "prompt": options["prompt"], "generic_prompt": None}
    has_subject = bool(options["images"] or options["subject"])
    if recipes.had_subject(recipe) and not has_subject and "prompt" not in given:
        why = "a recipe holds neither photos nor a LoRA"
        do = "give the subject again, with --images or --subject"
        raise UsageError(f"{name} was drawn with a subject, and none is given", why, do)
    found = recipes.options_of(recipe) | _guidance(recipe, given, has_subject)
    found |= _beside(recipe, options, given)
    found = {key: value for key, value in found.items() if key not in given}
    bundle = Bundle.open(found.get("bundle", options["bundle"]))
    _check_bundle(name, recipe, bundle, is_given="bundle" in given)
    return {**found, "recipe": recipe}


def check_subject(recipe: Mapping[str, Any], runtime: Runtime, subject: Subject | None) -> None:
    """Warn where the subject or the backend is another than the recipe's."""
    before, now = recipe.get("subject_sha256"), hash_of(subject).get("subject_sha256")
    if now is not None and before not in (None, now):
        both = _short(now), _short(before)
        log.warning("the subject is %s, the recipe's is %s: the picture will differ", *both)
    backend = recipe.get("backend")
    if backend is not None and backend != runtime.backend:
        both = runtime.backend, short_repr(backend)
        log.warning("the backend is %r, the recipe's is %s: pixels may differ a little", *both)


def _beside(
    recipe: Mapping[str, Any], options: Mapping[str, Any], given: Collection[str]
) -> dict[str, Any]:
    """What `generate` takes of a recipe beside the options of a sampling, as far as it is of use here."""
    names = ("class_noun", "combine", "bundle", "backend")
    noun, combine, bundle, backend = (recipe.get(name) for name in names)
    found = {
        # A new prompt is about the subject that is given, which says itself what it is.
        "class_noun": noun if (options["images"] or options["subject"]) and "prompt" not in given else None,
        "combine": combine if options["images"] and combine in COMBINED else None,
        "bundle": bundle if bundle in packaged() else None,
        "backend": backend if _runs_here(backend) else None,
    }
    return {name: value for name, value in found.items() if value is not None}


def _runs_here(backend: object) -> bool:
    """Whether it is a backend for processors that is installed; a GPU's may be there and not work."""
    known = BACKENDS.get(backend) if isinstance(backend, str) else None
    return bool(known and known.vendor and not known.nvidia and find_spec(known.vendor))


def _guidance(recipe: Mapping[str, Any], given: Collection[str], has_subject: bool) -> dict[str, Any]:
    """The guidance's kind and scale, which is converted where the command line asks for the other kind."""
    before = recipe.get("cfg") is True
    cfg = "cfg" in given or (before and has_subject and "kappa" not in given)
    scale = recipe.get("guidance_scale")
    if before != cfg and isinstance(scale, (int, float)) and 0 <= scale <= MAX_GUIDANCE:
        scale = scale * CFG_PULL if cfg else scale / CFG_PULL
    found = {"cfg": cfg} | ({} if scale is None else {"guidance_scale": scale})
    if cfg or not has_subject:
        found |= {"kappa": None}
    return found if has_subject else {**found, "image_scale": None}


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
    size, here = recipe.get("size"), [bundle.image_size] * 2
    if size is not None and size != here:
        log.warning("%s is %s pixels large, pictures of %r are %s", name, short_repr(size), bundle.name, here)


def _short(sha256: object) -> str:
    return short_repr(sha256[:12] if isinstance(sha256, str) else sha256)
