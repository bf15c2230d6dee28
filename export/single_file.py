"""Single files: Stable Diffusion's weights, or a VAE's, under the names that they were first published with.

Such a file has the networks side by side, each below a prefix, and no configuration: that is in the folder of
a model of the same architecture. diffusers' own functions translate the names. They say nothing of what they
miss or do not know, so names and shapes are compared with the configuration here, before anything is read.

The file is mapped into memory: a network takes it as it is stored, and what is stored in fp16 is not copied.
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
# A VAE alone has no prefix, and is often under diffusers' names.
VAE_ALONE = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
PREFIXES: Mapping[str, tuple[str | tuple[str, ...], ...]] = {  # of each network; the first that the file has
    "unet": ("model.diffusion_model.",),
    "vae": ("first_stage_model.", VAE_ALONE),
    "text_encoder": (
        "cond_stage_model.transformer.", "conditioner.embedders.0.transformer.", OPEN_CLIP[0],
    ),
    "text_encoder_2": (OPEN_CLIP[1],),
}  # fmt: skip
# SDXL's embedding of the pooled text and the sizes; diffusers' function fails where one of them is missing.
ADDED = {"label_emb.0.0.": "add_embedding.linear_1.", "label_emb.0.2.": "add_embedding.linear_2."}
EDM = ("edm_mean", "edm_std", "edm_vpred.")  # Playground 2.5, CosXL
OLD_ATTENTION = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}
# Text encoders may have them; hidden states do not depend on them.
UNUSED = ("embeddings.position_ids", "text_projection.weight")
AGAIN = "download or copy it again"
LIKE = "name a model that it was made from: --like DIR or OWNER/NAME@COMMIT"
VAE_FOLDER = "give --vae a folder in diffusers' format, which has a configuration of its own"
NAME_VAE = "say where one is: --vae FILE, DIR or OWNER/NAME@COMMIT"


def part_of(path: Path, name: str, build: Callable[[], nn.Module]) -> ModelPart:
    """A network of the file, a key of `PREFIXES`; `build` makes it as its configuration says."""

    def read() -> nn.Module:
        with init_empty_weights(include_buffers=False):
            module = build().requires_grad_(False)
        module.load_state_dict(_translated(name, _tensors(path, name), module), assign=True)
        return module.eval()

    return ModelPart(name, build, read)


def check(path: Path, part: ModelPart, like: Path, kind: str = "base model") -> None:
    """Whether the file has all of a network, and of the shapes that the configuration in `like` asks for.

    kind: what the file is, for errors: "base model" or "VAE".

    Raises:
        BadInput: it has nothing of this network.
        IntegrityError: it is damaged, or not complete.
        ExportError: it is of another architecture.
    """
    tensors = _tensors(path, part.name, hollow=True)
    if not tensors:
        prefixes = [one for one in PREFIXES[part.name] if isinstance(one, str)]
        why = f"no tensor's name begins with {' or '.join(prefixes)}"
        do = "give a whole model under Stable Diffusion's original names, or a folder in diffusers' format"
        raise BadInput(f"{path} has no {part.name}", why, NAME_VAE if part.name == "vae" else do)
    what = f"the {kind} {path} is not complete"
    try:
        translated = _translated(part.name, tensors, part.skeleton)
    except (KeyError, IndexError, TypeError, RuntimeError) as error:
        raise IntegrityError(what, f"{part.name}: {error} is missing", AGAIN) from error
    found = {key: _form(tensor) for key, tensor in translated.items()}
    wanted = {key: _form(tensor) for key, tensor in part.skeleton.state_dict(keep_vars=True).items()}
    if others := sorted(key for key in found if found[key] != wanted.get(key)):
        key = others[0]
        why = f"{part.name}, {key}: {found[key]} in the file, {wanted.get(key, 'absent')} in {like}"
        other, do = ("--like", LIKE) if kind == "base model" else (f"the VAE of {like}", VAE_FOLDER)
        raise ExportError(f"{path} is of another architecture than {other}", why, do)
    if missing := sorted(wanted.keys() - found.keys()):
        why = f"{len(missing)} of the {len(wanted)} tensors of {part.name} are missing, such as {missing[0]}"
        raise IntegrityError(what, why, AGAIN)


def check_schedule(path: Path, config: Mapping[str, Any]) -> None:
    """Whether the file says of itself what the configuration of the noise schedule does not.

    Models that were trained so have an empty tensor `v_pred`, and `ztsnr` where the last timestep has no
    signal, for programs that read no configuration; those of EDM have their own.

    Raises:
        ExportError: it does.
    """
    with _opened(path) as file:
        names = set(file.keys())
    if edm := sorted(name for name in names if name.startswith(EDM)):
        why = f"{edm[0]} in the file means that it was trained as EDM, whose noise betas do not describe"
        raise ExportError(f"the base model {path} has an unknown noise schedule", why, "use another model")
    told = {"v_pred": ("prediction_type", "v_prediction"), "ztsnr": ("rescale_betas_zero_snr", True)}
    for name, (key, value) in told.items():
        if name in names and config.get(key) != value:
            why = f"{name} in the file means that {key} is {value!r}; in --like it is {config.get(key)!r}"
            raise ExportError(f"{path} was trained with another noise schedule than --like", why, LIKE)


def _translated(name: str, tensors: Tensors, module: nn.Module) -> dict[str, Tensor]:
    """A network's tensors under the names that `module` gives them."""
    config: Any = module.config
    if name == "unet":
        found = convert_ldm_unet_checkpoint(dict(tensors), {**config, "addition_embed_type": None})
        found |= _added(tensors)
    elif name == "vae":
        if any(".mid_block." in key for key in tensors):
            found = {_attention_of_today(key): tensor for key, tensor in tensors.items()}
        else:
            found = convert_ldm_vae_checkpoint(dict(tensors), config)
    else:
        found = _text(tensors, module)
    return {key: tensor for key, tensor in found.items() if tensor is not None}


def _attention_of_today(key: str) -> str:
    """A name of diffusers' VAE; before 0.16 it had others for the attention's projections."""
    for old, new in OLD_ATTENTION.items():
        key = key.replace(old, new)
    return key


def _added(tensors: Tensors) -> dict[str, Tensor]:
    found = {}
    for key, tensor in tensors.items():
        for old, new in ADDED.items():
            start = PREFIXES["unet"][0] + old
            if key.startswith(start):
                found[new + key.removeprefix(start)] = tensor
    return found


def _text(tensors: Tensors, module: nn.Module) -> dict[str, Tensor]:
    prefix = next((prefix for prefix in OPEN_CLIP if next(iter(tensors)).startswith(prefix)), None)
    if prefix is None:
        found = convert_ldm_clip_checkpoint(tensors)
    else:
        found = convert_open_clip_checkpoint(module, tensors, prefix)
    wanted = module.state_dict(keep_vars=True).keys()
    if not any(key.startswith("text_model.") for key in wanted):  # so in transformers 5.6 and later
        found = {key.removeprefix("text_model."): tensor for key, tensor in found.items()}
    return {key: tensor for key, tensor in found.items() if key in wanted or not key.endswith(UNUSED)}


def _tensors(path: Path, name: str, hollow: bool = False) -> dict[str, Tensor]:
    """What the file has of a network; `hollow`: shapes without data."""
    with _opened(path) as file:
        for prefix in PREFIXES[name]:
            if keys := [key for key in file.keys() if key.startswith(prefix)]:  # noqa: SIM118
                return {key: _hollow(file.get_slice(key)) if hollow else file.get_tensor(key) for key in keys}
    return {}


def _hollow(about: Any) -> Tensor:
    dtype = torch.float32 if about.get_dtype().startswith(("F", "BF")) else torch.int64
    return torch.empty(about.get_shape(), dtype=dtype, device="meta")


def _form(tensor: Tensor) -> str:
    return f"{list(tensor.shape)}{'' if tensor.is_floating_point() else ' of whole numbers'}"


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, "pt")
    except (SafetensorError, OSError) as error:
        raise IntegrityError(f"the base model {path} is damaged", first_line(error), AGAIN) from error
