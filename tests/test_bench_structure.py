"""bench/structure.py finds what it counts, in a small tree of sources."""

import importlib
import subprocess
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[1] / "bench"


@pytest.fixture
def structure(monkeypatch):
    monkeypatch.syspath_prepend(BENCH)
    return importlib.import_module("structure")


@pytest.fixture
def write(tmp_path, structure):
    """write({path: source}): the parsed modules of a tree with these files."""

    def write(sources):
        for path, source in sources.items():
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_text(source)
        return structure.parsed(tmp_path)

    return write


def circles(structure, trees):
    return structure.all_circles(structure.imports(trees))


def test_a_circle_of_modules_is_found_inside_functions_and_under_type_checking(structure, write):
    trees = write(
        {
            "training/a.py": "import hyperrt.training.b",
            "training/b.py": "def f():\n    from hyperrt.training import c",
            "training/c.py": "if TYPE_CHECKING:\n    from hyperrt.training.a import A",
            "training/d.py": "from hyperrt.training.a import A\nimport numpy",
        }
    )
    assert circles(structure, trees) == ["training/a.py -> training/b.py -> training/c.py -> training/a.py"]


def test_a_circle_of_rooms_is_found_where_no_module_is_in_one(structure, write):
    trees = write(
        {
            "hyperrt/lora/a.py": "from hyperrt.plans.b import B",
            "hyperrt/lora/c.py": "",
            "hyperrt/lora_names.py": "from hyperrt.lora import c",
            "hyperrt/plans/b.py": "",
            "hyperrt/plans/d.py": "from hyperrt.lora.c import C",
        }
    )
    assert circles(structure, trees) == [
        "hyperrt/lora -> hyperrt/plans -> hyperrt/lora "
        "(hyperrt/lora/a.py -> hyperrt/plans/b.py, hyperrt/plans/d.py -> hyperrt/lora/c.py)"
    ]


def test_packages_and_their_own_init_are_rooms_like_others(structure, write):
    trees = write(
        {
            "engines/base.py": "import hyperrt.errors",
            "hyperrt/__init__.py": "from hyperrt.errors import E",
            "hyperrt/errors.py": "from hyperrt import __version__, engines",
            "engines/__init__.py": "",
        }
    )
    assert circles(structure, trees) == [
        "hyperrt/__init__.py -> hyperrt/errors.py -> hyperrt/__init__.py",
        "engines -> hyperrt -> engines "
        "(engines/base.py -> hyperrt/errors.py, hyperrt/errors.py -> engines/__init__.py)",
    ]


OPTIONS = """
def f(a: int, b, c: Any, *d: int, e: Any = 1, g: Any | None = None, h: int = 2, _i=0, **j: object): ...
def typed(x: int = 1, **options: Unpack[Options]) -> None: ...
def _hidden(x, **options): ...
@click.command()
def command(**options: Any): ...
class A:
    def __init__(self, x): ...
    def _hidden(self, x): ...
    @staticmethod
    def of(x): ...
    @overload
    def g(self, x: int, **more: Any): ...
    @overload
    def g(self, x: str): ...
    def g(self, x: Any = 0, y: Any = 0): ...
class _B:
    def __init__(self, x): ...
"""


def test_untyped_options_of_public_functions_are_named(structure, write):
    trees = write(dict.fromkeys(("export/a.py", "export/_a.py", "hyperrt/cli/a.py"), OPTIONS))
    options = [
        option.split(" ")[1]
        for path, tree in trees.items()
        for option in structure.untyped_options(path, tree)
    ]
    expected = ["f(b)", "f(e)", "f(g)", "f(**j)", "A.__init__(x)", "A.of(x)", "A.g(**more)"]
    assert sorted(options) == sorted(expected)


def test_functions_are_measured_with_methods_and_those_inside_others(structure, write):
    source = "class A:\n    def f(self):\n        def g():\n            pass\n\n        return g\n"
    functions = structure.all_functions(write({"hyperrt/a.py": source}))
    assert {f.name: f.end_lineno - f.lineno + 1 for _, f in functions} == {"f": 5, "g": 2}


def test_only_what_git_tracks_is_a_room(structure, write, tmp_path):
    write({"hyperrt/a.py": "", "hyperrt/lora/b.py": "", "hyperrt/lora/c.py": "", "hyperrt/new.py": ""})
    for words in (["init", "--quiet"], ["add", "hyperrt/a.py", "hyperrt/lora"]):
        subprocess.run(["git", *words], cwd=tmp_path, check=True, capture_output=True)
    assert structure.tracked_at_the_top(tmp_path, "hyperrt") == {"a.py", "lora"}
