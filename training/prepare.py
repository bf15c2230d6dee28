"""Makes of a data set the cache that training/train.py reads.

    hyperrt prepare --layout folders --source DIR --model BASE --output CACHE

Stages, each of which is kept when a later one is stopped:

    pictures   reads the photos, in worker processes (training/data/ingest.py)
    encoders   latents, image features, texts (training/data/features.py)
    cache.json is written last

What cannot be read is left out and named in skipped.jsonl; more than a share of it ends the work.
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

VERSION = 2  # of the cache; 1 and 3 are those of drawn scenes
ENCODED = ("latents", "mirrored", "features", "text", "pooled")
FILES = (IMAGES, NOUNS, CAPTIONS, METADATA, LATENTS, ingest.SKIPPED, BACKGROUNDS, DESCRIPTIONS)
OURS = re.compile(rf"({'|'.join(ENCODED)})-[0-9a-f]+\.npy|\.hyperrt-\w+\.tmp")
MODEL_PARTS = ("vae", "image_encoder", "text_encoder", "text_encoder_2")


@dataclass(frozen=True)
class DatasetLayout:
    """How a data set lies on the disk, and which options are of use to it."""

    find: Callable[[Path, DatasetOptions], Dataset]
    splits: tuple[str, ...] = ("train",)
    options: tuple[str, ...] = ()  # of noun, views


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
    """One `hyperrt prepare`.

    Raises:
        UsageError: a number is out of range, or an option is of another layout.
    """

    layout: str
    source: Path  # folder of the data set
    model: Path  # folder of the base model
    output: Path  # folder of the cache
    size: int | None = None  # pixels; None: what the model was trained for
    token: str = scenes.TOKEN  # stands for [V] in the texts that are encoded
    split: str = "train"  # or "eval"
    limit: int | None = None  # most subjects; of cut-outs, how many to make
    views: int | None = None  # most photos of a subject
    noun: str | None = None  # of subjects that do not say what they are
    flip: bool = False  # also encode mirrored pictures, as targets of half the rows
    max_bad: float = 0.05  # share of the photos that may be left out for being bad
    workers: int = 1  # processes that read photos
    force: bool = False  # replace a finished cache
    device: str | None = None  # None: a GPU if there is one

    def __post_init__(self) -> None:
        layout = LAYOUTS.get(self.layout)
        if layout is None:
            raise UsageError(f"there is no layout {self.layout!r}", f"there are {', '.join(LAYOUTS)}")
        if self.split not in layout.splits:
            why = f"it has {' and '.join(layout.splits)}"
            do = "prepare a folder of its own for the evaluation"
            raise UsageError(f"the layout {self.layout} has no split {self.split!r}", why, do)
        for name in ("noun", "views"):
            if getattr(self, name) is not None and name not in layout.options:
                why = f"the layout {self.layout} knows that itself"
                raise UsageError(f"--{name} is of no use here", why, f"leave --{name} out")
        for name in ("size", "limit", "views", "workers"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UsageError(f"{name} is {value}", "it must be at least 1")
        if not 0 <= self.max_bad <= 1:
            raise UsageError(f"max_bad is {self.max_bad}", "it is a share, from 0 to 1", "--max-bad 0.05")


def prepare(config: PrepareConfig) -> PictureCache:
    """Makes the cache, or what is still missing of it; one that is finished and the same is kept.

    Raises:
        UsageError: the size does not fit the model; the output is no folder of ours, or another run works on
            it, or it is a finished cache of another make-up and `force` is off.
        NotFound, BadInput, IntegrityError: the data set or the base model cannot be read, or too much is bad.
        FileNotFoundError: a part of the base model is missing.
        ResourceError: the disk is full, or a worker died.
        NumericError: an encoder made no finite numbers.
    """
    bases.parts_of(config.model)
    recipe = {
        "version": VERSION, "layout": config.layout, "split": config.split, "size": _size(config),
        "limit": config.limit, "views": config.views, "noun": config.noun, "source": _listing(config.source),
    }  # fmt: skip
    with _claimed(config.output, config.source):
        if read_json(config.output / CAPTIONS).get("recipe") != recipe:
            _give_up_finished(config, recipe)
            for path in config.output.iterdir():
                path.unlink()
            _read_pictures(config, recipe)
        about = read_json(config.output / CAPTIONS)
        about = {name: about[name] for name in ("names", "photos", "bad", "filtered")}
        ingest.check_share(config.output, about, config.max_bad)
        cache = PictureCache.read(config.output, about)
        base = _encoders(config)
        made = {**recipe, "model": _hashes(base), "token": config.token, "flip": config.flip}
        _give_up_finished(config, made)
        encoded = _encode(config, base, cache)
        for path in config.output.iterdir():  # of another model or token
            if path.name.startswith(ENCODED) and path.name not in encoded.values():
                path.unlink()
        done = json.dumps({**made, **about, **encoded})
        files.publish(config.output / METADATA, lambda file: file.write(done.encode()), force=True)
        log.info("%s: %d subjects, %d views of each", config.output, *cache.shape)
        return PictureCache.open(config.output)


def _read_pictures(config: PrepareConfig, recipe: dict[str, Any]) -> None:
    size = recipe["size"]
    options = DatasetOptions(config.split, config.noun, config.views, config.limit, size)
    found = LAYOUTS[config.layout].find(config.source, options)
    ingest.write(config.output, found, size, config.limit, config.workers, recipe)


def _encode(config: PrepareConfig, base: bases.Encoders, cache: PictureCache) -> dict[str, str]:
    """The second stage; the names of its files by kind."""
    found = {"latents": features.latents(base, cache)}
    if config.flip:
        found["mirrored"] = features.latents(base, cache, mirrored=True)
    found["features"] = features.image_features(base, cache)
    captions = features.caption_table(base, cache, config.token)
    found["text"] = captions.hidden
    if captions.pooled is not None:
        found["pooled"] = captions.pooled
    return {kind: Path(array.filename).name for kind, array in found.items()}


def _encoders(config: PrepareConfig) -> bases.Encoders:
    try:
        base = bases.load_encoders(config.model)
    except ValueError as error:
        do = "copy it again, or make it again with hyperrt pretrain"
        raise IntegrityError(f"{config.model} is no base model", str(error), do) from error
    where = device.pick(config.device)
    if where.type == "cuda":  # TF32 is as exact as the float16 that the files have
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
        trained, step = model_config.picture_size(config.model)
    except (ValueError, OSError) as error:
        raise IntegrityError(f"{config.model} is no base model", str(error), "copy it again") from error
    size = config.size or trained
    if size % step:
        why = f"the model takes multiples of {step}"
        do = f"leave --size out for {trained}, which it was trained for"
        raise UsageError(f"the size is {size}", why, do)
    return size


def _listing(source: Path) -> str:
    """Hex digits that stand for the names and sizes of all files of a data set."""
    if not source.exists():
        raise NotFound(f"there is no {source}", "it was to be prepared", "check --source")
    digest = hashlib.sha256()
    walk = os.walk(source) if source.is_dir() else [(str(source.parent), [], [source.name])]
    for folder, folders_in, names in walk:
        folders_in.sort()
        for name in sorted(names):
            path = Path(folder, name)
            size = path.stat().st_size if path.exists() else -1
            digest.update(os.fsencode(f"{path.relative_to(source.parent)} {size}\n"))
    return digest.hexdigest()[: features.HASH_DIGITS]


@contextlib.contextmanager
def _claimed(output: Path, source: Path) -> Iterator[None]:
    """The folder of a cache, made or found, for this run alone.

    Raises:
        UsageError: it holds something else, or another run has it, or it lies in the data set.
        NotFound: the folder above it does not exist.
    """
    if output.resolve().is_relative_to(source.resolve()):
        why = f"{source} is read, and what is written there would be read, too"
        raise UsageError(f"{output} lies in the data set", why, "choose another --output")
    if not output.parent.is_dir():
        why, do = f"{output.name} is to be written there", shlex.join(["mkdir", "-p", str(output.parent)])
        raise NotFound(f"the folder {output.parent} does not exist", why, do)
    if output.exists() and not output.is_dir():
        raise UsageError(f"{output} is no folder", "the cache is one", "choose another name")
    output.mkdir(exist_ok=True)
    names = [path.name for path in output.iterdir()]
    strangers = [name for name in names if name not in FILES and not OURS.fullmatch(name)]
    if strangers:
        why = f"it holds {printable(strangers[0])}, and only a cache is replaced"
        raise UsageError(f"{output} is no cache", why, "name a new folder")
    descriptor = os.open(output, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise UsageError(f"{output} is being prepared", "another run works on it", "wait for it") from error
    finally:
        os.close(descriptor)


def _give_up_finished(config: PrepareConfig, wanted: dict[str, Any]) -> None:
    """Makes a finished cache an unfinished one if it is not what is wanted.

    Raises:
        UsageError: it would be, and `force` is off.
    """
    finished = read_json(config.output / METADATA)
    if all(finished.get(name) == value for name, value in wanted.items()) or not finished:
        return
    if not config.force:
        differing = [name for name, value in wanted.items() if finished.get(name) != value]
        why = f"it is a finished cache, of which {', '.join(differing)} would change"
        raise UsageError(f"{config.output} exists", why, "add --force, or choose another --output")
    (config.output / METADATA).unlink()


PATH = click.Path(path_type=Path)
COUNT = click.IntRange(1)


@click.command(context_settings={"show_default": True})
@click.option("--layout", type=click.Choice(list(LAYOUTS)), required=True, help="How the data set lies.")
@click.option("--source", type=PATH, required=True, help="Folder of the data set.")
@click.option("--model", type=PATH, required=True, help="Folder of the base model, with image_encoder/.")
@click.option("--output", type=PATH, required=True, help="Folder of the cache; an unfinished one goes on.")
@click.option("--size", type=COUNT, help="Of the pictures, in pixels [default: the model's].")
@click.option("--token", default=scenes.TOKEN, help="Stands for [V] in the texts that are encoded.")
@click.option("--split", type=click.Choice(["train", "eval"]), default="train")
@click.option("--limit", type=COUNT, help="Most subjects; of cut-outs, how many to make.")
@click.option("--views", type=COUNT, help="Most photos of a subject.")
@click.option("--noun", help="Class of subjects that do not say what they are.")
@click.option("--flip", is_flag=True, help="Half of the targets will be mirrored.")
@click.option("--max-bad", type=click.FloatRange(0, 1), default=0.05, help="Share of photos that may be bad.")
@click.option("--workers", type=COUNT, default=1, help="Processes that read photos.")
@click.option("--force", is_flag=True, help="Replace a finished cache of another make-up.")
@click.option("--device", help="Of the encoders [default: a GPU if there is one].")
def main(**flags: Any) -> None:
    """Turn a data set into the cache that hyperrt train reads.

    \b
    Examples:
      hyperrt prepare --layout folders --source photos --model base --output cache
      hyperrt prepare --layout celeba --source CelebA-HQ --model stable-diffusion-v1-5 --output cache
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _leave)
    with reported():
        prepare(PrepareConfig(**flags))


def _leave(number: int, _: object) -> None:
    raise SystemExit(128 + number)


if __name__ == "__main__":
    main()
