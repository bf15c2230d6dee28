"""The report: which tables of the paper it compares with, whether scorers agree, and its commit."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from hyperrt import Runtime
from hyperrt.bundle.bundle import packaged
from hyperrt.training.evaluation import prompt_packs, report, scores
from hyperrt.training.evaluation.drawing import DrawSettings
from hyperrt.training.evaluation.protocols import EvaluationSubject, SubjectList
from hyperrt.training.evaluation.results import SubjectResult
from hyperrt.training.evaluation.settings import EvaluateConfig


def tables_of(protocol: str, **drawn: object) -> list[str]:
    """Numbers of the paper's tables with a row for pictures drawn with these settings."""
    settings = {"drawn_here": True, "cfg": False, "kappa": None} | drawn
    tables = json.loads(report.PAPER.read_text(encoding="utf-8"))["tables"][protocol]
    marked = [table | {"doubt": report._mismatch(table, settings)} for table in tables]
    matching = [table["title"].split()[1].rstrip(",") for table in marked if not table["doubt"]]
    assert bool(report._mismatches(marked)) == (not matching)
    return matching


def test_a_run_has_a_row_in_the_tables_with_its_guidance():
    cfg = {"cfg": True, "guidance": 7.5}
    assert tables_of("afhq", **cfg) == ["2", "9"] and tables_of("faces", **cfg) == ["3", "5"]
    assert tables_of("dreambench", **cfg) == []
    assert tables_of("dreambench", cfg=True, guidance=5.0) == ["4"]
    assert tables_of("dreambench", guidance=3.5, kappa=1.6) == ["10"]
    assert tables_of("afhq", guidance=7.0, kappa=1.2) == ["9"]
    assert tables_of("faces", guidance=6.0, kappa=1.0) == ["5"]
    for other in ({"kappa": 0.0, "guidance": 3.5}, {"kappa": 1.0, "guidance": 5.0}, {"drawn_here": False}):
        assert tables_of("dreambench", **other) == []


def test_the_settings_include_the_bundles_defaults(tmp_path):
    if "tiny" not in packaged():
        pytest.skip("the default bundle is not in this checkout")

    def settings(**options):
        config = EvaluateConfig(
            protocol="dreambench", output=tmp_path, bundle="tiny", drawing=DrawSettings(**options)
        )
        with Runtime.open("tiny") as runtime:
            return report._settings(config, runtime)

    plain, hybrid = settings(cfg=True), settings(kappa=0.4, steps=None)
    default = hybrid["guidance"]
    assert (plain["cfg"], plain["kappa"], plain["guidance"]) == (True, None, 2 * default)
    assert (hybrid["cfg"], hybrid["kappa"], hybrid["steps"] > 0) == (False, 0.4, True)


@pytest.mark.parametrize(("measured", "agrees"), [(0.7741, True), (0.70, False)])
def test_with_all_thirty_subjects_the_scorer_agrees_or_does_not(measured, agrees):
    results = [
        SubjectResult(name, noun, "drawn-v1", ["1.png"], real={"dino": measured, "dino_with_self": 0.9})
        for name, noun in prompt_packs.DREAMBENCH.items()
    ]
    pack = prompt_packs.PACKS["drawn-v1"]
    subjects = [EvaluationSubject(name, noun, pack) for name, noun in prompt_packs.DREAMBENCH.items()]
    config = EvaluateConfig(protocol="dreambench", output=Path("."), bundle="tiny")
    real = scores.figures([result.real for result in results])
    published = {"dino": 0.774, "clip_i": 0.885}
    calibration = report._calibration(config, SubjectList(tuple(subjects)), results, real, published)
    assert calibration["dino"]["agrees"] is agrees and "clip_i" not in calibration
    problems = report._scorer_problems({}, calibration)
    assert problems == ([] if agrees else ["dino of real photos is 0.700, and published is 0.774"])


def git(folder: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=tester", "-c", "user.email=tester@example.org")
    command = ["git", *identity, *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout.strip()


def test_the_commit_is_reported_only_if_git_tracks_our_file(tmp_path):
    source = tmp_path / "venv" / "report.py"
    source.parent.mkdir()
    source.write_text("")
    assert report.commit(source) == ""
    git(tmp_path, "init")
    git(tmp_path, "commit", "--allow-empty", "-m", "of another project")
    assert report.commit(source) == ""
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "ours")
    head = git(tmp_path, "rev-parse", "--short", "HEAD")
    assert report.commit(source) == head
    source.write_text("changed")
    assert report.commit(source) == f"{head}-dirty"
