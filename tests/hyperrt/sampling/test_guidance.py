"""Guidance is an affine sum of branches: arXiv 2511.03156, eq. 20."""

from __future__ import annotations

import numpy as np
import pytest

from hyperrt.errors import UsageError
from hyperrt.sampling.guidance import Branch, active, cfg_weights, combine, hm_cfg_weights

SCALES = (0.0, 0.5, 1.0, 3.5, 7.5)
KAPPAS = (0.0, 0.4, 1.0, 1.6, 2.0)


def predictions(seed=0):
    return np.random.default_rng(seed).standard_normal((3, 2, 4, 8, 8))  # uncond, subject, generic


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("kappa", KAPPAS)
def test_the_weights_add_up_to_one(scale, kappa):
    assert sum(hm_cfg_weights(scale, kappa)) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize(
    ("kappa", "weights"),
    [(0, (-6, 0, 7)), (0.4, (-6, 1.4, 5.6)), (1, (-6, 3.5, 3.5)), (2, (-6, 7, 0))],
)
def test_the_weights_at_scale_3_5_are_those_worked_out_by_hand(kappa, weights):
    assert hm_cfg_weights(3.5, kappa) == pytest.approx(weights)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("kappa", KAPPAS)
def test_the_sum_is_the_papers_equation(scale, kappa):
    uncond, subject, generic = predictions()
    pull_subject, pull_generic = subject - uncond, generic - uncond
    paper = uncond + scale * (kappa * pull_subject + (2 - kappa) * pull_generic)
    np.testing.assert_allclose(combine(hm_cfg_weights(scale, kappa), predictions()), paper, atol=1e-12)


@pytest.mark.parametrize("kappa", KAPPAS)
def test_without_a_lora_it_is_plain_guidance_of_twice_the_scale(kappa):
    uncond, cond, _ = predictions()
    combined = combine(hm_cfg_weights(3.5, kappa), [uncond, cond, cond])
    np.testing.assert_allclose(combined, uncond + 7 * (cond - uncond), atol=1e-12)


@pytest.mark.parametrize("scale", SCALES)
def test_plain_guidance_goes_from_the_empty_prompt_towards_the_subject_s(scale):
    uncond, subject, _ = predictions()
    combined = combine(cfg_weights(scale), [uncond, subject])
    np.testing.assert_allclose(combined, uncond + scale * (subject - uncond), atol=1e-12)


def test_the_sum_commutes_with_a_change_of_prediction_type():
    """v = a noise - s x0 and x = a x0 + s noise, so v is affine in the noise at fixed latents x."""
    x, a, s = predictions(1)[0], 0.6, 0.8
    weights = hm_cfg_weights(3.5, 1.2)

    def velocity(noise):
        return a * noise - s * (x - s * noise) / a

    noises = predictions()
    np.testing.assert_allclose(
        combine(weights, velocity(noises)), velocity(combine(weights, noises)), atol=1e-12
    )


@pytest.mark.parametrize(
    ("scale", "kappa", "names"),
    [
        (3.5, 1, ["uncond", "subject", "generic"]),
        (3.5, 0, ["uncond", "generic"]),
        (3.5, 2, ["uncond", "subject"]),
        (0.5, 1, ["subject", "generic"]),
        (0.5, 2, ["subject"]),
        (0, 1, ["uncond"]),
    ],
)
def test_branches_of_weight_zero_are_dropped(scale, kappa, names):
    branches = map(Branch, ("uncond", "subject", "generic"), hm_cfg_weights(scale, kappa))
    assert [branch.name for branch in active(branches)] == names


@pytest.mark.parametrize("arguments", [(float("nan"), 1), (float("inf"), 1), (3.5, float("nan"))])
def test_weights_that_are_no_numbers_are_refused(arguments):
    with pytest.raises(UsageError, match=r"is (nan|inf)"):
        hm_cfg_weights(*arguments)


def test_a_scale_of_plain_guidance_that_is_no_number_is_refused():
    with pytest.raises(UsageError, match="guidance_scale is nan"):
        cfg_weights(float("nan"))


def test_a_weight_too_many_is_refused():
    with pytest.raises(ValueError, match="shorter"):
        combine([0.5, 0.25, 0.25], predictions()[:2])


def test_torch_and_numpy_agree():
    torch = pytest.importorskip("torch")
    weights = hm_cfg_weights(3.5, 1.2)
    np.testing.assert_allclose(
        combine(weights, torch.from_numpy(predictions())).numpy(), combine(weights, predictions())
    )
