"""The base model and the scene cache that a measurement is made on: the user's, or random ones.

Random weights in the tiny family's sizes are worth as much as trained ones where time is measured, and enough
to see whether a script is in order (`--quick`). Drawn subjects, random latents.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import report
import torch

from hyperrt import files
from hyperrt.errors import HyperRTError, NotFound
from hyperrt.training.data import cache as data
from hyperrt.training.data import clip_tokenizer
from hyperrt.training.model import base_model as bases
from hyperrt.training.run.config import TrainConfig

MAKE = "hyperrt pretrain --out RUN; then say --model RUN/base --data RUN/cache"
OF_CAPTIONS = ("text-", "pooled-")  # files that hold what the text encoders make of them
IDENTITIES, FEW_IDENTITIES, VIEWS = 96, 16, 4  # of a random cache, and of that of a quick run


@dataclass(frozen=True)
class World:
    """Folders of a base model and of its scene cache."""

    base: Path
    cache: Path

    def training(self, out: Path | str, **settings: Any) -> TrainConfig:
        """The settings of a training on it."""
        return TrainConfig(base=str(self.base), data=str(self.cache), output=str(out), **settings)


def options(description: str | None) -> argparse.ArgumentParser:
    """What all scripts take that measure a training."""
    parser = report.options(description)
    parser.add_argument("--model", type=Path, metavar="BASE", help="folder of the base model")
    parser.add_argument("--data", type=Path, metavar="CACHE", help="folder of its scene cache, with latents")
    parser.add_argument("--threads", type=int, help="threads of PyTorch (default: its own choice)")
    return parser


@contextlib.contextmanager
def opened(args: argparse.Namespace, random: bool) -> Iterator[World]:
    """The world that the options name; where they name none, a random one for as long as it is open.

    Args:
        random: whether random weights will do.

    Raises:
        NotFound: a folder is missing, or none is named and random weights will not do.
    """
    if args.model and args.data:
        for folder, part in ((args.model, "unet/config.json"), (args.data, data.LATENTS)):
            if not (folder / part).is_file():
                why = "it is not there, or not finished"
                raise NotFound(f"{folder} has no {part}", why, f"make it: {MAKE}")
        yield World(args.model, args.data)
    elif args.model or args.data or not random:
        why = "it is measured on a trained base model and the scenes that it was trained on"
        raise NotFound("--model or --data is missing", why, f"make them: {MAKE}")
    else:
        with tempfile.TemporaryDirectory() as folder:
            yield make(Path(folder), FEW_IDENTITIES if args.quick else IDENTITIES)


def make(folder: Path, identities: int = IDENTITIES, seed: int = 0) -> World:
    """Writes a random base model of the tiny family's sizes and a small cache: seconds."""
    torch.manual_seed(seed)
    tokenizer = clip_tokenizer.build(folder / "base" / "tokenizer", bases.MAX_TOKENS)
    parts = bases.Base(
        unet=bases.tiny_unet(), vae=bases.tiny_vae(), text_encoder=bases.tiny_text_encoder(tokenizer),
        tokenizer=tokenizer, image_encoder=bases.tiny_image_encoder(), scheduler=bases.tiny_scheduler(),
    )  # fmt: skip
    bases.save(parts, folder / "base")
    data.build(folder / "cache", identities, VIEWS, bases.IMAGE_SIZE, workers=1)
    shape = (identities, VIEWS, bases.LATENT_CHANNELS, bases.IMAGE_SIZE // 8, bases.IMAGE_SIZE // 8)
    latents = np.random.default_rng(seed).standard_normal(shape, np.float32)
    np.save(folder / "cache" / data.LATENTS, latents.astype(np.float16))
    return World(folder / "base", folder / "cache")


def captioned_by_noun(world: World, folder: Path) -> World:
    """The same world, every picture captioned "a [V] robot", whatever its scene; made once in that folder.

    Pictures, latents and image features are links to those of the cache.
    """
    if not (folder / data.CAPTIONS).is_file():  # written last
        folder.mkdir(parents=True, exist_ok=True)
        for path in world.cache.resolve().iterdir():
            if path.name == data.CAPTIONS or path.name.startswith(OF_CAPTIONS):
                continue
            link = folder / path.name
            link.unlink(missing_ok=True)
            link.symlink_to(path)
        cache = data.PictureCache.open(world.cache)
        views = cache.images.shape[1]
        texts = [[(f"a [V] {cache.names[noun]}", f"a {cache.names[noun]}")] * views for noun in cache.nouns]
        content = json.dumps({"texts": texts}).encode()
        files.publish(folder / data.CAPTIONS, lambda file: file.write(content), force=True)
    return World(world.base, folder)


@contextlib.contextmanager
def refusals() -> Iterator[None]:
    """An error raised on purpose ends a script as its message and its exit code."""
    try:
        yield
    except (HyperRTError, FileNotFoundError) as error:
        sys.stderr.write(f"{error}\n")
        raise SystemExit(getattr(error, "code", NotFound.code)) from None
