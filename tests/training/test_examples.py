from __future__ import annotations

from pathlib import Path

import numpy as np
from click.testing import CliRunner
from PIL import Image

from hyperrt.training import examples
from hyperrt.training.data import scenes

SHIPPED = Path(__file__).resolve().parents[2] / "examples" / "subjects"


def draw(out, option="--output"):
    result = CliRunner().invoke(examples.main, [option, str(out)])
    assert result.exit_code == 0, result.output
    return {path.relative_to(out): np.asarray(Image.open(path)) for path in sorted(out.rglob("*.png"))}


def test_every_noun_has_its_photos_and_they_are_the_shipped_ones(tmp_path):
    drawn = draw(tmp_path)
    assert {path.parent.name for path in drawn} == set(scenes.NOUNS)
    assert len(drawn) == len(scenes.NOUNS) * len(examples.PLACES)
    shipped = {path.relative_to(SHIPPED): np.asarray(Image.open(path)) for path in SHIPPED.rglob("*.png")}
    assert shipped.keys() == drawn.keys()
    for path, picture in drawn.items():
        assert np.array_equal(picture, shipped[path]), path


def test_the_former_name_of_the_output_works_and_is_not_in_the_help(tmp_path, monkeypatch):
    monkeypatch.setattr(scenes, "NOUNS", scenes.NOUNS[:1])
    assert len(draw(tmp_path, "--out")) == len(examples.PLACES)
    assert "--out " not in CliRunner().invoke(examples.main, ["--help"]).output


def test_existing_photos_are_replaced_only_with_force(tmp_path):
    mine = tmp_path / scenes.NOUNS[0] / "1.png"
    mine.parent.mkdir()
    mine.write_bytes(b"mine")
    result = CliRunner().invoke(examples.main, ["--output", str(tmp_path)])
    assert result.exit_code == 2 and "--force" in result.output
    assert mine.read_bytes() == b"mine"
    assert CliRunner().invoke(examples.main, ["-o", str(tmp_path), "--force"]).exit_code == 0
