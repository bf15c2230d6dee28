"""What export raises on purpose; like every error of HyperRT in three lines: what, why, do."""

from __future__ import annotations

from typing import ClassVar

from hyperrt.errors import Incompatible


class ExportError(Incompatible):
    """The model cannot be made into a bundle."""


class ParityError(ExportError):
    """A graph was made, but does not compute what the model does; nothing is published."""

    code: ClassVar[int] = 9


def first_line(error: Exception) -> str:
    """What another library's error says, short enough for the line that says why."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return (str(error).strip() or repr(error)).splitlines()[0]
