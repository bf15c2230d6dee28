"""Turns photos into the weights of a subject: image encoder, weight decoder, mean over the photos.

pixels [photos, 3, S, S] -> features [photos, T, F] -> lora_q [photos, Nq], lora_kv [photos, Nkv] -> mean.
In the open category also features -> image_tokens [photos, tokens, width] -> mean.
By default the factors A and B are averaged (arXiv 2511.03156, several reference images), not the product A B;
lora/combine.py has the other ways.

On a device features stay there, and so does the LoRA of a single photo; the mean of several is on the host.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray

from hyperrt import engines
from hyperrt.bundle import memory
from hyperrt.bundle.manifest import Manifest
from hyperrt.engines.base import Engine
from hyperrt.engines.dlpack import DeviceArray
from hyperrt.lora import combine as combining
from hyperrt.lora.layout import LoraLayout, Vector
from hyperrt.lora.subject import LoraOnDevice
from hyperrt.session.finite import check_finite
from hyperrt.session.graphs import Graphs

Features = Vector | DeviceArray


class Personalizer:
    """Opens the graphs that make a subject, and runs them; not for two threads at once.

    With enough memory the graphs stay open for the next subject, until something is drawn: to open them takes
    twice as long as to run them (the small model).  With low memory, or beside open graphs that draw, each is
    closed before the next is opened.  On a GPU they are always closed: a subject's LoRA stays in the memory
    that the weight decoder wrote.

    Args:
        graphs: of an open bundle.
        low_memory: close each graph as soon as it has run.
    """

    def __init__(self, graphs: Graphs, low_memory: bool) -> None:
        self._graphs = graphs
        self._low_memory = low_memory
        self._backend = engines.BACKENDS[graphs.backend]

    def lora(self, pixels: NDArray[np.float32], combine: str) -> tuple[Mapping[str, Vector], Features | None]:
        """Pixels [photos, 3, S, S] to what a `Subject` holds; None for tokens where the model has none.

        Raises:
            NumericError: the predicted weights hold NaN; of a photo on a GPU that is found when it is drawn.
            ResourceError: there is not enough memory.
        """
        bundle, tokens = self._graphs.bundle, None
        stay = self._room()
        with self._opened("image_encoder", stay) as encoder:
            features = encode_photos(pixels, encoder)
        with self._opened("weight_decoder", stay) as decoder:
            weights = lora_of(features, decoder, bundle.layout, combine)
        if bundle.image_prompt:
            with self._opened("image_prompt", stay) as resampler:
                tokens = tokens_of(features, resampler)
        return weights, tokens

    def free(self) -> None:
        """Close what waits for the next subject."""
        for name in memory.PERSONALIZING:
            self._graphs.free(name)

    def _room(self) -> bool:
        """Whether all of them may stay open; there is memory for one after the other at least."""
        if self._backend.nvidia:
            return False
        if self._graphs.open_names & set(memory.PERSONALIZING):  # there was room when they were opened
            return True
        bundle, loads_fp32 = self._graphs.bundle, self._backend.loads_fp32
        memory.check(memory.to_personalize(bundle, loads_fp32), "making a subject", "end other programs")
        if self._low_memory or self._graphs.open_names & set(memory.DRAWING):
            return False
        return memory.fits(memory.to_personalize(bundle, loads_fp32, stay_open=True))

    @contextmanager
    def _opened(self, graph: str, stay: bool) -> Iterator[Engine]:
        try:
            yield self._graphs.engine(graph)
        finally:
            if not stay:
                self._graphs.free(graph)


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
    on_device = {n: x.reshape(x.shape[1:]) for n, x in lora.items() if isinstance(x, DeviceArray)}
    on_host = {n: x[0] for n, x in lora.items() if isinstance(x, np.ndarray)}
    return LoraOnDevice(on_device) if on_device else on_host


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
    """The metadata of a subject that was made from photos (`hyperrt/lora/metadata.py`).

    Args:
        noun: class noun of the subject.
        photos: number of photos.
        combine: how they were combined, one of `names.COMBINED_TO_SAVE`.
    """
    fields = {
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
    return fields | ({"image_scale": f"{bundle.image_prompt.scale:g}"} if bundle.image_prompt else {})
