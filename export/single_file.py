"""Reads Stable Diffusion or a VAE from a single file, whose tensors have the names of the first publication.

Such a file holds the networks side by side, each below a prefix. It has no configuration, which comes from
the folder of a model of the same architecture. diffusers' functions translate the names, but do not report
missing or unknown tensors. So names and shapes are compared with the configuration before weights are read.

The file is mapped into memory, and fp16 weights are not copied.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from hyperrt.errors import BadInput, IntegrityError
from hyperrt.export.errors import ExportError
from hyperrt.export.parts import ModelPart
from hyperrt.training.messages import first_line

Tensors = Mapping[str, Tensor]

OPEN_CLIP = ("cond_stage_model.model.", "conditioner.embedders.1.model.")  # Stable Diffusion 2, SDXL
# The file of a VAE has no prefix, and often diffusers' names.
VAE_ALONE = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
PREFIXES: Mapping[str, tuple[str | tuple[str, ...], ...]] = {  # first match counts
    "unet": ("model.diffusion_model.",),
    "vae": ("first_stage_model.", VAE_ALONE),
    "text_encoder": (
        "cond_stage_model.transformer.", "conditioner.embedders.0.transformer.", OPEN_CLIP[0],
    ),
    "text_encoder_2": (OPEN_CLIP[1],),
}  # fmt: skip
# SDXL's embedding of the pooled text and the sizes; diffusers' function fails if one is missing.
ADDED = {"label_emb.0.0.": "add_embedding.linear_1.", "label_emb.0.2.": "add_embedding.linear_2."}
EDM = ("edm_mean", "edm_std", "edm_vpred.")  # Playground 2.5, CosXL
OLD_ATTENTION = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}
# Tensors of some text encoders that the hidden states do not depend on.
UNUSED = ("embeddings.position_ids", "text_projection.weight")
AGAIN = "download or copy it again"
LIKE = "name a model that it was made from: --like DIR or OWNER/NAME@COMMIT"
VAE_FOLDER = "give --vae a folder in diffusers' format, which has a configuration"
NAME_VAE = "say where one is: --vae FILE, DIR or OWNER/NAME@COMMIT"


def part_of(path: Path, name: str, build: Callable[[], nn.Module]) -> ModelPart:
    """A network of the file.

    name: key in `PREFIXES`.
    build: makes the network from its configuration, without weights.
    """

    def read() -> nn.Module:
        with init_empty_weights(include_buffers=False):
            module = build().requires_grad_(False)
        module.load_state_dict(_translated(name, _tensors(path, name), module), assign=True)
        return module.eval()

    return ModelPart(name, build, read)


def check(path: Path, part: ModelPart, like: Path, kind: str = "base model") -> None:
    """Checks that the file has all tensors of a network, in the shapes of the configuration in `like`.

    kind: of the file, for errors: "base model" or "VAE".

    Raises:
        BadInput: it has no tensor of this network.
        IntegrityError: it is damaged, or not complete.
        ExportError: it has another architecture.
    """
    tensors = _tensors(path, part.name, hollow=True)
    if not tensors:
        prefixes = [prefix for prefix in PREFIXES[part.name] if isinstance(prefix, str)]
        why = f"no tensor's name begins with {' or '.join(prefixes)}"
        do = "give a whole model under Stable Diffusion's original names, or a folder in diffusers' format"
        raise BadInput(f"{path} has no {part.name}", why, NAME_VAE if part.name == "vae" else do)
    what = f"the {kind} {path} is not complete"
    try:
        translated = _translated(part.name, tensors, part.skeleton)
    except (KeyError, IndexError, TypeError, RuntimeError) as error:
        raise IntegrityError(what, f"{part.name}: {error} is missing", AGAIN) from error
    forms = {key: _form(tensor) for key, tensor in translated.items()}
    expected = {key: _form(tensor) for key, tensor in part.skeleton.state_dict(keep_vars=True).items()}
    if others := sorted(key for key in forms if forms[key] != expected.get(key)):
        key = others[0]
        why = f"{part.name}, {key}: {forms[key]} in the file, {expected.get(key, 'absent')} in {like}"
        other, do = ("--like", LIKE) if kind == "base model" else (f"the VAE of {like}", VAE_FOLDER)
        raise ExportError(f"{path} is of another architecture than {other}", why, do)
    if missing := sorted(expected.keys() - forms.keys()):
        why = (
            f"{len(missing)} of the {len(expected)} tensors of {part.name} are missing, such as {missing[0]}"
        )
        raise IntegrityError(what, why, AGAIN)


def check_schedule(path: Path, config: Mapping[str, Any]) -> None:
    """Checks that tensors of the file do not contradict the configuration of the noise schedule.

    For programs that read no configuration, a model with v-prediction has an empty tensor `v_pred`, one with
    zero terminal SNR has `ztsnr`, and one that was trained as EDM has other tensors.

    Raises:
        ExportError: they do.
    """
    with _opened(path) as file:
        names = set(file.keys())
    if edm := sorted(name for name in names if name.startswith(EDM)):
        why = f"{edm[0]} in the file means that it was trained as EDM; betas do not describe that noise"
        raise ExportError(f"the base model {path} has an unknown noise schedule", why, "use another model")
    meanings = {"v_pred": ("prediction_type", "v_prediction"), "ztsnr": ("rescale_betas_zero_snr", True)}
    for name, (key, value) in meanings.items():
        if name in names and config.get(key) != value:
            why = f"{name} in the file means that {key} is {value!r}; in --like it is {config.get(key)!r}"
            raise ExportError(f"{path} was trained with another noise schedule than --like", why, LIKE)


def _translated(name: str, tensors: Tensors, module: nn.Module) -> dict[str, Tensor]:
    """A network's tensors under the names that `module` gives them."""
    config: Any = module.config
    if name == "unet":
        translated = convert_ldm_unet_checkpoint(dict(tensors), {**config, "addition_embed_type": None})
        translated |= _added(tensors)
    elif name == "vae":
        if any(".mid_block." in key for key in tensors):
            translated = {_new_name(key): tensor for key, tensor in tensors.items()}
        else:
            translated = convert_ldm_vae_checkpoint(dict(tensors), config)
    else:
        translated = _text(tensors, module)
    return {key: tensor for key, tensor in translated.items() if tensor is not None}


def _new_name(key: str) -> str:
    """The name of a VAE's tensor since diffusers 0.16, which renamed the projections of attentions."""
    for old, new in OLD_ATTENTION.items():
        key = key.replace(old, new)
    return key


def _added(tensors: Tensors) -> dict[str, Tensor]:
    translated = {}
    for key, tensor in tensors.items():
        for old, new in ADDED.items():
            start = PREFIXES["unet"][0] + old
            if key.startswith(start):
                translated[new + key.removeprefix(start)] = tensor
    return translated


def _text(tensors: Tensors, module: nn.Module) -> dict[str, Tensor]:
    prefix = next((prefix for prefix in OPEN_CLIP if next(iter(tensors)).startswith(prefix)), None)
    if prefix is None:
        translated = convert_ldm_clip_checkpoint(tensors)
    else:
        translated = convert_open_clip_checkpoint(module, tensors, prefix)
    expected = module.state_dict(keep_vars=True).keys()
    if not any(key.startswith("text_model.") for key in expected):  # since transformers 5.6
        translated = {key.removeprefix("text_model."): tensor for key, tensor in translated.items()}
    return {key: tensor for key, tensor in translated.items() if key in expected or not key.endswith(UNUSED)}


def _tensors(path: Path, name: str, hollow: bool = False) -> dict[str, Tensor]:
    """The file's tensors of a network; `hollow`: on the meta device, without data."""
    with _opened(path) as file:
        for prefix in PREFIXES[name]:
            if keys := [key for key in file.keys() if key.startswith(prefix)]:  # noqa: SIM118
                return {key: _hollow(file.get_slice(key)) if hollow else file.get_tensor(key) for key in keys}
    return {}


def _hollow(header: Any) -> Tensor:
    dtype = torch.float32 if header.get_dtype().startswith(("F", "BF")) else torch.int64
    return torch.empty(header.get_shape(), dtype=dtype, device="meta")


def _form(tensor: Tensor) -> str:
    return f"{list(tensor.shape)}{'' if tensor.is_floating_point() else ' of whole numbers'}"


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, "pt")
    except (SafetensorError, OSError) as error:
        raise IntegrityError(f"the base model {path} is damaged", first_line(error), AGAIN) from error
