"""Photos to a subject: image encoder, weight decoder, mean over the photos.

pixels [photos, 3, S, S] -> features [photos, T, F] -> lora_q [photos, Nq], lora_kv [photos, Nkv] -> mean, each [N].
The factors themselves are averaged (arXiv 2511.03156, several reference images), not the products A B.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines.base import Engine
from hyperrt import images as photo_files
from hyperrt.errors import BadImage, BadInput, NumericError

log = logging.getLogger("hyperrt")

Photo = Any  # path, [H, W, 3] uint8, or PIL image
Photos = str | os.PathLike[str] | Sequence[Photo]
Pixels = NDArray[np.float32]


def read_photos(photos: Photos, strict: bool = False) -> list[NDArray[np.uint8]]:
    """Every usable photo as [H, W, 3] uint8; one that is not is logged as a warning and left out.

    Args:
        photos: a folder, a file, or a sequence of files, arrays and PIL images.
        strict: raise on the first photo that cannot be used.

    Raises:
        BadInput: no photo is left, or one is bad and `strict` is on.
        NotFound: the folder or a file does not exist.
    """
    if isinstance(photos, (str, os.PathLike)) and Path(photos).is_dir():
        folder = photo_files.load_folder(Path(photos), strict=strict)
        for name, reason in folder.rejected:
            log.warning("left out %s: %s", name, reason)
        return list(folder.images)
    return list(_read_each(_as_sequence(photos), strict))


def predict_lora(pixels: Pixels, image_encoder: Engine, weight_decoder: Engine) -> dict[str, Pixels]:
    """The mean LoRA of photos [photos, 3, S, S]: `lora_q` [Nq] and `lora_kv` [Nkv].

    Photos go through one at a time, so that memory does not grow with their number.

    Raises:
        NumericError: a weight is NaN or infinite.
    """
    sums: dict[str, NDArray[np.float64]] = {}
    for photo in pixels:
        features = image_encoder.run({"pixels": photo[np.newaxis]})["features"]
        for name, rows in weight_decoder.run({"features": features}).items():
            sums[name] = sums.get(name, 0.0) + rows[0].astype(np.float64)
    lora = {name: (total / len(pixels)).astype(np.float32) for name, total in sums.items()}
    check_finite(lora, "the predicted LoRA")
    return lora


def check_finite(tensors: Mapping[str, NDArray[Any]], what: str) -> None:
    """Refuse NaN and infinity.

    Raises:
        NumericError: naming the tensor and how many of its numbers are not finite.
    """
    for name, tensor in tensors.items():
        bad = tensor.size - int(np.count_nonzero(np.isfinite(tensor)))
        if bad:
            raise NumericError(
                f"{what} is not a number everywhere",
                f"{bad} of {tensor.size} values of {name} are NaN or infinite",
                "try other settings; if it stays, check the bundle: hyperrt doctor",
            )


def _as_sequence(photos: Photos) -> Sequence[Photo]:
    single = isinstance(photos, (str, os.PathLike)) or not isinstance(photos, Sequence)
    several: Sequence[Photo] = [photos] if single else photos  # type: ignore[assignment, list-item]
    if not several:
        raise BadInput("no photos were given", "a subject needs at least one", "three to five photos are a good number")
    return several


def _read_each(photos: Sequence[Photo], strict: bool) -> Iterator[NDArray[np.uint8]]:
    usable = 0
    first: BadImage | None = None
    for photo in photos:
        try:
            image = photo_files.load_image(photo)
        except BadImage as error:
            if strict:
                raise
            log.warning("left out %s: %s", error.name, error.reason)
            first = first or error
            continue
        usable += 1
        yield image
    if not usable and first:
        raise first
