"""The commands that a message gives its reader, found in its text as a reader finds them.

A command begins the text or stands after a colon, and ends with the text or at a semicolon: "reduce it:
hyperrt lora convert a.safetensors b.safetensors --rank 4".
"""

from __future__ import annotations

import re
import shlex

PROGRAMS = ("hyperrt", "pip", "python", "chmod", "rm", "mkdir")
_START = re.compile(rf"(?:^|: |&& )(?=(?:{'|'.join(PROGRAMS)}) )")


def commands_in(text: str) -> list[list[str]]:
    """The words of every command, after the shell's parsing.

    Raises:
        ValueError: a quotation is not closed.
    """
    found: list[list[str]] = []
    end = 0
    for start in _START.finditer(text):
        if start.end() < end:  # inside the words of the command before
            continue
        words, end = _words(text, start.end())
        found.append(words)
    return found


def _words(text: str, start: int) -> tuple[list[str], int]:
    """The words of the command that begins at `start`, and where it ends."""
    scanner = shlex.shlex(text[start:], posix=True, punctuation_chars=";&|")
    scanner.whitespace_split, scanner.commenters = True, ""
    words = []
    for word in scanner:
        if set(word) <= set(";&|"):
            break
        words.append(word)
    return words, start + scanner.instream.tell()
