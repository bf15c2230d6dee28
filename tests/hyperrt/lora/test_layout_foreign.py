"""LoRA files of other programs as subjects of a bundle: used whole, or refused with what would be left."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hyperrt import Runtime
from hyperrt.cli import main
from hyperrt.errors import BadPrompt, LoraError, LoraMismatch
from hyperrt.lora.layout import LoraLayout, Site
from hyperrt.lora.subject_file import load_subject
from tests.hyperrt import fake_bundle
from tests.hyperrt.lora_files import change, random_pairs, read, sites, write, write_kohya

LAYOUT = LoraLayout(tuple(Site(path, *size) for path, size in sites().items()), 4)
ATTN1 = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight"
RANKS = dict.fromkeys(sites(), 4)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "other.safetensors"


def load(path, layout=LAYOUT, **options):
    return load_subject(path, layout, "b" * 64, **options)


@given(
    st.dictionaries(st.sampled_from(list(sites())), st.integers(1, 4), min_size=1),
    st.sampled_from([0.5, 1.0, 3.0]),
    st.sampled_from([np.float16, np.float32]),
)
@settings(max_examples=20, deadline=None)
def test_a_weight_changes_by_alpha_over_rank_times_the_product(tmp_path_factory, ranks, alpha, dtype):
    pairs = random_pairs(ranks, dtype=dtype)
    path = write_kohya(tmp_path_factory.mktemp("x") / "x.s", pairs, dict.fromkeys(pairs, alpha))
    for site, (a, b) in LAYOUT.unpack(load(path).lora).items():
        expected = np.zeros((a.shape[0], b.shape[1]))
        if site in pairs:
            down, up = (array.astype(np.float64) for array in pairs[site])
            expected = (alpha / ranks[site] * up @ down).T
        np.testing.assert_allclose(a.astype(np.float64) @ b, expected, rtol=1e-5, atol=1e-6)


def test_an_unscaled_lora_of_the_bundles_rank_is_taken_bit_for_bit(path):
    pairs = random_pairs(RANKS)
    found = LAYOUT.unpack(load(write(path, pairs)).lora)
    assert all(np.array_equal(found[site][0].T, a) and np.array_equal(found[site][1].T, b)
               for site, (a, b) in pairs.items())  # fmt: skip


def test_that_nothing_is_known_of_its_base_model_is_said(path, caplog):
    load(write(path, random_pairs(RANKS), ss_sd_model_name="somebodys-mix.safetensors"))
    (record,) = caplog.records
    assert "somebodys-mix.safetensors" in record.message and "another base model" in record.message


@pytest.mark.parametrize(
    ("metadata", "trigger"),
    [
        ({}, None),
        ({"modelspec.trigger_phrase": "ohwx"}, "ohwx"),
        ({"modelspec.trigger_phrase": "\x1b[2J"}, None),
        ({"modelspec.trigger_phrase": "x" * 65}, None),
        ({"modelspec.trigger_phrase": f"ohwx,  red robot , {'x' * 65}"}, "ohwx, red robot"),
    ],
)
def test_its_trigger_is_read_where_it_has_one(path, metadata, trigger):
    subject = load(write(path, random_pairs(RANKS), **metadata))
    assert subject.metadata.get("trigger") == trigger
    assert (subject.class_noun, subject.photos) == ("", 0)


def test_other_modules_are_refused_and_left_out_only_on_request(path):
    pairs = random_pairs(RANKS)
    whole = load(write(path, pairs)).lora
    extra = np.ones((2, 2), np.float32)
    change(path, {ATTN1: extra, ATTN1.replace("lora_A", "lora_B"): extra})
    with pytest.raises(LoraMismatch, match="more than") as caught:
        load(path)
    assert caught.value.code == 5 and "2 tensors of self-attention" in caught.value.why
    part = load(path, partial=True).lora
    assert all(np.array_equal(part[name], whole[name]) for name in whole)


def test_a_rank_beyond_the_bundles_is_refused_with_the_way_to_reduce_it(path):
    with pytest.raises(LoraMismatch, match=r"the rank of other\.safetensors is 9") as caught:
        load(write(path, random_pairs({**RANKS, next(iter(RANKS)): 9})))
    assert "--rank 4" in caught.value.do


def test_a_lora_of_another_model_is_refused(path):
    pairs = random_pairs(RANKS)
    narrow = LoraLayout(tuple(Site(site.path, site.d_in + 1, site.d_out) for site in LAYOUT.sites), 4)
    with pytest.raises(LoraMismatch, match=r"lora_A\.weight is"):
        load(write(path, pairs), narrow)
    shallow = LoraLayout(LAYOUT.sites[:3], 4)
    with pytest.raises(LoraMismatch, match="another model") as caught:
        load(path, shallow)
    assert "6 of its 9 sites are not in the bundle" in caught.value.why


@pytest.mark.parametrize("partial", [False, True])
def test_dora_is_refused_and_so_is_a_file_with_nothing_to_use(path, partial):
    write(path, random_pairs(RANKS))
    change(path, {f"unet.{LAYOUT.sites[0].path}.lora_magnitude_vector": np.ones(6, np.float32)})
    with pytest.raises(LoraError, match="not a LoRA of pairs"):
        load(path, partial=partial)
    write(path, {})
    change(path, {ATTN1: np.ones((2, 2), np.float32)})
    with pytest.raises(LoraError, match="no layer that HyperRT can use"):
        load(path, partial=partial)


def test_nan_is_refused_even_in_one_number_of_one_site(path):
    pairs = random_pairs(RANKS)
    pairs[LAYOUT.sites[4].path][1][2, 1] = np.nan
    with pytest.raises(LoraError, match=r"to_k.lora_B.weight cannot be used"):
        load(write(path, pairs))


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_a_damaged_file_is_loaded_whole_or_refused(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("damaged") / "x.s"
    said = {"lora_adapter_metadata": json.dumps({"unet.lora_alpha": 2, "unet.alpha_pattern": {"to_q": 1}})}
    content = bytearray(write(path, random_pairs(dict.fromkeys(sites(), 1)), **said).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    try:
        subject = load(path, partial=data.draw(st.booleans()))
    except LoraError as error:
        assert str(error).isprintable() or "\n  why: " in str(error)
        return
    assert all(np.isfinite(vector).all() for vector in subject.lora.values())


# drawing with them


@pytest.fixture
def foreign(path):
    """A LoRA of the fake bundle's layout, in kohya's format, of half its rank."""
    rng = np.random.default_rng(0)
    pairs = {
        site.path: (rng.standard_normal((1, site.d_in)).astype(np.float32),
                    rng.standard_normal((site.d_out, 1)).astype(np.float32))
        for site in fake_bundle.LAYOUT.sites
    }  # fmt: skip
    return write_kohya(path, pairs, {}, **{"modelspec.trigger_phrase": "red robot"})


def test_the_runtime_draws_with_a_lora_of_another_program(pretend, foreign):
    with Runtime.open(pretend, "fake") as runtime:
        subject = runtime.load_subject(foreign)
        assert subject.class_noun == "robot"  # that of the trigger
        base = runtime.generate("a [V] robot", subject, seed=1, strength=0)
        drawn = runtime.generate("a [V] robot", subject, seed=1)
        on_request = runtime.load_subject(foreign, partial=True)
    assert np.abs(drawn.latents - base.latents).max() > 0
    assert drawn.recipe["subject_prompt"] == "a red robot"
    assert all(np.array_equal(on_request.lora[name], subject.lora[name]) for name in subject.lora)


def prompts_of(pretend, path, prompt, **options):
    """The prompts of the subject and of the base model, as a recipe tells them."""
    with Runtime.open(pretend, "fake") as runtime:
        recipe = runtime.generate(prompt, runtime.load_subject(path), **options).recipe
    return recipe["subject_prompt"], recipe["generic_prompt"]


@pytest.mark.parametrize(
    ("prompt", "subject", "generic"),
    [
        ("a [V] in snow", "a red robot in snow", "a robot in snow"),
        ("a [V] mug in snow", "a red robot in snow", "a mug in snow"),
        ("a robot in snow", "a robot in snow", "a robot in snow"),
    ],
)
def test_its_trigger_stands_for_the_placeholder_and_the_noun(pretend, foreign, prompt, subject, generic):
    assert prompts_of(pretend, foreign, prompt) == (subject, generic)


def test_a_generic_prompt_is_the_base_models_alone(pretend, foreign):
    found = prompts_of(pretend, foreign, "a robot in snow", generic_prompt="a cat")
    assert found == ("a robot in snow", "a cat")


@pytest.mark.parametrize("format", ["kohya", "diffusers"])
def test_our_own_file_without_our_keys_draws_the_same_words(run, pretend, subject_file, format):
    other = subject_file.with_name(f"{format}.safetensors")
    assert main.run(["lora", "convert", str(subject_file), str(other), "--format", format]) == 0
    change(other, metadata={key: None for key in read(other)[1] if key.startswith("hyperrt.")})
    for prompt in ("a [V] robot on the beach", "a [V] on the beach"):
        ours, theirs = (prompts_of(pretend, path, prompt) for path in (subject_file, other))
        assert ours == theirs == ("a sks robot on the beach", "a robot on the beach")


def test_a_prompt_without_the_placeholder_draws_with_a_warning_once(run, foreign):
    code, out, err = run("generate", "-s", foreign, "-p", "a robot in snow", "-n", "3", "-o", "x")
    assert code == 0 and len(out.splitlines()) == 3
    assert err.count("asks for words that the prompt lacks: red robot") == 1
    _, _, err = run("generate", "-s", foreign, "-p", "a red robot in snow", "-o", "y.png")
    assert "lacks" not in err


def test_a_subject_of_photos_still_needs_the_placeholder(run, pretend, subject_file):
    assert run("generate", "-s", subject_file, "-p", "a robot in snow", "-o", "x.png")[0] == 3
    with Runtime.open(pretend, "fake") as runtime, pytest.raises(BadPrompt):
        runtime.generate("a robot in snow", runtime.load_subject(subject_file))


def test_the_command_line_draws_with_it(run, foreign):
    code, out, err = run("generate", "-s", foreign, "-p", "a [V] robot", "-o", "x.png")
    assert (code, out) == (0, "x.png\n") and "made by another program" in err
    extra = "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight"
    change(foreign, {extra: np.ones((2, 2), np.float32)})
    code, out, err = run("generate", "-s", foreign, "-p", "a [V] robot", "-o", "y.png")
    assert code == 5 and "the text encoder" in err and "--partial" in err
    code, _, _ = run("generate", "-s", foreign, "-p", "a [V] robot", "-o", "y.png", "--partial")
    assert code == 0
    assert run("generate", "-p", "a robot", "--partial")[0] == 2
