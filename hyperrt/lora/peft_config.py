"""PEFT's configuration of a LoRA: reads it, finds alpha, and names methods that are not a plain LoRA.

PEFT writes it beside the weights (`adapter_config.json`), diffusers into the header of the file.  HyperRT
adds alpha / r times B A to the weights of the base model.  Some configurations mean something else: `methods`
names them.  Each option was tried with PEFT 0.21 (tests/export/test_peft_config.py).
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
Patterns = Mapping[str, tuple[int, Any]]  # key of alpha_pattern -> its position and value

MAX_ALPHA = 1e6
PEFT_FILE, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"  # PEFT's names in a folder
CONFIG = "lora_adapter_metadata"  # key of the configuration in diffusers' metadata
MAX_CONFIG = 2**20  # bytes of adapter_config.json
ALPHA = 8  # PEFT's default of lora_alpha
CORRECT = "correct it where the file came from"

# Values of `init_lora_weights` that change the base model's weights before the training, and that do not.
_CHANGED_BASE = {"pissa": "PiSSA", "olora": "OLoRA", "corda": "CorDA", "lora_ga": "LoRA-GA", "loftq": "LoftQ"}
_KEPT_BASE = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
_OTHER_METHODS = {  # option -> method, and why it is not a plain LoRA
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
# These do not change what is added to a weight.  If they add tensors to a file, the reader sees those.
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
        name: such as "PiSSA".
        why: the option and its meaning, for a message.
        do: the remedy, for a message.
    """

    name: str
    why: str
    do: str = "convert it to a plain LoRA where it was trained, or use another file"


def read(source: Path, format: str, metadata: Mapping[str, str]) -> Config | None:
    """The configuration of the UNet's LoRA, from the header or beside the file; None if it has none.

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
        LoraError: a key is not the name of a module.
    """
    values = config.get("alpha_pattern") or {}
    patterns: dict[str, tuple[int, Any]] = {}
    for position, (pattern, value) in enumerate(values.items() if isinstance(values, dict) else ()):
        patterns.setdefault(_module_of(pattern, name), (position, value))
    return patterns


def alpha(config: Config, patterns: Patterns, name: str, site: str, rank: int) -> float:
    """The alpha of a site: alpha / rank times B A is added to its weight.

    Args:
        patterns: of `alpha_patterns`.
        name: of the file, for messages.
        site: its path in the UNet.

    Raises:
        LoraError: it is not a number.
    """
    # The first key counts that the path ends with.  Looked up: a file may have thousands of keys and sites.
    parts = site.split(".")
    keys = [f"^{site}", *(".".join(parts[start:]) for start in range(len(parts)))]
    matches = [patterns[key] for key in keys if key in patterns]
    value = min(matches, key=itemgetter(0))[1] if matches else config.get("lora_alpha", ALPHA)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or abs(value) > MAX_ALPHA:
        why = f"it must be a number above 0, and at most {MAX_ALPHA:g}"
        raise LoraError(f"{name}: alpha is {shortened(repr(value))}", why, CORRECT)
    return float(value) * math.sqrt(rank) if config.get("use_rslora") else float(value)


def methods(config: Config) -> tuple[Method, ...]:
    """The methods for which PEFT does not compute W + alpha / r B A; () for a plain LoRA."""
    kind, start = config.get("peft_type", "LORA"), config.get("init_lora_weights")
    if kind != "LORA":
        return (Method(shortened(str(kind)), f"peft_type is {shortened(repr(kind))}, not 'LORA'"),)
    methods = []
    if (start.lower() if isinstance(start, str) else start) not in _KEPT_BASE:
        methods.append(_of_changed_base(start))
    for option, (name, why) in _OTHER_METHODS.items():
        if config.get(option) not in _UNSET:
            methods.append(Method(name, f"{option} is set: {why}"))
    return tuple(methods)


def unknown(config: Config) -> list[str]:
    """Names of options that are set but unknown to this version."""
    read = _WITHOUT_EFFECT | _OTHER_METHODS.keys()
    is_set = [name for name, value in config.items() if value not in (*_UNSET, {})]
    return [shortened(name) for name in is_set if name not in read]


def _of_changed_base(start: Any) -> Method:
    option = f"init_lora_weights is {shortened(repr(start))}"
    key = next((key for key in _CHANGED_BASE if str(start).lower().startswith(key)), "")
    if not key:
        return Method("LoRA of an unknown start", f"{option}, which PEFT 0.21 does not have")
    why = f"{option}: it fits base weights that its training changed, and not those of the base model"
    if key == "loftq":
        return Method("LoftQ", why, "train it without LoftQ, or use another file")
    do = "save it as a plain LoRA where it was trained: PEFT's save_pretrained does that if it is given "
    return Method(_CHANGED_BASE[key], why, do + "path_initial_model_for_weight_conversion")


def _module_of(pattern: str, name: str) -> str:
    """The module that a key of `alpha_pattern` names, after "^" if it is a whole path.

    To PEFT the key is a regular expression.
    """
    ending = pattern.removeprefix("^").removesuffix("$").replace("\\.", ".")
    if not re.fullmatch(r"[\w.]+", ending):  # never run: it may take forever
        why = f"its key {shortened(pattern)} is a pattern, not the name of a module"
        raise LoraError(f"the alpha_pattern of {name} is not understood", why, CORRECT)
    return f"^{ending}" if pattern.startswith("^") else ending


def _object(name: str, text: bytes) -> Config:
    try:
        config = strict_json.loads(text)
    except strict_json.StrictError as error:
        raise LoraError(f"the configuration in {name} is damaged", shortened(str(error)), CORRECT) from error
    if not isinstance(config, dict):
        raise LoraError(f"the configuration in {name} is damaged", "it is not a JSON object", CORRECT)
    return config
