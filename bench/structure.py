"""Measures the structure of the source code, without running it.

Over engines/, hyperrt/, training/ and export/ with all their folders, and README.md:

    hyperrt_rooms_at_the_top   files and folders directly in hyperrt/ that git tracks
    import_circles             groups of modules, and of rooms, that all import one another, also indirectly.
                               The rooms of a folder are the files and folders directly in it
    longest_file               lines
    longest_function           lines, from `def` to its end
    readme_lines               lines
    untyped_public_options     parameters of public functions that a type checker cannot check

Imports: every import statement counts, also those inside functions and under TYPE_CHECKING, without which a
name cannot stand in an annotation. `from package import name` leads to the module `package.name` if that
exists, else to the package's `__init__`. `import_module("...")` does not count: commands use it for packages
that may not be installed.

Public: a function of a module or a method of a class, with no leading underscore in its name, its class's or
its module's, and a class's `__init__` and `__call__`. A backend's `open` is public: `engines.open` hands it
the user's options. Of an overloaded function the overloads are what a caller sees. The command line
(`hyperrt/cli`, `cli.py`, click commands) is not public: a shell calls it, and click checks the options.

An option is a parameter that a caller may omit, by a default or `**options`. It is untyped if it is
annotated as `Any`; `**options` also as `object`, but not as `Unpack[...]`. A parameter without an annotation
counts even if it is required. One with a leading underscore does not count: the function ignores it.
"""

from __future__ import annotations

import ast
import subprocess
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path

import report

PACKAGES = ("engines", "hyperrt", "training", "export")
BARS = {
    "hyperrt_rooms_at_the_top": "<= 17",
    "import_circles": "0",
    "longest_file": "<= 400",
    "longest_function": "<= 60",
    "readme_lines": "<= 170",
    "untyped_public_options": "0",
}
ANY = {"Any", "typing.Any"}
Function = ast.FunctionDef | ast.AsyncFunctionDef
Graph = Mapping[str, set[str]]


def main() -> None:
    report.options(__doc__).parse_args()
    root = report.ROOT
    trees = parsed(root)
    circles = all_circles(imports(trees))
    files = {path: len((root / path).read_text(encoding="utf-8").splitlines()) for path in trees}
    functions = {
        f"{path}:{f.lineno} {f.name}": f.end_lineno - f.lineno + 1 for path, f in all_functions(trees)
    }
    untyped = [f"{path}:{line}" for path, tree in trees.items() for line in untyped_options(path, tree)]
    report.table([(circle,) for circle in circles], ("circles of imports",))
    report.table(longest(files), ("longest files", "lines"))
    report.table(longest(functions), ("longest functions", "lines"))
    report.table([(option,) for option in untyped], ("untyped public options",))
    figures = {
        "hyperrt_rooms_at_the_top": len(tracked_at_the_top(root, "hyperrt")),
        "import_circles": len(circles),
        "longest_file": max(files.values()),
        "longest_function": max(functions.values()),
        "readme_lines": len((root / "README.md").read_text(encoding="utf-8").splitlines()),
        "untyped_public_options": len(untyped),
    }
    report.finish(__file__, figures, BARS)


def parsed(root: Path) -> dict[str, ast.Module]:
    """Every module of the packages by its path from the root, such as "hyperrt/errors.py"."""
    paths = [path for package in PACKAGES for path in sorted((root / package).rglob("*.py"))]
    return {
        path.relative_to(root).as_posix(): ast.parse(path.read_text(encoding="utf-8"), str(path))
        for path in paths
    }


def tracked_at_the_top(root: Path, folder: str) -> set[str]:
    """Names of the files and folders directly in a folder that git tracks."""
    command = ["git", "ls-files", "-z", folder]
    listing = subprocess.run(command, cwd=root, stdout=subprocess.PIPE, text=True, check=True).stdout
    return {Path(path).parts[1] for path in listing.split("\0") if path}


def longest(lines: Mapping[str, int], count: int = 5) -> list[tuple[str, int]]:
    return sorted(lines.items(), key=lambda item: -item[1])[:count]


def all_functions(trees: Mapping[str, ast.Module]) -> Iterator[tuple[str, Function]]:
    """Every function with the path of its module, methods and nested functions included."""
    for path, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, Function):
                yield path, node


def module_name(path: str) -> str:
    """The name that a module is imported by: "engines/base.py" -> "hyperrt.engines.base"."""
    name = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    return name if name.split(".")[0] == "hyperrt" else f"hyperrt.{name}"


def imports(trees: Mapping[str, ast.Module]) -> dict[str, set[str]]:
    """For every module the paths of the modules that its import statements name."""
    paths = {module_name(path): path for path in trees}
    graph: dict[str, set[str]] = {}
    for path, tree in trees.items():
        names = {name for node in ast.walk(tree) for name in imported(node, paths)}
        graph[path] = {paths[name] for name in names if name in paths}
    return graph


def imported(node: ast.AST, paths: Mapping[str, str]) -> list[str]:
    """The modules that an import statement names; [] for another node."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        modules = [f"{node.module}.{alias.name}" for alias in node.names]
        return [module if module in paths else str(node.module) for module in modules]
    return []


def all_circles(graph: Graph) -> list[str]:
    """Circles of modules, and of rooms with a folder among them; each as "a -> b -> a"."""
    lines = [" -> ".join(circle) for circle in circles(graph)]
    for rooms in rooms_by_folder(graph).values():
        for circle in circles(rooms):
            if not all(room.endswith(".py") for room in circle):
                examples = [import_between(graph, *pair) for pair in pairwise(circle)]
                lines.append(f"{' -> '.join(circle)} ({', '.join(examples)})")
    return lines


def import_between(graph: Graph, room: str, imported_room: str) -> str:
    """One of the imports by which a room imports another."""
    return next(
        f"{path} -> {target}"
        for path, targets in sorted(graph.items())
        for target in sorted(targets)
        if f"{path}/".startswith(f"{room}/") and f"{target}/".startswith(f"{imported_room}/")
    )


def rooms_by_folder(graph: Graph) -> dict[str, dict[str, set[str]]]:
    """For every folder, "" being the root, which of its rooms import which others."""
    folders: dict[str, dict[str, set[str]]] = {}
    for path, targets in graph.items():
        for target in targets - {path}:
            folder, room, imported_room = rooms_between(path, target)
            rooms = folders.setdefault(folder, {})
            rooms.setdefault(room, set()).add(imported_room)
            rooms.setdefault(imported_room, set())
    return folders


def rooms_between(path: str, target: str) -> tuple[str, str, str]:
    """The deepest folder that holds both files, and the two rooms of it that they are in."""
    pairs = list(zip(path.split("/"), target.split("/"), strict=False))
    depth = next(k for k, (one, another) in enumerate(pairs) if one != another)
    folder, rooms = [part for part, _ in pairs[:depth]], pairs[depth]
    return ("/".join(folder), *("/".join([*folder, room]) for room in rooms))


def circles(graph: Graph) -> Iterator[list[str]]:
    """A shortest circle of each group of nodes that all reach one another: [a, b, a]."""
    reach = {node: reachable(graph, node) for node in graph}
    visited: set[str] = set()
    for node in sorted(graph):
        if node in reach[node] and node not in visited:
            group = {member for member in reach[node] if node in reach[member]}
            visited |= group
            yield min((way_back(graph, member) for member in sorted(group)), key=len)


def reachable(graph: Graph, start: str) -> set[str]:
    """Every node that edges lead to from `start`; `start` only if it is in a circle."""
    nodes: set[str] = set()
    waiting = [start]
    while waiting:
        targets = graph[waiting.pop()] - nodes
        nodes |= targets
        waiting += targets
    return nodes


def way_back(graph: Graph, start: str) -> list[str]:
    """The shortest path from a node of a circle back to it, breadth first."""
    ways = [[start]]
    visited: set[str] = set()
    for way in ways:  # the loop appends to `ways`
        if start in graph[way[-1]]:
            return [*way, start]
        ways += [[*way, target] for target in sorted(graph[way[-1]] - visited)]
        visited |= graph[way[-1]]
    raise ValueError(f"{start} is in no circle")


def untyped_options(path: str, tree: ast.Module) -> Iterator[str]:
    """Line, function and parameter of every untyped option of a module's public functions."""
    for name, function in [] if is_private(path) else public_functions(tree.body, ""):
        for parameter in untyped_parameters(function, is_method="." in name):
            yield f"{function.lineno} {name}({parameter})"


def is_private(path: str) -> bool:
    """Whether a module's name has a leading underscore, or it belongs to the command line."""
    names = path.removesuffix(".py").removesuffix("/__init__").split("/")
    return any(name == "cli" or name.startswith(("_", "cli_")) for name in names)


def public_functions(body: list[ast.stmt], prefix: str) -> Iterator[tuple[str, Function]]:
    """The public functions and methods of a module or class, as callers see them, with dotted names."""
    functions = [node for node in body if isinstance(node, Function)]
    overloaded = {node.name for node in functions if decorated(node, "overload")}
    for node in functions:
        hidden = node.name.startswith("_") and node.name not in ("__init__", "__call__")
        implements = node.name in overloaded and not decorated(node, "overload")
        if not (hidden or implements or decorated(node, "command", "group")):
            yield prefix + node.name, node
    for node in body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from public_functions(node.body, f"{prefix}{node.name}.")


def decorated(node: Function, *names: str) -> bool:
    """Whether a decorator has one of these names, of `@click.command()` the last part: "command"."""
    decorators = [mark.func if isinstance(mark, ast.Call) else mark for mark in node.decorator_list]
    return any(ast.unparse(decorator).rsplit(".", 1)[-1] in names for decorator in decorators)


def untyped_parameters(function: Function, is_method: bool) -> Iterator[str]:
    """The parameters without annotation, and the untyped ones among those that may be left out."""
    every = function.args
    positional = [*every.posonlyargs, *every.args]
    named = zip(every.kwonlyargs, every.kw_defaults, strict=True)
    options = {*positional[len(positional) - len(every.defaults) :], every.kwarg}
    options |= {argument for argument, default in named if default is not None}
    if is_method and not decorated(function, "staticmethod"):
        positional = positional[1:]  # without self or cls
    for argument in [*positional, *every.kwonlyargs, every.vararg, every.kwarg]:
        if argument is None or argument.arg.startswith("_"):
            continue
        annotation = ast.unparse(argument.annotation) if argument.annotation else ""
        untyped = {*ANY, "object"} if argument is every.kwarg else ANY
        if not annotation or (argument in options and annotation.removesuffix(" | None") in untyped):
            yield {every.vararg: "*", every.kwarg: "**"}.get(argument, "") + argument.arg


if __name__ == "__main__":
    main()
