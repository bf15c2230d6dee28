"""What the system says of a file that is to be written, as errors of ours."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from hyperrt.errors import HyperRTError, NotFound, ResourceError, UsageError

EXISTS = {errno.EEXIST, errno.ENOTEMPTY, errno.EISDIR}
_NOT_WRITABLE = {errno.EACCES, errno.EPERM, errno.EROFS}
_MISSING = {errno.ENOENT, errno.ENOTDIR}
_FULL = {errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)}


@contextlib.contextmanager
def explained(target: Path) -> Iterator[None]:
    """The system's errors about `target` become ours; others, about a file that `write` reads, pass."""
    try:
        yield
    except OSError as error:
        named = Path(error.filename) if isinstance(error.filename, (str, os.PathLike)) else target
        if error.errno is None or target.parent not in (named, *named.parents):
            raise
        raise _explain(error.errno, os.strerror(error.errno), target) from error


def _explain(number: int, text: str, target: Path) -> HyperRTError:
    if number in _NOT_WRITABLE:
        return not_writable(target)
    if number in EXISTS:
        return already(target)
    if number in _MISSING:
        return NotFound(f"{target} is not there", "it, or a folder above it, was removed", "make it again")
    if number == errno.ENAMETOOLONG:
        return UsageError(f"the name {target.name[:40]}… is too long", text, "choose a shorter one")
    what = f"{target} could not be written"
    if number in _FULL:
        with contextlib.suppress(OSError):
            text += f"; {shutil.disk_usage(target.parent).free:,} bytes are free"
        return ResourceError(what, text, "make room on the disk, or choose another folder")
    return ResourceError(what, text, "check the disk, then try again")


def already(target: Path) -> UsageError:
    """The error of a name that is taken."""
    why = "nothing is overwritten unasked"
    return UsageError(f"{target} exists", why, "add --force (in Python force=True), or choose another name")


def not_writable(target: Path) -> UsageError:
    """The error of a folder that is not open to this user."""
    why = f"the folder {target.parent} is not writable for you"
    return UsageError(f"{target} cannot be written", why, "choose another folder")
