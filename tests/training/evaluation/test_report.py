"""What a report says of its figures: beside which tables of the paper they stand, if scorers agree."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hyperrt import Runtime
from hyperrt.bundle.bundle import packaged
from hyperrt.training.evaluate import EvaluateConfig
from hyperrt.training.evaluation import prompt_packs, report, scores
from hyperrt.training.evaluation.drawing import Drawing
from hyperrt.training.evaluation.protocols import EvaluationSubject, SubjectList


def tables_of(protocol: str, **drawn: object) -> list[str]:
    """Numbers of the paper's tables in which pictures drawn so have a row."""
    settings = {"drawn_here": True, "cfg": False, "kappa": None} | drawn
    tables = json.loads(report.PAPER.read_text(encoding="utf-8"))["tables"][protocol]
    doubts = [report._doubt_of(table, settings) for table in tables]
    kept = [table["title"].split()[1] for table, doubt in zip(tables, doubts, strict=True) if not doubt]
    found = [table | {"doubt": doubt} for table, doubt in zip(tables, doubts, strict=True)]
    assert bool(report._doubts_of_tables(found)) == (not kept)
    return [title.rstrip(",") for title in kept]


def test_a_run_has_a_row_in_the_tables_that_were_drawn_as_it_was():
    cfg = {"cfg": True, "guidance": 7.5}
    assert tables_of("afhq", **cfg) == ["2", "9"] and tables_of("faces", **cfg) == ["3", "5"]
    assert tables_of("dreambench", **cfg) == []
    assert tables_of("dreambench", cfg=True, guidance=5.0) == ["4"]
    assert tables_of("dreambench", guidance=3.5, kappa=1.6) == ["10"]
    assert tables_of("afhq", guidance=7.0, kappa=1.2) == ["9"]
    assert tables_of("faces", guidance=6.0, kappa=1.0) == ["5"]
    for other in ({"kappa": 0.0, "guidance": 3.5}, {"kappa": 1.0, "guidance": 5.0}, {"drawn_here": False}):
        assert tables_of("dreambench", **other) == []


def test_the_settings_are_those_that_a_recipe_has(tmp_path):
    if "tiny" not in packaged():
        pytest.skip("the default bundle is not in this checkout")

    def settings(**options):
        config = EvaluateConfig(
            protocol="dreambench", output=tmp_path, bundle="tiny", drawing=Drawing(**options)
        )
        with Runtime.open("tiny") as runtime:
            return report._settings(config, runtime)

    plain, hybrid = settings(cfg=True), settings(kappa=0.4, steps=None)
    usual = hybrid["guidance"]
    assert (plain["cfg"], plain["kappa"], plain["guidance"]) == (True, None, 2 * usual)
    assert (hybrid["cfg"], hybrid["kappa"], hybrid["steps"] > 0) == (False, 0.4, True)


@pytest.mark.parametrize(("measured", "agrees"), [(0.7741, True), (0.70, False)])
def test_on_all_thirty_subjects_the_scorer_agrees_or_does_not(measured, agrees):
    rows = [
        {"name": name, "photos": ["1.png"], "real": {"dino": measured, "dino_with_self": 0.9}}
        for name in prompt_packs.DREAMBENCH
    ]
    pack = prompt_packs.PACKS["drawn-v1"]
    entries = [EvaluationSubject(name, noun, pack) for name, noun in prompt_packs.DREAMBENCH.items()]
    listing = SubjectList(tuple(entries))
    config = EvaluateConfig(protocol="dreambench", output=Path("."), bundle="tiny")
    real = scores.figures([row["real"] for row in rows])
    published = {"dino": 0.774, "clip_i": 0.885}
    found = report._calibration(config, listing, rows, real, published)
    assert found["dino"]["agrees"] is agrees and "clip_i" not in found
    doubts = report._doubts_of_scorers({}, found)
    assert doubts == ([] if agrees else ["dino of real photos is 0.700, and published is 0.774"])
