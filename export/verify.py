"""The parity ladder: each rung compares the graphs, as the runtime will run them, with PyTorch in fp32.

    none    nothing is compared
    graphs  each graph alone, right after it was written, so that one network is in memory at a time
    full    all rungs, at the end, with all networks in memory: for the tiny family

The figures are relative errors, max |found - expected| / max |expected|, and go into the manifest. A rung
above its tolerance ends the export.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hyperrt import engines, guidance, sampling, solvers
from hyperrt.bundle import Defaults
from hyperrt.engines.base import Engine
from hyperrt.export import reference, refit_form
from hyperrt.export.errors import ParityError
from hyperrt.export.graphs import Graph
from hyperrt.export.source import Source, betas, prediction_type
from hyperrt.graphs import REFITTING
from hyperrt.lora import LoraLayout
from hyperrt.parity import relative
from hyperrt.training.base import tokens

LEVELS = ("none", "graphs", "full")
# rung -> largest relative error allowed     # measured: tiny, random weights, ONNX Runtime 1.32 on a CPU
TOLERANCE = {
    "image_encoder": 1e-4,  # 6e-7
    "weight_decoder": 1e-4,  # 1e-7
    "image_prompt": 1e-4,
    "text_encoder": 1e-4,  # 6e-7
    "context": 1e-4,  # 2e-7
    "denoiser": 1e-4,  # 5e-6; under two LoRAs, one of them per row
    "vae_decoder": 1e-4,  # 2e-6
    "fused_step": 1e-4,  # one call against three calls of diffusers' UNet, the LoRA merged
    "lora_zero": 0.0,  # 0: a LoRA of zeros, and a gate of zeros, are the base model to the bit
    "subjects_broadcast": 1e-6,  # 0: one LoRA for all rows against the same one in every row
    "loop": 1e-3,  # photos and prompts to pixels, ten steps of HM-CFG
}
RUNGS = {"none": (), "graphs": tuple(TOLERANCE)[:7], "full": tuple(TOLERANCE)}
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
LOOP_STEPS = 10

Arrays = dict[str, np.ndarray]
Progress = Callable[[str], None]


def ladder(
    source: Source,
    graphs: Sequence[Graph],
    modules: Mapping[str, nn.Module],
    folder: Path,
    defaults: Defaults,
    progress: Progress,
) -> dict[str, float]:
    """Climb every rung; returns rung -> relative error.

    Args:
        source: what the graphs were made from.
        graphs: as `graphs.build` made them.
        modules: its parts, fp32, weights as they are stored.
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
        torchs = Torch(
            source, copy.deepcopy(modules)
        )  # as they are: `graph.make` replaces attention and more
        rungs: dict[str, Callable[[], float]] = {
            graph.name: lambda graph=graph: max(
                relative(opened[graph.name].run(_arrays(feeds)), expected)
                for feeds, expected in expectations(graph, modules, GRAPH_SIZES)
            )
            for graph in graphs
        }
        rungs["fused_step"] = lambda: fused_step_error(torchs, opened)
        rungs["lora_zero"] = lambda: max(
            lora_zero_error(graph, opened) for graph in graphs if _lora_of(graph)
        )
        rungs["subjects_broadcast"] = lambda: max(
            broadcast_error(graph, opened) for graph in graphs if _lora_of(graph)
        )
        rungs["loop"] = lambda: loop_error(torchs, opened, defaults)
        figures = {}
        for name, measure in rungs.items():
            progress(name)
            figures[name] = checked(name, measure(), TOLERANCE[name])
        return figures


@dataclass(frozen=True)
class Torch:
    """The models in PyTorch, for the rungs of several graphs."""

    source: Source
    modules: Mapping[str, Any]


@dataclass(frozen=True)
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


Expected = tuple[dict[str, Tensor], Arrays]


def expectations(
    graph: Graph, modules: Mapping[str, nn.Module], sizes: Sequence[Mapping[str, int]]
) -> list[Expected]:
    """Random inputs of these sizes, and what the graph's module makes of them in fp32.

    modules: the graph's parts; they are made fp32 in place, which changes no weight.
    """
    module = graph.make({name: modules[name].float() for name in graph.parts})
    found = []
    for seed, size in enumerate(sizes):
        feeds = graph.feeds({**size, "subjects": 1} if graph.refit else size, seed)
        with torch.no_grad():
            results = module(**feeds)
        results = results if isinstance(results, tuple) else (results,)
        arrays = {spec.name: tensor.numpy() for spec, tensor in zip(graph.outputs, results, strict=True)}
        found.append((feeds, arrays))
    return found


def graph_error(
    path: Path,
    *,
    backend: str,
    expected: Sequence[Expected],
    refit: LoraLayout | None = None,
    **options: Any,
) -> float:
    """A graph's file on a backend, against what `expectations` found.

    refit: layout of the LoRA, where its factors are constants of the file.
    """
    if refit is not None and backend not in REFITTING:
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


def lora_zero_error(graph: Graph, opened: Mapping[str, Fed]) -> float:
    """Rows with a LoRA of zeros, against rows with some LoRA and a gate of zeros."""
    name, engine = _lora_of(graph), opened[graph.name]
    feeds = _arrays(graph.feeds(GRAPH_SIZES[1], seed=2))
    open_gate = feeds | {"gate": np.ones_like(feeds["gate"]), name: np.zeros_like(feeds[name])}
    return relative(engine.run(open_gate), engine.run(feeds | {"gate": np.zeros_like(feeds["gate"])}))


def broadcast_error(graph: Graph, opened: Mapping[str, Fed]) -> float:
    """One LoRA for all rows, against the same one in every row."""
    name, engine = _lora_of(graph), opened[graph.name]
    feeds = _arrays(graph.feeds(GRAPH_SIZES[1], seed=3))
    one = feeds[name][:1]
    return relative(
        engine.run(feeds | {name: one}), engine.run(feeds | {name: one.repeat(len(feeds["gate"]), axis=0)})
    )


def fused_step_error(torchs: Torch, opened: Mapping[str, Fed]) -> float:
    """One denoiser call for two images, against three calls of diffusers' UNet with a merged random LoRA."""
    source, base_unet = torchs.source, torchs.modules["unet"]
    layout, unet_config = source.layout, source.config("unet")
    rng = np.random.default_rng(4)
    lora = {name: 0.2 * rng.standard_normal(layout.size(name), np.float32) for name in ("lora_q", "lora_kv")}
    shape = (2, unet_config.in_channels, source.latent_size, source.latent_size)
    feeds = {name: rng.standard_normal(shape, np.float32) for name in ("latents", "previous", "noise")}
    feeds |= {
        "timestep": np.array(601, np.float32),
        "coefficients": rng.uniform(0.5, 1, 7).astype(np.float32),
    }
    hidden = [
        torch.from_numpy(rng.standard_normal(_hidden_shape(source), np.float32)) for _ in guidance.BRANCHES
    ]
    weights = guidance.hm_cfg_weights(2.0, 0.8)
    unet = reference.plain(base_unet)
    expected = reference.stepper(unet, reference.personalised(unet, layout, lora), hidden, weights)(feeds)
    return relative(_stepper(opened, lora, hidden, weights, images=2)(feeds), expected)


def loop_error(torchs: Torch, opened: Mapping[str, Fed], defaults: Defaults) -> float:
    """Photos and prompts to pixels, all in graphs, against all in PyTorch."""
    source, modules = torchs.source, torchs.modules
    vae = modules["vae"]
    rng = np.random.default_rng(5)
    size = source.config("image_encoder").image_size
    pixels = rng.uniform(-1, 1, (1, 3, size, size)).astype(np.float32)
    text = ["", f"a {source.token} toy on a beach", "a toy on a beach"]
    ids = tokens(source.tokenizer, text)
    weights = guidance.hm_cfg_weights(defaults.guidance_scale, defaults.kappa)
    with torch.no_grad():
        features = modules["image_encoder"](torch.from_numpy(pixels)).last_hidden_state
        packed = modules["weight_decoder"](features)
        hidden = modules["text_encoder"](ids).last_hidden_state.split(1)
    unet = reference.plain(modules["unet"])
    lora = {name: vector[0].numpy() for name, vector in packed.items()}
    subject = reference.personalised(unet, source.layout, lora)
    expected = _sampled(source, reference.stepper(unet, subject, hidden, weights))
    with torch.no_grad():
        z = torch.from_numpy(expected) / vae.config.scaling_factor + (vae.config.get("shift_factor") or 0)
        picture = vae.decode(z).sample.numpy()

    seen = opened["image_encoder"].run({"pixels": pixels})
    found_lora = {name: vector[0] for name, vector in opened["weight_decoder"].run(seen).items()}
    found_text = opened["text_encoder"].run({"input_ids": ids.numpy()})["hidden_states"]
    found_hidden = torch.from_numpy(found_text).split(1)
    latents = _sampled(source, _stepper(opened, found_lora, found_hidden, weights, images=1))
    found = {"latents": latents, **opened["vae_decoder"].run({"latents": latents})}
    return relative(found, {"latents": expected, "pixels": picture})


def _sampled(source: Source, step: Callable[[Mapping[str, np.ndarray]], Arrays]) -> np.ndarray:
    """Latents [1, C, h, w] after LOOP_STEPS steps of DPM-Solver++(2M)."""
    schedule = solvers.NoiseSchedule.named(**dataclasses.asdict(betas(source)))
    table = solvers.table("dpmpp_2m", schedule, LOOP_STEPS, prediction_type(source))
    channels = source.config("unet").in_channels
    noise = sampling.initial_noise(0, (channels, source.latent_size, source.latent_size), 1)
    latents = noise * np.float32(table.initial_scale)
    for done in sampling.denoise(step, table, latents, sampling.noise_generators(0, 1)):
        latents = done.latents
    return latents


def _stepper(
    opened: Mapping[str, Fed],
    lora: Arrays,
    hidden: Sequence[Tensor],
    weights: Sequence[float],
    images: int,
) -> Callable[[Mapping[str, np.ndarray]], Arrays]:
    """The step of `sampling.denoise` on the graphs.

    lora: packed vectors [N]; hidden: per branch [1, L, D].
    """
    gate = np.repeat(np.array([0, 1, 0], np.float32), images)
    text = np.concatenate([branch.numpy().repeat(images, axis=0) for branch in hidden])
    resident = opened["context"].run({"hidden_states": text, "gate": gate, "lora_kv": lora["lora_kv"][None]})
    resident |= {"gate": gate, "lora_q": lora["lora_q"][None], "guidance": np.array(weights, np.float32)}
    return lambda feeds: opened["denoiser"].run({**feeds, **resident})


def _hidden_shape(source: Source) -> tuple[int, int, int]:
    return 1, source.max_tokens, source.text_width


def _lora_of(graph: Graph) -> str:
    """The LoRA input of a graph, or ""."""
    return next((spec.name for spec in graph.inputs if spec.name.startswith("lora_")), "")


def _arrays(feeds: Mapping[str, Tensor]) -> Arrays:
    return {name: tensor.numpy() for name, tensor in feeds.items()}


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
