"""Shape of the weight decoder."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

KINDS = ("hyperdreambooth", "resampler")  # of the closed and of the open category
QUERIES = ("factor", "site")


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Shape of the weight decoder that `hyperrt.training.model.hypernet.decoder_of` makes.

    Raises:
        ValueError: a number is out of range, a word is unknown, or an option belongs to the other kind.
    """

    kind: str = "hyperdreambooth"
    dim: int = 128  # width of a token
    layers: int = 2  # different blocks
    iterations: int = 4  # passes through the blocks; a resampler makes one
    head_dim: int = 32  # bottleneck shared by all heads; 0: each head is Linear(dim, numel), as in the paper
    output_dim: int = 0  # resampler: width of its output, which the heads read; 0: dim
    queries: str = "factor"  # resampler: one query per factor (A or B), or one per site
    shared_heads: bool = False  # one head per projection, width and A or B; layers differ by an embedding

    def __post_init__(self) -> None:
        if min(self.dim, self.layers, self.iterations) < 1 or min(self.head_dim, self.output_dim) < 0:
            raise ValueError(f"a weight decoder cannot have the shape {self}")
        if self.dim % self.heads:
            raise ValueError(f"dim is {self.dim}; it must be below 128 or a multiple of {self.heads}")
        if self.kind not in KINDS or self.queries not in QUERIES:
            why = f"kind is one of {', '.join(KINDS)}, queries one of {', '.join(QUERIES)}"
            raise ValueError(f"kind is {self.kind!r}, queries {self.queries!r}; {why}")
        if self.kind != "resampler" and (self.output_dim or self.queries != "factor"):
            raise ValueError("output_dim and queries need the kind 'resampler'")

    @property
    def heads(self) -> int:
        """Attention heads, of 64 channels or a little more."""
        return max(1, self.dim // 64)


# The paper's two: SD1.5 with rank 3 reads ViT-B/16 (223,488 numbers of LoRA); SDXL with rank 2 reads ViT-H/14
# (1,239,040 numbers, 634 M weights in the heads).
FULL_CLOSED = DecoderConfig(dim=512, layers=4, iterations=4, head_dim=0)
FULL_OPEN = DecoderConfig(kind="resampler", dim=512, layers=4, head_dim=0)
OPEN_VARIANTS = {  # smaller heads, and other readings of the paper's section B.2; weights of SDXL's heads:
    "width_128": dataclasses.replace(FULL_OPEN, output_dim=128),  # 159 M
    "bottleneck_64": dataclasses.replace(FULL_OPEN, head_dim=64),  # 79 M
    "shared_heads": dataclasses.replace(FULL_OPEN, shared_heads=True),  # 16 M
    "wide": dataclasses.replace(FULL_OPEN, dim=1280, output_dim=512),  # 634 M, after 81.5 M instead of 13.7 M
    "query_per_site": dataclasses.replace(FULL_OPEN, queries="site"),  # 634 M
}
