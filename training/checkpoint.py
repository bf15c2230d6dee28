"""Checkpoints of the hypernetwork: safetensors and JSON, each published whole or not at all; no pickles.

A run's folder:
    hypernet.safetensors   weights of the decoder (EMA), what `hyperrt export --hypernet` reads
    hypernet.json          what they are: shape, LoRA layout, token, base model, training configuration
    state.safetensors      all that a killed run needs to go on unchanged: weights, EMA, AdamW, step
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from hyperrt import files
from hyperrt.errors import Incompatible, IntegrityError
from hyperrt.lora import LoraLayout
from training.config import DecoderConfig, TrainConfig, to_json
from training.hypernet import Decoder, decoder_of
from training.loop import Descent

FORMAT = 1
HYPERNET, STATE = "hypernet", "state.safetensors"
# Settings that a resumed run may not change: the weights would not fit.
FIXED = ("rank", "dim", "layers", "iterations", "head_dim")


def hash_of(module: nn.Module, half: bool = False) -> str:
    """sha256 (hex) of a module's weights, names and values; tells one base model from another.

    half: of the values rounded to fp16, which a model has whether it was loaded as fp32 or as fp16; for the
        large families. Without it, of fp32 values, as in the checkpoints and bundles of the tiny family.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        values = tensor.detach().cpu().to(torch.float16 if half else torch.float32)
        digest.update(values.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def save_hypernet(
    folder: Path, decoder: Decoder, config: TrainConfig, step: int, base_model: str
) -> Path:
    """Writes hypernet.json and hypernet.safetensors; returns the path of the latter."""
    about = {
        "format": FORMAT,
        "step": step,
        "token": config.token,
        "base_model": base_model,
        "feature_dim": decoder.feature_dim,
        "decoder": to_json(decoder.config),
        "layout": decoder.layout.to_json(),
        "training": to_json(config),
    }
    files.publish(
        folder / f"{HYPERNET}.json", lambda file: file.write(json.dumps(about, indent=1).encode()), force=True
    )
    return _publish(folder / f"{HYPERNET}.safetensors", decoder.state_dict(), {"format": str(FORMAT)})


def load_hypernet(path: Path | str) -> tuple[Decoder, dict[str, Any]]:
    """The decoder, frozen and in eval mode, and what hypernet.json says of it.

    Args:
        path: the run's folder, or hypernet.safetensors, or hypernet.json.

    Raises:
        FileNotFoundError: one of the two files is missing.
        ValueError: a file is damaged, of another format, or they do not fit together.
    """
    path = Path(path)
    stem = path / HYPERNET if path.is_dir() else path.with_suffix("")
    try:
        about = json.loads(stem.with_suffix(".json").read_text())
        tensors = load_file(stem.with_suffix(".safetensors"))
    except (json.JSONDecodeError, SafetensorError) as error:
        raise ValueError(f"{stem} is damaged: {error}") from error
    if about.get("format") != FORMAT:
        raise ValueError(f"{stem}.json has format {about.get('format')!r}; this version reads {FORMAT}")
    layout, config = LoraLayout.from_json(about["layout"]), DecoderConfig(**about["decoder"])
    with torch.device("meta"):  # the tensors take the place of the parameters; those of SDXL are 2.6 GB
        decoder = decoder_of(layout, about["feature_dim"], config)
    try:
        decoder.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, assign=True)
    except RuntimeError as error:
        raise ValueError(f"{stem}.safetensors does not fit {stem}.json: {error}") from error
    return decoder.eval().requires_grad_(False), about


def save_state(
    folder: Path,
    decoder: Decoder,
    descent: Descent,
    window: Tensor,
    config: TrainConfig,
    step: int,
    base_model: str,
) -> Path:
    """Writes state.safetensors; `step` steps are done, `window` holds their losses not logged yet."""
    tensors = {"window": window}
    tensors.update({f"decoder/{name}": tensor for name, tensor in decoder.state_dict().items()})
    tensors.update({f"ema/{name}": tensor for name, tensor in descent.ema.state_dict().items()})
    for name, parameter in decoder.named_parameters():
        moments = descent.optimizer.state[parameter]
        tensors.update({f"adam.{key}/{name}": value for key, value in moments.items()})
    metadata = {"step": str(step), "base_model": base_model, "config": json.dumps(to_json(config))}
    return _publish(folder / STATE, tensors, metadata)


def load_state(
    folder: Path, decoder: Decoder, descent: Descent, config: TrainConfig, base_model: str
) -> tuple[int, Tensor, dict[str, tuple[Any, Any]]]:
    """Puts everything back; returns the step, the window, and what differs as {name: (then, now)}.

    Raises:
        Incompatible: a setting in `FIXED` differs, or the hash of the base model.
        IntegrityError: the file is damaged.
    """
    path = folder / STATE
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
        tensors = load_file(path)
        done, before = int(metadata["step"]), json.loads(metadata["config"])
        was = metadata["base_model"]
    except (SafetensorError, KeyError, ValueError) as error:
        raise IntegrityError(f"{path} is damaged", str(error), f"remove {folder} to train it anew") from error
    now = to_json(config)
    changed = {name: (before.get(name), now[name]) for name in now if before.get(name) != now[name]}
    if fatal := [f"{name} was {then} and is {now}" for name, (then, now) in changed.items() if name in FIXED]:
        raise Incompatible(
            f"{path} is of another decoder", ", ".join(fatal), "set it back, or choose another --out"
        )
    if was != base_model:
        why = f"it has the hash {was[:12]}, the one of --base has {base_model[:12]}"
        do = "set --base back, or choose another --out"
        raise Incompatible(f"{path} is of another base model", why, do)
    decoder.load_state_dict(_under("decoder/", tensors))
    descent.ema.load_state_dict(_under("ema/", tensors))
    keys = {name.partition("/")[0] for name in tensors if name.startswith("adam.")}
    moments = {key.removeprefix("adam."): _under(f"{key}/", tensors) for key in keys}
    for name, parameter in decoder.named_parameters():
        descent.optimizer.state[parameter] = {
            key: values[name].to(parameter.device) for key, values in moments.items()
        }
    return done, tensors["window"], changed


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _publish(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> Path:
    content = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, metadata)
    return files.publish(path, lambda file: file.write(content), force=True)
