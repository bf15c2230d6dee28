"""Opens the base model and the scene cache of a measurement: the user's, or random ones.

Random weights of the tiny family's sizes take as long as trained ones, so they do for measurements of time,
and for `--quick`. The subjects of a random cache are drawn, its latents are random.
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

MAKE = "hyperrt pretrain --output RUN, then give --base RUN/base --data RUN/cache"
OF_CAPTIONS = ("text-", "pooled-")  # prefixes of the files that hold encoded captions
IDENTITIES, FEW_IDENTITIES, VIEWS = 96, 16, 4  # a random cache, one of a quick run


@dataclass(frozen=True)
class World:
    """The folders of a base model and of its scene cache."""

    base: Path
    cache: Path

    def training(self, out: Path | str, **settings: Any) -> TrainConfig:
        """The settings of a training on it."""
        return TrainConfig(base=str(self.base), data=str(self.cache), output=str(out), **settings)


def options(description: str | None) -> argparse.ArgumentParser:
    """The options of all scripts that measure a training."""
    parser = report.options(description)
    parser.add_argument("--base", type=Path, metavar="FOLDER", help="the base model")
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="its scene cache, with latents")
    parser.add_argument("--threads", type=int, help="threads of PyTorch (default: PyTorch decides)")
    return parser


@contextlib.contextmanager
def opened(args: argparse.Namespace, random: bool) -> Iterator[World]:
    """The world of --base and --data; without these a random one in a temporary folder.

    Args:
        random: whether random weights are enough.

    Raises:
        NotFound: a folder is missing, or an option is and random weights are not enough.
    """
    if args.base and args.data:
        for folder, part in ((args.base, "unet/config.json"), (args.data, data.LATENTS)):
            if not (folder / part).is_file():
                why = "the folder does not exist, or is not finished"
                raise NotFound(f"{folder} has no {part}", why, f"make it: {MAKE}")
        yield World(args.base, args.data)
    elif args.base or args.data or not random:
        why = "this is measured with a trained base model and the scenes that it was trained on"
        raise NotFound("--base or --data is missing", why, f"make them: {MAKE}")
    else:
        with tempfile.TemporaryDirectory() as folder:
            yield make(Path(folder), FEW_IDENTITIES if args.quick else IDENTITIES)


def make(folder: Path, identities: int = IDENTITIES, seed: int = 0) -> World:
    """Writes a random base model of the tiny family's sizes and a small cache; takes seconds."""
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
    """The same world with captions that name the noun alone, such as "a [V] robot".

    The cache is made once, in `folder`; pictures, latents and image features are links.
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
    """Ends the script on an expected error, with its message and exit code, without a traceback."""
    try:
        yield
    except (HyperRTError, FileNotFoundError) as error:
        sys.stderr.write(f"{error}\n")
        raise SystemExit(getattr(error, "code", NotFound.code)) from None
