"""A subject's LoRA into an open engine, in the way that the bundle's manifest names.

`inputs`: the factors of one graph are one packed float32 vector, an input [1, N] of that graph (or [rows, N],
where rows have different subjects) that stays resident on the device until another subject comes.  The base
model is the zero vector: with the row gate at 0 it adds exactly 0, so going back gives the base's own bits.

`refit`: the factors are constants of the graph, each of its own name, which the backend replaces.  They hold
for all rows, so one call knows one subject; the row gate says on which rows.

On a device either way reads the factors where the weight decoder wrote them (`LoraOnDevice`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hyperrt.engines.base import Engine, EngineUnusable
from hyperrt.engines.dlpack import DeviceArray, concatenate
from hyperrt.errors import BundleMismatch, LoraMismatch, UsageError
from hyperrt.lora.layout import LoraLayout
from hyperrt.lora.subject import LoraOnDevice, Subject, Vector

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
            subjects = (the_one(subjects),)
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


def the_one(subjects: Iterable[Subject | None]) -> Subject | None:
    """The subject of a call whose rows share one LoRA; None if all are the base model, whose gate is 0.

    Raises:
        UsageError: there are several.
    """
    different = [*dict.fromkeys(subject for subject in subjects if subject is not None)]
    if len(different) > 1:
        raise UsageError(
            f"{len(different)} subjects cannot share a call of this bundle",
            "its LoRA is part of the graph, one for all rows (adapt is 'refit')",
            "draw them one after the other, or export the bundle with --adapt inputs",
        )
    return different[0] if different else None


def packed(subject: Subject | None, name: str, size: int, there: bool = False) -> Vector | DeviceArray:
    """The packed vector [size] of a subject; zeros for the base model.

    Args:
        there: leave it on the device, where it is on one.

    Raises:
        LoraMismatch: the subject has another number of weights.
    """
    if subject is None:
        return np.zeros(size, np.float32)
    if there and isinstance(subject.lora, LoraOnDevice):
        vector: Vector | DeviceArray = subject.lora.there[name]
    else:
        vector = _on_host(subject, name)
    if vector.shape != (size,):
        raise LoraMismatch(
            "the subject does not fit the bundle",
            f"its {name} holds {math.prod(vector.shape)} weights, the bundle's {size}",
            "make it again from its photos, with this bundle",
        )
    return vector


def _on_host(subject: Subject, name: str) -> Vector:
    """A vector of the subject as float32; what is too large becomes infinite.

    Raises:
        LoraMismatch: it is no array of floats.
    """
    try:
        found = np.asarray(subject.lora.get(name))
        with np.errstate(over="ignore"):
            return found.astype(np.float32, casting="same_kind", copy=False)
    except (TypeError, ValueError) as error:
        why = f"its {name} is no array of floats: {error}"
        raise LoraMismatch("the subject cannot be used", why, "make it again with this bundle") from error


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
