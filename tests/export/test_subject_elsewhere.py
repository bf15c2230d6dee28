"""A subject file in diffusers and PEFT: it loads there, and gives the picture that the runtime gives."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from safetensors.torch import load_file

from hyperrt import Runtime
from hyperrt.lora import combine
from hyperrt.sampling import loop
from tests.export import merged

peft = pytest.importorskip("peft")

PROMPT, STEPS, SEED = "a [V] robot on a beach", 6, 11


@pytest.fixture
def unet(modules):
    """The base model's UNet as diffusers would load it, the test's own."""
    return copy.deepcopy(modules["unet"])


@pytest.fixture(scope="module")
def made(exported, drawn_photos):
    """A subject, and what the runtime makes of it; κ = 2 and s = 1/2 leave nothing but its own branch."""
    with Runtime.open(exported, "onnxruntime") as runtime:
        subject = runtime.personalize(drawn_photos, class_noun="robot")
        alone = {"kappa": 2, "guidance_scale": 0.5, "solver": "ddim", "steps": STEPS, "seed": SEED}
        return subject, runtime.generate(PROMPT, subject, **alone)


def save(path, subject, format):
    subject.save(path, format)
    return path


# Pictures


@pytest.fixture
def pipeline(source, modules, unet):
    """diffusers' own pipeline, of the parts that the bundle was made from."""
    pipeline = StableDiffusionPipeline(
        vae=modules["vae"], text_encoder=modules["text_encoder"], tokenizer=source.tokenizer, unet=unet,
        scheduler=DDIMScheduler.from_config(source.scheduler), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline, source, output):
    """What the pipeline makes of the prompt, as "latent" or "np"; no guidance, so one branch here too."""
    unet = source.config("unet")
    shape = (unet.in_channels, unet.sample_size, unet.sample_size)
    latents = torch.from_numpy(loop.initial_noise(SEED, shape, 1))
    prompt = PROMPT.replace("[V]", source.token)
    result = pipeline(
        prompt, guidance_scale=1.0, num_inference_steps=STEPS, latents=latents, output_type=output
    ).images
    return result.numpy() if output == "latent" else np.rint(result * 255).astype(int)


@pytest.mark.parametrize("format", ["diffusers", "kohya", "peft"])
def test_diffusers_draws_the_picture_of_the_runtime_from_the_same_file(
    tmp_path, pipeline, source, made, format
):
    subject, ours = made
    of_the_base = draw(pipeline, source, "latent")
    if format == "peft":
        folder = save(tmp_path / "robot", subject, format)
        pipeline.unet = peft.PeftModel.from_pretrained(pipeline.unet, str(folder)).get_base_model()
    else:
        pipeline.load_lora_weights(str(save(tmp_path / "robot.safetensors", subject, format)))
    latents = draw(pipeline, source, "latent")
    scale = np.abs(latents).max()
    assert np.abs(latents - of_the_base).max() / scale > 2e-3  # the subject does something
    assert np.abs(latents - ours.latents).max() / scale < 1e-4
    assert np.abs(draw(pipeline, source, "np") - ours.images).max() <= 1


# UNets


def run(unet):
    config, generator = unet.config, torch.Generator().manual_seed(1)
    latents = torch.randn(1, config.in_channels, config.sample_size, config.sample_size, generator=generator)
    text = torch.randn(1, 5, config.cross_attention_dim, generator=generator)
    with torch.no_grad():
        return unet(latents, 7, text).sample.numpy()


def load_in_diffusers(unet, path, layout):
    unet.load_lora_adapter(str(path), prefix="unet", use_safetensors=True)


def load_in_peft(unet, path, layout):
    targets = [site.path for site in layout.sites]
    config = peft.LoraConfig(r=layout.rank, lora_alpha=layout.rank, target_modules=targets)
    peft.inject_adapter_in_model(config, unet)
    report = peft.set_peft_model_state_dict(unet, load_file(path))
    assert not report.unexpected_keys
    assert not [key for key in report.missing_keys if "lora_" in key]


@pytest.mark.parametrize(("format", "load"), [("diffusers", load_in_diffusers), ("peft", load_in_peft)])
def test_a_unet_with_the_file_computes_with_the_factors(tmp_path, unet, source, made, format, load):
    layout, subject = source.layout, made[0]
    expected = run(merged.personalised(unet, layout, subject.lora))
    theirs = copy.deepcopy(unet)
    load(theirs, save(tmp_path / "robot.safetensors", subject, format), layout)
    assert np.abs(expected - run(unet)).max() > 1e-2
    np.testing.assert_allclose(run(theirs), expected, rtol=1e-4, atol=1e-5)


def test_peft_loads_the_folder(tmp_path, unet, source, made):
    expected = run(merged.personalised(unet, source.layout, made[0].lora))
    folder = save(tmp_path / "robot", made[0], "peft")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(unet), str(folder))
    np.testing.assert_allclose(run(theirs.eval()), expected, rtol=1e-4, atol=1e-5)


def test_combined_photos_change_in_diffusers_what_each_changes_on_average(tmp_path, unet, source, made):
    layout, subject = source.layout, made[0]
    photos = [subject.lora, {name: vector[::-1].copy() for name, vector in subject.lora.items()}]
    each = [merged.personalised(unet, layout, lora) for lora in photos]
    mean = copy.deepcopy(unet)
    for site in layout.sites:
        weights = [one.get_submodule(site.path).weight.data for one in each]
        mean.get_submodule(site.path).weight.data = torch.stack(weights).mean(0)
    file = tmp_path / "robot.safetensors"
    wide = combine.combined_layout(layout, "concat", len(photos))
    lora = combine.concatenated(photos, layout)
    dataclasses.replace(subject, lora=lora, layout=wide).save(file)
    theirs = copy.deepcopy(unet)
    load_in_diffusers(theirs, file, wide)
    np.testing.assert_allclose(run(theirs), run(mean), rtol=1e-4, atol=1e-5)
