"""Times diffusers with PEFT: a step of HM-CFG, and a change of subject.

    python peer_diffusers.py step   FOLDER --way toggle|two_unets --precision fp32|bf16
    python peer_diffusers.py switch FOLDER

`toggle`: one UNet with the LoRA as a PEFT adapter, three calls of one row, the adapter on for one of them.
`two_unets`: two UNets, one with the LoRA fused; the base model computes its two rows in one call.
`switch`: ms from LoRA tensors in memory to a UNet that computes with this LoRA alone:
    diffusers_fuse_ms     unfuse, delete the old adapter, load the new one, fuse
    diffusers_hotswap_ms  load_lora_adapter(hotswap=True); the adapter stays unfused
Runs in the environment `diffusers`; the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import peer_timing
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from safetensors.torch import load_file

PROJECTIONS = ("attn2.to_q", "attn2.to_k", "attn2.to_v")
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
WEIGHTS = (-6.5, 7.5)  # of generic and subject in the guidance sum; the values do not matter
Step = Callable[[], object]


def main() -> None:
    parser = peer_timing.options(__doc__)
    parser.add_argument("--way", choices=("toggle", "two_unets"), default="toggle")
    parser.add_argument("--precision", choices=sorted(TYPES), default="fp32")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with torch.inference_mode():
        if args.what == "step":
            make = toggle if args.way == "toggle" else two_unets
            results = peer_timing.repeat(make(args.folder, TYPES[args.precision]), args)
        else:
            results = switches(args.folder, args)
    print(json.dumps(results | {"versions": peer_timing.versions("torch", "diffusers", "peft")}))


def unet(folder: Path, dtype: torch.dtype) -> UNet2DConditionModel:
    """The UNet in NHWC memory, which is faster on a CPU."""
    model = UNet2DConditionModel.from_pretrained(folder / "diffusers" / "unet", torch_dtype=dtype)
    return model.eval().to(memory_format=torch.channels_last)


def adapter(folder: Path, name: str) -> dict[str, torch.Tensor]:
    """A subject's LoRA in memory, under PEFT's names."""
    tensors = load_file(folder / "lora" / f"{name}.safetensors")
    paths = {"lora_unet_" + path.replace(".", "_"): path for path in paths_of(folder)}
    kinds = {"lora_down": "lora_A", "lora_up": "lora_B"}
    factors = {}
    for key, tensor in tensors.items():
        stem, kind, *_ = key.split(".")
        if kind in kinds:  # alpha is the rank: a factor of 1
            factors[f"{paths[stem]}.{kinds[kind]}.weight"] = tensor
    return factors


def paths_of(folder: Path) -> list[str]:
    """Paths of the adapted projections."""
    with torch.device("meta"):
        config = UNet2DConditionModel.load_config(folder / "diffusers" / "unet")
        model = UNet2DConditionModel.from_config(config)
    return [name for name, _ in model.named_modules() if name.endswith(PROJECTIONS)]


def load(model: UNet2DConditionModel, tensors: dict[str, torch.Tensor], name: str, **options: object) -> None:
    """Loads a LoRA into a UNet, from memory."""
    model.load_lora_adapter(dict(tensors), prefix=None, adapter_name=name, **options)


def inputs(model: UNet2DConditionModel) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents [1, 4, h, w] and the three prompts' hidden states [3, 77, D]."""
    torch.manual_seed(0)
    size = model.config.sample_size
    latents = torch.randn(1, 4, size, size, dtype=model.dtype).to(memory_format=torch.channels_last)
    return latents, torch.randn(3, 77, model.config.cross_attention_dim, dtype=model.dtype)


def guided(scheduler: DDIMScheduler, latents: torch.Tensor, empty, subject, generic) -> torch.Tensor:
    """The guidance sum, and the solver's update of the latents."""
    noise = empty + WEIGHTS[0] * (generic - empty) + WEIGHTS[1] * (subject - empty)
    return scheduler.step(noise, scheduler.timesteps[10], latents).prev_sample


def solver() -> DDIMScheduler:
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(30)
    return scheduler


def toggle(folder: Path, dtype: torch.dtype) -> Step:
    """A step with one UNet whose adapter is switched on and off."""
    model, scheduler = unet(folder, dtype), solver()
    load(model, adapter(folder, "a"), "a")
    model.to(dtype)
    latents, prompts = inputs(model)
    time = scheduler.timesteps[10]

    def step() -> torch.Tensor:
        model.disable_lora()
        empty = model(latents, time, prompts[:1]).sample
        model.enable_lora()
        subject = model(latents, time, prompts[1:2]).sample
        model.disable_lora()
        generic = model(latents, time, prompts[2:]).sample
        return guided(scheduler, latents, empty, subject, generic)

    return step


def two_unets(folder: Path, dtype: torch.dtype) -> Step:
    """A step with two UNets, that of the base model on two rows."""
    base, personal, scheduler = unet(folder, dtype), unet(folder, dtype), solver()
    load(personal, adapter(folder, "a"), "a")
    personal.fuse_lora()
    personal.unload_lora()
    personal.to(dtype)
    latents, prompts = inputs(base)
    time = scheduler.timesteps[10]

    def step() -> torch.Tensor:
        empty, generic = base(latents.repeat(2, 1, 1, 1), time, prompts[::2]).sample.chunk(2)
        subject = personal(latents, time, prompts[1:2]).sample
        return guided(scheduler, latents, empty, subject, generic)

    return step


def switches(folder: Path, args: argparse.Namespace) -> dict[str, object]:
    """Times of a change of subject in both ways."""
    subjects = [adapter(folder, name) for name in "ab"]
    model = unet(folder, torch.float32)
    load(model, subjects[0], "old")
    model.fuse_lora()
    turn = 0

    def fuse() -> None:
        nonlocal turn
        turn += 1
        old, new = ("old", "new") if turn % 2 else ("new", "old")
        model.unfuse_lora()
        model.delete_adapters(old)
        load(model, subjects[turn % 2], new)
        model.fuse_lora()

    times = {"diffusers_fuse_ms": peer_timing.repeat(fuse, args)}
    model.unfuse_lora()
    model.unload_lora()
    load(model, subjects[0], "only")

    def hotswap() -> None:
        nonlocal turn
        turn += 1
        load(model, subjects[turn % 2], "only", hotswap=True)

    return times | {"diffusers_hotswap_ms": peer_timing.repeat(hotswap, args)}


if __name__ == "__main__":
    main()
