"""The errors of an export."""

from __future__ import annotations

from typing import ClassVar

from hyperrt.errors import Incompatible


class ExportError(Incompatible):
    """The model cannot be made into a bundle."""


class ParityError(ExportError):
    """A graph does not compute what the model does; nothing is published."""

    code: ClassVar[int] = 9
