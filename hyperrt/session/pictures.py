"""What comes out of the decoder, as pictures."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from hyperrt.errors import NumericError

Floats = NDArray[np.float32]
Pictures = NDArray[np.uint8]


def check_not_flat(pixels: Floats) -> None:
    """Refuse pixels [1, 3, H, W] of one colour: a black picture is how overflow in a decoder shows.

    Raises:
        NumericError: they are.
    """
    if not np.ptp(np.clip(pixels, -1, 1), axis=(2, 3)).any():
        raise NumericError(
            "the picture is all of one colour",
            "every pixel came out of the decoder the same, or beyond black or white",
            "try a lower guidance scale or another seed; if it stays, check the bundle: hyperrt doctor",
        )


def pictures_from_pixels(pixels: Floats) -> Pictures:
    """Pixels [n, 3, H, W] in [-1, 1] to pictures [n, H, W, 3] uint8; what lies outside is clipped."""
    scaled = np.rint((np.clip(pixels, -1, 1) + 1) * 127.5).astype(np.uint8)
    return np.ascontiguousarray(scaled.transpose(0, 2, 3, 1))
