"""Reads the user's config file: defaults of the options, in TOML, a table per command.

    [generate]
    steps = 20
    backend = "onnxruntime"

The file is `--config FILE`, else `$XDG_CONFIG_HOME/hyperrt/config.toml` (`~/.config`). No config file is read
from the current folder, because somebody else may have put it there.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from hyperrt.errors import NotFound, UsageError
from hyperrt.plans.private_folder import xdg_folder

MAX_BYTES = 2**20  # of a config file


def user_config() -> Path | None:
    """Path of the user's config file, or None."""
    try:
        path = xdg_folder("config") / "hyperrt" / "config.toml"
        return path if path.is_file() else None
    except (OSError, RuntimeError):  # no home folder, or it is not readable
        return None


def default_map(path: Path, group: click.Group) -> dict[str, dict[str, Any]]:
    """Read a config file as click's defaults.

    Raises:
        NotFound: the file does not exist.
        UsageError: it is not TOML, too large, or sets an unknown option.
    """
    return _defaults(path, _read(path), group, "")


def _defaults(path: Path, tables: dict[str, Any], group: click.Group, above: str) -> dict[str, Any]:
    """The defaults of a group's commands; `above` is "plans." for [plans.prune]."""
    defaults: dict[str, Any] = {}
    for name, table in tables.items():
        command = group.commands.get(name)
        if command is None or not isinstance(table, dict):
            where = f"in [{above[:-1]}]" if above else "at its top"
            allowed = ", ".join(f"[{above}{name}]" for name in group.commands)
            raise UsageError(f"the config file {path} has {name!r} {where}", f"its tables are {allowed}")
        if isinstance(command, click.Group):
            defaults[name] = _defaults(path, table, command, f"{above}{name}.")
            continue
        defaults[name] = {key.replace("-", "_"): value for key, value in table.items()}
        if command.params:  # a training command has none before PyTorch is loaded
            _check(path, table, command, above + name)
    return defaults


def check_options(group: click.Context, command: click.Command, name: str) -> None:
    """Check the config file's table of a training command, after its module was imported.

    Args:
        group: the context of `hyperrt`.
        command: the command of the module.
        name: of the command, and of its table.

    Raises:
        UsageError: the table sets an unknown option.
    """
    table = (group.default_map or {}).get(name, {})
    _check(Path(group.meta.get("hyperrt.config", "")), table, command, name)


def _check(path: Path, table: Mapping[str, Any], command: click.Command, where: str) -> None:
    names = {option.name for option in command.params}
    for key in table:
        if key.replace("-", "_") not in names:
            options = ", ".join(sorted(map(str, names)))
            raise UsageError(
                f"the config file {path} sets {key!r} in [{where}]", f"its options are {options}"
            )


def _read(path: Path) -> dict[str, Any]:
    import tomllib  # not at the top: most users have no config file

    try:
        if path.exists() and not path.is_file() and str(path) != os.devnull:
            raise ValueError("it is not a plain file")
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise ValueError(f"it has more than {MAX_BYTES:,} bytes")
        return tomllib.loads(content.decode("utf-8-sig"))  # with or without a byte order mark
    except FileNotFoundError:
        raise NotFound(f"the config file {path} does not exist", "", "check --config") from None
    except (OSError, ValueError) as error:
        raise UsageError(
            f"the config file {path} cannot be read", str(error), "correct it, or name another: --config"
        ) from error
