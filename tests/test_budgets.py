"""How long things may get, what must be documented, and what the wheel holds.

Exceptions stand here by name, with the reason.
"""

from __future__ import annotations

import ast
import importlib.metadata
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("engines", "hyperrt", "training", "export")
FILE_LINES, FUNCTION_LINES, README_LINES = 400, 60, 360  # of the README a half is the tree
RUNTIME_DEPENDENCIES = 7
WHEEL_MB = 25
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
LONG_FUNCTIONS: dict[str, str] = {}  # "training/loop.py:train" -> why it is better in one piece


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


@each(*PACKAGES, "tests", "bench")
def test_a_file_has_at_most_400_lines(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= FILE_LINES


@each(*PACKAGES, "tests", "bench")
def test_a_function_has_at_most_60_lines(path):
    functions = [n for n in ast.walk(tree(path)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    lengths = {f"{name(path)}:{f.name}": f.end_lineno - f.lineno + 1 for f in functions}
    long = {key for key, length in lengths.items() if length > FUNCTION_LINES}
    assert not long - LONG_FUNCTIONS.keys()


def test_every_exception_is_still_needed():
    for entry in LONG_FUNCTIONS:
        path, function = entry.split(":")
        assert any(getattr(node, "name", "") == function for node in ast.walk(tree(ROOT / path)))


@each(*PACKAGES, "bench")
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
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= README_LINES


def test_the_runtime_needs_few_packages():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert len(project["dependencies"]) <= RUNTIME_DEPENDENCIES


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    """The wheel, built from a copy: a build in the checkout would leave a build/ behind."""
    if int(importlib.metadata.version("setuptools").split(".")[0]) < 77:
        pytest.skip("needs setuptools 77: pip install '.[test]'")
    copy = tmp_path_factory.mktemp("source")
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, copy)
    for package in PACKAGES:
        shutil.copytree(ROOT / package, copy / package, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", "dist", "."]
    subprocess.run(command, cwd=copy, check=True, capture_output=True)
    with zipfile.ZipFile(next((copy / "dist").glob("*.whl"))) as archive:
        yield archive


def files_of(folder: Path) -> set[str]:
    return {name(path) for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts}


def installed(path: Path) -> str:
    """Where a file of the repository lies in site-packages: engines/base.py => hyperrt/engines/base.py."""
    return name(path) if name(path).startswith("hyperrt/") else f"hyperrt/{name(path)}"


def test_the_wheel_holds_every_module(wheel):
    assert {installed(path) for path in python_files(*PACKAGES)} <= set(wheel.namelist())


def test_the_wheel_holds_the_default_bundle(wheel):
    bundles = files_of(ROOT / "hyperrt" / "bundles")
    assert "hyperrt/bundles/tiny/bundle.json" in bundles
    assert bundles <= set(wheel.namelist())


def test_the_wheel_holds_the_licence_and_the_command(wheel):
    members = wheel.namelist()
    assert any(member.endswith("licenses/LICENSE") for member in members)
    entry_points = next(member for member in members if member.endswith("entry_points.txt"))
    assert "hyperrt = hyperrt.cli:main" in wheel.read(entry_points).decode()


def test_the_wheel_installs_one_name(wheel):
    """`engines`, `training` and `export` are names that others install, too (open_clip_torch 2.19.0)."""
    assert {member.split("/")[0] for member in wheel.namelist() if "dist-info" not in member} == {"hyperrt"}


def test_the_wheel_holds_no_tests_and_is_small(wheel):
    assert not [member for member in wheel.namelist() if "test" in member]
    assert Path(wheel.filename).stat().st_size <= WHEEL_MB * 1e6
