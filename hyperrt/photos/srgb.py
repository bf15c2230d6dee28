"""An image of any mode, profile and orientation => an upright picture in sRGB, 8 bits, on white."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from PIL.Image import Image as PilImage
    from PIL.Image import Transpose

Picture = NDArray[np.uint8]  # [H, W, 3]
ORIENTATION = 0x0112  # EXIF tag
SAME_COLOUR = 2  # levels of 255; published sRGB profiles differ from Little CMS's by 1
# [81, 9, 3]: every colour of nine levels a channel
_TEST_COLOURS = (np.indices((9, 9, 9)).reshape(3, 81, 9).transpose(1, 2, 0) * 31.875).astype(np.uint8)


def upright_srgb(image: PilImage, keep_side: int) -> Picture:
    """A loaded image => [H, W, 3] uint8 of at most `keep_side` pixels on the longer side.

    Raises whatever Pillow raises on a damaged one; ValueError: its samples have 32 bits.
    """
    from PIL import Image

    # TIFF is turned while it loads, which also clears its tag: so the tag is read here, and not before.
    turn = _turn(image)
    colour, alpha = _colour_and_alpha(image)
    colour = _to_srgb(colour, image.info.get("icc_profile"))
    if alpha is not None:
        colour = Image.composite(colour, Image.new("RGB", colour.size, "white"), alpha)
    colour.thumbnail((keep_side, keep_side), Image.Resampling.BICUBIC, reducing_gap=3.0)
    return np.array(colour if turn is None else colour.transpose(turn), np.uint8)


def _colour_and_alpha(image: PilImage) -> tuple[PilImage, PilImage | None]:
    """Colour in a mode that colour profiles are made for, RGB, L or CMYK; transparency as L."""
    from PIL import Image

    if image.mode in ("I", "F"):
        raise ValueError("its samples are of 32 bits, in an unknown range")
    if image.mode.startswith("I;16"):  # Pillow's own conversion cuts everything above 255 to white
        samples = np.asarray(image)
        clear = image.info.get("transparency")
        alpha = None if clear is None else Image.fromarray(np.uint8(255) * (samples != clear))
        return Image.fromarray((samples >> 8).astype(np.uint8)), alpha
    colour = "L" if image.mode in ("1", "L", "LA") else "RGB"
    if image.has_transparency_data:
        both = image.convert(f"{colour}A")
        return both.convert(colour), both.getchannel("A")
    return (image if image.mode in ("CMYK", colour) else image.convert(colour)), None


def _to_srgb(image: PilImage, profile: bytes | None) -> PilImage:
    """RGB; a profile that cannot be read or does not fit is ignored."""
    if profile:
        with contextlib.suppress(Exception):
            from PIL import ImageCms

            source, target = ImageCms.getOpenProfile(io.BytesIO(profile)), ImageCms.createProfile("sRGB")
            convert = ImageCms.buildTransform(source, target, image.mode, "RGB").apply
            if not _changes_nothing(convert, image.mode):
                return convert(image)
    return image.convert("RGB")


def _changes_nothing(convert: Callable[[PilImage], PilImage], mode: str) -> bool:
    """Whether a profile is sRGB, whatever it calls itself: the way there and back would cost exactness."""
    from PIL import Image

    colours = Image.fromarray(_TEST_COLOURS).convert(mode)
    change = np.asarray(convert(colours), int) - np.asarray(colours.convert("RGB"), int)
    return bool(abs(change).max() <= SAME_COLOUR)


def _turn(image: PilImage) -> Transpose | None:
    """The transposition that makes it upright; None where there is none, or the EXIF block is damaged."""
    from PIL.Image import Transpose

    turns = {
        2: Transpose.FLIP_LEFT_RIGHT, 3: Transpose.ROTATE_180, 4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE, 6: Transpose.ROTATE_270, 7: Transpose.TRANSVERSE, 8: Transpose.ROTATE_90,
    }  # fmt: skip
    with contextlib.suppress(Exception):
        return turns[image.getexif()[ORIENTATION]]
    return None
