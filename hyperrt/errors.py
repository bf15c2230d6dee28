"""The errors of the runtime.  `HyperRTError` is the base of these and of the errors of engines.

    HyperRTError 1
    ├── UsageError 2 (a ValueError, too)
    ├── BadInput 3
    │   ├── BadImage 3, LinkedPhotos 3, BadPrompt 3
    │   └── LoraError 3
    │       └── LoraMismatch 5
    ├── NotFound 4
    ├── Incompatible 5
    ├── ResourceError 6
    ├── IntegrityError 8
    │   └── BundleError 8
    │       └── BundleMismatch 5
    ├── NumericError 9
    └── EngineError 7 and the errors below it: engines/errors.py

The number is `code`, the exit status of the command line.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

from hyperrt.engines.errors import HyperRTError as HyperRTError

SCARCE = {errno.EMFILE, errno.ENFILE, errno.ENOMEM}  # the system may have room for it later
EXISTS = {errno.EEXIST, errno.ENOTEMPTY, errno.EISDIR}
_NOT_WRITABLE = {errno.EACCES, errno.EPERM, errno.EROFS}
_MISSING = {errno.ENOENT, errno.ENOTDIR}
_FULL = {errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)}


class UsageError(HyperRTError, ValueError):
    """An argument of a function or command is wrong."""

    code: ClassVar[int] = 2


class BadInput(HyperRTError):
    """An input of the user (photos, prompt, subject file) cannot be used."""

    code: ClassVar[int] = 3


class BadImage(BadInput):
    """A photo cannot be used.

    Args:
        name: file name or position of the photo.
        reason: why it cannot be used.
        do: the remedy.
    """

    def __init__(self, name: str, reason: str, do: str = "") -> None:
        super().__init__(f"cannot use the image {name!r}", reason, do)
        # For pickling: the arguments differ from the base class's.
        self.args = (name, reason, do)
        self.name = name
        self.reason = reason


class LinkedPhotos(BadInput):
    """A folder of photos holds links, which are not followed in a folder.

    Args:
        what, why, do: as in every error.
        folder: as it was named.
        files: its photos; a link is followed if it is named itself.
    """

    def __init__(
        self, what: str, why: str = "", do: str = "", folder: str = "", files: tuple[str, ...] = ()
    ) -> None:
        super().__init__(what, why, do)
        self.args = (what, why, do, folder, files)  # for pickling
        self.folder = folder
        self.files = files


class BadPrompt(BadInput):
    """The prompt is empty, malformed, or lacks the subject's placeholder."""


class LoraError(BadInput):
    """A subject file is malformed."""


class LoraMismatch(LoraError):
    """A subject file is valid, but made for another base model or layout."""

    code: ClassVar[int] = 5


class NotFound(HyperRTError):
    """A file, folder, bundle or backend does not exist."""

    code: ClassVar[int] = 4


class Incompatible(HyperRTError):
    """Two valid things do not fit together."""

    code: ClassVar[int] = 5


class ResourceError(HyperRTError):
    """Memory, disk space or file handles ran out."""

    code: ClassVar[int] = 6


class IntegrityError(HyperRTError):
    """Stored data is damaged."""

    code: ClassVar[int] = 8


class BundleError(IntegrityError):
    """A bundle is damaged: a file is missing, unreadable, or does not have the hash in the manifest."""


class BundleMismatch(BundleError):
    """A bundle is valid, but this version cannot run its format or layout."""

    code: ClassVar[int] = 5


class NumericError(HyperRTError):
    """A result holds NaN or infinity, or is out of range."""

    code: ClassVar[int] = 9


@contextlib.contextmanager
def explained(target: Path) -> Iterator[None]:
    """Turn the system's errors about `target` into ours; errors about files elsewhere pass."""
    try:
        yield
    except OSError as error:
        path = Path(error.filename) if isinstance(error.filename, (str, os.PathLike)) else target
        if error.errno is None or target.parent not in (path, *path.parents):
            raise
        raise _explain(error.errno, os.strerror(error.errno), target) from error


def _explain(number: int, text: str, target: Path) -> HyperRTError:
    if number in _NOT_WRITABLE:
        return not_writable(target)
    if number in EXISTS:
        return already(target)
    if number in _MISSING:
        why = "it, or a folder above it, was removed"
        return NotFound(f"{target} does not exist", why, "make it again")
    if number == errno.ENAMETOOLONG:
        return UsageError(f"the name {target.name[:40]}… is too long", text, "choose a shorter one")
    what = f"{target} could not be written"
    if number in _FULL:
        with contextlib.suppress(OSError):
            text += f"; {shutil.disk_usage(target.parent).free:,} bytes are free"
        return ResourceError(what, text, "make room on the disk, or choose another folder")
    return ResourceError(what, text, "check the disk, then try again")


def already(target: Path) -> UsageError:
    """The error if the name is taken."""
    why = "nothing is overwritten unasked"
    return UsageError(f"{target} exists", why, "add --force (in Python force=True), or choose another name")


def not_writable(target: Path) -> UsageError:
    """The error if this user may not write to the folder."""
    why = f"the folder {target.parent} is not writable"
    return UsageError(f"{target} cannot be written", why, "choose another folder")
