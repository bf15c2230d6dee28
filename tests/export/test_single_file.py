"""Single files: the weights of the folder that they were made from, or an error in three lines."""

import copy
import tempfile
from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders.single_file_utils import CHECKPOINT_KEY_NAMES
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from hyperrt.cli import main as command
from hyperrt.errors import BadInput, IntegrityError
from hyperrt.export import architectures, families, loading, read_source, single_file
from hyperrt.export.errors import ExportError
from hyperrt.training.model import weight_hash
from tests.export import original_layout, small_models
from tests.export.command_line import config as config_of_family
from tests.export.command_line import three_lines

MODELS = {"sd15": small_models.SD15, "sdxl": small_models.SDXL}
UNET, VAE = original_layout.UNET, original_layout.VAE


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """By family: `folder`, `hypernet`, its networks as modules, and their tensors under original names."""
    root, found = tmp_path_factory.mktemp("models"), {}
    for family, builders in MODELS.items():
        folder = root / family
        modules = small_models.save(folder, builders)
        (folder / "LICENSE").write_text("of the folder")
        del modules["image_encoder"]
        found[family] = SimpleNamespace(
            family=family,
            folder=folder,
            hypernet=small_models.save_hypernet(root / f"hypernet-{family}", folder, modules["unet"]),
            modules=modules,
            tensors=original_layout.original(modules),
        )
    return found


@pytest.fixture(params=MODELS)
def model(request, models):
    return models[request.param]


@pytest.fixture
def file(tmp_path):
    return tmp_path / "model.safetensors"


def parts_of(model, file, tensors):
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, file)
    return loading.parts_of(model.folder, file=file)


def cast(tensors, dtype):
    return {key: t.to(dtype) if t.is_floating_point() else t for key, t in tensors.items()}


# what is right


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_every_network_is_that_of_the_folder(dtype, model, file):
    parts = parts_of(model, file, cast(model.tensors, dtype))
    for name, module in model.modules.items():
        expected = weight_hash.hash_of(copy.deepcopy(module).to(dtype), half=True)
        assert parts[name].hash(half=True) == expected
        assert {tensor.dtype for tensor in parts[name].read().state_dict().values()} == {dtype}
    folders = loading.parts_of(model.folder)
    assert parts.keys() == folders.keys()
    if dtype != torch.bfloat16:  # whose rounding the folder has not seen
        assert {n: p.hash(half=True) for n, p in parts.items()} == {
            n: p.hash(half=True) for n, p in folders.items()
        }


def test_a_network_computes_what_that_of_the_folder_does(models, file):
    parts = parts_of(models["sdxl"], file, models["sdxl"].tensors)
    ids = torch.tensor([[0, 5, 9, 2]])
    found, expected = (
        part["text_encoder_2"].read()(ids, output_hidden_states=True)
        for part in (parts, loading.parts_of(models["sdxl"].folder))
    )
    torch.testing.assert_close(found.text_embeds, expected.text_embeds)
    torch.testing.assert_close(found.hidden_states[-2], expected.hidden_states[-2])


def test_the_text_encoder_of_stable_diffusion_2_is_read(models, file):
    model = models["sd15"]
    encoder = model.modules["text_encoder"]
    text = {f"cond_stage_model.model.{k}": t for k, t in original_layout.of_open_clip(encoder).items()}
    tensors = {k: t for k, t in model.tensors.items() if not k.startswith(original_layout.CLIP)}
    part = parts_of(model, file, tensors | text)["text_encoder"]
    assert part.hash(half=True) == weight_hash.hash_of(encoder, half=True)


def test_names_without_the_wrapper_of_the_text_model_are_known(models, file):
    model = models["sd15"]
    tensors = {key.replace(".text_model.", "."): tensor for key, tensor in model.tensors.items()}
    part = parts_of(model, file, tensors)["text_encoder"]
    assert part.hash(half=True) == weight_hash.hash_of(model.modules["text_encoder"], half=True)


def test_what_is_exported_has_the_rules_of_the_configuration_and_not_its_licence(model, file):
    save_file(model.tensors, file)
    options = {"base": file, "hypernet": model.hypernet, "like": model.folder}
    source = read_source.read(config_of_family(model.family, **options))
    assert source.is_sdxl == (model.family == "sdxl")
    assert source.zero_empty == source.is_sdxl
    assert source.license == families.get(model.family).license
    assert source.image_size == 32


@pytest.mark.parametrize(
    ("config", "count", "known"),
    [
        (architectures.SD15_UNET, 686, CHECKPOINT_KEY_NAMES["v1"]),
        (architectures.SDXL_UNET, 1680, f"{UNET}label_emb.0.2.bias"),
    ],
    ids=MODELS,
)
def test_every_weight_of_the_true_unet_goes_to_its_place(config, count, known, monkeypatch):
    with torch.device("meta"):
        unet = UNet2DConditionModel(**config)
    tensors = goes_to_its_place("unet", unet, original_layout.of_unet, monkeypatch)
    assert known in tensors and len(tensors) == count


def test_every_weight_of_the_true_autoencoder_goes_to_its_place(monkeypatch):
    with torch.device("meta"):
        vae = AutoencoderKL(**architectures.VAE)
    assert len(goes_to_its_place("vae", vae, original_layout.of_vae, monkeypatch)) == 248


def goes_to_its_place(name, module, original, monkeypatch):
    """Each weight is a number, repeated without taking memory, that must come back under its name."""
    tags = {
        key: torch.tensor(float(k)).expand(tensor.shape)
        for k, (key, tensor) in enumerate(module.state_dict().items())
    }
    monkeypatch.setattr(original_layout, "state", lambda _: tags)
    prefix = single_file.PREFIXES[name][0]
    tensors = {prefix + key: tensor for key, tensor in original(module).items()}
    found = single_file._translated(name, tensors, module)
    assert {key: (t.flatten()[0].item(), t.shape) for key, t in found.items()} == {
        key: (t.flatten()[0].item(), t.shape) for key, t in tags.items()
    }
    return tensors


@pytest.mark.parametrize(
    ("name", "build", "known"),
    [
        ("text_encoder", lambda: CLIPTextModel(CLIPTextConfig(**architectures.CLIP_L)), "clip"),
        (
            "text_encoder_2",
            lambda: CLIPTextModelWithProjection(CLIPTextConfig(**architectures.CLIP_BIG_G)),
            "xl_base",
        ),
    ],
    ids=["CLIP", "OpenCLIP"],
)
def test_the_true_text_encoders_are_complete(name, build, known):
    with torch.device("meta"):
        module = build()
    if name == "text_encoder":
        prefix, tensors = original_layout.CLIP, module.state_dict()
    else:
        prefix, tensors = original_layout.OPEN_CLIP, original_layout.of_open_clip(module)
    named = {prefix + key.removeprefix("text_model."): tensor for key, tensor in tensors.items()}
    found = single_file._translated(name, named, module)
    assert CHECKPOINT_KEY_NAMES[known] in named
    assert {k: t.shape for k, t in found.items()} == {k: t.shape for k, t in module.state_dict().items()}


# what is wrong


def test_every_missing_tensor_is_reported(model, file, monkeypatch):
    parts = parts_of(model, file, model.tensors)
    for name in model.modules:
        tensors = single_file._tensors(file, name, hollow=True)
        for gone in [key for key in tensors if not key.endswith(("position_ids", "logit_scale"))]:
            others = {key: tensor for key, tensor in tensors.items() if key != gone}
            monkeypatch.setattr(single_file, "_tensors", lambda *_, others=others, **__: others)
            with pytest.raises(IntegrityError, match="is not complete"):
                single_file.check(file, parts[name], model.folder)
        monkeypatch.undo()


@pytest.mark.parametrize("prefix", [UNET, VAE, "cond", "conditioner.embedders.1."])
def test_a_missing_network_is_reported(prefix, models, file):
    model = models["sdxl" if prefix.endswith("1.") else "sd15"]
    tensors = {key: tensor for key, tensor in model.tensors.items() if not key.startswith(prefix)}
    with pytest.raises(BadInput, match=rf"has no (unet|vae|text_encoder)(?s:.*){prefix}"):
        parts_of(model, file, tensors)


@pytest.mark.parametrize(
    "more",
    [
        f"{UNET}input_blocks.1.0.in_layers.9.weight", f"{UNET}input_blocks.1.1.to_q.scale_weight",
        "conditioner.embedders.0.transformer.text_model.lora.weight",
        "conditioner.embedders.1.model.transformer.resblocks.2.ln_1.weight",
    ],
)  # fmt: skip
def test_an_unknown_tensor_is_refused(more, models, file):
    model = models["sdxl"]
    with pytest.raises(ExportError, match=r"of another architecture(?s:.*)absent in"):
        parts_of(model, file, model.tensors | {more: torch.zeros(2)})


@pytest.mark.parametrize(
    "wrong", [torch.zeros(16, 9, 3, 3), torch.zeros(16, 4, 3, 3).to(torch.int8)], ids=["shape", "kind"]
)
def test_a_tensor_of_another_shape_or_kind_is_refused_with_both(wrong, model, file):
    tensors = model.tensors | {f"{UNET}input_blocks.0.0.weight": wrong}
    with pytest.raises(ExportError, match=r"conv_in.weight: \[16, .* in the file, \[16, 4, 3, 3\] in"):
        parts_of(model, file, tensors)


def test_a_weight_beyond_fp16_is_refused_by_its_value(model, file):
    bias = torch.full_like(model.tensors[f"{UNET}out.2.bias"], 1e6)
    part = parts_of(model, file, model.tensors | {f"{UNET}out.2.bias": bias})["unet"]
    with pytest.raises(ExportError, match=r"1e\+06; fp16 ends"):
        part.load()


@pytest.mark.parametrize("names", [["v_pred"], ["ztsnr"]])
def test_a_noise_schedule_that_the_file_contradicts_is_refused(names, model, file):
    save_file(model.tensors | {name: torch.zeros(0) for name in names}, file)
    with pytest.raises(ExportError, match=rf"another noise schedule(?s:.*){names[0]} in the file"):
        loading.scheduler_of(model.folder, file)


@pytest.mark.parametrize("name", ["edm_mean", "edm_std", "edm_vpred.sigma_max"])
def test_a_file_that_was_trained_as_edm_is_refused(name, models, file):
    save_file(models["sdxl"].tensors | {name: torch.zeros(4)}, file)
    with pytest.raises(ExportError, match=f"unknown noise schedule(?s:.*){name} in the file"):
        loading.scheduler_of(models["sdxl"].folder, file)


def test_a_noise_schedule_that_the_file_confirms_is_taken(models, file):
    save_file(models["sdxl"].tensors | {"v_pred": torch.zeros(0)}, file)
    single_file.check_schedule(file, {"prediction_type": "v_prediction"})


# at the command line


def run(model, file, like, new, *more):
    return command.run(
        [
            "export", "--model", model.family, "--base", str(file), "--like", str(like),
            "--hypernet", str(model.hypernet), "--verify", "none", "-o", str(new), *more,
        ]
    )  # fmt: skip


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """The folder of temporary files, to see what remains in it."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def test_a_dry_run_reads_a_single_file_and_writes_nothing(model, file, tmp_path, temporary, capsys):
    save_file(cast(model.tensors, torch.float16), file)
    there = sorted(tmp_path.rglob("*"))
    assert run(model, file, model.folder, tmp_path / "new", "--dry-run") == 0
    assert "denoiser" in capsys.readouterr().out
    assert sorted(tmp_path.rglob("*")) == there


def truncated(models, file):
    save_file(models["sd15"].tensors, file)
    file.write_bytes(file.read_bytes()[:-1000])


def no_safetensors(models, file):
    file.write_bytes(b"PK\x03\x04 a zip, as pickles are in")


def one_missing(models, file):
    tensors = dict(models["sd15"].tensors)
    del tensors[f"{UNET}middle_block.1.transformer_blocks.0.attn2.to_q.weight"]
    save_file(tensors, file)


def no_text_encoder(models, file):
    save_file({k: t for k, t in models["sd15"].tensors.items() if not k.startswith("cond")}, file)


def of_sdxl(models, file):
    save_file(models["sdxl"].tensors, file)


def another_unet(models, file):
    save_file(models["sd15"].tensors | {f"{UNET}out.2.weight": torch.zeros(4, 8, 3, 3)}, file)


@pytest.mark.parametrize(
    ("spoil", "code", "words"),
    [
        (truncated, 8, "model.safetensors is damaged"),
        (no_safetensors, 8, "model.safetensors is damaged"),
        (one_missing, 8, "mid_block.attentions.0.transformer_blocks.0.attn2.to_q.weight"),
        (no_text_encoder, 3, "has no text_encoder"),
        (of_sdxl, 5, "of another architecture than --like"),
        (another_unet, 5, "[4, 8, 3, 3] in the file, [4, 16, 3, 3] in"),
    ],
    ids=lambda value: getattr(value, "__name__", "").replace("_", " "),
)
def test_a_single_file_that_is_wrong_ends_in_three_lines_and_its_code(
    spoil, code, words, models, file, tmp_path, temporary, capfd
):
    spoil(models, file)
    there = sorted(tmp_path.rglob("*"))
    assert run(models["sd15"], file, models["sd15"].folder, tmp_path / "new") == code
    assert words in three_lines(capfd)
    assert sorted(tmp_path.rglob("*")) == there


def test_a_file_of_sd15_is_refused_as_sdxl(models, file, tmp_path, capfd):
    save_file(models["sd15"].tensors, file)
    assert run(models["sdxl"], file, models["sdxl"].folder, tmp_path / "new") == 5
    assert "of another architecture than --like" in three_lines(capfd)
