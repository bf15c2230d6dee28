"""What may import what, and what no file may contain. Read from the source, so lazy imports count too.

engines < hyperrt < training < export        each may use only what stands to its left
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LAYERS = ("engines", "hyperrt", "training", "export")  # folders; installed as hyperrt.engines, hyperrt, ...
RUNTIME = ("engines", "hyperrt")
HEAVY = {"torch", "torchvision", "diffusers", "transformers", "peft", "accelerate", "onnx", "onnxscript"}
VENDORS = {"onnxruntime", "openvino", "tensorrt", "tensorrt_rtx", "pycuda", "cuda", "cupy"}
SLOW_TO_IMPORT = {"PIL", "tokenizers", "safetensors", "rich"}
UNSAFE = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "jsonpickle", "marshal", "shelve"}
# Functions that run what they are given: by their whole names, and those that do whatever stands before them.
RUNS_CODE = {
    "eval", "exec", "builtins.eval", "builtins.exec", "os.system", "os.popen", "os.spawnl", "pty.spawn",
    "code.interact", "runpy.run_path", "asyncio.create_subprocess_shell",
}  # fmt: skip
ALSO_RUNS_CODE = {"getoutput", "getstatusoutput", "read_pickle", "unsafe_load", "load_state_dict_from_url"}
TEXT = {".py", ".md", ".toml", ".txt", ".json", ".yml", ".yaml", ".cfg", ".csv", ".sh", ""}
MACHINE_PATH = re.compile(r"(?<![\w.\-/])/(?:home|root|Users|work|opt)/\w|[A-Z]:\\\\?Users")


def sources(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def each(*folders: str) -> pytest.MarkDecorator:
    """Parametrise `path` over the Python files of these folders, with readable ids."""
    return pytest.mark.parametrize("path", sources(*folders), ids=name)


def nodes(path: Path, at_import: bool = False) -> Iterator[ast.AST]:
    """Every node of a file; with `at_import` only those that run when the module is imported."""
    waiting: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"), str(path))]
    while waiting:
        node = waiting.pop()
        yield node
        if at_import and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if at_import and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            waiting.extend(node.orelse)
            continue
        waiting.extend(ast.iter_child_nodes(node))


def imports(path: Path, at_import: bool = False) -> set[str]:
    """What a file imports with an import statement, as layers of ours and names of other packages."""
    found = set()
    for node in nodes(path, at_import):
        if isinstance(node, ast.Import):
            found |= {part_of(alias.name) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute"
            found |= {part_of(f"{node.module}.{alias.name}") for alias in node.names}
    return found


def part_of(module: str) -> str:
    """A module of ours => its layer, as the folder is called; another's => its package."""
    package, _, rest = module.partition(".")
    inside = rest.partition(".")[0]
    return inside if package == "hyperrt" and inside in LAYERS else package


def imports_by_name(path: Path) -> set[str]:
    """The same of what a file loads with `import_module("…")` or `__import__("…")`, f-strings too."""
    found = set()
    for node in nodes(path):
        if isinstance(node, ast.Call) and called(node) in {"import_module", "__import__"} and node.args:
            found.add(part_of(ast.unparse(node.args[0]).lstrip("f").strip("\"'")))
    return found


def called(node: ast.Call) -> str:
    """Last part of the name of what is called: `importlib.import_module(…)` => "import_module"."""
    return ast.unparse(node.func).rsplit(".", 1)[-1]


def lines(found: list[ast.AST]) -> list[int]:
    return sorted(node.lineno for node in found)


def loaded_after(code: str, wanted: set[str]) -> set[str]:
    """Which of `wanted` are in sys.modules of a new process that ran `code`."""
    report = f"\nimport sys\nprint(*{wanted!r} & {{name.split('.')[0] for name in sys.modules}})"
    env = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1"}
    result = subprocess.run(
        [sys.executable, "-c", code + report], cwd=ROOT, env=env, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return set(result.stdout.split())


@each(*LAYERS)
def test_a_layer_imports_only_layers_to_its_left(path):
    layer = path.relative_to(ROOT).parts[0]
    to_its_right = set(LAYERS[LAYERS.index(layer) + 1 :])
    assert not to_its_right & imports(path)


@each(*RUNTIME)
def test_the_runtime_names_no_training_framework_not_even_lazily(path):
    assert not HEAVY & (imports(path) | imports_by_name(path))


@each(*RUNTIME)
def test_only_commands_reach_to_the_right_and_only_by_name(path):
    allowed = set(LAYERS[2:]) if is_command_line(path) else set()
    assert not (set(LAYERS[2:]) - allowed) & imports_by_name(path)


@each("hyperrt")
def test_vendor_runtimes_are_the_business_of_engines(path):
    assert not VENDORS & (imports(path) | imports_by_name(path))


@each("engines")
def test_a_vendor_runtime_is_imported_by_its_own_backend_alone(path):
    """engines/onnxruntime.py may import onnxruntime: `engines.open` loads that file when it is asked for."""
    assert not (VENDORS - {path.stem}) & imports(path, at_import=True)


@pytest.mark.parametrize("layer", RUNTIME)
def test_importing_every_module_of_the_runtime_loads_nothing_heavy(layer):
    backends = VENDORS | {"__main__"}
    paths = [path.relative_to(ROOT).with_suffix("") for path in sources(layer) if path.stem not in backends]
    modules = [".".join(path.parts).removesuffix(".__init__") for path in paths]
    modules = [module if layer == "hyperrt" else f"hyperrt.{module}" for module in modules]
    code = f"import importlib\nfor module in {modules!r}: importlib.import_module(module)"
    assert modules
    assert loaded_after(code, HEAVY | VENDORS) == set()


@pytest.mark.parametrize("module", ["hyperrt", "hyperrt.cli.main"])
def test_what_help_needs_does_not_load_what_pictures_need(module):
    assert loaded_after(f"import {module}", SLOW_TO_IMPORT | HEAVY | VENDORS) == set()


# As in the Makefile.
RUNTIME_TESTS = [*sources("tests/engines", "tests/hyperrt"), *sorted((ROOT / "tests").glob("*.py"))]


@pytest.mark.parametrize("path", RUNTIME_TESTS, ids=name)
def test_the_tests_of_the_runtime_start_without_a_training_framework(path):
    if path.name.startswith("test_") or path.name == "conftest.py":
        assert not HEAVY & imports(path, at_import=True), 'write: torch = pytest.importorskip("torch")'


TESTS_OF_SEVERAL_MODULES = {
    "tests/export/test_lora_elsewhere.py": "hyperrt/lora against diffusers and PEFT",
    "tests/export/test_peft_config.py": "hyperrt/lora/peft_config.py against PEFT",
    "tests/export/test_small_models.py": "export, runtime and command line",
    "tests/export/test_small_models_loop.py": "the same, against diffusers' loop",
    "tests/export/test_subject_elsewhere.py": "subject files of the runtime in diffusers and PEFT",
}


def test_a_test_file_is_named_for_a_module_of_its_folder():
    paths = [path for layer in LAYERS for path in sources(f"tests/{layer}") if path.name.startswith("test_")]
    assert paths
    others = {name(path) for path in paths if not modules_of_test(path)}
    assert others == TESTS_OF_SEVERAL_MODULES.keys()


def modules_of_test(path: Path) -> list[Path]:
    """Of tests/hyperrt/lora/test_layout_foreign.py: hyperrt/lora/layout.py."""
    words = path.stem.split("_")[1:]
    folder = ROOT / path.parent.relative_to(ROOT / "tests")
    modules = [folder / ("_".join(words[: k + 1]) + ".py") for k in range(len(words))]
    return [module for module in modules if module.is_file()]


@each(*LAYERS, "bench")
def test_nothing_that_is_loaded_can_run_code(path):
    bad = [node for node in nodes(path) if runs_code(node)]
    assert not UNSAFE & (imports(path) | imports_by_name(path))
    assert not bad, lines(bad)


def runs_code(node: ast.AST) -> bool:
    """A call that trusts what it loads or hands text to an interpreter, or the import of such a function."""
    if isinstance(node, ast.ImportFrom):  # under its bare name the call would not be seen
        names = {(node.module, alias.name) for alias in node.names}
        functions = RUNS_CODE | {"torch.load", "torch.hub"}
        return any(f"{module}.{name}" in functions or name in ALSO_RUNS_CODE for module, name in names)
    if not isinstance(node, ast.Call):
        return False
    function = ast.unparse(node.func)
    given = {keyword.arg: getattr(keyword.value, "value", None) for keyword in node.keywords}
    trusts = any(given.get(key, False) is not False for key in ("allow_pickle", "trust_remote_code", "shell"))
    unpickles = function == "torch.load" and given.get("weights_only") is not True
    known = function in RUNS_CODE or called(node) in ALSO_RUNS_CODE or function.startswith("torch.hub.")
    return trusts or unpickles or known


@pytest.mark.parametrize(
    "code",
    [
        "eval(text)", "builtins.exec(text)", "os.system(text)", "os.popen(text)", "sub.getoutput(text)",
        "from subprocess import getstatusoutput", "from os import popen", "run(text, shell=True)",
        "torch.load(file)", "torch.load(file, weights_only=False)", "from torch import load as read",
        "torch.hub.load(name)", "pandas.read_pickle(file)", "numpy.load(file, allow_pickle=True)",
        "from_pretrained(name, trust_remote_code=yes)", "yaml.unsafe_load(file)",
    ],
)  # fmt: skip
def test_the_search_sees_each_way_to_run_code(code):
    assert any(runs_code(node) for node in ast.walk(ast.parse(code)))


@pytest.mark.parametrize("code", ["model.eval()", "torch.load(file, weights_only=True)", "run(words)"])
def test_the_search_lets_other_code_pass(code):
    assert not any(runs_code(node) for node in ast.walk(ast.parse(code)))


def is_command_line(path: Path) -> bool:
    return path.name == "__main__.py" or name(path).startswith("hyperrt/cli")


@each("engines", "hyperrt", "export")
def test_a_user_never_meets_an_assertion(path):
    bad = [node for node in nodes(path) if isinstance(node, ast.Assert)]
    assert not bad, lines(bad)


@each(*LAYERS)
def test_libraries_do_not_print(path):
    bad = [node for node in nodes(path) if isinstance(node, ast.Call) and ast.unparse(node.func) == "print"]
    assert not bad or is_command_line(path), lines(bad)


@each(*RUNTIME, "export")
def test_only_the_command_line_ends_the_process(path):
    exits = {"exit", "sys.exit", "os._exit", "quit", "SystemExit"}
    bad = [node for node in nodes(path) if isinstance(node, ast.Call) and ast.unparse(node.func) in exits]
    assert not bad or is_command_line(path), lines(bad)


def text_files() -> list[Path]:
    """Files that belong to the project: those that git tracks or would track; without git, all of them."""
    command = ["git", "ls-files", "-z", "-co", "--exclude-standard"]
    listing = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if listing.returncode == 0:
        files = [ROOT / entry for entry in listing.stdout.split("\0") if entry]
    else:
        folders = (*LAYERS, "tests", "docs", "bench", "examples")
        files = [path for folder in folders for path in (ROOT / folder).rglob("*")]
    return [path for path in files if path.is_file() and path.suffix in TEXT]


def test_no_file_names_a_place_on_somebodys_machine():
    found = []
    for path in text_files():
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
            if MACHINE_PATH.search(line):
                found.append(f"{name(path)}:{number}: {line.strip()[:100]}")
    assert not found, "\n".join(found)


def test_nothing_is_left_for_later():
    marks = re.compile(r"\b(?:TO" + r"DO|FIX" + r"ME|XX" + r"X)\b")
    found = [
        f"{name(path)}: {match.group()}"
        for path in sources(*LAYERS, "tests", "bench")
        for match in marks.finditer(path.read_text(encoding="utf-8"))
    ]
    assert not found


@each(*LAYERS)
def test_libraries_log_under_one_name(path):
    calls = [node for node in nodes(path) if isinstance(node, ast.Call)]
    loggers = {ast.unparse(node.args[0]) for node in calls if called(node) == "getLogger"}
    others = {"'PIL'", "name"}  # loggers of packages, which are silenced (export/onnx_graph.py has a list)
    assert loggers <= {"'hyperrt'", "'hyperrt.training'"} | others
    root = {f"logging.{level}" for level in ("debug", "info", "warning", "error", "exception", "critical")}
    assert not [node.lineno for node in calls if ast.unparse(node.func) in root]


CLOCK = re.compile(r"perf_counter|monotonic|process_time|time\.time\b|\b(seconds|elapsed)\b")


@each("tests")
def test_no_assertion_looks_at_a_clock(path):
    bad = [node for node in nodes(path) if isinstance(node, ast.Assert) and CLOCK.search(ast.unparse(node))]
    assert not bad, lines(bad)
