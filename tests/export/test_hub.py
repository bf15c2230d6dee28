"""Files that are downloaded from a hub: only those that are read. A stand-in replaces the network."""

import json
import shutil
from unittest import mock

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError
from huggingface_hub.utils import filter_repo_objects

from hyperrt.errors import BadInput, NotFound, UsageError
from hyperrt.export import hub, loading
from tests.export import small_models

ID = f"someone/model@{'0123456789' * 4}"
READ = [
    "LICENSE.md", "model_index.json", "scheduler/scheduler_config.json",
    "text_encoder/config.json", "text_encoder/model.safetensors",
    "text_encoder_2/config.json", "text_encoder_2/model.safetensors",
    "tokenizer/merges.txt", "tokenizer/tokenizer_config.json", "tokenizer/vocab.json",
    "tokenizer_2/tokenizer.json",
    "unet/config.json", "unet/diffusion_pytorch_model-00001-of-00002.safetensors",
    "unet/diffusion_pytorch_model-00002-of-00002.safetensors",
    "unet/diffusion_pytorch_model.safetensors.index.json",
    "vae/config.json", "vae/diffusion_pytorch_model.fp16.safetensors",
]  # fmt: skip
OTHERS = [
    "README.md", "sd_xl_base_1.0.safetensors", "sd_xl_offset_lora[1].safetensors", "v1-5-pruned.ckpt",
    "vae_1_0/config.json", "vae_1_0/diffusion_pytorch_model.safetensors", "feature_extractor/LICENSE",
    "safety_checker/config.json", "safety_checker/model.safetensors", "pipeline.py", "unet/LICENSE.txt",
    "text_encoder/model.fp16.safetensors", "text_encoder/pytorch_model.bin", "text_encoder/model.onnx",
    "text_encoder/openvino_model.xml", "text_encoder/flax_model.msgpack", "tokenizer/notes.txt",
    "unet/diffusion_pytorch_model.fp16.safetensors", "unet/diffusion_pytorch_model.non_ema.safetensors",
    "unet/other.json", "unet/old/config.json",
]  # fmt: skip


def remote(folder, files, monkeypatch):
    """A stand-in for the hub's client with its real signatures, whose repository has `files`."""

    def download(name, *, revision=None, allow_patterns=None, local_files_only=False, **_):
        return str(folder)

    client = mock.create_autospec(huggingface_hub.snapshot_download, side_effect=download)
    listing = mock.create_autospec(huggingface_hub.list_repo_files, return_value=list(files))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", client)
    monkeypatch.setattr(huggingface_hub, "list_repo_files", listing)
    return client


def asked(client, files):
    """The files that the client would download, by its own rule."""
    return sorted(filter_repo_objects(files, allow_patterns=client.call_args.kwargs["allow_patterns"]))


def test_of_a_repository_exactly_what_is_read_is_downloaded(tmp_path, monkeypatch):
    files = READ + OTHERS
    client = remote(tmp_path, files, monkeypatch)
    assert loading.find(ID, None, False) == loading.ModelFiles(tmp_path)
    assert asked(client, files) == sorted(READ)
    assert client.call_args.kwargs["revision"] == ID.partition("@")[2]


def test_a_file_name_is_not_read_as_a_pattern(tmp_path, monkeypatch):
    files = ["vae/config.json", "vae/diffusion_pytorch_model.safetensors", "LICENSE[1]", "LICENSE1"]
    client = remote(tmp_path, files, monkeypatch)
    hub.fetch(ID, False, lambda files: ["LICENSE[1]"])
    assert asked(client, files) == ["LICENSE[1]"]


def test_weights_that_come_from_elsewhere_are_not_downloaded(tmp_path, monkeypatch):
    client = remote(tmp_path, READ, monkeypatch)
    loading.find(ID, None, False, but=["vae"])
    assert {*READ} - {*asked(client, READ)} == {"vae/diffusion_pytorch_model.fp16.safetensors"}


def test_a_configuration_comes_without_weights(tmp_path, monkeypatch):
    (tmp_path / "model.safetensors").write_bytes(b"")
    client = remote(tmp_path, READ + OTHERS, monkeypatch)
    loading.find(str(tmp_path / "model.safetensors"), ID, False)
    configuration = [
        name for name in READ if "diffusion_pytorch_model" not in name and "safetensors" not in name
    ]
    assert asked(client, READ + OTHERS) == sorted(configuration)


@pytest.mark.parametrize("place", ["", "vae/"])
def test_a_vae_may_come_from_the_repository_of_a_vae_or_of_a_model(place, tmp_path, monkeypatch):
    small_models.vae().save_pretrained(tmp_path / place)
    expected = [f"{place}config.json", f"{place}diffusion_pytorch_model.safetensors"]
    files = ["LICENSE", *expected, "sdxl.vae.safetensors", "unet/config.json", f"{place}pytorch_model.bin"]
    client = remote(tmp_path, files, monkeypatch)
    found = loading.find_vae(ID, tmp_path, False)
    assert found == loading.ModelFiles(tmp_path / place)
    assert asked(client, files) == sorted(["LICENSE", *expected])


@pytest.mark.parametrize(
    "name", ["unet/diffusion_pytorch_model.bin", "unet/diffusion_pytorch_model.bin.index.json"]
)
def test_pickles_alone_are_refused_before_anything_is_downloaded(name, tmp_path, monkeypatch):
    client = remote(tmp_path, ["model_index.json", "unet/config.json", name], monkeypatch)
    with pytest.raises(BadInput, match=r"someone/model@.*: unet/ has no safetensors"):
        loading.find(ID, None, False)
    assert not client.called


def test_without_a_network_the_cache_is_used(tmp_path, monkeypatch):
    client = remote(tmp_path, [], monkeypatch)
    monkeypatch.setattr(huggingface_hub, "list_repo_files", mock.Mock(side_effect=RuntimeError("no network")))
    assert loading.find(ID, None, False) == loading.find(ID, None, True) == loading.ModelFiles(tmp_path)
    assert [call.kwargs["local_files_only"] for call in client.call_args_list] == [True, True]


def test_an_incomplete_snapshot_is_reported(tmp_path, monkeypatch):
    small_models.save(tmp_path, small_models.SD15)
    shutil.rmtree(tmp_path / "unet")
    remote(tmp_path, [], monkeypatch)
    with pytest.raises(NotFound, match="it has no unet"):
        loading.parts_of(loading.find(ID, None, True).folder)


@pytest.mark.parametrize("offline", [True, False])
def test_an_unreachable_hub_is_reported(offline, tmp_path, monkeypatch):
    client = remote(tmp_path, [], monkeypatch)
    client.side_effect = LocalEntryNotFoundError("not in the cache")
    monkeypatch.setattr(huggingface_hub, "list_repo_files", mock.Mock(side_effect=RuntimeError("no network")))
    why = "--offline is given" if offline else "no network"
    with pytest.raises(NotFound, match=rf"cannot be downloaded from the hub(?s:.*){why}"):
        loading.find(ID, None, offline)


@pytest.mark.parametrize("find", [loading.find, loading.find_vae])
@pytest.mark.parametrize("name", ["someone/model", "someone/model@main"])
def test_a_hub_id_must_name_its_commit(find, name):
    with pytest.raises(UsageError, match="no pinned revision"):
        find(name, None, False)


def test_a_repository_without_a_vae_is_reported(tmp_path, monkeypatch):
    (tmp_path / "model_index.json").write_text(json.dumps({}))
    remote(tmp_path, ["diffusion_pytorch_model.safetensors"], monkeypatch)
    with pytest.raises(NotFound, match="no VAE can be read from someone/model@"):
        loading.find_vae(ID, tmp_path, False)
