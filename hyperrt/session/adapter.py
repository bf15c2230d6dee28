"""Puts a subject's LoRA into an open engine, in the way that the bundle's manifest names.

`inputs`: the LoRA factors of a graph are one packed float32 vector, an input [1, N] (or [rows, N] if the rows
have different subjects) that stays in the engine until another subject comes.  The base model is the zero
vector; a row with a gate of 0 adds exactly 0, so its bits are those of the base model.

`refit`: the factors are named constants of the graph, which the backend replaces.  They hold for all rows, so
one call has one subject; the gate says on which rows.

On a device both ways read the factors where the weight decoder wrote them (`LoraOnDevice`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from hyperrt.engines.dlpack import concatenate
from hyperrt.errors import BundleMismatch
from hyperrt.lora.layout import LoraLayout, Vector
from hyperrt.lora.subject import Subject, only_subject, packed
from hyperrt.session.resident import Resident

TOKENS = 16  # of one row that are written at a time: SDXL's K and V of so many stay in a processor's cache


def put_lora(
    resident: Resident, vector: str, layout: LoraLayout, mode: str, subjects: Sequence[Subject | None]
) -> None:
    """Put subjects (None: the base model) into an open engine, unless it holds them.

    After an error the engine holds the subjects of before.

    Args:
        resident: an open `denoiser` or `context` graph.
        vector: the packed vector that the graph takes, "lora_q" or "lora_kv".
        layout: of the bundle.
        mode: how the LoRA enters the graph: "inputs" or "refit".
        subjects: one for all rows, or one for each row.

    Raises:
        BundleMismatch: this version does not know the mode.
        UsageError: there are several subjects, and the engine takes one for all rows.
        LoraMismatch: a subject has another number of weights than the bundle.
        engines.EngineError: the backend failed; after `EngineUnusable` the engine refuses to run until a
            LoRA has been put in.
    """
    if mode not in ("inputs", "refit"):
        why = "this version knows 'inputs' and 'refit'"
        do = "export it again with one of them"
        raise BundleMismatch(f"the bundle takes its LoRA by {mode!r}", why, do)
    if mode == "refit":
        subjects = [only_subject(subjects)]

    def load() -> None:
        size, engine = layout.size(vector), resident.engine
        vectors = [packed(subject, vector, size, engine.on_device) for subject in subjects]
        if mode == "inputs":
            engine.bind({vector: concatenate([packed_lora.reshape((1, size)) for packed_lora in vectors])})
        else:
            engine.refit(layout.named({vector: vectors[0]}))  # type: ignore[type-var]

    resident.hold(vector, tuple(subjects), load)  # subjects compare by identity


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
