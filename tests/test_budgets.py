"""How long things may get, and what must be documented.

Exceptions stand here by name, with the reason.
"""

from __future__ import annotations

import ast
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("engines", "hyperrt", "training", "export")
FILE_LINES, FUNCTION_LINES, README_LINES = 400, 60, 170
RUNTIME_DEPENDENCIES = 7
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
LONG_FUNCTIONS: dict[str, str] = {}  # "training/run/loop.py:train" -> why it is better in one piece


def python_files(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def each(*folders: str) -> pytest.MarkDecorator:
    """Parametrise `path` over the Python files of these folders, with readable ids."""
    return pytest.mark.parametrize("path", python_files(*folders), ids=name)


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def public_definitions(node: ast.Module | ast.ClassDef, methods: bool) -> list[Definition]:
    """Public functions and classes; with `methods` also the methods that no base class documents."""
    found = []
    for child in node.body:
        if isinstance(child, Definition) and not child.name.startswith("_"):
            found.append(child)
            if methods and isinstance(child, ast.ClassDef) and not child.bases:
                found += public_definitions(child, methods)
    return [child for child in found if not is_overload(child)]


def is_overload(node: Definition) -> bool:
    return any(ast.unparse(mark).endswith(("overload", ".setter")) for mark in node.decorator_list)


@each(*PACKAGES, "tests", "bench", "docs")
def test_a_file_has_at_most_400_lines(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= FILE_LINES


@each(*PACKAGES, "tests", "bench", "docs")
def test_a_function_has_at_most_60_lines_or_is_an_exception_that_is_needed(path):
    functions = [n for n in ast.walk(tree(path)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    long = {f"{name(path)}:{f.name}" for f in functions if f.end_lineno - f.lineno >= FUNCTION_LINES}
    assert long == {entry for entry in LONG_FUNCTIONS if entry.split(":")[0] == name(path)}


def test_an_exception_names_a_file_that_is_there():
    assert not [entry for entry in LONG_FUNCTIONS if not (ROOT / entry.split(":")[0]).is_file()]


@each(*PACKAGES, "bench", "docs")
def test_a_module_says_what_it_is(path):
    module = tree(path)
    assert not module.body or ast.get_docstring(module)


@each(*PACKAGES)
def test_what_is_public_is_documented(path):
    is_api = path.relative_to(ROOT).parts[0] in {"engines", "hyperrt"}
    found = public_definitions(tree(path), methods=is_api)
    assert not [f"line {node.lineno}: {node.name}" for node in found if not ast.get_docstring(node)]


@each(*PACKAGES, "bench")
def test_a_file_is_named_for_what_it_holds(path):
    assert path.stem not in {"util", "utils", "helper", "helpers", "common", "misc", "manager", "core"}


def test_the_readme_is_read_in_one_sitting():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= README_LINES


def test_the_runtime_needs_few_packages():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert len(project["dependencies"]) <= RUNTIME_DEPENDENCIES
