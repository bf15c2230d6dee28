"""Text for messages: values, names and commands, short and safe to print on a terminal."""

from __future__ import annotations

import os
import reprlib
import shlex

LONGEST = 60  # characters of a value that `short_repr` keeps


def printable(text: str, lines: bool = False) -> str:
    """The text with backslash escapes for control characters and undecodable bytes.

    Args:
        lines: keep line ends.
    """
    return "".join(
        c if c.isprintable() or (lines and c == "\n") else c.encode("unicode_escape").decode() for c in text
    )


def shortened(text: str, most: int = 120) -> str:
    """`printable` text on one line, cut after `most` characters."""
    return printable(text[:most]) + ("…" if len(text) > most else "")


def short_repr(value: object) -> str:
    """The repr of any value, on one line and shortened."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = LONGEST
    try:
        text = " ".join(short.repr(value).split())
    except ValueError:  # a whole number with more digits than Python writes
        return "a very large number"
    return text if len(text) <= 2 * LONGEST else text[: 2 * LONGEST] + "…"


def advice(text: str, *words: str | os.PathLike[str]) -> str:
    """`text: command`, for the `do` of an error; the command is last, and runs as it stands.

    Args:
        text: what the command is for.
        words: of the command.  A path that begins with "-" gets "./" in front, so that it is not taken for an
            option.  A command that cannot be printed is left out.
    """
    command = shlex.join(_word(word) for word in words)
    return f"{text}: {command}" if command.isprintable() else text


def _word(word: str | os.PathLike[str]) -> str:
    text = os.fspath(word)
    return os.path.join(os.curdir, text) if isinstance(word, os.PathLike) and text.startswith("-") else text
