"""LoRA files between HyperRT, diffusers and PEFT: no name is missing or too many, and all compute the same.

UNets are small, of SD1.5's and SDXL's structure; names are also those of the true models, without weights.
"""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
from accelerate import init_empty_weights
from diffusers import (
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.utils import convert_state_dict_to_diffusers, convert_state_dict_to_kohya
from safetensors.torch import save_file

from hyperrt.errors import LoraError, LoraMismatch
from hyperrt.export import architectures
from hyperrt.lora import writer
from hyperrt.lora.names import FORMATS
from hyperrt.lora.reader import open_lora
from hyperrt.lora.subject_file import load_subject
from hyperrt.training.data import clip_tokenizer
from hyperrt.training.model import lora_layers
from tests.export import small_models
from tests.hyperrt import lora_files
from tests.hyperrt.lora_files import save_subject

peft = pytest.importorskip("peft")

ORIGIN = {"base_model": "b" * 64, "hypernet": "a" * 64, "class_noun": "mug", "photos": "3", "trigger": "sks"}
FAMILIES = ("sd15", "sdxl")
PIPELINES = {"sd15": StableDiffusionPipeline, "sdxl": StableDiffusionXLPipeline}
CONFIGS = {"sd15": architectures.SD15_UNET, "sdxl": architectures.SDXL_UNET}


def random_lora(layout, seed=0):
    rng = np.random.default_rng(seed)
    return {name: rng.normal(0, 0.3, layout.size(name)).astype(np.float32) for name in ("lora_q", "lora_kv")}


def small_unet(family):
    torch.manual_seed(0)
    return (small_models.SDXL if family == "sdxl" else small_models.SD15)["unet"]().eval()


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def pipeline(family, tmp_path_factory):
    """diffusers' pipeline of small random parts."""
    builders = dict(small_models.SDXL if family == "sdxl" else small_models.SD15)
    del builders["image_encoder"]
    parts = {name: build() for name, build in builders.items()} | {"unet": small_unet(family)}
    tokenizer = clip_tokenizer.build(tmp_path_factory.mktemp("tokenizer"), 77)
    parts |= {"tokenizer": tokenizer, "scheduler": DDIMScheduler()}
    if family == "sdxl":
        return StableDiffusionXLPipeline(**parts, tokenizer_2=tokenizer)
    return StableDiffusionPipeline(
        **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )


@pytest.fixture
def reports(monkeypatch):
    """Of each load into a model: names of the LoRA's that were missing, and that were too many."""
    found, load = [], peft.set_peft_model_state_dict

    def watched(model, state, *args, **options):
        result = load(model, state, *args, **options)
        found.append(([name for name in result.missing_keys if "lora" in name], result.unexpected_keys))
        return result

    monkeypatch.setattr("peft.set_peft_model_state_dict", watched)
    monkeypatch.setattr("peft.peft_model.set_peft_model_state_dict", watched)
    return found


def deltas(unet):
    """Path of every adapted projection -> what the adapter adds to its weight, by PEFT."""
    found = {}
    for name, module in unet.named_modules():
        if hasattr(module, "get_delta_weight"):
            delta = module.get_delta_weight(module.active_adapters[0])
            found[name.removeprefix("base_model.model.")] = delta.detach().numpy()
    return found


def same(found, layout, packed):
    """Whether weights change as by these factors, at every site and nowhere else."""
    expected = {path: (a @ b).T for path, (a, b) in layout.unpack(packed).items()}
    return found.keys() == expected.keys() and all(
        np.allclose(found[path], expected[path], rtol=1e-5, atol=1e-6) for path in expected
    )


# ours there


@pytest.mark.parametrize("format", ["diffusers", "kohya"])
def test_a_pipeline_loads_the_whole_file_and_nothing_is_left(tmp_path, family, pipeline, reports, format):
    layout = lora_layers.layout_of(pipeline.unet, 2)
    packed, path = random_lora(layout), tmp_path / "x.safetensors"
    save_subject(path, packed, layout, ORIGIN | {"family": family}, format)
    pipeline.load_lora_weights(str(path), use_safetensors=True)
    try:
        assert reports == [([], [])]
        assert same(deltas(pipeline.unet), layout, packed)
    finally:
        pipeline.unload_lora_weights()


@pytest.mark.parametrize(
    ("format", "file", "prefix"),
    [
        ("diffusers", "x/x.safetensors", "unet"),
        ("peft", "x/adapter_model.safetensors", "base_model.model"),
    ],
)
def test_a_unet_loads_the_whole_file_and_nothing_is_left(tmp_path, family, reports, format, file, prefix):
    unet = small_unet(family)
    layout = lora_layers.layout_of(unet, 2)
    packed = random_lora(layout)
    (tmp_path / "x").mkdir()
    save_subject(tmp_path / file, packed, layout, ORIGIN, format)
    unet.load_lora_adapter(str(tmp_path / file), prefix=prefix, use_safetensors=True)
    assert reports == [([], [])] and same(deltas(unet), layout, packed)


def test_peft_loads_the_folder_and_nothing_is_left(tmp_path, family, reports):
    unet = small_unet(family)
    layout = lora_layers.layout_of(unet, 2)
    save_subject(tmp_path / "mug", random_lora(layout), layout, ORIGIN, "peft")
    model = peft.PeftModel.from_pretrained(unet, str(tmp_path / "mug"))
    assert reports == [([], [])] and same(deltas(model), layout, random_lora(layout))


@pytest.fixture(scope="module")
def true_unet(family):
    """The published UNet, with no weights."""
    with init_empty_weights():
        return UNet2DConditionModel(**CONFIGS[family])


@pytest.mark.parametrize("format", ["diffusers", "kohya"])
def test_the_names_of_the_true_models_are_those_that_diffusers_knows(
    tmp_path, family, true_unet, reports, format
):
    layout = lora_layers.layout_of(true_unet, 2 if family == "sdxl" else 3)
    assert len(layout.sites) == {"sd15": 48, "sdxl": 210}[family]
    packed, path, kind = random_lora(layout), tmp_path / "x.safetensors", PIPELINES[family]
    save_subject(path, packed, layout, ORIGIN | {"family": family}, format)
    named = " ".join(open_lora(path).entries)
    assert ("input_blocks_4_1" in named) == (format == "kohya" and family == "sdxl")
    state, alphas, said = kind.lora_state_dict(
        str(path), unet_config=true_unet.config, return_lora_metadata=True, use_safetensors=True
    )
    unet = copy.deepcopy(true_unet)
    kind.load_lora_into_unet(dict(state), alphas, unet, metadata=said, low_cpu_mem_usage=True)
    assert reports == [([], [])]
    adapted = {name for name, module in unet.named_modules() if hasattr(module, "lora_A")}
    assert adapted == {site.path for site in layout.sites}
    # Without weights the numbers are looked at by their names in between.
    path_of = {name.replace(".processor", "").replace("_lora.", ".lora."): name for name in state}
    for site, (a, b) in layout.unpack(packed).items():
        down, up = ("lora.down", "lora.up") if format == "kohya" else ("lora_A", "lora_B")
        assert np.array_equal(state[path_of[f"unet.{site}.{down}.weight"]].numpy(), a.T)
        assert np.array_equal(state[path_of[f"unet.{site}.{up}.weight"]].numpy(), b.T)


# theirs here


def adapted_unet(family, **options):
    """A small UNet with a random adapter of PEFT on its cross-attention."""
    config = {"r": 2, "lora_alpha": 3, "target_modules": ["attn2.to_q", "attn2.to_k", "attn2.to_v"]}
    unet = small_unet(family)
    unet.add_adapter(peft.LoraConfig(**{**config, **options}))
    with torch.no_grad():
        for name, weight in unet.named_parameters():
            if "lora_" in name:
                weight.normal_(0, 0.3)
    return unet


PATTERNS = {"rank_pattern": {"to_k": 1}, "alpha_pattern": {"to_v": 5, "attn2.to_q": 0.5}}
OPTIONS = [{}, PATTERNS, {"use_rslora": True}]


def saved_by_peft(unet, folder):
    state = peft.get_peft_model_state_dict(unet)
    save_file({f"base_model.model.{k}": v for k, v in state.items()}, folder / "adapter_model.safetensors")
    unet.peft_config["default"].save_pretrained(str(folder))


def saved_by_diffusers_unet(unet, folder):
    unet.save_lora_adapter(folder)


def saved_by_a_script_of_diffusers(unet, folder):
    layers = convert_state_dict_to_diffusers(peft.get_peft_model_state_dict(unet))
    StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=layers)


def saved_by_diffusers_with_configuration(unet, folder):
    StableDiffusionPipeline.save_lora_weights(
        folder,
        unet_lora_layers=peft.get_peft_model_state_dict(unet),
        unet_lora_adapter_metadata=unet.peft_config["default"].to_dict(),
    )


def saved_for_kohya(unet, folder):
    state = {f"unet.{name}": tensor for name, tensor in peft.get_peft_model_state_dict(unet).items()}
    save_file(convert_state_dict_to_kohya(state), folder / "pytorch_lora_weights.safetensors")


@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "patterns", "rslora"])
@pytest.mark.parametrize(
    "save", [saved_by_peft, saved_by_diffusers_unet, saved_by_diffusers_with_configuration]
)
def test_a_file_with_a_configuration_is_what_peft_computes(tmp_path, family, save, options):
    unet = adapted_unet(family, **options)
    save(unet, tmp_path)
    layout = lora_layers.layout_of(small_unet(family), 4)
    assert same(deltas(unet), layout, load_subject(tmp_path, layout, "b" * 64).lora)


def test_a_header_without_alpha_means_pefts_default(tmp_path, family):
    saved_by_diffusers_with_configuration(adapted_unet(family), tmp_path)
    path = tmp_path / "pytorch_lora_weights.safetensors"
    said = json.loads(open_lora(path).metadata["lora_adapter_metadata"])
    del said["unet.lora_alpha"]
    lora_files.change(path, metadata={"lora_adapter_metadata": json.dumps(said)})
    unet = small_unet(family)
    unet.load_lora_adapter(str(path), prefix="unet", use_safetensors=True)
    layout = lora_layers.layout_of(small_unet(family), 4)
    assert same(deltas(unet), layout, load_subject(path, layout, "b" * 64).lora)


def test_a_start_that_changes_the_base_model_is_refused_from_a_header_too(tmp_path, family):
    saved_by_diffusers_with_configuration(adapted_unet(family, init_lora_weights="pissa_niter_4"), tmp_path)
    with pytest.raises(LoraError, match="is PiSSA, not a plain LoRA"):
        load_subject(tmp_path, lora_layers.layout_of(small_unet(family), 4), "b" * 64)


@pytest.mark.parametrize("save", [saved_by_a_script_of_diffusers, saved_for_kohya])
def test_a_file_without_configuration_is_what_diffusers_loads(tmp_path, pipeline, family, save):
    save(adapted_unet(family), tmp_path)
    layout = lora_layers.layout_of(small_unet(family), 4)
    found = load_subject(tmp_path, layout, "b" * 64).lora
    pipeline.load_lora_weights(str(tmp_path), use_safetensors=True)
    try:
        assert same(deltas(pipeline.unet), layout, found)
    finally:
        pipeline.unload_lora_weights()


@pytest.mark.parametrize("format", FORMATS)
def test_what_was_converted_computes_the_same_there(tmp_path, pipeline, family, reports, format):
    # Of a kohya file diffusers 0.42.1 takes one alpha: it looks for the others under names of its own.
    unet = adapted_unet(family, **(PATTERNS if format != "kohya" else {"rank_pattern": {"to_k": 1}}))
    saved_by_peft(unet, tmp_path)
    target = tmp_path / ("folder" if format == "peft" else "x.safetensors")
    writer.convert(open_lora(tmp_path), target, format, family=family)
    if format == "peft":
        found = deltas(peft.PeftModel.from_pretrained(small_unet(family), str(target)))
    else:
        pipeline.load_lora_weights(str(target), use_safetensors=True)
        found = deltas(pipeline.unet)
        pipeline.unload_lora_weights()
    assert reports == [([], [])]
    expected = deltas(unet)
    assert found.keys() == expected.keys()
    for path, delta in expected.items():
        np.testing.assert_allclose(found[path], delta, rtol=1e-5, atol=1e-7)


def test_an_adapter_of_more_than_the_bundles_sites_is_refused_or_used_in_part(tmp_path, family):
    unet = adapted_unet(family, target_modules=["to_q", "to_k", "to_v", "to_out.0"])
    saved_by_peft(unet, tmp_path)
    layout = lora_layers.layout_of(small_unet(family), 2)
    with pytest.raises(LoraMismatch) as caught:
        load_subject(tmp_path, layout, "b" * 64)
    assert "of self-attention" in caught.value.why and "output of the cross-attention" in caught.value.why
    part = load_subject(tmp_path, layout, "b" * 64, partial=True).lora
    theirs = deltas(unet)
    assert same({path: theirs[path] for path in theirs if path in layout.unpack(part)}, layout, part)
