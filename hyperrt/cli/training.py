"""The commands that need PyTorch: `hyperrt pretrain`, `prepare`, `train` and `evaluate`.

Each is the command `main` of a module of `hyperrt.training`, which is imported when the command is called. So
`hyperrt --help` and the other commands work without PyTorch and do not wait for it.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import click

from hyperrt.cli.user_config import check_options
from hyperrt.errors import Incompatible

TRAINING_NEEDS = ("accelerate", "diffusers", "matplotlib", "peft", "scipy", "torch", "transformers")
COMMANDS = {
    "pretrain": "Train the small base model from scratch (needs PyTorch).",
    "prepare": "Convert a data set to the cache that training reads (needs PyTorch).",
    "train": "Train a hypernetwork on a frozen base model (needs PyTorch).",
    "evaluate": "Draw and score pictures of many subjects (needs PyTorch).",
}


class TrainingCommand(click.Command):
    """A command whose module is imported when it is called; until then it has a name and a summary.

    Args:
        name: of the command, and of its module in `hyperrt.training`.
        summary: its line in `hyperrt --help`.
    """

    def __init__(self, name: str, summary: str) -> None:
        super().__init__(name, help=summary)

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        """Import the module, and make the context of its command.

        Raises:
            Incompatible: PyTorch or another package of the extra `train` is not installed.
            UsageError: the config file sets an option that the command does not have.
        """
        require("training", "train", TRAINING_NEEDS)
        command: click.Command = importlib.import_module(f"hyperrt.training.{self.name}").main
        if parent is not None:
            check_options(parent, command, str(self.name))
        return command.make_context(info_name, args, parent, **extra)


def require(what: str, extra: str, packages: tuple[str, ...]) -> None:
    """Check that the packages of an extra are installed.

    Args:
        what: what needs them, for the message.
        extra: the extra of the distribution that installs them.

    Raises:
        Incompatible: one is missing.
    """
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        why = f"these packages are missing: {', '.join(missing)}"
        raise Incompatible(f"{what} is not installed", why, f"pip install 'hyperrt[{extra}]'")
