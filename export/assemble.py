"""Exports a base model and a hypernetwork as a bundle: traces, writes, verifies and publishes its graphs.

Everything is written into a folder beside the output, which is renamed at the very end (hyperrt/files.py). So
an export that fails or is killed changes nothing.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from hyperrt import files
from hyperrt.bundle import bundle, memory
from hyperrt.errors import ResourceError, UsageError
from hyperrt.export import expected, families, graph_specs, onnx_graph, read_source, verify
from hyperrt.export.families import Family
from hyperrt.export.graph_specs import GraphSpec
from hyperrt.export.onnx_graph import Written
from hyperrt.export.parts import numbers_of
from hyperrt.export.source import (
    Source,
    betas,
    image_prompt_section,
    prediction_type,
    preprocess,
    save_tokenizer,
    timestep_spacing,
)  # fmt: skip
from hyperrt.version import VERSION

if TYPE_CHECKING:
    from hyperrt.cli.configs import ExportConfig

Progress = Callable[[int, int, str], None]  # stages done, stages in all, name of the next stage

LIBRARIES = 1_200_000_000  # bytes: PyTorch, the exporter, a traced graph
# Freed memory is not returned to the system at once: peaks were 3.1 GB for SD1.5 and 9.0 GB for SDXL, whose
# largest networks take 1.7 and 6.0 GB.
SPARE = 1.3
HASHED = ("unet", "weight_decoder")  # parts whose hashes are in the manifest


@dataclass(frozen=True)
class Needs:
    """Estimate of what an export takes, in bytes: disk space by graph, and memory at its peak."""

    disk: Mapping[str, int]
    memory: int


def export_bundle(config: ExportConfig, progress: Progress | None = None) -> Path:
    """Writes a bundle; returns its folder.

    Args:
        config: options of `hyperrt export`; `model` is a key of `families.FAMILIES`.
        progress: called before each stage.

    Raises:
        UsageError: unknown family, options contradict each other or are missing, or the output exists.
        NotFound: an input or the parent of the output is missing.
        BadInput: an input is another kind of file.
        IntegrityError: an input is damaged.
        ExportError: the inputs do not fit together, or cannot be exported.
        ResourceError: the disk or the memory is too small.
        ParityError: a graph does not compute what the model does.
    """
    family, output = families.get(config.model), Path(config.output)
    files.check_folder(output, bundle.MANIFEST, config.force)
    level = level_of(config)
    source = read_source.read(config)
    graphs = graph_specs.build(source, config.adapt)
    checks = {"none": 0, "graphs": 1, "full": len(verify.TOLERANCE)}[level]
    start_stage = _Stages(progress, 1 + len(graphs) + checks)
    start_stage("check")
    check_room(output, needs(source, graphs, config))

    def write(folder: Path) -> None:
        modules: dict[str, nn.Module] = {}
        written, parity = _write_graphs(source, graphs, folder, config, modules, start_stage)
        if level == "full":
            modules = {name: module.float() for name, module in modules.items()}
            parity = verify.run_checks(source, graphs, modules, folder, family.defaults, start_stage)
        save_tokenizer(source, folder / bundle.TOKENIZER)
        (folder / "LICENSES").write_text(source.license, encoding="utf-8")
        entries = {graph.name: _entry(graph, folder, written[graph.name]) for graph in graphs}
        bundle.write_manifest(folder, manifest(family, source, entries, folder, config, parity))

    return files.publish_folder(output, write, marker=bundle.MANIFEST, force=config.force)


def needs(source: Source, graphs: Sequence[GraphSpec], config: ExportConfig) -> Needs:
    """Estimates what an export takes."""
    level = level_of(config)
    skeletons = {name: part.skeleton for name, part in source.parts.items()}
    held = {graph.name: graph_specs.numbers_of(graph, skeletons) for graph in graphs}
    disk = {name: (1 if config.quantize == "int8" else 2) * count for name, count in held.items()}
    if level == "full":
        numbers = 4 * sum(numbers_of(skeleton) for skeleton in skeletons.values()) + 4 * sum(held.values())
        return Needs(disk, LIBRARIES + int(SPARE * numbers))
    peaks = []
    for graph, loaded in zip(graphs, _loaded_parts(graphs), strict=True):
        own = sum(numbers_of(skeletons[name]) for name in graph.parts)
        kept = sum(numbers_of(skeletons[name]) for name in loaded - {*graph.parts})
        # It is run by PyTorch in fp32, and then by an engine that holds the weights of the graph.
        compared = max(4 * own, 4 * held[graph.name]) if level == "graphs" else 2 * own
        peaks.append(compared + 2 * kept)
    return Needs(disk, LIBRARIES + int(SPARE * max(peaks)))


def check_room(output: Path, needed: Needs) -> None:
    """Checks before the work that disk and memory suffice.

    Raises:
        ResourceError: they do not.
    """
    folder = Path(os.path.abspath(output)).parent
    disk, free = sum(needed.disk.values()), shutil.disk_usage(folder).free
    if free < disk:
        why = f"it takes about {disk / 1e6:,.0f} MB; {free / 1e6:,.0f} MB are free"
        do = "make room on the disk, or choose another folder"
        raise ResourceError(f"{folder} has no room for the bundle", why, do)
    available = memory.available()
    if available is not None and available < needed.memory:
        why = f"it takes about {needed.memory / 1e9:.1f} GB; {available / 1e9:.1f} GB are available"
        do = "end other programs, leave the comparison out (--verify none), or export on another machine"
        raise ResourceError("there is not enough memory for the export", why, do)


def level_of(config: ExportConfig) -> str:
    """The verification level, see export/verify.py: the given one, or else the family's.

    Raises:
        UsageError: "full" was asked for graphs that it does not exist for.
    """
    family = families.get(config.model)
    level = config.verify or family.verify
    reduced = config.precision != "fp32" or config.quantize == "int8"
    if level == "full" and (family.verify != "full" or reduced):
        if config.verify:
            why = "it is for fp32 graphs of the tiny family"
            raise UsageError("--verify full cannot be done", why, "use --verify graphs")
        return "graphs"
    return level


def _write_graphs(
    source: Source,
    graphs: Sequence[GraphSpec],
    folder: Path,
    config: ExportConfig,
    modules: dict[str, nn.Module],
    start_stage: _Stages,
) -> tuple[dict[str, Written], dict[str, float]]:
    """Writes the graphs, and at level "graphs" compares each; returns their sizes and the errors.

    modules: the loaded parts. One is added when the first graph needs it, and removed after the last one,
        unless the level is "full".
    """
    level, half_hash = level_of(config), families.get(config.model).half_hash
    skeletons = {name: part.skeleton for name, part in source.parts.items()}
    written, parity = {}, {}
    for k, graph in enumerate(graphs):
        start_stage(graph.name)
        for name in graph.parts:
            if name not in modules:
                modules[name] = source.parts[name].load(half_hash if name in HASHED else None)
        int8 = config.quantize == "int8"
        written[graph.name] = onnx_graph.write(graph, skeletons, modules, folder, config.precision, int8)
        results = expected.of_graph(graph, source, modules, verify.LARGE_SIZES) if level == "graphs" else []
        later = {name for following in graphs[k + 1 :] for name in following.parts}
        for name in modules.keys() - later if level != "full" else ():
            del modules[name]
        if level == "graphs":
            parity[graph.name] = _graph_error(graph, folder, results, config)
    if level == "graphs":
        start_stage("solvers")
        error = verify.solvers_error(source)
        parity["solvers"] = verify.checked("solvers", error, verify.TOLERANCE["solvers"])
    return written, parity


def _graph_error(
    graph: GraphSpec, folder: Path, results: Sequence[expected.Expected], config: ExportConfig
) -> float:
    """The relative error of a written graph, which is within the tolerance of its precision."""
    reduction = "int8" if config.quantize == "int8" else config.precision
    error = verify.graph_error(
        folder / f"{graph.name}.onnx", expected=results, refit=graph.refit, **verify.RUN_BY[config.precision]
    )
    return verify.checked(graph.name, error, verify.allowed(graph.name, reduction))


def _loaded_parts(graphs: Sequence[GraphSpec]) -> list[set[str]]:
    """For each graph the parts in memory while it is written: its parts, and those used before and after."""
    loaded = []
    for k, graph in enumerate(graphs):
        earlier = {name for other in graphs[:k] for name in other.parts}
        later = {name for other in graphs[k + 1 :] for name in other.parts}
        loaded.append({*graph.parts} | (earlier & later))
    return loaded


def manifest(
    family: Family,
    source: Source,
    graphs: Mapping[str, bundle.Graph],
    folder: Path,
    config: ExportConfig,
    parity: Mapping[str, float],
) -> bundle.Manifest:
    """The manifest of the graphs in `folder`."""
    half_storage = "bf16" if config.precision == "bf16" else "fp16"
    return bundle.Manifest(
        format=bundle.FORMAT,
        family=family.name,
        name=Path(config.output).name,
        created_by=f"hyperrt {VERSION}",
        image_size=source.image_size,
        latent=bundle.Latent(source.config("unet").in_channels, source.latent_size),
        prediction_type=prediction_type(source),
        betas=betas(source),
        timestep_spacing=timestep_spacing(source),
        defaults=family.defaults,
        graphs=graphs,
        lora=bundle.LoraSection.of(source.layout),
        adapt=config.adapt,
        preprocess=preprocess(source),
        prompts=family.prompts(source),
        image_prompt=image_prompt_section(source),
        tokenizer_sha256=bundle.sha256_of(folder / bundle.TOKENIZER),
        hashes=bundle.Hashes(*(source.parts[name].hash(family.half_hash) for name in HASHED)),
        precision=config.precision,
        storage="int8" if config.quantize == "int8" else half_storage,
        parity=parity,
    )


def _entry(graph: GraphSpec, folder: Path, written: Written) -> bundle.Graph:
    """The manifest's entry of a graph."""
    file = f"{graph.name}.onnx"
    data = f"{file}.data"
    external = (folder / data).exists()
    return bundle.Graph(
        file=file,
        sha256=bundle.sha256_of(folder / file),
        inputs=graph.file_inputs,
        outputs=graph.outputs,
        data_file=data if external else None,
        data_sha256=bundle.sha256_of(folder / data) if external else None,
        weight_bytes=written.weight_bytes,
        row_bytes=written.row_bytes,
        weights=graph.weights,
    )


class _Stages:
    """Counts the stages, and reports each to `progress` as it starts."""

    def __init__(self, progress: Progress | None, stages: int) -> None:
        self._progress = progress
        self._stages = stages
        self._done = 0

    def __call__(self, name: str) -> None:
        if self._progress:
            self._progress(self._done, self._stages, name)
        self._done += 1
