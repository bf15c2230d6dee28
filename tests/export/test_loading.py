"""Base models from folders, single files and a hub: what is read, and errors."""

import json
import shutil

import pytest
import torch
from diffusers import AutoencoderTiny
from safetensors.torch import load_file, save_file
from transformers import CLIPTokenizer

from hyperrt.bundle.bundle import Bundle
from hyperrt.errors import BadInput, IntegrityError, NotFound, UsageError
from hyperrt.export import assemble, export_bundle, graph_specs, loading, read_source
from hyperrt.export.errors import ExportError
from hyperrt.export.parts import random_part
from hyperrt.export.source import sized
from hyperrt.training.model import weight_hash
from tests.export import original_layout, small_models
from tests.export.command_line import config
from tests.export.small_models import SDXL

SCHEDULER = small_models.SCHEDULER | {"prediction_type": "v_prediction", "timestep_spacing": "trailing"}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A small SDXL as diffusers saves it, and a hypernetwork of it in `hypernet`."""
    folder = tmp_path_factory.mktemp("model")
    modules = small_models.save(folder, SDXL, SCHEDULER)
    (folder / "LICENSE.md").write_text("theirs")
    small_models.save_hypernet(folder / "hypernet", folder, modules["unet"])
    return folder


def of_sdxl(saved, base, output="new", **options):
    """An export of that base model and the hypernetwork of `saved`."""
    return config("sdxl", output, base=base, hypernet=saved / "hypernet", **options)


@pytest.fixture
def folder(saved, tmp_path):
    """A copy to damage."""
    return shutil.copytree(saved, tmp_path / "model")


def test_a_folder_becomes_a_bundle_with_its_own_rules(saved, tmp_path):
    path = export_bundle(of_sdxl(saved, saved, tmp_path / "b"))
    bundle = Bundle.open(path)
    assert max(bundle.parity.values()) <= 1e-4
    assert bundle.hashes.base_model == loading.parts_of(saved)["unet"].hash(half=True)
    assert (bundle.prediction_type, bundle.timestep_spacing) == ("v_prediction", "trailing")
    assert bundle.prompts.zero_empty and bundle.prompts.pad_2 is not None
    assert (path / "LICENSES").read_text() == "theirs"


def test_weights_of_half_precision_are_the_same_model(saved, folder):
    for path in folder.glob("*/*.safetensors"):
        half = {name: t.half() if t.is_floating_point() else t for name, t in load_file(path).items()}
        save_file(half, path, {"format": "pt"})
    part = loading.parts_of(folder)["unet"]
    assert next(part.read().parameters()).dtype == torch.float16
    assert part.hash(half=True) == loading.parts_of(saved)["unet"].hash(half=True)


def test_the_variant_fp16_is_read_where_it_is_the_only_one(saved, folder):
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    path.rename(path.with_name("diffusion_pytorch_model.fp16.safetensors"))
    part = loading.parts_of(folder)["unet"]
    assert part.hash(half=True) == loading.parts_of(saved)["unet"].hash(half=True)


@pytest.mark.parametrize("name", ["unet", "text_encoder"])
def test_weights_in_shards_are_read(name, saved, folder):
    path = next((folder / name).glob("*.safetensors"))
    tensors = load_file(path)
    halves = [dict(list(tensors.items())[k::2]) for k in range(2)]
    weight_map = {}
    for k, half in enumerate(halves):
        shard = path.with_name(f"{path.stem}-0000{k + 1}-of-00002.safetensors")
        save_file(half, shard, {"format": "pt"})
        weight_map |= dict.fromkeys(half, shard.name)
    path.unlink()
    index = path.with_name(f"{path.name}.index.json")
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    part = loading.parts_of(folder)[name]
    assert part.hash(half=True) == loading.parts_of(saved)[name].hash(half=True)
    shard.unlink()
    with pytest.raises(NotFound, match=r"not complete(?s:.*)00002-of-00002.safetensors is missing"):
        loading.parts_of(folder)


def test_a_configuration_may_begin_with_a_byte_order_mark(tmp_path):
    (tmp_path / "x.json").write_text('{"a": 1}', encoding="utf-8-sig")
    assert loading.read_json(tmp_path / "x.json") == {"a": 1}


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(NotFound, match=r"no base model(?s:.*)it has no unet, vae"):
        loading.parts_of(tmp_path)


def test_a_model_without_the_hypernetworks_encoder_asks_for_it(saved, folder, tmp_path):
    shutil.move(folder / "image_encoder", tmp_path / "vit")
    with pytest.raises(NotFound, match="--image-encoder DIR"):
        loading.parts_of(folder)
    found = loading.parts_of(folder, tmp_path / "vit")["image_encoder"]
    assert found.hash(half=True) == loading.parts_of(saved)["image_encoder"].hash(half=True)


def test_pickles_are_refused_with_advice(folder):
    path = next((folder / "vae").glob("*.safetensors"))
    path.rename(path.with_name("diffusion_pytorch_model.bin"))
    with pytest.raises(BadInput, match=r"no safetensors(?s:.*)is a pickle(?s:.*)safe_serialization"):
        loading.parts_of(folder)


def test_a_truncated_file_is_found_before_it_is_needed(folder):
    path = next((folder / "vae").glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(IntegrityError, match=path.name):
        loading.parts_of(folder)


def test_incomplete_weights_are_refused(folder):
    path = next((folder / "unet").glob("*.safetensors"))
    tensors = load_file(path)
    tensors.pop("conv_in.weight")
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(IntegrityError, match=r"conv_in\.weight"):
        loading.parts_of(folder)["unet"].read()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("in_channels", 9), ("time_cond_proj_dim", 16), ("class_embed_type", "timestep"),
        ("cross_attention_dim", 8),
    ],
)  # fmt: skip
def test_a_unet_of_another_kind_is_refused(key, value, saved, folder):
    path = folder / "unet" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(ExportError, match=rf"of a kind that is not known(?s:.*){key}|layouts differ"):
        read_source.read(of_sdxl(saved, folder))


@pytest.mark.parametrize("size", [33, 2, 10_000])
def test_a_size_that_the_unet_cannot_draw_is_refused(size, saved):
    source = read_source.read(of_sdxl(saved, saved))
    with pytest.raises(UsageError, match=rf"pictures of {size} pixels(?s:.*)multiples of 4"):
        sized(source, size)


def find(model, like=None, offline=False):
    return loading.find(str(model), like and str(like), offline)


def test_a_pickled_checkpoint_is_refused(tmp_path):
    with pytest.raises(BadInput, match="ckpt files are pickles"):
        find(tmp_path / "model.ckpt")


def test_a_single_file_needs_a_configuration(saved, tmp_path):
    file = tmp_path / "model.safetensors"
    save_file({"x": torch.zeros(1)}, file)
    with pytest.raises(UsageError, match="--like DIR"):
        find(file)
    with pytest.raises(UsageError, match="is a file of weights"):
        find(file, like=file)
    with pytest.raises(NotFound, match="no such file"):
        find(tmp_path / "other.safetensors")
    assert find(file, like=saved) == loading.ModelFiles(saved, file)


def test_like_is_refused_for_a_model_with_a_configuration(saved):
    with pytest.raises(UsageError, match=r"would not be read(?s:.*)leave --like out"):
        find(saved, like=saved)


def test_a_model_that_does_not_exist_is_not_found():
    with pytest.raises(NotFound, match="not a folder, a file or a hub id"):
        find("no such thing")


# another VAE

ALONE = {
    "original, with its prefix": lambda vae: {
        original_layout.VAE + k: t for k, t in original_layout.of_vae(vae).items()
    },
    "original": lambda vae: original_layout.of_vae(vae),
    "diffusers'": lambda vae: vae.state_dict(),
    "diffusers' of before 0.16": lambda vae: {
        old_name(key): tensor for key, tensor in vae.state_dict().items()
    },
}


def old_name(key):
    for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
        key = key.replace(f"mid_block.attentions.0.{new}.", f"mid_block.attentions.0.{old}.")
    return key


def another_vae(seed=1):
    """A VAE like the saved model's, with other weights."""
    return random_part("vae", SDXL["vae"], seed).read().float()


def with_vae(saved, vae):
    """The networks of the saved model with another VAE."""
    return loading.parts_of(saved, vae=loading.find_vae(str(vae), saved, False))


@pytest.mark.parametrize("layout", ALONE)
def test_a_vae_may_come_as_a_file(layout, saved, tmp_path):
    vae, file = another_vae(), tmp_path / "vae.safetensors"
    tensors = {key: tensor.contiguous() for key, tensor in ALONE[layout](vae).items()}
    save_file(tensors | {"loss.logvar": torch.zeros(1)}, file)
    parts = with_vae(saved, file)
    assert parts["vae"].hash(half=True) == weight_hash.hash_of(vae, half=True)
    assert parts["unet"].hash(half=True) == loading.parts_of(saved)["unet"].hash(half=True)


@pytest.mark.parametrize("place", ["", "vae"])
def test_a_vae_may_come_as_a_folder_or_in_that_of_a_model(place, saved, tmp_path):
    vae = another_vae()
    vae.save_pretrained(tmp_path / place)
    assert with_vae(saved, tmp_path)["vae"].hash(half=True) == weight_hash.hash_of(vae, half=True)


def test_a_model_without_a_vae_takes_one(folder, saved, tmp_path):
    shutil.rmtree(folder / "vae")
    with pytest.raises(NotFound, match=r"has no VAE(?s:.*)--vae FILE"):
        loading.parts_of(folder)
    save_file(another_vae().state_dict(), tmp_path / "vae.safetensors")
    with pytest.raises(NotFound, match=r"the VAE has no configuration(?s:.*)a folder in diffusers' format"):
        with_vae(folder, tmp_path / "vae.safetensors")
    assert "vae" in with_vae(folder, saved)


def test_a_single_file_without_a_vae_takes_one(saved, tmp_path):
    modules = {name: part.read() for name, part in loading.parts_of(saved).items()}
    file, vae = tmp_path / "model.safetensors", tmp_path / "vae.safetensors"
    tensors = original_layout.original(modules)
    save_file({key: t for key, t in tensors.items() if not key.startswith(original_layout.VAE)}, file)
    with pytest.raises(BadInput, match=r"has no vae(?s:.*)--vae FILE, DIR or OWNER/NAME@COMMIT"):
        loading.parts_of(saved, file=file)
    save_file(another_vae().state_dict(), vae)
    found = loading.parts_of(saved, file=file, vae=loading.find_vae(str(vae), saved, False))
    assert found["vae"].hash(half=True) == weight_hash.hash_of(another_vae(), half=True)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"scaling_factor": 0.5}, "scaling_factor 0.5, the base model's scaling_factor 0.18215"),
        ({"latents_mean": [1.0] * 4, "latents_std": [2.0] * 4}, "mean .* std"),
    ],
)
def test_a_vae_whose_latents_mean_something_else_is_refused(settings, words, saved, tmp_path):
    small_models.vae(**settings).save_pretrained(tmp_path)
    with pytest.raises(ExportError, match=rf"does not fit the base model(?s:.*){words}"):
        with_vae(saved, tmp_path)


def test_a_tiny_vae_may_have_another_scale(saved, tmp_path):
    blocks = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    counts = {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)}
    AutoencoderTiny(**blocks, **counts).save_pretrained(tmp_path)
    assert with_vae(saved, tmp_path)["vae"].skeleton.config.scaling_factor == 1.0


def test_a_vae_of_another_architecture_is_refused(saved, tmp_path):
    file = tmp_path / "vae.safetensors"
    save_file(another_vae().state_dict() | {"decoder.conv_out.weight": torch.zeros(3, 9, 3, 3)}, file)
    with pytest.raises(ExportError, match=r"of another architecture than the VAE of(?s:.*)--vae a folder"):
        with_vae(saved, file)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04"], ids=["empty", "a zip"])
def test_a_damaged_vae_is_reported(content, saved, tmp_path):
    (tmp_path / "vae.safetensors").write_bytes(content)
    with pytest.raises(IntegrityError, match=r"vae\.safetensors is damaged"):
        with_vae(saved, tmp_path / "vae.safetensors")


def test_a_bundle_with_another_vae_is_of_the_same_base_model(saved, tmp_path):
    """A LoRA belongs to the UNet: subject files and hypernetworks fit as before."""
    vae = another_vae()
    vae.save_pretrained(tmp_path / "vae")
    (tmp_path / "vae" / "LICENSE").write_text("the VAE's")
    source = read_source.read(of_sdxl(saved, saved, vae=tmp_path / "vae"))
    assert source.parts["unet"].hash(half=True) == loading.parts_of(saved)["unet"].hash(half=True)
    assert source.parts["vae"].hash(half=True) == weight_hash.hash_of(vae, half=True)
    assert source.license.startswith("theirs\n---- the VAE") and source.license.endswith("the VAE's")


# two tokenizers


@pytest.mark.parametrize(
    "change", [{"model_max_length": 20}, {"added": "<subject>"}], ids=["length", "token"]
)
def test_tokenizers_that_read_text_in_two_ways_are_refused(change, folder, saved):
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer_2")
    tokenizer.model_max_length = change.get("model_max_length", tokenizer.model_max_length)
    tokenizer.add_tokens(change.get("added", "!"), special_tokens=True)
    tokenizer.save_pretrained(folder / "tokenizer_2")
    with pytest.raises(ExportError, match="read text in two ways"):
        read_source.read(of_sdxl(saved, folder))


def test_a_word_that_stands_for_several_is_refused(folder):
    """diffusers keeps a textual inversion of several vectors so."""
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    tokenizer.add_tokens(["<mug>", "<mug>_1"])
    tokenizer.save_pretrained(folder / "tokenizer")
    with pytest.raises(ExportError, match="reads <mug> as <mug> <mug>_1"):
        loading.tokenizer_of(folder / "tokenizer", loading.parts_of(folder)["text_encoder"])


def test_int8_needs_less_disk_space(saved):
    source = read_source.read(of_sdxl(saved, saved))
    plain, int8 = (
        assemble.needs(source, graph_specs.build(source), of_sdxl(saved, saved, quantize=quantize))
        for quantize in ("none", "int8")
    )
    assert plain.memory > assemble.LIBRARIES
    assert sum(int8.disk.values()) < sum(plain.disk.values())
