"""Where the value of an option came from: the command line, a recipe, the environment or the config file."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, TypeVar

import click
from click.core import ParameterSource

from hyperrt.cli.configs import ExportConfig, GenerateConfig, PersonalizeConfig
from hyperrt.errors import UsageError

Config = TypeVar("Config", GenerateConfig, PersonalizeConfig, ExportConfig)


def checked(context: click.Context, kind: type[Config], options: dict[str, Any]) -> Config:
    """The command's config; an error names the variable or the file that a bad value came from.

    Raises:
        UsageError: an option has a value that the config does not take.
    """
    try:
        return kind(**options)
    except UsageError as error:
        for field in fields(kind):
            if error.what.startswith(f"{field.name.replace('_', ' ')} is ") and (
                origin := origin_of(context, field.name)
            ):
                raise UsageError(error.what, f"{error.why}; set by {origin}", error.do) from None
        raise


def given(context: click.Context) -> set[str]:
    """Names of the options that are on the command line."""
    source = context.get_parameter_source
    return {name for name in context.params if source(name) is ParameterSource.COMMANDLINE}


def origin_of(context: click.Context, name: str) -> str:
    """Where an option's value came from, if not from the command line."""
    file, names = context.meta.get("hyperrt.recipe", ("", ()))
    if name in names:
        return f"the recipe of {file}"
    source = context.get_parameter_source(name)
    if source is ParameterSource.ENVIRONMENT:
        return f"the environment variable {context.auto_envvar_prefix}_{name.upper()}"
    if source is ParameterSource.DEFAULT_MAP:
        return f"the config file {context.meta.get('hyperrt.config', '')}"
    return ""


def explain_click(error: click.ClickException) -> tuple[str, str, str]:
    """What, why and do of an error that click found in the command line."""
    context = getattr(error, "ctx", None)
    what = " ".join(error.format_message().split())
    parameter = getattr(error, "param", None)
    origin = origin_of(context, parameter.name) if context and parameter and parameter.name else ""
    command = context.command_path if context else "hyperrt"
    return what.rstrip("."), f"it was set by {origin}" if origin else "", f"{command} --help"
