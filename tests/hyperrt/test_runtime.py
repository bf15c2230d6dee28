from __future__ import annotations

import dataclasses
import json
import threading

import numpy as np
import pytest

from hyperrt import engines
from hyperrt.errors import BadPrompt, LoraMismatch, NumericError, UsageError
from hyperrt.runtime import Runtime
from hyperrt.sampling.recipe import options_of
from hyperrt.sampling.tokenizer import Tokenizer
from hyperrt.session.decode import pictures_from_pixels
from tests.hyperrt import fake_bundle

PROMPT = "a [V] robot on the beach"


def last_feeds():
    """What the denoiser was given in the last step."""
    seen = {}

    def spy(tensors):
        seen.update(tensors)
        return fake_bundle.GRAPHS["denoiser"](tensors)

    fake_bundle.register(denoiser=spy)
    return seen


def test_a_result_is_pictures_seeds_recipe_and_latents(runtime, subject):
    result = runtime.generate(PROMPT, subject, n=2, seed=5)
    assert result.images.shape == (2, fake_bundle.IMAGE, fake_bundle.IMAGE, 3)
    assert result.images.dtype == np.uint8
    assert result.seeds == (5, 6)
    assert result.latents.shape == (2, 4, 4, 4)


def test_the_final_latents_are_those_of_the_formula_computed_by_hand(runtime, subject):
    """HM-CFG (arXiv 2511.03156, eq. 20) and DDIM (arXiv 2010.02502, eq. 12) with fake_bundle's networks."""
    s, kappa, strength, steps = 2.0, 0.4, 0.1, 3
    result = runtime.generate(PROMPT, subject, kappa=kappa, guidance_scale=s, strength=strength, steps=steps)
    rules = runtime.bundle.prompts
    tokenizer = Tokenizer(runtime.bundle.tokenizer, rules.max_tokens, rules.pad)
    texts = {"uncond": "", "subject": "a sks robot on the beach", "generic": "a robot on the beach"}
    factors = fake_bundle.LAYOUT.unpack(subject.lora)
    to_kv = [factors[path] for path in factors if not path.endswith("to_q")]
    row_values = {}
    for branch, text in texts.items():
        gate = strength if branch == "subject" else 0
        hidden = np.outer(tokenizer.encode(text).ids, np.linspace(0.1, 1, fake_bundle.D))
        added = np.concatenate([hidden @ a @ b for a, b in to_kv], axis=1)
        context = hidden.sum(1, keepdims=True) + gate * added
        row_values[branch] = np.tanh(context.mean() / 10) + gate * subject.lora["lora_q"].sum()
    weights = {"uncond": 1 - 2 * s, "subject": kappa * s, "generic": (2 - kappa) * s}
    alphas = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
    x = np.random.Generator(np.random.Philox(0)).standard_normal((1, 4, 4, 4), np.float32)
    for timestep in (667, 334, 1):
        now, after = alphas[timestep], alphas[max(timestep - 1000 // steps, 0)]
        noise = sum(w * (0.5 * x + row_values[branch] + timestep / 1000) for branch, w in weights.items())
        clean = (x - np.sqrt(1 - now) * noise) / np.sqrt(now)
        x = np.sqrt(after) * clean + np.sqrt(1 - after) * noise
    np.testing.assert_allclose(result.latents, x, rtol=1e-4, atol=1e-4)


def test_a_picture_has_the_same_bits_alone_and_among_others(runtime, subject):
    together = runtime.generate(PROMPT, subject, n=3, seed=10)
    alone = runtime.generate(PROMPT, subject, n=1, seed=12)
    np.testing.assert_array_equal(together.latents[2], alone.latents[0])
    np.testing.assert_array_equal(together.images[2], alone.images[0])


def test_a_picture_hardly_depends_on_the_batch_size(runtime, subject):
    one = runtime.generate(PROMPT, subject, n=3, solver="euler_ancestral")
    two = runtime.generate(PROMPT, subject, n=3, batch_size=2, solver="euler_ancestral")
    np.testing.assert_allclose(one.latents, two.latents, rtol=1e-5)


def test_seed_zero_is_a_seed(runtime):
    first, again, other = (runtime.generate("a robot", seed=seed).latents for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize("options", [{}, {"seed": None}, {"seed": -1}], ids=str)
def test_a_seed_that_was_not_given_is_told_and_draws_the_picture_again(runtime, monkeypatch, options):
    monkeypatch.setattr("hyperrt.sampling.options.random_seed", lambda pictures: 2**32 - pictures)
    result = runtime.generate("a robot", n=2, **options)
    assert result.seeds == (2**32 - 2, 2**32 - 1) and result.recipe["seed"] == 2**32 - 2
    again = runtime.generate("a robot", seed=result.seeds[1])
    np.testing.assert_array_equal(again.images[0], result.images[1])


def test_a_subject_then_another_then_the_first_gives_the_first_picture(runtime, subject, other):
    first = runtime.generate(PROMPT, subject)
    between = runtime.generate(PROMPT, other)
    np.testing.assert_array_equal(runtime.generate(PROMPT, subject).latents, first.latents)
    assert not np.array_equal(between.latents, first.latents)


def test_after_a_subject_the_base_model_is_back_bit_for_bit(runtime, photos):
    before = runtime.generate("a robot on the beach")
    runtime.generate(PROMPT, runtime.personalize(photos))
    np.testing.assert_array_equal(runtime.generate("a robot on the beach").latents, before.latents)


def test_no_subject_is_plain_guidance_of_twice_the_scale(runtime):
    seen = last_feeds()
    runtime.generate("a robot on the beach", guidance_scale=3.5)
    np.testing.assert_allclose(seen["guidance"], [-6, 7])
    np.testing.assert_array_equal(seen["gate"], [0, 0])
    assert not seen["lora_q"].any()


@pytest.mark.parametrize(
    ("options", "rows"),
    [
        ({"kappa": 0}, 2),
        ({"kappa": 2}, 2),
        ({"guidance_scale": 0.5}, 2),
        ({}, 3),
        ({"kappa": 2, "guidance_scale": 0.5}, 1),
    ],
    ids=["no subject row", "no generic row", "no empty row", "all rows", "the subject row alone"],
)
def test_a_row_of_weight_zero_is_not_computed(runtime, subject, options, rows):
    seen = last_feeds()
    runtime.generate(PROMPT, subject, **options)
    assert len(seen["guidance"]) == len(seen["context"]) == len(seen["gate"]) == rows


def test_the_strength_is_the_gate_of_the_subject_row(runtime, subject):
    seen = last_feeds()
    runtime.generate(PROMPT, subject, strength=0.5, n=2, batch_size=2)
    np.testing.assert_array_equal(seen["gate"], [0, 0, 0.5, 0.5, 0, 0])


def test_strength_zero_is_the_base_model_with_the_subject_prompt(runtime, subject, other):
    pictures = [runtime.generate(PROMPT, one, strength=0).latents for one in (subject, other)]
    np.testing.assert_array_equal(*pictures)


def test_the_context_is_computed_once_per_prompt(runtime, subject):
    fake_bundle.calls.clear()
    runtime.generate(PROMPT, subject, n=2)
    runtime.generate(PROMPT, subject, seed=9)
    assert [fake_bundle.calls.count(name) for name in ("text_encoder", "context", "denoiser")] == [1, 1, 12]
    runtime.generate("a [V] robot in snow", subject)
    assert fake_bundle.calls.count("context") == 2


def test_what_stays_the_same_over_the_loop_is_uploaded_once(runtime, subject):
    runtime.generate(PROMPT, subject, steps=9)
    assert sorted(runtime._graphs.engine("denoiser").uploads) == ["context", "gate", "guidance", "lora_q"]


def test_steps_yields_every_step_and_returns_the_result(runtime, subject):
    steps = runtime.sample(runtime.request(PROMPT, subject, n=2, steps=3))
    seen = []
    while True:
        try:
            seen.append(next(steps))
        except StopIteration as end:
            [result] = end.value
            break
    assert [(step.index, step.total) for step in seen] == [(k, 6) for k in range(6)]
    np.testing.assert_array_equal(seen[-1].latents[0], result.latents[1])


def test_stopping_early_runs_no_further_step(runtime, subject):
    fake_bundle.calls.clear()
    steps = runtime.sample(runtime.request(PROMPT, subject, steps=8))
    next(steps)
    steps.close()
    assert fake_bundle.calls.count("denoiser") == 1
    assert "vae_decoder" not in fake_bundle.calls


def test_two_samplings_in_turns_do_not_mix_their_subjects(runtime, subject, other):
    expected = [runtime.generate(PROMPT, one).latents for one in (subject, other)]
    samplings = [runtime.sample(runtime.request(PROMPT, one)) for one in (subject, other)]
    pairs = zip(*samplings, strict=True)
    *_, (first, second) = pairs
    np.testing.assert_array_equal(first.latents, expected[0])
    np.testing.assert_array_equal(second.latents, expected[1])


def test_threads_do_not_mix_their_subjects(runtime, subject, other):
    expected = {id(one): runtime.generate(PROMPT, one).latents for one in (subject, other)}
    wrong = []

    def work(one):
        for _ in range(5):
            if not np.array_equal(runtime.generate(PROMPT, one).latents, expected[id(one)]):
                wrong.append(one)

    threads = [threading.Thread(target=work, args=(one,)) for one in (subject, other) * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_negative_prompt_takes_the_place_of_the_empty_one(runtime, subject):
    plain = runtime.generate(PROMPT, subject)
    negative = runtime.generate(PROMPT, subject, negative_prompt="blurry")
    assert negative.recipe["negative_prompt"] == "blurry"
    assert not np.array_equal(plain.latents, negative.latents)


def test_a_generic_prompt_of_the_users_own_is_used(runtime, subject):
    result = runtime.generate(PROMPT, subject, generic_prompt="a red robot")
    assert result.recipe["generic_prompt"] == "a red robot"


@pytest.mark.parametrize("name", ["generic_prompt", "negative_prompt"])
def test_a_prompt_of_the_base_model_may_not_name_the_subject(runtime, subject, name):
    with pytest.raises(BadPrompt, match=r"has \[V\]"):
        runtime.generate(PROMPT, subject, **{name: "a [v] robot"})


def test_a_subject_without_its_placeholder_is_refused(runtime, subject):
    with pytest.raises(BadPrompt):
        runtime.generate("a robot on the beach", subject)


def test_the_class_noun_of_a_subject_fills_a_prompt_without_a_noun(runtime, photos):
    result = runtime.generate("a [V] on the beach", runtime.personalize(photos, "mug"))
    assert result.recipe["generic_prompt"] == "a mug on the beach"
    assert result.recipe["subject_prompt"] == "a sks mug on the beach"


def test_an_unknown_way_to_combine_photos_is_refused_before_they_are_encoded(runtime, photos):
    fake_bundle.calls.clear()
    with pytest.raises(UsageError, match="combine is 'median'"):
        runtime.personalize(photos, combine="median")
    assert fake_bundle.calls == []


def test_the_recipe_is_json_and_reproduces_the_picture(runtime, subject):
    result = runtime.generate(
        PROMPT, subject, n=2, kappa=1.2, solver="euler", negative_prompt="blurry", seed=3
    )
    told = json.loads(json.dumps(result.recipe_of(1)))
    again = runtime.generate(subject=subject, **options_of(told))
    np.testing.assert_array_equal(again.images[0], result.images[1])


def test_the_recipe_holds_no_path(runtime, subject, photos, pretend):
    text = json.dumps(dict(runtime.generate(PROMPT, subject).recipe))
    assert str(photos) not in text and str(pretend) not in text and "photo 0" not in text


def test_nan_in_a_step_is_an_error_that_names_the_step(runtime, subject):
    def broken(tensors):
        outputs = fake_bundle.GRAPHS["denoiser"](tensors)
        outputs["next_latents"][0, 0, 0, 0] = np.nan
        return outputs

    fake_bundle.register(denoiser=broken)
    with pytest.raises(NumericError, match="step 1"):
        runtime.generate(PROMPT, subject)


@pytest.mark.parametrize("graph", ["weight_decoder", "context", "vae_decoder"])
def test_nan_out_of_any_graph_is_an_error(runtime, photos, graph):
    def broken(tensors):
        return {
            name: value * np.float32(np.inf) for name, value in fake_bundle.GRAPHS[graph](tensors).items()
        }

    fake_bundle.register(**{graph: broken})
    with pytest.raises(NumericError), np.errstate(invalid="ignore"):
        runtime.generate(PROMPT, runtime.personalize(photos))


@pytest.mark.parametrize("level", [-3.0, 0.0, 2.0], ids=["black", "grey", "white"])
def test_a_picture_of_one_colour_is_an_error(runtime, subject, level):
    def flat(tensors):
        noise = 0.1 * fake_bundle.GRAPHS["vae_decoder"](tensors)["pixels"] * bool(level)  # clipped away
        return {"pixels": noise + np.float32(level)}

    fake_bundle.register(vae_decoder=flat)
    with pytest.raises(NumericError, match="one colour"):
        runtime.generate(PROMPT, subject)


def test_after_a_failed_step_the_next_call_is_right(runtime, subject):
    faults = [engines.EngineMemoryError("memory ran out")]

    def out_of_memory_once(tensors):
        if faults:
            raise faults.pop()
        return fake_bundle.GRAPHS["denoiser"](tensors)

    fake_bundle.register(denoiser=out_of_memory_once)
    with pytest.raises(engines.EngineMemoryError):
        runtime.generate(PROMPT, subject)
    again = runtime.generate(PROMPT, subject).latents
    with Runtime.open(runtime.bundle.path, "fake") as fresh:
        np.testing.assert_array_equal(fresh.generate(PROMPT, subject).latents, again)


def test_a_subject_of_another_base_model_is_refused_before_anything_runs(runtime, subject):
    stranger = dataclasses.replace(subject, metadata={**subject.metadata, "base_model": "d" * 64})
    with pytest.raises(LoraMismatch, match="another base model"):
        runtime.request(PROMPT, stranger)


def test_a_subject_of_another_size_is_refused_before_anything_runs(runtime, subject):
    small = dataclasses.replace(subject, lora={**subject.lora, "lora_kv": np.zeros(3, np.float32)})
    with pytest.raises(LoraMismatch, match="lora_kv holds 3 weights"):
        runtime.request(PROMPT, small)


@pytest.mark.parametrize(
    "bad",
    [
        {"kappa": 3},
        {"kappa": float("nan")},
        {"steps": 0},
        {"seed": -2},
        {"n": 0},
        {"batch_size": 0},
        {"solver": "magic"},
    ],
    ids=str,
)
def test_an_argument_out_of_range_is_refused_before_anything_runs(runtime, bad):
    with pytest.raises(UsageError):
        runtime.request("a robot", **bad)
    assert not runtime.open_graphs


def test_with_low_memory_a_graph_is_closed_before_the_next_is_opened(pretend):
    with Runtime.open(pretend, "fake", low_memory=True) as runtime, Runtime.open(pretend, "fake") as other:
        runtime.personalize([np.full((40, 40, 3), 200, np.uint8)])
        assert not runtime.open_graphs
        steps = runtime.sample(runtime.request("a robot", n=2))
        next(steps)
        assert runtime.open_graphs == {"denoiser"}
        steps.close()
        result = runtime.generate("a robot", n=2)
        assert not runtime.open_graphs
        np.testing.assert_array_equal(result.images, other.generate("a robot", n=2).images)


def test_a_closed_runtime_says_so(pretend):
    runtime = Runtime.open(pretend, "fake")
    runtime.close()
    runtime.close()
    with pytest.raises(UsageError, match="closed"):
        runtime.generate("a robot")


def test_a_subject_file_gives_the_same_picture_as_its_photos(runtime, subject, tmp_path):
    subject.save(tmp_path / "s.safetensors")
    loaded = runtime.load_subject(tmp_path / "s.safetensors")
    assert loaded.class_noun == "robot" and loaded.photos == 3
    np.testing.assert_array_equal(
        runtime.generate(PROMPT, loaded).latents, runtime.generate(PROMPT, subject).latents
    )


def test_pixels_are_clipped_and_rounded_to_bytes():
    pixels = np.array([-2, -1, 0, 0.999, 1, 5], np.float32).reshape(1, 1, 1, 6).repeat(3, axis=1)
    assert pictures_from_pixels(pixels)[0, 0, :, 0].tolist() == [0, 0, 128, 255, 255, 255]


def test_the_bundle_in_the_wheel_draws_a_subject_and_comes_back(tiny, photos):
    with Runtime.open(tiny, threads=1) as runtime:
        noun = runtime.bundle.prompts.default_class
        before = runtime.generate(f"a {noun}", steps=2)
        subject = runtime.personalize(photos)
        own = runtime.generate(f"a [V] {noun} on a beach", subject, steps=2, n=2)
        alone = runtime.generate(f"a [V] {noun} on a beach", subject, steps=2, seed=1)
        after = runtime.generate(f"a {noun}", steps=2)
    np.testing.assert_array_equal(before.latents, after.latents)
    np.testing.assert_array_equal(own.images[1], alone.images[0])
