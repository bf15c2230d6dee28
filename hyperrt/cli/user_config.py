"""The user's config file: defaults of the command line's options, in TOML, a table per command.

    [generate]
    steps = 20
    backend = "onnxruntime"

It is `--config FILE`, else `$XDG_CONFIG_HOME/hyperrt/config.toml` (`~/.config`). Nothing is read from the
current folder, where somebody else may have put it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from hyperrt.errors import NotFound, UsageError
from hyperrt.plans.private_folder import xdg_folder

MAX_BYTES = 2**20  # of a config file


def user_config() -> Path | None:
    """The user's config file, if there is one."""
    try:
        path = xdg_folder("config") / "hyperrt" / "config.toml"
        return path if path.is_file() else None
    except (OSError, RuntimeError):  # no home folder, or one that may not be read
        return None


def default_map(path: Path, group: click.Group) -> dict[str, dict[str, Any]]:
    """The file's tables as click's defaults.

    Raises:
        NotFound: there is no such file.
        UsageError: it is not TOML, or sets something that the commands do not have.
    """
    return _defaults(path, _read(path), group, "")


def _defaults(path: Path, tables: dict[str, Any], group: click.Group, above: str) -> dict[str, Any]:
    """A table of tables, one per command of the group; `above` is "plans." for [plans.prune]."""
    found: dict[str, Any] = {}
    for name, table in tables.items():
        command = group.commands.get(name)
        if command is None or not isinstance(table, dict):
            where = f"in [{above[:-1]}]" if above else "at its top"
            known = ", ".join(f"[{above}{name}]" for name in group.commands)
            raise UsageError(f"the config file {path} has {name!r} {where}", f"it takes the tables {known}")
        if isinstance(command, click.Group):
            found[name] = _defaults(path, table, command, f"{above}{name}.")
            continue
        found[name] = {key.replace("-", "_"): value for key, value in table.items()}
        if command.params:  # those of the training commands are not known before PyTorch is loaded
            _check(path, table, command, above + name)
    return found


def check_options(group: click.Context, command: click.Command, name: str) -> None:
    """Refuse what the config file sets of a training command, once its options are known.

    Args:
        group: the context of `hyperrt`.
        command: the command as its module has it.
        name: of the command, and of its table.

    Raises:
        UsageError: the table sets something that is no option of the command.
    """
    table = (group.default_map or {}).get(name, {})
    _check(Path(group.meta.get("hyperrt.config", "")), table, command, name)


def _check(path: Path, table: Mapping[str, Any], command: click.Command, where: str) -> None:
    known = {option.name for option in command.params}
    for key in table:
        if key.replace("-", "_") not in known:
            options = ", ".join(sorted(str(option) for option in known))
            raise UsageError(
                f"the config file {path} sets {key!r} in [{where}]", f"its options are {options}"
            )


def _read(path: Path) -> dict[str, Any]:
    import tomllib  # not at the top: most users have no config file

    try:
        if path.exists() and not path.is_file():
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
