"""The configurations of a base model's folder, read as diffusers' pipelines read them."""

import json

import pytest
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

from hyperrt.training.model import base_model, model_config
from tests.export import small_models

STEM = "diffusion_pytorch_model"


def written(folder, name, **content):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(content))


@pytest.mark.parametrize("version", ["0.4.0", "0.8.1", "0.9.0", "0.10.2", "0.42.0", None])
@pytest.mark.parametrize("size", [32, 64, 96])
def test_the_size_is_the_one_that_diffusers_pipeline_takes(version, size, tmp_path):
    unet = UNet2DConditionModel(**small_models.UNET | {"sample_size": size}, **small_models.SD15_BLOCKS)
    if version:
        unet.register_to_config(_diffusers_version=version)
    found = model_config.sample_size(dict(unet.config), tmp_path)
    others = dict.fromkeys(("vae", "text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
    pipe = StableDiffusionPipeline(
        unet=unet, scheduler=DDIMScheduler(), requires_safety_checker=False, **others
    )
    assert found == pipe.unet.config.sample_size


def test_an_sdxl_of_an_old_diffusers_has_its_own_size(tmp_path):
    (tmp_path / "text_encoder_2").mkdir()
    config = {"sample_size": 32, "_diffusers_version": "0.4.0"}
    assert model_config.sample_size(config, tmp_path) == 32


@pytest.mark.parametrize("size", [[64, 96], None, 0, "64", True])
def test_a_size_that_is_not_one_number_is_refused(size, tmp_path):
    with pytest.raises(ValueError, match="sample_size is"):
        model_config.sample_size({"sample_size": size}, tmp_path)


@pytest.mark.parametrize(
    ("part", "kind"),
    [
        ("unet", "UNet3DConditionModel"), ("text_encoder", "ChatGLMModel"), ("vae", "VQModel"),
        ("text_encoder", "CLIPTextModelWithProjection"), ("tokenizer", "T5Tokenizer"),
    ],
)  # fmt: skip
def test_a_class_in_the_index_that_is_not_read_is_named(part, kind, tmp_path):
    written(tmp_path, "model_index.json", **{part: ["a library", kind]})
    with pytest.raises(ValueError, match=f"{part} is of the class '{kind}'"):
        model_config.check_index(tmp_path, base_model.PARTS)
    model_config.check_index(tmp_path, base_model.PARTS, but=[part])


@pytest.mark.parametrize("entry", [[None, None], None, [], "unet", {}, ["diffusers", "UNet2DConditionModel"]])
def test_an_index_that_names_no_other_class_is_no_fault(entry, tmp_path):
    written(tmp_path, "model_index.json", unet=entry, tokenizer=["transformers", "CLIPTokenizerFast"])
    model_config.check_index(tmp_path, base_model.PARTS)


def test_a_folder_without_an_index_is_no_fault(tmp_path):
    assert model_config.index_of(tmp_path) == {}
    (tmp_path / "model_index.json").write_text("[]")
    assert model_config.index_of(tmp_path) == {}


def test_a_scheduler_of_the_index_is_the_one_that_is_read(tmp_path):
    written(tmp_path, "scheduler/scheduler_config.json", beta_start=0.1, _class_name="DDIMScheduler")
    written(tmp_path, "model_index.json", scheduler=["diffusers", "LCMScheduler"])
    found = model_config.scheduler(tmp_path)
    assert (found["beta_start"], found["beta_schedule"]) == (0.1, "scaled_linear")
    written(tmp_path, "model_index.json", scheduler=["diffusers", "EDMEulerScheduler"])
    with pytest.raises(ValueError, match="EDMEulerScheduler"):
        model_config.scheduler(tmp_path)


@pytest.mark.parametrize(
    ("names", "read"),
    [
        ([], []),
        (["lora.safetensors", f"{STEM}.non_ema.safetensors", f"{STEM}.bin"], []),
        ([f"{STEM}.safetensors", f"{STEM}.fp16.safetensors"], [f"{STEM}.safetensors"]),
        ([f"{STEM}.fp16.safetensors"], [f"{STEM}.fp16.safetensors"]),
        (
            [
                f"{STEM}.safetensors.index.json",
                f"{STEM}-00001-of-00001.safetensors",
                f"{STEM}.fp16.safetensors",
            ],
            [f"{STEM}.safetensors.index.json", f"{STEM}-00001-of-00001.safetensors"],
        ),
        (
            [f"{STEM}.safetensors.index.fp16.json", f"{STEM}.fp16-00001-of-00001.safetensors"],
            [f"{STEM}.safetensors.index.fp16.json", f"{STEM}.fp16-00001-of-00001.safetensors"],
        ),
    ],
    ids=["nothing", "other files", "both precisions", "fp16", "shards", "shards of fp16"],
)
def test_weights_are_read_in_one_precision(names, read):
    assert model_config.weights(names, STEM) == read
