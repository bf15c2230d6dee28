"""Computes the conditioning of the rows: text K and V, pooled text and image tokens, with the subjects' LoRA.

texts -> hidden_states (, pooled)                                 once per prompt    text_encoder
these (, image tokens, time ids) -> context (, added)             once per prompt    context
context + K/V LoRA                                                once per subject   on the host
these, K/V LoRA, image tokens (, time ids) -> context (, added)   once per subject   context

`HostConditioning` does lines 2 and 3 of this table, `DeviceConditioning` does line 4: K and V stay on the
device.  In the open category the second line runs once per subject with image tokens.

rows = branches x pairs, branch-major.  A graph is fed the inputs that the manifest lists for it.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from hyperrt.engines.backends import BACKENDS
from hyperrt.engines.dlpack import DeviceArray, concatenate
from hyperrt.engines.tensors import Tensors
from hyperrt.lora.subject import Subject, packed
from hyperrt.sampling.request import Row
from hyperrt.sampling.tokenizer import Tokenizer
from hyperrt.session.adapter import put_lora, write_context
from hyperrt.session.finite import check_finite
from hyperrt.session.graphs import Graphs
from hyperrt.text import short_repr

log = logging.getLogger("hyperrt")

Floats = NDArray[np.float32]
Arrays = Mapping[str, Floats]
Rows = tuple[Row, ...]
T = TypeVar("T")

MEANING = "what the prompt says"  # the conditioning, in messages


class Latest(Generic[T]):
    """The value that was computed last, and its key."""

    def __init__(self) -> None:
        self.key: object = None
        self.value: T | None = None

    def has(self, key: object) -> bool:
        """Whether the last value has this key."""
        return self.value is not None and self.key == key

    def of(self, key: object, compute: Callable[[], T]) -> T:
        """The value of a key, computed if the last one had another key."""
        if self.value is None or self.key != key:
            self.clear()  # first, to make room
            self.value = compute()
            self.key = key
        return self.value

    def clear(self) -> None:
        self.key = self.value = None


class TextFeatures:
    """The outputs of the text encoder; those of the last prompts are kept.

    Args:
        low_memory: close the text encoder as soon as it has run.
    """

    def __init__(self, graphs: Graphs, low_memory: bool) -> None:
        self._graphs = graphs
        self._bundle = graphs.bundle
        self._low_memory = low_memory
        self._tokenizers: dict[str, Tokenizer] = {}  # by the input of the text encoder's graph
        self._latest: Latest[Arrays] = Latest()

    def of(self, texts: Sequence[str]) -> Arrays:
        """`hidden_states` [texts, L, D], and `pooled` [texts, E] where the model has it."""
        return self._latest.of(tuple(texts), lambda: self._encoded(texts))

    def clear(self) -> None:
        """Drop the features that are kept."""
        self._latest.clear()

    def _encoded(self, texts: Sequence[str]) -> Arrays:
        unique = list(dict.fromkeys(texts))  # the empty prompt of every pair is the same
        features = self._graphs.engine("text_encoder").run(self.token_ids(unique))
        if self._low_memory:
            self._graphs.free("text_encoder")
        if self._bundle.prompts.zero_empty and "" in unique:
            for output in features.values():
                output[unique.index("")] = 0
        rows = [unique.index(text) for text in texts]
        return {name: output[rows] for name, output in features.items()}

    def token_ids(self, texts: Sequence[str]) -> dict[str, NDArray[np.int64]]:
        """Token ids [texts, L] of every text encoder; words that do not fit are logged as a warning."""
        rules = self._bundle.prompts
        if not self._tokenizers:
            pads = {"input_ids": rules.pad}
            if rules.pad_2 is not None:
                pads["input_ids_2"] = rules.pad_2
            path, most = self._bundle.tokenizer, rules.max_tokens
            self._tokenizers = {name: Tokenizer(path, most, pad) for name, pad in pads.items()}
        encoded = {
            name: [tokenizer.encode(text) for text in texts] for name, tokenizer in self._tokenizers.items()
        }
        longest = max((text.dropped for text in encoded["input_ids"]), key=len)
        if longest:
            log.warning("prompt cut to %d tokens; dropped: %s", rules.max_tokens, short_repr(longest))
        return {name: np.stack([text.ids for text in each]) for name, each in encoded.items()}


class Conditioning(ABC):
    """The conditioning of the last rows is kept for the next call.

    Args:
        graphs: of an open bundle.
        low_memory: close the text encoder and the context graph as soon as they have run.
    """

    def __init__(self, graphs: Graphs, low_memory: bool) -> None:
        self._graphs = graphs
        self._bundle = graphs.bundle
        self._low_memory = low_memory
        self._features = TextFeatures(graphs, low_memory)
        self._latest: Latest[Tensors] = Latest()
        self._zero_tokens: Floats | None = None

    @abstractmethod
    def of(self, rows: Rows) -> Tensors:
        """`context` [rows, L, W], and `added` [rows, E] where the model has it.

        Raises:
            NumericError: a value on the host is NaN or infinite.
        """

    def forget(self) -> None:
        """Drop everything that is kept."""
        self._features.clear()
        self._latest.clear()

    def _run(self, rows: Rows, subjects: Sequence[Subject | None], gate: Floats) -> Mapping[str, Any]:
        """The outputs of the context graph, checked; on a device they stay there.

        Args:
            subjects: hold the K/V LoRA, one for all rows or one for each.
            gate: [rows] strength of the K/V LoRA.
        """
        graph, bundle = self._bundle.graphs["context"], self._bundle
        inputs: dict[str, Any] = {**self._features.of([row.text for row in rows]), "gate": gate}
        inputs |= {**self._time_ids(len(rows)), **self._image_prompt(rows)}
        resident = self._graphs.resident("context")
        put_lora(resident, "lora_kv", bundle.layout, graph.adapt, subjects)
        feeds = {name: value for name, value in inputs.items() if graph.takes(name)}
        outputs: Mapping[str, Any] = resident.engine.run(feeds, host=False)
        if self._low_memory:
            self._graphs.free("context")
        check_finite(outputs, MEANING)
        return outputs

    def _time_ids(self, rows: int) -> dict[str, Floats]:
        """SDXL's time ids [rows, 6]: original height, width, crop top, left, target height, width."""
        side = self._bundle.image_size
        return {"time_ids": np.tile(np.array([side, side, 0, 0, side, side], np.float32), (rows, 1))}

    def _image_prompt(self, rows: Rows) -> dict[str, Floats | DeviceArray]:
        """Image tokens and their scale, per row; a row with a scale of 0 is that of the plain UNet.

        The empty prompt of CFG has the tokens of zero pixels, as in IP-Adapter's own guidance.
        """
        shape = self._bundle.image_prompt
        if shape is None:
            return {}
        none = np.zeros((1, shape.tokens, shape.width), np.float32)
        scales = np.array([row.image_scale for row in rows], np.float32)
        return {"image_tokens": concatenate([self._tokens(row, none) for row in rows]), "image_scale": scales}

    def _tokens(self, row: Row, none: Floats) -> Floats | DeviceArray:
        """[1, tokens, width] image tokens of a row, the mean over the photos; `none` for a row without."""
        tokens = row.subject.image_tokens if row.subject is not None and row.image_scale else None
        if tokens is None:
            return none
        if not row.has_photo:
            tokens = self._tokens_of_zero_pixels()
        return tokens if isinstance(tokens, DeviceArray) else tokens.mean(0, keepdims=True)

    def _tokens_of_zero_pixels(self) -> Floats:
        """[1, tokens, width]; the graph returns them whatever it reads."""
        if self._zero_tokens is None:
            engine = self._graphs.engine("image_prompt")
            shape = [size if isinstance(size, int) else 1 for size in engine.inputs[0].shape]
            self._zero_tokens = engine.run({"features": np.zeros(shape, np.float32)})["zero_tokens"]
            self._graphs.free("image_prompt")
        return self._zero_tokens


class DeviceConditioning(Conditioning):
    """Runs the context graph with the subjects' LoRA; nothing leaves the device."""

    def of(self, rows: Rows) -> Tensors:
        """As `Conditioning.of`."""
        gate = np.array([row.gate for row in rows], np.float32)
        return self._latest.of(rows, lambda: self._run(rows, lora_subjects(rows), gate))


class HostConditioning(Conditioning):
    """Adds what the LoRA adds to the base model's K and V on the host.

    After a change of subject this is a fiftieth of the graph's work: (hidden A) B has rank r.
    """

    def __init__(self, graphs: Graphs, low_memory: bool) -> None:
        super().__init__(graphs, low_memory)
        self._base: Latest[Arrays] = Latest()  # the base model's K and V

    def of(self, rows: Rows) -> Tensors:
        """As `Conditioning.of`."""
        context = None if self._latest.has(rows) else self._array_to_write(rows)
        return self._latest.of(rows, lambda: self._with_lora(rows, context))

    def forget(self) -> None:
        """As `Conditioning.forget`."""
        super().forget()
        self._base.clear()

    def _with_lora(self, rows: Rows, context: Floats | None) -> Arrays:
        """The base model's outputs, with the LoRA on the rows that have one.

        Args:
            context: to write to; its rows without LoRA and image tokens are right already. None: a new array.
        """
        base_rows = tuple(_without_lora(row) for row in rows)
        base = self._base.of(base_rows, lambda: self._run(base_rows, [None], np.zeros(len(rows), np.float32)))
        if self._low_memory:
            self._base.clear()
        if context is None:
            context = base["context"].copy()
        layout = self._bundle.layout
        hidden_states = self._features.of([row.text for row in rows])["hidden_states"]
        for k, row in enumerate(rows):
            if row.gate:
                lora_kv = np.asarray(packed(row.subject, "lora_kv", layout.size("lora_kv")))
                strength = float(np.float32(row.gate))
                write_context(layout, base["context"][k], hidden_states[k], lora_kv, strength, context[k])
                check_finite({"context": context[k]}, MEANING)
            elif row.image_scale:  # the subject's image tokens are in it
                context[k] = base["context"][k]
        return {**base, "context": context}

    def _array_to_write(self, rows: Rows) -> Floats | None:
        """The last context, if its rows had the same texts and only other subjects: SDXL's has 150 MB."""
        last, latest = self._latest.key, self._latest.value
        if latest is None or not isinstance(last, tuple):
            return None
        self._latest.clear()  # until it is whole again
        is_same = [row._replace(subject=None) for row in last] == [row._replace(subject=None) for row in rows]
        return np.asarray(latest["context"]) if is_same else None


def conditioning_for(graphs: Graphs, low_memory: bool) -> Conditioning:
    """The kind of conditioning that suits the backend."""
    kind = DeviceConditioning if BACKENDS[graphs.backend].on_device else HostConditioning
    return kind(graphs, low_memory)


def lora_subjects(rows: Sequence[Row]) -> tuple[Subject | None, ...]:
    """The subject whose LoRA each row holds; a single entry if one serves all rows.

    Rows of the base model have a gate of 0, whatever LoRA they hold.
    """
    different = [*dict.fromkeys(row.subject for row in rows if row.subject is not None)]
    if len(different) < 2:
        return (different[0] if different else None,)
    return tuple(row.subject for row in rows)


def _without_lora(row: Row) -> Row:
    return row._replace(gate=0.0, subject=row.subject if row.image_scale else None)
