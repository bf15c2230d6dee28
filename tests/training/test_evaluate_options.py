"""The options of hyperrt evaluate, without an evaluation."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from hyperrt.training import evaluate


class Started(Exception):
    """Carries the settings of an evaluation that was about to start."""


@pytest.mark.parametrize(
    ("former", "current"),
    [
        (["tiny", "--images-per-prompt", 3], ["tiny", "-n", 3]),
        (["tiny", "--guidance", 2.5], ["tiny", "--guidance-scale", 2.5]),
        (["tiny", "--batch", 7], ["tiny", "--batch-size", 7]),
        (["tiny", "--judges", "folder"], ["tiny", "--encoders", "folder"]),
        (["--pictures", "."], ["--score", "."]),
    ],
)
def test_former_options_mean_the_same_and_are_not_in_the_help(monkeypatch, former, current):
    def start(config):
        raise Started(config)

    monkeypatch.setattr(evaluate, "run", start)
    configs = []
    for options in (former, current):
        words = ["--protocol", "drawn", "--output", "out", *map(str, options)]
        with pytest.raises(Started) as started:
            CliRunner().invoke(evaluate.main, words, catch_exceptions=False)
        configs.append(started.value.args[0])
    assert configs[0] == configs[1]
    assert configs[0] != evaluate.EvaluateConfig(protocol="drawn", output=Path("out"), bundle="tiny")
    text = CliRunner().invoke(evaluate.main, ["--help"]).output
    assert "--score" in text
    assert not re.search(r"--(images-per-prompt|guidance|batch|judges)\s", text)
