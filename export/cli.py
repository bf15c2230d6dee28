"""`hyperrt export`: what the command does once its options are parsed (hyperrt/cli_commands.py)."""

from __future__ import annotations

from collections.abc import Container
from pathlib import Path
from typing import TYPE_CHECKING

from hyperrt import files
from hyperrt.bundle import MANIFEST, Bundle
from hyperrt.errors import UsageError

if TYPE_CHECKING:
    from hyperrt.cli_output import Output
    from hyperrt.config import ExportConfig


def run(config: ExportConfig, output: Output) -> None:
    """Export as `config` says; progress and parity go to stderr, the bundle's folder to stdout."""
    files.check_folder(config.output, MANIFEST, config.force)  # before seconds are spent on PyTorch
    from export import assemble

    _silence_libraries()
    family, base = _family_and_base(config, assemble.families.FAMILIES)
    hypernet = Path(config.hypernet) if config.hypernet else None
    if config.dry_run:
        source = assemble.load(assemble.families.get(family), base, hypernet, config.random_weights)
        sizes = assemble.sizes(assemble.graphs.build(source.base, source.decoder))
        rows = {**sizes, "in all": sum(sizes.values())}
        text = "\n".join(f"{name:15} {size / 1e6:9.1f} MB" for name, size in rows.items())
        output.result(text, graphs=sizes, output=config.output)
        return
    with output.progress("export", assemble.STAGES) as advance_to:
        path = assemble.export_bundle(
            family, base, hypernet, Path(config.output),
            random_weights=config.random_weights, force=config.force,
            progress=lambda done, total, what: advance_to(done),
        )  # fmt: skip
        advance_to(assemble.STAGES)
    parity = Bundle.open(path).parity
    if not output.json:
        allowed = assemble.verify.TOLERANCE
        rows = [f"  {rung:20}{error:8.0e} ({allowed[rung]:.0e})" for rung, error in parity.items()]
        output.note("\n".join(["largest relative errors against PyTorch (and what is allowed):", *rows]))
    output.result(str(path), path=str(path), parity=dict(parity))


def _family_and_base(config: ExportConfig, families: Container[str]) -> tuple[str, Path | None]:
    """`--model` is a family, or the folder of a base model of the family tiny."""
    base = Path(config.base) if config.base else None
    if config.model in families or not Path(config.model).is_dir():
        return config.model, base
    if base is not None:
        why = f"--model {config.model} and --base {config.base} both name one"
        raise UsageError("there are two base models", why, "leave one out, or say --model tiny")
    return "tiny", Path(config.model)


def _silence_libraries() -> None:
    """What diffusers and transformers warn about is an error of training.base.load, or of no interest."""
    import diffusers
    import transformers

    diffusers.utils.logging.set_verbosity_error()
    transformers.utils.logging.set_verbosity_error()
