"""What the rows of a job are told: prompts, and the subjects' K and V, as the denoiser takes them.

texts -> hidden_states (, pooled)                                 once per prompt    text_encoder
these (, image tokens, time ids) -> context (, added)             once per prompt    context
context + K/V LoRA                                                once per subject   here, on the host
these, K/V LoRA, image tokens (, time ids) -> context (, added)   once per subject   context

The last line takes the place of the two before it on a device, where K and V then stay.  In the open category
the second is once per subject that has image tokens.

rows = branches x pairs here, branch-major: row = branch * pairs + pair.  Which of these a model has is read
from its manifest; a graph is fed what it asks for.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hyperrt.engines.dlpack import DeviceArray, concatenate
from hyperrt.engines.tensors import Tensors
from hyperrt.lora.subject import Subject, packed
from hyperrt.sampling.request import Job
from hyperrt.sampling.tokenizer import Tokenizer
from hyperrt.session.adapter import write_context
from hyperrt.session.graphs import Graphs
from hyperrt.session.personalizer import check_finite
from hyperrt.text import short_repr

log = logging.getLogger("hyperrt")

Floats = NDArray[np.float32]
Arrays = Mapping[str, Floats]


class Conditioning:
    """The text side of an open bundle; keeps what it said of the last prompts.

    Args:
        graphs: where the text encoder and the context graph are.
        low_memory: close these two as soon as they have run.
    """

    def __init__(self, graphs: Graphs, low_memory: bool) -> None:
        self._graphs = graphs
        self._bundle = graphs.bundle
        self._low_memory = low_memory
        self._tokenizers: dict[str, Tokenizer] = {}  # by the input of the text encoder's graph
        self._features: tuple[tuple[str, ...], Arrays] | None = None  # of the last texts
        self._plain: tuple[tuple[Any, ...], Arrays] | None = None  # of the last texts, image tokens
        self._context: tuple[tuple[Any, ...], Tensors] | None = None  # of the last job: its key, outputs
        self._zero_tokens: Floats | None = None

    def of(self, job: Job) -> Tensors:
        """`context` [rows, L, W], and `added` [rows, E] where the model has it; kept for the next call.

        Raises:
            NumericError: a value on the host is NaN or infinite.
        """
        if self._context is None or self._context[0] != job.told:
            features = self._features_of(job.texts)
            if self._graphs.engine("context").on_device:  # nothing leaves it
                self._context = None  # room for the new one
                self._context = job.told, self._run(job, features, job.gate, job.lora_rows(1))
            else:
                self._context = job.told, self._with_lora(job, features)
        return self._context[1]

    def _with_lora(self, job: Job, features: Arrays) -> Arrays:
        """The base model's K and V, kept for the next subject, and what the LoRA adds on the subjects' rows.

        For a change of subject this is a fiftieth of the graph's work: (hidden A) B has rank r.
        """
        told = job.texts, job.image_scales.tobytes(), self._with_tokens(job)
        if self._plain is None or self._plain[0] != told:
            self._plain = None  # room for the new one
            self._plain = told, self._run(job, features, np.zeros_like(job.gate), (None,))
        plain = self._plain[1]
        if self._low_memory:
            self._plain = None
        context = self._of_same_rows(job)
        if context is None:
            context = plain["context"].copy()
        for row in np.flatnonzero(np.logical_and(job.image_scales, job.gate == 0)):
            context[row] = plain["context"][row]
        layout = self._bundle.layout
        for row in np.flatnonzero(job.gate):
            subject = job.subjects[row % len(job.subjects)]  # there is one where the gate is open
            lora_kv = np.asarray(packed(subject, "lora_kv", layout.size("lora_kv")))
            hidden, strength = features["hidden_states"][row], float(job.gate[row])
            write_context(layout, plain["context"][row], hidden, lora_kv, strength, context[row])
            check_finite({"context": context[row]}, "what the prompt says")
        return {**plain, "context": context}

    def _with_tokens(self, job: Job) -> tuple[Subject | None, ...]:
        """[rows] whose image tokens a row has."""
        subjects = enumerate(job.image_scales)
        return tuple(job.subjects[row % len(job.subjects)] if scale else None for row, scale in subjects)

    def _of_same_rows(self, job: Job) -> Floats | None:
        """The last job's array, to be written to, where only its subjects were others: SDXL's has 150 MB."""
        if self._context is None:
            return None
        (texts, _, *scales), last = self._context
        same = (texts, *scales) == (job.told[0], *job.told[2:])
        self._context = None  # until it is whole again
        return np.asarray(last["context"]) if same else None

    def _run(
        self, job: Job, features: Arrays, gate: Floats, subjects: tuple[Subject | None, ...]
    ) -> Mapping[str, Any]:
        """The context graph's outputs, checked; on a device they stay there."""
        known = {**features, "gate": gate, **self._sizes(len(gate)), **self._image_prompt(job)}
        self._graphs.adapter("context", "lora_kv").put(*subjects)
        graph = self._bundle.graphs["context"]
        asked = {name: value for name, value in known.items() if graph.takes(name)}
        context: Mapping[str, Any] = self._graphs.engine("context").run(asked, host=False)
        self._done_with("context")
        check_finite(context, "what the prompt says")
        return context

    def forget(self) -> None:
        """Drop what is kept."""
        self._features = self._plain = self._context = None

    def _features_of(self, texts: tuple[str, ...]) -> Arrays:
        """The text encoder's outputs [rows, ...]; those of the last texts are kept for the next subject."""
        if self._features is None or self._features[0] != texts:
            unique = list(dict.fromkeys(texts))  # the empty prompt of every pair is one
            features = self._graphs.engine("text_encoder").run(self._token_ids(unique))
            self._done_with("text_encoder")
            if self._bundle.prompts.zero_empty and "" in unique:
                for output in features.values():
                    output[unique.index("")] = 0
            rows = [unique.index(text) for text in texts]
            self._features = texts, {name: output[rows] for name, output in features.items()}
        return self._features[1]

    def _token_ids(self, texts: list[str]) -> dict[str, NDArray[np.int64]]:
        """Token ids [texts, L] of every text encoder; what does not fit is logged as a warning."""
        rules = self._bundle.prompts
        if not self._tokenizers:
            pads = {"input_ids": rules.pad}
            if rules.pad_2 is not None:
                pads["input_ids_2"] = rules.pad_2
            path, most = self._bundle.tokenizer, rules.max_tokens
            self._tokenizers = {name: Tokenizer(path, most, pad) for name, pad in pads.items()}
        encoded = {name: [one.encode(text) for text in texts] for name, one in self._tokenizers.items()}
        longest = max((text.dropped for text in encoded["input_ids"]), key=len)
        if longest:
            log.warning("prompt cut to %d tokens; dropped: %s", rules.max_tokens, short_repr(longest))
        return {name: np.stack([text.ids for text in found]) for name, found in encoded.items()}

    def _sizes(self, rows: int) -> dict[str, Floats]:
        """SDXL's time ids [rows, 6]: original height and width, crop's top and left, target's size."""
        side = self._bundle.image_size
        return {"time_ids": np.tile(np.array([side, side, 0, 0, side, side], np.float32), (rows, 1))}

    def _image_prompt(self, job: Job) -> dict[str, Floats | DeviceArray]:
        """Image tokens and their scale, per row; where the scale is 0 any tokens give the plain UNet.

        Beside CFG's empty prompt they are those of zero pixels, as in IP-Adapter's own guidance.
        """
        shape = self._bundle.image_prompt
        if shape is None:
            return {}
        tokens: list[Floats | DeviceArray] = []
        for row, scale in enumerate(job.image_scales):
            pair, branch = row % len(job.subjects), job.branches[row // len(job.subjects)]
            subject = job.subjects[pair]
            found = subject.image_tokens if subject is not None and scale else None
            if found is not None and branch.name == "subject_uncond":
                found = self._of_no_photo()
            if found is None:
                found = np.zeros((1, shape.tokens, shape.width), np.float32)
            tokens.append(found if isinstance(found, DeviceArray) else found.mean(0, keepdims=True))
        return {"image_tokens": concatenate(tokens), "image_scale": job.image_scales}

    def _of_no_photo(self) -> Floats:
        """[1, tokens, width] image tokens of zero pixels, which the graph gives whatever it reads."""
        if self._zero_tokens is None:
            engine = self._graphs.engine("image_prompt")
            shape = [size if isinstance(size, int) else 1 for size in engine.inputs[0].shape]
            self._zero_tokens = engine.run({"features": np.zeros(shape, np.float32)})["zero_tokens"]
            self._graphs.free("image_prompt")
        return self._zero_tokens

    def _done_with(self, graph: str) -> None:
        if self._low_memory:
            self._graphs.free(graph)
