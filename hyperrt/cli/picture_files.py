"""Chooses the names of a command's pictures before the work, and writes the pictures without a collision.

In a folder a picture is called WORDS-OF-PROMPT-SEED.png. If that name is taken, a number follows:
a-mug-7.png, a-mug-7-2.png, a-mug-7-3.png. Two commands that run at the same time get different names. A file
that the user named keeps its name.
"""

from __future__ import annotations

import itertools
import os
import re
import shlex
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hyperrt.errors import UsageError

CHARACTERS, BYTES = 60, 200  # of the prompt in a name; a name has at most 255 bytes on most file systems
# Invisible letters and marks: variation selectors, fillers and others.
INVISIBLE = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]"
)


@dataclass(frozen=True)
class Target:
    """The file of a picture.

    Attributes:
        path: the file.
        stem: of a generated name, without a number; None: the user named the file.
    """

    path: Path
    stem: str | None = None


def targets(output: str | None, prompt: str, seeds: Sequence[int], force: bool = False) -> list[Target]:
    """The file of each picture, checked before the work: a taken name must not cost an hour.

    Args:
        output: `FILE.png` is that file, with `-SEED` before the suffix if there are several pictures; a name
            without a suffix is a folder, which may be new; None is the current folder.
        prompt: names the pictures in a folder.
        seeds: one for each picture.
        force: replace existing files.

    Raises:
        UsageError: the suffix is not .png, or a named file exists, is not a plain file, or is not writable.
        NotFound: the folder of `FILE.png` does not exist.
    """
    from hyperrt import files

    target = Path(output or ".")
    if target.suffix and not os.path.isdir(target) and not (output or "").endswith(("/", os.sep)):
        chosen = [Target(path) for path in _named(target, seeds)]
    elif os.path.lexists(target) and not os.path.isdir(target):
        why = "a name without .png means a folder"
        raise UsageError(f"{target} is not a folder", why, f"use -o {shlex.quote(f'{target}.png')}")
    else:
        stems = [f"{words(prompt)}-{seed}" for seed in seeds]
        if not os.path.isdir(target):  # it will be made: check whether it can be
            parent = next(folder for folder in target.absolute().parents if os.path.exists(folder))
            files.check_file(parent / target.name, force=True)
            return [Target(target / f"{stem}.png", stem) for stem in stems]
        chosen = [Target(_free(target, stem, force), stem) for stem in stems]
    for picture in chosen:
        files.check_file(picture.path, force)
    return chosen


def save(target: Target, image: Any, recipe: Mapping[str, Any], force: bool = False) -> Path:
    """Write a picture with its recipe; returns its path, with another number if the name is taken by now.

    Args:
        image: [H, W, 3] uint8.

    Raises:
        UsageError: a file that the user named exists.
        HyperRTError: as `recipe.save_png`.
    """
    from hyperrt.sampling.recipe import save_png

    path = target.path
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        try:
            save_png(path, image, recipe, force=force)
            return path
        except UsageError:
            if force or target.stem is None or not os.path.lexists(path):
                raise
            path = _free(path.parent, target.stem)


def words(prompt: str) -> str:
    """The letters and digits of a prompt, in any script, as part of a file name for every system."""
    kept: list[str] = []
    for character in INVISIBLE.sub(" ", unicodedata.normalize("NFC", prompt.lower())):
        # Marks, such as the vowels of Devanagari, belong to the letter before them.
        is_mark = kept[-1:] not in ([], ["-"]) and unicodedata.category(character) in ("Mn", "Mc")
        kept.append(character if character.isalnum() or is_mark else "-")
    name = re.sub("-+", "-", "".join(kept)).strip("-")[:CHARACTERS]
    return name.encode()[:BYTES].decode(errors="ignore").strip("-") or "picture"


def _free(folder: Path, stem: str, force: bool = False) -> Path:
    numbers = itertools.chain([""], (f"-{number}" for number in itertools.count(2)))
    names = (folder / f"{stem}{number}.png" for number in numbers)
    return next(path for path in names if force or not os.path.lexists(path))


def _named(target: Path, seeds: Sequence[int]) -> list[Path]:
    if target.suffix.lower() != ".png":
        raise UsageError(
            f"{target} ends in {target.suffix}",
            "pictures are written as PNG",
            f"use -o {shlex.quote(str(target.with_suffix('.png')))}",
        )
    if len(seeds) == 1:
        return [target]
    return [target.with_name(f"{target.stem}-{seed}{target.suffix}") for seed in seeds]
