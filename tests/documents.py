"""The Markdown documents of the repository and their fenced blocks.

A comment on the line before a block says how it is treated; without one it is run.

    <!-- ci: NAME -->        a command that .ci/run executes in a fresh environment; here without its pip part
    <!-- not run: why -->    the options of its commands are compared with --help
    <!-- folders -->         the folders of the code, each with a description
    <!-- tree -->            the folders and files of the code, each with a description
    <!-- rooms -->           the rooms of hyperrt/, each above those that it imports
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [
    path.relative_to(ROOT).as_posix() for path in sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
]
BLOCK = re.compile(r"(?:^<!-- (?P<mark>[^\n]*) -->\n)?^```(?P<language>\w+)\n(?P<code>.*?)^```$", re.M | re.S)


@dataclass(frozen=True)
class Block:
    """A fenced block of a document: the comment before it, its language and text, and where it starts."""

    document: str
    mark: str
    language: str
    code: str
    line: int


def text_of(document: str) -> str:
    return (ROOT / document).read_text(encoding="utf-8")


def blocks(document: str) -> list[Block]:
    text = text_of(document)
    return [
        Block(document, m["mark"] or "", m["language"], m["code"], text.count("\n", 0, m.start("code")))
        for m in BLOCK.finditer(text)
    ]


def marked(document: str, mark: str) -> Block:
    return next(block for block in blocks(document) if block.mark == mark)


def table_rows(document: str) -> list[list[str]]:
    """The rows of all tables of a document, as cells."""
    lines = [line for line in text_of(document).splitlines() if line.startswith("|")]
    cells = [re.split(r"(?<!\\)\|", line[1:-1]) for line in lines]
    return [[cell.strip() for cell in row] for row in cells]
