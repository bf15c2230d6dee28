"""Photos to the weights of a subject: image encoder, weight decoder, mean over the photos.

pixels [photos, 3, S, S] -> features [photos, T, F] -> lora_q [photos, Nq], lora_kv [photos, Nkv] -> mean.
In the open category also features -> image_tokens [photos, tokens, width] -> mean.
The factors themselves are averaged (arXiv 2511.03156, several reference images), not the products A B, unless
something else is asked for: hyperrt/lora/combine.py.

On a device features stay there, and so does the LoRA of a single photo; the mean of several is the host's.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hyperrt.bundle.manifest import Manifest
from hyperrt.engines.base import Engine
from hyperrt.engines.dlpack import DeviceArray
from hyperrt.errors import BadImage, BadInput, NumericError
from hyperrt.lora import combine as combining
from hyperrt.lora.layout import LoraLayout, Vector
from hyperrt.lora.subject import LoraOnDevice
from hyperrt.photos import load as photo_files
from hyperrt.text import printable

log = logging.getLogger("hyperrt")

MOST_SAID = 10  # photos that have a line each of what is wrong with them; a folder may hold thousands

Photo = Any  # path, bytes, open binary file, [H, W, 3] uint8, or PIL image
Photos = str | os.PathLike[str] | Iterable[Photo]
Features = Vector | DeviceArray


def read_photos(photos: Photos, strict: bool = False) -> list[NDArray[np.uint8]]:
    """Every usable photo as [H, W, 3] uint8; one that is not is logged as a warning and left out.

    A photo that is nearly one colour is used, with a warning.

    Args:
        photos: a folder, a photo (a file's name, its contents, an open binary file, an array [H, W, 3] of
            uint8, a PIL image), an array [n, H, W, 3], or several of all these: a list, set or generator.
        strict: raise on the first photo that cannot be used.

    Raises:
        BadInput: no photo is left, or one is bad and `strict` is on, or these are no photos.
        NotFound: the folder or a file does not exist.
    """
    usable: list[NDArray[np.uint8]] = []
    names: list[str] = []
    bad: list[BadImage] = []
    for number, photo in enumerate(_each(photos), start=1):
        if isinstance(photo, (str, os.PathLike)) and os.path.isdir(photo):
            folder = photo_files.load_folder(Path(photo), strict=strict)
            bad += [BadImage(name, reason) for name, reason in folder.rejected]
            usable += folder.images
            names += folder.names
            continue
        name = _name(photo, number)
        try:
            usable.append(photo_files.load_image(photo, name=name))
            names.append(name)
        except BadImage as error:
            if strict:
                raise
            bad.append(error)
    if not usable:
        raise bad[0] if len(bad) == 1 else _none_left(bad)
    blank = [name for name, image in zip(names, usable, strict=True) if photo_files.is_blank(image)]
    _warn([f"left out {error.name}: {error.reason}" for error in bad], "left out %s more photos")
    _warn([f"{name} shows no subject: it is nearly one colour" for name in blank], "and so do %s more photos")
    return usable


def encode_photos(pixels: Vector, image_encoder: Engine) -> list[Features]:
    """Pixels [photos, 3, S, S] to features [1, T, F], one per photo.

    Photos go through one at a time, so that memory does not grow with their number.
    """
    return [image_encoder.run({"pixels": photo[np.newaxis]}, host=False)["features"] for photo in pixels]


def predict_lora(features: Sequence[Features], weight_decoder: Engine) -> Mapping[str, Vector]:
    """The mean LoRA of the photos whose features [1, T, F] are given: `lora_q` [Nq] and `lora_kv` [Nkv].

    Raises:
        NumericError: a weight is NaN or infinite.
    """
    lora = _mean_over_photos(features, weight_decoder, ("lora_q", "lora_kv"))
    check_finite(lora, "the predicted LoRA")
    there = {n: x.reshape(x.shape[1:]) for n, x in lora.items() if isinstance(x, DeviceArray)}
    here = {n: x[0] for n, x in lora.items() if isinstance(x, np.ndarray)}
    return LoraOnDevice(there) if there else here


def lora_of(
    features: Sequence[Features], weight_decoder: Engine, layout: LoraLayout, combine: str
) -> Mapping[str, Vector]:
    """`predict_lora`, but of several photos what `combine` says, one of `names.COMBINED_TO_SAVE`.

    Args:
        layout: of the decoder's LoRA; that of the result is another for "concat".

    Raises:
        NumericError: a weight is NaN or infinite.
        UsageError: there is no such way, or with "concat" the layout becomes too large.
    """
    combining.check_way(combine)
    if combine == "mean" or len(features) == 1:
        return predict_lora(features, weight_decoder)
    each = [predict_lora([photo], weight_decoder) for photo in features]
    return (combining.product_mean if combine == "product" else combining.concatenated)(each, layout)


def tokens_of(features: Sequence[Features], image_prompt: Engine) -> Features:
    """The mean image tokens [1, tokens, width] of the photos whose features [1, T, F] are given.

    Raises:
        NumericError: a number is NaN or infinite.
    """
    tokens = _mean_over_photos(features, image_prompt, ("image_tokens",))
    check_finite(tokens, "the image prompt")
    return tokens["image_tokens"]


def _mean_over_photos(
    features: Sequence[Features], engine: Engine, names: Sequence[str]
) -> dict[str, Features]:
    """Outputs [1, ...] of one photo at a time, their mean; those of a single photo stay where they are."""
    if len(features) == 1:
        outputs = engine.run({"features": features[0]}, host=False)
        return {name: outputs[name] for name in names}
    sums: dict[str, NDArray[np.float64]] = {}
    for photo in features:
        outputs = engine.run({"features": photo})
        for name in names:
            sums[name] = sums.get(name, 0.0) + outputs[name].astype(np.float64)
    return {name: (total / len(features)).astype(np.float32) for name, total in sums.items()}


def origin(bundle: Manifest, noun: str, photos: int, combine: str) -> dict[str, str]:
    """What a subject's file says of where it comes from (`lora_metadata`).

    Args:
        noun: what the subject is.
        photos: how many there were.
        combine: what was made of several, one of `names.COMBINED_TO_SAVE`.
    """
    found = {
        "base_model": bundle.hashes.base_model,
        "hypernet": bundle.hashes.hypernet,
        "class_noun": noun,
        "photos": str(photos),
        "combine": combine,
        "trigger": bundle.prompts.token,
        "family": bundle.family,
        "image_size": str(bundle.image_size),
        "prediction_type": bundle.prediction_type,
    }
    return found | ({"image_scale": f"{bundle.image_prompt.scale:g}"} if bundle.image_prompt else {})


def check_finite(tensors: Mapping[str, NDArray[Any] | DeviceArray], what: str) -> None:
    """Refuse NaN and infinity; what is on a device is not looked at, as it would have to be waited for.

    Raises:
        NumericError: naming the tensor and how many of its numbers are not finite.
    """
    for name, tensor in tensors.items():
        if isinstance(tensor, DeviceArray):
            continue
        bad = tensor.size - int(np.count_nonzero(np.isfinite(tensor)))
        if bad:
            raise NumericError(
                f"{what} is not a number everywhere",
                f"{bad} of {tensor.size} values of {name} are NaN or infinite",
                "try other settings; if it stays, check the bundle: hyperrt doctor",
            )


def _each(photos: Photos) -> Iterable[Photo]:
    """The photos one by one, of whatever holds them."""
    if isinstance(photos, np.ndarray):
        return photos if photos.ndim == 4 else [photos]
    single = isinstance(photos, (str, bytes, bytearray, memoryview, os.PathLike)) or hasattr(photos, "read")
    if single or not isinstance(photos, Iterable):
        return [photos]
    # The order of a set of names differs from run to run, and with it the last digits of a sum.
    return sorted(photos, key=str) if isinstance(photos, Set) else photos


def _name(photo: Photo, number: int) -> str:
    """What a warning calls a photo: the file's name, else its place among the photos."""
    name = photo if isinstance(photo, (str, os.PathLike)) else getattr(photo, "name", None)
    return printable(os.fsdecode(name)) if isinstance(name, (str, os.PathLike)) else f"photo {number}"


def _warn(messages: Sequence[str], more: str) -> None:
    for message in messages[:MOST_SAID]:
        log.warning("%s", message)
    if len(messages) > MOST_SAID:
        log.warning(more, f"{len(messages) - MOST_SAID:,}")


def _none_left(bad: Sequence[BadImage]) -> BadInput:
    if not bad:
        do = "three to five photos are a good number"
        return BadInput("no photos were given", "a subject needs at least one", do)
    first = "; ".join(f"{error.name}: {error.reason}" for error in bad[:3])
    return BadInput(
        f"none of the {len(bad)} photos could be used", first, "convert them to PNG, JPEG or WebP"
    )
