"""What the options of several commands share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import click


class RenamedOption(click.Option):
    """An option whose former names still work, for one version, and are not in the help.

    Args:
        former: the former names, such as ["--out"].
    """

    def __init__(self, *args: Any, former: Sequence[str] = (), **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.former = list(former)

    def add_to_parser(self, parser: Any, ctx: click.Context) -> None:
        names = self.opts
        self.opts = [*names, *self.former]
        try:
            super().add_to_parser(parser, ctx)
        finally:
            self.opts = names
