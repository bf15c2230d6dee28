"""An image of any mode, profile and orientation => an upright picture in sRGB, 8 bits, on white."""

from __future__ import annotations

import contextlib
import io
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from PIL.Image import Image as PilImage
    from PIL.Image import Transpose

Picture = NDArray[np.uint8]  # [H, W, 3]
ORIENTATION = 0x0112  # EXIF tag


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
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return rgba.convert("RGB"), rgba.getchannel("A")
    return (image if image.mode in ("RGB", "L", "CMYK") else image.convert("RGB")), None


def _to_srgb(image: PilImage, profile: bytes | None) -> PilImage:
    """RGB; a profile that cannot be read or does not fit is left out of account."""
    if profile:
        with contextlib.suppress(Exception):
            from PIL import ImageCms

            source = ImageCms.getOpenProfile(io.BytesIO(profile))
            if "sRGB" not in ImageCms.getProfileDescription(source):  # the way there and back costs exactness
                target = ImageCms.createProfile("sRGB")
                converted = ImageCms.profileToProfile(image, source, target, outputMode="RGB")
                if converted is not None:
                    return converted
    return image.convert("RGB")


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
