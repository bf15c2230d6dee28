"""Turns the exceptions of ONNX Runtime and OpenVINO into engine errors."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from hyperrt.engines.errors import EngineError, EngineLoadError, EngineMemoryError


@dataclass(frozen=True)
class VendorErrors:
    """How a vendor words its exceptions, which have no common base but Exception.

    Attributes:
        noise: parts of a message that name places in the vendor's source.
        out_of_memory: lower-case texts, one of which is in a message if memory ran out.
        requested: matches the bytes that could not be allocated.
    """

    noise: re.Pattern[str]
    out_of_memory: tuple[str, ...]
    requested: re.Pattern[str]

    @contextmanager
    def raised_as(self, kind: type[EngineError], what: str) -> Iterator[None]:
        """Raise the block's exceptions as `kind`, or as EngineMemoryError if memory ran out.

        Args:
            kind: class of the error; engine errors pass unchanged.
            what: first line of the error.
        """
        try:
            yield
        except EngineError:
            raise
        except Exception as error:
            text = " ".join(self.noise.sub(" ", " ".join(str(error).split())).split())
            if isinstance(error, MemoryError) or any(sign in text.lower() for sign in self.out_of_memory):
                size = self.requested.search(text)
                why = f"memory ran out: {text}"
                if size:
                    why = f"could not allocate {int(size[1]) / 1e6:.0f} MB in one block"
                raise EngineMemoryError(what, why, "use a smaller batch, or end other programs") from error
            do = "check the file, or export the bundle again" if kind is EngineLoadError else ""
            raise kind(what, text, do) from error
