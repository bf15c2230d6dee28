"""Runs diffusers' pipeline on the networks of an export, to compare the graphs with it.

diffusers encodes the prompts, decodes the pictures, makes time ids and timesteps, does the solver's steps
and loads the LoRA into PEFT. Every row is a separate call. So an omission of HyperRT is not repeated here.
Only the guided sum of HM-CFG is written here (`Guided`), because diffusers does not have it.

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

Switch = Callable[[int, float], None]  # (subject, strength): gives the UNet that subject's LoRA

# diffusers' scheduler for each solver (hyperrt/sampling/solvers.py), and options that override the model's
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
STEP_OPTIONS = {
    "steps_offset": 1, "final_sigmas_type": "zero", "clip_sample": False,
    "use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False,
}  # fmt: skip


def scheduler(source: Source, solver: str) -> Any:
    """diffusers' scheduler for a solver, with the model's noise schedule."""
    kind, more = SCHEDULERS[solver]
    config = {**source.scheduler, **STEP_OPTIONS, **more, "timestep_spacing": timestep_spacing(source)}
    config.pop("_use_default_values", None)  # another class would take its defaults for these
    return kind.from_config(config)


def pipeline(
    source: Source, modules: Mapping[str, Any], solver: str = "ddim", unet: nn.Module | None = None
) -> Any:
    """diffusers' pipeline; networks that are not in `modules` have no weights.

    unet: replaces the UNet.
    """
    networks = {name: modules.get(name, part.skeleton) for name, part in source.parts.items()}
    encoder = networks["image_encoder"]
    parts = {name: networks[name] for name in ("vae", "text_encoder")} | {
        "unet": networks["unet"] if unet is None else unet,
        "tokenizer": source.tokenizer,
        "scheduler": scheduler(source, solver),
        "image_encoder": encoder if isinstance(encoder, CLIPVisionModelWithProjection) else None,
        "feature_extractor": None,
    }
    if source.is_sdxl:
        pipe = StableDiffusionXLPipeline(
            **parts, text_encoder_2=networks["text_encoder_2"], tokenizer_2=source.tokenizer_2,
            force_zeros_for_empty_prompt=source.zero_empty, add_watermarker=False,
        )  # fmt: skip
    else:
        pipe = StableDiffusionPipeline(**parts, safety_checker=None, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@dataclass(frozen=True)
class Text:
    """Encoded prompts: hidden states [n, L, D], and for SDXL the pooled text [n, P]."""

    hidden: Tensor
    pooled: Tensor | None = None

    def of(self, row: int) -> Text:
        """The text of one row."""
        return Text(self.hidden[row : row + 1], None if self.pooled is None else self.pooled[row : row + 1])


@torch.no_grad()
def encoded(pipe: Any, prompts: Sequence[str]) -> Text:
    """Encodes prompts with the pipeline."""
    options = {"device": torch.device("cpu"), "num_images_per_prompt": 1}
    with _quietly():
        embeddings = pipe.encode_prompt(list(prompts), do_classifier_free_guidance=False, **options)
    return Text(embeddings[0], embeddings[2] if len(embeddings) == 4 else None)


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Silences the warnings of the pipeline and its tokenizer about prompts that are too long."""
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
    """The negative prompt embeddings of the pipeline if no negative prompt is given."""
    options = {"device": torch.device("cpu"), "num_images_per_prompt": 1}
    embeddings = pipe.encode_prompt(["a"], do_classifier_free_guidance=True, **options)
    return Text(embeddings[1], embeddings[3] if len(embeddings) == 4 else None)


class _UNetStandIn(nn.Module):
    """Base of modules that replace a pipeline's UNet: has the attributes that the pipeline reads."""

    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.config, self.dtype, self.device = unet.config, torch.float32, torch.device("cpu")
        if unet.config.addition_embed_type is not None:
            self.add_embedding = unet.add_embedding


Branch = tuple[float, float, Text]  # weight in the guided sum, strength of the LoRA, prompt


def hybrid(s: float, kappa: float, uncond: Text, subject: Text, generic: Text) -> list[Branch]:
    """The branches of HM-CFG (arXiv 2511.03156 eq. 20) with a weight other than zero."""
    branches = [(1 - 2 * s, 0.0, uncond), (kappa * s, 1.0, subject), ((2 - kappa) * s, 0.0, generic)]
    return [branch for branch in branches if branch[0]]


class Guided(_UNetStandIn):
    """Replaces a pipeline's UNet; its output is the guided sum of one call of `unet` per branch.

    Args:
        unet: diffusers' UNet.
        branches: as `hybrid` returns them.
        use: switches the LoRA.
    """

    def __init__(self, unet: Any, branches: Sequence[Branch], use: Switch) -> None:
        super().__init__(unet)
        self.unet, self.branches, self.use = unet, branches, use

    def forward(
        self,
        sample: Tensor,
        timestep: Any,
        *_: Any,
        added_cond_kwargs: Mapping[str, Tensor] | None = None,
        **__: Any,
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
    """Runs diffusers' UNet on x [n, C, h, w].

    time_ids: SDXL's [n, 6].
    image: as `with_image` yields it.
    """
    added = None if time_ids is None else {"time_ids": time_ids, "text_embeds": text.pooled}
    hidden = text.hidden if image is None else (text.hidden, image)
    return unet(x, timestep, hidden, added_cond_kwargs=added, return_dict=False)[0]


class Given(_UNetStandIn):
    """Replaces a pipeline's UNet by a function: `output` of (sample, timestep)."""

    def __init__(self, unet: Any, output: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__(unet)
        self.output = output

    def forward(self, sample: Tensor, timestep: Tensor, *_: Any, **__: Any) -> tuple[Tensor]:
        return (self.output(sample, timestep),)


@torch.no_grad()
def drawn(
    pipe: Any,
    text: Text,
    noise: Tensor,
    steps: int,
    output: str = "latent",
    generator: torch.Generator | None = None,
    on_step_end: Callable[..., dict[str, Tensor]] | None = None,
) -> np.ndarray:
    """Runs the pipeline from unit noise [n, C, h, w]; returns latents, or ("pt") pictures in [0, 1].

    The pipeline's guidance is off; `Guided` as its UNet does it.
    """
    embeddings = {"prompt_embeds": text.hidden.expand(len(noise), -1, -1)}
    if text.pooled is not None:
        embeddings["pooled_prompt_embeds"] = text.pooled.expand(len(noise), -1)
    factor = pipe.vae_scale_factor
    height, width = (factor * side for side in noise.shape[2:])
    result = pipe(
        **embeddings, latents=noise, height=height, width=width, num_inference_steps=steps,
        guidance_scale=1.0, output_type=output, generator=generator, callback_on_step_end=on_step_end,
    )  # fmt: skip
    return result.images.numpy()


@torch.no_grad()
def decoded(source: Source, vae: Any, latents: Tensor) -> np.ndarray:
    """Decodes latents of the UNet [n, C, h, w]; returns pixels [n, 3, H, W], not clipped to [-1, 1]."""
    unet: Any = source.parts["unet"].skeleton
    pipe = pipeline(source, {"vae": vae}, unet=Given(unet, lambda x, _: torch.zeros_like(x)))
    pipe.image_processor = SimpleNamespace(postprocess=lambda image, **_: image)
    pipe.check_inputs = lambda *_: None  # small models have sizes that are not multiples of 8 pixels
    return drawn(
        pipe, no_text(source), latents, 1, "pt", on_step_end=lambda *_: {"latents": latents}
    )


def no_text(source: Source) -> Text:
    """A text of zeros, for a UNet that does not read it."""
    pooled = torch.zeros(1, source.config("text_encoder_2").projection_dim) if source.is_sdxl else None
    return Text(torch.zeros(1, 1, source.text_width), pooled)


@contextlib.contextmanager
def adapted(unet: Any, layout: LoraLayout, subjects: Mapping[str, np.ndarray]) -> Iterator[Switch]:
    """Adds PEFT's LoRA to a UNet, for one subject at a time; yields the function that switches it.

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
    """PEFT's tensors of one subject, A [r, d_in] and B [d_out, r]; without an alpha PEFT takes the rank."""
    state = {}
    for path, factors in layout.unpack({name: rows[subject] for name, rows in subjects.items()}).items():
        for role, matrix in zip("AB", factors, strict=True):
            state[f"{path}.lora_{role}.weight"] = torch.from_numpy(np.ascontiguousarray(matrix.T))
    return state


@contextlib.contextmanager
def image_prompted(unet: Any, prompt: nn.Module) -> Iterator[None]:
    """Adds IP-Adapter's processors to a UNet, which diffusers makes from the tensors of `prompt`."""
    processors = unet._convert_ip_adapter_attn_to_diffusers([published(prompt)])
    unet.set_attn_processor(processors)
    try:
        yield
    finally:
        unet.set_attn_processor(AttnProcessor2_0())


def image_projection(unet: Any, prompt: nn.Module) -> Any:
    """diffusers' resampler with the tensors of `prompt`, or ours if it has not four layers as diffusers'."""
    tensors = published(prompt)["image_proj"]
    if len({name.split(".")[1] for name in tensors if name.startswith("layers.")}) != IP_LAYERS:
        return prompt.image_proj
    return unet._convert_ip_adapter_image_proj_to_diffusers(tensors, low_cpu_mem_usage=False)


def published(prompt: nn.Module) -> dict[str, dict[str, Tensor]]:
    """The tensors of an image prompt under the names of its published file, by part."""
    state: dict[str, dict[str, Tensor]] = {"image_proj": {}, "ip_adapter": {}}
    for name, tensor in prompt.state_dict().items():
        part, _, key = name.partition(".")
        state[part][key] = tensor
    return state


@contextlib.contextmanager
def with_image(unet: Any, keys_values: Mapping[str, tuple[Tensor, Tensor]]) -> Iterator[list[Tensor]]:
    """Adds IP-Adapter's processors to a UNet, with known keys and values by path of the attention.

    Yields what the UNet takes as image tokens.
    """

    def processor(path: str) -> Any:
        if path not in keys_values:
            return AttnProcessor2_0()
        adapter = IPAdapterAttnProcessor2_0(1, 1)
        key, value = keys_values[path]
        adapter.to_k_ip, adapter.to_v_ip = nn.ModuleList([_Known(key)]), nn.ModuleList([_Known(value)])
        return adapter

    unet.set_attn_processor(
        {name: processor(name.removesuffix(".processor")) for name in unet.attn_processors}
    )
    try:
        yield [torch.zeros(1)]
    finally:
        unet.set_attn_processor(AttnProcessor2_0())


class _Known(nn.Module):
    """A projection that returns a known result."""

    def __init__(self, result: Tensor) -> None:
        super().__init__()
        self.result = result

    def forward(self, _: Tensor) -> Tensor:
        return self.result
