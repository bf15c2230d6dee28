"""Downloads base models and VAEs from the Hugging Face hub: only the files that are read.

A repository often holds a model several times: in parts and as one file, in two precisions, as pickles, with
a safety checker and LoRAs. The names of its files decide which are downloaded.
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

Choice = Callable[[Sequence[str]], list[str]]  # names of a repository's files => those to download


def configuration(files: Iterable[str]) -> list[str]:
    """The configurations and licences of a base model."""
    return [name for name in files if name in CONFIGURATION or LICENSE.fullmatch(name)]


def base_model(files: Iterable[str], but: Sequence[str] = ()) -> list[str]:
    """`configuration`, and the weights of each part in one precision.

    but: parts whose weights are not needed.

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
    """The configuration and weights of a VAE, whose repository may be a base model's; errors as above."""
    files = list(files)
    folder = "vae/" if "vae/config.json" in files else ""
    others = [name for name in files if name == f"{folder}config.json" or LICENSE.fullmatch(name)]
    return [*others, *_part(files, folder, STEMS["vae"])]


def _part(files: Sequence[str], folder: str, stem: str) -> list[str]:
    """The weights of the part in `folder`, which ends with a slash or is ""."""
    inside = [name.removeprefix(folder) for name in files if name.startswith(folder)]
    if not (names := weights(inside, stem)):
        pickled = next((name for name in inside if name.endswith((".bin", ".ckpt"))), "")
        why = f"there is no {folder}{stem}.safetensors"
        why += f"; {folder}{pickled} is a pickle, which can run code, and is not read" if pickled else ""
        raise BadInput(f"{folder or 'the repository'} has no safetensors", why, CONVERT)
    return [folder + name for name in names]


def fetch(model: str, offline: bool, choice: Choice, kind: str = "base model") -> Path:
    """Downloads the files of `choice`; returns the folder of their snapshot.

    Args:
        model: OWNER/NAME@COMMIT.
        offline: use only files already in the Hugging Face cache.
        kind: of the model, for errors.

    Raises:
        UsageError: there is no revision, or it is not a commit.
        NotFound: it is not a hub id, or cannot be downloaded.
        BadInput: `choice` refuses the repository.
    """
    if not HUB_ID.fullmatch(model):
        if re.fullmatch(r"[\w.-]+/[\w.-]+(@.*)?", model) and not os.path.lexists(model):
            why = "a name without the commit's 40 digits can mean another model tomorrow"
            raise UsageError(f"{model} has no pinned revision", why, "write OWNER/NAME@COMMIT")
        do = "check the path, or write OWNER/NAME@COMMIT for one of the hub"
        raise NotFound(f"there is no {kind} {model}", "it is not a folder, a file or a hub id", do)
    name, _, revision = model.partition("@")
    try:
        return _cached(name, revision) if offline else _downloaded(name, revision, choice)
    except BadInput as error:
        raise BadInput(f"{model}: {error.what}", error.why, error.do) from None
    except Exception as error:  # the hub's client and the library below it have no common class of errors
        why = "--offline is given, and it is not in the cache" if offline else first_line(error)
        do = "give a folder, or download it on a machine with a network"
        raise NotFound(f"{model} cannot be downloaded from the hub", why, do) from error


def _downloaded(name: str, revision: str, choice: Choice) -> Path:
    import huggingface_hub

    try:
        files = huggingface_hub.list_repo_files(name, revision=revision)
    except Exception:  # as above; a cached snapshot is as good, since a commit does not change
        with contextlib.suppress(OSError):
            return _cached(name, revision)
        raise
    patterns = [glob.escape(file) for file in choice(files)]
    return Path(huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=patterns))


def _cached(name: str, revision: str) -> Path:
    """The folder of a cached snapshot; files that it lacks are reported when they are read."""
    import huggingface_hub

    options = {"revision": revision, "local_files_only": True, "allow_patterns": []}
    return Path(huggingface_hub.snapshot_download(name, **options))
