"""The commands `hyperrt lora ...`: inspect, convert and check LoRA files."""

from __future__ import annotations

import functools
import os
import sys
from typing import TYPE_CHECKING, Any

import click

from hyperrt.cli.configs import ConvertConfig
from hyperrt.cli.options import force_option, format_option
from hyperrt.cli.origin import checked
from hyperrt.cli.output import Output, with_json
from hyperrt.errors import LoraMismatch, UsageError
from hyperrt.lora.names import FORMATS

if TYPE_CHECKING:
    from hyperrt.bundle.bundle import Bundle
    from hyperrt.lora.reader import LoraFile


@click.group(invoke_without_command=True)
@click.pass_context
def lora(context: click.Context, /) -> None:
    """Inspect, convert and check LoRA files, of HyperRT and of other programs.

    \b
    Examples:
      hyperrt lora inspect mug.safetensors
      hyperrt lora convert mug.safetensors mug-kohya.safetensors --format kohya
      hyperrt lora verify other.safetensors --bundle my-bundle
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


@lora.command()
@click.argument("file", metavar="FILE|DIR")
@with_json
@click.pass_obj
def inspect(output: Output, file: str) -> None:
    """Show a LoRA file's format, rank, scale and origin, and what it adapts and how strongly.

    \b
    Examples:
      hyperrt lora inspect mug.safetensors
      hyperrt lora inspect adapter-folder --json
    """
    from hyperrt.cli.info import text
    from hyperrt.cli.lora_report import facts

    values = facts(file)
    output.result(text(values), **values)


@lora.command()
@click.argument("source", metavar="IN")
@click.argument("output", metavar="OUT")
@format_option(tuple(FORMATS))
@click.option("--bundle", metavar="NAME|DIR", help="Bundle that it must fit.  [default: not checked]")
@click.option("--rank", type=int, help="Reduce it to this rank, by the closest LoRA of that rank.")
@click.option("--partial", is_flag=True, help="Keep only q, k and v of the cross-attention.")
@force_option()
@with_json
@click.pass_context
def convert(context: click.Context, /, **options: Any) -> None:
    """Write a LoRA in another format: the same numbers under the names that another program expects.

    With --format peft, a name without a suffix is a folder for PeftModel.from_pretrained.

    \b
    Examples:
      hyperrt lora convert mug.safetensors mug-kohya.safetensors --format kohya
      hyperrt lora convert mug.safetensors mug --format peft
      hyperrt lora convert other.safetensors small.safetensors --rank 4 --bundle tiny
    """
    config = checked(context, ConvertConfig, options)
    output: Output = context.obj
    lost = _convert(config, output)
    if config.rank is not None:
        output.note(f"the lower rank loses {100 * lost:.1f} % of the LoRA's norm", lost=lost)
    output.result(config.output, path=config.output, format=config.format, lost=lost)


def _convert(config: ConvertConfig, output: Output) -> float:
    """Convert the file; returns the share of the LoRA's norm that is lost."""
    if "numpy" not in sys.modules:  # NumPy reads the variable on import
        # On small matrices the threads of NumPy's library wait for each other while other programs run.
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    from hyperrt import files
    from hyperrt.bundle.bundle import Bundle
    from hyperrt.lora import peft_config, reader, writer

    bundle = Bundle.open(config.bundle) if config.bundle is not None else None
    layout = bundle.layout if bundle else None
    file = reader.open_lora(config.source, [site.path for site in layout.sites] if layout else ())
    if os.path.realpath(config.output) in (os.path.realpath(config.source), os.path.realpath(file.path)):
        why = "a file that is read cannot be the one that is written"
        raise UsageError(f"{config.output} is the file to convert", why, "choose another name")
    reader.check_used(file, config.partial)
    if config.format == "peft" and not os.path.splitext(config.output)[1]:
        files.check_folder(config.output, peft_config.PEFT_CONFIG, config.force)
    else:
        files.check_file(config.output, config.force)
    if bundle:
        _check_fit(file, bundle, config)
    family = bundle.family if bundle else ""
    write = functools.partial(
        writer.convert, file, config.output, config.format, family=family, force=config.force
    )
    if config.rank is None:
        return write()
    with output.progress("reducing", len(file.pairs)) as advance_to:
        return write(rank=config.rank, advance_to=advance_to)


def _check_fit(file: LoraFile, bundle: Bundle, config: ConvertConfig) -> None:
    """Refuse a file that the bundle would not take after the conversion."""
    from hyperrt.lora.layout import LoraLayout
    from hyperrt.lora.subject_file import load_file

    layout = bundle.layout
    if config.rank is not None:
        if config.rank > layout.rank:
            why = f"the bundle takes at most {layout.rank}"
            raise UsageError(f"rank is {config.rank}", why, f"use --rank {layout.rank}")
        if not file.origin:
            layout = LoraLayout(layout.sites, max(layout.rank, file.rank))
    elif file.rank > layout.rank and not file.origin:
        do = f"add --rank {layout.rank}, which loses a part of it"
        raise LoraMismatch(f"the rank of {file.name} is {file.rank}", f"the bundle's is {layout.rank}", do)
    load_file(file, layout, bundle.hashes.base_model, bundle.token_shape, partial=config.partial)


@lora.command()
@click.argument("file", metavar="FILE|DIR")
@click.option("--bundle", metavar="NAME|DIR", help="Bundle that it must fit.  [default: not checked]")
@click.option("--partial", is_flag=True, help="Accept layers other than q, k and v of the cross-attention.")
@with_json
@click.pass_obj
def verify(output: Output, file: str, bundle: str | None, partial: bool) -> None:
    """Check that a LoRA file is whole, that its numbers are finite, and that it fits a bundle.

    \b
    Examples:
      hyperrt lora verify mug.safetensors --bundle tiny
      hyperrt lora verify other.safetensors --json
    """
    from hyperrt.cli.checks import report
    from hyperrt.cli.lora_report import checks

    report(checks(file, bundle, partial), output)
