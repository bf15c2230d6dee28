"""What tests of `hyperrt export` share."""

from __future__ import annotations

from pathlib import Path


def arguments(base: Path, hypernet: Path, new: Path) -> list[str]:
    """An export of the tiny family."""
    return ["export", "--model", "tiny", "--base", str(base), "--hypernet", str(hypernet), "-o", str(new)]


def three_lines(capfd) -> str:
    """What is on stderr, which must be one error as design 10 wants it."""
    shown = capfd.readouterr()
    assert not shown.out
    heads = [line[:7] for line in shown.err.splitlines()]
    assert heads == ["error: ", "  why: ", "  do:  "], shown.err
    return shown.err
