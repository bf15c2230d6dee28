"""Recognises image files by their contents, and opens their pictures within size limits.

Camera raw is refused: most of these files are TIFF inside, and a TIFF reader finds a thumbnail of 160 x 120
pixels first.
"""

from __future__ import annotations

import contextlib
import ctypes
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, BinaryIO

from hyperrt.errors import BadImage
from hyperrt.text import printable

if TYPE_CHECKING:
    from PIL.Image import Image as PilImage

MAX_PIXELS = 64_000_000
MAX_JPEG_PIXELS = 16_384 * 12_288  # of a JPEG decoded at half size or less: phones' 200 megapixels
MIN_SIDE, MAX_SIDE = 32, 16_384  # pixels
MAX_ASPECT = 20  # longer side over shorter; in a square picture the subject of a narrower photo is lost
MAX_SCANS = 100  # of a JPEG; a progressive one has about 10, and each is a pass over all pixels

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")  # of Pillow
HEIC = "HEIC"
RAW = "camera raw"
READABLE = "JPEG, PNG, WebP, GIF, BMP, TIFF, AVIF or HEIC"
CONVERT, AGAIN = "convert it to PNG or JPEG", "copy or save it again"
DEVELOP = "export it as JPEG or PNG from a program that reads camera raw"

RAW_SUFFIXES = (
    ".3fr", ".arw", ".cr2", ".cr3", ".crw", ".dcr", ".dng", ".erf", ".iiq", ".kdc", ".mef", ".mos", ".mrw",
    ".nef", ".nrw", ".orf", ".pef", ".raf", ".rw2", ".rwl", ".sr2", ".srw", ".x3f",
)  # fmt: skip
# A file with one of these names is meant as a photo, even if it cannot be read.
SUFFIXES = (
    ".apng", ".avif", ".bmp", ".dib", ".gif", ".heic", ".heif", ".hif", ".ico", ".jfif", ".jp2", ".jpe",
    ".jpeg", ".jpg", ".jxl", ".mpo", ".png", ".psd", ".tif", ".tiff", ".webp", *RAW_SUFFIXES,
)  # fmt: skip
SIGNATURES = (  # offset, bytes, kind of file
    (0, b"\xff\xd8\xff", "JPEG"), (0, b"\x89PNG\r\n\x1a\n", "PNG"), (8, b"WEBP", "WEBP"), (0, b"GIF8", "GIF"),
    (0, b"BM", "BMP"), (8, b"CR\2\0", f"{RAW} (CR2)"), (0, b"II*\0", "TIFF"), (0, b"MM\0*", "TIFF"),
    (0, b"II+\0", "TIFF"), (0, b"MM\0+", "TIFF"), (0, b"II\0*", "TIFF"), (0, b"MM*\0", "TIFF"),
    (0, b"FUJIFILMCCD-RAW", f"{RAW} (RAF)"), (0, b"IIRO", f"{RAW} (ORF)"), (0, b"IIRS", f"{RAW} (ORF)"),
    (0, b"MMOR", f"{RAW} (ORF)"), (0, b"IIU\0", f"{RAW} (RW2)"), (6, b"HEAPCCDR", f"{RAW} (CRW)"),
    (0, b"\0MRM", f"{RAW} (MRW)"), (0, b"FOVb", f"{RAW} (X3F)"), (4, b"jP  ", "JPEG 2000"),
    (4, b"JXL ", "JPEG XL"), (0, b"\xff\x0a", "JPEG XL"), (0, b"8BPS", "Photoshop"), (0, b"%PDF", "PDF"),
    (0, b"<svg", "SVG"),
)  # fmt: skip
BRANDS = (  # of an ISO media file; HEIC's come last, as AVIF files name mif1, too
    (f"{RAW} (CR3)", {b"crx "}),
    ("AVIF", {b"avif", b"avis"}),
    (HEIC, {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1"}),
)
HEAD_BYTES = 128

# Tags of TIFF 6.0, and of DNG 1.7, chapter 4
NEW_SUBFILE, SUBFILE, PHOTOMETRIC, SUB_DIRECTORIES, DNG_VERSION = 254, 255, 262, 330, 50706
SENSOR_DATA = (32803, 34892)  # photometric interpretations: colour filter array, linear raw
MAX_DIRECTORIES = 8  # of a TIFF that are read


def kind_of(head: bytes) -> str | None:
    """The kind of a file from its first `HEAD_BYTES`: of `FORMATS`, `HEIC`, one that is not read, or None."""
    if head[4:8] == b"ftyp":
        end = min(int.from_bytes(head[:4]), len(head))
        brands = {head[8:12], *(head[at : at + 4] for at in range(16, end, 4))}
        return next((kind for kind, of_kind in BRANDS if brands & of_kind), None)
    return next((kind for at, magic, kind in SIGNATURES if head[at:].startswith(magic)), None)


def is_photo(head: bytes) -> bool:
    """Whether a file with these first `HEAD_BYTES` is a photo: of a kind that is read, or camera raw."""
    kind = kind_of(head) or ""
    return kind in (*FORMATS, HEIC) or kind.startswith(RAW)


@contextlib.contextmanager
def opened(file: BinaryIO, name: str, keep_side: int) -> Iterator[PilImage]:
    """The picture in a file, with its size checked and its pixels not yet decoded.

    If a file holds several pictures, this is the first; in a TIFF the first that is not marked as a
    thumbnail, in HEIC the primary one.  A large JPEG will be decoded at a half, fourth or eighth of its size.

    Args:
        file: at its beginning.
        name: for errors.
        keep_side: the longer side keeps at least this many pixels.

    Raises:
        BadImage: it cannot be read, or its size is outside the limits; also replaces any error of a decoder
            inside the `with`.
    """
    head = file.read(HEAD_BYTES)
    file.seek(0)
    kind = kind_of(head)
    with damage_as_bad_image(name, kind), _silent_libtiff(kind), _open(file, name, kind) as image:
        size, most = image.size, MAX_PIXELS
        if kind == "JPEG":
            image.draft(None, (keep_side, keep_side))
            most = MAX_PIXELS if image.size == size else MAX_JPEG_PIXELS
        check_size(size, name, most)
        yield image


@contextlib.contextmanager
def _silent_libtiff(kind: str | None) -> Iterator[None]:
    """Keep libtiff from printing errors on stderr: Pillow raises them too.

    This sets libtiff's error handler: redirecting file descriptor 2 would lose what other threads print.
    The handler belongs to the process; two threads at once may leave it off.  Nothing is done if Pillow's
    libtiff cannot be reached, as on Windows.
    """
    handler: Any = None
    if kind == "TIFF":
        from PIL import _imaging

        with contextlib.suppress(AttributeError, OSError):
            handler = ctypes.CDLL(_imaging.__file__).TIFFSetErrorHandler
    if handler is None:
        yield
        return
    handler.argtypes, handler.restype = [ctypes.c_void_p], ctypes.c_void_p
    before = handler(None)
    try:
        yield
    finally:
        handler(before)


def check_size(size: tuple[int, int], name: str, most: int = MAX_PIXELS) -> None:
    """Refuse a picture that is too small, too large or too narrow.

    Args:
        size: width and height, pixels.
        most: pixels in all.

    Raises:
        BadImage: naming the size and the limit.
    """
    width, height = size
    short, long = min(size), max(size)
    if short < MIN_SIDE:
        why = f"it has {width} x {height} pixels; each side needs at least {MIN_SIDE}"
        raise BadImage(name, why, "use a larger one")
    if long > MAX_SIDE or width * height > most:
        limit = f"at most {MAX_SIDE:,} a side and {most // 10**6} million in all"
        raise BadImage(name, f"it has {width} x {height} pixels; {limit}", "make it smaller")
    if long > MAX_ASPECT * short:
        why = f"it has {width} x {height} pixels; one side is over {MAX_ASPECT} times the other"
        raise BadImage(name, why, "crop it")


@contextlib.contextmanager
def damage_as_bad_image(name: str, kind: str | None = None) -> Iterator[None]:
    """Turn any error of a decoder into a BadImage, and drop its warnings.

    Args:
        name: for errors.
        kind: of the file, from its first bytes.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except BadImage:
        raise
    # Decoders let nearly everything escape: OSError, ValueError, SyntaxError, struct.error, MemoryError ...
    except Exception as error:
        raise _bad_image(name, kind, error) from error


def _bad_image(name: str, kind: str | None, error: Exception) -> BadImage:
    from PIL import Image, UnidentifiedImageError

    if isinstance(error, Image.DecompressionBombError):
        return BadImage(name, f"it has more than {MAX_PIXELS // 10**6} million pixels", "make it smaller")
    if isinstance(error, (UnidentifiedImageError, SyntaxError)):
        why = f"it begins like {kind}, but is damaged" if kind else f"it is not {READABLE}"
        return BadImage(name, why, AGAIN if kind else CONVERT)
    return BadImage(name, f"it is damaged: {printable(str(error)) or type(error).__name__}", AGAIN)


def _open(file: BinaryIO, name: str, kind: str | None) -> PilImage:
    # Import the readers: if one is missing, Pillow imports all forty.
    from PIL import AvifImagePlugin, Image, TiffImagePlugin, WebPImagePlugin  # noqa: F401

    if kind == "TIFF" and (name.lower().endswith(RAW_SUFFIXES) or _is_raw(file)):
        kind = RAW
    if kind is not None and kind not in (*FORMATS, HEIC):
        do = DEVELOP if kind.startswith(RAW) else CONVERT
        raise BadImage(name, f"it is {kind}; HyperRT reads {READABLE}", do)
    if kind == "AVIF" and not AvifImagePlugin.SUPPORTED:
        raise BadImage(name, "it is AVIF, which this Pillow cannot read", "pip install --upgrade pillow")
    if kind == "JPEG":
        return _jpeg(file)
    if kind == HEIC:
        return _heic(file, name)
    image = Image.open(file, formats=FORMATS)
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        _skip_thumbnails(image, name)
    return image


def _jpeg(file: BinaryIO) -> PilImage:
    """Open a JPEG without `Image.open`, which refuses 200 megapixels even if decoded at an eighth."""
    from PIL.JpegImagePlugin import JpegImageFile

    class Jpeg(JpegImageFile):
        scans, last = 0, b""

        def load_read(self, read_bytes: int) -> bytes:
            content = super().load_read(read_bytes)
            # The marker of a scan never occurs in coded pixels, and rarely in metadata.
            self.scans += (self.last + content).count(b"\xff\xda")
            self.last = content[-1:]
            if self.scans > MAX_SCANS:
                raise OSError(f"more than {MAX_SCANS} scans")
            return content

    return Jpeg(file)


def _heic(file: BinaryIO, name: str) -> PilImage:
    """Open HEIC with pillow-heif's class, without registering it in Pillow for the whole process."""
    try:
        import pillow_heif

        # The first with libheif 1.23, which checks a file against the size that it declares.
        if tuple(map(int, pillow_heif.__version__.split(".")[:2])) < (1, 4):
            raise ImportError(f"pillow-heif {pillow_heif.__version__} is too old")
        reader: Any = pillow_heif.HeifImageFile
        image: PilImage = reader(file)
        return image
    except ImportError as error:
        why = f"it is {HEIC}, which needs pillow-heif 1.4 or later ({error})"
        raise BadImage(name, why, "pip install 'pillow-heif>=1.4'") from error


def _is_raw(file: BinaryIO) -> bool:
    """Whether a TIFF is a DNG, or has a directory that describes a sensor's data."""
    from PIL.TiffImagePlugin import ImageFileDirectory_v2

    head = file.read(8)
    head += file.read(8) if head[2] == 43 else b""  # BigTIFF
    waiting = [ImageFileDirectory_v2(head).next]
    directories: list[ImageFileDirectory_v2] = []
    with contextlib.suppress(Exception):  # Pillow will report the damage
        while waiting and len(directories) < MAX_DIRECTORIES:
            file.seek(waiting.pop(0))
            directory = ImageFileDirectory_v2(head)
            directory.load(file)
            directories.append(directory)
            below: Any = directory.get(SUB_DIRECTORIES, ())
            waiting += below if isinstance(below, tuple) else [below]
            waiting += [directory.next] if directory.next else []
    file.seek(0)
    return any(DNG_VERSION in each or each.get(PHOTOMETRIC) in SENSOR_DATA for each in directories)


def _skip_thumbnails(image: Any, name: str) -> None:
    """Go to the first picture of a TIFF that is not marked as a smaller copy of another."""
    width, height = image.size
    with contextlib.suppress(EOFError):
        for page in range(MAX_DIRECTORIES):
            image.seek(page)
            if not image.tag_v2.get(NEW_SUBFILE, 0) & 1 and image.tag_v2.get(SUBFILE) != 2:
                return
    why = f"it holds a thumbnail of {width} x {height} pixels, and HyperRT cannot read the photo itself"
    raise BadImage(name, f"{why}, as {RAW} files do", DEVELOP)
