"""Text to token ids, by CLIP's rules: `[start, tokens..., end, pad, pad, ...]`, int64 [L].

The vocabulary is the bundle's `tokenizer.json`, as transformers' CLIPTokenizer writes it; ids are those of
`CLIPTokenizer(text, padding="max_length", truncation=True)`. What does not fit is not lost silently: it is
`Encoded.dropped`.

Two text encoders share the vocabulary, and differ in the pad: SDXL's second one has "!". As in transformers
the word of a pad is a token of its own wherever the text has it: "mug!" ends in the id of the pad.
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
    """One text as the text encoder takes it.

    Attributes:
        ids: [L] int64; the pad follows the text's end token.
        dropped: the end of the text that did not fit; empty when all of it did.
    """

    ids: NDArray[np.int64]
    dropped: str


class Tokenizer:
    """The tokenizer of one text encoder.

    Args:
        path: a `tokenizer.json`.
        max_tokens: L, the start and end tokens included.
        pad: id that follows the end token; None: the end token again.

    Raises:
        BundleError: the file is missing, is no tokenizer, or puts no start and end token around text.
    """

    def __init__(self, path: str | os.PathLike[str], max_tokens: int, pad: int | None = None) -> None:
        import tokenizers  # here, because `hyperrt --help` does not need it

        self.max_tokens = max_tokens
        name = Path(path).name
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(os.fspath(path))
        except Exception as error:  # the library raises bare Exception, for a missing file too
            raise BundleError(f"cannot read the tokenizer {name}", str(error), EXPORT_AGAIN) from error
        # A file may ask for its own cutting and padding; both are done below, so that the cut is seen.
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
            self._tokenizer.add_special_tokens([word])  # a word of the vocabulary keeps its id

    def encode(self, text: str) -> Encoded:
        """Token ids [L] of a text, and the part of the text that did not fit."""
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        room = self.max_tokens - 2
        ids = np.full(self.max_tokens, self._pad, dtype=np.int64)
        kept = encoding.ids[:room]
        ids[: len(kept) + 2] = [self._start, *kept, self._end]
        dropped = text[encoding.offsets[room][0] :] if len(encoding.ids) > room else ""
        return Encoded(ids, dropped)
