"""Turns text into token ids by CLIP's rules: `[start, tokens..., end, pad, pad, ...]`, int64 [L].

The vocabulary is the bundle's `tokenizer.json`, as transformers' CLIPTokenizer writes it; ids are those of
`CLIPTokenizer(text, padding="max_length", truncation=True)`. The part that does not fit is returned as
`Encoded.dropped`.

SDXL's two text encoders share the vocabulary but not the pad token: the second one pads with "!". As in
transformers, the pad is a special token also inside a text: "mug!" ends in the id of the pad.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hyperrt.bundle.bundle import EXPORT_AGAIN
from hyperrt.errors import BundleError


@dataclass(frozen=True, eq=False)
class Encoded:
    """The input of a text encoder for one text.

    Attributes:
        ids: [L] int64; pad tokens follow the end token.
        dropped: the end of the text that did not fit, or "".
    """

    ids: NDArray[np.int64]
    dropped: str


class Tokenizer:
    """The tokenizer of one text encoder.

    Args:
        path: a `tokenizer.json`.
        max_tokens: L, including the start and end tokens.
        pad: id of the pad token; None: the end token.

    Raises:
        BundleError: the file is missing, is not a tokenizer, or adds no start and end token.
    """

    def __init__(self, path: str | os.PathLike[str], max_tokens: int, pad: int | None = None) -> None:
        import tokenizers  # slow, and `hyperrt --help` does not need it

        self.max_tokens = max_tokens
        name = Path(path).name
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(os.fspath(path))
        except Exception as error:  # the library raises bare Exception, also for a missing file
            raise BundleError(f"cannot read the tokenizer {name}", str(error), EXPORT_AGAIN) from error
        # The file may ask for truncation and padding; both are done below, to know what is dropped.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        ends = self._tokenizer.encode("").ids
        if len(ends) != 2 or max_tokens < 2:
            raise BundleError(
                f"the tokenizer {name} is not CLIP's",
                f"empty text gives {len(ends)} tokens (a start and an end are two), and L is {max_tokens}",
                EXPORT_AGAIN,
            )
        self._start, self._end = ends
        self._pad = self._end if pad is None else pad
        if pad is not None and (word := self._tokenizer.id_to_token(pad)):
            self._tokenizer.add_special_tokens([word])  # which keeps its id

    def encode(self, text: str) -> Encoded:
        """Token ids [L] of a text, and the part of the text that did not fit."""
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        room = self.max_tokens - 2
        ids = np.full(self.max_tokens, self._pad, dtype=np.int64)
        kept = encoding.ids[:room]
        ids[: len(kept) + 2] = [self._start, *kept, self._end]
        dropped = text[encoding.offsets[room][0] :] if len(encoding.ids) > room else ""
        return Encoded(ids, dropped)
