"""PEFT's configuration: what it says that B A does not is named, wherever the configuration is."""

from __future__ import annotations

import json

import pytest

from hyperrt.cli import main
from hyperrt.errors import LoraError
from hyperrt.lora import peft_config
from hyperrt.lora.reader import check_used, open_lora
from tests.hyperrt.command_line import events, is_three_lines
from tests.hyperrt.lora_files import random_pairs, sites, write, write_kohya

RANKS = dict.fromkeys(sites(), 2)
PLAIN = {"peft_type": "LORA", "r": 2, "lora_alpha": 2}


def in_folder(folder, **options):
    """A folder of PEFT's."""
    folder.mkdir(exist_ok=True)
    write(folder / "adapter_model.safetensors", random_pairs(RANKS), "peft")
    (folder / "adapter_config.json").write_text(json.dumps({**PLAIN, **options}))
    return folder


def in_header(folder, **options):
    """A file of diffusers', whose header has the configuration."""
    folder.mkdir(exist_ok=True)
    said = json.dumps({f"unet.{key}": value for key, value in {**PLAIN, **options}.items()})
    return write(folder / "x.safetensors", random_pairs(RANKS), lora_adapter_metadata=said)


def names(**options):
    return [method.name for method in peft_config.methods({**PLAIN, **options})]


@pytest.mark.parametrize(
    "start", [True, False, None, "gaussian", "Gaussian", "eva", "orthogonal", "mica"], ids=str
)
def test_a_start_that_leaves_the_base_model_alone_is_plain(start):
    assert names(init_lora_weights=start) == []


@pytest.mark.parametrize(
    ("start", "name"),
    [
        ("pissa", "PiSSA"),
        ("pissa_niter_16", "PiSSA"),
        ("OLoRA", "OLoRA"),
        ("corda", "CorDA"),
        ("lora_ga", "LoRA-GA"),
        ("loftq", "LoftQ"),
        ("something new", "LoRA of an unknown start"),
        (["pissa"], "LoRA of an unknown start"),
        ({}, "LoRA of an unknown start"),
    ],
    ids=str,
)
def test_a_start_that_changes_the_base_model_is_named(start, name):
    assert names(init_lora_weights=start) == [name]


@pytest.mark.parametrize("option", peft_config._OTHER_METHODS)
def test_an_option_is_another_method_only_where_it_is_set(option):
    assert names(**{option: True}) and names(**{option: {"a": 1}})
    assert names(**{option: None}) == names(**{option: False}) == names(**{option: []}) == []


@pytest.mark.parametrize("kind", ["IA3", "LOHA", "ADALORA", "\x1b[2J", 3, None])
def test_another_type_is_named_by_what_it_says(kind):
    (method,) = peft_config.methods({"peft_type": kind, "init_lora_weights": "pissa"})
    assert "peft_type" in method.why and f"{method.name}{method.why}".isprintable()


def test_what_changes_nothing_is_no_method_and_a_new_option_is_told(tmp_path):
    harmless = {"bias": "all", "fan_in_fan_out": True, "lora_dropout": 0.1, "target_parameters": ["x"]}
    assert names(**harmless, eva_config={"rho": 2.0}, corda_config={"a": 1}) == []
    (note,) = open_lora(in_folder(tmp_path, **harmless, use_new=True, unset_new=None)).notes
    assert "use_new" in note and "unset_new" not in note


@pytest.mark.parametrize("save", [in_folder, in_header])
def test_every_method_is_refused_in_three_lines_wherever_the_configuration_is(tmp_path, save):
    for options in ({"init_lora_weights": "pissa"}, {"use_dora": True}, {"peft_type": "LOHA"}):
        file = open_lora(save(tmp_path / "x", **options))
        with pytest.raises(LoraError, match="not a plain LoRA") as caught:
            check_used(file, partial=True)
        assert len(str(caught.value).splitlines()) == 3 and caught.value.code == 3


def test_the_way_to_a_plain_lora_is_told():
    (pissa,) = peft_config.methods({"init_lora_weights": "pissa"})
    (loftq,) = peft_config.methods({"init_lora_weights": "loftq"})
    assert "path_initial_model_for_weight_conversion" in pissa.do and "path_initial" not in loftq.do


def test_a_configuration_of_the_text_encoder_alone_says_nothing_of_the_unet(tmp_path):
    said = json.dumps({"text_encoder.lora_alpha": 9, "text_encoder.use_dora": True})
    file = open_lora(write(tmp_path / "x.s", random_pairs(RANKS), lora_adapter_metadata=said))
    assert not file.methods and {pair.alpha for pair in file.pairs.values()} == {2}


def test_a_kohya_file_keeps_its_own_alpha_beside_a_configuration(tmp_path):
    said = json.dumps({"unet.lora_alpha": 9, "unet.init_lora_weights": "pissa"})
    file = open_lora(write_kohya(tmp_path / "x.s", random_pairs(RANKS), {}, lora_adapter_metadata=said))
    assert [method.name for method in file.methods] == ["PiSSA"]
    assert {pair.alpha for pair in file.pairs.values()} == {2}


def test_a_byte_order_mark_is_read_over(tmp_path):
    folder = in_folder(tmp_path, lora_alpha=6)
    config = folder / "adapter_config.json"
    config.write_bytes(b"\xef\xbb\xbf" + config.read_bytes())
    assert {pair.alpha for pair in open_lora(folder).pairs.values()} == {6}


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("save", [in_folder, in_header])
def test_inspect_shows_it_and_verify_and_convert_refuse_it(tmp_path, save, capsys):
    path = str(save(tmp_path / "x", init_lora_weights="pissa"))
    assert main.run(["lora", "inspect", path, "--json"]) == 0
    assert "PiSSA: init_lora_weights is 'pissa'" in events(capsys.readouterr().out)[-1]["faults"][0]
    for command in (["verify", path], ["convert", path, "out.safetensors"]):
        assert main.run(["lora", *command]) == 3
        err = capsys.readouterr().err
        assert is_three_lines(err) and "is PiSSA, not a plain LoRA" in err


def test_factors_of_another_shape_are_no_error_of_their_own_where_the_method_has_such(tmp_path):
    folder = in_folder(tmp_path, use_bdlora={"nblocks": 2})
    pairs = {site: (a, b[:, :1]) for site, (a, b) in random_pairs(RANKS).items()}
    write(folder / "adapter_model.safetensors", pairs, "peft")
    with pytest.raises(LoraError, match="is BD-LoRA"):
        check_used(open_lora(folder))


@pytest.mark.parametrize(
    ("patterns", "alpha"),
    [
        ({"attn2.to_k": 3, "to_k": 5}, 3),
        ({"to_k": 5, "attn2.to_k": 3}, 5),
        ({"^attn2.to_k": 3, "to_k": 5}, 5),
        ({"^a.attn2.to_k$": 3, "to_k": 5}, 3),
        ({"o_k": 3}, 8),
        ({f"module{number}": 3 for number in range(50_000)}, 8),
    ],
    ids=["the first", "the first", "a whole path", "a whole path", "part of a name", "very many"],
)
def test_the_first_key_of_alpha_pattern_that_ends_a_path_counts(patterns, alpha):
    config = {"alpha_pattern": patterns}
    found = peft_config.alpha(config, peft_config.alpha_patterns(config, "x"), "x", "a.attn2.to_k", 4)
    assert found == alpha


def test_an_alpha_that_is_no_number_of_a_computer_is_refused():
    for config in ({"lora_alpha": 10**400}, {"alpha_pattern": {"to_k": 10**400}}):
        with pytest.raises(LoraError, match="at most 1e"):
            peft_config.alpha(config, peft_config.alpha_patterns(config, "x"), "x", "a.to_k", 4)
