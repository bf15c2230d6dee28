"""The user's config file: defaults of the command line's options, in TOML, a table per command.

    [generate]
    steps = 20
    backend = "onnxruntime"

It is `--config FILE`, else `$XDG_CONFIG_HOME/hyperrt/config.toml` (`~/.config`). Nothing is read from the
current folder, where somebody else may have put it.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from hyperrt.errors import NotFound, UsageError


def user_config() -> Path | None:
    """The user's config file, if there is one."""
    try:
        home = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
        path = Path(home) / "hyperrt" / "config.toml"
        return path if path.is_file() else None
    except (OSError, RuntimeError):  # no home folder, or one that may not be read
        return None


def default_map(path: Path, group: click.Group) -> dict[str, dict[str, Any]]:
    """The file's tables as click's defaults.

    Raises:
        NotFound: there is no such file.
        UsageError: it is not TOML, or sets something that the commands do not have.
    """
    found: dict[str, dict[str, Any]] = {}
    for command, table in _read(path).items():
        if command not in group.commands or not isinstance(table, dict):
            tables = ", ".join(f"[{name}]" for name in group.commands)
            raise UsageError(
                f"the config file {path} has {command!r} at its top", f"it takes the tables {tables}"
            )
        known = {option.name for option in group.commands[command].params}
        found[command] = {}
        for key, value in table.items():
            name = key.replace("-", "_")
            if name not in known:
                options = ", ".join(sorted(str(option) for option in known))
                raise UsageError(
                    f"the config file {path} sets {key!r} in [{command}]", f"its options are {options}"
                )
            found[command][name] = value
    return found


def _read(path: Path) -> dict[str, Any]:
    import tomllib  # here: most users have no config file to wait for

    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise NotFound(f"there is no config file {path}", "", "check --config") from None
    except (OSError, ValueError) as error:
        raise UsageError(
            f"the config file {path} cannot be read", str(error), "correct it, or name another: --config"
        ) from error
