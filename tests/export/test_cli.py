import json

import pytest

from hyperrt.cli import main as command
from hyperrt.export import assemble, verify
from hyperrt.export.errors import ParityError
from tests.export.command_line import arguments, config, config_of, three_lines


def last_event(capsys):
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_a_dry_run_says_how_large_each_graph_will_be_and_writes_nothing(trained, tmp_path, capsys):
    options = ["--dry-run", "--json"]
    assert command.run(arguments(trained.base, trained.hypernet, tmp_path / "new") + options) == 0
    needed = last_event(capsys)
    assert needed["graphs"]["denoiser"] > needed["graphs"]["context"] > 0
    assert needed["memory"] > sum(needed["graphs"].values())
    assert not list(tmp_path.iterdir())


@pytest.fixture
def called(monkeypatch, exported):
    """The fields of the config that `export_bundle` is called with; it returns `exported`."""
    fields = {}

    def fake(config, progress):
        fields.update(vars(config))
        return exported

    monkeypatch.setattr(assemble, "export_bundle", fake)
    return fields


def test_the_result_is_the_bundles_folder_and_its_parity(trained, tmp_path, capsys, called, exported):
    options = ["--force", "--json"]
    assert command.run(arguments(trained.base, trained.hypernet, tmp_path / "new") + options) == 0
    result = last_event(capsys)
    assert result["path"] == str(exported)
    assert result["parity"].keys() == verify.TOLERANCE.keys() - {"image_prompt"}
    expected = config_of(trained, tmp_path / "new", force=True)
    assert called == vars(expected)


def test_every_option_reaches_the_export(tmp_path, called):
    given = {
        "image-encoder": "vit", "image-prompt": "ip.safetensors", "like": "folder", "size": "768",
        "precision": "bf16", "quantize": "int8", "verify": "none", "hypernet": "run", "base": "a/b",
        "adapt": "refit", "vae": "c/d",
    }  # fmt: skip
    options = [word for name, value in given.items() for word in (f"--{name}", value)]
    command.run(["export", "--model", "sdxl", "--offline", *options, "-o", str(tmp_path / "new")])
    fields = {name.replace("-", "_"): value for name, value in given.items()} | {"size": 768}
    assert called == vars(config("sdxl", tmp_path / "new", offline=True, **fields))


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
    for check, error in json.loads((exported / "bundle.json").read_text())["parity"].items():
        assert f"{check:20}{error:8.0e}" in shown.err


def test_a_check_that_fails_is_named(trained, tmp_path, capfd, monkeypatch):
    def fails(*_, **options):
        verify.checked("fused_step", 0.5, 0.1)

    monkeypatch.setattr(assemble, "export_bundle", fails)
    assert command.run(arguments(trained.base, trained.hypernet, tmp_path / "new")) == ParityError.code == 9
    assert "fused_step" in three_lines(capfd)
