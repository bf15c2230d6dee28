from __future__ import annotations

import copy

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from safetensors.torch import save_file
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from hyperrt.errors import BadInput, Incompatible, IntegrityError, NotFound
from hyperrt.training.model import image_prompt, lora_layers
from hyperrt.training.model.image_prompt import ImagePrompt
from hyperrt.training.model.lora_layers import Rows
from tests.training import full_size

FEATURES, TOKENS, DIM, ROWS = 12, 3, 16, 2


@pytest.fixture(scope="module")
def prompt(parts):
    torch.manual_seed(0)
    return ImagePrompt(parts.unet, FEATURES, TOKENS, DIM, heads=1).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def features():
    return torch.randn(ROWS, 5, FEATURES, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def file(prompt, tmp_path):
    path = tmp_path / "ip-adapter-plus.safetensors"
    save_file({name: tensor.half().contiguous() for name, tensor in prompt.state_dict().items()}, path)
    return path


def test_diffusers_reads_its_weights_and_computes_the_same(parts, prompt, features):
    """Numbering of the attentions, resampler and decoupled attention, against diffusers' own loader."""
    generator = torch.Generator().manual_seed(2)
    latents = torch.randn(ROWS, 8, 8, 8, generator=generator)
    text = torch.randn(ROWS, 16, 32, generator=generator)
    halves = {"image_proj": {}, "ip_adapter": {}}
    for name, tensor in prompt.state_dict().items():
        half, key = name.split(".", 1)
        halves[half][key] = tensor
    theirs = copy.deepcopy(parts.unet)
    theirs.set_attn_processor(AttnProcessor2_0())  # another test may have made them ours
    theirs._load_ip_adapter_weights([halves], low_cpu_mem_usage=False)
    for processor in theirs.attn_processors.values():
        if hasattr(processor, "scale"):
            processor.scale = [0.55]
    expected = theirs(latents, 500, text, added_cond_kwargs={"image_embeds": [features[:, None]]}).sample

    ours = copy.deepcopy(parts.unet)
    lora_layers.install(ours)
    image = prompt.key_values(prompt.tokens(features), torch.full((ROWS,), 0.55))
    options = {"rows": Rows({}, torch.ones(ROWS, 1, 1), image=image)}
    found = ours(latents, 500, text, cross_attention_kwargs=options).sample
    error = (found - expected).abs().max() / expected.abs().max()
    without = parts.unet(latents, 500, text).sample
    assert error < 1e-5
    assert (without - expected).abs().max() / expected.abs().max() > 1e-3


def test_its_parameters_are_numbered_as_published():
    with torch.device("meta"):
        prompt = ImagePrompt(full_size.sdxl())
    shapes = {name: tuple(tensor.shape) for name, tensor in prompt.state_dict().items()}
    numbers = sorted({int(name.split(".")[1]) for name in shapes if name.startswith("ip_adapter.")})
    assert numbers == list(range(1, 140, 2))
    assert shapes["ip_adapter.1.to_k_ip.weight"] == (640, 2048)
    assert shapes["ip_adapter.139.to_v_ip.weight"] == (1280, 2048)
    assert shapes["image_proj.latents"] == (1, 16, 1280)
    assert shapes["image_proj.proj_out.weight"] == (2048, 1280)


def test_it_has_the_size_of_the_published_one():
    with torch.device("meta"):
        prompt = ImagePrompt(full_size.sdxl())
    count = sum(parameter.numel() for parameter in prompt.parameters())
    assert count == pytest.approx(423.7e6, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_file_makes_the_image_prompt_that_it_was_saved_from(parts, prompt, file, dtype):
    found = image_prompt.load(file, parts.unet, dtype)
    assert found.image_proj.latents.dtype == dtype
    assert not found.training
    expected = prompt.state_dict()
    for name, tensor in found.state_dict().items():
        assert torch.equal(tensor.half(), expected[name].half()), name


def test_a_scale_of_zero_makes_values_of_zero(prompt, features):
    for key, value in prompt.key_values(prompt.tokens(features), torch.tensor([0.0, 1.0])).values():
        assert value[0].abs().max() == 0
        assert key[0].abs().max() > 0
        assert value[1].abs().max() > 0


def test_zero_tokens_are_those_of_zero_pixels_and_not_zero(parts, prompt):
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=FEATURES, num_hidden_layers=3, num_attention_heads=2, intermediate_size=16,
        image_size=16, patch_size=8, projection_dim=8,
    )  # fmt: skip
    encoder = CLIPVisionModelWithProjection(config).eval()
    zeros = prompt.zero_tokens(encoder)
    assert zeros.shape == (1, TOKENS, 32)
    with torch.no_grad():
        hidden = encoder(torch.zeros(1, 3, 16, 16), output_hidden_states=True).hidden_states
        assert torch.equal(zeros, prompt.tokens(hidden[-2]))
    assert zeros.abs().max() > 0.1


def is_three_lines(error):
    return len(str(error).splitlines()) == 3


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".ckpt"])
def test_a_pickle_is_refused_unread(parts, tmp_path, suffix):
    path = tmp_path / f"ip-adapter{suffix}"
    path.write_bytes(b"\x80\x04 not to be opened")
    with pytest.raises(BadInput, match="run code") as caught:
        image_prompt.load(path, parts.unet)
    assert is_three_lines(caught.value)


def test_a_file_that_is_absent_is_not_found(parts, tmp_path):
    with pytest.raises(NotFound, match="there is no image prompt") as caught:
        image_prompt.load(tmp_path / "none.safetensors", parts.unet)
    assert is_three_lines(caught.value)


def test_a_truncated_file_is_damaged(parts, file):
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(IntegrityError, match="is damaged") as caught:
        image_prompt.load(file, parts.unet)
    assert is_three_lines(caught.value)


def test_an_ip_adapter_without_a_resampler_is_refused(parts, tmp_path):
    path = tmp_path / "ip-adapter.safetensors"
    save_file({"image_proj.proj.weight": torch.zeros(2, 2)}, path)
    with pytest.raises(BadInput, match="not an IP-Adapter-Plus") as caught:
        image_prompt.load(path, parts.unet)
    assert is_three_lines(caught.value)


def test_one_of_another_unet_is_refused_with_both_sizes(file):
    with pytest.raises(Incompatible, match=r"is \(32,\), the base model's is \(768,\)") as caught:
        image_prompt.load(file, full_size.sd15())
    assert is_three_lines(caught.value)
