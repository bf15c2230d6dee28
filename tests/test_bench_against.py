"""Compares two commits: figures in turns, latents bit by bit."""

import argparse
import importlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

BENCH = Path(__file__).resolve().parents[1] / "bench"
# Appends its commit to the file of --log; only the second commit has the figure c_mb.
SCRIPT = """
import json, sys
with open(sys.argv[sys.argv.index("--log") + 1], "a") as log:
    log.write("{name} ")
print("a table")
print(json.dumps({{"commit": "{name}", "figures": {figures}}}))
"""


@pytest.fixture
def against(monkeypatch):
    monkeypatch.syspath_prepend(BENCH)
    return importlib.import_module("against")


@pytest.fixture
def repository(against, monkeypatch, tmp_path):
    """A repository of two commits in place of this one."""
    root = tmp_path / "repository"
    script = root / "bench" / "timed.py"
    script.parent.mkdir(parents=True)
    git(root, "init", "--quiet")
    for name, figures in {"old": {"a_s": 2, "b": 5}, "new": {"a_s": 3, "b": 6, "c_mb": 1}}.items():
        script.write_text(SCRIPT.format(name=name, figures=figures))
        git(root, "add", ".")
        git(root, "-c", "user.name=a", "-c", "user.email=a@b", "commit", "--quiet", "--message", name)
    monkeypatch.setattr(against.report, "ROOT", root)
    return root


def git(root, *words):
    return subprocess.run(["git", *words], cwd=root, check=True, capture_output=True, text=True).stdout


def worktrees(root):
    return git(root, "worktree", "list").splitlines()


def test_both_commits_run_in_turns_and_their_times_are_compared(
    against, repository, monkeypatch, capsys, tmp_path
):
    log = tmp_path / "log"
    monkeypatch.setattr(sys, "argv", ["timed.py", "--log", str(log), "--against", "HEAD~1", "--turns=3"])
    args = argparse.Namespace(against="HEAD~1", turns=3)
    against.finish(str(repository / "bench" / "timed.py"), args, {"b": "< 7"})
    assert log.read_text().split() == ["new", "old", "old", "new", "new", "old"]
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert line["against"] == git(repository, "rev-parse", "--short", "HEAD~1").strip()
    assert line["figures"] == {
        "a_s": 3, "a_s_before": 2, "a_s_ratio": 1.5, "b": 6, "b_before": 5, "c_mb": 1,
    }  # fmt: skip
    assert len(worktrees(repository)) == 1


def test_a_ratio_is_the_median_of_those_within_a_turn(against):
    here, there = [{"a_ms": x} for x in (1, 20, 3)], [{"a_ms": x} for x in (1, 10, 6)]
    assert against.compared(here, there) == {"a_ms": 3, "a_ms_before": 6, "a_ms_ratio": 1}


def test_the_other_commit_s_folder_is_removed_when_the_measurement_fails(against, repository):
    with pytest.raises(ZeroDivisionError), against.worktree("HEAD~1") as before:
        assert "old" in (before / "bench" / "timed.py").read_text()
        raise ZeroDivisionError
    assert not before.exists()
    assert len(worktrees(repository)) == 1


def test_a_commit_that_does_not_exist_ends_the_measurement(against, repository):
    with pytest.raises(SystemExit, match="invalid reference: nothing"), against.worktree("nothing"):
        pass


def test_a_script_that_fails_ends_the_measurement(against, tmp_path):
    with pytest.raises(SystemExit, match="ended with 3"):
        against.run(tmp_path, ["-c", "raise SystemExit(3)"])


def test_python_gets_the_packages_of_that_checkout_and_no_settings(against, monkeypatch, tmp_path):
    for name in ("HYPERRT_BACKEND", "PYTHONPATH", "PYTHONDONTWRITEBYTECODE"):
        monkeypatch.setenv(name, "1")
    code = "import os, sys; print(sys.path[1], *[n for n in os.environ if n.startswith(('HYPER', 'PYTHON'))])"
    assert against.run(tmp_path, ["-c", code]) == f"{tmp_path} PYTHONPATH\n"


@pytest.fixture
def same_latents(against):
    return importlib.import_module("same_latents")


def test_a_bit_that_differs_is_a_change(same_latents):
    old = {name: np.ones((1, 2), np.float32) for name in ("the same", "next", "zero")}
    old["zero"][0, 0] = 0
    new = {name: array.copy() for name, array in old.items()}
    new["next"][0, 0] = np.nextafter(np.float32(1), np.float32(2))
    new["zero"][0, 0] = -0.0
    figures = same_latents.compared((new, new), (old, old))
    assert figures == {
        "requests": 3, "changed": 2, "images_changed": 2, "worst_rel": pytest.approx(2**-23),
    }  # fmt: skip
    assert same_latents.difference(np.ones(2), np.ones(3)) == np.inf


def test_packages_of_another_checkout_are_refused(against, tmp_path):
    pytest.importorskip("onnxruntime")
    requests = importlib.import_module("latent_requests")
    requests.check_origin(BENCH.parent)
    with pytest.raises(SystemExit, match=r"^hyperrt\S* was imported from \S*, not from "):
        requests.check_origin(tmp_path)


def test_every_request_is_one_of_those_that_are_compared(against):
    requests = importlib.import_module("latent_requests")
    assert len(requests.REQUESTS) >= 24
    assert requests.KEPT.items() <= requests.REQUESTS.items()
    solvers = {request.options.get("solver") for request in requests.REQUESTS.values()}
    assert solvers >= set(requests.SOLVERS)
