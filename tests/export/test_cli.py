import json
import shutil
from collections import namedtuple
from pathlib import Path

import pytest

from export import assemble, verify
from export.errors import ParityError
from hyperrt import cli as command
from tests.export.command_line import arguments, three_lines


def last_event(capsys):
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_a_dry_run_says_how_large_each_graph_will_be_and_writes_nothing(trained, tmp_path, capsys):
    options = ["--dry-run", "--json"]
    assert command.run(arguments(trained.base, trained.hypernet, tmp_path / "new") + options) == 0
    told = last_event(capsys)
    assert told["graphs"]["denoiser"] > told["graphs"]["context"] > 0
    assert told["memory"] > sum(told["graphs"].values())
    assert not list(tmp_path.iterdir())


@pytest.fixture
def called(monkeypatch, exported):
    """What `export_bundle`, which only says that it made `exported`, was called with."""
    seen = {}

    def fake(model, inputs, output, options, **others):
        seen.update(vars(inputs), **vars(options), model=model, output=output, **others)
        return exported

    monkeypatch.setattr(assemble, "export_bundle", fake)
    return seen


def test_the_result_is_the_bundles_folder_and_its_parity(trained, tmp_path, capsys, called, exported):
    options = ["--force", "--json"]
    assert command.run(arguments(trained.base, trained.hypernet, tmp_path / "new") + options) == 0
    result = last_event(capsys)
    assert result["path"] == str(exported)
    assert result["parity"].keys() == verify.TOLERANCE.keys() - {"image_prompt"}
    options = {"force": True, "random_weights": None, "model": "tiny"}
    paths = {"base": str(trained.base), "hypernet": trained.hypernet, "output": tmp_path / "new"}
    assert called.items() >= (options | paths).items()


def test_every_option_reaches_the_export(tmp_path, called):
    given = {
        "image-encoder": "vit", "image-prompt": "ip.safetensors", "like": "folder", "size": "768",
        "precision": "bf16", "quantize": "int8", "verify": "none", "hypernet": "run", "base": "a/b",
    }  # fmt: skip
    options = [word for name, value in given.items() for word in (f"--{name}", value)]
    command.run(["export", "--model", "sdxl", "--offline", *options, "-o", str(tmp_path / "new")])
    expected = {
        "image_encoder": Path("vit"), "image_prompt": Path("ip.safetensors"), "like": "folder", "size": 768,
        "precision": "bf16", "int8": True, "verify": "none", "hypernet": Path("run"), "base": "a/b",
        "offline": True, "model": "sdxl",
    }  # fmt: skip
    assert called.items() >= expected.items()


@pytest.mark.parametrize(
    ("second", "width", "family"), [(True, 8, "sdxl"), (False, 768, "sd15"), (False, 8, "tiny")]
)
def test_the_family_of_a_folder_is_read_from_its_configuration(second, width, family, tmp_path, called):
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json").write_text(json.dumps({"cross_attention_dim": width}))
    if second:
        (tmp_path / "text_encoder_2").mkdir()
    assert command.run(["export", "--model", str(tmp_path), "-o", str(tmp_path / "new")]) == 0
    assert called["model"] == family


def test_the_model_may_be_the_folder_of_a_base(trained, tmp_path, called):
    assert command.run(["export", "--model", str(trained.base), "-o", str(tmp_path / "new")]) == 0
    assert (called["model"], called["base"]) == ("tiny", str(trained.base))


def test_a_folder_that_is_called_like_a_family_is_not_the_model(tmp_path, monkeypatch, called):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").mkdir()
    assert command.run(["export", "--model", "tiny", "-o", "new"]) == 0
    assert (called["model"], called["base"]) == ("tiny", None)


def test_two_base_models_are_one_too_many(trained, tmp_path, capfd):
    options = [
        "export",
        "--model",
        str(trained.base),
        "--base",
        str(trained.base),
        "-o",
        str(tmp_path / "new"),
    ]
    assert command.run(options) == 2
    assert "there are two base models" in three_lines(capfd)


def test_the_parity_figures_are_shown(trained, tmp_path, capsys, called, exported):
    assert command.run(arguments(trained.base, trained.hypernet, tmp_path / "new")) == 0
    shown = capsys.readouterr()
    assert shown.out == f"{exported}\n"
    for rung, error in json.loads((exported / "bundle.json").read_text())["parity"].items():
        assert f"{rung:20}{error:8.0e}" in shown.err


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
        (no_unet, 4, "it has no unet"),
        (truncated_unet, 8, "unet"),
        (pickled_text_encoder, 3, "is a pickle"),
        (no_vocabulary, 8, "tokenizer"),
        (unknown_vae, 3, "'VQModel'"),
        (no_hypernet, 4, "hypernet.safetensors"),
        (truncated_hypernet, 8, "hypernet"),
        (list_for_hypernet_json, 8, "hypernet"),
        (no_token, 8, "lacks 'token'"),
        (bundle_exists, 2, "exists"),
        (output_is_a_file, 2, "is no plain folder"),
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


def test_a_pickle_is_not_read(trained, tmp_path, capfd):
    pickle = tmp_path / "hypernet.pt"
    pickle.write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    assert command.run(arguments(trained.base, pickle, tmp_path / "new")) == 3
    assert "pickles can run code" in three_lines(capfd)


def test_a_full_disk_is_seen_before_the_work(trained, tmp_path, capfd, monkeypatch):
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(1000))
    assert command.run(arguments(trained.base, trained.hypernet, tmp_path / "new")) == 6
    assert "has no room for the bundle" in three_lines(capfd)
    assert not list(tmp_path.iterdir())


def test_a_rung_that_fails_is_named(trained, tmp_path, capfd, monkeypatch):
    def fails(*_, **options):
        verify.checked("fused_step", 0.5, 0.1)

    monkeypatch.setattr(assemble, "export_bundle", fails)
    assert command.run(arguments(trained.base, trained.hypernet, tmp_path / "new")) == ParityError.code == 9
    assert "fused_step" in three_lines(capfd)
