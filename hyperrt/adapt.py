"""A subject's LoRA into an open engine, in the way that the bundle's manifest names.

`inputs`: the factors of one graph are one packed float32 vector, an input [1, N] of that graph that stays
resident on the device until another subject comes.  The base model is the zero vector: with the row gate at 0
it adds exactly 0, so going back to the base gives the base's own bits.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from engines.base import Engine
from hyperrt.errors import BundleMismatch, LoraMismatch
from hyperrt.lora import LoraLayout, Subject


class Adapter:
    """The LoRA of one engine; remembers whose it holds, so that the same subject is uploaded once.

    Args:
        engine: an open `denoiser` or `context` graph.
        name: its packed input, "lora_q" or "lora_kv".
        layout: of the bundle.
        mode: the manifest's `adapt`.

    Raises:
        BundleMismatch: the mode is not one that this version knows.
    """

    def __init__(self, engine: Engine, name: str, layout: LoraLayout, mode: str) -> None:
        if mode != "inputs":
            raise BundleMismatch(
                f"the bundle takes its LoRA by {mode!r}",
                "this version knows 'inputs'",
                "export it with the LoRA as inputs",
            )
        self._engine = engine
        self._name = name
        self._size = layout.size(name)
        self._held: Subject | None = None
        self._empty = True

    def put(self, subject: Subject | None) -> None:
        """Make the engine compute `subject` (None: the base model); on an error the old one stays.

        Raises:
            LoraMismatch: the subject has another number of weights than the bundle.
        """
        if not self._empty and subject is self._held:
            return
        vector = packed(subject, self._name, self._size)
        self._engine.bind({self._name: vector[np.newaxis]})
        self._held, self._empty = subject, False


def packed(subject: Subject | None, name: str, size: int) -> NDArray[np.float32]:
    """The packed vector [size] of a subject; zeros for the base model.

    Raises:
        LoraMismatch: the subject has another number of weights.
    """
    if subject is None:
        return np.zeros(size, np.float32)
    vector = np.asarray(subject.lora[name], dtype=np.float32)
    if vector.shape != (size,):
        raise LoraMismatch(
            "the subject does not fit the bundle",
            f"its {name} holds {vector.size} weights, the bundle's {size}",
            "make it again with this bundle: hyperrt personalize",
        )
    return vector
