"""What rows are told: two text encoders, pooled text, time ids, image tokens; where a model has them."""

from __future__ import annotations

import dataclasses
import json
import logging

import numpy as np
import pytest

from hyperrt.errors import NumericError
from hyperrt.runtime import Runtime
from tests.hyperrt import fake_bundle

PROMPT = "a [V] robot on the beach"
L, PAD_2 = fake_bundle.L, fake_bundle.PAD_2


def spy(graph):
    """What the graph was given when it last ran."""
    seen = {}

    def watched(tensors):
        seen.update(tensors)
        return fake_bundle.GRAPHS[graph](tensors)

    fake_bundle.register(**{graph: watched})
    return seen


@pytest.fixture
def sdxl(tmp_path):
    fake_bundle.register()
    with Runtime.open(fake_bundle.write(tmp_path / "sdxl", sdxl=True), "fake") as runtime:
        yield runtime


@pytest.fixture
def open_category(tmp_path):
    fake_bundle.register()
    folder = fake_bundle.write(tmp_path / "open", sdxl=True, open_category=True)
    with Runtime.open(folder, "fake") as runtime:
        yield runtime


# two text encoders


def test_the_second_text_encoder_has_its_own_padding(sdxl):
    seen = spy("text_encoder")
    sdxl.generate("a robot", steps=1)
    ends = [np.flatnonzero(row == 1)[0] for row in seen["input_ids"]]
    for first, second, end in zip(seen["input_ids"], seen["input_ids_2"], ends, strict=True):
        np.testing.assert_array_equal(second[: end + 1], first[: end + 1])
        assert set(first[end + 1 :]) <= {1} and set(second[end + 1 :]) <= {PAD_2}
    assert seen["input_ids_2"].dtype == np.int64 and (seen["input_ids_2"] == PAD_2).any()


def test_token_0_may_be_the_padding_of_the_second_text_encoder(tmp_path):
    fake_bundle.register()
    folder = fake_bundle.write(tmp_path / "b", sdxl=True)
    manifest = json.loads((folder / "bundle.json").read_text())
    manifest["prompts"]["pad_2"] = 0
    (folder / "bundle.json").write_text(json.dumps(manifest))
    with Runtime.open(folder, "fake") as runtime:
        seen = spy("text_encoder")
        runtime.generate("a robot", steps=1)
    assert (seen["input_ids_2"][:, -1] == 0).all()


def test_the_only_text_encoder_may_have_a_padding_of_its_own(tmp_path):
    fake_bundle.register()
    folder = fake_bundle.write(tmp_path / "b")
    manifest = json.loads((folder / "bundle.json").read_text())
    manifest["prompts"]["pad"] = PAD_2
    (folder / "bundle.json").write_text(json.dumps(manifest))
    with Runtime.open(folder, "fake") as runtime:
        seen = spy("text_encoder")
        runtime.generate("a robot", steps=1)
    assert (seen["input_ids"][:, -1] == PAD_2).all()


def test_a_prompt_that_is_too_long_is_cut_the_same_for_both_and_said_once(sdxl, caplog):
    seen = spy("text_encoder")
    with caplog.at_level(logging.WARNING, "hyperrt"):
        sdxl.generate("a red robot on the beach in snow", steps=1)
    np.testing.assert_array_equal(seen["input_ids"][1], seen["input_ids_2"][1])
    assert [message for message in caplog.messages if "prompt cut to 8 tokens; dropped: 'in snow'" in message]
    assert len(caplog.messages) == 1


def test_the_empty_prompt_is_zeros_and_a_negative_one_is_not(sdxl):
    seen = spy("context")
    sdxl.generate("a robot", steps=1)
    assert not seen["hidden_states"][0].any() and not seen["pooled"][0].any()
    assert seen["hidden_states"][1].any() and seen["pooled"][1].any()
    sdxl.generate("a robot", steps=1, negative_prompt="blurry")
    assert seen["hidden_states"][0].any() and seen["pooled"][0].any()


def test_a_bundle_that_does_not_ask_for_it_encodes_the_empty_prompt(pretend):
    with Runtime.open(pretend, "fake") as runtime:
        seen = spy("context")
        runtime.generate("a robot", steps=1)
    assert seen["hidden_states"][0].any() and set(seen) == {"hidden_states", "gate", "lora_kv"}


def test_every_row_has_the_time_ids_of_the_picture(sdxl, photos):
    seen = spy("context")
    sdxl.generate(PROMPT, sdxl.personalize(photos), steps=1)
    side = fake_bundle.IMAGE
    np.testing.assert_array_equal(seen["time_ids"], [[side, side, 0, 0, side, side]] * 3)
    assert seen["time_ids"].dtype == np.float32


def test_what_is_added_to_the_time_embedding_reaches_every_image_of_its_branch(sdxl):
    told = spy("context")
    seen = spy("denoiser")
    sdxl.generate("a robot", steps=1, n=2, batch_size=2)
    assert seen["added"].shape == (4, fake_bundle.E)
    np.testing.assert_array_equal(seen["added"][0], seen["added"][1])
    assert not np.array_equal(seen["added"][0], seen["added"][2]) and told == {}


@pytest.mark.parametrize("solver", ["euler", "euler_ancestral"])
def test_a_model_of_few_steps_runs_two_rows_from_the_last_timestep(tmp_path, photos, solver):
    fake_bundle.register()
    defaults = {"solver": solver, "steps": 1, "guidance_scale": 0.5, "kappa": 1.0}
    folder = fake_bundle.write(tmp_path / "turbo", sdxl=True, timestep_spacing="trailing", defaults=defaults)
    with Runtime.open(folder, "fake") as runtime:
        seen = spy("denoiser")
        runtime.generate(PROMPT, runtime.personalize(photos))
    np.testing.assert_allclose(seen["guidance"], [0.5, 0.5])
    assert seen["timestep"] == 999 and seen["gate"].tolist() == [1, 0]


# image tokens


def test_the_image_tokens_of_a_subject_are_the_mean_over_its_photos(open_category, photos):
    alone = [open_category.personalize(path) for path in sorted(photos.iterdir())]
    together = open_category.personalize(photos)
    assert together.image_tokens.shape == (1, fake_bundle.TOKENS, fake_bundle.WIDTH)
    mean = np.mean([one.image_tokens for one in alone], axis=0)
    np.testing.assert_allclose(together.image_tokens, mean, rtol=1e-6)


def test_only_the_rows_of_the_subject_have_image_tokens(open_category, photos):
    subject = open_category.personalize(photos)
    seen = spy("context")
    result = open_category.generate(PROMPT, subject, steps=1)
    np.testing.assert_allclose(seen["image_scale"], [0, 0.55, 0])
    np.testing.assert_array_equal(seen["image_tokens"][1], subject.image_tokens[0])
    assert result.recipe["image_scale"] == 0.55
    assert open_category.generate(PROMPT, subject, steps=1, image_scale=1.5).recipe["image_scale"] == 1.5
    np.testing.assert_allclose(seen["image_scale"], [0, 1.5, 0])


def test_a_subject_without_image_tokens_has_image_scale_0(open_category, photos):
    subject = dataclasses.replace(open_category.personalize(photos), image_tokens=None)
    rows = open_category.request(PROMPT, subject).rows
    assert [row.gate for row in rows] == [0, 1, 0] and [row.image_scale for row in rows] == [0, 0, 0]


def test_beside_the_empty_prompt_of_plain_guidance_are_the_tokens_of_no_photo(open_category, photos):
    subject = open_category.personalize(photos)
    seen = spy("context")
    open_category.generate(PROMPT, subject, steps=1, cfg=True)
    np.testing.assert_allclose(seen["image_scale"], [0.55, 0.55])
    of_nothing = fake_bundle.GRAPHS["image_prompt"]({"features": np.ones((1, 2, 3))})["zero_tokens"]
    np.testing.assert_array_equal(seen["image_tokens"], np.concatenate([of_nothing, subject.image_tokens]))
    assert "image_prompt" not in open_category.open_graphs


def test_the_image_scale_changes_the_picture_and_zero_leaves_the_lora_alone(open_category, photos):
    subject = open_category.personalize(photos)
    lora_alone = dataclasses.replace(subject, image_tokens=None)
    zero, without, full = (
        open_category.generate(PROMPT, one, image_scale=scale).latents
        for one, scale in ((subject, 0), (lora_alone, None), (subject, 1))
    )
    np.testing.assert_array_equal(zero, without)
    assert not np.array_equal(zero, full)


def test_without_a_subject_an_open_bundle_draws_what_the_base_model_draws(open_category, sdxl):
    ours, plain = (one.generate("a robot") for one in (open_category, sdxl))
    np.testing.assert_array_equal(ours.latents, plain.latents)
    assert "image_scale" not in ours.recipe


def test_after_a_subject_whose_keys_are_not_numbers_the_one_before_is_right(pretend, photos):
    """Keys and values are written where the denoiser reads them: half of another subject's must not stay."""
    with Runtime.open(pretend, "fake") as runtime:
        subject = runtime.personalize(photos)
        expected = runtime.generate(PROMPT, subject).latents
        lora = {**subject.lora, "lora_kv": subject.lora["lora_kv"] * np.inf}
        broken = dataclasses.replace(subject, lora=lora)
        with pytest.raises(NumericError, match="what the prompt says"), np.errstate(invalid="ignore"):
            runtime.generate(PROMPT, broken)
        np.testing.assert_array_equal(runtime.generate(PROMPT, subject).latents, expected)


def test_at_strength_0_another_subject_brings_its_own_image_tokens(open_category, photos):
    grey = [np.full((40, 40, 3), 200, np.uint8)]
    subjects = [open_category.personalize(images) for images in (photos, grey, photos)]
    first, second, again = (
        open_category.generate(PROMPT, subject, strength=0, image_scale=1, steps=1).latents
        for subject in subjects
    )
    assert not np.array_equal(first, second)
    np.testing.assert_array_equal(again, first)
