"""The manifest is read strictly, and no graph is used unless its bytes are those that were exported."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hyperrt.bundle import bundle as bundles
from hyperrt.bundle.bundle import FORMAT, GRAPHS, MANIFEST, TOKENIZER, Bundle, LoraSection, sha256_of
from hyperrt.errors import BundleError, BundleMismatch, HyperRTError, NotFound, UsageError
from hyperrt.lora.layout import LoraLayout, Site
from tests.engines.onnx_bytes import external_graph

ATTN = "mid.attn2"
LAYOUT = LoraLayout((Site(f"{ATTN}.to_q", 4, 4), Site(f"{ATTN}.to_k", 6, 4), Site(f"{ATTN}.to_v", 6, 4)), 2)


def manifest_of(folder: Path) -> dict:
    """The JSON of a small bundle whose files are in `folder`."""
    graphs = {}
    for name in GRAPHS:
        (folder / f"{name}.onnx").write_bytes(name.encode())
        inputs = [{"name": "rows", "shape": ["images", 4], "dtype": "float32"}]
        if name in ("denoiser", "context"):
            vector = "lora_q" if name == "denoiser" else "lora_kv"
            inputs.append({"name": vector, "shape": ["subjects", LAYOUT.size(vector)], "dtype": "float32"})
        outputs = [{"name": "out", "shape": [], "dtype": "float32"}]
        sha256 = sha256_of(folder / f"{name}.onnx")
        graphs[name] = {"file": f"{name}.onnx", "sha256": sha256, "inputs": inputs, "outputs": outputs}
    (folder / "denoiser.onnx.data").write_bytes(b"weights")
    data = {"data_file": "denoiser.onnx.data", "data_sha256": sha256_of(folder / "denoiser.onnx.data")}
    graphs["denoiser"] |= data
    (folder / TOKENIZER).write_text("{}")
    return {
        "format": FORMAT,
        "family": "tiny",
        "name": "small",
        "created_by": "test",
        "image_size": 64,
        "latent": {"channels": 4, "size": 8},
        "prediction_type": "epsilon",
        "betas": {"schedule": "scaled_linear", "start": 0.00085, "end": 0.012, "steps": 1000},
        "defaults": {"solver": "ddim", "steps": 30, "guidance_scale": 3, "kappa": 1.0},
        "graphs": graphs,
        "lora": LAYOUT.to_json(),
        "adapt": "inputs",
        "preprocess": {
            "size": 64,
            "mean": [0.5, 0.5, 0.5],
            "std": [1, 1, 1],
            "resample": "bicubic",
            "crop": "pad",
        },
        "prompts": {
            "placeholder": "[V]",
            "token": "sks",
            "max_tokens": 16,
            "default_class": "mug",
            "nouns": ["mug", "fish"],
        },
        "tokenizer_sha256": sha256_of(folder / TOKENIZER),
        "hashes": {"base_model": "b" * 64, "hypernet": "a" * 64},
        "precision": "fp32",
        "storage": "fp16",
        "parity": {"onnxruntime_fp32": 1e-5},
    }


def write(folder: Path, manifest: object) -> Path:
    (folder / MANIFEST).write_text(json.dumps(manifest))
    return folder


@pytest.fixture
def folder(tmp_path) -> Path:
    return write(tmp_path, manifest_of(tmp_path))


def changed(folder: Path, place: str, value: object) -> Path:
    """The manifest with another value at `place` ("latent.size"); Ellipsis removes the key."""
    manifest = json.loads((folder / MANIFEST).read_text())
    *parents, last = [int(part) if part.isdigit() else part for part in place.split(".")]
    inside = manifest
    for part in parents:
        inside = inside[part]
    if value is Ellipsis:
        del inside[last]
    else:
        inside[last] = value
    return write(folder, manifest)


def test_a_bundle_opens_and_says_what_its_manifest_says(folder):
    opened = Bundle.open(folder)
    assert (opened.family, opened.latent.channels, opened.defaults.solver) == ("tiny", 4, "ddim")
    assert opened.layout == LAYOUT
    assert opened.graphs["denoiser"].inputs[1].shape == ("subjects", LAYOUT.size("lora_q"))
    assert opened.preprocess.mean == (0.5, 0.5, 0.5)
    assert opened.graph("denoiser") == folder / "denoiser.onnx"
    assert opened.tokenizer == folder / TOKENIZER
    opened.verify()


def test_what_is_written_is_what_is_read(folder, tmp_path):
    manifest = bundles.read_manifest(folder)
    bundles.write_manifest(tmp_path, manifest)
    assert bundles.read_manifest(tmp_path) == manifest
    assert LoraSection.of(LAYOUT) == manifest.lora


def test_a_manifest_that_could_not_be_read_is_not_written(folder, tmp_path):
    manifest = bundles.read_manifest(folder)
    object.__setattr__(manifest, "family", "ti\x1bny")
    before = (folder / MANIFEST).read_bytes()
    with pytest.raises(ValueError, match="family"):
        bundles.write_manifest(folder, manifest)
    assert (folder / MANIFEST).read_bytes() == before


@pytest.mark.parametrize("name", ["rank", "sites", "hash"])
def test_the_layout_in_the_manifest_is_complete(folder, name):
    with pytest.raises(BundleError, match=rf"lora\.{name} is missing"):
        Bundle.open(changed(folder, f"lora.{name}", ...))


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        ("family", ..., "family is missing"),
        ("latent.size", ..., r"latent\.size is missing"),
        ("graphs.context", ..., "graphs has"),
        ("graphs.context.sha256", ..., r"graphs\.context\.sha256 is missing"),
        ("surprise", 1, "surprise is unknown"),
        ("latent.surprise", 1, r"latent\.surprise is unknown"),
        ("graphs.surprise", {}, r"graphs\.surprise"),
        ("image_size", "64", r'image_size is "64"; it must be a whole number'),
        ("image_size", 64.0, "image_size is 64.0"),
        ("image_size", True, "image_size is true"),
        ("image_size", 0, "image_size is 0; it must be at least 1"),
        ("latent.size", 2**40, "latent: size is 1099511627776; it must be at least 1 and at most 65536"),
        ("prompts.max_tokens", 10**4000, "max_tokens is 1000"),
        ("betas.steps", 10**12, "betas: steps is"),
        ("latent", [], r"latent is \[\]; it must be an object"),
        ("betas.start", True, "betas.start is true"),
        ("betas.end", 2, "betas: start is"),
        ("betas.schedule", "cosine", "it must be one of linear"),
        ("prediction_type", "flow", "it must be one of epsilon"),
        ("defaults.kappa", 3, "defaults: kappa is 3"),
        ("preprocess.mean", [0.5, 0.5], "preprocess.mean has 2 entries; it must have 3"),
        ("preprocess.std", [1, 1, 0], "preprocess: std is"),
        ("preprocess.crop", "stretch", "it must be one of pad, center"),
        ("prompts.nouns", "mug", "prompts.nouns is"),
        ("prompts.nouns.0", 1, r"prompts\.nouns\[0\] is 1"),
        ("prompts.token", "", "must not be empty"),
        ("name", "a\x1b[2Jb", "control characters"),
        ("hashes.base_model", "b" * 63, "64 hex"),
        ("graphs.context.sha256", "B" * 64, "64 hex"),
        ("graphs.context.data_file", "x.data", "together"),
        ("graphs.context.inputs.0.shape.0", 1.5, r"shape\[0\] is 1.5; it must be a whole number or a text"),
        ("graphs.denoiser.inputs.1.shape.1", 7, r"graphs\.denoiser must take lora_q"),
        ("graphs.context.inputs.1.name", "lora", r"graphs\.context must take lora_kv"),
        ("lora.hash", "c" * 64, "lora: hash is"),
        ("lora.rank", 3, "lora: hash is"),
        ("lora.rank", 2**60, "the LoRA layout is too large"),
        ("lora.sites.0.path", "mid.attn2.to_out", "lora: the LoRA layout cannot hold"),
        ("parity.onnxruntime_fp32", "small", "parity.onnxruntime_fp32 is"),
        ("parity", {"a\x1b[2J": 1.0}, "a key of parity is .*control characters"),
        ("graphs.context.inputs.0.shape.1", 10**30, "a fixed size must be from 1 to 268435456"),
        ("graphs.context.outputs.0.shape", [-5], r"'out' has shape \[-5\]"),
        ("format", "1", "format is"),
        ("format", ..., "format is missing"),
    ],
)
def test_a_manifest_that_is_wrong_anywhere_is_refused_and_the_place_named(folder, place, value, words):
    with pytest.raises(BundleError, match=words) as caught:
        Bundle.open(changed(folder, place, value))
    assert caught.value.code == 8
    assert "\x1b" not in str(caught.value)


@pytest.mark.parametrize(
    "name",
    [
        "../denoiser.onnx",
        "/etc/passwd",
        "a/b.onnx",
        "a\\b.onnx",
        "C:x.onnx",
        "..",
        ".hidden",
        "",
        "a\0b",
        "denoiser.onnx\n",
        "x" * 200,
        "nul",
        "COM1.onnx",
    ],
)
@pytest.mark.parametrize("key", ["file", "data_file"])
def test_a_file_name_cannot_leave_the_folder(folder, key, name):
    with pytest.raises(BundleError):
        Bundle.open(changed(folder, f"graphs.denoiser.{key}", name))


@pytest.mark.parametrize("number", [0, 2, 99])
def test_another_format_is_a_mismatch_that_names_both_numbers(folder, number):
    # Its other keys are not looked at: another format may have others.
    write(folder, {"format": number, "new": 1})
    with pytest.raises(BundleMismatch, match=f"it is format {number}; this version reads 1") as caught:
        Bundle.open(folder)
    assert caught.value.code == 5


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"null",
        b"[1]",
        b"{",
        b'"\xff"',
        b"\xef\xbb\xbf{}",
        b'{"format": 1, "format": 1}',
        b'{"format": NaN}',
        b'{"format": ' + b"9" * 5000 + b"}",
        b"[" * 100_000,
        b" " * (bundles.MAX_MANIFEST + 1),
    ],
    ids=range(11),
)
def test_what_is_no_manifest_is_refused(folder, text):
    (folder / MANIFEST).write_bytes(text)
    with pytest.raises(BundleError):
        Bundle.open(folder)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


def places(value: object, where: tuple = ()) -> list[tuple]:
    """Every place in a JSON value."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [where, *(place for key, item in pairs for place in places(item, (*where, key)))]


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> tuple[Path, dict]:
    """A folder with all files but the manifest, and the manifest."""
    folder = tmp_path_factory.mktemp("sound")
    return folder, manifest_of(folder)


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_no_value_in_any_place_breaks_the_reader(sound, data):
    folder, manifest = sound[0], copy.deepcopy(sound[1])
    *parents, last = data.draw(st.sampled_from(places(manifest)[1:]))
    inside = manifest
    for part in parents:
        inside = inside[part]
    inside[last] = data.draw(json_values)
    try:
        Bundle.open(write(folder, manifest))
    except HyperRTError:
        return


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_a_manifest_with_damaged_bytes_is_read_or_refused(sound, data):
    folder, manifest = sound
    text = bytearray(json.dumps(manifest).encode())
    for _ in range(data.draw(st.integers(1, 3))):
        text[data.draw(st.integers(0, len(text) - 1))] = data.draw(st.integers(0, 255))
    (folder / MANIFEST).write_bytes(text)
    try:
        Bundle.open(folder)
    except HyperRTError:
        return


def with_graph(folder: Path, name: str, content: bytes) -> Path:
    """The bundle with another file for the graph `name`, hash included."""
    (folder / f"{name}.onnx").write_bytes(content)
    return changed(folder, f"graphs.{name}.sha256", sha256_of(folder / f"{name}.onnx"))


def test_weights_are_taken_from_the_data_file_that_is_hashed_and_from_no_other(folder):
    with_graph(folder, "denoiser", external_graph(b"denoiser.onnx.data"))
    Bundle.open(folder).graph("denoiser")
    for name in (b"other.data", b"../denoiser.onnx.data", b"/etc/passwd", b"*/_ORT_MEM_ADDR_/*", b"\x1b[2J"):
        with_graph(folder, "denoiser", external_graph(name))
        with pytest.raises(BundleError, match="has weights in b'") as caught:
            Bundle.open(folder).graph("denoiser")
        assert "\x1b" not in str(caught.value)


def test_a_graph_with_no_data_file_has_its_weights_inside(folder):
    with_graph(folder, "context", external_graph(b"denoiser.onnx.data"))
    with pytest.raises(BundleError, match=r"context\.onnx .*cannot be used"):
        Bundle.open(folder).graph("context")
    with_graph(folder, "context", external_graph(b"x")[:-1])
    with pytest.raises(BundleError, match=r"context\.onnx .*is no graph"):
        Bundle.open(folder).graph("context")


def test_a_damaged_tokenizer_is_found_before_it_is_used(folder):
    (folder / TOKENIZER).write_text("{ }")
    opened = Bundle.open(folder)
    with pytest.raises(BundleError, match=r"tokenizer\.json .*damaged"):
        _ = opened.tokenizer
    with pytest.raises(BundleError, match=r"tokenizer\.json .*damaged"):
        opened.verify()


@pytest.mark.parametrize("file", ["denoiser.onnx", "denoiser.onnx.data"])
def test_one_wrong_bit_in_a_graph_is_found_before_it_is_used(folder, file):
    content = bytearray((folder / file).read_bytes())
    content[3] ^= 1
    (folder / file).write_bytes(content)
    opened = Bundle.open(folder)
    opened.graph("context")
    with pytest.raises(BundleError, match=rf"{file} .*damaged") as caught:
        opened.graph("denoiser")
    assert caught.value.code == 8
    with pytest.raises(BundleError, match="damaged"):
        opened.verify()


def test_a_graph_is_hashed_once_and_again_by_verify(folder, monkeypatch):
    hashed = []
    monkeypatch.setattr(bundles, "sha256_of", lambda path: hashed.append(path.name) or sha256_of(path))
    opened = Bundle.open(folder)
    assert hashed == []
    opened.graph("denoiser")
    opened.graph("denoiser")
    assert hashed == ["denoiser.onnx", "denoiser.onnx.data"]
    opened.verify()
    assert set(hashed) == {*(f"{name}.onnx" for name in GRAPHS), "denoiser.onnx.data", TOKENIZER}


@pytest.mark.parametrize("file", ["vae_decoder.onnx", "denoiser.onnx.data", TOKENIZER])
def test_a_missing_file_is_named_on_opening(folder, file):
    (folder / file).unlink()
    with pytest.raises(BundleError, match=f"{file} is missing"):
        Bundle.open(folder)


def test_a_pipe_in_the_place_of_a_graph_does_not_hang(folder):
    opened = Bundle.open(folder)
    (folder / "context.onnx").unlink()
    os.mkfifo(folder / "context.onnx")
    with pytest.raises(BundleError, match=r"context\.onnx is missing"):
        opened.graph("context")
    with pytest.raises(BundleError, match=r"context\.onnx is missing"):
        Bundle.open(folder)


def test_a_graph_that_no_bundle_has_is_a_usage_error(folder):
    with pytest.raises(UsageError, match="unet"):
        Bundle.open(folder).graph("unet")


def test_a_packaged_bundle_is_found_by_its_name(folder, monkeypatch):
    monkeypatch.setattr(bundles, "PACKAGED", folder.parent)
    assert folder.name in bundles.packaged()
    assert Bundle.open(folder.name).path == folder


@pytest.mark.parametrize("name", ["no-such-bundle", "..", "", "a\0b", "x" * 5000])
def test_a_name_that_is_nothing_is_not_found(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(NotFound) as caught:
        Bundle.open(name)
    assert caught.value.code == 4


def test_a_folder_without_manifest_is_not_a_bundle(tmp_path):
    with pytest.raises(NotFound, match=r"holds no bundle\.json"):
        Bundle.open(tmp_path)


def test_the_bundle_in_the_wheel_is_whole():
    if "tiny" not in bundles.packaged():
        pytest.skip("no bundle has been exported into this checkout")
    Bundle.open("tiny").verify()
