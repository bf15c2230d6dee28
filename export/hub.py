"""Base models and VAEs on the Hugging Face hub: exactly the files that are read, and no others.

A repository often holds a model several times: in parts and as one file, in two precisions, as pickles, with
a safety checker and LoRAs. Which of its files are read follows from their names.
"""

from __future__ import annotations

import contextlib
import glob
import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from hyperrt.errors import BadInput, NotFound, UsageError
from hyperrt.training.messages import first_line
from hyperrt.training.model.model_config import STEMS, weights

CONVERT = "convert it: diffusers' DiffusionPipeline.save_pretrained(FOLDER, safe_serialization=True)"
LICENSE = re.compile(r"LICENSE[^/]*")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+@[0-9a-f]{40}")
TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt",
)  # fmt: skip
CONFIGURATION = (
    "model_index.json",
    "scheduler/scheduler_config.json",
    *(f"{folder}/{name}" for folder in ("tokenizer", "tokenizer_2") for name in TOKENIZER),
    *(f"{part}/config.json" for part in STEMS),
)

Choice = Callable[[Sequence[str]], list[str]]  # names of a repository's files => those that are read


def configuration(files: Iterable[str]) -> list[str]:
    """What a base model's folder says of its parts, and its licence."""
    return [name for name in files if name in CONFIGURATION or LICENSE.fullmatch(name)]


def base_model(files: Iterable[str], but: Sequence[str] = ()) -> list[str]:
    """`configuration`, and the weights of each part in one precision; but: parts whose weights are elsewhere.

    Raises:
        BadInput: a part has no safetensors.
    """
    files = list(files)
    parts = [part for part in STEMS if part not in but and f"{part}/config.json" in files]
    return [
        *configuration(files),
        *(name for part in parts for name in _part(files, f"{part}/", STEMS[part])),
    ]


def vae(files: Iterable[str]) -> list[str]:
    """A VAE's configuration and weights, of a repository of its own or of a base model's; errors as above."""
    files = list(files)
    place = "vae/" if "vae/config.json" in files else ""
    others = [name for name in files if name == f"{place}config.json" or LICENSE.fullmatch(name)]
    return [*others, *_part(files, place, STEMS["vae"])]


def _part(files: Sequence[str], place: str, stem: str) -> list[str]:
    """The weights of the part whose folder begins with `place`."""
    inside = [name.removeprefix(place) for name in files if name.startswith(place)]
    if not (found := weights(inside, stem)):
        pickled = next((name for name in inside if name.endswith((".bin", ".ckpt"))), "")
        why = f"there is no {place}{stem}.safetensors"
        why += f"; {place}{pickled} is a pickle, which can run code, and is not read" if pickled else ""
        raise BadInput(f"{place or 'the repository'} has no safetensors", why, CONVERT)
    return [place + name for name in found]


def fetch(model: str, offline: bool, choice: Choice, kind: str = "base model") -> Path:
    """The folder of a snapshot that has the files of `choice`.

    Args:
        model: OWNER/NAME@COMMIT.
        offline: nothing but what was downloaded before.
        kind: what to call it in an error.

    Raises:
        UsageError: there is no revision, or it can mean another model tomorrow.
        NotFound: it is no hub id, or cannot be had.
        BadInput: `choice` finds none in the repository.
    """
    if not HUB_ID.fullmatch(model):
        if re.fullmatch(r"[\w.-]+/[\w.-]+(@.*)?", model) and not os.path.lexists(model):
            why = "a name without the commit's 40 digits can mean another model tomorrow"
            raise UsageError(f"{model} has no pinned revision", why, "write OWNER/NAME@COMMIT")
        do = "check the path, or write OWNER/NAME@COMMIT for one of the hub"
        raise NotFound(f"there is no {kind} {model}", "it is no folder, no file and no hub id", do)
    name, _, revision = model.partition("@")
    try:
        return _cached(name, revision) if offline else _downloaded(name, revision, choice)
    except BadInput as error:
        raise BadInput(f"{model}: {error.what}", error.why, error.do) from None
    except Exception as error:  # the hub's client and the library below it have no common one
        why = "--offline is given, and it was not downloaded before" if offline else first_line(error)
        do = "give a folder, or download it on a machine with a network"
        raise NotFound(f"{model} cannot be had from the hub", why, do) from error


def _downloaded(name: str, revision: str, choice: Choice) -> Path:
    import huggingface_hub

    try:
        files = huggingface_hub.list_repo_files(name, revision=revision)
    except Exception:  # as above; what was downloaded before is as good: a commit does not change
        with contextlib.suppress(OSError):
            return _cached(name, revision)
        raise
    wanted = [glob.escape(file) for file in choice(files)]
    return Path(huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=wanted))


def _cached(name: str, revision: str) -> Path:
    """A snapshot that is on this machine; which of its files are missing is said when they are read."""
    import huggingface_hub

    found = huggingface_hub.snapshot_download(
        name, revision=revision, local_files_only=True, allow_patterns=[]
    )
    return Path(found)
