"""`hyperrt export`: what the command does once its options are parsed (hyperrt/cli/commands.py)."""

from __future__ import annotations

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
    from hyperrt.export.assemble import Options
    from hyperrt.export.source import Inputs


def run(config: ExportConfig, output: Output) -> None:
    """Export as `config` says; progress and parity go to stderr, the bundle's folder to stdout."""
    files.check_folder(config.output, MANIFEST, config.force)  # before seconds are spent on PyTorch
    from hyperrt.export import assemble

    _silence_libraries()
    family, inputs = _family_and_inputs(config, assemble.families.FAMILIES)
    options = assemble.Options(config.precision, config.quantize == "int8", config.verify, config.adapt)
    if config.dry_run:
        _tell_needs(family, inputs, options, config, output)
        return
    path = _export(family, inputs, options, config, output)
    parity = Bundle.open(path).parity
    if parity and not output.json:
        rows = [f"  {rung:20}{error:8.0e}" for rung, error in parity.items()]
        output.note("\n".join(["largest relative errors against PyTorch:", *rows]))
    output.result(str(path), path=str(path), parity=dict(parity))


def _export(family: str, inputs: Inputs, options: Options, config: ExportConfig, output: Output) -> Path:
    from hyperrt.export import assemble

    with output.progress("export", 100) as advance_to:
        path = assemble.export_bundle(
            family, inputs, Path(config.output), options, force=config.force,
            progress=lambda done, total, what: advance_to(100 * done // total),
        )  # fmt: skip
        advance_to(100)
        return path


def _tell_needs(family: str, inputs: Inputs, options: Options, config: ExportConfig, output: Output) -> None:
    """What an export would take of disk and memory; nothing is written."""
    from hyperrt.export import assemble, families, graph_specs

    known = families.get(family)
    with families.opened(known, inputs) as source:
        needed = assemble.needs(
            source, graph_specs.build(source), options.int8, assemble.level_of(known, options)
        )
    rows = {**needed.disk, "in all": sum(needed.disk.values())}
    text = "\n".join(f"{name:15} {size / 1e6:9,.1f} MB" for name, size in rows.items())
    text += f"\n{'peak of memory':15} {needed.memory / 1e6:9,.1f} MB"
    output.result(text, graphs=dict(needed.disk), memory=needed.memory, output=config.output)


def _family_and_inputs(config: ExportConfig, families: Container[str]) -> tuple[str, Inputs]:
    """`--model` is a family, or the folder of a base model, whose family its configuration tells."""
    from hyperrt.export.source import Inputs

    family, base = config.model, config.base
    if family not in families and Path(family).is_dir():
        if base is not None:
            why = f"--model {family} and --base {base} both name one"
            raise UsageError("there are two base models", why, "leave one out, or say --model tiny")
        family, base = _family_of(Path(family)), family
    paths = {
        name: Path(value) if (value := getattr(config, name)) else None
        for name in ("hypernet", "image_encoder", "image_prompt")
    }
    others = {name: getattr(config, name) for name in ("random_weights", "vae", "like", "offline", "size")}
    return family, Inputs(base=base, **paths, **others)


def _family_of(folder: Path) -> str:
    """SDXL has a second text encoder; SD1.5 reads text of 768 numbers a token."""
    if (folder / "text_encoder_2").is_dir():
        return "sdxl"
    try:
        width = json.loads((folder / "unet" / "config.json").read_text())["cross_attention_dim"]
    except (OSError, ValueError, KeyError):
        return "tiny"  # which says what is wrong with the folder
    return "sd15" if width == 768 else "tiny"


def _silence_libraries() -> None:
    """What diffusers and transformers warn about is an error of `training.base.load`, or of no interest."""
    import diffusers
    import transformers
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()  # a hub that cannot be reached is asked five times more
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()  # a bar for each part, where the command has its own
