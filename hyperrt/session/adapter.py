"""A subject's LoRA into an open engine, in the way that the bundle's manifest names.

`inputs`: the factors of one graph are one packed float32 vector, an input [1, N] of that graph (or [rows, N],
where rows have different subjects) that stays resident on the device until another subject comes.  The base
model is the zero vector: with the row gate at 0 it adds exactly 0, so going back gives the base's own bits.

`refit`: the factors are constants of the graph, each of its own name, which the backend replaces.  They hold
for all rows, so one call knows one subject; the row gate says on which rows.

On a device either way reads the factors where the weight decoder wrote them (`LoraOnDevice`).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from hyperrt.engines.base import Engine, EngineUnusable
from hyperrt.engines.dlpack import concatenate
from hyperrt.errors import BundleMismatch
from hyperrt.lora.layout import LoraLayout, Vector
from hyperrt.lora.subject import Subject, only_subject, packed

TOKENS = 16  # of one row that are written at a time: SDXL's K and V of so many stay in a processor's cache


class Adapter:
    """The LoRA of one engine; remembers whose it holds, so that these are uploaded once.

    Args:
        engine: an open `denoiser` or `context` graph.
        name: the packed vector that it takes, "lora_q" or "lora_kv".
        layout: of the bundle.
        mode: how it takes it: "inputs" or "refit".

    Attributes:
        held: whose LoRA the engine holds, one for all rows or one for each; empty: not known.

    Raises:
        BundleMismatch: the mode is not one that this version knows.
    """

    def __init__(self, engine: Engine, name: str, layout: LoraLayout, mode: str) -> None:
        if mode not in ("inputs", "refit"):
            why = "this version knows 'inputs' and 'refit'"
            do = "export it again with one of them"
            raise BundleMismatch(f"the bundle takes its LoRA by {mode!r}", why, do)
        self._engine = engine
        self._name = name
        self._layout = layout
        self._mode = mode
        self.held: tuple[Subject | None, ...] = ()

    def put(self, *subjects: Subject | None) -> None:
        """Make the engine compute a subject (None: the base model); on an error the old one stays.

        Args:
            subjects: one for all rows, or one for each row.

        Raises:
            UsageError: there are several, and the engine holds one for all rows.
            LoraMismatch: a subject has another number of weights than the bundle.
            engines.EngineError: the backend failed; after `EngineUnusable` the engine runs no more before a
                `put` succeeds.
        """
        if self._mode == "refit":
            subjects = (only_subject(subjects),)
        if subjects == self.held:  # subjects compare by identity
            return
        size, there = self._layout.size(self._name), self._engine.on_device
        vectors = [packed(subject, self._name, size, there) for subject in subjects]
        if self._mode == "inputs":
            self._engine.bind({self._name: concatenate([vector.reshape((1, size)) for vector in vectors])})
        else:
            self._refit(vectors[0])
        self.held = subjects

    def _refit(self, vector: Any) -> None:
        try:
            self._engine.refit(self._layout.named({self._name: vector}))
        except EngineUnusable:
            self.held = ()
            raise


def write_context(
    layout: LoraLayout,
    plain: NDArray[np.float32],
    hidden: NDArray[np.float32],
    lora_kv: Vector,
    strength: float,
    out: NDArray[np.float32],
) -> None:
    """Keys and values of one row under a K/V LoRA: those of the base model + strength (hidden A) B per site.

    Args:
        plain: [L (+ image tokens), W], the base model's K and V of all cross-attentions side by side, as the
            `context` graph gives them.  Image tokens come last, and have no LoRA.
        hidden: [L, D], the text they were computed from.
        lora_kv: [Nkv].
        out: where they are written to, as large as `plain`.
    """
    rank, text = layout.rank, len(hidden)
    factors = layout.unpack({"lora_kv": lora_kv})
    down = np.concatenate([a for a, _ in factors.values()], axis=1)
    below = strength * (hidden @ down)  # [L, sites x rank]
    for first in range(0, text, TOKENS):
        tokens, start = slice(first, min(first + TOKENS, text)), 0
        for k, (_, b) in enumerate(factors.values()):
            end = start + b.shape[1]
            np.matmul(below[tokens, k * rank : (k + 1) * rank], b, out=out[tokens, start:end])
            start = end
        np.add(plain[tokens], out[tokens], out=out[tokens])
    out[text:] = plain[text:]
