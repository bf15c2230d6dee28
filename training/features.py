"""What the frozen encoders see, computed once: image features on disk, text features in memory.

Pixels are [n, 3, S, S] in [-1, 1] (mean and standard deviation 0.5), features [n, T, F], text [n, L, D].
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from hyperrt import files
from training.base import Base, tokens
from training.data import SceneCache

log = logging.getLogger("training")

CLIP_VISION = "clip_vision_model"  # model_type of transformers' CLIPVisionModel, with projection or not


def pixels(images: np.ndarray, size: int) -> Tensor:
    """uint8 [n, H, W, 3] => [n, 3, size, size] in [-1, 1]."""
    if images.shape[1:3] != (size, size):
        resized = [Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC) for image in images]
        images = np.stack([np.asarray(image) for image in resized])
    return torch.from_numpy(np.array(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


def encode_pixels(encoder: nn.Module, pixels: Tensor) -> Tensor:
    """Pixels as the encoder takes them => the features that hypernetwork and image prompt read [n, T, F].

    Of CLIP's vision model what goes into its last layer, as IP-Adapter does: the last layer is trained to
    leave in the first token what a text can say, and forgets the rest. Of a ViT its output.
    """
    if encoder.config.model_type == CLIP_VISION:
        return encoder(pixels, output_hidden_states=True).hidden_states[-2]
    return encoder(pixels).last_hidden_state


@torch.no_grad()
def encode_images(base: Base, images: np.ndarray) -> Tensor:
    """uint8 [n, H, W, 3] => features [n, T, F]."""
    device = next(base.image_encoder.parameters()).device
    return encode_pixels(
        base.image_encoder, pixels(images, base.image_encoder.config.image_size).to(device)
    )


@torch.no_grad()
def encode_text(base: Base, prompts: Sequence[str]) -> Tensor:
    """Prompts => hidden states [n, L, D], padded to the tokenizer's full length."""
    device = next(base.text_encoder.parameters()).device
    return base.text_encoder(tokens(base.tokenizer, prompts).to(device)).last_hidden_state


@dataclass(frozen=True)
class CaptionTable:
    """Hidden states of every caption of a cache: `hidden[subject[identity, view]]`; row 0: no text."""

    hidden: Tensor  # [captions, L, D]
    subject: np.ndarray  # [N, V] row of the caption with the token
    generic: np.ndarray  # [N, V] row of the caption without


def caption_table(base: Base, cache: SceneCache, token: str) -> CaptionTable:
    """Encodes each different caption of the cache once."""
    identities, views = np.indices(cache.backgrounds.shape)
    captions = [""]
    found = []
    for word in (token, None):
        different, index = np.unique(
            cache.captions(identities.ravel(), views.ravel(), word), return_inverse=True
        )
        found.append(index.reshape(identities.shape) + len(captions))
        captions += [str(caption) for caption in different]
    hidden = torch.cat([encode_text(base, captions[k : k + 64]) for k in range(0, len(captions), 64)])
    return CaptionTable(hidden, *found)


def image_features(base: Base, cache: SceneCache, batch: int = 250) -> np.ndarray:
    """Features of every picture of the cache, (N, V, T, F) float16, memory-mapped.

    They lie in the cache's folder; the encoder's weights are part of their name: another one computes anew.
    """
    path = cache.path / f"features-{fingerprint(base, cache)}.npy"
    if not path.exists():
        start = time.perf_counter()
        files.publish(path, lambda file: _write_features(file, base, cache, batch), force=True)
        log.info(
            "image features of %d pictures in %.0f s", cache.backgrounds.size, time.perf_counter() - start
        )
    return np.load(path, mmap_mode="r")


def fingerprint(base: Base, cache: SceneCache) -> str:
    """Twelve hex digits that stand for the encoder's weights and the cache's pictures."""
    digest = hashlib.sha256()
    for name, tensor in base.image_encoder.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    digest.update(str(cache.images.shape).encode())
    digest.update(np.ascontiguousarray(cache.images[:: max(1, len(cache.images) // 64)]).tobytes())
    return digest.hexdigest()[:12]


def _write_features(file: BinaryIO, base: Base, cache: SceneCache, batch: int) -> None:
    pictures = cache.images.reshape(-1, *cache.images.shape[2:])
    shape = tuple(encode_images(base, pictures[:1]).shape[1:])
    header = {"descr": "<f2", "fortran_order": False, "shape": (*cache.images.shape[:2], *shape)}
    np.lib.format.write_array_header_1_0(file, header)
    for start in range(0, len(pictures), batch):
        file.write(
            encode_images(base, pictures[start : start + batch]).cpu().numpy().astype(np.float16).tobytes()
        )


def feature_statistics(features: np.ndarray, sample: int = 512) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation [F] over pictures and tokens, from some evenly spaced identities."""
    some = np.asarray(features[:: max(1, len(features) // sample)], np.float32).reshape(
        -1, features.shape[-1]
    )
    return torch.from_numpy(some.mean(0)), torch.from_numpy(some.std(0))
