"""PEFT's configuration of a LoRA: where a file has it, alpha, and what it says that B A does not.

PEFT writes it beside the weights (`adapter_config.json`), diffusers into the header of the file.  HyperRT
adds alpha / r times B A to the weights of the base model.  Some configurations mean something else: `methods`
names them.  What PEFT computes was tried for each option (PEFT 0.21, tests/export/test_peft_config.py).
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

from hyperrt import strict_json
from hyperrt.errors import LoraError
from hyperrt.text import shortened

Config = Mapping[str, Any]
Patterns = Mapping[str, tuple[int, Any]]  # a key of alpha_pattern -> its place among the keys, and its value

MAX_ALPHA = 1e6
PEFT_FILE, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"  # what PEFT looks for in a folder
CONFIG = "lora_adapter_metadata"  # where diffusers keeps the configuration
MAX_CONFIG = 2**20  # bytes of PEFT's file of it
ALPHA = 8  # PEFT's lora_alpha where a configuration has none
CORRECT = "correct it where the file came from"

# `init_lora_weights` that changes the base model's weights before the training, and that does not.
_CHANGED_BASE = {"pissa": "PiSSA", "olora": "OLoRA", "corda": "CorDA", "lora_ga": "LoRA-GA", "loftq": "LoftQ"}
_KEPT_BASE = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
_OTHER_METHODS = {  # an option that is set -> the method, and what it does
    "use_dora": ("DoRA", "it scales the weights to a length that was trained"),
    "kasa_config": ("KaSA", "it takes small parts out of the base model's weights"),
    "alora_invocation_tokens": ("aLoRA", "it acts on a part of the prompt only"),
    "arrow_config": ("Arrow", "it chooses among several LoRAs for each word"),
    "use_bdlora": ("BD-LoRA", "its factors are blocks of larger ones"),
    "use_qalora": ("QALoRA", "it averages groups of its inputs"),
    "velora_config": ("VeLoRA", "it holds more than the factors A and B"),
    "monteclora_config": ("MonteCLoRA", "it holds more than the factors A and B"),
    "lora_bias": ("LoRA with biases", "it holds more than the factors A and B"),
    "layer_replication": ("LoRA of repeated layers", "it adds layers to the model"),
    "megatron_config": ("LoRA of Megatron's layers", "they are not those of Stable Diffusion"),
}
_UNSET: tuple[Any, ...] = (None, False, [])
# These change nothing in what is added to a weight.  What else they put into a file, its tensors tell.
_WITHOUT_EFFECT = frozenset(
    (
        "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "peft_type", "init_lora_weights",
        "target_modules", "exclude_modules", "target_parameters", "modules_to_save", "layers_to_transform",
        "layers_pattern", "trainable_token_indices", "lora_dropout", "fan_in_fan_out", "bias", "loftq_config",
        "eva_config", "corda_config", "lora_ga_config", "qalora_group_size", "runtime_config",
        "megatron_core", "ensure_weight_tying", "inference_mode", "task_type", "auto_mapping", "revision",
        "base_model_name_or_path", "peft_version",
    )
)  # fmt: skip


class Method(NamedTuple):
    """A way of adapting a model that alpha / r times B A does not express.

    Attributes:
        name: "PiSSA".
        why: what the configuration says, and what that means.
        do: the next step for the reader.
    """

    name: str
    why: str
    do: str = "convert it to a plain LoRA where it was trained, or use another file"


def read(source: Path, format: str, metadata: Mapping[str, str]) -> Config | None:
    """The configuration of the UNet's LoRA in the header or beside the file; None where there is none.

    Raises:
        LoraError: it is not JSON, or cannot be read.
    """
    beside = source.with_name(PEFT_CONFIG)
    if format == "peft" and source.name == PEFT_FILE and os.path.isfile(beside):
        try:
            with beside.open("rb") as file:
                return _object(PEFT_CONFIG, file.read(MAX_CONFIG))
        except OSError as error:
            raise LoraError(f"cannot read {beside}", f"{error.strerror}") from error
    if CONFIG not in metadata:
        return None
    config = _object(source.name, metadata[CONFIG].encode(errors="replace"))
    of_unet = {key[5:]: value for key, value in config.items() if key.startswith("unet.")}
    return of_unet or {key: value for key, value in config.items() if "." not in key} or None


def alpha_patterns(config: Config, name: str) -> Patterns:
    """PEFT's `alpha_pattern`, for `alpha`.

    Args:
        name: of the file, for messages.

    Raises:
        LoraError: a key is more than the name of a module.
    """
    patterns = config.get("alpha_pattern") or {}
    found: dict[str, tuple[int, Any]] = {}
    for place, (pattern, value) in enumerate(patterns.items() if isinstance(patterns, dict) else ()):
        found.setdefault(_module_of(pattern, name), (place, value))
    return found


def alpha(config: Config, patterns: Patterns, name: str, site: str, rank: int) -> float:
    """The alpha of a site; what is added to its weight is alpha / rank times B A.

    Args:
        patterns: of `alpha_patterns`.
        name: of the file, for messages.
        site: its path in the UNet.

    Raises:
        LoraError: it is not a number.
    """
    # A key means the modules whose path ends in it; the first one counts.  Looked up, since a file may have
    # thousands of keys and of sites.
    parts = site.split(".")
    keys = [f"^{site}", *(".".join(parts[start:]) for start in range(len(parts)))]
    meant = [patterns[key] for key in keys if key in patterns]
    found = min(meant, key=itemgetter(0))[1] if meant else config.get("lora_alpha", ALPHA)
    if isinstance(found, bool) or not isinstance(found, (int, float)) or abs(found) > MAX_ALPHA:
        why = f"it must be a number above 0, and at most {MAX_ALPHA:g}"
        raise LoraError(f"{name}: alpha is {shortened(repr(found))}", why, CORRECT)
    return float(found) * math.sqrt(rank) if config.get("use_rslora") else float(found)


def methods(config: Config) -> tuple[Method, ...]:
    """Everything for which PEFT computes something else than W + alpha / r B A; () for a plain LoRA."""
    kind, start = config.get("peft_type", "LORA"), config.get("init_lora_weights")
    if kind != "LORA":
        return (Method(shortened(str(kind)), f"peft_type is {shortened(repr(kind))}, not 'LORA'"),)
    found = []
    if (start.lower() if isinstance(start, str) else start) not in _KEPT_BASE:
        found.append(_of_changed_base(start))
    for option, (name, why) in _OTHER_METHODS.items():
        if config.get(option) not in _UNSET:
            found.append(Method(name, f"{option} is set: {why}"))
    return tuple(found)


def unknown(config: Config) -> list[str]:
    """Names of options that are set, and that this version does not know."""
    known = _WITHOUT_EFFECT | _OTHER_METHODS.keys()
    is_set = [name for name, value in config.items() if value not in (*_UNSET, {})]
    return [shortened(name) for name in is_set if name not in known]


def _of_changed_base(start: Any) -> Method:
    said = f"init_lora_weights is {shortened(repr(start))}"
    key = next((key for key in _CHANGED_BASE if str(start).lower().startswith(key)), "")
    if not key:
        return Method("LoRA of an unknown start", f"{said}, which PEFT 0.21 does not have")
    why = f"{said}: it belongs to base weights that its training changed, and not to those of the base model"
    if key == "loftq":
        return Method("LoftQ", why, "train it without LoftQ, or use another file")
    do = "save it as a plain LoRA where it was trained: PEFT's save_pretrained does that if it is given "
    return Method(_CHANGED_BASE[key], why, do + "path_initial_model_for_weight_conversion")


def _module_of(pattern: str, name: str) -> str:
    """A key of `alpha_pattern`, "^" first where it is a whole path; to PEFT it is a regular expression."""
    ending = pattern.removeprefix("^").removesuffix("$").replace("\\.", ".")
    if not re.fullmatch(r"[\w.]+", ending):  # never run: it may take for ever
        why = f"its key {shortened(pattern)} is a pattern, not the name of a module"
        raise LoraError(f"the alpha_pattern of {name} is not understood", why, CORRECT)
    return f"^{ending}" if pattern.startswith("^") else ending


def _object(name: str, text: bytes) -> Config:
    try:
        found = strict_json.loads(text)
    except strict_json.StrictError as error:
        raise LoraError(f"the configuration in {name} is damaged", shortened(str(error)), CORRECT) from error
    if not isinstance(found, dict):
        raise LoraError(f"the configuration in {name} is damaged", "it is no JSON object", CORRECT)
    return found
