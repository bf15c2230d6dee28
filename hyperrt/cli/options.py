"""Options that several commands share, as decorators."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import click

Command = TypeVar("Command", bound=Callable[..., Any])


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


def _together(*options: Callable[[Any], Any]) -> Callable[[Command], Command]:
    """One decorator for several options, in the order of the help."""

    def add(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return add


bundle_option = click.option(
    "--bundle", default="tiny", show_default=True, metavar="NAME|DIR", help="The model, as a bundle."
)
backend_option = click.option(
    "--backend", default="auto", show_default=True, metavar="NAME", help="The backend that runs the model."
)
model_options = _together(
    bundle_option,
    backend_option,
    click.option("--threads", type=int, help="Number of CPU threads.  [default: the physical cores]"),
    click.option("--device", type=int, default=0, show_default=True, metavar="N", help="Number of the GPU."),
)


def photo_options(required: bool, ways: Sequence[str], noun_default: str) -> Callable[[Command], Command]:
    """The photos of a subject, and how they become a LoRA.

    Args:
        required: whether the command needs photos.
        ways: values of `--combine`.
        noun_default: the default of `--class-noun`, in words.
    """
    combine = "Average the LoRA's factors over the photos, or their products."
    if "concat" in ways:
        combine += " concat stores the averaged product exactly, at a higher rank, for other programs."
    return _together(
        click.option(
            "--images", "-i", multiple=True, required=required, metavar="DIR|FILE...",
            help="Photos of the subject: photos/ or photos/*.jpg.",
        ),
        click.option(
            "--class-noun", cls=RenamedOption, former=["--class"], metavar="NOUN",
            help=f"What the subject is, such as mug.  [default: {noun_default}]",
        ),
        click.option(
            "--strict-images", is_flag=True,
            help="Stop if a photo cannot be used, instead of leaving it out.",
        ),
        click.option(
            "--combine", default="mean", show_default=True, type=click.Choice(tuple(ways)), help=combine
        ),
    )  # fmt: skip


def pictures_option(name: str, help: str) -> Callable[[Command], Command]:
    """`-n/--pictures`.

    Args:
        name: of the config's field.
    """
    former = {"n": "--n", "pictures": "--images"}[name]
    return click.option(
        "-n", "--pictures", name, cls=RenamedOption, former=[former], type=int, default=1,
        show_default=True, metavar="N", help=help,
    )  # fmt: skip


def format_option(formats: Sequence[str]) -> Callable[[Command], Command]:
    """`--format` of a LoRA file."""
    return click.option(
        "--format", default="diffusers", show_default=True, type=click.Choice(tuple(formats)),
        help="The program that the tensors are named for.",
    )  # fmt: skip


def force_option(help: str = "Replace files that exist.") -> Callable[[Command], Command]:
    """`--force`."""
    return click.option("--force", "-f", is_flag=True, help=help)
