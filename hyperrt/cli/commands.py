"""The commands: each turns its options into a config and calls one function.

The options have the names and defaults of the dataclasses in `hyperrt.cli.configs`. A value comes from the
flag, else the environment (HYPERRT_GENERATE_STEPS), else `--config FILE` or the user's config file, else the
default.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from hyperrt.cli.compile import compile_
from hyperrt.cli.configs import GenerateConfig, PersonalizeConfig
from hyperrt.cli.export import export
from hyperrt.cli.images import PhotosCommand
from hyperrt.cli.lora import lora
from hyperrt.cli.options import (
    RenamedOption,
    backend_option,
    bundle_option,
    force_option,
    format_option,
    model_options,
    photo_options,
    pictures_option,
)
from hyperrt.cli.origin import checked, given
from hyperrt.cli.output import Output, with_json
from hyperrt.cli.plans import plans
from hyperrt.cli.training import COMMANDS, TrainingCommand
from hyperrt.cli.user_config import default_map, user_config
from hyperrt.lora.names import COMBINED, COMBINED_TO_SAVE, FORMATS
from hyperrt.sampling.options import RANDOM, SOLVER_NAMES
from hyperrt.version import VERSION

ENV = "HYPERRT"
SETTINGS = {
    "auto_envvar_prefix": ENV,
    "help_option_names": ["-h", "--help"],
    "max_content_width": 110,
}


def _load_config(context: click.Context, option: click.Parameter, value: str | None) -> None:
    path = Path(value) if value else user_config()
    if path is not None:
        context.default_map = default_map(path, hyperrt)
        context.meta["hyperrt.config"] = str(path)


@click.group(context_settings=SETTINGS, invoke_without_command=True)
@click.version_option(VERSION, "--version", message="hyperrt %(version)s")
@click.option("--debug", is_flag=True, help="Show the traceback of an error (also HYPERRT_DEBUG=1).")
@click.option(
    "--config",
    metavar="FILE",
    expose_value=False,
    is_eager=True,
    callback=_load_config,
    help="TOML file of defaults, a table per command.  [default: ~/.config/hyperrt/config.toml]",
)
@click.pass_context
def hyperrt(context: click.Context, /, debug: bool) -> None:
    """Draw pictures of your own subject, from a few photos and a prompt.

    \b
    Examples:
      hyperrt generate --images photos/ --prompt "a [V] mug on a beach"
      hyperrt personalize --images photos/ -o mug.safetensors
      hyperrt generate --subject mug.safetensors --prompt "a [V] mug in the snow" -n 4
      hyperrt info picture.png
      hyperrt doctor

    Every option can also be set in the environment, such as HYPERRT_GENERATE_STEPS=20.
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


@hyperrt.command(cls=PhotosCommand)
@click.option("--prompt", "-p", help="What to draw; [V] stands for the subject: 'a [V] mug on a beach'.")
@click.option(
    "--recipe",
    metavar="FILE",
    help="Draw a picture again: its PNG, the JSON of `hyperrt info`, or AUTOMATIC1111's parameters.",
)
@photo_options(required=False, ways=COMBINED, noun_default="the noun after [V]")
@click.option("--subject", "-s", metavar="FILE", help="Subject file, or another LoRA, instead of photos.")
@click.option(
    "--partial", is_flag=True, help="Accept a LoRA that also adapts other layers, and ignore those layers."
)
@click.option(
    "--generic-prompt", metavar="TEXT", help="Prompt of the base model.  [default: the prompt without [V]]"
)
@click.option(
    "--negative-prompt",
    cls=RenamedOption,
    former=["--negative"],
    default="",
    metavar="TEXT",
    help="What not to draw.",
)
@click.option("--guidance-scale", "-g", type=float, help="How strongly to follow the prompt (s = w + 1).")
@click.option("--kappa", type=float, help="The subject's share of the guidance, 0 to 2.")
@click.option("--cfg", is_flag=True, help="Plain guidance by the personalised model alone, without --kappa.")
@click.option("--image-scale", type=float, help="Weight of the photos beside the text (open category).")
@click.option("--strength", type=float, default=1.0, show_default=True, help="Weight of the subject's LoRA.")
@click.option("--steps", type=int, help="Number of denoising steps.")
@click.option("--solver", metavar="NAME", help=f"One of {', '.join(SOLVER_NAMES)}.")
@click.option(
    "--seed",
    type=int,
    default=RANDOM,
    help="Seed of the noise; picture k uses seed + k, -1 is random.  [default: -1]",
)
@pictures_option("n", "Number of pictures.")
@click.option("--batch-size", type=int, default=1, show_default=True, help="Pictures per engine call.")
@model_options
@click.option(
    "--low-memory", is_flag=True, help="Unload parts of the model after use; decode large pictures in tiles."
)
@click.option(
    "--output",
    "-o",
    metavar="FILE.png|DIR|-",
    help="Where to write; - is stdout.  [default: the current folder]",
)
@force_option()
@with_json
@click.pass_context
def generate(context: click.Context, /, **options: Any) -> None:
    """Draw pictures of a prompt, with the subject of your photos where the prompt says [V].

    \b
    Examples:
      hyperrt generate --images photos/ --prompt "a [V] mug on a beach"
      hyperrt generate --subject mug.safetensors -p "a [V] mug at night" -n 4 -o out/
      hyperrt generate -p "a red house in the snow" --seed 7 -o house.png
      hyperrt generate -s mug.safetensors -p "a [V] mug" -o - | display
      hyperrt generate --recipe picture.png -s mug.safetensors --steps 50

    In a folder a picture is named after its prompt and seed: a-red-house-7.png. If that name is taken, a
    number is added (a-red-house-7-2.png); with -f the old picture is replaced.

    With --recipe, the command line overrides the recipe, and the recipe overrides the environment and the
    config file. The subject must be given again. AUTOMATIC1111's CFG scale is twice --guidance-scale.

    The settings are stored in each PNG: hyperrt info FILE. Options without a default use the model's.
    """
    from hyperrt.cli.generate import generate as command

    if options["recipe"] is not None:
        from hyperrt.cli.recipe import options_from

        of_recipe = options_from(options, given(context))
        context.meta["hyperrt.recipe"] = options["recipe"], of_recipe
        options |= of_recipe
    elif options["prompt"] is None:
        [missing] = (option for option in context.command.params if option.name == "prompt")
        raise click.MissingParameter(ctx=context, param=missing)
    command(checked(context, GenerateConfig, options), context.obj)


@hyperrt.command(cls=PhotosCommand)
@photo_options(required=True, ways=COMBINED_TO_SAVE, noun_default="the model's")
@click.option(
    "--output", "-o", required=True, metavar="FILE", help="Subject file to write, such as mug.safetensors."
)
@format_option(tuple(FORMATS))
@model_options
@force_option()
@with_json
@click.pass_context
def personalize(context: click.Context, /, **options: Any) -> None:
    """Turn photos of one subject into a subject file: LoRA weights that other programs can load too.

    \b
    Examples:
      hyperrt personalize --images photos/ -o mug.safetensors
      hyperrt personalize -i front.jpg side.jpg --class-noun mug -o mug.safetensors --format kohya
    """
    from hyperrt.cli.generate import personalize as command

    command(checked(context, PersonalizeConfig, options), context.obj)


@hyperrt.command()
@click.argument("path", metavar="FILE|BUNDLE", default="tiny")
@with_json
@click.pass_obj
def info(output: Output, path: str) -> None:
    """Show what a bundle, a picture or a subject file is, and how it was made.

    \b
    Examples:
      hyperrt info tiny
      hyperrt info picture.png
      hyperrt info mug.safetensors --json
    """
    from hyperrt.cli.info import describe, text

    facts = describe(path)
    output.result(text(facts), **facts)


@hyperrt.command()
@bundle_option
@backend_option
@with_json
@click.pass_obj
def doctor(output: Output, bundle: str, backend: str) -> None:
    """Check this machine: the installation, the backends, the model's files, and a short test run.

    \b
    Examples:
      hyperrt doctor
      hyperrt doctor --bundle my-bundle --json
    """
    from hyperrt.cli.checks import report
    from hyperrt.cli.doctor import run

    report(run(bundle, backend), output)


hyperrt.add_command(export)
hyperrt.add_command(compile_)
hyperrt.add_command(plans)
hyperrt.add_command(lora)
for name, summary in COMMANDS.items():
    hyperrt.add_command(TrainingCommand(name, summary))
