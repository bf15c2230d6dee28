"""`hyperrt export`: what the command does once its options are parsed (hyperrt/cli_commands.py)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from hyperrt.errors import UsageError

if TYPE_CHECKING:
    from hyperrt.cli_output import Output
    from hyperrt.config import ExportConfig


def run(config: ExportConfig, output: Output) -> None:
    """Export as `config` says; progress goes to stderr, the bundle's folder to stdout."""
    _check(config)
    from export import assemble  # seconds: PyTorch

    family, base = _family_and_base(config)
    hypernet = Path(config.hypernet) if config.hypernet else None
    seed = getattr(config, "random_weights", None)
    if config.dry_run:
        sizes = assemble.sizes(assemble.load(assemble.families.get(family), base, hypernet, seed))
        lines = [
            f"{name:15} {size / 1e6:9.1f} MB"
            for name, size in {**sizes, "in all": sum(sizes.values())}.items()
        ]
        output.result("\n".join(lines), graphs=sizes, output=config.output)
        return
    with output.progress("export", assemble.STAGES) as advance_to:

        def progress(done: int, total: int, what: str) -> None:
            advance_to(done)

        path = assemble.export_bundle(
            family, base, hypernet, Path(config.output),
            random_weights=seed, force=config.force, progress=progress,
        )  # fmt: skip
        advance_to(assemble.STAGES)
    output.result(str(path), path=str(path))


def _check(config: ExportConfig) -> None:
    for name, only in (("precision", "fp32"), ("adapt", "inputs")):
        value = getattr(config, name)
        if value != only:
            raise UsageError(
                f"--{name} {value} is not there yet", f"this version exports {only}", f"leave --{name} out"
            )


def _family_and_base(config: ExportConfig) -> tuple[str, Path | None]:
    """`--model` is a family, or the folder of a base model of the family tiny."""
    base = getattr(config, "base", None)
    if base is None and Path(config.model).is_dir():
        return "tiny", Path(config.model)
    return config.model, Path(base) if base else None
