"""The parity ladder: each rung compares the graphs, as the runtime will run them, with diffusers and PEFT.

    none    nothing is compared
    graphs  each graph alone, right after it was written, so that one network is in memory at a time; solvers
    full    all rungs, at the end, with all networks in memory: for the tiny family

The figures are relative errors, max |found - expected| / max |expected|, and go into the manifest. A rung
above its tolerance ends the export.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn

from hyperrt import engines
from hyperrt.bundle.bundle import Defaults
from hyperrt.engines.backends import BACKENDS
from hyperrt.engines.base import Engine
from hyperrt.export import expected, reference, refit_form
from hyperrt.export.errors import ParityError
from hyperrt.export.expected import Expected
from hyperrt.export.graph_specs import GraphSpec
from hyperrt.export.reference import Guided, Text
from hyperrt.export.source import Source, betas, prediction_type, timestep_spacing
from hyperrt.lora.layout import LoraLayout
from hyperrt.plans.compare import relative
from hyperrt.sampling import guidance, loop, solvers
from hyperrt.sampling.solvers import SolverTable

LEVELS = ("none", "graphs", "full")
# rung -> largest relative error allowed     # measured: tiny, random weights, ONNX Runtime 1.32 on a CPU
TOLERANCE = {
    "image_encoder": 1e-4,  # 6e-7
    "weight_decoder": 1e-4,  # 1e-7
    "image_prompt": 1e-3,  # its zero tokens are kept as a weight, in fp16
    "text_encoder": 1e-4,  # 6e-7
    "context": 1e-4,  # 2e-7
    "denoiser": 1e-4,  # 5e-6; under two LoRAs, one of them per row
    "vae_decoder": 1e-4,  # 2e-6
    "solvers": 1e-4,  # no network: tables against diffusers' schedulers of the model's configuration
    "fused_step": 1e-4,  # one call against three calls of diffusers' UNet
    "lora_zero": 0.0,  # 0: a LoRA of zeros, and a gate of zeros, are the base model to the bit
    "subjects_broadcast": 1e-6,  # 0: one LoRA for all rows against the same one in every row
    "loop": 1e-3,  # photos and prompts to pictures, ten steps of HM-CFG
}
# Of a graph whose arithmetic, or whose weights, have fewer bits than those of PyTorch's.
REDUCED = {"fp32": 1e-4, "fp16": 1e-2, "bf16": 5e-2, "int8": 2e-1}
# What a graph of each precision is compared on. No CPU multiplies fp16: there its rounding of weights shows.
RUN_BY = {
    "fp32": {"backend": "onnxruntime"},
    "fp16": {"backend": "openvino", "precision": "f32"},
    "bf16": {"backend": "openvino"},
}
GRAPH_SIZES = (
    {"photos": 1, "prompts": 1, "images": 1, "branches": 3, "rows": 3, "subjects": 1, "h": 8, "w": 8},
    {"photos": 3, "prompts": 3, "images": 2, "branches": 2, "rows": 4, "subjects": 4, "h": 6, "w": 10},
)
# Of large families: enough rows that one can be mixed up with another, few enough for the memory.
LARGE_SIZES = (
    {"photos": 2, "prompts": 2, "images": 1, "branches": 2, "rows": 2, "subjects": 2, "h": 16, "w": 24},
)
LOOP_STEPS, SOLVER_STEPS = 10, 6
LOOP_SOLVER = "dpmpp_2m"

Arrays = dict[str, np.ndarray]
Modules = Mapping[str, nn.Module]
Progress = Callable[[str], None]


def ladder(
    source: Source,
    graphs: Sequence[GraphSpec],
    modules: Modules,
    folder: Path,
    defaults: Defaults,
    progress: Progress,
) -> dict[str, float]:
    """Climb every rung; returns rung -> relative error.

    Args:
        source: what the graphs were made from.
        graphs: as `graph_specs.build` made them.
        modules: its parts as they were read, fp32, weights as they are stored.
        folder: holds NAME.onnx of each.
        defaults: guidance of the loop.
        progress: told the name of each rung before it.

    Raises:
        ParityError: a rung is above its tolerance.
        engines.EngineError: ONNX Runtime is missing or cannot run a graph.
    """
    with contextlib.ExitStack() as stack:
        opened = {
            graph.name: Fed(
                stack.enter_context(engines.open(folder / f"{graph.name}.onnx", "onnxruntime")), graph.refit
            )
            for graph in graphs
        }
        rungs: dict[str, Callable[[], float]] = {
            graph.name: lambda graph=graph: max(
                relative(opened[graph.name].run(_arrays(feeds)), arrays)
                for feeds, arrays in expected.of_graph(graph, source, modules, GRAPH_SIZES)
            )
            for graph in graphs
        }
        rungs["solvers"] = lambda: solvers_error(source)
        rungs["fused_step"] = lambda: fused_step_error(source, modules, opened)
        rungs["lora_zero"] = lambda: max(
            lora_zero_error(graph, opened) for graph in graphs if _lora_of(graph)
        )
        rungs["subjects_broadcast"] = lambda: max(
            broadcast_error(graph, opened) for graph in graphs if _lora_of(graph)
        )
        rungs["loop"] = lambda: loop_error(source, modules, opened, defaults)
        figures = {}
        for name, measure in rungs.items():
            progress(name)
            figures[name] = checked(name, measure(), TOLERANCE[name])
        return figures


@dataclasses.dataclass(frozen=True)
class Fed:
    """An engine that is fed a packed LoRA by name even where its LoRA enters by a refit."""

    engine: Engine
    refit: LoraLayout | None

    def run(self, feeds: Mapping[str, np.ndarray]) -> Arrays:
        """The outputs; of a LoRA for each row, a refit takes the first row's."""
        if self.refit is None:
            return self.engine.run(feeds)
        constants, inputs = _constants(self.refit, feeds)
        self.engine.refit(constants)
        return self.engine.run(inputs)


def graph_error(
    path: Path,
    *,
    backend: str,
    expected: Sequence[Expected],
    refit: LoraLayout | None = None,
    **options: Any,
) -> float:
    """A graph's file on a backend, against what `expected.of_graph` found.

    refit: layout of the LoRA, where its factors are constants of the file.
    """
    if refit is not None and not BACKENDS[backend].refits:
        return max(_error_of_copy(path, backend, one, refit, **options) for one in expected)
    with engines.open(path, backend, **options) as engine:
        fed = Fed(engine, refit)
        return max(relative(fed.run(_arrays(feeds)), arrays) for feeds, arrays in expected)


def _error_of_copy(path: Path, backend: str, expected: Expected, refit: LoraLayout, **options: Any) -> float:
    """The same where the backend cannot refit: of a copy of the file that holds the LoRA."""
    feeds, arrays = expected
    constants, inputs = _constants(refit, _arrays(feeds))
    copied = path.with_suffix(".copy.onnx")
    try:
        refit_form.with_lora(path, constants, copied)
        with engines.open(copied, backend, **options) as engine:
            return relative(engine.run(inputs), arrays)
    finally:
        copied.unlink(missing_ok=True)


def _constants(refit: LoraLayout, feeds: Mapping[str, np.ndarray]) -> tuple[Arrays, Arrays]:
    """The LoRA of the first row as constants, and the other feeds."""
    others = {name: array for name, array in feeds.items() if name != "lora_q"}
    return refit.named({"lora_q": feeds["lora_q"][0]}), others


def lora_zero_error(graph: GraphSpec, opened: Mapping[str, Fed]) -> float:
    """Rows with a LoRA of zeros, against rows with some LoRA and a gate of zeros."""
    name, engine = _lora_of(graph), opened[graph.name]
    feeds = _arrays(graph.feeds(GRAPH_SIZES[1], seed=2))
    open_gate = feeds | {"gate": np.ones_like(feeds["gate"]), name: np.zeros_like(feeds[name])}
    return relative(engine.run(open_gate), engine.run(feeds | {"gate": np.zeros_like(feeds["gate"])}))


def broadcast_error(graph: GraphSpec, opened: Mapping[str, Fed]) -> float:
    """One LoRA for all rows, against the same one in every row."""
    name, engine = _lora_of(graph), opened[graph.name]
    feeds = _arrays(graph.feeds(GRAPH_SIZES[1], seed=3))
    one = feeds[name][:1]
    return relative(
        engine.run(feeds | {name: one}), engine.run(feeds | {name: one.repeat(len(feeds["gate"]), axis=0)})
    )


@torch.no_grad()
def solvers_error(source: Source) -> float:
    """Latents of every solver's table, against diffusers' pipeline with the scheduler that stands for it.

    No network takes part: in place of the UNet is a function of latents and timestep.
    """
    schedule = solvers.NoiseSchedule.named(**dataclasses.asdict(betas(source)))
    spacing, predicts = timestep_spacing(source), prediction_type(source)
    side = 8  # of the latents: diffusers takes pictures of multiples of 8 pixels
    noise = loop.initial_noise(0, (source.config("unet").in_channels, side, side), 1)

    def output(x: Tensor, timestep: Any) -> Tensor:
        return torch.sin(3 * x + float(timestep) / 300)

    worst = 0.0
    for solver in reference.SCHEDULERS:
        if (solver, predicts) == ("euler_ancestral", "sample"):  # which diffusers does not have
            continue
        table = solvers.table(solver, schedule, SOLVER_STEPS, predicts, spacing)
        unet = reference.Given(source.parts["unet"].skeleton, output)
        pipe = reference.pipeline(source, {}, solver, unet)
        right = reference.drawn(
            pipe, reference.nothing(source), torch.from_numpy(noise), SOLVER_STEPS, generator=_generator()
        )
        worst = max(worst, relative({"latents": _solved(table, output, noise)}, {"latents": right}))
    return worst


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _solved(table: SolverTable, output: Callable[[Tensor, Any], Tensor], noise: np.ndarray) -> np.ndarray:
    """Latents after the steps of a table, with the fresh noise that diffusers draws."""
    generator = _generator()

    def step(feeds: Mapping[str, Any]) -> Arrays:
        c, x = feeds["coefficients"], torch.from_numpy(feeds["latents"] * feeds["coefficients"][0])
        fresh = randn_tensor(x.shape, generator=generator).numpy() if table.stochastic else feeds["noise"]
        outputs = output(x, feeds["timestep"]).numpy()
        following = solvers.apply(c, feeds["latents"], outputs, feeds["previous"], fresh)
        return dict(zip(("next_latents", "denoised"), following, strict=True))

    return _denoised(step, table, noise)


def _denoised(
    step: Callable[[Mapping[str, Any]], Arrays], table: SolverTable, noise: np.ndarray
) -> np.ndarray:
    latents = noise * np.float32(table.initial_scale)
    trajectory = loop.Trajectory(table, latents, loop.noise_generators(0, len(noise)))
    for done in loop.denoise(step, trajectory):
        latents = done.latents
    return latents


@torch.no_grad()
def fused_step_error(source: Source, modules: Modules, opened: Mapping[str, Fed]) -> float:
    """One denoiser call for two images, against three calls of diffusers' UNet with a random LoRA."""
    layout, unet = source.layout, modules["unet"]
    rng = np.random.default_rng(4)
    lora = {
        name: 0.2 * rng.standard_normal((1, layout.size(name)), np.float32) for name in ("lora_q", "lora_kv")
    }
    shape = (2, source.config("unet").in_channels, source.latent_size, source.latent_size)
    feeds = {name: rng.standard_normal(shape, np.float32) for name in ("latents", "previous", "noise")}
    feeds |= {
        "timestep": np.array(601, np.float32),
        "coefficients": rng.uniform(0.5, 1, 7).astype(np.float32),
    }
    width = (1, source.max_tokens, source.text_width)
    texts = [Text(torch.from_numpy(rng.standard_normal(width, np.float32))) for _ in guidance.BRANCHES]
    s, kappa = 2.0, 0.8
    x = torch.from_numpy(feeds["latents"] * feeds["coefficients"][0])
    with reference.adapted(unet, layout, lora) as use:
        branches = reference.hybrid(s, kappa, *(Text(text.hidden.expand(2, -1, -1)) for text in texts))
        (guided,) = Guided(unet, branches, use)(x, torch.from_numpy(feeds["timestep"]))
    following = solvers.apply(
        feeds["coefficients"], feeds["latents"], guided.numpy(), feeds["previous"], feeds["noise"]
    )
    right = dict(zip(("next_latents", "denoised"), following, strict=True))
    step = _stepper(opened, lora, texts, guidance.hm_cfg_weights(s, kappa), images=2)
    return relative(step(feeds), right)


@torch.no_grad()
def loop_error(source: Source, modules: Modules, opened: Mapping[str, Fed], defaults: Defaults) -> float:
    """Photos and prompts to pictures, all in graphs, against diffusers' pipeline and PEFT."""
    rng = np.random.default_rng(5)
    size = source.config("image_encoder").image_size
    pixels = rng.uniform(-1, 1, (1, 3, size, size)).astype(np.float32)
    prompts = [f"a {source.token} toy on a beach", "a toy on a beach"]
    s, kappa = defaults.guidance_scale, defaults.kappa
    schedule = solvers.NoiseSchedule.named(**dataclasses.asdict(betas(source)))
    table = solvers.table(
        LOOP_SOLVER, schedule, LOOP_STEPS, prediction_type(source), timestep_spacing(source)
    )
    noise = loop.initial_noise(0, (source.config("unet").in_channels, *(source.latent_size,) * 2), 1)

    features = modules["image_encoder"](torch.from_numpy(pixels)).last_hidden_state
    lora = {name: vector.numpy() for name, vector in modules["weight_decoder"](features).items()}
    pipe = reference.pipeline(source, modules, LOOP_SOLVER)
    uncond, texts = reference.encoded_empty(pipe), reference.encoded(pipe, prompts)
    branches = reference.hybrid(s, kappa, uncond, texts.of(0), texts.of(1))
    with reference.adapted(modules["unet"], source.layout, lora) as use:
        pipe.register_modules(unet=Guided(modules["unet"], branches, use))
        right = {
            name: reference.drawn(pipe, uncond, torch.from_numpy(noise), LOOP_STEPS, output)
            for name, output in (("latents", "latent"), ("pictures", "pt"))
        }

    seen = opened["image_encoder"].run({"pixels": pixels})
    found_lora = opened["weight_decoder"].run(seen)
    ids = _arrays(expected.token_ids(source, ["", *prompts]))
    hidden = torch.from_numpy(opened["text_encoder"].run(ids)["hidden_states"])
    weights = guidance.hm_cfg_weights(s, kappa)
    step = _stepper(opened, found_lora, [Text(one) for one in hidden.split(1)], weights, images=1)
    latents = _denoised(step, table, noise)
    decoded = opened["vae_decoder"].run({"latents": latents})["pixels"]
    return relative({"latents": latents, "pictures": np.clip(decoded / 2 + 0.5, 0, 1)}, right)


def _stepper(
    opened: Mapping[str, Fed],
    lora: Arrays,
    texts: Sequence[Text],
    weights: Sequence[float],
    images: int,
) -> Callable[[Mapping[str, Any]], Arrays]:
    """The step of `sampling.denoise` on the graphs.

    lora: packed vectors [1, N]; texts: of each branch's prompt.
    """
    gate = np.repeat(np.array([0, 1, 0], np.float32), images)
    text = np.concatenate([branch.hidden.numpy().repeat(images, axis=0) for branch in texts])
    resident = opened["context"].run({"hidden_states": text, "gate": gate, "lora_kv": lora["lora_kv"]})
    resident |= {"gate": gate, "lora_q": lora["lora_q"], "guidance": np.array(weights, np.float32)}
    return lambda feeds: opened["denoiser"].run({**feeds, **resident})


def _lora_of(graph: GraphSpec) -> str:
    """The LoRA input of a graph, or ""."""
    return next((spec.name for spec in graph.inputs if spec.name.startswith("lora_")), "")


def _arrays(feeds: Mapping[str, Tensor]) -> Arrays:
    return {name: tensor.numpy() for name, tensor in feeds.items()}


def allowed(graph: str, kind: str) -> float:
    """The largest relative error of a graph alone, in fp32, fp16, bf16 or with weights in int8."""
    return max(TOLERANCE[graph], REDUCED[kind])


def checked(rung: str, error: float, allowed: float) -> float:
    """The error of a rung, where it is within what is allowed.

    Raises:
        ParityError: it is not.
    """
    if not error <= allowed:
        why = f"relative error {error:.2g}; allowed is {allowed:g}"
        do = "try the pinned versions of torch, onnxscript and onnxruntime: pip install 'hyperrt[export]'"
        raise ParityError(f"the graphs do not compute what the model does: {rung}", why, do)
    return error
