"""Text to token ids, by CLIP's rules: `[start, tokens..., end, end, ...]`, int64 [L].

The vocabulary is the bundle's `tokenizer.json`, as transformers' CLIPTokenizer writes it; ids are those of
`CLIPTokenizer(text, padding="max_length", truncation=True)`. What does not fit is not lost silently: it is
`Encoded.dropped`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hyperrt.errors import BundleError

REBUILD = "export the bundle again"


@dataclass(frozen=True, eq=False)
class Encoded:
    """One text as the text encoder takes it.

    Attributes:
        ids: [L] int64; after the text's end token the end token is repeated.
        dropped: the end of the text that did not fit; empty when all of it did.
        length: how many ids are the text, its start and end token included.
    """

    ids: NDArray[np.int64]
    dropped: str
    length: int

    def padded_with(self, pad: int) -> NDArray[np.int64]:
        """The ids [L] with `pad` after the end token, as SDXL's second text encoder takes them."""
        return np.where(np.arange(len(self.ids)) < self.length, self.ids, pad)


class Tokenizer:
    """The tokenizer of one text encoder.

    Args:
        path: a `tokenizer.json`.
        max_tokens: L, the start and end tokens included.

    Raises:
        BundleError: the file is missing, is no tokenizer, or puts no start and end token around text.
    """

    def __init__(self, path: str | os.PathLike[str], max_tokens: int) -> None:
        import tokenizers  # here, because `hyperrt --help` does not need it

        self.max_tokens = max_tokens
        name = Path(path).name
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(os.fspath(path))
        except Exception as error:  # the library raises bare Exception, for a missing file too
            raise BundleError(f"cannot read the tokenizer {name}", str(error), REBUILD) from error
        # A file may ask for its own cutting and padding; both are done below, so that the cut is seen.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        ends = self._tokenizer.encode("").ids
        if len(ends) != 2 or max_tokens < 2:
            raise BundleError(
                f"the tokenizer {name} is not CLIP's",
                f"empty text gives {len(ends)} tokens (a start and an end are two), and L is {max_tokens}",
                REBUILD,
            )
        self._start, self._end = ends

    def encode(self, text: str) -> Encoded:
        """Token ids [L] of a text, and the part of the text that did not fit."""
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        room = self.max_tokens - 2
        ids = np.full(self.max_tokens, self._end, dtype=np.int64)
        kept = encoding.ids[:room]
        ids[0] = self._start
        ids[1 : 1 + len(kept)] = kept
        dropped = text[encoding.offsets[room][0] :] if len(encoding.ids) > room else ""
        return Encoded(ids, dropped, len(kept) + 2)
