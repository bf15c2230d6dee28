"""Base models from folders, single files and a hub: what is read, and how what is wrong is said."""

import json
import shutil

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file

from hyperrt.bundle import Bundle
from hyperrt.errors import BadInput, IntegrityError, NotFound, UsageError
from hyperrt.export import assemble, export_bundle, families, loading
from hyperrt.export.errors import ExportError
from hyperrt.export.source import Inputs
from tests.export import small_models
from tests.export.small_models import SDXL

COMMIT = "0123456789" * 4
SCHEDULER = small_models.SCHEDULER | {"prediction_type": "v_prediction", "timestep_spacing": "trailing"}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A small SDXL as diffusers saves it, and a hypernetwork of it in `hypernet`."""
    folder = tmp_path_factory.mktemp("model")
    modules = small_models.save(folder, SDXL, SCHEDULER)
    (folder / "LICENSE.md").write_text("theirs")
    small_models.save_hypernet(folder / "hypernet", folder, modules["unet"])
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """A copy to damage."""
    return shutil.copytree(saved, tmp_path / "model")


def test_a_folder_becomes_a_bundle_with_its_own_rules(saved, tmp_path):
    path = export_bundle("sdxl", Inputs(saved, saved / "hypernet"), tmp_path / "b")
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


def test_a_folder_that_is_no_model_is_refused(tmp_path):
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


def test_weights_that_lack_some_are_refused(folder):
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
    with (
        pytest.raises(ExportError, match=f"of a kind that is not known(?s:.*){key}|layouts differ"),
        families.opened(families.get("sdxl"), Inputs(folder, saved / "hypernet")),
    ):
        pass


@pytest.mark.parametrize("size", [33, 2, 10_000])
def test_a_size_that_the_unet_cannot_draw_is_refused(size, saved):
    with (
        pytest.raises(UsageError, match=f"pictures of {size} pixels(?s:.*)multiples of 4"),
        families.opened(families.get("sdxl"), Inputs(saved, saved / "hypernet", size=size)),
    ):
        pass


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
    assert find(file, like=saved) == loading.Found(saved, file)


def test_a_configuration_of_something_that_has_its_own_is_refused(saved):
    with pytest.raises(UsageError, match=r"would not be read(?s:.*)leave --like out"):
        find(saved, like=saved)


def test_a_hub_id_must_name_its_commit():
    with pytest.raises(UsageError, match="no pinned revision"):
        find("someone/model")
    with pytest.raises(UsageError, match="no pinned revision"):
        find("someone/model@main")


def test_a_name_that_is_nothing_is_not_found():
    with pytest.raises(NotFound, match="no folder, no file and no hub id"):
        find("no such thing")


@pytest.mark.parametrize("offline", [True, False])
def test_a_hub_that_cannot_be_reached_is_said(offline, monkeypatch):
    asked = {}

    def download(name, **options):
        asked.update(options, name=name)
        raise LocalEntryNotFoundError("not in the cache")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(NotFound, match="--offline is given" if offline else "cannot be had from the hub"):
        find(f"someone/model@{COMMIT}", offline=offline)
    assert asked["name"] == "someone/model" and asked["revision"] == COMMIT
    assert asked["local_files_only"] is offline
    assert not any(pattern.endswith((".bin", ".ckpt", ".py")) for pattern in asked["allow_patterns"])


def test_a_dry_run_tells_disk_and_memory(saved):
    family = families.get("sdxl")
    with families.opened(family, Inputs(saved, saved / "hypernet")) as source:
        needed = {
            int8: assemble.needs(source, assemble.graphs.build(source), int8, "graphs")
            for int8 in (False, True)
        }
    assert needed[False].memory > assemble.LIBRARIES
    assert sum(needed[True].disk.values()) < sum(needed[False].disk.values())
