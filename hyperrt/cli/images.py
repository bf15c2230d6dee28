"""Parses `--images` followed by several names, as a shell expands `-i photos/*.jpg`."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from hyperrt.errors import BadInput, LinkedPhotos, UsageError
from hyperrt.text import advice

OPTION, SHORT = "--images", "-i"
ONCE = ("prompt", "subject")  # of two, click would silently take the last


class PhotosCommand(click.Command):
    """A command whose `--images` takes all names that follow it, up to the next option."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse as click does; the error of a stray argument has the right command.

        Raises:
            UsageError: an argument belongs to no option, or a prompt or subject is given twice.
        """
        args = ctx.meta[OPTION] = one_name_each(args)
        try:
            rest = super().parse_args(ctx, list(args))
        except click.UsageError as error:
            _, stray, _ = self.make_parser(ctx).parse_args(list(args))
            if not stray:
                raise
            raise _stray_arguments(ctx.command_path, args, stray) from error
        _, _, order = self.make_parser(ctx).parse_args(list(args))
        for option in order:
            if option.name in ONCE and order.count(option) > 1:
                raise _repeated(option, order.count(option))
        return rest

    def invoke(self, ctx: click.Context) -> Any:
        """Invoke as click does; the error of a folder of links has the command that names the files.

        Raises:
            BadInput: the photos in a folder are links.
        """
        try:
            return super().invoke(ctx)
        except LinkedPhotos as error:
            command = [*ctx.command_path.split(), *_with_files(ctx.meta[OPTION], error)]
            raise BadInput(error.what, error.why, advice("name the files", *command)) from error


def one_name_each(args: Sequence[str]) -> list[str]:
    """`-i a.jpg b.jpg -n 2` => `--images a.jpg --images b.jpg -n 2`."""
    words, rest = [], list(args)
    while rest and rest[0] != "--":
        arg = rest.pop(0)
        if arg in (OPTION, SHORT):
            names = rest[:1]
            del rest[:1]
        elif arg.startswith(f"{OPTION}=") or arg.startswith(SHORT):
            names = [arg.partition("=")[2] if arg.startswith(OPTION) else arg.removeprefix(SHORT)]
        else:
            words.append(arg)
            continue
        while rest and not rest[0].startswith("-"):
            names.append(rest.pop(0))
        words += [word for name in names for word in (OPTION, name)] or [arg]
    return words + rest


def _repeated(option: click.Parameter, count: int) -> UsageError:
    what = f"{option.opts[0]} was given {count} times"
    why = f"a command draws one {option.name}"
    return UsageError(what, why, f"run the command once for each {option.name}")


def _stray_arguments(command: str, args: list[str], stray: list[str]) -> UsageError:
    what = f"no option takes {stray[0]!r}" + (f" and {len(stray) - 1:,} more" if stray[1:] else "")
    why = f"photos follow {OPTION}, and a prompt of several words stands in quotes"
    right = _with_quotes(args, stray) or _as_photos(args, stray)
    return UsageError(what, why, shlex.join([*command.split(), *right]) if right else f"{command} --help")


def _with_quotes(args: list[str], stray: list[str]) -> list[str]:
    """The arguments with the prompt in quotes, if the stray ones are the rest of a prompt; else empty."""
    for at, arg in enumerate(args):
        end = at + 2 + len(stray)
        if arg in ("--prompt", "-p") and args[at + 2 : end] == stray:
            return [*args[: at + 1], " ".join(args[at + 1 : end]), *args[end:]]
    return []


def _as_photos(args: list[str], stray: list[str]) -> list[str]:
    """The arguments with the stray ones as photos, if all are files and no option has them; else empty."""
    others = [arg for arg in args if arg not in stray]
    if len(others) + len(stray) == len(args) and all(map(os.path.exists, stray)):
        return [OPTION, *stray, *others]
    return []


def _with_files(args: list[str], error: LinkedPhotos) -> list[str]:
    """The arguments, with the folder replaced by its files."""
    for at, arg in enumerate(args[1:], start=1):
        if args[at - 1] == OPTION and Path(arg) == Path(error.folder):
            return [*args[:at], *error.files, *args[at + 1 :]]
    return [*args, OPTION, *error.files]  # the folder is set in the environment or the config file
