"""Opens folders and files of this user that nobody else could have written, such as compiled code.

A file is checked by its open descriptor, and opened relative to the descriptor of its folder, so that the
file that was checked is the file that is read, even if something is renamed meanwhile. Other systems than
POSIX lack both; there the user's profile protects the files.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import shlex
import stat
from collections.abc import Iterator
from pathlib import Path

from hyperrt.errors import SCARCE, IntegrityError, NotFound, ResourceError, UsageError

_POSIX = os.name == "posix"
_FULL = {errno.ENOSPC, errno.EIO, getattr(errno, "EDQUOT", errno.ENOSPC)}
_FLAGS = sum(getattr(os, name, 0) for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_BINARY"))
_CODE = "it is for executable code"


def xdg_folder(kind: str) -> Path:
    """$XDG_CACHE_HOME or $XDG_CONFIG_HOME, by default ~/.cache or ~/.config (XDG Base Directory).

    Args:
        kind: "cache" or "config".

    Raises:
        RuntimeError: this user has no home folder.
    """
    return Path(os.environ.get(f"XDG_{kind.upper()}_HOME") or Path.home() / f".{kind}")


def base_folder() -> Path:
    """$HYPERRT_HOME, by default `hyperrt` in the XDG cache; an absolute path that may not exist yet.

    Raises:
        NotFound: this user has no home folder.
    """
    if own := os.environ.get("HYPERRT_HOME"):
        return Path(own).absolute()
    try:
        return (xdg_folder("cache") / "hyperrt").absolute()
    except RuntimeError as error:
        why = "compiled code is kept there"
        raise NotFound("there is no home folder", why, "set HYPERRT_HOME to a folder of yours") from error


def distrust(status: os.stat_result) -> str:
    """Why another user could have written a file of this status; empty if only this user could."""
    if not _POSIX:
        return ""
    if status.st_uid != os.geteuid():
        return f"it belongs to user {status.st_uid}, and you are user {os.geteuid()}"
    if status.st_mode & 0o022:
        return f"others can write to it: its mode is {stat.S_IMODE(status.st_mode):o}"
    return ""


def make_folder(path: Path) -> None:
    """Make a folder for this user alone, and its parents; an existing folder stays unchanged.

    Raises:
        ResourceError: the disk is full or broken.
        UsageError: it cannot be made for another reason.
    """
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        why, what = error.strerror or str(error), f"the folder {path} cannot be made"
        if error.errno in _FULL:
            raise ResourceError(what, why, "make room on the disk, or set HYPERRT_HOME") from error
        raise UsageError(what, why, "set HYPERRT_HOME to a folder of yours") from error


@contextlib.contextmanager
def open_folder(path: Path, inside: int | None = None) -> Iterator[int | None]:
    """The descriptor of a folder that only this user can write; None if the system cannot open folders.

    Args:
        path: the folder; its last part must not be a link.
        inside: descriptor of its parent folder.

    Raises:
        FileNotFoundError: it does not exist.
        IntegrityError: it is not a folder, a link, or others can write to it; `do` is a shell command.
    """
    if not _POSIX:
        if not path.is_dir():
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
        yield None
        return
    descriptor = _open(path, inside, os.O_DIRECTORY)
    try:
        _judge(path, os.fstat(descriptor))
        yield descriptor
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def open_file(path: Path, inside: int | None = None) -> Iterator[io.BufferedReader]:
    """Open a plain file that only this user can write, to read it; arguments and errors as `open_folder`."""
    descriptor = _open(path, inside)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise IntegrityError(f"{path} is not a plain file", _CODE, shlex.join(["rm", "-r", str(path)]))
        _judge(path, status)
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            yield file
    finally:
        os.close(descriptor)


def _open(path: Path, inside: int | None, flags: int = 0) -> int:
    try:
        if inside is None:
            return os.open(path, os.O_RDONLY | _FLAGS | flags)
        return os.open(path.name, os.O_RDONLY | _FLAGS | flags, dir_fd=inside)
    except FileNotFoundError:
        raise
    except OSError as error:
        if error.errno in SCARCE:
            raise
        if not os.path.lexists(path):  # a parent is a file
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path)) from error
        fix = shlex.join(["rm", "-r", str(path)])
        if path.is_symlink():
            raise IntegrityError(f"{path} is a link", f"{_CODE}, and links are not followed", fix) from error
        raise IntegrityError(f"{path} cannot be opened", error.strerror or str(error), fix) from error


def _judge(path: Path, status: os.stat_result) -> None:
    why = distrust(status)
    if not why:
        return
    ours = not _POSIX or status.st_uid == os.geteuid()
    remove = shlex.join(["rm", "-r", str(path)])
    fix = shlex.join(["chmod", "go-w", str(path)]) if ours else remove
    raise IntegrityError(f"{path} is not private to you", f"{why}; {_CODE}", fix)
