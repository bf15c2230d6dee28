"""Converts an image of any mode, profile and orientation to an upright picture in 8-bit sRGB, on white."""

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
    """A loaded image to [H, W, 3] uint8 with at most `keep_side` pixels on the longer side.

    Raises:
        ValueError: its samples have 32 bits.  Pillow's errors pass.
    """
    from PIL import Image

    # Read the tag after loading: Pillow turns a TIFF while it loads, and clears the tag.
    turn = _turn(image)
    colour, alpha = _colour_and_alpha(image)
    colour = _to_srgb(colour, image.info.get("icc_profile"))
    if alpha is not None:
        colour = Image.composite(colour, Image.new("RGB", colour.size, "white"), alpha)
    colour.thumbnail((keep_side, keep_side), Image.Resampling.BICUBIC, reducing_gap=3.0)
    return np.array(colour if turn is None else colour.transpose(turn), np.uint8)


def _colour_and_alpha(image: PilImage) -> tuple[PilImage, PilImage | None]:
    """Colour in a mode that colour profiles support (RGB, L or CMYK), and transparency as L."""
    from PIL import Image

    if image.mode in ("I", "F"):
        raise ValueError("its samples have 32 bits, and an unknown range")
    if image.mode.startswith("I;16"):  # Pillow's conversion would make everything above 255 white
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
    """The image in sRGB; a profile that cannot be read or does not fit is ignored."""
    if profile:
        with contextlib.suppress(Exception):
            from PIL import ImageCms

            source, target = ImageCms.getOpenProfile(io.BytesIO(profile)), ImageCms.createProfile("sRGB")
            convert = ImageCms.buildTransform(source, target, image.mode, "RGB").apply
            if not _changes_nothing(convert, image.mode):
                return convert(image)
    return image.convert("RGB")


def _changes_nothing(convert: Callable[[PilImage], PilImage], mode: str) -> bool:
    """Whether the profile is sRGB, whatever its name: converting would only round the colours."""
    from PIL import Image

    colours = Image.fromarray(_TEST_COLOURS).convert(mode)
    change = np.asarray(convert(colours), int) - np.asarray(colours.convert("RGB"), int)
    return bool(abs(change).max() <= SAME_COLOUR)


def _turn(image: PilImage) -> Transpose | None:
    """The transposition that makes it upright, or None; a damaged EXIF block is ignored.

    Not `ImageOps.exif_transpose`: it would copy the image at full size, before `thumbnail`.
    """
    from PIL.Image import Transpose

    turns = {
        2: Transpose.FLIP_LEFT_RIGHT, 3: Transpose.ROTATE_180, 4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE, 6: Transpose.ROTATE_270, 7: Transpose.TRANSVERSE, 8: Transpose.ROTATE_90,
    }  # fmt: skip
    with contextlib.suppress(Exception):
        return turns[image.getexif()[ORIENTATION]]
    return None
