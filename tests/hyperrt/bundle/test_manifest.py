"""What not every bundle has: second text encoder, image prompt, few steps, sizes; together or not at all."""

from __future__ import annotations

import json

import pytest

from hyperrt.bundle.bundle import MANIFEST, PACKAGED, Bundle, read_manifest, write_manifest
from hyperrt.errors import BundleError, UsageError
from tests.hyperrt import fake_bundle


def edited(folder, change):
    manifest = json.loads((folder / MANIFEST).read_text())
    change(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest))
    return folder


def take(manifest, graph, name, shape=("rows", 6)):
    manifest["graphs"][graph]["inputs"].append({"name": name, "shape": list(shape), "dtype": "float32"})


def give(manifest, graph, name):
    manifest["graphs"][graph]["outputs"].append({"name": name, "shape": ["rows", 6], "dtype": "float32"})


WEIGHT = [{"name": "w", "shape": [2], "dtype": "float32"}]


def by_refit(manifest, graph, weights):
    inputs = manifest["graphs"]["denoiser"]["inputs"]
    inputs[:] = [spec for spec in inputs if spec["name"] != "lora_q"]
    manifest["adapt"] = "refit"
    manifest["graphs"]["denoiser"]["weights"] = [
        {"name": spec.name, "shape": list(spec.shape), "dtype": spec.dtype}
        for spec in fake_bundle.LAYOUT.constants("lora_q")
    ]
    manifest["graphs"][graph]["weights"] = list(weights)


@pytest.fixture
def folder(tmp_path):
    return fake_bundle.write(tmp_path / "bundle")


def test_what_a_bundle_does_not_say_has_the_value_of_the_first_bundles(folder):
    opened = Bundle.open(folder)
    assert (opened.timestep_spacing, opened.image_prompt) == ("leading", None)
    prompts = opened.prompts
    assert (prompts.pad, prompts.pad_2, prompts.zero_empty) == (None, None, False)
    assert (opened.graphs["denoiser"].weight_bytes, opened.graphs["denoiser"].row_bytes) == (0, 0)
    assert opened.graphs["denoiser"].weights == ()


def test_a_value_that_is_the_default_is_not_written(folder, tmp_path):
    before = json.loads((folder / MANIFEST).read_text())
    write_manifest(tmp_path, read_manifest(folder))
    assert json.loads((tmp_path / MANIFEST).read_text()) == before


def test_the_manifest_in_the_wheel_is_written_again_byte_for_byte(tmp_path):
    if not (PACKAGED / "tiny" / MANIFEST).is_file():
        pytest.skip("no bundle has been exported into this checkout")
    write_manifest(tmp_path, read_manifest(PACKAGED / "tiny"))
    assert (tmp_path / MANIFEST).read_bytes() == (PACKAGED / "tiny" / MANIFEST).read_bytes()


def test_what_a_bundle_says_is_written_and_read_back(folder, tmp_path):
    def change(manifest):
        manifest.update(timestep_spacing="trailing", storage="int8")
        manifest["prompts"].update(zero_empty=True, pad=2)
        manifest["graphs"]["denoiser"].update(weight_bytes=5_000_000_000, row_bytes=12)

    manifest = read_manifest(edited(folder, change))
    write_manifest(tmp_path, manifest)
    assert read_manifest(tmp_path) == manifest
    assert manifest.graphs["denoiser"].weight_bytes == 5_000_000_000


def test_the_weights_of_a_refit_are_written_and_read_back(tmp_path):
    folder = fake_bundle.write(tmp_path / "refit", refit=True)
    manifest = read_manifest(folder)
    assert manifest.graphs["denoiser"].weights == fake_bundle.LAYOUT.constants("lora_q")
    write_manifest(tmp_path, manifest)
    first, second = (json.loads((place / MANIFEST).read_text()) for place in (folder, tmp_path))
    assert first == second


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m.update(timestep_spacing="linspace"), "timestep_spacing"),
        (lambda m: m.update(storage="int4"), "storage"),
        (lambda m: m["graphs"]["context"].update(weight_bytes=-1), "weight_bytes is -1"),
        (lambda m: m["graphs"]["context"].update(row_bytes=2**60), "row_bytes is 115"),
        (lambda m: m["prompts"].update(pad=-1), "pad is -1"),
        (lambda m: m["prompts"].update(pad_2=-1), "pad_2 is -1"),
        (
            lambda m: m["prompts"].update(pad_2=0),
            "graphs.text_encoder must take input_ids_2: prompts.pad_2 is 0",
        ),
        (lambda m: take(m, "text_encoder", "input_ids_2"), "graphs.text_encoder must not take input_ids_2"),
        (lambda m: take(m, "context", "image_scale"), "image_scale: the manifest has no image_prompt"),
        (lambda m: take(m, "context", "pooled"), "takes pooled, which graphs.text_encoder does not give"),
        (lambda m: take(m, "denoiser", "added"), "graphs.denoiser must not take added"),
        (lambda m: give(m, "context", "added"), "graphs.denoiser must take added"),
        (
            lambda m: m.update(image_prompt={"tokens": 4, "width": 4, "scale": 1}),
            "it must have .*image_prompt",
        ),
        (lambda m: m.update(image_prompt={"tokens": 0, "width": 4, "scale": 1}), "tokens is 0"),
        (lambda m: m.update(image_prompt={"tokens": 4, "width": 4, "scale": -1}), "scale is -1"),
        (lambda m: m["graphs"].update(image_prompt=m["graphs"]["context"]), "graphs has"),
        (lambda m: m.update(adapt="refit"), "graphs.denoiser must not take lora_q: adapt is refit"),
        (lambda m: by_refit(m, "denoiser", ()), r"weights\[0\] is none; lora needs .*lora_A"),
        (lambda m: by_refit(m, "vae_decoder", WEIGHT), "graphs.vae_decoder must not have weights"),
        (lambda m: m["graphs"]["denoiser"].update(weights=WEIGHT), "if adapt is refit"),
    ],
)
def test_one_without_the_other_is_refused_and_the_place_named(folder, change, words):
    with pytest.raises(BundleError, match=words):
        Bundle.open(edited(folder, change))


def test_the_graph_of_the_image_prompt_is_one_that_only_the_open_category_has(folder):
    with pytest.raises(UsageError, match="no graph 'image_prompt'"):
        Bundle.open(folder).graph("image_prompt")
