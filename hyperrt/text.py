"""Commands in messages: quoted, so that they can be pasted into a shell."""

from __future__ import annotations

import os
import shlex


def advice(text: str, *words: str | os.PathLike[str]) -> str:
    """`text: command`, for the `do` of an error; the command is last, and runs as it stands.

    Args:
        text: what the command is for.
        words: of the command.  A path that begins with "-" gets "./" before it, so that it is no option; one
            that cannot be printed leaves the command out.
    """
    command = shlex.join(_word(word) for word in words)
    return f"{text}: {command}" if command.isprintable() else text


def _word(word: str | os.PathLike[str]) -> str:
    text = os.fspath(word)
    return os.path.join(os.curdir, text) if isinstance(word, os.PathLike) and text.startswith("-") else text
