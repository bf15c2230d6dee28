"""The README is run: its blocks from top to bottom in an empty folder, its tree and links against the disk.

A comment on the line before a block says how it is treated; without one it is run.

    <!-- ci: NAME -->        a command that .ci/run executes in a fresh environment; here without its pip part
    <!-- not run: why -->    its commands are only compared with their --help
    <!-- folders -->         the annotated folders
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from hyperrt.cli.training import COMMANDS

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
BLOCK = re.compile(r"(?:^<!-- (?P<mark>[^\n]*) -->\n)?^```(?P<language>\w+)\n(?P<code>.*?)^```$", re.M | re.S)
PACKAGES = ("engines", "hyperrt", "training", "export", "bench")


INTERPRETERS = {
    "bash": ["bash", "-euo", "pipefail", "-c"],
    "python": [sys.executable, "-W", "error", "-c"],
}
DOCUMENTS = [str(path.relative_to(ROOT)) for path in sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])]


@dataclass(frozen=True)
class Block:
    """A fenced block of the README: the comment before it, its language and text, and where it starts."""

    mark: str
    language: str
    code: str
    line: int


def blocks() -> list[Block]:
    text = README.read_text(encoding="utf-8")
    return [
        Block(m["mark"] or "", m["language"], m["code"], text.count("\n", 0, m.start("code")))
        for m in BLOCK.finditer(text)
    ]


def marked(mark: str) -> Block:
    return next(block for block in blocks() if block.mark == mark)


def runnable(block: Block) -> str:
    """What is run of a block: nothing, all of it, or what follows `pip install … &&`."""
    if block.language not in INTERPRETERS or block.mark.startswith(("not run", "ci: development")):
        return ""
    return re.sub(r"^pip install [^&]*&& ", "", block.code, flags=re.M)


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> dict[str, str]:
    """This interpreter's environment with `hyperrt` and `python` on the path, installed or not."""
    programs, installed = tmp_path_factory.mktemp("bin"), Path(sys.executable).parent
    env = os.environ | {"PATH": os.pathsep.join([str(programs), str(installed), os.environ["PATH"]])}
    if not shutil.which("hyperrt", path=str(installed)):  # a checkout that nobody installed
        (programs / "hyperrt").write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m hyperrt "$@"\n')
        (programs / "hyperrt").chmod(0o755)
        env["PYTHONPATH"] = str(ROOT)
    return env


def run(command: list[str], folder: Path, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)


def test_the_readme_runs_from_top_to_bottom(environment, tmp_path):
    for name in ("examples", "docs"):
        (tmp_path / name).symlink_to(ROOT / name)
    for block in blocks():
        code = runnable(block)
        if code:
            result = run([*INTERPRETERS[block.language], code], tmp_path, environment)
            assert result.returncode == 0, f"README.md:{block.line}\n{code}\n{result.stdout}\n{result.stderr}"
    assert len(list(tmp_path.glob("*.png"))) >= 2  # the first command's and the first of the use section


def commands(block: Block) -> list[list[str]]:
    """The `hyperrt X` and `python -m X` commands of a bash block, also launched ones, each as its words."""
    lines = re.split(r"\n|&&", block.code.replace("\\\n", " ").replace("accelerate launch", "python"))
    words = [shlex.split(line, comments=True) for line in lines]
    return [w for w in words if w[:1] == ["hyperrt"] or w[:2] == ["python", "-m"]]


NOT_RUN = [words for block in blocks() if block.mark.startswith("not run") for words in commands(block)]


@pytest.mark.parametrize("words", NOT_RUN, ids=shlex.join)
def test_commands_that_are_not_run_use_options_that_exist(words, environment):
    program = words[: 3 if words[0] == "python" else 2]
    if words[0] == "python" or words[1] in COMMANDS:
        pytest.importorskip("torch")
    result = run([*program, "--help"], ROOT, environment)
    assert result.returncode == 0, result.stderr
    missing = {word for word in words if word.startswith("-")} - {"-m"} - options_in(result.stdout)
    assert not missing, f"{shlex.join(program)} has no {missing}"


def options_in(text: str) -> set[str]:
    """The options that a --help names: {"-o", "--output"}."""
    return set(re.findall(r"(?<![\w-])--?[a-zA-Z][\w-]*", text))


def test_every_block_is_run_or_says_why_not():
    fences = [line for line in README.read_text(encoding="utf-8").splitlines() if line.startswith("```")]
    assert len(fences) == 2 * len(blocks()), "a block without a language is not seen by these tests"
    others = [block for block in blocks() if block.language not in INTERPRETERS]
    assert [block.mark for block in others] == ["folders"]
    not_run = [block.mark for block in blocks() if block.mark.startswith("not run")]
    assert all(re.fullmatch(r"not run: \S.*", mark) for mark in not_run), "a block says why it is not run"


WRONG = [("bash", "false | true"), ("bash", "false\ntrue"), ("bash", "hyperrt x"), ("python", "import no")]


@pytest.mark.parametrize(("language", "code"), WRONG)
def test_a_block_that_is_wrong_would_be_noticed(language, code, environment, tmp_path):
    assert run([*INTERPRETERS[language], code], tmp_path, environment).returncode != 0


def test_the_two_commands_of_ci_are_there():
    assert marked("ci: runtime").code.startswith("pip install '.[cpu]' && hyperrt generate ")
    assert marked("ci: development").code == "pip install -e '.[dev]' && make test\n"


def tree() -> list[str]:
    """The paths of the tree in docs/architecture.md, each with a description."""
    paths, folder = [], ""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    block = next(m for m in BLOCK.finditer(text) if m["mark"] == "tree")
    for line in block["code"].splitlines():
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


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document):
    text = (ROOT / document).read_text(encoding="utf-8")
    targets = re.findall(r"\]\((?!https?://|#|mailto:)([^)#\s]+)", text)
    assert not [target for target in targets if not ((ROOT / document).parent / target).exists()]


def figures() -> list[list[str]]:
    """Rows of the README's table of figures, as cells."""
    lines = [line for line in README.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    rows = [line[1:-1].split("|") for line in lines if "bench/" in line]
    return [[cell.strip() for cell in row] for row in rows if len(row) == 4]


def test_every_figure_is_given_and_names_the_script_that_measures_it():
    rows = figures()
    assert rows
    for what, measured, _, command in rows:
        script = ROOT / command.strip("`").split()[1]
        assert script.is_file(), command
        key = re.search(r"`(\w+)`$", what).group(1)
        assert key in script.read_text(encoding="utf-8"), f"{script.name} has no figure {key}"
        assert measured, f"{key} is not filled in"


def test_examples_are_folders_of_four_photos():
    subjects = [path for path in (ROOT / "examples" / "subjects").iterdir() if path.is_dir()]
    assert len(subjects) >= 3
    assert not [path.name for path in subjects if len(list(path.glob("*.png"))) != 4]
