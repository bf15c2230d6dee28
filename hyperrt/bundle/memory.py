"""How much memory drawing takes, and how much this process can still have.

The estimate is made of what the manifest says of each graph: bytes of its weights, and bytes at the peak for
each row.  Graphs are loaded and run one after the other, so the peak is the weights that are open then, and
the rows of one, or what a backend needs beside them while it loads one.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from itertools import accumulate
from pathlib import Path

from hyperrt.bundle.bundle import Bundle
from hyperrt.errors import ResourceError

TILE = 512  # pixels: a picture up to this size is decoded whole, a larger one in tiles of it
MEMINFO = Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")
DRAWING = ("text_encoder", "context", "denoiser", "vae_decoder")  # in the order in which they run
PERSONALIZING = ("image_encoder", "weight_decoder", "image_prompt")  # likewise
BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}  # of a number, by precision


def to_draw(
    bundle: Bundle,
    rows: int,
    low_memory: bool = False,
    is_open: Collection[str] = (),
    loads_fp32: bool = False,
) -> int | None:
    """Bytes at the peak of drawing, beside what is loaded already; None where the bundle does not say.

    Args:
        rows: of the denoiser: branches x pictures of one call.
        low_memory: graphs are closed when they are no longer needed, and large pictures decoded in tiles.
        is_open: names of the graphs that are loaded.
        loads_fp32: as `engines.Backend` has it.
    """
    graphs = [bundle.graphs[name] for name in DRAWING]
    if not all(graph.weight_bytes and graph.row_bytes for graph in graphs):
        return None
    weights = {name: bundle.graphs[name].weight_bytes for name in DRAWING}
    beside = {name: bundle.graphs[name].row_bytes * rows for name in DRAWING}
    beside["vae_decoder"] = _of_decoding(bundle, low_memory)
    missing = [name for name in DRAWING if name not in is_open]
    loading = {name: _in_fp32(bundle, name) if loads_fp32 else 0 for name in missing}
    if low_memory:
        loaded = sum(size for name, size in weights.items() if name in is_open)
        alone = (weights[name] + max(beside[name], loading.get(name, 0)) for name in DRAWING)
        return max(0, max(alone) - loaded)
    opened = accumulate(weights[name] for name in missing)  # one after the other
    peaks = [size + loading[name] for size, name in zip(opened, missing, strict=True)]
    return max([*peaks, sum(weights[name] for name in missing) + max(beside.values())])


def to_personalize(bundle: Bundle, loads_fp32: bool = False, stay_open: bool = False) -> int | None:
    """Bytes at the peak of making a subject; None where the bundle does not say.

    Args:
        stay_open: no graph is closed before the next one is opened.
    """
    graphs = {name: bundle.graphs[name] for name in PERSONALIZING if name in bundle.graphs}
    if not all(graph.weight_bytes and graph.row_bytes for graph in graphs.values()):
        return None
    before, peaks = 0, []
    for name, graph in graphs.items():
        beside = max(graph.row_bytes, _in_fp32(bundle, name) if loads_fp32 else 0)
        peaks.append(before + graph.weight_bytes + beside)
        before += graph.weight_bytes if stay_open else 0
    return max(peaks)


def fits(needed: int | None) -> bool:
    """Whether there is so much memory; where either number is unknown, there is."""
    left = available()
    return needed is None or left is None or needed <= left


def check(needed: int | None, what: str, advice: str) -> None:
    """Refuse work for which there is not enough memory; where either number is unknown, nothing is refused.

    Args:
        needed: bytes.
        what: the work, such as "drawing".
        advice: what to do.

    Raises:
        ResourceError: with both numbers.
    """
    left = available()
    if needed is not None and left is not None and not fits(needed):
        raise ResourceError(
            f"{what} needs about {needed / 1e9:.1f} GB of memory, and {left / 1e9:.1f} GB are available",
            "the model's weights and what one call of it computes would not fit at once",
            advice,
        )


def _in_fp32(bundle: Bundle, name: str) -> int:
    """Bytes of a graph's weights in fp32."""
    return bundle.graphs[name].weight_bytes * 4 // BYTES[bundle.precision]


def _of_decoding(bundle: Bundle, low_memory: bool) -> int:
    whole = bundle.graphs["vae_decoder"].row_bytes
    tile = tile_of(bundle) if low_memory else None
    return math.ceil(whole * (tile / bundle.latent.size) ** 2) if tile else whole


def available() -> int | None:
    """Bytes that can be had without swapping, within the container's limit; None where nothing says so."""
    found = [size for size in (_of_machine(), _of_cgroup()) if size is not None]
    return min(found) if found else None


def _of_machine() -> int | None:
    try:
        lines = MEMINFO.read_text().splitlines()
    except OSError:
        return None
    sizes = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    return sizes[0] if sizes else None


def _of_cgroup() -> int | None:
    """What the container's limit leaves (cgroup v2, else v1); files that are only cached can be dropped."""
    for folder, limit_name, used_name, cached in (
        (CGROUP, "memory.max", "memory.current", "inactive_file"),
        (CGROUP / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        try:
            limit, used = ((folder / name).read_text().strip() for name in (limit_name, used_name))
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):
            continue
        if limit.isdigit():
            return max(0, int(limit) - int(used) + int(stat.get(cached, 0)))
    return None


def tile_of(bundle: Bundle) -> int | None:
    """Side of a tile in latents, 512 pixels; None where the picture is small or the graph's size is fixed."""
    if bundle.image_size <= TILE:
        return None
    latents = next(spec for spec in bundle.graphs["vae_decoder"].inputs if spec.name == "latents")
    if not all(isinstance(size, str) for size in latents.shape[2:]):
        return None
    return TILE * bundle.latent.size // bundle.image_size
