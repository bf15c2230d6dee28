"""Runs `hyperrt export` once its options are parsed (hyperrt/cli/export.py)."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Container
from pathlib import Path
from typing import TYPE_CHECKING

from hyperrt import files
from hyperrt.bundle.bundle import MANIFEST, Bundle
from hyperrt.errors import UsageError

if TYPE_CHECKING:
    from hyperrt.cli.configs import ExportConfig
    from hyperrt.cli.output import Output


def run(config: ExportConfig, output: Output) -> None:
    """Export as `config` says; progress and parity go to stderr, the bundle's folder to stdout."""
    files.check_folder(
        config.output, MANIFEST, config.force
    )  # before PyTorch is imported, which takes seconds
    from hyperrt.export import families

    _silence_libraries()
    config = with_family(config, families.FAMILIES)
    if config.dry_run:
        _show_needs(config, output)
        return
    path = _export(config, output)
    parity = Bundle.open(path).parity
    if parity and not output.json:
        rows = [f"  {check:20}{error:8.0e}" for check, error in parity.items()]
        output.note("\n".join(["largest relative errors against PyTorch:", *rows]))
    output.result(str(path), path=str(path), parity=dict(parity))


def _export(config: ExportConfig, output: Output) -> Path:
    from hyperrt.export import assemble

    with output.progress("export", 100) as advance_to:
        path = assemble.export_bundle(config, lambda done, total, stage: advance_to(100 * done // total))
        advance_to(100)
        return path


def _show_needs(config: ExportConfig, output: Output) -> None:
    """Shows the disk space and memory that an export takes; writes nothing."""
    from hyperrt.export import assemble, graph_specs, read_source

    source = read_source.read(config)
    needed = assemble.needs(source, graph_specs.build(source), config)
    rows = {**needed.disk, "in all": sum(needed.disk.values())}
    text = "\n".join(f"{name:15} {size / 1e6:9,.1f} MB" for name, size in rows.items())
    text += f"\n{'peak of memory':15} {needed.memory / 1e6:9,.1f} MB"
    output.result(text, graphs=dict(needed.disk), memory=needed.memory, output=config.output)


def with_family(config: ExportConfig, families: Container[str]) -> ExportConfig:
    """`config` with a family as its `model`: if this is the folder of a base model, it becomes `base`."""
    folder = Path(config.model)
    if config.model in families or not folder.is_dir():
        return config
    if config.base is not None:
        why = f"--model {config.model} and --base {config.base} both name one"
        raise UsageError("there are two base models", why, "leave one out, or say --model tiny")
    return dataclasses.replace(config, model=_family_of(folder), base=config.model)


def _family_of(folder: Path) -> str:
    """The family of a base model: SDXL has a second text encoder, SD1.5 reads text of width 768."""
    if (folder / "text_encoder_2").is_dir():
        return "sdxl"
    try:
        width = json.loads((folder / "unet" / "config.json").read_text())["cross_attention_dim"]
    except (OSError, ValueError, KeyError):
        return "tiny"  # its export reports what is wrong with the folder
    return "sd15" if width == 768 else "tiny"


def _silence_libraries() -> None:
    """Silences diffusers and transformers: what matters of their warnings is an error of our loaders."""
    import diffusers
    import transformers
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()  # it reports each of five attempts to reach a hub
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()  # the command has a bar of its own
