"""The graphs that make a subject: what they make, and how long they are open.

Where there is room they wait for the next subject, until something is drawn: to open them takes twice as long
as to compute (the small model).  With low memory, or beside graphs that draw, each is closed before the next
one is opened.  So it is on a GPU, where a subject's LoRA is the memory that the weight decoder wrote.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray

from hyperrt import engines
from hyperrt.bundle import memory
from hyperrt.engines.base import Engine
from hyperrt.lora.layout import Vector
from hyperrt.session.graphs import Graphs
from hyperrt.session.personalizer import Features, encode_photos, lora_of, tokens_of


class Making:
    """Subjects' LoRA and image tokens from photos; not for two threads at once.

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
