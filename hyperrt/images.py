"""Photos in: untrusted files => [H, W, 3] uint8 pictures => pixels [n, 3, S, S] for the image encoder.

A photo is JPEG, PNG, WebP, GIF, BMP or TIFF, told by its contents and not by its name.  Pictures are upright
(EXIF orientation applied), in sRGB, 8 bits, transparency composited on white; of several frames the first; at
most `KEEP_SIDE` pixels on the longer side, which bounds memory.  Nothing of a file's metadata is kept.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import re
import stat
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol

import numpy as np
from numpy.typing import NDArray

from hyperrt.errors import BadImage, BadInput, BundleMismatch, NotFound
from hyperrt.srgb import Picture, upright_srgb

if TYPE_CHECKING:
    from PIL.Image import Image as PilImage

MAX_PHOTOS = 16  # of one folder; more add nothing to the mean, and each takes time
MAX_ENTRIES = 100_000  # of one folder; more is no folder of photos
MAX_FILE_BYTES = 64 << 20
MAX_PIXELS = 64_000_000
MIN_SIDE, MAX_SIDE = 32, 16_384  # pixels
MAX_ASPECT = 20  # longer side over shorter; beyond it a square picture shows nothing of the subject
KEEP_SIDE = 1024  # pixels; several times what an image encoder sees

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
READABLE = "JPEG, PNG, WebP, GIF, BMP or TIFF"
CONVERT, AGAIN = "convert it to PNG or JPEG", "copy or save it again"

# Names by which a file that cannot be read is still a photo that the user meant.
SUFFIXES = (
    ".apng", ".avif", ".bmp", ".dib", ".gif", ".heic", ".heif", ".ico", ".jfif", ".jp2", ".jpe", ".jpeg",
    ".jpg", ".jxl", ".mpo", ".png", ".psd", ".tif", ".tiff", ".webp",
)  # fmt: skip
SIGNATURES = (  # offset, bytes, what the file is
    (0, b"\xff\xd8\xff", "JPEG"), (0, b"\x89PNG\r\n\x1a\n", "PNG"), (8, b"WEBP", "WEBP"), (0, b"GIF8", "GIF"),
    (0, b"BM", "BMP"), (0, b"II*\0", "TIFF"), (0, b"MM\0*", "TIFF"), (4, b"ftyphei", "HEIC"),
    (4, b"ftypmif1", "HEIC"), (4, b"ftypavi", "AVIF"), (4, b"jP  ", "JPEG 2000"), (0, b"8BPS", "Photoshop"),
    (0, b"%PDF", "PDF"), (0, b"<svg", "SVG"),
)  # fmt: skip
HEAD_BYTES = 16
CROPS = {"pad": max, "center": min}  # side of the square, of height and width


class Preprocess(Protocol):
    """How pixels for an image encoder are made; the manifest's `preprocess`."""

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
    """What a folder gave, in natural order of the file names (2 before 10)."""

    images: list[Picture] = field(default_factory=list)
    names: list[str] = field(default_factory=list)  # of images, safe to print
    rejected: list[tuple[str, str]] = field(default_factory=list)  # photos left out: name, reason
    ignored: list[tuple[str, str]] = field(default_factory=list)  # what is no photo: name, kind


def load_image(
    source: str | os.PathLike[str] | bytes | Picture | PilImage,
    *,
    keep_side: int = KEEP_SIDE,
    follow: bool = True,
) -> Picture:
    """One photo => [H, W, 3] uint8.

    Args:
        source: a file, the contents of one, an array [H, W], [H, W, 3] or [H, W, 4] of uint8, or a PIL image
            (left as it is).
        keep_side: of a file, pixels that are kept on the longer side.
        follow: read a file that is reached by a link.

    Raises:
        BadImage: it cannot be read, or is too small, too large or too narrow.
        NotFound: there is no such file.
    """
    if isinstance(source, bytes):
        _check_bytes(len(source), "image")
        return _decode(io.BytesIO(source), "image", keep_side)
    if isinstance(source, (str, os.PathLike)):
        return _load_file(Path(source), printable(os.fspath(source)), follow, keep_side)
    with _damage_as_bad_image("image", b""):
        image = _image_in_memory(source)
        _check_size(image.size, "image")
        return upright_srgb(image.copy(), KEEP_SIDE)


def load_folder(path: str | os.PathLike[str], strict: bool = False) -> Photos:
    """The first `MAX_PHOTOS` usable photos of a folder; what else there is, is said in the result.

    Sub-folders are not entered, links not followed, pipes, sockets and devices not opened, hidden files not
    seen.  The same picture twice is used once.

    Args:
        path: the folder.
        strict: raise on the first photo that cannot be read.

    Raises:
        BadImage: a photo cannot be read and `strict` is on.
        BadInput: no photo is left, or it is no folder of photos.
        NotFound: there is no such folder.
    """
    folder = Path(path)
    photos = Photos()
    seen: dict[bytes, str] = {}  # hash of a picture -> its name
    found = entries(folder)
    for position, entry in enumerate(found):
        if len(photos.images) == MAX_PHOTOS:
            _count_rest(photos, found[position:])
            break
        name = printable(entry.name)
        try:
            if not _is_photo(entry):
                kind = "a folder" if entry.is_dir(follow_symlinks=False) else "no picture"
                photos.ignored.append((name, kind))
                continue
            picture = _load_file(Path(entry.path), name, follow=False)
        except (BadImage, NotFound) as error:  # NotFound: removed since it was listed
            if strict:
                raise
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
        raise _no_photos(folder, photos)
    return photos


def preprocess(images: Sequence[Picture], spec: Preprocess) -> NDArray[np.float32]:
    """Pictures [H, W, 3] uint8 => pixels [n, 3, S, S]: square, resized (antialiased), (x / 255 - mean) / std.

    `crop` makes them square: "pad" adds white to the shorter side, "center" cuts the ends of the longer.

    Raises:
        BundleMismatch: the spec names a way that this version does not know.
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
    """[H, W, 3] => [size, size, 3]; `crop` as in `preprocess`."""
    from PIL import Image

    height, width = picture.shape[:2]
    side = CROPS[crop](height, width)
    canvas = Image.new("RGB", (side, side), "white")
    canvas.paste(Image.fromarray(picture), ((side - width) // 2, (side - height) // 2))  # may stick out
    return np.array(canvas.resize((size, size), Image.Resampling.BICUBIC), np.uint8)


def natural_key(name: str) -> tuple[Any, ...]:
    """Sort key by which 2.png comes before 10.png."""
    parts = re.split(r"([0-9]+)", name.casefold())
    return tuple(int(part) if index % 2 else part for index, part in enumerate(parts)), name


def printable(name: str) -> str:
    """A file name with control characters and undecodable bytes written out: it may be hostile."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in name)


def entries(folder: Path) -> list[os.DirEntry[str]]:
    """What a folder holds, in natural order, without hidden files.

    Raises:
        NotFound, BadInput: there is no such folder; it cannot be read, or holds more than `MAX_ENTRIES`.
    """
    listed = []
    try:
        with os.scandir(folder) as found:
            for entry in found:
                if not entry.name.startswith("."):
                    listed.append(entry)
                if len(listed) > MAX_ENTRIES:
                    why = f"it holds more than {MAX_ENTRIES:,} files"
                    raise BadInput(f"{folder} is no folder of photos", why, "name one with photos")
    except FileNotFoundError as error:
        raise NotFound(f"the folder {folder} does not exist", "", "name a folder of photos") from error
    except OSError as error:
        raise BadInput(f"the folder {folder} cannot be read", error.strerror or str(error)) from error
    return sorted(listed, key=lambda entry: natural_key(entry.name))


def _is_photo(entry: os.DirEntry[str]) -> bool:
    """Whether the user may have meant it as a photo: by its name, or by how its contents begin."""
    if Path(entry.name).suffix.lower() in SUFFIXES:
        return not entry.is_dir(follow_symlinks=False)
    if not entry.is_file(follow_symlinks=False):
        return False
    try:
        with _open_regular(Path(entry.path), "", follow=False) as file:
            return _signature(file.read(HEAD_BYTES)) in FORMATS
    except BadImage:
        return False


def _count_rest(photos: Photos, rest: Sequence[os.DirEntry[str]]) -> None:
    more = [entry.name for entry in rest if Path(entry.name).suffix.lower() in SUFFIXES]
    if more:
        name = printable(more[0]) + (f" and {len(more) - 1:,} more" if len(more) > 1 else "")
        photos.rejected.append((name, f"only the first {MAX_PHOTOS} photos of a folder are used"))


def _no_photos(folder: Path, photos: Photos) -> BadInput:
    if not photos.rejected:
        why = f"it holds {len(photos.ignored):,} files or folders of other kinds"
        return BadInput(f"{folder} holds no photos", why, f"name a folder that itself holds {READABLE}")
    first = "; ".join(f"{name}: {reason}" for name, reason in photos.rejected[:3])
    more = f"; and {len(photos.rejected) - 3:,} more" if len(photos.rejected) > 3 else ""
    what = f"none of the {len(photos.rejected):,} photos in {folder} can be used"
    return BadInput(what, first + more, "add others, as PNG or JPEG")


def _load_file(path: Path, name: str, follow: bool, keep_side: int = KEEP_SIDE) -> Picture:
    with _open_regular(path, name, follow) as file:
        return _decode(file, name, keep_side)


def _decode(file: BinaryIO, name: str, keep_side: int) -> Picture:
    # Readers imported here: for one that is missing, Pillow would import all its forty.
    from PIL import Image, TiffImagePlugin, WebPImagePlugin  # noqa: F401

    head = file.read(HEAD_BYTES)
    file.seek(0)
    with _damage_as_bad_image(name, head), Image.open(file, formats=FORMATS) as image:
        _check_size(image.size, name)
        image.draft(None, (keep_side, keep_side))  # a large JPEG: decode it at a half, fourth ...
        image.load()
        return upright_srgb(image, keep_side)


@contextlib.contextmanager
def _open_regular(path: Path, name: str, follow: bool) -> Iterator[io.BufferedReader]:
    """A plain file, open; anything else is refused before it is opened: opening a pipe waits for its writer.

    Raises:
        BadImage: it is no plain file, is empty or too large, or may not be read.
        NotFound: it does not exist.
    """
    try:
        _check_regular(os.stat(path, follow_symlinks=follow), name)
        # In the meantime it may have become a pipe, so open without waiting, and look again.
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
    kinds = {stat.S_IFDIR: "a folder", stat.S_IFLNK: "a symbolic link", stat.S_IFIFO: "a named pipe"}
    return kinds.get(stat.S_IFMT(mode), "a socket or device")


@contextlib.contextmanager
def _damage_as_bad_image(name: str, head: bytes) -> Iterator[None]:
    """Whatever a decoder raises on a malformed file becomes a BadImage; its warnings are dropped."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except BadImage:
        raise
    # Decoders let nearly everything escape: OSError, ValueError, SyntaxError, struct.error, MemoryError ...
    except Exception as error:
        raise _bad_image(name, head, error) from error


def _bad_image(name: str, head: bytes, error: Exception) -> BadImage:
    from PIL import Image, UnidentifiedImageError

    kind = _signature(head)
    if kind and kind not in FORMATS:
        return BadImage(name, f"it is {kind}; readable are {READABLE}", CONVERT)
    if isinstance(error, Image.DecompressionBombError):
        return BadImage(name, f"it has more than {MAX_PIXELS // 10**6} million pixels", "make it smaller")
    if isinstance(error, UnidentifiedImageError):
        why = f"it begins like {kind}, but is damaged" if kind else f"it is not {READABLE}"
        return BadImage(name, why, AGAIN if kind else CONVERT)
    return BadImage(name, f"it is damaged: {printable(str(error)) or type(error).__name__}", AGAIN)


def _signature(head: bytes) -> str | None:
    return next((kind for at, magic, kind in SIGNATURES if head[at:].startswith(magic)), None)


def _check_size(size: tuple[int, int], name: str) -> None:
    width, height = size
    short, long = min(size), max(size)
    if short < MIN_SIDE:
        why = f"it has {width} x {height} pixels; each side needs at least {MIN_SIDE}"
        raise BadImage(name, why, "use a larger one")
    if long > MAX_SIDE or width * height > MAX_PIXELS:
        limit = f"at most {MAX_SIDE:,} a side and {MAX_PIXELS // 10**6} million in all"
        raise BadImage(name, f"it has {width} x {height} pixels; {limit}", "make it smaller")
    if long > MAX_ASPECT * short:
        why = f"it has {width} x {height} pixels; one side is over {MAX_ASPECT} times the other"
        raise BadImage(name, why, "crop it")


def _image_in_memory(source: object) -> PilImage:
    from PIL import Image

    if isinstance(source, Image.Image):
        return source
    if not isinstance(source, np.ndarray):
        raise BadImage("image", f"it is a {type(source).__name__}; wanted is a file name, array or PIL image")
    if source.dtype != np.uint8 or source.shape[2:] not in ((), (3,), (4,)) or source.ndim < 2:
        have = f"it is an array {list(source.shape)} of {source.dtype}"
        raise BadImage("image", f"{have}; wanted is [height, width, 3] of uint8")
    return Image.fromarray(np.ascontiguousarray(source))
