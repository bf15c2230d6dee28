"""PEFT's LoRAs: those that are taken are what PEFT computes, and what PEFT computes otherwise is refused."""

from __future__ import annotations

import copy
import dataclasses
import json

import pytest
import torch
from torch import nn

from hyperrt.errors import LoraError
from hyperrt.lora import peft_config
from hyperrt.lora.layout import LoraLayout, Site
from hyperrt.lora.reader import open_lora
from hyperrt.lora.subject_file import load_subject

peft = pytest.importorskip("peft")

BLOCK = "mid_block.attentions.0.transformer_blocks.0.attn2"
PATHS = [f"{BLOCK}.{name}" for name in ("to_q", "to_k", "to_v")]
LAYOUT = LoraLayout(tuple(Site(path, 16, 12) for path in PATHS), 4)
BASIC = {"r": 4, "lora_alpha": 6, "target_modules": ["to_q", "to_k", "to_v"]}


def base_model():
    """The cross-attention's projections of a UNet, under their paths."""
    torch.manual_seed(0)
    model = nn.ModuleDict({name: nn.Linear(16, 12, bias=False) for name in ("to_q", "to_k", "to_v")})
    for name in reversed(BLOCK.split(".")):
        model = nn.ModuleDict({name: model})
    return model


def trained(folder, config, prepare=lambda model, config: None):
    """A folder that PEFT saved, of an adapter that has moved away from where it started."""
    model = base_model()
    prepare(model, config)
    adapted = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_" in name:
                weight.add_(0.3 * torch.randn_like(weight))
    adapted.save_pretrained(folder)
    return folder


def outputs(model, x):
    return torch.cat([model.get_submodule(path)(x) for path in PATHS], 1)


def by_peft(folder, x):
    loaded = peft.PeftModel.from_pretrained(base_model(), str(folder)).eval()
    return outputs(loaded.base_model.model, x)


def by_product(folder, x):
    """W x + alpha / r B A x, of the tensors in the file, whatever its configuration says."""
    file = open_lora(folder)
    change = [torch.from_numpy(b @ a).T for a, b in (file.factors(path).numbers() for path in PATHS)]
    return outputs(base_model(), x) + torch.cat([x @ one for one in change], 1)


def difference(found, expected):
    return float((found - expected).detach().norm() / expected.detach().norm())


def gradients(model, config):
    """What LoRA-GA starts from."""
    from peft.tuners.lora import preprocess_loraga

    preprocess_loraga(model, config, lambda: outputs(model, torch.ones(2, 16)).sum().backward())


TAKEN = {
    "plain": {},
    "rsLoRA": {"use_rslora": True},
    "no start": {"init_lora_weights": False},
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "eva": {"init_lora_weights": "eva"},
    "mica": {"init_lora_weights": "mica"},
    "patterns": {"rank_pattern": {"to_k": 2}, "alpha_pattern": {"to_v": 3, f"^{PATHS[0]}": 2, "^to_k": 9}},
    "transposed": {"fan_in_fan_out": True},
    "dropout": {"lora_dropout": 0.5},
    "biases that are not there": {"bias": "lora_only"},
    "parameters": {"target_modules": [], "target_parameters": [f"{path}.weight" for path in PATHS]},
    "default alpha": {"lora_alpha": 8},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("options", TAKEN.values(), ids=TAKEN)
def test_accepted_options_compute_what_peft_computes(tmp_path, options):
    folder, x = trained(tmp_path, peft.LoraConfig(**{**BASIC, **options})), torch.randn(5, 16)
    taken = LAYOUT.unpack(load_subject(folder, LAYOUT, "b" * 64).lora)
    change = torch.cat([x @ torch.from_numpy(a @ b) for a, b in taken.values()], 1)
    assert difference(outputs(base_model(), x) + change, by_peft(folder, x)) < 1e-5


def test_an_alpha_that_the_configuration_leaves_out_is_pefts(tmp_path):
    folder, x = trained(tmp_path, peft.LoraConfig(**BASIC)), torch.randn(5, 16)
    content = json.loads((folder / "adapter_config.json").read_text())
    del content["lora_alpha"]
    (folder / "adapter_config.json").write_text(json.dumps(content))
    assert difference(by_product(folder, x), by_peft(folder, x)) < 1e-5


REFUSED = {
    "PiSSA": {"init_lora_weights": "pissa"},
    "OLoRA": {"init_lora_weights": "olora"},
    "DoRA": {"use_dora": True},
    "aLoRA": {"alora_invocation_tokens": [1, 2]},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", REFUSED)
def test_what_peft_computes_otherwise_is_refused_by_name(tmp_path, name):
    folder, x = trained(tmp_path, peft.LoraConfig(**BASIC, **REFUSED[name])), torch.randn(5, 16)
    assert difference(by_product(folder, x), by_peft(folder, x)) > 0.05
    with pytest.raises(LoraError, match=f"is {name}, not a plain LoRA"):
        load_subject(folder, LAYOUT, "b" * 64)


@pytest.mark.filterwarnings("ignore")
def test_lora_ga_which_peft_itself_does_not_load_right_is_refused(tmp_path):
    from peft.tuners.lora.config import LoraGAConfig

    config = peft.LoraConfig(**BASIC, init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig())
    folder = trained(tmp_path, config, gradients)
    with pytest.raises(LoraError, match="is LoRA-GA, not a plain LoRA"):
        load_subject(folder, LAYOUT, "b" * 64)


def others():
    """Configurations of PEFT that hold other tensors than A and B -> what they are called here."""
    from peft.tuners.lora import config

    return {
        "KaSA": peft.LoraConfig(**BASIC, kasa_config=config.KasaConfig()),
        "BD-LoRA": peft.LoraConfig(
            **BASIC, use_bdlora=config.BdLoraConfig(target_modules_bd_b=BASIC["target_modules"], nblocks=2)
        ),
        "VeLoRA": peft.LoraConfig(**BASIC, velora_config=config.VeloraConfig(num_groups=4)),
        "MonteCLoRA": peft.LoraConfig(**BASIC, monteclora_config=config.MontecloraConfig()),
        "LoRA with biases": peft.LoraConfig(**BASIC, lora_bias=True),
        "LOHA": peft.LoHaConfig(r=4, target_modules=BASIC["target_modules"]),
        "LOKR": peft.LoKrConfig(r=4, target_modules=BASIC["target_modules"]),
        "OFT": peft.OFTConfig(oft_block_size=4, target_modules=BASIC["target_modules"]),
        "IA3": peft.IA3Config(target_modules=BASIC["target_modules"], feedforward_modules=[]),
        "VERA": peft.VeraConfig(r=4, target_modules=BASIC["target_modules"]),
        "ADALORA": peft.AdaLoraConfig(r=4, total_step=10, target_modules=BASIC["target_modules"]),
    }


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", others())
def test_other_methods_of_peft_are_refused_by_name(tmp_path, name):
    folder = trained(tmp_path, others()[name])
    with pytest.raises(LoraError, match=f"is {name}, not a plain LoRA"):
        load_subject(folder, LAYOUT, "b" * 64, partial=True)


@pytest.mark.filterwarnings("ignore")
def test_pissa_that_peft_converted_is_taken(tmp_path):
    x, start = torch.randn(5, 16), tmp_path / "start"
    model = peft.get_peft_model(base_model(), peft.LoraConfig(**BASIC, init_lora_weights="pissa"))
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(start)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.add_(0.3 * torch.randn_like(weight))
    model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=str(start))
    assert difference(by_product(tmp_path / "plain", x), outputs(model.base_model.model, x)) < 1e-5
    wide = dataclasses.replace(LAYOUT, rank=8)
    assert load_subject(tmp_path / "plain", wide, "b" * 64).lora


def test_every_option_of_pefts_lora_is_known():
    assert not peft_config.unknown({field.name: "set" for field in dataclasses.fields(peft.LoraConfig)})


def test_a_configuration_that_peft_saves_has_nothing_that_is_unknown(tmp_path):
    folder = trained(tmp_path, copy.deepcopy(peft.LoraConfig(**BASIC)))
    assert open_lora(folder).notes == ()
