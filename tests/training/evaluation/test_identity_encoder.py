from __future__ import annotations

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from hyperrt.errors import IntegrityError, UsageError
from hyperrt.training.data import scenes
from hyperrt.training.evaluation import drawn, drawn_scorers, identity_encoder, prompt_packs
from hyperrt.training.evaluation.protocols import EvaluationSubject
from hyperrt.training.run import contrastive
from hyperrt.training.run.optimizer import Schedule

SCHEDULE = Schedule(steps=12, lr=3e-3, warmup=2, ema=0.8, report_every=6)


@pytest.fixture(scope="module", autouse=True)
def small():
    """Settings for a training of seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(identity_encoder, "SCHEDULE", SCHEDULE)
        patch.setattr(identity_encoder, "SUBJECTS", 40)
        patch.setattr(identity_encoder, "WIDTHS", (8, 16, 16))
        patch.setattr(identity_encoder, "BATCH", 16)
        patch.setattr(contrastive, "VALIDATION", 8)
        patch.setattr(drawn, "PHOTO_SIZE", 64)  # drawn sixteen times as fast
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a trained encoder."""
    path = tmp_path_factory.mktemp("encoders")
    identity_encoder.trained(path)
    return path


@pytest.fixture(scope="module")
def subjects():
    cases = drawn.cases_of(0, per_noun=1)
    return [
        EvaluationSubject(case.noun, case.noun, prompt_packs.PACKS["drawn-v1"], case=case) for case in cases
    ]


def test_it_is_trained_once_and_then_read(folder, monkeypatch):
    first, about = identity_encoder.trained(folder)
    monkeypatch.setattr(identity_encoder, "_train", lambda place: pytest.fail("trained again"))
    again, same = identity_encoder.trained(folder)
    assert about == same and 0 <= about["held_out_top1"] <= 1
    pixels = torch.zeros(1, 3, 64, 64)
    assert torch.equal(first(pixels).last_hidden_state, again(pixels).last_hidden_state)
    assert {path.name for path in (folder / identity_encoder.key()).iterdir()} == {
        identity_encoder.WEIGHTS,
        identity_encoder.ABOUT,
    }


def test_the_key_depends_on_settings_and_drawings(monkeypatch):
    key = identity_encoder.key()
    assert identity_encoder.key() == key
    with monkeypatch.context() as patch:
        patch.setattr(identity_encoder, "BATCH", 17)
        assert identity_encoder.key() != key
    with monkeypatch.context() as patch:
        patch.setattr(scenes, "INK", (0, 0, 0))
        assert identity_encoder.key() != key


def test_the_splits_of_subjects_do_not_overlap():
    assert len(set(scenes.SPLIT_SEEDS.values())) == len(scenes.SPLIT_SEEDS)
    assert identity_encoder.SPLIT not in ("train", "test", "example")


def test_damaged_weights_are_refused(folder, tmp_path):
    path = tmp_path / identity_encoder.key()
    path.mkdir()
    for name in (identity_encoder.WEIGHTS, identity_encoder.ABOUT):
        (path / name).write_bytes((folder / path.name / name).read_bytes()[:-9])
    with pytest.raises(IntegrityError, match="is damaged"):
        identity_encoder.trained(tmp_path)


@pytest.mark.parametrize("option", ["--output", "-o", "--out"])
def test_the_command_prints_the_accuracy(folder, option):
    result = CliRunner().invoke(identity_encoder.main, [option, str(folder)])
    assert result.exit_code == 0 and "held_out_top1" in result.stdout


def test_a_picture_of_any_size_becomes_a_unit_vector(folder, subjects):
    encoder, _ = identity_encoder.trained(folder)
    picture = subjects[0].case.view(drawn.WHITE, 0, 128)
    large, small = encoder.features(picture), encoder.features(picture[::2, ::2])
    assert np.linalg.norm(large) == pytest.approx(1)
    assert large @ small > 0.9


def test_identity_equals_the_nearest_candidate_of_a_plain_loop(folder, subjects):
    scorer = drawn_scorers.IdentityScorer(folder)
    encoder, _ = identity_encoder.trained(folder)
    case = subjects[0].case
    references = []
    for k, candidate in enumerate(case.candidates):
        views = [encoder.features(drawn.view(candidate, drawn.WHITE, [k, 2, v])) for v in range(drawn.VIEWS)]
        references.append(np.mean(views, axis=0) / np.linalg.norm(np.mean(views, axis=0)))
    pictures = [case.view(place, 3) for place in scenes.BACKGROUNDS[:4]]
    columns = scorer.score(subjects[0], [], pictures, [0, 1, 2, 3])
    for picture, right, similar in zip(
        pictures, columns["identity"], columns["identity_similarity"], strict=True
    ):
        cosines = [encoder.features(picture) @ reference for reference in references]
        assert right == float(np.argmax(cosines) == case.place)
        assert similar == pytest.approx(cosines[case.place])
    assert set(scorer.real(subjects[0], [])) == {"identity", "identity_similarity"}


def test_colours_are_scored_on_white_only_and_scenes_everywhere(subjects):
    white = scenes.BACKGROUNDS.index(drawn.WHITE)
    beach = 0
    colours, background = drawn_scorers.ColourScorer(), drawn_scorers.BackgroundScorer(subjects)
    pictures = [subjects[0].case.view(scenes.BACKGROUNDS[number], 9) for number in (white, beach, beach)]
    assert colours.score(subjects[0], [], pictures, [white, beach, white])["identity_hist"][:2] == [1.0, None]
    assert background.score(subjects[0], [], pictures, [white, beach, white])["background"] == [1.0, 1.0, 0.0]
    assert colours.real(subjects[0], []) == {"identity_hist": 1.0}
    assert background.real(subjects[0], [])["background"] > 0.9


def test_a_subject_from_photos_has_no_candidates():
    subject = EvaluationSubject("can", "can", prompt_packs.PACKS["dreambench-objects"])
    with pytest.raises(UsageError, match="no candidates"):
        drawn_scorers.ColourScorer().score(subject, [], [], [])
