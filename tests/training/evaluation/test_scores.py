from __future__ import annotations

import numpy as np
import pytest

from hyperrt.training.evaluation import scores


def features(count: int, seed: int) -> np.ndarray:
    return scores.unit(np.random.default_rng(seed).standard_normal((count, 7)).astype(np.float32))


def cosine(one: np.ndarray, other: np.ndarray) -> float:
    return sum(float(a) * float(b) for a, b in zip(one, other, strict=True))


def test_a_pictures_score_is_its_mean_cosine_with_all_photos():
    made, real = features(5, 0), features(3, 1)
    plain = [sum(cosine(one, other) for other in real) / 3 for one in made]
    assert scores.mean_cosines(made, real) == pytest.approx(plain)
    assert np.mean(scores.mean_cosines(made, real)) == pytest.approx((made @ real.T).mean())


def test_real_photos_are_compared_with_the_others_or_with_all():
    real = features(4, 2)
    pairs = [(i, j) for i in range(4) for j in range(4)]
    others = [cosine(real[i], real[j]) for i, j in pairs if i != j]
    everything = [cosine(real[i], real[j]) for i, j in pairs]
    assert scores.among_themselves(real, with_self=False) == pytest.approx(sum(others) / 12)
    assert scores.among_themselves(real, with_self=True) == pytest.approx(sum(everything) / 16)


def test_a_single_photo_has_no_other_photo_to_compare_with():
    assert scores.among_themselves(features(1, 3), with_self=False) is None
    assert scores.among_themselves(features(1, 3), with_self=True) == pytest.approx(1)


def test_a_missing_score_does_not_count_in_a_mean():
    rows = [{"a": 1.0, "b": None}, {"a": 2.0, "b": None}, {"a": None, "c": 4.0}]
    assert scores.means(rows) == {"a": 1.5, "b": None, "c": 4.0}
    assert scores.mean([]) is None


def test_the_average_needs_all_of_its_scores():
    assert scores.average({"x": 0.2, "y": 0.4}, ("x", "y")) == {"avg": pytest.approx(0.3)}
    assert scores.average({"x": 0.2, "y": None}, ("x", "y")) == {}
    assert scores.average({"x": 0.2}, ()) == {}


def test_a_figure_is_the_mean_over_subjects_and_not_over_pictures():
    subjects = [
        scores.means([{"dino": 0.0}] * 99),
        scores.means([{"dino": 1.0}]),
        {"dino": None},
    ]
    found = scores.figures(subjects)
    assert found["dino"]["mean"] == 0.5
    assert found["dino"]["subjects"] == 2
    assert found["dino"]["low"] <= 0.5 <= found["dino"]["high"]
    assert scores.figures([{"dino": None}]) == {}
