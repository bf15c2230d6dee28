"""The errors HyperRT raises: each says what happened, why, and what to do, and carries an exit code.

`str(error)` is three lines (``what``, ``why:``, ``do:``; the empty ones are left out).  `code` is the exit
status of the command line for that error.  Every subclass is a `HyperRTError`: catch one, catch all.
"""

from __future__ import annotations

from typing import ClassVar


class HyperRTError(Exception):
    """Base of every error of this package.

    Args:
        what: what happened, one line.
        why: the cause, as far as it is known; may be empty.
        do: the next step for the reader; may be empty.
    """

    code: ClassVar[int] = 1

    def __init__(self, what: str, why: str = "", do: str = "") -> None:
        # All three go to Exception.args, so that pickling (worker processes) rebuilds the same error.
        super().__init__(what, why, do)
        self.what = what
        self.why = why
        self.do = do

    def __str__(self) -> str:
        lines = [self.what]
        if self.why:
            lines.append(f"  why: {self.why}")
        if self.do:
            lines.append(f"  do:  {self.do}")
        return "\n".join(lines)


class UsageError(HyperRTError, ValueError):
    """An argument is outside what the function or the command takes."""

    code: ClassVar[int] = 2


class BadInput(HyperRTError):
    """Something the user gave (photos, prompt, subject file) cannot be used."""

    code: ClassVar[int] = 3


class BadImage(BadInput):
    """A photo cannot be used.

    Args:
        name: file name or position of the photo, as the user knows it.
        reason: why it was refused.
        do: the next step for the reader.
    """

    def __init__(self, name: str, reason: str, do: str = "") -> None:
        super().__init__(f"cannot use the image {name!r}", reason, do)
        # BadImage takes other arguments than its base: keep these for pickling.
        self.args = (name, reason, do)
        self.name = name
        self.reason = reason


class LinkedPhotos(BadInput):
    """A folder of photos holds links, which are not followed there.

    Args:
        what, why, do: as in every error.
        folder: the folder, as it was named.
        files: its photos, each of which may be named, and is then followed.
    """

    def __init__(
        self, what: str, why: str = "", do: str = "", folder: str = "", files: tuple[str, ...] = ()
    ) -> None:
        super().__init__(what, why, do)
        self.args = (what, why, do, folder, files)  # for pickling
        self.folder = folder
        self.files = files


class BadPrompt(BadInput):
    """The prompt is empty, malformed, or lacks the placeholder of the subject."""


class LoraError(BadInput):
    """A subject file is malformed."""


class LoraMismatch(LoraError):
    """A subject file is sound, but made for another base model or layout."""

    code: ClassVar[int] = 5


class NotFound(HyperRTError):
    """A file, folder, bundle or backend that was named does not exist."""

    code: ClassVar[int] = 4


class Incompatible(HyperRTError):
    """Two things that are each sound do not fit together."""

    code: ClassVar[int] = 5


class ResourceError(HyperRTError):
    """Memory, disk space or file handles ran out."""

    code: ClassVar[int] = 6


class IntegrityError(HyperRTError):
    """Stored data is damaged."""

    code: ClassVar[int] = 8


class BundleError(IntegrityError):
    """A bundle is damaged: a file is missing, unreadable, or has another hash than its manifest says."""


class BundleMismatch(BundleError):
    """A bundle is sound, but of a format or layout that this version cannot run."""

    code: ClassVar[int] = 5


class NumericError(HyperRTError):
    """A result holds NaN or infinity, or left the range it must keep."""

    code: ClassVar[int] = 9
