"""A base model and a hypernetwork to a bundle: trace, write, verify, publish, with one network in memory.

Everything is written into a folder beside the output and renamed at the very end (hyperrt/files.py), so an
export that fails or is killed leaves the old bundle, or none.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import nn

from hyperrt import __version__, files
from hyperrt.bundle import bundle, memory
from hyperrt.errors import ResourceError, UsageError
from hyperrt.export import expected, families, graph_specs, onnx_graph, source, verify
from hyperrt.export.families import Family
from hyperrt.export.graph_specs import GraphSpec
from hyperrt.export.onnx_graph import Written
from hyperrt.export.parts import numbers_of
from hyperrt.export.precision import Precision
from hyperrt.export.source import Inputs, Source

Progress = Callable[[int, int, str], None]  # stages done, stages in all, what comes now

LIBRARIES = 1_200_000_000  # bytes: PyTorch, the exporter, a traced graph
# What is freed is not given back at once: peaks were 3.1 GB for SD1.5 and 9.0 GB for SDXL, of which one
# network at a time accounts for 1.7 and 6.0.
SPARE = 1.3


@dataclass(frozen=True)
class Options:
    """How a bundle is made.

    Attributes:
        precision: of the arithmetic.
        int8: store weights of products in eight bits.
        verify: one of `verify.LEVELS`; None for what the family is for.
        adapt: how the LoRA enters the denoiser: "inputs", or "refit" for backends that replace constants.
    """

    precision: Precision = "fp32"
    int8: bool = False
    verify: str | None = None
    adapt: Literal["inputs", "refit"] = "inputs"


@dataclass(frozen=True)
class Needs:
    """About what an export takes, in bytes: disk by graph, and memory at its peak."""

    disk: Mapping[str, int]
    memory: int


def export_bundle(
    model: str,
    inputs: Inputs,
    output: Path,
    options: Options = Options(),
    *,
    force: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Write a bundle; returns its folder.

    Args:
        model: family, a key of `families.FAMILIES`.
        inputs: what it is made from.
        output: the new folder; its parent must exist.
        force: replace a bundle that is there.
        progress: called before each stage.

    Raises:
        UsageError: unknown family, something is not given, or `output` exists and `force` is off.
        NotFound: an input or the parent of `output` is missing.
        BadInput: an input is another kind of file.
        IntegrityError: an input is damaged.
        ExportError: the inputs do not fit together, or cannot be exported.
        ResourceError: the disk or the memory is too small.
        ParityError: a graph does not compute what the model does.
    """
    family = families.get(model)
    files.check_folder(output, bundle.MANIFEST, force)
    level = level_of(family, options)
    with families.opened(family, inputs) as made_from:
        parts = graph_specs.build(made_from, options.adapt)
        rungs = {"none": 0, "graphs": 1, "full": len(verify.TOLERANCE)}[level]
        tell = _Counter(progress, 1 + len(parts) + rungs)
        tell("check")
        check_room(output, needs(made_from, parts, options.int8, level))

        def write(folder: Path) -> None:
            written, parity = _write_graphs(made_from, parts, folder, options, level, tell)
            if level == "full":
                modules = {name: part.load().float() for name, part in made_from.parts.items()}
                parity = verify.ladder(made_from, parts, modules, folder, family.defaults, tell)
            _write_texts(folder, made_from)
            described = {graph.name: _described(graph, folder, written[graph.name]) for graph in parts}
            about = manifest(family, made_from, described, folder, options, parity, output.name)
            bundle.write_manifest(folder, about)

        return files.publish_folder(output, write, marker=bundle.MANIFEST, force=force)


def needs(made_from: Source, parts: Sequence[GraphSpec], int8: bool, level: str) -> Needs:
    """What an export takes."""
    skeletons = {name: part.skeleton for name, part in made_from.parts.items()}
    held = {graph.name: graph_specs.numbers_of(graph, skeletons) for graph in parts}
    disk = {name: (1 if int8 else 2) * count for name, count in held.items()}
    if level == "full":
        numbers = 4 * sum(numbers_of(skeleton) for skeleton in skeletons.values()) + 4 * sum(held.values())
        return Needs(disk, LIBRARIES + int(SPARE * numbers))
    peaks = []
    for graph, loaded in zip(parts, _loaded_parts(parts), strict=True):
        own = sum(numbers_of(skeletons[name]) for name in graph.parts)
        kept = sum(numbers_of(skeletons[name]) for name in loaded - {*graph.parts})
        # Compared in fp32 with PyTorch, and then in an engine that holds the weights of the graph.
        compared = max(4 * own, 4 * held[graph.name]) if level == "graphs" else 2 * own
        peaks.append(compared + 2 * kept)
    return Needs(disk, LIBRARIES + int(SPARE * max(peaks)))


def check_room(output: Path, needed: Needs) -> None:
    """Whether disk and memory suffice: known before minutes of work, not after.

    Raises:
        ResourceError: they do not.
    """
    folder = Path(os.path.abspath(output)).parent
    disk, free = sum(needed.disk.values()), shutil.disk_usage(folder).free
    if free < disk:
        why = f"it takes about {disk / 1e6:,.0f} MB; {free / 1e6:,.0f} MB are free"
        raise ResourceError(
            f"{folder} has no room for the bundle", why, "make room on the disk, or choose another folder"
        )
    available = memory.available()
    if available is not None and available < needed.memory:
        why = f"it takes about {needed.memory / 1e9:.1f} GB; {available / 1e9:.1f} GB can be had"
        do = "end other programs, leave the comparison out (--verify none), or export on another machine"
        raise ResourceError("there is not enough memory for the export", why, do)


def level_of(family: Family, options: Options) -> str:
    """How much of the parity ladder is climbed.

    Raises:
        UsageError: the rungs that `options` ask for do not exist for this family.
    """
    level = options.verify or family.verify
    if level == "full" and (family.verify != "full" or options.precision != "fp32" or options.int8):
        if options.verify:
            why = "all rungs are for fp32 graphs of the tiny family"
            raise UsageError("--verify full cannot be done", why, "use --verify graphs")
        return "graphs"
    return level


def _write_graphs(
    made_from: Source, parts: Sequence[GraphSpec], folder: Path, options: Options, level: str, tell: _Counter
) -> tuple[dict[str, Written], dict[str, float]]:
    """Every graph, its parts loaded when it is reached and gone when no later one needs them."""
    skeletons = {name: part.skeleton for name, part in made_from.parts.items()}
    written, parity = {}, {}
    modules: dict[str, nn.Module] = {}
    for k, (graph, loaded) in enumerate(zip(parts, _loaded_parts(parts), strict=True)):
        tell(graph.name)
        modules.update({name: made_from.parts[name].load() for name in graph.parts if name not in modules})
        written[graph.name] = onnx_graph.write(
            graph, skeletons, modules, folder, options.precision, options.int8
        )
        right = expected.of_graph(graph, made_from, modules, verify.LARGE_SIZES) if level == "graphs" else []
        later = {name for following in parts[k + 1 :] for name in following.parts}
        modules = {name: module for name, module in modules.items() if name in loaded & later}
        if level == "graphs":
            kind = "int8" if options.int8 else options.precision
            how = verify.RUN_BY[options.precision]
            path = folder / f"{graph.name}.onnx"
            error = verify.graph_error(path, expected=right, refit=graph.refit, **how)
            parity[graph.name] = verify.checked(graph.name, error, verify.allowed(graph.name, kind))
    if level == "graphs":
        tell("solvers")
        parity["solvers"] = verify.checked(
            "solvers", verify.solvers_error(made_from), verify.TOLERANCE["solvers"]
        )
    return written, parity


def _loaded_parts(parts: Sequence[GraphSpec]) -> list[set[str]]:
    """Per graph the parts in memory while it is written: its own, and those needed before and after."""
    found = []
    for k, graph in enumerate(parts):
        earlier = {name for other in parts[:k] for name in other.parts}
        later = {name for other in parts[k + 1 :] for name in other.parts}
        found.append({*graph.parts} | (earlier & later))
    return found


def manifest(
    family: Family,
    made_from: Source,
    described: Mapping[str, bundle.Graph],
    folder: Path,
    options: Options,
    parity: Mapping[str, float],
    name: str,
) -> bundle.Manifest:
    """The manifest of the graphs that lie in `folder`."""
    hashes = {part: made_from.parts[part].hash(family.half_hash) for part in ("unet", "weight_decoder")}
    return bundle.Manifest(
        format=bundle.FORMAT,
        family=family.name,
        name=name,
        created_by=f"hyperrt {__version__}",
        image_size=made_from.image_size,
        latent=bundle.Latent(made_from.config("unet").in_channels, made_from.latent_size),
        prediction_type=source.prediction_type(made_from),
        betas=source.betas(made_from),
        timestep_spacing=source.timestep_spacing(made_from),
        defaults=family.defaults,
        graphs=described,
        lora=bundle.LoraSection.of(made_from.layout),
        adapt=options.adapt,
        preprocess=source.preprocess(made_from),
        prompts=family.prompts(made_from),
        image_prompt=source.image_prompt_section(made_from),
        tokenizer_sha256=bundle.sha256_of(folder / bundle.TOKENIZER),
        hashes=bundle.Hashes(hashes["unet"], hashes["weight_decoder"]),
        precision=options.precision,
        storage="int8" if options.int8 else "bf16" if options.precision == "bf16" else "fp16",
        parity=parity,
    )


def _described(graph: GraphSpec, folder: Path, written: Written) -> bundle.Graph:
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


def _write_texts(folder: Path, made_from: Source) -> None:
    """tokenizer.json and LICENSES."""
    source.save_tokenizer(made_from, folder / bundle.TOKENIZER)
    (folder / "LICENSES").write_text(made_from.license, encoding="utf-8")


class _Counter:
    """Counts the stages for whoever shows them."""

    def __init__(self, progress: Progress | None, stages: int) -> None:
        self._progress = progress
        self._stages = stages
        self._done = 0

    def __call__(self, what: str) -> None:
        if self._progress:
            self._progress(self._done, self._stages, what)
        self._done += 1
