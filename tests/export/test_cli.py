import json
from pathlib import Path

import pytest

from hyperrt.cli import main as command
from hyperrt.export import assemble, verify
from hyperrt.export.errors import ParityError
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
        "adapt": "refit", "vae": "c/d",
    }  # fmt: skip
    options = [word for name, value in given.items() for word in (f"--{name}", value)]
    command.run(["export", "--model", "sdxl", "--offline", *options, "-o", str(tmp_path / "new")])
    expected = {
        "image_encoder": Path("vit"), "image_prompt": Path("ip.safetensors"), "like": "folder", "size": 768,
        "precision": "bf16", "int8": True, "verify": "none", "hypernet": Path("run"), "base": "a/b",
        "offline": True, "model": "sdxl", "adapt": "refit", "vae": "c/d",
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


def test_the_parity_figures_are_shown(trained, tmp_path, capsys, called, exported):
    assert command.run(arguments(trained.base, trained.hypernet, tmp_path / "new")) == 0
    shown = capsys.readouterr()
    assert shown.out == f"{exported}\n"
    for rung, error in json.loads((exported / "bundle.json").read_text())["parity"].items():
        assert f"{rung:20}{error:8.0e}" in shown.err


def test_a_rung_that_fails_is_named(trained, tmp_path, capfd, monkeypatch):
    def fails(*_, **options):
        verify.checked("fused_step", 0.5, 0.1)

    monkeypatch.setattr(assemble, "export_bundle", fails)
    assert command.run(arguments(trained.base, trained.hypernet, tmp_path / "new")) == ParityError.code == 9
    assert "fused_step" in three_lines(capfd)
