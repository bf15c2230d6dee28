"""A LoRA from one format into another: the same bits, the same scale, and names that others look for."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hyperrt.lora import writer
from hyperrt.lora.layout import LoraLayout, Site
from hyperrt.lora.names import FORMATS
from hyperrt.lora.reader import Factors, open_lora
from hyperrt.lora.safetensors_file import Stored
from hyperrt.lora.subject_file import load_subject
from tests.hyperrt.lora_files import change, random_pairs, read, save_subject, sites, write, write_kohya

BASE = "b" * 64
METADATA = {"base_model": BASE, "hypernet": "a" * 64, "class_noun": "mug", "photos": "3", "trigger": "sks"}
KNOWN = {"family": "sd15", "image_size": "512", "prediction_type": "epsilon"}
LAYOUT = LoraLayout(tuple(Site(path, *size) for path, size in sites().items()), 2)
ROUTES = list(itertools.permutations(FORMATS, 3))


def subject(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(LAYOUT.size(name)).astype(np.float32) for name in ("lora_q", "lora_kv")}


def convert(source, target, format, **options):
    writer.convert(open_lora(source), target, format, **options)
    return target


# subjects of ours


@pytest.mark.parametrize("family", ["sd15", "sdxl", "tiny"])
@pytest.mark.parametrize("route", ROUTES, ids="-".join)
def test_a_subject_comes_back_byte_for_byte_by_any_way(tmp_path, route, family):
    first, second, third = (tmp_path / name for name in "abc")
    save_subject(tmp_path / "0.s", subject(), LAYOUT, METADATA | KNOWN | {"family": family}, route[0])
    convert(tmp_path / "0.s", tmp_path / "1.s", route[1])
    convert(tmp_path / "1.s", tmp_path / "2.s", route[2])
    convert(tmp_path / "2.s", tmp_path / "3.s", route[0])
    assert (tmp_path / "3.s").read_bytes() == (tmp_path / "0.s").read_bytes()
    for format, name in zip(route, "012", strict=True):
        save_subject(tmp_path / "x.s", subject(), LAYOUT, METADATA | KNOWN | {"family": family}, format, True)
        assert (tmp_path / "x.s").read_bytes() == (tmp_path / f"{name}.s").read_bytes()
    assert not [path for path in (first, second, third) if path.exists()]


def test_a_folder_of_peft_is_a_subject_like_any_other(tmp_path):
    save_subject(tmp_path / "mug", subject(), LAYOUT, METADATA, "peft")
    convert(tmp_path / "mug", tmp_path / "mug.safetensors", "diffusers")
    save_subject(tmp_path / "same.safetensors", subject(), LAYOUT, METADATA)
    assert (tmp_path / "mug.safetensors").read_bytes() == (tmp_path / "same.safetensors").read_bytes()


def test_sdxl_has_the_names_of_the_first_publication_in_kohyas_format_alone(tmp_path):
    for family in ("sdxl", "sd15"):
        for format in FORMATS:
            path = tmp_path / f"{family}-{format}"
            save_subject(path.with_suffix(".s"), subject(), LAYOUT, METADATA | {"family": family}, format)
    stems = {name.partition(".")[0] for name in read(tmp_path / "sdxl-kohya.s")[0]}
    assert stems == {
        f"lora_unet_{block}_transformer_blocks_0_attn2_to_{projection}"
        for block in ("input_blocks_4_1", "middle_block_1", "output_blocks_2_1")
        for projection in "qkv"
    }
    for other in ("sdxl-diffusers", "sdxl-peft", "sd15-kohya"):
        assert not [name for name in read(tmp_path / f"{other}.s")[0] if "put_blocks" in name]


def test_a_subject_of_sdxl_with_diffusers_blocks_in_kohyas_format_is_read_as_well(tmp_path):
    path = tmp_path / "old.s"
    save_subject(path, subject(), LAYOUT, METADATA | {"family": "sd15"}, "kohya")
    change(path, metadata={"hyperrt.family": "sdxl"})
    found = load_subject(path, LAYOUT, BASE).lora
    assert all(np.array_equal(found[name], vector) for name, vector in subject().items())


@pytest.mark.parametrize(
    ("family", "width", "prediction", "architecture", "version"),
    [
        ("sd15", 768, "epsilon", "stable-diffusion-v1/lora", "sd_v1"),
        ("sd15", 1024, "epsilon", "stable-diffusion-v2-512/lora", "sd_v2"),
        ("sd15", 1024, "v_prediction", "stable-diffusion-v2-768-v/lora", "sd_v2"),
        ("sdxl", 2048, "epsilon", "stable-diffusion-xl-v1-base/lora", "sdxl_base_v1-0"),
        ("tiny", 64, "v_prediction", "hyperrt-tiny/lora", None),
    ],
)
def test_the_header_says_what_other_programs_look_for(
    tmp_path, family, width, prediction, architecture, version
):
    layout = LoraLayout(tuple(Site(path, *size) for path, size in sites(width).items()), 2)
    packed = {name: np.ones(layout.size(name), np.float32) for name in ("lora_q", "lora_kv")}
    known = {"family": family, "image_size": "512", "prediction_type": prediction, "image_scale": "0.55"}
    save_subject(tmp_path / "x.s", packed, layout, METADATA | known, "kohya")
    _, said = read(tmp_path / "x.s")
    assert said["modelspec.architecture"] == architecture
    assert said.get("ss_base_model_version") == version
    assert (said["ss_network_dim"], said["ss_network_alpha"]) == ("2", "2")
    assert said["modelspec.implementation"].startswith("https:" if family == "sdxl" else "diffusers")
    assert said["modelspec.trigger_phrase"] == "sks mug" and said["modelspec.resolution"] == "512x512"
    assert said["modelspec.prediction_type"] == ("v" if prediction == "v_prediction" else "epsilon")
    assert "0.55" in said["modelspec.usage_hint"] and said["hyperrt.image_scale"] == "0.55"


def test_what_is_not_known_is_not_said(tmp_path):
    save_subject(tmp_path / "x.s", subject(), LAYOUT, METADATA, "kohya")
    _, said = read(tmp_path / "x.s")
    assert not [key for key in said if key.startswith("modelspec") or key == "ss_base_model_version"]


# LoRAs of other programs

ranked = st.dictionaries(st.sampled_from(list(sites())), st.integers(1, 4), min_size=1)
alphas = st.one_of(st.integers(1, 16).map(float), st.sampled_from([0.25, 0.5, 1.5]))


@given(ranked, st.data(), st.sampled_from([np.float32, np.float16]), st.sampled_from(ROUTES))
@settings(max_examples=40, deadline=None)
def test_any_ranks_alphas_and_types_come_back_from_any_way(tmp_path_factory, ranks, data, dtype, route):
    folder = tmp_path_factory.mktemp("route")
    pairs = random_pairs(ranks, dtype=dtype)
    scales = {site: data.draw(alphas) for site in pairs}
    at = write_kohya(folder / "0.s", pairs, scales)
    for number, format in enumerate((*route, "kohya"), start=1):
        target = folder / (f"{number}" if format == "peft" else f"{number}.s")  # a folder: else alpha is lost
        at = convert(at, target, format)
    found, _ = read(at)
    expected, _ = read(folder / "0.s")
    assert {name: (x.dtype, x.tobytes()) for name, x in found.items()} == {
        name: (x.dtype, x.tobytes()) for name, x in expected.items()
    }


def test_what_a_trainer_said_of_its_lora_is_kept(tmp_path):
    write_kohya(tmp_path / "0.s", random_pairs(dict.fromkeys(sites(), 2)), {}, ss_tag_frequency='{"x": 1}')
    convert(tmp_path / "0.s", tmp_path / "1.s", "diffusers")
    assert read(tmp_path / "1.s")[1]["ss_tag_frequency"] == '{"x": 1}'


@pytest.mark.parametrize(("version", "first"), [("sdxl_base_v1-0", True), ("sd_v1", False)])
def test_whose_names_a_foreign_lora_gets_is_told_by_what_it_says_or_by_the_bundle(tmp_path, version, first):
    pairs = random_pairs(dict.fromkeys(sites(), 2))
    write(tmp_path / "0.s", pairs, ss_base_model_version=version)
    names, said = read(convert(tmp_path / "0.s", tmp_path / "1.s", "kohya"))
    assert any("input_blocks" in name for name in names) == first
    assert said["ss_base_model_version"] == version and said["ss_network_dim"] == "2"
    names, _ = read(convert(tmp_path / "0.s", tmp_path / "2.s", "kohya", family="sdxl"))
    assert any("input_blocks" in name for name in names)


def test_a_patched_configuration_names_the_sites_that_differ(tmp_path):
    first, *others = sites()
    write_kohya(tmp_path / "0.s", random_pairs({**dict.fromkeys(others, 2), first: 3}), {first: 1.5})
    convert(tmp_path / "0.s", tmp_path / "1", "peft")
    config = json.loads((tmp_path / "1" / "adapter_config.json").read_text())
    assert (config["r"], config["rank_pattern"]) == (2, {first: 3})
    assert (config["lora_alpha"], config["alpha_pattern"]) == (2, {first: 1.5})


# rank and norm


def product(factors: Factors) -> np.ndarray:
    a, b = factors.numbers()
    return b.astype(np.float64) @ a.astype(np.float64)


@given(st.integers(1, 6), st.integers(1, 9), st.integers(1, 9), st.integers(1, 6), alphas, st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_a_reduced_lora_is_the_nearest_of_its_rank(rank, d_in, d_out, wanted, alpha, seed):
    rng = np.random.default_rng(seed)
    a, b = rng.standard_normal((rank, d_in)), rng.standard_normal((d_out, rank))
    whole = Factors(Stored.of(a), Stored.of(b), alpha)
    reduced = writer.reduced(whole, wanted)
    assert reduced.rank <= min(rank, wanted)
    values = np.linalg.svd(product(whole), compute_uv=False)
    missing = np.linalg.norm(product(whole) - product(reduced))
    assert missing == pytest.approx(np.sqrt(np.sum(values[wanted:] ** 2)), abs=1e-5 * values[0])
    assert writer.norm(whole) == pytest.approx(np.linalg.norm(product(whole)), rel=1e-6)


def test_what_a_rank_loses_is_said_and_what_fits_is_not_touched(tmp_path):
    first, *others = sites()
    pairs = random_pairs({**dict.fromkeys(others, 2), first: 4})
    file = open_lora(write(tmp_path / "0.s", pairs))
    lost = writer.convert(file, tmp_path / "1.s", "diffusers", rank=2)
    found = open_lora(tmp_path / "1.s")
    whole = sum(np.linalg.norm(product(file.factors(site))) ** 2 for site in file.pairs)
    missing = np.linalg.norm(product(file.factors(first)) - product(found.factors(first)))
    assert lost == pytest.approx(missing / np.sqrt(whole), rel=1e-5) and lost > 0.01
    for site in others:
        assert found.factors(site) == file.factors(site)
    assert writer.convert(file, tmp_path / "2.s", "diffusers", rank=4) == 0


def test_a_subject_of_another_rank_is_a_lora_like_any_other(tmp_path):
    save_subject(tmp_path / "0.s", subject(), LAYOUT, METADATA | KNOWN)
    assert writer.convert(open_lora(tmp_path / "0.s"), tmp_path / "1.s", "diffusers", rank=1) > 0
    file = open_lora(tmp_path / "1.s")
    assert file.origin == {} and {pair.rank for pair in file.pairs.values()} == {1}
    assert load_subject(tmp_path / "1.s", LAYOUT, BASE).metadata["trigger"] == "sks mug"


def test_the_norm_of_a_rank_far_above_the_sizes_takes_no_more_memory_than_the_factors():
    """A Gram matrix of this rank would have 80 GB."""
    a, b = np.ones((100_000, 2), np.float32), np.ones((3, 100_000), np.float32)
    factors = Factors(Stored.of(a), Stored.of(b), 100_000.0)
    assert writer.norm(factors) == pytest.approx(100_000 * 6**0.5)
