"""Estimates the memory that drawing takes, and finds how much this process can still have.

The manifest says for each graph how many bytes its weights take, and how many one row needs beside them at
its peak.  The estimate is the highest point of a list of events: graphs are loaded, run and closed.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import NamedTuple

from hyperrt.bundle.bundle import Bundle
from hyperrt.errors import ResourceError

TILE = 512  # pixels: larger pictures are decoded in tiles of this size if memory is to be saved
MEMINFO = Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")
DRAWING = ("text_encoder", "context", "denoiser", "vae_decoder")  # in the order in which they run
PERSONALIZING = ("image_encoder", "weight_decoder", "image_prompt")  # likewise
BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}  # of a number, by precision


class Event(NamedTuple):
    """A graph is loaded, run or closed."""

    kept: int  # change in bytes, which stays
    needed: int = 0  # more bytes, until the event is over


def _peak(events: Iterable[Event]) -> int:
    kept = peak = 0
    for event in events:
        kept += event.kept
        peak = max(peak, kept + event.needed)
    return peak


def to_draw(
    bundle: Bundle,
    rows: int,
    low_memory: bool = False,
    is_open: Collection[str] = (),
    loads_fp32: bool = False,
) -> int | None:
    """Bytes that drawing takes at its peak, beyond what is loaded already; None if the bundle does not say.

    Args:
        rows: of the denoiser: branches x pictures of one call.
        low_memory: graphs are closed when they are no longer needed, and large pictures decoded in tiles.
        is_open: names of the graphs that are loaded.
        loads_fp32: as `engines.Backend` has it.
    """
    graphs = {name: bundle.graphs[name] for name in DRAWING}
    if not all(graph.weight_bytes and graph.row_bytes for graph in graphs.values()):
        return None
    converted = {name for name in DRAWING if loads_fp32 and name not in is_open}
    load = {
        name: Event(graph.weight_bytes, _in_fp32(bundle, name) if name in converted else 0)
        for name, graph in graphs.items()
    }
    run = {name: Event(0, graph.row_bytes * rows) for name, graph in graphs.items()}
    run["vae_decoder"] = Event(0, _of_decoding(bundle, low_memory))
    close = {name: Event(-graph.weight_bytes) for name, graph in graphs.items()}
    if not low_memory:
        return _peak([*(load[name] for name in DRAWING if name not in is_open), *run.values()])
    events = [close[name] for name in DRAWING if name in is_open]
    for name in DRAWING:
        events += [load[name], run[name], close[name]]
    return _peak(events)


def to_personalize(bundle: Bundle, loads_fp32: bool = False, stay_open: bool = False) -> int | None:
    """Bytes that making a subject takes at its peak; None if the bundle does not say.

    Args:
        stay_open: no graph is closed before the next one is opened.
    """
    graphs = {name: bundle.graphs[name] for name in PERSONALIZING if name in bundle.graphs}
    if not all(graph.weight_bytes and graph.row_bytes for graph in graphs.values()):
        return None
    events = []
    for name, graph in graphs.items():
        events += [Event(graph.weight_bytes, _in_fp32(bundle, name) if loads_fp32 else 0)]
        events += [Event(0, graph.row_bytes), Event(0 if stay_open else -graph.weight_bytes)]
    return _peak(events)


def fits(needed: int | None) -> bool:
    """Whether `needed` bytes are available; True if either number is unknown."""
    left = available()
    return needed is None or left is None or needed <= left


def check(needed: int | None, what: str, advice: str) -> None:
    """Refuse work for which memory is short; nothing is refused if either number is unknown.

    Args:
        needed: bytes.
        what: the work, such as "drawing".
        advice: what to do.

    Raises:
        ResourceError: naming both numbers.
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
    """Bytes available without swapping, within the container's limit; None if unknown."""
    sizes = [size for size in (_of_machine(), _of_cgroup()) if size is not None]
    return min(sizes) if sizes else None


def _of_machine() -> int | None:
    try:
        lines = MEMINFO.read_text().splitlines()
    except OSError:
        return None
    sizes = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    return sizes[0] if sizes else None


def _of_cgroup() -> int | None:
    """Bytes left of the container's limit (cgroup v2, else v1); cached files count as free."""
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
    """Side of a tile in latents (512 pixels); None if the picture is small or the graph's size is fixed."""
    if bundle.image_size <= TILE:
        return None
    latents = next(spec for spec in bundle.graphs["vae_decoder"].inputs if spec.name == "latents")
    if not all(isinstance(size, str) for size in latents.shape[2:]):
        return None
    return TILE * bundle.latent.size // bundle.image_size
