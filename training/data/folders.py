"""Layouts of photos in folders: one folder per subject, CelebA-HQ, AFHQ-v2.

    folders  DIR/SUBJECT/*.jpg, as in DreamBench; or DIR/*.jpg, one subject. The class noun is read from
             SUBJECT/class.txt, or "class_noun" in SUBJECT/metadata.json, or DIR/prompts_and_classes.txt (the
             file of google/dreambooth), or the option --noun
    celeba   DIR/0.jpg ... 29999.jpg; each photo is a subject; 29,800 train, the last 100 are for evaluation
    afhq     DIR/{train,test}/{cat,dog,wild}/*.png; each photo is a subject

Links are not followed, pipes and devices not opened, hidden files ignored.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

from hyperrt.errors import BadInput, BadPrompt, NotFound
from hyperrt.photos import load
from hyperrt.sampling import prompts
from hyperrt.text import printable
from hyperrt.training.data.subjects import (
    Captions,
    Dataset,
    DatasetOptions,
    DatasetSubject,
    LeftOut,
    View,
    captions_of_noun,
)

MAX_VIEWS = 8  # default maximum of a subject
CLASS_FILE, METADATA, TABLE = "class.txt", "metadata.json", "prompts_and_classes.txt"
MAX_TEXT = 65_536  # bytes of one of these files
CELEBA = {"train": range(29_800), "eval": range(29_900, 30_000)}  # the paper leaves out the 100 between
AFHQ = {"cat": "cat", "dog": "dog", "wild": "wild animal"}  # folder -> noun
AFHQ_SPLITS = {"train": ("train",), "eval": ("test", "val")}  # "val" in AFHQ's first version


def folders(source: Path, options: DatasetOptions) -> Dataset:
    """One folder per subject.

    Raises:
        NotFound, BadInput: the folder does not exist or holds no photos, or a subject has no class noun.
    """
    photos = {folder: _photos(folder) for folder in _folders(source)} or {source: _photos(source)}
    if not any(photos.values()):
        why = f"neither it nor one of its {len(photos):,} folders has a file named like a photo"
        raise BadInput(f"{source} holds no photos", why, "name a folder that has one folder for each subject")
    table = _class_table(source)
    max_views = options.views or MAX_VIEWS
    subjects: list[DatasetSubject | LeftOut] = []
    for folder, paths in photos.items():
        if not paths:
            subjects.append(LeftOut(folder.name, "it holds no photos"))
            continue
        noun = _noun(folder, table, options.noun)
        views = [_view(path, folder.name, captions_of_noun(noun)) for path in paths[:max_views]]
        subjects.append(DatasetSubject(noun, tuple(views)))
    return Dataset(iter(subjects), min(max_views, max(map(len, photos.values()))))


def celeba(source: Path, options: DatasetOptions) -> Dataset:
    """CelebA-HQ: numbered photos of faces; errors as `folders`."""
    photos = _photos(source)
    numbers = CELEBA[options.split]
    subjects: list[DatasetSubject | LeftOut] = []
    for path in photos:
        if number(path) is None:
            subjects.append(LeftOut(path.name, "its name is not a number"))
        elif number(path) in numbers:
            subjects.append(DatasetSubject("face", (_view(path, "", captions_of_noun("face")),)))
    if not any(isinstance(subject, DatasetSubject) for subject in subjects):
        why = f"none of its {len(photos):,} photos is numbered from {numbers.start:,} to {numbers.stop - 1:,}"
        what = f"{source} has no photos of the split {options.split!r}"
        raise BadInput(what, why, "check --source and --split")
    return Dataset(iter(subjects), 1)


def number(path: Path) -> int | None:
    """The number in a name of CelebA-HQ, "00012.jpg"; None if the name is not a number."""
    return int(path.stem[:18]) if path.stem.isascii() and path.stem.isdigit() else None


def afhq(source: Path, options: DatasetOptions) -> Dataset:
    """AFHQ-v2: animals of three classes, in a fixed order that mixes them; errors as `folders`."""
    names = AFHQ_SPLITS[options.split]
    folder = next((source / name for name in names if (source / name).is_dir()), None)
    if folder is None:
        why = f"it has no folder {' or '.join(names)}"
        raise NotFound(f"{source} is not AFHQ", why, "name the folder that holds train and test")
    subjects = [
        DatasetSubject(noun, (_view(path, kind, captions_of_noun(noun)),))
        for kind, noun in AFHQ.items()
        if (folder / kind).is_dir()
        for path in _photos(folder / kind)
    ]
    if not subjects:
        why = f"its folders {', '.join(AFHQ)} hold none"
        raise BadInput(f"{folder} holds no photos", why, "check --source")
    subjects.sort(key=lambda subject: hashlib.sha256(os.fsencode(subject.views[0].name)).digest())
    return Dataset(iter(subjects), 1)


def _view(path: Path, folder: str, captions: Captions) -> View:
    return View(f"{folder}/{path.name}" if folder else path.name, path, captions)


def _folders(source: Path) -> Iterator[Path]:
    for entry in load.entries(source):
        if entry.is_dir(follow_symlinks=False):
            yield Path(entry.path)


def _photos(folder: Path) -> list[Path]:
    """The files named like photos, in natural order; their contents are checked when they are read."""
    return [
        Path(entry.path)
        for entry in load.entries(folder)
        if Path(entry.name).suffix.lower() in load.SUFFIXES and not entry.is_dir(follow_symlinks=False)
    ]


def _noun(folder: Path, table: dict[str, str], default: str | None) -> str:
    """The class noun of a subject, from the first source that gives one."""
    noun = _text(folder / CLASS_FILE) or _from_json(folder / METADATA) or table.get(folder.name) or default
    name = printable(folder.name)
    do = f"write it into {CLASS_FILE} in its folder, or give one noun for all subjects: --noun dog"
    if not noun:
        raise BadInput(f"the class noun of the subject {name!r} is unknown", "captions need a noun", do)
    try:
        return prompts.check_text(noun, "class noun")
    except BadPrompt as error:
        raise BadInput(f"the class noun of the subject {name!r} cannot be used", error.what, do) from error


def _from_json(path: Path) -> str | None:
    text = _text(path)
    if text is None:
        return None
    try:
        noun = json.loads(text)["class_noun"]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        why = f"it has no class_noun: {type(error).__name__}"
        raise BadInput(f"{path} cannot be used", why, 'write {"class_noun": "dog"} into it') from error
    return str(noun)


def _class_table(source: Path) -> dict[str, str]:
    """{subject: class} from the first part of google/dreambooth's file; empty without this file."""
    classes, _, _ = (_text(source / TABLE) or "").partition("Prompts")
    rows = [line.split(",") for line in classes.splitlines()]
    return {row[0].strip(): row[1].strip() for row in rows if len(row) == 2}


def _text(path: Path) -> str | None:
    """The contents of a small text file; None if it does not exist."""
    if path.is_symlink() or not path.is_file():
        return None
    with path.open("rb") as file:
        return file.read(MAX_TEXT).decode("utf-8-sig", errors="replace").strip()
