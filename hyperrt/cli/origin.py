"""Finds where the value of an option came from, for error messages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import click
from click.core import ParameterSource

from hyperrt.arguments import Checked
from hyperrt.errors import UsageError

Config = TypeVar("Config", bound=Checked)


def checked(context: click.Context, kind: type[Config], options: dict[str, Any]) -> Config:
    """Build a command's config; an error names the variable or the file that a bad value came from.

    Raises:
        UsageError: the config refuses a value.
    """
    try:
        return kind(**options)
    except UsageError as error:
        for name in context.params:
            prefix = f"{name.replace('_', ' ')} is "
            if error.what.startswith(prefix) and (origin := origin_of(context, name)):
                raise UsageError(error.what, f"{error.why}; set by {origin}", error.do) from None
        raise


def given(context: click.Context) -> set[str]:
    """Names of the options that the command line sets."""
    source = context.get_parameter_source
    return {name for name in context.params if source(name) is ParameterSource.COMMANDLINE}


def origin_of(context: click.Context, name: str) -> str:
    """Where an option's value came from; empty for the command line and the default."""
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
    what = " ".join(error.format_message().split()).rstrip(".")
    why = ""
    parameter = getattr(error, "param", None)
    if context and parameter and (origin := origin_of(context, parameter.name)):
        why = f"it was set by {origin}"
    if isinstance(error, click.NoSuchOption):
        what = f"there is no option {error.option_name}"
        why = _similar(error.option_name, _option_names(context.command) if context else ())
    command = context.command_path if context else "hyperrt"
    return what, why, f"{command} --help"


def _option_names(command: click.Command) -> list[str]:
    """The names of a command's options that its help shows."""
    return [name for option in command.params for name in option.opts if name.startswith("--")]


def _similar(name: str, names: Sequence[str]) -> str:
    """Names that are similar, the closest first, in words."""
    import difflib  # not needed by commands that succeed

    matches = difflib.get_close_matches(name, names)
    return f"did you mean {' or '.join(matches)}?" if matches else ""
