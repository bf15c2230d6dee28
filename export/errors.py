"""What export raises on purpose; like every error of HyperRT in three lines: what, why, do."""

from __future__ import annotations

from typing import ClassVar

from hyperrt.errors import Incompatible


class ExportError(Incompatible):
    """The model cannot be made into a bundle."""


class ParityError(ExportError):
    """A graph was made, but does not compute what the model does; nothing is published."""

    code: ClassVar[int] = 9
