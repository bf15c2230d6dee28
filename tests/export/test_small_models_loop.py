"""Pictures of small SD1.5 and SDXL bundles, against a loop of diffusers' own networks and schedulers.

The kinds of model whose loop differs: v-prediction (as Stable Diffusion 2), and few steps (as SDXL Turbo:
from the last timestep, and no unconditional branch). Each goes through the real export and the runtime.
"""

import copy
import dataclasses
import shutil
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

from hyperrt import Runtime
from hyperrt.bundle.bundle import Bundle
from hyperrt.engines.base import Engine
from hyperrt.export import export_bundle, families, onnx_graph, reference, verify
from hyperrt.sampling import loop
from hyperrt.session.decode import pictures_from_pixels
from tests.export import small_models
from tests.export.command_line import config

SEED = 3
PROMPT = "a [V] toy on a beach!"  # "!" is a token of its own for SDXL's second text encoder
PROMPTS = {"subject": "a sks toy on a beach!", "generic": "a toy on a beach!"}
OF_V = {"prediction_type": "v_prediction"}
OF_FEW_STEPS = {"timestep_spacing": "trailing"}


@pytest.fixture(scope="module")
def exported():
    """Folder of the first bundle of each family."""
    return {}


@pytest.fixture(
    scope="module",
    params=[("sd15", OF_V), ("sdxl", OF_V), ("sd15", OF_FEW_STEPS), ("sdxl", OF_FEW_STEPS)],
    ids=["sd15 v", "sdxl v", "sd15 few steps", "sdxl few steps"],
)
def model(request, tmp_path_factory, drawn_photos, exported):
    """A bundle of that kind, a subject, and the networks that it was made from.

    Kinds differ in the manifest: the second of a family copies the graphs of the first, which take long.
    """
    family, own = request.param
    folder = tmp_path_factory.mktemp("model")
    source = small_models.source(family, folder / "tokenizer", small_models.SCHEDULER | own)
    smaller = dataclasses.replace(families.get(family), random=lambda seed: source)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(families.FAMILIES, family, smaller)
        if family in exported:
            patch.setattr(onnx_graph, "write", copied_from(exported[family]))
        bundle = export_bundle(config(family, folder / "bundle", random_weights=0, verify="none"))
    exported.setdefault(family, bundle)
    modules = {name: part.load().float() for name, part in source.parts.items()}
    with Runtime.open(bundle, "onnxruntime") as runtime:
        subject = runtime.personalize(drawn_photos)
        yield SimpleNamespace(source=source, modules=modules, runtime=runtime, subject=subject, own=own)


def copied_from(bundle):
    graphs = Bundle.open(bundle).graphs

    def write(graph, skeletons, modules, folder, *options):
        for path in bundle.glob(f"{graph.name}.onnx*"):
            shutil.copy(path, folder)
        return onnx_graph.Written(graphs[graph.name].weight_bytes, graphs[graph.name].row_bytes)

    return write


def latents_of_diffusers(model, solver, steps, s, kappa):
    """diffusers' pipeline, its UNet's output the paper's eq. 20."""
    pipe = reference.pipeline(model.source, model.modules, solver)
    uncond, texts = reference.encoded_empty(pipe), reference.encoded(pipe, PROMPTS.values())
    branches = reference.hybrid(s, kappa, uncond, texts.of(0), texts.of(1))
    noise = torch.from_numpy(loop.initial_noise(SEED, (4, 16, 16), 1))
    generator = loop.noise_generators(SEED, 1)[0]

    def fresh_noise(*_, **__):
        return torch.from_numpy(generator.standard_normal(noise.shape, np.float32))

    place = "diffusers.schedulers.scheduling_euler_ancestral_discrete.randn_tensor"
    unet, lora = model.modules["unet"], {name: row[None] for name, row in model.subject.lora.items()}
    with reference.adapted(unet, model.source.layout, lora) as use, mock.patch(place, fresh_noise):
        pipe.register_modules(unet=reference.Guided(unet, branches, use))
        return reference.drawn(pipe, uncond, noise, steps)


def compared(model, solver, steps, s, kappa=1.0, **more):
    """Relative difference of the runtime's latents."""
    options = {"solver": solver, "steps": steps, "guidance_scale": s, "kappa": kappa, "seed": SEED, **more}
    if model.source.is_sdxl:
        options["image_scale"] = 0.0  # diffusers' loop has no image tokens here
    found = model.runtime.generate(PROMPT, model.subject, **options).latents
    expected = latents_of_diffusers(model, solver, steps, s, kappa)
    return verify.relative({"latents": found}, {"latents": expected})


def test_the_manifest_names_the_kind_of_model(model):
    bundle: Bundle = model.runtime.bundle
    assert bundle.prediction_type == model.own.get("prediction_type", "epsilon")
    assert bundle.timestep_spacing == model.own.get("timestep_spacing", "leading")


@pytest.mark.parametrize("solver", reference.SCHEDULERS)
def test_many_steps_are_those_of_diffusers(model, solver):
    assert compared(model, solver, 6, s=2.0) < 1e-4
    assert compared(model, solver, 6, s=2.0, kappa=0.5) < 1e-4


@pytest.mark.parametrize("solver", ["euler", "euler_ancestral"])
@pytest.mark.parametrize("steps", [1, 4])
def test_few_steps_without_the_empty_prompt_are_two_rows_and_those_of_diffusers(
    model, solver, steps, monkeypatch
):
    model.runtime.prepare(model.runtime.request("a [V] toy", model.subject))  # other rows than those below
    rows, bind = [], Engine.bind

    def watched(engine, tensors, copy=True):
        if "guidance" in tensors:
            rows.append((len(tensors["gate"]), tensors["guidance"].tolist()))
        bind(engine, tensors, copy)

    monkeypatch.setattr(Engine, "bind", watched)
    assert compared(model, solver, steps, s=0.5) < 1e-4
    assert rows == [(2, [0.5, 0.5])]


@pytest.fixture
def pipeline(model):
    """diffusers' own pipeline of the networks, the test's own."""
    return reference.pipeline(
        model.source, {**model.modules, "unet": copy.deepcopy(model.modules["unet"])}, "euler"
    )


@pytest.mark.parametrize("format", ["diffusers", "kohya"])
def test_at_kappa_2_a_pipeline_with_the_subject_s_file_draws_the_same(model, pipeline, tmp_path, format):
    """There HM-CFG is eps_base(empty) + 2 s (eps_lora(subject) - eps_base(empty)).

    SDXL's empty prompt is all zeros, on which a LoRA of the cross-attention has no effect: plain guidance of
    scale 2 s.  Elsewhere it is that only at s = 1/2, where the empty prompt has no weight.
    """
    s = 2.5 if model.source.is_sdxl else 0.5
    is_drawn_by(pipeline, model, tmp_path, format, 2 * s, kappa=2, guidance_scale=s)


def test_plain_guidance_is_the_pipeline_s_with_the_subject_s_file(model, pipeline, tmp_path):
    is_drawn_by(pipeline, model, tmp_path, "diffusers", 5.0, cfg=True, guidance_scale=5.0)


def is_drawn_by(pipeline, model, tmp_path, format, scale, **options):
    pytest.importorskip("peft")
    options |= {"steps": 4, "seed": SEED, "solver": "euler"}
    if model.source.is_sdxl:
        options["image_scale"] = 0.0
    ours, without = (
        model.runtime.generate(PROMPT, model.subject, strength=strength, **options).latents
        for strength in (1, 0)
    )
    path = tmp_path / "toy.safetensors"
    model.subject.save(path, format)
    pipeline.load_lora_weights(str(path), use_safetensors=True)
    noise = torch.from_numpy(loop.initial_noise(SEED, (4, 16, 16), 1))
    latents = pipeline(
        PROMPTS["subject"], guidance_scale=scale, num_inference_steps=4, latents=noise, output_type="latent"
    ).images.numpy()
    largest = np.abs(latents).max()
    assert np.abs(latents - without).max() / largest > 1e-3  # the subject does something
    assert np.abs(latents - ours).max() / largest < 1e-4


def test_a_photo_prompts_as_diffusers_ip_adapter_does(model, pipeline, tmp_path):
    """From the photo on: its pixels, the image encoder, the tokens beside a prompt and beside none."""
    if not model.source.is_sdxl:
        pytest.skip("the small SD1.5 has no image prompt")
    photo = Image.fromarray(np.random.default_rng(0).integers(256, size=(60, 60, 3), dtype=np.uint8))
    subject = model.runtime.personalize([np.asarray(photo)])
    tensors = reference.published(model.modules["image_prompt"])
    pipeline.load_ip_adapter(tensors, subfolder="", weight_name="", image_encoder_folder=None)
    pipeline.set_ip_adapter_scale(0.55)
    path = tmp_path / "toy.safetensors"
    subject.save(path)
    pipeline.load_lora_weights(str(path), use_safetensors=True)
    noise = torch.from_numpy(loop.initial_noise(SEED, (4, 16, 16), 1))
    options = {"guidance_scale": 5.0, "num_inference_steps": 4, "latents": noise, "output_type": "latent"}
    expected = pipeline(PROMPTS["subject"], ip_adapter_image=photo, **options).images.numpy()
    options = {"solver": "euler", "steps": 4, "guidance_scale": 5.0, "cfg": True, "seed": SEED}
    found, without = (
        model.runtime.generate(PROMPT, subject, image_scale=scale, **options).latents for scale in (0.55, 0)
    )
    assert verify.relative({"x": found}, {"x": expected}) < 1e-3
    assert verify.relative({"x": without}, {"x": expected}) > 1e-2


def test_pictures_are_those_of_diffusers_decoder(model):
    latents = loop.initial_noise(SEED, (4, 16, 16), 2)
    pixels = reference.decoded(model.source, model.modules["vae"], torch.from_numpy(latents))
    assert np.ptp(pixels) > 0.1
    difference = model.runtime.decode(latents).astype(int) - pictures_from_pixels(pixels)
    assert np.abs(difference).max() <= 1  # of 255


def test_the_subject_matters(model):
    """Parity of a LoRA that does nothing would prove nothing."""
    assert compared(model, "euler", 4, s=0.5, strength=0.0) > 1e-3
