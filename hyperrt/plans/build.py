"""Builds the TensorRT plans of a bundle ahead of time and looks them up at run time.

The two large graphs have plans of fixed sizes, which are the fastest: the denoiser for a number of pictures
and branches, the decoder for one picture or a tile. The other graphs run once per subject or prompt, and
have one plan for all sizes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module, metadata
from pathlib import Path

from hyperrt import engines
from hyperrt.bundle.bundle import Bundle
from hyperrt.bundle.memory import tile_of
from hyperrt.engines.backends import BACKENDS
from hyperrt.engines.backends import names as backend_names
from hyperrt.engines.base import Engine
from hyperrt.engines.nvidia import tensorrt_build
from hyperrt.engines.nvidia.tensorrt_build import CURRENT, BuildRequest, Built
from hyperrt.errors import HyperRTError, UsageError
from hyperrt.plans import check
from hyperrt.plans.cache import Plan, PlanCache, PlanKey, graph_hash
from hyperrt.plans.check import Parity
from hyperrt.plans.messages import rebuild_command

log = logging.getLogger("hyperrt")

FIXED = ("denoiser", "vae_decoder")  # graphs with plans of fixed sizes
RANGES = {"photos": (1, 1, 16), "prompts": (1, 3, 48), "rows": (1, 3, 48), "subjects": (1, 1, 48)}
Sizes = Mapping[str, int]
Progress = Callable[[str, str, float], None]  # graph, target, fraction done


@dataclass(frozen=True)
class Compiled:
    """A plan in the cache; `built` is None if it was there before."""

    plan: Plan
    built: Built | None


def key_of(bundle: Bundle, name: str, backend: str, target: str, sizes: Sizes) -> PlanKey:
    """The key of a graph's plan in the cache.

    Args:
        target: as `tensorrt_build.BuildRequest` has it, or `hyperrt.engines.nvidia.tensorrt.target`.
        sizes: sizes of the call; the key has those that the plan fixes.
    """
    graph = bundle.graphs[name]
    fixed = {
        dim: sizes[dim]
        for spec in (graph.inputs if name in FIXED else ())
        for dim in spec.shape
        if isinstance(dim, str) and dim in sizes
    }
    flags = ("refit",) if graph.weights else ()
    return PlanKey(graph_hash(graph), backend, version(backend), target, tuple(sorted(fixed.items())), flags)


def version(backend: str) -> str:
    """Version of the vendor's package.

    Raises:
        engines.BackendMissing: the package is not installed.
    """
    try:
        return metadata.version(BACKENDS[backend].vendor)
    except metadata.PackageNotFoundError:  # installed by the system, without pip's records
        engines.load(backend)
        return str(import_module(BACKENDS[backend].vendor).__version__)


def find(
    bundle: Bundle,
    name: str,
    backend: str,
    sizes: Sizes,
    cache: PlanCache | None = None,
    device: int = 0,
) -> Plan:
    """Look up the plan of a graph for a GPU of this machine, and check its hash.

    Args:
        device: number of the GPU.

    Raises:
        NotFound: nothing was compiled for the graph.
        Incompatible: plans exist, for another version, GPU or size.
        IntegrityError: the plan is damaged, or others could have written it.
        engines.EngineError: the GPU does not exist.
    """
    target = engines.load(backend).target(BACKENDS[backend].vendor, device)
    key = key_of(bundle, name, backend, target, sizes)
    try:
        return (cache or PlanCache()).load(key, bundle=bundle.reference, graph_name=name)
    except HyperRTError as error:
        if dict(key.sizes).get("h") not in (None, bundle.latent.size):  # a tile
            raise type(error)(error.what, error.why, f"{error.do} --low-memory") from error
        raise


def compare_once(bundle: Bundle, name: str, plan: Plan, engine: Engine) -> None:
    """Compare a plan with its graph, unless that was done before.

    Args:
        engine: the open plan.

    Raises:
        NumericError: the results differ; `do` is the command that builds the plan again.
    """
    if check.known(plan) is None:
        log.info("comparing the plan of %s with its graph, once", name)
        do = rebuild_command(plan.key, bundle.reference)
        if parity := check.check(bundle, name, engine, _opt_sizes(plan.key), do):
            check.keep(plan, parity)


def unusable(bundle: Bundle, plan: Plan, error: engines.EngineLoadError) -> engines.EngineLoadError:
    """The error for a plan that is whole but does not load; `do` is the command that builds it again."""
    return engines.EngineLoadError(error.what, error.why, rebuild_command(plan.key, bundle.reference))


def _opt_sizes(key: PlanKey) -> dict[str, int]:
    """Sizes to compare a plan with: its fixed sizes, and the opt sizes of its ranges."""
    return {name: opt for name, (_, opt, _) in RANGES.items()} | dict(key.sizes)


def sizes_of(
    bundle: Bundle, images: int, branches: int, *, several: bool = False, low_memory: bool = False
) -> dict[str, int]:
    """The sizes of a call, by name.

    Args:
        images: number of pictures, of all subjects together.
        branches: number of guidance branches.
        several: whether the pictures show different subjects.
        low_memory: whether large pictures are decoded in tiles.
    """
    side = (tile_of(bundle) if low_memory else None) or bundle.latent.size
    rows = images * branches
    fixed = {"images": images, "branches": branches, "rows": rows, "subjects": rows if several else 1}
    return {**fixed, "h": side, "w": side}


def compile_bundle(
    bundle: Bundle,
    backend: str,
    targets: Sequence[str],
    sizes: Sizes,
    names: Sequence[str] = (),
    *,
    cache: PlanCache | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Iterator[Compiled]:
    """Compile graphs of a bundle for some targets; yields each plan once it is in the cache.

    Args:
        backend: one that `runs_plans`.
        targets: "sm89", ...; "current" is the GPU of this machine, the only target of TensorRT.
        sizes: as `sizes_of`.
        names: names of the graphs; empty for all.
        force: compile again what is in the cache.

    Raises:
        UsageError: the backend or a graph does not exist.
        NumericError: a plan does not compute the same as its graph.
        engines.EngineError: a graph cannot be compiled for a target; earlier plans are kept.
    """
    if backend not in (planned := backend_names("runs_plans")):
        why = f"plans are compiled for {', '.join(planned)}"
        raise UsageError(f"the backend is {backend!r}", why)
    unknown = [name for name in names if name not in bundle.graphs]
    if unknown:
        raise UsageError(f"a bundle has no graph {unknown[0]!r}", f"it has {', '.join(bundle.graphs)}")
    cache = cache or PlanCache()
    for target in targets:
        for name in names or bundle.graphs:
            yield _compile(bundle, name, backend, target, sizes, cache, force, progress)


def _compile(
    bundle: Bundle,
    name: str,
    backend: str,
    target: str,
    sizes: Sizes,
    cache: PlanCache,
    force: bool,
    progress: Progress | None,
) -> Compiled:
    vendor = BACKENDS[backend].vendor
    own = engines.load(backend).target(vendor) if target == CURRENT else ""
    if name == "vae_decoder":
        sizes = {**sizes, "images": 1}  # pictures are decoded one by one
    key = key_of(bundle, name, backend, own or target, sizes)
    if not force and (plan := cache.find(key)):
        return Compiled(plan, None)
    graph, path = bundle.graphs[name], bundle.graph(name)
    weights = tuple(spec.name for spec in graph.weights)
    built: list[Built] = []
    compared: list[Parity | None] = []

    def write(output: Path) -> None:
        request = BuildRequest(
            str(path), str(output), vendor, target, dict(key.sizes), RANGES, weights,
            str(cache.folder.parent / f"{backend}.timing"),
        )  # fmt: skip
        report = progress or (lambda *_: None)
        built.append(tensorrt_build.build(request, lambda share: report(name, target, share)))
        if not own:
            return  # a plan for another GPU is compared when it is first opened there
        with engines.open(path, backend, plan=output, weights=graph.weights) as engine:
            do = f"use another version of {vendor}"
            compared.append(check.check(bundle, name, engine, _opt_sizes(key), do))

    plan = cache.publish(key, write, bundle=bundle.path.name, graph_name=name, weights=weights)
    if compared and compared[0]:
        check.keep(plan, compared[0])
    return Compiled(plan, built[0])
