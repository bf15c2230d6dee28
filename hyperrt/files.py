"""Publishes files and folders: they appear under their names whole, or not at all.

Everything is written under a temporary name in the same folder, flushed to disk, and renamed.  A run that is
killed at any moment leaves the old contents, the new, or (folders only, for an instant) neither.  It may
leave a hidden `.hyperrt-*.tmp`, which the next publish into that folder removes: a writer holds a lock
(flock) on what it writes, so a file that can be locked has no writer.  Systems without flock never sweep.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shlex
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from hyperrt.errors import EXISTS, NotFound, ResourceError, UsageError, already, explained, not_writable

_POSIX = os.name == "posix"
if _POSIX:
    import fcntl

PREFIX, SUFFIX = ".hyperrt-", ".tmp"
ATTEMPTS = 10  # to replace a folder, while other runs replace it, too

_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EINVAL}


def publish(
    path: str | os.PathLike[str], write: Callable[[BinaryIO], object], *, force: bool = False
) -> Path:
    """Write one file; returns its absolute path.

    Args:
        path: its name; the folder must exist.
        write: fills an empty binary file that is open for writing.
        force: replace an existing file.

    Raises:
        UsageError, NotFound: as `check_file`.
        ResourceError: the disk is full or broken.
        Errors of `write` pass.  Nothing is left behind then, nor on KeyboardInterrupt.
    """
    target = check_file(path, force)
    sweep(target.parent)
    with explained(target):
        aside, descriptor = _create(target.parent, as_folder=False)
        try:
            with os.fdopen(descriptor, "wb") as file:
                write(file)
                file.flush()
                os.fsync(descriptor)
                _name_file(aside, target, force)
        except BaseException:
            aside.unlink(missing_ok=True)
            raise
        _sync_folder(target.parent)
    return target


def publish_folder(
    path: str | os.PathLike[str], write: Callable[[Path], object], *, marker: str, force: bool = False
) -> Path:
    """Write one folder; returns its absolute path.

    Args:
        path: its name; the parent folder must exist.
        write: fills an empty folder beside `path`.
        marker: a file that every folder of this kind has ("bundle.json"); other folders are not replaced.
        force: replace an existing folder.

    Raises:
        UsageError, NotFound: as `check_folder`.
        ResourceError: the disk is full or broken.
        Errors of `write` pass.  Nothing is left behind then, nor on KeyboardInterrupt.
    """
    target = check_folder(path, marker, force)
    sweep(target.parent)
    with explained(target):
        aside, descriptor = _create(target.parent, as_folder=True)
        try:
            write(aside)
            _sync_tree(aside)
            _name_folder(aside, target, marker, force)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise
        finally:
            if descriptor >= 0:
                os.close(descriptor)
        _sync_folder(target.parent)
    return target


def check_file(path: str | os.PathLike[str], force: bool = False) -> Path:
    """The absolute path, if `publish` can write there; called before long work starts.

    Raises:
        UsageError: it exists and `force` is off, it is not a regular file, or its folder is not writable.
        NotFound: its folder does not exist.
    """
    target = Path(os.path.abspath(path))
    with explained(target):
        _check_parent(target)
        if target.is_dir():
            raise UsageError(f"{target} is a folder", "a file is to be written", "add a file name to it")
        if _is_taken(target):
            if not target.is_file():
                why = "only plain files are replaced"
                raise UsageError(f"{target} is not a plain file", why, "choose another name")
            if not force:
                raise already(target)
    return target


def check_folder(path: str | os.PathLike[str], marker: str, force: bool = False) -> Path:
    """The absolute path, if `publish_folder` can write there; an empty folder may be replaced.

    Raises:
        UsageError: it exists and `force` is off; its parent is not writable; or, even with `force`, it is a
            file, the current folder, or lacks the marker (or a typing error could replace a home directory).
        NotFound: its parent does not exist.
    """
    target = Path(os.path.abspath(path))
    with explained(target):
        _check_parent(target)
        try:
            info = target.lstat()
            if not stat.S_ISDIR(info.st_mode):
                raise UsageError(f"{target} is not a folder", "a folder is to be written", "name another")
            current, contents = target.samefile(os.curdir), os.listdir(target)
            if not os.path.samestat(info, target.lstat()):
                return target  # replaced meanwhile: the listing may be of a half-removed folder
        except FileNotFoundError:  # the name is free, or another run is replacing the folder
            return target
        if current:
            raise UsageError(f"{target} is the current folder", "it would be replaced", "name a new one")
        if not contents:
            return target
        if marker not in contents:
            why = "only a folder of the same kind is replaced"
            raise UsageError(f"{target} is not empty and holds no {marker}", why, "name a new folder")
        if not force:
            raise already(target)
    return target


def remove(path: str | os.PathLike[str]) -> None:
    """Remove a file, a link, or a folder with its contents; its name is free at once.

    Raises:
        NotFound: it does not exist.
        UsageError: its folder is not writable.
        ResourceError: the disk is broken, or a part could not be removed.
    """
    target = Path(os.path.abspath(path))
    with explained(target):
        if not stat.S_ISDIR(target.lstat().st_mode):
            target.unlink()
            return
        old = _new_name(target.parent)
        with _locked(target):  # so that another run's sweep does not remove it as well
            os.rename(target, old)
            shutil.rmtree(old, ignore_errors=True)
        if os.path.lexists(old):
            do = shlex.join(["rm", "-r", str(old)])
            raise ResourceError(f"{target} was removed in part", f"the rest is {old}", do)


def sweep(folder: Path, dry_run: bool = False) -> list[Path]:
    """Remove the leftovers of killed runs from `folder`, but no file that a run is writing.

    Never raises OSError.

    Returns:
        The paths that were removed, or would be with `dry_run`.
    """
    removed: list[Path] = []
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in list(entries):
            if entry.name.startswith(PREFIX) and entry.name.endswith(SUFFIX):
                path = Path(entry.path)
                with contextlib.suppress(OSError):
                    removed += [path] if _remove_stale(path, dry_run) else []
    return removed


def _remove_stale(path: Path, dry_run: bool) -> bool:
    mode = path.lstat().st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        return False
    with _locked(path) as alone:
        if alone and not dry_run:
            if stat.S_ISDIR(mode):
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink()
        return alone


def _create(folder: Path, as_folder: bool) -> tuple[Path, int]:
    """A new temporary file or folder, open and locked, with a mode that follows the umask.

    The descriptor of a folder is -1 if the system cannot open folders.
    """
    while True:
        # Not derived from the target's name, which may be 255 bytes long already, the limit.
        aside = _new_name(folder)
        if as_folder:
            aside.mkdir()
            flags = os.O_RDONLY
        else:
            flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | getattr(os, "O_BINARY", 0)
        if as_folder and not _POSIX:
            return aside, -1
        # Another run may sweep it before it is locked: then make a new one.
        try:
            descriptor = os.open(aside, flags, 0o666)
        except FileNotFoundError:
            if not as_folder:  # opening creates a file, so it was not swept: it cannot be created (/proc)
                raise
            continue
        if _is_locked_at(descriptor, aside):
            return aside, descriptor
        os.close(descriptor)


def _is_locked_at(descriptor: int, path: Path) -> bool:
    """Lock an open file or folder; whether it still has its name."""
    if not _POSIX:
        return True
    _lock(descriptor, wait=True)
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _new_name(folder: Path) -> Path:
    return folder / f"{PREFIX}{secrets.token_hex(8)}{SUFFIX}"


def _name_file(aside: Path, target: Path, force: bool) -> None:
    if not force:
        # A link, unlike a rename, fails if the name is taken: two runs cannot overwrite each other.
        try:
            os.link(aside, target)
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            check_file(target, force)
        else:
            aside.unlink()
            return
    os.replace(aside, target)


def _name_folder(aside: Path, target: Path, marker: str, force: bool) -> None:
    if not force:
        os.rename(aside, target)  # fails if the name is taken, unless by an empty folder
        return
    for _ in range(ATTEMPTS):
        check_folder(target, marker, force)
        with _moved_away(target):
            try:
                os.rename(aside, target)
            except OSError as error:
                if error.errno not in EXISTS:
                    raise
                continue  # another run was faster: replace its folder
            return
    raise ResourceError(f"{target} could not be replaced", "other runs keep writing it", "try again later")


@contextlib.contextmanager
def _moved_away(target: Path) -> Iterator[None]:
    """Rename `target`; afterwards remove it, or put it back if its name is still free."""
    old = _new_name(target.parent)
    with _locked(target):  # the lock follows the folder: no sweep removes it before it is put back
        moved = True
        try:
            os.rename(target, old)
        except FileNotFoundError:
            moved = False
        try:
            yield
        finally:
            if moved and not os.path.lexists(target):
                _put_back(old, target)
            shutil.rmtree(old, ignore_errors=True)


def _put_back(old: Path, target: Path) -> None:
    try:
        os.rename(old, target)
    except OSError as error:
        if error.errno not in EXISTS:  # another run has just taken the name
            raise


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Hold the lock of a file or folder; yields False if it cannot be locked."""
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    try:
        descriptor = os.open(path, flags)
    except OSError:  # absent; or a folder, on a system that cannot open folders
        yield False
        return
    try:
        yield _lock(descriptor)
    finally:
        os.close(descriptor)


def _lock(descriptor: int, wait: bool = False) -> bool:
    if not _POSIX:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:  # another process has it, or the file system has no locks
        return False
    return True


def _sync_tree(folder: Path) -> None:
    for parent, _, names in os.walk(folder):
        for name in names:
            with open(os.path.join(parent, name), "rb") as file:
                os.fsync(file.fileno())
        _sync_folder(Path(parent))


def _sync_folder(folder: Path) -> None:
    if not _POSIX:
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:  # some network file systems cannot sync a folder
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def _check_parent(target: Path) -> None:
    parent, why = target.parent, f"{target.name} is to be written there"
    _check_name(target)
    if not parent.exists():
        raise NotFound(f"the folder {parent} does not exist", why, shlex.join(["mkdir", "-p", str(parent)]))
    if not parent.is_dir():
        raise UsageError(f"{parent} is not a folder", why, "choose another name")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise not_writable(target)


def _check_name(target: Path) -> None:
    try:
        os.lstat(target)
    except ValueError as error:  # NUL, or a character that the file system cannot encode
        raise UsageError(f"{str(target)!r} is not a file name", str(error), "choose another") from error
    except OSError:  # raised again when the name is used
        pass


def _is_taken(target: Path) -> bool:
    """Whether the name exists, if only as a dangling link; unlike `lexists`, raises if it cannot exist."""
    try:
        target.lstat()
    except FileNotFoundError:
        return False
    return True
