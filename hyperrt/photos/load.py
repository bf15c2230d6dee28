"""Loads photos: untrusted files => [H, W, 3] uint8 pictures => pixels [n, 3, S, S] for the image encoder.

Pictures are upright (EXIF orientation applied), 8-bit sRGB, composited on white, with at most `KEEP_SIDE`
pixels on the longer side, which bounds memory.  No metadata is kept.  hyperrt/photos/formats.py
says which kinds and sizes of files are read.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import re
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol

import numpy as np
from numpy.typing import NDArray

from hyperrt.errors import BadImage, BadInput, BundleMismatch, LinkedPhotos, NotFound
from hyperrt.photos.formats import (
    AGAIN,
    CONVERT,
    HEAD_BYTES,
    READABLE,
    SUFFIXES,
    check_size,
    damage_as_bad_image,
    is_photo,
    opened,
)
from hyperrt.photos.srgb import Picture, upright_srgb
from hyperrt.text import advice, printable

if TYPE_CHECKING:
    from PIL.Image import Image as PilImage

MAX_PHOTOS = 16  # of one folder; more hardly change the mean, and each takes time
MAX_ENTRIES = 100_000  # of one folder
MAX_FILE_BYTES = 128 << 20
KEEP_SIDE = 1024  # pixels; several times the size of an image encoder's input
WANTED = "give a file name, an open binary file, bytes, an array or a PIL image"
BINARY = "open it for reading, with mode 'rb'"
BLANK = 8  # levels of 255; smallest standard deviation of a channel of the photo at 32 x 32 pixels
CROPS = {"pad": max, "center": min}  # side of the square from height and width


class Preprocess(Protocol):
    """Options of `preprocess`, from the manifest."""

    @property
    def size(self) -> int: ...  # S, pixels
    @property
    def mean(self) -> Sequence[float]: ...  # per channel, of values in [0, 1]
    @property
    def std(self) -> Sequence[float]: ...
    @property
    def resample(self) -> str: ...  # "bicubic"
    @property
    def crop(self) -> str: ...  # "pad" or "center"


@dataclass
class Photos:
    """The photos of a folder, in natural order of the file names (2 before 10)."""

    images: list[Picture] = field(default_factory=list)
    names: list[str] = field(default_factory=list)  # of images, safe to print
    rejected: list[tuple[str, str]] = field(default_factory=list)  # unusable photos: name, reason
    ignored: list[tuple[str, str]] = field(default_factory=list)  # other files and folders: name, kind


def load_image(
    source: str | os.PathLike[str] | bytes | BinaryIO | Picture | PilImage,
    *,
    keep_side: int = KEEP_SIDE,
    follow: bool = True,
    name: str = "image",
) -> Picture:
    """One photo as [H, W, 3] uint8.

    Args:
        source: a file's name, its contents, an open binary file (read from its beginning), an array [H, W],
            [H, W, 3] or [H, W, 4] of uint8, or a PIL image (not changed).
        keep_side: pixels to keep on the longer side of a file's picture.
        follow: follow a symbolic link.
        name: for errors, if the photo has no file name.

    Raises:
        BadImage: it cannot be read, or is too small, too large or too narrow.
        NotFound: the file does not exist.
    """
    if isinstance(source, (str, os.PathLike)):
        path = os.fsdecode(source)
        name = printable(path)
        with _open_regular(Path(path), name, follow) as file:
            return _decode(file, name, keep_side)
    content = _contents(source, name)
    if content is not None:
        _check_bytes(len(content), name)
        return _decode(io.BytesIO(content), name, keep_side)
    with damage_as_bad_image(name):
        image = _image_in_memory(source, name)
        check_size(image.size, name)
        return upright_srgb(image.copy(), KEEP_SIDE)


def is_blank(picture: Picture) -> bool:
    """Whether [H, W, 3] is nearly one colour, as behind a lens cap.

    At 32 x 32 pixels, without a sensor's noise, each channel's standard deviation is below `BLANK`.
    """
    from PIL import Image

    small = Image.fromarray(picture).resize((32, 32), Image.Resampling.BOX)
    return bool(np.std(np.asarray(small), axis=(0, 1)).max() < BLANK)


def load_folder(path: str | os.PathLike[str], strict: bool = False) -> Photos:
    """The first `MAX_PHOTOS` usable photos of a folder; the result lists the other files, too.

    Sub-folders are not entered, links not followed, pipes, sockets and devices not opened, hidden files
    skipped.  A picture that occurs twice is used once.

    Args:
        path: the folder.
        strict: raise on the first photo that cannot be read.

    Raises:
        BadImage: a photo cannot be read and `strict` is on.
        LinkedPhotos: no photo is usable, or one with `strict`, because photos are links.
        BadInput: no photo is usable, or the folder cannot be read.
        NotFound: the folder does not exist.
    """
    folder = Path(path)
    photos = Photos()
    seen: dict[bytes, str] = {}  # hash of a picture -> its name
    listed = entries(folder)
    for position, entry in enumerate(listed):
        if len(photos.images) == MAX_PHOTOS:
            _count_rest(photos, listed[position:])
            break
        name = printable(entry.name)
        try:
            if not _is_photo(entry):
                kind = "a folder" if entry.is_dir(follow_symlinks=False) else "not a picture"
                photos.ignored.append((name, kind))
                continue
            with _open_regular(Path(entry.path), name, follow=False) as file:
                picture = _decode(file, name, KEEP_SIDE)
        except (BadImage, NotFound) as error:  # NotFound: removed since it was listed
            if strict:
                linked = entry.is_symlink() and _linked(folder, listed, error.what, error.why)
                raise (linked or error) from None
            photos.rejected.append((name, error.why))
            continue
        content = repr(picture.shape).encode() + picture.tobytes()
        first = seen.setdefault(hashlib.sha256(content).digest(), name)
        if first != name:
            photos.rejected.append((name, f"it is the same picture as {first}"))
            continue
        photos.images.append(picture)
        photos.names.append(name)
    if not photos.images:
        raise _no_photos(folder, photos, listed)
    return photos


def preprocess(images: Sequence[Picture], spec: Preprocess) -> NDArray[np.float32]:
    """Pictures [H, W, 3] uint8 to pixels [n, 3, S, S]: square, resized (antialiased), (x / 255 - mean) / std.

    `crop` makes them square: "pad" adds white to the shorter side, "center" cuts the ends of the longer.

    Raises:
        BundleMismatch: this version does not know `resample` or `crop`.
    """
    if spec.resample != "bicubic" or spec.crop not in CROPS:
        why = f"resample {spec.resample!r}, crop {spec.crop!r}; known are 'bicubic' and 'pad', 'center'"
        raise BundleMismatch("the bundle prepares photos in an unknown way", why, "update hyperrt")
    pixels = np.empty((len(images), 3, spec.size, spec.size), np.float32)
    mean, std = np.asarray(spec.mean, np.float32), np.asarray(spec.std, np.float32)
    for row, picture in zip(pixels, images, strict=True):
        small = square(picture, spec.size, spec.crop)
        row[:] = ((np.asarray(small, np.float32) / 255 - mean) / std).transpose(2, 0, 1)
    return pixels


def square(picture: Picture, size: int, crop: str = "center") -> Picture:
    """[H, W, 3] to [size, size, 3]; `crop` as in `preprocess`."""
    from PIL import Image

    height, width = picture.shape[:2]
    side = CROPS[crop](height, width)
    canvas = Image.new("RGB", (side, side), "white")
    canvas.paste(Image.fromarray(picture), ((side - width) // 2, (side - height) // 2))  # may stick out
    return np.array(canvas.resize((size, size), Image.Resampling.BICUBIC), np.uint8)


def natural_key(name: str) -> tuple[Any, ...]:
    """Sort key that puts 2.png before 10.png."""
    parts = re.split(r"([0-9]+)", name.casefold())
    return tuple(int(part) if index % 2 else part for index, part in enumerate(parts)), name


def entries(folder: Path) -> list[os.DirEntry[str]]:
    """The files and folders in a folder, in natural order, without hidden ones.

    Raises:
        NotFound: the folder does not exist.
        BadInput: it cannot be read, or holds more than `MAX_ENTRIES`.
    """
    listed = []
    try:
        with os.scandir(folder) as scan:
            for entry in scan:
                if not entry.name.startswith("."):
                    listed.append(entry)
                if len(listed) > MAX_ENTRIES:
                    why = f"it holds more than {MAX_ENTRIES:,} files"
                    raise BadInput(f"{folder} is not a folder of photos", why, "name one with photos")
    except FileNotFoundError as error:
        raise NotFound(f"the folder {folder} does not exist", "", "name a folder of photos") from error
    except OSError as error:
        raise BadInput(f"the folder {folder} cannot be read", error.strerror or str(error)) from error
    return sorted(listed, key=lambda entry: natural_key(entry.name))


def _is_photo(entry: os.DirEntry[str]) -> bool:
    """Whether it may be meant as a photo, by its name or its first bytes."""
    if Path(entry.name).suffix.lower() in SUFFIXES:
        return not entry.is_dir(follow_symlinks=False)
    if not entry.is_file(follow_symlinks=False):
        return False
    try:
        with _open_regular(Path(entry.path), "", follow=False) as file:
            return is_photo(file.read(HEAD_BYTES))
    except BadImage:
        return False


def _count_rest(photos: Photos, rest: Sequence[os.DirEntry[str]]) -> None:
    more = [entry.name for entry in rest if Path(entry.name).suffix.lower() in SUFFIXES]
    if more:
        name = printable(more[0]) + (f" and {len(more) - 1:,} more" if len(more) > 1 else "")
        photos.rejected.append((name, f"only the first {MAX_PHOTOS} photos of a folder are used"))


def _no_photos(folder: Path, photos: Photos, listed: Sequence[os.DirEntry[str]]) -> BadInput:
    if not photos.rejected:
        why = f"it holds {len(photos.ignored):,} files or folders of other kinds"
        return BadInput(f"{folder} holds no photos", why, f"name a folder that itself holds {READABLE}")
    first = "; ".join(f"{name}: {reason}" for name, reason in photos.rejected[:3])
    more = f"; and {len(photos.rejected) - 3:,} more" if len(photos.rejected) > 3 else ""
    what = f"none of the {len(photos.rejected):,} photos in {folder} can be used"
    linked = _linked(folder, listed, what, first + more)
    return linked or BadInput(what, first + more, "add others, as PNG or JPEG")


def _linked(folder: Path, listed: Sequence[os.DirEntry[str]], what: str, why: str) -> LinkedPhotos | None:
    """An error that names the files, if links may be the reason; else None."""
    photos = [e for e in listed if Path(e.name).suffix.lower() in SUFFIXES and os.path.isfile(e.path)]
    if not any(entry.is_symlink() for entry in photos):
        return None
    files = tuple(entry.path for entry in photos[:MAX_PHOTOS])
    return LinkedPhotos(what, why, advice("name the files", *files), str(folder), files)


def _decode(file: BinaryIO, name: str, keep_side: int) -> Picture:
    with opened(file, name, keep_side) as image:
        image.load()
        return upright_srgb(image, keep_side)


@contextlib.contextmanager
def _open_regular(path: Path, name: str, follow: bool) -> Iterator[io.BufferedReader]:
    """Open a regular file; refuse anything else before opening it, as opening a pipe waits for its writer.

    Raises:
        BadImage: it is not a regular file, is empty or too large, or cannot be read.
        NotFound: it does not exist.
    """
    try:
        _check_regular(os.stat(path, follow_symlinks=follow), name)
        # It may be a pipe by now: open without waiting, and check again.
        flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
        descriptor = os.open(path, flags | (0 if follow else getattr(os, "O_NOFOLLOW", 0)))
        with os.fdopen(descriptor, "rb") as file:
            _check_regular(os.fstat(descriptor), name)
            yield file
    except FileNotFoundError as error:
        raise NotFound(f"the photo {name!r} does not exist", "no such file", "check the name") from error
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise BadImage(name, f"it cannot be read: {getattr(error, 'strerror', None) or error}") from error


def _check_regular(info: os.stat_result, name: str) -> None:
    if stat.S_ISLNK(info.st_mode):
        why = "it is a symbolic link, which is not followed in a folder"
        raise BadImage(name, why, "name the file itself")
    if not stat.S_ISREG(info.st_mode):
        raise BadImage(name, f"it is {_kind(info.st_mode)}, not a file", "name a plain file")
    _check_bytes(info.st_size, name)


def _check_bytes(count: int, name: str) -> None:
    if count == 0:
        raise BadImage(name, "it is empty (0 bytes)", AGAIN)
    if count > MAX_FILE_BYTES:
        why = f"it has {count >> 20} MiB; the limit is {MAX_FILE_BYTES >> 20} MiB"
        raise BadImage(name, why, CONVERT)


def _kind(mode: int) -> str:
    kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a named pipe"}
    return kinds.get(stat.S_IFMT(mode), "a socket or device")


def _contents(source: Any, name: str) -> bytes | None:
    """The bytes of an open file, at most one more than allowed; None if the source has none."""
    if isinstance(source, (bytes, bytearray, memoryview)):
        return bytes(source)
    if not hasattr(source, "read"):
        return None
    try:
        if source.seekable():
            source.seek(0)
        content = source.read(MAX_FILE_BYTES + 1)
    except (OSError, ValueError, AttributeError) as error:  # ValueError: it is closed
        raise BadImage(name, f"it cannot be read: {error}", BINARY) from error
    if not isinstance(content, bytes):
        raise BadImage(name, f"reading it gave {type(content).__name__}, not bytes", BINARY)
    return content


def _image_in_memory(source: object, name: str) -> PilImage:
    from PIL import Image

    if isinstance(source, Image.Image):
        return source
    if not isinstance(source, np.ndarray):
        raise BadImage(name, f"it is of type {type(source).__name__}", WANTED)
    if source.dtype != np.uint8 or source.shape[2:] not in ((), (3,), (4,)) or source.ndim < 2:
        why = f"it is an array {list(source.shape)} of {source.dtype}; it must be [height, width, 3] of uint8"
        raise BadImage(name, why, "convert it")
    return Image.fromarray(np.ascontiguousarray(source))
