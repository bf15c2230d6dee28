"""What the graphs are compared with: diffusers' pipeline of the same networks, end to end.

Prompts, time ids, image prompt, timesteps, solver steps and pictures are diffusers' own, the LoRA is loaded
by diffusers into PEFT, and every row is a call of its own. So what HyperRT leaves out is not left out here,
too. diffusers has no HM-CFG: its sum alone is written out (`Guided`). Nor has it a hypernetwork.

The networks must be as they were read: `GraphSpec.hold` changes nothing, and what is added is removed again.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.models.attention_processor import AttnProcessor2_0, IPAdapterAttnProcessor2_0
from torch import Tensor, nn
from transformers import CLIPVisionModelWithProjection

from hyperrt.export.source import Source, timestep_spacing
from hyperrt.lora.layout import LoraLayout

Switch = Callable[[int, float], None]  # which subject's LoRA the UNet has, and at what strength

# HyperRT's solvers as diffusers' schedulers (hyperrt/sampling/solvers.py). All else is the model's
# configuration.
SCHEDULERS: Mapping[str, tuple[Any, Mapping[str, Any]]] = {
    "ddim": (diffusers.DDIMScheduler, {"set_alpha_to_one": False}),
    "euler": (diffusers.EulerDiscreteScheduler, {"interpolation_type": "linear"}),
    "euler_ancestral": (diffusers.EulerAncestralDiscreteScheduler, {}),
    "dpmpp_2m": (
        diffusers.DPMSolverMultistepScheduler,
        {
            "algorithm_type": "dpmsolver++", "solver_order": 2, "solver_type": "midpoint",
            "lower_order_final": True, "euler_at_final": False, "variance_type": None,
            "use_lu_lambdas": False, "lambda_min_clipped": -math.inf,
        },
    ),
}  # fmt: skip
IP_LAYERS = 4
STEPS_AS_OURS = {
    "steps_offset": 1, "final_sigmas_type": "zero", "clip_sample": False,
    "use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False,
}  # fmt: skip


def scheduler(source: Source, solver: str) -> Any:
    """diffusers' scheduler that is one of HyperRT's solvers, for the model's noise schedule."""
    kind, more = SCHEDULERS[solver]
    config = {**source.scheduler, **STEPS_AS_OURS, **more, "timestep_spacing": timestep_spacing(source)}
    config.pop("_use_default_values", None)  # for which another class would take its own defaults
    return kind.from_config(config)


def pipeline(source: Source, modules: Mapping[str, Any], solver: str = "ddim", unet: Any = None) -> Any:
    """diffusers' pipeline; a network that is not in `modules` is there without weights.

    unet: stands in for the UNet.
    """
    found = {name: modules.get(name, part.skeleton) for name, part in source.parts.items()}
    encoder = found["image_encoder"]
    parts = {name: found[name] for name in ("vae", "text_encoder")} | {
        "unet": found["unet"] if unet is None else unet,
        "tokenizer": source.tokenizer,
        "scheduler": scheduler(source, solver),
        "image_encoder": encoder if isinstance(encoder, CLIPVisionModelWithProjection) else None,
        "feature_extractor": None,
    }
    if source.is_sdxl:
        made = StableDiffusionXLPipeline(
            **parts, text_encoder_2=found["text_encoder_2"], tokenizer_2=source.tokenizer_2,
            force_zeros_for_empty_prompt=source.zero_empty, add_watermarker=False,
        )  # fmt: skip
    else:
        made = StableDiffusionPipeline(**parts, safety_checker=None, requires_safety_checker=False)
    made.set_progress_bar_config(disable=True)
    return made


@dataclass(frozen=True)
class Text:
    """What a UNet reads of prompts: hidden states [n, L, D], and an SDXL's pooled text [n, P]."""

    hidden: Tensor
    pooled: Tensor | None = None

    def of(self, row: int) -> Text:
        """The same of one prompt."""
        return Text(self.hidden[row : row + 1], None if self.pooled is None else self.pooled[row : row + 1])


@torch.no_grad()
def encoded(pipe: Any, prompts: Sequence[str]) -> Text:
    """Prompts as the pipeline encodes them."""
    options = {"device": torch.device("cpu"), "num_images_per_prompt": 1}
    with _quietly():
        found = pipe.encode_prompt(list(prompts), do_classifier_free_guidance=False, **options)
    return Text(found[0], found[2] if len(found) == 4 else None)


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """The pipeline and its tokenizer say that a prompt is cut; here it is meant to be."""
    libraries = (diffusers.utils.logging, transformers.utils.logging)
    levels = [library.get_verbosity() for library in libraries]
    try:
        for library in libraries:
            library.set_verbosity(library.CRITICAL)
        yield
    finally:
        for library, level in zip(libraries, levels, strict=True):
            library.set_verbosity(level)


@torch.no_grad()
def encoded_empty(pipe: Any) -> Text:
    """What stands beside a prompt where there is no negative one."""
    options = {"device": torch.device("cpu"), "num_images_per_prompt": 1}
    found = pipe.encode_prompt(["a"], do_classifier_free_guidance=True, **options)
    return Text(found[1], found[3] if len(found) == 4 else None)


class _InPlaceOfUnet(nn.Module):
    """What a pipeline asks its UNet, answered as `unet` would."""

    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.config, self.dtype, self.device = unet.config, torch.float32, torch.device("cpu")
        if unet.config.addition_embed_type is not None:
            self.add_embedding = unet.add_embedding


Branch = tuple[float, float, Text]  # weight in the guided sum, strength of the LoRA, prompt


def hybrid(s: float, kappa: float, uncond: Text, subject: Text, generic: Text) -> list[Branch]:
    """The branches of HM-CFG, arXiv 2511.03156 eq. 20; those of weight zero are left out."""
    branches = [(1 - 2 * s, 0.0, uncond), (kappa * s, 1.0, subject), ((2 - kappa) * s, 0.0, generic)]
    return [branch for branch in branches if branch[0]]


class Guided(_InPlaceOfUnet):
    """A pipeline's UNet whose output is the guided sum, by a call for each branch.

    Args:
        unet: diffusers'.
        branches: as `hybrid` makes them.
        use: switches the LoRA.
    """

    def __init__(self, unet: Any, branches: Sequence[Branch], use: Switch) -> None:
        super().__init__(unet)
        self.unet, self.branches, self.use = unet, branches, use

    def forward(
        self, sample: Tensor, timestep: Any, *_: Any, added_cond_kwargs: Any = None, **__: Any
    ) -> tuple[Tensor]:
        guided = torch.zeros_like(sample)
        ids = added_cond_kwargs["time_ids"] if added_cond_kwargs else None
        for weight, strength, text in self.branches:
            self.use(0, strength)
            guided = guided + weight * predicted(self.unet, sample, timestep, text, ids)
        return (guided,)


def predicted(
    unet: Any,
    x: Tensor,
    timestep: Any,
    text: Text,
    time_ids: Tensor | None = None,
    image: list[Tensor] | None = None,
) -> Tensor:
    """diffusers' UNet on x [n, C, h, w]; time_ids: an SDXL's [n, 6]; image: what `image_given` gives."""
    added = None if time_ids is None else {"time_ids": time_ids, "text_embeds": text.pooled}
    hidden = text.hidden if image is None else (text.hidden, image)
    return unet(x, timestep, hidden, added_cond_kwargs=added, return_dict=False)[0]


class Given(_InPlaceOfUnet):
    """A pipeline's UNet that computes nothing with weights: `output` of (sample, timestep)."""

    def __init__(self, unet: Any, output: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__(unet)
        self.output = output

    def forward(self, sample: Tensor, timestep: Tensor, *_: Any, **__: Any) -> tuple[Tensor]:
        return (self.output(sample, timestep),)


@torch.no_grad()
def drawn(
    pipe: Any, text: Text, noise: Tensor, steps: int, output: str = "latent", **more: Any
) -> np.ndarray:
    """The pipeline's own loop from unit noise [n, C, h, w]: latents, or ("pt") pictures in [0, 1].

    The guided sum is that of its UNet (`Guided`): the pipeline is text to guide nothing.
    """
    given = {"prompt_embeds": text.hidden.expand(len(noise), -1, -1)}
    if text.pooled is not None:
        given["pooled_prompt_embeds"] = text.pooled.expand(len(noise), -1)
    factor = pipe.vae_scale_factor
    height, width = (factor * side for side in noise.shape[2:])
    found = pipe(
        **given, latents=noise, height=height, width=width, num_inference_steps=steps, guidance_scale=1.0,
        output_type=output, **more,
    )  # fmt: skip
    return found.images.numpy()


@torch.no_grad()
def decoded(source: Source, vae: Any, latents: Tensor) -> np.ndarray:
    """Latents as the UNet takes them [n, C, h, w] => pixels [n, 3, H, W], not yet cut to [-1, 1]."""
    unet: Any = source.parts["unet"].skeleton
    pipe = pipeline(source, {"vae": vae}, unet=Given(unet, lambda x, _: torch.zeros_like(x)))
    pipe.image_processor = SimpleNamespace(postprocess=lambda image, **_: image)
    pipe.check_inputs = lambda *_: None  # of multiples of 8 pixels, which small models are not
    return drawn(
        pipe, no_text(source), latents, 1, "pt", callback_on_step_end=lambda *_: {"latents": latents}
    )


def no_text(source: Source) -> Text:
    """A prompt for a UNet that reads none."""
    pooled = torch.zeros(1, source.config("text_encoder_2").projection_dim) if source.is_sdxl else None
    return Text(torch.zeros(1, 1, source.text_width), pooled)


@contextlib.contextmanager
def adapted(unet: Any, layout: LoraLayout, subjects: Mapping[str, np.ndarray]) -> Iterator[Switch]:
    """A UNet with PEFT's LoRA of one subject at a time; gives what switches them.

    subjects: packed vectors by name, [subjects, N].
    """
    loaded: list[int] = []

    def use(subject: int, strength: float) -> None:
        if subject not in loaded:
            unet.unload_lora()
            unet.load_lora_adapter(
                _peft_state(layout, subjects, subject), prefix=None, adapter_name="subject"
            )
            loaded[:] = [subject]
        if strength:
            unet.enable_lora()
            unet.set_adapters(["subject"], [strength])
        else:
            unet.disable_lora()

    try:
        yield use
    finally:
        unet.unload_lora()


def _peft_state(layout: LoraLayout, subjects: Mapping[str, np.ndarray], subject: int) -> dict[str, Tensor]:
    """PEFT's tensors of one subject: A [r, d_in] and B [d_out, r]; alpha is the rank where none is said."""
    state = {}
    for path, factors in layout.unpack({name: rows[subject] for name, rows in subjects.items()}).items():
        for role, matrix in zip("AB", factors, strict=True):
            state[f"{path}.lora_{role}.weight"] = torch.from_numpy(np.ascontiguousarray(matrix.T))
    return state


@contextlib.contextmanager
def image_prompted(unet: Any, prompt: nn.Module) -> Iterator[None]:
    """A UNet with IP-Adapter's processors, which diffusers makes of the tensors of `prompt`."""
    processors = unet._convert_ip_adapter_attn_to_diffusers([published(prompt)])
    unet.set_attn_processor(processors)
    try:
        yield
    finally:
        unet.set_attn_processor(AttnProcessor2_0())


def image_projection(unet: Any, prompt: nn.Module) -> Any:
    """diffusers' resampler with the tensors of `prompt`; it knows four layers, others compute with ours."""
    tensors = published(prompt)["image_proj"]
    if len({name.split(".")[1] for name in tensors if name.startswith("layers.")}) != IP_LAYERS:
        return prompt.image_proj
    return unet._convert_ip_adapter_image_proj_to_diffusers(tensors, low_cpu_mem_usage=False)


def published(prompt: nn.Module) -> dict[str, dict[str, Tensor]]:
    """The tensors of an image prompt as its published file has them, by part."""
    state: dict[str, dict[str, Tensor]] = {"image_proj": {}, "ip_adapter": {}}
    for name, tensor in prompt.state_dict().items():
        part, _, key = name.partition(".")
        state[part][key] = tensor
    return state


@contextlib.contextmanager
def image_given(unet: Any, keys_values: Mapping[str, tuple[Tensor, Tensor]]) -> Iterator[list[Tensor]]:
    """A UNet with IP-Adapter's processors whose keys and values are given, by path of the attention.

    Gives what stands for the image tokens.
    """

    def processor(path: str) -> Any:
        if path not in keys_values:
            return AttnProcessor2_0()
        made = IPAdapterAttnProcessor2_0(1, 1)
        key, value = keys_values[path]
        made.to_k_ip, made.to_v_ip = nn.ModuleList([_Known(key)]), nn.ModuleList([_Known(value)])
        return made

    unet.set_attn_processor(
        {name: processor(name.removesuffix(".processor")) for name in unet.attn_processors}
    )
    try:
        yield [torch.zeros(1)]
    finally:
        unet.set_attn_processor(AttnProcessor2_0())


class _Known(nn.Module):
    """A projection whose result is known."""

    def __init__(self, result: Tensor) -> None:
        super().__init__()
        self.result = result

    def forward(self, _: Tensor) -> Tensor:
        return self.result
