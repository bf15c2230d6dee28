"""Compares the graphs, as the runtime will run them, with diffusers and PEFT.

Verification levels:
    none    no check
    graphs  each graph alone, right after it was written, so that one network is in memory at a time; solvers
    full    all checks, at the end, with all networks in memory: for the tiny family

Each check gives a relative error, max |result - expected| / max |expected|, which goes into the manifest. An
error above its tolerance ends the export.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from hyperrt import engines
from hyperrt.bundle.bundle import Defaults
from hyperrt.engines.backends import BACKENDS
from hyperrt.engines.base import Engine
from hyperrt.export import expected, reference, refit_form
from hyperrt.export.errors import ParityError
from hyperrt.export.expected import Expected
from hyperrt.export.graph_specs import GraphSpec, Modules
from hyperrt.export.reference import Guided, Text
from hyperrt.export.source import Source, betas, prediction_type, timestep_spacing
from hyperrt.lora.layout import LoraLayout
from hyperrt.plans.compare import relative
from hyperrt.sampling import guidance, loop, solvers
from hyperrt.sampling.solvers import SolverTable

# check -> largest relative error allowed     # measured: tiny, random weights, ONNX Runtime 1.32 on a CPU
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
# Largest relative error of a graph by its precision, or of one with int8 weights.
REDUCED = {"fp32": 1e-4, "fp16": 1e-2, "bf16": 5e-2, "int8": 2e-1}
# Backend that checks each precision. CPUs have no fp16 arithmetic, so fp16 graphs are checked in fp32 and
# show only the rounding of their weights.
RUN_BY = {
    "fp32": {"backend": "onnxruntime"},
    "fp16": {"backend": "openvino", "precision": "f32"},
    "bf16": {"backend": "openvino"},
}
GRAPH_SIZES = (
    {"photos": 1, "prompts": 1, "images": 1, "branches": 3, "rows": 3, "subjects": 1, "h": 8, "w": 8},
    {"photos": 3, "prompts": 3, "images": 2, "branches": 2, "rows": 4, "subjects": 4, "h": 6, "w": 10},
)
# For large families: enough rows to notice that two are mixed up, few enough for the memory.
LARGE_SIZES = (
    {"photos": 2, "prompts": 2, "images": 1, "branches": 2, "rows": 2, "subjects": 2, "h": 16, "w": 24},
)
LOOP_STEPS, SOLVER_STEPS = 10, 6
LOOP_SOLVER = "dpmpp_2m"

Arrays = dict[str, np.ndarray]
Run = Callable[[Mapping[str, np.ndarray]], Arrays]  # inputs of a graph, by name => its outputs


def run_checks(
    source: Source,
    graphs: Sequence[GraphSpec],
    modules: Modules,
    folder: Path,
    defaults: Defaults,
    start_check: Callable[[str], None],
) -> dict[str, float]:
    """Runs the checks of level "full"; returns check -> relative error.

    Args:
        source: what the graphs were made from.
        graphs: as `graph_specs.build` made them.
        modules: the source's parts as they were read, in fp32, with weights as they are stored.
        folder: holds NAME.onnx of each graph.
        defaults: give the guidance of the loop.
        start_check: called with the name of each check before it.

    Raises:
        ParityError: an error is above its tolerance.
        engines.EngineError: ONNX Runtime is missing or cannot run a graph.
    """
    with contextlib.ExitStack() as stack:
        runs: dict[str, Run] = {}
        for graph in graphs:
            engine = engines.open(folder / f"{graph.name}.onnx", "onnxruntime")
            runs[graph.name] = run_of(stack.enter_context(engine), graph.refit)
        adapted = [graph for graph in graphs if _lora_of(graph)]
        checks: dict[str, Callable[[], float]] = {
            graph.name: functools.partial(_graph_error, graph, source, modules, runs) for graph in graphs
        }
        checks["solvers"] = lambda: solvers_error(source)
        checks["fused_step"] = lambda: fused_step_error(source, modules, runs)
        checks["lora_zero"] = lambda: max(lora_zero_error(graph, runs) for graph in adapted)
        checks["subjects_broadcast"] = lambda: max(broadcast_error(graph, runs) for graph in adapted)
        checks["loop"] = lambda: loop_error(source, modules, runs, defaults)
        errors = {}
        for name, measure in checks.items():
            start_check(name)
            errors[name] = checked(name, measure(), TOLERANCE[name])
        return errors


def run_of(engine: Engine, refit: LoraLayout | None) -> Run:
    """Runs an engine on a packed LoRA, also where the LoRA enters by a refit.

    refit: layout of the LoRA, if its factors are constants of the graph. These then get the first row's LoRA.
    """

    def run(feeds: Mapping[str, np.ndarray]) -> Arrays:
        constants, inputs = _constants(refit, feeds)
        engine.refit(constants)
        return engine.run(inputs)

    return engine.run if refit is None else run


def _graph_error(graph: GraphSpec, source: Source, modules: Modules, runs: Mapping[str, Run]) -> float:
    results = expected.of_graph(graph, source, modules, GRAPH_SIZES)
    return max(relative(runs[graph.name](_arrays(feeds)), arrays) for feeds, arrays in results)


def graph_error(
    path: Path,
    *,
    backend: str,
    expected: Sequence[Expected],
    refit: LoraLayout | None = None,
    precision: str | None = None,
) -> float:
    """The relative error of a graph's file on a backend.

    expected: inputs and results, as `expected.of_graph` returns them.
    refit: layout of the LoRA, if its factors are constants of the file.
    precision: of the arithmetic, for backends that take one.
    """
    options = {} if precision is None else {"precision": precision}
    if refit is not None and not BACKENDS[backend].refits:
        return max(_error_of_copy(path, backend, pair, refit, **options) for pair in expected)
    with engines.open(path, backend, **options) as engine:
        run = run_of(engine, refit)
        return max(relative(run(_arrays(feeds)), arrays) for feeds, arrays in expected)


def _error_of_copy(path: Path, backend: str, expected: Expected, refit: LoraLayout, **options: Any) -> float:
    """The same for a backend that cannot refit: runs a copy of the file that holds the LoRA."""
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
    """The first row's LoRA as constants, and the other feeds."""
    others = {name: array for name, array in feeds.items() if name != "lora_q"}
    return refit.named({"lora_q": feeds["lora_q"][0]}), others


def lora_zero_error(graph: GraphSpec, runs: Mapping[str, Run]) -> float:
    """Compares rows with a LoRA of zeros with rows that have a random LoRA and a gate of zeros."""
    name, run = _lora_of(graph), runs[graph.name]
    feeds = _arrays(graph.feeds(GRAPH_SIZES[1], seed=2))
    open_gate = feeds | {"gate": np.ones_like(feeds["gate"]), name: np.zeros_like(feeds[name])}
    return relative(run(open_gate), run(feeds | {"gate": np.zeros_like(feeds["gate"])}))


def broadcast_error(graph: GraphSpec, runs: Mapping[str, Run]) -> float:
    """Compares one LoRA for all rows with the same LoRA in every row."""
    name, run = _lora_of(graph), runs[graph.name]
    feeds = _arrays(graph.feeds(GRAPH_SIZES[1], seed=3))
    lora = feeds[name][:1]
    in_every_row = lora.repeat(len(feeds["gate"]), axis=0)
    return relative(run(feeds | {name: lora}), run(feeds | {name: in_every_row}))


@torch.no_grad()
def solvers_error(source: Source) -> float:
    """Compares the latents of every solver's table with those of diffusers' pipeline and its scheduler.

    In place of the UNet is a function of latents and timestep.
    """
    schedule = solvers.NoiseSchedule.named(**dataclasses.asdict(betas(source)))
    spacing, predicts = timestep_spacing(source), prediction_type(source)
    side = 8  # in latents: diffusers takes pictures of multiples of 8 pixels
    noise = loop.initial_noise(0, (source.config("unet").in_channels, side, side), 1)

    def output(x: Tensor, timestep: Any) -> Tensor:
        return torch.sin(3 * x + float(timestep) / 300)

    worst = 0.0
    for solver in reference.SCHEDULERS:
        if (solver, predicts) == ("euler_ancestral", "sample"):  # diffusers does not have this pair
            continue
        table = solvers.table(solver, schedule, SOLVER_STEPS, predicts, spacing)
        unet = reference.Given(source.parts["unet"].skeleton, output)
        pipe = reference.pipeline(source, {}, solver, unet)
        latents = reference.drawn(
            pipe, reference.no_text(source), torch.from_numpy(noise), SOLVER_STEPS, generator=_generator()
        )
        worst = max(worst, relative({"latents": _solved(table, output, noise)}, {"latents": latents}))
    return worst


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _solved(table: SolverTable, output: Callable[[Tensor, Any], Tensor], noise: np.ndarray) -> np.ndarray:
    """Latents after all steps of a table, with the fresh noise that diffusers draws."""
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
def fused_step_error(source: Source, modules: Modules, runs: Mapping[str, Run]) -> float:
    """Compares one denoiser call for two images with three calls of diffusers' UNet, with a random LoRA."""
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
    results = dict(zip(("next_latents", "denoised"), following, strict=True))
    step = _step_of(runs, lora, texts, guidance.hm_cfg_weights(s, kappa), images=2)
    return relative(step(feeds), results)


@torch.no_grad()
def loop_error(source: Source, modules: Modules, runs: Mapping[str, Run], defaults: Defaults) -> float:
    """Compares pictures of photos and prompts that the graphs draw with those of diffusers and PEFT."""
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
        results = {
            name: reference.drawn(pipe, uncond, torch.from_numpy(noise), LOOP_STEPS, output)
            for name, output in (("latents", "latent"), ("pictures", "pt"))
        }

    lora = runs["weight_decoder"](runs["image_encoder"]({"pixels": pixels}))
    ids = _arrays(expected.token_ids(source, ["", *prompts]))
    hidden = torch.from_numpy(runs["text_encoder"](ids)["hidden_states"])
    weights = guidance.hm_cfg_weights(s, kappa)
    step = _step_of(runs, lora, [Text(row) for row in hidden.split(1)], weights, images=1)
    latents = _denoised(step, table, noise)
    decoded = runs["vae_decoder"]({"latents": latents})["pixels"]
    return relative({"latents": latents, "pictures": np.clip(decoded / 2 + 0.5, 0, 1)}, results)


def _step_of(
    runs: Mapping[str, Run],
    lora: Arrays,
    texts: Sequence[Text],
    weights: Sequence[float],
    images: int,
) -> Callable[[Mapping[str, Any]], Arrays]:
    """The step function of `loop.denoise` on the graphs.

    lora: packed vectors [1, N]; texts: the encoded prompt of each branch.
    """
    gate = np.repeat(np.array([0, 1, 0], np.float32), images)
    text = np.concatenate([branch.hidden.numpy().repeat(images, axis=0) for branch in texts])
    resident = runs["context"]({"hidden_states": text, "gate": gate, "lora_kv": lora["lora_kv"]})
    resident |= {"gate": gate, "lora_q": lora["lora_q"], "guidance": np.array(weights, np.float32)}
    return lambda feeds: runs["denoiser"]({**feeds, **resident})


def _lora_of(graph: GraphSpec) -> str:
    """The name of a graph's LoRA input, or ""."""
    return next((spec.name for spec in graph.inputs if spec.name.startswith("lora_")), "")


def _arrays(feeds: Mapping[str, Tensor]) -> Arrays:
    return {name: tensor.numpy() for name, tensor in feeds.items()}


def allowed(graph: str, reduction: str) -> float:
    """The tolerance of a graph, by its precision ("fp32", "fp16", "bf16") or for "int8" weights."""
    return max(TOLERANCE[graph], REDUCED[reduction])


def checked(check: str, error: float, allowed: float) -> float:
    """Returns the error of a check.

    Raises:
        ParityError: it is above what is allowed, or NaN.
    """
    if not error <= allowed:
        why = f"relative error {error:.2g}; allowed is {allowed:g}"
        do = "try the pinned versions of torch, onnxscript and onnxruntime: pip install 'hyperrt[export]'"
        raise ParityError(f"the graphs do not compute what the model does: {check}", why, do)
    return error
