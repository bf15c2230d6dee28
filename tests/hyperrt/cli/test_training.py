"""`hyperrt train` and its kin: known by name and summary until PyTorch is loaded for them."""

from __future__ import annotations

import pytest

from hyperrt.cli.training import COMMANDS


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_training_command_is_that_of_its_module(name, run):
    pytest.importorskip("torch")
    code, out, _ = run(name, "--help", here=())
    assert code == 0 and out.startswith(f"Usage: hyperrt {name} ") and "Examples:" in out


@pytest.mark.parametrize("name", COMMANDS)
def test_without_pytorch_a_training_command_says_what_to_install(name, run, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    code, _, err = run(name, here=())
    assert code == 5 and err.endswith("do:  pip install 'hyperrt[train]'\n")


def test_an_option_that_the_config_file_misspells_is_named_once_the_command_is_loaded(run, tmp_path):
    pytest.importorskip("torch")
    (tmp_path / "settings" / "hyperrt").mkdir(parents=True)
    (tmp_path / "settings" / "hyperrt" / "config.toml").write_text("[train]\nbach = 4\n")
    code, _, err = run("train", here=())
    assert code == 2 and "sets 'bach' in [train]" in err
    assert run("--version", here=())[0] == 0  # other commands do not load PyTorch to look
