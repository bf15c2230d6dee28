"""docs/architecture.md is compared with the disk: its tree, its index, and the six hops of a request."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tests.documents import ROOT, marked, table_rows, text_of

DOCUMENT = "docs/architecture.md"
PACKAGES = ("engines", "hyperrt", "training", "export", "bench")
HOPS = re.compile(r"^`[\w.]+`(?: → `[\w.]+`){5}$", re.M)
# A file in an index, and the names that it defines: `hyperrt/text.py` (`advice`, `shown`)
ENTRY = re.compile(r"`([\w./]+(?:\.py|/))`(?: \(([^()]*`[^()]*)\))?")
INDEX = [row for row in table_rows(DOCUMENT) if len(row) == 3 and "`tests/" in row[2]]


def tree() -> list[str]:
    """The paths of the tree, each with a description."""
    paths, folder = [], ""
    for line in marked(DOCUMENT, "tree").code.splitlines():
        name, _ = line.split(maxsplit=1)
        if not line.startswith(" "):
            folder = name
        paths.append(name if name == folder else folder + name)
    return paths


def test_the_tree_names_every_module_once_and_nothing_else():
    on_disk = {
        path.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
        if not path.name.startswith("__")
    }
    described = [path for path in tree() if path.endswith(".py")]
    assert not on_disk - set(described), "add to the tree"
    assert not set(described) - on_disk, "gone from the disk"
    assert len(described) == len(on_disk), "named twice"


def test_the_tree_has_no_folder_that_is_not_there():
    assert not [path for path in tree() if path.endswith("/") and not (ROOT / path).is_dir()]


def test_the_folders_of_the_readme_are_those_of_the_tree():
    lines = marked(DOCUMENT, "tree").code.splitlines()
    folders = [line for line in lines if re.match(r"\S+/ ", line)]
    assert marked("README.md", "folders").code.splitlines() == folders


def test_the_index_has_some_thirty_changes():
    assert len(INDEX) >= 30


@pytest.mark.parametrize("row", INDEX, ids=lambda row: row[0])
def test_a_row_of_the_index_names_files_and_definitions_that_exist(row):
    entries = [entry for cell in row[1:] for entry in ENTRY.findall(cell)]
    assert entries
    for path, names in entries:
        assert (ROOT / path).exists(), path
        for name in re.findall(r"`(\w+)`", names):
            source = (ROOT / path).read_text(encoding="utf-8")
            assert re.search(rf"^ *(?:def|class) {name}\b|^{name}\b.*=", source, re.M), (path, name)


def rooms() -> list[set[str]]:
    """The rooms and files of hyperrt/ as module names, line by line."""
    lines = marked(DOCUMENT, "rooms").code.splitlines()
    return [set(re.findall(r"(\w+)(?:/|\.py)(?!\S)", line)) for line in lines]


def room_of(path: Path) -> str:
    return path.relative_to(ROOT / "hyperrt").parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    """Rooms and files of hyperrt/ that a file imports: hyperrt.lora.layout => "lora"."""
    modules = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules += [f"{node.module}.{alias.name}" for alias in node.names]
    return {module.split(".")[1] for module in modules if module.startswith("hyperrt.")} - {room_of(path)}


ROOMS = rooms()
IN_ROOMS = [path for path in sorted((ROOT / "hyperrt").rglob("*.py")) if room_of(path) in set().union(*ROOMS)]


def test_the_rooms_are_all_of_hyperrt():
    names = {room_of(path) for path in (ROOT / "hyperrt").rglob("*.py")} - {"__init__", "__main__"}
    assert names == set().union(*ROOMS)


@pytest.mark.parametrize("path", IN_ROOMS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_room_imports_only_rooms_below_it(path):
    line = next(k for k, names in enumerate(ROOMS) if room_of(path) in names)
    assert not imported_rooms(path) & set().union(*ROOMS[: line + 1])


def test_the_hops_of_the_readme_are_those_of_the_architecture():
    [hops] = HOPS.findall(text_of("README.md"))
    assert HOPS.findall(text_of(DOCUMENT)) == [hops]
