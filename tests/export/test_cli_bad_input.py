"""Bad models, hypernetworks, options and outputs of `hyperrt export`: each ends in three lines and its code.

Nothing is written then, in the folder of the output or in that of temporary files.
"""

import json
import shutil
import tempfile
from collections import namedtuple

import pytest
from safetensors.torch import load_file, save_file

from hyperrt.bundle import memory
from hyperrt.cli import main as command
from hyperrt.export import onnx_graph
from tests.export import small_models
from tests.export.command_line import arguments, three_lines

COMMIT = "0123456789" * 4


@pytest.fixture(autouse=True)
def temporary(tmp_path, monkeypatch):
    """Temporary files are made where a test would see them."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


# models and hypernetworks: each of these does something to copies of good ones


def edit(path, **changes):
    """A JSON file with some keys changed, or (None) removed."""
    found = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in found.items() if value is not None}))


def scheduler(base):
    return base / "scheduler" / "scheduler_config.json"


def something_else(base, hypernet, new):
    shutil.rmtree(base)
    base.mkdir()
    (base / "notes.txt").write_text("no model")


def no_shard(base, hypernet, new):
    whole = base / "unet" / "diffusion_pytorch_model.safetensors"
    names = [f"diffusion_pytorch_model-0000{k}-of-00002.safetensors" for k in (1, 2)]
    tensors = load_file(whole)
    save_file(dict(list(tensors.items())[::2]), whole.with_name(names[0]), {"format": "pt"})
    index = {"metadata": {}, "weight_map": {key: names[k % 2] for k, key in enumerate(tensors)}}
    whole.with_name(f"{whole.name}.index.json").write_text(json.dumps(index))
    whole.unlink()


def index_of_nothing(base, hypernet, new):
    (base / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text("{}")


def cut_index(base, hypernet, new):
    (base / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text('{"weight_map": {')


def pickles_alone(base, hypernet, new):
    for path in [*base.glob("*/*.safetensors")]:
        path.rename(path.with_suffix(".bin"))


def cut_configuration(base, hypernet, new):
    (base / "unet" / "config.json").write_text('{"_class_name": ')


def no_scheduler(base, hypernet, new):
    scheduler(base).unlink()


def cut_scheduler(base, hypernet, new):
    scheduler(base).write_text('{"beta_start": ')


def no_betas(base, hypernet, new):
    """Nor a class whose defaults there could be."""
    edit(scheduler(base), beta_start=None, _class_name=None)
    edit(base / "model_index.json", scheduler=None)


def of_edm(base, hypernet, new):
    edit(scheduler(base), _class_name="EDMDPMSolverMultistepScheduler")


def of_flow_matching(base, hypernet, new):
    edit(base / "model_index.json", scheduler=["diffusers", "FlowMatchEulerDiscreteScheduler"])


def of_another_pipeline(base, hypernet, new):
    edit(base / "model_index.json", text_encoder=["kolors", "ChatGLMModel"])


def with_motion(base, hypernet, new):
    edit(base / "unet" / "config.json", _class_name="UNetMotionModel")


def shifted_latents(base, hypernet, new):
    edit(base / "vae" / "config.json", shift_factor=0.1159)


def no_length(base, hypernet, new):
    edit(base / "tokenizer" / "tokenizer_config.json", model_max_length=10**30)


def no_vae(base, hypernet, new):
    shutil.rmtree(base / "vae")


def unknown_schedule(base, hypernet, new):
    edit(scheduler(base), beta_schedule="sigmoid")


def no_signal_at_the_end(base, hypernet, new):
    edit(scheduler(base), rescale_betas_zero_snr=True)


def unknown_prediction(base, hypernet, new):
    edit(scheduler(base), prediction_type="flow_prediction")


def of_another_base_model(base, hypernet, new):
    edit(hypernet / "hypernet.json", base_model="0" * 64)


def of_another_rank(base, hypernet, new):
    about = json.loads((hypernet / "hypernet.json").read_text())
    edit(hypernet / "hypernet.json", layout=about["layout"] | {"rank": about["layout"]["rank"] + 1})


def of_other_sites(base, hypernet, new):
    shutil.rmtree(hypernet)
    small_models.save_hypernet(hypernet, base, small_models.SD15["unet"]())


def no_base(base, hypernet, new):
    shutil.rmtree(base)


def no_unet(base, hypernet, new):
    shutil.rmtree(base / "unet")


def truncated_unet(base, hypernet, new):
    (base / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"PK\x03\x04")


def pickled_text_encoder(base, hypernet, new):
    (base / "text_encoder" / "model.safetensors").rename(base / "text_encoder" / "pytorch_model.bin")


def no_vocabulary(base, hypernet, new):
    for file in (base / "tokenizer").iterdir():
        file.unlink()


def unknown_vae(base, hypernet, new):
    (base / "vae" / "config.json").write_text('{"_class_name": "VQModel"}')


def no_hypernet(base, hypernet, new):
    (hypernet / "hypernet.safetensors").unlink()


def truncated_hypernet(base, hypernet, new):
    (hypernet / "hypernet.safetensors").write_bytes(b"")


def list_for_hypernet_json(base, hypernet, new):
    (hypernet / "hypernet.json").write_text("[]")


def no_token(base, hypernet, new):
    about = json.loads((hypernet / "hypernet.json").read_text())
    del about["token"]
    (hypernet / "hypernet.json").write_text(json.dumps(about))


def bundle_exists(base, hypernet, new):
    new.mkdir()
    (new / "bundle.json").write_text("{}")


def output_is_a_file(base, hypernet, new):
    new.write_text("mine")


@pytest.mark.parametrize(
    ("spoil", "code", "what"),
    [
        (no_base, 4, "no base model"),
        (something_else, 4, "it has no unet, vae, text_encoder"),
        (no_unet, 4, "it has no unet"),
        (truncated_unet, 8, "unet"),
        (no_shard, 4, "00002-of-00002.safetensors is missing"),
        (index_of_nothing, 8, "it has no weight_map"),
        (cut_index, 8, "index.json is damaged"),
        (pickled_text_encoder, 3, "is a pickle"),
        (pickles_alone, 3, "is a pickle"),
        (cut_configuration, 3, "cannot be used as unet"),
        (no_vocabulary, 8, "tokenizer"),
        (unknown_vae, 3, "'VQModel'"),
        (no_scheduler, 4, "scheduler_config.json"),
        (cut_scheduler, 8, "scheduler_config.json is damaged"),
        (no_betas, 5, "its betas go from None"),
        (of_edm, 5, "its scheduler is EDMDPMSolverMultistepScheduler"),
        (of_flow_matching, 5, "its scheduler is FlowMatchEulerDiscreteScheduler"),
        (of_another_pipeline, 3, "text_encoder is of the class 'ChatGLMModel'"),
        (with_motion, 3, "of the class 'UNetMotionModel'"),
        (shifted_latents, 5, "its shift_factor is 0.1159"),
        (no_length, 8, "its model_max_length is 1e+30"),
        (no_vae, 4, "--vae FILE, DIR or OWNER/NAME@COMMIT"),
        (unknown_schedule, 5, "'sigmoid'"),
        (no_signal_at_the_end, 5, "rescale_betas_zero_snr"),
        (unknown_prediction, 5, "'flow_prediction'"),
        (no_hypernet, 4, "hypernet.safetensors"),
        (truncated_hypernet, 8, "hypernet"),
        (list_for_hypernet_json, 8, "hypernet"),
        (no_token, 8, "lacks 'token'"),
        (of_another_base_model, 5, "of another base model"),
        (of_another_rank, 8, "the hypernetwork"),
        (of_other_sites, 5, "their LoRA layouts differ"),
        (bundle_exists, 2, "exists"),
        (output_is_a_file, 2, "is not a folder"),
    ],
    ids=lambda value: getattr(value, "__name__", "").replace("_", " "),
)
def test_bad_input_ends_in_three_lines_and_its_code(spoil, code, what, trained, tmp_path, capfd):
    base, hypernet = (
        shutil.copytree(getattr(trained, name), tmp_path / name) for name in ("base", "hypernet")
    )
    spoil(base, hypernet, tmp_path / "new")
    there = sorted(tmp_path.rglob("*"))
    assert command.run(arguments(base, hypernet, tmp_path / "new")) == code
    assert what in three_lines(capfd)
    assert sorted(tmp_path.rglob("*")) == there


@pytest.mark.parametrize("name", ["model.ckpt", "model.CKPT", "model.pt", "pytorch_model.bin"])
def test_a_pickled_base_model_is_not_read(name, trained, tmp_path, capfd):
    pickle = tmp_path / name
    pickle.write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    assert command.run(arguments(pickle, trained.hypernet, tmp_path / "new")) == 3
    assert "can run code" in three_lines(capfd)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_pickled_hypernetwork_is_not_read(trained, tmp_path, capfd):
    pickle = tmp_path / "hypernet.pt"
    pickle.write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    assert command.run(arguments(trained.base, pickle, tmp_path / "new")) == 3
    assert "pickles can run code" in three_lines(capfd)


# options


@pytest.mark.parametrize(
    ("more", "code", "what"),
    [
        (["--base", f"someone/model@{COMMIT}"], 4, "cannot be downloaded from the hub"),
        (["--base", f"someone/model@{COMMIT}", "--offline"], 4, "--offline is given"),
        (["--base", "someone/model"], 2, "no pinned revision"),
        (["--base", "nowhere at all"], 4, "not a folder, a file or a hub id"),
        (["--base", __file__], 3, "the only files that are read are .safetensors"),
        (["--like", "somewhere"], 2, "leave --like out"),
        (["--vae", "nowhere at all"], 4, "no VAE nowhere at all"),
        (["--vae", "nowhere.safetensors"], 4, "there is no VAE nowhere.safetensors"),
        (["--vae", "vae.pt"], 3, "can run code"),
        (["--vae", __file__], 3, "is not a VAE"),
        (["--vae", "."], 4, "no VAE can be read from ."),
        (["--model", "sd9"], 2, "no model family 'sd9'"),
        (["--size", "33"], 2, "pictures of 33 pixels"),
        (["--size", "4096"], 2, "pictures of 4096 pixels"),
        (["--image-encoder", "nowhere"], 4, "no image encoder can be read from nowhere"),
        (["--image-prompt", "nowhere.safetensors"], 4, "no image prompt nowhere.safetensors"),
        (["--verify", "full", "--quantize", "int8"], 2, "--verify full cannot be done"),
        (["--verify", "full", "--precision", "fp16"], 2, "--verify full cannot be done"),
        (["--random-weights", "0"], 2, "--base and --random-weights exclude each other"),
    ],
    ids=lambda value: " ".join(value)[-40:] if isinstance(value, list) else "",
)
def test_options_that_cannot_be_met_end_in_three_lines(
    more, code, what, trained, tmp_path, capfd, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert command.run([*arguments(trained.base, trained.hypernet, tmp_path / "new"), *more]) == code
    assert what in three_lines(capfd)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "code", "what"),
    [
        (["--model", "sd15", "--random-weights", "0", "--verify", "full"], 2, "--verify full cannot be done"),
        (["--model", "sdxl", "--random-weights", "0", "--like", "x"], 2, "--like and --random-weights"),
        (["--model", "sd15", "--random-weights", "0", "--hypernet", "x"], 2, "--hypernet and"),
        (["--model", "sd15", "--random-weights", "0", "--vae", "x"], 2, "--vae and"),
        (["--model", "sd15", "--random-weights", "0", "--size", "500"], 2, "multiples of 64"),
        (["--model", "sd15"], 2, "--hypernet is not given"),
        (["--model", "BASE", "--base", "BASE"], 2, "there are two base models"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_options_that_contradict_each_other_end_in_three_lines(options, code, what, trained, tmp_path, capfd):
    options = [str(trained.base) if word == "BASE" else word for word in options]
    assert command.run(["export", *options, "-o", str(tmp_path / "new")]) == code
    assert what in three_lines(capfd)
    assert not list(tmp_path.iterdir())


# the machine


def test_a_full_disk_is_seen_before_the_work(trained, tmp_path, capfd, monkeypatch):
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(1000))
    assert command.run(arguments(trained.base, trained.hypernet, tmp_path / "new")) == 6
    assert "has no room for the bundle" in three_lines(capfd)
    assert not list(tmp_path.iterdir())


def test_too_little_memory_is_seen_before_the_work(trained, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(memory, "available", lambda: 10**6)
    monkeypatch.setattr(onnx_graph, "write", lambda *_, **__: pytest.fail("it started to work"))
    assert command.run(arguments(trained.base, trained.hypernet, tmp_path / "new")) == 6
    assert "not enough memory for the export" in three_lines(capfd)
    assert not list(tmp_path.iterdir())


def test_a_folder_for_the_output_that_is_missing_is_not_made(trained, tmp_path, capfd):
    assert command.run(arguments(trained.base, trained.hypernet, tmp_path / "missing" / "new")) == 4
    assert "missing" in three_lines(capfd)
    assert not list(tmp_path.iterdir())
