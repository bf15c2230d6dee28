"""The documents are run: the blocks of each from top to bottom, in an empty folder with the examples.

tests/documents.py says how a block is marked that is treated in another way.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hyperrt.cli.training import COMMANDS
from tests.documents import DOCUMENTS, ROOT, Block, blocks, marked, text_of

INTERPRETERS = {
    "bash": ["bash", "-euo", "pipefail", "-c"],
    "python": [sys.executable, "-W", "error", "-c"],
}
GROUPS = ("lora", "plans")  # commands that have subcommands
ANNOTATED = ("folders", "tree", "rooms")  # compared with the disk: tests/test_architecture.py


def runnable(block: Block) -> str:
    """What is run of a block: nothing, all of it, or what follows `pip install … &&`."""
    if block.language not in INTERPRETERS or block.mark.startswith(("not run", "ci: development")):
        return ""
    return re.sub(r"^pip install [^&]*&& ", "", block.code, flags=re.M)


RUN = [document for document in DOCUMENTS if any(map(runnable, blocks(document)))]


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


@pytest.mark.slow
@pytest.mark.parametrize("document", RUN)
def test_a_document_runs_from_top_to_bottom(document, environment, tmp_path):
    for name in ("examples", "docs"):
        (tmp_path / name).symlink_to(ROOT / name)
    for block in blocks(document):
        code = runnable(block)
        if code:
            result = run([*INTERPRETERS[block.language], code], tmp_path, environment)
            printed = f"{result.stdout}\n{result.stderr}"
            assert result.returncode == 0, f"{document}:{block.line}\n{code}\n{printed}"
    assert len(list(tmp_path.glob("*.png"))) >= 2


def commands(block: Block) -> list[list[str]]:
    """The `hyperrt X`, `python -m X` and `python bench/X.py` commands of a bash block, also launched ones."""
    lines = re.split(r"\n|&&", block.code.replace("\\\n", " ").replace("accelerate launch", "python"))
    words = [shlex.split(line, comments=True) for line in lines]
    return [w for w in words if w[:1] == ["hyperrt"] or w[:2] == ["python", "-m"] or is_script(w)]


def is_script(words: list[str]) -> bool:
    return len(words) > 1 and words[0] == "python" and words[1].endswith(".py")


def program_of(words: list[str]) -> tuple[str, ...]:
    """The part of a command before its arguments: hyperrt lora convert, python -m hyperrt.training.train."""
    return tuple(words[: 3 if words[:2] == ["python", "-m"] or words[1] in GROUPS else 2])


def commands_not_run() -> dict[tuple[str, ...], set[str]]:
    """Options of the commands that are not run, by program."""
    options: dict[tuple[str, ...], set[str]] = {}
    for document in DOCUMENTS:
        for block in blocks(document):
            for words in commands(block) if block.mark.startswith("not run") else ():
                program = program_of(words)
                arguments = words[len(program) :]
                options.setdefault(program, set()).update(word for word in arguments if word.startswith("-"))
    return options


NOT_RUN = [pytest.param(*item, id=" ".join(item[0])) for item in commands_not_run().items()]


@pytest.mark.parametrize(("program", "options"), NOT_RUN)
def test_commands_that_are_not_run_use_options_that_exist(program, options, environment):
    if program[0] == "python" or program[1] in COMMANDS:
        pytest.importorskip("torch")
    result = run([*program, "--help"], ROOT, environment)
    assert result.returncode == 0, result.stderr
    missing = options - options_in(result.stdout)
    assert not missing, f"{shlex.join(program)} has no {missing}"


def options_in(text: str) -> set[str]:
    """The options that a --help names: {"-o", "--output"}."""
    return set(re.findall(r"(?<![\w-])--?[a-zA-Z][\w-]*", text))


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_block_is_run_or_says_why_not(document):
    fences = [line for line in text_of(document).splitlines() if line.startswith("```")]
    assert len(fences) == 2 * len(blocks(document)), "a block without a language is not seen by these tests"
    others = [block.mark for block in blocks(document) if block.language not in INTERPRETERS]
    assert set(others) <= set(ANNOTATED)
    not_run = [block.mark for block in blocks(document) if block.mark.startswith("not run")]
    assert all(re.fullmatch(r"not run: \S.*", mark) for mark in not_run), "a block says why it is not run"


WRONG = [("bash", "false | true"), ("bash", "false\ntrue"), ("bash", "hyperrt x"), ("python", "import no")]


@pytest.mark.parametrize(("language", "code"), WRONG)
def test_a_block_that_is_wrong_would_be_noticed(language, code, environment, tmp_path):
    assert run([*INTERPRETERS[language], code], tmp_path, environment).returncode != 0


def test_the_two_commands_of_ci_are_in_the_readme():
    assert marked("README.md", "ci: runtime").code.startswith("pip install '.[cpu]' && hyperrt generate ")
    assert marked("README.md", "ci: development").code == "pip install -e '.[dev]' && make test\n"


def test_examples_are_folders_of_four_photos():
    subjects = [path for path in (ROOT / "examples" / "subjects").iterdir() if path.is_dir()]
    assert len(subjects) >= 3
    assert not [path.name for path in subjects if len(list(path.glob("*.png"))) != 4]
