"""Features, latents and text of a cache: computed once by the frozen encoders and kept beside the cache.

    latents-*   (N, V, C, h, w)  the VAE's of the pictures, scaled as the UNet takes them
    features-*  (N, V, T, F)     the image encoder's, which hypernetwork and image prompt read
    text-*      (n, L, D)        the text encoder's of every different caption; row 0: no text
    pooled-*    (n, P)           SDXL's pooled text of the same

All float16 and memory-mapped: of ViT-H's 257 tokens a picture has 658 KB, of SDXL's text a caption 315 KB.
They are written a batch at a time and appear whole. A name ends in a hash of the weights that made the file
and of what they saw, so that another encoder, or other pictures, make another file.
"""

from __future__ import annotations

import hashlib
import logging
import math
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor, nn

from hyperrt import files
from hyperrt.errors import Incompatible, NumericError, ResourceError
from hyperrt.training.data.cache import PictureCache
from hyperrt.training.messages import warn
from hyperrt.training.model.base_model import Encoders
from hyperrt.training.model.encode import Text, encode_images, encode_latents, encode_prompts, preprocess_of
from hyperrt.training.model.weight_hash import hash_of

log = logging.getLogger("hyperrt.training")

HASH_DIGITS = 12
PICTURES_AT_ONCE, PROMPTS_AT_ONCE = 64, 64
PIXELS_AT_ONCE = 1 << 22  # the VAE encodes so many at a time: 16 pictures of 512 pixels
LATENTS_COMPARED, MOST_LATENTS_ERROR = 4, 0.1  # pictures; the error of bf16 is 0.01, of another VAE about 1
STATISTICS_NUMBERS = 1 << 26  # 256 MB, and NumPy takes some copies


@dataclass(frozen=True)
class CaptionTable:
    """The encoded captions of a cache, one row each; row 0 is the empty prompt."""

    hidden: np.ndarray  # [captions, L, D] float16
    pooled: np.ndarray | None  # [captions, P] of SDXL
    subject: np.ndarray  # [N, V] row of the caption with the token
    generic: np.ndarray  # [N, V] row of the caption without

    def text(self, rows: np.ndarray) -> Text:
        """Some rows, in fp32."""
        hidden = torch.from_numpy(self.hidden[rows].astype(np.float32))
        if self.pooled is None:
            return Text(hidden)
        return Text(hidden, torch.from_numpy(self.pooled[rows].astype(np.float32)))


def caption_table(base: Encoders, cache: PictureCache, token: str) -> CaptionTable:
    """Encodes each different caption of the cache once."""
    who, views = (index.ravel() for index in np.indices(cache.shape))
    row_of = {"": 0}
    subject, generic = (
        np.array([row_of.setdefault(text, len(row_of)) for text in cache.captions(who, views, word)])
        for word in (token, None)
    )
    texts = list(row_of)
    name = _text_hash(base, texts)
    hidden, pooled = cache.path / f"text-{name}.npy", cache.path / f"pooled-{name}.npy"
    if not hidden.exists() or (base.text_encoder_2 is not None and not pooled.exists()):
        _write_text(base, texts, hidden, pooled)
    return CaptionTable(
        np.load(hidden, mmap_mode="r"),
        None if base.text_encoder_2 is None else np.load(pooled, mmap_mode="r"),
        subject.reshape(cache.shape),
        generic.reshape(cache.shape),
    )


def image_features(base: Encoders, cache: PictureCache) -> np.ndarray:
    """Features of every picture of the cache, (N, V, T, F) float16, memory-mapped."""
    name = f"features-{fingerprint(base.image_encoder, cache, preprocess_of(base.image_encoder.config))}.npy"
    return _of_pictures(cache, name, lambda pictures: encode_images(base, pictures), PICTURES_AT_ONCE)


def latents(base: Encoders, cache: PictureCache, mirrored: bool = False) -> np.memmap:
    """Latents of every picture, or of its mirror image, (N, V, C, h, w) float16, memory-mapped."""
    name = f"{'mirrored' if mirrored else 'latents'}-{_of_vae(base, cache)}.npy"
    batch = max(1, min(PICTURES_AT_ONCE, PIXELS_AT_ONCE // cache.images.shape[2] ** 2))
    return _of_pictures(cache, name, lambda pictures: encode_latents(base, pictures, mirrored), batch)


def check_latents(base: Encoders, cache: PictureCache) -> None:
    """Check that the latents of a cache are those of this VAE.

    Those of training/prepare.py are told by their name. Of others a few are made again and compared; if they
    differ, a warning says so: a script may train on latents that are no pictures', to see how fast it is.

    Raises:
        Incompatible: prepared ones are another's.
    """
    what = f"the cache {cache.path} does not fit the base model"
    meaning = "latents of one VAE mean nothing to another"
    name = cache.metadata.get("latents")
    if name is None:
        if not (error := _latents_error(base, cache)) <= MOST_LATENTS_ERROR:
            why = f"its latents are {error:.0%} off what the VAE makes of its pictures; {meaning}"
            warn(what, why, "give --base the model that hyperrt pretrain made with it, or make both anew")
    elif name != f"latents-{_of_vae(base, cache)}.npy":
        why = f"it was prepared for a base model with another VAE, and {meaning}"
        raise Incompatible(what, why, "prepare it again with hyperrt prepare --force")


def _latents_error(base: Encoders, cache: PictureCache) -> float:
    """|z - z'| / |z'| over a few pictures: z are the latents of the cache, z' those of the VAE."""
    count = min(len(cache.latents), len(cache.images))  # the numbers are compared elsewhere
    subjects = np.linspace(0, count - 1, min(count, LATENTS_COMPARED)).astype(int)
    stored = torch.from_numpy(cache.latents[subjects, 0].astype(np.float32))
    expected = encode_latents(base, cache.images[subjects, 0]).cpu()
    if stored.shape != expected.shape:
        return math.inf
    return float((stored - expected).norm() / expected.norm())


def fingerprint(encoder: nn.Module, cache: PictureCache, *more: object) -> str:
    """Hex digits that identify the encoder's weights (alike in fp32 and fp16, not bf16) and some pictures."""
    digest = hashlib.sha256(repr((hash_of(encoder, half=True), cache.images.shape, more)).encode())
    for picture in cache.images[:: max(1, len(cache.images) // 64), 0]:
        digest.update(picture.tobytes())
    return digest.hexdigest()[:HASH_DIGITS]


def _of_vae(base: Encoders, cache: PictureCache) -> str:
    """`fingerprint` of the VAE, and of its statistics where it has them: other names stay as they were."""
    scale = base.latent_scale
    return fingerprint(base.vae, cache, *([scale] if scale.mean else []))


def feature_statistics(features: np.ndarray, sample: int = 512) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation [F] over pictures and tokens, from some evenly spaced subjects."""
    sample = min(sample, max(1, STATISTICS_NUMBERS // features[0].size))
    some = np.asarray(features[:: max(1, len(features) // sample)], np.float32).reshape(
        -1, features.shape[-1]
    )
    return torch.from_numpy(some.mean(0)), torch.from_numpy(some.std(0))


def _of_pictures(cache: PictureCache, name: str, encode: Callable[[np.ndarray], Tensor], batch: int) -> Any:
    """[subjects, V, ...] `encode` of each picture of the cache; a file of that name is not written again."""
    path = cache.path / name
    if not path.exists():
        parts = _encoded_subjects(cache, encode, batch)
        _write(path, cache.shape, parts, f"{name.partition('-')[0]} of {cache.counts.sum():,} pictures")
    return np.load(path, mmap_mode="r")


def _encoded_subjects(
    cache: PictureCache, encode: Callable[[np.ndarray], Tensor], batch: int
) -> Iterator[np.ndarray]:
    """[some subjects, V, ...], one part after the other; each different view is encoded once."""
    subjects, views = cache.shape
    step = max(1, batch // views)
    for start in range(0, subjects, step):
        counts = cache.counts[start : start + step, None]
        different = np.arange(views) < counts
        rows = encode(cache.images[start : start + step][different])
        yield _half(rows, f"subjects {start} to {start + len(counts) - 1}")[
            np.cumsum(counts)[:, None] - counts + np.arange(views) % counts
        ]


def _half(rows: Tensor, which: str) -> np.ndarray:
    """The rows as float16; values that float16 cannot hold are refused."""
    with np.errstate(over="ignore"):
        half = rows.cpu().numpy().astype(np.float16)
    if not np.isfinite(half).all():
        why = f"an encoder made NaN, infinity or too large a number of {which}"
        do = "check the weights of the base model"
        raise NumericError("the encoded values cannot be used for training", why, do)
    return half


def _write(path: Path, leading: Sequence[int], parts: Iterator[np.ndarray], what: str) -> None:
    """Writes the parts in order as one .npy of shape (*leading, ...), whole or not at all.

    Raises:
        ResourceError: the disk is too small, which shows after the first part.
    """
    began = time.perf_counter()

    def write(file: BinaryIO) -> None:
        done = 0
        for part in parts:
            shape = (*leading, *part.shape[len(leading) :])
            if not done:
                _check_room(path.parent, 2 * int(np.prod(shape)), what)
                header = {"descr": "<f2", "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(file, header)
            file.write(part.tobytes())
            before, done = done, done + len(part)
            if done * 10 // leading[0] > before * 10 // leading[0]:
                seconds = time.perf_counter() - began
                log.info("%s: %d %% in %.0f s", what, 100 * done // leading[0], seconds)

    files.publish(path, write, force=True)


def _check_room(folder: Path, needed: int, what: str) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        why = f"{needed / 1e9:,.1f} GB are needed, {free / 1e9:,.1f} GB are free"
        what = f"the disk of {folder} has no room for the {what}"
        raise ResourceError(what, why, "make room, or use another disk")


def _write_text(base: Encoders, texts: Sequence[str], hidden: Path, pooled: Path) -> None:
    seconds: list[np.ndarray] = []

    def parts() -> Iterator[np.ndarray]:
        for start in range(0, len(texts), PROMPTS_AT_ONCE):
            which = f"captions {start} to {start + PROMPTS_AT_ONCE - 1}"
            encoded = encode_prompts(base, texts[start : start + PROMPTS_AT_ONCE])
            if encoded.pooled is not None:
                seconds.append(_half(encoded.pooled, which))
            yield _half(encoded.hidden_states, which)

    _write(hidden, (len(texts),), parts(), f"text of {len(texts):,} captions")
    if seconds:
        files.publish(pooled, lambda file: np.save(file, np.concatenate(seconds)), force=True)


def _text_hash(base: Encoders, texts: Sequence[str]) -> str:
    """Hex digits that stand for the text encoders, their tokenizers, and the texts."""
    digest = hashlib.sha256()
    for encoder in (base.text_encoder, base.text_encoder_2):
        if encoder is not None:
            digest.update(hash_of(encoder, half=True).encode())
    for tokenizer in (base.tokenizer, base.tokenizer_2):
        if tokenizer is not None:
            about = sorted(tokenizer.get_vocab().items()), tokenizer.model_max_length, tokenizer.pad_token
            digest.update(repr(about).encode())
    digest.update(repr((base.zero_empty, texts)).encode())
    return digest.hexdigest()[:HASH_DIGITS]
