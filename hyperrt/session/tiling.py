"""Large pictures decoded in tiles, so that memory is that of one tile.

Tiles overlap, and where they do they are blended: each tile's weight falls linearly towards its edge, and the
weights at a place add up to one.  A decoder that works pixel by pixel gives what it gives untiled; one that
looks around differs near seams, the less the wider the overlap.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

SHARE = 4  # a tile overlaps its neighbour by this part of itself

Floats = NDArray[np.float32]


def decode(run: Callable[[Floats], Floats], latents: Floats, tile: int) -> Floats:
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
