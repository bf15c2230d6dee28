"""Decodes latents to pictures; a large picture in tiles, so that memory is that of one tile.

Tiles overlap and are blended there: each tile's weight falls linearly towards its edge, and the weights of a
pixel add up to one.  A decoder that works pixel by pixel gives the same picture with tiles and without; one
that looks around differs near seams, the less the wider the overlap.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from hyperrt.bundle.memory import tile_of
from hyperrt.errors import NumericError
from hyperrt.session.finite import check_finite
from hyperrt.session.graphs import Graphs

SHARE = 4  # a tile overlaps its neighbour by this part of itself

Floats = NDArray[np.float32]
Pictures = NDArray[np.uint8]


def decode_picture(graphs: Graphs, latents: Floats, low_memory: bool) -> Pictures:
    """Latents [1, C, h, w] to a picture [1, H, W, 3] uint8.

    Args:
        low_memory: decode a large picture in tiles.

    Raises:
        NumericError: a pixel is NaN or infinite, or all pixels are the same.
    """

    def run(part: Floats) -> Floats:
        sizes = {"images": 1, "h": part.shape[2], "w": part.shape[3]}
        pixels: Floats = graphs.engine("vae_decoder", sizes).run({"latents": part})["pixels"]
        return pixels

    tile = tile_of(graphs.bundle) if low_memory else None
    pixels = decode_tiles(run, latents, tile) if tile else run(latents)
    check_finite({"pixels": pixels}, "the picture")
    check_not_flat(pixels)
    return pictures_from_pixels(pixels)


def decode_tiles(run: Callable[[Floats], Floats], latents: Floats, tile: int) -> Floats:
    """Latents [1, C, h, w] to pixels [1, 3, f h, f w], a tile at a time; f is what `run` enlarges by.

    Args:
        run: decodes latents [1, C, th, tw] to pixels [1, 3, f th, f tw].
        latents: of the whole picture.
        tile: side of a tile; all tiles are of this size, or of the picture's where that is smaller.
    """
    overlap = tile // SHARE
    rows, columns = (_starts(size, tile, overlap) for size in latents.shape[2:])
    high, wide = (min(size, tile) for size in latents.shape[2:])
    total = weights = np.zeros(0, np.float32)
    factor = 0
    for top in rows:
        for left in columns:
            pixels = run(latents[:, :, top : top + high, left : left + wide])
            if not factor:
                factor = pixels.shape[2] // high
                size = tuple(factor * side for side in latents.shape[2:])
                total = np.zeros((*pixels.shape[:2], *size), np.float32)
                weights = np.zeros(size, np.float32)
            weight = np.outer(*(_ramp(side * factor, overlap * factor) for side in (high, wide)))
            place = (
                slice(top * factor, (top + high) * factor),
                slice(left * factor, (left + wide) * factor),
            )
            total[(..., *place)] += pixels * weight
            weights[place] += weight
    return total / weights


def _starts(size: int, tile: int, overlap: int) -> list[int]:
    """Where tiles begin along one axis; the last ends with the picture."""
    if size <= tile:
        return [0]
    return [*range(0, size - tile, tile - overlap), size - tile]


def _ramp(size: int, overlap: int) -> Floats:
    """Weights [size] of a tile along one axis: rising over the overlap, 1, falling; never 0."""
    distance = np.minimum(np.arange(size), np.arange(size)[::-1]) + 0.5
    return np.minimum(distance / max(overlap, 1), 1).astype(np.float32)


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
