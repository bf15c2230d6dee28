"""Pairs of a prompt and a subject in one call: each is drawn as it would be alone."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from hyperrt.bundle.bundle import Bundle
from hyperrt.errors import BadPrompt, LoraMismatch, UsageError
from hyperrt.runtime import Runtime
from hyperrt.sampling.guidance import Branch
from hyperrt.sampling.options import SamplingOptions
from hyperrt.sampling.recipe import options_of
from hyperrt.sampling.request import blank_subject, noun_in, resolve
from tests.hyperrt import fake_bundle

PROMPT = "a [V] robot on the beach"
PROMPTS = [PROMPT, "a [V] mug in snow", "a red cat"]


@pytest.fixture(params=["plain", "sdxl", "open"])
def runtime(request, tmp_path):
    fake_bundle.register()
    kind = request.param
    folder = fake_bundle.write(tmp_path / kind, sdxl=kind != "plain", open_category=kind == "open")
    with Runtime.open(folder, "fake") as runtime:
        yield runtime


@pytest.fixture
def subjects(runtime, photos):
    grey = [np.full((40, 40, 3), 120, np.uint8)]
    return [runtime.personalize(photos), runtime.personalize(grey, "mug"), None]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"n": 3, "batch_size": 2, "seed": 7},
        {"kappa": 2.0},
        {"guidance_scale": 0.5},
        {"solver": "euler_ancestral", "n": 2, "batch_size": 2},
        {"strength": 0.5, "negative_prompt": "blurry"},
        {"cfg": True},
        {"cfg": True, "guidance_scale": 5.0, "strength": 0.5},
    ],
    ids=str,
)
def test_each_pair_is_drawn_as_it_is_alone(runtime, subjects, options):
    together = runtime.generate(PROMPTS, subjects, **options)
    assert len(together) == 3
    for result, prompt, subject in zip(together, PROMPTS, subjects, strict=True):
        own = options if subject else without_subject(options, runtime.bundle.defaults.guidance_scale)
        alone = runtime.generate(prompt, subject, **own)
        np.testing.assert_allclose(result.latents, alone.latents, rtol=2e-4, atol=2e-5)
        assert np.abs(result.images.astype(int) - alone.images).max() <= 1
        assert result.recipe == alone.recipe and result.seeds == alone.seeds


def without_subject(options, usual):
    """Options that draw the base model as these do beside subjects: its CFG is of twice the scale."""
    own = {name: value for name, value in options.items() if name not in ("kappa", "cfg")}
    return own | {"guidance_scale": options.get("guidance_scale", 2 * usual) / 2} if "cfg" in options else own


def test_the_rows_of_all_pairs_share_one_call_of_a_step(runtime, subjects):
    fake_bundle.calls.clear()
    runtime.generate(PROMPTS, subjects, steps=4, n=2, batch_size=2)
    counts = [fake_bundle.calls.count(name) for name in ("text_encoder", "context", "denoiser")]
    assert counts == [1, 1, 4]


def test_each_row_holds_the_lora_of_its_subject(runtime, subjects):
    seen = {}

    def spy(tensors):
        seen.update(tensors)
        return fake_bundle.GRAPHS["denoiser"](tensors)

    fake_bundle.register(denoiser=spy)
    runtime.generate(PROMPTS, subjects, n=2, batch_size=2)
    own = [0 * subjects[0].lora["lora_q"] if one is None else one.lora["lora_q"] for one in subjects]
    np.testing.assert_array_equal(seen["lora_q"], np.tile(np.repeat(own, 2, axis=0), (3, 1)))
    np.testing.assert_array_equal(seen["gate"], [0] * 6 + [1, 1, 1, 1, 0, 0] + [0] * 6)


def test_one_subject_with_many_prompts_is_uploaded_once(runtime, subjects):
    runtime.generate([PROMPT, "a [V] robot in snow", "a robot"], [subjects[0], subjects[0], None])
    resident = runtime._graphs.engine("denoiser")._resident
    assert resident["lora_q"].shape[0] == 1


def test_a_list_of_one_gives_a_list_of_one_with_the_same_bits(runtime, subjects):
    [result] = runtime.generate([PROMPT], [subjects[0]])
    np.testing.assert_array_equal(result.latents, runtime.generate(PROMPT, subjects[0]).latents)


def test_steps_shows_the_latents_of_all_pairs(runtime, subjects):
    steps = runtime.sample(runtime.request(PROMPTS, subjects, n=2, batch_size=2))
    assert next(steps).latents.shape == (6, 4, 4, 4)


def test_after_pairs_a_single_subject_gives_its_own_bits_again(runtime, subjects):
    before = runtime.generate(PROMPT, subjects[0]).latents
    runtime.generate(PROMPTS, subjects)
    np.testing.assert_array_equal(runtime.generate(PROMPT, subjects[0]).latents, before)


@pytest.mark.parametrize(
    ("prompts", "count", "words"),
    [
        ([PROMPT], 2, "there are 1 prompts and 2 subjects"),
        ([], 0, "there are 0 prompts and 0 subjects"),
        (PROMPT, 1, "do not go together"),
    ],
    ids=["lengths", "empty", "one prompt and a list"],
)
def test_pairs_that_do_not_match_are_refused(runtime, subjects, prompts, count, words):
    with pytest.raises(UsageError, match=words):
        runtime.request(prompts, subjects[:count])


def test_a_list_of_prompts_needs_a_list_of_subjects(runtime, subjects):
    for one in (None, subjects[0]):
        with pytest.raises(UsageError, match="do not go together"):
            runtime.request([PROMPT], one)


def test_one_bad_pair_refuses_all(runtime, subjects):
    with pytest.raises(BadPrompt):
        runtime.request(["a robot", PROMPT], subjects[:2])


# plain CFG


def test_plain_guidance_is_of_the_personalised_model_on_both_rows(runtime, subjects):
    """The same bits as eq. 20 at kappa 2 and half the scale, with the LoRA on the row of the empty prompt."""
    more = {"image_scale": 0.0} if runtime.bundle.image_prompt else {}
    found = runtime.generate(PROMPT, subjects[0], cfg=True, guidance_scale=5.0, **more)
    hybrid = {"kappa": 2.0, "guidance_scale": 2.5, **more}
    request = runtime.request(PROMPT, subjects[0], **hybrid)
    names = ("subject_uncond", "subject")
    branches = tuple(map(Branch, names, request.weights))
    *_, last = runtime.sample(dataclasses.replace(request, branches=branches))
    np.testing.assert_array_equal(found.latents, last.latents)
    assert (found.latents != runtime.generate(PROMPT, subjects[0], **hybrid).latents).any()
    assert [row.gate for row in runtime.request(PROMPT, subjects[0], cfg=True).rows] == [1, 1]


def test_plain_guidance_has_by_default_the_scale_that_pulls_as_the_bundle_s(runtime, subjects):
    usual = runtime.bundle.defaults.guidance_scale
    default, strong, alone = (
        runtime.request(PROMPT, subjects[0], cfg=True, guidance_scale=scale) for scale in (None, 7.5, 1)
    )
    np.testing.assert_allclose(default.weights, [1 - 2 * usual, 2 * usual])
    np.testing.assert_allclose(strong.weights, [-6.5, 7.5])
    assert [row.text for row in alone.rows] == ["a sks robot on the beach"]


def test_a_negative_prompt_takes_the_place_of_the_empty_one(runtime, subjects):
    request = runtime.request(PROMPT, subjects[0], cfg=True, negative_prompt="blurry")
    assert [row.text for row in request.rows] == ["blurry", "a sks robot on the beach"]


def test_the_recipe_of_plain_guidance_reproduces_the_picture(runtime, subjects):
    result = runtime.generate(PROMPT, subjects[0], cfg=True)
    again = options_of(json.loads(json.dumps(result.recipe)))
    np.testing.assert_array_equal(runtime.generate(subject=subjects[0], **again).images, result.images)
    assert "cfg" not in runtime.generate(PROMPT, subjects[0]).recipe


def test_plain_guidance_without_a_subject_or_with_kappa_is_refused(runtime, subjects):
    for subject, options, words in (
        (None, {}, "cfg is on, but there is no subject"),
        (subjects[0], {"kappa": 1.0}, "cfg is on, but kappa is 1"),
    ):
        with pytest.raises(UsageError, match=words) as caught:
            runtime.request(PROMPT, subject, cfg=True, **options)
        assert len(str(caught.value).splitlines()) == 3


def test_a_recipe_draws_each_pair_again(runtime, subjects):
    options = {"strength": 0.5, "negative_prompt": "blurry", "kappa": 0.4, "seed": 7, "steps": 3}
    for prompt, subject in zip(PROMPTS, subjects, strict=True):
        result = runtime.generate(prompt, subject, **(options if subject else {**options, "kappa": None}))
        again = runtime.generate(subject=subject, **options_of(result.recipe))
        np.testing.assert_array_equal(again.images, result.images)
        assert again.recipe == result.recipe


# options that change nothing, and what is refused before photos are read


def test_kappa_without_a_subject_is_refused_and_with_one_pair_that_has_one_is_not(runtime, subjects):
    with pytest.raises(UsageError, match=r"kappa is 0\.4, but there is no subject"):
        runtime.request("a robot", kappa=0.4)
    runtime.request("a robot", kappa=0)
    runtime.request(["a robot", PROMPT], [None, subjects[0]], kappa=0.4)


def test_with_a_blank_subject_a_request_is_refused_before_photos_are_read(runtime):
    def resolved(prompt, has_subject, **options):
        subject = blank_subject(runtime.bundle) if has_subject else None
        return resolve(runtime.bundle, "fake", [prompt], [subject], SamplingOptions(**options))

    assert not resolved(PROMPT, True).warnings
    for prompt, has_subject, options, kind in (
        ("a robot", True, {}, BadPrompt),
        ("", False, {}, BadPrompt),
        ("a robot", False, {"kappa": 1}, UsageError),
        (PROMPT, True, {"negative_prompt": "a [V]"}, BadPrompt),
        (PROMPT, True, {"steps": 2000}, UsageError),
    ):
        with pytest.raises(kind):
            resolved(prompt, has_subject, **options)


def test_image_tokens_that_do_not_fit_are_refused(runtime, subjects):
    odd = dataclasses.replace(subjects[0], image_tokens=np.zeros((1, 3, 3), np.float32))
    with pytest.raises(LoraMismatch, match="image tokens"):
        runtime.request(PROMPT, odd)


@pytest.mark.parametrize(
    ("prompt", "noun"),
    [
        ("a [V] mug on a robot", "mug"),
        ("a [v] Cat.", "cat"),
        ("a [V] on the beach", None),
        ("a mug", None),
        ("[V]", None),
    ],
)
def test_the_noun_after_the_placeholder_is_found(pretend, prompt, noun):
    assert noun_in(prompt, Bundle.open(pretend)) == noun
