"""Checkpoints as safetensors and JSON, without pickles; each file is published whole or not at all.

In the folder of any training:
    state.safetensors      all that a killed run needs to resume: weights, EMA, AdamW's moments, the step
In the folder of a hypernetwork's training also:
    hypernet.safetensors   weights of the decoder (EMA); `hyperrt export --hypernet` reads them
    hypernet.json          their description: shape, LoRA layout, token, training configuration, and the
                           hashes of base model and image prompt
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
from hyperrt.training.messages import first_line
from hyperrt.training.model.decoder_config import DecoderConfig
from hyperrt.training.model.hypernet import Decoder, decoder_of
from hyperrt.training.run.config import FIXED, TrainConfig, differences, renamed, to_json
from hyperrt.training.run.optimizer import Optimizer

FORMAT = 1
HYPERNET, STATE = "hypernet", "state.safetensors"
Changes = dict[str, tuple[Any, Any]]  # name of what differs -> (value of the saved run, value now)


@dataclass(frozen=True)
class Origin:
    """What a run was started with, identified by content: folders may move.

    Attributes:
        base_model: `weight_hash.base_hash` of the UNet.
        data: `Batches.fingerprint`.
        image_prompt: `weight_hash.prompt_hash`, "" without an image prompt.
    """

    base_model: str
    data: str
    image_prompt: str = ""


def save_hypernet(
    folder: Path, decoder: Decoder, config: TrainConfig, step: int, base_model: str, image_prompt: str = ""
) -> Path:
    """Writes hypernet.json and hypernet.safetensors; returns the path of the latter.

    A kill between the two leaves the weights of the save before. So the step is also stored with the weights.

    Args:
        base_model, image_prompt: their hashes, as in `Origin`.
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
        ValueError: a file is damaged or of another format, or they do not fit together.
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
    about["training"] = renamed(about["training"])
    layout, config = LoraLayout.from_json(about["layout"]), DecoderConfig(**about["decoder"])
    with torch.device("meta"):  # the tensors replace the parameters; SDXL's are 2.6 GB
        decoder = decoder_of(layout, about["feature_dim"], config)
    try:
        decoder.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, assign=True)
    except RuntimeError as error:
        raise ValueError(f"{stem}.safetensors does not fit {stem}.json: {error}") from error
    return decoder.eval().requires_grad_(False), about


def save_state(folder: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> Path:
    """Writes state.safetensors.

    Args:
        tensors: `Optimizer.tensors`: "model/NAME", "ema/NAME", "adam.exp_avg/NAME" and so on; others may be
            added.
        metadata: "step", the number of steps done, and others.
    """
    return _publish(folder / STATE, tensors, metadata)


def read_state(folder: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of `save_state`.

    Raises:
        IntegrityError: the file is damaged.
    """
    path = folder / STATE
    try:
        tensors, metadata = read(path)
        int(metadata["step"])
    except (SafetensorError, KeyError, ValueError) as error:
        raise IntegrityError(f"{path} is damaged", str(error), f"remove {folder} to train it anew") from error
    former = "decoder/"  # "model/" of earlier versions
    return {
        f"model/{name.removeprefix(former)}" if name.startswith(former) else name: tensor
        for name, tensor in tensors.items()
    }, metadata


def restore(folder: Path, optimizer: Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Loads the tensors of `read_state` into a model and its optimizer.

    Raises:
        IntegrityError: they are another model's.
    """
    try:
        optimizer.restore(tensors)
    except (RuntimeError, KeyError) as error:
        do = f"remove {folder} to train it anew"
        what = f"{folder / STATE} is another model's"
        raise IntegrityError(what, first_line(error), do) from error


def state_metadata(step: int, config: TrainConfig, origin: Origin) -> dict[str, str]:
    """The metadata of a hypernetwork's state, which `check_state` compares."""
    return {"step": str(step), "config": json.dumps(to_json(config)), **vars(origin)}


def check_state(
    path: Path, metadata: Mapping[str, str], config: TrainConfig, origin: Origin, allow_changes: bool = False
) -> Changes:
    """Compares a saved run with what it is to resume with; returns the differences.

    Args:
        path: of the state, for error messages.
        metadata: as `state_metadata` made it; earlier versions saved no `data` and `image_prompt`.

    Raises:
        UsageError: settings other than `config.FREE`, the pictures or the image prompt differ, and
            `allow_changes` is off.
        Incompatible: it is on and a setting in `config.FIXED` differs; or the base model differs.
        IntegrityError: the metadata is damaged.
    """
    try:
        before, base_model = renamed(json.loads(metadata["config"])), metadata["base_model"]
    except (KeyError, ValueError) as error:
        do = f"remove {path.parent} to train it anew"
        raise IntegrityError(f"{path} is damaged", str(error), do) from error
    if base_model != origin.base_model:
        why = f"its base model has the hash {base_model[:12]}, the one of --base has {origin.base_model[:12]}"
        do = "set --base back, or choose another --output"
        raise Incompatible(f"{path} was trained with another base model", why, do)
    changed = differences(before, config) | _changed_contents(metadata, before, origin)
    check_changes(path, changed, allow_changes)
    return changed


def _changed_contents(metadata: Mapping[str, str], before: Mapping[str, Any], origin: Origin) -> Changes:
    """Differences in the content of data and image prompt, as far as the metadata can tell."""
    changed: Changes = {}
    if metadata.get("data", origin.data) != origin.data:
        changed["the content of --data"] = metadata["data"], origin.data
    then, now = metadata.get("image_prompt"), origin.image_prompt
    if then is None:
        then = (now or "another") if before.get("image_prompt") else ""
    if then != now:
        changed["the content of --image-prompt"] = then[:12] or "nothing", now[:12] or "nothing"
    return changed


def check_changes(path: Path, changed: Changes, allowed: bool) -> None:
    """Raises the errors of `check_state` about changes."""
    why = ", ".join(f"{name} was {then} and is {now}" for name, (then, now) in changed.items())
    fixed = FIXED & changed.keys()
    do = f"set it back,{'' if fixed else ' add --allow-changes,'} or choose another --output"
    if changed and not allowed:
        raise UsageError(f"{path} was saved by a run with other settings", why, do)
    if fixed:
        raise Incompatible(f"{path} holds another decoder", why, do)


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
