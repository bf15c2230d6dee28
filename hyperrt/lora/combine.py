"""Combines the LoRAs of several photos into one.

A projection depends on the product A B alone, and the mean of products is not the product of means:

    mean(A_i B_i) = mean(A_i) mean(B_i) + Cov(A_i, B_i)

mean     A = mean(A_i), B = mean(B_i): the paper's (arXiv 2511.03156, several reference images)
product  A B is the best approximation of mean(A_i B_i) with the layout's rank r (hyperrt/lora/low_rank.py)
concat   A B is mean(A_i B_i), exactly: A = [A_1 ... A_n], B = [B_1; ...; B_n] / n, of rank n r

"mean" is computed while photos are decoded (hyperrt/session/personalizer.py), with one LoRA in memory at a
time.  The others need all LoRAs at once, and are here.  No product of size d_in x d_out is ever made.  LoRAs
are packed as in `LoraLayout`; i = 1 ... n photos.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from hyperrt.arguments import one_of
from hyperrt.lora.layout import LoraLayout, Vector
from hyperrt.lora.low_rank import Matrix, truncated
from hyperrt.lora.names import COMBINED_TO_SAVE

Packed = Mapping[str, Vector]  # "lora_q" [Nq], "lora_kv" [Nkv]


def check_way(way: str) -> None:
    """Refuse a way of combining that is not in `COMBINED_TO_SAVE`.

    Raises:
        UsageError: it is not.
    """
    one_of("combine", way, COMBINED_TO_SAVE)


def product_mean(photos: Sequence[Packed], layout: LoraLayout) -> dict[str, Vector]:
    """The LoRA of the layout's rank whose products are closest to mean(A_i B_i).

    A and B have the same scale; unused rank is zero.

    Raises:
        LoraMismatch: a photo's LoRA does not fit the layout.
    """
    return layout.pack({path: truncated(a, b, layout.rank) for path, a, b in _side_by_side(photos, layout)})


def concatenated(photos: Sequence[Packed], layout: LoraLayout) -> dict[str, Vector]:
    """The exact mean(A_i B_i), packed for `combined_layout`.

    Raises:
        LoraMismatch: a photo's LoRA does not fit the layout.
        UsageError: the combined layout is too large.
    """
    return combined_layout(layout, "concat", len(photos)).pack(
        {path: (a, b) for path, a, b in _side_by_side(photos, layout)}
    )


def combined_layout(layout: LoraLayout, way: str, photos: int) -> LoraLayout:
    """The layout of a LoRA combined from `photos` LoRAs: the same, or for "concat" of rank n r.

    Raises:
        UsageError: `way` is not in `COMBINED_TO_SAVE`, or the layout is too large.
    """
    check_way(way)
    return dataclasses.replace(layout, rank=photos * layout.rank) if way == "concat" else layout


def _side_by_side(photos: Sequence[Packed], layout: LoraLayout) -> Iterator[tuple[str, Matrix, Matrix]]:
    """Per site [A_1 ... A_n] [d_in, n r] and [B_1; ...; B_n] / n [n r, d_out], float64."""
    each = [layout.unpack(photo) for photo in photos]
    for site in layout.sites:
        a = np.concatenate([factors[site.path][0] for factors in each], axis=1, dtype=np.float64)
        b = np.concatenate([factors[site.path][1] for factors in each], axis=0, dtype=np.float64)
        yield site.path, a, b / len(photos)
