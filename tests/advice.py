"""The messages of the source that hold a command, and what becomes of the command when it is pasted.

`pip` is not run: the extras and options that it is told must exist.  What compiles for a GPU is only parsed.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import click

from hyperrt.cli.commands import hyperrt as group
from tests.pasting import PROGRAMS

ROOT = Path(__file__).resolve().parents[1]
LAYERS = ("engines", "hyperrt", "training", "export")
START = re.compile(rf"(?:^|: |&& )(?:{'|'.join(PROGRAMS)}) ")
EXIT_CODES = {("hyperrt", "plans", "verify"): 8}  # it says what is wrong with plans


def sites() -> dict[str, list[str]]:
    """Where the source has messages with commands: "hyperrt/files.py:remove" -> their texts."""
    found: dict[str, list[str]] = {}
    for path in (path for layer in LAYERS for path in sorted((ROOT / layer).rglob("*.py"))):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for function, node in texts_in(tree, ""):
            text = text_of(node)
            if (START.search(text) or is_advice(node)) and "\n" not in text:
                found.setdefault(f"{path.relative_to(ROOT).as_posix()}:{function}", []).append(text)
    return found


def texts_in(node: ast.AST, function: str) -> Iterator[tuple[str, ast.AST]]:
    """Whole texts, and lists of words that are joined for a shell, with the function that they are in."""
    if isinstance(node, ast.FunctionDef):
        function = node.name
    for child in ast.iter_child_nodes(node):
        if isinstance(node, ast.Expr) and isinstance(child, ast.Constant):
            continue  # a docstring
        whole = isinstance(child, ast.Constant | ast.JoinedStr | ast.BinOp)
        whole = whole or is_join(child) or is_advice(child)
        if whole or isinstance(child, ast.List):
            yield function, child
        if not whole:
            yield from texts_in(child, function)


def is_join(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and ast.unparse(node.func) == "shlex.join"


def is_advice(node: ast.AST) -> bool:
    """A call of `hyperrt.text.advice`."""
    return isinstance(node, ast.Call) and ast.unparse(node.func) == "advice"


def text_of(node: ast.AST) -> str:
    """The text, with … for what is filled in."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else "…"
    if isinstance(node, ast.FormattedValue):
        return text_of(node.value)
    if isinstance(node, ast.BinOp):
        return text_of(node.left) + text_of(node.right)
    if is_join(node):
        return text_of(node.args[0])
    if is_advice(node):
        return f"{text_of(node.args[0])}: …"
    if isinstance(node, ast.List):
        return " ".join(map(text_of, node.elts))
    return "".join(map(text_of, node.values)) if isinstance(node, ast.JoinedStr) else "…"


def fits(template: str, text: str) -> bool:
    """Whether a message may come from a text of the source, quotes that a shell needs left aside."""
    parts = [re.escape(part) for part in template.replace("'", "").split("…")]
    return re.search(".*".join(parts), text.replace("'", "").replace('"', "")) is not None


def run(words: list[str], folder: Path) -> None:
    """Run a command of a message, in the folder that its reader is in, beside `folder`."""
    if words[0] == "pip":
        check_pip(words[1:])
    elif words[:2] == ["hyperrt", "compile"]:
        parsed(words[1:])
        assert Path(words[2]).is_dir()
    else:
        start = [sys.executable, "-m", "hyperrt"] if words[0] == "hyperrt" else words[:1]
        env = os.environ | {"PYTHONPATH": str(ROOT)}
        result = subprocess.run(
            [*start, *words[1:]], cwd=folder.parent, env=env, capture_output=True, text=True, check=False
        )
        assert result.returncode == EXIT_CODES.get(tuple(words), 0), (words, result.stderr)


def check_pip(words: list[str]) -> None:
    """As pip would: the options are pip's, the extras are ours, and a folder is there."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert words[0] in ("install", "uninstall")
    options = {word for word in words[1:] if word.startswith("-")}
    assert options <= {"--yes", "--no-deps", "--force-reinstall", "--upgrade", "-U"}
    wanted = [word for word in words[1:] if not word.startswith("-")]
    assert wanted
    for word in wanted:
        name, _, extra = word.partition("[")
        if extra:
            assert name == "hyperrt" or (Path(name) / "pyproject.toml").is_file()
            assert extra.rstrip("]") in extras
        else:
            assert re.fullmatch(r"[a-zA-Z][\w-]*(?:[<>=]=?[\d.]+)?", word)


def parsed(words: list[str]) -> None:
    """Refuse what click would, without running it."""
    command: click.Command = group
    while isinstance(command, click.Group):
        command, words = command.commands[words[0]], words[1:]
    command.make_context(command.name, list(words))
