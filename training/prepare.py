"""Turns a data set into the cache that training/train.py reads.

    hyperrt prepare --layout folders --source DIR --base BASE --output CACHE

A stopped run resumes after the last finished stage:

    pictures   reads the photos, in worker processes (training/data/ingest.py)
    encoders   computes latents, image features and texts (training/data/features.py)
    cache.json is written last

Bad photos are left out and listed in skipped.jsonl; too large a share of them is an error.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import re
import shlex
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch

from hyperrt import files
from hyperrt.cli.options import RenamedOption
from hyperrt.errors import IntegrityError, NotFound, UsageError
from hyperrt.text import printable
from hyperrt.training.data import features, ingest, scenes
from hyperrt.training.data.cache import (
    BACKGROUNDS,
    CAPTIONS,
    DESCRIPTIONS,
    IMAGES,
    LATENTS,
    METADATA,
    NOUNS,
    PictureCache,
    cutout_subjects,
    read_json,
)
from hyperrt.training.data.folders import afhq, celeba, folders
from hyperrt.training.data.shards import webdataset
from hyperrt.training.data.subjects import Dataset, DatasetOptions
from hyperrt.training.data.subjects200k import subjects200k
from hyperrt.training.messages import reported
from hyperrt.training.model import base_model as bases
from hyperrt.training.model import model_config
from hyperrt.training.model.weight_hash import hash_of
from hyperrt.training.run import device

log = logging.getLogger("hyperrt.training")

VERSION = 2  # of the cache; drawn scenes have 1 and 3
ENCODED = ("latents", "mirrored", "features", "text", "pooled")
FILES = (IMAGES, NOUNS, CAPTIONS, METADATA, LATENTS, ingest.SKIPPED, BACKGROUNDS, DESCRIPTIONS)
OURS = re.compile(rf"({'|'.join(ENCODED)})-[0-9a-f]+\.npy|\.hyperrt-\w+\.tmp")
MODEL_PARTS = ("vae", "image_encoder", "text_encoder", "text_encoder_2")


@dataclass(frozen=True)
class DatasetLayout:
    """How a data set lies on the disk: a function that reads it, its splits, and options it accepts."""

    read: Callable[[Path, DatasetOptions], Dataset]
    splits: tuple[str, ...] = ("train",)
    options: tuple[str, ...] = ()  # among noun and views


LAYOUTS = {
    "folders": DatasetLayout(folders, options=("noun", "views")),
    "celeba": DatasetLayout(celeba, splits=("train", "eval")),
    "afhq": DatasetLayout(afhq, splits=("train", "eval")),
    "subjects200k": DatasetLayout(subjects200k),
    "cutouts": DatasetLayout(cutout_subjects, splits=("train", "eval"), options=("views",)),
    "webdataset": DatasetLayout(webdataset, options=("noun", "views")),
}


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """The options of one `hyperrt prepare`.

    Raises:
        UsageError: a number is out of range, or the layout does not take an option.
    """

    layout: str
    source: Path  # folder of the data set
    base: Path  # folder of the base model
    output: Path  # folder of the cache
    size: int | None = None  # pixels; None: the size that the model was trained for
    token: str = scenes.TOKEN  # replaces [V] in the encoded texts
    split: str = "train"  # or "eval"
    limit: int | None = None  # maximum number of subjects; of cut-outs, their number
    views: int | None = None  # maximum number of photos per subject
    noun: str | None = None  # of subjects for which the data set gives none
    flip: bool = False  # also encode mirrored pictures, as targets of half the rows
    max_bad: float = 0.05  # largest share of bad photos
    workers: int = 1  # processes that read photos
    force: bool = False  # replace a finished cache
    device: str | None = None  # None: a GPU if there is one

    def __post_init__(self) -> None:
        layout = LAYOUTS.get(self.layout)
        if layout is None:
            raise UsageError(f"there is no layout {self.layout!r}", f"there are {', '.join(LAYOUTS)}")
        if self.split not in layout.splits:
            why = f"it has {' and '.join(layout.splits)}"
            do = "prepare a separate folder for the evaluation"
            raise UsageError(f"the layout {self.layout} has no split {self.split!r}", why, do)
        for name in ("noun", "views"):
            if getattr(self, name) is not None and name not in layout.options:
                why = f"the layout {self.layout} sets it"
                raise UsageError(f"--{name} cannot be set", why, f"leave --{name} out")
        for name in ("size", "limit", "views", "workers"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UsageError(f"{name} is {value}", "it must be at least 1")
        if not 0 <= self.max_bad <= 1:
            raise UsageError(
                f"max_bad is {self.max_bad}", "it is a share, from 0 to 1", "for example: --max-bad 0.05"
            )


def prepare(config: PrepareConfig) -> PictureCache:
    """Makes the cache, or its missing parts; a finished cache with the same settings is kept.

    Raises:
        UsageError: the size does not fit the model; the output holds other files, or another run works on it,
            or it is a finished cache with other settings and `force` is off.
        NotFound, BadInput, IntegrityError: the data set or the base model cannot be read, or has too many bad
            photos.
        FileNotFoundError: a part of the base model is missing.
        ResourceError: the disk is full, or a worker died.
        NumericError: the output of an encoder is not finite.
    """
    bases.parts_of(config.base)
    settings = {
        "version": VERSION, "layout": config.layout, "split": config.split, "size": _size(config),
        "limit": config.limit, "views": config.views, "noun": config.noun,
        "source": _source_hash(config.source),
    }  # fmt: skip
    with _claimed(config.output, config.source):
        if read_json(config.output / CAPTIONS).get(ingest.SETTINGS) != settings:
            _discard_finished(config, settings)
            for path in config.output.iterdir():
                path.unlink()
            _read_pictures(config, settings)
        captions = read_json(config.output / CAPTIONS)
        counts = {name: captions[name] for name in ("names", "photos", "bad", "filtered")}
        ingest.check_share(config.output, counts, config.max_bad)
        cache = PictureCache.read(config.output, counts)
        base = _encoders(config)
        settings |= {"model": _hashes(base), "token": config.token, "flip": config.flip}
        _discard_finished(config, settings)
        encoded = _encode(config, base, cache)
        for path in config.output.iterdir():  # of another model or token
            if path.name.startswith(ENCODED) and path.name not in encoded.values():
                path.unlink()
        metadata = json.dumps({**settings, **counts, **encoded})
        files.publish(config.output / METADATA, lambda file: file.write(metadata.encode()), force=True)
        log.info("%s: %d subjects, %d views of each", config.output, *cache.shape)
        return PictureCache.open(config.output)


def _read_pictures(config: PrepareConfig, settings: dict[str, Any]) -> None:
    size = settings["size"]
    options = DatasetOptions(config.split, config.noun, config.views, config.limit, size)
    dataset = LAYOUTS[config.layout].read(config.source, options)
    ingest.write(config.output, dataset, size, config.limit, config.workers, settings)


def _encode(config: PrepareConfig, base: bases.Encoders, cache: PictureCache) -> dict[str, str]:
    """Runs the second stage; returns the names of its files by kind."""
    arrays = {"latents": features.latents(base, cache)}
    if config.flip:
        arrays["mirrored"] = features.latents(base, cache, mirrored=True)
    arrays["features"] = features.image_features(base, cache)
    captions = features.caption_table(base, cache, config.token)
    arrays["text"] = captions.hidden
    if captions.pooled is not None:
        arrays["pooled"] = captions.pooled
    return {kind: Path(array.filename).name for kind, array in arrays.items()}


def _encoders(config: PrepareConfig) -> bases.Encoders:
    try:
        base = bases.load_encoders(config.base)
    except ValueError as error:
        do = "copy it again, or make it again with hyperrt pretrain"
        raise IntegrityError(f"{config.base} is not a base model", str(error), do) from error
    where = device.pick(config.device)
    if where.type == "cuda":  # TF32 is as precise as the float16 of the files
        torch.set_float32_matmul_precision("high")
    for part in (base.vae, base.text_encoder, base.text_encoder_2, base.image_encoder):
        if part is not None:
            part.to(where)
    return base


def _hashes(base: bases.Encoders) -> dict[str, str]:
    parts = {name: getattr(base, name) for name in MODEL_PARTS}
    return {name: hash_of(part, half=True) for name, part in parts.items() if part is not None}


def _size(config: PrepareConfig) -> int:
    try:
        trained, step = model_config.picture_size(config.base)
    except (ValueError, OSError) as error:
        raise IntegrityError(f"{config.base} is not a base model", str(error), "copy it again") from error
    size = config.size or trained
    if size % step:
        why = f"the model takes multiples of {step}"
        do = f"leave --size out to use {trained}, which it was trained for"
        raise UsageError(f"the size is {size}", why, do)
    return size


def _source_hash(source: Path) -> str:
    """A hash, in hex digits, of the names and sizes of all files of a data set."""
    if not source.exists():
        raise NotFound(f"there is no {source}", "the data set is read from it", "check --source")
    digest = hashlib.sha256()
    walk = os.walk(source) if source.is_dir() else [(str(source.parent), [], [source.name])]
    for folder, subfolders, names in walk:
        subfolders.sort()
        for name in sorted(names):
            path = Path(folder, name)
            size = path.stat().st_size if path.exists() else -1
            digest.update(os.fsencode(f"{path.relative_to(source.parent)} {size}\n"))
    return digest.hexdigest()[: features.HASH_DIGITS]


@contextlib.contextmanager
def _claimed(output: Path, source: Path) -> Iterator[None]:
    """Creates the folder of a cache if it is missing, and locks it for this run.

    Raises:
        UsageError: it holds other files, or another run works on it, or it lies in the data set.
        NotFound: the folder above it does not exist.
    """
    if output.resolve().is_relative_to(source.resolve()):
        why = f"everything in {source} is read, including what would be written there"
        raise UsageError(f"{output} lies in the data set", why, "choose another --output")
    if not output.parent.is_dir():
        why, do = f"{output.name} is written there", shlex.join(["mkdir", "-p", str(output.parent)])
        raise NotFound(f"the folder {output.parent} does not exist", why, do)
    if output.exists() and not output.is_dir():
        raise UsageError(f"{output} is not a folder", "a cache is a folder", "choose another --output")
    output.mkdir(exist_ok=True)
    names = [path.name for path in output.iterdir()]
    others = [name for name in names if name not in FILES and not OURS.fullmatch(name)]
    if others:
        why = f"it holds {printable(others[0])}, and only the files of a cache are replaced"
        raise UsageError(f"{output} is not a cache", why, "choose another --output")
    descriptor = os.open(output, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise UsageError(f"{output} is being prepared", "another run works on it", "wait for it") from error
    finally:
        os.close(descriptor)


def _discard_finished(config: PrepareConfig, settings: dict[str, Any]) -> None:
    """Marks a finished cache with other settings as unfinished.

    Raises:
        UsageError: there is one, and `force` is off.
    """
    finished = read_json(config.output / METADATA)
    if all(finished.get(name) == value for name, value in settings.items()) or not finished:
        return
    if not config.force:
        differing = [name for name, value in settings.items() if finished.get(name) != value]
        why = f"it is a finished cache with other settings: {', '.join(differing)}"
        raise UsageError(f"{config.output} exists", why, "add --force, or choose another --output")
    (config.output / METADATA).unlink()


PATH = click.Path(path_type=Path)
COUNT = click.IntRange(1)


@click.command(context_settings={"show_default": True})
@click.option("--layout", type=click.Choice(list(LAYOUTS)), required=True, help="Format of the data set.")
@click.option("--source", type=PATH, required=True, help="Folder of the data set.")
@click.option(
    "--base",
    cls=RenamedOption,
    former=["--model"],
    type=PATH,
    required=True,
    help="Folder of the base model, with image_encoder/.",
)
@click.option(
    "--output", "-o", type=PATH, required=True, help="Folder of the cache; an unfinished one is continued."
)
@click.option("--size", type=COUNT, help="Side of the pictures, in pixels.  [default: the model's]")
@click.option("--token", default=scenes.TOKEN, help="Replaces [V] in the encoded texts.")
@click.option("--split", type=click.Choice(["train", "eval"]), default="train", help="Part of the data set.")
@click.option("--limit", type=COUNT, help="Maximum number of subjects; of cut-outs, their number.")
@click.option("--views", type=COUNT, help="Maximum number of photos per subject.")
@click.option("--noun", help="Class noun of subjects for which the data set gives none.")
@click.option(
    "--flip", is_flag=True, help="Also encode mirrored pictures; half of the training targets are mirrored."
)
@click.option("--max-bad", type=click.FloatRange(0, 1), default=0.05, help="Largest share of bad photos.")
@click.option("--workers", type=COUNT, default=1, help="Processes that read photos.")
@click.option("--force", is_flag=True, help="Replace a finished cache with other settings.")
@click.option("--device", help="Device of the encoders.  [default: a GPU if there is one]")
def main(**flags: Any) -> None:
    """Turn a data set into the cache that hyperrt train reads.

    \b
    Examples:
      hyperrt prepare --layout folders --source photos --base base --output cache
      hyperrt prepare --layout celeba --source CelebA-HQ --base stable-diffusion-v1-5 --output cache
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _leave)
    with reported():
        prepare(PrepareConfig(**flags))


def _leave(number: int, _: object) -> None:
    raise SystemExit(128 + number)


if __name__ == "__main__":
    main()
