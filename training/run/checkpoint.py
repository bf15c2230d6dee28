"""Checkpoints of the hypernetwork: safetensors and JSON, each published whole or not at all; no pickles.

A run's folder:
    hypernet.safetensors   weights of the decoder (EMA), what `hyperrt export --hypernet` reads
    hypernet.json          what they are: shape, LoRA layout, token, training configuration, and the hashes of
                           base model and image prompt
    state.safetensors      all that a killed run needs to go on unchanged: weights, EMA, AdamW, step
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from hyperrt import files
from hyperrt.errors import Incompatible, IntegrityError, UsageError
from hyperrt.lora.layout import LoraLayout
from hyperrt.training.model.decoder_config import DecoderConfig
from hyperrt.training.model.hypernet import Decoder, decoder_of
from hyperrt.training.run.config import FIXED, TrainConfig, differences, to_json
from hyperrt.training.run.loop import Descent

FORMAT = 1
HYPERNET, STATE = "hypernet", "state.safetensors"
Moments = Mapping[str, Mapping[str, Tensor]]  # name of a parameter -> AdamW's state of it
Changes = dict[str, tuple[Any, Any]]  # what differs -> (then, now)
RENAMED = {"base": "model", "cache": "data", "out": "output"}  # settings that once had other names


@dataclass(frozen=True)
class Origin:
    """What a run goes on from, told by content: a moved folder is the same, another model in it is not.

    base_model: `base_hash` of the UNet. data: `Batches.fingerprint`. image_prompt: `prompt_hash`, "" without
    one. States of before the latter two were kept lack them.
    """

    base_model: str
    data: str
    image_prompt: str = ""


def save_hypernet(
    folder: Path, decoder: Decoder, config: TrainConfig, step: int, base_model: str, image_prompt: str = ""
) -> Path:
    """Writes hypernet.json and hypernet.safetensors; returns the path of the latter.

    base_model, image_prompt: their hashes, as in `Origin`.

    A run that is killed between the two leaves weights of the save before: the step is with the weights.
    """
    about = {
        "format": FORMAT,
        "step": step,
        "token": config.token,
        "base_model": base_model,
        "image_prompt": image_prompt,
        "feature_dim": decoder.feature_dim,
        "decoder": to_json(decoder.config),
        "layout": decoder.layout.to_json(),
        "training": to_json(config),
    }
    files.publish(
        folder / f"{HYPERNET}.json", lambda file: file.write(json.dumps(about, indent=1).encode()), force=True
    )
    metadata = {"format": str(FORMAT), "step": str(step)}
    return _publish(folder / f"{HYPERNET}.safetensors", decoder.state_dict(), metadata)


def load_hypernet(path: Path | str, values: bool = True) -> tuple[Decoder, dict[str, Any]]:
    """The decoder, frozen and in eval mode, and what hypernet.json says of it.

    Args:
        path: the run's folder, or hypernet.safetensors, or hypernet.json.
        values: without them only the file's header is read, and the decoder is on the meta device.

    Raises:
        FileNotFoundError: one of the two files is missing.
        ValueError: a file is damaged, of another format, or they do not fit together.
    """
    path = Path(path)
    stem = path / HYPERNET if path.is_dir() else path.with_suffix("")
    try:
        about = json.loads(stem.with_suffix(".json").read_text())
        tensors, metadata = read(stem.with_suffix(".safetensors"), values)
        step = metadata.get("step")
    except (json.JSONDecodeError, SafetensorError) as error:
        raise ValueError(f"{stem} is damaged: {error}") from error
    if about.get("format") != FORMAT:
        raise ValueError(f"{stem}.json has format {about.get('format')!r}; this version reads {FORMAT}")
    about["step"] = about["step"] if step is None else int(step)
    about["training"] = {RENAMED.get(name, name): value for name, value in about["training"].items()}
    layout, config = LoraLayout.from_json(about["layout"]), DecoderConfig(**about["decoder"])
    with torch.device("meta"):  # the tensors take the place of the parameters; those of SDXL are 2.6 GB
        decoder = decoder_of(layout, about["feature_dim"], config)
    try:
        decoder.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, assign=True)
    except RuntimeError as error:
        raise ValueError(f"{stem}.safetensors does not fit {stem}.json: {error}") from error
    return decoder.eval().requires_grad_(False), about


def save_state(
    folder: Path, decoder: Decoder, ema: Decoder, moments: Moments, window: Tensor, config: TrainConfig,
    step: int, origin: Origin,
) -> Path:  # fmt: skip
    """Writes state.safetensors; `step` steps are done, `window` holds their losses not logged yet."""
    tensors = {"window": window}
    tensors.update({f"decoder/{name}": tensor for name, tensor in decoder.state_dict().items()})
    tensors.update({f"ema/{name}": tensor for name, tensor in ema.state_dict().items()})
    for name, values in moments.items():
        tensors.update({f"adam.{key}/{name}": value for key, value in values.items()})
    metadata = {"step": str(step), "config": json.dumps(to_json(config)), **vars(origin)}
    return _publish(folder / STATE, tensors, metadata)


def load_state(
    folder: Path, decoder: Decoder, descent: Descent, config: TrainConfig, origin: Origin,
    allow_changes: bool = False,
) -> tuple[int, Tensor, Changes]:  # fmt: skip
    """Puts everything back; returns the step, the window, and what differs as {name: (then, now)}.

    Raises:
        UsageError: settings that are not `config.FREE` differ, or the pictures, or the image prompt, without
            `allow_changes`.
        Incompatible: with it, a setting in `config.FIXED` differs; the hash of the base model does.
        IntegrityError: the file is damaged.
    """
    path = folder / STATE
    try:
        tensors, metadata = read(path)
        done, before = int(metadata["step"]), json.loads(metadata["config"])
        base_model = metadata["base_model"]
    except (SafetensorError, KeyError, ValueError) as error:
        raise IntegrityError(f"{path} is damaged", str(error), f"remove {folder} to train it anew") from error
    if base_model != origin.base_model:
        why = f"it has the hash {base_model[:12]}, the one of --model has {origin.base_model[:12]}"
        do = "set --model back, or choose another --output"
        raise Incompatible(f"{path} is of another base model", why, do)
    changed = differences(before, config) | _changed_contents(metadata, before, origin)
    check_changes(path, changed, allow_changes)
    decoder.load_state_dict(_under("decoder/", tensors))
    descent.ema.load_state_dict(_under("ema/", tensors))
    keys = {name.partition("/")[0] for name in tensors if name.startswith("adam.")}
    columns = {key.removeprefix("adam."): _under(f"{key}/", tensors) for key in keys}
    descent.restore({name: {key: values[name] for key, values in columns.items()} for name in descent.named})
    return done, tensors["window"], changed


def _changed_contents(metadata: Mapping[str, str], before: Mapping[str, Any], origin: Origin) -> Changes:
    """What the files hold otherwise, as far as a state of before that was kept can tell."""
    changed: Changes = {}
    if metadata.get("data", origin.data) != origin.data:
        changed["what --data holds"] = metadata["data"], origin.data
    then, now = metadata.get("image_prompt"), origin.image_prompt
    if then is None:
        then = (now or "another") if before.get("image_prompt") else ""
    if then != now:
        changed["what --image-prompt holds"] = then[:12] or "nothing", now[:12] or "nothing"
    return changed


def check_changes(path: Path, changed: Changes, allowed: bool) -> None:
    """Raises what `load_state` says of changes."""
    said = ", ".join(f"{name} was {then} and is {now}" for name, (then, now) in changed.items())
    fixed = FIXED & changed.keys()
    do = f"set it back,{'' if fixed else ' add --allow-changes,'} or choose another --output"
    if changed and not allowed:
        raise UsageError(f"{path} is of a run with other settings", said, do)
    if fixed:
        raise Incompatible(f"{path} is of another decoder", said, do)


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def read(path: Path, values: bool = True) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors (without `values` on the meta device) and the metadata of a safetensors file.

    Raises:
        SafetensorError: the file is damaged.
    """
    with safe_open(path, "pt") as file:
        names = file.keys()
        if values:
            tensors = {name: file.get_tensor(name) for name in names}
        else:
            tensors = {name: torch.empty(file.get_slice(name).get_shape(), device="meta") for name in names}
        return tensors, file.metadata() or {}


def _publish(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> Path:
    content = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, metadata)
    return files.publish(path, lambda file: file.write(content), force=True)
