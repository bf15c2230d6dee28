"""Tar shards in WebDataset's format, read from front to back without writing to the disk.

    cat/0001.jpg  cat/0001.txt  cat/0001.cls      one sample: files with the same name up to the first dot
    0002.0.png  0002.1.png  0002.json             several photos of one subject

Layout `webdataset`: images are .jpg, .jpeg, .png and .webp; the caption is .txt (0002.0.txt for one photo) or
"caption" in .json; the class noun is "noun" in .json, or .cls, or the option --noun. The default caption is
"a [V] noun". Other files are ignored, but a shard with pickles is refused.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from hyperrt.errors import BadInput, BadPrompt, HyperRTError, IntegrityError, NotFound
from hyperrt.photos import load
from hyperrt.sampling import prompts
from hyperrt.text import printable
from hyperrt.training.data.folders import MAX_VIEWS
from hyperrt.training.data.subjects import (
    Captions,
    Dataset,
    DatasetOptions,
    DatasetSubject,
    LeftOut,
    View,
    captions_of_noun,
    captions_of_text,
)

IMAGES = ("jpg", "jpeg", "png", "webp")
TEXTS = ("txt", "json", "cls")
PICKLES = ("pkl", "pickle", "pyd", "pth", "pt", "ckpt", "dill", "joblib")
MAX_TEXT = 1 << 20  # bytes of a caption or a JSON file


@dataclass
class Sample:
    """The files with one name: suffix ("jpg", "0.txt") -> contents; `problem`: why it cannot be used."""

    name: str
    files: dict[str, bytes] = field(default_factory=dict)
    problem: str = ""


def webdataset(source: Path, options: DatasetOptions) -> Dataset:
    """The subjects of a folder of *.tar files, or of one such file.

    Raises:
        NotFound: there is no shard.
        BadInput, IntegrityError: as `samples`, when the subjects are read.
    """
    shards = shards_of(source)
    max_views = options.views or MAX_VIEWS
    subjects = (subject_of(sample, options.noun) for shard in shards for sample in samples(shard))
    first: list[DatasetSubject | LeftOut] = []
    views = 1
    for item in subjects:  # the first subject decides: fewer photos are repeated, further ones left out
        first.append(item)
        if isinstance(item, DatasetSubject):
            views = min(max_views, len(item.views))
            break
    return Dataset(itertools.chain(first, subjects), views)


def shards_of(source: Path) -> list[Path]:
    """The *.tar files of a folder, in natural order, or `source` if it is a file.

    Raises:
        NotFound: there is no such file.
    """
    if source.is_file():
        return [source]
    paths = [path for path in source.rglob("*.tar") if path.is_file()] if source.is_dir() else []
    if not paths:
        why = "there is no *.tar in it" if source.is_dir() else "there is no such folder or file"
        raise NotFound(f"{source} has no shards", why, "name a folder of tar files")
    return sorted(paths, key=lambda path: load.natural_key(path.as_posix()))


def samples(shard: Path) -> Iterator[Sample]:
    """The samples of one shard, in its order.

    Raises:
        BadInput: it holds a pickle.
        IntegrityError: it is truncated, or not a tar file.
    """
    sample: Sample | None = None
    try:
        with shard.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as archive:
            while (member := archive.next()) is not None:
                archive.members.clear()  # tarfile keeps all members, and a shard may have millions
                name, suffix = _split(member.name)
                if member.isdir() or not suffix:
                    continue
                _refuse_pickle(shard, member.name, suffix)
                if sample is None or sample.name != f"{shard.name}/{name}":
                    if sample is not None:
                        yield sample
                    sample = Sample(f"{shard.name}/{name}")
                _add(sample, suffix, member, archive)
    except HyperRTError:
        raise
    except Exception as error:  # a damaged file may raise anything
        why = printable(str(error)) or type(error).__name__
        raise IntegrityError(f"the shard {shard} is damaged", why, "download or copy it again") from error
    if sample is not None:
        yield sample


def _split(member: str) -> tuple[str, str]:
    """Splits the name of a member into sample and suffix: a/0002.0.png => a/0002, 0.png."""
    folder, slash, base = member.rpartition("/")
    stem, _, suffix = base.partition(".")
    return (f"{folder}{slash}{stem}", suffix.lower()) if stem else (member, "")


def _refuse_pickle(shard: Path, member: str, suffix: str) -> None:
    kind = suffix.rpartition(".")[2]
    if kind in PICKLES:
        why = f"{printable(member)} is a pickle (.{kind}), which can run code when it is loaded"
        raise BadInput(f"the shard {shard} holds a pickle", why, "make the shards again without such files")


def _add(sample: Sample, suffix: str, member: tarfile.TarInfo, archive: tarfile.TarFile) -> None:
    """Reads a member into its sample, unless it is of another kind."""
    kind, path = suffix.rpartition(".")[2], PurePosixPath(member.name)
    if kind not in (*IMAGES, *TEXTS):
        return
    limit = load.MAX_FILE_BYTES if kind in IMAGES else MAX_TEXT
    if path.is_absolute() or ".." in path.parts:
        sample.problem = "its name points outside the archive"
    elif not member.isreg():
        sample.problem = f".{suffix} is a link or a device"
    elif member.size > limit:
        sample.problem = f".{suffix} has {member.size:,} bytes; the limit is {limit:,}"
    elif suffix in sample.files:
        sample.problem = f"it has two .{suffix} files"
    else:
        content = archive.extractfile(member)
        sample.files[suffix] = b"" if content is None else content.read()


def subject_of(sample: Sample, default_noun: str | None = None) -> DatasetSubject | LeftOut:
    """The subject of a sample; `default_noun` is used if the sample gives none."""
    if sample.problem:
        return LeftOut(sample.name, sample.problem)
    photos = sorted((s for s in sample.files if s.rpartition(".")[2] in IMAGES), key=load.natural_key)
    if not photos:
        return LeftOut(sample.name, "it has no image")
    try:
        about = json_of(sample)
        given = about.get("noun") or _text(sample, "cls")
        noun = _noun(str(given)) if given else (default_noun or "")
        views = [
            View(f"{sample.name}.{suffix}", sample.files[suffix], _captions(sample, suffix, about, noun))
            for suffix in photos
        ]
    except (BadPrompt, ValueError) as error:
        return LeftOut(sample.name, error.what if isinstance(error, BadPrompt) else str(error))
    return DatasetSubject(noun or "subject", tuple(views))


def json_of(sample: Sample) -> Mapping[str, object]:
    """The sample's .json; empty without such a file.

    Raises:
        ValueError: it is not a JSON object.
    """
    content = sample.files.get("json")
    if content is None:
        return {}
    with contextlib.suppress(ValueError, RecursionError):
        value = json.loads(content)
        if isinstance(value, dict):
            return value
    raise ValueError("its .json is not a JSON object")


def _captions(sample: Sample, suffix: str, about: Mapping[str, object], noun: str) -> Captions:
    number, dot, _ = suffix.rpartition(".")
    text = _text(sample, f"{number}{dot}txt") or _text(sample, "txt") or about.get("caption")
    if text:
        return captions_of_text(str(text), noun)
    if not noun:
        raise ValueError("it has neither a caption nor a class noun")
    return captions_of_noun(noun)


def _text(sample: Sample, suffix: str) -> str:
    try:
        return sample.files.get(suffix, b"").decode("utf-8-sig").strip()
    except UnicodeDecodeError:
        raise ValueError(f"its .{suffix} is not UTF-8") from None


def _noun(text: str) -> str:
    if text.isdigit():
        raise ValueError(f"its class is the number {text[:20]}, not a noun")
    return prompts.check_text(text, "class noun")
