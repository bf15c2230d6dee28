"""A base model and a hypernetwork to a bundle: load, round, export, verify, publish.

Everything is written into a folder beside the output and renamed at the very end (hyperrt/files.py), so an
export that fails or is killed leaves the old bundle, or none.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

from export import families, graphs, onnx_graph, storage, verify
from export.families import Family, Source
from export.graphs import Graph
from hyperrt import __version__, bundle, files
from hyperrt.errors import ResourceError, UsageError
from training import checkpoint

Progress = Callable[[int, int, str], None]  # stages done, stages in all, what comes now

STAGES = 1 + len(bundle.GRAPHS) + len(verify.TOLERANCE)


def export_bundle(
    model: str,
    base: Path | None,
    hypernet: Path | None,
    output: Path,
    *,
    random_weights: int | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Write a bundle; returns its folder.

    Args:
        model: family, a key of `families.FAMILIES`.
        base: folder of the base model, in diffusers' format; None for that of the hypernetwork's training.
        hypernet: checkpoint of the weight decoder, or its folder.
        output: the new folder; its parent must exist.
        random_weights: a seed: random weights of the family's sizes in place of `base` and `hypernet`.
        force: replace a bundle that is there.
        progress: called before each of STAGES stages.

    Raises:
        UsageError: unknown family, something is not given, or `output` exists and `force` is off.
        NotFound: `base`, `hypernet` or the parent of `output` is missing.
        BadInput: `hypernet` is another kind of file.
        IntegrityError: `base` or `hypernet` is damaged.
        ExportError: the two do not fit together, or cannot be exported.
        ResourceError: the disk is too full.
        ParityError: a graph does not compute what the model does.
    """
    family = families.get(model)
    files.check_folder(output, bundle.MANIFEST, force)
    tell = _Counter(progress or (lambda done, total, what: None))
    tell("load")
    source = load(family, base, hypernet, random_weights)
    hashes = bundle.Hashes(checkpoint.hash_of(source.base.unet), checkpoint.hash_of(source.decoder))
    for name, module in source.modules().items():
        storage.round_weights(module, name)
    parts = graphs.build(source.base, source.decoder)
    _check_room(output, parts)

    def write(folder: Path) -> None:
        for graph in parts:
            tell(graph.name)
            onnx_graph.write(graph, folder)
        parity = verify.ladder(source, parts, folder, family.defaults, tell)
        _write_texts(folder, family, source)
        bundle.write_manifest(folder, manifest(family, source, parts, folder, hashes, parity, output.name))

    return files.publish_folder(output, write, marker=bundle.MANIFEST, force=force)


def load(
    family: Family, base: Path | None, hypernet: Path | None, random_weights: int | None = None
) -> Source:
    """What the bundle is made from; arguments and errors as `export_bundle`."""
    if random_weights is not None:
        if base is not None or hypernet is not None:
            given = "--base" if base is not None else "--hypernet"
            raise UsageError(f"{given} and --random-weights exclude each other", "", "leave one out")
        return family.random(random_weights)
    if hypernet is None:
        why = "a bundle is made from a base model and the hypernetwork that was trained on it"
        do = f"hyperrt export --model {family.name} --hypernet CKPT -o BUNDLE"
        raise UsageError("--hypernet is not given", why, do)
    return family.load(base, hypernet)


def sizes(parts: Iterable[Graph]) -> dict[str, int]:
    """About how many bytes each graph will have in the bundle."""
    return {graph.name: 2 * graphs.weights_of(graph) for graph in parts}


def _check_room(output: Path, parts: Iterable[Graph]) -> None:
    """Whether the bundle fits on the disk: known before minutes of work, not after."""
    folder = Path(os.path.abspath(output)).parent
    needed, free = sum(sizes(parts).values()), shutil.disk_usage(folder).free
    if free < needed:
        why = f"it takes about {needed / 1e6:.0f} MB; {free / 1e6:.0f} MB are free"
        raise ResourceError(
            f"{folder} has no room for the bundle", why, "make room on the disk, or choose another folder"
        )


def manifest(
    family: Family,
    source: Source,
    parts: tuple[Graph, ...],
    folder: Path,
    hashes: bundle.Hashes,
    parity: dict[str, float],
    name: str,
) -> bundle.Manifest:
    """The manifest of the graphs that lie in `folder`."""
    unet = source.base.unet.config
    by_name = {graph.name: graph for graph in parts}
    return bundle.Manifest(
        format=bundle.FORMAT,
        family=family.name,
        name=name,
        created_by=f"hyperrt {__version__}",
        image_size=int(by_name["vae_decoder"].outputs[0].shape[-1]),
        latent=bundle.Latent(unet.in_channels, unet.sample_size),
        prediction_type=source.base.scheduler.config.prediction_type,
        betas=families.betas(source),
        defaults=family.defaults,
        graphs={graph.name: _described(graph, folder) for graph in parts},
        lora=bundle.LoraSection.of(source.decoder.layout),
        adapt="inputs",
        preprocess=families.preprocess(source),
        prompts=family.prompts(source),
        tokenizer_sha256=bundle.sha256_of(folder / bundle.TOKENIZER),
        hashes=hashes,
        precision="fp32",
        storage="fp16",
        parity=parity,
    )


def _described(graph: Graph, folder: Path) -> bundle.Graph:
    file = f"{graph.name}.onnx"
    data = f"{file}.data"
    external = (folder / data).exists()
    return bundle.Graph(
        file=file,
        sha256=bundle.sha256_of(folder / file),
        inputs=graph.inputs,
        outputs=graph.outputs,
        data_file=data if external else None,
        data_sha256=bundle.sha256_of(folder / data) if external else None,
    )


def _write_texts(folder: Path, family: Family, source: Source) -> None:
    """tokenizer.json and LICENSES."""
    tokenizer = source.base.tokenizer.backend_tokenizer
    # The last text that was encoded left its padding here; the runtime does its own.
    tokenizer.no_padding()
    tokenizer.no_truncation()
    tokenizer.save(str(folder / bundle.TOKENIZER))
    theirs = sorted(source.folder.glob("LICENSE*")) if source.folder else []
    if theirs:
        shutil.copyfile(theirs[0], folder / "LICENSES")
    else:
        (folder / "LICENSES").write_text(family.license, encoding="utf-8")


class _Counter:
    """Counts the stages, which verify does not know the number of."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._done = 0

    def __call__(self, what: str) -> None:
        self._progress(self._done, STAGES, what)
        self._done += 1
