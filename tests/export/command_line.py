"""Arguments and configs of an export, shared by tests of `hyperrt export`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hyperrt.cli.configs import ExportConfig


def arguments(base: Path, hypernet: Path, new: Path) -> list[str]:
    """An export of the tiny family."""
    return ["export", "--model", "tiny", "--base", str(base), "--hypernet", str(hypernet), "-o", str(new)]


def config(model: str, output: Path | str = "new", **options: Any) -> ExportConfig:
    """An export of that family; paths become strings, as on a command line."""
    given = {name: str(value) if isinstance(value, Path) else value for name, value in options.items()}
    return ExportConfig(model=model, output=str(output), **given)


def config_of(trained: Any, output: Path | str = "new", **options: Any) -> ExportConfig:
    """An export of the models of the fixture `trained`."""
    return config("tiny", output, base=trained.base, hypernet=trained.hypernet, **options)


def three_lines(capfd) -> str:
    """What is on stderr, which must be one error of three lines."""
    shown = capfd.readouterr()
    assert not shown.out
    heads = [line[:7] for line in shown.err.splitlines()]
    assert heads == ["error: ", "  why: ", "  do:  "], shown.err
    return shown.err
